"""Where a run came from (machine, versions, commit): the trainer puts it in every results file."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .records import Record

PACKAGES = (
    "torch",
    "torchdiffeq",
    "torchcde",
    "torchaudio",
    "numpy",
    "scipy",
    "scikit-learn",
    "gymnasium",
    "soundfile",
)
THEN = ", then "
"""Between the devices of a run that was resumed on another one, and between its commits."""
THREADS = " threads)"
"""What the name of a device ends with if its number of threads changed."""
NUMBERS = {"family": "cpu family", "model": "model"}
"""What tells the generation of a CPU, and what /proc/cpuinfo calls it."""


def joined(then: str | None, now: str | None) -> str | None:
    """Both, where they differ: what began as `then` goes on as `now`."""
    if then is None or now is None:
        return now
    return then if now in then.split(THEN) else f"{then}{THEN}{now}"


@dataclass(kw_only=True)
class Provenance(Record):
    """What `describe` tells, and the digest of the data's split."""

    device_name: str
    num_threads: int = field(metadata={"minimum": 1, "maximum": 10**6})
    platform: str
    python: str
    packages: dict[str, str | None]
    commit: str | None
    split: str

    def after(self, earlier: "Provenance") -> "Provenance":
        """That of a run which began as `earlier` and goes on as this: both devices and commits where they differ.

        Devices count as others too if the number of threads is another one, which they then name: seconds by these are
        no seconds of one device.
        """

        then, now = earlier.device_name, self.device_name
        if THREADS in then or earlier.num_threads != self.num_threads:
            then, now = (
                name if THREADS in name else f"{name} ({it.num_threads}{THREADS}"
                for name, it in ((then, earlier), (now, self))
            )
        return replace(self, device_name=joined(then, now), commit=joined(earlier.commit, self.commit))


def short_commit(commit: str | None) -> str:
    """A commit of `describe` in a length that people can read, and whether files differed from it."""
    name, _, dirty = (commit or "unknown").partition("-")
    return name[:8] + "-dirty" * bool(dirty)


def describe(device: torch.device) -> dict:
    """The device, the number of threads, the platform, the versions and the commit, ready for JSON.

    `commit` ends in "-dirty" if tracked files differ from it, and is None outside a git checkout, unless `COMMIT` tells
    it. A package that is not installed has the version None.
    """
    return {
        "device_name": _device_name(device),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and platform.system() == "Linux":
        # `platform.processor()` is empty or just "x86_64" there.
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {name.strip(): value.strip() for name, _, value in reversed(list(lines))}
        if "model name" in found:
            # On virtual machines CPUs of several generations have one name.
            numbers = [f"{name} {found[key]}" for name, key in NUMBERS.items() if key in found]
            return ", ".join([found["model name"], *numbers])
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


COMMIT = "SEMINORM_COMMIT"
"""The environment variable that has the commit of a copy of the code without its history, as on a node of a cluster."""


def commit() -> str | None:
    """The commit of this checkout or copy, as `describe` has it."""
    if told := os.environ.get(COMMIT):
        return told
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).resolve().parents[1]
    # A copy within another repository is not of that one's commit.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()
