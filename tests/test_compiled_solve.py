"""A compiled loop over steps takes the steps of eager attempts, and so does its way back."""

import os

import pytest
import torch
from problems import F64, KINKS, Kinked, Network, Pair, Tied, differentiate, distance, random, solve, steps
from torch import nn
from torch._dynamo.utils import counters
from torch._higher_order_ops.while_loop import while_loop_op as while_loop

from torchadjoint import METHODS, Discrete, SolverError, compiled_loops, compiling, posing
from torchadjoint.methods.runge_kutta import RungeKutta

pytestmark = pytest.mark.skipif(
    not compiled_loops.IS_TORCH_NEW_ENOUGH, reason=f"loops need torch {compiled_loops.OLDEST_TORCH}"
)

T = torch.tensor([0.0, 0.4, 2.0, 3.0], dtype=F64)
TIGHT = dict(rtol=1e-6, atol=1e-8)

ADAPTIVE = [name for name, method in METHODS.items() if method.is_adaptive]


@pytest.fixture
def loops(traced):
    """Loops run as they are, which is enough to compare numbers."""


@pytest.fixture(params=[1, 4, 128])
def capacity(request, monkeypatch):
    """How many attempts a call records."""
    monkeypatch.setattr(compiled_loops, "FEWEST_ATTEMPTS", request.param)
    monkeypatch.setattr(compiled_loops, "MOST_ATTEMPTS", request.param)


def compare(func, y0, t, *, tolerance=1e-9, of_times=1e-7, **options):
    """Ours are those of eager attempts."""
    eager = differentiate(func, y0, t, adjoint="discrete", **options)
    ours = differentiate(func, y0, t, adjoint="discrete", **options, compile="solve")
    assert steps(ours.statistics) == [pytest.approx(times, abs=of_times) for times in steps(eager.statistics)]
    method = METHODS[options.get("method", "dopri5")]
    own, expected = ours.statistics.forward, eager.statistics.forward
    assert own.nfe == expected.nfe if method.is_fsal else own.nfe >= expected.nfe
    # The last step's stages stay for its reversal where they are eager. Behind a last slope that is asked for, at the
    # end or at a jump, there is a step of no size, of which all stages are evaluated.
    most = (1 + 1 + len(options.get("jump_t", ()))) * method.num_stages
    assert eager.statistics.backward.nfe <= ours.statistics.backward.nfe < eager.statistics.backward.nfe + most
    assert distance(ours.y, eager.y) < tolerance
    for own, expected in zip(ours.gradients, eager.gradients, strict=True):
        assert (own is None) == (expected is None)
        assert own is None or (own - expected).norm() <= tolerance * expected.norm()
    return ours


@pytest.mark.usefixtures("loops", "capacity")
@pytest.mark.parametrize("times", [T, T.flip(0), T[[0, -1]]], ids=["increasing", "decreasing", "one segment"])
def test_steps_and_gradients_are_those_of_eager_attempts(times):
    t = times.clone().requires_grad_()
    ours = compare(Kinked(), random(4, 3), t, jump_t=KINKS, **TIGHT)
    assert ours.statistics.forward.num_rejected > 0
    assert t.grad.abs().min() > 0


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_method_with_error_control(method):
    compare(Kinked(), random(4, 3), T, jump_t=KINKS, method=method, rtol=1e-4, atol=1e-5)


class Slow(nn.Module):
    def forward(self, t, y):
        return 1e-6 * torch.exp(t) * y


@pytest.mark.usefixtures("loops")
def test_the_first_guess_is_that_of_single_steps():
    """From zero, and where it is as long as the solve."""
    compare(Network(), torch.zeros(4, 3, dtype=F64), T, **TIGHT)
    compare(Slow(), torch.ones(2, dtype=F64), torch.tensor([0.0, 10.0], dtype=F64), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("loops", "capacity")
def test_many_outputs_in_a_step():
    """Also in those that end at a jump, whose last slopes are not the first of the next."""
    times = torch.linspace(0, 3, 150, dtype=F64).requires_grad_()
    compare(Network(), random(4, 3), times, rtol=1e-4, atol=1e-5)
    compare(Kinked(), random(4, 3), times, jump_t=KINKS, rtol=1e-4, atol=1e-5)
    jumps = [*KINKS, *(times[1:40] + 0.01).tolist()]
    compare(Kinked(), random(4, 3), times.detach().flip(0), jump_t=jumps, **TIGHT)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(
    "options",
    [
        dict(first_step=0.3),
        dict(max_step=0.1),
        dict(min_step=0.2),
        dict(safety=0.5, ifactor=2.0, dfactor=0.7),
        dict(jump_t=[0.0, 3.0]),
        dict(jump_t=[0.4, 2.5]),
    ],
    ids=str,
)
def test_options_of_the_steps(options):
    compare(Network(), random(4, 3), T, **TIGHT, **options)


@pytest.mark.usefixtures("loops")
def test_a_tuple_state():
    compare(Pair(), Pair.start(), T, **TIGHT)


@pytest.mark.usefixtures("loops", "capacity")
def test_float32():
    """The error of a small first step would be rounding alone, and so would the size of the next: it is given."""
    func, y0 = Network(dtype=torch.float32), random(4, 3, dtype=torch.float32)
    options = dict(rtol=1e-4, atol=1e-4, jump_t=[1.1], first_step=0.5)
    compare(func, y0, T.float(), **options, tolerance=1e-4, of_times=1e-2)


@pytest.mark.usefixtures("loops", "capacity")
def test_behind_a_jump_it_asks_where_single_steps_do():
    """Two jumps that are one in float32 have no number between them."""

    def times_about(jump, compile):
        func, y0 = Network(dtype=torch.float32), random(4, 3, dtype=torch.float32)
        options = dict(jump_t=[jump, jump + 1e-9], adjoint="discrete", rtol=1e-4, atol=1e-4, compile=compile)
        with torch.no_grad():
            times = solve(func, y0, T.float(), **options).statistics.forward.evaluation_times
        return [time for time in times if abs(time - jump) < 1e-6]

    assert times_about(1.1, "solve") == times_about(1.1, True)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("adjoint", ["discrete", "seminorm", "default"])
def test_a_solve_that_is_not_differentiated(adjoint):
    func, y0 = Kinked(), random(4, 3)
    with torch.no_grad():
        eager, ours = (
            solve(func, y0, T, jump_t=KINKS, adjoint=adjoint, compile=compile, **TIGHT) for compile in (False, "solve")
        )
    assert steps(ours.statistics) == [pytest.approx(times, abs=1e-7) for times in steps(eager.statistics)]
    assert distance(ours.y, eager.y) < 1e-9


@pytest.mark.usefixtures("loops")
def test_frozen_parameters_and_no_parameters_at_all():
    func = Network()
    func.first.requires_grad_(False)
    compare(func, random(4, 3), T, **TIGHT)
    compare(func.requires_grad_(False), random(4, 3), T, **TIGHT)


@pytest.mark.usefixtures("loops")
def test_a_gradient_asked_for_again_is_the_same_whatever_becomes_of_y0():
    func, y0 = Kinked(), random(4, 3).requires_grad_()
    solution = solve(func, y0, T, jump_t=KINKS, adjoint="discrete", compile="solve", **TIGHT)
    (once,) = torch.autograd.grad(solution.y[1:].sum(), y0, retain_graph=True)
    with torch.no_grad():
        y0.mul_(3)
    (again,) = torch.autograd.grad(solution.y[1:].sum(), y0)
    assert torch.equal(once, again)


class Exploding(nn.Module):
    """y' = y^2, from 1 infinite at t = 1; or what is not finite from some time on."""

    def __init__(self, wrong_from: float = 9.0):
        super().__init__()
        self.wrong_from = wrong_from

    def forward(self, t, y):
        return torch.where(t < self.wrong_from, y * y, torch.nan)


@pytest.mark.usefixtures("loops", "capacity")
@pytest.mark.parametrize(
    ("wrong_from", "options"),
    [
        (9.0, {}),
        (9.0, dict(max_num_steps=7)),
        (9.0, dict(max_num_steps=1)),
        (0.5, {}),
        (0.5, dict(min_step=0.01)),
        (-1.0, {}),
        (-1.0, dict(first_step=0.1)),
    ],
)
def test_failures_are_told_as_those_of_single_steps_are(wrong_from, options):
    def failure(compile):
        with pytest.raises(SolverError) as caught:
            solve(Exploding(wrong_from), torch.ones(1, dtype=F64), T, compile=compile, **TIGHT, **options)
        return str(caught.value)

    assert failure("solve") == failure(True)


class Steep(nn.Module):
    def forward(self, t, y):
        return torch.full_like(y, 1e35)


@pytest.mark.usefixtures("loops")
def test_a_slope_too_large_for_its_tolerance_is_told_as_by_single_steps():
    for compile in (True, "solve"):
        with pytest.raises(SolverError, match="the vector field over its tolerance is too large a number at t = 0"):
            solve(Steep(), torch.zeros(1), T.float(), compile=compile, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(method="rk4", step_size=0.1), "method is 'rk4', which takes fixed steps, but .*: take compile=True"),
        (dict(step_t=[1.0]), "step_t is given, but .*: take compile=True"),
        (dict(observer=print), "an observer is given, or func has callbacks, but .*: take compile=True"),
        (dict(adjoint="seminorm"), "the adjoint is 'seminorm', but .* or compile=True"),
        (dict(adjoint=Discrete(checkpoint_interval=2)), "compile='solve' keeps every state"),
        (dict(atol=torch.ones(3)), "compile='solve' needs tolerances that are numbers"),
        (dict(adjoint_params=()), "compile='solve' needs no adjoint_params"),
    ],
)
def test_what_a_loop_cannot_do_is_said(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve(Network(), random(3), T, compile="solve", **{"adjoint": "discrete", **options})


def test_callbacks_are_refused():
    func = Network()
    func.callback_step = print
    with pytest.raises(ValueError, match="func has callbacks"):
        solve(func, random(3), T, compile="solve")


def test_an_older_torch_is_told(monkeypatch):
    monkeypatch.setattr(posing, "IS_TORCH_NEW_ENOUGH", False)
    with pytest.raises(ValueError, match=r"needs torch 2.14 or newer, but this is .*: take compile=True"):
        solve(Network(), random(3), T, compile="solve")


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_dense_output_as_polynomials(method):
    method: RungeKutta = METHODS[method]
    for fraction in (0.0, 0.3, 0.9, 1.0):
        powers = torch.tensor([fraction**power for power in (1, 2, 3, 4)], dtype=F64)
        weights = powers @ torch.tensor(method.dense_output, dtype=F64)
        assert weights.tolist() == pytest.approx(method.interpolation_weights(fraction), abs=1e-13)


FEW_STAGES = dict(method="bosh3", rtol=1e-4, atol=1e-5)


class Preying(nn.Module):
    """Prey and predator, with parameters that are taken apart, a buffer, and joined slopes."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=F64))
        self.register_buffer("shares", torch.tensor([0.9, 1.1], dtype=F64))

    def forward(self, t, y):
        birth, eaten, death, eating = self.rates
        (less, more), (prey, predator) = self.shares, y
        met = prey * predator
        return torch.stack([birth * prey - less * eaten * met, more * eating * met - death * predator])


def test_a_field_that_takes_its_tensors_apart(graphs):
    compare(Preying(), torch.ones(2, dtype=F64), T, **FEW_STAGES)
    assert graphs


def test_a_weight_in_two_places(graphs):
    compare(Tied(), random(2, 3), T[[0, 1]], **FEW_STAGES)
    assert graphs


def test_torch_looks_at_the_module_once_a_solve(looks):
    func = Kinked()
    compare(func, random(4, 3), T, jump_t=KINKS, **FEW_STAGES)
    looks.clear()
    with torch.no_grad():
        func.rates *= 0.9
    compare(func, random(4, 3), T * 0.9, jump_t=KINKS, **FEW_STAGES)
    assert sorted(looks) == ["attempt_steps", "reverse_steps"]


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch's compiler mixes kernels then")
def test_kernels_are_compiled_once(caches):
    options = dict(jump_t=[0.5], **FEW_STAGES)
    compare(Preying(), torch.ones(2, dtype=F64), T, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        func = Preying()
        with torch.no_grad():
            func.rates *= 0.9
            func.shares *= 0.9
        many = compare(func, random(2).abs(), T.flip(0), **options | dict(rtol=1e-8, atol=1e-9))
    # The loop was called more than once.
    assert many.statistics.forward.num_accepted > compiled_loops.MOST_ATTEMPTS


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch's compiler mixes kernels then")
def test_kernels_of_a_loop_stay_on_disk_for_just_this_loop():
    def compiled(factor):
        def function(x):
            number = torch.zeros((), dtype=torch.int64)
            _, x = while_loop(lambda number, _: number < 3, lambda number, x: (number + 1, factor * x), (number, x), ())
            return (x.clone(),)

        torch._dynamo.reset_code(function.__code__)
        return torch.compile(function, fullgraph=True, dynamic=False, backend=compiling.make_kernels)

    def num_found():
        return counters["inductor"]["fxgraph_cache_hit"]

    x = random(4)
    for factor in (2.0, 4.0):  # exact, in any order
        assert torch.equal(compiled(factor)(x)[0], factor**3 * x)
    known = num_found()
    assert torch.equal(compiled(2.0)(x)[0], 8 * x)
    assert num_found() == known + 1
