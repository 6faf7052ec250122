"""How long one gradient step takes, in each way and with each peer, side by side: `make bench`.

Every contestant does the same work, forward and backward, on the same batch and the same briefly trained weights. They
take turns in each round, on one core unless told otherwise, and process CPU time is compared within the round, so that
a machine's moods touch all of them alike. The table gives medians over the rounds, and the range of each ratio. One
more step of each tells how much memory it takes, on Linux, and how often it evaluates the field. "First step" is what
the very first took by the clock, compilation included.

torchdiffeq is called as it is, with norms of its own, and is told of the jumps of the Neural CDE. It forgets all that
are left once a step happens to end on one: its evaluations would show that.

"% of the floor" is what the field's matrix products alone would take, over what the step took: those of one evaluation
forward, and three times as many for one backward, timed in the same rounds.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
import torchdiffeq
import tyro
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import acrobot
import speech_commands
from benchmarks import published_field
from common import command_line, provenance, randomness
from datasets import acrobot as acrobot_data
from datasets import speech_commands as speech_commands_data
from torchadjoint import Backsolve, Solution, arguments, solve
from torchadjoint.statistics import SolveStatistics

NUM_TRAINING_STEPS = 30

NUM_LARGE_ROUNDS = 1
"""How often the contestants on a batch of `LARGE_BATCH` samples or more take turns: torchdiffeq needs minutes there."""
LARGE_BATCH = 1024

TIMES = torch.linspace(0, 10, 10)
"""Where the solution of the `NeuralODE` is wanted."""


RESULTS = Path(__file__).parents[1] / "reference"
"""Where `make bench` keeps its output, in a file for each kind of CPU."""

SUMMARY = {
    "torchdiffeq, its default norm": "torchdiffeq, its default norm",
    "torchdiffeq, seminorm": "torchdiffeq, its seminorm",
    "ours, seminorm": "ours, `seminorm`",
    "ours, seminorm, compiled": "the same, `compile=True`",
    "ours, seminorm, warm start": "ours, `seminorm`, warm start",
    "ours, discrete": "ours, `discrete`",
    "diffrax, backsolve with the seminorm": "diffrax, backsolve with the seminorm",
    "diffrax, recursive checkpoints": "diffrax, recursive checkpoints",
}
"""The contestants that the README shows, and what it calls them."""


SUMMARY_BEGIN, SUMMARY_END = "<!-- gradient step: begin -->", "<!-- gradient step: end -->"
"""What stands between them in a file of the output stands in the README too."""


@dataclass
class Contestant:
    """One way to take a gradient step."""

    name: str
    step: Callable[[], object]
    count: Callable[[], tuple[int, int] | str]
    """The same step, which returns the number of evaluations forward and backward, or what else is known of them."""


@dataclass
class Problem:
    """Contestants on the same batch and weights, the first being what the others are compared with."""

    title: str
    contestants: list[Contestant]
    products: list[tuple[int, nn.Linear]]
    """The matrix products of one evaluation of the field: how many rows go through which layer."""
    num_rounds: int


class _Counting(nn.Module):
    """A field that counts its evaluations, the forward ones until `is_backward` is set."""

    def __init__(self, func: nn.Module):
        super().__init__()
        self.func = func
        self.statistics = SolveStatistics()
        self.is_backward = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        counted = self.statistics.backward if self.is_backward else self.statistics.forward
        counted.evaluation_times.append(t.item())
        return self.func(t, y)


class _Unfused(nn.Module):
    """A module without its field written for the solver."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.module(t, y)


class _Traceable(nn.Module):
    """The Neural CDE's field, with a look-up of dX/dt that torch.compile can take; torchcde's it cannot."""

    def __init__(self, field: speech_commands.ControlledField):
        super().__init__()
        self.vector_field = field.vector_field
        self.register_buffer("inner_knots", field.path.grid_points[1:-1])
        self.register_buffer("slopes", field.slopes())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        slope = self.slopes.index_select(0, torch.bucketize(t, self.inner_knots).reshape(1)).squeeze(0)
        return (self.vector_field(z) @ slope.unsqueeze(-1)).squeeze(-1)


class NeuralODE(nn.Module):
    """A model as anyone has one: a network of the state, whose solution is wanted at some times.

    It solves by its attribute `solve`, which each contestant sets.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16)]
        self.vector_field = _Network(nn.Sequential(*layers))

    def forward(self, y0: Tensor) -> tuple[Tensor, SolveStatistics]:
        solution = self.solve(self.vector_field, y0, TIMES)
        return solution.y, solution.statistics


class _Network(nn.Module):
    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


def _solve_traceable(func: nn.Module, *inputs, **options) -> Solution:
    return solve(_Traceable(func), *inputs, **options)


def _solve_unfused(func: nn.Module, *inputs, **options) -> Solution:
    return solve(_Unfused(func), *inputs, **options)


def _solve_stock(
    func: nn.Module,
    y0: Tensor,
    t: Tensor,
    *,
    jump_t: Tensor | None = None,
    norm: str | None = None,
    is_published: bool = False,
    is_counted: bool = False,
    **tolerances,
) -> Solution:
    """torchdiffeq's own adjoint, with its default norm or that of its name `norm`; nothing is counted unless asked."""
    func = published_field.PublishedField(func) if is_published else func
    func = _Counting(func) if is_counted else func
    options = {} if jump_t is None else {"jump_t": jump_t}
    adjoint_options = options if norm is None else {**options, "norm": norm}
    y = torchdiffeq.odeint_adjoint(
        func, y0, t, method="dopri5", options=options, adjoint_options=adjoint_options, **tolerances
    )
    if not is_counted:
        return Solution(y, SolveStatistics())
    func.is_backward = True
    return Solution(y, func.statistics)


def _step(model: nn.Module, batch: tuple[Tensor, ...], loss_function, solver) -> tuple[int, int]:
    model.solve = solver
    model.zero_grad()
    prediction, counted = model(batch[0])
    loss_function(prediction, batch[-1]).backward()
    return counted.forward.nfe, counted.backward.nfe


def _train_briefly(model: nn.Module, batches, loss_function, **options) -> None:
    model.solve = functools.partial(solve, adjoint="discrete", **options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    num_steps = 0
    while num_steps < NUM_TRAINING_STEPS:
        for batch in batches:
            loss_function(model(batch[0])[0], batch[-1]).backward()
            optimiser.step()
            optimiser.zero_grad()
            num_steps += 1
            if num_steps == NUM_TRAINING_STEPS:
                break


def neural_cde(batch_size: int, data_root: str, num_rounds: int) -> Problem:
    """One batch of Speech Commands, which repeats its recordings if they are fewer."""
    tolerances = dict(rtol=1e-3, atol=1e-6)
    order = randomness.stream(0, "batch order")
    data = speech_commands_data.load(
        data_root=data_root, split="published", batch_size=min(batch_size, 128), device="cpu", generator=order
    )
    with randomness.seeded(0, "weights"):
        config = speech_commands.Config("cpu", "seminorm")
        model = speech_commands.build(config)
    _train_briefly(model, data.train, functional.cross_entropy, **tolerances)
    num_recordings = min(batch_size, data.train.dataset_size)
    chosen = torch.arange(batch_size) % num_recordings
    batch = tuple(tensor[chosen] for tensor in data.train.tensors)
    step = functools.partial(_step, model, batch, functional.cross_entropy)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, {}),
        "torchdiffeq, seminorm": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm, autograd's field, compiled": (_solve_traceable, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, per-tensor": (solve, dict(adjoint="per-tensor")),
    }
    repeated = "" if num_recordings == batch_size else f" ({num_recordings} recordings, repeated)"
    layers = [*model.vector_field.hidden, model.vector_field.last]
    return Problem(
        f"Neural CDE, batch {batch_size}{repeated}",
        _contestants(step, ways, tolerances, "neural_cde_step", model, *batch),
        [(batch_size, layer) for layer in layers],
        min(num_rounds, NUM_LARGE_ROUNDS) if batch_size >= LARGE_BATCH else num_rounds,
    )


def symplectic_ode_net(num_rounds: int) -> Problem:
    """One batch of acrobot's windows; torchdiffeq has the published code's field, unless said otherwise."""
    tolerances = dict(rtol=1e-4, atol=1e-4)
    data = acrobot_data.load(batch_size=256, device="cpu", generator=randomness.stream(0, "batch order"))
    with randomness.seeded(0, "weights"):
        model = acrobot.build(acrobot.Config("cpu", "seminorm"))
    _train_briefly(model, data.train, functional.mse_loss, **tolerances)
    batch = next(iter(data.train))
    step = functools.partial(_step, model, batch, functional.mse_loss)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, dict(is_published=True)),
        "torchdiffeq, seminorm": (_solve_stock, dict(is_published=True, norm="seminorm")),
        "torchdiffeq, seminorm, our field": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, warm start": (solve, dict(adjoint=Backsolve(warm_start=True))),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, as-published": (solve, dict(adjoint="as-published")),
    }
    field = model.vector_field
    # The inverse mass and the potential with their derivative along dq/dt, the control without.
    rows = {field.factor: 2 * 256, field.potential: 2 * 256, field.control: 256}
    return Problem(
        "Symplectic ODE-Net, batch 256",
        _contestants(step, ways, tolerances, "symplectic_step", model, batch[0], acrobot_data.TIMES),
        [(num_rows, layer) for network, num_rows in rows.items() for layer in network.layers],
        num_rounds,
    )


def neural_ode(num_rounds: int) -> Problem:
    """A batch of points that turn about the origin."""
    tolerances = dict(rtol=1e-5, atol=1e-7)
    with randomness.seeded(0, "weights"):
        model = NeuralODE()
    numbers = randomness.stream(0, "points")
    spin = torch.randn(16, 16, generator=numbers) / 16
    y0 = torch.randn(64, 16, generator=numbers)
    batch = y0, torch.stack([y0 @ torch.linalg.matrix_exp((spin - spin.T) * t) for t in TIMES])
    _train_briefly(model, [batch], functional.mse_loss, **tolerances)
    step = functools.partial(_step, model, batch, functional.mse_loss)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, {}),
        "torchdiffeq, seminorm": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, warm start": (solve, dict(adjoint=Backsolve(warm_start=True))),
        "ours, seminorm, compiled": (solve, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm, compiled, warm start": (solve, dict(adjoint=Backsolve(warm_start=True), compile=True)),
        "ours, discrete": (solve, dict(adjoint="discrete")),
    }
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return Problem(
        f"Network 16-64-64-16, batch 64, {len(TIMES)} output times",
        _contestants(step, ways, tolerances, "neural_ode_step", model, *batch, TIMES),
        [(64, layer) for layer in layers],
        num_rounds,
    )


def _contestants(step: Callable, ways: dict, tolerances: dict, peer: str, *of_peer) -> list[Contestant]:
    """Ours and torchdiffeq's by `step`; diffrax's by the function `peer` of `with_diffrax`, if diffrax is installed."""
    found = []
    for name, (function, options) in ways.items():
        solver = functools.partial(function, **tolerances, **options)
        counting = functools.partial(solver, is_counted=True) if function is _solve_stock else solver
        found.append(Contestant(name, functools.partial(step, solver), functools.partial(step, counting)))
    if _is_installed("diffrax"):
        from benchmarks import with_diffrax

        for adjoint in with_diffrax.ADJOINTS:
            diffrax_step = getattr(with_diffrax, peer)(*of_peer, adjoint=adjoint, **tolerances)
            count = functools.partial(_count_diffrax, diffrax_step)
            found.append(Contestant(adjoint, diffrax_step, count))
    return found


def _count_diffrax(step: Callable[[], tuple[int, float]]) -> str:
    num_steps, _ = step()
    return f"{num_steps} steps"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _Floor:
    """Seconds of the matrix products of a field: of one evaluation forward, and of one backward.

    Forward each layer has one product; backward three, the others being those with the cotangents. The rows are taken
    at once or in pieces, whatever is fastest.
    """

    def __init__(self, products: Sequence[tuple[int, nn.Linear]]):
        self.products = products

    def measure(self, clock: Callable[[], float]) -> tuple[float, float]:
        seconds = [self._fastest(num_rows, layer.weight.detach(), clock) for num_rows, layer in self.products]
        forward = sum(one for one, _ in seconds)
        return forward, forward + sum(others for _, others in seconds)

    def _fastest(self, num_rows: int, weight: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
        pieces = {num_rows, *(size for size in (32, 64, 128, 256) if num_rows % size == 0)}
        taken = [self._seconds(num_rows, size, weight, clock) for size in pieces]
        return min(one for one, _ in taken), min(others for _, others in taken)

    @staticmethod
    def _seconds(num_rows: int, size: int, weight: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
        inputs, cotangents = torch.rand(size, weight.shape[1]), torch.rand(size, weight.shape[0])
        outputs, by_inputs, by_weight = cotangents.clone(), inputs.clone(), torch.zeros_like(weight)
        num_repetitions = math.ceil(2e8 / (size * weight.numel()))
        started = clock()
        for _ in range(num_repetitions):
            torch.mm(inputs, weight.T, out=outputs)
        between = clock()
        for _ in range(num_repetitions):
            torch.mm(cotangents, weight, out=by_inputs)
            torch.addmm(by_weight, cotangents.T, inputs, out=by_weight)
        ended = clock()
        per_call = num_rows / size / num_repetitions
        return (between - started) * per_call, (ended - between) * per_call


def compare(problem: Problem, clock: Callable[[], float]) -> pandas.DataFrame:
    """Seconds by `clock` of each contestant, and how many times faster than the first: median and range over rounds."""
    contestants, floor = problem.contestants, _Floor(problem.products)
    seconds = {contestant.name: [] for contestant in contestants}
    floors, first = [], {}
    for contestant in tqdm(contestants, desc="warming up", unit="contestant", disable=None):
        started = time.perf_counter()
        contestant.step()
        first[contestant.name] = time.perf_counter() - started
    for _ in tqdm(range(problem.num_rounds), unit="round", disable=None):
        floors.append(floor.measure(clock))
        for contestant in contestants:
            started = clock()
            contestant.step()
            seconds[contestant.name].append(clock() - started)
    baseline = seconds[contestants[0].name]
    rows = []
    for contestant in contestants:
        taken = seconds[contestant.name]
        mebibytes, evaluations = _peak_memory(contestant.count)
        ratios = [base / own for base, own in zip(baseline, taken, strict=True)]
        is_counted = isinstance(evaluations, tuple)
        shares = [_share(evaluations, *floor) / own for floor, own in zip(floors, taken, strict=True) if is_counted]
        rows.append(
            {
                "gradient step": contestant.name,
                "NFE, forward + backward": " + ".join(map(str, evaluations)) if is_counted else evaluations,
                "seconds": f"{statistics.median(taken):#.3g}",
                "times faster than the first": f"{statistics.median(ratios):#.3g}",
                "range": f"{min(ratios):#.3g} to {max(ratios):#.3g}",
                "% of the floor": f"{100 * statistics.median(shares):.0f}" if shares else "",
                "MiB": mebibytes,
                "first step": f"{first[contestant.name]:.1f}",
            }
        )
    return pandas.DataFrame(rows)


def _share(evaluations: tuple[int, int], forward: float, backward: float) -> float:
    """Seconds of the matrix products of so many evaluations, given those of one in each direction."""
    return evaluations[0] * forward + evaluations[1] * backward


def summarise(tables: dict[str, pandas.DataFrame]) -> str:
    """What the README shows of the tables, by the titles of their problems: the seconds, in Markdown."""
    columns = {
        title: table.set_index("gradient step")["seconds"].reindex(list(SUMMARY)).rename(SUMMARY)
        for title, table in tables.items()
    }
    summary = pandas.DataFrame(columns).dropna(how="all").fillna("").rename_axis("seconds").reset_index()
    return _markdown(summary)


def _markdown(table: pandas.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * (table.shape[1] - 1)))


def _peak_memory(count: Callable[[], object]) -> tuple[str, object]:
    """How far the process's resident memory rises during a step, in MiB, and what the step returns.

    The first is empty where the system does not tell.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return "", count()
    # What was freed goes back to the system first, so that the step must ask for all that it needs.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak becomes what is resident now
    before = _resident(status, "VmRSS")
    counted = count()
    return f"{(_resident(status, 'VmHWM') - before) / 1024:.0f}", counted


def _resident(status: Path, name: str) -> int:
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def kind_of_cpu() -> str:
    """The maker of the CPU, such as "amd" or "intel", else its architecture."""
    names = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    makers = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return names.get(makers[0] if makers else "", platform.machine().lower())


def main(
    data_root: str = "synthetic",
    rounds: int = 5,
    problems: tuple[str, ...] = ("32", "128", "1024", "acrobot", "network"),
    cores: int = 1,
    output: Path | None = None,
) -> None:
    """Compares gradient steps, and prints a table in Markdown for each problem.

    Args:
        data_root: the Speech Commands recordings, or "synthetic".
        rounds: how often every contestant takes its turn; once only for 1024 samples and more.
        problems: batch sizes of the Neural CDE, "acrobot" for the Symplectic ODE-Net, "network" for a neural ODE.
        cores: how many cores, with a thread on each. On one, CPU seconds are compared, else seconds by the clock.
        output: folder in which what is printed is kept too, in a file for each kind of CPU.
    """
    available = sorted(os.sched_getaffinity(0))
    cores = arguments.whole_number("cores", cores, maximum=len(available))
    rounds = arguments.whole_number("rounds", rounds)
    torch.set_num_threads(cores)
    os.sched_setaffinity(0, available[:cores])
    if cores == 1:
        # Read when jax is first used.
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    seconds, clock = ("CPU seconds", time.process_time) if cores == 1 else ("seconds by the clock", time.perf_counter)
    machine = provenance.describe(torch.device("cpu"))
    packages = [name for name in ("torch", "torchdiffeq", "diffrax", "jax") if _is_installed(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    data = "synthetic recordings" if data_root == "synthetic" else "real recordings"
    parts = [
        f"# {seconds} of one gradient step\n{machine['device_name']}, {cores} of its cores; "
        f"Python {platform.python_version()}, {versions}; commit {machine['commit']}; {data}"
    ]
    if not _is_installed("diffrax"):
        parts[0] += "\n\ndiffrax is left out: it is not installed (`pip install -r requirements-bench.txt`)."
    print(parts[0])
    tables = {}
    with tempfile.TemporaryDirectory() as empty:
        # What an earlier run has compiled is compiled again.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for name in problems:
            if name == "acrobot":
                problem = symplectic_ode_net(rounds)
            elif name == "network":
                problem = neural_ode(rounds)
            else:
                problem = neural_cde(int(name), data_root, rounds)
            tables[problem.title] = compare(problem, clock)
            num_rounds = f"{problem.num_rounds} round{'s' if problem.num_rounds > 1 else ''}"
            parts.append(f"### {problem.title}, {num_rounds}\n{_markdown(tables[problem.title])}")
            print(f"\n{parts[-1]}", flush=True)
    parts.insert(1, f"{SUMMARY_BEGIN}\n{summarise(tables)}\n{SUMMARY_END}")
    print(f"\n{parts[1]}")
    if output is not None:
        on_cores = "" if cores == 1 else f"-{cores}-cores"
        path = output / f"gradient_step-{kind_of_cpu()}{on_cores}.md"
        output.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(parts) + "\n")
        print(f"\nKept in {path}")


if __name__ == "__main__":
    command_line.call(tyro.cli, main)
