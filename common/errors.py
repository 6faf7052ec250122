"""What stops a run: the solver and the trainer raise these, and the command line explains them."""


class SolverError(RuntimeError):
    """A solve could not go on, for example because its step became too small for the tolerances."""


class TrainingFailed(RuntimeError):
    """A training stopped before its end. Its `results` attribute holds what had been learnt and measured by then."""


class RunBusy(ValueError):
    """Another process trains this very run."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a training between two batches; `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
