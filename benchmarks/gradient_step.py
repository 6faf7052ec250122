"""How long one gradient step takes, in each way and with each peer, side by side: `make bench`.

Every contestant does the same work, forward and backward, on the same batch and the same briefly trained weights. They
take turns in each round, on one core unless told otherwise, and process CPU time is compared within the round, so that
a machine's moods touch all of them alike. The table gives medians over the rounds, and the range of each ratio. One
more step of each tells how much memory it takes, on Linux, and how often it evaluates the field. "First step" is what
the very first took by the clock, compilation included.

"% of the floor" is what the field's matrix products alone would take, over what the step took: those of one evaluation
forward, and three times as many for one backward, timed in the same rounds. `discrete` has none: its products of the
way back are more than its evaluations there.
"""

import importlib.metadata
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.memory import peak_growth
from benchmarks.problems import (
    Problem,
    continuous_flow,
    is_installed,
    neural_cde,
    neural_ode,
    symplectic_ode_net,
)
from common import command_line, files, provenance
from torchadjoint import arguments

SUMMARY = {
    "torchdiffeq, its default norm": "torchdiffeq, its default norm",
    "torchdiffeq, seminorm": "torchdiffeq, its seminorm",
    "torchdiffeq, seminorm, our field": "torchdiffeq, its seminorm, our field",
    "ours, seminorm": "ours, `seminorm`",
    "ours, seminorm, autograd's field": "the same, autograd's field",
    "ours, seminorm, compiled": "the same, `compile=True`",
    "ours, seminorm, integrals unweighed": "the same, integrals unweighed",
    "ours, seminorm, warm start": "ours, `seminorm`, warm start",
    "ours, seminorm, compiled, warm start": "the same, `compile=True`",
    "ours, discrete": "ours, `discrete`",
    "ours, discrete, compiled": "the same, `compile=True`",
    "ours, discrete, compiled solve": 'the same, `compile="solve"`',
    "ours, discrete, all stages kept": "ours, `discrete`, all stages kept",
    "diffrax, backsolve with the seminorm": "diffrax, backsolve with the seminorm",
    "diffrax, recursive checkpoints": "diffrax, recursive checkpoints",
}
"""The contestants that docs/benchmark.md shows, and what it calls them."""


BUILDERS = {"acrobot": symplectic_ode_net, "network": neural_ode, "flow": continuous_flow}
"""What makes a problem that is no batch size of the Neural CDE, given the number of rounds."""
SUMMARY_BEGIN, SUMMARY_END = "<!-- gradient step: begin -->", "<!-- gradient step: end -->"
"""What stands between them in a file of the output stands in docs/benchmark.md too."""


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
        mebibytes, evaluations = peak_growth(contestant.count)
        ratios = [base / own for base, own in zip(baseline, taken, strict=True)]
        is_counted = isinstance(evaluations, tuple)
        has_floor = is_counted and "discrete" not in contestant.name
        shares = [_share(evaluations, *floor) / own for floor, own in zip(floors, taken, strict=True) if has_floor]
        rows.append(
            {
                "gradient step": contestant.name,
                "NFE, forward + backward": " + ".join(map(str, evaluations)) if is_counted else evaluations,
                "seconds": f"{statistics.median(taken):#.3g}",
                "times faster than the first": f"{statistics.median(ratios):#.3g}",
                "range": f"{min(ratios):#.3g} to {max(ratios):#.3g}",
                "% of the floor": f"{100 * statistics.median(shares):.0f}" if shares else "",
                "MiB": "" if mebibytes is None else f"{mebibytes:.0f}",
                "first step": f"{first[contestant.name]:.1f}",
            }
        )
    return pandas.DataFrame(rows)


def _share(evaluations: tuple[int, int], forward: float, backward: float) -> float:
    """Seconds of the matrix products of so many evaluations, given those of one in each direction."""
    return evaluations[0] * forward + evaluations[1] * backward


def summarise(tables: dict[str, pandas.DataFrame]) -> str:
    """What docs/benchmark.md shows of the tables, by the titles of their problems: the seconds, in Markdown."""
    columns = {
        title: table.set_index("gradient step")["seconds"].reindex(list(SUMMARY)).rename(SUMMARY)
        for title, table in tables.items()
    }
    summary = pandas.DataFrame(columns).dropna(how="all").fillna("").rename_axis("seconds").reset_index()
    return _markdown(summary)


def _markdown(table: pandas.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * (table.shape[1] - 1)))


def kind_of_cpu(device_name: str) -> str:
    """The maker of the CPU, such as "amd" or "intel", else its architecture."""
    return next((maker for maker in ("amd", "intel") if maker in device_name.lower()), platform.machine().lower())


def main(
    data_root: str = "synthetic",
    rounds: int = 5,
    problems: tuple[str, ...] = ("32", "128", "1024", "acrobot", "network", "flow"),
    cores: int = 1,
    output: Path | None = None,
) -> None:
    """Compares gradient steps, and prints a table in Markdown for each problem.

    Args:
        data_root: the Speech Commands recordings, or "synthetic".
        rounds: how often every contestant takes its turn; once only for 1024 samples and more.
        problems: batch sizes of the Neural CDE, "acrobot" for the Symplectic ODE-Net, "network" for a neural ODE,
            "flow" for a continuous normalising flow.
        cores: how many cores, with a thread on each. On one, CPU seconds are compared, else seconds by the clock.
        output: folder in which what is printed is kept too, in a file for each kind of CPU, problem by problem.
    """
    for name in problems or [""]:
        if name not in BUILDERS and not (name.isdigit() and int(name)):
            arguments.refuse("problems", name, f"a batch size, or one of {', '.join(BUILDERS)}")
    has_affinity = hasattr(os, "sched_setaffinity")  # not on macOS
    available = sorted(os.sched_getaffinity(0)) if has_affinity else range(os.cpu_count())
    cores = arguments.whole_number("cores", cores, maximum=len(available))
    rounds = arguments.whole_number("rounds", rounds)
    torch.set_num_threads(cores)
    if has_affinity:
        os.sched_setaffinity(0, available[:cores])
    # Read when jax is first used.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if cores == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    seconds, clock = ("CPU seconds", time.process_time) if cores == 1 else ("seconds by the clock", time.perf_counter)
    machine = provenance.describe(torch.device("cpu"))
    packages = [name for name in ("torch", "torchdiffeq", "diffrax", "jax") if is_installed(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    data = "synthetic recordings" if data_root == "synthetic" else "real recordings"
    head = (
        f"# {seconds} of one gradient step\n{machine['device_name']}, {cores} of its cores; "
        f"Python {platform.python_version()}, {versions}; commit {machine['commit']}; {data}"
    )
    if not is_installed("diffrax"):
        head += "\n\ndiffrax is left out: it is not installed (`pip install -r requirements-bench.txt`)."
    print(head)
    on_cores = "" if cores == 1 else f"-{cores}-cores"
    tables, parts = {}, []
    with tempfile.TemporaryDirectory() as empty:
        # What an earlier run has compiled is compiled again.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for name in problems:
            problem = BUILDERS[name](rounds) if name in BUILDERS else neural_cde(int(name), data_root, rounds)
            tables[problem.title] = compare(problem, clock)
            num_rounds = f"{problem.num_rounds} round{'s' if problem.num_rounds > 1 else ''}"
            parts.append(f"### {problem.title}, {num_rounds}\n{_markdown(tables[problem.title])}")
            print(f"\n{parts[-1]}", flush=True)
            summary = f"{SUMMARY_BEGIN}\n{summarise(tables)}\n{SUMMARY_END}"
            if output is not None:
                path = output / f"gradient_step-{kind_of_cpu(machine['device_name'])}{on_cores}.md"
                output.mkdir(parents=True, exist_ok=True)
                files.replace(path, ("\n\n".join([head, summary, *parts]) + "\n").encode())
    print(f"\n{summary}")
    if output is not None:
        print(f"\nKept in {path}")


if __name__ == "__main__":
    command_line.call(tyro.cli, main)
