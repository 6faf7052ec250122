"""The figures of gradient steps in README and docs/ are those of the benchmark's files."""

import re

import pytest
from prose import RESULTS, markdown_tables, says


def benchmark(path):
    """The rows of a benchmark's output by part (on one core, on two), model and name of the contestant."""
    parts = path.read_text(encoding="utf-8").split("\n# The same with `--cores 2`")
    return [
        {
            title.strip(): {row[0]: dict(zip(heading, row, strict=True)) for row in rows}
            for title, (heading, *rows) in zip(
                re.findall(r"^### (.*)", part, flags=re.MULTILINE),
                markdown_tables(part[part.index("\n### ") :]),
                strict=True,
            )
        }
        for part in parts
    ]


def test_the_figures_from_the_benchmark():
    [times, _] = benchmark(RESULTS / "gradient_step-intel.md")

    def seconds(title, name):
        return float(times[title][name]["seconds"])

    def saving(batch):
        default, seminorm = (
            int(times[f"Neural CDE, batch {batch}"][f"ours, {norm}"]["NFE, forward + backward"].split("+")[1])
            for norm in ("default", "seminorm")
        )
        return round(100 * (1 - seminorm / default))

    says(f"and {saving(32)} and {saving(128)} % in the benchmark (30 training steps, batches 32 and 128)")

    small = "Neural ODE of 16 channels, batch 64"
    stock, eager, discrete, compiled, warm = (
        1000 * seconds(small, name)
        for name in (
            "torchdiffeq, its default norm",
            "ours, seminorm",
            "ours, discrete",
            "ours, seminorm, compiled",
            "ours, seminorm, compiled, warm start",
        )
    )
    says(f"takes {stock:.0f} ms a gradient step with torchdiffeq,")
    says(f"{eager:.0f} with `seminorm`, {discrete:.0f} with `discrete`, and {warm:.0f} compiled with a warm start")
    assert compiled == pytest.approx(eager / 2, rel=0.1)
    says("The network takes half the time with `compile=True`")
    first_steps = [
        float(row["first step"])
        for table in times.values()
        for name, row in table.items()
        if name.endswith(", compiled")
    ]
    says(f"after {min(first_steps):.0f} to {max(first_steps):.0f} seconds of compiling")
    gains = [
        seconds(f"Neural CDE, batch {batch}", "ours, seminorm, autograd's field")
        / seconds(f"Neural CDE, batch {batch}", "ours, seminorm, autograd's field, compiled")
        for batch in (32, 128)
    ]
    says("{:.1f} times as fast at batch 32, but {:.1f} times at 128".format(*gains))
    acrobot = "Symplectic ODE-Net, batch 256"
    published, ours = (seconds(acrobot, f"torchdiffeq, seminorm, {field} field") for field in ("published", "our"))
    says(f"{published / ours:.1f} times as fast in torchdiffeq")


def test_the_comparison_with_diffrax_on_amd():
    [times] = benchmark(RESULTS / "gradient_step-amd.md")
    of_problem = {title.rpartition(",")[0]: rows for title, rows in times.items()}

    def faster(problem, *names):
        return max(float(of_problem[problem][name]["times faster than the first"]) for name in names)

    def lead(problem, ours=("ours, seminorm", "ours, discrete")):
        diffrax = ["diffrax, backsolve with the seminorm", "diffrax, recursive checkpoints"]
        return f"{faster(problem, *ours) / faster(problem, *diffrax[: 1 if len(ours) == 1 else 2]):.2f}"

    small, large, acrobot = "Neural CDE, batch 32", "Neural CDE, batch 128", "Symplectic ODE-Net, batch 256"
    says(f"ours is {lead(small)} times faster in the Neural CDE at batch 32, {lead(large)} at batch 128, and")
    warm = lead(acrobot, ["ours, seminorm, warm start"])
    says(f"and {lead(acrobot)} on acrobot; the warm start is {warm} times faster")
    shares = [of_problem[problem]["ours, seminorm"]["% of the floor"] for problem in (small, large)]
    says(f"share of `seminorm` is {shares[0]} and {shares[1]} %")

    [times] = benchmark(RESULTS / "gradient_step-amd-network.md")
    network, small_flow = (
        {name: float(row["times faster than the first"]) for name, row in rows.items()} for rows in times.values()
    )
    ahead = [
        f"{network['diffrax, recursive checkpoints'] / network[f'ours, discrete, compiled{solve}']:.2f}"
        for solve in (" solve", "")
    ]
    says(f"stay ahead by {ahead[0]} times over the compiled solve, and by {ahead[1]} over compiled `discrete`")
    backsolve = network["ours, discrete, compiled solve"] / network["diffrax, backsolve with the seminorm"]
    says(f"the compiled solve is {backsolve:.1f} times faster than diffrax's backsolve")
    warm = small_flow["ours, seminorm, compiled, warm start"] / small_flow["diffrax, recursive checkpoints"]
    says(f"On the flow the compiled warm start is {warm:.2f} times faster than diffrax's recursive checkpoints")

    [times] = benchmark(RESULTS / "gradient_step-amd-1024.md")
    of_problem = {title.rpartition(",")[0]: rows for title, rows in times.items()}
    paper = "Neural CDE, batch 1024"
    share = of_problem[paper]["ours, seminorm"]["% of the floor"]
    says(f"ours is {lead(paper)} times faster than diffrax, and `seminorm` reaches {share} % of the matrix products")
