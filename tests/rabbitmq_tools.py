"""A publisher beside idemq, a collector of deliveries, a TCP proxy to cut, and a server to kill."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import amqp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from idemq.broker import Delivery, Subscription
from idemq.rabbitmq import Queue
from tests.servers import SERVERS, free_port


class Server:
    """A connection of the test's own, written without idemq."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = amqp.Connection(
            host=f"{parts.hostname}:{parts.port or 5672}",
            userid=parts.username or "guest",
            password=parts.password or "guest",
            virtual_host="/",
            confirm_publish=True,
        )
        self._connection.connect()
        self.channel = self._connection.channel()

    def declare(self, name: str, *, durable: bool = True, **arguments: Any) -> None:
        names = {option.replace("_", "-"): value for option, value in arguments.items()}
        self.channel.queue_declare(name, durable=durable, auto_delete=False, arguments=names)

    def publish(
        self, name: str, body: bytes, *, headers: Mapping[str, Any] | None = None, **properties: Any
    ) -> None:
        message = amqp.Message(body, application_headers=dict(headers or {}), **properties)
        self.channel.basic_publish(message, routing_key=name)

    def counts(self, name: str) -> tuple[int, int]:
        """Messages that are ready, and consumers."""
        found = self.channel.queue_declare(name, passive=True)
        return found.message_count, found.consumer_count

    def delete(self, name: str) -> None:
        self.channel.queue_delete(name)

    def close(self) -> None:
        with suppress(OSError, amqp.AMQPError):
            self._connection.close()
        self._connection.collect()


class Collector:
    """What a worker's `deliver` would get, in order."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def __call__(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._queue.put(delivery)

    def take(self, seconds: float = 90.0) -> Delivery:
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"no delivery within {seconds} s") from None

    def several(self, count: int) -> list[Delivery]:
        return [self.take() for _ in range(count)]

    @property
    def empty(self) -> bool:
        return self._queue.empty()


@contextmanager
def consuming(source: Queue, *, prefetch: int = 100) -> Iterator[tuple[Subscription, Collector]]:
    collector = Collector()
    subscription = source.subscribe("test", collector, prefetch)
    try:
        yield subscription, collector
    finally:
        subscription.close(10)


class Proxy:
    """Forwards a local port to `target`; `cut` resets its connections, `freeze` stops the bytes, and
    `hold_replies` those of the server only."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: How many connections there have been.
        self.accepted = 0
        self.port: int = self._listener.getsockname()[1]
        self._flowing, self._replying = threading.Event(), threading.Event()
        self._flowing.set()
        self._replying.set()
        #: Set when a reply is being held.
        self.held = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # ends when the listener is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                self.accepted += 1
                self._spawn(self._pump, client, server, False)
                self._spawn(self._pump, server, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                if replies and not self._replying.is_set():
                    self.held.set()
                    self._replying.wait()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        self._flowing.clear()

    def hold_replies(self) -> None:
        self._replying.clear()

    def thaw(self) -> None:
        self._flowing.set()
        self._replying.set()

    def cut(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.thaw()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for end in self._sockets:
            end.close()


class OwnServer:
    """A RabbitMQ container with a TLS port and a certificate for `localhost` that may be killed."""

    def __init__(self, folder: Path) -> None:
        write_certificate(folder)
        self.ca_certs = str(folder / "cert.pem")
        self.port, self.tls_port = free_port(), free_port()
        configuration = folder / "90-tls.conf"
        configuration.write_text(
            "listeners.ssl.default = 5671\n"
            "ssl_options.cacertfile = /etc/rabbitmq/tls/cert.pem\n"
            "ssl_options.certfile = /etc/rabbitmq/tls/cert.pem\n"
            "ssl_options.keyfile = /etc/rabbitmq/tls/key.pem\n"
            "ssl_options.verify = verify_none\n"
        )
        self._container = (
            DockerContainer(SERVERS["rabbitmq"][1])
            .with_bind_ports(5672, self.port)
            .with_bind_ports(5671, self.tls_port)
            .with_volume_mapping(str(folder), "/etc/rabbitmq/tls")
            .with_volume_mapping(str(configuration), "/etc/rabbitmq/conf.d/90-tls.conf")
            .waiting_for(LogMessageWaitStrategy("Server startup complete").with_startup_timeout(90))
        )

    def __enter__(self) -> Self:
        self._container.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._container.stop()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def start(self) -> None:
        self._container.get_wrapped_container().start()

    def stop_app(self) -> None:
        """An orderly end: the server closes its connections and its files."""
        self.ctl("stop_app")

    def start_app(self) -> None:
        self.ctl("start_app")

    def ctl(self, *command: str) -> None:
        code, output = self._container.exec(["rabbitmqctl", *command])
        assert code == 0, output


def write_certificate(folder: Path) -> None:
    """A certificate that signs itself, for the host name `localhost`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "idemq test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)  # the server in the container is another user
