"""Kills the relay at each step of the outbox, again and again, and judges what a consumer has received."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, create_engine, func, select, text

from idemq import migrate, schema
from prove.brokers import Broker

#: Before the publish; at some moment of it; when RabbitMQ's first confirm is about to be heard (elsewhere as
#: "publishing"); when all are confirmed; when they are deleted.
STEPS = ("picked", "publishing", "unheard", "confirmed", "deleted")

#: Seconds without any progress until a run is given up.
PATIENCE = 90.0

ROOT = Path(__file__).parent.parent
TABLE = schema.table("idemq_outgoing")


@dataclass(frozen=True, slots=True)
class Relayed:
    """What a run of so many kills has led to."""

    kills: int
    messages: int
    #: Planned messages without an effect, and those with more than one.
    lost: int
    double: int
    #: Messages that were gone at the death of a relay, or at the end, without a confirm of the broker.
    unconfirmed: int

    @property
    def right(self) -> bool:
        return not self.lost and not self.double and not self.unconfirmed


class RelayLoop:
    """One run, in a directory and an empty database of its own."""

    def __init__(
        self, kills: int, broker: Broker, name: str, database: URL, directory: Path, control: str = ""
    ) -> None:
        self._kills, self._broker, self._name, self._directory = kills, broker, name, directory
        self._engine = create_engine(database)
        given = {
            "DIRECTORY": str(directory),
            "DATABASE": database.render_as_string(hide_password=False),
            "BROKER": broker.url,
            "NAME": name,
            "CONTROL": control,
        }
        self._environment = os.environ | {f"PROVE_{key}": value for key, value in given.items()}
        self._unconfirmed: set[str] = set()

    def run(self, show: Callable[[int], None] = lambda kills: None) -> Relayed:
        """Raises `RuntimeError` when nothing moves any more."""
        with self._engine.begin() as connection:
            migrate.upgrade(connection)
            connection.execute(text("CREATE TABLE effects (id VARCHAR(36) NOT NULL)"))
        for file in ("planned", "confirmed"):
            (self._directory / file).touch()
        self._broker.create(self._name, single=False)
        try:
            counting = self._start("counted")
            try:
                for number in range(self._kills):
                    self._kill(STEPS[number % len(STEPS)])
                    show(number + 1)
                self._drain()
            finally:
                _stop(counting)
            return self._judge()
        finally:
            self._broker.remove(self._name)
            self._engine.dispose()

    def _start(self, only: str, step: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "idemq", "run", "prove.planned:app", "--child", "--only", only]
        with (self._directory / "workers.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment | {"PROVE_STEP": step},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def _kill(self, step: str) -> None:
        """A relay plans messages and dies at this step."""
        relay = self._start("relay", step)
        try:
            if (code := relay.wait(PATIENCE)) != -signal.SIGKILL:
                raise RuntimeError(f"a relay has ended ({code}): see {self._directory}/workers.log")
        finally:
            _stop(relay)
        self._unconfirmed |= self._gone()

    def _gone(self) -> set[str]:
        """What was planned, and is neither waiting nor confirmed."""
        with self._engine.connect() as connection:
            waiting = connection.execute(select(TABLE.c.body)).scalars().all()
        return self._ids("planned") - {body.decode() for body in waiting} - self._ids("confirmed")

    def _ids(self, file: str) -> set[str]:
        return set((self._directory / file).read_text().split())

    def _drain(self) -> None:
        """A relay that is not killed sends the rest, and the consumer takes all of it."""
        relay = self._start("relay")
        last, changed = (-1, -1, -1), time.monotonic()
        try:
            while (state := self._left())[0] or state[1]:
                if state != last:
                    last, changed = state, time.monotonic()
                if time.monotonic() - changed > PATIENCE:
                    raise RuntimeError(f"nothing moves: see {self._directory}/workers.log")
                time.sleep(0.05)
        finally:
            _stop(relay)
        self._unconfirmed |= self._gone()

    def _left(self) -> tuple[int, int, int]:
        """In the outbox; at the broker, asked after it because that is their way; effects."""
        with self._engine.connect() as connection:
            waiting = connection.execute(select(func.count()).select_from(TABLE)).scalar_one()
        left = self._broker.left(self._name)
        with self._engine.connect() as connection:
            effects = connection.execute(text("SELECT count(*) FROM effects")).scalar_one()
        return waiting, left, effects

    def _judge(self) -> Relayed:
        with self._engine.connect() as connection:
            effects = Counter(connection.execute(text("SELECT id FROM effects")).scalars())
        planned = self._ids("planned")
        return Relayed(
            kills=self._kills,
            messages=len(planned),
            lost=sum(not effects[each] for each in planned),
            double=sum(count > 1 for count in effects.values()),
            unconfirmed=len(self._unconfirmed),
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait(60)
    if process.stdin is not None:
        process.stdin.close()
