"""`idemq demo`: the main job before your eyes, on the embedded broker and SQLite, in a temporary directory.

What it prints at the end is counted from the providers' log and from the shop's database.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idemq.embedded import Embedded
from idemq.errors import IdemqError
from idemq.failures import WAITING
from idemq.message import Message
from idemq.outgoing import IN_DOUBT

#: Payments, and the share of them whose message is delivered more than once.
MESSAGES, REPEATED = 1_000, 0.3
PROCESSES = 4
QUEUE = "payments.settled"
#: The payment of a customer abroad: another provider, which drops the connection.
ABROAD = "pay-0007"
#: Seconds until the demo gives up.
PATIENCE = 120.0

#: The shop as the demo runs it: it has no minute to wait until a dead worker's texts are asked for again.
HURRIED = """
from idemq import outgoing

outgoing.LEASE = 2.0

from shop import app
"""

#: Makes idemq's tables, as `idemq db upgrade` does, and the shop's.
TABLES = """
import idemq.migrate, shop

with shop.app.engine.begin() as connection:
    idemq.migrate.upgrade(connection)
    shop.Base.metadata.create_all(connection)
"""


class DemoFailed(IdemqError):
    """The demo did not come to its end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found after the run."""

    messages: int
    deliveries: int
    killed: int
    receipts: int
    texts: int
    asked_again: int
    in_doubt: int
    lost: int
    double: int


class Demo:
    """The story, step by step, in `directory`."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self._payments = [f"pay-{number:04}" for number in range(MESSAGES)]
        self._broker = Embedded(directory / "broker.db")
        self._log = directory / "workers.log"
        self._texts = directory / "gateway.log"
        self.copies = 0

    def prepare(self, port: int) -> None:
        """Write the shop, make its tables, and publish each payment at least once."""
        source = Path(__file__).with_name("shop.py").read_text()
        (self._directory / "shop.py").write_text(source.replace("{port}", str(port)))
        (self._directory / "hurried.py").write_text(HURRIED)
        self._python(TABLES)
        self._broker.declare(QUEUE)
        messages = [*self._payments, *self._random.sample(self._payments, int(MESSAGES * REPEATED))]
        self._random.shuffle(messages)
        messages.sort(key=lambda payment: payment != ABROAD)  # at first, long before the kill
        self.copies = len(messages)
        self._broker.publish_many(QUEUE, map(_settled, messages))

    @contextmanager
    def workers(self) -> Iterator[None]:
        """Four worker processes under `idemq run`, until the block ends."""
        command = [sys.executable, "-m", "idemq", "run", "hurried:app", "--log-format", "json"]
        with self._log.open("w") as log:
            parent = subprocess.Popen(
                [*command, "--processes", str(PROCESSES)], cwd=self._directory, stdout=log, stderr=log
            )
            try:
                yield
            finally:
                parent.send_signal(signal.SIGTERM)
                try:
                    parent.wait(40)
                except subprocess.TimeoutExpired:
                    parent.kill()

    def kill_one(self) -> int:
        """SIGKILL one of the workers in the middle of its work; returns its process id."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        started = [line["process"] for line in lines if line["message"].startswith("started")]
        victim: int = self._random.choice(started)
        os.kill(victim, signal.SIGKILL)
        return victim

    def progress(self) -> tuple[int, int]:
        """Receipts in the shop's table, texts in the gateway's log."""
        return len(self._receipts()), len(self._lines("sent"))

    def left(self) -> int:
        """What is not done: in the broker or, asked after it because that is their way, parked or planned."""
        return sum(self._broker.depth(QUEUE)) or self._parked() or self._planned()

    def outcome(self, killed: int) -> Outcome:
        receipts, texts = Counter(self._receipts()), Counter(self._lines("sent"))
        return Outcome(
            messages=MESSAGES,
            deliveries=self.copies,
            killed=killed,
            receipts=receipts.total(),
            texts=texts.total(),
            asked_again=len(self._lines("again")),
            in_doubt=len(self._rows("SELECT 1 FROM idemq_outgoing WHERE state = ?", IN_DOUBT)),
            lost=sum(not (receipts[each] and texts[each]) for each in self._payments),
            double=sum(receipts[each] > 1 or texts[each] > 1 for each in self._payments),
        )

    def _receipts(self) -> list[str]:
        return [row[0] for row in self._rows("SELECT payment FROM receipts")]

    def _parked(self) -> int:
        """What the killed worker had in hand is run by a process of its own."""
        return len(self._rows("SELECT 1 FROM idemq_failed WHERE state = ?", WAITING))

    def _planned(self) -> int:
        """Texts that will be sent, or asked for again, by themselves."""
        return len(self._rows("SELECT 1 FROM idemq_outgoing WHERE not_before IS NOT NULL"))

    def _rows(self, query: str, *values: int) -> list[Any]:
        with closing(sqlite3.connect(self._directory / "shop.db", timeout=30)) as connection:
            return connection.execute(query, values).fetchall()

    def _lines(self, kind: str) -> list[str]:
        lines = (line.split() for line in self._texts.read_text().splitlines())
        return [line[1] for line in lines if len(line) == 2 and line[0] == kind]

    def doubt(self) -> Iterator[tuple[str, str]]:
        """What a person does about the effect in doubt: each command, and what it prints."""
        command, printed = self._shown("doubt", "list", "shop:app")
        yield command, printed
        key = printed.splitlines()[-1].split()[0]
        assert ABROAD in self._lines("sent")
        more = ("--done", "--reason", "seen in the log of the provider", "--by", "demo", "--yes")
        yield self._shown("doubt", "resolve", "shop:app", key, *more)

    def _shown(self, *arguments: str) -> tuple[str, str]:
        return f"idemq {shlex.join(arguments)}", self._idemq(*arguments)

    def _idemq(self, *arguments: str) -> str:
        return self._python("from idemq.cli import main; main()", *arguments)

    def _python(self, code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=self._directory, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DemoFailed(done.stderr)
        return done.stdout


def _settled(payment: str) -> Message:
    body = {"payment": payment, "phone": f"{'+33 1' if payment == ABROAD else '+49 30'} {payment[4:]}"}
    return Message(body=json.dumps(body).encode(), id=payment, content_type="application/json")


@contextmanager
def gateway(log: Path) -> Iterator[int]:
    """The gateway in a process of its own; gives its port."""
    log.touch()
    command = [sys.executable, "-m", "idemq.demo.gateway", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def wait_until_done(demo: Demo, show: Callable[[int, int], None]) -> int:
    """Until nothing is left to do; kills a worker half way and returns its process id."""
    end, killed = time.monotonic() + PATIENCE, 0
    while time.monotonic() < end:
        receipts, texts = demo.progress()
        show(receipts, texts)
        if not killed and texts >= MESSAGES // 2:
            killed = demo.kill_one()
        if killed and not demo.left():
            return killed
        time.sleep(0.1)
    raise DemoFailed(f"the demo did not end within {PATIENCE:.0f} s; the workers' log is in the directory")
