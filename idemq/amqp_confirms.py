"""A channel on which RabbitMQ says of each published message whether it keeps it.

An answer belongs to the message with its delivery tag, and to no other; a returned message counts as refused,
although the server confirms it as well.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from struct import pack, unpack_from
from typing import Any

import amqp
from amqp import spec
from amqp.serialization import decode_properties_basic

from idemq.amqp_frames import METHOD, Inbox, short
from idemq.amqp_link import Wire
from idemq.amqp_parcels import Parcel
from idemq.broker import Unsendable

#: Frames are made as the server takes them, so that a large batch is not in memory twice.
_AHEAD = 256 * 1024
_HEARTBEAT = pack(">BHIB", 8, 0, 0, 0xCE)


@dataclass(frozen=True, slots=True)
class Settled:
    """The server's answer to one delivery tag, or to all up to it."""

    tag: int
    multiple: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Returned:
    """A message that no queue got. Its ack follows."""

    exchange: str
    routing_key: str
    id: str | None
    body: bytes = field(repr=False)
    reason: str


class Receipts(Inbox):
    """What the server says about the published messages, in its order."""

    def __init__(self) -> None:
        super().__init__({})
        self.answers: deque[Settled | Returned] = deque()
        #: Why the server takes nothing at the moment, None when it does.
        self.blocked: str | None = None

    def on_frame(self, frame: tuple[int, int, bytes]) -> bool:
        kind, _, payload = frame
        method = unpack_from(">HH", payload) if kind == METHOD else None
        if method in (spec.Basic.Ack, spec.Basic.Nack):
            tag, bits = unpack_from(">QB", payload, 4)
            self.answers.append(Settled(tag, bool(bits & 1), method == spec.Basic.Ack))
        elif method == spec.Connection.Blocked:
            self.blocked = short(payload, 4)[0]
        elif method == spec.Connection.Unblocked:
            self.blocked = None
        else:
            return super().on_frame(frame)
        return True

    def take(self, arguments: bytes, header: bytes, body: bytes) -> None:
        (code,) = unpack_from(">H", arguments, 4)
        text, end = short(arguments, 6)
        exchange, end = _exactly(arguments, end)
        routing_key, _ = _exactly(arguments, end)
        properties, _ = decode_properties_basic(header[12:], 0)
        identifier = properties.get("message_id") or None
        self.answers.append(Returned(exchange, routing_key, identifier, body, f"{code} {text}"))


def _exactly(payload: bytes, offset: int) -> tuple[str, int]:
    """A short string that we wrote ourselves."""
    end = offset + 1 + payload[offset]
    return payload[offset + 1 : end].decode("utf-8", "surrogatepass"), end


class Open:
    """The published messages of one channel that are not answered yet."""

    def __init__(self) -> None:
        self._parcels: dict[int, Parcel] = {}  # by delivery tag, in ascending order
        self._returned: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parcels)

    def add(self, tag: int, parcel: Parcel) -> None:
        self._parcels[tag] = parcel

    def hear(self, answer: Settled | Returned, answers: MutableMapping[int, str | None]) -> None:
        """Write to `answers`, by place in the batch, what is final now."""
        if isinstance(answer, Returned):
            self._give_back(answer)
            return
        tags = [answer.tag] if answer.tag in self._parcels else []
        if answer.multiple:
            tags = [tag for tag in self._parcels if tag <= answer.tag]
        for tag in tags:
            place = self._parcels.pop(tag).place
            answers[place] = self._returned.pop(tag, None if answer.kept else _NACKED)

    def _give_back(self, answer: Returned) -> None:
        """A return carries no tag. Of messages that are the same in all that it says, any may be meant: all
        of them count as returned, since one too many is sent again, and one too few is lost."""
        found = [
            tag
            for tag, sent in self._parcels.items()
            if (sent.exchange, sent.routing_key, sent.id) == (answer.exchange, answer.routing_key, answer.id)
            and sent.body == answer.body
        ]
        if not found:  # its ack would pass for that of a message that was kept
            raise amqp.UnexpectedFrame(f"RabbitMQ returned a message that was not sent: {answer.id!r}")
        for tag in found:
            self._returned[tag] = _unroutable(answer)


_NACKED = "RabbitMQ refused it: the queue is full (x-overflow: reject-publish), or it has failed"


def _unroutable(answer: Returned) -> str:
    if not answer.exchange:
        return f"there is no queue {answer.routing_key!r} ({answer.reason}): create it"
    return (
        f"no queue is bound to the exchange {answer.exchange!r} for the routing key {answer.routing_key!r} "
        f"({answer.reason}): bind one"
    )


class Confirms(Wire):
    """A connection whose channel is in confirm mode."""

    _inbox: Receipts

    def __init__(self, connection: Any, inbox: Receipts) -> None:
        super().__init__(connection, inbox)
        self._tag = 0
        self._out = bytearray()
        self._used = time.monotonic()
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # py-amqp has the system end a connection on which nothing can be sent for a second: a server that
            # slows its publishers down would be a doubt. The end of our patience is `deadline`.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        self._channel.confirm_select()

    def publish(
        self, parcels: Sequence[Parcel], answers: MutableMapping[int, str | None], deadline: float
    ) -> None:
        """Publish all of them, and write each answer to `answers` as it comes.

        Raises `TimeoutError` at `deadline` (monotonic seconds), and whatever ended channel or connection;
        then nothing is known of the places without an answer, and the connection must not be used again.
        """
        waiting, open_ = deque(parcels), Open()
        while waiting or open_:
            while waiting and len(self._out) < _AHEAD:
                self._write(waiting.popleft(), open_, answers)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(self._unanswered(len(open_) + len(waiting)))
            try:
                self._turn(min(remaining, self.pulse))
            finally:  # answers may have come right before the end
                while self._inbox.answers:
                    open_.hear(self._inbox.answers.popleft(), answers)

    def _write(self, parcel: Parcel, open_: Open, answers: MutableMapping[int, str | None]) -> None:
        try:
            frames = parcel.frames(self._channel.channel_id, self._connection.frame_max)
        except Unsendable as error:
            answers[parcel.place] = str(error)
            return
        self._tag += 1
        open_.add(self._tag, parcel)
        self._out += frames

    def _unanswered(self, count: int) -> str:
        blocked = self._inbox.blocked
        cause = "no answer in time" if blocked is None else f"the server takes no messages now ({blocked})"
        return f"{cause}; {count} not confirmed"

    def fit(self) -> bool:
        """Whether it can be used for another batch, as far as can be known without asking."""
        # Between batches nobody sends heartbeats; after two of them the server gives us up.
        if time.monotonic() - self._used > self._connection.heartbeat / 2:
            return False
        try:
            self._turn(0)
        except (OSError, amqp.AMQPError):
            return False
        self._inbox.answers.clear()  # nothing is open, so they can be meant for nothing
        return True

    def _turn(self, seconds: float) -> None:
        """Write and read what can be now, after waiting for that at most `seconds`. Both in turn, because a
        server whose answers nobody reads stops reading itself."""
        if not self._out and time.monotonic() - self._used > self.pulse:
            self._out += _HEARTBEAT
        writes = selectors.EVENT_WRITE if self._out else 0
        self._selector.modify(self._socket, selectors.EVENT_READ | writes)
        readable = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        for _, events in self._selector.select(0 if readable else seconds):
            readable |= bool(events & selectors.EVENT_READ)
            if events & selectors.EVENT_WRITE:
                self._send()
        if readable:
            self._receive()

    def _send(self) -> None:
        self._socket.settimeout(0)
        try:
            sent = self._socket.send(self._out)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        finally:
            self._socket.settimeout(self._patience)
        del self._out[:sent]
        self._used = time.monotonic()

    def close(self, seconds: float) -> None:
        """Say goodbye, in at most `seconds`."""
        self._selector.modify(self._socket, selectors.EVENT_READ)
        self._give_up = time.monotonic() + seconds
        self._connection.close()
