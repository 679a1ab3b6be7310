"""The idemq side: an App as a user declares it, checked and run as `idemq run` does it, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.work import Meter, Pace, Work
from idemq import App
from idemq.broker import Source
from idemq.cli.run import prepare
from idemq.worker import Worker


def consume(
    engine: Engine, source: Source, warm_up: int, messages: int, async_engine: AsyncEngine | None = None
) -> Pace:
    """One round: the default options, which have the guard, one message at a time."""
    app, work = App(engine, async_engine), Work()
    handler: Callable[..., Any] = work.handle if async_engine is None else work.handle_async
    app.consumer("bench", source)(handler)
    feeds = prepare(app, list(app.consumers.values()))
    worker = Worker([(feed, app.engine_for(feed.consumer)) for feed in feeds])
    work.meter = Meter(warm_up, messages, worker.stop)
    if not worker.run(grace=30.0):
        raise RuntimeError("the worker did not end in time")
    if async_engine is not None:
        asyncio.run(async_engine.dispose())
    return work.meter.pace
