"""What README and docs/ say, and the committed results that it must follow from."""

import functools
import json
import re
from pathlib import Path

from common.results import load_all

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "reference"
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]
PROSE = " ".join(" ".join(page.read_text(encoding="utf-8") for page in PAGES).split())


@functools.cache
def committed_runs():
    """Which nobody may change."""
    return tuple(load_all(str(RESULTS)).values())


def says(sentence):
    assert sentence in PROSE, f"neither README.md nor docs/ says: {sentence}"


def diagnosis(measurement, experiment):
    return json.loads((RESULTS / "diagnostics" / f"{measurement}-{experiment}.json").read_bytes())


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def markdown_tables(text):
    """Every table's rows of cells: the heading first, without the line below it."""
    for lines in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        heading, _, *rows = map(cells, lines.splitlines())
        yield [heading, *rows]
