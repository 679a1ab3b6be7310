"""Runs cases of `prove.cases` on worker processes, and judges them by the gateway's own log."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from sqlalchemy import URL, create_engine, select, text

from idemq import Message, migrate, schema
from idemq.embedded import Embedded
from idemq.outgoing import IN_DOUBT
from prove.cases import PROVIDERS, Case, phase
from prove.gateway import FAULTS

#: Seconds without any progress until a run is given up.
PATIENCE = 90.0

ROOT = Path(__file__).parent.parent
QUEUE = "payments.settled"
TABLE = schema.table("idemq_outgoing")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: texts that left, by the gateway's log, and whether a person has to decide."""

    case: Case
    texts: int
    in_doubt: bool
    #: How many of its steps its process was killed at.
    killed: int
    #: A row that is neither gone nor for a person.
    stuck: bool

    @property
    def right(self) -> bool:
        if self.stuck or self.killed < len(self.case.steps):
            return False
        if self.case.provider == "none" and self.in_doubt:
            return self.texts <= 1
        return self.texts == 1 and not self.in_doubt


class Fire:
    """One run, in a directory and an empty database of its own."""

    def __init__(self, cases: Sequence[Case], database: URL, directory: Path, control: str = "") -> None:
        self._cases, self._directory, self._control = cases, directory, control
        self._url = database.render_as_string(hide_password=False)
        self._engine = create_engine(database)
        self.kills = 0

    def run(self) -> list[Outcome]:
        """What became of each. Raises `RuntimeError` when nothing moves any more."""
        self._prepare()
        try:
            with self._gateway():
                self._play()
            return self._judge()
        finally:
            self._engine.dispose()

    def _prepare(self) -> None:
        with self._engine.begin() as connection:
            migrate.upgrade(connection)
            connection.execute(text("CREATE TABLE receipts (payment VARCHAR(200) NOT NULL)"))
        (self._directory / "cases").write_text("".join(f"{case.payment}\n" for case in self._cases))
        (self._directory / "kills.log").touch()
        broker = Embedded(self._directory / "broker.db")
        broker.declare(QUEUE)
        copies = [*self._cases, *self._cases]
        random.Random(len(copies)).shuffle(copies)
        broker.publish_many(QUEUE, map(_settled, copies))
        broker.close()

    @contextmanager
    def _gateway(self) -> Iterator[None]:
        command = [sys.executable, "-m", "prove.gateway", str(self._directory / "gateway.log")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            (self._directory / "ports").write_text(process.stdout.readline())
            try:
                yield
            finally:
                process.kill()

    def freeze(self, step: str) -> list[Outcome]:
        """Freeze a worker at a step until another one has done all that it can; what became of each case."""
        self._prepare()
        try:
            with self._gateway(), self._worker(freeze=step) as frozen:
                self._wait(lambda: _stopped(frozen), frozen)
                with self._worker() as other:
                    self._wait(self._over, other)
                frozen.send_signal(signal.SIGCONT)
            return self._judge()
        finally:
            self._engine.dispose()

    def _play(self) -> None:
        """Start the worker again whenever it has died, until nothing is left to do."""
        while not self._over():
            with self._worker() as worker:
                self._wait(lambda: worker.poll() is not None or self._over(), worker)
            self.kills += worker.returncode == -signal.SIGKILL

    @contextmanager
    def _worker(self, freeze: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """A worker process, which is stopped in order at the end."""
        given = {"DIRECTORY": str(self._directory), "DATABASE": self._url, "CONTROL": self._control}
        given["FREEZE"] = freeze
        command = [sys.executable, "-m", "idemq", "run", "prove.texts:app", "--child"]
        environment = os.environ | {f"PROVE_{name}": value for name, value in given.items()}
        with (self._directory / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        assert worker.stdin is not None
        try:
            yield worker
            if worker.poll() is None:
                worker.terminate()
            worker.wait(60)
        finally:
            worker.kill()
            worker.wait()
            worker.stdin.close()

    def _wait(self, condition: Callable[[], bool], worker: subprocess.Popen[bytes]) -> None:
        last, changed = "", time.monotonic()
        while not condition():
            if (state := (self._directory / "gateway.log").read_text()) != last:
                last, changed = state, time.monotonic()
            if time.monotonic() - changed > PATIENCE or worker.returncode is not None:
                raise RuntimeError(f"nothing moves: see {self._directory}/worker.log, kills.log")
            time.sleep(0.05)

    def _over(self) -> bool:
        """Every kill was done, and nothing is left that moves by itself."""
        if len(self._killed()) < sum(len(case.steps) for case in self._cases):
            return False
        return not any(moves for _, moves in self._rows().values())

    def _killed(self) -> list[str]:
        return (self._directory / "kills.log").read_text().splitlines()

    def _rows(self) -> dict[str, tuple[int, bool]]:
        """Payment -> state, and whether it will be looked at again."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(TABLE.c.body, TABLE.c.state, TABLE.c.not_before)).all()
        return {json.loads(row.body)["payment"]: (row.state, row.not_before is not None) for row in rows}

    def _judge(self) -> list[Outcome]:
        lines = (self._directory / "gateway.log").read_text().splitlines()
        texts = Counter(line.removeprefix("sent ") for line in lines if line.startswith("sent "))
        killed = Counter(line.split()[0] for line in self._killed())
        rows = self._rows()
        outcomes = []
        for case in self._cases:
            state, moves = rows.get(case.payment, (0, False))
            stuck = moves or state not in (0, IN_DOUBT)
            count, steps = texts[case.payment], killed[case.payment]
            outcomes.append(Outcome(case, count, state == IN_DOUBT, steps, stuck))
        return outcomes


def _stopped(process: subprocess.Popen[bytes]) -> bool:
    return ") T " in Path(f"/proc/{process.pid}/stat").read_text()


def _settled(case: Case) -> Message:
    return Message(
        body=json.dumps({"payment": case.payment}).encode(), id=case.payment, content_type="application/json"
    )


def _place(case: Case) -> tuple[object, ...]:
    return PROVIDERS.index(case.provider), [(phase(step), step) for step in case.steps]


def table(outcomes: Sequence[Outcome], title: str) -> Table:
    """Texts that left, by the gateway's log; `?` where a person has to decide."""
    shown = Table("provider", "killed when", *FAULTS, title=title, caption="texts; ? in doubt; ! wrong")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in sorted(outcomes, key=lambda each: _place(each.case)):
        case = outcome.case
        row = cells.setdefault((case.provider, ", then ".join(case.steps)), {})
        mark = " ?" if outcome.in_doubt else ""
        row[case.fault] = f"{outcome.texts}{mark}{'' if outcome.right else ' !'}"
    for (provider, steps), row in cells.items():
        shown.add_row(provider, steps, *(row.get(fault, "") for fault in FAULTS))
    return shown
