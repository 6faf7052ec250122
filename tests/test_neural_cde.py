import functools

import pytest
import torch
import torchcde
from problems import F64, Plain, distance, random, random_walks

from fields import neural_cde
from fields.neural_cde import NeuralCDEField
from fields.views import MOST_KEPT
from speech_commands import ControlledField, NeuralCDE, VectorField
from torchadjoint import METHODS, Backsolve, Discrete, solve
from torchadjoint.field import AutogradField

NUM_STAGES = 7
NUM_KNOTS, NUM_CHANNELS, NUM_HIDDEN, WIDTH = 6, 4, 7, 5
ALL_AT_ONCE, SEVERAL_CHUNKS = 1 << 18, 2 * NUM_CHANNELS * NUM_HIDDEN  # two rows a chunk: the last of 5 has one

batches_and_chunks = pytest.mark.parametrize(
    ("batch", "chunk_entries"), [(1, ALL_AT_ONCE), (5, ALL_AT_ONCE), (5, SEVERAL_CHUNKS), (4, SEVERAL_CHUNKS), (3, 1)]
)
depths = pytest.mark.parametrize("num_hidden_layers", [1, 4])


def controlled_field(batch, num_hidden_layers, dtype=F64):
    """A field along random walks, with weights at which some of the ReLUs in each layer are on."""
    network = VectorField(
        NUM_CHANNELS, NUM_HIDDEN, hidden_hidden_channels=WIDTH, num_hidden_layers=num_hidden_layers
    ).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(network.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) / 4 + 0.2 * (parameter.dim() == 1))
    coefficients = torchcde.linear_interpolation_coeffs(random_walks(batch, NUM_KNOTS, NUM_CHANNELS - 1, dtype=dtype))
    return ControlledField(network, torchcde.LinearInterpolation(coefficients))


@pytest.fixture
def fields(batch, num_hidden_layers, chunk_entries, monkeypatch):
    """The same field written for the solver and by autograd."""
    monkeypatch.setattr(neural_cde, "CHUNK_ENTRIES", chunk_entries)
    controlled, shape = controlled_field(batch, num_hidden_layers), torch.Size((batch, NUM_HIDDEN))
    generic = AutogradField(controlled, tuple(controlled.parameters()), shape, time_gradient=False)
    return controlled.fused_field(torch.zeros(shape)), generic, shape


def both(fields, call):
    """What the two fields write to a tensor."""
    fused, generic, shape = fields
    outs = [torch.full(shape, torch.nan, dtype=F64) for _ in range(2)]
    for field, out in zip((fused, generic), outs, strict=True):
        call(field, out)
    return outs


@batches_and_chunks
@depths
def test_evaluations_equal_the_plain_formula_between_all_knots(fields):
    fused, generic, shape = fields
    for t0 in [3, 0, 1, 4, 2]:
        y = random(*shape, seed=t0)
        fused.enter(*((t0, t0 + 1) if t0 % 2 else (t0 + 1, t0)))
        actual, expected = both(fields, lambda field, out, t=t0 + 0.3, y=y: field.evaluate(t, y, out))
        assert distance(actual, expected) < 1e-12
    assert fused.parameter_sizes == generic.parameter_sizes
    assert all(ours is theirs for ours, theirs in zip(fused.parameters, generic.parameters, strict=True))


@batches_and_chunks
@depths
def test_products_equal_those_of_autograd(fields):
    fused, generic, shape = fields
    fused.enter(2.0, 3.0)
    gradients = [torch.zeros(sum(fused.parameter_sizes), dtype=F64) for _ in range(2)]
    # A whole step: all stages first, and then the parameters' products, without the second and with a negative weight.
    for slot in range(NUM_STAGES):
        y, cotangent = random(*shape, seed=slot), random(*shape, seed=slot + 50)
        actual, expected = both(fields, lambda field, out, slot=slot, y=y: field.linearise(slot, 2.5, y, out))
        assert distance(actual, expected) < 1e-12
        actual, expected = both(fields, lambda field, out, slot=slot, c=cotangent: field.pullback(slot, c, out))
        assert distance(actual, expected) < 1e-12
        y.zero_(), cotangent.zero_()  # the solver writes over them
    for slot, weight in ((0, 0.3), (2, 1.0), (3, -2.0), (5, 0.1), (6, 0.7)):
        for field, gradient in zip((fused, generic), gradients, strict=True):
            field.add_parameter_product(slot, weight, gradient)
    compare_gradients(fused, generic, gradients)


def compare_gradients(fused, generic, gradients):
    pieces = zip(fused.unflatten(gradients[0]), generic.unflatten(gradients[1]), fused.parameters, strict=True)
    for actual, expected, parameter in pieces:
        assert actual.shape == parameter.shape
        assert distance(actual, expected) < 1e-12


@pytest.mark.parametrize(("batch", "chunk_entries", "num_hidden_layers"), [(5, SEVERAL_CHUNKS, 2)])
def test_the_last_slot_becomes_the_first_and_evaluations_leave_slots_alone(fields):
    fused, generic, shape = fields
    fused.enter(0.0, 1.0)
    gradients = [torch.zeros(sum(fused.parameter_sizes), dtype=F64) for _ in range(2)]
    for field, gradient in zip((fused, generic), gradients, strict=True):
        out = torch.zeros(shape, dtype=F64)
        for slot in (0, NUM_STAGES - 1):
            field.linearise(slot, 0.5, random(*shape, seed=slot), out)
            field.pullback(slot, random(*shape, seed=slot + 50), out)
        field.reuse_slot(NUM_STAGES - 1)
        field.evaluate(0.5, random(*shape, seed=77), out)
        field.linearise(NUM_STAGES - 1, 0.5, random(*shape, seed=78), out)
        field.pullback(NUM_STAGES - 1, random(*shape, seed=79), out)
        field.add_parameter_product(0, 1.0, gradient)
    compare_gradients(fused, generic, gradients)


@pytest.mark.parametrize(("batch", "chunk_entries", "num_hidden_layers"), [(2, ALL_AT_ONCE, 1)])
def test_the_path_goes_on_straight_beyond_its_ends_and_must_not_have_knots_in_a_piece(fields):
    fused, _, shape = fields
    y = random(*shape)
    for inside, outside in ((0.5, -0.5), (4.5, 5.5)):
        fused.enter(inside, inside)
        expected = torch.zeros(shape, dtype=F64)
        fused.evaluate(inside, y, expected)
        fused.enter(outside, outside)
        assert torch.equal(both(fields, lambda field, out, t=outside: field.evaluate(t, y, out))[0], expected)
    fused.enter(4.0, 7.0)
    for piece in ((0.0, 5.0), (5.0, 0.0), (1.0, 2.5), (1.5, 1.0 - 0.1)):
        with pytest.raises(ValueError, match=r"a knot between .* jump_t=path\.grid_points"):
            fused.enter(*piece)


def train_step(func, batch, dtype=F64, **options):
    """Solution and gradients of z0 and all parameters, and statistics."""
    z0 = random(batch, NUM_HIDDEN, dtype=dtype).requires_grad_()
    path = func.path if isinstance(func, ControlledField) else func.func.path
    solution = solve(func, z0, path.interval, jump_t=path.grid_points, **(dict(rtol=1e-4, atol=1e-6) | options))
    wanted = [tensor for tensor in (z0, *func.parameters()) if tensor.requires_grad]
    gradients = torch.autograd.grad((solution.y * random(*solution.y.shape, seed=3, dtype=dtype)).sum(), wanted)
    flat = torch.cat([solution.y.detach().reshape(-1), *(gradient.reshape(-1) for gradient in gradients)])
    return flat, solution.statistics


@pytest.mark.parametrize(
    "options",
    [
        dict(adjoint="default"),
        dict(adjoint="seminorm"),
        dict(adjoint="per-tensor"),
        dict(adjoint="discrete"),
        dict(adjoint=Discrete(3)),
        dict(adjoint=Discrete(linearised="stage")),
        dict(adjoint=Discrete(linearised="solve")),
        dict(adjoint=Backsolve(warm_start=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_entries", [ALL_AT_ONCE, SEVERAL_CHUNKS])
def test_whole_gradients_equal_those_through_autograd(options, chunk_entries, monkeypatch):
    monkeypatch.setattr(neural_cde, "CHUNK_ENTRIES", chunk_entries)
    func = controlled_field(5, 2)
    fused, fused_statistics = train_step(func, 5, **options)
    generic, generic_statistics = train_step(Plain(func), 5, **options)
    assert fused_statistics.forward.nfe == generic_statistics.forward.nfe
    assert fused_statistics.backward.nfe == generic_statistics.backward.nfe
    assert distance(fused, generic) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_every_method_takes_the_field_of_its_own(method, adjoint):
    func, options = controlled_field(3, 1), dict(method=method, adjoint=adjoint)
    options |= dict(rtol=1e-2, atol=1e-3) if METHODS[method].is_adaptive else dict(step_size=0.5)
    fused, fused_statistics = train_step(func, 3, **options)
    generic, generic_statistics = train_step(Plain(func), 3, **options)
    assert fused_statistics.forward.nfe == generic_statistics.forward.nfe
    assert distance(fused, generic) < 1e-9


def test_a_field_of_other_parameters_than_its_module_is_refused(monkeypatch):
    func = controlled_field(3, 1)
    make = func.fused_field

    def swapped(self, y0):
        field = make(y0)
        field.parameter_sizes = field.parameter_sizes[::-1]
        return field

    monkeypatch.setattr(ControlledField, "fused_field", swapped)
    with pytest.raises(ValueError, match=r"fused_field has parameter_sizes \(.*but its module has parameters of"):
        train_step(func, 3)


def test_a_guess_of_the_first_step_that_goes_beyond_a_knot_leaves_the_field_where_it_was():
    func = controlled_field(2, 1)
    with torch.no_grad():
        for parameter in func.vector_field.last.parameters():
            parameter.mul_(1e-4)  # so slow that the guess is tried some intervals ahead
    fused, statistics = train_step(func, 2)
    assert statistics.forward.evaluation_times[1] > 1
    assert distance(fused, train_step(Plain(func), 2)[0]) < 1e-12


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_float32_differs_by_rounding(adjoint):
    options = dict(adjoint=adjoint, rtol=1e-3, atol=1e-5)
    single, _ = train_step(controlled_field(5, 2, torch.float32), 5, torch.float32, **options)
    double, _ = train_step(Plain(controlled_field(5, 2)), 5, **options)
    assert single.dtype == torch.float32
    assert distance(single.double(), double) < 1e-3


def test_frozen_layers_get_no_gradient_and_change_no_other():
    func = controlled_field(3, 2)
    everything, _ = train_step(func, 3)
    size = func.vector_field.last.bias.numel()  # the last parameter of all
    func.vector_field.last.bias.requires_grad_(False)
    without, _ = train_step(func, 3)
    torch.testing.assert_close(without, everything[:-size], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "adjoint", ["seminorm", *(Discrete(linearised=extent) for extent in ("stage", "step", "solve"))]
)
def test_the_graph_may_be_used_twice(adjoint):
    func = controlled_field(3, 2)
    z0 = random(3, NUM_HIDDEN).requires_grad_()
    times, knots = func.path.interval, func.path.grid_points
    y = solve(func, z0, times, jump_t=knots, rtol=1e-3, atol=1e-5, adjoint=adjoint).y
    once, twice = (torch.autograd.grad(y[-1].sum(), (z0, *func.parameters()), retain_graph=True) for _ in range(2))
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(first, second)


def test_a_solve_that_is_not_told_of_the_knots_is_refused():
    func = controlled_field(2, 1)
    with pytest.raises(ValueError, match="jump_t"):
        solve(func, random(2, NUM_HIDDEN), func.path.interval)


class Recorder:
    """Patches the solver's choice of a field to remember what it was."""

    def __init__(self, monkeypatch):
        self.kinds = []
        monkeypatch.setattr("torchadjoint.adjoints.forward.AutogradField", self.recorded(AutogradField))
        monkeypatch.setattr("speech_commands.NeuralCDEField", self.recorded(NeuralCDEField))

    def recorded(self, kind):
        def make(*arguments, **options):
            self.kinds.append(kind)
            return kind(*arguments, **options)

        return make


def test_the_field_of_its_own_is_used_where_it_can_be(monkeypatch):
    recorder = Recorder(monkeypatch)
    func = controlled_field(2, 1)
    z0, times, jumps = random(2, NUM_HIDDEN), func.path.interval, func.path.grid_points
    options = dict(jump_t=jumps, rtol=1e-2, atol=1e-2)
    solve(func, z0, times, **options)
    solve(func, z0, times, **options, adjoint_params=(func.vector_field.last.weight,))
    solve(func, z0, times.clone().requires_grad_(), **options)
    assert recorder.kinds == [NeuralCDEField, AutogradField, AutogradField]


def test_the_model_has_the_papers_size():
    model = NeuralCDE(21, 90, 10, hidden_hidden_channels=40, num_hidden_layers=4, solve=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 88_940
    assert sum(parameter.numel() for parameter in model.vector_field.parameters()) == 86_050


def test_the_model_returns_logits_and_statistics(monkeypatch):
    recorder = Recorder(monkeypatch)
    model = NeuralCDE(
        NUM_CHANNELS,
        NUM_HIDDEN,
        3,
        hidden_hidden_channels=WIDTH,
        num_hidden_layers=2,
        solve=functools.partial(solve, rtol=1e-3, atol=1e-6),
    )
    x = random_walks(5, NUM_KNOTS, NUM_CHANNELS - 1, dtype=torch.float32)
    logits, statistics = model(x)
    assert logits.shape == (5, 3)
    assert statistics.forward.nfe > 0 == statistics.backward.nfe
    logits.sum().backward()
    assert statistics.backward.nfe > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert recorder.kinds == [NeuralCDEField]
    # Each path on its own gives the same.
    assert distance(torch.cat([model(path.unsqueeze(0))[0] for path in x]), logits) < 1e-2


def test_gradients_of_a_kept_graph_do_not_pile_up():
    func, z0 = controlled_field(batch=3, num_hidden_layers=1), random(3, NUM_HIDDEN).requires_grad_()
    times = torch.tensor([0.0, NUM_KNOTS - 1], dtype=F64)
    y = solve(func, z0, times, adjoint="default", jump_t=range(NUM_KNOTS), rtol=1e-3, atol=1e-3).y[-1].sum()
    gradients = [torch.autograd.grad(y, [*func.parameters()], retain_graph=True) for _ in range(4)]
    assert all(map(torch.equal, gradients[0], gradients[-1]))
    views = y.grad_fn.next_functions[0][0].next_functions[0][0].plan.differentiation.field.gradient_views
    assert len(views) <= MOST_KEPT < 4 * NUM_STAGES


def test_the_start_is_linear_in_the_first_point_and_the_logits_in_the_last_state():
    model = small_model()
    with torch.no_grad():
        for parameter in model.vector_field.last.parameters():
            parameter.zero_()
    x = random_walks(2, NUM_KNOTS, NUM_CHANNELS - 1, dtype=torch.float32)
    torch.testing.assert_close(model(x)[0], model.readout(model.initial(x[:, 0])))


def small_model():
    sizes = dict(hidden_hidden_channels=WIDTH, num_hidden_layers=1)
    return NeuralCDE(NUM_CHANNELS, NUM_HIDDEN, 3, **sizes, solve=functools.partial(solve, rtol=1e-4, atol=1e-6))


def test_a_gradient_of_the_input_is_refused_as_it_would_lack_the_paths():
    x = random_walks(2, NUM_KNOTS, NUM_CHANNELS - 1, dtype=torch.float32).requires_grad_()
    with pytest.raises(ValueError, match="x requires a gradient, but the solve is not differentiated for the path"):
        small_model()(x)


def test_along_a_path_that_is_curved_the_module_itself_is_solved():
    linear = controlled_field(2, 1)
    coefficients = torchcde.natural_cubic_coeffs(random_walks(2, NUM_KNOTS, NUM_CHANNELS - 1))
    curved = ControlledField(linear.vector_field, torchcde.CubicSpline(coefficients))
    assert hasattr(linear, "fused_field")
    assert not hasattr(curved, "fused_field")
