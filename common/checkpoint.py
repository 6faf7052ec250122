"""What lets a run stop anywhere and go on: its checkpoint file, and signals that wait for it; the trainer uses both."""

import hashlib
import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import Interrupted, RunBusy

SCHEMA = 1
DIGEST_SIZE = hashlib.sha256().digest_size


class Checkpoint:
    """The file of one unfinished run, which one process at a time holds (inside `with`).

    The file is the SHA-256 of what follows, then what `torch.save` writes: the state with the run's `identity`, which
    is all that must be the same for the run to go on.

    Raises:
        RunBusy: on entering, if another process holds it.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path = path
        self.identity = identity
        self._partial = path.with_name(f"{path.name}.partial")
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
        """Replaces the file; killed at any moment, it leaves the old file or the new one, whole."""
        buffer = io.BytesIO()
        torch.save({"schema": SCHEMA, "identity": self.identity, "state": state}, buffer)
        content = buffer.getbuffer()
        with self._partial.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._partial, self.path)

    def read(self) -> dict[str, Any] | None:
        """The state, its tensors on the CPU; None if there is no file.

        Raises:
            ValueError: if the file is damaged, or of a run with another identity; it says what differs.
        """
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        digest, content = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(f"the checkpoint {self.path} is damaged: delete it to start from the beginning")
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if stored["schema"] != SCHEMA:
            raise ValueError(f"the checkpoint {self.path} is of another version: delete it to start from the beginning")
        then, now = stored["identity"], self.identity
        differences = [
            f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if differences:
            raise ValueError(
                f"the unfinished run in {self.path} is another one, so it cannot be resumed: {'; '.join(differences)}"
            )
        return stored["state"]

    def delete(self) -> None:
        """Removes the file, and what a kill in mid-write may have left."""
        self.path.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)


class DelayedSignals:
    """Inside `with`, in the main thread, the first SIGINT or SIGTERM waits for `check`; a second acts at once."""

    def __init__(self):
        self.received = None
        self._handlers = {}

    def __enter__(self) -> "DelayedSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Of a signal that is ignored, as in a shell's background job, nothing changes.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(self, *_) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _receive(self, number, frame) -> None:
        self.received = number
        self.__exit__()

    def check(self, message: str) -> None:
        """Raises Interrupted with `message` if a signal came."""
        if self.received is not None:
            raise Interrupted(message, self.received)
