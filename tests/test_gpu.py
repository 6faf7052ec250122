"""What `make gpu` measures, on the CPU: there nothing is recorded, so that ways differ by their adjoint alone."""

import json

import pytest
import torch

import acrobot
import flow
from reproduction import gpu, page
from torchadjoint import replay
from torchadjoint.statistics import SolveStatistics


@pytest.fixture(scope="module")
def rows():
    config = acrobot.Config("cpu", "seminorm", batch_size=8, num_trajectories=16)
    return {row["way"]: row for row in gpu.gradient_steps("acrobot", config, num_rounds=1)}


def test_every_way_takes_the_step(rows):
    assert list(rows) == list(gpu.WAYS)
    assert all(row["milliseconds"] > 0 and row["forward_nfe"] > 0 for row in rows.values())
    assert rows["ours, discrete"]["backward_nfe"] < rows[gpu.GRAPHS]["backward_nfe"]


def test_no_step_draws_as_a_training_does(monkeypatch):
    def spy(model, *_):
        is_training.append(model.training)
        return torch.ones(1), SolveStatistics(), 0.0

    is_training = []
    monkeypatch.setattr(gpu, "_gradient_step", spy)
    gpu.gradient_steps("flow", flow.Config("cpu", "seminorm", data="digits", width=1, batch_size=2), num_rounds=1)
    assert is_training == [False] * 3 * len(gpu.WAYS), "a warm-up, the numbers and a round"


def test_graphs_do_not_change_the_gradient_and_adjoints_do(rows):
    assert rows[gpu.KERNELS]["difference"] == rows[gpu.GRAPHS]["difference"] == 0
    assert 0 < rows["ours, discrete"]["difference"] < 1
    assert 0 < rows["torchdiffeq, seminorm"]["difference"] < 1e-3


def test_a_way_holds_while_it_is_applied(monkeypatch):
    device = torch.device("cuda")
    with gpu.WAYS[gpu.KERNELS].applied():
        assert not replay.can_record(device)
    with gpu.WAYS[f"{gpu.GRAPHS}, deterministic"].applied():
        assert replay.can_record(device)
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_as_a_table(rows):
    table = gpu.table(list(rows.values()))
    assert list(table["way"]) == list(gpu.WAYS)
    assert table["experiment"].iloc[0] == "Symplectic ODE-Net on acrobot, batch 8"


def test_the_report_shows_what_was_kept(rows, tmp_path):
    assert gpu.tables(str(tmp_path)) == []
    record = {"provenance": {"device_name": "a card"}, "rounds": 1, "tests_passed": True, "seconds_of_two_epochs": None}
    (tmp_path / gpu.FILE).write_text(json.dumps({**record, "rows": list(rows.values())}))
    [table] = gpu.tables(str(tmp_path))
    assert len(table.frame) == len(gpu.WAYS)
    assert "a card" in table.notes[0]
    assert "A gradient step on a GPU" in page.make_page(str(tmp_path), "cpu", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    gpu.main(gpu.Options(results_dir=str(tmp_path)))
    assert "No GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_columns_have_what_their_headings_say():
    row = dict(experiment="acrobot", batch_size=8, way="w", forward_nfe=1, backward_nfe=2, milliseconds=3, mebibytes=4)
    [text] = gpu.table([row | {"difference": 0.0}]).to_dict("records")
    assert (text["NFE"], text["ms"], text["MiB"], text["difference"]) == ("1 + 2", "3", "4", "0e+00")


@pytest.mark.parametrize("content", ["{}", "[1]", "torn"])
def test_a_foreign_file_is_named(tmp_path, content):
    (tmp_path / gpu.FILE).write_text(content)
    with pytest.raises(ValueError, match=gpu.FILE):
        gpu.tables(str(tmp_path))


def test_tests_that_failed_are_told(rows, tmp_path):
    epochs = {"seconds_of_two_epochs": 30.0, "num_samples": 280}
    record = {"provenance": {"device_name": "a card"}, "rounds": 1, **epochs}
    for passed, word in ((True, "need a GPU passed"), (False, "need a GPU FAILED")):
        content = {**record, "tests_passed": passed, "rows": list(rows.values())}
        (tmp_path / gpu.FILE).write_text(json.dumps(content))
        [note] = gpu.tables(str(tmp_path))[0].notes
        assert word in note
        assert "Two epochs of the Neural CDE on 280 samples took 30 s." in note
