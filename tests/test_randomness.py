import torch

from common.randomness import seeded, stream


def draw(seed, name):
    return torch.rand(4, generator=stream(seed, name))


def test_stream_depends_on_seed_and_name_only():
    assert torch.equal(draw(0, "weights"), draw(0, "weights"))
    assert not torch.equal(draw(0, "weights"), draw(1, "weights"))
    assert not torch.equal(draw(0, "weights"), draw(0, "batch order"))


def test_seed_means_the_same_for_ever():
    assert stream(0, "weights").initial_seed() == 2128831168668818800


def test_seeded_gives_the_stream_and_restores_the_global_generator():
    before = torch.get_rng_state()
    with seeded(0, "weights"):
        assert torch.equal(torch.rand(4), draw(0, "weights"))
    assert torch.equal(torch.get_rng_state(), before)
