import functools

import pytest
import torch
from problems import F64, Network, differentiate, distance, random, random_walks, solve, steps
from torch import nn
from torch.nn import functional

from speech_commands import NeuralCDE
from torchadjoint import Backsolve, Discrete

NUM_KNOTS = 16
KNOTS = torch.arange(NUM_KNOTS, dtype=F64)
INTERIOR = {float(knot) for knot in KNOTS[1:-1]}
TOLERANCES = [(1e-3, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8)]


class Staircase(nn.Module):
    """dy/dt = heights[floor(t)]: every step between two knots is exact, every step over a knot is not."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.heights = nn.Parameter(random(NUM_KNOTS - 1, dtype=dtype))

    def forward(self, t, y):
        piece = min(max(int(t.item() // 1), 0), NUM_KNOTS - 2)
        return self.heights[piece] + torch.zeros_like(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adjoint", ["default", "seminorm", "discrete"])
@pytest.mark.parametrize("times", [KNOTS[[0, -1]], KNOTS[[-1, 0]], KNOTS[[0, 3, 8]], KNOTS[[12, 8, 1]]], ids=str)
def test_every_piece_is_met_from_its_own_side(adjoint, times, dtype):
    func = Staircase(dtype)
    # With a first step of 1, steps end on the knots of their own accord.
    ours = differentiate(
        func, torch.zeros(1, dtype=dtype), times, rtol=1e-3, atol=1e-3, adjoint=adjoint, jump_t=KNOTS, first_step=1.0
    )
    done = ours.statistics
    assert done.forward.num_rejected == 0
    assert set(done.forward.accept_times) >= INTERIOR & set(torch.arange(*sorted([times[0], times[-1]])).tolist()[1:])
    increments = torch.cat([torch.zeros(1, dtype=dtype), func.heights.detach()]).cumsum(0)[times.long()]
    assert (ours.y[:, 0] - (increments - increments[0])).abs().max() < (1e-12 if dtype == F64 else 1e-5)
    weights = random(*ours.y.shape, seed=100, dtype=dtype)[:, 0]
    expected = torch.zeros_like(func.heights)
    for weight, time in zip(weights.tolist(), times.tolist(), strict=True):
        low, high = sorted([int(times[0]), int(time)])
        expected[low:high] += weight if times[0] < times[-1] else -weight
    assert (func.heights.grad - expected).abs().max() < (1e-12 if dtype == F64 else 1e-5)


class Ramp(nn.Module):
    """dy/dt = w c with c = 1, 2, 3, ... from knot to knot, of which its field knows by `enter` alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def fused_field(self, y0):
        return RampField(self.weight)


class RampField:
    parameter_sizes, is_static = (1,), False

    def __init__(self, weight):
        self.weight, self.cotangents = weight.detach(), {}

    def enter(self, t0, t1):
        self.c = 1.0 + (t0 + t1) / 2 // 1

    def evaluate(self, t, y, out):
        out.fill_(self.weight * self.c)

    def linearise(self, slot, t, y, out):
        self.evaluate(t, y, out)

    def pullback(self, slot, cotangent, out):
        self.cotangents[slot] = cotangent.clone()
        out.zero_()

    def add_parameter_product(self, slot, weight, gradient):
        gradient[0] += weight * self.c * self.cotangents[slot].sum()

    def reuse_slot(self, slot):
        self.cotangents[0] = self.cotangents[slot]

    def unflatten(self, gradient):
        return (gradient[0],)


@pytest.mark.parametrize(
    "adjoint", ["seminorm", "discrete", *(Discrete(linearised=extent) for extent in ("stage", "solve")), Discrete(2)]
)
def test_a_last_step_beyond_the_last_time_is_in_the_piece_before_it(adjoint):
    """Jumps behind the last time need not be named, and the last step goes far beyond it."""
    func, times = Ramp(), torch.tensor([0.0, 1.5, 1.6], dtype=F64)
    solution = solve(func, torch.zeros(1, dtype=F64), times, jump_t=[1.0], adjoint=adjoint, first_step=1.0)
    assert solution.statistics.forward.accept_times == [0, 1]
    torch.testing.assert_close(solution.y[:, 0], torch.tensor([0.0, 1.0, 1.1], dtype=F64))
    solution.y[1].sum().backward()
    assert func.weight.grad.item() == pytest.approx(1 + 0.5 * 2)


class Switch(nn.Module):
    """dy/dt = w sin(7 k) y + k, where k is how many of the `switches` lie at or before t."""

    def __init__(self, switches):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.switches = switches

    def forward(self, t, y):
        k = (t >= self.switches).sum()
        return self.weight * torch.sin(7.0 * k) * y + k


@pytest.mark.parametrize("options", [{}, dict(adjoint=Backsolve(warm_start=True)), dict(adjoint="default")], ids=str)
@pytest.mark.parametrize("time_dtype", [torch.float32, F64])
def test_jumps_given_as_floats_are_the_output_times_that_they_round_to(time_dtype, options):
    switches = torch.tensor([0.1, 0.3, 0.7])
    t = torch.tensor([0.0, 0.1, 0.7, 1.0]).to(time_dtype)
    by_floats, by_tensor = (
        differentiate(Switch(switches), torch.ones(1), t, jump_t=jumps, rtol=1e-5, atol=1e-5, **options)
        for jumps in ([0.1, 0.3, 0.7], switches)
    )
    assert distance(by_floats.gradient, by_tensor.gradient) < 1e-5
    # The jump at 0.3 is no output time, so it stays what was given.
    for ours, theirs in zip(steps(by_floats.statistics), steps(by_tensor.statistics), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_jumps_are_snapped_to_no_other_time():
    func, t = Staircase(), torch.tensor([0.0, 1.0, 1.0 + 1e-12, 3.0], dtype=F64)
    accepted = differentiate(func, torch.zeros(1), t, jump_t=[1.0], first_step=1.0, rtol=1e-3, atol=1e-3).statistics
    assert accepted.forward.accept_times[1] == 1.0


def test_stock_torchdiffeq_loses_the_jumps_behind_one_that_a_step_ends_on():
    """Why there is a solver of our own: its test is `t0 < jump < t0 + dt`, so a step that ends on a jump forgets it."""
    options = dict(rtol=1e-3, atol=1e-3, jump_t=KNOTS, first_step=1.0)
    with torch.no_grad():
        theirs, ours = (
            solve(Staircase(), torch.zeros(1, dtype=F64), KNOTS[[0, -1]], **options, solver=solver)
            for solver in ("torchdiffeq", "torchadjoint")
        )
    assert set(ours.statistics.forward.accept_times) >= INTERIOR
    assert not set(theirs.statistics.forward.accept_times) >= INTERIOR
    assert theirs.statistics.forward.nfe > 2 * ours.statistics.forward.nfe
    exact = Staircase().heights.sum()
    assert ours.y[-1].item() == pytest.approx(exact.item(), abs=1e-12)
    assert theirs.y[-1].item() != pytest.approx(exact.item(), abs=1e-4)


@pytest.mark.parametrize("times", [[0.0, 1.1, 3.0], [3.0, 1.1, 0.0]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("adjoint", ["default", "seminorm"])
def test_steps_and_gradients_with_jumps_equal_torchdiffeqs_where_that_loses_none(adjoint, times):
    class Jumping(Network):
        def forward(self, t, y):
            return super().forward(t, y) * (1 + 0.5 * (t > 0.7).to(y.dtype) - (t > 2.2).to(y.dtype))

    # torchdiffeq's gradient of t lacks what the jumps add.
    t, jumps = torch.tensor(times, dtype=F64), [0.7, 2.2]
    theirs, ours = (
        differentiate(Jumping(), random(2, 3), t, rtol=1e-5, atol=1e-6, adjoint=adjoint, jump_t=jumps, solver=solver)
        for solver in ("torchdiffeq", "torchadjoint")
    )
    for our_times, their_times in zip(steps(ours.statistics), steps(theirs.statistics), strict=True):
        assert our_times == pytest.approx(their_times, abs=1e-6)
    assert set(jumps) < set(ours.statistics.forward.accept_times)
    assert set(jumps) < set(ours.statistics.backward.accept_times)
    assert distance(ours.gradient, theirs.gradient) < 1e-9


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.3, 0.5], [0.0, 0.5, 1.0]], ids=str)
@pytest.mark.parametrize("adjoint", ["default", "seminorm", "per-tensor", "discrete"])
def test_the_start_may_move_where_the_field_jumps(adjoint, times):
    """dy/dt = -k y before t = 1/2 and 2 k y behind: the logarithm of y is a line with a kink."""

    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.8, dtype=F64))

        def forward(self, t, y):
            return torch.where(t < 0.5, -1, 2) * self.rate * y

    t, func = torch.tensor(times, dtype=F64, requires_grad=True), Bent()
    y = solve(func, torch.full((1,), 1.3, dtype=F64), t, jump_t=[0.5], adjoint=adjoint, rtol=1e-9, atol=1e-10).y
    weights = random(*y.shape, seed=1)
    (found,) = torch.autograd.grad((y * weights).sum(), t)
    other = t.detach().clone().requires_grad_()
    area = torch.where(other < 0.5, -other, 2 * other - 1.5) * 0.8
    exact = 1.3 * (area - area[0]).exp()
    # At a jump a time may move to either side: an output moves with the slope where the step that reaches it ends.
    (expected,) = torch.autograd.grad((exact[:, None] * weights).sum(), other)
    assert torch.allclose(found, expected, rtol=1e-6)


@functools.cache
def train_step(dtype, seed, rtol, atol, **options):
    """Gradient of all parameters, and statistics, of a Neural CDE on random walks."""
    torch.manual_seed(seed)
    model = NeuralCDE(
        4,
        6,
        3,
        hidden_hidden_channels=8,
        num_hidden_layers=2,
        solve=functools.partial(solve, rtol=rtol, atol=atol, **options),
    ).to(dtype)
    logits, statistics = model(random_walks(4, NUM_KNOTS, 3, seed=seed, dtype=dtype))
    functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]), statistics


@pytest.mark.parametrize(("rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("adjoint", ["default", "seminorm"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neural_cde_meets_every_knot_in_both_directions(seed, dtype, adjoint, rtol, atol):
    _, statistics = train_step(dtype, seed, rtol, atol, adjoint=adjoint)
    for direction in (statistics.forward, statistics.backward):
        assert set(direction.accept_times) >= INTERIOR
        # Two to start, six an attempt, one more behind each jump that is not the end.
        assert direction.nfe == 2 + 6 * (direction.num_accepted + direction.num_rejected) + len(INTERIOR)


@pytest.mark.parametrize(("rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("seed", range(3))
def test_the_seminorm_takes_fewer_evaluations(seed, rtol, atol):
    default, seminorm = (
        train_step(torch.float32, seed, rtol, atol, adjoint=adjoint)[1] for adjoint in ("default", "seminorm")
    )
    assert seminorm.forward.nfe == default.forward.nfe
    assert seminorm.backward.nfe < default.backward.nfe


def test_stock_torchdiffeq_loses_knots_of_a_neural_cde():
    """A step of exactly the length of an interval is kept as long as its error is between 0.59 and 1."""
    theirs, ours = (
        train_step(F64, 2, *TOLERANCES[0], adjoint="seminorm", solver=solver)[1]
        for solver in ("torchdiffeq", "torchadjoint")
    )
    assert not set(theirs.backward.accept_times) >= INTERIOR
    assert theirs.backward.nfe > 1.5 * ours.backward.nfe


@pytest.mark.parametrize(("rtol", "atol", "bound"), [(1e-3, 1e-6, 3e-2), (1e-4, 1e-7, 1e-2), (1e-5, 1e-8, 3e-3)])
@pytest.mark.parametrize("adjoint", ["default", "seminorm"])
def test_the_gradient_of_a_neural_cde_approaches_that_of_tight_tolerances(adjoint, rtol, atol, bound):
    # The ReLUs' kinks, which no error estimate of z sees, are what limits it.
    gradient, _ = train_step(F64, 2, rtol, atol, adjoint=adjoint)
    reference, _ = train_step(F64, 2, 1e-10, 1e-12, adjoint="seminorm")
    assert distance(gradient, reference) < bound


@pytest.mark.parametrize("adjoint", ["default", "seminorm", "per-tensor", "discrete"])
def test_a_neural_cdes_gradient_equals_stock_torchdiffeqs_where_that_loses_no_jump(adjoint):
    options = dict(adjoint=adjoint, first_step=0.3)
    (theirs, their_statistics), (ours, our_statistics) = (
        train_step(F64, 0, *TOLERANCES[0], solver=solver, **options) for solver in ("torchdiffeq", "torchadjoint")
    )
    directions = ("forward",) if adjoint == "discrete" else ("forward", "backward")
    for direction in directions:
        expected, actual = getattr(their_statistics, direction), getattr(our_statistics, direction)
        assert set(expected.accept_times) >= INTERIOR  # or the comparison would mean nothing
        assert actual.accept_times == pytest.approx(expected.accept_times, abs=1e-6)
        assert actual.reject_times == pytest.approx(expected.reject_times, abs=1e-6)
        # It evaluates behind the last jump, although no step follows.
        assert actual.nfe == expected.nfe - 1
    assert distance(ours, theirs) < 1e-9


def test_a_jump_is_the_output_time_of_single_precision_though_the_state_is_double():
    t = torch.tensor([0.0, 0.1, 0.7, 1.0])
    func = Switch(t[1:3].double()).double()
    found = [
        differentiate(func, torch.ones(1, dtype=F64), t, jump_t=jumps, rtol=1e-5, atol=1e-5)
        for jumps in ([0.1, 0.7], t[1:3])
    ]
    assert steps(found[0].statistics) == steps(found[1].statistics)
