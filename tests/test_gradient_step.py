"""The benchmark's tables, and what docs/benchmark.md shows of them."""

import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import torch
from torch import nn

from benchmarks import gradient_step, problems
from benchmarks.gradient_step import SUMMARY_BEGIN, SUMMARY_END
from benchmarks.problems import Contestant, Problem

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def neither_threads_nor_cores(monkeypatch):
    """Other tests want the number of threads and cores that they had."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(gradient_step.os, "sched_setaffinity", lambda process, cores: None)


class Clock:
    """Stands still but for what a contestant takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


def problem(num_rounds: int, clock: Clock | None = None) -> Problem:
    clock = clock or Clock()

    def contestant(name: str, seconds: float, evaluations) -> Contestant:
        return Contestant(name, lambda: clock.take(seconds), lambda: evaluations)

    contestants = [
        contestant("torchdiffeq, its default norm", 4.0, (10, 30)),
        contestant("ours, seminorm", 2.0, (10, 20)),
        contestant("diffrax, recursive checkpoints", 1.0, "3 steps"),
    ]
    return Problem("A problem", contestants, [(64, nn.Linear(16, 16))], num_rounds)


def test_contestants_are_compared_with_the_first(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gradient_step._Floor, "measure", lambda floor, clock: (0.01, 0.03))
    table = gradient_step.compare(problem(3, clock), clock).set_index("gradient step")
    assert list(table["seconds"]) == ["4.00", "2.00", "1.00"]
    assert list(table["times faster than the first"]) == ["1.00", "2.00", "4.00"]
    assert list(table["NFE, forward + backward"]) == ["10 + 30", "10 + 20", "3 steps"]
    assert list(table["% of the floor"]) == ["25", "35", ""]


def test_an_evaluation_backward_has_three_products_of_each_layer():
    # A clock that ticks whenever it is read: every measurement takes a tick for so many repetitions.
    ticks = iter(range(1_000_000))
    layer = nn.Linear(100, 2000)
    forward, backward = gradient_step._Floor([(32, layer), (32, layer)]).measure(lambda: next(ticks))
    assert forward == pytest.approx(2 / 32)  # 2e8 / (32 * 200,000) repetitions
    assert backward == pytest.approx(2 * forward)
    assert gradient_step._share((10, 20), 1.0, 3.0) == 70


def test_stock_torchdiffeq_counts_and_gives_the_same():
    func = nn.Sequential(nn.Linear(2, 2))
    field = problems._Network(func)
    solved = {}
    for is_counted in (False, True):
        func.zero_grad()
        solution = problems._solve_stock(
            field, torch.ones(2), torch.tensor([0.0, 1.0]), norm="seminorm", is_counted=is_counted, rtol=1e-3, atol=1e-3
        )
        solution.y.sum().backward()
        solved[is_counted] = (solution.y.detach(), func[0].weight.grad.clone())
        counted = solution.statistics
        assert (counted.forward.nfe > 0) == (counted.backward.nfe > 0) == is_counted
    torch.testing.assert_close(solved[True], solved[False])


def test_what_is_printed_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gradient_step, "neural_ode", problem)
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(gradient_step, "kind_of_cpu", lambda: "amd")
    for variable in ("XLA_FLAGS", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that what is set is forgotten afterwards
    gradient_step.main(rounds=2, problems=("network",), output=tmp_path / "new")
    [path] = (tmp_path / "new").iterdir()
    kept = path.read_text()
    assert path.name == "gradient_step-amd.md"
    assert "commit" in kept.splitlines()[1]
    assert "### A problem, 2 rounds" in kept
    assert summary_of(kept) in capsys.readouterr().out


def test_help_and_contestants_need_no_diffrax(monkeypatch):
    script = (
        "import sys; sys.modules.update(diffrax=None, jax=None); sys.argv = ['gradient_step', '--help'];"
        "import tyro; from benchmarks import gradient_step; tyro.cli(gradient_step.main)"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0
    assert "--data-root" in process.stdout
    monkeypatch.setattr(problems, "is_installed", lambda package: False)
    [own] = problems._contestants(lambda solver: None, {"ours": (problems.solve, {})}, {}, "neural_ode_step")
    assert own.name == "ours"


def test_the_summary_has_what_was_measured_and_no_more():
    table = pandas.DataFrame({"gradient step": ["ours, seminorm", "ours, default"], "seconds": ["0.120", "0.130"]})
    lines = gradient_step.summarise({"A problem": table}).splitlines()
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["ours, `seminorm`", "0.120"]


def summary_of(text: str) -> str:
    return text[text.index(SUMMARY_BEGIN) : text.index(SUMMARY_END)]


# Those of a run on several cores are not on the page.
@pytest.mark.parametrize(
    "path", sorted(gradient_step.RESULTS.glob("gradient_step-*[!s].md")), ids=lambda path: path.stem
)
def test_the_page_has_the_summary_of_each_kind_of_cpu(path):
    page = (ROOT / "docs" / "benchmark.md").read_text()
    assert summary_of(path.read_text()) in page, f"paste the part between the markers of {path} into the page"
    assert f"(../{path.relative_to(ROOT)})" in page
