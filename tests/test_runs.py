"""The presets are the runs that they are said to be, and results files are recognised as theirs."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from prose import committed_runs

import acrobot
import flow
import speech_commands
from datasets.flow import TOY_SIZES, Toy
from datasets.speech_commands import WORDS, _published_parts
from reproduction import runs as runs_module
from reproduction.experiments import EXPERIMENTS, FLOW
from reproduction.runs import PRESETS, Run, identity, identity_of, preset_runs
from reproduction.status import Status, begun, on_found_data, statuses

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reference"
NORMS = ("default", "per-tensor", "seminorm")
PUBLISHED = ("speech_commands", "acrobot")
"""The experiments whose code was released."""


def conditions(runs):
    """How many seeds there are of each condition."""
    return Counter((run.experiment, run.config.rtol, run.config.max_epochs, run.way) for run in runs)


def test_the_runs_of_the_paper():
    norms = (*NORMS, "discrete")
    assert conditions(preset_runs("paper", experiments=PUBLISHED)) == Counter(
        {
            **{("speech_commands", rtol, 200, norm): 5 for rtol in (1e-3, 1e-4, 1e-5) for norm in norms},
            **{("acrobot", 1e-4, 50, norm): 5 for norm in (*norms, "as-published", "seminorm, warm start")},
        }
    )
    for run in preset_runs("paper", experiments=PUBLISHED):
        default = (speech_commands if run.experiment == "speech_commands" else acrobot).Config("cpu", run.config.norm)
        own = {name: getattr(run.config, name) for name in ("rtol", "atol", "seed", "warm_start")}
        assert replace(default, **own) == run.config
    pairs = {(run.config.rtol, run.config.atol) for run in preset_runs("paper", experiments=["speech_commands"])}
    assert pairs == set(speech_commands.TOLERANCES)
    assert runs_module.TOLERANCES == speech_commands.TOLERANCES


def test_the_runs_for_a_cpu():
    norms = ("default", "seminorm", "discrete")
    tight = {("speech_commands", rtol, 24, norm): 3 for rtol in (1e-4, 1e-5) for norm in norms}
    tight |= {("speech_commands", rtol, 24, "per-tensor"): 1 for rtol in (1e-4, 1e-5)}
    loose = {("speech_commands", 1e-3, 24, norm): 3 for norm in NORMS}
    loose |= {("speech_commands", 1e-3, 48, norm): 1 for norm in ("default", "seminorm")}
    acrobots = {("acrobot", 1e-4, 3, norm): 3 for norm in ("default", "seminorm", "as-published")}
    acrobots |= {("acrobot", 1e-4, 50, norm): 1 for norm in ("default", "seminorm", "as-published", "discrete")}
    beyond = {("acrobot", 1e-4, 50, "seminorm, warm start"): 1}
    beyond |= {("speech_commands", 1e-3, 24, "discrete"): 3, ("speech_commands", 1e-3, 24, "discrete, bosh3"): 3}
    runs = preset_runs("cpu", data_root="recordings", experiments=PUBLISHED)
    assert conditions(runs) == Counter({**tight, **loose, **acrobots, **beyond})
    sizes = {(run.experiment, run.config.batch_size, run.config.metric_interval) for run in runs}
    assert sizes == {("speech_commands", 128, 2), ("acrobot", 256, 1), ("acrobot", 256, 10)}


def test_the_quick_runs_take_the_recordings_if_there_are_any():
    roots = [
        {run.settings["data_root"] for run in preset_runs("quick", experiments=["speech_commands"], data_root=root)}
        for root in (None, "recordings")
    ]
    assert roots == [{"synthetic"}, {"recordings"}]
    assert len(preset_runs("quick")) == 7


def test_the_runs_of_flows():
    """MNIST and CIFAR-10 as FFJORD has them, at three widths; toys of 3,000 iterations, tables and digits for a CPU."""
    paper, runs = (preset_runs(preset, experiments=["flow"]) for preset in ("paper", "cpu"))
    ways = 4  # and in the preset for a CPU one more, integrals that are not weighed
    assert Counter(run.group for run in paper) == {
        f"{data}, width {width}": 5 * ways for data in ("mnist", "cifar10") for width in (32, 64, 128)
    }
    assert {(run.config.rtol, run.config.atol, run.config.batch_size, run.config.max_epochs) for run in paper} == {
        (1e-5, 1e-5, 200, 100)
    }
    seeds = {"checkerboard": 3, "8gaussians": 3, "2spirals": 3, "wine": 1, "breast_cancer": 1, "digits, width 16": 2}
    of_all_ways = {group: number * (ways + 1) for group, number in seeds.items()}
    assert Counter(run.group for run in runs) == of_all_ways | {f"digits, width {width}": 1 for width in (32, 64)}
    for run in runs:
        if run.config.data in get_args(Toy):
            assert run.config.max_epochs * TOY_SIZES[0] // run.config.batch_size >= 3000


@pytest.mark.parametrize("group", FLOW.measured_groups)
def test_the_options_of_a_group_make_a_run_of_it(group):
    words = FLOW.options_of(group).split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    config = flow.Config("cpu", "seminorm", data=options["--data"], width=int(options.get("--width", 0)) or None)
    assert FLOW.group(vars(config)) == group
    assert EXPERIMENTS["acrobot"].options_of(None) == ""


@pytest.mark.parametrize("preset", PRESETS)
def test_seeds_can_be_more_and_come_one_after_the_other(preset):
    seeds = [run.config.seed for run in preset_runs(preset, num_seeds=2)]
    assert seeds == [0] * (len(seeds) // 2) + [1] * (len(seeds) // 2)
    assert len({run.identity for run in preset_runs(preset, num_seeds=2)}) == len(seeds)


def speech_run(**settings):
    return Run("speech_commands", {"norm": "seminorm", "data_root": "recordings", **settings}, "abc")


@pytest.mark.parametrize("change", [{"data_root": "/elsewhere"}, {"data_root": None}, {"norm": True}, {"rtol": 0.001}])
def test_the_same_run(change):
    assert speech_run(**change).identity == speech_run().identity


@pytest.mark.parametrize(
    "change", [{"data_root": "synthetic"}, {"norm": "default"}, {"seed": 1}, {"published_metrics": True}, {"rtol": 0.1}]
)
def test_another_run(change):
    assert speech_run(**change).identity != speech_run().identity


def test_a_run_on_other_recordings_is_another():
    assert replace(speech_run(), digest="other").identity != speech_run().identity
    assert replace(speech_run(), digest=None).identity != speech_run().identity


def test_where_and_whither_a_run_went_does_not_matter():
    config = asdict(speech_run().config)
    free = {"device": "cuda:3", "results_dir": "/elsewhere", "resume": True}
    assert identity("speech_commands", config | free, "abc") == speech_run().identity
    assert identity("acrobot", config, "abc") != speech_run().identity


def test_a_setting_that_an_older_file_lacks_is_at_its_default():
    config = asdict(speech_run().config)
    for name in ("warm_start", "published_metrics", "split"):
        del config[name]
    assert identity("speech_commands", config, "abc") == speech_run().identity
    assert identity("speech_commands", config, "abc") != speech_run(split="official").identity


def test_the_recordings_of_the_committed_runs_are_named():
    names = (RESULTS / "recordings.txt").read_text().split()
    labels = torch.tensor([WORDS.index(name.partition("/")[0]) for name in names])
    parts = _published_parts(labels)
    lines = [line for part, indices in parts.items() for line in (part, *(names[index] for index in indices))]
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    runs = [run for run in committed_runs() if run.experiment == "speech_commands"]
    assert {run.provenance["split"] for run in runs} == {digest}


def test_the_committed_results_are_recognised_as_the_cpu_presets():
    results = committed_runs()
    runs = on_found_data(preset_runs("cpu"), results)
    found = [identity_of(result) for result in results]
    assert len(found) == len(set(found))
    assert set(found) <= {run.identity for run in runs}
    done = {status.run.identity for status in statuses(runs, str(RESULTS)) if status.state == "done"}
    assert done == set(found)
    # What was too long to make for all seeds is shown as missing.
    assert {run.experiment for run in runs if run.identity not in done} <= {"flow"}


def test_a_sweep_of_acrobot_needs_nothing_of_speech_commands():
    program = (
        "import sys, tables, reproduction.runs as r; [run.identity for run in r.preset_runs('paper', "
        "experiments=['acrobot'])]; print([n for n in ('torchaudio', 'soundfile', 'torchcde') if n in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert process.stdout.strip() == "[]"


# How the released analysis scripts read results: JSON at results/<experiment>/<condition>/<run>; a condition is the
# norm, rtol and atol (and the sizes) joined by '-', with '.' replaced by '-'; everything by its published name.
METRICS = {
    "dataset_size", "loss", "timestamp", "timespan", "forward_nfe", "backward_nfe", "forward_ts", "backward_ts",
    "forward_accept_ts", "forward_reject_ts", "backward_accept_ts", "backward_reject_ts",
}  # fmt: skip
RUN = {
    "memory_usage", "baseline_memory", "start_time", "timespan", "parameters", "history",
    "train_metrics", "val_metrics", "test_metrics",
}  # fmt: skip


def published_condition(*parts):
    return "-".join(str(part) for part in parts).replace(".", "-")


@pytest.mark.parametrize(
    ("experiment", "norm", "rtol", "atol"),
    [
        ("speech_commands", "default", 1e-3, 1e-6),
        ("speech_commands", "seminorm", 1e-3, 1e-6),
        ("acrobot", "default", 1e-4, 1e-4),
        ("acrobot", "seminorm", 1e-4, 1e-4),
        ("acrobot", "as-published", 1e-4, 1e-4),
    ],
)
def test_the_authors_scripts_can_read_the_results(experiment, norm, rtol, atol):
    [*paths] = RESULTS.glob(f"{experiment}/{published_condition(norm, rtol, atol)}-*/*.json")
    assert paths
    for path in paths:
        assert path.stem.isdecimal()
        results = json.loads(path.read_text())
        assert results.keys() >= RUN
        history = results["history"]
        assert [entry["epoch"] for entry in history] == sorted(entry["epoch"] for entry in history)
        measured = [results["train_metrics"], results["val_metrics"], results["test_metrics"]]
        for entry in history:
            measured += [entry["train_metrics"], entry["val_metrics"]]
            assert entry["train_metrics"]["backward_nfe"] > 0
            accepted = entry["train_metrics"]["backward_accept_ts"]
            assert accepted == sorted(accepted, reverse=True)
            assert len(accepted) > 0
        for metrics in measured:
            assert metrics.keys() >= METRICS
            assert ("accuracy" in metrics) == (experiment == "speech_commands")
        assert results["test_metrics"]["loss"] > 0
        assert results["test_metrics"]["backward_nfe"] > 0


def test_tables_may_leave_out_what_nobody_has_begun():
    standing = [
        Status(Run("acrobot", {"norm": "default"}), "done"),
        Status(Run("acrobot", {"norm": "seminorm"}), "missing"),
        Status(Run("flow", {"norm": "default", "data": "moons"}), "missing"),
        Status(Run("flow", {"norm": "default", "data": "digits"}), "done"),
    ]
    assert begun(standing) == [standing[0], standing[1], standing[3]]
    assert begun(standing[1:3]) == standing[1:3]
