"""The benchmark's tables, and what docs/benchmark.md shows of them."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import torchdiffeq
from prose import RESULTS
from torch import nn
from torch.nn import functional

import acrobot
import flow
import speech_commands
from benchmarks import gradient_step, problems
from benchmarks.gradient_step import SUMMARY_BEGIN, SUMMARY_END
from benchmarks.problems import Contestant, Problem
from benchmarks.published_field import PublishedField
from datasets import acrobot as acrobot_data
from datasets import flow as flow_data
from datasets import speech_commands as speech_commands_data
from datasets.batches import Batches

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def neither_threads_nor_cores(monkeypatch):
    """Other tests want the number of threads and cores that they had."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    if hasattr(os, "sched_setaffinity"):
        monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: None)


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


@pytest.mark.parametrize("is_published", [False, True])
@pytest.mark.parametrize("norm", [None, "seminorm"])
def test_stock_torchdiffeq_gets_the_jumps_the_norm_and_the_field(is_published, norm, monkeypatch):
    def spy(func, y0, t, **options):
        calls.append((func, options))
        return y0.expand(len(t), *y0.shape)

    calls = []
    monkeypatch.setattr(torchdiffeq, "odeint_adjoint", spy)
    field, y0, t, jumps = nn.Identity(), torch.ones(2), torch.tensor([0.0, 1.0]), torch.tensor([0.5])
    for given in ({}, dict(jump_t=jumps)):
        problems._solve_stock(field, y0, t, norm=norm, is_published=is_published, rtol=1e-3, atol=1e-4, **given)
        func, options = calls.pop()
        assert type(func) is (PublishedField if is_published else nn.Identity)
        assert (options["method"], options["rtol"], options["atol"]) == ("dopri5", 1e-3, 1e-4)
        assert options["options"] == given
        assert options["adjoint_options"] == given | ({} if norm is None else dict(norm=norm))


@pytest.mark.parametrize(
    ("build", "rtol", "atol"),
    [
        (functools.partial(problems.neural_cde, 3, "synthetic"), 1e-3, 1e-6),
        (problems.symplectic_ode_net, 1e-4, 1e-4),
        (problems.neural_ode, 1e-5, 1e-7),
        (problems.continuous_flow, 1e-5, 1e-5),
    ],
    ids=["neural_cde", "symplectic_ode_net", "neural_ode", "continuous_flow"],
)
def test_each_way_is_what_its_name_says(build, rtol, atol, monkeypatch):
    data = SimpleNamespace(train=Batches((torch.zeros(3, 2),), 3))
    for module in (acrobot_data, flow_data, speech_commands_data):
        monkeypatch.setattr(module, "load", lambda **_: data)
    monkeypatch.setattr(problems, "_train_briefly", lambda *_, **__: None)
    monkeypatch.setattr(problems, "is_installed", lambda package: False)
    monkeypatch.setattr(problems, "_step", lambda *arguments: arguments[-1])
    contestants = build(1).contestants
    assert contestants[0].name == "torchdiffeq, its default norm"
    for contestant in contestants:
        solver, counting = contestant.step(), contestant.count()
        library, name, *others = contestant.name.split(", ")
        options = solver.keywords
        assert (options.pop("rtol"), options.pop("atol")) == (rtol, atol)
        assert counting.func is solver.func
        if library == "torchdiffeq":
            expected = dict(norm="seminorm") if name == "seminorm" else {}
            if build is problems.symplectic_ode_net and "our field" not in others:
                expected["is_published"] = True
            assert (solver.func, options) == (problems._solve_stock, expected)
            assert counting.keywords["is_counted"]
            continue
        adjoint = options["adjoint"]
        assert (adjoint if isinstance(adjoint, str) else adjoint.name) == name
        assert getattr(adjoint, "warm_start", False) == ("warm start" in others)
        extents = {"one stage at a time": "stage", "all stages kept": "solve"}
        extent = next((extents[word] for word in others if word in extents), "step")
        assert getattr(adjoint, "linearised", "step") == extent
        assert options.get("compile", False) == ("solve" if "compiled solve" in others else "compiled" in others)
        is_unweighed = "integrals unweighed" in others
        assert (options.get("integrals", 0), options.get("weigh_integrals", True)) == (is_unweighed, not is_unweighed)
        by_autograd = problems._solve_traceable if "compiled" in others else problems._solve_unfused
        assert solver.func is (by_autograd if "autograd's field" in others else problems.solve)


def test_what_is_printed_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gradient_step.BUILDERS, "network", problem)
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(gradient_step, "kind_of_cpu", lambda device_name: "amd")
    for variable in ("XLA_FLAGS", "JAX_PLATFORMS", "TORCHINDUCTOR_CACHE_DIR"):
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
@pytest.mark.parametrize("path", sorted(RESULTS.glob("gradient_step-*[!s].md")), ids=lambda path: path.stem)
def test_the_page_has_the_summary_of_each_kind_of_cpu(path):
    page = (ROOT / "docs" / "benchmark.md").read_text()
    assert summary_of(path.read_text()) in page, f"paste the part between the markers of {path} into the page"
    assert f"(../{path.relative_to(ROOT)})" in page


def test_medians_and_ranges_are_over_the_rounds(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gradient_step._Floor, "measure", lambda floor, clock: (0.01, 0.03))
    times = {"torchdiffeq, its default norm": [9.0, 4.0, 10.0, 4.0], "ours, discrete": [9.0, 2.0, 2.0, 4.0]}

    def contestant(name):
        left = iter(times[name])
        return Contestant(name, lambda: clock.take(next(left)), lambda: (10, 20))

    table = gradient_step.compare(Problem("A problem", [*map(contestant, times)], [], 3), clock)
    first, own = table.to_dict("records")
    assert (first["seconds"], own["seconds"]) == ("4.00", "2.00")
    assert (own["times faster than the first"], own["range"]) == ("2.00", "1.00 to 5.00")
    assert first["% of the floor"]
    assert not own["% of the floor"], "its products are more than its evaluations"


def test_a_problem_that_is_none_is_refused_before_any_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gradient_step, "neural_cde", None)
    for asked, name in ((("32", "acrobat"), "acrobat"), (("32", "0"), "0"), ((), "")):
        with pytest.raises(ValueError, match=f"problems is '{name}', but must be a batch size, or one of acrobot"):
            gradient_step.main(problems=asked, output=tmp_path / "new")


def test_what_was_measured_is_kept_though_the_next_problem_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(gradient_step.BUILDERS, "network", problem)
    monkeypatch.setitem(gradient_step.BUILDERS, "flow", None)
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    for variable in ("XLA_FLAGS", "JAX_PLATFORMS", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "")
    with pytest.raises(TypeError):
        gradient_step.main(rounds=2, problems=("network", "flow"), output=tmp_path)
    [path] = tmp_path.iterdir()
    assert "### A problem, 2 rounds" in path.read_text()


@pytest.mark.parametrize("name", ["neural_cde_step", "symplectic_step", "neural_ode_step", "flow_step"])
def test_diffrax_solves_the_same_problem(name, monkeypatch):
    """The same loss, of weights that were not trained and a few samples."""
    pytest.importorskip("diffrax", reason="diffrax is not installed: pip install -r requirements-bench.txt")
    from benchmarks import with_diffrax

    model, batch, loss_function, others = {
        "neural_cde_step": lambda: (
            speech_commands.build(speech_commands.Config("cpu", True, hidden_channels=6, hidden_hidden_channels=5)),
            (torch.cat([torch.arange(9.0).expand(3, 9).unsqueeze(-1), torch.randn(3, 9, 20)], dim=-1), torch.arange(3)),
            functional.cross_entropy,
            (),
        ),
        "symplectic_step": lambda: (
            acrobot.build(acrobot.Config("cpu", True)),
            (torch.randn(3, 8, 8),),
            functional.mse_loss,
            (acrobot_data.TIMES,),
        ),
        "neural_ode_step": lambda: (
            problems.NeuralODE(),
            problems.turning_points(3),
            functional.mse_loss,
            (problems.TIMES,),
        ),
        "flow_step": lambda: (
            flow.build(flow.Config("cpu", True, data="moons", width=8)),
            (torch.randn(3, 2),),
            flow.mean_loss,
            (),
        ),
    }[name]()
    tolerances = dict(rtol=1e-5, atol=1e-6)
    model.solve = functools.partial(problems.solve, **tolerances)
    expected = loss_function(model(batch[0])[0], batch[-1]).item()
    # The loss alone: to compile its gradient takes most of the time.
    monkeypatch.setattr(with_diffrax, "_step", lambda loss, weights: lambda: loss(weights)[::-1])
    step = getattr(with_diffrax, name)(model, *batch, *others, adjoint=with_diffrax.ADJOINTS[1], **tolerances)
    assert step()[1] == pytest.approx(expected, rel=1e-3)


def test_diffrax_weighs_what_its_names_say():
    diffrax = pytest.importorskip("diffrax", reason="diffrax is not installed: pip install -r requirements-bench.txt")
    from benchmarks import with_diffrax

    tolerances = dict(rtol=1e-3, atol=1e-4)
    backsolve, checkpoints = (
        with_diffrax._adjoint(name, functools.partial(diffrax.PIDController, **tolerances))
        for name in ("diffrax, backsolve with the seminorm", "diffrax, recursive checkpoints")
    )
    assert isinstance(backsolve, diffrax.BacksolveAdjoint)
    assert backsolve.kwargs["stepsize_controller"].norm is diffrax.adjoint_rms_seminorm
    assert isinstance(checkpoints, diffrax.RecursiveCheckpointAdjoint)
