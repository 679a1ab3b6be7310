from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from sqlalchemy import URL, create_engine, make_url, text

from idemq.rabbitmq import RabbitMQ
from tests import core_tools, kafka_tools, servers
from tests.rabbitmq_tools import OwnServer, Proxy, Server

_missing: set[str] = set()


@pytest.fixture(scope="session")
def _running() -> Iterator[tuple[ExitStack, dict[str, str]]]:
    with ExitStack() as stack:
        yield stack, {}


def _server(name: str, running: tuple[ExitStack, dict[str, str]]) -> str:
    stack, urls = running
    if name not in urls:
        try:
            urls[name] = stack.enter_context(servers.server(name))
        except servers.Unavailable as reason:
            _is_missing(name, reason)
    return urls[name]


def _is_missing(name: str, reason: servers.Unavailable) -> NoReturn:
    _missing.add(f"{name}: {reason}")
    if servers.required() and name != "mysql":
        pytest.fail(f"{name} is required here, but: {reason}", pytrace=False)
    pytest.skip(f"needs {name}: {reason}")


@pytest.fixture
def rabbitmq_url(_running: tuple[ExitStack, dict[str, str]]) -> str:
    """A running RabbitMQ. Use queue names of your own: see `unique`."""
    return _server("rabbitmq", _running)


@pytest.fixture
def server(rabbitmq_url: str) -> Iterator[Server]:
    """Speaks plain AMQP to RabbitMQ."""
    server = Server(rabbitmq_url)
    yield server
    server.close()


@pytest.fixture
def rabbit(rabbitmq_url: str) -> RabbitMQ:
    return RabbitMQ(rabbitmq_url)


@pytest.fixture
def queue(server: Server, unique: str) -> Iterator[str]:
    """A durable classic queue of the test's own."""
    server.declare(unique)
    yield unique
    server.delete(unique)


@pytest.fixture
def proxy(rabbitmq_url: str) -> Iterator[Proxy]:
    """A way to RabbitMQ that can be cut."""
    parts = urlsplit(rabbitmq_url)
    proxy = Proxy((parts.hostname or "localhost", parts.port or 5672))
    yield proxy
    proxy.close()


@pytest.fixture
def kafka_servers(_running: tuple[ExitStack, dict[str, str]]) -> str:
    """host:port of a running Kafka. Use topic names of your own: see `unique`."""
    return _server("kafka", _running)


@pytest.fixture(scope="module")
def own_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A RabbitMQ that may be killed, or set up in another way; with TLS."""
    try:
        servers.require_engine()
    except servers.Unavailable as reason:
        _is_missing("a RabbitMQ of its own", reason)
    with OwnServer(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture(scope="module")
def own_kafka() -> Iterator[kafka_tools.Broker]:
    """A Kafka that may be killed; with short session timeouts and a port that wants a password."""
    try:
        servers.require_engine()
    except servers.Unavailable as reason:
        _is_missing("a Kafka of its own", reason)
    with kafka_tools.own_broker() as broker:
        yield broker


@pytest.fixture
def redis_url(_running: tuple[ExitStack, dict[str, str]]) -> str:
    """A running Redis. Use key names of your own: see `unique`."""
    return _server("redis", _running)


@pytest.fixture
def unique() -> str:
    """A name that no other test uses, for queues, topics and groups."""
    return f"t{uuid.uuid4().hex[:12]}"


#: Parameters for `database_url`: server and SQLAlchemy driver.
DATABASES = ["sqlite", "postgres", "mariadb", "mysql"]


@contextmanager
def _database(kind: str, running: tuple[ExitStack, dict[str, str]], directory: Path) -> Iterator[URL]:
    """An empty database of its own, as the URL of its sync driver."""
    if kind == "sqlite":
        yield make_url(f"sqlite:///{directory / 'test.db'}")
        return
    admin = make_url(_server(kind, running))
    name = f"t{uuid.uuid4().hex[:12]}"
    engine = create_engine(admin, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield admin.set(database=name)
    with engine.connect() as connection:
        force = " WITH (FORCE)" if kind == "postgres" else ""
        connection.execute(text(f"DROP DATABASE {name}{force}"))
    engine.dispose()


@pytest.fixture(params=DATABASES)
def database_url(
    request: pytest.FixtureRequest, _running: tuple[ExitStack, dict[str, str]], tmp_path: Path
) -> Iterator[URL]:
    """An empty database of its own on each kind of server, as the URL of its sync driver.

    Indirect parametrization chooses one kind: `@pytest.mark.parametrize("database_url", ["postgres"],
    indirect=True)`.
    """
    with _database(request.param, _running, tmp_path) as url:
        yield url


@pytest.fixture
def postgres_url(_running: tuple[ExitStack, dict[str, str]], tmp_path: Path) -> Iterator[URL]:
    """An empty PostgreSQL database of its own."""
    with _database("postgres", _running, tmp_path) as url:
        yield url


@pytest.fixture(scope="session")
def _shared(
    _running: tuple[ExitStack, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], URL]]:
    """One database of each kind for the whole session, because making one takes seconds."""
    urls: dict[str, URL] = {}
    with ExitStack() as stack:

        def shared(kind: str) -> URL:
            if kind not in urls:
                urls[kind] = stack.enter_context(_database(kind, _running, tmp_path_factory.mktemp("shared")))
            return urls[kind]

        yield shared


@pytest.fixture
def shop(
    request: pytest.FixtureRequest,
    _running: tuple[ExitStack, dict[str, str]],
    _shared: Callable[[str], URL],
    tmp_path: Path,
) -> Iterator[core_tools.Shop]:
    """idemq's tables, empty, and a driver: see `core_tools.on`."""
    kind, driver, own = request.param
    with ExitStack() as stack:
        shares = kind != "sqlite" and not own
        url = _shared(kind) if shares else stack.enter_context(_database(kind, _running, tmp_path))
        yield stack.enter_context(core_tools.open_shop(url, driver))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # one of several processes: what it missed is told at the end by the first
        output["missing"] = sorted(_missing)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _missing.update(getattr(node, "workeroutput", {}).get("missing", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _missing and not servers.required():
        terminalreporter.write_line("skipped tests that need a server: " + "; ".join(sorted(_missing)))
