"""A checkpoint that holds something else than a run's state is one sentence, and no program."""

import hashlib
import io
import re
from pathlib import Path

import pytest
import torch
from test_checkpoint import checkpoints, fail, model_of
from test_training import make_config, run

from common.errors import TrainingFailed


def rewritten(path, change):
    """Gives a checkpoint other content, with the right digest."""
    stored = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    buffer = io.BytesIO()
    torch.save(change(stored), buffer)
    path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def without(*way):
    def change(stored):
        place = stored
        for step in way[:-1]:
            place = place[step]
        del place[way[-1]]
        return stored

    return change


def with_state(name, value):
    return lambda stored: stored | {"state": stored["state"] | {name: value}}


def with_plain(name, value):
    return lambda stored: with_state("plain", stored["state"]["plain"] | {name: value})(stored)


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: [1, 2, 3],
        lambda stored: "text",
        without("schema"),
        without("identity"),
        without("state"),
        without("state", "training"),
        without("state", "provenance"),
        without("state", "plain", "epoch"),
        lambda stored: stored | {"identity": 3},
        with_state("model", {"linear.weight": torch.ones(3, 3)}),
        with_state("optimiser", {}),
        with_state("random", torch.ones(3)),
        with_state("epochs", [{"epoch": 1}]),
        with_state("training", {"num_batches": "two"}),
        with_plain("epoch", "1"),
        with_plain("epoch", 0),
        with_plain("order", torch.ones(3)),
    ],
)
def test_a_checkpoint_of_other_content_is_one_sentence(tmp_path, change):
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path), model=model_of(fail))
    [path] = checkpoints(tmp_path)
    rewritten(path, change)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds something else .*: delete it to") as caught:
        run(make_config(tmp_path, resume=True))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_checkpoint_that_is_a_program_is_not_run(tmp_path):
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path), model=model_of(fail))
    [path] = checkpoints(tmp_path)
    rewritten(path, lambda stored: stored | {"state": Trap(tmp_path / "sprung")})
    with pytest.raises(ValueError, match="holds something else"):
        run(make_config(tmp_path, resume=True))
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
