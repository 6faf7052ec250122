import copy
import json
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from common.records import read_as
from common.results import Epoch, HistoryEntry, Metrics, Results, load, load_all, make_directory, save

COUNTS = {
    f"{direction}_{name}": number
    for number, (direction, name) in enumerate(
        (direction, name) for direction in ("forward", "backward") for name in ("nfe", "accepted", "rejected")
    )
}
TIMES = {
    f"{direction}_{name}": [0.0, 0.25]
    for direction in ("forward", "backward")
    for name in ("ts", "accept_ts", "reject_ts")
}
PUBLISHED_METRICS = {"dataset_size": 20, "loss": 0.5, "timestamp": 1e9, "timespan": 2.5, **TIMES}
METRICS = {**PUBLISHED_METRICS, **COUNTS}
CONFIG = {"norm": "seminorm", "rtol": 1e-3, "atol": 1e-6, "seed": 0}
EPOCH = {"epoch": 1, "loss": 0.5, "seconds": 2.0, "cpu_seconds": 1.5, "learning_rate": 1e-3, **COUNTS}


def make_results(**changes):
    values = {
        "start_time": 1e9,
        "model": nn.Linear(2, 1),
        "parameters": 3,
        "history": [
            HistoryEntry(epoch=1, train_metrics=read_as(Metrics, METRICS), val_metrics=read_as(Metrics, METRICS))
        ],
        "train_dataloader": [1, 2],
        "train_metrics": read_as(Metrics, {**METRICS, "accuracy": 0.75}),
        "val_metrics": read_as(Metrics, {**METRICS, "accuracy": 0.75}),
        "test_metrics": read_as(Metrics, {**METRICS, "accuracy": 0.75}),
        "experiment": "toy",
        "config": CONFIG,
        "provenance": {"commit": None},
        "epochs": [read_as(Epoch, EPOCH), read_as(Epoch, {**EPOCH, "accuracy": 0.5})],
        "status": "completed",
    }
    return Results(**{**values, **changes})


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_names_are_the_published_ones_and_then_ours():
    published = """memory_usage baseline_memory start_time timespan model parameters history
        train_dataloader val_dataloader test_dataloader train_metrics val_metrics test_metrics"""
    ours = "experiment config provenance epochs status failure"
    results = make_results()
    assert list(results.keys()) == (published + " " + ours).split()
    assert set(results.history[0].train_metrics.keys()) == {*PUBLISHED_METRICS, *COUNTS}


def test_items_are_attributes():
    results = make_results()
    assert results["history"][0]["val_metrics"]["loss"] == results.history[0].val_metrics.loss == 0.5
    assert dict(results)["parameters"] == 3
    with pytest.raises(KeyError):
        results["keys"]


def test_accuracy_is_absent_where_there_is_none():
    results = make_results()
    assert hasattr(results.test_metrics, "accuracy")
    assert "accuracy" in results.test_metrics
    without = results.history[0].val_metrics
    assert not hasattr(without, "accuracy")
    assert "accuracy" not in without
    assert "accuracy" not in results.epochs[0]
    assert results.epochs[1].accuracy == 0.5


def test_copies_and_pickles():
    results = make_results(model=None)
    assert copy.deepcopy(results) == results
    assert copy.deepcopy(results).history[0] is not results.history[0]
    assert pickle.loads(pickle.dumps(results)) == results


def test_saved_results_load_equal_without_what_lives_in_memory(tmp_path):
    results = make_results()
    path = save(results, tmp_path)
    assert path == tmp_path / "0.json"
    assert "model" not in strict_json(path)
    assert strict_json(path)["schema"] == 2
    results.model = results.train_dataloader = None
    assert load(path) == results
    assert type(load(path).epochs[1]) is type(results.epochs[1])


def test_numbers_that_json_lacks_become_null(tmp_path):
    metrics = read_as(Metrics, {**METRICS, "loss": float("nan"), "forward_ts": [0.0, float("inf")]})
    saved = strict_json(save(make_results(val_metrics=metrics), tmp_path))["val_metrics"]
    assert saved["loss"] is None
    assert saved["forward_ts"] == [0.0, None]
    assert math.isnan(load(tmp_path / "0.json").val_metrics.loss)


def test_saving_takes_the_next_free_number_and_leaves_nothing_else(tmp_path):
    (tmp_path / "1.json").write_text("mine")
    assert [save(make_results(), tmp_path).name for _ in range(2)] == ["0.json", "2.json"]
    assert (tmp_path / "1.json").read_text() == "mine"
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert names == {"0.json", "0.pt", "1.json", "2.json", "2.pt"}


def test_many_can_save_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda seed: save(make_results(config={**CONFIG, "seed": seed}), tmp_path), range(40)))
    assert len(set(paths)) == 40
    assert [load(path).config["seed"] for path in paths] == list(range(40))


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "..", "a/b\\c\0d", "x" * 1000])
def test_no_name_leaves_the_results_folder(tmp_path, name):
    directory = make_directory(str(tmp_path / "results"), "toy", name)
    assert directory.is_dir()
    assert directory.resolve().parent == (tmp_path / "results" / "toy").resolve()


def test_condition_keeps_its_letters(tmp_path):
    assert make_directory(str(tmp_path), "toy", "as-published-0.001-1e-06").name == "as-published-0-001-1e-06"


def test_results_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(ValueError, match="no folder can be made"):
        make_directory(str(tmp_path / "results"), "toy", "seminorm")


def test_another_schema_is_refused(tmp_path):
    path = save(make_results(), tmp_path)
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 3'))
    with pytest.raises(ValueError, match=r"0\.json is not a results file .*schema is 3, not 2 or older"):
        load(path)


def test_the_older_schema_is_read(tmp_path):
    path = save(make_results(), tmp_path)
    old = path.read_text().replace('"schema": 2', '"schema": 1').replace('"cpu_seconds": 1.5, ', "")
    assert "cpu_seconds" not in old
    path.write_text(old)
    results = load(path)
    assert [epoch.cpu_seconds for epoch in results.epochs] == [None, None]
    assert results.epochs[0].seconds == 2.0


def test_the_weights_of_a_completed_run_lie_beside_it(tmp_path):
    results = make_results()
    weights = torch.load(save(results, tmp_path).with_suffix(".pt"), weights_only=True)
    torch.testing.assert_close(weights, dict(results.model.state_dict()), rtol=0, atol=0)
    assert not save(make_results(status="failed"), tmp_path).with_suffix(".pt").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "it is \\[\\], not dict"),
        (b"{}", "its schema is None"),
        (b'{"schema": 1}', "epochs is None, not list"),
        (b'{"schema": 2, "start_time": 0', "Expecting"),
        (b'{"schema": 2, "start_time": 0}', "lacks .*'experiment'"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "0.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"0\.json is not a results file .*{reason}"):
        load(path)


DAMAGES = {
    '"parameters": 3': ('"parameters": "3"', "parameters is '3', not int"),
    '"start_time": 1000000000.0': ('"start_time": NaN', "NaN is not a finite number"),
    '"status": "completed"': ('"status": "complete"', "status is 'complete', not"),
    '"failure": null': ('"failure": 1', "failure is 1, not str"),
    '"memory_usage": null': ('"memory_usage": true', "memory_usage is True, not int"),
    '"epoch": 1, "seconds"': ('"epoch": 1.5, "seconds"', "epochs.0..epoch is 1.5, not int"),
    '"learning_rate": 0.001': ('"rate": 0.001', "epochs.0. lacks .'learning_rate'. and has the unknown .'rate'."),
    '"loss": 0.5': ('"loss": 1e999', "1e999 is not a finite number"),
    '"forward_ts": [0.0': ('"forward_ts": ["0"', "forward_ts.0. is '0', not float"),
    '"norm": "seminorm"': ('"norm": ["seminorm"]', "config.norm is"),
    '"atol": ': ('"atoll": ', "config lacks atol"),
    '"history": [': ('"history": [3, ', "history.0. is 3, not HistoryEntry"),
    '"epochs": [': ('"more": 1, "epochs": [', "unknown .'more'."),
}


@pytest.mark.parametrize("old", DAMAGES)
def test_names_and_types_must_be_those_of_the_schema(tmp_path, old):
    new, reason = DAMAGES[old]
    path = save(make_results(), tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=reason):
        load(path)


def test_a_completed_run_has_all_metrics(tmp_path):
    with pytest.raises(ValueError, match="lacks metrics"):
        load(save(make_results(val_metrics=None), tmp_path))
    assert load(save(make_results(val_metrics=None, status="failed"), tmp_path)).val_metrics is None


def test_all_runs_are_read_and_what_is_none_is_named(tmp_path, caplog):
    root, outside = tmp_path / "results", tmp_path / "outside"
    good = [save(make_results(), make_directory(root, "toy", name)) for name in ("seminorm", "default", "default")]
    outside.mkdir()
    secret = save(make_results(), outside)
    folder = good[0].parent
    (folder / "torn.json").write_bytes(good[0].read_bytes()[:-9])
    (folder / "bytes.json").write_bytes(b"\xff")
    (folder / "folder.json").mkdir()
    (folder / "link.json").symlink_to(secret)
    (folder / "broken.json").symlink_to(tmp_path / "nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    os.mkfifo(folder / "pipe.json")
    (root / "toy" / "elsewhere").symlink_to(outside)
    (root / "toy" / "note.json").write_text("not a run")
    (root / "diagnostics").mkdir()
    (root / "diagnostics" / "norms.json").write_text("{}")
    runs = load_all(root)
    assert list(runs) == sorted(good)
    assert all(results == load(path) for path, results in runs.items())
    bad = ["bytes", "torn", "folder", "link", "broken", "loop", "pipe", "0"]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == len(bad)
    assert all(any(f"/{name}.json" in message for message in named) for name in bad)
    assert load_all(tmp_path / "nowhere") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path, caplog):
    path = save(make_results(), make_directory(tmp_path, "toy", "seminorm"))
    path.chmod(0)
    assert load_all(tmp_path) == {}
    assert "Permission denied" in caplog.text
