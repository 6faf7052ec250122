"""What was measured of one contestant at one problem: a JSON file for each and a dtype, which grows by tolerances."""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from common import files
from common.records import OPTIONAL, Record, plain, read_as

COMMITTED = Path(__file__).parents[2] / "reference" / "adjoints"
"""The measurements that the page is made from."""


@dataclass(kw_only=True)
class Session(Record):
    """Where and when some of the measurements were made."""

    device_name: str
    num_threads: int
    platform: str
    python: str
    packages: dict[str, str | None]
    commit: str | None
    started: float
    """Seconds since 1970."""


@dataclass(kw_only=True)
class Measurement(Record):
    """One tolerance."""

    rtol: float
    atol: float
    session: int
    """Which of the file's sessions."""
    failure: str = ""
    """Why there are no numbers."""
    error: float | None = None
    """The norm of the gradient's difference from the reference, over the reference's norm."""
    forward_nfe: int | None = None
    backward_nfe: int | None = None
    mebibytes: float | None = None
    """How far the process's resident memory rose during one step."""
    first_seconds: float | None = None
    """What the first step took by the clock, compilation included, or how long it was until it failed."""
    failed_seconds: float | None = field(default=None, metadata=OPTIONAL)
    """CPU seconds of a step that failed, compilation apart; None if it did not come so far, or was not measured."""
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of a step, for each round."""

    @property
    def median(self) -> float:
        """CPU seconds of a step."""
        return statistics.median(self.seconds)


@dataclass(kw_only=True)
class Results(Record):
    """All that was measured of one contestant at one problem in one dtype."""

    problem: str
    contestant: str
    dtype: str
    """What is solved in; errors are those of float64's reference."""
    agreement: float
    """How far two independent ways agree on the reference."""
    reference: str
    """What these ways are."""
    sessions: list[Session] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def at(self, rtol: float) -> Measurement | None:
        """What was measured at a tolerance."""
        return next((it for it in self.measurements if math.isclose(it.rtol, rtol)), None)


def path_of(folder: Path, problem: str, contestant: str, dtype: str) -> Path:
    """Where the results of a contestant at a problem lie."""
    return folder / f"{problem}--{re.sub(r'[^a-z0-9]+', '-', contestant.lower())}--{dtype}.json"


def load(path: Path) -> Results | None:
    """The results in a file, None if there is no file.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        return read_as(Results, json.loads(path.read_bytes()), path.name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as results, so move it away: {error}") from error


def load_all(folder: Path) -> list[Results]:
    """The results in a folder, by the names of their files."""
    return [load(path) for path in sorted(folder.glob("*--*.json"))]


def save(folder: Path, results: Results) -> None:
    """Write a file of results, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    results.measurements.sort(key=lambda measurement: -measurement.rtol)
    text = json.dumps(plain(results), allow_nan=False, indent=1)
    files.replace(path_of(folder, results.problem, results.contestant, results.dtype), f"{text}\n".encode())
