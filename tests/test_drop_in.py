"""`odeint` and `odeint_adjoint` do what torchdiffeq's do, with every option that it has."""

import inspect

import pytest
import torch
import torchcde
import torchdiffeq
from problems import F64, Network, Pair, backward, distance, random
from torch import nn

import torchadjoint
from torchadjoint import METHODS, odeint, odeint_adjoint

T = torch.linspace(0, 2, 6, dtype=F64)
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
SAME_STEPS = ("dopri5", "bosh3", "dopri8")
"""Of torchdiffeq's methods with error control: the other two are others there, see their tables."""


class Timed(nn.Module):
    """A field that remembers when it was evaluated."""

    def __init__(self, func=None):
        super().__init__()
        self.func = Network() if func is None else func
        self.times, self.accepted, self.rejected = [], [], []

    def forward(self, t, y):
        self.times.append(t.item())
        return self.func(t, y)


class Recorded(Timed):
    """It also remembers the steps; torchdiffeq warns that methods of fixed steps do not say when they are accepted."""

    def callback_accept_step(self, t0, y0, dt):
        self.accepted.append(t0.item())

    def callback_reject_step(self, t0, y0, dt):
        self.rejected.append(t0.item())


def both(*arguments, func=None, by="odeint", **options):
    """The solution and the recorded field, ours and torchdiffeq's."""
    found = []
    for library in (torchadjoint, torchdiffeq):
        field = (Timed if options.get("method") in FIXED else Recorded)(func)
        with torch.no_grad():
            found += [getattr(library, by)(field, *arguments, **options), field]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(first_step=0.5),
        dict(first_step=torch.tensor(0.5)),
        dict(step_t=torch.tensor([0.3, 1.7, 0.9])),
        dict(jump_t=torch.tensor([0.35, 1.1], dtype=F64)),
        dict(step_t=torch.tensor([0.5]), jump_t=torch.tensor([0.25])),
        dict(min_step=0.3),
        dict(max_step=0.05),
        dict(safety=0.5),
        dict(ifactor=1.5),
        dict(dfactor=0.9, first_step=2.0),
        dict(norm=lambda y: y.abs().max()),
        dict(dtype=torch.float64, max_num_steps=500),
    ],
    ids=lambda options: "-".join(options) or "none",
)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["increasing", "decreasing"])
def test_options_of_error_control_mean_the_same(options, method, t):
    y, ours, expected, theirs = both(random(4, 3), t, rtol=1e-4, atol=1e-6, method=method, options=options)
    assert ours.accepted == pytest.approx(theirs.accepted, abs=1e-9)
    assert ours.rejected == pytest.approx(theirs.rejected, abs=1e-9)
    if method == "dopri5":  # the dense output of bosh3 is another
        assert distance(y, expected) < 1e-9
        # After a jump at which no more steps are taken there is no evaluation here.
        assert ours.times == pytest.approx(theirs.times[: len(ours.times)], abs=1e-9)


@pytest.mark.parametrize("method", SAME_STEPS)
def test_methods_take_the_same_steps(method):
    _, ours, _, theirs = both(random(4, 3), T, rtol=1e-6, atol=1e-8, method=method, options=dict(first_step=1.0))
    assert ours.accepted == pytest.approx(theirs.accepted, abs=1e-6)
    assert ours.rejected == pytest.approx(theirs.rejected, abs=1e-6)
    assert len(theirs.rejected) > 0
    # dopri8 is not FSAL, so its last stage is not evaluated of a rejected step.
    saved = len(ours.rejected) if method == "dopri8" else 0
    assert len(ours.times) == len(theirs.times) - saved


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(step_size=0.13),
        dict(step_size=0.3, interp="cubic"),
        dict(step_size=5.0, perturb=True),
        dict(grid_constructor=lambda func, y0, t: torch.linspace(t[0], t[-1], 4, dtype=F64)),
        dict(perturb=True),
    ],
    ids=lambda options: "-".join(options) or "none",
)
@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["increasing", "decreasing"])
def test_fixed_steps_are_the_same_in_values_and_evaluations(method, options, t):
    y, ours, expected, theirs = both(random(4, 3), t, method=method, options=options)
    assert distance(y, expected) < 1e-12
    if "interp" not in options:  # torchdiffeq evaluates the end of a step anew for each output in it
        assert ours.times == pytest.approx(theirs.times, abs=1e-14)


def test_fixed_steps_ask_at_the_very_times_of_the_grid():
    """Fields that look up data by the time's whole part depend on it."""
    _, ours, _, theirs = both(random(3), torch.arange(5, dtype=F64), method="rk4")
    assert ours.times == theirs.times
    _, ours, _, theirs = both(random(3), torch.arange(5, dtype=F64), method="rk4", options=dict(perturb=True))
    assert ours.times == theirs.times


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by", ["odeint", "odeint_adjoint"])
def test_gradients_of_everything_equal_finite_differences(method, by):
    func = Network(2, 3)
    t = torch.tensor([0.0, 0.2, 0.3] if method in FIXED else [0.0, 0.7, 1.0], dtype=F64, requires_grad=True)
    tolerance = {"adaptive_heun": 1e-6, "fehlberg2": 1e-8, "bosh3": 1e-8}.get(method, 1e-10)
    tolerances = dict(rtol=tolerance, atol=tolerance)
    # Fixed steps on the output times: the gradient of the times is the flow's.
    options = dict(step_size=0.01) if method in FIXED else dict(first_step=0.01)
    close = {"euler": 0.2}.get(method, 2e-3)

    def solution(y0, t, *parameters):
        replaced = dict(zip(dict(func.named_parameters()), parameters, strict=True))
        given = dict(adjoint_params=parameters) if by == "odeint_adjoint" else {}
        return getattr(torchadjoint, by)(
            lambda time, y: torch.func.functional_call(func, replaced, (time, y)),
            y0,
            t,
            **tolerances,
            method=method,
            options=options,
            **given,
        )

    inputs = (random(2).requires_grad_(), t, *func.parameters())
    assert torch.autograd.gradcheck(solution, inputs, eps=1e-4, atol=close, rtol=close, fast_mode=True)


@pytest.mark.parametrize("adjoint_options", [None, {}, dict(norm="per-tensor"), dict(norm="seminorm"), "a function"])
@pytest.mark.parametrize("state", [random(4, 3), (random(4, 3), random(2))], ids=["tensor", "tuple"])
def test_adjoint_norms_mean_the_same(adjoint_options, state):
    func = Pair() if isinstance(state, tuple) else Network()
    seen = []

    def largest(tensors):
        seen.append([tuple(tensor.shape) for tensor in tensors])
        return torch.stack([tensor.abs().amax() for tensor in tensors]).amax()

    theirs_options = adjoint_options
    if adjoint_options == "a function":
        adjoint_options = theirs_options = dict(norm=largest)
    elif adjoint_options is None or adjoint_options.get("norm") == "seminorm" or not adjoint_options:
        # Where no norm is named, ours is the seminorm. That of torchdiffeq weighs a_t, which is not 0 here.
        theirs_options = dict(norm=torchadjoint.make_norm(state))
    else:
        theirs_options = {}
    nfe, gradients = [], []
    for library, options in ((torchadjoint, adjoint_options), (torchdiffeq, theirs_options)):
        field = Recorded(func)
        func.zero_grad()
        y = library.odeint_adjoint(field, state, T, rtol=1e-5, atol=1e-7, adjoint_options=options)
        field.times.clear()
        backward(y)
        nfe.append(len(field.times))
        gradients.append(torch.cat([parameter.grad.reshape(-1) for parameter in func.parameters()]))
    assert nfe[0] == nfe[1]
    assert distance(*gradients) < 1e-6
    if seen:
        states = [tuple(piece.shape) for piece in (state if isinstance(state, tuple) else (state,))]
        assert seen[0] == [(), *states, *states, *(tuple(parameter.shape) for parameter in func.parameters())]


def test_a_norm_of_the_state_measures_its_adjoint_too():
    """A hundred times as large, it is the same as tolerances a hundred times as small, of a_z above all."""

    def hundredfold(y):
        return 100 * y.square().mean().sqrt()

    func, steps = Recorded(), []
    for norm, tolerance in ((hundredfold, 1e-4), (None, 1e-6)):
        taken = []
        func.callback_accept_step_adjoint = lambda t0, y0, dt, taken=taken: taken.append(t0.item())
        options = {} if norm is None else dict(options=dict(norm=norm))
        y = odeint_adjoint(func, random(4, 3), T, rtol=tolerance, atol=tolerance, **options)
        (1e3 * y).sum().backward()  # a large a_z
        steps.append(taken)
    assert steps[0] == pytest.approx(steps[1], abs=1e-6)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-2, 1e-8), (1e-8, 1e-2)], ids=["a loose rtol", "a loose atol"])
def test_the_backward_solve_has_tolerances_of_its_own(rtol, atol):
    steps, own = [], dict(adjoint_rtol=rtol, adjoint_atol=atol)
    for by, options in ((odeint_adjoint, own), (torchdiffeq.odeint_adjoint, own), (odeint_adjoint, {})):
        func, taken = Recorded(), []
        func.callback_accept_step_adjoint = lambda t0, y0, dt, taken=taken: taken.append(t0.item())
        norm = dict(adjoint_options=dict(norm="per-tensor")) if by is odeint_adjoint else {}
        by(func, random(4, 3), T, rtol=1e-4, atol=1e-4, **options, **norm).sum().backward()
        steps.append(taken)
    assert steps[0] == pytest.approx(steps[1], abs=1e-6)
    assert len(steps[0]) != len(steps[2])


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_the_defaults_are_torchdiffeqs(name):
    ours, theirs = (inspect.signature(getattr(of, name)).parameters for of in (torchadjoint, torchdiffeq))
    shared = ours.keys() & theirs.keys() - {"func", "y0", "t"}
    assert {"rtol", "atol", "method", "options"} <= shared
    assert {key: ours[key].default for key in shared} == {
        key: None if theirs[key].default == () else theirs[key].default for key in shared
    }


def test_a_norm_of_a_state_of_tensors_gets_them():
    def of_the_second(state):
        assert [tuple(part.shape) for part in state] == [tuple(part.shape) for part in Pair.start()]
        return state[1].square().mean().sqrt()

    _, ours, _, theirs = both(Pair.start(), T, func=Pair(), rtol=1e-5, atol=1e-7, options=dict(norm=of_the_second))
    assert ours.accepted == pytest.approx(theirs.accepted, abs=1e-9)


@pytest.mark.parametrize("given", ["options", "adjoint_options"])
def test_a_jump_that_either_direction_is_told_of_counts_for_both(given):
    func, backward_steps = Recorded(), []
    func.callback_accept_step_adjoint = lambda t0, y0, dt: backward_steps.append(t0.item())
    both_options = {"options": {}, "adjoint_options": {}} | {given: dict(jump_t=torch.tensor([0.7], dtype=F64))}
    odeint_adjoint(func, random(4, 3), T, rtol=1e-3, atol=1e-3, **both_options).sum().backward()
    assert 0.7 in func.accepted
    assert 0.7 in backward_steps


def test_the_backward_solve_has_options_of_its_own():
    observed = {}
    func = Recorded()
    func.callback_accept_step_adjoint = lambda t0, y0, dt: observed.setdefault("sizes", []).append(dt.item())
    y = odeint_adjoint(
        func, random(3), T, adjoint_rtol=1e-2, adjoint_atol=1e-2, adjoint_method="rk4",
        adjoint_options=dict(step_size=0.1),
    )  # fmt: skip
    y.sum().backward()
    assert observed["sizes"] == pytest.approx([0.1] * 20)
    with pytest.raises(ValueError, match="options and another adjoint_method are given: give adjoint_options"):
        odeint_adjoint(func, random(3), T, options=dict(first_step=0.1), adjoint_method="bosh3")


@pytest.mark.parametrize(
    ("rtol", "atol"),
    [
        (torch.tensor(1e-4), torch.tensor(1e-6)),
        (1e-4, torch.tensor([1e-6, 1e-3, 1e-8], dtype=F64)),
        (torch.full((4, 3), 1e-4, dtype=F64), 1e-6),
    ],
)
def test_tolerances_may_be_tensors(rtol, atol):
    _, ours, _, theirs = both(random(4, 3), T, rtol=rtol, atol=atol)
    assert ours.accepted == pytest.approx(theirs.accepted, abs=1e-9)


def backward_steps(rtol=1e-3, atol=1e-3, **options):
    """The sizes of the steps of a backward solve from 2 to 0."""
    func, sizes = Recorded(), []
    func.callback_accept_step_adjoint = lambda t0, y0, dt: sizes.append(dt.item())
    odeint_adjoint(func, random(4, 3), T[[0, -1]], rtol=rtol, atol=atol, **options).sum().backward()
    return sizes


def test_the_backward_solve_has_the_grid_too():
    def grid(func, y0, t):
        assert y0.shape == (4, 3)
        return torch.linspace(t[0], t[-1], 5, dtype=F64)

    assert backward_steps(method="rk4", options=dict(grid_constructor=grid)) == pytest.approx([0.5] * 4)


def test_empty_adjoint_options_are_not_those_of_the_forward_solve():
    assert max(backward_steps(options=dict(max_step=0.02))) == pytest.approx(0.02)
    assert max(backward_steps(options=dict(max_step=0.02), adjoint_options={})) > 0.05


def test_tolerances_may_differ_between_the_tensors_of_a_state():
    _, ours, _, theirs = both(Pair.start(), T, func=Pair(), rtol=(1e-3, 1e-6), atol=(1e-4, torch.tensor(1e-7)))
    assert ours.accepted == pytest.approx(theirs.accepted, abs=1e-9)
    with pytest.raises(ValueError, match="rtol of the backward solve is not one number, as it must be: give one as"):
        odeint_adjoint(Pair(), Pair.start(), T, rtol=(1e-3, 1e-6))


@pytest.mark.parametrize("method", METHODS)
def test_one_output_time_is_the_start(method):
    y0 = random(2, 3).requires_grad_()
    for by in (odeint, odeint_adjoint):
        y = by(Network(), y0, T[:1], method=method)
        assert torch.equal(y, y0.unsqueeze(0))
        (gradient,) = torch.autograd.grad(y.sum(), y0)
        assert torch.equal(gradient, torch.ones_like(y0))


def test_at_a_single_time_the_parameters_have_no_gradient_but_a_backward_pass():
    func = Network()
    odeint_adjoint(func, random(3), T[:1]).sum().backward()
    assert all(parameter.grad is None for parameter in func.parameters())


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("interpolate", [torchcde.LinearInterpolation, torchcde.CubicSpline])
def test_torchcde_by_replacement(adjoint, interpolate, monkeypatch):
    """torchcde looks up odeint and odeint_adjoint in torchdiffeq."""
    x = torch.linspace(0, 1, 5, dtype=F64)[:, None] * random(2, 1, 3)
    coefficients = {torchcde.LinearInterpolation: torchcde.linear_interpolation_coeffs}.get(
        interpolate, torchcde.natural_cubic_coeffs
    )(x)
    path = interpolate(coefficients)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 12, dtype=F64)

        def forward(self, t, z):
            return torch.tanh(self.linear(z)).view(*z.shape, 3)

    func, found = Field(), []
    for library in (torchadjoint, torchdiffeq):
        monkeypatch.setattr(torchdiffeq, "odeint", library.odeint)
        monkeypatch.setattr(torchdiffeq, "odeint_adjoint", library.odeint_adjoint)
        func.zero_grad()
        z = torchcde.cdeint(path, func, random(2, 4), path.interval, adjoint=adjoint, rtol=1e-8, atol=1e-9)
        z.pow(2).sum().backward()
        found.append((z.detach(), func.linear.weight.grad.clone()))
        monkeypatch.undo()
    assert distance(found[0][0], found[1][0]) < 1e-6
    assert distance(found[0][1], found[1][1]) < 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(event_fn=lambda t, y: y), "event_fn is given, but there are no events here: use torchdiffeq's"),
        (dict(method="implicit_adams"), "for implicit and multistep methods and those of SciPy use torchdiffeq"),
        (dict(method="scipy_solver"), "method is 'scipy_solver', but must be one of"),
        (dict(options=dict(frist_step=1.0)), "unknown option 'frist_step': use one of 'first_step'"),
        (dict(options=[1]), "options is a list, but must be a dict of options"),
        (dict(method="rk4", options=dict(first_step=1.0)), "first_step is given, but the method 'rk4' takes fixed"),
        (dict(options=dict(step_size=1.0)), "step_size is given, but the method 'dopri5' chooses its steps"),
        (dict(options=dict(min_step=2.0, max_step=1.0)), "min_step is 2.0, but must be at most max_step, 1"),
        (dict(options=dict(norm="rms")), "norm is 'rms', but must be a function"),
        (dict(options=dict(dtype=3)), "dtype is 3, but must be a floating-point dtype"),
        (dict(options=dict(step_t=3)), "step_t is 3, but must be a list of times"),
        (dict(options=dict(dfactor=2.0)), "dfactor is 2.0, but must be at most 1"),
        (
            dict(method="rk4", options=dict(interp="quartic")),
            "interp is 'quartic', but must be one of 'linear'",
        ),
        (dict(method="rk4", options=dict(step_size=1.0, grid_constructor=print)), "step_size and grid_constructor are"),
        (dict(method="rk4", options=dict(grid_constructor=lambda f, y, t: t[1:])), "but they must go from 0 to 2"),
        (
            dict(method="rk4", options=dict(grid_constructor=lambda f, y, t: 3)),
            "what grid_constructor returned must",
        ),
        (dict(rtol=torch.tensor([1e-3, -1.0, 1.0])), "rtol is tensor"),
        (dict(rtol=torch.ones(7)), "a tensor of such that broadcasts to the state"),
    ],
)
@pytest.mark.parametrize("by", [odeint, odeint_adjoint])
def test_what_is_not_supported_names_itself(options, sentence, by):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # the sentence is compared below
        by(Network(), random(3), T, **options)
    assert sentence in str(caught.value)


def test_complex_states_are_refused():
    with pytest.raises(ValueError, match=r"y0 is complex, but must be real: solve for torch.view_as_real\(y0\)"):
        odeint(Network(), torch.ones(3, dtype=torch.complex64), T)


@pytest.mark.parametrize(
    ("norm", "sentence"), [("l2", "norm is 'l2', but must be one of 'default', 'seminorm'"), (3, "norm is 3, but must")]
)
def test_a_wrong_adjoint_norm_is_refused(norm, sentence):
    with pytest.raises(ValueError, match=sentence):
        odeint_adjoint(Network(), random(3), T, adjoint_options=dict(norm=norm))


def test_an_interval_of_fixed_steps_has_no_tiny_last_one():
    t = torch.tensor([0.0, 0.3], dtype=torch.float32)  # 0.3 is a little more than 0.3 in float32
    func = Recorded(Network(dtype=torch.float32))
    odeint(func, random(3, dtype=torch.float32), t, method="euler", options=dict(step_size=0.1))
    assert func.times == pytest.approx([0, 0.1, 0.2])
