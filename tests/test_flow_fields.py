"""The field of a flow written for the solver computes what autograd does, with its products, and so do its solves."""

import gc
import sys
import threading

import pytest
import torch
from problems import Plain, random
from torch import nn
from torch.nn.utils import parametrize, prune

from fields.concatsquash import ConcatSquashField
from fields.convolutions import ConvolutionsField
from flows.continuous import FlowField
from flows.networks import ConcatSquash, Convolutions
from torchadjoint import ADJOINTS, Discrete, solve

WAYS = [*sorted(ADJOINTS.keys() - {"as-published"}), Discrete(linearised="solve"), Discrete(linearised="stage")]
TIMES = torch.tensor([0.0, 0.5], dtype=torch.float64)


def make(shape=(3,), activation="tanh", is_estimated=False, batch=5, widths=(7, 6)):
    """Of points, or of images if their shape has channels, height and width."""
    torch.manual_seed(0)
    if len(shape) == 3:
        network = Convolutions(shape[0], width=4).double()
    else:
        network = ConcatSquash([*shape, *widths, *shape], activation).double()
    return FlowField(network, random(batch, *shape).sign() if is_estimated else None)


CASES = [
    dict(shape=shape, activation=activation, is_estimated=is_estimated)
    for shape, activation in (
        ((1,), "tanh"),
        ((3,), "tanh"),
        ((1,), "softplus"),
        ((3,), "softplus"),
        ((1, 4, 5), "softplus"),
        ((2, 3, 3), "softplus"),
    )
    for is_estimated in (False, True)
]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halve(layer):
    parametrize.register_parametrization(layer, "weight", Halved())


@pytest.mark.parametrize("change", [halve, lambda layer: prune.random_unstructured(layer, "weight", amount=0.5)])
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_network_whose_weights_are_computed_goes_through_autograd(adjoint, change):
    func, x = make((2, 3, 3)), random(5, 2, 3, 3)
    change(func.network.layers[1])
    gradients = []
    for each in (func, Plain(func)):
        loss = solve(each, (x, x.new_zeros(5)), TIMES, rtol=1e-6, atol=1e-6, adjoint=adjoint).y[0].square().sum()
        gradients.append(torch.autograd.grad(loss, [*func.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_values_and_products_are_those_of_autograd(case):
    func, t = make(**case), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = random(5, *case["shape"]).requires_grad_()
    cotangent = (random(5, *case["shape"]), random(5))
    velocity, divergence = func(t, (x, x.new_zeros(5)))
    loss = (velocity * cotangent[0]).sum() + (divergence * cotangent[1]).sum()
    by_x, by_time, *by_parameters = torch.autograd.grad(loss, [x, t, *func.parameters()])

    field, state = func.fused_field((x, x.new_zeros(5))), (x.detach(), random(5))
    out, product = ((torch.empty_like(x), torch.empty(5).double()) for _ in range(2))
    field.evaluate(0.3, state, out)
    torch.testing.assert_close(out, (velocity, divergence))
    field.linearise(0, 0.1, state, out)
    field.linearise(2, 0.3, state, out)
    field.pullback(2, cotangent, product)
    torch.testing.assert_close(product, (by_x, torch.zeros(5).double()))
    gradient = torch.zeros(sum(field.parameter_sizes) + 1).double()
    field.add_parameter_product(2, -0.5, gradient)
    torch.testing.assert_close(gradient[-1], -0.5 * by_time)
    torch.testing.assert_close(field.unflatten(gradient[:-1]), tuple(-0.5 * each for each in by_parameters))
    without_time = torch.zeros(sum(field.parameter_sizes)).double()
    field.reuse_slot(2)
    field.add_parameter_product(0, -0.5, without_time)
    torch.testing.assert_close(without_time, gradient[:-1])


@pytest.mark.parametrize("is_estimated", [False, True])
@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)], ids=["points", "images"])
@pytest.mark.parametrize("adjoint", WAYS, ids=str)
def test_solves_and_gradients_are_those_of_autograd(adjoint, shape, is_estimated):
    found = []
    for wrap in (Plain, lambda func: func):
        func = make(shape, is_estimated=is_estimated)
        x = random(5, *shape).requires_grad_()
        solution = solve(wrap(func), (x, x.new_zeros(5)), TIMES, rtol=1e-5, atol=1e-5, adjoint=adjoint)
        points, changes = solution.y
        (points[-1].pow(3).sum() + (changes[-1] * torch.arange(5)).sum()).backward()
        counted = (solution.statistics.forward.nfe, solution.statistics.backward.nfe)
        found.append((counted, points, changes, x.grad, *(parameter.grad for parameter in func.parameters())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_buffers_that_solves_hand_on_are_of_one_size_and_few_and_those_of_inference_mode_stay_there():
    func, options = make(), dict(rtol=1e-4, atol=1e-4, adjoint=Discrete(linearised="solve"))
    with torch.inference_mode():
        solve(func, (random(5, 3), torch.zeros(5).double()), TIMES, **options)
    for batch in (5, 6, 5):
        x = random(batch, 3).requires_grad_()
        solve(func, (x, x.new_zeros(batch)), TIMES, **options).y[0].sum().backward()
    _, spare = func.network.spare_slots.latest
    assert 0 < len(spare) <= 16
    assert {slot.points.shape[0] for slot in spare} == {5}


@pytest.mark.parametrize(
    ("shape", "kind"), [((2,), ConcatSquashField), ((1, 2, 2), ConvolutionsField)], ids=["points", "images"]
)
def test_gradients_of_a_solve_pass_gradcheck(shape, kind):
    func = make(shape, batch=3)

    def end(x):
        points, changes = solve(func, (x, x.new_zeros(3)), TIMES, rtol=1e-10, atol=1e-10, adjoint="discrete").y
        return points[-1], changes[-1]

    assert isinstance(func.fused_field((random(3, *shape), random(3))), kind)
    torch.autograd.gradcheck(end, random(3, *shape).requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("shape", [(3,), (1, 3, 3)], ids=["points", "images"])
def test_large_values_saturate_without_nan(shape, activation):
    func = make(shape, activation)
    x = 1e6 * random(5, *shape)
    out = (torch.empty_like(x), torch.empty(5).double())
    field = func.fused_field((x, random(5)))
    field.linearise(0, 0.5, (x, random(5)), out)
    product = (torch.empty_like(x), torch.empty(5).double())
    field.pullback(0, (x, random(5)), product)
    assert all(tensor.isfinite().all() for tensor in (*out, *product))


def test_an_estimate_after_an_exact_divergence_takes_buffers_of_its_own():
    func, x = make(), random(5, 3)
    state = (x, x.new_zeros(5))
    with torch.no_grad():
        solve(func, state, TIMES)
        func.probe = random(5, 3, seed=1).sign()
        found, expected = (solve(each, state, TIMES).y[1] for each in (func, Plain(func)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjoint", WAYS, ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 3, 3)], ids=["points", "images"])
def test_autocast_does_not_reach_a_field_written_for_the_solver(adjoint, shape):
    found = []
    for is_cast in (False, True):
        func = make(shape).float()
        x = random(5, *shape).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            points, _ = solve(func, (x, x.new_zeros(5)), TIMES.float(), rtol=1e-3, atol=1e-3, adjoint=adjoint).y
        points[-1].pow(3).sum().backward()
        found.append((points.detach(), x.grad, *(parameter.grad for parameter in func.parameters())))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", [(8,), (4, 3, 3)], ids=["points", "images"])
def test_a_network_that_has_a_layer_twice_goes_through_autograd(shape):
    func = make(shape, widths=(8, 8))
    if len(shape) == 1:
        func.network.weights[2] = func.network.weights[1]
    else:
        func.network.layers[2] = func.network.layers[1]
    assert not hasattr(func, "fused_field")
    x = random(5, *shape).requires_grad_()
    solve(func, (x, x.new_zeros(5)), TIMES, rtol=1e-3, atol=1e-3).y[0].sum().backward()
    assert x.grad.any()


def test_a_probe_that_is_replaced_is_the_one_that_is_solved_by():
    func = make(is_estimated=True)
    for seed in (1, 2):
        func.probe = random(5, 3, seed=seed).sign()
        with torch.no_grad():
            ours, plain = (
                solve(field, (random(5, 3), random(5)), TIMES, rtol=1e-8, atol=1e-8).y[1]
                for field in (func, Plain(func))
            )
        torch.testing.assert_close(ours, plain)


def test_buffers_stay_few_however_many_solves_are_kept():
    func, options = make(), dict(rtol=1e-5, atol=1e-5, adjoint=Discrete(linearised="solve"))
    x = random(5, 3).requires_grad_()
    kept = [solve(func, (x, x.new_zeros(5)), TIMES, **options) for _ in range(2)]
    sum(solution.y[0].sum() for solution in kept).backward()
    del kept
    gc.collect()
    _, spare = func.network.spare_slots.latest
    assert 0 < len(spare) <= 16


def test_threads_share_a_network():
    func, errors = make(widths=(4,)), []

    def gradient(batch):
        x = random(batch, 3).requires_grad_()
        y = solve(func, (x, x.new_zeros(batch)), TIMES, rtol=1e-3, atol=1e-3).y
        return torch.autograd.grad(y[0].sum(), x)[0]

    def work(batch):
        try:
            for _ in range(10):
                assert torch.equal(gradient(batch), expected[batch])
        except Exception as error:
            errors.append(error)

    expected = {batch: gradient(batch) for batch in (5, 6)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(batch,)) for batch in (5, 6, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'Tanh', but must be 'tanh' or 'softplus'"):
        ConcatSquash([2, 3, 2], "Tanh")
