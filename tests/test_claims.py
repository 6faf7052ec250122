"""The page of claims is what the committed results say, and a verdict is what its rule makes of them."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from records import rewrite

import tables
from reproduction.claim_list import claims
from reproduction.claims import Above, AtLeast, AtMost, Below, Holds, Within
from reproduction.evidence import Evidence, Finding, interval

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference"
SEMINORM = "seminorm-0-001-1e-06-max_epochs-24-batch_size-128-metric_interval-2"


def finding(low, high, value=None):
    return Finding((low + high) / 2 if value is None else value, low, high, 3, "pairs", ())


@pytest.mark.parametrize(
    ("rule", "confirmed", "refuted", "open_ends"),
    [
        (Above(0.1), (0.2, 0.3), (-0.3, 0.05), (0.0, 0.2)),
        (Below(1.0), (0.2, 0.9), (1.1, 1.2), (0.9, 1.1)),
        (Within(0.02), (-0.01, 0.015), (0.03, 0.04), (-0.01, 0.05)),
        (Holds(0.4), (0.36, 0.44), None, (0.5, 0.6)),
        (Holds(0.4), (0.39, 0.48), None, (0.3, 0.5)),
    ],
)
def test_a_rule_looks_at_the_whole_interval(rule, confirmed, refuted, open_ends):
    assert rule.judge(finding(*confirmed)) == "confirmed"
    assert refuted is None or rule.judge(finding(*refuted)) == "refuted"
    assert rule.judge(finding(*open_ends)) == "not confirmed"
    # One run has no interval, whatever it says.
    for value in (-10.0, 0.0, 0.4, 10.0):
        assert rule.judge(finding(math.nan, math.nan, value)) == "not confirmed"


def test_a_number_without_an_interval_is_judged_by_itself():
    assert AtMost(0.5).judge(finding(math.nan, math.nan, 0.4)) == "confirmed"
    assert AtMost(0.5).judge(finding(math.nan, math.nan, 0.6)) == "refuted"
    assert AtLeast(0.5).judge(finding(math.nan, math.nan, 0.6)) == "confirmed"
    assert AtLeast(0.5).judge(finding(math.nan, math.nan, 0.4)) == "refuted"


def test_an_end_that_is_open_is_as_far_as_can_be():
    assert Below(1.0).judge(finding(-math.inf, 0.9, 0.8)) == "confirmed"
    assert Below(1.0).judge(finding(0.8, math.inf, 0.9)) == "not confirmed"
    assert Above(1.0).judge(finding(1.1, math.inf, 1.2)) == "confirmed"


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 3.0], "runs", [])
    assert (found.value, found.num) == (2.0, 3)
    assert found.high - found.value == pytest.approx(4.302653 / 3**0.5)
    assert math.isnan(interval([1.0], "runs", []).low)
    assert interval([], "runs", []) is None


def test_the_committed_page_is_what_the_results_say():
    """To the byte: `python tables.py claims` writes it."""
    tables.main(tables.Claims(str(REFERENCE), check=True))


def test_the_commands_of_measurements_train_the_weights_that_were_measured():
    evidence = Evidence.of(str(REFERENCE))
    checked = set()
    for claim in claims():
        _, found = claim.verdict(evidence)
        for path in () if isinstance(found, str) else found.files:
            config = json.loads(path.read_bytes()).get("config")
            if path.parent.name != "diagnostics" or not config:
                continue
            trainings = [part for part in claim.command.split(";") if ".py --device" in part]
            if trainings:
                assert any(trains(training.split(), config) for training in trainings), (claim.text, claim.command)
            else:
                weights = REFERENCE / "weights" / "speech_commands"
                assert [path.name.split("-")[0] for path in weights.iterdir()] == [config["norm"]]
                assert [path.name.rpartition("-")[2] for path in weights.iterdir()] == [config["method"]]
            checked.add(path.name)
    assert {"step_errors-flow.json", "equal_error-acrobot.json", "law-speech_commands.json"} <= checked


def trains(words, config):
    """Whether a command trains by these settings; one that is in a loop over seeds names none."""
    options = dict(pairwise(words))
    names = ("norm", "max_epochs", "data", "width", "seed")
    given = {name: options.get(f"--{name.replace('_', '-')}") for name in names}
    return all(
        value in (None, "$seed") or str(config.get(name)) == value for name, value in given.items() if name in config
    ) and all(given[name] is not None for name in ("norm", "max_epochs"))


def verdict(results_dir):
    """That of one claim."""
    [claim] = [claim for claim in claims() if claim.text == SAVES]
    return claim.verdict(Evidence.of(str(results_dir)))


SAVES = "The seminorm saves backward evaluations on Speech Commands at 1e-3, 1e-6"


@pytest.fixture
def copied(tmp_path):
    """The runs that these claims are about."""
    for folder in REFERENCE.glob("speech_commands/*-max_epochs-24-*"):
        if folder.name.startswith(("default-", "seminorm-")):
            shutil.copytree(folder, tmp_path / "speech_commands" / folder.name)
    return tmp_path


def multiply_backward_nfe(record, factor):
    for epoch in record["epochs"]:
        epoch["backward_nfe"] = round(factor * epoch["backward_nfe"])


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "confirmed"), (1.75, "not confirmed"), (4.0, "refuted")])
def test_a_verdict_changes_with_the_results(copied, factor, expected):
    runs = sorted((copied / "speech_commands" / SEMINORM).glob("*.json"))
    for path in runs:
        rewrite(path, lambda record: multiply_backward_nfe(record, factor))
    found, number = verdict(copied)
    assert (found, number.num) == (expected, len(runs))
    assert {path.relative_to(copied).parts[1].split("-")[0] for path in number.files} == {"default", "seminorm"}


def test_a_claim_without_its_runs_is_not_testable_and_one_with_a_single_pair_is_open(copied):
    runs = sorted((copied / "speech_commands" / SEMINORM).glob("*.json"))
    for path in runs[1:]:
        path.unlink()
    found, number = verdict(copied)
    assert (found, number.num) == ("not confirmed", 1)
    runs[0].unlink()
    assert verdict(copied) == ("not testable here", "runs missing")


def test_runs_of_other_seeds_data_or_epochs_are_no_pairs(copied):
    runs = sorted((copied / "speech_commands" / SEMINORM).glob("*.json"))

    def other_seed(record):
        record["config"]["seed"] = 77

    def other_data(record):
        record["provenance"]["split"] = "0" * 64

    def fewer_epochs(record):
        record["epochs"], record["history"] = record["epochs"][:2], record["history"][:1]

    for path, change in zip(runs, (other_seed, other_data, fewer_epochs), strict=True):
        rewrite(path, change)
    assert verdict(copied) == ("not testable here", "runs missing")


def test_what_was_not_measured_is_called_that(tmp_path):
    evidence = Evidence.of(str(tmp_path))
    reasons = [claim.verdict(evidence)[1] for claim in claims() if "-m reproduction." in claim.command]
    assert len(reasons) > 50
    assert set(reasons) == {"not measured"}


def test_of_several_numbers_of_epochs_the_most_count(copied):
    def fewer_epochs(record):
        record["epochs"], record["history"] = record["epochs"][:2], record["history"][:1]

    for norm in ("default", "seminorm"):
        folder = copied / "speech_commands" / SEMINORM.replace("seminorm", norm)
        short = folder.with_name(f"{folder.name}-short")
        shutil.copytree(folder, short)
        for path in short.glob("*.json"):
            rewrite(path, fewer_epochs)
    _, number = verdict(copied)
    assert (number.num, {path.parent.name.endswith("short") for path in number.files}) == (3, {False})
    assert "24 epochs" in number.note


def test_of_several_numbers_of_epochs_that_with_more_pairs_counts(copied):
    for norm in ("default", "seminorm"):
        folder = copied / "speech_commands" / SEMINORM.replace("seminorm", norm)
        longer = folder.with_name(f"{folder.name}-longer")
        longer.mkdir()
        shutil.copy(folder / "0.json", longer)

        def more_epochs(record):
            record["epochs"] += [epoch | {"epoch": 24 + epoch["epoch"]} for epoch in record["epochs"]]

        rewrite(longer / "0.json", more_epochs)
    _, number = verdict(copied)
    assert (number.num, "24 epochs" in number.note) == (3, True)


def test_the_page_says_which_numbers_of_the_paper_were_not_checked():
    page = (ROOT / "results" / "CLAIMS.md").read_text(encoding="utf-8")
    for claim in claims():
        if isinstance(claim.rule, Holds):
            assert "from memory, not checked against the paper" in claim.source
        assert claim.text in page


def test_the_files_behind_a_claim_are_there():
    evidence = Evidence.of(str(REFERENCE))
    for claim in claims():
        _, number = claim.verdict(evidence)
        found = isinstance(number, str) or (number.files and all(path.exists() for path in number.files))
        assert found, claim.text


def test_runs_that_did_not_complete_do_not_count(copied):
    path = copied / "speech_commands" / SEMINORM / "0.json"
    rewrite(path, lambda record: record.update(status="interrupted"))
    assert verdict(copied)[1].num == 2


@pytest.mark.parametrize("later", [1.0, -1.0])
def test_of_several_results_of_a_run_the_latest_count(copied, later):
    first = copied / "speech_commands" / SEMINORM / "0.json"
    again = first.with_name("3.json")
    shutil.copy(first, again)
    rewrite(again, lambda record: record.update(start_time=record["start_time"] + later))
    _, number = verdict(copied)
    assert number.num == 3
    assert (again in number.files, first in number.files) == (later > 0, later < 0)


def test_seconds_by_two_clocks_are_not_compared(copied):
    [claim] = [claim for claim in claims() if claim.text == FASTER]
    assert claim.verdict(Evidence.of(str(copied)))[1].num == 3

    def forget_the_cpus_clock(record):
        for epoch in record["epochs"]:
            epoch["cpu_seconds"] = None

    [path] = (copied / "speech_commands").glob("seminorm-0-0001-*/1.json")
    rewrite(path, forget_the_cpus_clock)
    assert claim.verdict(Evidence.of(str(copied)))[1].num == 2
    # CPU seconds of several threads are not those of one.
    rewrite(path.with_name("2.json"), lambda record: record["provenance"].update(num_threads=8))
    assert claim.verdict(Evidence.of(str(copied)))[1].num == 1


FASTER = "Training takes less time with the seminorm on Speech Commands at 1e-4, 1e-7"
