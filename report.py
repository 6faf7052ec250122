"""Writes one page of everything that results/ holds, `python report.py` or `make report`: open it in a browser."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import command_line, files
from common.results import check_folder
from reproduction.page import make_page
from reproduction.runs import PRESETS


@dataclass(frozen=True)
class Options(command_line.Paths):
    """Writes an HTML page of what was run, its tables and figures; it needs no network and no other file.

    Its tables are those of the preset's runs. What failed, and what is missing so far, is said on it.
    """

    results_dir: str = "results"
    """Folder of the results files."""
    preset: Literal[tuple(PRESETS)] = "cpu"
    """Whose runs the tables are about; the list of runs has all that there are."""
    output: str | None = None
    """The page's file; `report.html` in the folder of the results if not given."""


def main(options: Options) -> None:
    """Writes the page.

    Raises:
        ValueError: if the folder of the results is not one.
        OSError: if the page cannot be written.
    """
    logging.basicConfig(format="%(message)s")
    check_folder(options.results_dir)
    output = Path(options.output or Path(options.results_dir, "report.html"))
    page = make_page(options.results_dir, options.preset, output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    files.replace(output, page.encode())
    print(f"Wrote {output}")


if __name__ == "__main__":
    command_line.run(Options, main)
