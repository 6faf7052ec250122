"""What is claimed of the law behind the saving, for `claim_list.py`."""

from collections.abc import Iterator
from functools import partial
from statistics import mean

from scipy import stats

from .claims import MEMORY, OURS, Above, AtMost, Below, Claim, factor, percent, points
from .collapse import CHOSEN, between, spreads
from .evidence import Evidence, Finding, interval
from .law_subjects import MODELS
from .summary import CONFIDENCE

LAW_MARGIN = 0.1
"""By how much a predicted saving may be off: ten points."""
LAW = "python -m reproduction.law {} --weights-dir reference/weights --results-dir reference"
TITLES = {
    "speech_commands": "the Neural CDE",
    "acrobot": "acrobot",
    "neural_ode": "the small network",
    "flow": "the flow",
}


def claims_of_law() -> Iterator[Claim]:
    """One after the other, model by model."""
    for model in MODELS:
        for norm in ("default", "seminorm"):
            yield Claim(
                f"Of one batch the backward NFE of `{norm}` depend on loss scale / atol alone: {TITLES[model]}",
                OURS,
                "spread about the curve over the spread about a constant, of the case where it is largest",
                partial(_symmetry, model, norm),
                AtMost(0.25),
                factor,
                LAW.format("grid"),
            )
        for norm in ("default", "seminorm"):
            yield Claim(
                f"The backward NFE of `{norm}` fall on one curve against {CHOSEN[norm]}: {TITLES[model]}",
                OURS,
                "spread about the curve over the spread about a constant, over loss scales, atol, batches and widths",
                partial(_collapse, model, norm, CHOSEN[norm]),
                AtMost(0.5),
                factor,
                LAW.format("grid"),
            )
        yield Claim(
            f"The ratio of parameters to state sets the cost of `default`: {TITLES[model]}",
            MEMORY,
            "spread about the curve against that ratio over the spread about a constant",
            partial(_collapse, model, "default", "parameters / state"),
            AtMost(0.5),
            factor,
            LAW.format("grid"),
        )
        yield Claim(
            f"The saving is largest where atol lies between the sizes of a_z and a_theta: {TITLES[model]}",
            OURS,
            "mean saving there minus the mean saving elsewhere, over the settings of the grid (Welch's interval)",
            partial(_between, model),
            Above(),
            points,
            LAW.format("grid"),
        )
    for text, quantity in (
        ("from the size of a_z alone", CHOSEN["seminorm"]),
        ("from the sizes of a_theta and a_z", CHOSEN["default"]),
    ):
        yield Claim(
            f"What the seminorm saves at settings not measured before can be predicted within ten points {text}",
            OURS,
            "distance of the predicted saving from the measured one, over the further settings of all models",
            partial(_prediction, quantity),
            Below(LAW_MARGIN),
            points,
            f"{LAW.format('predict')}; {LAW.format('check')}",
        )


def _collapse(model: str, norm: str, quantity: str, evidence: Evidence) -> Finding | None:
    found = evidence.measurement("law", model)
    if found is None:
        return None
    path, record = found
    spread = spreads(record["cases"], norm)
    num_rows = sum(row["norm"] == norm for case in record["cases"] for row in case["rows"])
    note = f"spread {percent(spread['nothing'])} about a constant, {percent(spread[quantity])} about the curve"
    share = spread[quantity] / spread["nothing"]
    return Finding(share, float("nan"), float("nan"), num_rows, "settings", (path,), note)


def _symmetry(model: str, norm: str, evidence: Evidence) -> Finding | None:
    found = evidence.measurement("law", model)
    if found is None:
        return None
    path, record = found
    shares = []
    for case in record["cases"]:
        spread = spreads([case], norm)
        # Of a case where the NFE never change there is nothing to collapse.
        if spread["nothing"] > 0:
            shares.append(spread["loss scale / atol"] / spread["nothing"])
    return Finding(max(shares), float("nan"), float("nan"), len(shares), "cases", (path,)) if shares else None


def _between(model: str, evidence: Evidence) -> Finding | None:
    found = evidence.measurement("law", model)
    if found is None:
        return None
    path, record = found
    inside, outside = between(record["cases"])
    if min(len(inside), len(outside)) < 2:
        return None
    ends = stats.ttest_ind(inside, outside, equal_var=False).confidence_interval(CONFIDENCE)
    note = f"{len(inside)} between, with {percent(mean(inside))} saved; elsewhere {percent(mean(outside))}"
    difference = mean(inside) - mean(outside)
    return Finding(difference, float(ends.low), float(ends.high), len(inside) + len(outside), "settings", (path,), note)


def _prediction(of_default: str, evidence: Evidence) -> Finding | None:
    """Of the settings whose NFE of `default` were predicted from this quantity."""
    found = [
        (path, abs(setting["predicted_saving"] - setting["measured_saving"]))
        for model in MODELS
        for path, record in [evidence.measurement("law_predictions", model) or (None, {"settings": []})]
        for setting in record["settings"]
        if "measured_saving" in setting and setting["predicted_from"]["default"] == of_default
    ]
    note = f"the farthest is {percent(max(distance for _, distance in found))} off" if found else ""
    return interval([distance for _, distance in found], "settings", [path for path, _ in found], note)
