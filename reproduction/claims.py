"""The page of claims: what the paper says and what we say, each judged by a rule from the results.

`tables.py claims` writes it. No verdict is typed in: a claim has a number that is computed and a rule that compares it.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .evidence import Evidence, Find, Finding
from .summary import CONFIDENCE

Verdict = Literal["confirmed", "not confirmed", "refuted", "not testable here"]
PAPER, MEMORY, OURS = "the paper", "the paper, from memory, not checked against the paper", "ours"
ELSEWHERE = "the paper's claim, tried elsewhere"
"""On data or a model of which the paper does not say it."""
NARROW = 0.05
"""How far an interval may reach from a number that it is to confirm."""


@dataclass(frozen=True)
class Above:
    """Confirmed if the whole interval lies above the bound, refuted if all of it lies below; else neither."""

    bound: float

    def judge(self, finding: Finding) -> Verdict:
        """What the finding says."""
        return "confirmed" if finding.low > self.bound else "refuted" if finding.high < self.bound else "not confirmed"


@dataclass(frozen=True)
class Below:
    """Confirmed if the whole interval lies below the bound, refuted if all of it lies above; else neither."""

    bound: float

    def judge(self, finding: Finding) -> Verdict:
        """What the finding says."""
        return "confirmed" if finding.high < self.bound else "refuted" if finding.low > self.bound else "not confirmed"


@dataclass(frozen=True)
class Within:
    """Confirmed if the whole interval is within the margin about no difference, refuted if all of it is beyond."""

    margin: float

    def judge(self, finding: Finding) -> Verdict:
        """What the finding says."""
        if -self.margin < finding.low and finding.high < self.margin:
            return "confirmed"
        return "refuted" if finding.low > self.margin or finding.high < -self.margin else "not confirmed"


@dataclass(frozen=True)
class Holds:
    """Confirmed if the interval holds the paper's number and reaches no farther than five points from its own middle.

    Runs as small as ours never refute it.
    """

    number: float

    def judge(self, finding: Finding) -> Verdict:
        """What the finding says."""
        is_narrow = finding.high - finding.low <= 2 * NARROW
        return "confirmed" if is_narrow and finding.low <= self.number <= finding.high else "not confirmed"


@dataclass(frozen=True)
class AtMost:
    """Confirmed if the number itself is at most the bound, refuted if not: of numbers that have no interval."""

    bound: float

    def judge(self, finding: Finding) -> Verdict:
        """What the finding says."""
        return "confirmed" if finding.value <= self.bound else "refuted"


@dataclass(frozen=True)
class AtLeast:
    """Confirmed if the number itself is at least the bound, refuted if not: of numbers that have no interval."""

    bound: float

    def judge(self, finding: Finding) -> Verdict:
        """What the finding says."""
        return "confirmed" if finding.value >= self.bound else "refuted"


@dataclass(frozen=True)
class Claim:
    """A sentence, where it is from, the number that it is about, and the rule."""

    text: str
    source: str
    """One of the four above."""
    what: str
    """What the number is."""
    find: Find
    rule: Above | Below | Within | Holds | AtMost | AtLeast
    show: Callable[[float], str]
    command: str
    """What makes the files again."""

    def verdict(self, evidence: Evidence) -> tuple[Verdict, Finding | str]:
        """The verdict, and the number behind it or why there is none."""
        finding = self.find(evidence)
        return ("not testable here" if isinstance(finding, str) else self.rule.judge(finding)), finding


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    """A difference of shares."""
    return f"{100 * value:+.1f} points"


def signed(value: float) -> str:
    """A difference."""
    return f"{value:+.3f}"


def factor(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}"


def log_factor(value: float) -> str:
    """The ratio of which this is the logarithm."""
    return factor(math.exp(value))


def page(claims: Iterable[Claim], evidence: Evidence, directory: Path) -> str:
    """The page, in Markdown; its links start from `directory`, where it will lie."""
    judged = [(claim, *claim.verdict(evidence)) for claim in claims]
    counts = {verdict: sum(found == verdict for _, found, _ in judged) for verdict in Verdict.__args__}
    head = INTRODUCTION.format(results_dir=os.path.relpath(evidence.results_dir, directory))
    return "\n".join([head, *_counted(counts), *_table(judged), *_behind(judged, directory)]) + "\n"


INTRODUCTION = f"""\
# Claims
Written by `python tables.py claims` from the results in `{{results_dir}}`: do not edit. A verdict is computed by a rule
from files, and changes when they change. Both are named with each claim below.

Intervals are those of {100 * CONFIDENCE:.0f} % by Student's t, and n is what they are over. Where gradients are
measured with several sets of weights, an interval reaches as far as the wider one of two, over batches and over
weights. *Not confirmed*: the interval leaves it open, or there is one pair of runs and so no interval. *Not testable
here*: runs or measurements are missing, and as soon as they are there the claim is judged. The runs are smaller than
the paper's; how large they are stands with each claim. *At most* and *at least*: the number is a bound. *Open*:
it is one by some of the weights, so that there is no interval. An n of 8 x 3 is 8 batches with each of 3 sets of
weights; over the latter the interval is mostly the wider one.

Some numbers have no interval, such as those of one batch or of a fit. Their rules look at the number itself, so the
verdict is of what was measured and says nothing beyond. Of many intervals of {100 * CONFIDENCE:.0f} % some miss by
chance: a single verdict is no proof. The rules were written, and some changed, with the data known; of the numbers
only the predictions were made before their measurement.

The commands write into `results/`. `python tables.py claims --results-dir results --output results/mine.md` judges what
is there.
"""


def _counted(counts: dict[Verdict, int]) -> Iterator[str]:
    yield ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + "."
    yield ""


def _table(judged: list[tuple[Claim, Verdict, Finding | str]]) -> Iterator[str]:
    yield "| | claim | from | verdict | number | interval | n |"
    yield "|---:|---|---|---|---:|---|---:|"
    for number, (claim, verdict, finding) in enumerate(judged, start=1):
        cells = [finding, "-", "-"] if isinstance(finding, str) else _cells(claim, finding)
        yield f"| [{number}](#claim-{number}) | {claim.text} | {claim.source} | **{verdict}** | {' | '.join(cells)} |"
    yield ""


def _cells(claim: Claim, finding: Finding) -> list[str]:
    number, ends = claim.show(finding.value), [claim.show(end) for end in (finding.low, finding.high)]
    count = f"{finding.num} x {len(finding.of_weights)}" if finding.of_weights else str(finding.num)
    if math.isnan(finding.low) or math.isnan(finding.high):
        return [number, "-", count]
    if math.isinf(finding.low) and math.isinf(finding.high):
        return [number, "open", count]
    if math.isinf(finding.low):
        return [f"at most {number}", f"to {ends[1]}", count]
    if math.isinf(finding.high):
        return [f"at least {number}", f"from {ends[0]}", count]
    return [number, " to ".join(ends), count]


def _behind(judged: list[tuple[Claim, Verdict, Finding | str]], directory: Path) -> Iterator[str]:
    for number, (claim, verdict, finding) in enumerate(judged, start=1):
        yield f"## Claim {number}"
        yield f"{claim.text} ({claim.source}): **{verdict}**."
        yield ""
        yield f"- The number: {claim.what}."
        yield f"- The rule: {_in_words(claim)}"
        if isinstance(finding, Finding):
            note = f" ({finding.note})" if finding.note else ""
            yield f"- n = {finding.num} {finding.unit}{note}."
            if finding.of_weights:
                alone = ", ".join(_alone(claim, *ends) for ends in finding.of_weights)
                yield f"- By each set of weights alone: {alone}."
            yield f"- Files: {', '.join(_link(path, directory) for path in sorted(finding.files))}"
        yield f"- Again: `{claim.command}`"
        yield ""


def _alone(claim: Claim, low: float, high: float) -> str:
    if math.isinf(low):
        return f"at most {claim.show(high)}"
    return f"at least {claim.show(low)}" if math.isinf(high) else claim.show(low)


def _in_words(claim: Claim) -> str:
    rule, text = claim.rule, " ".join(type(claim.rule).__doc__.split())
    [(name, bound)] = vars(rule).items()
    return f"{text} The {name} is {claim.show(bound)}."


def _link(path: Path, directory: Path) -> str:
    parts = path.parts[-3:] if path.suffix == ".json" and path.parts[-2] != "diagnostics" else path.parts[-2:]
    return f"[{'/'.join(parts)}]({os.path.relpath(path, directory)})"
