"""The library stands on torch alone."""

import ast
import sys
from pathlib import Path

import pytest

import torchadjoint

SOURCES = sorted(Path(torchadjoint.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_it_imports_torch_and_the_standard_library_only(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.partition(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_all_that_it_offers_is_there_and_described():
    assert all(getattr(torchadjoint, name).__doc__ for name in torchadjoint.__all__)
