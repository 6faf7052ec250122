"""What several test files need."""

import os
import signal
import subprocess

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: two threads each would wait for one another. torch reads it when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure():
    """A shell's job in the background ignores Ctrl-C, and so would what it starts; the tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    import torch  # here, as it reads the number of threads

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 1 MiB: a file system of its own, which only root can have."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)
