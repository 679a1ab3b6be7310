"""One subscription to a Kafka topic: a thread whose event loop owns the consumer and nothing else.

Handlers never run on that loop, so heartbeats go on however long they block. A consumer that fails or makes
no progress is thrown away with its loop and built anew: its epochs end, and Kafka gives the uncommitted
records again.
"""

from __future__ import annotations

import asyncio
import os
import random
from threading import Event, Thread
from time import monotonic

from aiokafka.errors import KafkaError

from idemq.broker import Deliver
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka_connect import Reading, Stuck, log, told
from idemq.kafka_delivery import Flow
from idemq.kafka_session import Session

#: The longest pause before a consumer is built anew.
LONGEST_PAUSE = 30.0
#: A topic that is missing or a login that is refused so often in a row ends a subscription: a cluster that
#: restarts may say so once, and a broker that has not heard of a new topic yet.
CERTAIN_AFTER = 3
#: How long an orderly end may take when nobody waits for it.
LEAVE_SECONDS = 5.0


class KafkaSubscription:
    """Reads until it is closed, or until `failure` says why it never can again."""

    def __init__(self, reading: Reading, consumer: str, deliver: Deliver, prefetch: int) -> None:
        if not 1 <= prefetch <= 1_000_000:
            raise SetupError(f"consumer {consumer!r}: prefetch={prefetch} must be from 1 up")
        self._reading = reading
        self._consumer = consumer
        self._deliver = deliver
        self._flow = Flow(prefetch, self._wake)
        self._closing = Event()
        self._deadline = float("inf")
        self._session: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._pid = os.getpid()
        self._thread = Thread(target=self._run, name=f"idemq-kafka-{consumer}", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        if self._pid != os.getpid():
            return SetupError(
                f"consumer {self._consumer!r} was started in process {self._pid}, before the fork"
            )
        if self._failure is None and not self._thread.is_alive() and not self._closing.is_set():
            return RuntimeError("its thread has ended")
        return self._failure

    @property
    def connected(self) -> bool:
        session = self._session
        return session is not None and self._pid == os.getpid() and session.connected

    def pause(self) -> None:
        self._flow.pause()

    def close(self, timeout: float) -> None:
        if self._pid != os.getpid():
            return
        self._flow.pause()
        self._deadline = monotonic() + timeout
        self._closing.set()
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("%s: not closed within %.1f s; Kafka will notice by itself", self._consumer, timeout)

    def _wake(self) -> None:
        loop, session = self._loop, self._session
        if loop is None or session is None:
            return
        try:
            loop.call_soon_threadsafe(session.wake)
        except RuntimeError:
            pass  # the loop was closed in between; the next session looks for itself

    def _run(self) -> None:
        attempt = refused = 0
        while not self._closing.is_set():
            session = Session(self._reading, self._deliver, self._flow, self._closing)
            try:
                asyncio.run(self._live(session))
                continue  # closed in order
            except Exception as error:
                reason = error
            except asyncio.CancelledError:  # nobody cancels us: aiokafka lets some of its own escape
                reason = Stuck(f"{self._reading.description}: the consumer was cancelled")
            finally:
                self._session = self._loop = None
            attempt = 0 if session.joined else attempt + 1
            refused = refused + 1 if isinstance(reason, SetupError) else 0
            if refused >= CERTAIN_AFTER:
                self._failure = reason
                log.error("%s: stopped: %s", self._consumer, reason)
                return
            pause = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 0.5 * 2**attempt)
            # An error of ours, or one of aiokafka's that has no name here, is worth its traceback.
            known = isinstance(reason, SetupError | BrokerUnavailable | Stuck)
            log.warning(
                "%s: %s; reading again in %.1f s",
                self._consumer,
                reason if known else told(reason),
                pause,
                exc_info=None if known or isinstance(reason, KafkaError) else reason,
            )
            self._closing.wait(pause)

    async def _live(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: log.debug("%s: %s", self._consumer, context.get("message"))
        )
        self._loop, self._session = loop, session
        await session.run(self._remaining)

    def _remaining(self) -> float:
        """Seconds that an orderly end may still take."""
        return max(0.1, self._deadline - monotonic()) if self._closing.is_set() else LEAVE_SECONDS
