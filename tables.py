"""Runs conditions of both experiments and prints them as one table: `python tables.py quick`, which is `make run`."""

import argparse
import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

import pandas

from common.errors import TrainingFailed
from common.results import Results


@dataclass(frozen=True)
class Run:
    """One row of the table, by its experiment's name and what its `main` is called with."""

    experiment: str
    norm: str
    settings: dict[str, Any] = field(default_factory=dict)

    def execute(self, device: str) -> Results:
        """The results of this run. Experiments are imported here, so that one never needs the other's packages."""
        return importlib.import_module(self.experiment).main(device, self.norm, **self.settings)


def quick_runs(data_root: str | None) -> list[Run]:
    """Minutes on a CPU: both experiments, much reduced, with and without the trick.

    Speech Commands is read from `data_root`, or is the synthetic sample if there is none.
    """
    acrobot = dict(num_trajectories=16, max_epochs=2)
    if data_root is None:
        speech_commands = dict(data_root="synthetic", batch_size=32, max_epochs=8)
    else:
        speech_commands = dict(data_root=data_root, batch_size=64, max_epochs=3)
    return [
        *(Run("acrobot", norm, acrobot) for norm in ("default", "seminorm", "as-published")),
        *(Run("speech_commands", norm, speech_commands) for norm in ("default", "seminorm")),
    ]


def tabulate(results: list[Results]) -> str:
    """A table in Markdown with a row for each run; what a norm saves is against `default` in the same experiment."""
    rows = []
    for result in results:
        metrics = result.test_metrics
        metric = f"accuracy {metrics.accuracy:.1%}" if "accuracy" in metrics else f"loss {metrics.loss:.4g}"
        rows.append(
            {
                "experiment": result.experiment,
                "norm": result.config["norm"],
                "test metric": metric,
                "forward NFE": sum(epoch.forward_nfe for epoch in result.epochs),
                "backward NFE": sum(epoch.backward_nfe for epoch in result.epochs),
                "seconds": sum(epoch.seconds for epoch in result.epochs),
            }
        )
    table = pandas.DataFrame(rows)
    baselines = table[table["norm"] == "default"].set_index("experiment")["backward NFE"]
    table.insert(5, "saving", 1 - table["backward NFE"] / table["experiment"].map(baselines))
    table["saving"] = table["saving"].map(lambda saving: "" if pandas.isna(saving) else f"{saving:.0%}")
    table["seconds"] = table["seconds"].map("{:.0f}".format)
    for column in ("forward NFE", "backward NFE"):
        table[column] = table[column].map("{:,}".format)
    return table.to_markdown(index=False, colalign=("left", "left", *["right"] * 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=["quick"], help="which runs")
    parser.add_argument(
        "--data-root", help="folder with the Speech Commands recordings; the synthetic sample if not given"
    )
    parser.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    arguments = parser.parse_args()
    runs = quick_runs(arguments.data_root)
    results = []
    for number, run in enumerate(runs, start=1):
        print(f"Run {number} of {len(runs)}: {run.experiment}, {run.norm}")
        try:
            results.append(run.execute(arguments.device))
        except (ValueError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        except TrainingFailed as error:
            print(f"Failed: {error}", file=sys.stderr)
    if not results:
        sys.exit("Every run failed, so there is no table.")
    print(f"\nNFE and seconds are those of the training steps, all epochs together.\n\n{tabulate(results)}")


if __name__ == "__main__":
    main()
