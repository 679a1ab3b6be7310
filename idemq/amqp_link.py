"""One connection and channel to RabbitMQ, used by one thread: raw deliveries in, acknowledgements out.

py-amqp does the handshake, the methods and the heartbeats; reading never blocks, and acknowledgements leave
in one write, so that the thread can do all of it in turn. After any error the link is of no use any more.
`Wire` is what a consumer and a publisher have in common.
"""

from __future__ import annotations

import os
import selectors
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from struct import Struct, unpack_from
from typing import Any, Self

import amqp
from amqp import spec

from idemq.amqp_frames import METHOD, Inbox, Settled
from idemq.amqp_url import Address
from idemq.errors import BrokerUnavailable, IdemqError, SetupError
from idemq.message import Message

#: What a lost or refused connection raises; anything else is a mistake in the program.
LINK_ERRORS = (IdemqError, OSError, amqp.AMQPError)

_FRAME_END = 0xCE
#: type, channel, size, class, method, delivery tag, multiple, end
_ACK = Struct(">BHIHHQBB")
_RECEIVE = 65536


class Wire:
    """A connection with one channel; all methods belong to one thread."""

    def __init__(self, connection: Any, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._channel = connection.channel()
        self._socket: socket.socket = connection.sock
        self._patience: float = self._socket.gettimeout() or 10.0
        self._give_up: float | None = None
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        connection.drain_events = self._drain
        #: How often `tick` must be called, in seconds.
        self.pulse: float = min(1.0, connection.heartbeat / 4)
        #: When bytes came last, in monotonic seconds.
        self.last_seen = time.monotonic()

    @classmethod
    def connect(cls, address: Address, title: str, inbox: Inbox) -> Self:
        """Log in and open the channel. Raises `SetupError` or `BrokerUnavailable`."""
        connection = amqp.Connection(
            host=address.netloc,
            userid=address.user,
            password=address.password,
            login_method=address.login_method,
            virtual_host=address.vhost,
            ssl=dict(address.tls) if address.tls is not None else False,
            connect_timeout=address.connect_timeout,
            heartbeat=address.heartbeat,
            frame_handler=inbox.attach,
            client_properties={"product": "idemq", "connection_name": title},
        )
        try:
            connection.connect()
            # py-amqp waits for answers without a limit of its own.
            connection.sock.settimeout(address.connect_timeout)
            return cls(connection, inbox)
        except BaseException as error:
            _sever(connection)
            if isinstance(error, OSError | amqp.AMQPError):
                raise _refusal(error, address) from error
            raise

    def _poll(self, seconds: float) -> bool:
        readable = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        for key, _ in self._selector.select(0 if readable else seconds):
            if key.fileobj is self._socket:
                readable = True
            elif isinstance(key.fileobj, socket.socket):
                with suppress(BlockingIOError):
                    key.fileobj.recv(4096)
        return readable

    def _drain(self, timeout: float | None = None) -> None:
        """Stands in for py-amqp's `drain_events`, so that its waiting for answers reads here as well."""
        deadline = self._give_up or time.monotonic() + (timeout or self._patience)
        while not self._poll(max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError("no answer from the broker")
        self._receive()

    def _receive(self) -> None:
        self._socket.settimeout(0)
        try:
            data = self._socket.recv(_RECEIVE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        finally:
            self._socket.settimeout(self._patience)
        if not data:
            raise ConnectionResetError("the broker closed the connection")
        self.last_seen = time.monotonic()
        self._connection.bytes_recv += 1  # py-amqp's sign of life, for `heartbeat_tick`
        self._split(data)

    def _split(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        start = 0
        while len(data) - start >= 8:
            kind, channel, size = unpack_from(">BHI", data, start)
            end = start + 7 + size
            if end >= len(data):
                break
            if data[end] != _FRAME_END:
                raise amqp.UnexpectedFrame("a frame does not end where it should")
            self._inbox.on_frame((kind, channel, data[start + 7 : end]))
            start = end + 1
        self._rest = data[start:]

    def sever(self) -> None:
        """End at once; the broker gives back what was not acknowledged."""
        self._selector.close()
        _sever(self._connection)
        self._socket.close()


class Link(Wire):
    """A connection that consumes."""

    def __init__(self, connection: Any, inbox: Inbox) -> None:
        super().__init__(connection, inbox)
        self._settled = Settled()
        self._tag: str | None = None
        self._sole = False
        self._ticked = 0.0
        #: As `4.1.2`; empty when the server does not say.
        self.server_version = str(connection.server_properties.get("version", ""))

    def find(self, queue: str) -> None:
        """Raise amqp's `NotFound` when the queue does not exist."""
        self._channel.queue_declare(queue, passive=True)

    def declare(self, queue: str, arguments: Mapping[str, Any]) -> None:
        """Make a durable queue; raises amqp's `PreconditionFailed` when it exists and differs."""
        self._channel.queue_declare(queue, durable=True, auto_delete=False, arguments=dict(arguments))

    def consume(self, queue: str, prefetch: int, *, sole: bool = False) -> None:
        """`sole`: the queue has a single active consumer, and the next one begins when the connection ends,
        with what is not acknowledged then. Were this one cancelled before, the next would begin behind it."""
        self._sole = sole
        self._channel.basic_qos(0, prefetch, False)
        self._tag = self._channel.basic_consume(queue)

    @property
    def consuming(self) -> bool:
        return self._tag is not None

    def cancel(self) -> None:
        """Ask for no more deliveries; some may be on their way."""
        tag, self._tag = self._tag, None
        if tag is not None and not self._sole:
            self._channel.basic_cancel(tag, nowait=True)

    def watch(self, wakeup: socket.socket) -> None:
        """Have `wait` return when `wakeup`, which does not block, is written to."""
        self._selector.register(wakeup, selectors.EVENT_READ)

    def wait(self, seconds: float) -> bool:
        """Until there is something to `read` (then True), until a wake-up, or until the time is over."""
        return bool(self._inbox.arrived) or self._poll(seconds)

    def read(self) -> list[tuple[int, Message]]:
        """What has arrived, without waiting, in pieces small enough to write and to tick in between."""
        self._receive()
        arrived, self._inbox.arrived = self._inbox.arrived, []
        return arrived

    def ack(self, tags: Sequence[int]) -> None:
        """Acknowledge `tags` and nothing else, in one write."""
        channel = self._channel.channel_id
        frames = [
            _ACK.pack(METHOD, channel, 13, *spec.Basic.Ack, tag, below, _FRAME_END)
            for tag, below in self._settled.add(tags)
        ]
        self._connection.transport.write(b"".join(frames))
        self._connection.bytes_sent += 1

    def tick(self) -> None:
        """Send a heartbeat when one is due; raises when the broker has been silent for two of them."""
        now = time.monotonic()
        if now - self._ticked >= self.pulse:
            self._ticked = now
            self._connection.heartbeat_tick()

    @property
    def alive(self) -> bool:
        """The broker knows our consumer, and was heard of within two heartbeats."""
        return (
            self.consuming and time.monotonic() - self.last_seen < 2 * self._connection.heartbeat + self.pulse
        )

    def close(self, seconds: float) -> None:
        """End in order, in at most `seconds`: the broker has taken what was acknowledged before."""
        # RabbitMQ passes on 32 acknowledgements to a quorum queue and holds the others back until those are
        # written; the end of the connection would have it forget them. To cancel a consumer waits for the
        # writing, and the answer to one request more for the rest to be passed on. (What is forgotten of a
        # sole consumer's comes again, and its claims absorb it.)
        self._give_up = time.monotonic() + seconds
        tag, self._tag = self._tag, None
        if tag is not None and not self._sole:
            self._channel.basic_cancel(tag)
        self._channel.basic_qos(0, 1, False)
        self._connection.close()


def _sever(connection: Any) -> None:
    # Ending TLS waits for the other side, which may be gone; py-amqp raises AttributeError and ValueError on
    # half-open connections. There is nobody left who could use the answer.
    with suppress(OSError, AttributeError, ValueError, amqp.AMQPError):
        if connection.connected:
            connection.sock.settimeout(1)
        connection.collect()


def _refusal(error: Exception, address: Address) -> IdemqError:
    """What went wrong while connecting, in words."""
    where = f"RabbitMQ at {address.netloc}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return SetupError(
            f"{where}: its certificate is not trusted ({error.verify_message}): give the authority's file, "
            'ssl={"ca_certs": "..."}, and use a host name that the certificate carries'
        )
    if isinstance(error, amqp.AccessRefused):
        return SetupError(f"{where} refused the user {address.user!r}: check user and password in the url")
    if isinstance(error, amqp.NotAllowed) and "limit" not in str(error):
        return SetupError(
            f"{where}: the virtual host {address.vhost!r} does not exist or is not open to the user "
            f"{address.user!r}: check the path of the url, or create it"
        )
    return BrokerUnavailable(f"{where} cannot be reached: {str(error) or type(error).__name__}")


def refuse_fork(pid: int | None) -> None:
    """A connection and its thread belong to the process that made them."""
    if pid not in (None, os.getpid()):
        raise SetupError(
            f"RabbitMQ was connected in process {pid}, of which this one is a fork: connect in the child "
            "only, or start processes with multiprocessing's 'spawn'"
        )
