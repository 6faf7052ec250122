"""The commands of the Makefile, with a stub in place of Python: `make run` passes any name of a folder on as it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"


@pytest.fixture
def make(tmp_path):
    """Calls make in a folder where all is installed; returns the arguments of each call of Python, and the output."""
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("requirements.txt", "requirements-cluster.txt", "requirements-dev.txt", "requirements-bench.txt"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open('calls', 'a'))\n"
    )
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()

    def call(*arguments, **environment):
        output = subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()], output

    return call


FOLDERS = ["recordings", "a b", 'a"b', "it's", "$HOME", "$(HOME)$$", "`touch no`", "$(shell touch no)", "a;b&#\\"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("place", ["argument", "environment"])
def test_any_name_of_a_folder_is_passed_on(make, tmp_path, folder, place):
    calls, _ = make("run", "bench", f"DATA={folder}") if place == "argument" else make("run", "bench", DATA=folder)
    assert calls[0] == ["tables.py", "run", "quick", "--data-root", folder]
    assert calls[-1] == ["-m", "benchmarks.gradient_step", "--output", "results", "--data-root", folder]
    assert not (tmp_path / "no").exists()


def test_without_a_folder_none_is_named_and_the_last_line_says_how_to_go_on(make):
    calls, output = make("run")
    assert calls == [["tables.py", "run", "quick"]]
    assert '". .venv/bin/activate"' in output.splitlines()[-1]
