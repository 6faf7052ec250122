"""Data whose density `flow.py` learns: 2-d toys, tables of scikit-learn, and images of whole grey levels.

The toys are those of FFJORD (Grathwohl et al., 2019), drawn here once for all. Digits and tables come with
scikit-learn. MNIST and CIFAR-10 come through torchvision, which is imported for them alone.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from common import randomness

from .batches import DataSplit
from .cache import NoRoom, cache_directory, make_folder

Toy = Literal["checkerboard", "8gaussians", "2spirals", "pinwheel", "moons", "rings"]
Table = Literal["wine", "breast_cancer"]
Image = Literal["digits", "mnist", "cifar10"]
Data = Literal[get_args(Toy) + get_args(Table) + get_args(Image)]

TOY_SIZES = (10_000, 1_000, 2_000)
"""Points for training, validation and test."""
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
"""Of images: channels, height, width."""
NUM_LEVELS = {"digits": 17, "mnist": 256, "cifar10": 256}
"""Grey levels, from 0 on."""
NUM_COLUMNS = {"wine": 13, "breast_cancer": 30}
NUM_VALIDATION = 5_000
"""Images of MNIST or CIFAR-10 that are taken from the training set for validation."""


def load(
    *,
    batch_size: int,
    device: str | int | torch.device,
    generator: torch.Generator | None,
    data: Data,
    data_root: str | os.PathLike | None = None,
) -> DataSplit:
    """The data set `data` in batches of one tensor each, on `device`.

    Toys are float32 points (batch, 2): 10,000 for training, 1,000 for validation, 2,000 for test. Tables are float32
    rows (batch, columns), each column less the training set's mean and over its standard deviation; images are uint8
    grey levels (batch, channels, height, width). Rows and digits are split 70 % / 15 % / 15 % at random; of MNIST and
    CIFAR-10, 5,000 training images are for validation, and the test set is theirs. The data never depend on a run's
    seed: they are drawn from random streams of their own. `generator` orders the training batches; `data_root` is
    torchvision's folder, None for one in the cache.

    Raises:
        ValueError: if there is no such data set, or no torchvision where it is needed.
        FileNotFoundError: if the images cannot be downloaded.
    """
    if data in get_args(Toy):
        points = TOYS[data](sum(TOY_SIZES), randomness.stream(0, f"points of {data}"))
        parts = points.split(TOY_SIZES)
    elif data in get_args(Table):
        parts = _standardised(_split(_table(data), data))
    elif data == "digits":
        parts = _split(_digits(), data)
    elif data in get_args(Image):
        parts = _torchvision(data, data_root)
    else:
        raise ValueError(f"data is {data!r}, but must be one of {', '.join(map(repr, get_args(Data)))}")
    sizes = tuple(map(len, parts))
    return DataSplit.of([(part.to(device),) for part in parts], batch_size, generator, ("flow", data, sizes))


def _checkerboard(number: int, random: torch.Generator) -> Tensor:
    """Uniform on the dark fields of a board of 4 x 4 fields, each of side 2, around the origin: density 1 / 32."""
    x, y = torch.rand(2, number, generator=random)
    column = (4 * x).floor()
    # Of the two dark fields of a column, one by the first bit of y, and a place in it by the rest.
    row = 2 * (2 * y).floor() + column % 2
    return 2 * torch.stack([4 * x, row + (2 * y) % 1], dim=1) - 4


def _eight_gaussians(number: int, random: torch.Generator) -> Tensor:
    """Eight normal distributions of deviation 0.5 / sqrt(2), around a circle of radius 4 / sqrt(2)."""
    angle = math.pi / 4 * torch.randint(8, (number,), generator=random)
    return (4 * _on_circle(angle) + 0.5 * torch.randn(number, 2, generator=random)) / math.sqrt(2)


def _two_spirals(number: int, random: torch.Generator) -> Tensor:
    """Two arms of one and a half turns, opposite each other, with noise of deviation 0.1."""
    angle = 3 * math.pi * torch.rand(number, generator=random).sqrt()
    arm = 2.0 * torch.randint(2, (number, 1), generator=random) - 1
    place = angle.unsqueeze(1) * _on_circle(math.pi - angle) + 0.5 * torch.rand(number, 2, generator=random)
    return arm * place / 3 + 0.1 * torch.randn(number, 2, generator=random)


def _pinwheel(number: int, random: torch.Generator) -> Tensor:
    """Five normal distributions, stretched away from the origin and turned the more the further out."""
    along, across = torch.tensor([[0.3], [0.1]]) * torch.randn(2, number, generator=random)
    along = along + 1
    angle = 2 * math.pi / 5 * torch.randint(5, (number,), generator=random) + 0.25 * along.exp()
    cosine, sine = angle.cos(), angle.sin()
    return 2 * torch.stack([along * cosine - across * sine, along * sine + across * cosine], dim=1)


def _moons(number: int, random: torch.Generator) -> Tensor:
    """Two half circles of radius 2, one in the hollow of the other, with noise of deviation 0.2."""
    angle = math.pi * torch.rand(number, generator=random)
    upper = torch.randint(2, (number, 1), generator=random).bool()
    circle = _on_circle(angle)
    moons = torch.where(upper, circle, torch.tensor([1.0, 0.5]) - circle)
    return 2 * (moons + 0.1 * torch.randn(number, 2, generator=random)) - torch.tensor([1.0, 0.2])


def _rings(number: int, random: torch.Generator) -> Tensor:
    """Four circles of radii 0.75, 1.5, 2.25 and 3, with noise of deviation 0.08."""
    radius = 0.75 * (1 + torch.randint(4, (number, 1), generator=random))
    angle = 2 * math.pi * torch.rand(number, generator=random)
    return radius * _on_circle(angle) + 0.08 * torch.randn(number, 2, generator=random)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


TOYS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "checkerboard": _checkerboard,
    "8gaussians": _eight_gaussians,
    "2spirals": _two_spirals,
    "pinwheel": _pinwheel,
    "moons": _moons,
    "rings": _rings,
}
"""What draws so many points (number, 2) of a toy."""


def _table(name: Table) -> Tensor:
    """All rows of a table that comes with scikit-learn, float64."""
    from sklearn import datasets  # takes seconds, and toys do without

    return torch.from_numpy({"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer}[name]().data)


def _digits() -> Tensor:
    """The 1,797 digits of scikit-learn, of 8 x 8 pixels with 17 levels."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)


def _split(samples: Tensor, name: str) -> tuple[Tensor, ...]:
    """The samples in an order of their own, 70 % / 15 % / 15 %."""
    order = torch.randperm(len(samples), generator=randomness.stream(0, f"split of {name}"))
    num_train, num_val = len(samples) * 70 // 100, len(samples) * 15 // 100
    return samples[order].split((num_train, num_val, len(samples) - num_train - num_val))


def _standardised(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mean, deviation = parts[0].mean(dim=0), parts[0].std(dim=0)
    return tuple(((part - mean) / deviation).float() for part in parts)


def _torchvision(name: Image, data_root: str | os.PathLike | None) -> tuple[Tensor, ...]:
    """Images of torchvision, which checks what it downloads by checksums."""
    others = ", ".join(repr(other) for other in get_args(Data) if other not in ("mnist", "cifar10"))
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ValueError(
            f"data is {name!r}, which needs torchvision ({error}): `pip install torchvision`, or take one of {others}"
        ) from error
    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]

    def read(root: Path) -> list[Tensor]:
        return [torch.as_tensor(kind(root, train=part, download=True).data) for part in (True, False)]

    root = Path(data_root) if data_root is not None else cache_directory() / "torchvision" / name
    try:
        if data_root is None:
            root.parent.mkdir(exist_ok=True)
            make_folder(root, read)
        train, test = read(root)
    except NoRoom:
        raise
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the images of {name!r} cannot be had in {root} ({' '.join(str(error).split())}): connect to a network, "
            "or name by data_root a folder in which torchvision has put them"
        ) from error
    # MNIST has no channels, CIFAR-10 has them last.
    train, test = (images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1) for images in (train, test))
    order = torch.randperm(len(train), generator=randomness.stream(0, f"split of {name}"))
    train, val = train[order].split((len(train) - NUM_VALIDATION, NUM_VALIDATION))
    return train, val, test
