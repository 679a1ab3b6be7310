"""The payments example shows what it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.test_examples import ROOT, play

SCRIPT = ROOT / "examples" / "payments" / "play.py"


def _judged(printed: str) -> None:
    assert "as README.md says" in printed
    assert printed.count("(the first answer again)") == 3
    assert "killed, with 100 of 100 in the account" in printed


@pytest.mark.situation(3)
@pytest.mark.pattern("result-cache")
@pytest.mark.pattern("reject-at-edge")
def test_one_debit_and_the_first_answer_without_any_server() -> None:
    _judged(play(SCRIPT))


@pytest.mark.situation(3)
@pytest.mark.pattern("result-cache")
@pytest.mark.pattern("reject-at-edge")
def test_one_debit_and_the_first_answer_on_postgresql(postgres_url: URL) -> None:
    _judged(play(SCRIPT, DATABASE_URL=postgres_url.render_as_string(hide_password=False)))


def test_a_second_debit_would_be_found(tmp_path: Path) -> None:
    """Played against a shop that takes every request for one of a new customer, the story fails."""
    for name in ("play.py", "shop.py"):
        text = SCRIPT.with_name(name).read_text(encoding="utf-8")
        text = text.replace("caller=customer_of", "caller=lambda _: str(time.monotonic_ns())")
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"wanted \(201, True\)"):
        play(tmp_path / "play.py")
