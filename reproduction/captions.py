"""What the figures of `figures.py` show, in words, for readers of a page who see them and those who do not."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import diagnostic_figures
from .experiments import EXPERIMENTS
from .typesetting import tolerances


@dataclass(frozen=True)
class Caption:
    """A figure's title, the text that stands for it where it cannot be seen, and how it is to be read."""

    title: str
    alternative: str
    reading: str


OF_RUNS = {
    "backward-nfe": Caption(
        "what a gradient step costs",
        "Line chart of the backward NFE of a gradient step against the epoch, a line for each norm.",
        "Evaluations of the field in the backward solve of a mean gradient step. Lines are means over the seeds, bands "
        "go from the least to the most; the dotted line is the forward solve.",
    ),
    "learning": Caption(
        "what is learnt",
        "Line charts of loss, and of accuracy if there is one, against the epoch, a line for each norm.",
        "Lines with markers are validation data, mean over the seeds in a band from the least to the most; thin lines "
        "are the training steps. Norms that learn alike lie on each other.",
    ),
    "nfe-by-tolerance": Caption(
        "cost over the tolerance",
        "Line charts of the backward NFE of a gradient step against the relative tolerance, and of its ratio to that "
        "of the seminorm, a line for each norm.",
        "Left the evaluations of a mean gradient step in the first epochs, right how many times the seminorm's they "
        "are. Points are seeds; tolerances get tighter to the right.",
    ),
    "solver-times": Caption(
        "where in time the backward solve works",
        "Histograms over the time of the solve of evaluations, accepted and rejected steps, default beside seminorm.",
        "The backward solve goes from right to left. The numbers above each panel are sums over time: what a mean "
        "gradient step has.",
    ),
}
CAPTIONS = {
    f"{experiment}-{group}-{kind}".replace("--", "-"): Caption(
        f"{card.title_of(group)}: {caption.title}", caption.alternative, caption.reading
    )
    for experiment, card in EXPERIMENTS.items()
    for group in card.figure_groups
    for kind, caption in OF_RUNS.items()
} | {
    "gradient-errors": Caption(
        "How exact a gradient is, and what it costs",
        "Line charts of the relative error of the gradient against NFE, and of the backward NFE against the relative "
        "tolerance, a line for each way to differentiate, a column for each experiment.",
        "Above, further left is cheaper and further down more exact. Points are tolerances: medians over batches, with "
        "bars from the least to the most. Tolerances less than two decades from the reference's have no error.",
    ),
    "step-errors": Caption(
        "What drives the steps",
        "Scatter charts over the time of one backward solve: each attempted step's error over its tolerance, for z, "
        "a_z, a_θ and, in a flow, a_t, and its size, default beside seminorm; below, bars of which is the largest.",
        "The reason behind the trick, seen. The largest error sets the next step, and above the line a step is "
        "rejected. Where that is the parameters' adjoint, a_θ, or that of time, a_t, the seminorm takes longer steps; "
        "where it is the state, z, or its adjoint, a_z, the seminorm has nothing to save.",
    ),
    "law": Caption(
        "On what the saving depends",
        "Charts of the backward NFE against the factor on the loss and against the size of the adjoint over atol, and "
        "of what the seminorm saves, with predictions and what was measured then; a column for each model.",
        "Above, a line is a case (weights, width, batch) at one absolute tolerance. In the middle the same points lie "
        "against the size of the adjoint over atol (of a_θ for default, of a_z for the seminorm), with the curve that "
        "they spread about. Below, rings were predicted before the dots were measured.",
    ),
    "equal-error": Caption(
        "What is saved at the same error",
        "Line charts of the relative error of the gradient against NFE and against CPU seconds, and what every way "
        "costs over default at the same error; a row for each experiment.",
        "To the left, points are tolerances, means over batches and weights; filled with dopri5, hollow with bosh3. To "
        "the right, a way saves evaluations where it lies left of the line, at three tolerances from loose to tight; "
        "bars are 95 % intervals, as wide as the wider one of two, over the batches and over the weights. An arrow to "
        "the left: the way is more exact than default at any tolerance, so it costs this much at most; to the right: "
        "it is less exact, so at least; to both sides: by some of the weights, so that there is no interval.",
    ),
    "flow-densities": Caption(
        "Flows: data, density and samples",
        "For each toy three squares: points of the data, the density that was learnt, and points drawn from it.",
        "Points that the training has not seen, the density from the solve to the noise, and noise solved back.",
    ),
    "flow-images": Caption(
        "Flows: images and samples",
        "Two mosaics of small grey images: of the test set, and drawn from the flow.",
        "Left images that the training has not seen, right noise solved back through all flows.",
    ),
    "flow-integrals": Caption(
        "Flows: does it pay to leave the log-determinant out of the norms?",
        "Line charts of the errors of log-likelihood and gradient against NFE, a line for each way to treat the "
        "log-determinant.",
        "Points are tolerances, medians over three batches with one set of weights; bars go from the least to the "
        "most. Further left is cheaper and further down more exact: a way would pay where its line lies below the "
        "others, as a looser tolerance moves along a line. Over more batches and weights no such gain is shown: see "
        "the figure of equal errors.",
    ),
    "acrobot-control-frames": Caption(
        "Acrobot's learnt control, in frames",
        "Ten frames of the two links of the acrobot, from hanging at rest, with the path of the tip between them.",
        "Torques from the learnt potential and control matrix act on the true dynamics.",
    ),
    "acrobot-control-curves": Caption(
        "Acrobot's learnt control, in curves",
        "Line charts of both joints' angles, velocities and torques against time.",
        "The same motion. Dotted lines are the upright angle and the bounds of the torques.",
    ),
}
"""By the name of a figure."""
ANIMATIONS = {
    "acrobot-control": Caption(
        "Acrobot's learnt control, in motion",
        "The two links of the acrobot in motion, with the path of the tip.",
        "",
    ),
    "flow": Caption(
        "Flows: noise becomes data", "Points of a normal distribution move until they lie like the data.", ""
    ),
}
"""By the name of a figure that moves."""


def caption(name: str, results_dir: str) -> Caption:
    """The caption of a figure that has been drawn from these results.

    That of the gradients' errors also says what they were measured against, and on how much.
    """
    found = CAPTIONS[name]
    if name != "gradient-errors":
        return found
    records = diagnostic_figures.read(results_dir, "gradient_errors")
    references = (_reference(EXPERIMENTS[experiment].title, record) for experiment, record in records.items())
    return dataclasses.replace(found, reading=" ".join([found.reading, *references]))


def _reference(title: str, record: Mapping[str, Any]) -> str:
    """What a measurement of the gradients' errors takes as exact, by its file."""
    rows, reference = record["rows"], record["reference"]
    num_batches = len({row["batch"] for row in rows})
    decades = round(math.log10(min(row["rtol"] for row in rows) / reference[0]))
    errors = [row["reference_error"] for row in rows if "reference_error" in row]
    own = f"is {max(errors):.1g} or less away, relatively" if errors else "was not compared"
    return (
        f"{title}: {num_batches} batches of {record['batch_size']} samples with one set of weights. The reference is "
        f"the seminorm in double precision at {tolerances(*reference)}, {decades} decade{'s' * (decades != 1)} tighter "
        f"than the tightest point; discrete at the same tolerances {own}."
    )
