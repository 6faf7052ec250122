"""Batches visit every sample once, in order or in an order that the generator alone decides."""

import copy

import pytest
import torch

from datasets.batches import Batches


def values(batches):
    return [batch.tolist() for (batch,) in batches]


def test_without_generator_the_order_is_kept_and_the_last_batch_is_short():
    batches = Batches((torch.arange(7),), 3)
    assert values(batches) == values(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(batches) == 3
    assert batches.dataset_size == 7


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 6), (3, 2), (6, 1), (100, 1)])
def test_length_is_the_number_of_batches(batch_size, num_batches):
    batches = Batches((torch.zeros(6),), batch_size)
    assert len(batches) == len(list(batches)) == num_batches


def test_generator_shuffles_anew_and_keeps_samples_together():
    batches = Batches((torch.arange(50), -torch.arange(50)), 8, generator=torch.Generator().manual_seed(0))
    epochs = []
    for _ in range(2):
        first, second = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        assert torch.equal(first, -second)
        assert sorted(first.tolist()) == list(range(50))
        epochs.append(first.tolist())
    assert epochs[0] != epochs[1]
    assert list(range(50)) not in epochs


def test_the_order_depends_on_nothing_but_the_generator():
    first = Batches((torch.arange(20),), 4, generator=torch.Generator().manual_seed(1))
    second = copy.deepcopy(first)
    expected = values(first)
    torch.manual_seed(5)
    assert values(second) == expected


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Batches((torch.zeros(3),), 0)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        Batches((torch.zeros(3), torch.zeros(2)), 1)
    with pytest.raises(ValueError, match=r"\[0\]"):
        Batches((torch.zeros(0, 4),), 1)
