"""`make hazards`: what can go wrong (docs/hazards.md), the situations and patterns of docs/idempotence.md,
and the tests that prove the answers.

Tests are collected, not run. Ends with 1 when something that is answered has no test, or when a test names
what the lists do not have.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Marker, what it marks, the page that lists it, and how a row of that page begins.
LISTS = (
    ("hazard", "hazards", "hazards.md", r"[HS]\d+"),
    ("situation", "situations", "idempotence.md", r"\d"),
    ("pattern", "patterns", "idempotence.md", r"[a-z]+(?:-[a-z]+)+|token|upsert"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    id: str
    title: str
    answer: str

    @property
    def required(self) -> bool:
        return not self.answer.startswith("later")


def entries(page: str, ids: str) -> list[Entry]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    row = re.compile(rf"^\| (?P<id>{ids}) \| (?P<title>.+?) \| (?P<answer>.+?) \|$", re.MULTILINE)
    return [Entry(**found.groupdict()) for found in row.finditer(text)]


class Collector:
    """Remembers which tests carry which mark; those marked as skipped or failing prove nothing."""

    def __init__(self) -> None:
        #: Marker and its argument -> test, without its parameters -> number of cases.
        self.tests: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if item.get_closest_marker("skip") or item.get_closest_marker("xfail"):
                continue
            for name, *_ in LISTS:
                for id in {str(arg) for marker in item.iter_markers(name) for arg in marker.args}:
                    self.tests[name, id][item.nodeid.partition("[")[0]] += 1


def collect() -> Collector:
    collector = Collector()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["--collect-only", "-q", "--rootdir", str(ROOT), str(ROOT / "tests")], [collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(output.getvalue() + "the tests could not be collected")
    return collector


def main() -> int:
    found = collect().tests
    wrong = False
    for marker, title, page, ids in LISTS:
        tests = {id: each for (name, id), each in found.items() if name == marker}
        known = entries(page, ids)
        missing = [entry.id for entry in known if entry.required and entry.id not in tests]
        unknown = sorted(tests.keys() - {entry.id for entry in known})
        wide = max(len(entry.id) for entry in known)
        for entry in known:
            _print(entry, tests.get(entry.id, {}), wide)
        proven = sum(entry.id in tests for entry in known)
        print(f"\n{proven} of {len(known)} {title} have tests; missing: {', '.join(missing) or 'none'}\n")
        if unknown:
            print(f"tests name {title} that docs/{page} does not have: {', '.join(unknown)}\n")
        wrong = wrong or bool(missing or unknown)
    return int(wrong)


def _print(entry: Entry, tests: dict[str, int], wide: int) -> None:
    state = f"{sum(tests.values())} cases" if tests else "MISSING" if entry.required else "not yet"
    print(f"{entry.id:<{wide}} {state:>9}  {entry.title}")
    for test, cases in sorted(tests.items()):
        print(f"{'':{wide + 12}} {test.removeprefix('tests/')}{f' ({cases} cases)' if cases > 1 else ''}")


if __name__ == "__main__":
    sys.exit(main())
