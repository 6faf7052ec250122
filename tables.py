"""Reruns the paper: trains the runs of a preset and prints their tables, `python tables.py --help`."""

if __name__ == "__main__":
    from common import command_line

    command_line.guard_imports()

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import command_line, files
from common.results import check_folder, load_all
from reproduction import claim_list, claims, typesetting
from reproduction.evidence import Evidence
from reproduction.experiments import EXPERIMENTS
from reproduction.local_engine import devices_of, run_locally
from reproduction.runs import PRESETS, Run, load_data, preset_runs
from reproduction.status import Status, begun, estimated_seconds, on_found_data, statuses
from reproduction.sweep import Engine, sweep
from reproduction.timing import Sample, rough_seconds

ROOT = Path(__file__).parent
PAGE = ROOT / "docs" / "results.md"
CLAIMS = ROOT / "results" / "CLAIMS.md"
REFERENCE = str(ROOT / "reference")
"""The committed runs."""


@dataclass(frozen=True)
class Selection(command_line.Paths):
    """Which runs a command is about."""

    preset: tyro.conf.Positional[Literal[tuple(PRESETS)]]
    """Quick: minutes on a CPU, reproduces no figure. Cpu: a day or two, reduced. Paper: everything as published."""
    experiments: tuple[Literal[tuple(EXPERIMENTS)], ...] = tuple(EXPERIMENTS)
    """Which experiments."""
    seeds: int | None = None
    """Runs of each condition, in place of the preset's own number."""
    data_root: str | None = None
    """Folder with the Speech Commands recordings. By default they are downloaded; quick has a synthetic sample."""
    results_dir: str = "results"
    """Folder of the results files."""

    def __post_init__(self):
        super().__post_init__()
        if not self.experiments:
            raise ValueError(f"experiments is empty, but must name some of {', '.join(EXPERIMENTS)}")
        for name in ("seeds", "jobs"):
            number = getattr(self, name, None)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1")

    @property
    def runs(self) -> list[Run]:
        """The runs, with no look at their data."""
        return preset_runs(self.preset, experiments=self.experiments, data_root=self.data_root, num_seeds=self.seeds)


@dataclass(frozen=True)
class Train(Selection):
    """Trains the runs of a preset that the results folder lacks, and prints the tables.

    It may be stopped and started again at any time, and several may work on one results folder. It exits with 0 if
    every run is done, 1 if one failed or was left undone, 2 for what cannot be used, 130 after Ctrl-C and 143 after
    SIGTERM.
    """

    device: str = "cpu"
    """Where to train: cpu, cuda for all GPUs, or one of them, such as cuda:1."""
    jobs: int | None = None
    """Runs at a time; by default one on each device. They share the GPUs, and divide the CPU's threads."""
    engine: Literal["local", "ray"] = "local"
    """Local: processes of this machine. Ray: a cluster, whose address is in RAY_ADDRESS."""
    retry_failed: bool = False
    """Also do again what failed before."""


@dataclass(frozen=True)
class Plan(Selection):
    """Trains nothing: lists which runs are done, failed and missing, and roughly how long that takes."""

    device: str = "cpu"
    """Where they would train."""
    retry_failed: bool = False
    """Count what failed before as missing."""


@dataclass(frozen=True)
class Show(Selection):
    """Trains nothing: prints the tables of the results that are there, of whatever recordings most of them are."""

    format: Literal[typesetting.FORMATS] = "terminal"
    """How to print the tables."""
    all_seeds: bool = False
    """A row for each run in place of one for each condition."""


@dataclass(frozen=True)
class Page(command_line.Paths):
    """Trains nothing: puts the tables into docs/results.md, in place of those that it has."""

    preset: Literal[tuple(PRESETS)] = "cpu"
    """Whose tables."""
    results_dir: str = REFERENCE
    """Folder of the results files."""
    check: bool = False
    """Write nothing; exit with 1 if the page has other tables than these."""


@dataclass(frozen=True)
class Claims(command_line.Paths):
    """Trains nothing: writes the page of claims, each judged by a rule from the results."""

    results_dir: str = REFERENCE
    """Folder of the results files."""
    output: str | None = None
    """The page's file; that of the committed runs, results/CLAIMS.md of this project, if not given."""
    check: bool = False
    """Write nothing; exit with 1 if the page is another than this."""


def main(options: Train | Plan | Show | Page | Claims) -> None:
    """What the command line asks for."""
    {Train: train, Plan: plan, Show: show, Page: page, Claims: write_claims}[type(options)](options)


def train(options: Train) -> None:
    """Trains what is missing, says before what that is, and prints the tables."""
    runs, samples = options.runs, {}
    print(f"Preset {options.preset}: {PRESETS[options.preset].__doc__}", file=sys.stderr)
    if options.engine == "local":
        check_device(runs, options.device)
        runs, samples = with_data(runs, may_download=True)
    without_data, runs = runs, on_found_data(runs, load_all(options.results_dir).values())
    standing = standing_of(runs, options)
    missing = [status.run for status in standing if status.state == "missing"]
    guesses = seconds_of(missing, samples, options)
    print(_outlook(standing, guesses, options.results_dir), file=sys.stderr)
    standing = sweep(
        runs,
        engine_of(options),
        results_dir=options.results_dir,
        device=options.device,
        retry_failed=options.retry_failed,
        guesses={run.identity: seconds for run, seconds in zip(missing, guesses, strict=True)},
    )
    # Where the data are on other machines, the results tell which they are.
    runs = on_found_data(without_data, load_all(options.results_dir).values())
    standing = [replace(status, run=run) for status, run in zip(standing, runs, strict=True)]
    print_tables(standing, options.results_dir)
    if any(status.state != "done" for status in standing):
        sys.exit(1)


def plan(options: Plan) -> None:
    """A line for each run: how it stands with it, and about how long it takes; a sum of what is missing."""
    runs = options.runs
    check_device(runs, options.device)
    runs, samples = with_data(runs, may_download=False)
    runs = on_found_data(runs, load_all(options.results_dir).values())
    standing = standing_of(runs, options)
    seconds = seconds_of(runs, samples, options)
    for status, second in zip(standing, seconds, strict=True):
        reason = f" ({status.reason})" if status.reason else ""
        print(f"{status.state:8}{_duration(second):>8}  {status.run}{reason}")
    missing = [second for status, second in zip(standing, seconds, strict=True) if status.state == "missing"]
    print(_outlook(standing, missing, options.results_dir))
    if any(map(_is_download, runs)):
        print(
            "A training would download data, unless they are in the cache. Until then, done is what most results here "
            "were trained on."
        )


def show(options: Show) -> None:
    """Prints the tables of what is there."""
    check_folder(options.results_dir)
    runs = on_found_data(options.runs, load_all(options.results_dir).values())
    standing = statuses(runs, options.results_dir)
    print_tables(standing, options.results_dir, format=options.format, all_seeds=options.all_seeds)


def page(options: Page) -> None:
    """Puts the tables into docs/results.md; with `check`, only exits with 1 if other tables are there."""
    check_folder(options.results_dir)
    results = load_all(options.results_dir).values()
    standing = begun(statuses(on_found_data(preset_runs(options.preset), results), options.results_dir))
    document = PAGE.read_text(encoding="utf-8")
    updated = typesetting.insert(document, typesetting.render(standing, results, format="markdown"))
    if updated == document:
        return
    if options.check:
        sys.exit(f"The tables in {PAGE.name} are not those of the results: write them by `python tables.py page`.")
    files.replace(PAGE, updated.encode())


def write_claims(options: Claims) -> None:
    """Writes the page of claims; with `check`, only exits with 1 if another is there."""
    check_folder(options.results_dir)
    output = Path(options.output or CLAIMS)
    text = claims.page(claim_list.claims(), Evidence.of(options.results_dir), output.parent).encode()
    if not options.check:
        files.replace(output, text)
    elif not output.exists() or output.read_bytes() != text:
        sys.exit(f"{output.name} is not what the results say: write it by the same command without --check.")


def print_tables(standing: Sequence[Status], results_dir: str, **options) -> None:
    """Prints the tables of these runs, and on stderr which of them failed; `options` are those of `render`."""
    print(typesetting.render(standing, load_all(results_dir).values(), **{"format": "terminal", **options}), end="")
    failures = [f"{status.run}: {status.reason}" for status in standing if status.state == "failed"]
    if failures:
        print(f"\n{len(failures)} failed; --retry-failed tries again:", *failures, sep="\n", file=sys.stderr)


def check_device(runs: Sequence[Run], device: str) -> None:
    """Refuses a device that this machine lacks by a ValueError, before anything is loaded or trained."""
    replace(runs[0].config, device=device)


def with_data(runs: Sequence[Run], *, may_download: bool) -> tuple[list[Run], dict[tuple, Sample]]:
    """The runs with the digests of their data, and samples of these; every data set is loaded once.

    Unless it `may_download` data, runs on these stay without, and their sample is of what stands in for them, if there
    is such.
    """
    digests, samples = {}, {}
    for run in runs:
        if run.data_key in samples:
            continue
        if may_download or not _is_download(run):
            data = load_data(run.experiment, run.config)
            digests[run.data_key], samples[run.data_key] = data.digest, Sample.of(data)
        elif stand_in := EXPERIMENTS[run.experiment].stand_in:
            data = load_data(run.experiment, replace(run.config, data_root=stand_in))
            num_training = EXPERIMENTS[run.experiment].paper.training_samples
            samples[run.data_key] = replace(Sample.of(data), num_training=num_training)
    return [replace(run, digest=digests.get(run.data_key)) for run in runs], samples


def standing_of(runs: Sequence[Run], options: Train | Plan) -> list[Status]:
    """How it stands with the runs; what failed counts as missing if it is to be done again."""
    return statuses(runs, options.results_dir, retry_before=math.inf if options.retry_failed else 0.0)


def seconds_of(runs: Sequence[Run], samples: dict[tuple, Sample], options: Train | Plan) -> list[float | None]:
    """About how long each run takes, by completed runs or else by a timed step; None if its data are not here."""
    results = list(load_all(options.results_dir).values())
    seconds = dict(zip([run.identity for run in runs], estimated_seconds(runs, results, options.device), strict=True))
    unknown = [run for run in runs if seconds[run.identity] is None and run.data_key in samples]
    if not unknown:
        return list(seconds.values())
    guesses = rough_seconds(unknown, samples, [*load_all(REFERENCE).values(), *results], options.device)
    seconds |= zip([run.identity for run in unknown], guesses, strict=True)
    return list(seconds.values())


def engine_of(options: Train) -> Engine:
    if options.engine == "ray":
        from reproduction import ray_engine

        return ray_engine.connect(options.device, options.jobs)
    return partial(run_locally, devices=devices_of(options.device, options.jobs))


def _is_download(run: Run) -> bool:
    return run.settings.get("data_root", "") is None


def _outlook(standing: Sequence[Status], seconds: Sequence[float | None], results_dir: str) -> str:
    """What is done, what is to be trained, and how long that takes: `seconds` are those of the missing runs."""
    counts = {state: sum(status.state == state for status in standing) for state in ("done", "failed", "missing")}
    sentence = f"{counts['done']} of {len(standing)} runs are done in {results_dir}; "
    if counts["failed"]:
        sentence += f"{counts['failed']} failed before and stay so without --retry-failed; "
    if not counts["missing"]:
        return sentence + "there is nothing to train."
    known = [second for second in seconds if second is not None]
    time = f"roughly {_duration(sum(known))} of training, one after the other" if known else "for an unknown time"
    if known and len(known) < len(seconds):
        time += f", and {len(seconds) - len(known)} of unknown length"
    return sentence + f"{counts['missing']} to train: {time}."


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h" if minutes else f"{seconds:.0f} s"


COMMANDS = (
    Annotated[Train, tyro.conf.subcommand("run")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Page, tyro.conf.subcommand("page")]
    | Annotated[Claims, tyro.conf.subcommand("claims")]
)

if __name__ == "__main__":
    command_line.run(COMMANDS, main)
