"""The snippets of each page of docs/ run, one after the other."""

import re
from pathlib import Path

import pytest
from prose import markdown_tables

PAGES = sorted(Path(__file__).parents[1].joinpath("docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run(page):
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names = {"__name__": page.stem}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)


def test_most_pages_have_snippets():
    assert sum("```python" in page.read_text() for page in PAGES) >= 7


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_of_a_page_has_rows(page):
    assert all(rows for _, *rows in markdown_tables(page.read_text()))


@pytest.mark.parametrize("page", [*PAGES, PAGES[0].parents[1] / "README.md"], ids=lambda page: page.stem)
def test_links_between_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", page.read_text()):
        assert page.parent.joinpath(target).exists(), target
