"""Runs suspects, one at a time and alone in its process: what ends the process is then known.

`idemq run` starts this process when suspects are due, and it leaves when there were none for a while. Only
here is a crash counted; the workers, and the messages that were beside a suspect, go on meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.attempts import AsyncUnit, SyncUnit
from idemq.bridge import EventLoop
from idemq.failures import RELEASED, Job, Outcome
from idemq.lanes import Feed
from idemq.message import Release, Verdict
from idemq.overtime import OVERTIME
from idemq.packing import shown
from idemq.parking import Found
from idemq.retry import pause

log = logging.getLogger("idemq.worker")

#: Leave after so many seconds without a suspect.
IDLE = 5.0

#: Look for suspects so often, in seconds.
LOOK_EVERY = 0.5

#: The longest rest between two tries of a suspect while the database is away, in seconds.
MAX_REST = 5.0


class _Cell(NamedTuple):
    feed: Feed
    unit: SyncUnit | AsyncUnit


class Quarantine:
    """The suspects of some consumers, run until there are none or `stop` is set."""

    def __init__(
        self, feeds: Sequence[tuple[Feed, Engine | AsyncEngine]], owner: bytes, stop: threading.Event
    ) -> None:
        self._stop = stop
        self._owner = owner
        self._loop = EventLoop() if any(isinstance(engine, AsyncEngine) for _, engine in feeds) else None
        self._cells = [_Cell(feed, _unit(feed, engine)) for feed, engine in feeds]

    def run(self) -> None:
        """Until there were no suspects for a while; never ends in the middle of one, but for `deadline=`."""
        last = time.monotonic()
        while not self._stop.is_set() and time.monotonic() - last < IDLE:
            if any(self._one(cell) for cell in self._cells):
                last = time.monotonic()
            else:
                self._stop.wait(LOOK_EVERY)
        for cell in self._cells:
            self._close(cell)
        if self._loop is not None:
            self._loop.close()

    def _one(self, cell: _Cell) -> bool:
        """Run one suspect of this consumer, if there is one."""
        found = self._look(cell.unit)
        if isinstance(found, Release):
            log.warning("%s: suspects wait: %s", cell.feed.consumer.name, shown(found.cause))
            return False
        for job in found.jobs:
            log.info("%s: %r runs alone", cell.feed.consumer.name, shown(job.message.id or ""))
            verdict, tries = self._attempt(cell, job), 0
            while isinstance(verdict, Release) and not self._stop.is_set():
                tries += 1
                if verdict.twin:
                    job.outcome = Outcome(RELEASED, None, 5.0, verdict.cause)
                else:
                    self._rest(cell, min(pause(tries), MAX_REST))
                verdict = self._attempt(cell, job)
            log.info("%s: %r: %s", cell.feed.consumer.name, shown(job.message.id or ""), verdict)
        return bool(found.jobs)

    def _look(self, unit: SyncUnit | AsyncUnit) -> Found | Release:
        if isinstance(unit, SyncUnit):
            return unit.look(self._owner, 1, alone=True)
        assert self._loop is not None
        return self._loop.run(unit.look(self._owner, 1, alone=True))

    def _attempt(self, cell: _Cell, job: Job) -> Verdict:
        deadline = cell.feed.consumer.deadline
        watch = threading.Timer((deadline or 0.0) + OVERTIME, os._exit, (1,))  # that counts as a crash
        watch.daemon = True
        if deadline is not None:
            watch.start()
        try:
            if isinstance(cell.unit, SyncUnit):
                return cell.unit.run(job)
            assert self._loop is not None
            return self._loop.run(cell.unit.run(job))
        finally:
            watch.cancel()

    def _rest(self, cell: _Cell, seconds: float) -> None:
        """Wait; should this process end meanwhile, the suspect has not ended it."""
        for alone in (False, True):
            while not self._leased(cell, alone=alone):
                if self._stop.wait(seconds):
                    return
            if not alone and self._stop.wait(seconds):
                return

    def _leased(self, cell: _Cell, *, alone: bool | None) -> bool:
        try:
            if isinstance(cell.unit, SyncUnit):
                cell.unit.lease(self._owner, alone=alone)
            elif self._loop is not None:
                self._loop.run(cell.unit.lease(self._owner, alone=alone))
        except Exception as error:
            log.warning("%s: the database is away: %s", cell.feed.consumer.name, shown(str(error)))
            return False
        return True

    def _close(self, cell: _Cell) -> None:
        if self._leased(cell, alone=None):
            if isinstance(cell.unit, SyncUnit):
                cell.unit.close()
            elif self._loop is not None:
                self._loop.run(cell.unit.close())


def _unit(feed: Feed, engine: Engine | AsyncEngine) -> SyncUnit | AsyncUnit:
    if isinstance(engine, AsyncEngine):
        return AsyncUnit(engine, feed.consumer, feed.number, trigger=feed.trigger, apart=True)
    return SyncUnit(engine, feed.consumer, feed.number, trigger=feed.trigger)
