"""Messages to RabbitMQ: sent is what the server has confirmed, on a connection without any doubt.

After a timeout, a returned or refused message, or any error the connection is thrown away, so that a late
answer meets nobody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import amqp

from idemq.amqp_confirms import Confirms
from idemq.amqp_link import refuse_fork
from idemq.amqp_parcels import Parcel, parcel
from idemq.broker import Unsendable
from idemq.errors import BrokerUnavailable, SetupError
from idemq.message import Message

_Answers = dict[int, str | None]


class AmqpPublisher:
    """A connection for publishing to one RabbitMQ: see `broker.Publisher`. Used by one thread."""

    def __init__(self, connect: Callable[[float], Confirms], description: str) -> None:
        #: Gives a connection within about so many seconds.
        self._connect = connect
        self._description = description
        #: The process that connected first.
        self._pid: int | None = None
        self._link: Confirms | None = None

    def publish(self, batch: Sequence[tuple[tuple[str, ...], Message]], timeout: float) -> list[str | None]:
        refuse_fork(self._pid)
        deadline = time.monotonic() + timeout
        answers: _Answers = {}
        parcels = []
        for place, (address, message) in enumerate(batch):
            try:
                parcels.append(parcel(place, address, message))
            except Unsendable as error:
                answers[place] = str(error)
        try:
            self._publish(parcels, answers, deadline)
        except (OSError, amqp.AMQPError, BrokerUnavailable) as error:
            cause = str(error) or type(error).__name__
            raise BrokerUnavailable(f"{self._description}: {cause}") from error
        return [answers[place] for place in range(len(batch))]

    def close(self) -> None:
        refuse_fork(self._pid)
        if self._link is not None:
            with suppress(OSError, amqp.AMQPError):
                self._link.close(1.0)
        self._drop()

    def _publish(self, parcels: Sequence[Parcel], answers: _Answers, deadline: float) -> None:
        try:
            self._attempt(parcels, answers, deadline)
        except amqp.AMQPError as error:
            if not _is_refusal(error):
                raise
            self._sift([each for each in parcels if each.place not in answers], answers, deadline, error)

    def _attempt(self, parcels: Sequence[Parcel], answers: _Answers, deadline: float) -> None:
        if not parcels:
            return
        try:
            self._connected(deadline).publish(parcels, answers, deadline)
        except BaseException:
            self._drop()
            raise
        if any(answers[each.place] is not None for each in parcels):
            self._drop()

    def _sift(self, parcels: Sequence[Parcel], answers: _Answers, deadline: float, first: Exception) -> None:
        """One of these ended the channel, and the server does not say which: each goes alone now.

        Those before it may have been published, and are again; those after it were not looked at.
        """
        refused: dict[tuple[str, ...], str] = {}
        for each in parcels:
            known = refused.get((each.exchange,)) or refused.get((each.exchange, each.routing_key))
            if known is not None:
                answers[each.place] = known
                continue
            try:
                self._attempt([each], answers, deadline)
            except amqp.AMQPError as error:
                if not _is_refusal(error):
                    raise
                answers[each.place] = text = f"RabbitMQ refused it: {error}"
                refused[_reach(each, error)] = text
            except (OSError, BrokerUnavailable):
                if not refused or time.monotonic() < deadline:
                    raise
                # What ended the channel is found, and is told now: the same batch would end the same way.
                late = f"the time was over before its turn came, after RabbitMQ had said: {first}"
                answers.update({rest.place: late for rest in parcels if rest.place not in answers})
                return

    def _connected(self, deadline: float) -> Confirms:
        if self._link is not None and not self._link.fit():
            self.close()
        if self._link is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no time left to connect")
            try:
                self._link = self._connect(remaining)
                self._pid = os.getpid()
            except SetupError as error:  # somebody has to act, and meanwhile nothing can be sent
                raise BrokerUnavailable(str(error)) from error
        return self._link

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.sever()


def _is_refusal(error: amqp.AMQPError) -> bool:
    """The server ended channel or connection over something that was published."""
    return not isinstance(error, amqp.ConnectionForced | amqp.UnexpectedFrame) and bool(error.code)


def _reach(parcel: Parcel, error: amqp.AMQPError) -> tuple[str, ...]:
    """What else would be refused for the same reason: all to the exchange, all to the address, or nothing."""
    if isinstance(error, amqp.NotFound):
        return (parcel.exchange,)
    if isinstance(error, amqp.AccessRefused):
        return parcel.exchange, parcel.routing_key
    return parcel.exchange, parcel.routing_key, str(parcel.place)
