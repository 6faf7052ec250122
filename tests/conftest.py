"""What several test files need."""

import signal
import subprocess

import pytest


def pytest_configure():
    """A shell's job in the background ignores Ctrl-C, and so would what it starts; the tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
