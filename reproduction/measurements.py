"""The files under results/diagnostics/: where each measurement lies, and what may be added to it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import files

from .experiments import EXPERIMENTS
from .runs import identity


def path_of(results_dir: str, measurement: str, subject: str, group: str | None = None) -> Path:
    """Where a measurement of an experiment's model, or of another, is saved."""
    card = EXPERIMENTS.get(subject)
    name = card.file_name(measurement, group) if card else f"{measurement}-{subject}.json"
    return Path(results_dir, "diagnostics", name)


def read_record(path: Path) -> dict[str, Any] | None:
    """What such a file holds; None if there is none. ValueError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not strict JSON ({error}): move it away and measure it again") from error


def save_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a measurement as strict JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(record, allow_nan=False).encode())


def check_weights(path: Path, saved: Mapping[str, Any], experiment: str, config: Mapping[str, Any]) -> None:
    """Refuses, by a ValueError, to add to a file what is measured with weights that were trained by other settings.

    Where they were trained, and with which seed, does not matter.
    """

    def settings(of: Mapping[str, Any]) -> object:
        # The solver had another name once, and of other models than the experiments' there are no settings.
        return identity(experiment, {**of, "solver": "torchadjoint", "seed": None}, None) if of else of

    if "config" in saved and settings(saved["config"]) != settings(config):
        raise ValueError(
            f"{path} was measured with the weights of {saved['run']}, which was trained by other settings: "
            "move it away, or give another results_dir"
        )
