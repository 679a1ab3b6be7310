"""One kill loop: publish, run workers, kill them at random, let the rest drain, and have it judged."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Plan:
    messages: int
    kills: int
    workers: int
    #: Seconds from the publishing of a share to the kill, at random from this range.
    after: tuple[float, float]
    seed: int
    control: str = ""


@dataclass(slots=True)
class Run:
    """One run of a plan, in a directory and a database of its own."""

    plan: Plan
    broker: Broker
    database: URL
    directory: Path
    show: Callable[[dict[str, int]], None]
    name: str = field(default_factory=lambda: f"prove-{uuid4().hex[:8]}")
    kills: int = 0
    hits: int = 0
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def execute(self) -> dict[str, Any]:
        """The checker's verdict, with the kills and how many of them hit a running handler."""
        self._prepare()
        try:
            started = time.monotonic()
            with self._publisher() as publishing:
                orders = publishing.stdin
                assert orders is not None
                self._kill_many(lambda count: print(count, file=orders, flush=True))
                orders.close()
                if publishing.wait():
                    raise RuntimeError("the publisher failed")
            self._drain()
            verdict = self._judge()
            seconds = round(time.monotonic() - started, 1)
            return {**verdict, "kills": self.kills, "hits": self.hits, "seconds": seconds}
        finally:
            for worker in self.workers:
                worker.kill()
            self.broker.remove(self.name)

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True)
        engine = App(self.database).engine
        assert engine is not None
        with engine.begin() as connection:
            migrate.upgrade(connection)
            connection.exec_driver_sql("CREATE TABLE effects (id uuid NOT NULL, worker int NOT NULL)")
        engine.dispose()
        self.broker.create(self.name)

    @contextmanager
    def _publisher(self) -> Iterator[subprocess.Popen[str]]:
        arguments = [self.broker.url, self.name, str(self._published), str(self.plan.messages)]
        command = [sys.executable, "-m", "prove.publisher", *arguments, str(self.plan.seed)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as publishing:
            try:
                yield publishing
            finally:
                publishing.kill()

    @property
    def _published(self) -> Path:
        return self.directory / "published.log"

    def _kill_many(self, publish: Callable[[int], None]) -> None:
        """Publish a share before each kill, and kill only workers that have begun to work on something."""
        chosen = random.Random(self.plan.seed)
        share = self.plan.messages // self.plan.kills
        while self.kills < self.plan.kills:
            publish(share * (self.plan.workers if self.broker.kills_all else 1))
            at_work = self._at_work()
            time.sleep(chosen.uniform(*self.plan.after))
            for victim in self.workers if self.broker.kills_all else [chosen.choice(at_work)]:
                self._kill(victim)
            self.broker.evict(self.name)
            self.show({"kills": self.kills, "hits": self.hits})

    def _at_work(self) -> list[subprocess.Popen[bytes]]:
        """The workers that have called a handler; waits for the first one."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self._staff()
            files = {worker: self._busy(worker) for worker in self.workers}
            if at_work := [worker for worker, file in files.items() if file.exists() and file.stat().st_size]:
                return at_work
            time.sleep(0.02)
        raise RuntimeError(f"no worker did anything for {PATIENCE:.0f} s; see {self.directory}/workers.log")

    def _busy(self, worker: subprocess.Popen[bytes]) -> Path:
        return self.directory / f"{worker.pid}.busy"

    def _staff(self) -> None:
        """Start a worker for each that is missing."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        environment = {
            **os.environ,
            "PROVE_BROKER": self.broker.url,
            "PROVE_NAME": self.name,
            "PROVE_DATABASE": self.database.render_as_string(hide_password=False),
            "PROVE_DIRECTORY": str(self.directory),
            "PROVE_CONTROL": self.plan.control,
        }
        command = [sys.executable, "-m", "idemq", "run", "prove.shop:app", "--child"]
        with (self.directory / "workers.log").open("ab") as log:
            while len(self.workers) < self.plan.workers:
                worker = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
                )
                self.workers.append(worker)

    def _kill(self, victim: subprocess.Popen[bytes]) -> None:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        self.kills += 1
        busy = self._busy(victim)
        if busy.exists():
            self.hits += b"1" in busy.read_bytes()
            busy.unlink()

    def _drain(self) -> None:
        """Let living workers finish what is left, and stop them in order.

        Again where they gave something back when they stopped: copies that nobody had begun.
        """
        for _ in range(5):
            self._settle_down()
            for worker in self.workers:
                worker.send_signal(signal.SIGTERM)
            for worker in self.workers:
                worker.wait(60)
            if self.broker.left(self.name) == 0:
                return

    def _settle_down(self) -> None:
        last, changed = -1, time.monotonic()
        while True:
            self._staff()
            held, missing = self.broker.left(self.name), self._unprocessed()
            if held + missing == 0:
                return
            if held + missing != last:
                last, changed = held + missing, time.monotonic()
            if time.monotonic() - changed > (PATIENCE if held else PATIENCE / 6):
                return  # the checker says what is missing
            self.show({"kills": self.kills, "hits": self.hits, "left": held, "missing": missing})
            time.sleep(0.5)

    def _unprocessed(self) -> int:
        """Published ids without an effect: what lost ones leave, the patience ends."""
        published = set(self._published.read_text().split())
        with psycopg.connect(self._plain_url) as connection:
            row = connection.execute("SELECT count(DISTINCT id) FROM effects").fetchone()
        assert row is not None
        return len(published) - int(row[0])

    @property
    def _plain_url(self) -> str:
        return self.database.set(drivername="postgresql").render_as_string(hide_password=False)

    def _judge(self) -> dict[str, Any]:
        left = self.broker.left(self.name)
        command = [sys.executable, "-m", "prove.checker", str(self._published), self._plain_url]
        judged = subprocess.run(
            [*command, "--left", str(left)], stdout=subprocess.PIPE, text=True, check=False
        )
        if judged.returncode not in (0, 1) or not judged.stdout:
            raise RuntimeError("the checker failed")
        return {"red": judged.returncode == 1, "left": left, **json.loads(judged.stdout)}
