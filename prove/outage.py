"""PostgreSQL is killed and stays away for a while, and RabbitMQ is restarted, while messages arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from pika.exceptions import AMQPError
from sqlalchemy import URL, make_url

from prove.stage import Stage
from tests import servers

#: Messages a second.
PACE = 50


class Own:
    """A container of our own that may be killed; its port stays the same."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def stop(self) -> None:
        self._container.get_wrapped_container().stop()

    def start(self) -> None:
        self._container.get_wrapped_container().start()


@contextmanager
def own_postgres() -> Iterator[tuple[Own, URL]]:
    from testcontainers.community.postgres import PostgresContainer

    servers.require_engine()
    port = servers.free_port()
    container = PostgresContainer(servers.SERVERS["postgres"][1], driver="psycopg")
    with container.with_bind_ports(5432, port) as started:
        yield Own(started), make_url(started.get_connection_url())


@contextmanager
def own_rabbitmq() -> Iterator[tuple[Own, str]]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    servers.require_engine()
    port = servers.free_port()
    ready = LogMessageWaitStrategy("Server startup complete").with_startup_timeout(90)
    container = DockerContainer(servers.SERVERS["rabbitmq"][1]).with_bind_ports(5672, port)
    with container.waiting_for(ready) as started:
        yield Own(started), f"amqp://guest:guest@{started.get_container_host_ip()}:{port}//"


class Outage(Stage):
    """`recovery` is the longest time from a server's return until messages got through again, in seconds."""

    #: Set by `__main__`, because the containers must be there before the stage.
    postgres: Own
    rabbitmq: Own

    def play(self) -> dict[str, Any]:
        recoveries: list[float] = []
        with self.publisher() as publish, self._paced(publish):
            self.staff()
            self._progress("workers begin")
            for number in range(self.plan.restarts):
                (self.rabbitmq.kill if number % 2 else self.rabbitmq.stop)()
                self.rabbitmq.start()
                recoveries.append(self._progress("consuming goes on after the broker's return"))
                time.sleep(3.0)
            self.postgres.kill()
            time.sleep(self.plan.down)
            self.postgres.start()
            recoveries.append(self._progress("consuming goes on after the database's return"))
        self.settle_down()
        log = (self.directory / "workers.log").read_text(errors="replace")
        deaths = log.count("a worker process ended")
        recovery = round(max(recoveries), 1)
        return {"red": recovery > 30 or deaths > 0, "recovery": recovery, "deaths": deaths}

    @contextmanager
    def _paced(self, publish: Callable[[int], None]) -> Iterator[None]:
        """Messages at a steady pace in a thread of their own, as long as the block lasts."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(0.1):
                publish(PACE // 10)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _progress(self, what: str) -> float:
        """Seconds from the answers of both servers to one more message that is done, or parked."""
        self.show({"waiting until": what})
        self.wait_until(lambda: self._claims() is not None and self._broker_answers(), "servers answer")
        began, before = time.monotonic(), self._claims() or 0
        self.wait_until(lambda: (self._claims() or 0) > before, what)
        return time.monotonic() - began

    def _claims(self) -> int | None:
        """None: the database does not answer."""
        try:
            return self.ask("SELECT count(*) FROM idemq_processed")[0]
        except psycopg.OperationalError:
            return None

    def _broker_answers(self) -> bool:
        try:
            self.broker.left(self.name)
        except (AMQPError, OSError):
            return False
        return True
