"""`idemq doubt`, and what `idemq status` says of what leaves."""

from __future__ import annotations

import getpass
import json
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete, select, update

from idemq import doubt, schema
from idemq.cli import doubt as commands
from idemq.cli import tables
from idemq.drivers import begin
from idemq.effects import Effects, declare
from idemq.message import Message
from idemq.outbox import Outbox
from idemq.outgoing import EFFECT, FAILED, IN_DOUBT, SENDING, WAITING
from idemq.outgoing import plan as plan_row
from tests.core_tools import Shop, on
from tests.test_cli_failed import MARK, Cli, write_app
from tests.test_outgoing import QUEUE

TABLE = schema.table("idemq_outgoing")
PAYLOAD = b'{"phone":"+49 1","text":"Thank you"}'

APP = """
@app.effect("sms")
def send_sms(payload: dict[str, str], key: str) -> None: ...
"""

SQLITE = on(("sqlite", "pysqlite"))
EVERYWHERE = on(
    ("sqlite", "pysqlite"),
    ("sqlite", "aiosqlite"),
    ("postgres", "psycopg"),
    ("postgres", "asyncpg"),
    ("mariadb", "pymysql"),
    ("mariadb", "asyncmy"),
)


@pytest.fixture
def cli(
    shop: Shop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unique: str,
) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with shop.engine.begin() as connection:
        connection.execute(delete(TABLE))
    return Cli(write_app(tmp_path, unique, shop.url_of_driver(), APP), capsys)


def doubtful(shop: Shop, effect: str = "sms", payload: bytes = PAYLOAD, **values: Any) -> UUID:
    """A row as the relay leaves it, by default in doubt."""
    with shop.engine.connect() as connection, begin(connection):
        key = plan_row(connection, EFFECT, effect, Message(body=payload))
        row = connection.execute(select(TABLE).where(TABLE.c.pk == key.bytes)).one()
        long_ago = row.at - timedelta(minutes=90)
        values = {
            "state": IN_DOUBT,
            "attempts": 1,
            "not_before": None,
            "at": long_ago,
            "first_sending_at": long_ago,
            "error": "Traceback\nTimeoutError: no answer",
            **values,
        }
        connection.execute(update(TABLE).where(TABLE.c.seq == row.seq).values(**values))
    return key


def rows(shop: Shop) -> list[Any]:
    with shop.engine.connect() as connection:
        return list(connection.execute(select(TABLE).order_by(TABLE.c.seq)))


def history(shop: Shop, key: UUID) -> list[tuple[str, ...]]:
    with shop.engine.connect() as connection:
        return [(each.who, each.action, each.why or "") for each in doubt.history(connection, key)]


# --- looking --------------------------------------------------------------------------------------------


@EVERYWHERE
def test_the_list_says_what_is_in_doubt_or_failed_and_who_looks_at_it(shop: Shop, cli: Cli) -> None:
    key = doubtful(shop)
    failed = doubtful(shop, "mail", state=FAILED, attempts=3, error="Refused: no such address")
    doubtful(shop, state=WAITING)
    soon = rows(shop)[0].last_at + timedelta(minutes=5)
    looked = doubtful(shop, not_before=soon)
    code, out, _ = cli("doubt list")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split() == ["id", "effect", "state", "attempts", "age", "looked", "at", "error"]
    assert lines[0].split() == [
        *(str(key), "sms", "in", "doubt", "1", "90m", "by", "a", "person", "TimeoutError:", "no", "answer")
    ]
    assert lines[1].split()[:5] == [str(failed), "mail", "failed", "3", "90m"]
    assert lines[2].split()[0] == str(looked)
    assert re.search(r" in \dm ", lines[2])
    assert len(lines) == 3


@SQLITE
def test_in_a_narrow_terminal_the_error_gives_way_and_the_id_stays_whole(
    shop: Shop, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [doubtful(shop, error="TimeoutError: " + "no answer " * 30) for _ in range(2)]
    for width, words in ((100, ["sms", "in doubt", "by a person", "Timeout"]), (60, [])):
        monkeypatch.setattr(tables, "WIDTH", width)
        _, *lines = cli("doubt list")[1].splitlines()
        assert [line.split()[0] for line in lines] == [str(key) for key in keys]
        assert [word for word in words if word not in lines[0]] == []


@EVERYWHERE
def test_show_tells_all_of_an_effect_by_the_beginning_of_its_id(shop: Shop, cli: Cli) -> None:
    key = doubtful(shop)
    code, out, _ = cli("doubt show", str(key)[:30])
    assert code == 0
    facts = dict(line.strip().split(maxsplit=1) for line in out.splitlines()[:4])
    assert facts == {"id": str(key), "effect": "sms", "state": "in doubt", "attempts": "1"}
    assert "by a person" in out
    assert 'payload (36 bytes)\n{\n  "phone": "+49 1",\n  "text": "Thank you"\n}\n' in out
    assert "error\nTraceback\nTimeoutError: no answer" in out
    found = cli.json("doubt show", str(key))
    assert (found["key"], found["state"], found["due"]) == (str(key), "in doubt", None)
    assert json.loads(found["payload"]) == json.loads(PAYLOAD)
    assert found["history"] == []


@SQLITE
def test_for_programs_there_is_json_and_what_is_shown_is_chosen(shop: Shop, cli: Cli) -> None:
    old, new = doubtful(shop), doubtful(shop, "mail", at=rows_now(shop))
    for arguments, keys in (
        ([], [old, new]),
        (["--effect", "mail"], [new]),
        (["--older-than", "1h"], [old]),
        (["--limit", "1"], [old]),
    ):
        assert [UUID(each["key"]) for each in cli.json("doubt list", *arguments)] == keys
    first = cli.json("doubt list")[0]
    assert (first["effect"], first["attempts"], first["size"]) == ("sms", 1, len(PAYLOAD))
    assert datetime.fromisoformat(first["planned_at"]).tzinfo is not None
    assert "payload" not in first
    assert "there are more" in cli("doubt list", "--limit", "1")[1]
    assert cli("doubt list", "--effect", "sms", "--older-than", "2w")[:2] == (0, "There are none.\n")
    code, _, err = cli("doubt list", "--effect", "smss")
    assert (code, err) == (2, "idemq: no effect named 'smss' is declared, or in doubt\n")


def rows_now(shop: Shop) -> datetime:
    moment: datetime = rows(shop)[-1].last_at
    return moment


@SQLITE
def test_an_effect_that_is_not_there_or_not_unique_is_one_line(shop: Shop, cli: Cli) -> None:
    for last in (1, 2):
        doubtful(shop, pk=UUID(f"abcdef00-0000-7000-8000-00000000000{last}").bytes)
    assert cli("doubt show", "abc") == (
        1,
        "",
        "idemq: 'abc' is not unique: it begins abcdef00-0000-7000-8000-000000000001,"
        " abcdef00-0000-7000-8000-000000000002\n",
    )
    missing = "idemq: there is no effect 'fff'; it may be done, or resolved\n"
    assert cli("doubt show", "fff")[::2] == (1, missing)
    assert cli("doubt resolve", "fff", "--done", "--reason", "x", "--yes")[::2] == (1, missing)
    assert cli("doubt show", "xyz")[0] == 2


@pytest.mark.hazard("S7")
@SQLITE
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_secrets_are_masked_and_a_terminal_obeys_nothing(shop: Shop, cli: Cli, more: list[str]) -> None:
    payload = json.dumps({"password": MARK, "url": f"https://a:{MARK}@b", "to": "ann"}).encode()
    error = f"Traceback\nError: token={MARK}; Authorization: Bearer {MARK} \x1b[2J"
    key = doubtful(shop, "sms\x1b[2J", payload, error=error)
    out = cli("doubt list", *more)[1] + cli("doubt show", str(key), *more)[1]
    assert MARK not in out
    assert "\x1b" not in out
    assert "ann" in out
    assert cli("doubt show", str(key), "--raw", "payload.json")[0] == 0
    assert Path("payload.json").read_bytes() == payload


# --- deciding -------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize(
    ("decision", "meaning"),
    [
        ("done", "it has happened; it ends, and is not sent again"),
        ("resend", "it has not happened; it is sent again now, with the same key and payload"),
        ("failed", "it is given up; it ends, and is not sent again"),
    ],
)
def test_resolve_says_what_it_does_and_records_who_and_why(
    shop: Shop, cli: Cli, decision: str, meaning: str
) -> None:
    key = doubtful(shop)
    code, out, err = cli(
        "doubt resolve", str(key)[:30], f"--{decision}", "--reason", "asked them", "--by", "ann", "--yes"
    )
    assert (code, out) == (0, f"{key}: {decision}.\n")
    assert err == f"{decision} {key} (sms, in doubt, 1 attempt): {meaning}\n"
    assert history(shop, key) == [("ann", decision, "asked them")]
    if decision == "resend":
        assert [(row.state, row.attempts) for row in rows(shop)] == [(WAITING, 1)]
        assert "by ann: asked them" in cli("doubt show", str(key))[1]
    else:
        assert rows(shop) == []


@SQLITE
def test_what_a_failed_effect_is_and_who_does_it_has_a_default(shop: Shop, cli: Cli) -> None:
    key = doubtful(shop, "mail", state=FAILED, attempts=2)
    answer = cli.json("doubt resolve", str(key), "--resend", "--reason", "paid", "--yes")
    assert answer == {"key": str(key), "resolved": "resend"}
    assert history(shop, key) == [(getpass.getuser(), "resend", "paid")]
    key = doubtful(shop, "mail", state=FAILED, attempts=2)
    err = cli("doubt resolve", str(key), "--resend", "--reason", "paid", "--yes")[2]
    assert "(mail, failed, 2 attempts)" in err
    assert err.endswith("this app does not declare the effect: it waits until one does\n")


@SQLITE
def test_what_is_not_in_doubt_is_not_decided(shop: Shop, cli: Cli) -> None:
    for state, words in ((WAITING, "waiting, 1 attempt"), (SENDING, "sending, 1 attempt")):
        key = doubtful(shop, state=state)
        assert cli("doubt resolve", str(key), "--done", "--reason", "x", "--yes") == (
            1,
            "",
            f"idemq: {key} is neither in doubt nor failed: it is {words}\n",
        )
    assert len(rows(shop)) == 2


@SQLITE
@pytest.mark.parametrize("said", [[], ["--done", "--failed"]])
def test_one_thing_must_be_said_and_a_reason(shop: Shop, cli: Cli, said: list[str]) -> None:
    key = doubtful(shop)
    code, _, err = cli("doubt resolve", str(key), *said, "--reason", "x", "--yes")
    assert (code, err) == (2, "idemq: say what is the case: --done, --resend or --failed\n")
    assert cli("doubt resolve", str(key), "--done", "--yes")[0] == 2
    assert cli("doubt resolve", str(key), "--done", "--reason", " ", "--yes")[0] == 2
    assert len(rows(shop)) == 1
    assert history(shop, key) == []


@SQLITE
def test_without_a_terminal_nothing_is_decided_unless_yes_is_said(shop: Shop, cli: Cli) -> None:
    key = doubtful(shop)
    before = rows(shop)
    code, out, err = cli("doubt resolve", str(key), "--done", "--reason", "x")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "idemq: there is no terminal to ask at, so nothing was done: give --yes"
    assert (rows(shop), history(shop, key)) == (before, [])


@pytest.mark.hazard("H50")
@SQLITE
@pytest.mark.parametrize("who", ["a person", "a person who sends it", "a webhook", "a relay"])
def test_whoever_is_faster_than_the_answer_to_the_question_is_named(
    shop: Shop, cli: Cli, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    key = doubtful(shop)

    def think(_yes: bool) -> None:
        """While the question stands there."""
        with shop.engine.begin() as connection:
            if who == "a webhook":
                assert Effects(connection).confirm(key)
            elif who == "a relay":
                connection.execute(update(TABLE).values(state=IN_DOUBT, attempts=2))
            else:
                decision: doubt.Decision = "done" if who == "a person" else "resend"
                assert doubt.resolve(connection, key, decision, by="ben", why="x")

    monkeypatch.setattr(commands, "ask", think)
    code, out, err = cli("doubt resolve", str(key), "--failed", "--reason", "x", "--by", "ann")
    assert (code, out) == (1, "")
    last = re.sub(r" at [\d-]+ [\d:]+\+00:00", " at NOW", err.splitlines()[-1])
    assert (
        last
        == {
            "a person": f"idemq: nothing was done: ben said of {key} at NOW: done",
            "a person who sends it": f"idemq: nothing was done: {key} is waiting, 1 attempt now",
            "a webhook": f"idemq: nothing was done: {key} has been done meanwhile",
            "a relay": f"idemq: nothing was done: {key} is in doubt, 2 attempts now",
        }[who]
    )
    assert all(name == "ben" for name, *_ in history(shop, key))


# --- the overview ---------------------------------------------------------------------------------------


def send_sms(payload: dict[str, str], key: str) -> None:
    raise AssertionError("nobody calls it here")


declare("sms", send_sms, repeat=None, key_lifetime=None, settle=0.0, retry=None, concurrency=1)


@EVERYWHERE
def test_the_overview_says_what_is_to_leave_and_what_nobody_sends(shop: Shop, cli: Cli) -> None:
    doubtful(shop)
    doubtful(shop, state=SENDING)
    doubtful(shop, state=WAITING)
    doubtful(shop, "mail", state=FAILED)
    with shop.engine.begin() as connection:
        Outbox(connection).publish(QUEUE, b"1")
        Outbox(connection).publish(QUEUE, b"2")
    code, out, _ = cli("status")
    assert code == 0
    first, _, heading, *lines = out.splitlines()
    assert first == "No consumer has ever run on this database."
    assert heading.split() == [
        *("leaving", "by", "waiting", "sending", "in", "doubt", "failed", "oldest", "waiting")
    ]
    broker, mail, sms = (line.split() for line in lines)
    assert broker[:6] == ["broker", "rabbit", "2", "0", "0", "0"]
    assert broker[7:] == ["not", "declared"]
    assert mail == ["effect", "mail", "0", "0", "0", "1", "-", "not", "declared"]
    assert sms == ["effect", "sms", "1", "1", "1", "0", "90m"]
    overview = cli.json("status")
    assert overview["consumers"] == []
    assert [(each["kind"], each["name"], each["declared"]) for each in overview["leaving"]] == [
        ("broker", "rabbit", False),
        ("effect", "mail", False),
        ("effect", "sms", True),
    ]
    assert overview["leaving"][2]["in_doubt"] == 1
    assert datetime.fromisoformat(overview["leaving"][0]["oldest_waiting"]).tzinfo is not None


@SQLITE
def test_what_is_declared_is_there_before_anything_was_planned(shop: Shop, cli: Cli) -> None:
    assert cli("status")[1].splitlines()[-1].split() == ["effect", "sms", "0", "0", "0", "0", "-"]
