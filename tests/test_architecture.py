"""docs/architecture.md walks a message through functions that exist, and through few enough of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| \d+ \| `(\S+)` \| `(\S+)` \|", TEXT, re.MULTILINE)


def names(file: str) -> set[str]:
    """Functions and methods of a file, as `Class.method`."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_the_functions_of_the_walk_exist() -> None:
    assert [step for step in STEPS if step[1] not in names(step[0])] == []


def test_the_walk_is_short() -> None:
    assert 0 < len(STEPS) < 10


def test_every_file_that_the_page_names_exists() -> None:
    files = set(re.findall(r"`((?:idemq|tests)/[\w/]+\.py)`", TEXT))
    assert [file for file in files if not (ROOT / file).exists()] == []
