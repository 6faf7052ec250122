"""What `solve` refuses, each in a sentence."""

import pytest
import torch
from problems import (
    INCREASING,
    Network,
    T,
    differentiate,
    distance,
    random,
    solve,
)
from torch import nn

import torchadjoint
from torchadjoint import Backsolve, Discrete

NET, Y0 = Network(), random(2, 3)


def bad(*arguments, match, **options):
    return pytest.param(arguments, options, match, id=match)


class OfAnotherShape(nn.Module):
    def forward(self, t, y):
        return torch.zeros(4, 3) if isinstance(y, torch.Tensor) else (y[0],)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        bad(NET, Y0, torch.zeros(2, 2), match=r"t must be a floating-point tensor of shape \(times,\).*\(2, 2\)"),
        bad(NET, Y0, torch.tensor(1.0), match=r"a time or more.*\(\)"),
        bad(
            NET, Y0, T, adjoint_options=dict(norm=max), match=r"adjoint_options names a norm: name it by adjoint=Backs"
        ),
        bad(NET, Y0, torch.tensor([0, 1]), match=r"floating-point tensor.*int64"),
        bad(NET, Y0, [0.0, 1.0], match=r"floating-point tensor.*list"),
        bad(NET, Y0, T[[0, 2, 1]], match=r"t is \[0.0, 2.0, 1.0\], but must be finite and strictly increasing"),
        bad(NET, Y0, T[[0, 1, 1]], match=r"t is \[0.0, 1.0, 1.0\], but must be finite and strictly increasing"),
        bad(NET, Y0, T / 0, match="must be finite and strictly increasing"),
        bad(NET, Y0, torch.tensor([0.0, torch.inf]), match=r"t is \[0.0, inf\], but must be finite and strictly"),
        bad(NET, Y0, T, rtol=0.0, match="rtol is 0.0, but must be a finite number above 0"),
        bad(NET, Y0, T, atol=-1e-3, match="atol is -0.001"),
        bad(NET, Y0, T, atol=torch.inf, match="atol is inf"),
        bad(NET, Y0, T, rtol=torch.nan, match="rtol is nan"),
        bad(NET, Y0, T, rtol="1e-3", match="rtol is '1e-3'"),
        bad(NET, Y0, T, adjoint_rtol=0, match="adjoint_rtol is 0"),
        bad(NET, Y0, T, adjoint_atol=-1, match="adjoint_atol is -1"),
        bad(NET, Y0, T, first_step=0.0, match="first_step is 0.0"),
        bad(NET, Y0, T, ifactor=0.5, match="ifactor is 0.5"),
        bad(NET, Y0, T, max_num_steps=0, match="max_num_steps is 0"),
        bad(NET, Y0, T, max_step=torch.ones(3), match=r"max_step is tensor\(\[1., 1., 1.\]\), but must be"),
        bad(NET, Y0, T, adjoint_atol=torch.ones(3), solver="torchdiffeq", match="no tensors as tolerances"),
        bad(
            NET,
            Y0,
            T,
            adjoint=Backsolve(warm_start=True),
            adjoint_options=dict(first_step=0.1),
            match="warm_start is True, and adjoint_options have a first_step.*: .*leave out one of them",
        ),
        bad(
            NET,
            Y0,
            T,
            adjoint=Backsolve("default", warm_start=True),
            first_step=0.1,
            adjoint_options=dict(first_step=0.2),
            match="warm_start is True, and adjoint_options have a first_step",
        ),
        bad(NET, Y0, T, warm_start=True, match="unknown option 'warm_start': use one of 'first_step'"),
        bad(NET, Y0, T, adjoint="l2", match="adjoint is 'l2', but must be one of 'default'"),
        bad(
            NET,
            Y0,
            T,
            adjoint=Discrete,
            match="Discrete'>, but must be one of 'default'",
        ),
        bad(
            NET,
            Y0,
            T,
            solver="torchdiffeq",
            adjoint=Backsolve(warm_start=True),
            match="no warm_start.*: use solver='torchadjoint'",
        ),
        bad(NET, Y0, T, compile="yes", match="compile is 'yes', but must be True or False"),
        bad(NET, Y0, T, compile=True, adjoint="default", match="compile=True needs adjoint='seminorm' or .*'discrete'"),
        bad(NET, Y0, T, compile=True, adjoint=Discrete(2), match="checkpoint_interval=2.*, but compile=True keeps"),
        bad(NET, Y0, T, compile=True, adjoint=Discrete(linearised="solve"), match="linearised='solve'.*, but compile="),
        bad(NET, Y0, T, compile=True, solver="torchdiffeq", match="no compile.*: use solver='torchadjoint'"),
        bad(NET, Y0, T, compile=True, adjoint_params=(), match="compile=True needs no adjoint_params"),
        bad(NET, Y0.long(), T, match="y0 is of dtype torch.int64, but must be float32 or float64"),
        bad(NET, Y0.half(), T, match="y0 is of dtype torch.float16"),
        bad(NET, [Y0], T, match=r"y0 is \[tensor.*, but must be a tensor or a tuple"),
        bad(lambda t, y: y, Y0, T, match="func is no nn.Module.*adjoint_params"),
        bad(OfAnotherShape(), Y0, T, match=r"returned shape \(4, 3\) for a state of shape \(2, 3\)"),
        bad(
            OfAnotherShape(),
            (Y0, Y0),
            T,
            match=r"returned \(tensor.* for a state of 2 tensors: it must return a tuple of as many",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        solve(*arguments, **options)


def test_a_wrong_number_of_arguments_is_said_of_the_function_that_was_called():
    with pytest.raises(TypeError, match=r"^solve\(\) takes 3 positional arguments but 4 were given"):
        torchadjoint.solve(NET, Y0, T, 1e-3)
    with pytest.raises(TypeError, match=r"^solve\(\) missing 1 required positional argument: 't'"):
        torchadjoint.solve(NET, Y0)


def test_what_only_a_backward_solve_needs_is_asked_for_by_none_without_gradient():
    with torch.no_grad():
        forward = [
            solve(Network(), random(100, 3), INCREASING, **options).y
            for options in (dict(adjoint="as-published"), dict(rtol=torch.full((3,), 1e-7)), {})
        ]
    assert torch.equal(forward[0], forward[2])
    assert distance(forward[1], forward[2]) < 1e-9


def test_as_published_is_refused_where_its_blocks_do_not_fit():
    with pytest.raises(ValueError, match="as-published"):
        differentiate(Network(), random(100, 3), INCREASING, rtol=1e-3, atol=1e-3, adjoint="as-published")
