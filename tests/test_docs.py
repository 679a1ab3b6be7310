"""Every fenced code block of README.md and docs/ is executed.

The blocks of one file run in order, in one process and one namespace, in a temporary directory: `python`
blocks as they are, `sh` blocks with bash, of `console` blocks the lines that begin with `$ `. A python block
whose first line is a file name (`# shop.py`) is also written to that file. `text` and `mermaid` blocks are
pictures. An HTML comment on the line before the fence says otherwise:

    <!-- not run: the reason -->      left out; the test run lists these as skipped
    <!-- run by .ci/run -->           every line of the block stands in that file, which runs it
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>\w*)")
_NOTE = re.compile(r"^ *<!-- (?P<kind>not run:|run by) (?P<value>\S.*?) -->$")


@dataclass(frozen=True, slots=True)
class Block:
    line: int  # of the opening fence, from 1
    language: str
    code: list[str]
    #: "not run:" or "run by", and what follows it.
    note: tuple[str, str] | None

    @property
    def commands(self) -> list[str]:
        if self.language == "console":
            return [line[2:] for line in self.code if line.startswith("$ ")]
        return self.code


def blocks(text: str) -> Iterator[Block]:
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        if opening := _FENCE.match(lines[at]):
            closing = re.compile(rf" *{opening['fence'][0]}{{{len(opening['fence'])},}} *$")
            end = next((n for n in range(at + 1, len(lines)) if closing.match(lines[n])), None)
            assert end is not None, f"the block of line {at + 1} is not closed"
            indent = len(opening["indent"])
            note = _NOTE.match(lines[at - 1]) if at else None
            code = [line[indent:] for line in lines[at + 1 : end]]
            yield Block(at + 1, opening["language"], code, (note["kind"], note["value"]) if note else None)
            at = end
        at += 1


def program(text: str, directory: Path) -> str:
    """The blocks as one Python program; every line keeps its number. Files that blocks name are written."""
    lines = [""] * len(text.splitlines())
    for block in blocks(text):
        if block.note or block.language in ("text", "mermaid"):
            continue
        if block.language == "python":
            lines[block.line : block.line + len(block.code)] = block.code
            if name := re.match(r"# (\w+\.py)$", block.code[0]):
                (directory / name[1]).write_text("\n".join(block.code), encoding="utf-8")
        elif block.language in ("sh", "console"):
            command = ["bash", "-euo", "pipefail", "-c", "\n".join(block.commands)]
            lines[block.line - 1] = f"__import__('subprocess').run({command!r}, check=True)"
        else:
            pytest.fail(
                f"line {block.line}: a {block.language or 'nameless'} block needs a reason not to run"
            )
    return "\n".join(lines)


def run(text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    script = directory / "document.py"
    script.write_text(program(text, directory), encoding="utf-8")
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", script.name]
    return subprocess.run(
        command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_code_block_of_a_document_runs(path: Path, tmp_path: Path) -> None:
    result = run(path.read_text(encoding="utf-8"), tmp_path)
    assert result.returncode == 0, (
        f"{name_of(path)} (lines as in the document):\n{result.stdout}{result.stderr}"
    )


NOTED = [
    pytest.param(block, id=f"{name_of(path)}:{block.line}")
    for path in FILES
    for block in blocks(path.read_text(encoding="utf-8"))
    if block.note
]


@pytest.mark.parametrize("block", NOTED)
def test_a_block_that_does_not_run_here_runs_elsewhere_or_has_a_reason(block: Block) -> None:
    assert block.note
    kind, value = block.note
    if kind == "not run:":
        pytest.skip(f"not run: {value}")
    elsewhere = (ROOT / value).read_text(encoding="utf-8")
    commands = [command.partition(" #")[0].strip() for command in block.commands]
    missing = [command for command in commands if command not in elsewhere]
    assert not missing, f"{value} does not run {missing}"


DOCUMENT = """\
```python
# shop.py
price = 3
```

```console
$ test -f shop.py
prose that looks like output
```

<!-- not run: it would stop the machine -->
```sh
exit 7
```

```python
import shop
assert price == shop.price == {price}
```
"""


def test_blocks_share_a_namespace_and_a_failure_names_its_line(tmp_path: Path) -> None:
    good = run(DOCUMENT.replace("{price}", "3"), tmp_path)
    bad = run(DOCUMENT.replace("{price}", "4"), tmp_path)
    assert good.returncode == 0, good.stderr
    assert bad.returncode != 0
    assert 'document.py", line 18' in bad.stderr


def test_a_failing_command_fails_the_document(tmp_path: Path) -> None:
    assert run("```sh\nfalse\ntrue\n```\n", tmp_path).returncode != 0
