import math
from itertools import pairwise

import pytest
import torch
from problems import F64, Growth, Integral, Network, Pair, distance, random
from torch import nn

from torchadjoint import SolverError, solve
from torchadjoint.field import AutogradField
from torchadjoint.solver import beside

T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)


class Power(nn.Module):
    """dy/dt = y^2, which from 1 at t = 0 is infinite at t = 1."""

    def forward(self, t, y):
        return y**2


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("times", [T, T.flip(0)], ids=["increasing", "decreasing"])
def test_the_error_of_the_solution_follows_the_tolerance(tolerance, times):
    func, y0 = Growth(), 1 + random(3).abs()
    y = solve(func, y0, times, rtol=tolerance, atol=tolerance).y
    assert torch.equal(y[0], y0)
    assert distance(y, func.exact(y0, times)) < 30 * tolerance


def test_polynomials_up_to_the_third_degree_are_solved_exactly_at_every_output_time():
    func, y0 = Integral(degree=3), random(2)
    times = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6, 2.0], dtype=F64)
    solution = solve(func, y0, times, rtol=1e-3, atol=1e-3)
    assert distance(solution.y, func.exact(y0, times)) < 1e-13
    assert solution.statistics.forward.num_accepted < 5


def test_a_coarse_solve_differs_from_a_fine_one():
    """The tolerances are not ignored."""
    func, y0 = Growth(), random(3)
    coarse, fine = (solve(func, y0, T, rtol=rtol, atol=rtol) for rtol in (1e-2, 1e-10))
    assert distance(coarse.y, fine.y) > 1e-6
    assert coarse.statistics.forward.nfe < fine.statistics.forward.nfe / 3


@pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
def test_evaluations_and_steps_add_up(tolerance):
    func, times = Network(), torch.linspace(0, 4, 6, dtype=F64)
    evaluated = []
    func.register_forward_hook(lambda module, given, result: evaluated.append(given[0].item()))
    solution = solve(func, random(3), times, rtol=tolerance, atol=tolerance, jump_t=[1.0, 2.5])
    forward = solution.statistics.forward
    # The first slope and the guess of the first step, six an attempt, and one more behind each jump.
    assert forward.nfe == 2 + 6 * (forward.num_accepted + forward.num_rejected) + 2
    assert forward.evaluation_times == evaluated
    assert forward.accept_times == sorted(forward.accept_times)
    assert {1.0, 2.5} < set(forward.accept_times)


def test_a_first_step_that_is_given_costs_no_evaluation_and_is_taken():
    solution = solve(Network(), random(3), T, rtol=1e-5, atol=1e-5, first_step=0.01)
    forward = solution.statistics.forward
    assert forward.nfe == 1 + 6 * (forward.num_accepted + forward.num_rejected)
    assert forward.accept_times[:2] == [0.0, 0.01]


def test_the_stages_of_a_step_are_evaluated_at_its_nodes_and_the_last_two_just_before_its_end():
    forward = solve(Network(), random(3), T, rtol=1e-5, atol=1e-5, first_step=0.25).statistics.forward
    assert forward.accept_times[1] == 0.25
    just_before = math.nextafter(0.25, 0)
    assert forward.evaluation_times[:7] == pytest.approx([0, 0.05, 0.075, 0.2, 0.25 * 8 / 9, just_before, just_before])
    assert forward.evaluation_times[5:7] == [just_before, just_before]


def test_beside_is_the_neighbour_in_the_dtype():
    assert beside(1.0, 0.0, torch.float64) == 1 - 2**-53
    assert beside(1.0, 2.0, torch.float64) == 1 + 2**-52
    assert beside(1.0, 0.0, torch.float32) == 1 - 2**-24
    assert beside(1.0, 2.0, torch.float32) == 1 + 2**-23
    assert beside(-1.0, 0.0, torch.float32) == -1 + 2**-24
    assert beside(-1.0, -2.0, torch.float32) == -1 - 2**-23
    assert [beside(0.0, to, torch.float32) for to in (-1.0, 1.0)] == [-(2.0**-149), 2.0**-149]


@pytest.mark.parametrize(
    "options",
    [dict(method="dopri8"), dict(method="adaptive_heun"), dict(method="rk4", step_size=0.3, interp="cubic")],
    ids=str,
)
def test_every_evaluation_is_counted(options):
    """Also that of a last stage which only the dense output needs."""
    func, evaluated = Network(), []
    func.register_forward_hook(lambda module, given, result: evaluated.append(given[0].item()))
    times = torch.linspace(0, 2, 6, dtype=F64)
    forward = solve(func, random(3), times, rtol=1e-4, atol=1e-6, **options).statistics.forward
    assert forward.evaluation_times == evaluated


def test_a_rejected_step_starts_again_at_the_same_time():
    forward = solve(Network(), random(3), T, rtol=1e-6, atol=1e-6, first_step=1.0).statistics.forward
    assert forward.reject_times[0] == 0.0
    assert forward.accept_times[0] == 0.0


def test_steps_end_on_jumps_in_any_order_and_not_on_those_outside():
    forward = solve(
        Integral(), random(3), T, rtol=1e-3, atol=1e-3, jump_t=[1.7, -1.0, 0.3, 2.0, 5.0]
    ).statistics.forward
    assert {0.3, 1.7} < set(forward.accept_times)
    assert all(0 <= time < 2 for time in forward.accept_times)
    assert max(forward.evaluation_times) < 2  # no step goes beyond the jump at the last time


def test_a_field_is_told_its_piece_also_after_the_guess_of_the_first_step_has_left_it():
    entered = []

    class Told(AutogradField):
        def enter(self, t0, t1):
            entered.append((t0, t1))

    func = Network()
    func.fused_field = lambda y0: Told(func, tuple(func.parameters()), y0.shape, time_gradient=False)
    with torch.no_grad():
        solve(func, random(3), T[[0, 2]], jump_t=[1.0], rtol=1e-3, atol=1e-3)
    before, (start, end), after, last = entered
    assert start == end
    assert before == after == (0, 1)
    assert last == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finite_time_blow_up_is_an_error_that_says_where(dtype):
    with pytest.raises(
        SolverError, match=r"the step became too small at t = (1|0\.9999).*step size .*larger tolerances"
    ):
        solve(Power(), torch.ones(2, dtype=dtype), T, rtol=1e-6, atol=1e-6)


def test_a_blow_up_backwards_in_time_is_an_error():
    with pytest.raises(SolverError, match=r"the step became too small at t = -1"):
        solve(Power(), -torch.ones(2, dtype=F64), -T, rtol=1e-6, atol=1e-6)


def test_too_many_steps_are_an_error_that_says_how_far_it_came():
    options = dict(rtol=1e-9, atol=1e-9, first_step=0.001)
    count = len(solve(Network(), random(3), T, **options).statistics.forward.accept_times)
    solve(Network(), random(3), T, **options, max_num_steps=3 * count)
    with pytest.raises(
        SolverError, match=r"more than 3 steps were attempted at t = 0\.\d+ \(step size .*, 3 steps acc"
    ):
        solve(Network(), random(3), T, **options, max_num_steps=3)


def test_too_many_fixed_steps_are_an_error_that_speaks_of_no_tolerance():
    with pytest.raises(
        SolverError, match="more than 5 steps were attempted, by fixed steps: give a larger max_num_steps"
    ):
        solve(Network(), random(3), T, method="euler", step_size=0.01, max_num_steps=5)


def test_the_first_guess_looks_no_farther_than_the_last_time():
    """Where the field is small the guess is long, and beyond the end this one is infinite."""

    class Explodes(nn.Module):
        def forward(self, t, y):
            times.append(t.item())
            return 1e-6 * torch.exp(t) * y

    for t in (torch.tensor([0.0, 10.0], dtype=F64), torch.tensor([10.0, 0.0], dtype=F64)):
        times = []
        y = solve(Explodes(), torch.ones(2, dtype=F64), t, rtol=1e-9, atol=1e-9).y[-1]
        torch.testing.assert_close(y, torch.exp(1e-6 * (t[1].exp() - t[0].exp())).expand(2), rtol=1e-6, atol=0)
        assert max(times) < 15


def test_a_slope_beyond_float32_when_divided_by_its_tolerance_is_an_error_that_says_so():
    class Steep(nn.Module):
        def forward(self, t, y):
            return torch.full_like(y, 1e35)

    with pytest.raises(SolverError, match="the vector field over its tolerance is too large a number at t = 0"):
        solve(Steep(), torch.zeros(2), T.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("start", "what"),
    [(math.nan, "the state"), (math.inf, "the state"), (1e200, "the vector field")],
)
def test_a_start_that_is_not_finite_is_an_error_that_says_what(start, what):
    y0 = torch.tensor([1.0, start], dtype=F64)
    with pytest.raises(SolverError, match=rf"{what} is not finite at t = 0 .*rtol 1e-06, atol 1e-09.*finite"):
        solve(Power(), y0, T, rtol=1e-6, atol=1e-9)
    with pytest.raises(SolverError, match="the vector field is not finite at t = 0"):
        solve(Power(), y0, T, rtol=1e-6, atol=1e-9, first_step=0.1)


def test_a_step_out_of_the_domain_is_taken_again_smaller():
    """A trial state at which the field is not a number ends no solve."""

    class SquareRoot(nn.Module):
        def forward(self, t, y):
            return -torch.sqrt(y)

    solution = solve(SquareRoot(), torch.ones(1, dtype=F64), T[:2], rtol=1e-6, atol=1e-9, first_step=100.0)
    assert solution.statistics.forward.num_rejected > 0
    assert solution.y[-1].item() == pytest.approx(0.25, rel=1e-6)


def test_a_tuple_state_is_solved_as_one_system():
    func, (y0, z0) = Pair(), Pair.start()
    coarse, fine = (solve(func, (y0, z0), T, rtol=rtol, atol=rtol).y for rtol in (1e-6, 1e-10))
    assert [tuple(piece.shape) for piece in coarse] == [(3, 4, 3), (3, 2)]
    for actual, expected, start in zip(coarse, fine, (y0, z0), strict=True):
        assert torch.equal(actual[0], start)
        assert distance(actual, expected) < 1e-5


def test_output_times_take_no_part_in_the_steps():
    few, many = (
        solve(Network(), random(3), torch.linspace(0, 2, num, dtype=F64), rtol=1e-6, atol=1e-6) for num in (2, 201)
    )
    assert few.statistics.forward.accept_times == many.statistics.forward.accept_times
    assert torch.equal(few.y[-1], many.y[-1])
    jumps = [after - before for before, after in pairwise(many.y[:, 0].tolist())]
    assert max(map(abs, jumps)) < 0.1  # a smooth curve


def test_fixed_steps_beside_a_jump_end_there_alone():
    """0.1 * 3 is not 0.3, and the step between the two would be nothing."""
    for jumps, num_steps in (([0.3, 0.6, 0.7], 10), ([0.35], 11)):
        times = torch.tensor([0.0, 1.0], dtype=F64)
        for t in (times, times.flip(0)):
            solution = solve(Network(), random(3), t, method="rk4", step_size=0.1, jump_t=jumps)
            assert solution.statistics.forward.num_accepted == num_steps


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_jump_beside_the_first_or_the_last_time_takes_no_step_away(adjoint):
    at_jump, eighth = 0.1 * 3, 0.1 * 7
    assert (at_jump > 0.3, eighth > 0.7) == (True, True), "beside, as they round"
    for ends in ((0.0, eighth), (eighth, 0.0), (at_jump, 1.0), (1.0, at_jump), (0.0, at_jump, eighth, 1.0)):
        func, t = Network(), torch.tensor(ends, dtype=F64)
        options = dict(method="rk4", step_size=0.1, jump_t=[0.3, 0.7], adjoint=adjoint)
        solution = solve(func, random(3), t, **options)
        solution.y.sum().backward()
        steps = round(abs(ends[-1] - ends[0]) / 0.1)
        assert steps <= solution.statistics.forward.num_accepted <= steps + 2
        exact = solve(func, random(3), t, rtol=1e-9, atol=1e-9).y
        torch.testing.assert_close(solution.y, exact, rtol=1e-4, atol=1e-4)


def test_a_failure_backwards_says_so():
    y = solve(Network(), random(4, 3), T).y
    y.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(SolverError, match=r"^in the backward solve the state is not finite at t = 2"):
        y.sum().backward()


@pytest.mark.parametrize("step_size", [1e-12, 5e-324])
def test_fixed_steps_that_are_too_many_are_refused_before_they_fill_the_memory(step_size):
    with pytest.raises(SolverError, match="more than 100000 steps were attempted, by fixed steps"):
        solve(Network(), random(3), T, method="euler", step_size=step_size)


def test_a_limit_of_steps_is_for_each_stretch_between_output_times():
    t = torch.linspace(0, 3, 5, dtype=F64)

    def backward_attempts(**options):
        solution = solve(Network(), random(4, 3).requires_grad_(), t, **options)
        solution.y.sum().backward()
        return solution.statistics.backward.num_accepted + solution.statistics.backward.num_rejected

    total = backward_attempts()
    assert backward_attempts(adjoint_options=dict(max_num_steps=total - 1)) == total


def test_a_backward_solve_of_the_other_kind_of_method_leaves_out_options_that_it_lacks():
    solution = solve(Network(), random(3).requires_grad_(), T, first_step=0.1, adjoint_method="rk4")
    solution.y.sum().backward()
    assert solution.statistics.backward.num_accepted == 2


def test_the_largest_step_may_be_infinite():
    found, expected = (solve(Network(), random(3), T, **options).y for options in (dict(max_step=math.inf), {}))
    assert torch.equal(found, expected)
