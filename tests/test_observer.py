"""An observer is told of every attempted step, before and after; callbacks of the field besides."""

import pytest
import torch
from problems import F64, Network, Pair, random

from torchadjoint import solve

T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)


def observed(adjoint="default", func=None, y0=None, **options):
    """What an observer notes of a solve and its gradient, and the statistics."""
    notes = []

    def note(attempt):
        state = attempt.state if attempt.is_accepted is None else None
        notes.append((attempt.direction, attempt.t0, attempt.t1, attempt.dt, attempt.is_accepted, attempt.error_ratio,
                      attempt.errors, state))  # fmt: skip

    y0 = random(4, 3).requires_grad_() if y0 is None else y0
    options = {"rtol": 1e-6, "atol": 1e-6, **options}
    solution = solve(func or Network(), y0, T, adjoint=adjoint, observer=note, **options)
    y = solution.y if isinstance(solution.y, torch.Tensor) else solution.y[0]
    y.sum().backward()
    return notes, solution.statistics


@pytest.mark.parametrize("adjoint", ["default", "seminorm", "discrete"])
def test_every_attempt_is_told_twice_in_order(adjoint):
    notes, statistics = observed(adjoint, first_step=1.0)
    before, after = notes[::2], notes[1::2]
    assert {note[4] for note in before} == {None}
    for first, second in zip(before, after, strict=True):
        assert first[:4] == second[:4]
        assert first[5] is None
        assert first[6] == {}
        assert second[4] == (second[5] <= 1)
    for direction, counted in (("forward", statistics.forward), ("backward", statistics.backward)):
        told = [note for note in after if note[0] == direction]
        assert [note[1] for note in told if note[4]] == counted.accept_times
        assert [note[1] for note in told if not note[4]] == counted.reject_times
    assert statistics.forward.num_rejected > 0
    for note in after:
        assert abs(note[2] - note[1]) == pytest.approx(note[3])


@pytest.mark.parametrize(
    ("adjoint", "parts"), [("default", ["a_t", "a_theta", "a_z", "z"]), ("seminorm", ["a_z", "z"]), ("discrete", [])]
)
def test_errors_are_those_of_the_parts_and_the_largest_is_the_ratio(adjoint, parts):
    notes, _ = observed(adjoint)
    judged = [note for note in notes if note[4] is not None]
    for direction, _, _, _, _, ratio, errors, _ in judged:
        assert sorted(errors) == (["y"] if direction == "forward" else parts)
        assert max(errors.values()) == pytest.approx(ratio)


def test_the_state_is_where_the_step_starts():
    y0 = random(4, 3).requires_grad_()
    notes, _ = observed("seminorm", y0=y0)
    assert torch.equal(notes[0][7], y0.detach().reshape(-1))
    [start, *_] = [note[7] for note in notes if note[0] == "backward" and note[7] is not None]
    assert start.shape == (24,)
    assert torch.equal(start[12:], torch.ones(12, dtype=F64))  # the gradient of the sum


def test_fixed_steps_have_no_error():
    notes, _ = observed("seminorm", method="rk4", step_size=0.5)
    judged = [note for note in notes if note[4] is not None]
    assert [note[3] for note in judged] == [0.5] * 8
    assert all(note[4] and note[5] == 0 and note[6] == {} for note in judged)


def test_an_observer_and_callbacks_hear_of_the_same_steps():
    class Called(Pair):
        def __init__(self):
            super().__init__()
            self.calls = []

        def callback_accept_step(self, t0, state, dt):
            y, z = state
            assert y.shape == (4, 3)
            assert z.shape == (2,)
            self.calls.append((t0.item(), dt.item()))

    func = Called()
    start = tuple(tensor.requires_grad_() for tensor in Pair.start())
    notes, _ = observed("discrete", func=func, y0=start)
    assert func.calls == [(note[1], note[3]) for note in notes if note[4]]


def test_what_is_no_observer_is_refused():
    with pytest.raises(ValueError, match="observer is 3, but must be a function of an Attempt"):
        solve(Network(), random(3), T, observer=3)


def test_each_part_has_its_own_error():
    seen = []
    y = solve(Network(), random(4, 3), T, observer=lambda attempt: seen.append((attempt.direction, attempt.errors))).y
    (0 * y.sum()).backward()
    backward = [errors for direction, errors in seen if direction == "backward" and errors]
    assert backward
    assert all(errors["a_z"] == 0 < errors["z"] for errors in backward)


def test_without_parameters_there_is_no_error_of_theirs():
    class Decay(torch.nn.Module):
        def forward(self, t, y):
            return -y

    seen = []
    y0 = random(3).requires_grad_()
    solve(Decay(), y0, T, adjoint="default", observer=lambda attempt: seen.append(attempt.errors)).y.sum().backward()
    assert all(value == value for errors in seen for value in (errors or {}).values())
    assert not any("a_theta" in (errors or {}) for errors in seen)
