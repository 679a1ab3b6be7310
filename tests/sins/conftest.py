from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url, text

from tests.conftest import _server
from tests.sins.play import Stage, build

#: driver -> (server, SQLAlchemy's name for the driver, an async one).
DRIVERS = {
    "psycopg": ("postgres", "postgresql+psycopg", False),
    "psycopg-async": ("postgres", "postgresql+psycopg", True),
    "asyncpg": ("postgres", "postgresql+asyncpg", True),
    "pymysql": ("mariadb", "mysql+pymysql", False),
    "asyncmy": ("mariadb", "mysql+asyncmy", True),
    "sqlite": ("sqlite", "sqlite+pysqlite", False),
    "aiosqlite": ("sqlite", "sqlite+aiosqlite", True),
}
#: driver -> kind of database.
_KIND_OF = {"postgres": "postgresql", "mariadb": "mariadb", "sqlite": "sqlite"}
KINDS = {driver: _KIND_OF[server] for driver, (server, _, _) in DRIVERS.items()}


@pytest.fixture(scope="session")
def stages(
    _running: tuple[ExitStack, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, bool], Stage]]:
    """Makes the stage for a driver, with or without the strict trigger; one database for all tests."""
    databases: dict[tuple[str, bool], tuple[URL, int, str]] = {}
    with ExitStack() as stack:

        def stage(driver: str, trigger: bool) -> Stage:
            server, name, asynchronous = DRIVERS[driver]
            if (server, trigger) not in databases:
                url = _database(server, _running, tmp_path_factory.mktemp("sins"), stack)
                databases[server, trigger] = (url, *build(url, trigger=trigger))
            plain, number, kind = databases[server, trigger]
            return Stage(plain, plain.set(drivername=name), asynchronous, trigger, number, kind)

        yield stage


def _database(
    server: str, running: tuple[ExitStack, dict[str, str]], directory: Path, stack: ExitStack
) -> URL:
    if server == "sqlite":
        return make_url(f"sqlite:///{directory / 'sins.db'}")
    admin = make_url(_server(server, running))
    name = f"t{uuid.uuid4().hex[:12]}"

    def execute(statement: str) -> None:
        engine = create_engine(admin, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    execute(f"CREATE DATABASE {name}")
    stack.callback(execute, f"DROP DATABASE {name}{' WITH (FORCE)' if server == 'postgres' else ''}")
    return admin.set(database=name)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that are forked from one which has everything imported, and nothing opened."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sins.play"])
    return context
