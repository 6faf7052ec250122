"""Each example learns something in a few steps, and what it computes holds."""

import pytest
import torch
from problems import F64

from examples import flow, flow_matching, neural_cde, neural_ode


def test_the_neural_ode_comes_near_the_spiral():
    assert neural_ode.main(num_steps=60) < 0.1 < neural_ode.main(num_steps=1)


def test_the_neural_cde_tells_the_spirals():
    assert neural_cde.main(num_steps=15) > 0.9


def test_the_flow_learns_a_density():
    first, _ = flow.main(num_steps=1)
    last, total = flow.main(num_steps=15)
    assert last < first - 0.2
    assert total == pytest.approx(1, abs=0.01)


def test_the_gradient_of_a_likelihood_points_up():
    before, after = flow_matching.main(num_steps=50)
    assert after > before


def test_the_gradient_of_a_likelihood_is_that_of_finite_differences():
    model = flow.Flow(width=8).double()
    x, direction = torch.randn(2, 5, 2, dtype=F64)
    options = dict(rtol=1e-9, atol=1e-9)
    _, gradient = flow_matching.likelihood_gradient(model, x, **options)
    with torch.no_grad():
        ahead, behind = (model.log_density(x + shift * direction, **options).mean() for shift in (1e-4, -1e-4))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-4, rel=1e-5)


@pytest.mark.parametrize("example", [neural_ode, neural_cde, flow, flow_matching], ids=lambda example: example.__name__)
def test_an_example_gives_the_same_again(example):
    first = example.main(num_steps=2)
    torch.randn(3)
    assert example.main(num_steps=2) == first
