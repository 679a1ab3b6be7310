from __future__ import annotations

import gzip
import logging
import multiprocessing
import os
import pickle
import signal
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session

from idemq import App
from idemq.attempts import SyncUnit
from idemq.errors import Reject
from idemq.failures import Job, _identity
from idemq.message import Ack, Dead, Message, Release, key_of
from idemq.packing import packed
from tests.core_tools import (
    NOWHERE,
    PROCESSED,
    REPEATED,
    Attempts,
    Shop,
    effects,
    message,
    on,
    unpacked,
    write,
)

DATABASES = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql")]


@dataclass
class Payment:
    id: int


def decoding(shop: Shop) -> Attempts:
    """A sync consumer that asks for a payload."""
    engine = shop.new_engine()
    app = App(engine)

    @app.consumer("shop", NOWHERE)
    def handler(given: Payment, session: Session) -> None:
        session.execute(insert(effects).values(mark=str(given.id)))

    return shop.attempts(consumer=app.consumers["shop"].consumer, engine=engine)


UNREADABLE = {
    "json": Message(id="1", body=b"{\xff\x00"),
    "charset": Message(id="2", body=b"{}", content_type="application/json; charset=latin-1"),
    "type": Message(id="3", body=pickle.dumps(1), content_type="application/x-python-serialize"),
    "compression": Message(id="4", body=b"\x00\x01", headers={"compression": "nope", "raw": b"\xff"}),
    "bomb": Message(id="5", body=gzip.compress(bytes(100 * 1024 * 1024)), content_encoding="gzip"),
    "depth": Message(id="6", body=b'{"id":' + b"[" * 100_000),
    "broker": Message(id="7", body=b"whole", unreadable="an invalid property"),
    "broker, no id": Message(id=None, body=b"whole", unreadable="an invalid property"),
    "no id": Message(
        id=None, body=b'{"id": 1}', headers={"x": "\ud800", "n": 2**70, "nested": {"a": [1, None]}}
    ),
    "tombstone": Message(id="8", body=None, key=b"\xff"),
}


@pytest.mark.hazard("H11")
@pytest.mark.hazard("H24")
@pytest.mark.hazard("S1")
@pytest.mark.hazard("S2")
@pytest.mark.hazard("S4")
@on(*DATABASES)
def test_what_cannot_be_judged_is_one_dead_letter_each_byte_for_byte(shop: Shop) -> None:
    attempts = decoding(shop)
    for name, given in UNREADABLE.items():
        reason = "no id" if name == "no id" else "unreadable"
        assert attempts(given) == Dead(reason), name
        again = REPEATED if given.id is not None else Dead(reason)
        assert [attempts(given) for _ in range(2)] == [again] * 2
    rows = shop.dead()
    assert [row.body for row in rows] == [given.body for given in UNREADABLE.values()]
    assert [row.headers for row in rows] == [packed(given.headers) for given in UNREADABLE.values()]
    assert unpacked(rows[3].headers) == {"compression": "nope", "raw": b"\xff"}
    assert [row.copies for row in rows] == [1 if given.id else 3 for given in UNREADABLE.values()]
    assert all(
        row.owns_claim == (given.id is not None) for row, given in zip(rows, UNREADABLE.values(), strict=True)
    )
    assert shop.effects() == []
    assert attempts(Message(id="good", body=b'{"id": 9}')) == PROCESSED


@pytest.mark.hazard("H30")
@pytest.mark.hazard("S3")
@on()
def test_the_same_id_with_another_body_is_a_conflict_and_changes_nothing(shop: Shop) -> None:
    attempts = shop.attempts()
    assert attempts(message(body=b"first")) == PROCESSED
    for _ in range(2):
        assert attempts(message(body=b"second")) == Dead("conflict")
    assert attempts(message(body=b"third")) == Dead("conflict")
    assert attempts(message(body=b"first")) == REPEATED
    assert shop.effects() == ["first"]
    assert [(row.reason, row.body, row.copies, row.owns_claim) for row in shop.dead()] == [
        ("conflict", b"second", 2, False),
        ("conflict", b"third", 1, False),
    ]


@pytest.mark.hazard("H30")
@on(("sqlite", "pysqlite"), ("postgres", "psycopg"))
def test_what_is_compared_is_the_consumers_choice(shop: Shop) -> None:
    nothing = shop.attempts(name="nothing", fingerprint=None)
    assert [nothing(message(body=body)) for body in (b"a", b"b")] == [PROCESSED, REPEATED]
    start = shop.attempts(name="start", fingerprint=lambda given: (given.body or b"")[:1])
    assert [start(message(body=body)) for body in (b"ab", b"ac", b"b")] == [
        PROCESSED,
        REPEATED,
        Dead("conflict"),
    ]

    def broken(given: Message) -> bytes:
        raise ValueError("not this one")

    assert shop.attempts(name="broken", fingerprint=broken)(message()) == Dead("unreadable")


@on()
def test_a_rejected_message_is_dead_with_its_claim(shop: Shop) -> None:
    def rejecting(given: Message, session: Session) -> None:
        write(given, session)
        raise Reject("amount must be positive")

    attempts = shop.attempts(rejecting)
    assert [attempts(message()) for _ in range(2)] == [Dead("rejected"), REPEATED]
    (row,) = shop.dead()
    assert "amount must be positive" in row.error
    assert (shop.effects(), shop.claims(), row.owns_claim) == ([], 1, True)


def test_no_chosen_id_meets_the_identity_of_a_message_without_id() -> None:
    lost = Job(Message(body=b"lost"), None, None)
    identity = _identity(lost)
    for chosen in (identity.hex(), str(identity), "lost"):
        assert key_of(chosen) != identity
    moved = Job(Message(body=b"ost", headers={"l": ""}), None, None)
    again = Job(
        Message(body=b"lost", headers={"x-death": [{"count": 2}], "x-last-death-queue": "q"}), None, None
    )
    assert _identity(moved) != identity == _identity(again)


def test_headers_that_are_nested_without_end_are_cut_and_not_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert len(packed(deep)) < 1000
    while deep:  # freed step by step, because the interpreter's own way is recursive
        deep = deep["a"]


class Text(str):
    pass


class Number(int):
    pass


class Moment(datetime):
    pass


class Silent:
    def __str__(self) -> str:
        raise ValueError("on purpose")


@pytest.mark.hazard("H44")
def test_headers_of_whatever_types_are_written_down() -> None:
    early, late = timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))
    headers: dict[Any, Any] = {
        "text": Text("é"),
        "number": Number(7),
        "bytes": memoryview(b"a-b-c")[::2],
        "moment": Moment(2026, 1, 2, tzinfo=UTC),
        "first": datetime.min.replace(tzinfo=early),
        "last": datetime.max.replace(tzinfo=late),
        "silent": Silent(),
        Silent(): 1,
    }
    assert unpacked(packed(headers)) == {
        "text": "é",
        "number": 7,
        "bytes": b"abc",
        "moment": datetime(2026, 1, 2, tzinfo=UTC),
        "first": "0001-01-01 00:00:00+14:00",
        "last": "9999-12-31 23:59:59.999999-12:00",
        "silent": "(it cannot be printed)",
        "(it cannot be printed)": 1,
    }


@pytest.mark.hazard("H44")
@on(*DATABASES)
def test_killed_between_any_two_steps_of_burying_one_dead_letter_is_left(shop: Shop) -> None:
    consumer, number = shop.consumer(), shop.number()
    shop.engine.dispose()

    def child(given: Message, step: int) -> None:
        engine = shop.new_engine()
        left = [step]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        for place in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(engine, place, count)
        unit = SyncUnit(engine, consumer, number)  # type: ignore[arg-type]  # the drivers here are sync
        unit.run(consumer.job(given))
        count()
        os._exit(0)

    kills = 0
    for given in (message("1", unreadable="torn"), message(None)):
        for step in range(30):
            process = multiprocessing.get_context("fork").Process(target=child, args=(given, step))
            process.start()
            process.join(90)
            if process.exitcode == 0:
                break
            kills += process.exitcode == -signal.SIGKILL
    assert kills >= 10
    assert sorted(shop.reasons()) == ["no id", "unreadable"]
    assert shop.claims() == 1


@pytest.mark.hazard("S7")
@on()
def test_no_body_parameter_or_password_reaches_a_verdict_or_a_log_line(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "idemq")
    marker = "marker-7391"

    def failing(given: Message, session: Session) -> None:
        mark = (given.body or b"").decode()
        if given.id == "null":
            session.execute(text("INSERT INTO effects (seq, mark) VALUES (1, NULL)"))
        elif given.id == "unique":
            session.execute(text("CREATE TEMPORARY TABLE kept (mark varchar(50) PRIMARY KEY)"))
            for _ in range(2):
                session.execute(text("INSERT INTO kept VALUES (:mark)"), {"mark": mark})
        elif given.id == "type":
            session.execute(insert(effects).values(seq=mark, mark=mark))
        elif given.id == "bind":
            session.execute(insert(effects).values(mark=object(), seq=[mark]))
        elif given.id == "syntax":
            session.execute(text("SELECT :mark FROM no_such_table"), {"mark": mark})
        else:
            session.execute(text("SELECT :mark"), {"wrong": mark})

    attempts = shop.attempts(failing)
    for id in ("null", "unique", "type", "bind", "syntax", "missing"):
        verdict = attempts(message(id, marker.encode()))
        assert isinstance(verdict, Release | Ack), verdict  # SQLite stores what it is given
        assert marker not in repr(verdict)
        assert "INSERT INTO" not in repr(verdict)
    told = caplog.text + repr(attempts) + repr(attempts.engine)
    assert marker not in told
    if shop.url.password:
        assert f":{shop.url.password}@" not in told
