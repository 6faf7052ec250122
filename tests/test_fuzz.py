"""Odd settings, odd command lines and damaged files: a result or one of our errors, and no trace where none belongs."""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fuzzing import cases, damaged, odd, some_of, survive, time_limit
from hypothesis import given
from hypothesis import strategies as st

import acrobot
import figures
import flow
import speech_commands
import tables
from common import command_line
from common.checkpoint import Checkpoint
from common.results import load, load_all
from datasets import cache, synthetic
from datasets import speech_commands as recordings
from reproduction import runs, status, typesetting
from reproduction.page import make_page
from reproduction.style import NothingToDraw, render

EXPERIMENTS = {"acrobot": acrobot, "flow": flow, "speech_commands": speech_commands}
experiments = st.sampled_from(sorted(EXPERIMENTS))


def names_of(experiment):
    return sorted(EXPERIMENTS[experiment].Config.__dataclass_fields__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty working directory, with a home and a cache of its own beside it."""
    root = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in (("HOME", "home"), ("SEMINORM_CACHE", "cache")):
            (root / name).mkdir()
            patch.setenv(variable, str(root / name))
        (root / "work").mkdir()
        patch.chdir(root / "work")
        # A simulation takes seconds, and every case that asks for another torque would wait for one.
        patch.setattr(
            acrobot.dataset,
            "_trajectories",
            lambda environment: torch.linspace(-1, 1, 9 * 128 * 32 * 8).view(9, 128, 32, 8),
        )
        logging.disable()
        yield root
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    root = tmp_path_factory.mktemp("sounds")
    synthetic.write(root, clips_per_word=7)
    return root


def files_in(folder):
    return {path for path in folder.rglob("*") if not path.is_dir()}


@cases(0.25)
@given(st.data())
def test_settings(data):
    experiment = data.draw(experiments)
    settings = data.draw(some_of(dict.fromkeys(names_of(experiment), odd), at_most=3))
    config = survive(lambda: EXPERIMENTS[experiment].Config(**{"device": "cpu", "norm": True, **settings}))
    if config is not None:
        for field in config.__dataclass_fields__.values():
            assert not isinstance(field.type, type) or type(getattr(config, field.name)) is field.type
        assert json.dumps({name: getattr(config, name) for name in names_of(experiment)}, allow_nan=False)
        assert config.condition


words = st.one_of(
    st.sampled_from(["True", "0", "1", "1e-3", "nan", "inf", "-1", "None", "", "--", "-", "x" * 3000, "9" * 5000]),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
)


def exit_code(experiment, arguments):
    """How a command line ends, 0 for one without faults, and what it prints."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["program", *arguments])
        try:
            with time_limit():
                command_line.run(EXPERIMENTS[experiment].Config, lambda config: None)
        except SystemExit as end:
            return end.code, printed.getvalue()
    return 0, "nothing to say"


@cases(0.1)
@given(st.data())
def test_command_lines(data):
    experiment = data.draw(experiments)
    names = st.sampled_from([f"--{name.replace('_', '-')}" for name in names_of(experiment)]) | words
    options = data.draw(st.lists(st.tuples(names, words) | st.tuples(names), max_size=3))
    valid = data.draw(st.sampled_from([["--device", "cpu", "--norm", "True"]] * 3 + [[]]))
    code, printed = exit_code(experiment, [*valid, *itertools.chain.from_iterable(options)])
    assert code in (0, 2)
    assert printed
    assert "Traceback" not in printed


SMALL = {
    "acrobot": dict(num_trajectories=7, batch_size=900, metric_interval=1),
    "flow": dict(data="wine", batch_size=900, width=5),
    "speech_commands": dict(batch_size=25, hidden_channels=4, hidden_hidden_channels=4, num_hidden_layers=1),
}


@cases(0.01)
@given(st.data())
def test_runs(folder, sounds, data):
    experiment = data.draw(experiments)
    settings = dict(device="cpu", norm=True, rtol=1e-1, atol=1e-1, max_epochs=1, **SMALL[experiment])
    settings |= dict(data_root=sounds) if experiment == "speech_commands" else {}
    # Without a value for data_root it would download; with small batches or many epochs it would train on and on.
    values = dict.fromkeys(names_of(experiment), odd) | {
        "data_root": odd.filter(lambda value: value is not None),
        "batch_size": st.sampled_from([0, 100, 2**62, 2**63, "8", 100.5]),
        "max_epochs": st.sampled_from([0, 2, "1", None]),
        "rtol": st.sampled_from([1e-300, 1e30, 1e300, "1"]),
        "results_dir": st.sampled_from(["", "results", "deep/er", "../beside/up", "x" * 300, 7, "\0", "/proc/here"]),
        "learning_rate": st.sampled_from([1e-300, 1e30, 1e300, float("nan")]),
        # Others take long, or download.
        "data": st.sampled_from(["wine", "Wine", "2spirals", None, 7]),
        "width": st.sampled_from([None, 0, 1, 3.5, "4", 10**9]),
    }
    settings |= data.draw(some_of({name: values[name] for name in names_of(experiment)}, at_most=2))
    before = files_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        network = acrobot.SoftplusNetwork
        patch.setattr(
            acrobot, "SoftplusNetwork", lambda *widths: network(widths[0], *[5] * (len(widths) - 2), widths[-1])
        )
        survive(lambda: EXPERIMENTS[experiment].main(**settings))
    written = {path.relative_to(folder).as_posix() for path in files_in(folder) - before}
    results_dir = os.path.normpath(Path("work", str(settings.get("results_dir", "results"))))
    kept = rf"{re.escape(results_dir)}/{experiment}/[^/]+/(\d+\.(json|pt)|seed-\d+\.checkpoint(\.lock)?|save\.lock)"
    assert not [path for path in written if not re.fullmatch(rf"{kept}|cache/[^/]+\.npz(\.lock)?", path)]


RESULTS = next((Path(__file__).parent.parent / "reference").glob("speech_commands/*/0.json")).read_bytes()
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def replaced(value, place, by):
    """A copy of `value`, in terms of JSON, with one thing within it replaced: the `place` chooses which."""
    if isinstance(value, (dict, list)) and value and place:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[place[0] % len(keys)]
        copy = value.copy()
        copy[key] = replaced(value[key], place[1:], by)
        return copy
    return by


results_with_odd_values = st.builds(
    lambda place, by: json.dumps(replaced(json.loads(RESULTS), place, by)).encode(),
    st.lists(st.integers(0, 50), min_size=1, max_size=4),
    values,
)


@cases(0.12)
@given(
    results_with_odd_values
    | damaged(RESULTS)
    | values.map(lambda value: json.dumps(value).encode())
    | st.integers(1, 100_000).map(lambda depth: b"[" * depth)
)
def test_results(folder, content):
    path = folder / "fuzzed" / "toy" / "condition" / "0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    results = survive(lambda: load(path))
    assert (results is not None) == (path in load_all(folder / "fuzzed"))


odd_leaves = st.sampled_from(
    [None, True, -1, 0, 0.5, 3, 10**400, 1e308, -1e308, 5e-324, "", "a\nb\x1b[31m\ud800", "cpu", "seminorm", [], {}]
)


def ways(value, way=()):
    """The ways to all that is within `value`, in terms of JSON; of a list, to its first item and its last."""
    if way:
        yield way
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        if not isinstance(value, list) or key in (0, len(value) - 1):
            yield from ways(value[key], (*way, key))


def damaged_at(value, way, by):
    """A copy of `value` with `by` where the way leads, or without what is there if that is "taken away"."""
    if not way:
        return by
    copy = value.copy()
    if by == "taken away" and len(way) == 1:
        del copy[way[0]]
    else:
        copy[way[0]] = damaged_at(value[way[0]], way[1:], by)
    return copy


@cases(0.004)
@given(st.sampled_from(sorted(ways(json.loads(RESULTS)), key=str)), odd_leaves | st.just("taken away"), st.integers(0))
def test_what_a_results_file_holds_is_drawn_and_printed_or_left_out(folder, way, by, number):
    root = folder / "drawn"
    path = root / "speech_commands" / "condition" / "0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(damaged_at(json.loads(RESULTS), way, by)))
    if survive(lambda: load(path)) is None:
        assert not load_all(root)
        return
    planned = status.on_found_data(runs.preset_runs("cpu"), load_all(root).values())
    standing = status.statuses(planned, str(root))
    for kind in ("terminal", "csv"):
        assert typesetting.render(standing, load_all(root).values(), format=kind)
    assert tables.seconds_of(planned, {}, tables.Plan(preset="cpu", results_dir=str(root)))
    # Each case draws one figure, as all take seconds.
    draws = list(figures.figures(str(root)).values())
    with contextlib.suppress(NothingToDraw):
        render(draws[number % len(draws)](), "svg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "figures", lambda results_dir: {})
        assert make_page(str(root), "cpu", root).encode()


@cases(0.06)
@given(st.data())
def test_recordings(folder, sounds, data):
    original = next(sounds.rglob("*.wav")).read_bytes()
    path = folder / "recording.wav"
    path.write_bytes(data.draw(damaged(original[:3000] if data.draw(st.booleans()) else original)))
    read = survive(lambda: recordings._read_all([path]))
    assert read is None or (read[0][0].ndim == 1 and 2 * len(read[0][0]) < path.stat().st_size)


@cases(0.06)
@given(st.data())
def test_caches(folder, data):
    path, tensors = folder / "tensors.npz", {"a": torch.arange(50.0), "b": torch.tensor([3])}

    def fits(read):
        return [read["a"].shape, read["b"].shape] == [(50,), (1,)]

    path.unlink(missing_ok=True)
    cache.load_or_build(path, lambda: tensors, fits)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    for _ in range(2):
        read = survive(lambda: cache.load_or_build(path, lambda: tensors, fits))
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert not list(folder.glob("*.partial"))


@cases(0.06)
@given(st.data())
def test_checkpoints(folder, data):
    with Checkpoint(folder / "run.checkpoint", {"seed": 0}) as checkpoint:
        checkpoint.write({"weight": torch.ones(3), "epoch": 2})
        original = checkpoint.path.read_bytes()
        content = data.draw(damaged(original))
        # Half of them with the right digest, as another program would write.
        if data.draw(st.booleans()):
            content = hashlib.sha256(content[32:]).digest() + content[32:]
        checkpoint.path.write_bytes(content)
        restored = []
        survive(lambda: checkpoint.restore(SimpleNamespace(load_state_dict=restored.append)))
        assert all(state.keys() == {"weight", "epoch"} for state in restored)
