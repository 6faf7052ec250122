"""What is claimed of the continuous normalising flows, for `claim_list.py`."""

from collections.abc import Iterator
from functools import partial

from .claim_commands import RUNS_OF_FLOWS, growth
from .claims import ELSEWHERE, MEMORY, OURS, Above, Claim, Within, percent, points, signed
from .evidence import NOT_MEASURED, Evidence, Finding, Way, backward_nfe, bits_per_dim, comparison, interval, nll
from .experiments import FLOW

TOLERANCES = {
    "checkerboard": (1e-5, 1e-5),
    "8gaussians": (1e-5, 1e-5),
    "2spirals": (1e-5, 1e-5),
    "wine": (1e-6, 1e-8),
    "breast_cancer": (1e-6, 1e-8),
    "digits": (1e-5, 1e-5),
}
"""Of the runs on each data set."""
MEASURES = {"nll": ("nats", nll), "bits_per_dim": ("bits per dimension", bits_per_dim)}
"""Unit and quantity of each of the card's metrics."""
LIKELIHOOD_MARGIN = 0.02
"""Within how many of these two ways learn alike."""


def claims_of_flows() -> Iterator[Claim]:
    """Data set by data set."""
    for data, (rtol, atol) in TOLERANCES.items():
        way = partial(Way, "flow", rtol, atol, data=data)
        default, seminorm = way(norm="default"), way(norm="seminorm")
        unweighed = way(norm="seminorm", integrals="unweighed")
        for text, source, mine, theirs in (
            ("The seminorm saves backward evaluations", ELSEWHERE, seminorm, default),
            ("`discrete` saves backward evaluations", OURS, way(norm="discrete"), default),
            ("The seminorm with integrals unweighed saves backward evaluations", OURS, unweighed, default),
            ("It saves some of those of the seminorm alone", OURS, unweighed, seminorm),
        ):
            yield Claim(
                f"{text}: a flow, {data}",
                source,
                f"share of the backward NFE with `{theirs.norm}` that is saved, over pairs of equal seed",
                comparison(mine, theirs, backward_nfe, is_share=True),
                Above(0.01),  # one in a hundred is no saving
                percent,
                RUNS_OF_FLOWS,
            )
        unit, likelihood = MEASURES[FLOW.metric({"data": data})]
        for text, source, mine in (
            ("the seminorm", ELSEWHERE, seminorm),
            ("the seminorm with integrals unweighed", OURS, unweighed),
        ):
            yield Claim(
                f"The likelihood is not affected by {text}: a flow, {data}",
                source,
                f"{unit} of the test set minus those with `default`, over pairs of equal seed",
                comparison(mine, default, likelihood, is_share=False),
                Within(LIKELIHOOD_MARGIN),
                signed,
                RUNS_OF_FLOWS,
            )
    yield Claim(
        "The seminorm saves more where the network is wider: a flow, digits",
        MEMORY,
        "share of the backward NFE that it saves at width 64 minus that at width 16, trained weights, batch by batch",
        _gain_by_width,
        Above(0.01),
        points,
        growth(),
    )


def _gain_by_width(evidence: Evidence) -> Finding | str:
    found = [evidence.measurement("growth", "flow", f"digits, width {width}") for width in (16, 64)]
    if None in found:
        return NOT_MEASURED
    narrow, wide = (_savings(record["rows"]) for _, record in found)
    if not any((*narrow.values(), *wide.values())):
        return "it saves nothing at either width"
    return interval([wide[batch] - narrow[batch] for batch in wide], "batches", [path for path, _ in found])


def _savings(rows: list[dict]) -> dict[int, float]:
    """Of the seminorm against `default` at trained weights, by batch."""
    nfe = {(row["way"], row["batch"]): row["backward_nfe"] for row in rows if row["weights"] == "trained"}
    return {batch: 1 - nfe["seminorm", batch] / own for (way, batch), own in nfe.items() if way == "default"}
