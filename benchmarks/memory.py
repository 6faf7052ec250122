"""How much memory a function takes: the same measure for PyTorch, for JAX, and for what else runs in the process."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Answer = TypeVar("Answer")


def peak_growth(run: Callable[[], Answer]) -> tuple[float | None, Answer]:
    """How far the process's resident memory rises while `run` runs, in MiB, and what `run` returns.

    Whatever takes memory counts, in whatever library: tensors, graphs, buffers within an operation. What `run` finds in
    place, such as compiled code, does not. The first is None where the system does not tell; Linux does.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None, run()
    # What was freed goes back to the system first, so that the function must ask for all that it needs.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak becomes what is resident now
    before = _resident(status, "VmRSS")
    answer = run()
    return (_resident(status, "VmHWM") - before) / 1024, answer


def _resident(status: Path, name: str) -> int:
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])
