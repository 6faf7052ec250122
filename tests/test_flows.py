"""Flows, their divergences and their densities, against what is known of them exactly."""

import functools
import math
import statistics

import pytest
import torch
from problems import random
from torch import nn

from common.randomness import stream
from flows.continuous import ContinuousFlow, FlowField
from flows.densities import ImageDensity, PointDensity, log_normal
from flows.images import ALPHA, Multiscale, bits_per_dim, dequantise, levels_of, logit
from flows.networks import ConcatSquash, Convolutions
from torchadjoint import solve

TIGHT = functools.partial(solve, rtol=1e-9, atol=1e-9)
POINTS = dict(divergence="automatic", stream=functools.partial(stream, 0), solve=TIGHT)


class Linear(nn.Module):
    """v = A x, whose flow multiplies by exp(A T) and has the log-determinant trace(A) T."""

    def __init__(self, size):
        super().__init__()
        self.matrix = nn.Parameter(random(size, size) / size)

    def forward(self, t, x):
        return (x.flatten(1) @ self.matrix.T).view_as(x)


@pytest.mark.parametrize("is_estimated", [False, True])
def test_a_linear_flow_has_the_trace_times_its_length_as_log_determinant(is_estimated):
    network, x = Linear(3), random(5, 3)
    # Signs along the axes' own directions: of a diagonal matrix the estimate is exact.
    if is_estimated:
        network.matrix.data = network.matrix.data.diag().diag()
    probe = random(5, 3).sign() if is_estimated else None
    end, log_determinant, _ = ContinuousFlow(network, 0.7)(x, probe, TIGHT)
    torch.testing.assert_close(end, x @ torch.matrix_exp(0.7 * network.matrix).T)
    torch.testing.assert_close(log_determinant, (0.7 * network.matrix.trace()).expand(5))


def jacobian(network, t, x):
    """Of one sample, by central differences (entries, entries)."""
    step, columns = 1e-6, []
    for direction in torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape):
        ends = [network(t, (x + sign * step * direction).unsqueeze(0)).detach() for sign in (1, -1)]
        columns.append(((ends[0] - ends[1]) / (2 * step)).flatten())
    return torch.stack(columns, dim=1)


NETWORKS = {
    "tanh": (lambda: ConcatSquash([3, 8, 7, 3], "tanh"), (3,)),
    "softplus": (lambda: ConcatSquash([3, 8, 3], "softplus"), (3,)),
    "convolutions": (lambda: Convolutions(2, 3), (2, 2, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_divergences_are_those_of_finite_differences(name):
    make, shape = NETWORKS[name]
    network, t = make().double(), torch.tensor(0.3, dtype=torch.float64)
    x, probe = random(4, *shape).requires_grad_(), random(4, *shape).sign()
    velocity, exact = FlowField(network, None)(t, (x, x))
    _, estimated = FlowField(network, probe)(t, (x, x))
    torch.testing.assert_close(velocity, network(t, x))
    for number in range(4):
        matrix, signs = jacobian(network, t, x[number].detach()), probe[number].flatten()
        assert exact[number].item() == pytest.approx(matrix.trace().item(), abs=1e-6)
        assert estimated[number].item() == pytest.approx((signs @ matrix @ signs).item(), abs=1e-6)


def test_the_estimate_is_the_trace_in_the_mean():
    network, t = ConcatSquash([6, 8, 6], "tanh").double(), torch.tensor(0.3, dtype=torch.float64)
    x = random(1, 6).expand(20_000, 6)
    probes = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    _, estimates = FlowField(network, probes)(t, (x, x))
    exact = FlowField(network, None)(t, (x[:1], x))[1].item()
    error = estimates.std().item() / len(estimates) ** 0.5
    assert abs(estimates.mean().item() - exact) < 4 * error
    assert estimates.std().item() > 0.01


@pytest.mark.parametrize("end_time", [0.5, 1.0])
def test_a_density_of_points_integrates_to_one(end_time):
    network = ConcatSquash([2, 16, 16, 2], "tanh").double()
    for parameter in network.parameters():
        parameter.data *= 2
    side = torch.linspace(-7, 7, 141, dtype=torch.float64)
    model = PointDensity(ContinuousFlow(network, end_time), 2, **POINTS)
    with torch.no_grad():
        losses, _ = model(torch.cartesian_prod(side, side))
    assert (-losses).exp().sum().item() * (side[1] - side[0]).item() ** 2 == pytest.approx(1, abs=1e-4)


def test_log_normal_is_that_of_the_library():
    x = random(4, 2, 3, 3)
    expected = torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(dim=1)
    torch.testing.assert_close(log_normal(x), expected)
    torch.testing.assert_close(log_normal(*x.split(1, dim=1)), expected)


@pytest.mark.parametrize("num_levels", [17, 256])
def test_a_uniform_model_has_the_logarithm_of_the_levels_as_bits_per_dimension(num_levels):
    """In the unit cube its log density is 0, and that of the logits is the logistic distribution's."""
    torch.testing.assert_close(bits_per_dim(torch.zeros(3), 64, num_levels), torch.full((3,), math.log2(num_levels)))
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    y, log_determinant = logit(x)
    logistic = (nn.functional.logsigmoid(y) + nn.functional.logsigmoid(-y)).flatten(1).sum(dim=1)
    # Apart from ALPHA, which leaves out 2 ALPHA of the line.
    found = bits_per_dim(logistic - 64 * math.log(1 - 2 * ALPHA) + log_determinant, 64, num_levels)
    assert found.tolist() == pytest.approx([math.log2(num_levels)] * 6, abs=1e-5)


def test_the_logit_has_the_slope_that_its_log_determinant_says():
    x = torch.tensor([[0.0], [1e-5], [0.3], [0.999], [1.0]], dtype=torch.float64, requires_grad=True)
    y, log_determinant = logit(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log().flatten(), log_determinant)
    torch.testing.assert_close(y[0], -y[-1])


def test_levels_come_back():
    levels = torch.arange(17, dtype=torch.uint8).view(1, 1, 1, 17)
    for noise in (0.01, 0.5, 0.99):
        y, _ = logit(dequantise(levels, torch.full(levels.shape, noise), 17))
        assert levels_of(y, 17).equal(levels)


@pytest.mark.parametrize("levels", [torch.tensor([[17.0]]), torch.tensor([[-1.0]]), torch.tensor([[math.nan]])])
def test_data_outside_the_unit_cube_are_refused(levels):
    with pytest.raises(ValueError, match="outside the unit cube: give levels from 0 to 16"):
        dequantise(levels, torch.zeros(1, 1), 17)


@pytest.mark.parametrize(("shape", "num_flows"), [((1, 8, 8), 6), ((1, 28, 28), 10), ((3, 32, 32), 14)])
def test_images_have_the_flows_and_parameters_of_ffjord(shape, num_flows):
    flows = Multiscale(shape, 64)
    assert sum(map(len, flows.scales)) == num_flows
    first, *_ = (flow for scale in flows.scales for flow in scale)
    num_parameters = sum(parameter.numel() for parameter in first.parameters())
    ratio = {8: 6.0, 28: 0.49, 32: 0.13}[shape[1]]
    assert num_parameters / (200 * math.prod(shape)) == pytest.approx(ratio, rel=0.03)
    assert sum(map(math.prod, flows.noise_shapes(shape))) == math.prod(shape)


@pytest.mark.parametrize(("shape", "sides"), [((1, 3, 8), "3 x 8"), ((1, 2, 2), "2 x 2"), ((1, 9, 8), "9 x 8")])
def test_images_too_small_for_the_scales_are_refused(shape, sides):
    with pytest.raises(ValueError, match=f"of {sides} pixels, but the flow's scales need sides of at least 4"):
        Multiscale(shape, 4)


def test_a_dimension_too_large_for_the_exact_divergence_is_refused():
    with pytest.raises(ValueError, match="have 784 numbers, and more than 64 are too many for that: take 'estimated'"):
        ImageDensity((1, 28, 28), 256, width=4, **{**POINTS, "divergence": "exact"})


def image_model(**options):
    torch.manual_seed(0)
    return ImageDensity((1, 4, 4), 17, width=3, **{**POINTS, **options}).double()


def test_images_whose_flow_stands_still_have_the_density_of_transformed_noise():
    model = image_model(solve=solve).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    levels = torch.randint(17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = (levels + model.draws.uniform("dequantisation", levels).double()) / 17
    scale = 1 / (1 - 2 * ALPHA)
    transforms = [torch.distributions.SigmoidTransform(), torch.distributions.AffineTransform(-ALPHA * scale, scale)]
    noise = torch.distributions.Normal(torch.tensor(0.0, dtype=x.dtype), torch.tensor(1.0, dtype=x.dtype))
    density = torch.distributions.TransformedDistribution(noise, transforms, validate_args=False)
    expected = math.log2(17) - density.log_prob(x).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(model(levels)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_log_determinant_of_images_is_that_of_the_whole_map():
    model = image_model(divergence="exact")
    x = random(1, 1, 4, 4)
    noise, log_determinant, _ = model.flows(x, lambda x: None, TIGHT)

    def whole(t, x):
        return torch.cat([part.flatten(1) for part in model.flows(x, lambda x: None, TIGHT)[0]], dim=1)

    assert log_determinant.item() == pytest.approx(jacobian(whole, None, x[0]).slogdet()[1].item(), abs=1e-5)
    torch.testing.assert_close(model.flows.inverse(noise, TIGHT), x, rtol=1e-6, atol=1e-6)


def test_scales_come_back():
    flows, x = Multiscale((1, 8, 8), 3).double(), random(2, 1, 8, 8)
    noise, _, _ = flows(x, lambda x: torch.ones_like(x), TIGHT)
    assert [part.shape[1:] for part in noise] == [torch.Size(shape) for shape in flows.noise_shapes((1, 8, 8))]
    torch.testing.assert_close(flows.inverse(noise, TIGHT), x, rtol=1e-6, atol=1e-6)


def test_random_draws_are_new_in_every_batch_of_a_training_and_the_same_in_measurements():
    model, levels = image_model(solve=solve), torch.randint(17, (3, 1, 4, 4), generator=torch.Generator())

    def losses():
        with torch.no_grad():
            return model(levels)[0]

    first, second = losses(), losses()
    assert not first.equal(second)
    model.eval()
    measured = losses()
    assert measured.equal(losses())
    model.train()
    model.draws.number.fill_(0)
    assert losses().equal(first)


def test_the_flows_of_an_image_have_probes_of_their_own_and_one_for_a_whole_solve():
    model, seen = image_model(), []

    def observe(func, y0, t, **options):
        seen.append(func.probe)
        return solve(func, y0, t, **options)

    model.solve = observe
    model(torch.zeros(3, 1, 4, 4))[0].sum().backward()
    assert [probe.shape for probe in seen] == [torch.Size((3, 1, 4, 4))] * 2
    assert not seen[0].equal(seen[1])
    assert {value for probe in seen for value in probe.flatten().tolist()} == {-1.0, 1.0}


def test_statistics_of_several_solves_are_added_when_they_are_done():
    model = image_model()
    losses, counted = model(torch.zeros(3, 1, 4, 4))
    parts = counted.parts
    assert counted.forward.nfe == sum(part.forward.nfe for part in parts) > 0
    assert counted.backward.nfe == 0
    losses.sum().backward()
    assert counted.backward.nfe == sum(part.backward.nfe for part in parts) > 0
    assert counted.backward.num_accepted == sum(part.backward.num_accepted for part in parts)
    assert counted.backward.evaluation_times[0] == parts[-1].backward.evaluation_times[0]


@pytest.mark.parametrize("make", [image_model, lambda: PointDensity(
    ContinuousFlow(ConcatSquash([2, 4, 2], "tanh").double(), 0.5), 2, **POINTS)], ids=["images", "points"])  # fmt: skip
def test_samples_are_drawn_from_a_stream(make):
    model = make()
    first, second, third = (model.sample(3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.equal(second)
    assert not first.equal(third)
    assert len(first) == 3


def test_samples_have_the_density_that_is_learnt():
    """The mean log-likelihood of samples is minus the entropy, here of a flow that only shifts and scales."""
    network = Linear(2)
    network.matrix.data = torch.tensor([[0.4, 0.0], [0.0, -1.0]], dtype=torch.float64)
    model = PointDensity(ContinuousFlow(network, 1.0), 2, **POINTS)
    samples = model.sample(4000, torch.Generator().manual_seed(0))
    assert samples.std(dim=0).tolist() == pytest.approx([math.exp(-0.4), math.e], rel=0.05)
    entropy = math.log(2 * math.pi * math.e) + 0.6
    assert statistics.mean(model(samples)[0].tolist()) == pytest.approx(entropy, abs=0.05)


def test_a_field_of_another_network_has_none_written_for_the_solver():
    assert not hasattr(FlowField(Linear(2), None), "fused_field")
    assert hasattr(FlowField(ConcatSquash([2, 4, 2], "tanh"), None), "fused_field")


@pytest.mark.parametrize("is_frozen", [False, True])
def test_images_are_measured_in_inference_mode(is_frozen):
    model = image_model(solve=solve).requires_grad_(not is_frozen).eval()
    levels = torch.randint(17, (3, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        expected, _ = model(levels)
    with torch.inference_mode():
        found, _ = model(levels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_measurement_does_not_move_the_draws_of_a_training():
    model = image_model(solve=solve).eval()
    model(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    assert model.draws.number == 0
    model.train()(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    assert model.draws.number == 1


@pytest.mark.parametrize(
    ("integrals", "expected"),
    [("none", {}), ("backward", {"integrals": 1}), ("unweighed", {"integrals": 1, "weigh_integrals": False})],
)
def test_how_integrals_are_solved_for(integrals, expected):
    seen = []

    def spy(func, y0, t, **options):
        seen.append(options)
        return solve(func, y0, t, **options)

    ContinuousFlow(ConcatSquash([2, 3, 2], "tanh"), 0.5, integrals)(torch.randn(4, 2), None, spy)
    assert seen == [expected]
