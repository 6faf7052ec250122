"""Toys are drawn as described, splits are what they say, and what is lacking is a sentence."""

import errno
import math
import sys
import types

import pytest
import torch

from common.randomness import stream
from datasets import flow
from datasets.flow import NUM_COLUMNS, SHAPES, TOY_SIZES, TOYS, load

OPTIONS = dict(batch_size=100, device="cpu", generator=None)


def points(name, number=20_000):
    return TOYS[name](number, stream(0, "points"))


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_the_same_for_everyone_and_split_in_order(name):
    data, again = (load(data=name, **OPTIONS) for _ in range(2))
    parts = [part.tensors[0] for part in (data.train, data.val, data.test)]
    assert [part.shape for part in parts] == [(size, 2) for size in TOY_SIZES]
    assert {part.dtype for part in parts} == {torch.float32}
    assert parts[0].equal(again.train.tensors[0])
    assert not parts[1].equal(parts[0][: len(parts[1])])
    assert data.digest == again.digest
    assert parts[0].abs().max() < 5


def test_digests_tell_data_sets_apart():
    assert len({load(data=name, **OPTIONS).digest for name in (*TOYS, *NUM_COLUMNS, "digits")}) == len(TOYS) + 3


def test_the_checkerboard_is_uniform_on_the_dark_fields():
    fields = ((points("checkerboard") + 4) / 2).floor().long()
    assert ((fields.sum(dim=1) % 2) == 0).all()
    counts = torch.zeros(4, 4).index_put_(tuple(fields.T), torch.tensor(1.0), accumulate=True)
    assert counts[counts > 0].numel() == 8
    assert counts[counts > 0].tolist() == pytest.approx([2500] * 8, abs=4 * 2500**0.5)
    within = ((points("checkerboard") + 4) / 2) % 1
    assert within.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_eight_gaussians_lie_on_a_circle():
    found = points("8gaussians")
    numbers = torch.atan2(found[:, 1], found[:, 0]).div(math.pi / 4).round().long() % 8
    for number in range(8):
        group = found[numbers == number]
        angle = number * math.pi / 4
        centre = [4 / 2**0.5 * math.cos(angle), 4 / 2**0.5 * math.sin(angle)]
        assert group.mean(dim=0).tolist() == pytest.approx(centre, abs=0.05)
        assert group.std(dim=0).tolist() == pytest.approx([0.5 / 2**0.5] * 2, rel=0.1)


def test_rings_have_four_radii():
    radii = points("rings").norm(dim=1)
    assert (radii / 0.75).round().unique().tolist() == [1, 2, 3, 4]
    assert (radii - 0.75 * (radii / 0.75).round()).std().item() == pytest.approx(0.08, rel=0.05)


@pytest.mark.parametrize("name", ["2spirals", "8gaussians", "checkerboard", "rings"])
def test_toys_lie_around_the_origin(name):
    assert points(name).mean(dim=0).tolist() == pytest.approx([0, 0], abs=0.1)


@pytest.mark.parametrize("name", NUM_COLUMNS)
def test_tables_are_standardised_by_their_training_part(name):
    data = load(data=name, **OPTIONS)
    train, val, test = (part.tensors[0] for part in (data.train, data.val, data.test))
    number = len(train) + len(val) + len(test)
    assert (len(train), len(val)) == (number * 70 // 100, number * 15 // 100)
    assert train.shape[1] == NUM_COLUMNS[name]
    torch.testing.assert_close(train.mean(dim=0), torch.zeros(NUM_COLUMNS[name]), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(dim=0), torch.ones(NUM_COLUMNS[name]), atol=1e-5, rtol=0)
    assert test.mean(dim=0).abs().max() > 0.01


def test_digits_are_whole_levels():
    data = load(data="digits", **OPTIONS)
    parts = [part.tensors[0] for part in (data.train, data.val, data.test)]
    assert [len(part) for part in parts] == [1257, 269, 271]
    assert {part.shape[1:] for part in parts} == {torch.Size(SHAPES["digits"])}
    assert (parts[0].dtype, parts[0].min().item(), parts[0].max().item()) == (torch.uint8, 0, 16)


def fake_torchvision(monkeypatch, make):
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(MNIST=make, CIFAR10=make)
    monkeypatch.setitem(sys.modules, "torchvision", module)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_images_of_torchvision_have_channels_first(monkeypatch, tmp_path, name):
    asked = []

    def make(root, *, train, download):
        asked.append((str(root), train, download))
        channels, height, width = SHAPES[name]
        images = torch.zeros(60 if train else 10, height, width, channels, dtype=torch.uint8)
        return types.SimpleNamespace(data=images.squeeze(-1) if name == "mnist" else images.numpy())

    fake_torchvision(monkeypatch, make)
    monkeypatch.setattr(flow, "NUM_VALIDATION", 20)
    data = load(data=name, data_root=tmp_path, **OPTIONS)
    shapes = [part.tensors[0].shape for part in (data.train, data.val, data.test)]
    assert shapes == [(number, *SHAPES[name]) for number in (40, 20, 10)]
    assert asked == [(str(tmp_path), True, True), (str(tmp_path), False, True)]


def test_a_download_that_was_cut_short_is_made_good(monkeypatch, tmp_path):
    """Torchvision takes a file that is there for whole."""

    def make(root, *, train, download):
        for part in ("train", "test")[: 1 if train else 2]:
            (root / part).touch()
        if failures:
            raise failures.pop()
        wholes.append(root)
        return types.SimpleNamespace(data=torch.zeros(60 if train else 10, *SHAPES["mnist"][1:], dtype=torch.uint8))

    failures, wholes = [OSError("the line is down")], []
    fake_torchvision(monkeypatch, make)
    monkeypatch.setenv("SEMINORM_CACHE", str(tmp_path))
    monkeypatch.setattr(flow, "NUM_VALIDATION", 20)
    with pytest.raises(FileNotFoundError, match="the line is down"):
        load(data="mnist", **OPTIONS)
    assert not (tmp_path / "torchvision" / "mnist").exists()
    for _ in range(2):
        load(data="mnist", **OPTIONS)
    # Filled once, beside, and read twice.
    assert [root.name for root in wholes] == ["mnist.partial"] * 2 + ["mnist"] * 4


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("Error\ndownloading train-images")])
def test_what_cannot_be_downloaded_is_a_sentence(monkeypatch, tmp_path, error):
    def make(root, *, train, download):
        raise error

    fake_torchvision(monkeypatch, make)
    with pytest.raises(
        FileNotFoundError, match=r"the images of 'mnist' cannot be had in .*: connect to a network"
    ) as e:
        load(data="mnist", data_root=tmp_path, **OPTIONS)
    assert "\n" not in str(e.value)


def test_a_disk_that_is_full_is_no_lack_of_a_network(monkeypatch, tmp_path):
    def make(root, *, train, download):
        raise OSError(errno.ENOSPC, "No space left on device")

    fake_torchvision(monkeypatch, make)
    monkeypatch.setenv("SEMINORM_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="There is no room for"):
        load(data="mnist", **OPTIONS)


def test_missing_torchvision_is_a_sentence_that_names_what_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"needs torchvision .*`pip install torchvision`, or take one of .*'digits'"):
        load(data="cifar10", **OPTIONS)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="data is 'swissroll', but must be one of 'checkerboard'"):
        load(data="swissroll", **OPTIONS)


def test_parts_share_no_sample_and_are_drawn_from_all_over():
    parts = flow._split(torch.arange(1000), "digits")
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    assert all(400 < part.double().mean() < 600 for part in parts)


def test_two_spirals_wind_outwards_and_lie_opposite_each_other():
    found = points("2spirals")
    radius = 3 * found.norm(dim=1)
    # Along an arm the angle falls as the radius grows; of the other arm it is off by half a turn.
    off = (torch.atan2(found[:, 1], -found[:, 0]) - radius + math.pi / 2) % math.pi - math.pi / 2
    assert off[radius > 6].abs().median() < 0.35  # of noise; of angles at random it is a quarter of pi
    # Uniform in area: half of the points lie beyond the largest radius over sqrt(2).
    assert (radius > 3 * math.pi / 2**0.5).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert radius.quantile(0.99) == pytest.approx(3 * math.pi, abs=0.7)


def test_a_pinwheel_has_five_arms_around_radius_two():
    found = points("pinwheel")
    radius = found.norm(dim=1) / 2
    assert radius.mean().item() == pytest.approx(1, abs=0.02)
    assert radius.std().item() == pytest.approx(0.3, abs=0.02)
    turned = torch.atan2(found[:, 1], found[:, 0]) - 0.25 * radius.exp()
    off = (turned + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
    assert off[radius > 0.8].std() < 0.15


def test_moons_are_two_half_circles():
    found = (points("moons") + torch.tensor([1.0, 0.2])) / 2
    distances = [(found - centre).norm(dim=1) for centre in (torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.5]))]
    halves = [found[:, 1] > -0.3, found[:, 1] < 0.8]
    near = [(distance - 1).abs() < 0.35 for distance in distances]
    on = [is_near & half for is_near, half in zip(near, halves, strict=True)]
    assert (on[0] | on[1]).double().mean() > 0.99
    assert [on_one.double().mean().item() > 0.45 for on_one in on] == [True, True]
    assert found.mean(dim=0).tolist() == pytest.approx([0.5, 0.25], abs=0.02)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_images_of_torchvision_stay_upright_and_are_drawn_from_all_over(monkeypatch, tmp_path, name):
    channels, height, width = SHAPES[name]

    def make(root, *, train, download):
        number = 60 if train else 10
        images = torch.arange(number * height * width * channels).reshape(number, height, width, channels)
        return types.SimpleNamespace(data=images.squeeze(-1) if name == "mnist" else images.numpy())

    fake_torchvision(monkeypatch, make)
    monkeypatch.setattr(flow, "NUM_VALIDATION", 20)
    data = load(data=name, data_root=tmp_path, **OPTIONS)
    train, val, test = (part.tensors[0] for part in (data.train, data.val, data.test))
    raw = torch.arange(10 * height * width * channels).reshape(10, height, width, channels)
    assert torch.equal(test.permute(0, 2, 3, 1), raw)
    numbers = torch.cat([train, val])[:, 0, 0, 0] // (height * width * channels)
    assert sorted(numbers.tolist()) == list(range(60))
    assert numbers[:40].tolist() != list(range(40))
