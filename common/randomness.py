"""Independent named random streams from one seed: experiments draw weights, batch order and so on, each from its own.

A stream depends on nothing but the seed and its name, so drawing more from one never changes another.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _stream_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def stream(seed: int, name: str) -> torch.Generator:
    """A new CPU generator for the stream `name` of `seed`; asked for twice, it starts anew."""
    return torch.Generator().manual_seed(_stream_seed(seed, name))


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Lets torch's global CPU generator be the stream `name` inside the block, for code that takes no generator.

    PyTorch's layers are such code: they draw their initial weights from the global generator. Its state from before is
    restored at the end of the block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(_stream_seed(seed, name))
        yield
