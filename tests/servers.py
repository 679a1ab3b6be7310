"""Real servers for the tests: given by an environment variable, else a container for the test session.

The images are the public ones unless `IDEMQ_IMAGE_POSTGRES` and its siblings name others (CI builds its own).
"""

from __future__ import annotations

import gc
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache

#: Server name -> (variable with a URL of a running one, image).
SERVERS = {
    "postgres": ("IDEMQ_POSTGRES_URL", os.environ.get("IDEMQ_IMAGE_POSTGRES", "postgres:17")),
    "mariadb": ("IDEMQ_MARIADB_URL", os.environ.get("IDEMQ_IMAGE_MARIADB", "mariadb:11")),
    "redis": ("IDEMQ_REDIS_URL", os.environ.get("IDEMQ_IMAGE_REDIS", "redis:7")),
    "mysql": ("IDEMQ_MYSQL_URL", ""),
    "rabbitmq": ("IDEMQ_RABBITMQ_URL", os.environ.get("IDEMQ_IMAGE_RABBITMQ", "rabbitmq:4-management")),
    "kafka": ("IDEMQ_KAFKA_SERVERS", os.environ.get("IDEMQ_IMAGE_KAFKA", "apache/kafka:4.1.1")),
}


class Unavailable(Exception):
    """No such server here: the tests that need it are skipped, or fail when servers are required."""


def required() -> bool:
    return os.environ.get("IDEMQ_REQUIRE_SERVERS") == "1"


@contextmanager
def server(name: str) -> Iterator[str]:
    """The URL (Kafka: host:port) of a running server; a container that we start is removed afterwards."""
    variable, image = SERVERS[name]
    if url := os.environ.get(variable):
        yield url
        return
    if name == "mysql":
        raise Unavailable(f"{variable} is not set")
    require_engine()
    with _STARTERS[name](image) as url:
        yield url


def require_engine() -> None:
    """Raise `Unavailable` where no container can be started."""
    if missing := _no_engine():
        raise Unavailable(missing)


@lru_cache
def _no_engine() -> str:
    """Why no container can be started; empty where one can. Asked once."""
    reason = _refusal()
    with warnings.catch_warnings():
        # A client that found no engine leaves its socket open: collected here, not as an error of some test.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return reason


def _refusal() -> str:
    try:
        import docker

        with closing(docker.from_env()) as client:
            client.ping()
    except Exception as error:
        return f"no Docker engine ({error.__class__.__name__})"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _postgres(image: str) -> Iterator[str]:
    from testcontainers.community.postgres import PostgresContainer

    container = PostgresContainer(image, driver="psycopg").with_command("postgres -c max_connections=400")
    with container as started:
        yield started.get_connection_url()


@contextmanager
def _mariadb(image: str) -> Iterator[str]:
    from testcontainers.community.mysql import MySqlContainer

    container = MySqlContainer(
        image, dialect="pymysql", username="root", root_password="test", password="test", dbname="test"
    ).with_command("mariadbd --max-connections=400")
    with container as started:
        yield started.get_connection_url()


@contextmanager
def _rabbitmq(image: str) -> Iterator[str]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    ready = LogMessageWaitStrategy("Server startup complete").with_startup_timeout(90)
    with DockerContainer(image).with_exposed_ports(5672).waiting_for(ready) as started:
        yield f"amqp://guest:guest@{started.get_container_host_ip()}:{started.get_exposed_port(5672)}//"


@contextmanager
def _kafka(image: str) -> Iterator[str]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    port = free_port()
    container = (
        DockerContainer(image)
        .with_bind_ports(9092, port)
        .with_env(
            "KAFKA_LISTENERS", "PLAINTEXT://0.0.0.0:9092,INTERNAL://0.0.0.0:9094,CONTROLLER://0.0.0.0:9093"
        )
        # The broker reaches itself, for transactions, by the second: the host's port is closed inside.
        .with_env("KAFKA_ADVERTISED_LISTENERS", f"PLAINTEXT://localhost:{port},INTERNAL://localhost:9094")
        .with_env("KAFKA_INTER_BROKER_LISTENER_NAME", "INTERNAL")
        .with_env("KAFKA_PROCESS_ROLES", "broker,controller")
        .with_env("KAFKA_NODE_ID", "1")
        .with_env("KAFKA_CONTROLLER_QUORUM_VOTERS", "1@localhost:9093")
        .with_env("KAFKA_CONTROLLER_LISTENER_NAMES", "CONTROLLER")
        .with_env(
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP",
            "CONTROLLER:PLAINTEXT,INTERNAL:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        )
        .with_env("KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1")
        .with_env("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0")
        .waiting_for(LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(90))
    )
    with container:
        yield f"localhost:{port}"


@contextmanager
def _redis(image: str) -> Iterator[str]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    ready = LogMessageWaitStrategy("Ready to accept connections").with_startup_timeout(90)
    with DockerContainer(image).with_exposed_ports(6379).waiting_for(ready) as started:
        yield f"redis://{started.get_container_host_ip()}:{started.get_exposed_port(6379)}/0"


_STARTERS = {
    "postgres": _postgres,
    "mariadb": _mariadb,
    "rabbitmq": _rabbitmq,
    "kafka": _kafka,
    "redis": _redis,
}


PATIENCE = 90.0  # seconds; far more than any wait needs, since no test may depend on speed


def eventually(condition: Callable[[], object], what: str = "", seconds: float = PATIENCE) -> None:
    """Wait until `condition` is true, for things outside this process that send no event; else fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.02)
