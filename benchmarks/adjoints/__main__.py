"""Measures what is asked for and not there yet: `python -m benchmarks.adjoints`, or `make adjoints`."""

from common import command_line

command_line.guard_imports()

import os  # noqa: E402
import tempfile  # noqa: E402

# Read when the libraries are first used.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import tyro  # noqa: E402

from .sessions import run  # noqa: E402

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        # What an earlier run has compiled is compiled again, unless a cache is named.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", empty)
        command_line.call(tyro.cli, run)
