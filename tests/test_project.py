"""What holds for the source as a whole, and no other tool checks."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import idemq

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "idemq").rglob("*.py"))

#: Modules whose decoders run code, or which switch such decoders on.
UNSAFE_IMPORTS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "yaml"}
UNSAFE_NAMES = {"enable_insecure_serializers", "register_pickle", "register_yaml"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: explaining more is no reason to split."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module


def test_the_public_names_are_sorted_and_there() -> None:
    names = vars(idemq)["__all__"]
    assert list(names) == sorted(names)
    assert [name for name in names if not hasattr(idemq, name)] == []


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    heading = re.search(
        r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert heading
    assert heading[1] == project["version"]


def test_no_module_is_longer_than_300_lines() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_no_function_is_longer_than_40_lines() -> None:
    too_long = {
        f"{name_of(path)}:{function.lineno} {function.name}": length(function)
        for path in MODULES
        for function in functions(ast.parse(path.read_text(encoding="utf-8")))
        if length(function) > 40
    }
    assert too_long == {}


def test_nothing_that_runs_code_from_a_body_is_imported_or_switched_on() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            roots = {name.partition(".")[0] for name in imported(node)}
            names = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None)}
            if roots & UNSAFE_IMPORTS or names & UNSAFE_NAMES:
                found.append(f"{name_of(path)}:{getattr(node, 'lineno', '?')}")
    assert found == []


def test_every_line_with_a_row_count_names_the_update_or_delete_that_it_counts() -> None:
    # SQLAlchemy gives -1 for the row count of an INSERT, whether the row was new or there already.
    unexplained = [
        f"{name_of(path)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ".rowcount" in line and not re.search(r"\b(update|delete)\b", line, re.IGNORECASE)
    ]
    assert unexplained == []
