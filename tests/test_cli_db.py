from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import URL, NullPool, create_engine, insert, inspect, text

from idemq import migrate, names, schema
from idemq.cli import main
from idemq.drivers import url_for
from idemq.message import key_of
from tests.servers import free_port

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unique: str) -> Write:
    """Writes a module into the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        (tmp_path / f"{unique}.py").write_text(source)
        return unique

    return write


def app_on(url: URL | str, more: str = "") -> str:
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    return f"from idemq import App\napp = App({text!r}{more})\n"


def async_app_on(url: URL) -> str:
    text = url_for(url, asynchronous=True).render_as_string(hide_password=False)
    return (
        "from idemq import App\nfrom sqlalchemy.ext.asyncio import create_async_engine\n"
        f"app = App(create_async_engine({text!r}))\n"
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    code = caught.value.code
    return (code if isinstance(code, int) else 0), out, err


@pytest.mark.parametrize("make", [app_on, async_app_on])
def test_upgrade_makes_what_check_then_approves(
    database_url: URL, make: Callable[[URL], str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(make(database_url)) + ":app"
    code, out, _ = run(capsys, "db", "check", app)
    assert code == 1
    assert f"problem: the tables of idemq are missing: run `idemq db upgrade {app}`" in out
    for _ in range(2):
        code, out, _ = run(capsys, "db", "upgrade", app)
        assert (code, out.splitlines()[-1]) == (0, "the tables are right")
    code, out, _ = run(capsys, "db", "check", app)
    assert (code, out.splitlines()[-1]) == (0, "the tables are right")


def test_the_apps_schema_and_strict_are_used(
    postgres_url: URL, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(postgres_url, ", schema='shop'")) + ":app"
    code, out, _ = run(capsys, "db", "upgrade", app, "--strict")
    assert (code, out) == (0, "the tables are right, and commits are strict\n")
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.begin() as connection:
        assert migrate.has_strict(connection, "shop")
    assert inspect(engine).get_table_names() == []


def test_check_prints_every_problem_and_warning(
    postgres_url: URL, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(postgres_url.set(query={"options": "-c synchronous_commit=off"}))) + ":app"
    run(capsys, "db", "upgrade", app)
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE idemq_processed SET UNLOGGED"))
        connection.execute(text("DROP TABLE idemq_lanes"))
    code, out, _ = run(capsys, "db", "check", app)
    assert code == 1
    assert "problem: idemq_processed is UNLOGGED" in out
    assert f"problem: idemq_lanes is missing: mend it by hand (`idemq db sql {app}` prints" in out
    assert "warning: synchronous_commit = off" in out


def test_sql_prints_statements_and_connects_to_nothing(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(f"postgresql+psycopg://nobody:hush@127.0.0.1:{free_port()}/none")) + ":app"
    code, out, _ = run(capsys, "db", "sql", app, "--strict")
    assert code == 0
    assert "CREATE TABLE idemq_processed" in out
    assert "CREATE CONSTRAINT TRIGGER" in out
    assert "hush" not in out


def test_strict_on_another_database_is_one_line(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(f"sqlite:///{tmp_path / 'x.db'}")) + ":app"
    code, out, err = run(capsys, "db", "upgrade", app, "--strict")
    assert (code, out) == (2, "")
    assert err.startswith("idemq: strict needs PostgreSQL")


def test_seen_tells_processed_dead_and_unknown_ids_apart(
    database_url: URL, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(database_url)) + ":app"
    run(capsys, "db", "upgrade", app)
    engine = create_engine(database_url, poolclass=NullPool)
    noon = datetime(2026, 5, 17, 12, 30, 15, tzinfo=UTC)
    with engine.begin() as connection:
        number = names.register(connection, "receipts")
        claims, failures = schema.table("idemq_processed", None), schema.table("idemq_failed", None)
        for identifier in ("done", "dead"):
            claim = insert(claims).values(consumer=number, id=key_of(identifier), at=noon)
            connection.execute(claim)
        failure = {"pk": b"p" * 16, "consumer": number, "identity": key_of("dead"), "owns_claim": True}
        failure |= {"state": 2, "reason": "rejected", "first_at": noon, "last_at": noon}
        connection.execute(insert(failures).values(failure))
    when = "at 2026-05-17T12:30:15+00:00\n"
    assert run(capsys, "seen", app, "receipts", "done")[:2] == (0, f"receipts processed 'done' {when}")
    dead = f"receipts made 'dead' a dead letter (rejected) {when}"
    assert run(capsys, "seen", app, "receipts", "dead")[:2] == (0, dead)
    code, out, _ = run(capsys, "seen", app, "receipts", "other")
    assert code == 1
    assert out.startswith("receipts has not processed 'other'")
    check_one_line(run(capsys, "seen", app, "ledger", "done"), 1, "no consumer named 'ledger'")


@pytest.mark.hazard("H56")
def test_seen_without_tables_names_the_command_that_makes_them(
    database_url: URL, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(database_url)) + ":app"
    check_one_line(run(capsys, "seen", app, "receipts", "x"), 1, f"`idemq db upgrade {app}`")


# --- expected failures are one line, without a traceback and without the password -----------------------


def check_one_line(result: tuple[int, str, str], code: int, *words: str) -> None:
    assert result[0] == code
    (line,) = result[2].splitlines()
    assert line.startswith("idemq: ")
    for word in words:
        assert word in line
    assert "hush-hush" not in "".join(result[1:])


@pytest.mark.parametrize("make", [app_on, async_app_on])
@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql"])
def test_an_unreachable_database(
    driver: str, make: Callable[[URL], str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    url = URL.create(driver, "shop", "hush-hush", "127.0.0.1", port, "shop")
    app = write(make(url)) + ":app"
    result = run(capsys, "db", "check", app)
    check_one_line(result, 1, "cannot be reached", f"shop:***@127.0.0.1:{port}/shop")


@pytest.mark.parametrize("make", [app_on, async_app_on])
@pytest.mark.parametrize("database_url", ["postgres", "mariadb", "mysql"], indirect=True)
def test_a_wrong_password(
    database_url: URL, make: Callable[[URL], str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(make(database_url.set(password="hush-hush"))) + ":app"
    check_one_line(run(capsys, "db", "upgrade", app), 1, "cannot be reached", ":***@")


@pytest.mark.parametrize("make", [app_on, async_app_on])
def test_a_database_that_refuses(
    postgres_url: URL, make: Callable[[URL], str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only = postgres_url.set(query={"options": "-c default_transaction_read_only=on"})
    if make is async_app_on:
        engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            name = postgres_url.database
            connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        read_only = postgres_url
    app = write(make(read_only)) + ":app"
    check_one_line(run(capsys, "db", "upgrade", app), 1, "refused", "read-only transaction")


def test_a_sqlite_file_that_cannot_be_made(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    app = write(app_on(f"sqlite:///{tmp_path / 'no' / 'such' / 'x.db'}")) + ":app"
    check_one_line(run(capsys, "db", "check", app), 1, "cannot be reached", "unable to open")


@pytest.mark.parametrize("name", ["shop", "shop:", ":app", ""])
def test_a_name_without_module_or_attribute(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_one_line(run(capsys, "db", "check", name), 2, "write MODULE:NAME, such as shop:app")


def test_a_module_that_is_not_there(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    package = write("")
    check_one_line(run(capsys, "db", "check", "nowhere:app"), 2, "there is no module nowhere in ")
    check_one_line(
        run(capsys, "db", "check", f"{package}.shop:app"), 2, f"there is no module {package}.shop in "
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import not_installed_here\n", "No module named 'not_installed_here'"),
        ("\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def broken(\n", "SyntaxError: '(' was never closed"),
        ("from idemq import App\napp = App('nonsense')\n", "not a database URL"),
    ],
)
def test_an_error_inside_the_module_is_shown_with_its_place(
    source: str, words: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    module = write(source)
    place = f"({module}.py, line {source.count(chr(10))})"
    check_one_line(run(capsys, "db", "check", f"{module}:app"), 2, words, place)


def test_an_attribute_that_is_not_there_or_no_app(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    module = write(app_on(f"sqlite:///{tmp_path / 'x.db'}") + "number = 7\n")
    missing = run(capsys, "db", "check", f"{module}:shop")
    check_one_line(missing, 2, f"the module {module} has no 'shop'; it has {module}:app")
    check_one_line(run(capsys, "db", "check", f"{module}:number"), 2, "is of type int, not an idemq App")
    check_one_line(run(capsys, "db", "check", f"{module}:App"), 2, "is the class App, not an idemq App")


def test_the_command_runs_as_a_program(tmp_path: Path, write: Write) -> None:
    app = write(app_on(f"sqlite:///{tmp_path / 'x.db'}")) + ":app"
    program = [sys.executable, "-W", "error", "-m", "idemq", "db"]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    for arguments, code in ((["upgrade", app], 0), (["check", "x"], 2)):
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
