"""What lets a run stop anywhere and go on, for the trainer: the run's state, its file, and signals that wait."""

import contextlib
import hashlib
import io
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from torchadjoint.arguments import shown

from . import files
from .errors import Interrupted, RunBusy, TrainingFailed
from .measuring import Pass
from .progress import say
from .provenance import Provenance
from .records import plain, read_as
from .results import Epoch, HistoryEntry, Results

SCHEMA = 1
RESUME = "do the same with resume=True (on the command line: --resume)"
"""How to go on, as errors say it."""
START_ANEW = "delete it to start from the beginning"
DIGEST_SIZE = hashlib.sha256().digest_size
ECHO_SECONDS = 1.0


class Checkpoint:
    """The file of one unfinished run, which one process at a time holds (inside `with`).

    The file is the SHA-256 of what follows, then what `torch.save` writes: the state with the run's `identity`. That
    and the digest of the data's split, which is in the state, must be the same for the run to go on.

    Raises:
        RunBusy: on entering, if another process holds it.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path = path
        self.identity = identity
        self._lock = FileLock(f"{path}.lock")

    def __enter__(self) -> "Checkpoint":
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunBusy(
                f"another process is training this very run and holds {self.path}.lock: "
                "wait for it, or choose another seed or results_dir"
            ) from None
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    def write(self, state: dict[str, Any]) -> None:
        """Replaces the file; killed at any moment, it leaves the old file or the new one, whole.

        Raises:
            TrainingFailed: if there is no room, for example; the old file stays.
        """
        buffer = io.BytesIO()
        torch.save({"schema": SCHEMA, "identity": self.identity, "state": state}, buffer)
        content = buffer.getbuffer()
        try:
            files.replace(self.path, hashlib.sha256(content).digest(), content)
        except OSError as error:
            raise TrainingFailed(
                f"the checkpoint {self.path} cannot be written ({error.strerror}), and what it held before is kept: "
                f"make room, then {RESUME}"
            ) from error

    def restore(self, state: "State") -> bool:
        """Puts what the file holds into `state`; False if there is no file.

        Raises:
            ValueError: if the file is damaged, or of a run with another identity or of other data; it says what
                differs.
        """
        if not self.path.exists():
            return False
        content = self.path.read_bytes()
        digest, content = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(f"the checkpoint {self.path} is damaged: {START_ANEW}")
        with self._foreign_content_named():
            stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            schema, then = stored["schema"], dict(stored["identity"])
            if "split" not in self.identity:
                then.pop("split", None)  # where files from before have the digest
            # Not by the name of a setting.
            then["digest of the data"] = stored["state"]["provenance"]["split"]
        if schema != SCHEMA:
            raise ValueError(f"the checkpoint {self.path} is of another version: {START_ANEW}")
        now = self.identity | {"digest of the data": state.results.provenance.split}
        differences = [
            f"{name} was {shown(then.get(name))} and is {shown(now.get(name))}"
            for name in sorted(then.keys() | now.keys(), key=str)
            if then.get(name) != now.get(name)
        ]
        if differences:
            raise ValueError(
                f"the unfinished run in {self.path} is another one, so it cannot be resumed: {'; '.join(differences)}: "
                f"{START_ANEW}"
            )
        with self._foreign_content_named():
            state.load_state_dict(stored["state"])
        return True

    @contextlib.contextmanager
    def _foreign_content_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds: the file is whole, but another program wrote it
            raise ValueError(
                f"the checkpoint {self.path} holds something else than a run of this version "
                f"({type(error).__name__}: {shown(str(error))}): {START_ANEW}"
            ) from error

    def delete(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


@dataclass
class State:
    """All that the rest of a training depends on: what a checkpoint holds."""

    results: Results
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    epoch: int = 1
    training: Pass = field(default_factory=Pass)
    order: Tensor | None = None
    """The state of the generator that shuffles the batches, at the epoch's start."""
    best_loss: float = math.inf
    best_state: dict[str, Tensor] | None = None
    plateau_loss: float = math.inf
    plateau_start: int = 0

    PLAIN = ("epoch", "order", "best_loss", "best_state", "plateau_loss", "plateau_start")

    def state_dict(self) -> dict[str, Any]:
        on_gpu = torch.cuda.is_initialized()
        return {
            "plain": {name: getattr(self, name) for name in self.PLAIN},
            "training": plain(self.training),
            "epochs": plain(self.results.epochs),
            "history": plain(self.results.history),
            "start_time": self.results.start_time,
            "provenance": plain(self.results.provenance),
            "model": self.results.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state_all() if on_gpu else [],
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        for name in self.PLAIN:
            setattr(self, name, stored["plain"][name])
        if type(self.epoch) is not int or self.epoch < 1:
            raise ValueError(f"its epoch is {self.epoch}")
        self.training = read_as(Pass, stored["training"])
        self.results.epochs = read_as(list[Epoch], stored["epochs"])
        self.results.history = read_as(list[HistoryEntry], stored["history"])
        self.results.start_time = stored["start_time"]
        self.results.provenance = self.results.provenance.after(read_as(Provenance, stored["provenance"]))
        self.results.model.load_state_dict(stored["model"])
        self.optimiser.load_state_dict(stored["optimiser"])
        self.scheduler.load_state_dict(stored["scheduler"])
        torch.set_rng_state(stored["random"])
        for index, random in enumerate(stored["random_gpu"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(random, index)
        if self.order is not None:
            self.results.train_dataloader.generator.set_state(self.order)


class DelayedSignals:
    """Inside `with`, in the main thread, the first SIGINT or SIGTERM waits for `check`; a second acts at once.

    A second SIGTERM within `ECHO_SECONDS` counts as the first: a service manager or a cluster that stops a sweep also
    signals its workers, as the sweep does.
    """

    def __init__(self):
        self.received = None
        self._since = 0.0
        self._handlers = {}

    def __enter__(self) -> "DelayedSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Of a signal that is ignored, as in a shell's background job, nothing changes.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(self, *_) -> None:
        self._restore(*self._handlers)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._handlers:  # else a signal that came in between has restored it
                signal.signal(number, self._handlers.pop(number))

    def _receive(self, number, frame) -> None:
        if self.received is not None:
            if time.monotonic() - self._since > ECHO_SECONDS:
                self._restore(number)
                signal.raise_signal(number)
            return
        self.received, self._since = number, time.monotonic()
        self._restore(*(other for other in list(self._handlers) if (number, other) != (signal.SIGTERM, signal.SIGTERM)))
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        say(f"\n{name}: stops as soon as the batch is finished; a second one stops at once", sys.stderr)

    def check(self, message: str) -> None:
        """Raises Interrupted with `message` if a signal came."""
        if self.received is not None:
            raise Interrupted(message, self.received)
