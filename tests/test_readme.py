"""The figures in the prose and the tables of README and docs/ are those of the committed runs and measurements."""

import importlib
import json
import math
import statistics
from datetime import datetime, timezone
from pathlib import Path

import pytest
from prose import RESULTS, committed_runs, diagnosis, says
from scipy.stats import t as students_t

from reproduction.evidence import Evidence, Way, backward_nfe, seconds
from reproduction.runs import way_of

TOLERANCES = (1e-3, 1e-4, 1e-5)
EPOCHS = dict.fromkeys(TOLERANCES, 24)
"""Of the runs of Speech Commands that are compared."""


@pytest.fixture(scope="module")
def runs():
    return committed_runs()


CHANGED = datetime(2026, 11, 25, 2, 30, tzinfo=timezone.utc).timestamp()
"""When the Neural CDE and the order of acrobot's windows did."""


def test_what_is_older_than_the_changes(runs):
    older = {}
    for run in runs:
        if run.start_time < CHANGED:
            key = (run.experiment, run.config["rtol"], len(run.epochs), way_of(run.config))
            older.setdefault(key, set()).add(run.config["seed"])
    at_1e_3 = {"default": {1, 2}, "discrete": {0}, "seminorm": {0, 1, 2}, "per-tensor": {0, 1, 2}}
    assert older == {
        **{("speech_commands", 1e-3, 24, way): seeds for way, seeds in at_1e_3.items()},
        **{("acrobot", 1e-4, 3, norm): {1, 2} for norm in ("default", "as-published", "seminorm")},
    }
    says("at 1e-3: `seminorm` and `per-tensor`, `default` of seeds 1 and 2 and `discrete` of seed 0;")
    pairs = [
        (seed in seeds) != (seed in at_1e_3["default"])
        for seeds in ({0, 1, 2}, {0, 1, 2}, {0}, set())
        for seed in range(3)
    ]
    says(f"In {sum(pairs)} of the {len(pairs)} pairs with `default` at 1e-3 one run is of before")


def of_each_epoch(runs, count, **wanted):
    """That count of each epoch, by seed, of the runs with these settings; without a warm start."""
    wanted = {"warm_start": False, **wanted}
    return {
        run.config["seed"]: [epoch[count] for epoch in run.epochs]
        for run in runs
        if all({"experiment": run.experiment, **run.config}[name] == value for name, value in wanted.items())
    }


def epoch_savings(runs, rtol):
    """By seed, what the seminorm saves of the backward NFE of `default` in each epoch, and in all."""
    shared = dict(experiment="speech_commands", rtol=rtol, max_epochs=EPOCHS[rtol])
    default, seminorm = (of_each_epoch(runs, "backward_nfe", norm=norm, **shared) for norm in ("default", "seminorm"))
    assert default.keys() <= seminorm.keys()
    return {
        seed: [1 - mine / theirs for mine, theirs in zip([*seminorm[seed], sum(seminorm[seed])], [*nfe, sum(nfe)])]  # noqa: B905
        for seed, nfe in default.items()
    }


def ratios(experiment, rtol, adjoint, baseline, quantity):
    """Of each batch."""
    rows = [row for row in diagnosis("gradient_errors", experiment)["rows"] if row["rtol"] == rtol]
    values = {name: [row[quantity] for row in rows if row["adjoint"] == name] for name in (adjoint, baseline)}
    return [mine / theirs for mine, theirs in zip(values[adjoint], values[baseline], strict=True)]


def with_interval(values):
    """The geometric mean, and the 95 % interval by Student's t on the logarithms."""
    logarithms = list(map(math.log, values))
    middle = statistics.mean(logarithms)
    half = students_t.ppf(0.975, len(values) - 1) * statistics.stdev(logarithms) / len(values) ** 0.5
    return "{:.2f} ({:.2f} to {:.2f})".format(*map(math.exp, (middle, middle - half, middle + half)))


def test_the_runs_are_as_described(runs):
    [speech] = {
        tuple(part.dataset_size for part in (run.train_metrics, run.val_metrics, run.test_metrics))
        for run in runs
        if run.experiment == "speech_commands"
    }
    says(f"{sum(speech):,} real recordings ({speech[0]:,} for training)")
    epochs = {(run.experiment, run.config["rtol"], len(run.epochs)) for run in runs if run.experiment != "flow"}
    others = {("speech_commands", 1e-3, 48), ("acrobot", 1e-4, 3), ("acrobot", 1e-4, 50)}
    assert epochs == {("speech_commands", *pair) for pair in EPOCHS.items()} | others
    [batch_size] = {run.config["batch_size"] for run in runs if run.experiment == "speech_commands"}
    says(f"batch {batch_size} in place of 1024, {EPOCHS[1e-3]} epochs in place of 200 (48 in one pair of runs at 1e-3)")
    says("3 epochs in place of 50, and one seed of each way over all 50")
    assert {(run.provenance["num_threads"], run.provenance["device_name"].split()[0]) for run in runs} == {
        (1, "Intel(R)"),
        (1, "AMD"),
    }
    [version] = {run.provenance["packages"]["torch"] for run in runs}
    says("All on one core, of an Intel Xeon (AVX-512) or of an AMD EPYC (Zen 2 to 5), with")
    says(f"torch {version}")
    assert not any(run.provenance["commit"].endswith("-dirty") for run in runs)


def test_committed_files_name_no_folder_of_a_machine():
    named = {
        (path, setting): Path(config[setting])
        for path in RESULTS.rglob("*.json")
        if (config := json.loads(path.read_bytes()).get("config"))
        for setting in ("results_dir", "data_root")
        if config.get(setting)
    }
    assert len(named) > 100
    assert not {key: folder for key, folder in named.items() if folder.is_absolute() or ".." in folder.parts}


def test_acrobot_over_the_papers_epochs(runs):
    found = {
        way_of(run.config): run
        for run in runs
        if (run.experiment, run.config["max_epochs"], len(run.epochs)) == ("acrobot", 50, 50)
    }
    assert len(found) == 5
    default, seminorm = found["default"], found["seminorm"]
    [nfe] = {f"{backward_nfe(run):,}" for run in (default, seminorm)}
    says(f"Over the paper's 50 epochs (seed 0) both take {nfe} backward NFE")
    steps, rejected = (
        sum(getattr(epoch, name) for epoch in default.epochs for name in names)
        for names in (("backward_accepted", "backward_rejected"), ("backward_rejected",))
    )
    assert not sum(epoch.backward_rejected for epoch in found["as-published"].epochs)
    says(f"Hardly a backward step is rejected: {rejected} of {steps:,} by `default` over 50 epochs, none by")
    saved = [
        f"{100 * (1 - backward_nfe(found[way]) / backward_nfe(default)):.0f}"
        for way in ("as-published", "seminorm, warm start", "discrete")
    ]
    says("`as-published` saves {} % of them, as over 3 epochs, the warm start {} % and `discrete` {} %".format(*saved))
    says(f"`as-published`, saves {saved[0]} %")
    says(f"`discrete` saves {saved[2]} % (one seed).")
    losses = sorted(run.test_metrics.loss for run in found.values())
    says(f"The five end at test losses from {losses[0]:.6f} to {losses[-1]:.6f}")
    losses = [{entry.epoch: f"{entry.val_metrics.loss:.6f}" for entry in run.history} for run in (default, seminorm)]
    early, late = (" and ".join(of[epoch] for of in losses) for epoch in (20, 50))
    says(f"at epoch 20 the validation losses are {early}, at epoch 50 {late}.")


def test_the_forward_nfe_hardly_differ(runs):
    totals = {}
    for run in (run for run in runs if run.experiment != "flow"):
        key = (
            run.experiment,
            run.config["rtol"],
            run.config["seed"],
            run.config["max_epochs"],
            run.config.get("method", "dopri5"),
        )
        totals.setdefault(key, []).append(sum(epoch.forward_nfe for epoch in run.epochs))
    most = max(max(found) / min(found) - 1 for found in totals.values())
    says(f"Between norms, forward NFE of equal seeds differ by {most:.1%} at most in".replace("%", " %"))


def test_savings_of_all_evaluations(runs):
    def evaluations(norm, rtol):
        """Of each seed's training, forward and backward."""
        shared = dict(experiment="speech_commands", norm=norm, rtol=rtol, max_epochs=24)
        forward, backward = (of_each_epoch(runs, f"{way}_nfe", **shared) for way in ("forward", "backward"))
        return [sum(forward[seed]) + sum(backward[seed]) for seed in sorted(forward)]

    shares = []
    for rtol in TOLERANCES[:2]:
        pairs = zip(evaluations("seminorm", rtol), evaluations("default", rtol), strict=True)
        shares.append(f"{100 * statistics.mean(1 - mine / theirs for mine, theirs in pairs):.0f} %")
    says("Of all evaluations, forward and backward, it saves {} at 1e-3 and {} at 1e-4".format(*shares))
    says(f"against the paper's baseline: {shares[0]} of all evaluations.")
    [size] = {run.train_metrics.dataset_size for run in runs if run.experiment == "speech_commands"}
    shared = dict(experiment="speech_commands", norm="seminorm", rtol=1e-3, max_epochs=24)
    steps = of_each_epoch(runs, "backward_accepted", **shared)
    of_a_solve = [round(statistics.mean(of_seed) / math.ceil(size / 128)) for of_seed in steps.values()]
    says(f"At 1e-3 the seminorm takes {min(of_a_solve)} to {max(of_a_solve)} in a backward solve: it is at this floor.")


def test_savings(runs):
    def span(values):
        ends = dict.fromkeys(f"{100 * end:.0f}" for end in (min(values), max(values)))
        return f"{' to '.join(ends)} %"

    by_seed = epoch_savings(runs, 1e-3).values()
    says(f"first falls, to {span([min(found) for found in by_seed])} in the three seeds")
    says(f"ends at {span([found[-2] for found in by_seed])}.")
    in_training = [statistics.mean(found[-1] for found in epoch_savings(runs, rtol).values()) for rtol in TOLERANCES]
    measured = [
        1 - statistics.geometric_mean(ratios("speech_commands", rtol, "seminorm", "default", "backward_nfe"))
        for rtol in TOLERANCES
    ]
    batch_size = diagnosis("gradient_errors", "speech_commands")["batch_size"]
    where = f"in the measurement below (trained, batch {batch_size};"
    says(f"The saving is {span(in_training)} in the table, {span(measured)} {where}")
    evidence = Evidence.of(str(RESULTS))
    saved = [
        evidence.compared(
            *(Way("speech_commands", rtol, atol, norm) for norm in ("seminorm", "default")),
            backward_nfe,
            is_share=True,
        )
        for rtol, atol in ((1e-3, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8))
    ]
    ways = (Way("speech_commands", 1e-4, 1e-7, norm) for norm in ("seminorm", "default"))
    faster = evidence.compared(*ways, seconds, is_share=True)
    says(f"takes {100 * faster.value:.0f} % ({100 * faster.low:.0f} to {100 * faster.high:.0f}) less CPU time")
    assert [found.num for found in (*saved, faster)] == [3, 3, 3, 3]
    for pair in ((1e-3, 1e-6), (1e-5, 1e-8)):
        ways = (Way("speech_commands", *pair, norm) for norm in ("seminorm", "default"))
        other = evidence.compared(*ways, seconds, is_share=True)
        assert other is None or (other.num < 3 and not other.low > 0)
    says("at the other two too few pairs are of one CPU to tell")
    numbers = [f"{100 * found.value:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})" for found in saved]
    says(f"saves {numbers[0]} of the backward NFE in training at 1e-3, {numbers[1]} at 1e-4 and {numbers[2]} at 1e-5")


def test_one_pair_was_trained_as_far_as_accuracy_rises(runs):
    default, seminorm = (
        next(run for run in runs if (run.config["norm"], run.config["max_epochs"]) == (norm, 48))
        for norm in ("default", "seminorm")
    )
    accuracies = [f"{100 * run.test_metrics.accuracy:.1f} %" for run in (default, seminorm)]
    says("The test accuracy is {} with `default` and {} with the seminorm".format(*accuracies))
    settled = [[entry for entry in run.history if entry.train_metrics.accuracy > 0.99] for run in (default, seminorm)]
    says("From epoch {} on with `default` and {} with the seminorm, more than".format(*(of[0].epoch for of in settled)))
    spans = [sorted(entry.val_metrics.accuracy for entry in of) for of in settled]
    says("stays at {} and {}.".format(*(f"{100 * of[0]:.0f} to {100 * of[-1]:.0f} %" for of in spans)))
    late = [sum(epoch.backward_nfe for epoch in run.epochs[-12:]) for run in (seminorm, default)]
    saved = 1 - backward_nfe(seminorm) / backward_nfe(default), 1 - late[0] / late[1]
    says(
        "The seminorm saves {:.0f} % of the backward NFE, in the last twelve epochs {:.0f} %".format(
            *(100 * share for share in saved)
        )
    )


def test_discrete_beside_the_seminorm_at_the_tightest_pair():
    evidence = Evidence.of(str(RESULTS))
    ways = (Way("speech_commands", 1e-5, 1e-8, norm) for norm in ("discrete", "seminorm"))
    pairs = [[evidence.runs[path] for path in pair] for pair in evidence.pairs(*ways)]
    assert {len(run.epochs) for pair in pairs for run in pair} == {24}
    assert len({run.provenance.device_name for pair in pairs for run in pair}) == 1
    of_nfe, of_seconds = (
        statistics.mean(quantity(mine) / quantity(theirs) for mine, theirs in pairs)
        for quantity in (backward_nfe, seconds)
    )
    says(f"At the tightest pair `discrete` takes {of_nfe:.2f} times the backward NFE of `seminorm`,")
    says(f"and {of_seconds:.2f} times its CPU seconds (means of {len(pairs)} pairs)")


def test_the_table_of_errors():
    record = diagnosis("gradient_errors", "speech_commands")
    tolerances = TOLERANCES[:2]
    for rtol in tolerances:
        row = [f"1e{math.log10(rtol):.0f}"]
        for adjoint in ("seminorm", "per-tensor", "discrete"):
            error, nfe = (
                ratios("speech_commands", rtol, adjoint, "default", quantity) for quantity in ("error", "backward_nfe")
            )
            row += [with_interval(error), f"{statistics.geometric_mean(nfe):.2f}"]
        says(f"| {' | '.join(row)} |")
    says("the seminorm's gradient is less exact in all of them at both tolerances")
    for rtol in tolerances:
        assert min(ratios("speech_commands", rtol, "seminorm", "default", "error")) > 1
    nfe = ratios("speech_commands", 1e-3, "seminorm", "default", "backward_nfe")
    says(f"at 1e-3 the seminorm's is open: {with_interval(nfe)}")
    num_batches = len({row["batch"] for row in record["rows"]})
    says(f"n = {num_batches} batches of {record['batch_size']} clips, one set of weights")
    assert [decades(experiment) for experiment in ("speech_commands", "acrobot")] == [1, 3]
    says("two decades tighter than the row at 1e-4")
    says("On acrobot, where it is three decades tighter than the tightest point")
    other = {
        adjoint: statistics.geometric_mean(
            row["error"]
            for row in diagnosis("methods", "speech_commands")["rows"]
            if (row["method"], row["rtol"], row["adjoint"]) == ("dopri5", 1e-3, adjoint)
        )
        for adjoint in ("default", "seminorm")
    }
    says(f"it is more exact at 1e-3, {other['seminorm'] / other['default']:.2f} times.")


def decades(experiment):
    """By how much the reference of the errors is tighter than the tightest of their tolerances."""
    record = diagnosis("gradient_errors", experiment)
    return round(math.log10(min(row["rtol"] for row in record["rows"]) / record["reference"][0]))


def test_the_errors_on_acrobot():
    rows = diagnosis("gradient_errors", "acrobot")["rows"]
    factors = [
        factor
        for rtol in {row["rtol"] for row in rows}
        for adjoint in ("per-tensor", "seminorm", "as-published")
        for factor in ratios("acrobot", rtol, adjoint, "default", "error")
    ]
    says(f"have the same error within {100 * max(abs(factor - 1) for factor in factors):.0f} %")
    error, nfe = (ratios("acrobot", 1e-4, "discrete", "default", quantity) for quantity in ("error", "backward_nfe"))
    times_the_nfe = f"{statistics.geometric_mean(nfe):.2f} times the NFE"
    says(f"`discrete` at 1e-4 has {with_interval(error)} times that error, for {times_the_nfe}")


def test_what_sets_the_steps():
    shares = [share["a_theta"] for share in diagnosis("step_errors", "speech_commands")["shares"]]
    says(f"error in {100 * min(shares):.1f} to {100 * max(shares):.1f} % of the steps of `default`")
    record = diagnosis("step_errors", "acrobot")
    assert all(share["z"] == 1 for share in record["shares"])


def test_the_saving_of_the_released_norm_on_acrobot_is_a_longer_first_step():
    guesses, numbers = {}, {}
    for norm, steps in diagnosis("step_errors", "acrobot")["steps"].items():
        assert max(steps["error_ratio"]) < 1, "none is rejected"
        starts = [number for number, t0 in enumerate(steps["t0"]) if abs(t0 / 0.05 - round(t0 / 0.05)) < 1e-6]
        guesses[norm] = statistics.mean(steps["t0"][number] - steps["t1"][number] for number in starts)
        numbers[norm] = len(steps["t0"]) / len(starts)
    assert numbers == {"default": 2, "seminorm": 2, "as-published": 1}
    assert guesses["default"] == guesses["seminorm"] < 0.05 < guesses["as-published"]
    says(f"first guess a step of {guesses['default']:.3f} s, a little too short")
    says(f"`as-published` guesses {guesses['as-published']:.3f} s, which is enough")
    evaluations = {norm: 2 + 6 * number for norm, number in numbers.items()}
    says(f"takes {evaluations['as-published']:.0f} evaluations in place of {evaluations['default']:.0f}")
    says(f"the whole saving of {100 * (1 - evaluations['as-published'] / evaluations['default']):.0f} %")


def test_the_acrobot_swings_up_and_stays():
    motion = diagnosis("control", "acrobot")["motion"]
    for name in ("q1", "q2"):
        final = motion[name][-100:]
        upright = math.pi if name == "q1" else 0
        assert all(abs((angle - upright + math.pi) % math.tau - math.pi) < 0.1 for angle in final)


def test_the_models_of_the_committed_runs_are_those_of_today(runs):
    for run in {json.dumps(run.config | {"seed": 0}): run for run in runs}.values():
        module = importlib.import_module(run.experiment)
        settings = run.config | dict(device="cpu", save=False, resume=False, solver="torchadjoint")
        model = module.build(module.Config(**settings))
        assert sum(parameter.numel() for parameter in model.parameters()) == run.parameters
