from __future__ import annotations

import getpass
import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.exc import OperationalError

from idemq import letters, names, schema
from idemq.cli import harmless, main
from idemq.cli.choosing import act, duration, matching
from idemq.cli.loading import Database, load
from idemq.packing import error_text, packed
from tests.core_tools import Shop, on
from tests.test_letters import bury, entries, park, row_of

Result = tuple[int, str, str]

MARK, PASSWORD = "marker-in-the-secret", "hush-hush"


class Cli:
    """The command on a shop's app."""

    def __init__(self, app: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.app, self._capsys = app, capsys

    def __call__(self, command: str, *arguments: str) -> Result:
        with pytest.raises(SystemExit) as caught:
            main([*command.split(), self.app, *arguments])
        out, err = self._capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), out, err

    def json(self, command: str, *arguments: str) -> Any:
        code, out, err = self(command, *arguments, "--json")
        assert code == 0, err
        return json.loads(out)


def write_app(directory: Path, name: str, url: URL, more: str = "") -> str:
    text = url.render_as_string(hide_password=False)
    (directory / f"{name}.py").write_text(f"from idemq import App\napp = App({text!r})\n{more}")
    return f"{name}:app"


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
    return Cli(write_app(tmp_path, unique, shop.url_of_driver()), capsys)


SQLITE = on(("sqlite", "pysqlite"))
EVERYWHERE = on(
    ("sqlite", "pysqlite"),
    ("sqlite", "aiosqlite"),
    ("postgres", "psycopg"),
    ("postgres", "asyncpg"),
    ("mariadb", "pymysql"),
    ("mysql", "pymysql"),
)


# --- lists and the overview -----------------------------------------------------------------------------


@EVERYWHERE
def test_the_lists_and_the_overview(shop: Shop, cli: Cli) -> None:
    dead, waiting = bury(shop, "payment-1"), park(shop, "payment-2", crashes=0)
    bury(shop, "payment-3", "crashed", consumer="ledger")
    code, out, _ = cli("dead list")
    assert code == 0
    (heading, first, second) = out.splitlines()
    assert heading.split() == [
        "id",
        "consumer",
        "message",
        "id",
        "reason",
        "attempts",
        "copies",
        "age",
        "error",
    ]
    assert first.split() == [
        str(dead)[:12],
        "shop",
        "payment-1",
        "rejected",
        "8",
        "1",
        "60m",
        "ValueError:",
        "no",
    ]
    assert "crashed" in second
    (only,) = cli("dead list", "--consumer", "ledger")[1].splitlines()[1:]
    assert only.split() == second.split()
    code, out, _ = cli("parked list")
    assert out.splitlines()[1].split()[:2] == [str(waiting)[:12], "shop"]
    assert "in 4m" in out
    code, out, _ = cli("status")
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["ledger", "0", "0", "0", "1", "-", "-"],
        ["shop", "0", "1", "1", "1", "60m", "in", "4m"],
    ]


@SQLITE
def test_for_programs_there_is_json(shop: Shop, cli: Cli) -> None:
    pk = bury(shop, "payment-1")
    (letter,) = cli.json("dead list")
    assert UUID(letter["pk"]) == pk
    assert (letter["id"], letter["consumer"], letter["reason"]) == ("payment-1", "shop", "rejected")
    assert datetime.fromisoformat(letter["last_at"]).tzinfo is not None
    assert cli.json("parked list") == []
    (overview,) = cli.json("status")["consumers"]
    assert (overview["consumer"], overview["dead"], overview["precision"]) == ("shop", 1, "exact")


@SQLITE
def test_filters_and_what_they_refuse(shop: Shop, cli: Cli) -> None:
    bury(shop, "old", last_at=datetime.now(UTC) - timedelta(days=8))
    bury(shop, "new", "crashed")
    for arguments, ids in (
        (["--older-than", "7d"], ["old"]),
        (["--newer-than", "1h30m"], ["new"]),
        (["--reason", "crashed"], ["new"]),
        (["--limit", "1"], ["old"]),
        (["--older-than", "2w"], []),
    ):
        assert [letter["id"] for letter in cli.json("dead list", *arguments)] == ids
    assert "there are more" in cli("dead list", "--limit", "1")[1]
    assert cli("dead list", "--older-than", "2w")[:2] == (0, "There are none.\n")
    for wrong in ("7", "d", "-1d", "1y", "9999999d"):
        code, _, err = cli("dead list", f"--older-than={wrong}")
        assert code == 2
        assert "is no duration" in re.sub(r"[^\w ]+", "", err.replace("\n", " "))
    code, _, err = cli("dead list", "--consumer", "nobody")
    known = "those that have: shop"
    assert (code, err) == (2, f"idemq: no consumer named 'nobody' has run on this database; {known}\n")


@SQLITE
def test_the_error_of_a_list_is_what_was_raised_and_not_where_to_read_about_it(shop: Shop, cli: Cli) -> None:
    with shop.engine.connect() as connection, pytest.raises(OperationalError) as caught:
        connection.execute(text("SELECT payment FROM missing WHERE payment = :payment"), {"payment": "p-1"})
    bury(shop, "database", error=error_text(caught.value))
    bury(shop, "lines", error=error_text(ValueError("the amount\nis negative")))
    bury(shop, "long", error=error_text(ValueError("x" * 30_000)))
    bury(shop, "short", error="no traceback")
    out = cli("dead list")[1]
    assert "(sqlite3.OperationalError) no such table: missing" in out
    assert "ValueError: the amount" in out
    assert "ValueError: xxx" in out
    assert "no traceback" in out
    assert "Background" not in out


@SQLITE
def test_a_consumers_name_may_be_anything_and_a_wrong_one_names_the_right_ones(shop: Shop, cli: Cli) -> None:
    for name in ("[red]a b", "50%_'\"", "-x"):
        bury(shop, name, consumer=name)
        assert [each["id"] for each in cli.json("dead list", f"--consumer={name}")] == [name]
        assert name in cli("dead list")[1]
    code, _, err = cli("dead list", "--consumer", "50")
    assert (code, err.count("\n")) == (2, 1)
    assert "no consumer named '50' has run" in err
    assert "-x, 50%_'\", [red]a b" in err
    for command, arguments in (("dead list", ["--consumer", "\udcff"]), ("seen", ["\udcff", "\udcff"])):
        code, _, err = cli(command, *arguments)
        assert (code, err.count("\n")) == (1 if command == "seen" else 2, 1)
        assert "has run" in err


@SQLITE
def test_json_for_programs_has_no_number_that_json_does_not_know(shop: Shop, cli: Cli) -> None:
    pk = bury(shop, "nan", headers=packed({"nan": float("nan"), "list": [float("inf")]}))
    out = cli("dead show", str(pk), "--json")[1]
    assert json.loads(out, parse_constant=pytest.fail)["headers"] == {"nan": "nan", "list": ["inf"]}


def test_durations() -> None:
    assert duration("90s") == timedelta(seconds=90)
    assert duration("1h30m") == timedelta(minutes=90)
    assert duration("2w") == timedelta(days=14)


@SQLITE
def test_a_consumer_is_shown_under_the_name_that_the_app_gives_it_now(
    shop: Shop, cli: Cli, tmp_path: Path, unique: str
) -> None:
    bury(shop, "1", consumer="a-name-before")
    with shop.engine.begin() as connection:
        names.register(connection, "shop", ("a-name-before",))
    more = (
        "from idemq import Message\nfrom tests.core_tools import NOWHERE\n"
        "@app.consumer('shop', NOWHERE, known_as='a-name-before')\ndef handle(message: Message): ...\n"
    )
    renamed = Cli(write_app(tmp_path, unique + "b", shop.url, more), cli._capsys)
    assert [each["consumer"] for each in renamed.json("dead list")] == ["shop"]
    assert [each["consumer"] for each in renamed.json("status")["consumers"]] == ["shop"]


@SQLITE
def test_without_tables_the_command_that_makes_them_is_named(
    shop: Shop, cli: Cli, tmp_path: Path, unique: str
) -> None:
    empty = Cli(write_app(tmp_path, unique + "b", shop.url.set(database=str(tmp_path / "x"))), cli._capsys)
    for command in ("status", "dead list", "parked list", "dead show"):
        arguments = ["abc"] if command == "dead show" else []
        code, _, err = empty(command, *arguments)
        assert code == 1
        assert err == f"idemq: the tables of idemq are missing: run `idemq db upgrade {empty.app}`\n"


# --- one letter -----------------------------------------------------------------------------------------


@EVERYWHERE
def test_show_tells_all_of_a_letter_by_the_beginning_of_its_id(shop: Shop, cli: Cli) -> None:
    pk = bury(shop, "payment-1", body=b'{"amount":1.10,"to":"ann"}')
    code, out, _ = cli("dead show", str(pk)[:8])
    assert code == 0
    for words in (
        "payment-1",
        "dead (rejected)",
        "8, and 2 crashes",
        "queue: payments",
        "text: t",
        "type: paid",
    ):
        assert words in out
    assert 'body (26 bytes)\n{\n  "amount": 1.10,\n  "to": "ann"\n}\n' in out
    assert "error\nTraceback\nValueError: no" in out
    letter = cli.json("dead show", str(pk))
    assert (letter["headers"], letter["key"]) == ({"text": "t", "bytes": "0xff"}, "k")
    assert letter["origin"] == {"queue": "payments"}


@EVERYWHERE
def test_raw_gives_the_body_byte_for_byte(shop: Shop, cli: Cli, tmp_path: Path) -> None:
    body = bytes(range(256)) * 300
    pk = bury(shop, "1", body=body)
    assert cli("dead show", str(pk), "--raw", "body.bin")[0] == 0
    assert (tmp_path / "body.bin").read_bytes() == body
    assert "76,800 bytes in all" in cli("dead show", str(pk))[1]
    program = [sys.executable, "-W", "error", "-m", "idemq", "dead", "show", cli.app, str(pk), "--raw", "-"]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    if shop.kind == "sqlite":
        done = subprocess.run(program, capture_output=True, env=environment)
        assert (done.returncode, done.stdout) == (0, body), done.stderr
    assert cli("dead show", str(pk), "--raw", "no/such/file")[0] == 1
    tombstone = bury(shop, "2", body=None)
    assert "tombstone" in cli("dead show", str(tombstone), "--raw", "-")[2]
    assert "(none: a tombstone)" in cli("dead show", str(tombstone))[1]


@SQLITE
def test_a_letter_that_is_not_there_or_not_unique_is_one_line(shop: Shop, cli: Cli) -> None:
    for last in (1, 2):
        pk = UUID(f"abcdef00-0000-4000-8000-00000000000{last}")
        bury(shop, str(last), pk=pk.bytes)
    assert cli("dead show", "abc") == (
        1,
        "",
        "idemq: 'abc' is not unique: it begins abcdef00-0000-4000-8000-000000000001,"
        " abcdef00-0000-4000-8000-000000000002\n",
    )
    assert cli("dead show", "fff")[::2] == (
        1,
        "idemq: there is no letter 'fff'; it may be done, or dropped\n",
    )
    assert cli("dead show", "xyz")[0] == 2


SECRETS = {
    "Authorization": f"Bearer {MARK}",
    "Cookie": MARK,
    "X-Api-Key": MARK,
    "deep": {"Access_Token": MARK, "list": [{"client-secret": MARK}]},
    "url": f"amqp://shop:{MARK}@rabbit:5672/",
    "bytes": f"password={MARK}".encode(),
    "harmless": "stays",
}


@pytest.mark.hazard("S7")
@SQLITE
@pytest.mark.parametrize("kind", ["table", "json"])
def test_secrets_are_masked_wherever_show_and_list_print_them(shop: Shop, cli: Cli, kind: str) -> None:
    body = json.dumps({"url": f"https://a:{MARK}@b/c?token={MARK}&x=1", "password": MARK, "to": "ann"})
    error = (
        f"Traceback\n  connect('postgresql://shop:{MARK}@db/shop', password='{MARK}')\n"
        f"Error: token={MARK}; Authorization: Bearer {MARK}\nCookie: a={MARK}; b={MARK}\n"
        f"{json.dumps(json.dumps({'password': MARK}))} {{'secret': '{MARK}', 'api_key' : \"{MARK}\"}}"
    )
    pk = bury(
        shop,
        "1",
        body=body.encode(),
        error=error,
        headers=packed(SECRETS),
        properties=packed({"message_id": "1", "reply_secret": MARK}),
        origin=packed({"queue": "q", "url": f"amqp://a:{MARK}@b"}),
    )
    more = ["--json"] if kind == "json" else []
    out = "".join(
        cli(command, *arguments, *more)[1]
        for command, arguments in (("dead list", []), ("dead show", [str(pk)]))
    )
    assert MARK not in out
    for words in ("***", "stays", "ann", "shop:***@db"):
        assert words in out
    assert MARK in row_of(shop, pk).error


@pytest.mark.hazard("S7")
@pytest.mark.parametrize("filler", ["x", " ", '"', "é"])
def test_a_secret_at_the_cut_does_not_come_through_in_part(filler: str) -> None:
    for secret in (f"amqp://a:{MARK * 3}@b", f'"password": "{MARK * 60}"', f"token={MARK * 60}"):
        for before in range(harmless.SHOWN - len(secret) - 5, harmless.SHOWN + 5, 7):
            text = filler * (before - 1) + " " + secret + " end" * 400
            assert MARK[:4] not in harmless.shown(text)


@pytest.mark.hazard("S7")
@SQLITE
def test_a_terminal_obeys_nothing_that_a_message_says(shop: Shop, cli: Cli) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e[red]:bomb:\r\n\udc80"
    pk = bury(
        shop,
        evil,
        body=evil.encode("utf-8", "surrogatepass"),
        error=evil.encode("utf-8", "replace").decode(),
        headers=packed({evil: evil}),
        origin=packed({"queue": evil}),
        reason="rejected",
    )
    bury(shop, "2", body="\x1b[2J\u009b[red]".encode())
    for command, arguments in (("dead list", []), ("dead show", [str(pk)]), ("dead list", ["--json"])):
        code, out, _ = cli(command, *arguments)
        assert code == 0
        assert not set(out) & set("\x1b\x07\u009b\u202e\r\udc80")
    assert "[red]:bomb:" in cli("dead show", str(pk))[1]


def test_looking_for_secrets_takes_no_time_that_grows_faster_than_the_text() -> None:
    for part in ("a://b:", "password", '"token', "token=", "x" * 50, '"\\', "bearer "):
        harmless.shown(part * (harmless.SHOWN // len(part) + 100))


# --- retry and drop -------------------------------------------------------------------------------------


@pytest.mark.hazard("H44")
@pytest.mark.hazard("S8")
@EVERYWHERE
def test_retry_by_a_filter_says_how_many_and_records_who_and_why(shop: Shop, cli: Cli) -> None:
    mine = [bury(shop, str(number)) for number in range(3)]
    other = bury(shop, "other", consumer="ledger")
    code, out, err = cli("dead retry", "--consumer", "shop", "--yes", "--by", "ann", "--why", "fixed")
    assert (code, out, err) == (
        0,
        "3 dead letters handed to the workers.\n",
        "retry 3 dead letters (shop: 3 rejected)\n",
    )
    assert {row_of(shop, pk).state for pk in mine} == {1}
    assert row_of(shop, other).state == 2
    assert sorted(entries(shop)) == sorted(("ann", "retry", pk.bytes, "rejected", "fixed") for pk in mine)
    code, out, err = cli("dead retry", "--consumer", "shop", "--yes")
    assert (code, out, err) == (0, "", "There is nothing to retry.\n")
    assert len(entries(shop)) == 3


@SQLITE
def test_retry_by_ids_needs_letters_that_are_dead(shop: Shop, cli: Cli) -> None:
    one, two, waiting = bury(shop, "1"), bury(shop, "2"), park(shop, "3")
    assert cli("dead retry", str(one)[:12], str(waiting), "--yes")[0] == 1
    assert row_of(shop, one).state == 2
    assert cli.json("dead retry", str(one)[:12], str(two), "--yes") == {"retried": 2, "refused": []}
    code, _, err = cli("dead retry", str(one), "--yes")
    assert code == 1
    assert "is not dead: it is waiting to be tried again (failed)" in err
    assert entries(shop)[0][0] == getpass.getuser()


@pytest.mark.hazard("H30")
@SQLITE
def test_conflicts_are_refused_by_name_and_broken_ones_want_force(shop: Shop, cli: Cli) -> None:
    conflict, broke = bury(shop, "1", "conflict"), bury(shop, "2", "broke its transaction")
    bury(shop, "3")
    code, out, err = cli("dead retry", "--all", "--yes")
    assert (code, out) == (0, "1 dead letter handed to the workers.\n")
    assert "refused: 1 (conflict): its id was processed with another body" in err
    assert "refused: 1 (broke its transaction): what its handler committed is there" in err
    code, _, err = cli("dead retry", str(conflict), "--force", "--yes")
    assert code == 1
    assert "There is nothing to retry." in err
    answer = cli.json("dead retry", "--all", "--force", "--yes")
    assert (answer["retried"], [each["pk"] for each in answer["refused"]]) == (1, [str(conflict)])
    assert row_of(shop, broke).state == 1


@EVERYWHERE
def test_drop_wants_a_reason_and_leaves_the_claim(shop: Shop, cli: Cli) -> None:
    pk = bury(shop, "1")
    assert cli("dead drop", str(pk), "--yes")[0] == 2
    code, out, _ = cli("dead drop", str(pk), "--yes", "--why", "spam", "--by", "ben")
    assert (code, out) == (0, "1 dead letter dropped.\n")
    assert (shop.dead(), shop.claims()) == ([], 1)
    code, out, _ = cli("seen", "shop", "1")
    assert code == 0
    assert out.startswith("shop had made '1' a dead letter (rejected), dropped by ben at ")
    with shop.engine.connect() as connection:
        assert [entry.why for entry in letters.history(connection, pk)] == ["spam"]


@SQLITE
def test_without_a_terminal_nothing_is_done_unless_yes_is_said(shop: Shop, cli: Cli) -> None:
    pk = bury(shop, "1")
    before = row_of(shop, pk)
    for command in ("retry", "drop"):
        code, out, err = cli(f"dead {command}", "--all", "--why", "x")
        assert (code, out) == (2, "")
        assert (
            err.splitlines()[-1] == "idemq: there is no terminal to ask at, so nothing was done: give --yes"
        )
    assert row_of(shop, pk) == before
    assert entries(shop) == []


@SQLITE
@pytest.mark.parametrize("arguments", [[], ["--limit", "3"], ["--all", "--reason", "x"], ["abc", "--all"]])
def test_which_letters_are_meant_must_be_said_in_one_way(shop: Shop, cli: Cli, arguments: list[str]) -> None:
    bury(shop, "1")
    for command in ("retry", "drop"):
        code, _, err = cli(f"dead {command}", *arguments, "--yes", "--why", "x")
        assert (code, err.startswith("idemq: say which: ids, or a filter")) == (2, True)


@SQLITE
@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, 0), (b"n\n", 1, 2), (b"\x04", 1, 2)])
def test_at_a_terminal_it_asks_first(shop: Shop, cli: Cli, answer: bytes, code: int, left: int) -> None:
    for number in range(2):
        bury(shop, str(number))
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "idemq", "dead", "drop", cli.app, "--all", "--why", "x"]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            asked = b""
            while b"Go on?" not in asked:
                asked += os.read(ours, 1024)
            assert b"drop 2 dead letters (shop: 2 rejected)" in asked
            os.write(ours, answer)
            assert process.wait(90) == code
        finally:
            process.kill()
            os.close(ours)
    assert len(shop.dead()) == left


@SQLITE
def test_what_came_after_the_question_is_not_touched(shop: Shop, cli: Cli) -> None:
    first = bury(shop, "1")
    database = Database(cli.app, load(cli.app))
    chosen = matching(database, None, {})
    second = bury(shop, "2")
    assert act(database, "retry", chosen, True, _retry) == 1
    assert (row_of(shop, first).state, row_of(shop, second).state) == (1, 2)


def _retry(connection: Any, pks: list[UUID]) -> int:
    return letters.retry(connection, by="ann", ids=pks)


# --- seen -----------------------------------------------------------------------------------------------


@EVERYWHERE
def test_seen_tells_waiting_from_dead(shop: Shop, cli: Cli) -> None:
    park(shop, "1", "later")
    assert cli("seen", "shop", "1")[:2] == (0, "'1' is waiting to be tried again by shop (later)\n")


@SQLITE
def test_what_was_dropped_and_forgotten_and_came_again_is_processed(shop: Shop, cli: Cli) -> None:
    pk = bury(shop, "1")
    processed = schema.table("idemq_processed")
    with shop.engine.begin() as connection:
        letters.drop(connection, by="ann", why="x", ids=[pk])
        later = datetime.now(UTC) + timedelta(days=30)
        connection.execute(processed.update().values(at=later))
        assert connection.scalar(select(processed.c.consumer)) is not None
    assert cli("seen", "shop", "1")[1].startswith("shop processed '1' at ")


@SQLITE
def test_no_password_is_in_anything_that_the_commands_print(
    shop: Shop, cli: Cli, tmp_path: Path, unique: str
) -> None:
    url = URL.create("postgresql+psycopg", "shop", PASSWORD, "127.0.0.1", 1, "shop")
    away = Cli(write_app(tmp_path, unique + "c", url), cli._capsys)
    for command in ("status", "dead list", "parked list"):
        code, out, err = away(command)
        assert code == 1
        assert "cannot be reached" in err
        assert PASSWORD not in out + err
