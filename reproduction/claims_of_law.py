"""What is claimed of the law behind the saving, for `claim_list.py`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from .claim_commands import law
from .claims import MEMORY, OURS, Above, AtMost, Below, Claim, factor, percent, points
from .collapse import CHOSEN, asymmetry, between, spread_left_out, spreads, spreads_within_settings
from .evidence import NOT_MEASURED, Finding, interval, measured
from .law_subjects import MODELS

LAW_MARGIN = 0.1
"""By how much a predicted saving may be off: ten points."""
LEAST_SPREAD = 0.1
"""Evaluations that vary by less have nothing to explain."""
MOST_LEFT = 0.5
"""Which share of the spread may be left about a curve that explains it."""
FEWEST_SETTINGS = 3
"""At fewer, any order of the cases fits a curve."""
FEWEST_CASES = 6
"""Of fewer, too many of their orders would pass: of the Neural CDE's five, one in five."""
FLAT = "the evaluations vary by less than a tenth, so there is nothing to explain"
Record = Mapping[str, Any]
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
                "by how much NFE over those of z alone differ where that ratio is equal, of the settings where they "
                "differ most; atol is of both solves",
                measured("law", model, partial(_symmetry, norm)),
                AtMost(LEAST_SPREAD),
                percent,
                law(model, "grid"),
            )
        for norm in ("default", "seminorm"):
            yield Claim(
                f"The backward NFE of `{norm}` fall on one curve against {CHOSEN[norm]}: {TITLES[model]}",
                OURS,
                "spread about the curve over the spread about a constant, over loss scales, atol, batches and widths",
                measured("law", model, partial(_collapse, norm, CHOSEN[norm])),
                AtMost(MOST_LEFT),
                factor,
                law(model, "grid"),
            )
        yield Claim(
            f"At one loss scale and atol the ratio of parameters to state sets the cost of `default`: {TITLES[model]}",
            MEMORY,
            "spread about the curve against that ratio over the spread of the cases at equal settings",
            measured("law", model, _ratio_within_settings),
            AtMost(MOST_LEFT),
            factor,
            law(model, "grid"),
        )
        yield Claim(
            f"The saving is largest where atol lies between the sizes of a_z and a_theta: {TITLES[model]}",
            OURS,
            "mean saving there minus the mean saving elsewhere, over the cases that have both",
            measured("law", model, _between),
            Above(0.0),
            points,
            law(model, "grid"),
        )
    for text, quantity, model in (
        ("from the size of a_z alone", CHOSEN["seminorm"], "speech_commands"),
        ("from the sizes of a_theta and a_z", CHOSEN["default"], "speech_commands"),
        ("from the sizes of a_theta and a_z", CHOSEN["default"], "neural_ode"),
    ):
        yield Claim(
            "What the seminorm saves at settings not measured before is predicted to ten points in the mean "
            f"{text}: {TITLES[model]}",
            OURS,
            "distance of the predicted saving from the measured one, over the further settings",
            measured("law_predictions", model, partial(_prediction, quantity)),
            Below(LAW_MARGIN),
            points,
            law(model, "predict", "check"),
        )


def _collapse(norm: str, quantity: str, path: Path, record: Record) -> Finding | str:
    spread = spreads(record["cases"], norm)
    if spread["nothing"] < LEAST_SPREAD:
        return FLAT
    num_rows = sum(row["norm"] == norm for case in record["cases"] for row in case["rows"])
    shares = {
        "about the curve": spread[quantity],
        "about that of the other cases": spread_left_out(record["cases"], norm, quantity),
        "about a curve against loss scale / atol": spread["loss scale / atol"],
    }
    told = ", ".join(f"{percent(share)} {where}" for where, share in shares.items())
    note = f"spread {percent(spread['nothing'])} about a constant, {told}"
    return Finding(spread[quantity] / spread["nothing"], math.nan, math.nan, num_rows, "settings", (path,), note)


def _symmetry(norm: str, path: Path, record: Record) -> Finding | str:
    cases = [case for case in record["cases"] if spreads([case], norm)["nothing"] >= LEAST_SPREAD]
    if not cases:
        return FLAT
    return Finding(max(map(partial(asymmetry, norm=norm), cases)), math.nan, math.nan, len(cases), "cases", (path,))


def _ratio_within_settings(path: Path, record: Record) -> Finding | str:
    cases = record["cases"]
    number, nothing, about = spreads_within_settings(cases, "default", "parameters / state", least=LEAST_SPREAD)
    if number < FEWEST_SETTINGS or len(cases) < FEWEST_CASES:
        return "too few cases, or they differ by a tenth at too few settings"
    note = f"at the {number} settings where they differ by a tenth or more: by {percent(nothing)}"
    return Finding(about / nothing, math.nan, math.nan, len(cases), "cases", (path,), note)


def _between(path: Path, record: Record) -> Finding | str:
    both = [(inside, outside) for inside, outside in map(between, record["cases"]) if inside and outside]
    num_between = sum(len(inside) for inside, _ in both)
    num_settings = sum(len(inside) + len(outside) for inside, outside in map(between, record["cases"]))
    note = f"of {len(record['cases'])}; {num_between} of {num_settings} settings lie between"
    if len(both) < FEWEST_CASES:
        return f"{len(both)} cases have settings of both kinds, too few to tell"
    gains = [mean(inside) - mean(outside) for inside, outside in both]
    return interval(gains, "cases", [path], note)


def _prediction(of_default: str, path: Path, record: Record) -> Finding | str:
    """Of the settings whose NFE of `default` were predicted from this quantity."""
    distances = [
        abs(setting["predicted_saving"] - setting["measured_saving"])
        for setting in record["settings"]
        if "measured_saving" in setting and setting["predicted_from"]["default"] == of_default
    ]
    if not distances:
        return NOT_MEASURED
    num_beyond = sum(distance > LAW_MARGIN for distance in distances)
    note = f"{num_beyond} of them beyond ten points, the farthest by {points(max(distances))[1:]}"
    found = interval(distances, "settings", [path], note)
    return replace(found, low=max(found.low, 0.0))  # a mean distance is not below 0
