"""What every scenario stands on: a queue or topic, a database, a publisher, workers, and the judge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import URL

from idemq import migrate
from idemq.app import App
from prove.brokers import Broker

#: Seconds without any progress until a run is given up.
PATIENCE = 90.0

#: The same while messages are parked: a killed worker's are due again when their lease ends, a minute later.
PATIENCE_PARKED = 150.0

APP = "prove.shop:app"

CREATE_EFFECTS = "CREATE TABLE effects (seq bigserial NOT NULL, id uuid NOT NULL, worker int NOT NULL)"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is published, and how much is killed."""

    messages: int
    seed: int
    kills: int = 0
    workers: int = 2
    #: Seconds from the publishing of a share to the kill, at random from this range.
    after: tuple[float, float] = (0.0, 0.0)
    #: How many messages of each kind that is not simply good: see `prove.shop`.
    kinds: Mapping[str, int] = field(default_factory=dict)
    #: The share of messages that are published twice, and how many others come between: from, to.
    copies: float = 0.1
    apart: tuple[int, int] = (0, 50)
    #: Random kills must blame no innocent, so this is high where there are any.
    max_crashes: int = 20
    control: str = ""
    #: For the outage: how long the database is down, in seconds, and how often the broker is restarted.
    down: float = 0.0
    restarts: int = 0
    #: How many keys the messages have, which are to be worked on in order then; and how often a worker is
    #: frozen.
    keys: int = 0
    freezes: int = 0


class Stage(ABC):
    """One run of a plan, in a directory and a database of its own."""

    def __init__(
        self,
        plan: Plan,
        broker: Broker,
        database: URL,
        directory: Path,
        show: Callable[[Mapping[str, object]], None],
    ) -> None:
        self.plan, self.broker, self.database, self.directory = plan, broker, database, directory
        self.show = show
        self.name = f"prove-{uuid4().hex[:8]}"
        self.published = directory / "published.log"
        self.workers: list[subprocess.Popen[bytes]] = []
        #: Whether `idemq run` itself starts workers again, or the scenario does.
        self.supervised = True

    def execute(self) -> dict[str, Any]:
        """The checker's verdict, with what the scenario itself counted."""
        self._prepare()
        try:
            started = time.monotonic()
            counted = self.play()
            verdict = self._judge()
            verdict["red"] = verdict["red"] or bool(counted.pop("red", False))
            return {
                **verdict,
                "kills": 0,
                "hits": 0,
                **counted,
                "seconds": round(time.monotonic() - started, 1),
            }
        finally:
            for worker in self.workers:
                worker.kill()
            self.broker.remove(self.name)

    @abstractmethod
    def play(self) -> dict[str, Any]:
        """The scenario: everything until workers have stopped."""

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True)
        engine = App(self.database).engine
        assert engine is not None
        with engine.begin() as connection:
            migrate.upgrade(connection)
            connection.exec_driver_sql(CREATE_EFFECTS)
        engine.dispose()
        self.broker.create(self.name, single=bool(self.plan.keys))

    @contextmanager
    def publisher(self) -> Iterator[Callable[[int], None]]:
        """Publishes so many messages when it is called, and the rest at the end."""
        arguments = [self.broker.url, self.name, str(self.published), json.dumps(asdict(self.plan))]
        command = [sys.executable, "-m", "prove.publisher", *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as publishing:
            orders = publishing.stdin
            assert orders is not None
            try:
                yield lambda count: print(count, file=orders, flush=True)
                orders.close()
                if publishing.wait():
                    raise RuntimeError("the publisher failed")
            finally:
                publishing.kill()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PROVE_BROKER": self.broker.url,
            "PROVE_NAME": self.name,
            "PROVE_DATABASE": self.database.render_as_string(hide_password=False),
            "PROVE_DIRECTORY": str(self.directory),
            "PROVE_CONTROL": self.plan.control,
            "PROVE_ORDERED": "1" if self.plan.keys else "",
            "PROVE_MAX_CRASHES": str(self.plan.max_crashes),
        }

    def staff(self) -> None:
        """Start a worker for each that is missing; or `idemq run` once, which does that itself."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        command = [sys.executable, "-m", "idemq", "run", APP]
        command += ["--processes", str(self.plan.workers)] if self.supervised else ["--child"]
        with (self.directory / "workers.log").open("ab") as log:
            while len(self.workers) < (1 if self.supervised else self.plan.workers):
                worker = subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.PIPE, stdout=log, stderr=log
                )
                self.workers.append(worker)

    def suspects(self) -> list[int]:
        """The processes that workers of this run have started for suspects."""
        mine = f"PROVE_NAME={self.name}".encode()
        found = []
        for file in self.directory.glob("*.busy"):
            process = Path("/proc", file.stem)
            try:
                if b"--suspects" in (process / "cmdline").read_bytes():
                    found += [int(file.stem)] * (mine in (process / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue  # it has ended
        return found

    def settle_down(self) -> None:
        """Let living workers finish what is left, and stop them in order.

        Again where they gave something back when they stopped: copies that nobody had begun.
        """
        for _ in range(5):
            self._wait_for_the_end()
            for worker in self.workers:
                worker.send_signal(signal.SIGTERM)
            for worker in self.workers:
                worker.wait(90)
            self.wait_until(lambda: not self.suspects(), "the processes for suspects leave")
            if self.broker.left(self.name) == 0:
                return

    def _wait_for_the_end(self) -> None:
        last, changed = (-1, -1, -1, -1), time.monotonic()
        while True:
            self.staff()
            counts = self.broker.left(self.name), *self.unfinished()
            held, missing, parked, _ = counts
            if not held + missing + parked:
                return
            if counts != last:
                last, changed = counts, time.monotonic()
            patience = PATIENCE_PARKED if parked else PATIENCE if held else PATIENCE / 6
            if time.monotonic() - changed > patience:
                return  # the checker says what is missing
            self.show({"left": held, "missing": missing, "parked": parked})
            time.sleep(0.5)

    def unfinished(self) -> tuple[int, int, int]:
        """Published ids that have not come to an end, how many wait in a row, and the tries of those."""
        published = {line.split()[0] for line in self.published.read_text().splitlines()}
        query = (
            "SELECT (SELECT count(*) FROM (SELECT id FROM effects UNION "
            "SELECT identity FROM idemq_failed WHERE state = 2) AS ended), "
            "count(*), coalesce(sum(attempts + starts + crashes), 0) FROM idemq_failed WHERE state = 1"
        )
        ended, parked, tries = self.ask(query)
        return len(published) - ended, parked, tries

    def effects(self) -> int:
        return self.ask("SELECT count(*) FROM effects")[0]

    def dead(self) -> int:
        return self.ask("SELECT count(*) FROM idemq_failed WHERE state = 2")[0]

    def ask(self, query: str) -> tuple[int, ...]:
        with psycopg.connect(self._plain_url) as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return tuple(row)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> float:
        """How long it took; raises when it took too long."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise RuntimeError(f"not within {seconds:.0f} s: {what}; see {self.directory}/workers.log")
            time.sleep(0.05)
        return time.monotonic() - began

    @property
    def _plain_url(self) -> str:
        return self.database.set(drivername="postgresql").render_as_string(hide_password=False)

    def _judge(self) -> dict[str, Any]:
        left = self.broker.left(self.name)
        command = [sys.executable, "-m", "prove.checker", str(self.published), self._plain_url]
        judged = subprocess.run(
            [*command, "--left", str(left)], stdout=subprocess.PIPE, text=True, check=False
        )
        if judged.returncode not in (0, 1) or not judged.stdout:
            raise RuntimeError("the checker failed")
        return {"red": judged.returncode == 1, "left": left, **json.loads(judged.stdout)}
