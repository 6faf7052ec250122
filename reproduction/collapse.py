"""The law behind the saving, read off the measurements of `law.py`: on what the backward NFE depends, and on what not.

The backward equation is linear in the adjoint, so a factor c on the loss is one on a_z and a_theta. A step is judged by
err / (atol + rtol |a|), entry by entry: only c |a| / atol can matter. Where it is small the adjoint is hardly measured,
and z alone sets the steps. It never stops to matter where it is large: the adjoint has entries of every size, and the
RMS is made of those that are still below atol / rtol.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy

Case, Row = Mapping[str, Any], Mapping[str, Any]


def _over_atol(name: str) -> Callable[[Case, Row], float]:
    return lambda case, row: row["loss_scale"] * case["sizes"][name] / row["atol"]


QUANTITIES: dict[str, Callable[[Case, Row], float]] = {
    "loss scale": lambda case, row: row["loss_scale"],
    "parameters / state": lambda case, row: case["num_parameters"] / case["batch_size"],
    "loss scale / atol": lambda case, row: row["loss_scale"] / row["atol"],
    "RMS(a_z) / atol": _over_atol("a_z_rms_largest"),
    "RMS(a_theta) / atol": _over_atol("a_theta_rms_last"),
}
"""What the backward NFE may depend on. Of a_z it is the largest RMS along the solve, of a_theta that at its end."""

CHOSEN = {"default": "RMS(a_theta) / atol", "per-tensor": "RMS(a_theta) / atol", "seminorm": "RMS(a_z) / atol"}
"""What each norm's NFE are drawn against and predicted from.

Over widths a_z collapses `default` best, for one width a_theta does. Predictions from a_z alone failed for larger
batches: of a mean loss a_z is divided by the batch, and a_theta is not.
"""


def of_z_alone(case: Case, atol: float) -> int:
    """The backward NFE that z alone asks for: that of the seminorm at the least loss scale."""
    rows = [row for row in case["rows"] if row["norm"] == "seminorm" and row["atol"] == atol]
    return min(rows, key=lambda row: row["loss_scale"])["backward_nfe"]


def points(cases: Iterable[Case], norm: str, quantity: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The quantity, and the backward NFE over those of z alone, of every row of this norm: (rows,) each."""
    pairs = [
        (QUANTITIES[quantity](case, row), row["backward_nfe"] / of_z_alone(case, row["atol"]))
        for case in cases
        for row in case["rows"]
        if row["norm"] == norm
    ]
    return tuple(numpy.array(values) for values in zip(*pairs, strict=True))


class Curve:
    """The non-decreasing curve through points in the logarithms of both, by least squares; constant beyond its ends."""

    def __init__(self, quantity: Sequence[float], nfe: Sequence[float]):
        from sklearn.isotonic import IsotonicRegression  # takes a second, and most commands do without

        self._fit = IsotonicRegression(out_of_bounds="clip").fit(numpy.log(quantity), numpy.log(nfe))
        self.spread = _share(self.distances(quantity, nfe))
        """The standard deviation of the points about the curve, as a share."""

    def distances(self, quantity: Sequence[float], nfe: Sequence[float]) -> numpy.ndarray:
        """How far points lie from the curve, in the logarithm."""
        return numpy.log(nfe) - self._fit.predict(numpy.log(quantity))

    def __call__(self, quantity: Sequence[float] | float) -> numpy.ndarray:
        return numpy.exp(self._fit.predict(numpy.log(numpy.atleast_1d(quantity))))


def _share(distances: numpy.ndarray) -> float:
    return float(numpy.exp(numpy.std(distances)) - 1)


def spreads(cases: Sequence[Case], norm: str) -> dict[str, float]:
    """How far the points lie from one curve, for each quantity; under the name `nothing`, how far from a constant."""
    found = {name: Curve(*points(cases, norm, name)).spread for name in QUANTITIES}
    _, nfe = points(cases, norm, "loss scale")
    return {"nothing": _share(numpy.log(nfe)), **found}


def asymmetry(case: Case, norm: str) -> float:
    """By which share the backward NFE over those of z alone differ where loss scale / atol is equal, at most."""
    ratios, nfe = points([case], norm, "loss scale / atol")
    alike = [nfe[numpy.isclose(ratios, ratio)] for ratio in ratios]
    return float(max(group.max() / group.min() - 1 for group in alike))


def spread_left_out(cases: Sequence[Case], norm: str, quantity: str) -> float:
    """As that about one curve, but each case is judged by the curve through the others."""
    distances = []
    for number, case in enumerate(cases):
        others = [*cases[:number], *cases[number + 1 :]]
        distances.append(Curve(*points(others, norm, quantity)).distances(*points([case], norm, quantity)))
    return _share(numpy.concatenate(distances))


def spreads_within_settings(
    cases: Sequence[Case], norm: str, quantity: str, *, least: float
) -> tuple[int, float, float]:
    """How far cases differ at one loss scale and atol, and how far they lie from one curve there.

    The NFE are over their geometric mean at each setting, so that a quantity that is constant in a case can matter.
    Settings count at which the cases differ by `least` or more; their number comes first, then both spreads.
    """
    settings = [(row["loss_scale"], row["atol"]) for case in cases for row in case["rows"] if row["norm"] == norm]
    values, nfe = points(cases, norm, quantity)
    logarithms, chosen = numpy.log(nfe), []
    for setting in set(settings):
        same = [number for number, other in enumerate(settings) if other == setting]
        logarithms[same] -= logarithms[same].mean()
        if _share(logarithms[same]) >= least:
            chosen.append(same)
    if not chosen:
        return 0, 0.0, 0.0
    rows = numpy.concatenate(chosen)
    about = Curve(values[rows], numpy.exp(logarithms[rows])).spread
    return len(chosen), _share(logarithms[rows]), about


def saving(default_nfe: float, seminorm_nfe: float) -> float:
    """The share of the backward NFE of `default` that the seminorm saves."""
    return 1 - seminorm_nfe / default_nfe


def predicted_saving(cases: Sequence[Case], case: Case, row: Row) -> float:
    """What the seminorm saves at a setting of which only the sizes are known.

    The curves are those of the cases with weights of the same kind, trained or not, and if there are such with the same
    width.
    """
    alike = [known for known in cases if known["weights"] == case["weights"]]
    alike = [known for known in alike if known["width"] == case["width"]] or alike
    nfe = {
        norm: Curve(*points(alike, norm, CHOSEN[norm]))(QUANTITIES[CHOSEN[norm]](case, row))[0]
        for norm in ("default", "seminorm")
    }
    return saving(nfe["default"], nfe["seminorm"])


def measured_savings(case: Case) -> dict[tuple[float, float], float]:
    """What the seminorm saves, by loss scale and absolute tolerance."""
    nfe = {(row["loss_scale"], row["atol"], row["norm"]): row["backward_nfe"] for row in case["rows"]}
    return {
        (loss_scale, atol): saving(nfe[loss_scale, atol, "default"], nfe[loss_scale, atol, "seminorm"])
        for loss_scale, atol, norm in nfe
        if norm == "seminorm"
    }


def between(case: Case) -> tuple[list[float], list[float]]:
    """What the seminorm saves where atol lies between the RMS of a_z and that of a_theta, and elsewhere."""
    a_z, a_theta = (case["sizes"][name] for name in ("a_z_rms_largest", "a_theta_rms_last"))
    inside, outside = [], []
    for (loss_scale, atol), share in measured_savings(case).items():
        (inside if loss_scale * a_z < atol < loss_scale * a_theta else outside).append(share)
    return inside, outside
