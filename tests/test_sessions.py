from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idemq import App, Message
from idemq.errors import SetupError
from tests.core_tools import NOWHERE, PROCESSED, Shop, effects, message, on


class Mine(Session):
    def add_mark(self, mark: str) -> None:
        self.execute(insert(effects).values(mark=mark))


class MineAsync(AsyncSession):
    sync_session_class = Mine


@pytest.mark.hazard("H4")
@on(("sqlite", "pysqlite"), ("postgres", "psycopg"))
def test_the_users_sessionmaker_gives_class_and_options_but_not_its_engine(
    shop: Shop, tmp_path: Path
) -> None:
    elsewhere = create_engine(f"sqlite:///{tmp_path / 'elsewhere.db'}")
    maker: Any = sessionmaker(
        elsewhere, class_=Mine, expire_on_commit=False, info={"tenant": 1}, binds={effects: elsewhere}
    )
    engine = shop.new_engine()
    app = App(engine, session=maker)

    @app.consumer("shop", NOWHERE)
    def handler(given: Message, session: Mine) -> None:
        assert session.info == {"tenant": 1}
        assert not session.expire_on_commit
        session.add_mark("mine")

    attempts = shop.attempts(consumer=app.consumers["shop"].consumer, engine=engine)
    assert attempts(message()) == PROCESSED
    assert shop.effects() == ["mine"]
    elsewhere.dispose()


@pytest.mark.parametrize("old_style", [False, True], ids=["async_sessionmaker", "sessionmaker"])
@on(("sqlite", "aiosqlite"), ("postgres", "asyncpg"))
def test_the_users_async_sessionmaker_too(shop: Shop, old_style: bool) -> None:
    maker: Any = async_sessionmaker(class_=MineAsync, expire_on_commit=False)
    if old_style:
        maker = sessionmaker(class_=MineAsync, expire_on_commit=False)
    engine = shop.new_engine()
    app = App(engine, session=maker)

    @app.consumer("shop", NOWHERE)
    async def handler(given: Message, session: MineAsync) -> None:
        assert not session.sync_session.expire_on_commit
        assert isinstance(session.sync_session, Mine)
        await session.run_sync(lambda sync: sync.add_mark("mine"))  # type: ignore[attr-defined]  # it is Mine

    attempts = shop.attempts(consumer=app.consumers["shop"].consumer, engine=engine)
    assert attempts(message()) == PROCESSED
    assert shop.effects() == ["mine"]


def test_an_async_session_over_an_unsafe_one_is_refused() -> None:
    class Routed(Session):
        def get_bind(self, *arguments: Any, **options: Any) -> Any:
            return super().get_bind(*arguments, **options)

    with pytest.raises(SetupError, match="Routed overrides get_bind"):
        App("sqlite:///unused.db", session=async_sessionmaker(sync_session_class=Routed))
