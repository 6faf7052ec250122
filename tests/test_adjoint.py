import pytest
import torch
from problems import (
    ADJOINTS,
    BACKWARD_SOLVES,
    F64,
    INCREASING,
    NOT_AS_PUBLISHED,
    Growth,
    Integral,
    Linear,
    Network,
    Pair,
    T,
    backward,
    differentiate,
    differentiate_exactly,
    distance,
    random,
    solve,
    steps,
)
from torch import nn

from torchadjoint import Backsolve, odeint_adjoint

WARM = Backsolve(warm_start=True)
DECREASING = torch.tensor([3.0, 2.5, 0.7, -0.2], dtype=F64)


def compare_with_torchdiffeq(func, y0, t, **options):
    """Solve by torchdiffeq and by us: the same steps, evaluations and solution; return both outcomes.

    In float32 the error estimate of an easy step is mostly rounding, so there steps agree in number only.
    """
    theirs, ours = (differentiate(func, y0, t, solver=solver, **options) for solver in ("torchdiffeq", "torchadjoint"))
    for their_times, our_times in zip(steps(theirs.statistics), steps(ours.statistics), strict=True):
        assert len(our_times) == len(their_times)
        assert ours.y.dtype != F64 or our_times == pytest.approx(their_times, abs=1e-6)
    assert ours.statistics.forward.nfe == theirs.statistics.forward.nfe
    # The gradient of the first time takes one evaluation of ours, which torchdiffeq integrates.
    assert ours.statistics.backward.nfe == theirs.statistics.backward.nfe + t.requires_grad
    assert distance(ours.y, theirs.y) < (1e-12 if ours.y.dtype == F64 else 1e-4)
    return theirs, ours


def assert_same(gradients, expected, t):
    """To rounding, but for the first time's: torchdiffeq integrates it, and we take it from the field there."""
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is None:
            continue
        if other.shape == t.shape:
            assert distance(gradient, other) < 1e-4
            gradient, other = gradient[1:], other[1:]
        assert distance(gradient, other) < 1e-9


@pytest.mark.parametrize("adjoint", BACKWARD_SOLVES)
@pytest.mark.parametrize("times", [INCREASING, DECREASING], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("needs_time_gradient", [True, False])
@pytest.mark.parametrize("func", [Network(), Network(autonomous=True)], ids=["of t and y", "of y"])
def test_steps_and_gradients_equal_torchdiffeqs(adjoint, times, needs_time_gradient, func):
    t = times.clone().requires_grad_(needs_time_gradient)
    theirs, ours = compare_with_torchdiffeq(func, random(4, 3), t, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    assert_same(ours.gradients, theirs.gradients, t)


@pytest.mark.parametrize("adjoint", BACKWARD_SOLVES)
def test_steps_and_gradients_equal_torchdiffeqs_for_a_tuple_state(adjoint):
    t = INCREASING.clone().requires_grad_()
    theirs, ours = compare_with_torchdiffeq(Pair(), Pair.start(), t, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    assert_same(ours.gradients, theirs.gradients, t)


@pytest.mark.parametrize("adjoint", BACKWARD_SOLVES)
def test_gradients_equal_torchdiffeqs_to_rounding_in_float32(adjoint):
    func, y0 = Network(dtype=torch.float32, autonomous=True), random(4, 3, dtype=torch.float32)
    t = INCREASING.float()
    theirs, ours = compare_with_torchdiffeq(func, y0, t, rtol=1e-3, atol=1e-5, adjoint=adjoint)
    assert ours.y.dtype == torch.float32
    assert distance(ours.gradient, theirs.gradient) < 1e-4


@pytest.mark.parametrize("adjoint", ["seminorm", "per-tensor"])
@pytest.mark.parametrize(
    "options",
    [
        dict(first_step=0.05),
        dict(adjoint_rtol=1e-3),
        dict(adjoint_atol=1e-3),
        dict(adjoint_rtol=1e-8, adjoint_atol=1e-9),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_torchdiffeq(adjoint, options):
    options = dict(rtol=1e-5, atol=1e-6, adjoint=adjoint) | options
    func = Network(autonomous=True)
    theirs, ours = compare_with_torchdiffeq(func, random(3), INCREASING, **options)
    assert distance(ours.gradient, theirs.gradient) < 1e-9
    plain = differentiate(func, random(3), INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    assert steps(ours.statistics) != steps(plain.statistics)


@pytest.mark.parametrize("adjoint", NOT_AS_PUBLISHED)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)], ids=str)
def test_states_may_have_any_shape(adjoint, shape):
    func, y0 = Growth(), 1 + random(*shape).abs()
    ours = differentiate(
        func, y0, T.clone().requires_grad_(adjoint != "discrete"), rtol=1e-8, atol=1e-8, adjoint=adjoint
    )
    exact = differentiate_exactly(func, y0, T.clone().requires_grad_(adjoint != "discrete"))
    assert ours.y.shape == (3, *shape)
    assert distance(ours.y, exact.y) < 1e-6
    assert distance(ours.gradient, exact.gradient) < 1e-6


class Ballast(Network):
    """A network with a parameter that is not used, one without gradient, and a buffer."""

    def __init__(self):
        super().__init__(autonomous=True)
        self.unused = nn.Parameter(random(4))
        self.frozen = nn.Parameter(torch.tensor(0.7, dtype=F64), requires_grad=False)
        self.register_buffer("constant", torch.tensor(0.2, dtype=F64))

    def forward(self, t, y):
        return self.frozen * super().forward(t, y) + self.constant


@pytest.mark.parametrize("adjoint", ["default", "seminorm", "per-tensor"])
def test_unused_parameters_get_zeros_and_those_without_gradient_none(adjoint):
    func = Ballast()
    theirs, ours = compare_with_torchdiffeq(func, random(2, 3), INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    assert distance(ours.gradient, theirs.gradient) < 1e-9
    assert torch.equal(func.unused.grad, torch.zeros(4, dtype=F64))
    assert func.frozen.grad is None


@pytest.mark.parametrize("adjoint", NOT_AS_PUBLISHED)
@pytest.mark.parametrize(
    ("derivative", "factor"), [(lambda y: y, torch.e**2), (torch.ones_like, 1.0), (torch.zeros_like, 1.0)]
)
def test_fields_without_parameters_and_fields_that_do_not_depend_on_the_state(adjoint, derivative, factor):
    class Field(nn.Module):
        def forward(self, t, y):
            return derivative(y)

    y0 = random(3).requires_grad_()
    solve(Field(), y0, T, rtol=1e-9, atol=1e-9, adjoint=adjoint).y[-1].sum().backward()
    assert y0.grad.tolist() == pytest.approx([factor] * 3, rel=1e-7)


def test_only_the_adjoint_params_are_differentiated():
    func, y0 = Network(autonomous=True), random(3)
    theirs, ours = compare_with_torchdiffeq(
        func, y0, INCREASING, rtol=1e-5, atol=1e-6, adjoint="default", adjoint_params=(func.second.weight,)
    )
    assert [gradient is None for gradient in ours.gradients] == [False, True, True, True, False, True]
    assert distance(ours.gradient, theirs.gradient) < 1e-9


def test_a_function_is_solved_with_adjoint_params():
    matrix, y0 = random(2, 2).requires_grad_(), random(2)
    y = odeint_adjoint(lambda t, y: y @ matrix.T, y0, T, rtol=1e-8, atol=1e-8, adjoint_params=(matrix,))
    backward(y)
    exact = differentiate_exactly(Linear(matrix.detach()), y0, T)
    assert distance(matrix.grad, exact.gradients[-1]) < 1e-6


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("times", [INCREASING, DECREASING], ids=["increasing", "decreasing"])
def test_gradients_equal_those_of_the_exact_solution(adjoint, times):
    func, y0 = Linear(random(3, 3, seed=2)), random(3)
    if adjoint == "as-published":  # needs parameters enough for its two blocks
        times = times[[0, -1]]
    t = times.clone().requires_grad_(adjoint != "discrete")
    exact = differentiate_exactly(func, y0, t)
    for tolerance in (1e-5, 1e-9):
        ours = differentiate(func, y0, t, rtol=tolerance, atol=tolerance, adjoint=adjoint)
        for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
            assert gradient is expected is None or distance(gradient, expected) < 100 * tolerance


@pytest.mark.parametrize("adjoint", ["default", "seminorm", "discrete"])
def test_gradients_equal_finite_differences(adjoint):
    func, y0 = Network(2, 3), random(2)
    t = torch.tensor([0.0, 0.7, 1.0], dtype=F64, requires_grad=True)

    def solution(y0, t, *parameters):
        replaced = dict(zip(dict(func.named_parameters()), parameters, strict=True))
        return solve(
            lambda time, y: torch.func.functional_call(func, replaced, (time, y)),
            y0,
            t,
            rtol=1e-12,
            atol=1e-12,
            adjoint=adjoint,
            adjoint_params=parameters,
        ).y

    assert torch.autograd.gradcheck(
        solution, (y0.requires_grad_(), t, *func.parameters()), eps=1e-4, atol=1e-6, rtol=1e-6, fast_mode=True
    )


@pytest.mark.parametrize("rest", [0.02, 0.3, 0.9])
def test_the_last_step_adds_the_quadrature_up_to_the_output_time_only(rest):
    """Steps of a cubic grow tenfold, so the last goes far beyond the output time; the weights are those up to it."""
    func, y0 = Integral(degree=3), random(2)
    t = torch.tensor([0.0, 1.0, 1.0 + rest], dtype=F64, requires_grad=True)
    ours = differentiate(func, y0, t, rtol=1e-3, atol=1e-3, adjoint="seminorm")
    exact = differentiate_exactly(func, y0, t)
    for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
        assert distance(gradient, expected) < 1e-12
    backward_statistics = ours.statistics.backward
    assert min(backward_statistics.evaluation_times) < 0  # a step did go beyond


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_callbacks_hear_of_every_step(adjoint):
    func, heard = Pair(), {}
    for name in ("step", "accept_step", "reject_step", "step_adjoint", "accept_step_adjoint", "reject_step_adjoint"):
        heard[name] = []
        setattr(func, f"callback_{name}", lambda *step, name=name: heard[name].append(step))
    options = dict(rtol=1e-5, atol=1e-6, adjoint=adjoint, first_step=3.0)
    y0 = Pair.start()
    statistics = differentiate(func, y0, INCREASING, **options).statistics
    for suffix, counted in (("", statistics.forward), ("_adjoint", statistics.backward)):
        for name, times in (("accept_step", counted.accept_times), ("reject_step", counted.reject_times)):
            assert [step[0].item() for step in heard[name + suffix]] == times
        assert len(heard[f"step{suffix}"]) == counted.num_accepted + counted.num_rejected
        assert all(dt > 0 for _, _, dt in heard[f"step{suffix}"])
    assert statistics.forward.num_rejected > 0
    assert bool(heard["step_adjoint"]) == (adjoint != "discrete")
    (t0, state, _), *_, (_, later, _) = heard["accept_step"]
    assert t0 == INCREASING[0]
    assert all(torch.equal(*pair) for pair in zip(state, y0, strict=True))
    assert later[0].shape == y0[0].shape
    assert not torch.equal(later[0], y0[0])
    for _, (state, adjoint_state), _ in heard["step_adjoint"]:
        assert [piece.shape for piece in (*state, *adjoint_state)] == [piece.shape for piece in (*y0, *y0)]
    if adjoint != "discrete":
        t0, (_, adjoint_state), _ = heard["step_adjoint"][0]
        assert t0 == INCREASING[-1]
        assert distance(adjoint_state[0], random(5, 4, 3, seed=100)[-1]) < 1e-12
    plain = differentiate(Pair(), y0, INCREASING, **options)
    assert steps(plain.statistics) == steps(statistics)


def test_callbacks_need_our_solver():
    func = Network()
    func.callback_step = print
    with pytest.raises(ValueError, match=r"no callbacks: use solver='torchadjoint'"):
        solve(func, random(4, 3), T, solver="torchdiffeq")


def test_times_of_another_dtype_than_the_state():
    ours, exact = (
        by(Growth(), random(3), T.clone().to(dtype).requires_grad_())
        for by, dtype in ((differentiate, torch.float32), (differentiate_exactly, F64))
    )
    assert ours.gradients[1].dtype == torch.float32
    assert distance(ours.gradients[1].double(), exact.gradients[1]) < 1e-5
