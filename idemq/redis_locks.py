"""redis-py's own lock, with a fencing number that grows with every holder.

    lock = client.lock(f"report {day}", timeout=60, blocking_timeout=10)
    with hold(lock) as fence:
        ...                                   # take the state over, and write: see `idemq.locks`
        lock.extend(60, replace_ttl=True)     # still at it; raises LockNotOwnedError when it is lost

How long the lock lives without its holder (`timeout`), how long it is waited for (`blocking_timeout`; None:
for ever) and how it is extended are redis-py's. A holder that works longer than the timeout has lost the lock
without knowing, and somebody else works too: as with every lock, only the fencing number refuses its writes,
in the state that they go to.

The number is a counter in the same Redis, without expiry, and as durable as that: a Redis that has forgotten
it begins at 1 again, and the guarded state refuses everybody until the counter is set above the fence stored
there. Where that must not be, take `idemq.locks`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from idemq.errors import LockLost, LockTimeout, SetupError

try:
    from redis.exceptions import LockError, RedisError
except ModuleNotFoundError:
    raise SetupError('Redis needs redis-py: pip install "idemq[redis]"') from None

if TYPE_CHECKING:
    from redis.asyncio.lock import Lock as AsyncLock
    from redis.lock import Lock


@contextmanager
def hold(lock: Lock) -> Iterator[int]:
    """Hold `lock` for the block, and give it its fencing number: larger than that of every holder before.

    Raises `LockTimeout` when the lock is not free in time, and `LockLost` when it was lost: before the block,
    which is then not entered, or at the end of a block that ended well. Other errors are those of redis-py.
    """
    counter = _counter(lock)
    if not lock.acquire():
        raise LockTimeout(_busy(lock))
    try:
        fence = int(lock.redis.incr(counter))
        # Whoever lost the lock before could have a larger number than the holder of now.
        if not lock.owned():
            raise LockLost(f"the lock {lock.name!r} was lost before it was used: give it a longer timeout")
        yield fence
    except BaseException:
        try:
            lock.release()
        except RedisError:
            pass  # it expires; what went wrong in the block says more
        raise
    try:
        lock.release()
    except LockError as error:
        raise LockLost(_lost(lock, fence)) from error


@asynccontextmanager
async def hold_async(lock: AsyncLock) -> AsyncIterator[int]:
    """`hold` for a lock of `redis.asyncio`."""
    counter = _counter(lock)
    if not await lock.acquire():
        raise LockTimeout(_busy(lock))
    try:
        fence = int(await lock.redis.incr(counter))
        if not await lock.owned():
            raise LockLost(f"the lock {lock.name!r} was lost before it was used: give it a longer timeout")
        yield fence
    except BaseException:
        try:
            await lock.release()
        except RedisError:
            pass  # it expires; what went wrong in the block says more
        raise
    try:
        await lock.release()
    except LockError as error:
        raise LockLost(_lost(lock, fence)) from error


def _counter(lock: Any) -> str | bytes:
    """The key of the number. Raises `SetupError` for a lock that a dead holder would keep for ever."""
    if not hasattr(lock, "acquire") or not hasattr(lock, "redis"):
        raise SetupError(
            f"hold() takes a lock of redis-py, not {type(lock).__name__}: client.lock(name, timeout=seconds)"
        )
    if lock.timeout is None:
        raise SetupError(f"the lock {lock.name!r} has no timeout: a holder that dies would keep it for ever")
    name: str | bytes = lock.name
    return name + b":fence" if isinstance(name, bytes) else f"{name}:fence"


def _busy(lock: Any) -> str:
    return (
        f"the lock {lock.name!r} is held by somebody else, and the wait of {lock.blocking_timeout} s ran out"
    )


def _lost(lock: Any, fence: int) -> str:
    return f"the lock {lock.name!r} was lost while fence {fence} worked: only what the fence let pass counts"
