import copy
import json
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from records import made_on
from torch import nn

from common.records import plain, read_as
from common.results import (
    MEASURES,
    SCHEMA,
    Epoch,
    HistoryEntry,
    Metrics,
    Results,
    load,
    load_all,
    make_directory,
    save,
)

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
PUBLISHED_METRICS = {"accuracy": 0.75, "dataset_size": 20, "loss": 0.5, "timestamp": 1e9, "timespan": 2.5, **TIMES}
METRICS = {**PUBLISHED_METRICS, **COUNTS}
CONFIG = {
    "device": "cpu", "norm": "seminorm", "rtol": 1e-3, "atol": 1e-6, "seed": 0,
    "max_epochs": 2, "batch_size": 8, "learning_rate": 0.1,
}  # fmt: skip
EPOCH = {"epoch": 1, "loss": 0.5, "accuracy": 0.5, "seconds": 2.0, "cpu_seconds": 1.5, "learning_rate": 1e-3, **COUNTS}


def make_results(**changes):
    values = {
        "start_time": 1e9,
        "timespan": 9.0,
        "model": nn.Linear(2, 1),
        "parameters": 3,
        "history": [
            HistoryEntry(epoch=2, train_metrics=read_as(Metrics, METRICS), val_metrics=read_as(Metrics, METRICS))
        ],
        "train_dataloader": [1, 2],
        "train_metrics": read_as(Metrics, METRICS),
        "val_metrics": read_as(Metrics, METRICS),
        "test_metrics": read_as(Metrics, METRICS),
        "experiment": "toy",
        "config": CONFIG,
        "provenance": made_on(),
        "epochs": [read_as(Epoch, {**EPOCH, "epoch": epoch}) for epoch in (1, 2)],
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


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_absent_where_there_are_none(name):
    for kind, values in ((Metrics, METRICS), (Epoch, EPOCH)):
        others = {key: value for key, value in values.items() if key != "accuracy"}
        record = read_as(kind, {**others, name: 0.25})
        assert getattr(record, name) == record[name] == 0.25
        without = read_as(kind, others)
        assert name not in without
        assert name not in plain(without)
        assert len(record) == len(list(record)) == len(without) + 1
        with pytest.raises(KeyError):
            without[name]
        with pytest.raises(ValueError, match=f"has a null for '{name}'"):
            read_as(kind, {**others, name: None})


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
    assert strict_json(path)["schema"] == SCHEMA
    results.model = results.train_dataloader = None
    assert load(path) == results
    assert type(load(path).epochs[1]) is type(results.epochs[1])


def test_numbers_that_json_lacks_become_null(tmp_path):
    metrics = read_as(Metrics, {**METRICS, "forward_ts": [0.0, float("inf")]})
    saved = strict_json(save(make_results(val_metrics=metrics), tmp_path))["val_metrics"]
    assert saved["forward_ts"] == [0.0, None]
    assert math.isnan(load(tmp_path / "0.json").val_metrics.forward_ts[1])


def test_saving_takes_the_next_free_number_and_leaves_nothing_else(tmp_path):
    (tmp_path / "1.json").write_text("mine")
    assert [save(make_results(start_time=time), tmp_path).name for time in (0.0, 1.0)] == ["0.json", "2.json"]
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
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 99'))
    with pytest.raises(ValueError, match=rf"0\.json is not a results file .*schema is 99, not {SCHEMA} or older"):
        load(path)


def test_the_solver_has_another_name_in_older_files(tmp_path):
    path = save(make_results(config={**CONFIG, "solver": "dopri5"}), tmp_path)
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 2'))
    assert load(path).config["solver"] == "torchadjoint"


def test_the_oldest_schema_is_read(tmp_path):
    path = save(make_results(), tmp_path)
    old = path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 1').replace('"cpu_seconds": 1.5, ', "")
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
        (b'{"schema": 3, "start_time": 0', "Expecting"),
        (b'{"schema": 3, "start_time": 0}', "lacks .*'experiment'"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "0.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"0\.json is not a results file .*{reason}"):
        load(path)


NAMES = sorted(Results.__dataclass_fields__)
DAMAGES = [
    # (where, what is put there, the sentence)
    ("parameters", "3", "parameters is '3', not int"),
    ("parameters", 10**400, "parameters is 1000.*, but must be a number from 0 to 1000000000000000"),
    ("start_time", -1, "start_time is -1, but must be a number from 0 to"),
    ("start_time", 1e12, "start_time is 1000000000000.0, but must"),
    ("timespan", None, "its timespan None: it has not ended"),
    ("status", "running", "its status is running"),
    ("status", "complete", "status is 'complete', not"),
    ("status", [], r"status is \[\], not"),
    ("failure", 1, "failure is 1, not str"),
    ("memory_usage", True, "memory_usage is True, not int"),
    ("memory_usage", -1, "memory_usage is -1, but must"),
    ("more", 1, "it has the unknown 'more'$"),
    ("epochs", [], "its history is of the epochs .2., but must be of some of .."),
    ("history", [], "completed, but lacks"),
    ("history", plain(make_results())["history"] * 2, r"its history is of the epochs \[2, 2\], but must be of some"),
    ("history", [3], r"history\[0\] is 3, not HistoryEntry"),
    ("epochs.0.epoch", 1.5, r"epochs\[0\].epoch is 1.5, not int"),
    ("epochs.0.epoch", 2, r"its epochs are \[2, 2\], but must be 1, 2, 3 and so on"),
    ("epochs.1.backward_nfe", -1, r"epochs\[1\].backward_nfe is -1, but must be a number from 0 to"),
    ("epochs.1.backward_nfe", 10**400, r"epochs\[1\].backward_nfe is 1000"),
    ("epochs.1.loss", None, r"epochs\[1\].loss is None, but must be a number from -1e\+39 to 1e\+39"),
    ("epochs.1.loss", 1e308, r"epochs\[1\].loss is 1e\+308, but must"),
    ("epochs.1.seconds", -0.5, r"epochs\[1\].seconds is -0.5, but must"),
    ("epochs.1.cpu_seconds", 1e300, r"epochs\[1\].cpu_seconds is 1e\+300, but must"),
    ("epochs.1.learning_rate", 10**400, r"epochs\[1\].learning_rate is 1000.*, which is too large"),
    ("epochs.1.rate", 1, r"epochs\[1\] has the unknown 'rate'$"),
    ("history.0.epoch", 3, r"its history is of the epochs \[3\], but must be of some of \[1, 2\]"),
    ("history.0.epoch", 1, "lacks metrics of a part of the data or of its last epoch"),
    ("history.0.val_metrics.accuracy", 2, "val_metrics.accuracy is 2, but must be a number from 0 to 1"),
    ("test_metrics.accuracy", -0.1, "test_metrics.accuracy is -0.1, but must be a number from 0 to 1"),
    ("train_metrics.dataset_size", 0, "dataset_size is 0, but must be a number from 1 to"),
    ("test_metrics.forward_ts", ["0"], r"forward_ts\[0\] is '0', not float"),
    ("test_metrics.timestamp", 1e300, "timestamp is 1e\\+300, but must"),
    ("config.norm", ["seminorm"], "config.norm is"),
    ("config.norm", "seminrom", "norm is 'seminrom', but must be one of 'default', 'seminorm'"),
    ("config.rtol", 0, "rtol is 0, but must be a finite number above 0"),
    ("config.atol", "small", "atol is 'small', but must be a finite number above 0"),
    ("config.seed", -1, "seed is -1, but must be a whole number of at least 0"),
    ("config.batch_size", 0, "batch_size is 0, but must be a whole number of at least 1"),
    ("config.batch_size", 10**400, "batch_size is 1000.*, but must be at most"),
    ("config.warm_start", 1, "warm_start is 1, but must be True or False"),
    ("config.device", None, "device is None, but must be the name of a device"),
    ("provenance.num_threads", 0, "num_threads is 0, but must"),
    ("provenance.device_name", None, "device_name is None, not str"),
    ("provenance.packages", {"torch": 2}, "packages.torch is 2, not str"),
    ("provenance.commit", 7, "commit is 7, not str"),
    ("provenance", {}, "provenance lacks 'commit', 'device_name', .*'split'$"),
    *[(f"config.{name}", "lacking", f"config lacks {name}") for name in CONFIG],
    *[(f"provenance.{name}", "lacking", f"provenance lacks '{name}'$") for name in made_on()],
    *[(name, "lacking", f"it lacks '{name}'$") for name in NAMES if name in plain(make_results())],
    ("epochs.0.accuracy", "lacking", "it has accuracy in some epochs or metrics and none in others"),
    ("history.0.val_metrics.loss", "lacking", "val_metrics lacks 'loss'$"),
]


def damaged(path, where, by):
    """Puts `by` where the names and numbers lead, in the results file; "lacking" takes away what is there."""
    content = json.loads(path.read_text())
    *way, last = where.split(".")
    place = content
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    if by == "lacking":
        del place[last]
    else:
        place[last] = by
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("where", "by", "sentence"), DAMAGES, ids=lambda value: str(value)[:30])
def test_what_is_not_as_the_schema_has_it_is_named(tmp_path, where, by, sentence):
    path = damaged(save(make_results(), tmp_path), where, by)
    with pytest.raises(ValueError, match=sentence) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_numbers_that_json_lacks_are_refused(tmp_path, number):
    path = save(make_results(), tmp_path)
    path.write_text(path.read_text().replace('"start_time": 1000000000.0', f'"start_time": {number}'))
    with pytest.raises(ValueError, match=f"{number} is not a finite number"):
        load(path)


def test_text_becomes_one_line_that_a_terminal_only_prints(tmp_path):
    path = save(make_results(status="failed", failure="too\nlittle\x1b[31m memory\u202e"), tmp_path)
    for where in ("provenance.device_name", "provenance.split", "experiment"):
        damaged(path, where, "a\r\nb\x1b]0;c\x07 \ud800")
    damaged(path, "provenance.packages", {"to\nrch": "2\t3"})
    damaged(path, "config.integrals", "no\nne\x1b[31m")
    results = load(path)
    assert results.failure == "too little [31m memory"
    assert results.experiment == results.provenance.device_name == results.provenance.split == "a b ]0;c"
    assert results.provenance.packages == {"to rch": "2 3"}
    assert results.config["integrals"] == "no ne [31m"


def test_a_setting_that_an_older_file_lacks_is_at_its_default(tmp_path):
    assert "warm_start" not in load(save(make_results(), tmp_path)).config


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_completed_run_has_all_metrics(tmp_path, part):
    changes = {f"{part}_metrics": None}
    with pytest.raises(ValueError, match="lacks metrics"):
        load(save(make_results(**changes), tmp_path))
    assert load(save(make_results(status="failed", **changes), tmp_path))[f"{part}_metrics"] is None


def test_a_completed_run_is_saved_once(tmp_path):
    first = save(make_results(), tmp_path)
    again = make_results(timespan=99.0, config={**CONFIG, "resume": True})
    assert save(again, tmp_path) == first
    others = dict(seed={"config": {**CONFIG, "seed": 1}}, start={"start_time": 2.0}, end={"status": "failed"})
    paths = {name: save(make_results(**changes), tmp_path) for name, changes in others.items()}
    assert len({first, *paths.values()}) == 4


def test_names_print_as_names():
    assert str(make_results().keys()).startswith("dict_keys(['memory_usage', 'baseline_memory', ")


def test_long_conditions_that_differ_have_folders_that_differ(tmp_path):
    alike = "width-" + "7" * 300
    folders = [make_directory(str(tmp_path), "toy", f"{alike}-{end}") for end in ("a", "b")]
    assert folders[0] != folders[1]
    assert max(len(folder.name) for folder in folders) <= 200
    assert make_directory(str(tmp_path), "toy", "x" * 200).name == "x" * 200


def test_all_runs_are_read_and_what_is_none_is_named(tmp_path, caplog):
    root, outside = tmp_path / "results", tmp_path / "outside"
    good = [save(make_results(), make_directory(root, "toy", name)) for name in ("seminorm", "default", "discrete")]
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
