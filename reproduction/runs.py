"""The paper's tables as data: what a run is, when two are the same, and presets of them; `reproduction` rests on it."""

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.config import TrainingConfig
from common.results import Results, directory_of
from common.training import FREE_TO_DIFFER
from datasets.batches import DataSplit

from .experiments import EXPERIMENTS, SPEECH_COMMANDS

TOLERANCES = SPEECH_COMMANDS.tolerances
METHOD = "dopri5"
"""The paper's."""


@dataclass(frozen=True)
class Run:
    """One training: the module of its experiment, and what its `main` is called with, device and results_dir aside."""

    experiment: str
    settings: Mapping[str, Any]
    digest: str | None = None
    """That of the data's split, as in the provenance of results; None while the data are not known."""

    @functools.cached_property
    def config(self) -> TrainingConfig:
        """All its settings. ValueError if one is not allowed."""
        return importlib.import_module(self.experiment).Config("cpu", **self.settings)

    @functools.cached_property
    def identity(self) -> str:
        """Equal for two runs exactly if they are the same."""
        return identity(self.experiment, asdict(self.config), self.digest)

    @property
    def data_key(self) -> tuple:
        """Equal for runs that have their data in common."""
        return (self.experiment, *_data_settings(self.experiment, self.config).items())

    @property
    def way(self) -> str:
        """How it differentiates."""
        return way_of(asdict(self.config))

    @property
    def group(self) -> str:
        """Those of its experiment that it shares tables with."""
        return EXPERIMENTS[self.experiment].group(vars(self.config))

    def path(self, results_dir: str, suffix: str) -> Path:
        """The file of this run with this suffix, beside its results; its folder need not exist."""
        directory = directory_of(results_dir, self.experiment, self.config.condition)
        return directory / f"seed-{self.config.seed}{suffix}"

    def train(self, device: str, results_dir: str) -> Results:
        """Does the run, or what is left of it."""
        main = importlib.import_module(self.experiment).main
        return main(device=device, results_dir=results_dir, resume=True, **self.settings)

    def __str__(self) -> str:
        return f"{self.experiment} {self.config.condition}, seed {self.config.seed}"


def way_of(config: Mapping[str, Any]) -> str:
    """How a run with this `config` of a results file differentiates: its norm, and what else is not the paper's."""
    parts = [config["norm"]]
    if config.get("warm_start"):
        parts.append("warm start")
    if config.get("integrals", "none") != "none":
        parts.append(f"integrals {config['integrals']}")
    if config.get("method", METHOD) != METHOD:
        parts.append(config["method"])
    return ", ".join(parts)


def load_data(experiment: str, config: TrainingConfig) -> DataSplit:
    """The data of a run with these settings, on the CPU and in order. It raises what `load` of the data set raises."""
    load = importlib.import_module(f"datasets.{experiment}").load
    return load(batch_size=config.batch_size, device="cpu", generator=None, **_data_settings(experiment, config))


def _data_settings(experiment: str, config: TrainingConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in EXPERIMENTS[experiment].data_settings}


def identity_of(results: Results) -> str:
    """The identity of the run that made these results."""
    return identity(results.experiment, results.config, results.provenance["split"])


def whole_config(experiment: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of a results file with every setting: one that an older file does not have is at its default."""
    defaults = {
        setting.name: setting.default
        for setting in fields(importlib.import_module(experiment).Config)
        if setting.default is not MISSING
    }
    return {**defaults, **config}


def identity(experiment: str, config: Mapping[str, Any], digest: str | None) -> str:
    """What makes a run this one, for `config` as in a results file: every setting that is not free to differ, and data.

    Where recordings lie does not matter, but which they are does: `digest` is that of the data's split. Whether they
    are the synthetic sample is known without it.
    """
    whole = whole_config(experiment, config)
    settings = {name: value for name, value in whole.items() if name not in FREE_TO_DIFFER}
    if "data_root" in settings:
        settings["data_root"] = settings["data_root"] == "synthetic"
    return json.dumps([experiment, settings, digest], sort_keys=True)


@dataclass(frozen=True)
class Block:
    """Runs of one experiment that differ in how they differentiate (`variants`) and in their seed."""

    experiment: str
    variants: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    num_seeds: int


def _norms(*names: str) -> list[dict[str, Any]]:
    return [{"norm": name} for name in names]


WARM_START = {"norm": "seminorm", "warm_start": True}
"""Beyond the paper, as `discrete` is; Speech Commands has a single output interval, so nothing to carry over."""
BOSH3 = {"norm": "discrete", "method": "bosh3"}
"""Beyond the paper: half the time on paths that are linear between knots."""


INTEGRALS = {"norm": "seminorm", "integrals": "unweighed"}
"""Beyond the paper: the log-determinant is left out of the norms, as the parameters' adjoint is."""


def quick(data_root: str | None) -> list[Block]:
    """Minutes on a CPU, much reduced: shows that everything works, and reproduces no figure of the paper."""
    speech = dict(data_root=data_root, batch_size=64, max_epochs=3)
    if data_root is None:
        speech = dict(data_root="synthetic", batch_size=32, max_epochs=4)
    return [
        Block("acrobot", _norms("default", "seminorm", "as-published"), dict(num_trajectories=8, max_epochs=2), 1),
        Block("speech_commands", _norms("default", "seminorm"), speech, 1),
        Block("flow", _norms("default", "seminorm"), dict(data="checkerboard", batch_size=500, max_epochs=2), 1),
    ]


def cpu(data_root: str | None) -> list[Block]:
    """A day or two of one core, reduced: a folder of some of the recordings, smaller batches, fewer epochs."""
    speech = dict(data_root=data_root, batch_size=128, metric_interval=2)
    loose, tighter, tightest = (dict(rtol=rtol, atol=atol, max_epochs=24, **speech) for rtol, atol in TOLERANCES)
    acrobot = dict(max_epochs=3, metric_interval=1)
    return [
        Block("speech_commands", [*_norms("default", "per-tensor", "seminorm", "discrete"), BOSH3], loose, 3),
        *(
            block
            for settings in (tighter, tightest)
            for block in (
                Block("speech_commands", _norms("default", "seminorm", "discrete"), settings, 3),
                Block("speech_commands", _norms("per-tensor"), settings, 1),
            )
        ),
        # As far as accuracy rises.
        Block("speech_commands", _norms("default", "seminorm"), {**loose, "max_epochs": 48}, 1),
        Block("acrobot", _norms("default", "seminorm", "as-published"), acrobot, 3),
        # As long as the paper's.
        Block("acrobot", [*_norms("default", "seminorm", "as-published", "discrete"), WARM_START], {}, 1),
        *_flows(),
    ]


def _flows() -> list[Block]:
    """Densities of toys, tables and digits, of a size for a CPU."""
    ways = [*_norms("default", "per-tensor", "seminorm", "discrete"), INTEGRALS]
    toys = dict(batch_size=100, max_epochs=30)
    tables = dict(rtol=1e-6, atol=1e-8, batch_size=1000)
    digits = dict(data="digits", batch_size=50)
    return [
        *(Block("flow", ways, dict(data=data, **toys), 3) for data in ("checkerboard", "8gaussians", "2spirals")),
        Block("flow", ways, dict(data="wine", max_epochs=300, **tables), 1),
        Block("flow", ways, dict(data="breast_cancer", max_epochs=100, **tables), 1),
        Block("flow", ways, dict(width=16, max_epochs=30, **digits), 2),
        *(Block("flow", _norms("discrete"), dict(width=width, max_epochs=10, **digits), 1) for width in (32, 64)),
    ]


def paper(data_root: str | None) -> list[Block]:
    """Everything as published, as far as that is known (flows as in FFJORD), and some ways beyond the paper."""
    norms = _norms("default", "per-tensor", "seminorm", "discrete")
    speech = [
        Block("speech_commands", norms, dict(rtol=rtol, atol=atol, data_root=data_root), 5) for rtol, atol in TOLERANCES
    ]
    flows = [
        Block("flow", norms, dict(data=data, width=width, data_root=None), 5)
        for data in ("mnist", "cifar10")
        for width in (32, 64, 128)
    ]
    return [*speech, Block("acrobot", [*norms, *_norms("as-published"), WARM_START], {}, 5), *flows]


PRESETS = {"quick": quick, "cpu": cpu, "paper": paper}
"""Each makes the blocks of a preset, given where the recordings are, and says in its docstring what it is."""


def preset_runs(
    preset: str,
    *,
    experiments: Sequence[str] = tuple(EXPERIMENTS),
    data_root: str | None = None,
    num_seeds: int | None = None,
) -> list[Run]:
    """The runs of a preset, those of the first seed first.

    Args:
        preset: one of `PRESETS`.
        experiments: those wanted.
        data_root: where the recordings are; None for a download, or the synthetic sample if the preset is quick.
        num_seeds: seeds of each condition (0, 1, ...) in place of the preset's own number.
    """
    runs = [
        Run(block.experiment, {**variant, **block.settings, "seed": seed})
        for block in PRESETS[preset](data_root)
        if block.experiment in experiments
        for variant in block.variants
        for seed in range(num_seeds or block.num_seeds)
    ]
    return sorted(runs, key=lambda run: run.settings["seed"])
