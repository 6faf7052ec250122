"""Draws the paper's figures, and some more, from what is in results/: `python figures.py`, or `--help`."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from matplotlib.figure import Figure

from common import command_line, files
from common.results import check_folder, load_all
from reproduction import diagnostic_figures, flow_figures, law_figures, run_figures, time_figures
from reproduction.experiments import EXPERIMENTS
from reproduction.style import NothingToDraw, render

FORMATS = ("png", "pdf")


def figures(results_dir: str) -> dict[str, Callable[[], Figure]]:
    """Every figure by its name. What draws it raises NothingToDraw where the results lack what it takes."""
    results = list(load_all(results_dir).values())
    drawings = {}
    for experiment, card in EXPERIMENTS.items():
        for group in card.figure_groups:
            name = f"{experiment}-{group}" if group else experiment
            # One experiment without runs must not keep the other's figures from being drawn.
            runs = cache(partial(run_figures.comparable, results, experiment, group))
            drawings[f"{name}-backward-nfe"] = lambda runs=runs: run_figures.backward_nfe(runs())
            drawings[f"{name}-learning"] = lambda runs=runs: run_figures.learning(runs())
            drawings[f"{name}-solver-times"] = lambda runs=runs: time_figures.solver_times(runs())
            if len(card.tolerances) > 1:
                drawings[f"{name}-nfe-by-tolerance"] = lambda runs=runs: run_figures.nfe_by_tolerance(runs())
    read = partial(diagnostic_figures.read, results_dir)
    drawings["gradient-errors"] = lambda: diagnostic_figures.gradient_errors(read("gradient_errors"))
    drawings["step-errors"] = lambda: diagnostic_figures.step_errors(read("step_errors"))
    of_law = partial(read, names=law_figures.TITLES)
    drawings["law"] = lambda: law_figures.law(
        of_law("law", command="reproduction.law grid"), of_law("law_predictions", command="reproduction.law predict")
    )
    drawings["equal-error"] = lambda: law_figures.equal_error(read("equal_error", command="reproduction.equal_error"))
    drawings["acrobot-control-frames"] = lambda: diagnostic_figures.control_frames(read("control"))
    drawings["acrobot-control-curves"] = lambda: diagnostic_figures.control_curves(read("control"))
    samples = partial(flow_figures.read, results_dir)
    drawings["flow-densities"] = lambda: flow_figures.densities(samples(of_images=False))
    drawings["flow-images"] = lambda: flow_figures.images(samples(of_images=True))
    drawings["flow-integrals"] = lambda: diagnostic_figures.integrals(read("integrals"))
    return drawings


def animations(results_dir: str) -> dict[str, Callable[[], bytes]]:
    """The GIF of every figure that moves, by its name, as `figures`."""
    return {
        "acrobot-control": lambda: diagnostic_figures.control_animation(
            diagnostic_figures.read(results_dir, "control")
        ),
        "flow": lambda: flow_figures.animation(flow_figures.read(results_dir, of_images=False)),
    }


@dataclass(frozen=True)
class Options(command_line.Paths):
    """Draws every figure that there are results for, and says what the others lack.

    Figures of runs are made of completed runs, the others of what `python -m reproduction.diagnostics` has measured.
    It exits with 0 if all figures were drawn, 1 if some were not, and 2 for a folder that cannot be used.
    """

    results_dir: str = "results"
    """Folder of the results files."""
    output: str | None = None
    """Folder for the figures; `figures` in the folder of the results if not given."""


def main(options: Options) -> None:
    """Draws what can be drawn."""
    logging.basicConfig(format="%(message)s")
    check_folder(options.results_dir)
    output = Path(options.output or Path(options.results_dir, "figures"))
    output.mkdir(parents=True, exist_ok=True)
    drawn = {}
    lacking = []
    for name, draw in figures(options.results_dir).items():
        try:
            figure = draw()
        except NothingToDraw as reason:
            lacking.append(f"{name}: {reason}")
            continue
        drawn |= {f"{name}.{kind}": render(figure, kind) for kind in FORMATS}
    for name, draw in animations(options.results_dir).items():
        try:
            drawn[f"{name}.gif"] = draw()
        except NothingToDraw as reason:
            lacking.append(f"{name}.gif: {reason}")
    for name, content in drawn.items():
        files.replace(output / name, content)
    print(f"Drew {len(drawn)} files in {output}")
    for sentence in lacking:
        print(f"Not drawn: {sentence}", file=sys.stderr)
    sys.exit(1 if lacking else 0)


if __name__ == "__main__":
    command_line.run(Options, main)
