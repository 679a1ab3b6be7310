"""The two sides as consumers that stay connected, each with a queue or topic and tables of its own.

idemq is an App as a user declares it, checked and run as `idemq run` does it, with the default options, which
have the guard; here in a thread of this process, as the hand-written loop is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.brokers import Fill
from benchmarks.work import Pace, Work
from idemq import App
from idemq.broker import Source
from idemq.cli.run import prepare
from idemq.worker import Worker


@dataclass(slots=True)
class Side:
    """A running consumer."""

    work: Work
    fill: Fill

    def round(self, warm_up: int, messages: int) -> Pace:
        self.work.meter.arm(warm_up, messages)
        self.fill(warm_up + messages)
        return self.work.meter.pace()


@contextmanager
def idemq(source: Source, fill: Fill, url: URL, async_url: URL | None) -> Iterator[Side]:
    engine, work = create_engine(url), Work()
    async_engine = create_async_engine(async_url) if async_url is not None else None
    app = App(engine, async_engine)
    handler: Callable[..., Any] = work.handle if async_engine is None else work.handle_async
    app.consumer("bench", source)(handler)
    feeds = prepare(app, list(app.consumers.values()))
    worker = Worker([(feed, app.engine_for(feed.consumer)) for feed in feeds])
    with running(lambda: worker.run(grace=30.0)):
        try:
            yield Side(work, fill)
        finally:
            worker.stop()
    if async_engine is not None:
        asyncio.run(async_engine.dispose())
    engine.dispose()


@contextmanager
def by_hand(loop: Callable[[Work], object], fill: Fill) -> Iterator[Side]:
    work = Work()
    with running(lambda: loop(work)):
        try:
            yield Side(work, fill)
        finally:
            work.stopped = True


@contextmanager
def running(call: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    yield
    thread.join(60)
