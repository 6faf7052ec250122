"""Whatever is given to a solve, ours or the reference, it ends in a solution and its gradient or in our own error."""

import torch
from fuzzing import cases, odd, some_of, survive
from hypothesis import given
from hypothesis import strategies as st
from problems import SOLVERS
from torch import nn

from torchadjoint import ADJOINTS, METHODS, Backsolve, Discrete

REAL = [torch.float64, torch.float32]
dtypes = st.sampled_from([*REAL * 5, torch.int64, torch.float16, torch.complex64, torch.bool])


@st.composite
def tensors(draw):
    shape = draw(st.sampled_from([(3,), (2, 3), (), (1,), (0, 3), (2, 0), (0,), (2, 1, 3)]))
    dtype = draw(dtypes)
    tensor = torch.linspace(-1, 1, 100)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    change = draw(st.sampled_from([None] * 12 + [torch.nan, torch.inf, 1e38, "meta", "sparse", "stride", "gradient"]))
    if isinstance(change, float) and tensor.numel() and dtype in REAL:
        tensor.view(-1)[-1] = change
    elif change == "meta":
        tensor = tensor.to("meta")
    elif change == "sparse" and dtype is not torch.bool:
        tensor = tensor.to_sparse()
    elif change == "stride":
        tensor = tensor.expand(2, *shape).movedim(0, -1)
    elif change == "gradient" and dtype in REAL:
        tensor = tensor.requires_grad_() * 1.0
    return tensor


CHANGES = {
    "good": lambda slope, t, y: slope,
    "nan": lambda slope, t, y: slope * torch.nan,
    "stiff": lambda slope, t, y: 1e9 * slope**3,
    "exploding": lambda slope, t, y: 1e9 * slope**2 + 1,
    "jump": lambda slope, t, y: slope * (t > 0.5),
    "detached": lambda slope, t, y: slope.detach(),
    "zero": lambda slope, t, y: torch.zeros_like(y),
    "tiny": lambda slope, t, y: torch.full_like(y, 1e-30),
    "float": lambda slope, t, y: 1.0,
    "none": lambda slope, t, y: None,
    "tuple": lambda slope, t, y: (slope, slope),
    "transposed": lambda slope, t, y: slope.movedim(0, -1) if slope.dim() else slope,
    "scalar": lambda slope, t, y: slope.sum(),
    "integer": lambda slope, t, y: slope.long(),
    "complex": lambda slope, t, y: slope * 1j,
    "half": lambda slope, t, y: slope.half(),
    "double": lambda slope, t, y: slope.double(),
    "sparse": lambda slope, t, y: slope.to_sparse(),
    "meta": lambda slope, t, y: slope.to("meta"),
}


class Whatever(nn.Module):
    """A field that makes of its derivative what `change` says, for a state of any shape or a tuple."""

    def __init__(self, change, dtype, is_frozen):
        super().__init__()
        self.change = change
        self.rate = nn.Parameter(torch.tensor(-0.7, dtype=dtype), requires_grad=not is_frozen)

    def forward(self, t, state):
        if isinstance(state, tuple):
            derivatives = tuple(self.forward(t, y) for y in state)
            return derivatives[0] if self.change == "scalar" else derivatives
        return CHANGES[self.change](self.rate * state * (1 + t), t, state)

    def __repr__(self):
        return f"Whatever({self.change}, {self.rate.dtype}, {not self.rate.requires_grad})"


funcs = st.builds(Whatever, st.just("good") | st.sampled_from(sorted(CHANGES)), st.sampled_from(REAL), st.booleans())
times = st.one_of(
    *[
        st.lists(st.floats(-most, most), min_size=2, max_size=4, unique=True).map(sorted)
        for most in (1, 10, 1e30, 1e300)
    ],
    st.lists(st.floats(), max_size=4),
    st.sampled_from([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5, 1.0], [0, 1], [0.0, 0.0]]),
)
output_times = st.one_of(
    st.builds(torch.tensor, times, dtype=st.sampled_from([*REAL, torch.float16])),
    times.map(lambda values: torch.tensor(values, dtype=torch.float64, requires_grad=True)),
    tensors(),
    odd,
)
tolerances = st.sampled_from([1e-3, 1e-6, 1e-12, 1e-300, 1e30, 1e300]) | odd
OPTIONS = dict(
    rtol=tolerances,
    atol=tolerances,
    adjoint_rtol=tolerances,
    adjoint_atol=tolerances,
    adjoint=st.sampled_from([*ADJOINTS, "discrete", Backsolve("default", warm_start=True), Discrete(3)]) | odd,
    jump_t=times | times | output_times | odd,
    adjoint_params=st.lists(tensors(), max_size=3) | st.lists(tensors(), max_size=3).map(iter) | tensors() | odd,
    first_step=st.floats(1e-3, 10) | odd,
    method=st.sampled_from([*METHODS]) | odd,
    adjoint_method=st.sampled_from([*METHODS]) | odd,
    adjoint_options=st.dictionaries(st.sampled_from(["norm", "first_step", "step_size"]), odd, max_size=2) | odd,
    step_t=times | odd,
    min_step=st.floats(0, 1e-3) | odd,
    max_step=st.floats(1e-2, 10) | odd,
    safety=st.floats(0.1, 1) | odd,
    step_size=st.floats(0.05, 2) | odd,
    interp=st.sampled_from(["linear", "cubic"]) | odd,
    perturb=st.booleans() | odd,
    max_num_steps=st.integers(1, 3) | odd,
    compile=st.just(False) | odd,  # compiling takes seconds
)
good_times = st.sampled_from([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5, 1.0]]).map(torch.tensor)
good_states = st.builds(
    torch.ones, st.sampled_from([(3,), (2, 3), ()]), dtype=st.sampled_from(REAL), requires_grad=st.booleans()
)
bad_states = st.one_of(tensors(), tensors(), st.lists(tensors(), max_size=3).map(tuple), st.tuples(tensors(), odd), odd)


@cases(0.35)
@given(
    st.tuples(funcs, good_states, good_times),
    st.tuples(odd, bad_states, output_times),
    st.sets(st.integers(0, 2), max_size=1),
    some_of(OPTIONS, at_most=3),
    st.sampled_from(sorted(SOLVERS)),
)
def test_solves(good, bad, are_bad, options, solver):
    func, y0, t = (bad[index] if index in are_bad else good[index] for index in range(3))

    def solve_and_differentiate():
        y = SOLVERS[solver](func, y0, t, **{"max_num_steps": 100, **options}).y
        assert isinstance(y, tuple) == isinstance(y0, tuple)
        pieces = y if isinstance(y, tuple) else (y,)
        if any(piece.requires_grad for piece in pieces):
            sum(piece.sum() for piece in pieces).backward()
        return pieces

    survive(solve_and_differentiate)
