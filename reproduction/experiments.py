"""What each experiment is, on one card: its names, data, tolerances and metric, and what measurements and figures need.

Everything in `reproduction` that is said of one experiment alone is said here, so a new one is a card here beside its
own files: `<name>.py`, with its settings and `main`, and `datasets/<name>.py`, with `load`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Scale:
    """How large the paper's runs of an experiment are."""

    training_samples: int
    batch_size: int
    max_epochs: int
    num_seeds: int = 5
    caveat: str = ""
    """What of this is not known from the paper."""
    groups: str = ""
    """How the names of the groups begin that the paper has."""


@dataclass(frozen=True)
class TimeAxis:
    """The solve's time of an experiment, cut into bins."""

    label: str
    start: float
    end: float
    num_bins: int
    unit: float
    """The time for which densities are given, and what it is."""
    unit_name: str


@dataclass(frozen=True)
class GradientSetting:
    """How the gradients of an experiment's model are measured."""

    loss_function: Callable[[Tensor, Tensor], Tensor]
    tolerances: Sequence[tuple[float, float]]
    adjoints: tuple[str, ...]
    batch_size: int
    num_batches: int
    reference: tuple[float, float]
    """rtol and atol, in float64, of what counts as exact: at least two decades tighter than the tightest tolerance."""
    training: str
    """Options of a run of minutes on a CPU that makes weights."""


@dataclass(frozen=True)
class Experiment:
    """All that is known of an experiment without a look at its runs."""

    name: str
    """Of its module, of its data set's and of its folder of results."""
    title: str
    short_title: str
    """Above a column of a figure."""
    metric: Callable[[Mapping[str, Any]], Literal["accuracy", "loss", "bits_per_dim", "nll"]]
    """The column of the tables that says how well a run of these settings has learnt."""
    tolerances: tuple[tuple[float, float], ...]
    """The paper's pairs of rtol and atol."""
    data_settings: tuple[str, ...]
    """The settings that say which data a run is of: keywords of the data set's `load`."""
    paper: Scale
    time_axis: TimeAxis
    gradients: GradientSetting
    measurements: tuple[str, ...] = ("gradient_errors", "methods", "losses", "step_errors")
    """Those of `diagnostics.MEASUREMENTS` that make sense for it."""
    group_measurements: tuple[str, ...] = ()
    """Those that are made of every group; the others of the first alone."""
    stand_in: str | None = None
    """A `data_root` without any download, for data like those that a download brings; None if there is none."""
    group_settings: tuple[str, ...] = ()
    """The settings in which runs differ so much that they share neither tables nor figures."""
    figure_groups: tuple[str, ...] = ("",)
    """The groups that have figures of their runs."""
    measured_groups: tuple[str | None, ...] = (None,)
    """The groups whose trained weights are measured; None for a run of any."""

    def group(self, config: Mapping[str, Any]) -> str:
        """What runs of these settings have in common: the empty name where all runs of the experiment do."""
        values = {name: config[name] for name in self.group_settings if config[name] is not None}
        return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in values.items())

    def options_of(self, group: str | None) -> str:
        """What the command line of a run of this group has besides, with a space before it."""
        first, *others = (group or "").split(", ")
        return "".join([f" --{self.group_settings[0]} {first}" if first else "", *(f" --{other}" for other in others)])

    def file_name(self, measurement: str, group: str | None) -> str:
        """Of what a measurement has found."""
        suffix = f"-{group.replace(', width ', '-')}" if measurement in self.group_measurements else ""
        return f"{measurement}-{self.name}{suffix}.json"

    def title_of(self, group: str) -> str:
        """The experiment's title, with the group's name if it has one."""
        return f"{self.title}, {group}" if group else self.title


# As in `speech_commands`, which is not imported here: a sweep of acrobot alone does without its packages.
_SPEECH_TOLERANCES = ((1e-3, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8))

SPEECH_COMMANDS = Experiment(
    name="speech_commands",
    title="Neural CDE on Speech Commands",
    short_title="Neural CDE, Speech Commands",
    metric=lambda config: "accuracy",
    tolerances=_SPEECH_TOLERANCES,
    data_settings=("data_root", "split"),
    stand_in="synthetic",
    paper=Scale(training_samples=24_482, batch_size=1024, max_epochs=200),
    time_axis=TimeAxis("$t$ (frames of the recording)", 0.0, 160.0, 20, 1.0, "frame"),
    gradients=GradientSetting(
        # The field's ReLUs have kinks, and every one that a sample crosses cuts the step of its batch: the reference
        # takes minutes for a batch.
        loss_function=functional.cross_entropy,
        tolerances=((1e-2, 1e-5), *_SPEECH_TOLERANCES),
        adjoints=("default", "per-tensor", "seminorm", "discrete"),
        batch_size=16,
        num_batches=3,
        reference=(1e-7, 1e-10),
        training="--batch-size 128 --max-epochs 24 --data-root FOLDER",  # of some of the recordings
    ),
)
ACROBOT = Experiment(
    name="acrobot",
    title="Symplectic ODE-Net on acrobot",
    short_title="Symplectic ODE-Net, acrobot",
    metric=lambda config: "loss",
    tolerances=((1e-4, 1e-4),),
    data_settings=("num_trajectories", "torque"),
    paper=Scale(training_samples=20_025, batch_size=256, max_epochs=50),
    # A step goes on beyond the output time that it is meant for, the last one to before 0.
    time_axis=TimeAxis("$t$ (seconds)", -0.125, 0.35, 19, 0.05, "0.05 s"),
    gradients=GradientSetting(
        loss_function=functional.mse_loss,
        tolerances=tuple((10.0**-digits, 10.0**-digits) for digits in (2, 3, 4, 5, 6)),
        adjoints=("default", "per-tensor", "seminorm", "as-published", "discrete"),
        batch_size=64,
        num_batches=3,
        reference=(1e-9, 1e-9),
        training="--max-epochs 3",
    ),
    measurements=("gradient_errors", "methods", "losses", "step_errors", "control"),
)
FLOW = Experiment(
    name="flow",
    title="Continuous normalising flow",
    short_title="Continuous normalising flow",
    metric=lambda config: "bits_per_dim" if config["data"] in ("digits", "mnist", "cifar10") else "nll",
    tolerances=((1e-5, 1e-5),),
    data_settings=("data", "data_root"),
    paper=Scale(
        training_samples=55_000,
        batch_size=200,
        max_epochs=100,
        caveat=" on MNIST, of which the epochs alone are known and the rest is assumed",
        groups="mnist",
    ),
    time_axis=TimeAxis("$t$ (data at 0)", 0.0, 0.5, 20, 0.05, "0.05"),
    gradients=GradientSetting(
        loss_function=lambda losses, batch: losses.mean(),
        tolerances=tuple((10.0**-digits, 10.0**-digits) for digits in (3, 4, 5, 6)),
        adjoints=("default", "per-tensor", "seminorm", "discrete"),
        batch_size=100,
        num_batches=3,
        reference=(1e-8, 1e-8),
        training="--batch-size 100 --max-epochs 30",
    ),
    group_settings=("data", "width"),
    figure_groups=("checkerboard", "8gaussians", "2spirals"),
    measured_groups=("checkerboard", "8gaussians", "2spirals", *(f"digits, width {width}" for width in (16, 32, 64))),
    measurements=("gradient_errors", "step_errors", "integrals", "growth", "samples"),
    group_measurements=("growth", "samples"),
)

EXPERIMENTS = {card.name: card for card in (SPEECH_COMMANDS, ACROBOT, FLOW)}
"""By name, in the order of tables and figures."""
