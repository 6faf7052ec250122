"""Numbers to text: the tables of a list of runs for terminal, Markdown, LaTeX or CSV, and those in docs/results.md.

`tables.py` prints them and the report shows them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import pandas

from common.results import Results

from .experiments import EXPERIMENTS
from .published import PUBLISHED
from .status import Status
from .summary import BASELINES, CONFIDENCE, SAVING_ENDS, SAVINGS, collect, summarise

FORMATS = ("terminal", "markdown", "latex", "csv")
PAPERS_WAYS = ("default", "per-tensor", "seminorm", "as-published")
QUANTITIES = {
    "accuracy": "test accuracy",
    "bits_per_dim": "test bits per dimension",
    "nll": "test NLL (nats)",
    "loss": "test loss",
    "backward_nfe": "backward NFE, training",
    "test_backward_nfe": "backward NFE, test set",
    "forward_nfe": "forward NFE, training",
    "seconds": "seconds of training",
    "epoch_seconds": "seconds of an epoch",
    "memory": "peak of GPU memory",
}
LEGEND = (
    "Mean +- sample standard deviation over the runs of a row, which differ in their seed. NFE of a training: all its "
    "steps together. What is saved is the mean over pairs of runs with the same seed. In parentheses: its "
    f"{100 * CONFIDENCE:.0f} % interval by Student's t, and the number n of pairs. A single pair has no interval. "
    "Seconds (CPU) are of all cores together, seconds (wall) by the clock. They are means over the runs that had the "
    "device and the number of threads of most runs of the same tolerances and epochs: over n, where these are not all."
)
COMPARISON_NOTE = (
    "NFE grow with batches and epochs, so of reduced runs only what is saved compares. The paper's NFE of a training "
    "are ten times the sum over extra passes in epochs 1, 11, 21, ... and the last: 5 % too many for 200 epochs. What "
    "is from memory was not checked against the paper."
)
NOTHING = "-"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Table:
    """A table of finished text. What is code in any of it stands between backticks, as in Markdown."""

    title: str
    frame: pandas.DataFrame
    notes: tuple[str, ...] = ()


def build(collected: pandas.DataFrame, *, all_seeds: bool = False) -> list[Table]:
    """The tables of what `summary.collect` returned: a row a condition, or with `all_seeds` a row a run.

    For each experiment and group: what is saved, the paper's figures beside ours (means, so not with `all_seeds`), in a
    table of its own what is beyond the paper, and what everything costs.
    """
    tables = []
    for (experiment, group), runs in collected.groupby(["experiment", "group"], sort=False):
        title, summary = EXPERIMENTS[experiment].title_of(group), summarise(runs, all_seeds=all_seeds)
        metric = runs["metric"].iloc[0]
        baselines = [baseline for baseline in BASELINES if (runs["way"] == baseline).any()]
        papers, beyond = summary[~_is_beyond(summary)], summary[_is_beyond(summary)]
        scale = tuple(_scale(runs))
        if not papers.empty:
            notes = (*scale, *_absences(runs[~_is_beyond(runs)]))
            tables.append(Table(title, _savings(papers, baselines, metric), notes))
        comparison = [] if all_seeds or runs["synthetic"].any() else _comparison(papers)
        if comparison:
            frame = pandas.DataFrame(comparison)
            tables.append(Table(f"{title}: the paper's figures beside ours", frame, (COMPARISON_NOTE,)))
        if not beyond.empty:
            notes = (*(scale if papers.empty else ()), *_equal_seeds(runs), *_absences(runs[_is_beyond(runs)]))
            tables.append(Table(f"{title}: beyond the paper", _savings(beyond, baselines, metric), notes))
        tables.append(Table(f"{title}: costs", _costs(summary)))
    return tables


def render(standing: Iterable[Status], results: Iterable[Results], *, format: str, all_seeds: bool = False) -> str:
    """The tables of these runs and their results in one of `FORMATS`, ending in a newline.

    CSV is a single table of numbers, unrounded: what `summary.summarise` returns. LaTeX needs the packages
    booktabs and graphicx.
    """
    collected = collect(standing, results)
    if format == "csv":
        return summarise(collected, all_seeds=all_seeds).to_csv(index=False)
    tables = build(collected, all_seeds=all_seeds)
    if format == "latex":
        return "\n".join([_latex(LEGEND) + "\n", *map(_latex_table, tables)])
    bold, style = ("", "simple") if format == "terminal" else ("**", "pipe")
    parts = [LEGEND]
    for table in tables:
        alignment = ["right" if is_number(name) else "left" for name in table.frame]
        text = table.frame.to_markdown(index=False, tablefmt=style, colalign=alignment, disable_numparse=True)
        parts += [f"{bold}{table.title}{bold}", text, *table.notes]
    text = "\n\n".join(parts) + "\n"
    return text.replace("`", "") if format == "terminal" else text


def insert(document: str, text: str) -> str:
    """`document` with `text` between the lines `BEGIN` and `END`, in place of what was there.

    Raises:
        ValueError: if these lines are not there exactly once, in this order.
    """
    lines = document.split("\n")
    if lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        raise ValueError(f"the tables need one line {BEGIN!r} and below it one line {END!r} to stand between: add them")
    return "\n".join([*lines[: lines.index(BEGIN) + 1], *text.rstrip("\n").split("\n"), *lines[lines.index(END) :]])


def _conditions(summary: pandas.DataFrame) -> pandas.DataFrame:
    """The columns that say which runs a row is about."""
    columns = {
        "rtol, atol": [tolerances(*row) for row in summary[["rtol", "atol"]].itertuples(index=False)],
        "norm": [_shown(way) for way in summary["way"]],
    }
    if "seed" in summary:
        columns["seed"] = summary["seed"].astype(str)
    return pandas.DataFrame(columns, index=summary.index)


def _savings(summary: pandas.DataFrame, baselines: list[str], metric: str) -> pandas.DataFrame:
    table = _conditions(summary)
    table["runs"] = [_num_runs(*row) for row in summary[["wanted", "completed", "failed"]].itertuples(index=False)]
    table["epochs"] = _epochs(summary)
    for quantity in (metric, "backward_nfe"):
        table[QUANTITIES[quantity]] = _cells(summary, quantity)
    for baseline in baselines:
        columns = [SAVINGS["backward_nfe", baseline] + end for end in SAVING_ENDS]
        table[f"saved against `{baseline}`"] = [saved(*row) for row in summary[columns].itertuples(index=False)]
    return table


def _costs(summary: pandas.DataFrame) -> pandas.DataFrame:
    table = _conditions(summary)
    table["epochs"] = _epochs(summary)
    quantities = ["seconds", "forward_nfe", "test_backward_nfe", "memory"]
    if summary["memory_mean"].isna().all():
        quantities.remove("memory")
    for quantity in quantities:
        table[QUANTITIES[quantity]] = _cells(summary, quantity)
    return table


def _epochs(summary: pandas.DataFrame) -> pandas.Series:
    return summary["epochs_mean"].map(lambda epochs: NOTHING if numpy.isnan(epochs) else f"{epochs:.4g}")


def _comparison(papers: pandas.DataFrame) -> list[dict[str, str]]:
    """Rows with a figure of the paper beside ours each, and with what the seminorm saves in both.

    Ours are the trainings of the length that most seeds of both have, and of several such the longest.
    """
    rows = []
    ours = papers[papers["completed"] > 0].set_index(["experiment", "rtol", "atol", "max_epochs", "way"])
    for figure in PUBLISHED:
        condition = (figure.experiment, figure.rtol, figure.atol)
        default, seminorm = (
            {
                epochs: row["completed"]
                for (*at, epochs, way), row in ours.iterrows()
                if (*at, way) == (*condition, name)
            }
            for name in ("default", "seminorm")
        )
        if not default.keys() & seminorm.keys():
            continue
        lengths = [(min(default[epochs], seminorm[epochs]), epochs) for epochs in default.keys() & seminorm.keys()]
        condition += (max(lengths)[1],)
        cells = _cells(ours, figure.quantity)
        our_saving = papers_saving = NOTHING
        column = SAVINGS.get((figure.quantity, "default"))
        if column is not None:
            our_saving = saved(ours.loc[(*condition, "seminorm"), column])
            papers_saving = saved(1 - figure.seminorm[0] / figure.default[0])
        rows.append(
            {
                "rtol, atol": tolerances(figure.rtol, figure.atol),
                "quantity": QUANTITIES[figure.quantity],
                "ours: `default`": cells[(*condition, "default")],
                "ours: `seminorm`": cells[(*condition, "seminorm")],
                "ours: saved": our_saving,
                "paper: `default`": _cell(figure.quantity, *figure.default),
                "paper: `seminorm`": _cell(figure.quantity, *figure.seminorm),
                "paper: saved": papers_saving,
                "paper: status": figure.status,
            }
        )
    return rows


def _is_beyond(rows: pandas.DataFrame) -> pandas.Series:
    """Which rows are of no way that the paper or its code has."""
    return ~rows["way"].isin(PAPERS_WAYS)


def _scale(runs: pandas.DataFrame) -> Iterable[str]:
    """How large the runs are, beside the paper's."""
    completed, paper = runs[runs["status"] == "completed"], EXPERIMENTS[runs["experiment"].iloc[0]].paper
    if completed.empty:
        return
    samples, sizes = (
        " or ".join(f"{number:,.0f}" for number in completed[name].drop_duplicates())
        for name in ("training_samples", "batch_size")
    )
    sample = " of synthetic sounds, which are not speech," if runs["synthetic"].any() else ""
    ours = f"Trained on {samples} samples{sample} in batches of {sizes}, on {'; '.join(completed['device'].unique())}."
    papers = (
        f" The paper{paper.caveat}: {paper.training_samples:,} samples, batches of {paper.batch_size:,}, "
        f"{paper.max_epochs} epochs, {paper.num_seeds} runs."
    )
    yield ours + papers if runs["group"].iloc[0].startswith(paper.groups) else ours
    if elsewhere := runs["elsewhere"].sum():
        yield f"Left out, as they were trained on other data: {elsewhere} completed runs."


def _absences(runs: pandas.DataFrame) -> Iterable[str]:
    """Which runs are missing, and why others failed."""
    names = _conditions(runs).agg(lambda row: f"{row['norm']} at {row['rtol, atol']}", axis="columns")
    names += runs["max_epochs"].map(" for {} epochs".format)
    missing = runs[runs["status"] == "missing"]
    if not missing.empty:
        seeds = missing["seed"].astype(str).groupby(names, sort=False).agg(", ".join)
        yield "Missing: " + "; ".join(f"{name}, seed {which}" for name, which in seeds.items()) + "."
    for index, run in runs[runs["status"] == "failed"].iterrows():
        yield f"Failed: {names[index]}, seed {run['seed']}: {run['failure']}"


def _equal_seeds(runs: pandas.DataFrame) -> Iterable[str]:
    """What the paper's norms reach with just the seeds of the rows beyond the paper, where these have fewer."""
    metric = runs["metric"].iloc[0]
    completed = runs[runs["status"] == "completed"]
    for (*pair, _), alike in completed.groupby(["rtol", "atol", "max_epochs"], sort=False):
        papers, seeds = alike[~_is_beyond(alike)], alike.loc[_is_beyond(alike), "seed"].unique()
        with_them = papers[papers["seed"].isin(seeds)]
        if with_them.empty or len(with_them) == len(papers):
            continue
        cells = [
            f"`{way}` {_cell(metric, values.mean(), values.std())}"
            for way, values in with_them.groupby("way", sort=False)[metric]
        ]
        which = ", ".join(map(str, seeds))
        yield (
            f"At {tolerances(*pair)} these are of seed {which} alone. The {QUANTITIES[metric]} of the others with "
            f"seed {which}: {', '.join(cells)}."
        )


def _cells(summary: pandas.DataFrame, quantity: str) -> pandas.Series:
    means_and_deviations = summary[[f"{quantity}_mean", f"{quantity}_sd"]]
    cells = means_and_deviations.agg(lambda row: _cell(quantity, *row), axis="columns")
    return cells + summary.agg(_clock, axis="columns") if "seconds" in quantity else cells


def _clock(row: pandas.Series) -> str:
    """By which clock the seconds of a row are, and of how many runs where not of all that are completed."""
    if not row["timed"]:
        return ""
    return f" ({row['clock']})" if row["timed"] == row["completed"] else f" ({row['clock']}, n = {row['timed']})"


def _cell(quantity: str, mean: float, deviation: float) -> str:
    if numpy.isnan(mean):
        return NOTHING
    unit, factor, decimals = "", 1, 0
    if quantity == "accuracy":
        unit, factor, decimals = " %", 100, 1
    elif quantity == "memory":
        unit, factor = " MiB", 2.0**-20
    elif quantity == "epoch_seconds":
        decimals = 1
    elif quantity.endswith("nfe") and mean >= 1e6:
        unit, factor, decimals = " million", 1e-6, 2
    elif quantity in ("bits_per_dim", "nll"):
        decimals = 3
    elif quantity == "loss" and mean > 0:
        decimals = max(0, 2 - int(numpy.floor(numpy.log10(mean))))
    shown = [f"{factor * value:,.{decimals}f}" for value in (mean, deviation) if not numpy.isnan(value)]
    return " +- ".join(shown) + unit


def saved(share: float, low: float = numpy.nan, high: float = numpy.nan, num_pairs: float = 1) -> str:
    """What share of a cost is saved, with the interval if there is one; what costs more is called that."""
    if numpy.isnan(share):
        return NOTHING
    if share <= -1:
        low, high, shown, unit = 1 - high, 1 - low, lambda value: f"{value:.1f}", " times as many"
        share = 1 - share
    elif round(100 * share) < 0:
        share, low, high, shown, unit = -share, -high, -low, _percent, " % more"
    else:
        shown, unit = _percent, " %"
    interval = "" if numpy.isnan(low) else f" ({shown(low)} to {shown(high)}, n = {num_pairs:.0f})"
    return f"{shown(share)}{unit}{interval}"


def _percent(share: float) -> str:
    return f"{round(100 * share)}"


def _num_runs(wanted: int, completed: int, failed: int) -> str:
    return (str(completed) if completed == wanted else f"{completed} of {wanted}") + f", {failed} failed" * (failed > 0)


def _shown(way: str) -> str:
    """A way's norm as code, and what else it has behind."""
    norm, comma, others = way.partition(",")
    return f"`{norm}`{comma}{others}"


def tolerances(*values: float) -> str:
    """Tolerances as in the tables: 1e-3, 1e-6."""
    return ", ".join(numpy.format_float_scientific(value, trim="-", exp_digits=1) for value in values)


def is_number(column: str) -> bool:
    """Whether a table's column of this name holds numbers, and so stands to the right."""
    return column not in ("rtol, atol", "norm", "quantity", "paper: status", "experiment", "way")


def _latex_table(table: Table) -> str:
    frame = table.frame.map(_latex).rename(columns=_latex)
    columns = "".join("r" if is_number(name) else "l" for name in table.frame)
    text = frame.to_latex(index=False, column_format=columns, caption=_latex(table.title), position="htbp")
    notes = "".join(f"\\par\\footnotesize {_latex(note)}\n" for note in table.notes)
    # Tables wider than the page shrink to it.
    shrunk = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{\begin{tabular}"
    text = text.replace(r"\begin{tabular}", shrunk).replace(r"\end{tabular}", r"\end{tabular}}")
    return text.replace(r"\end{table}", notes + r"\end{table}")


def _latex(text: str) -> str:
    special = {**{character: f"\\{character}" for character in "&%$#_{}"}, "\\": r"\textbackslash{}"}
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    escaped = text.translate(str.maketrans(special)).replace("+-", r"$\pm$")
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escaped)
