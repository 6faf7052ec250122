"""Made-up results of runs, for the tests of what is made from results."""

import dataclasses
import importlib
import json

from common.provenance import Provenance
from common.results import Epoch, HistoryEntry, Metrics, Results, read_as, save
from reproduction.runs import Run
from reproduction.status import Status
from reproduction.summary import collect

COUNTS = {f"{direction}_{name}": 1 for direction in ("forward", "backward") for name in ("nfe", "accepted", "rejected")}
TIMES = {
    f"{direction}_{name}": [] for direction in ("forward", "backward") for name in ("ts", "accept_ts", "reject_ts")
}


def speech(norm, seed=0, **settings):
    return Run("speech_commands", {"norm": norm, "seed": seed, **settings}, "all")


def acrobot(norm, seed=0, **settings):
    return Run("acrobot", {"norm": norm, "seed": seed, **settings}, "all")


def made_on(split="all", device_name="a CPU"):
    return Provenance(
        device_name=device_name, num_threads=1, platform="Linux", python="3.11", packages={}, commit=None, split=split
    )


def result(run, nfe, *, accuracy=0.9, loss=0.5, cpu_seconds=(5.0, 6.0), split="all", config=None, **changes):
    """Results of a run of two epochs with `nfe` backward evaluations in all, and a tenth of that on the test set."""
    accuracies = {"accuracy": accuracy} if run.experiment == "speech_commands" else {}
    measured = {"dataset_size": 1249, "timestamp": 0.0, "timespan": 1.0, "loss": loss, **accuracies}
    metrics = read_as(Metrics, {**COUNTS, **TIMES, **measured, "backward_nfe": nfe // 10})
    trained = {"loss": 1.0, "learning_rate": 0.1, "seconds": 10.0, **accuracies}
    epochs = [
        read_as(Epoch, {**COUNTS, **trained, "epoch": epoch, "backward_nfe": part, "cpu_seconds": seconds})
        for epoch, part, seconds in zip((1, 2), (nfe // 3, nfe - nfe // 3), cpu_seconds, strict=True)
    ]
    return Results(
        parameters=3,
        history=[HistoryEntry(epoch=2, train_metrics=metrics, val_metrics=metrics)],
        train_metrics=metrics,
        val_metrics=metrics,
        test_metrics=metrics,
        experiment=run.experiment,
        config={**dataclasses.asdict(run.config), **(config or {})},
        provenance=made_on(split),
        epochs=epochs,
        **{"start_time": 0.0, "timespan": 1.0, "status": "completed", **changes},
    )


def collected(pairs, *others):
    """The rows of completed runs, each given with its results, and of runs with other statuses."""
    return collect([*(Status(run, "done") for run, _ in pairs), *others], [results for _, results in pairs])


def three_seeds():
    """Runs and results: seminorm saves 50, 25 and 50 % against default, and 75 % against per-tensor."""
    costs = {"default": (100, 200, 300), "per-tensor": (200, 600, 600), "seminorm": (50, 150, 150)}
    runs = [(speech(norm, seed), cost) for norm in costs for seed, cost in enumerate(costs[norm])]
    return [(run, result(run, cost, accuracy=0.9 + 0.02 * run.config.seed)) for run, cost in runs]


def saved_run(folder, experiment="acrobot", **changes):
    """The file of a run with few weights, which are beside it; `changes` as for its settings and for `result`."""
    of_result = {name: changes.pop(name) for name in ("loss", "status", "start_time") if name in changes}
    run = Run(experiment, {"norm": "seminorm", "batch_size": 8, **changes}, "all")
    model = importlib.import_module(experiment).build(run.config)
    directory = folder / experiment / "seminorm"
    directory.mkdir(parents=True, exist_ok=True)
    return save(result(run, 10, model=model, **of_result), directory)


def rewrite(path, change):
    """Changes the record in a file, in place."""
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))
