"""What a user sees of a training: a bar on a terminal, else a line for each epoch; the trainer reports to it."""

import contextlib
import sys
import time
from typing import TextIO

from tqdm.auto import tqdm

from .results import Epoch


def say(sentence: str, stream: TextIO | None) -> None:
    """Prints a sentence for people. That a stream is full or closed is no reason for a run to fail."""
    # A signal's handler that prints while its own process does is refused with RuntimeError.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if stream is not None:
            print(sentence, file=stream, flush=True)


class Progress:
    """How far a training is, in batches of all its passes, shown on stderr; the bar is closed at the end of `with`.

    Args:
        done: batches done before, in a run that is resumed.
        total: all batches, those done before among them.
    """

    def __init__(self, done: int, total: int):
        self.done = self.done_before = done
        self.total = total
        self.started = time.perf_counter()
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="batch", disable=not on_terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def batch(self, doing: str, numbers: dict[str, float]) -> None:
        """A batch is done."""
        self.done += 1
        self.bar.set_description_str(doing, refresh=False)
        self.bar.set_postfix(numbers, refresh=False)
        self.bar.update()

    def epoch(self, epoch: Epoch, *, num_epochs: int, num_batches: int) -> None:
        """The training steps of an epoch are done."""
        accuracy = f", accuracy {epoch.accuracy:.3f}" if "accuracy" in epoch else ""
        forward, backward = (round(number / num_batches) for number in (epoch.forward_nfe, epoch.backward_nfe))
        self._line(
            f"epoch {epoch.epoch} of {num_epochs}: loss {epoch.loss:.5g}{accuracy}, NFE per step {forward} forward, "
            f"{backward} backward, {epoch.seconds:.1f} s; {self._time_left()}"
        )

    def measuring(self, num_batches: int) -> None:
        """Training has ended, perhaps early; what is left is to measure so many batches."""
        self.total = self.bar.total = self.done + num_batches
        self._line(f"measuring on all parts of the data: {num_batches} batches; {self._time_left()}")

    def _line(self, sentence: str) -> None:
        if self.bar.disable:
            say(sentence, sys.stderr)

    def _time_left(self) -> str:
        seconds = (time.perf_counter() - self.started) / max(1, self.done - self.done_before)
        return f"about {tqdm.format_interval(seconds * (self.total - self.done))} left"
