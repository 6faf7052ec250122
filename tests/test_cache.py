"""The cache builds once, also across processes, and recovers from whatever has happened to its file."""

import io
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import cache
from datasets.cache import cache_directory, make_folder

TENSORS = {"path": torch.arange(600.0).reshape(20, 30), "label": torch.arange(20)}

SPAWN = multiprocessing.get_context("spawn")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def archive(**arrays):
    """The bytes of a cache file with these arrays."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def build():
    return TENSORS


def fits(tensors):
    return tensors["path"].shape == TENSORS["path"].shape


def load_or_build(path, build):
    return cache.load_or_build(path, build, fits)


def refuse():
    pytest.fail("What is cached was built again.")


def assert_equal(tensors):
    assert list(tensors) == list(TENSORS)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, TENSORS[name], rtol=0, atol=0)


def test_builds_once_and_then_reads(tmp_path, caplog):
    path = tmp_path / "cached"
    assert_equal(load_or_build(path, build))
    assert_equal(load_or_build(path, refuse))
    assert not caplog.records


def build_slowly(path, built):
    tensors = cache.load_or_build(
        path, lambda: (time.sleep(0.3), {"pid": torch.tensor(os.getpid())})[1], lambda tensors: "pid" in tensors
    )
    built.put(tensors["pid"].item())


def test_of_two_processes_one_builds(tmp_path):
    built = SPAWN.SimpleQueue()
    processes = [SPAWN.Process(target=build_slowly, args=(tmp_path / "cached", built)) for _ in range(2)]
    for process in processes:
        process.start()
    assert built.get() == built.get()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def build_and_die(path):
    def die(descriptor):
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = die
    load_or_build(path, build)


def test_a_kill_while_it_writes_leaves_nothing_that_counts(tmp_path):
    path, partial = tmp_path / "cached", tmp_path / "cached.partial"
    process = SPAWN.Process(target=build_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not path.exists()
    assert partial.exists()
    assert_equal(load_or_build(path, build))
    assert not partial.exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content[:-1], id="last byte missing"),
        pytest.param(lambda content: content.replace(b"\x80?", b"\x80@", 1), id="one value changed"),
        pytest.param(lambda content: b"no archive at all", id="text"),
        pytest.param(lambda content: pickle.dumps({"path": 1}), id="pickle"),
        pytest.param(lambda content: archive(), id="no names"),
        pytest.param(lambda content: archive(path=np.zeros((30, 20))), id="another shape"),
        pytest.param(lambda content: archive(path=np.zeros((20, 30), "S1")), id="text in place of numbers"),
    ],
)
def test_damaged_file_is_built_anew(tmp_path, caplog, damage):
    path = tmp_path / "cached"
    load_or_build(path, build)
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert path.read_bytes() != intact
    assert_equal(load_or_build(path, build))
    assert [record.getMessage() for record in caplog.records] == [
        f"The cache file {path} cannot be used: it is built anew."
    ]
    assert path.read_bytes() == intact


def test_pickles_are_never_loaded(tmp_path):
    path, touched = tmp_path / "cached", tmp_path / "touched"
    with path.open("wb") as file:
        np.savez(file, path=np.array([Payload(touched)], dtype=object))
    assert_equal(load_or_build(path, build))
    assert not touched.exists()


def test_failed_write_leaves_neither_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    path = tmp_path / "cached"
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        load_or_build(path, build)
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".lock"] == []


@pytest.mark.parametrize("leads_to", ["target", "nowhere"])
def test_a_link_in_place_of_a_partial_file_or_folder_is_not_followed(tmp_path, leads_to):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("untouched")
    link = tmp_path / leads_to / "file" if leads_to == "target" else tmp_path / leads_to
    (tmp_path / "cached.partial").symlink_to(link)
    (tmp_path / "folder.partial").symlink_to(tmp_path / leads_to)
    assert_equal(load_or_build(tmp_path / "cached", build))
    make_folder(tmp_path / "folder", lambda partial: (partial / "made").touch())
    # A folder that is there needs no lock, which may be another user's.
    (tmp_path / "folder.lock").unlink(missing_ok=True)
    (tmp_path / "folder.lock").mkdir()
    make_folder(tmp_path / "folder", refuse)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"target", "cached", "folder"}
    assert not (tmp_path / "cached").is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["made"]
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "untouched"


def test_directory_is_the_variables_or_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SEMINORM_CACHE", str(tmp_path / "variable"))
    assert cache_directory() == tmp_path / "variable"
    monkeypatch.delenv("SEMINORM_CACHE")
    assert cache_directory() == tmp_path / "home" / ".cache" / "seminorm"
    assert cache_directory().is_dir()


def test_directory_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("SEMINORM_CACHE", str(file / "below"))
    with pytest.raises(ValueError, match="cannot be made"):
        cache_directory()
