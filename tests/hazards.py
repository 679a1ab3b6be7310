"""`make hazards`: every hazard of docs/hazards.md with the tests that prove its answer.

Tests are collected, not run. Ends with 1 when a hazard that is answered has no test, or when a test names a
hazard that the list does not have.
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
_ROW = re.compile(r"^\| (?P<id>[HS]\d+) \| (?P<title>.+?) \| (?P<answer>.+?) \|$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Hazard:
    id: str
    title: str
    answer: str

    @property
    def required(self) -> bool:
        return not self.answer.startswith("later")


def hazards() -> list[Hazard]:
    text = (ROOT / "docs" / "hazards.md").read_text(encoding="utf-8")
    return [Hazard(**row.groupdict()) for row in _ROW.finditer(text)]


class Collector:
    """Remembers which tests carry which hazard; those marked as skipped or failing prove nothing."""

    def __init__(self) -> None:
        #: Hazard -> test, without its parameters -> number of cases.
        self.tests: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if item.get_closest_marker("skip") or item.get_closest_marker("xfail"):
                continue
            for name in {str(arg) for marker in item.iter_markers("hazard") for arg in marker.args}:
                self.tests[name][item.nodeid.partition("[")[0]] += 1


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
    known = hazards()
    missing = [hazard.id for hazard in known if hazard.required and hazard.id not in found]
    unknown = sorted(found.keys() - {hazard.id for hazard in known})
    for hazard in known:
        tests = found.get(hazard.id, {})
        state = f"{sum(tests.values())} cases" if tests else "MISSING" if hazard.required else "not yet"
        print(f"{hazard.id:<4} {state:>9}  {hazard.title}")
        for test, cases in sorted(tests.items()):
            print(f"{'':16} {test.removeprefix('tests/')}{f' ({cases} cases)' if cases > 1 else ''}")
    proven = sum(hazard.id in found for hazard in known)
    print(f"\n{proven} of {len(known)} hazards have tests; missing: {', '.join(missing) or 'none'}")
    if unknown:
        print(f"tests name hazards that docs/hazards.md does not have: {', '.join(unknown)}")
    return 1 if missing or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
