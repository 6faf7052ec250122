"""What a user adds stands outside the library: nothing there is edited for it."""

import pytest
import torch
from problems import F64, Network, differentiate, distance, random, steps

from torchadjoint import Backsolve, Discrete, solve
from torchadjoint.adjoints import forward_solver, make_field
from torchadjoint.compiled_loops import IS_TORCH_NEW_ENOUGH
from torchadjoint.systems import ForwardSystem

T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
TOLERANCES = dict(rtol=1e-5, atol=1e-7)


def test_a_norm_of_ones_own():
    """A hundred times the seminorm is the seminorm at tolerances a hundred times as small."""

    def hundredfold(tensors):
        _, z, a_z, *_ = tensors
        return 100 * torch.stack([z.square().mean(), a_z.square().mean()]).amax().sqrt()

    func, y0 = Network(), random(4, 3)
    own = differentiate(func, y0, T, adjoint=Backsolve(hundredfold), **TOLERANCES)
    tight = {f"adjoint_{name}": tolerance / 100 for name, tolerance in TOLERANCES.items()}
    named, loose = (differentiate(func, y0, T, **TOLERANCES, **options) for options in (tight, {}))
    assert steps(own.statistics) == [pytest.approx(times, abs=1e-6) for times in steps(named.statistics)]
    assert distance(own.gradient, named.gradient) < 1e-6
    assert own.statistics.backward.nfe > loose.statistics.backward.nfe


class Clipped:
    """The gradient of another adjoint, all of it scaled down to a norm of `largest` at most."""

    def __init__(self, adjoint, largest):
        self.name = f"{adjoint.name}, clipped"
        self.adjoint, self.largest = adjoint, largest

    def differentiate(self, problem, statistics):
        differentiation = self.adjoint.differentiate(problem, statistics)
        unclipped = differentiation.gradients

        def gradients(solution, solution_gradient):
            found = unclipped(solution, solution_gradient)
            norm = torch.cat([found.y0.reshape(-1), found.parameters]).norm()
            factor = (self.largest / norm).clamp(max=1.0)
            return found._replace(y0=found.y0 * factor, parameters=found.parameters * factor)

        differentiation.gradients = gradients
        return differentiation


def test_an_adjoint_of_ones_own():
    func, y0 = Network(), random(4, 3)
    for adjoint in (Discrete(checkpoint_interval=3), Backsolve("seminorm", warm_start=True)):
        whole = differentiate(func, y0, T, adjoint=adjoint, **TOLERANCES)
        clipped = differentiate(func, y0, T, adjoint=Clipped(adjoint, 0.1), **TOLERANCES)
        assert clipped.gradient.norm().item() < 0.1 + 1e-12 < whole.gradient.norm().item()
        assert distance(clipped.gradient * whole.gradient.norm() / 0.1, whole.gradient) < 1e-12
        assert clipped.statistics == whole.statistics


def test_an_observer_of_ones_own():
    """Which part of the backward state sets the steps: under the paper's baseline, that of the parameters too."""
    largest = []

    def observe(attempt):
        if attempt.direction == "backward" and attempt.errors:
            largest.append(max(attempt.errors, key=attempt.errors.get))

    done = differentiate(Network(3, 256), random(4, 3), T, adjoint="default", observer=observe, **TOLERANCES)
    counted = done.statistics.backward
    assert len(largest) == counted.num_accepted + counted.num_rejected
    assert "a_theta" in largest


class Uncompiled:
    """An adjoint made of the usual parts, which do not compile."""

    name = "uncompiled"

    def __init__(self, problem=None, statistics=None):
        self.problem, self.statistics = problem, statistics
        if problem is not None:
            self.field = make_field(problem, time_gradient=False)

    def differentiate(self, problem, statistics):
        return Uncompiled(problem, statistics)

    def begin(self):
        return forward_solver(self.problem, self.statistics, ForwardSystem(self.field, self.problem.y0.shape))


@pytest.mark.parametrize("compile", [True, "solve"])
def test_an_adjoint_that_does_not_compile_refuses_to(compile):
    if compile == "solve" and not IS_TORCH_NEW_ENOUGH:
        pytest.skip("this torch has no while_loop")
    with pytest.raises(ValueError, match="goes with adjoint='seminorm' and 'discrete', not with 'uncompiled'"):
        solve(Network(), random(3).requires_grad_(), T, adjoint=Uncompiled(), compile=compile)
