"""The figures of methods in the prose and the tables of README and docs/ are those of the committed measurements."""

import json
import math
import statistics

from prose import RESULTS, committed_runs, diagnosis, says


def method_row(method, rtol):
    """A line of the table of methods."""
    cells = [f"`{method}`", f"1e{math.log10(rtol):.0f}"]
    for adjoint in ("default", "seminorm", "discrete"):
        rows = [
            row
            for row in diagnosis("methods", "speech_commands")["rows"]
            if (row["method"], row["rtol"], row["adjoint"]) == (method, rtol, adjoint)
        ]
        nfe = [round(statistics.mean(row[f"{direction}_nfe"] for row in rows)) for direction in ("forward", "backward")]
        error = statistics.geometric_mean(row["error"] for row in rows)
        seconds = statistics.median(row["cpu_seconds"] for row in rows)
        cells.append(f"{nfe[0]:,} + {nfe[1]:,}: {error:.3f}, {seconds:.2f} s")
    return f"| {' | '.join(cells)} |"


def test_the_table_of_methods():
    record = diagnosis("methods", "speech_commands")
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        for rtol in (1e-2, 1e-3):
            says(method_row(method, rtol))
    reference_error = max(row["reference_error"] for row in record["rows"])
    trained = [run for run in committed_runs() if run.config.get("method") == "bosh3"]
    accuracies = [100 * run.test_metrics.accuracy for run in trained]
    seconds = [sum(epoch.cpu_seconds for epoch in run.epochs) for run in trained]
    says(f"{statistics.mean(accuracies):.1f} +- {statistics.stdev(accuracies):.1f} % over {len(trained)} seeds")
    says(f"{min(seconds):.0f} to {max(seconds):.0f} CPU seconds")
    [baseline] = [
        sum(epoch.cpu_seconds for epoch in run.epochs)
        for run in committed_runs()
        if (run.experiment, run.config["norm"]) == ("speech_commands", "default")
        and run.provenance["device_name"] == trained[0].provenance["device_name"]
    ]
    says(f"where a run of `dopri5` with `default` on the same CPU took {baseline:,.0f}")
    says(f"n = {record['num_batches']} batches of {record['batch_size']} clips, reference good to {reference_error:.1%}"
         .replace("%", " %"))  # fmt: skip


def test_what_weights_are_worth_by_other_methods():
    rows = diagnosis("losses", "speech_commands")["rows"]
    accuracies = {(row["method"], row["rtol"]): f"{100 * row['accuracy']:.1f} %" for row in rows}
    exception = accuracies.pop(("bosh3", 1e-2))
    [usual] = set(accuracies.values())
    losses = sorted(row["loss"] for row in rows)
    says(f"a test accuracy of {usual} by each of the six at both tolerances, but {exception} by `bosh3` at 1e-2")
    says(f"and test losses of {losses[0]:.3f} to {losses[-1]:.3f}")
    assert len({method for method, _ in accuracies}) == 6


def test_what_a_warm_start_saves_in_the_benchmark():
    def nfe(contestant):
        """Of every solve that did not fail, by problem and rtol."""
        records = [json.loads(path.read_bytes()) for path in RESULTS.glob(f"adjoints/*--{contestant}--float64.json")]
        return {
            (record["problem"], row["rtol"]): row["backward_nfe"]
            for record in records
            for row in record["measurements"]
            if row["backward_nfe"]
        }

    warm, cold = nfe("ours-seminorm-warm-start"), nfe("ours-seminorm")
    ratios = {key: warm[key] / cold[key] for key in warm.keys() & cold.keys()}
    says(f"it takes {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times the backward NFE")
    of_rtol = [[ratio for (_, rtol), ratio in ratios.items() if rtol == wanted] for wanted in (1e-2, 1e-4, 1e-9)]
    medians = [f"{statistics.median(found):.2f}" for found in of_rtol]
    says("{} times at rtol 1e-2, {} at 1e-4 and {} at 1e-9 (medians over problems,".format(*medians))
    says("n = {}, {} and {})".format(*map(len, of_rtol)))
