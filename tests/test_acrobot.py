import functools

import pytest
import torch
import torchdiffeq
from problems import F64, Plain, distance, random, solve
from torch import nn

import acrobot
from benchmarks.published_field import PublishedField
from datasets.acrobot import TIMES, load
from fields.softplus_networks import SlopeNetwork
from fields.symplectic_dynamics import SymplecticDynamics
from torchadjoint import Backsolve, Discrete
from torchadjoint.field import AutogradField
from torchadjoint.norms import Sizes, block_norm, seminorm

NUM_PARAMETERS = 509_108


@pytest.fixture(scope="module")
def vector_field():
    torch.manual_seed(0)
    return acrobot.SymplecticVectorField().double()


def states(batch, dtype=F64):
    angles = 3 * random(batch, 2, seed=1)
    return torch.cat([angles.cos(), angles.sin(), random(batch, 4, seed=2)], dim=-1).to(dtype)


def windows(batch, dtype=F64):
    """Targets that stand still: of the right shape, and at some distance from what the model predicts."""
    return states(batch, dtype).unsqueeze(1).repeat(1, 8, 1)


def fused_and_generic(vector_field, y):
    generic = AutogradField(vector_field, tuple(vector_field.parameters()), y.shape, time_gradient=False)
    return vector_field.fused_field(y), generic


def test_parameter_count():
    assert sum(parameter.numel() for parameter in acrobot.SymplecticODENet(solve=None).parameters()) == NUM_PARAMETERS


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
def test_the_field_is_the_published_formula(vector_field, batch, dtype, tolerance):
    network = acrobot.SymplecticVectorField().to(dtype)
    network.load_state_dict(vector_field.state_dict())
    y = states(batch, dtype)
    expected = PublishedField(network)(None, y).detach()
    fused = torch.empty_like(y)
    network.fused_field(y).evaluate(0.0, y, fused)
    torch.testing.assert_close(network(None, y).detach(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 5])
def test_products_by_hand_equal_those_of_autograd(vector_field, batch):
    y, cotangent = states(batch), random(batch, 8, seed=3)
    outcomes = []
    for field in fused_and_generic(vector_field, y):
        derivative, product = torch.empty_like(y), torch.empty_like(y)
        gradient = torch.ones(NUM_PARAMETERS, dtype=F64)
        for slot in (0, 6, 2):
            field.linearise(slot, 0.0, y, derivative)
            field.pullback(slot, cotangent, product)
        field.reuse_slot(6)
        for slot, weight in ((0, 0.3), (2, -2.0)):
            field.add_parameter_product(slot, weight, gradient)
        outcomes.append((derivative, product, gradient, torch.cat([g.reshape(-1) for g in field.unflatten(gradient)])))
    for ours, theirs in zip(*outcomes, strict=True):
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("linearised", ["solve", "stage"])
def test_a_whole_solve_has_the_gradient_of_autograd(vector_field, batch, linearised):
    y0, times = states(batch).requires_grad_(), torch.linspace(0, 0.2, 4, dtype=F64)
    gradients = []
    for func in (vector_field, Plain(vector_field)):
        y = solve(func, y0, times, rtol=1e-4, atol=1e-4, adjoint=Discrete(linearised=linearised)).y
        of_each = torch.autograd.grad(y.square().sum(), [y0, *func.parameters()])
        gradients.append(torch.cat([gradient.reshape(-1) for gradient in of_each]))
    assert distance(*gradients) < 1e-12


def test_slopes_of_the_potential_and_their_products(vector_field):
    """The gradient by hand, its products with the inputs and with every parameter, against autograd twice."""
    batch, layers = 5, vector_field.potential.layers
    network = SlopeNetwork(layers, scratch=torch.empty(2 * batch * 300, dtype=F64))
    inputs, cotangent = random(4, 3, batch, seed=4).requires_grad_(), random(2, batch, seed=5)
    value, *directions = inputs.unbind(1)
    hidden = (layers[0].weight @ value + layers[0].bias[:, None]).exp().log1p()
    hidden = (layers[1].weight @ hidden + layers[1].bias[:, None]).exp().log1p()
    (slopes,) = torch.autograd.grad((layers[2].weight @ hidden).sum(), value, create_graph=True)
    expected = torch.stack([(direction * slopes).sum(dim=0) for direction in directions])
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    by_inputs, *by_parameters = torch.autograd.grad(expected, (inputs, *parameters), cotangent, materialize_grads=True)

    negated, kept = -inputs.detach().flatten(1), network.new_kept(batch)
    assert distance(-network.evaluate(negated, kept), expected.detach()) < 1e-12
    assert distance(network.pullback(cotangent, negated, kept), by_inputs.flatten(1)) < 1e-12
    gradients = [torch.ones_like(parameter) for parameter in by_parameters]
    network.add_parameter_product(kept, -0.7, gradients)
    for ours, theirs in zip(gradients, by_parameters, strict=True):
        assert distance(ours, 1 + 0.7 * theirs) < 1e-12


def test_product_of_the_equations_by_hand():
    batch = 5
    y, factor, forces = states(batch).T, random(3, 3, batch, seed=4), random(2, batch, seed=5)
    inputs = [tensor.requires_grad_() for tensor in (y, factor, forces)]
    cotangent = random(8, batch, seed=6)
    dynamics = SymplecticDynamics(*inputs)
    expected = torch.autograd.grad(dynamics.derivative, inputs, cotangent)
    with torch.no_grad():
        for ours, theirs in zip(dynamics.pullback(cotangent), expected, strict=True):
            assert distance(ours, theirs) < 1e-12
        assert torch.equal(SymplecticDynamics(y, -factor, forces).derivative, dynamics.derivative)


@pytest.mark.parametrize("bias", [200.0, -200.0])
def test_activations_at_which_sigmoid_underflows(vector_field, bias):
    network = acrobot.SymplecticVectorField()
    network.load_state_dict(vector_field.state_dict())
    with torch.no_grad():
        network.potential.layers[0].bias.fill_(bias)
        network.potential.layers[1].weight.mul_(0.01)
    y, cotangent = states(3, torch.float32), random(3, 8, seed=3, dtype=torch.float32)
    outcomes = []
    for field in fused_and_generic(network, y):
        value, derivative, product = (torch.empty_like(y) for _ in range(3))
        gradient = torch.zeros(NUM_PARAMETERS)
        field.evaluate(0.0, y, value)
        field.linearise(1, 0.0, y, derivative)
        field.pullback(1, cotangent, product)
        field.add_parameter_product(1, 1.0, gradient)
        outcomes.append((value, derivative, product, gradient))
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_torques_are_constant_and_angles_stay_on_the_circle(vector_field):
    y = states(4)
    derivative = vector_field(None, y)
    assert torch.equal(derivative[:, 6:], torch.zeros(4, 2, dtype=F64))
    radial = (y[:, :4] * derivative[:, :4]).view(4, 2, 2).sum(dim=1)
    assert radial.abs().max() < 1e-14


def test_without_torque_the_learnt_energy_is_conserved(vector_field):
    def energy(y):
        l11, l22, l21 = vector_field.factor(y[None, :, :4])[0].unbind(-1)
        zero = torch.zeros_like(l11)
        factor = torch.stack([l11, zero, l21, l22], dim=-1).unflatten(-1, (2, 2))
        inverse_mass = factor @ factor.mT + 0.1 * torch.eye(2, dtype=F64)
        velocities = y[:, 4:6, None]
        kinetic = (velocities.mT @ torch.linalg.solve(inverse_mass, velocities)).flatten() / 2
        return kinetic + vector_field.potential(y[None, :, :4])[0, :, 0]

    y = torch.cat([states(5)[:, :6], torch.zeros(5, 2, dtype=F64)], dim=-1).requires_grad_()
    (slope,) = torch.autograd.grad(energy(y).sum(), y)
    assert ((slope * vector_field(None, y)).sum(dim=-1)).abs().max() < 1e-12


def gradient(model, window, **options):
    model.zero_grad()
    model.solve = functools.partial(solve, rtol=1e-4, atol=1e-4, **options)
    prediction, statistics = model(window)
    nn.functional.mse_loss(prediction, window).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]), statistics


@pytest.fixture(scope="module")
def model(vector_field):
    network = acrobot.SymplecticODENet(solve=None).double()
    network.vector_field.load_state_dict(vector_field.state_dict())
    return network


@pytest.mark.parametrize("adjoint", ["seminorm", "default", "per-tensor", "as-published"])
def test_the_whole_gradient_and_all_counts_equal_torchdiffeqs(model, adjoint):
    window = windows(3)
    theirs, their_statistics = gradient(model, window, adjoint=adjoint, solver="torchdiffeq")
    ours, our_statistics = gradient(model, window, adjoint=adjoint)
    assert distance(ours, theirs) < 1e-9
    assert our_statistics.forward.nfe == their_statistics.forward.nfe
    assert our_statistics.backward.nfe == their_statistics.backward.nfe


def test_discrete_gradients_are_the_same_whatever_is_kept(model):
    window = windows(3)
    usual, _ = gradient(model, window, adjoint="discrete")
    for linearised in ("stage", "solve"):
        other, _ = gradient(model, window, adjoint=Discrete(linearised=linearised))
        assert distance(other, usual) < 1e-12


def test_warm_starts_halve_the_backward_solve(model):
    window = windows(3)
    cold, cold_statistics = gradient(model, window, adjoint="seminorm")
    warm, warm_statistics = gradient(model, window, adjoint=Backsolve(warm_start=True))
    assert warm_statistics.backward.nfe <= 50 < cold_statistics.backward.nfe
    assert distance(warm, cold) < 1e-3


def test_only_the_published_norm_and_warm_starts_save_anything_on_real_windows(model):
    """7 segments of 14 evaluations under both true norms, of 8 under the published one, of 7 with a warm start."""
    data = load(batch_size=64, device="cpu", generator=None, num_trajectories=7)
    window = data.train.tensors[0][::14][:64].double()
    runs = {name: gradient(model, window, adjoint=name) for name in ("default", "seminorm", "as-published")}
    runs["warm"] = gradient(model, window, adjoint=Backsolve(warm_start=True))
    counts = {name: statistics.backward.nfe for name, (_, statistics) in runs.items()}
    assert counts == {"default": 98, "seminorm": 98, "as-published": 56, "warm": 49}
    for name in ("default", "as-published", "warm"):
        assert distance(runs[name][0], runs["seminorm"][0]) < 1e-4


def test_the_published_norm_takes_the_window_for_the_state(model, monkeypatch):
    """Seen through the model: two blocks of the size of a window, of which only a quarter of the first is the state."""
    batch, received = 3, []
    original = torchdiffeq.odeint_adjoint

    def spied(*arguments, adjoint_options, **keywords):
        norm = adjoint_options["norm"]

        def spy(adjoint_state):
            received.append((tuple(tensor.clone() for tensor in adjoint_state), norm(adjoint_state)))
            return received[-1][1]

        return original(*arguments, adjoint_options=adjoint_options | dict(norm=spy), **keywords)

    monkeypatch.setattr(torchdiffeq, "odeint_adjoint", spied)
    gradient(model, windows(batch), adjoint="as-published", solver="torchdiffeq")
    (time, z, adjoint, *parameters), value = received[-1]
    size = batch * 8
    assert (time.numel(), z.numel(), adjoint.numel()) == (1, size, size)
    assert sum(parameter.numel() for parameter in parameters) == NUM_PARAMETERS
    flat = torch.cat([tensor.reshape(-1) for tensor in (time, z, adjoint, *parameters)])
    first, second = flat[1 : 1 + 8 * size], flat[1 + 8 * size : 1 + 16 * size]
    assert value.item() == pytest.approx(max(first.square().mean().sqrt(), second.square().mean().sqrt()).item())
    # The true seminorm does not see the parameters at all.
    blocks = seminorm(Sizes([size], [NUM_PARAMETERS], 8 * size))
    perturbed = flat[1:].clone()
    perturbed[2 * size :] += 1e6
    assert torch.equal(block_norm(perturbed, blocks), block_norm(flat[1:], blocks))


def test_prediction_starts_at_the_first_point(model):
    model.solve = functools.partial(solve, rtol=1e-4, atol=1e-4)
    window = windows(2)
    prediction, statistics = model(window)
    assert prediction.shape == (2, len(TIMES), 8)
    assert torch.equal(prediction[:, 0], window[:, 0])
    assert statistics.forward.nfe > 0
