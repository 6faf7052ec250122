import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, Linear, Network, differentiate, differentiate_exactly, distance, random, steps, way

from torchadjoint import Discrete, solve

ADJOINTS = ["default", "seminorm", "per-tensor", "discrete"]

# The same examples at every run, and none is too slow.
quick = settings(max_examples=25, deadline=None, derandomize=True)

seeds = st.integers(0, 10_000)
adjoints = st.sampled_from(ADJOINTS)
tolerances = st.sampled_from([1e-3, 1e-5, 1e-7])
sizes = st.integers(1, 4)
batch_shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
kinds_of_discrete = st.one_of(
    st.builds(Discrete, st.sampled_from([2, 5, 100]), linearised=st.sampled_from(["stage", "step"])),
    st.builds(Discrete, linearised=st.sampled_from(["stage", "solve"])),
)


@st.composite
def increasing(draw, min_size=2, max_size=5):
    """Times at least a hundredth apart, between -2 and 2."""
    ticks = draw(st.lists(st.integers(-200, 200), min_size=min_size, max_size=max_size, unique=True))
    return torch.tensor(sorted(ticks), dtype=F64) / 100


times = st.tuples(increasing(), st.booleans()).map(lambda drawn: drawn[0].flip(0) if drawn[1] else drawn[0])
# Half a tick beside any output time.
jumps = increasing(min_size=0, max_size=4).map(lambda ticks: (ticks + 0.005).tolist())


def linear_problem(seed, size, batch_shape, dtype=F64):
    return Linear(random(size, size, seed=seed, dtype=dtype) / size), random(
        *batch_shape, size, seed=seed + 1, dtype=dtype
    )


def network_problem(seed, size, batch_shape):
    func = Network(size, 8, seed=seed)
    with torch.no_grad():
        func.second.weight.div_(2)  # errors grow less than a hundredfold on the way
    return func, random(*batch_shape, size, seed=seed + 1)


def assert_close(actual, expected, bound):
    """Every entry, to `bound` times the largest, or to `bound` where all are small: as tolerances mean it."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())


@quick
@given(seeds, sizes, batch_shapes, times, tolerances, adjoints)
def test_linear_fields_are_solved_and_differentiated_to_the_tolerance(seed, size, batch, times, tolerance, adjoint):
    func, y0 = linear_problem(seed, size, batch)
    t = times.clone().requires_grad_(adjoint != "discrete")
    exact = differentiate_exactly(func, y0, t)
    ours = differentiate(func, y0, t, rtol=tolerance, atol=tolerance, adjoint=adjoint)
    assert torch.equal(ours.y[0], y0)
    assert_close(ours.y, exact.y, 30 * tolerance)
    for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            # The integral of the parameters' gradient is in no norm of the seminorm's.
            assert_close(gradient, expected, (1000 if adjoint == "seminorm" else 100) * tolerance)


@quick
@given(seeds, sizes, batch_shapes, times, adjoints)
def test_linear_fields_in_float32(seed, size, batch, times, adjoint):
    func, y0 = linear_problem(seed, size, batch, torch.float32)
    exact = differentiate_exactly(func, y0, times.float())
    ours = differentiate(func, y0, times.float(), rtol=1e-4, atol=1e-5, adjoint=adjoint)
    assert ours.y.dtype == ours.gradient.dtype == torch.float32
    assert_close(ours.y, exact.y, 3e-3)
    assert_close(ours.gradient, exact.gradient, 1e-2)


@settings(quick, max_examples=15)
@given(seeds, sizes, batch_shapes, times, tolerances, adjoints, st.booleans())
def test_networks_are_differentiated_to_the_tolerance(seed, size, batch, times, tolerance, adjoint, warm_start):
    func, y0 = network_problem(seed, size, batch)
    reference = differentiate(func, y0, times, rtol=1e-10, atol=1e-10)
    ours = differentiate(func, y0, times, rtol=tolerance, atol=tolerance, adjoint=way(adjoint, warm_start=warm_start))
    assert_close(ours.y, reference.y, 100 * tolerance)
    assert_close(ours.gradient, reference.gradient, 300 * tolerance)


def num_between(jumps, times):
    """How many jumps lie between the first and the last time."""
    low, high = sorted([times[0].item(), times[-1].item()])
    return sum(low < jump < high for jump in jumps)


@quick
@given(seeds, times, jumps, tolerances, adjoints, st.booleans())
def test_evaluations_steps_and_jumps_add_up(seed, times, jumps, tolerance, adjoint, t_requires_grad):
    func, y0 = network_problem(seed, 2, (2,))
    t = times.clone().requires_grad_(t_requires_grad)
    done = differentiate(func, y0, t, rtol=tolerance, atol=tolerance, adjoint=adjoint, jump_t=jumps).statistics
    num_jumps, num_segments = num_between(jumps, times), len(times) - 1
    num_attempts = [direction.num_accepted + direction.num_rejected for direction in (done.forward, done.backward)]

    assert done.forward.nfe == 2 + 6 * num_attempts[0] + num_jumps
    directions = [(done.forward, times)]
    if adjoint == "discrete":
        assert num_attempts[1] == 0
        # Six a step, one more for the last slope of a step that ends in an output time's interpolation. Of the last
        # step all but the first are the forward solve's.
        of_times = len(times) if t.requires_grad else 0
        assert 0 <= done.backward.nfe - of_times - 6 * (done.forward.num_accepted - 1) - 1 < num_segments
    else:
        of_times = len(times) if t.requires_grad else 0
        assert done.backward.nfe == of_times + 2 * num_segments + 6 * num_attempts[1] + num_jumps
        directions.append((done.backward, times.flip(0)))
    for direction, ends in directions:
        low, high = sorted([ends[0].item(), ends[-1].item()])
        assert {jump for jump in jumps if low < jump < high} <= set(direction.accept_times)
        assert all(low <= time <= high and time != ends[-1] for time in direction.accept_times)
    assert done.forward.accept_times == sorted(done.forward.accept_times, reverse=bool(times[0] > times[-1]))


@quick
@given(seeds, sizes, times, tolerances, adjoints, st.booleans())
def test_a_solve_in_reversed_time_takes_the_same_steps(seed, size, times, tolerance, adjoint, warm_start):
    func, y0 = linear_problem(seed, size, (2,))
    mirrored = Linear(-func.matrix.detach())
    options = dict(rtol=tolerance, atol=tolerance, adjoint=way(adjoint, warm_start=warm_start))
    ours, theirs = differentiate(func, y0, times, **options), differentiate(mirrored, y0, -times, **options)
    assert torch.equal(ours.y, theirs.y)
    assert torch.equal(ours.gradients[0], theirs.gradients[0])
    assert torch.equal(ours.gradients[2], -theirs.gradients[2])
    assert steps(ours.statistics) == [[-time for time in some] for some in steps(theirs.statistics)]


@quick
@given(seeds, sizes, batch_shapes, times, adjoints)
def test_a_tuple_of_one_tensor_is_the_tensor(seed, size, batch, times, adjoint):
    func, y0 = network_problem(seed, size, batch)

    class OfTuple(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.func = func

        def forward(self, t, y):
            return (self.func(t, *y),)

    options = dict(rtol=1e-4, atol=1e-4, adjoint=adjoint)
    tensor, of_tuple = differentiate(func, y0, times, **options), differentiate(OfTuple(), (y0,), times, **options)
    assert torch.equal(tensor.y.reshape(-1), of_tuple.y)
    assert torch.equal(tensor.gradient, of_tuple.gradient)
    assert tensor.statistics == of_tuple.statistics


@quick
@given(seeds, times, jumps, tolerances, kinds_of_discrete)
def test_discrete_gradients_do_not_depend_on_what_is_kept(seed, times, jumps, tolerance, adjoint):
    func, y0 = network_problem(seed, 3, (2,))
    options = dict(rtol=tolerance, atol=tolerance, jump_t=jumps)
    usual, other = (differentiate(func, y0, times, **options, adjoint=each) for each in (Discrete(), adjoint))
    assert distance(other.gradient, usual.gradient) < 1e-12


@quick
@given(seeds, increasing(min_size=3), tolerances)
def test_output_times_change_nothing_but_what_is_put_out(seed, times, tolerance):
    func, y0 = network_problem(seed, 2, ())
    options = dict(rtol=tolerance, atol=tolerance)
    all_times, ends = solve(func, y0, times, **options), solve(func, y0, times[[0, -1]], **options)
    assert torch.equal(all_times.y[[0, -1]], ends.y)
    assert all_times.statistics == ends.statistics
