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

log = logging.getLogger("idemq.worker")

#: Seconds between two lines about a consumer's progress.
REPORT_EVERY = 60.0

#: Seconds that the database has for closing idle connections when the worker stops.
FAREWELL = 5.0


class Worker:
    """All consumers of one process, from start to stop."""

    def __init__(
        self, feeds: Sequence[tuple[Feed, Engine | AsyncEngine]], isolation: Isolation | None = None
    ) -> None:
        """Without `isolation`, suspects are run here, beside others that they may take with them."""
        self._feeds = feeds
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
        loop = EventLoop() if any(isinstance(engine, AsyncEngine) for _, engine in self._feeds) else None
        workers = [
            ConsumerWorker(feed, engine, self._clock, loop, self._isolation) for feed, engine in self._feeds
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
        if loop is not None and not late:
            for _, engine in self._feeds:
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
        if all(worker.stopped is not None for worker in self.consumers):
            # Started again it would stop again, after as many messages more.
            self.failure = SetupError(f"no consumer is left: {self.consumers[0].stopped}")
            self._clock.stop()
            return
        self._clock.later(1.0, self._watch)

    def _report(self) -> None:
        for worker in self.consumers:
            worker.report()
        self._clock.later(REPORT_EVERY, self._report)


async def _dispose(engine: AsyncEngine) -> None:
    """Say good-bye to the database, if it listens: some drivers wait for its answer without a limit."""
    with suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL):
            await engine.dispose()
