"""What stops a run: the trainer raises these, and the command line explains them."""


class TrainingFailed(RuntimeError):
    """A training stopped before its end. Its `results` attribute holds what had been learnt and measured by then."""


class RunBusy(ValueError):
    """Another process trains this very run."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a training between two batches; `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
