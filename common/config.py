"""The settings of a training, checked and normalised once; each experiment derives its own from them."""

import ast
import functools
import inspect
import os
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch

import torchadjoint
from torchadjoint import ADJOINTS, METHODS, Solution, arguments

SAME_STEPS = ("dopri5", "bosh3")
"""The methods that `solver="torchdiffeq"` takes: it has them, and they take the same evaluations as ours."""
LONGEST_PATH = 4096
"""How many bytes a path has at most, on Linux."""


@dataclass(frozen=True)
class TrainingConfig:
    """What the settings of every experiment have in common.

    A field's annotation, in derived classes too, says what it may be: an `int` is at least 1 and a `float` finite and
    above 0, or within the `minimum` and `maximum` in the field's metadata; a `Literal` is one of its values; None is
    allowed where it is named. A path becomes a string. A field with `condition=False` in its metadata is not in
    the name of the results' folder.

    Raises:
        ValueError: if a value is not allowed; it says what is.
    """

    device: int | str | torch.device
    """Where to train: cpu, cuda, cuda:1, or the number of a GPU."""
    norm: bool | str
    """How to differentiate; False is default, True is seminorm.

    default: adjoint solve whose norm weighs all parameter adjoints as one vector, the paper's baseline.
    seminorm: adjoint solve whose norm weighs the state and its adjoint only, the paper's trick.
    per-tensor: adjoint solve whose norm weighs each parameter tensor apart, the strictest.
    as-published: adjoint solve with the norm that the released acrobot code computes; for acrobot alone.
    discrete: no adjoint solve, but the exact gradient of the steps that the forward solve took.
    """
    rtol: float
    """Relative tolerance of the forward and the backward solve."""
    atol: float
    """Absolute tolerance of the forward and the backward solve."""
    _: KW_ONLY
    seed: int = field(default=0, metadata={"minimum": 0, "condition": False})
    """What the initial weights and the order of the batches are drawn from."""
    max_epochs: int
    """Number of epochs, unless the train loss stops falling before."""
    batch_size: int
    """Samples in a batch."""
    learning_rate: float
    """AdamW's learning rate at the start."""
    weight_decay: float = field(default=0.01, metadata={"minimum": 0})
    """AdamW's weight decay."""
    metric_interval: int = 10
    """Epochs from one measurement to the next; the last epoch is measured too."""
    scheduler_patience: int = field(default=2, metadata={"minimum": 0})
    """Measurements without improvement that are let pass before the learning rate falls tenfold."""
    plateau_epochs: int = 100
    """Epochs without improvement that are let pass before training stops."""
    method: typing.Literal[tuple(METHODS)] = "dopri5"
    """The Runge-Kutta method of the forward and the backward solve."""
    solver: typing.Literal["torchadjoint", "torchdiffeq"] = "torchadjoint"
    """Our library, or stock torchdiffeq, with the norm of ours of that name, to compare with."""
    warm_start: bool = False
    """Let the backward solve start with the forward solve's step, and carry its own across output times."""
    published_metrics: bool = False
    """Measure as the published code does, by extra passes that go forward and backward, after the first epoch and then
    each interval. They then say when the learning rate falls, which state is the best and when to stop."""
    save: bool = field(default=True, metadata={"condition": False})
    """Write a results file."""
    results_dir: str | os.PathLike = field(default="results", metadata={"condition": False})
    """Folder of the results files."""
    resume: bool = field(default=False, metadata={"condition": False})
    """Go on with the unfinished run of these settings and this seed, if there is one."""

    def __post_init__(self):
        values = {setting.name: _checked(setting, getattr(self, setting.name)) for setting in fields(self)}
        values.update(device=_checked_device(self.device), norm=_checked_norm(self.norm))
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.warm_start and self.norm == "discrete":
            raise ValueError("warm_start is True, but 'discrete' has no backward solve: leave it False")
        if self.solver == "torchdiffeq":
            if self.warm_start:
                raise ValueError("warm_start is True, but solver='torchdiffeq' has none: use solver='torchadjoint'")
            if self.method not in SAME_STEPS:
                raise ValueError(
                    f"method is {self.method!r}, but solver='torchdiffeq' has {' and '.join(SAME_STEPS)} to compare "
                    "with"
                )
        if self.resume and not self.save:
            raise ValueError("resume is True, but a run that is not saved leaves no checkpoint: leave save True")

    @property
    def solve(self) -> Callable[..., Solution]:
        """`torchadjoint.solve`, or the reference, as these settings have it."""
        if self.solver == "torchadjoint":
            solve = torchadjoint.solve
        else:
            from .torchdiffeq_reference import solve  # takes a second, and most runs do without

        adjoint = ADJOINTS[self.norm]
        return functools.partial(
            solve,
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            adjoint=replace(adjoint, warm_start=True) if self.warm_start else adjoint,
        )

    @property
    def condition(self) -> str:
        """Norm and tolerances, then each other setting that differs from its default, seed and data apart."""
        parts = [self.norm, str(self.rtol), str(self.atol)]
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.kw_only and setting.metadata.get("condition", True) and value != setting.default:
                parts.append(f"{setting.name}-{value}")
        return "-".join(parts)


def document(main: Callable, settings_class: type[TrainingConfig]) -> None:
    """Gives `main`, which takes the fields of the settings, their signature and, for `help`, what each of them is."""
    returned = inspect.signature(main).return_annotation
    main.__signature__ = inspect.signature(settings_class, eval_str=True).replace(return_annotation=returned)
    texts = {}
    for ancestor in reversed(settings_class.__mro__[:-1]):
        [definition] = ast.parse(inspect.getsource(ancestor)).body
        for statement, text in pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[statement.target.id] = inspect.cleandoc(text.value.value)
    settings = [
        f"{setting.name}:\n{textwrap.indent(texts[setting.name], '    ')}" for setting in fields(settings_class)
    ]
    main.__doc__ = "\n\n".join([main.__doc__, *settings])


def check_stored(stored: Mapping[str, Any]) -> None:
    """Checks the settings that every experiment has, as a results file has them, on whatever device they were used.

    Raises:
        ValueError: if one is not allowed, or if one is missing without which no run is known. Others are at their
            defaults, as those that came later are in older files.
    """
    for setting in fields(TrainingConfig):
        if setting.name in stored:
            _checked(setting, stored[setting.name])
        elif setting.default is MISSING or setting.name == "seed":
            raise ValueError(f"config lacks {setting.name}")
    arguments.choice("norm", stored["norm"], list(ADJOINTS))
    if not isinstance(stored["device"], str):
        arguments.refuse("device", stored["device"], "the name of a device")


def _checked(setting: Field, value: Any) -> Any:
    """`value` as the setting's annotation has it; numbers of other libraries, such as NumPy's, become Python's."""
    kind, limits = setting.type, {name: limit for name, limit in setting.metadata.items() if name != "condition"}
    if kind == int | None and value is None:
        return None
    if kind in (int, int | None):
        return arguments.whole_number(setting.name, value, **limits)
    if kind is float:
        return arguments.number(setting.name, value, **limits)
    if kind is bool:
        return arguments.flag(setting.name, value)
    if typing.get_origin(kind) is typing.Literal:
        return arguments.choice(setting.name, value, typing.get_args(kind))
    if os.PathLike in typing.get_args(kind) and not (value is None and type(None) in typing.get_args(kind)):
        return _checked_path(setting.name, value)
    return value


def _checked_norm(norm: bool | str) -> str:
    """The name of the adjoint; False is the paper's `default`, True its `seminorm`."""
    if isinstance(norm, bool):
        return "seminorm" if norm else "default"
    if not (isinstance(norm, str) and norm in ADJOINTS):
        names = ", ".join(map(repr, ADJOINTS))
        raise ValueError(
            f"unknown norm {arguments.shown(norm)}: use one of {names}, or False for 'default' and True for 'seminorm'"
        )
    return norm


def _checked_path(name: str, value: Any) -> str:
    """The path `value` as a string, with ~ at its start expanded. ValueError if no folder can have it."""
    try:
        encoded = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        encoded = b""
    if not 0 < len(encoded) <= LONGEST_PATH or b"\0" in encoded:
        arguments.refuse(name, value, "the path of a folder")
    return os.path.expanduser(os.fsdecode(encoded))


def _checked_device(device: int | str | torch.device) -> str:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    try:
        name = str(torch.device(device))
    except (RuntimeError, TypeError, ValueError):
        name = None
    if name not in available:
        raise ValueError(f"device is {arguments.shown(device)}, but this machine has {', '.join(available)}")
    return name
