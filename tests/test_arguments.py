"""What the checks of arguments let pass, and the sentences that they end in; the fuzz tests look for more."""

import re
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from problems import F64, Growth, Network, random, solve

from common.config import _checked_path
from torchadjoint import SolverError, arguments

T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)


def test_numbers_of_other_libraries_become_pythons():
    assert arguments.number("rtol", numpy.float32(0.5)) == 0.5
    assert arguments.number("rtol", Fraction(1, 4)) == 0.25
    assert type(arguments.whole_number("seed", numpy.int64(3))) is type(arguments.whole_number("seed", 3.0)) is int
    assert arguments.flag("save", numpy.True_) is True


def test_paths_become_strings(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert _checked_path("results_dir", Path("a", "b")) == _checked_path("results_dir", b"a/b") == "a/b"
    assert _checked_path("results_dir", "~/runs") == "/home/me/runs"


@pytest.mark.parametrize(
    ("check", "value", "sentence"),
    [
        (arguments.number, 10**400, "x is 1000"),
        pytest.param(arguments.number, 10**5000, "x is a very long int, but must be a finite number", id="digits"),
        (arguments.number, True, "x is True, but must be a finite number above 0"),
        (arguments.whole_number, 10**25, "x is 10000000000000000000000000, but must be at most 9223372036854775807"),
        (arguments.whole_number, float("inf"), "x is inf, but must be at most"),
        (arguments.whole_number, 2.5, "x is 2.5, but must be a whole number of at least 1"),
        (arguments.flag, "no", "x is 'no', but must be True or False"),
        (arguments.flag, 1, "x is 1, but must be True or False"),
        (_checked_path, "", "x is '', but must be the path of a folder"),
        (_checked_path, None, "x is None, but must be the path of a folder"),
        (_checked_path, "a\0b", r"x is 'a\x00b', but must be the path of a folder"),
        (_checked_path, "\ud800", r"x is '\ud800', but must be the path of a folder"),
        (_checked_path, "x" * 9999, "xxx..., but must be the path of a folder"),
        (arguments.flag, torch.ones(2, 2), "x is tensor([[1., 1.], [1., 1.]]), but"),
    ],
)
def test_what_is_refused_is_named(check, value, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check("x", value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"func": 3}, "func is 3, but must be a function of t and y"),
        ({"y0": ()}, "y0 is (), but must be a tensor or a tuple of tensors"),
        ({"y0": torch.ones(0, 3)}, "y0 is a tensor of shape (0, 3), dtype torch.float32 on cpu, but must be dense and"),
        ({"y0": torch.ones(3).to_sparse()}, "of layout torch.sparse_coo, but must be dense and have entries"),
        ({"y0": torch.ones(3, device="meta")}, "dtype torch.float32 on meta, but must be dense and have entries"),
        ({"y0": (torch.ones(3), torch.ones(3, dtype=F64))}, "the tensors of y0 must have one dtype and one device"),
        (
            {"t": torch.tensor([0.0, 1e300], dtype=F64)},
            "t is [0.0, 1e+300], but must be finite and strictly",
        ),
        ({"rtol": 1e300}, "rtol is 1e+300, but must be at most 3.4e+36"),
        ({"rtol": None}, "rtol is None, but must be a finite number above 0"),
        ({"first_step": 1e39}, "first_step is 1e+39, but must be at most 3.4e+36"),
        ({"perturb": True}, "perturb is given, but the method 'dopri5' chooses its steps by their error"),
        ({"jump_t": 0.5}, "jump_t is 0.5, but must be a list of times"),
        ({"jump_t": ["soon"]}, "jump_t is ['soon'], but must be a list of times"),
        ({"jump_t": [0.5, float("nan")]}, "jump_t is [0.5, nan], but must be finite"),
        ({"adjoint_params": torch.ones(2, requires_grad=True)}, "but must be a sequence of tensors, such as (weight,)"),
        ({"adjoint_params": ["w"]}, "adjoint_params is ['w'], but must be a sequence of tensors, but a str is in it"),
        (
            {"adjoint_params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]},
            "a parameter is a tensor of shape (2,), dtype torch.complex64 on cpu, but must be dense and real",
        ),
        (
            {"func": lambda t, y: 0.0, "adjoint_params": ()},
            "the vector field returned a float for a state",
        ),
        ({"func": lambda t, y: 1j * y, "adjoint_params": ()}, "returned a tensor of torch.complex64 and torch.strided"),
    ],
)
@pytest.mark.parametrize("solver", ["torchadjoint", "torchdiffeq"])
def test_bad_arguments_of_a_solve_are_named(changes, sentence, solver):
    given = {"func": Network(dtype=torch.float32), "y0": torch.ones(3), "t": T, "solver": solver, **changes}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        solve(given.pop("func"), given.pop("y0"), given.pop("t"), **given)


def test_repeated_jumps_are_one():
    once, twice = (solve(Growth(), random(3), T, jump_t=jumps, solver="torchdiffeq").y for jumps in ([0.5], [0.5, 0.5]))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("solver", ["torchadjoint", "torchdiffeq"])
@pytest.mark.parametrize("times", [T, T.flip(0)])
def test_too_many_steps_are_an_error_in_both_directions(solver, times):
    options = dict(rtol=1e-9, atol=1e-9, solver=solver)
    with pytest.raises(SolverError, match=r"more than 3 steps were attempted at t = [0-9.]+"):
        solve(Growth(), random(3), times, max_num_steps=3, **options)
    forward = solve(Growth(), random(3), times, **options).statistics.forward
    most = forward.num_accepted + forward.num_rejected
    tight = dict(adjoint_rtol=1e-13, adjoint_atol=1e-13)
    y = solve(Growth(), random(3).requires_grad_(), times, max_num_steps=most, **tight, **options).y
    with pytest.raises(SolverError, match=f"more than {most} steps were attempted"):
        y.sum().backward()
