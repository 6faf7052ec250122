"""Reruns the paper: does the runs of a preset that are missing and prints their tables, `python tables.py --help`."""

if __name__ == "__main__":
    from common import command_line

    command_line.guard_imports()

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from common import command_line
from common.results import load_all
from reproduction import typesetting
from reproduction.local_engine import devices_of, run_locally
from reproduction.runs import EXPERIMENTS, PRESETS, Run, preset_runs
from reproduction.status import Status, estimated_seconds, statuses
from reproduction.sweep import Engine, sweep

README = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Options:
    """Does the runs of a preset that are missing, and prints their tables.

    It may be stopped and started again at any time, and several may work on one results folder. It exits with 0 if
    every run is done, 1 if one failed, 2 for what cannot be used, 130 after Ctrl-C and 143 after SIGTERM.
    """

    experiments: tyro.conf.Positional[tuple[Literal[EXPERIMENTS], ...]] = EXPERIMENTS
    """Which experiments."""
    preset: Literal[tuple(PRESETS)] = "paper"
    """Quick: minutes on a CPU, reproduces no figure. Cpu: hours, reduced. Paper: everything as published."""
    device: str = "cpu"
    """Where to train: cpu, cuda for all GPUs, or one of them, such as cuda:1."""
    seeds: int | None = None
    """Runs of each condition, in place of the preset's own number."""
    jobs: int | None = None
    """Runs at a time; by default one on each device. They share the GPUs, and divide the CPU's threads."""
    data_root: str | None = None
    """Folder with the Speech Commands recordings. By default they are downloaded; quick has a synthetic sample."""
    results_dir: str = "results"
    """Folder of the results files."""
    engine: Literal["local", "ray"] = "local"
    """Local: processes of this machine. Ray: a cluster, whose address is in RAY_ADDRESS."""
    render: bool = False
    """Train nothing: print the tables of what is there."""
    dry_run: bool = False
    """Train nothing: list what is done, failed and missing, and how long that may take."""
    retry_failed: bool = False
    """Also do again what failed before."""
    format: Literal[typesetting.FORMATS] = "terminal"
    """How to print the tables."""
    all_seeds: bool = False
    """A row for each run in place of one for each condition."""
    write_readme: bool = False
    """With --render: also put the tables into README.md, in place of those that it has."""
    check: bool = False
    """With --render: exit with 1 if README.md has other tables than these."""

    def __post_init__(self):
        for name in ("seeds", "jobs"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1")


def main(options: Options) -> None:
    """What the command line asks for."""
    runs = preset_runs(
        options.preset, experiments=options.experiments, data_root=options.data_root, num_seeds=options.seeds
    )
    if options.engine == "local":
        # Refuses an unknown device before anything starts.
        replace(runs[0].config, device=options.device)
    if options.dry_run:
        print(plan(runs, options))
        return
    if options.render:
        standing = statuses(runs, options.results_dir)
    else:
        print(f"Preset {options.preset}: {PRESETS[options.preset].__doc__}", file=sys.stderr)
        standing = sweep(
            runs,
            engine_of(options),
            results_dir=options.results_dir,
            device=options.device,
            retry_failed=options.retry_failed,
        )
    tables = partial(typesetting.render, standing, load_all(options.results_dir).values(), all_seeds=options.all_seeds)
    print(tables(format=options.format), end="")
    if options.write_readme or options.check:
        update_readme(tables(format="markdown"), check=options.check)
    failures = [f"{status.run}: {status.reason}" for status in standing if status.state == "failed"]
    if failures:
        print(f"\n{len(failures)} failed; --retry-failed tries again:", *failures, sep="\n", file=sys.stderr)
    if not options.render and any(status.state != "done" for status in standing):
        sys.exit(1)


def update_readme(text: str, *, check: bool) -> None:
    """Puts the tables into README.md; with `check`, only exits with 1 if other tables are there."""
    document = README.read_text(encoding="utf-8")
    updated = typesetting.insert(document, text)
    if updated == document:
        return
    if check:
        sys.exit(f"The tables in {README.name} are not those of the results: write them with --write-readme.")
    README.write_text(updated, encoding="utf-8")


def engine_of(options: Options) -> Engine:
    if options.engine == "ray":
        from reproduction import ray_engine

        return ray_engine.connect(options.device, options.jobs)
    return partial(run_locally, devices=devices_of(options.device, options.jobs))


def plan(runs: Sequence[Run], options: Options) -> str:
    """A line for each run: how it stands with it, and about how long it takes; a sum of what is missing."""
    seconds = estimated_seconds(runs, load_all(options.results_dir).values(), options.device)
    standing = statuses(runs, options.results_dir, retry_before=math.inf if options.retry_failed else 0.0)
    lines = [_planned(status, second) for status, second in zip(standing, seconds, strict=True)]
    missing = [second for status, second in zip(standing, seconds, strict=True) if status.state == "missing"]
    known = [second for second in missing if second is not None]
    total = f"{len(missing)} of {len(runs)} runs are missing: about {_duration(sum(known))} of training"
    if len(known) < len(missing):
        total += f" and {len(missing) - len(known)} runs of unknown length"
    return "\n".join([*lines, total])


def _planned(status: Status, seconds: float | None) -> str:
    reason = f" ({status.reason})" if status.reason else ""
    return f"{status.state:8}{_duration(seconds):>8}  {status.run}{reason}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h" if minutes else f"{seconds:.0f} s"


if __name__ == "__main__":
    command_line.run(Options, main)
