"""Which adjoint to use for a problem of one's own: every way solves it, and a table says what each takes and errs."""

import copy
import functools
import html
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from . import arguments
from .adjoints import Backsolve, Discrete
from .api import solve
from .errors import SolverError
from .methods import METHODS
from .problem import State
from .stepping import OF_FIXED_STEPS

REFERENCE = 1e-3
"""How much tighter than the tolerances compared the reference's are."""
TOLERANCES = ("rtol", "atol", "adjoint_rtol", "adjoint_atol")
WAYS: dict[str, dict[str, Any]] = {
    "default": {"adjoint": "default"},
    "per-tensor": {"adjoint": "per-tensor"},
    "seminorm": {"adjoint": "seminorm"},
    "seminorm, warm start": {"adjoint": Backsolve(warm_start=True)},
    "discrete": {"adjoint": "discrete"},
    "discrete, all stages kept": {"adjoint": Discrete(linearised="solve")},
    "seminorm, compiled": {"adjoint": "seminorm", "compile": True},
    "discrete, compiled": {"adjoint": "discrete", "compile": True},
    "seminorm, warm start, compiled": {"adjoint": Backsolve(warm_start=True), "compile": True},
    "discrete, compiled solve": {"adjoint": "discrete", "compile": "solve"},
}
"""Ours, by name, as options of `solve`."""
TORCHDIFFEQ = {"torchdiffeq, adjoint": "odeint_adjoint", "torchdiffeq, through the solver": "odeint"}
"""torchdiffeq's functions."""


@dataclass(frozen=True)
class Row:
    """One way with one method."""

    way: str
    method: str
    forward_nfe: int | None = None
    """Number of function evaluations of the solve."""
    backward_nfe: int | None = None
    """And of its gradient; None where torchdiffeq differentiates through the solver, which evaluates nothing."""
    milliseconds: float | None = None
    """Of the solve, the loss and the gradient, warmed up: the median, by the clock."""
    mebibytes: float | None = None
    """Most memory that was taken at one time above what was taken before: on a GPU as its allocator counts it, on a CPU
    of tensors, apart from what an operation takes and frees within itself."""
    error: float | None = None
    """Of the gradient: the norm of its difference from the reference over the reference's norm."""
    is_on_front: bool = False
    """Whether no other way is both as fast and as exact."""
    failure: str = ""
    """Why there are no numbers."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. It prints as a table with a sentence below, and as HTML in a notebook."""

    rows: list[Row]
    reference_error: float
    """How far two ways agree on the reference; errors below are not to be trusted."""

    @property
    def advice(self) -> str:
        """A sentence that says which ways are on the front of error and time."""
        front = sorted((row for row in self.rows if row.is_on_front), key=lambda row: row.milliseconds)
        if not front:
            return "No way came to an end: try larger tolerances or float64."
        fastest, exact = (
            f"{row.way} with {row.method} ({row.milliseconds:.3g} ms, error {row.error:.1e})"
            for row in (front[0], front[-1])
        )
        if len(front) == 1:
            return f"The fastest is also the most exact: {fastest}."
        between = f", and {len(front) - 2} lie between" if len(front) > 2 else ""
        return f"On the front of error and time the fastest is {fastest}, the most exact {exact}{between}."

    def __str__(self) -> str:
        cells = [HEADINGS, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([*(line.rstrip() for line in lines), "", self.advice, self._about_reference])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        lines = [line(HEADINGS, "th"), *(line(_cells(row), "td") for row in self.rows)]
        below = html.escape(f"{self.advice} {self._about_reference}")
        return f"<table>{''.join(lines)}</table><p>{below}</p>"

    @property
    def _about_reference(self) -> str:
        agreed = f"{self.reference_error:.0e}"
        return f"Errors are from a float64 reference, on which two ways agree to {agreed}. *: on the front."


HEADINGS = ("way", "method", "NFE", "ms", "MiB", "error", "")


def _cells(row: Row) -> tuple[str, ...]:
    if row.failure:
        return (row.way, row.method, "", "", "", "", row.failure)
    nfe = f"{row.forward_nfe} + {row.backward_nfe}" if row.backward_nfe is not None else f"{row.forward_nfe}"
    numbers = (f"{row.milliseconds:.3g}", f"{row.mebibytes:.2f}", f"{row.error:.1e}")
    return (row.way, row.method, nfe, *numbers, "*" if row.is_on_front else "")


def compare(
    func: nn.Module,
    y0: State,
    t: Tensor,
    loss: Callable[[State], Tensor],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    methods: Sequence[str] = ("dopri5",),
    compile: bool | Literal["solve"] = False,
    repeats: int = 5,
    **options: Any,
) -> Comparison:
    """Solve one problem by every way to differentiate it, ours and torchdiffeq's if it is installed.

    A way that fails is a row that says why. Errors are measured against `discrete` in float64 at tolerances a thousand
    times tighter, and this against the seminorm there.

    Args:
        func: a module as `solve` takes it.
        y0: the initial state, as `solve` takes it.
        t: the output times, (times,).
        loss: maps the solution, (times, *shape of y0) or a tuple of such, to a tensor without dimensions. The reference
            is solved in float64, but its solution is rounded to the dtype of y0 for the loss.
        rtol: relative tolerance of every way.
        atol: absolute tolerance of every way.
        methods: names of methods to try each way with.
        compile: whether to try `compile=True` too, which takes seconds to minutes for each way and method; "solve" also
            `compile="solve"`, which takes minutes.
        repeats: how often each way is timed, one after the other.
        options: further options of `solve`, such as `jump_t`.

    Raises:
        ValueError: if an argument is not as described, or the reference cannot be solved.
    """
    if not isinstance(func, nn.Module):
        arguments.refuse("func", func, "an nn.Module")
    if not callable(loss):
        arguments.refuse("loss", loss, "a function of the solution")
    if isinstance(methods, str) or not methods:
        arguments.refuse("methods", methods, "a sequence of methods, such as ('dopri5', 'bosh3')")
    for method in methods:
        arguments.choice("methods", method, METHODS)
    every = "the gradient is that of all parameters and y0"
    for name, instead in (("adjoint", "every way is tried"), ("method", "give methods"), ("adjoint_params", every)):
        if name in options:
            raise ValueError(f"{name} is given, but compare chooses it: {instead}")
    repeats = arguments.whole_number("repeats", repeats)
    compile = arguments.flag("compile", compile, "solve")
    arguments.state_shapes(y0)
    options = {"rtol": rtol, "atol": atol, **options}
    for name in TOLERANCES:
        if options.get(name) is not None:
            options[name] = arguments.number(name, options[name])
    expected, reference_error = _reference(func, y0, t, loss, options)
    trials = [
        _Trial(name, method, functools.partial(solve, **{**options, **way, "method": method}))
        for method in methods
        for name, way in WAYS.items()
        if way.get("compile", False) in (False, bool(compile), compile)
        and ("warm start" not in name or (len(t) > 2 and METHODS[method].is_adaptive))
    ]
    if importlib.util.find_spec("torchdiffeq") is not None:
        trials += [
            _Trial(name, method, functools.partial(_by_torchdiffeq, function, method=method, **options))
            for method in methods
            for name, function in TORCHDIFFEQ.items()
        ]
    for trial in trials:
        trial.warm_up(func, y0, t, loss, expected)
    for _ in range(repeats):
        for trial in trials:
            trial.measure(func, y0, t, loss)
    rows = [trial.row() for trial in trials]
    return Comparison([_placed(row, rows) for row in rows], reference_error)


class _Counted(nn.Module):
    """A module that counts its evaluations, for torchdiffeq."""

    def __init__(self, func: nn.Module):
        super().__init__()
        self.func = func
        self.num_evaluations = 0

    def forward(self, t: Tensor, y: State) -> State:
        self.num_evaluations += 1
        return self.func(t, y)


@dataclass
class _TorchdiffeqSolution:
    y: State
    counted: _Counted


def _by_torchdiffeq(function: str, func: nn.Module, y0: State, t: Tensor, *, rtol, atol, method, **options):
    torchdiffeq = importlib.import_module("torchdiffeq")  # needed by nobody else
    counted = _Counted(func)
    names = ("jump_t", "step_t")
    backward = {name: options.pop(name) for name in list(options) if name.startswith("adjoint_")}

    def with_tensors(given):
        return {
            name: torch.as_tensor(value, dtype=torch.float64, device=t.device) if name in names else value
            for name, value in given.items()
        }

    keywords = dict(rtol=rtol, atol=atol, method=method, options=with_tensors(options))
    if function == "odeint_adjoint":
        if "adjoint_options" in backward:
            backward["adjoint_options"] = with_tensors(backward["adjoint_options"])
        keywords |= backward
    y = getattr(torchdiffeq, function)(counted, y0, t, **keywords)
    return _TorchdiffeqSolution(y, counted)


@dataclass
class _Trial:
    way: str
    method: str
    solve: Callable[..., Any]

    def __post_init__(self):
        self.seconds: list[float] = []
        self.found: dict[str, Any] = {}

    def warm_up(self, func: nn.Module, y0: State, t: Tensor, loss: Callable, expected: Tensor) -> None:
        """What a first gradient says but for its time: the counts, the memory and the error."""
        try:
            gradient, forward_nfe, backward_nfe = _gradient(self.solve, func, y0, t, loss)
            memory = _peak_memory(func, y0, lambda: _gradient(self.solve, func, y0, t, loss))
        # torchdiffeq fails by AssertionError, and in other ways at methods that it lacks.
        except (SolverError, ValueError, AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
            message = " ".join(str(error).split())
            self.found = {"failure": message if len(message) <= 100 else f"{message[:97]}..."}
            return
        self.found = {
            "forward_nfe": forward_nfe,
            "backward_nfe": backward_nfe,
            "mebibytes": memory / 2**20,
            "error": ((gradient.double() - expected).norm() / expected.norm()).item(),
        }

    def measure(self, func: nn.Module, y0: State, t: Tensor, loss: Callable) -> None:
        """Time one gradient."""
        if "failure" in self.found:
            return
        _wait(y0)
        started = time.perf_counter()
        _gradient(self.solve, func, y0, t, loss)
        _wait(y0)
        self.seconds.append(time.perf_counter() - started)

    def row(self) -> Row:
        """What was found."""
        taken = {"milliseconds": 1e3 * statistics.median(self.seconds)} if self.seconds else {}
        return Row(self.way, self.method, **self.found, **taken)


def _placed(row: Row, rows: Iterable[Row]) -> Row:
    """The row, knowing whether it is on the front of error and time."""
    measured = [other for other in rows if other.milliseconds is not None and other is not row]
    if row.milliseconds is None:
        return row
    is_beaten = any(
        other.milliseconds <= row.milliseconds and other.error <= row.error for other in measured
    ) or not math.isfinite(row.error)
    return replace(row, is_on_front=not is_beaten)


def _tensors(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _wait(y0: State) -> None:
    if _tensors(y0)[0].is_cuda:
        torch.cuda.synchronize()


def _gradient(solve: Callable, func: nn.Module, y0: State, t: Tensor, loss: Callable) -> tuple[Tensor, int, int | None]:
    """The gradient of the parameters and of y0, flat, and the evaluations forward and backward."""
    starts = tuple(tensor.detach().clone().requires_grad_() for tensor in _tensors(y0))
    parameters = [parameter for parameter in func.parameters() if parameter.requires_grad]
    solution = solve(func, starts if isinstance(y0, tuple) else starts[0], t)
    value = loss(solution.y)
    if not isinstance(value, Tensor) or value.dim() > 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss returned {found}, but must return a tensor without dimensions, such as a mean")
    forward_nfe = solution.counted.num_evaluations if isinstance(solution, _TorchdiffeqSolution) else None
    gradients = torch.autograd.grad(value, [*parameters, *starts], allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros_like(tensor).reshape(-1) if gradient is None else gradient.reshape(-1)
            for tensor, gradient in zip([*parameters, *starts], gradients, strict=True)
        ]
    )
    if forward_nfe is not None:
        return flat, forward_nfe, solution.counted.num_evaluations - forward_nfe or None
    return flat, solution.statistics.forward.nfe, solution.statistics.backward.nfe


def _doubled(func: nn.Module) -> nn.Module:
    """A copy in float64, of the tensors that are its attributes too."""
    try:
        found = copy.deepcopy(func).double()
    except (RuntimeError, TypeError) as error:  # torch copies leaves alone, Python no locks
        raise ValueError(f"func cannot be copied for the reference: {error}") from error
    for module in found.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.double())
    return found


def _reference(func: nn.Module, y0: State, t: Tensor, loss: Callable, options: dict[str, Any]) -> tuple[Tensor, float]:
    """The gradient in float64 at tighter tolerances, and how far another way agrees."""
    exact_func = _doubled(func)
    exact_y0 = tuple(tensor.detach().double() for tensor in _tensors(y0))
    tight = {name: value for name, value in options.items() if name not in (*OF_FIXED_STEPS, "adjoint_method")}
    if isinstance(tight.get("adjoint_options"), Mapping):  # else `solve` refuses it
        own = tight["adjoint_options"].items()
        tight["adjoint_options"] = {name: value for name, value in own if name not in OF_FIXED_STEPS}
    for name in TOLERANCES:
        if tight.get(name) is not None:
            tight[name] = tight[name] * REFERENCE
    tight["method"] = "dopri5"
    dtype = _tensors(y0)[0].dtype

    def loss_of_rounded(y: State) -> Tensor:
        # A loss may have parameters, which stay as they are.
        return loss(tuple(tensor.to(dtype) for tensor in y) if isinstance(y, tuple) else y.to(dtype))

    try:
        expected, other = (
            _gradient(
                functools.partial(solve, **tight, adjoint=adjoint),
                exact_func,
                exact_y0 if isinstance(y0, tuple) else exact_y0[0],
                t,
                loss_of_rounded,
            )[0]
            for adjoint in ("discrete", "seminorm")
        )
    except RuntimeError as error:  # such as a SolverError
        raise ValueError(f"the reference cannot be solved: {error}") from error
    if not expected.norm():
        raise ValueError("the gradient of the loss is zero here, so errors relative to it have no meaning")
    return expected, ((other - expected).norm() / expected.norm()).item()


def _peak_memory(func: nn.Module, y0: State, run: Callable[[], Any]) -> int:
    """The most bytes that `run` takes at one time."""
    if _tensors(y0)[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory([*func.parameters(), *_tensors(y0)]) as memory:
        run()
    return memory.peak


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under this mode have held at one time, in `peak`.

    After every operation it adds the storages of what came out and forgets those that have been freed since, told by
    weak references. What an operation allocates and frees within itself is not seen. Those of `inputs` do not count.
    """

    def __init__(self, inputs: Iterable[Tensor]):
        super().__init__()
        self.inputs = {StorageWeakRef(tensor.untyped_storage()) for tensor in inputs}
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired() and ref not in self.inputs}
        self.peak = max(self.peak, sum(self.held.values()))
        return result
