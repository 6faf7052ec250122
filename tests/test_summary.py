"""The numbers of the tables, against hand calculations."""

import dataclasses

import numpy
import pytest
from records import acrobot, collected, result, speech, three_seeds

from reproduction.status import Status
from reproduction.summary import collect, saving, summarise
from reproduction.typesetting import build


def test_means_and_sample_deviations_by_hand():
    summary = summarise(collected(three_seeds())).set_index("way")
    assert list(summary.index) == ["default", "per-tensor", "seminorm"]
    row = summary.loc["default"]
    assert (row.wanted, row.completed, row.failed) == (3, 3, 0)
    assert (row.backward_nfe_mean, row.backward_nfe_sd) == (200, 100)
    assert (row.test_backward_nfe_mean, row.test_backward_nfe_sd) == (20, 10)
    assert row.accuracy_mean == pytest.approx(0.92)
    assert row.accuracy_sd == pytest.approx(0.02)
    assert (row.seconds_mean, row.epoch_seconds_mean, row.clock) == (11.0, 5.5, "CPU")
    assert row.epochs_mean == 2


def test_savings_are_against_the_named_norm():
    summary = summarise(collected(three_seeds())).set_index("way")
    seminorm, per_tensor = summary.loc["seminorm"], summary.loc["per-tensor"]
    assert seminorm["backward_nfe_saving_default"] == pytest.approx(1 - 350 / 600)
    assert seminorm["backward_nfe_saving_per-tensor"] == pytest.approx(1 - 350 / 1400)
    assert per_tensor["backward_nfe_saving_default"] == pytest.approx(1 - 1400 / 600)
    assert numpy.isnan(summary.loc["default", "backward_nfe_saving_default"])
    # The standard error of 50, 25 and 50 % is 25 / 3 %, and t is 4.3027 for 2 degrees of freedom.
    assert seminorm["backward_nfe_saving_default_low"] == pytest.approx(5 / 12 - 4.3027 / 12, abs=1e-5)
    assert seminorm["backward_nfe_saving_default_high"] == pytest.approx(5 / 12 + 4.3027 / 12, abs=1e-5)
    assert seminorm["backward_nfe_saving_default_pairs"] == 3


def test_a_pair_counts_as_much_as_another_however_long_its_runs_are():
    share, low, high, num_pairs = saving(numpy.array([50.0, 9_000.0]), numpy.array([100.0, 10_000.0]))
    assert share == pytest.approx(0.3)
    assert (low + high) / 2 == pytest.approx(0.3)
    assert num_pairs == 2


def test_a_warm_start_is_no_baseline():
    """A run of the baseline's norm with a warm start has another cost, and is itself compared."""
    costs = {"default": 100, "warm": 10, "seminorm": 50}
    runs = [acrobot("default"), acrobot("default", warm_start=True), acrobot("seminorm")]
    summary = summarise(collected([(run, result(run, cost)) for run, cost in zip(runs, costs.values(), strict=True)]))
    saved = summary["backward_nfe_saving_default"].tolist()
    assert numpy.isnan(saved[0])
    assert saved[1:] == pytest.approx([0.9, 0.5])
    assert summary["backward_nfe_saving_default_pairs"].tolist()[1:] == [1, 1]


def test_a_device_is_named_on_one_line():
    run = speech("default")
    made = result(run, 100)
    made.provenance.device_name = "a\n<!-- tables: end -->\x1b[31m CPU"
    assert collected([(run, made)])["device"].item() == "a <!-- tables: end --> [31m CPU"


def test_seconds_are_those_of_the_device_of_most_runs():
    runs = [speech("default", 0), speech("default", 1), speech("seminorm", 0), speech("seminorm", 1)]
    results = [
        result(run, 100, cpu_seconds=(seconds, 0.0)) for run, seconds in zip(runs, (3.0, 70.0, 5.0, 7.0), strict=True)
    ]
    results[1].provenance.device_name = "a slower CPU"
    summary = summarise(collected(list(zip(runs, results, strict=True))))
    assert summary["seconds_mean"].tolist() == [3, 6]
    assert summary["backward_nfe_mean"].tolist() == [100, 100]
    # Runs of another length were made on another one, and are compared with one another.
    longer = [speech("default", max_epochs=24), speech("seminorm", max_epochs=24)]
    others = [result(run, 100, cpu_seconds=(9.0, 0.0)) for run in longer]
    for other in others:
        other.provenance.device_name = "a slower CPU"
    summary = summarise(collected(list(zip(runs + longer, results + others, strict=True))))
    assert summary["seconds_mean"].tolist() == [3, 6, 9, 9]


def test_seconds_of_several_threads_are_not_those_of_one():
    pairs = three_seeds()
    for run, made in pairs:
        if run.settings["seed"] == 2:
            made.provenance.num_threads = 8
            for epoch in made.epochs:
                epoch.cpu_seconds *= 8
    row = summarise(collected(pairs)).set_index("way").loc["default"]
    assert (row.seconds_mean, row.timed, row.completed) == (11.0, 2, 3)


def test_trainings_that_ended_after_other_numbers_of_epochs_are_no_pairs():
    pairs = three_seeds()
    for run, made in pairs:
        if (run.settings["norm"], run.settings["seed"]) == ("seminorm", 2):
            made.epochs.pop()
    row = summarise(collected(pairs)).set_index("way").loc["seminorm"]
    assert (row.completed, row["backward_nfe_saving_default_pairs"]) == (3, 2)


def test_savings_pair_equal_seeds_on_equal_data():
    pairs = [(speech("default", 0), 100), (speech("default", 1), 1000), (speech("seminorm", 1), 500)]
    results = [(run, result(run, cost)) for run, cost in pairs]
    row = summarise(collected(results)).set_index("way").loc["seminorm"]
    assert row["backward_nfe_saving_default"] == 0.5
    assert numpy.isnan(row["backward_nfe_saving_default_low"])


def test_runs_of_more_epochs_are_rows_apart_and_no_pairs():
    costs = {("default", 8): 100, ("seminorm", 8): 50, ("seminorm", 24): 150}
    runs = {condition: speech(condition[0], max_epochs=condition[1]) for condition in costs}
    found = summarise(collected([(run, result(run, costs[condition])) for condition, run in runs.items()]))
    rows = found.set_index(["way", "max_epochs"])
    assert list(rows.index) == list(costs)
    assert list(rows["backward_nfe_mean"]) == list(costs.values())
    assert rows.loc[("seminorm", 8), "backward_nfe_saving_default"] == 0.5
    assert numpy.isnan(rows.loc[("seminorm", 24), "backward_nfe_saving_default"])


def test_a_mean_is_of_runs_on_the_same_data():
    run = speech("default")
    mine, foreign = result(run, 100), result(run, 900, split="others", start_time=9.0)
    kept = collect([Status(run, "done")], [mine, foreign])
    assert summarise(kept)["backward_nfe_mean"].item() == 100
    assert "Left out, as they were trained on other data: 1 completed runs." in build(kept)[0].notes
    assert not any("other data" in note for note in build(collect([Status(run, "done")], [mine]))[0].notes)


def test_the_interval_contains_the_truth_and_shrinks():
    random = numpy.random.default_rng(7)

    def interval(num_pairs):
        baseline = random.normal(1000, 50, num_pairs)
        return saving(0.6 * baseline + random.normal(0, 50, num_pairs), baseline)

    hits = [low <= 0.4 <= high for _, low, high, _ in (interval(30) for _ in range(100))]
    assert 85 <= sum(hits) <= 100
    assert 85 <= sum(low <= 0.4 <= high for _, low, high, _ in (interval(3) for _ in range(100))) <= 100
    widths = [numpy.mean([high - low for _, low, high, _ in (interval(n) for _ in range(10))]) for n in (5, 20, 80)]
    assert widths[0] > 1.5 * widths[1] > 1.5**2 * widths[2]
    share, low, high, _ = interval(10)
    assert low < share < high


def test_equal_costs_save_nothing_for_certain():
    costs = numpy.array([3.0, 4.0, 5.0])
    assert saving(costs, costs) == (0, 0, 0, 3)
    share, low, high, _ = saving(costs[:1], costs[1:2])
    assert share == 0.25
    assert numpy.isnan([low, high]).all()


def test_the_seconds_of_two_clocks_do_not_mix():
    runs = [speech("default", seed) for seed in range(3)]
    old = result(runs[0], 100, cpu_seconds=(None, None))
    new = [result(run, 100, cpu_seconds=(run.config.seed, 1.0)) for run in runs[1:]]
    row = summarise(collected(list(zip(runs, [old, *new], strict=True)))).iloc[0]
    assert (row.clock, row.seconds_mean, row.completed) == ("CPU", 2.5, 3)
    assert row.backward_nfe_mean == 100
    row = summarise(collected([(runs[0], old)])).iloc[0]
    assert (row.clock, row.seconds_mean) == ("wall", 20)
    on_gpu = result(runs[0], 100, config={"device": "cuda:0"})
    row = summarise(collected([(runs[0], on_gpu)])).iloc[0]
    assert (row.clock, row.seconds_mean) == ("wall", 20)


def test_only_completed_results_of_just_this_run_count():
    run = speech("default")
    others = [
        result(run, 999, status="failed", failure="no"),
        result(run, 999, start_time=1.0),
        result(speech("default", learning_rate=0.5), 999, start_time=9.0),
        result(speech("default", data_root="synthetic"), 999, start_time=9.0),
        result(run, 999, start_time=9.0, status="interrupted"),
        dataclasses.replace(result(run, 999, start_time=9.0), experiment="no_experiment"),
    ]
    latest = result(run, 100, start_time=2.0, config={"device": "cuda", "data_root": "elsewhere"})
    (row,) = collect([Status(run, "done")], [latest, *others]).to_dict("records")
    assert row["backward_nfe"] == 100
    (row,) = collect([Status(run, "missing")], others[2:]).to_dict("records")
    assert row["status"] == "missing"
    assert numpy.isnan(row["backward_nfe"])
