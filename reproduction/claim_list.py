"""What is claimed, for the page of `claims.py`: first what the paper says, then what we say."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from .claim_commands import RUNS, equal_error, step_errors
from .claims import (
    ELSEWHERE,
    MEMORY,
    OURS,
    PAPER,
    Above,
    AtLeast,
    Below,
    Claim,
    Holds,
    Within,
    factor,
    log_factor,
    percent,
    points,
)
from .claims_of_flows import claims_of_flows
from .claims_of_law import TITLES, claims_of_law
from .evidence import NOT_MEASURED, Evidence, Finding, Way, accuracy, backward_nfe, comparison, loss, measured, seconds
from .experiments import EXPERIMENTS
from .fair_saving import COMPARED_AT, Cost, Ratio
from .published import PUBLISHED
from .runs import TOLERANCES
from .typesetting import tolerances

ACROBOT = (1e-4, 1e-4)
ACCURACY_MARGIN = 0.02
"""Within how many points of accuracy two ways learn alike; the paper's spread over seeds is about half a point."""
LEAST_SAVING = 0.01
"""One in a hundred is no saving, nor a larger error: two ways may differ by a few steps."""
LOSS_MARGIN = 0.1
"""Within which difference of the logarithm two losses are alike: a factor of 1.1."""


def claims() -> list[Claim]:
    """All claims, in the order of the page."""
    return [
        *_of_the_paper(),
        *_of_acrobot(),
        *_of_steps(),
        *_of_gradients(),
        *_of_ours(),
        *claims_of_law(),
        *claims_of_flows(),
    ]


def _ways(experiment: str, rtol: float, atol: float, norm: str = "seminorm", **options) -> tuple[Way, Way]:
    return Way(experiment, rtol, atol, norm, **options), Way(experiment, rtol, atol, "default")


def _of_the_paper() -> Iterator[Claim]:
    saved = "share of the backward NFE of a training with `default` that `seminorm` saves, over pairs of equal seed"
    for rtol, atol in TOLERANCES:
        ways, where = _ways("speech_commands", rtol, atol), f"on Speech Commands at {tolerances(rtol, atol)}"
        nfe = comparison(*ways, backward_nfe, is_share=True)
        yield Claim(
            f"The seminorm saves backward evaluations {where}", PAPER, saved, nfe, Above(LEAST_SAVING), percent, RUNS
        )
        [published] = [
            figure
            for figure in PUBLISHED
            if (figure.quantity, figure.rtol, figure.atol) == ("backward_nfe", rtol, atol)
        ]
        share = 1 - published.seminorm[0] / published.default[0]
        text = f"It saves {percent(share)} of them there"
        yield Claim(text, MEMORY, saved, nfe, Holds(share), percent, RUNS)
        yield Claim(
            f"The accuracy is not affected {where}",
            PAPER if (rtol, atol) == TOLERANCES[0] else MEMORY,
            "test accuracy with `seminorm` minus that with `default`, over pairs of equal seed",
            comparison(*ways, accuracy, is_share=False),
            Within(ACCURACY_MARGIN),
            points,
            RUNS,
        )
    for pair, source in zip(TOLERANCES, (PAPER, ELSEWHERE, ELSEWHERE), strict=True):
        yield Claim(
            f"Training takes less time with the seminorm on Speech Commands at {tolerances(*pair)}",
            source,
            "share of the CPU seconds of a training with `default` that `seminorm` saves, pairs on equal CPUs; in this "
            "library its evaluations are cheaper too",
            comparison(*_ways("speech_commands", *pair), seconds, is_share=True),
            Above(LEAST_SAVING),
            percent,
            RUNS,
        )


def _of_acrobot() -> Iterator[Claim]:
    saved = "share of the backward NFE of a training with `default` that is saved, over pairs of equal seed"
    for text, way, source in (
        ("The seminorm saves backward evaluations on acrobot", {}, PAPER),
        ("The norm of the released code, `as-published`, saves them on acrobot", {"norm": "as-published"}, PAPER),
        ("A warm start saves them on acrobot", {"warm_start": True}, OURS),
        ("`discrete` saves them on acrobot", {"norm": "discrete"}, OURS),
    ):
        nfe = comparison(*_ways("acrobot", *ACROBOT, **way), backward_nfe, is_share=True)
        yield Claim(text, source, saved, nfe, Above(LEAST_SAVING), percent, RUNS)
    whole = EXPERIMENTS["acrobot"].paper.max_epochs
    for name, way in (("the seminorm", {}), ("`as-published`", {"norm": "as-published"})):
        for when, source, num_epochs in (("after few epochs", OURS, None), (f"after {whole} epochs", PAPER, whole)):
            yield Claim(
                f"The loss {when} is not affected by {name} on acrobot",
                source,
                "ratio of the test losses to those of `default`, over pairs of equal seed (in the logarithm)",
                comparison(*_ways("acrobot", *ACROBOT, **way), loss, is_share=False, num_epochs=num_epochs),
                Within(LOSS_MARGIN),
                log_factor,
                RUNS,
            )


def _of_steps() -> Iterator[Claim]:
    def share(part: str, path: Path, record: Mapping[str, Any]) -> Finding:
        shares = [at[part] for at in record["shares"]]
        note = f"{percent(min(shares))} to {percent(max(shares))}"
        return Finding(mean(shares), math.nan, math.nan, len(shares), "pairs of tolerances", (path,), note)

    for experiment, part, name, source in (
        ("speech_commands", "a_theta", "The parameters' adjoint", PAPER),
        ("acrobot", "a_theta", "The parameters' adjoint", ELSEWHERE),
        ("flow", "a_theta", "The parameters' adjoint", ELSEWHERE),
        ("flow", "a_t", "The adjoint of time", OURS),
    ):
        yield Claim(
            f"{name} has the largest error in most steps of `default`, in one batch: {TITLES[experiment]}",
            source,
            f"share of the attempted steps in which {part} has the largest error, over the tolerances",
            measured("step_errors", experiment, partial(share, part)),
            AtLeast(0.5),
            percent,
            step_errors(experiment),
        )


def _of_gradients() -> Iterator[Claim]:
    for experiment in ("speech_commands", "flow"):
        for rtol in COMPARED_AT[experiment]:
            where = f"{TITLES[experiment]}, rtol {tolerances(rtol)}"
            for name, way in (("the seminorm", "seminorm"), ("`discrete`", "discrete")):
                yield Claim(
                    f"At equal tolerances the gradient of {name} is less exact: {where}",
                    OURS,
                    "error of its gradient over that of `default`",
                    partial(_ratio, experiment, "nfe", "error", way, rtol),
                    Above(1 + LEAST_SAVING),
                    factor,
                    equal_error(experiment),
                )
    ways = {
        "the seminorm": "seminorm",
        "`discrete`": "discrete",
        "the seminorm with bosh3": "seminorm, bosh3",
        "`discrete` with bosh3": "discrete, bosh3",
    }
    of_experiments = {
        "speech_commands": ways,
        "acrobot": ways | {"the warm start": "seminorm, warm start", "`as-published`": "as-published"},
        "flow": ways | {"the seminorm with integrals unweighed": "seminorm, integrals unweighed"},
    }
    for experiment, its_ways in of_experiments.items():
        for name, way in its_ways.items():
            for rtol in COMPARED_AT[experiment]:
                yield _at_equal_error(experiment, "nfe", name, way, rtol)
    for name, way in ways.items():
        for rtol in COMPARED_AT["speech_commands"]:
            yield _at_equal_error("speech_commands", "cpu_seconds", name, way, rtol)


def _at_equal_error(experiment: str, cost: Cost, name: str, way: str, rtol: float) -> Claim:
    saved = {"nfe": "evaluations", "cpu_seconds": "CPU seconds"}[cost]
    return Claim(
        f"At equal error of the gradient {name} at rtol {tolerances(rtol)} saves {saved}: {TITLES[experiment]}",
        OURS,
        f"{saved}, forward and backward, over those that `default` with dopri5 needs for the same error",
        partial(_ratio, experiment, cost, "at_equal_error", way, rtol),
        Below(1 - LEAST_SAVING),
        factor,
        equal_error(experiment),
    )


def _ratio(experiment: str, cost: Cost, quantity: str, way: str, rtol: float, evidence: Evidence) -> Finding | str:
    fair = evidence.fair(experiment, cost).get((way, rtol))
    if fair is None:
        return NOT_MEASURED
    ratio: Ratio = getattr(fair, quantity)
    path, record = evidence.measurement("equal_error", experiment)
    note = f"of {record['batch_size']} samples"
    of_weights = tuple(alone.known for alone in ratio.of_weights)
    unit = f"batches, each with {len(of_weights)} sets of weights" if of_weights else "batches"
    ends = (ratio.middle, ratio.low, ratio.high)
    return Finding(*ends, ratio.num_batches, unit, (path,), note, of_weights)


def _of_ours() -> Iterator[Claim]:
    default = Way("speech_commands", *TOLERANCES[0], "default")
    discrete = Way("speech_commands", *TOLERANCES[0], "discrete", method="bosh3")
    yield Claim(
        "bosh3 with `discrete` learns as well as dopri5 with `default` at 1e-3, 1e-6",
        OURS,
        "its test accuracy minus that of `default`, over pairs of equal seed",
        comparison(discrete, default, accuracy, is_share=False),
        Within(ACCURACY_MARGIN),
        points,
        RUNS,
    )
    for pairs in pairwise(TOLERANCES):
        loose, tight = (tolerances(*pair) for pair in pairs)
        for norm in ("default", "seminorm", "discrete"):
            ways = [Way("speech_commands", *pair, norm) for pair in pairs]
            yield Claim(
                f"Training with `{norm}` at {loose} does not get better by tolerances ten times tighter",
                OURS,
                f"test accuracy at {loose} minus that at {tight}, over pairs of equal seed and epochs",
                comparison(*ways, accuracy, is_share=False),
                Within(ACCURACY_MARGIN),
                points,
                RUNS,
            )
