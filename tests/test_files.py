"""Files are whole or absent, and what lies where one is written is never followed elsewhere."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import files
from common.results import place


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "page.html"
    for text in (b"old", b"new"):
        files.replace(path, text[:1], memoryview(text)[1:])
        assert path.read_bytes() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["page.html", "page.html.partial"])
@pytest.mark.parametrize("exists", [True, False])
def test_no_link_is_followed(tmp_path, name, exists):
    elsewhere = tmp_path / "elsewhere"
    if exists:
        elsewhere.write_bytes(b"another's")
    (tmp_path / name).symlink_to(elsewhere)
    files.replace(tmp_path / "page.html", b"mine")
    assert (tmp_path / "page.html").read_bytes() == b"mine"
    assert not (tmp_path / "page.html").is_symlink()
    assert elsewhere.exists() == exists
    assert not exists or elsewhere.read_bytes() == b"another's"


def test_a_link_that_appears_in_the_meantime_is_not_followed(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"another's")
    unlink = Path.unlink

    def unlink_and_plant(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        monkeypatch.undo()
        path.symlink_to(elsewhere)

    monkeypatch.setattr(Path, "unlink", unlink_and_plant)
    with pytest.raises(FileExistsError):
        files.replace(tmp_path / "page.html", b"mine")
    assert elsewhere.read_bytes() == b"another's"


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_bytes(b"old")

    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file_and_the_next_writer_is_not_in_its_way(tmp_path, point):
    program = f"""
import os, signal, sys
from pathlib import Path
from common import files
os.{point} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.replace(Path(sys.argv[1]), b"new")
"""
    path = tmp_path / "page.html"
    path.write_bytes(b"old")
    process = subprocess.run([sys.executable, "-c", program, path], cwd=Path(__file__).parents[1])
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.replace(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_many_place_results_and_weights_at_once(tmp_path):
    numbers = range(40)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda number: place(b"%d" % number, b"of %d" % number, tmp_path), numbers))
    assert {path.name for path in paths} == {f"{number}.json" for number in numbers}
    for path in paths:
        assert path.with_suffix(".pt").read_bytes() == b"of " + path.read_bytes()


def test_weights_that_a_kill_left_are_not_taken_for_those_of_another_run(tmp_path):
    (tmp_path / "0.pt").write_bytes(b"left")
    assert place(b"failed", None, tmp_path).name == "0.json"
    assert not (tmp_path / "0.pt").exists()


def test_a_dead_link_has_its_number_taken(tmp_path):
    (tmp_path / "0.json").symlink_to(tmp_path / "nowhere")
    assert place(b"completed", b"weights", tmp_path).name == "1.json"
    assert (tmp_path / "0.json").is_symlink()


def test_results_that_cannot_be_written_leave_no_weights(tmp_path, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if Path(target).suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        place(b"completed", b"weights", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
