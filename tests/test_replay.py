"""CUDA graphs without a GPU: a tape of the very operations, on the very tensors, takes the place of the graph."""

import logging
import re
import weakref
from pathlib import Path

import pytest
import torch
from problems import F64, differentiate, random, steps, way
from test_neural_cde import NUM_HIDDEN, NUM_KNOTS, controlled_field
from torch.utils._python_dispatch import TorchDispatchMode

from torchadjoint import Discrete, replay, solve
from torchadjoint.field import AutogradField
from torchadjoint.replay import NUM_EAGER_CALLS, Replay

OPTIONS = dict(rtol=1e-5, atol=1e-7, jump_t=range(NUM_KNOTS))
ADJOINTS = ["default", "seminorm", "per-tensor"]


class Tape(TorchDispatchMode):
    """Records the operations of one call, and repeats them on the same tensors, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.num_replays = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, output))
        return output

    def replay(self):
        self.num_replays += 1
        for operation, args, kwargs, output in self.operations:
            again = operation(*args, **kwargs)
            is_new = all(returned.alias_info is None for returned in operation._schema.returns)
            if is_new and isinstance(output, torch.Tensor):
                output.copy_(again)


@pytest.fixture
def tapes(monkeypatch):
    """The tapes made while work on the CPU is recorded as that on a GPU is."""
    made = []

    def record(function, device):
        function()
        with Tape() as tape:
            output = function()
        made.append(tape)
        return tape, output

    monkeypatch.setattr(replay, "can_record", lambda device: True)
    monkeypatch.setattr(replay, "record", record)
    replay._say_once.cache_clear()
    return made


def outcome(adjoint, **options):
    field = controlled_field(batch=3, num_hidden_layers=2)
    times = torch.tensor([0.0, 1.7, NUM_KNOTS - 1], dtype=F64)
    return differentiate(field, random(3, NUM_HIDDEN), times, adjoint=adjoint, **{**OPTIONS, **options})


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_replayed_solve_has_the_same_bits(adjoint, warm_start, request):
    eager = outcome(way(adjoint, warm_start=warm_start))
    tapes = request.getfixturevalue("tapes")
    replayed = outcome(way(adjoint, warm_start=warm_start))
    assert torch.equal(replayed.y, eager.y)
    assert torch.equal(replayed.gradient, eager.gradient)
    assert steps(replayed.statistics) == steps(eager.statistics)
    # Rejections, steps that end between two knots, and pieces of the path all happen, in replays.
    assert eager.statistics.backward.num_rejected > 0
    assert eager.statistics.backward.num_accepted > 2 * NUM_KNOTS
    attempts = eager.statistics.forward.num_accepted + eager.statistics.forward.num_rejected
    assert tapes[0].num_replays == attempts - NUM_EAGER_CALLS


def test_discrete_takes_its_last_step_apart_from_the_record(request):
    eager = outcome("discrete")
    tapes = request.getfixturevalue("tapes")
    replayed = outcome("discrete")
    assert torch.equal(replayed.gradient, eager.gradient)
    attempts = eager.statistics.forward.num_accepted + eager.statistics.forward.num_rejected
    assert tapes[0].num_replays == attempts - NUM_EAGER_CALLS - 1


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_discrete_that_keeps_all_stages_replays_nothing_that_fills_them(method, request):
    """First slopes among them: there are more than are made before a record, at knots and where no step ends on one."""
    options = dict(method=method, rtol=1e-3, atol=1e-3)
    eager = outcome(Discrete(linearised="solve"), **options)
    request.getfixturevalue("tapes")
    assert torch.equal(outcome(Discrete(linearised="solve"), **options).gradient, eager.gradient)


def test_the_field_of_the_documentation_is_static(tapes):
    page = Path(__file__).parents[1] / "docs" / "writing_a_field.md"
    definition, comparison = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(definition + comparison, {"__name__": page.stem})
    assert sum(tape.num_replays for tape in tapes) > 20


def test_few_calls_are_not_recorded(tapes):
    replayed = Replay(device=torch.device("cpu"), is_static=True)
    calls = []
    for _ in range(NUM_EAGER_CALLS):
        replayed(lambda: calls.append(1))
    assert len(calls) == NUM_EAGER_CALLS
    assert not tapes


def test_what_cannot_be_recorded_runs_all_the_same_and_says_so_once(tapes, caplog):
    total = torch.zeros(())
    for _ in range(2):
        replayed = Replay(device=torch.device("cpu"), is_static=True)
        outputs = [replayed(lambda: total.add(total.item() + 1)).item() for _ in range(NUM_EAGER_CALLS + 3)]
        assert outputs == [1] * (NUM_EAGER_CALLS + 3)
    assert not tapes
    [record] = caplog.records
    assert "kernel by kernel: operation not permitted" in record.message


def test_a_field_that_is_not_static_is_not_recorded(tapes, caplog):
    caplog.set_level(logging.INFO)
    func = controlled_field(batch=3, num_hidden_layers=2)
    func.vector_field.last.bias.requires_grad_(False)  # so that it goes through autograd
    differentiate(func, random(3, NUM_HIDDEN), torch.tensor([0.0, NUM_KNOTS - 1]).double(), **OPTIONS)
    assert not AutogradField.is_static
    assert not tapes
    [record] = caplog.records
    assert "without CUDA graphs" in record.message


def test_a_solve_leaves_nothing_behind(tapes):
    """Buffers and graphs go when the solve goes, not when Python next looks for circles."""
    field = controlled_field(batch=3, num_hidden_layers=2)
    solution = solve(field, random(3, NUM_HIDDEN).requires_grad_(), torch.tensor([0.0, 5.0]).double(), **OPTIONS).y
    solution.sum().backward()
    graphs = [weakref.ref(tape) for tape in tapes]
    assert graphs
    tapes.clear()
    del solution
    assert not any(graph() for graph in graphs)


@pytest.mark.gpu
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_real_graph_gives_the_eager_gradient(adjoint, monkeypatch):
    def on_gpu():
        field = controlled_field(batch=3, num_hidden_layers=2).cuda()
        times = torch.tensor([0.0, 1.7, NUM_KNOTS - 1], dtype=F64, device="cuda")
        return differentiate(field, random(3, NUM_HIDDEN).cuda(), times, adjoint=adjoint, **OPTIONS)

    recorded = on_gpu()
    monkeypatch.setattr(replay, "can_record", lambda device: False)
    eager = on_gpu()
    torch.testing.assert_close(recorded.y, eager.y, rtol=1e-12, atol=0)
    torch.testing.assert_close(recorded.gradient, eager.gradient, rtol=1e-9, atol=0)
    assert steps(recorded.statistics) == steps(eager.statistics)
