"""A running consumer of one queue.

An acknowledgement reaches exactly the delivery that it is for, or nobody: each delivery carries the epoch of
its connection, and after any doubt (an error of the channel, a cancelled consumer, missed heartbeats) the
connection is replaced and the epoch ends, and with it everything that was not settled. One thread touches the
connection; handlers never run on it, so heartbeats are sent while they are busy.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from idemq.amqp_link import LINK_ERRORS, Link, refuse_fork
from idemq.broker import Deliver
from idemq.message import Message

logger = logging.getLogger("idemq.rabbitmq")

#: The longest pause between two attempts to connect, in seconds.
LONGEST_PAUSE = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class QueueDelivery:
    """A message that RabbitMQ holds for us until it is acknowledged or its connection ends."""

    message: Message
    tag: int
    epoch: int
    subscription: QueueSubscription = field(repr=False)

    def start(self) -> bool:
        return self.subscription.current(self.epoch)

    def ack(self) -> None:
        self.subscription.settle(self.epoch, self.tag)

    def rest(self) -> None:
        """RabbitMQ waits for nobody."""

    def drop(self) -> None:
        """Nothing to send: RabbitMQ gives it to somebody when the connection ends."""


class QueueSubscription:
    """A consumer of one queue. Every public method may be called from any thread."""

    def __init__(
        self, connect: Callable[[], Link], description: str, consumer: str, deliver: Deliver
    ) -> None:
        #: Gives a link that consumes.
        self._connect = connect
        self._description = description
        self._consumer = consumer
        self._deliver = deliver
        self._pid = os.getpid()
        #: Counts connections; what carries another number is over. Written by the I/O thread alone.
        self._epoch = 0
        self._link: Link | None = None
        self._failures = 0
        self._settled: deque[tuple[int, int]] = deque()
        #: Handed out in this epoch, and no acknowledgement sent. Written by the I/O thread alone.
        self._out = 0
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        self._woken = False
        self._handing = threading.RLock()
        self._paused = False
        self._closing = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name=f"idemq-{consumer}-rabbitmq", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """Nothing that the broker says: a deleted queue may come back, and a refused password may be a broker
        starting up."""
        ended = not self._thread.is_alive() and not self._closing.is_set()
        return RuntimeError("its thread has ended") if ended and os.getpid() == self._pid else None

    @property
    def connected(self) -> bool:
        link = self._link
        return os.getpid() == self._pid and link is not None and link.alive

    def pause(self) -> None:
        refuse_fork(self._pid)
        with self._handing:
            self._paused = True
        self._wake()

    def close(self, timeout: float) -> None:
        refuse_fork(self._pid)
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self.pause()
        self._thread.join(timeout)

    def current(self, epoch: int) -> bool:
        """The connection of this epoch still stands, as far as is known."""
        refuse_fork(self._pid)
        return epoch == self._epoch

    def settle(self, epoch: int, tag: int) -> None:
        """Have `tag` acknowledged, if its epoch still lasts when the I/O thread comes to it.

        That is when a quarter of what is out is settled, else at the next pulse, within a second: a wake-up
        for each one costs more than the acknowledgement.
        """
        self._settled.append((epoch, tag))
        if 4 * len(self._settled) >= self._out:
            self._wake()

    def _wake(self) -> None:
        # One byte wakes for many settles: the flag is cleared before the deque is emptied, so whoever finds
        # it set has appended in time.
        if not self._woken:
            self._woken = True
            with suppress(OSError):  # full: it wakes anyway; closed: nothing is left to be woken
                self._waker.send(b"\0")

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                try:
                    self._serve()
                except Exception as error:
                    if not (self._closing.is_set() or self._paused):
                        self._pause_after(error)
        finally:
            self._wakeup.close()
            self._waker.close()

    def _serve(self) -> None:
        if self._paused:  # the connection broke after `pause`: nothing is left to be settled on another one
            self._closing.wait()
            return
        link = self._connect()
        began = time.monotonic()
        try:
            link.watch(self._wakeup)
            self._woken = False  # the byte may have been read by the connection that broke
            self._link = link
            logger.info("%s: consuming from %s", self._consumer, self._description)
            while not self._closing.is_set():
                self._turn(link)
            self._finish(link)
        finally:
            self._link = None
            self._epoch += 1
            self._out = 0
            link.sever()
            if time.monotonic() - began > LONGEST_PAUSE:
                self._failures = 0

    def _turn(self, link: Link) -> None:
        if self._paused and link.consuming:
            link.cancel()
        if link.wait(link.pulse) and (arrived := link.read()):
            self._hand_over([QueueDelivery(message, tag, self._epoch, self) for tag, message in arrived])
        self._send_settled(link)
        link.tick()

    def _hand_over(self, deliveries: list[QueueDelivery]) -> None:
        with self._handing:  # after `pause` has returned, nothing is handed over
            if not self._paused:
                self._out += len(deliveries)
                self._deliver(deliveries)

    def _send_settled(self, link: Link) -> None:
        self._woken = False
        tags = []
        while self._settled:
            epoch, tag = self._settled.popleft()
            if epoch == self._epoch:
                tags.append(tag)
        if tags:
            self._out -= len(tags)
            link.ack(tags)
            self._failures = 0

    def _finish(self, link: Link) -> None:
        self._send_settled(link)
        link.close(max(0.1, self._deadline - time.monotonic()))

    def _pause_after(self, error: Exception) -> None:
        pause = min(LONGEST_PAUSE, 0.1 * 2**self._failures) * random.uniform(0.5, 1)
        self._failures = min(self._failures + 1, 10)
        cause = str(error) or type(error).__name__
        if self._description not in cause:
            cause = f"not consuming from {self._description}: {cause}"
        logger.warning(
            "%s: %s; trying again in %.1f s",
            self._consumer,
            cause,
            pause,
            exc_info=None if isinstance(error, LINK_ERRORS) else error,
        )
        self._closing.wait(pause)
