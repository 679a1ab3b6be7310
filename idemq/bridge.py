"""The only place where threads and the event loop meet.

`Threads` and `Tasks` run a fixed number of lanes over one queue; `EventLoop` is a thread for async handlers,
apart from every broker's I/O; `Clock` calls things later, on the thread that runs it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

log = logging.getLogger("idemq.worker")

T = TypeVar("T")
Item = TypeVar("Item", contravariant=True)


async def uninterrupted(step: Awaitable[T]) -> T:
    """Await `step` to its end even when our task is cancelled meanwhile; the cancellation comes after it."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                pass  # told once more; it is raised below all the same
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains that nobody did
        raise


class Lane(Protocol[Item]):
    """Works on one item at a time. `run` must not raise."""

    def run(self, item: Item) -> None: ...
    def close(self) -> None: ...


class AsyncLane(Protocol[Item]):
    """`Lane` on the event loop."""

    async def run(self, item: Item) -> None: ...
    async def close(self) -> None: ...


class Threads(Generic[T]):
    """`count` threads that take items from one queue; each has a lane of its own, made in its thread."""

    def __init__(self, name: str, count: int, make: Callable[[], Lane[T]]) -> None:
        self._queue: SimpleQueue[T | None] = SimpleQueue()
        self._make = make
        self._threads = [
            threading.Thread(target=self._run, name=f"idemq-{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, items: Sequence[T]) -> None:
        for item in items:
            self._queue.put(item)

    def stop(self, drop: Callable[[T], None]) -> None:
        """Let the lanes end after their present item, and drop what nobody has begun."""
        try:
            while (item := self._queue.get_nowait()) is not None:
                drop(item)
        except Empty:
            pass
        for _ in self._threads:
            self._queue.put(None)

    def join(self, timeout: float) -> bool:
        """Whether all lanes ended within `timeout` seconds."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def ended(self) -> bool:
        """A lane ended that nobody stopped."""
        return not all(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        lane = self._make()
        while (item := self._queue.get()) is not None:
            lane.run(item)
        lane.close()


class EventLoop:
    """An event loop in a thread of its own, for async handlers or a client of a broker."""

    def __init__(self, name: str = "idemq-handlers") -> None:
        self.loop = asyncio.new_event_loop()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # A task that raises SystemExit, or anybody's `loop.stop()`, ends the loop; handlers still need it.
        while not self._closing:
            try:
                self.loop.run_forever()
            except BaseException as error:
                log.error("a task on the event loop of %s raised %r", self._thread.name, error)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop and wait for it here."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        self._closing = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Tasks(Generic[T]):
    """`Threads` for async lanes: `count` tasks on the handlers' event loop."""

    def __init__(self, loop: EventLoop, count: int, make: Callable[[], AsyncLane[T]]) -> None:
        self._loop = loop.loop
        self._queue: asyncio.Queue[T | None] = asyncio.Queue()
        self._make = make
        self._futures = [asyncio.run_coroutine_threadsafe(self._run(), self._loop) for _ in range(count)]

    def put(self, items: Sequence[T]) -> None:
        self._loop.call_soon_threadsafe(self._put, list(items))

    def _put(self, items: list[T]) -> None:
        for item in items:
            self._queue.put_nowait(item)

    def stop(self, drop: Callable[[T], None]) -> None:
        self._loop.call_soon_threadsafe(self._stop, drop)

    def _stop(self, drop: Callable[[T], None]) -> None:
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if item is not None:
                drop(item)
        for _ in self._futures:
            self._queue.put_nowait(None)

    def join(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        for future in self._futures:
            try:
                future.exception(max(0.0, end - time.monotonic()))
            except TimeoutError:
                return False
            except CancelledError:
                pass  # it ended, too
        return True

    def ended(self) -> bool:
        """A lane ended that nobody stopped."""
        return any(future.done() for future in self._futures)

    async def _run(self) -> None:
        lane = self._make()
        while (item := await self._queue.get()) is not None:
            await lane.run(item)
        await lane.close()


class Clock:
    """Calls functions later, on the one thread that runs it (the process's main thread)."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        # An RLock, because a signal handler may call `stop` while this very thread holds it.
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), call))
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Until `stop`."""
        while (call := self._next()) is not None:
            call()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(self._due[0][0] - now if self._due else None)
        return None
