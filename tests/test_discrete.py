import pytest
import torch
from problems import (
    F64,
    Integral,
    Linear,
    Network,
    Pair,
    differentiate,
    differentiate_exactly,
    distance,
    random,
)

from torchadjoint import Discrete, solve
from torchadjoint.adjoints import discrete
from torchadjoint.field import AutogradField

FIRST_STEP = 0.1  # a guess of it would depend on y0, and torchdiffeq differentiates through that
INTERVALS = (1, 3, 1000)
EVERY = [
    *map(Discrete, INTERVALS),
    Discrete(linearised="stage"),
    Discrete(3, linearised="stage"),
    Discrete(linearised="solve"),
]
every = pytest.mark.parametrize("adjoint", EVERY, ids=lambda each: f"{each.checkpoint_interval}-{each.linearised}")
TIMES = {
    "increasing": torch.linspace(0, 3, 5, dtype=F64),
    "decreasing": torch.tensor([3.0, 2.5, 0.7, -0.2], dtype=F64),
    "many in one step": torch.cat([torch.linspace(0, 0.3, 12, dtype=F64), torch.linspace(1, 1.2, 9, dtype=F64)]),
    "at the end of a step": torch.tensor([0.0, FIRST_STEP, 0.2, 0.5], dtype=F64),
}


def compare_with_torchdiffeq(func, y0, t, *, adjoint, rtol=1e-5, atol=1e-7, **options):
    options |= dict(first_step=FIRST_STEP, rtol=rtol, atol=atol)
    theirs = differentiate(func, y0, t, solver="torchdiffeq", adjoint="discrete", **options)
    ours = differentiate(func, y0, t, adjoint=adjoint, **options)
    assert ours.statistics.forward.accept_times == pytest.approx(theirs.statistics.forward.accept_times)
    assert distance(ours.y, theirs.y) < 1e-12
    for our_gradient, their_gradient in zip(ours.gradients, theirs.gradients, strict=True):
        assert (our_gradient is None) == (their_gradient is None)
        assert our_gradient is None or distance(our_gradient, their_gradient) < 1e-9
    return ours


@every
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES.keys())
def test_equals_torchdiffeq_differentiated_through(times, adjoint):
    func = Network()
    ours = compare_with_torchdiffeq(func, random(4, 3), times, adjoint=adjoint)
    if times is TIMES["at the end of a step"]:
        assert FIRST_STEP in ours.statistics.forward.accept_times
    if times is TIMES["many in one step"]:
        assert len(ours.statistics.forward.accept_times) < len(times) - 5


@every
@pytest.mark.parametrize("jumps", [[1.0, 2.5], [0.78, 2.3], [0.75, 1.5]], ids=["between", "just behind", "at outputs"])
def test_equals_torchdiffeq_differentiated_through_with_jumps(jumps, adjoint):
    class Jumping(Network):
        def forward(self, t, y):
            return super().forward(t, y) * (1 + sum((t > jump).to(y.dtype) for jump in jumps))

    ours = compare_with_torchdiffeq(Jumping(), random(4, 3), TIMES["increasing"], adjoint=adjoint, jump_t=jumps)
    assert set(jumps) < set(ours.statistics.forward.accept_times)


@every
def test_equals_torchdiffeq_differentiated_through_for_a_tuple_state(adjoint):
    compare_with_torchdiffeq(Pair(), Pair.start(), TIMES["increasing"], adjoint=adjoint, rtol=1e-3, atol=1e-4)


def test_float32():
    options = dict(rtol=1e-4, atol=1e-5, adjoint="discrete", first_step=FIRST_STEP)
    times = TIMES["increasing"].float()
    single = differentiate(Network(dtype=torch.float32), random(4, 3, dtype=torch.float32), times, **options)
    double = differentiate(Network(), random(4, 3), times, **options)
    assert single.gradient.dtype == torch.float32
    assert distance(single.gradient.double(), double.gradient) < 1e-3


@pytest.mark.parametrize("checkpoint_interval", INTERVALS)
def test_rejected_steps_cost_nothing_backwards(checkpoint_interval):
    ours = differentiate(
        Network(),
        random(4, 3),
        TIMES["increasing"][[0, -1]],
        rtol=1e-6,
        atol=1e-8,
        adjoint=Discrete(checkpoint_interval),
        first_step=2.0,
    )
    forward, backward = ours.statistics.forward, ours.statistics.backward
    assert forward.num_rejected > 0
    # Six stages a step, as the seventh is the next step's first; only the last, being interpolated, needs its own. Of
    # the last step, the forward solve has linearised all stages but the first.
    num_steps = forward.num_accepted
    num_solved_again = num_steps - len(range(0, num_steps, checkpoint_interval))
    assert backward.nfe == 6 * (num_steps + num_solved_again) + 1 - 6
    assert backward.num_accepted == backward.num_rejected == 0


def test_what_is_linearised_tells_what_is_evaluated_again():
    options = dict(rtol=1e-6, atol=1e-8, first_step=2.0)
    counts = {}
    for adjoint in (Discrete(linearised="stage"), Discrete(linearised="solve")):
        ours = differentiate(Network(), random(4, 3), TIMES["increasing"][[0, -1]], adjoint=adjoint, **options)
        counts[adjoint.linearised] = ours.statistics.backward.nfe
    assert ours.statistics.forward.num_rejected > 0
    # Once for the slopes and once to linearise, six stages a step, and that of the last step's interpolation.
    assert counts == {"stage": 12 * ours.statistics.forward.num_accepted + 1, "solve": 0}


def test_no_more_than_one_stage_is_linearised_at_a_time(monkeypatch):
    slots, linearise = set(), AutogradField.linearise

    def spy(self, slot, *arguments):
        slots.add(slot)
        linearise(self, slot, *arguments)

    monkeypatch.setattr(AutogradField, "linearise", spy)
    differentiate(Network(), random(3), TIMES["increasing"], rtol=1e-3, atol=1e-3, adjoint=EVERY[3])
    assert slots == {0}


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_output_times_within_steps_cost_no_evaluation_backwards(method):
    """The last slope of a step, which they use, is pulled back with the first of the next."""
    few, many = (
        differentiate(
            Network(), random(4, 3), torch.linspace(0, 3, number, dtype=F64), method=method, rtol=1e-5, atol=1e-7,
            adjoint="discrete",
        ).statistics
        for number in (2, 40)
    )  # fmt: skip
    assert many.forward.accept_times == few.forward.accept_times
    assert many.backward.nfe == few.backward.nfe


@pytest.mark.parametrize("method", ["bosh3", "dopri8", "rk4"])
def test_what_is_kept_does_not_change_the_gradient(method):
    """Nor where a step's last stage is evaluated only for an output within it, or to start the next step."""
    options = dict(rtol=1e-5, atol=1e-5, method=method, jump_t=[0.7, 1.5])
    if method == "rk4":
        options |= dict(step_size=0.4, interp="cubic")
    first, *others = (
        differentiate(Network(), random(4, 3), TIMES["increasing"], adjoint=adjoint, **options).gradient
        for adjoint in EVERY
    )
    assert max(distance(other, first) for other in others) < 1e-12


def kept_states(checkpoint_interval, monkeypatch, **options):
    """How many states a forward solve keeps, and how many steps it took."""
    records = []

    class Kept(discrete._Step):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            records.append(self)

    monkeypatch.setattr(discrete, "_Step", Kept)
    options = dict(rtol=1e-7, atol=1e-9, adjoint=Discrete(checkpoint_interval)) | options
    solution = solve(Network(), random(3), TIMES["increasing"], **options)
    return sum(record.start is not None for record in records), solution.statistics.forward.num_accepted


def test_what_is_solved_again_between_checkpoints_makes_no_graph():
    class Counting(Network):
        num_graphs = 0

        def forward(self, t, y):
            self.num_graphs += torch.is_grad_enabled()
            return super().forward(t, y)

    numbers = []
    for interval in (1, 4):
        func = Counting()
        t = torch.tensor([0.0, 1.0], dtype=F64)
        solve(func, random(4, 3), t, rtol=1e-5, atol=1e-7, adjoint=Discrete(interval)).y.sum().backward()
        numbers.append(func.num_graphs)
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("checkpoint_interval", INTERVALS)
def test_one_state_is_kept_for_each_checkpoint_interval(checkpoint_interval, monkeypatch):
    num_kept, num_steps = kept_states(checkpoint_interval, monkeypatch)
    assert num_steps > 10
    assert num_kept == len(range(0, num_steps, checkpoint_interval))


def test_nothing_is_kept_where_nothing_is_differentiated(monkeypatch):
    assert kept_states(1, monkeypatch, adjoint="seminorm")[0] == 0
    with torch.no_grad():
        assert kept_states(1, monkeypatch)[0] == 0


def test_it_is_the_gradient_of_the_steps_and_not_of_the_solution():
    """At loose tolerances it differs from the exact gradient as much as the solution differs, no less and no more."""
    func, y0, times = Linear(random(3, 3, seed=2)), random(3), TIMES["increasing"]
    exact = differentiate_exactly(func, y0, times)
    loose, tight = (
        differentiate(func, y0, times, rtol=tolerance, atol=tolerance, adjoint="discrete")
        for tolerance in (1e-3, 1e-10)
    )
    assert 1e-6 < distance(loose.gradient, exact.gradient) < 0.1
    assert distance(tight.gradient, exact.gradient) < 1e-8


def test_outputs_within_a_step_have_the_weights_of_the_dense_output():
    func, y0 = Integral(degree=3), random(2)
    times = torch.tensor([0.0, 0.01, 0.3, 0.7, 2.0], dtype=F64)
    ours = differentiate(func, y0, times, rtol=1e-3, atol=1e-3, adjoint="discrete", first_step=5.0)
    assert ours.statistics.forward.num_accepted == 1
    assert distance(ours.gradient, differentiate_exactly(func, y0, times).gradient) < 1e-12


@every
@pytest.mark.parametrize("times", [TIMES["increasing"], TIMES["at the end of a step"]], ids=["inside", "at the end"])
def test_the_gradient_can_be_asked_for_again(times, adjoint):
    """The second time, the field no longer holds the last step of the forward solve."""
    func, y0 = Network(), random(4, 3).requires_grad_()
    y = solve(func, y0, times, rtol=1e-5, atol=1e-7, adjoint=adjoint, first_step=FIRST_STEP).y
    inputs = [y0, *func.parameters()]
    first, second = (torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(linearised="steps"), "linearised is 'steps', but must be one of 'stage', 'step', 'solve'"),
        (dict(linearised="solve", checkpoint_interval=2), "checkpoint_interval is 2, but linearised is 'solve'"),
        (dict(checkpoint_interval=0), "checkpoint_interval is 0, but must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Discrete(**settings)


def test_a_whole_number_of_steps_may_be_a_float():
    gradients = []
    for interval in (2, 2.0):
        y0 = random(3).requires_grad_()
        solve(
            Network(), y0, torch.linspace(0, 3, 5, dtype=F64), adjoint=Discrete(checkpoint_interval=interval)
        ).y.sum().backward()
        gradients.append(y0.grad)
    assert torch.equal(*gradients)
