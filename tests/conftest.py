"""What several test files need."""

import functools
import os
import signal
import subprocess
import tempfile
import weakref

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: two threads each would wait for one another. torch reads it when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Workers, and what tests start, share a cache, so that data are made once; nothing of the user's is touched."""
    # A shell's job in the background ignores Ctrl-C, and so would what it starts; the tests send it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="seminorm-")
        config.add_cleanup(folder.cleanup)
        os.environ["SEMINORM_CACHE"] = folder.name


def pytest_collection_modifyitems(items):
    import torch  # here, as it reads the number of threads

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seeded():
    """Weights that a test draws are the same each time, whichever tests ran before it."""
    import torch

    torch.manual_seed(0)


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


@pytest.fixture
def caches(monkeypatch):
    """Nothing is compiled yet, and no more than four functions are kept."""
    from torchadjoint import compiled, compiling

    monkeypatch.setattr(compiled, "compiled", functools.lru_cache(maxsize=4)(compiling.compiled.__wrapped__))


@pytest.fixture
def traced(monkeypatch, caches):
    """What would be compiled runs as it is, which is enough to compare numbers."""
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def graphs(monkeypatch, caches):
    """torch.compile finds out what to compile, but makes no kernels; each graph that it found, as a weak reference.

    Two forms of a function are kept.
    """
    import torch

    if not hasattr(torch._dynamo.config, "recompile_limit"):
        pytest.skip("counts what the compiler makes, which is more in torch 2.6")
    found, compile = [], torch.compile

    def backend(graph, inputs):
        found.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, fullgraph=True, dynamic=False, backend=backend)
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        yield found


@pytest.fixture
def looks(monkeypatch, caches):
    """The functions that torch was asked to look at, one entry a call; kernels are the operations as they are."""
    from torchadjoint import compiling

    calls, call = [], compiling.Compiled.__call__

    def spy(self, *arguments):
        calls.append(self.code.co_name)
        return call(self, *arguments)

    monkeypatch.setattr(compiling, "make_kernels", lambda graph, examples: graph.forward)
    monkeypatch.setattr(compiling.Compiled, "__call__", spy)
    return calls


@pytest.fixture
def small_networks(monkeypatch):
    """Of the Symplectic ODE-Net, so that building and saving it takes no time."""
    import acrobot

    network = acrobot.SoftplusNetwork
    monkeypatch.setattr(
        acrobot, "SoftplusNetwork", lambda *widths: network(widths[0], *[9] * (len(widths) - 2), widths[-1])
    )
