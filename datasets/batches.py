"""Batches of tensors in memory and the split into three parts: what every data set returns and the trainer iterates."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class Batches:
    """Cuts tensors that share their first dimension into batches, on the device where they lie.

    Every iteration visits each sample once: in order, or in a new order drawn from `generator` (on the CPU, so that
    the order is the same on every device). The last batch holds what is left over. ValueError if the tensors have
    different lengths or no samples, or if `batch_size` is below 1.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, *, generator: torch.Generator | None = None):
        lengths = sorted({len(tensor) for tensor in tensors})
        if len(lengths) != 1 or lengths[0] == 0:
            raise ValueError(f"The tensors hold {lengths} samples, but all must hold the same number, at least 1.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")
        self.tensors = tensors
        self.batch_size = batch_size
        self.generator = generator
        self.dataset_size = lengths[0]

    def __len__(self) -> int:
        return math.ceil(self.dataset_size / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        tensors = self.tensors
        if self.generator is None:
            yield from zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)
        else:
            order = torch.randperm(self.dataset_size, generator=self.generator)
            for indices in order.to(tensors[0].device).split(self.batch_size):
                yield tuple(tensor[indices] for tensor in tensors)


@dataclass(frozen=True)
class DataSplit:
    """The batches of the three parts, of which only `train` is shuffled, and the SHA-256 of what defines the parts."""

    train: Batches
    val: Batches
    test: Batches
    digest: str

    @classmethod
    def of(
        cls,
        parts: Iterable[tuple[Tensor, ...]],
        batch_size: int,
        generator: torch.Generator | None,
        content: object,
    ) -> "DataSplit":
        """The split into these tensors for training, validation and test; the repr of `content` says what they are."""
        orders = (generator, None, None)
        batches = [Batches(part, batch_size, generator=order) for part, order in zip(parts, orders, strict=True)]
        return cls(*batches, digest=hashlib.sha256(repr(content).encode()).hexdigest())
