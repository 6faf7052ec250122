"""The figures of gradient steps in README and docs/ are those of the benchmark's files."""

import re

from prose import RESULTS, ROOT, markdown_tables, says


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
    times, on_two_cores = benchmark(RESULTS / "gradient_step-intel.md")

    def seconds(title, name):
        return float(times[title][name]["seconds"])

    def saved(batch, *measured):
        """Of the backward NFE of `default`, in per cent: the least and the most."""
        nfe = [
            [int(rows[f"ours, {norm}"]["NFE, forward + backward"].split("+")[1]) for norm in ("default", "seminorm")]
            for rows in (tables[f"Neural CDE, batch {batch}"] for tables in measured)
        ]
        shares = [f"{100 * (1 - seminorm / default):.0f}" for default, seminorm in sorted(nfe)]
        return " to ".join(dict.fromkeys([shares[0], shares[-1]]))

    [on_amd] = benchmark(RESULTS / "gradient_step-amd.md")
    on_amd = {title.split(", 3 rounds")[0]: rows for title, rows in on_amd.items()}
    shares = [saved(batch, times, on_two_cores, on_amd) for batch in (32, 128)]
    [large] = benchmark(RESULTS / "gradient_step-amd-1024.md")
    [[title, rows]] = large.items()
    shares.append(saved(1024, {title.removesuffix(", 1 round"): rows}))
    says("measured three times) {} % at batch 32, {} % at 128 and {} % at 1024".format(*shares))
    says(f"After 30 training steps it saves {shares[-1]} % backwards at the paper's batch of 1024")
    ours, autograds, others, diffrax = (
        f"{float(rows[name]['seconds']):.1f}"
        for name in (
            "ours, seminorm",
            "ours, seminorm, autograd's field",
            "torchdiffeq, seminorm",
            "diffrax, backsolve with the seminorm",
        )
    )
    says(f"takes {ours} s with a field written for the solver, {autograds} with autograd's,")
    says(f"where torchdiffeq with the seminorm takes {others} and diffrax {diffrax}")

    small = next(iter(benchmark(RESULTS / "gradient_step-intel-network.md")[0].values()))
    stock, *ours = (
        f"{1000 * float(small[name]['seconds']):.0f}"
        for name in (
            "torchdiffeq, its default norm",
            "ours, seminorm",
            "ours, seminorm, compiled",
            "ours, discrete",
            "ours, discrete, compiled",
            "ours, discrete, compiled solve",
        )
    )
    says(f"takes {stock} ms with torchdiffeq, {ours[0]} with `seminorm` ({ours[1]} with `compile=True`)")
    says(f'and {ours[2]} with `discrete` ({ours[3]} with `compile=True`, {ours[4]} with `compile="solve"`;')
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
    backsolve, checkpoints = "diffrax, backsolve with the seminorm", "diffrax, recursive checkpoints"

    def lead(rows, ours, others):
        """How many times faster the better of ours is: by medians of seconds, and of ratios to torchdiffeq."""
        seconds, ratio = (
            [[float(rows[name][column]) for name in names] for names in (ours, others)]
            for column in ("seconds", "times faster than the first")
        )
        return f"{min(seconds[1]) / min(seconds[0]):.2f} ({max(ratio[0]) / max(ratio[1]):.2f})"

    [times] = benchmark(RESULTS / "gradient_step-amd.md")
    of_problem = {title.rpartition(",")[0]: rows for title, rows in times.items()}
    small, large, acrobot = (
        of_problem[name] for name in ("Neural CDE, batch 32", "Neural CDE, batch 128", "Symplectic ODE-Net, batch 256")
    )
    leads = [
        lead(rows, ("ours, seminorm", "ours, discrete"), (backsolve, checkpoints)) for rows in (small, large, acrobot)
    ]
    says(f"Ours is {leads[0]} times faster in the Neural CDE at batch 32, {leads[1]} at batch 128, and {leads[2]}")

    def ends(rows, names):
        best = max((rows[name] for name in names), key=lambda row: float(row["times faster than the first"]))
        return [float(end) for end in best["range"].split(" to ")]

    for rows in (small, large, acrobot):
        assert ends(rows, ("ours, seminorm", "ours, discrete"))[0] < ends(rows, (backsolve, checkpoints))[1]
    says("in all three problems the ranges of the two libraries overlap")
    warm = lead(acrobot, ["ours, seminorm, warm start"], [backsolve])
    says(f"on acrobot; the warm start is {warm} times faster than diffrax's backsolve")
    network = of_problem["Network 16-64-64-16, batch 64, 10 output times"]
    behind = lead(network, [checkpoints], ["ours, seminorm, compiled, warm start"])
    says(f"On the network diffrax is {behind} times faster than the fastest of ours at that commit")
    shares = [rows["ours, seminorm"]["% of the floor"] for rows in (small, large)]
    says(f"matrix products alone would take {shares[0]} and {shares[1]} % of the time of `seminorm`")

    [paper] = benchmark(RESULTS / "gradient_step-amd-1024.md")[0].values()
    autograds, others = (
        [f"{min(float(rows[name]['seconds']) for name in names):.3g}" for rows in (paper, large, small)]
        for names in (["ours, seminorm, autograd's field"], (backsolve, checkpoints))
    )
    says("`seminorm` takes {} s at batch 1024, {} at 128 and {} at 32".format(*autograds))
    says("where the faster of diffrax's ways takes {}, {} and {}.".format(*others))

    [times] = benchmark(RESULTS / "gradient_step-amd.md")
    autograds = "ours, seminorm, autograd's field"
    compared = {
        title: [float(rows[name]["seconds"]) for name in (autograds, backsolve)]
        for title, rows in times.items()
        if autograds in rows
    }
    assert len(compared) == 3
    assert all(own > theirs for own, theirs in compared.values()), "diffrax is faster"
    [[own, theirs]] = [found for title, found in compared.items() if title.startswith("Symplectic ODE-Net")]
    says(f"autograd's field takes {own:.2f} s with `seminorm` on the AMD below, where diffrax's backsolve with the")
    says(f"seminorm takes {theirs:.2f}.")

    [times] = benchmark(RESULTS / "gradient_step-amd-network.md")
    network, flow = times.values()
    solve, steps = "ours, discrete, compiled solve", "ours, discrete, compiled"
    ahead = [lead(network, [checkpoints], [ours]) for ours in (solve, steps)]
    says(f"stay ahead by {ahead[0]} times over the compiled solve, and by {ahead[1]} over compiled `discrete`")
    says(f"the compiled solve is {lead(network, [solve], [backsolve])} times faster than diffrax's backsolve")
    warm = lead(flow, ["ours, seminorm, compiled, warm start"], [checkpoints])
    says(f"the compiled warm start is {warm} times faster than diffrax's recursive checkpoints")

    [times] = benchmark(RESULTS / "gradient_step-intel-network.md")
    network, flow = times.values()
    says(f"On the network diffrax's recursive checkpoints are {lead(network, [checkpoints], [solve])} times faster")
    warm = lead(flow, ["ours, seminorm, compiled, warm start"], [checkpoints])
    says(f"than the compiled solve there; on the flow the compiled warm start is {warm} times faster than they are")

    [times] = benchmark(RESULTS / "gradient_step-amd-flow.md")
    [flow] = times.values()
    warm = lead(flow, ["ours, seminorm, compiled, warm start"], [checkpoints])
    eager = [lead(flow, [checkpoints], [ours]) for ours in ("ours, seminorm, warm start", "ours, discrete")]
    says(f"The compiled warm start is {warm} times faster than diffrax's recursive checkpoints; with the field")
    says(f"the warm start takes {eager[0]} times their time, and `discrete` {eager[1]} times.")

    [times] = benchmark(RESULTS / "gradient_step-amd-1024.md")
    of_problem = {title.rpartition(",")[0]: rows for title, rows in times.items()}
    paper = "Neural CDE, batch 1024"
    share = of_problem[paper]["ours, seminorm"]["% of the floor"]
    ratios = {name: float(row["times faster than the first"]) for name, row in of_problem[paper].items()}
    ahead = max(ratios["ours, seminorm"], ratios["ours, discrete"]) / max(ratios[backsolve], ratios[checkpoints])
    says(
        f"ours is {ahead:.2f} times faster than diffrax. The matrix products alone would take {share} % of the time of"
    )


def test_what_readme_says_of_the_benchmark_of_adjoints_is_what_its_page_says():
    page = (ROOT / "docs" / "which_adjoint.md").read_text(encoding="utf-8")
    [(times, behind)] = re.findall(
        r"the best way in PyTorch takes (\S+) times the time of the best in JAX \(median; .*?\), "
        r"and more than 1.4 times in (\d+ of \d+) cells",
        page,
    )
    says(f"diffrax (JAX) is faster still, {times} times in the median, and by more than 1.4 times in {behind} comp")
    [problems] = re.findall(
        r"At some rtol of 1e-4 or tighter all that were tried fail and `discrete` does not on (\d+ of \d+ problems)",
        page,
    )
    says(
        f"So it is on {problems} of [the benchmark of adjoints](docs/which_adjoint.md): at some rtol of 1e-4 or tighter"
    )
    says(f"that is so at {problems}.")
