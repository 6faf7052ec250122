import functools

import pytest
import torch
import torchdiffeq
from problems import Pair, backward, differentiate, random, random_walks, solve, steps
from torch import nn

from speech_commands import NeuralCDE
from torchadjoint import Backsolve, norms
from torchadjoint.norms import NORMS, Sizes, block_norm, consecutive_blocks, make_norm, rms_norm


def rms(*tensors):
    """Root mean square of all entries of all tensors, by its definition."""
    entries = [entry for tensor in tensors for entry in tensor.reshape(-1).tolist()]
    return (sum(entry**2 for entry in entries) / len(entries)) ** 0.5


def expected_norm(norm, a_t, states, parameters, solution_size=None):
    """The norm by the formula of its docstring; `states` are the tensors of z and of a_z."""
    if norm == "as-published":
        flat = torch.cat([tensor.reshape(-1) for tensor in (*states, *parameters)])
        return max(rms(flat[:solution_size]), rms(flat[solution_size : 2 * solution_size]))
    candidates = [rms(tensor) for tensor in states]
    if norm != "seminorm":
        candidates.append(abs(a_t.item()))
    if norm == "default":
        candidates.append(rms(*parameters))
    if norm == "per-tensor":
        candidates.extend(rms(parameter) for parameter in parameters)
    return max(candidates)


def loud(tensors, index):
    """The tensors with one of them a thousand times as large, so that the norm shows whether it listens to it."""
    return [tensor * (1000 if index == i else 1) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("state_sizes", [(6,), (4, 3)])
@pytest.mark.parametrize("which", range(8))
def test_norms_match_their_formulas(norm, state_sizes, which):
    sizes = [*state_sizes, *state_sizes, 5, 1, 7, 1]
    tensors = loud([random(size, seed=seed) for seed, size in enumerate(sizes)], which)
    blocks = NORMS[norm](Sizes(state_sizes, (5, 1, 7), 11))
    num_states = 2 * len(state_sizes)
    expected = expected_norm(norm, tensors[-1], tensors[:num_states], tensors[num_states:-1], solution_size=11)
    assert block_norm(torch.cat(tensors), blocks).item() == pytest.approx(expected, rel=1e-12)


def test_the_forward_norm_is_the_largest_of_the_states_tensors():
    first, second = random(6), random(4, seed=1)
    norm = block_norm(torch.cat([first, second]), consecutive_blocks([6, 4]))
    assert norm.item() == pytest.approx(max(rms(first), rms(second)), rel=1e-12)


def test_rms_norm():
    assert rms_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item() == 2.5
    assert rms_norm(torch.tensor(-3.0)).item() == 3.0


@pytest.mark.parametrize("norm", ["default", "per-tensor"])
def test_norms_without_parameters_weigh_state_and_time(norm):
    blocks = NORMS[norm](Sizes([2], (), 4))
    assert block_norm(torch.tensor([1.0, 1.0, 3.0, 3.0, 2.0]), blocks).item() == pytest.approx(3)
    assert block_norm(torch.tensor([1.0, 1.0, 3.0, 3.0, -4.0]), blocks).item() == pytest.approx(4)


def test_as_published_refuses_blocks_beyond_the_end():
    as_published = NORMS["as-published"]
    assert as_published(Sizes([4], (3,), 5)) == [(0, 5), (5, 10)]
    assert as_published(Sizes([4], (4,), 6))[-1] == (6, 12)
    with pytest.raises(ValueError, match=r"two blocks of 6 entries.*only 11.*smaller batch"):
        as_published(Sizes([4], (3,), 6))


@pytest.mark.parametrize("norm", ["Seminorm", "rms", "", 1, None, ("default",), [], True])
def test_what_is_no_norm_is_refused(norm):
    with pytest.raises(ValueError, match=r"norm is .*'default', 'seminorm', 'per-tensor', 'as-published', or a func"):
        Backsolve(norm)


class Wide(nn.Module):
    """A state of two entries and 10,100 parameters, whose adjoints move far more than the state."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(random(100, 101, seed=3) / 30)

    def forward(self, t, y):
        frequencies = torch.arange(1, 101, dtype=y.dtype) / 5
        hidden = torch.sin(frequencies * t) @ self.weights / 10
        return torch.stack([-y[1] + hidden[:50].mean(), y[0] + hidden[50:].mean()])


class Spy:
    """A norm that remembers what it was given and what it answered."""

    def __init__(self, norm):
        self.norm = norm
        self.calls = []

    def __call__(self, given):
        value = self.norm(given)
        self.calls.append(([tensor.clone() for tensor in given], value.item()))
        return value


def torchdiffeq_adjoint(func, y0, adjoint_options, callbacks):
    """Backward evaluations of torchdiffeq's own adjoint."""
    times = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    func.callback_step_adjoint = lambda t0, y0, dt: callbacks.append(t0.item())
    solution = torchdiffeq.odeint_adjoint(func, y0, times, rtol=1e-6, atol=1e-8, adjoint_options=adjoint_options)
    backward(solution)
    return len(callbacks)


def test_make_norm_gives_the_seminorm_of_a_tensor_state():
    func, y0 = Wide(), random(2).requires_grad_()
    spy = Spy(make_norm(y0))
    with_norm = torchdiffeq_adjoint(func, y0, dict(norm=spy), [])
    assert with_norm < 0.7 * torchdiffeq_adjoint(func, y0, None, [])
    assert max(rms(given[3]) for given, _ in spy.calls) > 0
    for given, value in spy.calls:
        a_t, z, a_z, parameter = given
        assert (a_t.shape, z.shape, a_z.shape, parameter.shape) == ((), (2,), (2,), (100, 101))
        assert value == pytest.approx(max(rms(z), rms(a_z)), rel=1e-12)
        assert make_norm(y0)((a_t + 1e6, z, a_z, parameter + 1e6)).item() == value


def test_make_norm_gives_the_seminorm_of_a_tuple_state():
    func, y0 = Pair(), tuple(tensor.requires_grad_() for tensor in Pair.start())
    spy = Spy(make_norm(y0))
    torchdiffeq_adjoint(func, y0, dict(norm=spy), [])
    assert spy.calls
    for given, value in spy.calls:
        a_t, *states = given[:5]
        assert [tuple(tensor.shape) for tensor in states] == [(4, 3), (2,), (4, 3), (2,)]
        assert len(given) == 5 + len(list(func.parameters()))
        assert value == pytest.approx(max(map(rms, states)), rel=1e-12)
        assert make_norm(y0)((a_t, *states, *[tensor + 1e6 for tensor in given[5:]])).item() == value


def neural_cde(**options):
    model = NeuralCDE(
        4, 6, 3, hidden_hidden_channels=5, num_hidden_layers=2, solve=functools.partial(solve, rtol=1e-3, atol=1e-6)
    ).double()
    model.solve = functools.partial(model.solve, **options)
    return model


@pytest.mark.parametrize("norm", ["default", "seminorm", "per-tensor"])
def test_torchdiffeq_measures_the_neural_cde_by_the_named_norm(norm, monkeypatch):
    spies = []

    def spied(*arguments, adjoint_options, **keywords):
        spies.append(Spy(adjoint_options["norm"]))
        return odeint_adjoint(*arguments, adjoint_options=adjoint_options | dict(norm=spies[0]), **keywords)

    odeint_adjoint = torchdiffeq.odeint_adjoint
    monkeypatch.setattr(torchdiffeq, "odeint_adjoint", spied)
    model = neural_cde(adjoint=norm, solver="torchdiffeq")
    model(random_walks(2, 4, 3))[0].sum().backward()
    (spy,) = spies
    assert len(spy.calls) > 5
    for given, value in spy.calls:
        a_t, z, a_z, *parameters = given
        assert z.shape == a_z.shape == (2, 6)
        assert [tensor.shape for tensor in parameters] == [tensor.shape for tensor in model.vector_field.parameters()]
        assert value == pytest.approx(expected_norm(norm, a_t, [z, a_z], parameters), rel=1e-12)
        perturbed = spy.norm((a_t, z, a_z, *[tensor + 1e6 for tensor in parameters])).item()
        assert perturbed == value if norm == "seminorm" else perturbed > 1e5


@pytest.mark.parametrize("norm", ["default", "seminorm", "per-tensor"])
def test_our_solver_measures_the_neural_cde_by_the_named_norm(norm, monkeypatch):
    calls = []

    def spied(flat, blocks):
        value = block_norm(flat, blocks)
        calls.append((flat.clone(), value.item()))
        return value

    model = neural_cde(adjoint=norm)
    logits, _ = model(random_walks(2, 4, 3))
    monkeypatch.setattr(norms, "block_norm", spied)
    logits.sum().backward()
    assert len(calls) > 5
    sizes = [parameter.numel() for parameter in model.vector_field.parameters()]
    for flat, value in calls:
        z, a_z, integrals = flat.split([12, 12, len(flat) - 24])
        assert len(integrals) == (0 if norm == "seminorm" else sum(sizes) + 1)
        *parameters, a_t = integrals.split([*sizes, 1]) if norm != "seminorm" else [integrals]
        assert value == pytest.approx(expected_norm(norm, a_t, [z, a_z], parameters), rel=1e-12)


@pytest.mark.parametrize("adjoint", ["default", "per-tensor"])
def test_beside_a_norm_of_the_state_the_adjoints_weighs_the_rest(adjoint):
    times = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    own, named = (
        steps(differentiate(Wide(), random(2), times, rtol=1e-6, atol=1e-8, adjoint=adjoint, **options).statistics)
        for options in (dict(norm=lambda y: y.square().mean().sqrt()), {})
    )
    assert own == [pytest.approx(taken, abs=1e-6) for taken in named]


@pytest.mark.parametrize("adjoint", ["per-tensor", "default"])
def test_a_parameter_without_entries_weighs_nothing(adjoint):
    func, found = Pair().network, []
    for _ in range(2):
        found.append(steps(differentiate(func, random(4, 3), torch.tensor([0.0, 1.0]), adjoint=adjoint).statistics))
        func.none = nn.Parameter(torch.zeros(0, dtype=torch.float64))
    assert found[0] == found[1]
