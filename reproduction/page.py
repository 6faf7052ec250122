"""Everything that a results folder holds, as one HTML page that needs no other file; `report.py` writes it.

Here is what the page says; how is in `report.html.jinja`, and how that looks in `report.css`.
"""

import base64
import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

import jinja2
import pandas
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

import figures
from benchmarks.adjoints.page import Gathered
from benchmarks.adjoints.results import load_all as load_adjoints
from common.provenance import short_commit
from common.results import Results, load_all

from . import gpu, typesetting
from .captions import ANIMATIONS, CAPTIONS, caption
from .experiments import EXPERIMENTS
from .runs import PRESETS, identity_of, preset_runs, way_of, whole_config
from .status import Status, on_found_data, statuses
from .style import LOOKS, NothingToDraw, render
from .summary import collect
from .typesetting import NOTHING, QUANTITIES, Table, is_number, tolerances

DEVIATIONS = Path(__file__).parents[1] / "docs" / "deviations.md"
"""What the page takes over, below its heading."""
LARGEST_SVG = 150_000
"""Bytes above which a figure is on the page as PNG: thousands of points are smaller as pixels."""
PIXELS = 108
"""How large an inch of a figure is on the page, where there is room."""


def make_page(results_dir: str, preset: str, directory: Path) -> str:
    """The page about these results and the runs of this preset; its links start from `directory`, where it will lie."""
    results = load_all(results_dir)
    standing = statuses(on_found_data(preset_runs(preset), results.values()), results_dir)
    collected = collect(standing, results.values())
    tables = typesetting.build(collected)
    coverage = _coverage(collected)
    drawings, lacking = _drawings(results_dir)
    return _template().render(
        preset=preset,
        preset_is=PRESETS[preset].__doc__,
        results_dir=results_dir,
        now=time.time(),
        collected=collected,
        headlines=list(_headlines(tables, _titles(collected))),
        coverage=coverage,
        norms=[norm for norm in LOOKS if any(norm in row["states"] for row in coverage)],
        failures=list(_failures(standing)),
        machines=_machines(results.values()),
        legend=typesetting.LEGEND,
        tables=[*tables, *gpu.tables(results_dir)],
        drawings=drawings,
        animations=_animations(results_dir),
        lacking=lacking,
        adjoints=_adjoints(Path(results_dir, "adjoints")),
        deviations=_deviations(os.path.relpath(DEVIATIONS, directory)),
        runs=[*_recorded(results, standing, directory), *_unrecorded(results.values(), standing)],
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"prose": _prose, "norm": _norm, "date": _date}
    environment.globals |= {"tolerances": tolerances, "is_number": is_number}
    return environment.get_template("report.html.jinja")


def _prose(text: str) -> Markup:
    """Text as in the tables: what is between backticks is code, +- is one sign, and no line begins with a %."""
    signs = str(escape(text)).replace("+-", "±").replace(" %", "\N{NO-BREAK SPACE}%")
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", signs))


def _norm(text: str) -> Markup:
    """The name of a norm, with the colour that it has in the figures."""
    name, comma, rest = text.replace("`", "").partition(",")
    look = LOOKS.get(name + comma + rest)
    swatch = Markup('<i class="swatch" style="background:{}"></i>').format(look.color) if look else ""
    return Markup('<span class="norm">{}<code>{}</code>{}</span>').format(swatch, name, comma + rest)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _titles(collected: pandas.DataFrame) -> list[str]:
    """Of each experiment and group, in order."""
    pairs = collected[["experiment", "group"]].drop_duplicates().itertuples(index=False)
    return [EXPERIMENTS[experiment].title_of(group) for experiment, group in pairs]


def _headlines(tables: Sequence[Table], titles: Sequence[str]) -> Iterator[dict[str, str | None]]:
    """What the tables say of the trick, and of what was published as the trick: one for each pair and length."""
    by_title = {table.title: table.frame.to_dict("records") for table in tables}
    for title in titles:
        papers = {
            row["rtol, atol"]: f"{row['paper: saved']} ({row['paper: status']})"
            for row in by_title.get(f"{title}: the paper's figures beside ours", [])
            if row["quantity"] == QUANTITIES["backward_nfe"]
        }
        for row in by_title.get(title, []):
            saved = row.get("saved against `default`", NOTHING)
            if row["norm"] in ("`seminorm`", "`as-published`") and saved != NOTHING:
                share, _, interval = saved.partition(" (")
                yield {
                    "title": title,
                    "tolerances": row["rtol, atol"],
                    "epochs": row["epochs"],
                    "norm": row["norm"],
                    "share": share,
                    "interval": interval.partition(",")[0],
                    "per_tensor": row.get("saved against `per-tensor`", NOTHING).partition(" (")[0],
                    "runs": row["runs"],
                    "paper": papers.get(row["rtol, atol"]) if row["norm"] == "`seminorm`" else None,
                }


def _coverage(collected: pandas.DataFrame) -> list[dict[str, Any]]:
    """How it stands with the runs of each norm, for each experiment, pair of tolerances and length."""
    rows = []
    keys = ["experiment", "group", "rtol", "atol", "max_epochs"]
    for (experiment, group, rtol, atol, max_epochs), runs in collected.groupby(keys, sort=False):
        states = {}
        for run in runs.itertuples():
            states.setdefault(run.way, []).append(run.status)
        rows.append(
            {
                "title": EXPERIMENTS[experiment].title_of(group),
                "tolerances": tolerances(rtol, atol),
                "epochs": max_epochs,
                "states": states,
            }
        )
    return rows


def _failures(standing: Sequence[Status]) -> Iterator[dict[str, Any]]:
    """Which runs of the preset stand as failed, and why."""
    for status in standing:
        if status.state == "failed":
            yield {**_described(status.run.experiment, vars(status.run.config)), "reason": status.reason}


def _described(experiment: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a run from others for people."""
    card = EXPERIMENTS.get(experiment)
    group = card.group(whole_config(experiment, config)) if card else ""
    return {
        "experiment": f"{experiment}, {group}" if group else experiment,
        "norm": way_of(config),
        **{name: config[name] for name in ("rtol", "atol", "seed", "max_epochs")},
    }


def _machines(results: Iterable[Results]) -> list[dict[str, Any]]:
    """On what the runs were made: one for each kind of machine and software, with when runs began and their commits."""
    machines = {}
    for result in results:
        made_on = result.provenance
        packages = [f"{name} {version}" for name, version in made_on["packages"].items() if version]
        description = (
            *(made_on[name] for name in ("device_name", "num_threads", "platform", "python")),
            ", ".join(packages),
        )
        machine = machines.setdefault(description, {"starts": [], "commits": []})
        machine["starts"].append(result.start_time)
        if (commit := short_commit(result.provenance["commit"])) not in machine["commits"]:
            machine["commits"].append(commit)
    names = ("device", "num_threads", "platform", "python", "packages")
    return [dict(zip(names, description, strict=True)) | machine for description, machine in machines.items()]


def _drawings(results_dir: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The figures, and why the others are not there."""
    drawings, lacking = [], []
    for name, draw in figures.figures(results_dir).items():
        try:
            figure = draw()
        except NothingToDraw as reason:
            lacking.append(f"{CAPTIONS[name].title}: {reason}")
            continue
        kind, image = "svg+xml", render(figure, "svg")
        if len(image) > LARGEST_SVG:
            kind, image = "png", render(figure, "png")
        width, height = (round(PIXELS * inches) for inches in figure.get_size_inches())
        drawing = {"name": name, "caption": caption(name, results_dir), "width": width, "height": height}
        drawings.append(drawing | {"source": _inline(image, kind)})
    return drawings, lacking


def _animations(results_dir: str) -> list[dict[str, str]]:
    """The figures that move, as far as they were measured."""
    found = []
    for name, draw in figures.animations(results_dir).items():
        with contextlib.suppress(NothingToDraw):
            found.append({"caption": ANIMATIONS[name], "source": _inline(draw(), "gif")})
    return found


def _inline(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _adjoints(folder: Path) -> dict[str, Any] | None:
    """What the benchmark of adjoints decides, if its results are there."""
    gathered = Gathered(load_adjoints(folder))
    if not gathered.problems:
        return None
    markdown = MarkdownIt("commonmark", {"html": False})
    return {
        "num_problems": len(gathered.problems),
        "num_ways": len(gathered.ways),
        "decisions": [Markup(markdown.renderInline(sentence)) for sentence in gathered.decisions()],
    }


def _deviations(source: str) -> Markup:
    """Those of docs/. `source` is where that file is from the page: its links start from there."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(DEVIATIONS.read_text(encoding="utf-8"))
    section = tokens[3:]  # without the heading
    for token in itertools.chain.from_iterable(token.children or [] for token in section):
        if token.type == "link_open":
            token.attrs["href"] = urljoin(source, token.attrs["href"])
    return Markup(markdown.renderer.render(section, markdown.options, {}))


def _recorded(results: Mapping[Path, Results], standing: Sequence[Status], directory: Path) -> Iterator[dict[str, Any]]:
    """What the list of runs says of each results file."""
    preset = {status.run.identity for status in standing}
    for path, result in results.items():
        test = result.test_metrics or {}
        yield {
            **_described(result.experiment, result.config),
            "status": result.status,
            "reason": result.failure,
            "in_preset": _identity(result) in preset,
            "epochs": len(result.epochs),
            "accuracy": test.get("accuracy"),
            "loss": test.get("loss"),
            "backward_nfe": sum(epoch.backward_nfe for epoch in result.epochs),
            "test_backward_nfe": test.get("backward_nfe"),
            "seconds": sum(epoch.seconds for epoch in result.epochs),
            "start": result.start_time,
            "commit": short_commit(result.provenance["commit"]),
            "file": path.name,
            "link": quote(os.path.relpath(path, directory)),
        }


def _unrecorded(results: Iterable[Results], standing: Sequence[Status]) -> Iterator[dict[str, Any]]:
    """What the list of runs says of those that the preset lacks, unless a file says why."""
    failed = {_identity(result) for result in results if result.status == "failed"}
    for status in standing:
        if status.state != "done" and status.run.identity not in failed:
            yield {
                **_described(status.run.experiment, vars(status.run.config)),
                "epochs": 0,
                "status": status.state,
                "reason": status.reason,
                "in_preset": True,
            }


def _identity(result: Results) -> str | None:
    """None for an experiment that is not of this project: its module is not ours to import."""
    return identity_of(result) if result.experiment in EXPERIMENTS else None
