"""Compiled attempts do what eager ones do."""

import os

import pytest
import torch
from problems import F64, KINKS, Kinked, Network, Pair, Tied, differentiate, distance, random, steps
from torch import nn

from flows.continuous import FlowField
from flows.networks import ConcatSquash
from torchadjoint import METHODS, Backsolve, solve

T = torch.tensor([0.0, 0.4, 2.0, 3.0], dtype=F64)
WARM = Backsolve(warm_start=True)
TIGHT = dict(rtol=1e-6, atol=1e-8)


def compare(func, y0, t, **options):
    eager = differentiate(func, y0, t, **options)
    ours = differentiate(func, y0, t, **options, compile=True)
    assert steps(ours.statistics) == [pytest.approx(times, abs=1e-7) for times in steps(eager.statistics)]
    # Eager attempts leave away last stages that nobody needs, and the last step's stages stay for its reversal.
    used = (options.get("method", "dopri5"), options.get("adjoint_method", "dopri5"))
    is_fsal = all(METHODS[name].is_fsal for name in used)
    is_discrete = options.get("adjoint") == "discrete"
    for own, expected, is_equal in (
        (ours.statistics.forward, eager.statistics.forward, is_fsal),
        (ours.statistics.backward, eager.statistics.backward, is_fsal and not is_discrete),
    ):
        assert own.nfe == expected.nfe if is_equal else own.nfe >= expected.nfe
    if is_discrete:
        assert ours.statistics.backward.nfe < eager.statistics.backward.nfe + METHODS[used[0]].num_stages
    assert distance(ours.y, eager.y) < 1e-9
    for own, expected in zip(ours.gradients, eager.gradients, strict=True):
        assert (own is None) == (expected is None)
        assert own is None or (own - expected).norm() <= 1e-9 * expected.norm()
    return ours


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("times", [T, T.flip(0), T[[0, -1]]], ids=["increasing", "decreasing", "one segment"])
@pytest.mark.parametrize(
    "options", [{}, dict(adjoint=WARM), dict(adjoint_rtol=1e-7), dict(adjoint="discrete")], ids=str
)
def test_steps_and_gradients_are_those_of_eager_attempts(times, options):
    t = times.clone().requires_grad_()
    ours = compare(Kinked(), random(4, 3), t, jump_t=KINKS, **TIGHT, **options)
    assert ours.statistics.forward.num_rejected > 0
    assert t.grad.abs().min() > 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, adjoint):
    options = dict(rtol=1e-4, atol=1e-5) if METHODS[method].is_adaptive else dict(step_size=0.1)
    compare(Kinked(), random(4, 3), T.clone().requires_grad_(), jump_t=KINKS, method=method, adjoint=adjoint, **options)


@pytest.mark.usefixtures("traced")
def test_the_backward_solve_by_another_method():
    compare(Network(), random(4, 3), T, method="bosh3", adjoint_method="dopri8", rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "options", [dict(norm=lambda y: y.abs().amax()), dict(atol=torch.ones(3)), dict(adjoint="default")]
)
def test_what_cannot_be_compiled_is_refused(options):
    with pytest.raises(ValueError, match="compile=True needs"):
        solve(Network(), random(3), T, compile=True, **options)


@pytest.mark.parametrize(
    ("adjoint", "names"), [("seminorm", ["attempt_backward", "slope_backward"]), ("discrete", ["reverse_step"])]
)
def test_torch_looks_at_the_module_once_a_solve(looks, adjoint, names):
    func, options = Kinked(), dict(jump_t=KINKS, adjoint=adjoint, **TIGHT)
    compare(func, random(4, 3), T, **options)
    looks.clear()
    with torch.no_grad():
        func.rates *= 0.9
    ours = compare(func, random(4, 3), T * 0.9, **options)
    assert ours.statistics.forward.num_accepted >= 10
    assert sorted(looks) == sorted(["attempt_forward", "slope_forward", *names])


def test_an_attribute_that_the_field_writes_is_written_in_every_call(looks):
    class Remembering(Network):
        def forward(self, t, y):
            self.latest = t + 0
            return super().forward(t, y)

    func = Remembering()
    compare(func, random(4, 3), T, **TIGHT)
    with torch.no_grad():
        solve(func, random(4, 3), T, compile=True, **TIGHT)
    assert func.latest >= T[-1] - 1e-6
    assert len(looks) > 20


@pytest.mark.usefixtures("traced")
def test_observers_see_what_they_see_of_eager_attempts():
    def seen(**options):
        errors, states = [], []

        def observer(attempt):
            if attempt.is_accepted is not None:
                errors.extend(attempt.errors.values())
                states.append(attempt.state)

        differentiate(Network(), random(4, 3), T, observer=observer, **TIGHT, **options)
        return torch.tensor(errors), torch.cat(states)

    for own, expected in zip(seen(compile=True), seen(), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


def test_a_derivative_of_another_shape_is_said():
    class Summed(Network):
        def forward(self, t, y):
            return super().forward(t, y).sum(dim=0)

    with pytest.raises(ValueError, match=r"the vector field returned shape \(3,\) for a state of shape \(4, 3\)"):
        solve(Summed(), random(4, 3), T, compile=True)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_tuple_state(adjoint):
    compare(Pair(), Pair.start(), T, adjoint=adjoint, **TIGHT)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("options", [dict(interp="cubic"), dict(perturb=True), dict(interp="cubic", perturb=True)])
def test_fixed_steps_between_which_there_are_outputs(options):
    options = dict(method="rk4", step_size=0.3, jump_t=KINKS, adjoint="discrete", **options)
    compare(Kinked(), random(4, 3), T.clone().requires_grad_(), **options)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("options", [dict(), dict(interp="cubic"), dict(compile=True)])
def test_perturbed_steps_ask_behind_a_jump_that_nobody_named(options):
    class Jumps(nn.Module):
        def forward(self, t, y):
            return torch.where(t < 0.5, 1.0, 10.0) * torch.ones_like(y)

    times = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    with torch.no_grad():
        y = solve(Jumps(), random(2), times, method="euler", step_size=0.5, perturb=True, **options).y
    torch.testing.assert_close(y[-1] - y[0], torch.full((2,), 5.5, dtype=F64))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_gradient_asked_for_again_is_the_same(adjoint):
    func, y0 = Kinked(), random(4, 3).requires_grad_()
    solution = solve(func, y0, T, jump_t=KINKS, adjoint=adjoint, compile=True, **TIGHT)
    once, again = (torch.autograd.grad(solution.y[1:].sum(), y0, retain_graph=True) for _ in range(2))
    assert torch.equal(*once, *again)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_y0_may_change_before_the_way_back(adjoint):
    def gradient(change):
        func, y0 = Network(), random(4, 3).requires_grad_()
        y = solve(func, y0, T, adjoint=adjoint, compile=True, **TIGHT).y
        with torch.no_grad():
            y0.mul_(change)
        return torch.autograd.grad(y[1:].square().sum(), func.first.weight)[0]

    assert torch.equal(gradient(change=1), gradient(change=3))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_field_without_parameters(adjoint):
    class Rotation(nn.Module):
        def forward(self, t, y):
            return torch.stack([-y[1], y[0]])

    compare(Rotation(), random(2), T, adjoint=adjoint, **TIGHT)


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch's compiler mixes kernels then")
@pytest.mark.filterwarnings("ignore:Skipping serialization of")  # that of torch 2.6 says so
def test_it_is_compiled_once_for_a_class_of_field_and_a_shape():
    # Of few stages, so that it takes less time.
    options = dict(jump_t=KINKS, method="bosh3")
    compare(Kinked(), random(4, 3), T, rtol=1e-4, atol=1e-6, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            func = Kinked()
            with torch.no_grad():
                func.rates.copy_(random(len(KINKS) + 1, seed=seed))
            compare(func, random(4, 3, seed=seed), T * 0.9, rtol=1e-3, atol=1e-5, adjoint=WARM, **options)


@pytest.mark.parametrize("probe", [None, random(4, 2).sign()], ids=["exact", "estimated"])
def test_the_field_of_a_flow(graphs, probe):
    func = FlowField(ConcatSquash([2, 5, 4, 2], "tanh").double(), probe)
    compare(func, (random(4, 2), random(4)), T[[0, 1]], rtol=1e-4, atol=1e-4)
    assert graphs


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_weight_in_two_places(graphs, adjoint):
    compare(Tied(), random(2, 3), T[[0, 1]], rtol=1e-4, atol=1e-4, adjoint=adjoint)
