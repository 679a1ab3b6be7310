"""The worker: all consumers of one process, side by side, from start to stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.bridge import Clock, EventLoop
from idemq.consuming import ConsumerWorker
from idemq.errors import SetupError
from idemq.lanes import Feed, Isolation
from idemq.relay import Leaving, Relay

log = logging.getLogger("idemq.worker")

#: Seconds between two lines about a consumer's progress.
REPORT_EVERY = 60.0

#: Seconds that the database has for closing idle connections when the worker stops.
FAREWELL = 5.0


class Worker:
    """All consumers of one process, from start to stop."""

    def __init__(
        self,
        feeds: Sequence[tuple[Feed, Engine | AsyncEngine]],
        isolation: Isolation | None = None,
        leaving: Leaving | None = None,
    ) -> None:
        """Without `isolation`, suspects are run here, beside others that they may take with them.
        `leaving`: what a relay is to send beside the consumers."""
        self._feeds, self._leaving = feeds, leaving
        self._relay: Relay | None = None
        self._isolation = isolation
        self._clock = Clock()
        self.failure: BaseException | None = None
        #: Those that run, once `run` was called.
        self.consumers: list[ConsumerWorker] = []

    def stop(self) -> None:
        """Stop in order; may be called from a signal handler or another thread."""
        self._clock.stop()

    def run(self, grace: float, started: Callable[[], None] = lambda: None) -> bool:
        """Run until `stop`, or until a consumer cannot go on (`failure`).

        True: everything that was begun is settled. False: an attempt did not end within `grace` seconds;
        the caller must end the process hard, which is safe.
        """
        engines = [engine for _, engine in self._feeds]
        asynchronous = any(isinstance(engine, AsyncEngine) for engine in engines)
        loop = None
        if asynchronous or (self._leaving is not None and self._leaving.asynchronous):
            loop = EventLoop()
        if self._leaving is not None:
            engines.append(self._leaving.engine)
            self._relay = Relay(self._leaving, loop)
        planned = self._relay.wake if self._relay is not None else _nothing
        workers = [
            ConsumerWorker(feed, engine, self._clock, loop, self._isolation, planned)
            for feed, engine in self._feeds
        ]
        self.consumers = workers
        self._clock.later(1.0, self._watch)
        self._clock.later(REPORT_EVERY, self._report)
        started()
        self._clock.run()
        log.info("stopping: finishing what was begun (at most %.0f s)", grace)
        for worker in workers:
            worker.pause()
        end = time.monotonic() + grace
        late = [worker for worker in workers if not worker.close(max(0.0, end - time.monotonic()))]
        if self._relay is not None:
            self._relay.pause()
            if not self._relay.close(max(0.0, end - time.monotonic())):
                return False
        if loop is not None and not late:
            for engine in set(engines):
                if isinstance(engine, AsyncEngine):
                    loop.run(_dispose(engine))  # its connections belong to this loop
            loop.close()
        return not late

    def _watch(self) -> None:
        for worker in self.consumers:
            self.failure = worker.trouble()
            if self.failure is not None:
                log.error("%s: cannot go on: %s", worker.name, self.failure)
                self._clock.stop()
                return
        if self.consumers and all(worker.stopped is not None for worker in self.consumers):
            # Started again it would stop again, after as many messages more.
            self.failure = SetupError(f"no consumer is left: {self.consumers[0].stopped}")
            self._clock.stop()
            return
        self._clock.later(1.0, self._watch)

    def _report(self) -> None:
        for worker in self.consumers:
            worker.report()
        if self._relay is not None:
            self._relay.report()
        self._clock.later(REPORT_EVERY, self._report)


def _nothing() -> None:
    """There is no relay to wake."""


async def _dispose(engine: AsyncEngine) -> None:
    """Say good-bye to the database, if it listens: some drivers wait for its answer without a limit."""
    with suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL):
            await engine.dispose()
