"""The orders example shows what it claims."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session

from tests.test_examples import ROOT, play

SCRIPT = ROOT / "examples" / "orders" / "play.py"


def _judged(printed: str) -> None:
    assert "as README.md says" in printed
    journal = [line.strip() for line in printed.splitlines() if line.startswith("     ")]
    assert sorted(journal) == [
        "o-1 create: applied",
        "o-1 create: done before",
        "o-1 created: refused",
        "o-1 paid: already so",
        "o-1 paid: applied",
        "o-2 create: not enough",
        "o-3 create: applied",
        "o-3 created: applied",
        "o-4 create: not enough",
    ]


@pytest.mark.situation(1)
@pytest.mark.situation(2)
@pytest.mark.situation(4)
@pytest.mark.pattern("unique-index")
@pytest.mark.pattern("conditional-decrement")
@pytest.mark.pattern("state-machine")
def test_one_order_one_decrement_and_paid_stays_paid_without_any_server() -> None:
    _judged(play(SCRIPT))


@pytest.mark.situation(1)
@pytest.mark.situation(2)
@pytest.mark.situation(4)
@pytest.mark.pattern("unique-index")
@pytest.mark.pattern("conditional-decrement")
@pytest.mark.pattern("state-machine")
def test_one_order_one_decrement_and_paid_stays_paid_on_servers(postgres_url: URL, rabbitmq_url: str) -> None:
    database = postgres_url.render_as_string(hide_password=False)
    _judged(play(SCRIPT, DATABASE_URL=database, RABBITMQ_URL=rabbitmq_url))


@pytest.mark.parametrize(
    ("line", "broken", "found"),
    [
        (
            '    __table_args__ = (UniqueConstraint("number", name="orders_number"),)\n',
            "",
            "o-1 create: applied",
        ),
        ("by=placed.quantity)", "by=placed.quantity, floor=-100)", "o-2 create: applied"),
        ('"created": ["new"]', '"created": ["new", "paid"]', "o-1 created: applied"),
    ],
    ids=["a second order", "more than there is", "paid no more"],
)
def test_a_shop_that_does_it_wrong_is_found(line: str, broken: str, found: str, tmp_path: Path) -> None:
    for name in ("play.py", "shop.py"):
        text = SCRIPT.with_name(name).read_text(encoding="utf-8")
        assert line in text or name == "play.py"
        (tmp_path / name).write_text(text.replace(line, broken), encoding="utf-8")
    with pytest.raises(AssertionError, match=rf"found \[.*'{found}'.*\]\n *wanted"):
        play(tmp_path / "play.py")


@pytest.mark.situation(4)
def test_paid_waits_for_an_order_that_is_not_made_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("RABBITMQ_URL", raising=False)
    spec = importlib.util.spec_from_file_location("orders_shop", SCRIPT.with_name("shop.py"))
    assert spec is not None
    assert spec.loader is not None
    shop = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "orders_shop", shop)
    spec.loader.exec_module(shop)
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    shop.Base.metadata.create_all(engine)
    paid = shop.Changed("o-1", "paid")
    with Session(engine) as session:
        with pytest.raises(LookupError, match="no order o-1 yet"):  # so idemq tries it again
            shop.status(paid, session)
        session.add(shop.Order(number="o-1", state="new"))
        shop.status(paid, session)
        assert [order.state for order in session.query(shop.Order)] == ["paid"]
    engine.dispose()
