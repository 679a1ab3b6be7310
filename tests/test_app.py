from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, StaticPool, create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idemq import App, Message
from idemq.errors import SetupError
from tests.core_tools import NOWHERE


def handler(message: Message) -> None: ...


async def async_handler(message: Message) -> None: ...


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(f"sqlite:///{tmp_path / 'app.db'}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concurency": 2}, ["'shop'", "'concurency'", "did you mean 'concurrency'?"]),
        ({"prefetch": 0}, ["'shop'", "prefetch=0", "1 to 1000"]),
        ({"prefetch": 1001}, ["prefetch=1001"]),
        ({"concurrency": 0}, ["concurrency=0"]),
        ({"wait": 0}, ["wait=0"]),
        ({"wait": float("nan")}, ["wait=nan"]),
        ({"fingerprint": "body"}, ["fingerprint="]),
        ({"id": ""}, ["id="]),
        ({"id": []}, ["id="]),
    ],
)
@pytest.mark.hazard("H60")
def test_a_wrong_option_is_named_with_its_consumer(
    app: App, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(SetupError) as caught:
        app.consumer("shop", NOWHERE, **options)(handler)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.hazard("H1")
def test_two_consumers_may_not_share_a_name(app: App) -> None:
    app.consumer("shop", NOWHERE)(handler)
    with pytest.raises(SetupError, match="'shop' is declared twice"):
        app.consumer("shop", NOWHERE)(handler)


def test_the_decorated_function_is_given_back(app: App) -> None:
    assert app.consumer("shop", NOWHERE)(handler) is handler


@pytest.mark.hazard("H4")
@pytest.mark.parametrize(
    "options",
    [{"isolation_level": "AUTOCOMMIT"}, {"execution_options": {"isolation_level": "AUTOCOMMIT"}}],
    ids=["isolation_level", "execution_options"],
)
def test_an_autocommit_engine_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    url = f"sqlite:///{tmp_path / 'app.db'}"
    for engine in (
        create_engine(url, **options),
        create_async_engine("sqlite+aiosqlite" + url[6:], **options),
    ):
        with pytest.raises(SetupError, match="AUTOCOMMIT"):
            App(engine)


@pytest.mark.hazard("H40")
def test_a_memory_database_is_refused(tmp_path: Path) -> None:
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true&cache=shared"):
        with pytest.raises(SetupError, match="SQLite file"):
            App(create_engine(url))
        with pytest.raises(SetupError, match="SQLite file"):
            App(url).consumer("shop", NOWHERE)(handler)
    with pytest.raises(SetupError, match="SQLite file"):
        App(create_engine(f"sqlite:///{tmp_path / 'app.db'}", poolclass=StaticPool))


def test_a_handler_needs_an_engine_of_its_kind(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'app.db'}"
    with pytest.raises(SetupError, match=r"'shop'.*no async engine.*App\(engine, async_engine\)"):
        App(create_engine(url)).consumer("shop", NOWHERE)(async_handler)
    with pytest.raises(SetupError, match=r"'shop'.*no sync engine"):
        App(create_async_engine("sqlite+aiosqlite" + url[6:])).consumer("shop", NOWHERE)(handler)
    with pytest.raises(SetupError, match="create_async_engine"):
        App(create_engine("sqlite+aiosqlite" + url[6:]))


def test_a_missing_driver_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("psycopg", "asyncpg", "aiosqlite") else there(name),
    )
    with pytest.raises(SetupError) as caught:
        App("postgresql+psycopg://shop:hunter2@localhost/shop")
    assert 'pip install "idemq[postgresql]"' in str(caught.value)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SetupError, match=r"aiosqlite.*idemq\[sqlite\]"):
        App(f"sqlite:///{tmp_path / 'app.db'}").consumer("shop", NOWHERE)(async_handler)


@pytest.mark.hazard("S7")
@pytest.mark.parametrize(
    "url", ["oracle://me:hunter2@h/d", "nonsense hunter2", "postgresql+pg8000://me:hunter2@h/d"]
)
def test_a_url_that_is_refused_is_not_repeated(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        App(url)
    assert "hunter2" not in f"{caught.value!r} {caught.value} {caught.value.__cause__}"


@pytest.mark.hazard("S5")
@pytest.mark.parametrize("schema", ['x"; drop table idemq_processed', "1x", "", "a b", "x" * 64, "é", "x\n"])
def test_a_schema_is_a_plain_identifier_or_refused(schema: str) -> None:
    with pytest.raises(SetupError, match="schema="):
        App("sqlite:///unused.db", schema=schema)


def test_a_session_class_that_could_leave_the_transaction_is_refused() -> None:
    class Routed(Session):
        def get_bind(self, *arguments: Any, **options: Any) -> Any:
            return super().get_bind(*arguments, **options)

    with pytest.raises(SetupError, match=r"Routed overrides get_bind"):
        App("sqlite:///unused.db", session=sessionmaker(class_=Routed))
    with pytest.raises(SetupError, match="twophase"):
        App("sqlite:///unused.db", session=sessionmaker(twophase=True))


def test_a_session_class_that_the_app_does_not_make_is_refused(app: App) -> None:
    class Mine(Session): ...

    def wants_mine(session: Mine) -> None: ...

    wants_mine.__annotations__["session"] = Mine
    with pytest.raises(SetupError, match=r"'shop'.*Mine"):
        app.consumer("shop", NOWHERE)(wants_mine)
    made = App("sqlite:///unused.db", session=sessionmaker(class_=Mine))
    made.consumer("shop", NOWHERE)(wants_mine)


def test_urls_take_drivers_of_both_kinds() -> None:
    app = App(make_url("postgresql+asyncpg://localhost/shop"))
    assert app.engine is not None
    assert app.async_engine is not None
    assert (app.engine.dialect.driver, app.async_engine.dialect.driver) == ("psycopg", "asyncpg")
    assert isinstance(app.engine.url, URL)
