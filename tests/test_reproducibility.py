"""The same seed gives the same bits: in a sweep as alone, and however many threads read the data.

Others say the same of resumed runs (test_checkpoint.py), of two runs of an experiment (test_experiments.py), and of
Python's hash seed (test_checkpoint.py).
"""

from functools import partial

import pytest
import torch
from test_checkpoint import TESTS, learnt

from datasets import speech_commands, synthetic
from reproduction.local_engine import run_locally
from reproduction.runs import Run
from reproduction.sweep import sweep


def test_a_run_in_a_sweep_is_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    run = Run("toy", {"norm": "seminorm", "seed": 3}, "abc")
    engine = partial(run_locally, devices=["cpu"])
    [status] = sweep([run], engine, results_dir=str(tmp_path / "sweep"), device="cpu")
    assert status.state == "done"
    run.train("cpu", str(tmp_path / "alone"))
    assert learnt(tmp_path / "sweep") == learnt(tmp_path / "alone")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit_of_the_data(tmp_path, threads, monkeypatch):
    synthetic.write(tmp_path, clips_per_word=10)
    paths = []
    for num_threads in (1, 2, 3, 7):
        threads(num_threads)
        monkeypatch.setenv("SEMINORM_CACHE", str(tmp_path / f"cache-{num_threads}"))
        data = speech_commands.load(
            data_root=tmp_path,
            split="published",
            batch_size=16,
            device="cpu",
            generator=torch.Generator(),
        )
        assert torch.get_num_threads() == num_threads
        paths.append(torch.cat([part.tensors[0] for part in (data.train, data.val, data.test)]))
    assert all(torch.equal(other, paths[0]) for other in paths[1:])
