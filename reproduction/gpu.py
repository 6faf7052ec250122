"""What a GPU gives, in one command: `make gpu`, under ten minutes on one card. Without a GPU it says so and ends.

It runs the tests that need a GPU. Then it takes one gradient step of every experiment at the paper's batch size in
several ways, which take turns in each round: stock torchdiffeq, ours kernel by kernel, ours in CUDA graphs, the same
with deterministic algorithms, and the discrete adjoint. At last it trains the Neural CDE for two epochs.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas
import torch
from torch import Tensor, nn

from common import command_line, provenance
from common.training import set_full_precision
from torchadjoint import arguments

from .experiments import EXPERIMENTS
from .gradients import relative_error
from .measurements import read_record, save_record
from .runs import load_data
from .typesetting import Table

ROOT = Path(__file__).parents[1]
FILE = "gpu.json"
"""In the results folder."""
KERNELS, GRAPHS = "ours, kernel by kernel", "ours, CUDA graphs"


@dataclass(frozen=True)
class Way:
    """One way to take a gradient step: settings of the experiment, and what else is done for it."""

    settings: dict[str, str]
    has_graphs: bool = True
    is_deterministic: bool = False

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, steps are taken in this way."""
        without_graphs = mock.patch("torchadjoint.replay.can_record", return_value=False)
        torch.use_deterministic_algorithms(self.is_deterministic)
        try:
            with contextlib.nullcontext() if self.has_graphs else without_graphs:
                yield
        finally:
            torch.use_deterministic_algorithms(False)


SEMINORM = {"norm": "seminorm"}
WAYS = {
    "torchdiffeq, seminorm": Way({**SEMINORM, "solver": "torchdiffeq"}),
    KERNELS: Way(SEMINORM, has_graphs=False),
    GRAPHS: Way(SEMINORM),
    f"{GRAPHS}, deterministic": Way(SEMINORM, is_deterministic=True),
    "ours, discrete": Way({"norm": "discrete"}),
}


@dataclass(frozen=True)
class Options(command_line.Paths):
    """Measures what a GPU gives, and keeps it in `gpu.json` of the results folder, which the report shows."""

    results_dir: str = "results"
    """Folder of the results files."""
    data_root: str = "synthetic"
    """Folder of the Speech Commands recordings, or "synthetic"."""
    rounds: int = 5
    """How often every way takes its turn."""

    def __post_init__(self):
        super().__post_init__()
        arguments.whole_number("rounds", self.rounds)


def gradient_steps(experiment: str, config, num_rounds: int) -> list[dict[str, str | float | int]]:
    """One row for each of `WAYS`: NFE, milliseconds by the clock, peak of memory, and the gradient's difference.

    The difference is that from the gradient of `KERNELS`, over its norm. Milliseconds are the median over the rounds,
    after a warm-up. Memory is what the allocator counts above its start: MiB, 0 on the CPU.

    Args:
        experiment: one of `EXPERIMENTS`.
        config: its settings, of which the batch size, the device and those of the data count.
        num_rounds: how often every way takes its turn.
    """
    set_full_precision()  # as in a training
    # As it is measured: what a flow draws at random is the same for every way.
    model = importlib.import_module(experiment).build(config).to(config.device).eval()
    data = load_data(experiment, config).train
    chosen = torch.arange(config.batch_size) % data.dataset_size
    batch = tuple(tensor[chosen].to(config.device) for tensor in data.tensors)
    steps = {}
    for name, way in WAYS.items():
        solver = dataclasses.replace(config, **way.settings).solve
        steps[name] = functools.partial(
            _gradient_step, model, batch, EXPERIMENTS[experiment].gradients.loss_function, solver, way
        )
    found = {name: _measured(model, step, config.device) for name, step in steps.items()}
    milliseconds = {name: [] for name in WAYS}
    for _ in range(num_rounds):
        for name, step in steps.items():
            _, _, seconds = step()
            milliseconds[name].append(1e3 * seconds)
    exact, _, _ = found[KERNELS]
    return [
        {
            "experiment": experiment,
            "batch_size": config.batch_size,
            "way": name,
            "forward_nfe": counted.forward.nfe,
            "backward_nfe": counted.backward.nfe,
            "milliseconds": statistics.median(milliseconds[name]),
            "mebibytes": mebibytes,
            "difference": relative_error(gradient, exact),
        }
        for name, (gradient, counted, mebibytes) in found.items()
    ]


def _gradient_step(model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable, solver: Callable, way: Way):
    """The gradient (flat), the statistics of the solve, and seconds by the clock."""
    model.solve = solver
    model.zero_grad()
    _synchronise(batch[0].device)
    started = time.perf_counter()
    with way.applied():
        prediction, counted = model(batch[0])
        loss_function(prediction, batch[-1]).backward()
        _synchronise(batch[0].device)
    seconds = time.perf_counter() - started
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), copy.deepcopy(counted), seconds


def _measured(model: nn.Module, step: Callable, device: str):
    """Gradient, statistics and MiB of a step after a first one."""
    step()
    model.zero_grad()  # so that `before` does not count the first gradient
    if not device.startswith("cuda"):
        return (*step()[:2], 0.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient, counted, _ = step()
    return gradient, counted, (torch.cuda.max_memory_allocated() - before) / 2**20


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict]) -> pandas.DataFrame:
    """The rows of `gradient_steps` as text."""
    frame = pandas.DataFrame(rows)
    return pandas.DataFrame(
        {
            "experiment": [
                f"{EXPERIMENTS[name].title}, batch {size}"
                for name, size in zip(frame["experiment"], frame["batch_size"], strict=True)
            ],
            "way": frame["way"],
            "NFE": [f"{row.forward_nfe:,} + {row.backward_nfe:,}" for row in frame.itertuples()],
            "ms": frame["milliseconds"].map("{:.3g}".format),
            "MiB": frame["mebibytes"].map("{:.0f}".format),
            "difference": frame["difference"].map("{:.0e}".format),
        }
    )


def tables(results_dir: str) -> list[Table]:
    """What `main` kept in this folder, for the report: one table, or none."""
    path = Path(results_dir, FILE)
    record = read_record(path)
    if record is None:
        return []
    if not isinstance(record, dict) or not {"provenance", "rows", "rounds"} <= record.keys():
        raise ValueError(f"{path} is not what `make gpu` writes: move it away, and do that again")
    note = (
        f"{record['provenance']['device_name']}; median of {record['rounds']} rounds, by the clock. Difference: of the "
        f"gradient from that of `{KERNELS}`, over its norm. The tests that need a GPU "
        f"{'passed' if record['tests_passed'] else 'FAILED'}."
    )
    if seconds := record["seconds_of_two_epochs"]:
        note += f" Two epochs of the Neural CDE on {record['num_samples']:,} samples took {seconds:.0f} s."
    return [Table("A gradient step on a GPU", table(record["rows"]), (note,))]


def main(options: Options) -> None:
    """Everything, on the first GPU."""
    if not torch.cuda.is_available():
        print("No GPU: there is nothing to measure. What needs one is skipped by `make test` too.")
        return
    # Read when cuBLAS is first used; deterministic algorithms need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    tests = subprocess.run([sys.executable, "-m", "pytest", "--quiet", "-m", "gpu"], cwd=ROOT, check=False)
    rows = []
    for experiment in EXPERIMENTS:
        config_class = importlib.import_module(experiment).Config
        data = {} if EXPERIMENTS[experiment].stand_in is None else {"data_root": options.data_root}
        rows += gradient_steps(experiment, config_class("cuda", "seminorm", **data), options.rounds)
        print(table([row for row in rows if row["experiment"] == experiment]).to_markdown(index=False), flush=True)
    record = {
        "provenance": provenance.describe(torch.device("cuda")),
        "rounds": options.rounds,
        "tests_passed": tests.returncode == 0,
        "rows": rows,
        "seconds_of_two_epochs": None,
        "num_samples": None,
    }
    path = Path(options.results_dir, FILE)
    save_record(path, record)  # before the training, which may fail
    results = importlib.import_module("speech_commands").main(
        "cuda", "seminorm", data_root=options.data_root, max_epochs=2, results_dir=options.results_dir
    )
    record["seconds_of_two_epochs"] = sum(epoch.seconds for epoch in results.epochs)
    save_record(path, record | {"num_samples": results.train_metrics.dataset_size})
    print(f"Kept in {path}")
    if tests.returncode:
        sys.exit("Some of the tests that need a GPU failed: see above.")


if __name__ == "__main__":
    command_line.run(Options, main)
