"""Ends the process at the steps of `prove.cases`, by wrapping what the relay calls.

Who reaches its step stands there, so that one kill hits every case of a phase exactly where it has to. What
was killed is in `kills.log`, `PAYMENT STEP` in each line, because the process does not remember it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from sqlalchemy import Connection, select

from idemq import effect_rows, outgoing, schema
from idemq.drivers import begin
from idemq.effect_calls import EffectPump
from idemq.effect_rows import EffectRows
from idemq.ledger import clock
from idemq.outgoing import EFFECT, SENDING, Row
from prove.cases import PHASES, Case, phase

TABLE = schema.table("idemq_outgoing")

#: In seconds: what a dead process was sending is in doubt after it.
LEASE = 2.0


def shorten_leases() -> None:
    """A minute would be too long to wait for."""
    outgoing.LEASE = LEASE


class Steps:
    """The steps at which this process is to be killed, and who stands at one."""

    def __init__(
        self, cases: Sequence[Case], log: Path, planned: Callable[[], bool], freeze: str = ""
    ) -> None:
        self._log, self._planned = log, planned
        #: The step at which this process freezes instead, once.
        self._freeze = freeze
        log.touch()
        killed = {tuple(line.split()) for line in log.read_text().splitlines()}
        self._next = {
            case.payment: next(
                (step for step in case.steps if (case.payment, step.replace(" ", "_")) not in killed), None
            )
            for case in cases
        }
        self._standing: dict[str, str] = {}
        self._lock = threading.Lock()
        self._current = threading.local()

    def install(self) -> None:
        """Wrap what the relay calls, and watch."""
        _wrap_calls(self, self._current)
        _wrap_rows(self)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def phase(self) -> int:
        """The first that is not over; the number of phases when all are."""
        return min((phase(step) for step in self._next.values() if step is not None), default=len(PHASES))

    def planned(self) -> bool:
        return self._planned()

    def due(self, number: int) -> dict[str, str]:
        """What is to be killed in a phase: payment -> step."""
        return {
            payment: step
            for payment, step in self._next.items()
            if step is not None and phase(step) == number
        }

    def at(self, step: str) -> None:
        """The case that this thread works on has reached a step: it stays there if it is to be killed."""
        payment = self._current.payment
        reached = (step, f"again {step}") if self._current.again else (step,)
        if self._freeze in reached:
            self._freeze = ""
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # to this thread: it stops just here
        wanted = self._next[payment]
        if wanted is None or wanted not in reached:
            return
        with self._lock:
            self._standing[payment] = wanted
        threading.Event().wait()

    def kill(self, victims: dict[str, str]) -> NoReturn:
        lines = "".join(f"{payment} {step.replace(' ', '_')}\n" for payment, step in victims.items())
        with self._log.open("a") as log:
            log.write(lines)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is dead")

    def _watch(self) -> None:
        while True:
            time.sleep(0.02)
            due = self.due(self.phase)
            with self._lock:
                if due and due.keys() <= self._standing.keys():
                    self.kill(self._standing)


def _wrap_calls(steps: Steps, current: threading.local) -> None:
    send, look_up, write = EffectPump._send, EffectPump._look_up, EffectPump._write
    Writing = Callable[[Connection], bool]

    def _send(self: EffectPump, row: Row, payload: Any, until: float) -> Writing:
        current.payment, current.last, current.again = payload.payment, "written", row.attempts > 1
        steps.at("picked")
        writing = send(self, row, payload, until)
        steps.at("answered")
        return writing

    def _look_up(self: EffectPump, row: Row, payload: Any) -> Writing:
        current.payment, current.last, current.again = payload.payment, "recorded", False
        steps.at("asking")
        writing = look_up(self, row, payload)
        steps.at("told")
        return writing

    def _write(self: EffectPump, step: Writing) -> None:
        write(self, step)
        steps.at(current.last)

    for wrapper in (_send, _look_up, _write):
        setattr(EffectPump, wrapper.__name__, wrapper)


def _wrap_rows(steps: Steps) -> None:
    pick, reap = EffectRows.pick, EffectRows.reap

    def picking(self: EffectRows, connection: Connection, count: int) -> list[tuple[Row, effect_rows.Step]]:
        if not steps.planned() or steps.phase in (2, 3):
            return []  # so that the next kill finds only what it is to find
        if steps.phase == 0:
            steps.kill(steps.due(0))
        return pick(self, connection, count)

    def reaping(self: EffectRows, connection: Connection) -> None:
        if steps.phase == 2:
            if not _sending(connection, steps.due(2), until_due=True):
                steps.kill(steps.due(2))
            return
        reap(self, connection)
        if steps.phase == 3 and not _sending(connection, steps.due(3), until_due=False):
            steps.kill(steps.due(3))

    setattr(EffectRows, "pick", picking)  # noqa: B010  # mypy knows that methods are not assigned to
    setattr(EffectRows, "reap", reaping)  # noqa: B010


def _sending(connection: Connection, payments: dict[str, str], *, until_due: bool) -> bool:
    """Whether any of them is still being sent, or, until it is due, is so for a lease."""
    with begin(connection):
        now = clock(connection)
        wanted = (TABLE.c.kind == EFFECT) & (TABLE.c.state == SENDING)
        if until_due:
            wanted &= TABLE.c.not_before > now
        found = connection.execute(select(TABLE.c.body).where(wanted)).scalars().all()
    return any(msgspec.json.decode(body)["payment"] in payments for body in found)
