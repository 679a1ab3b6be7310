"""Where a RabbitMQ server is and how to log in: the url and the connection options, checked.

Passwords appear in no text that is made here, not even in the errors about urls that cannot be read.
"""

from __future__ import annotations

import math
import ssl as tls_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kombu.utils.url import url_to_parts

from idemq.errors import SetupError

LOGIN_METHODS = ("PLAIN", "AMQPLAIN", "EXTERNAL")

_FILES = ("ca_certs", "certfile", "keyfile")
_TLS_OPTIONS = (
    *_FILES,
    "cert_reqs",
    "ciphers",
    "server_hostname",
    "tls_minimum_version",
    "tls_maximum_version",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One server, and how to log in there."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    vhost: str
    #: Options for py-amqp's TLS transport, None for plain TCP.
    tls: Mapping[str, Any] | None = field(repr=False)
    login_method: str
    heartbeat: int
    connect_timeout: float

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def addresses(
    url: str,
    *,
    ssl: bool | Mapping[str, Any] | None,
    heartbeat: int,
    connect_timeout: float,
    login_method: str,
) -> tuple[Address, ...]:
    """The servers that `url` names. Raises `SetupError` that names the option and the remedy."""
    if not isinstance(url, str):
        raise SetupError(f"RabbitMQ: url must be a text, not {type(url).__name__}")
    if login_method not in LOGIN_METHODS:
        raise SetupError(f"RabbitMQ: login_method must be one of {', '.join(LOGIN_METHODS)}")
    options = {"heartbeat": heartbeat, "connect_timeout": connect_timeout}
    return tuple(_address(part.strip(), ssl, options, login_method) for part in url.split(";"))


def _address(
    url: str, ssl: bool | Mapping[str, Any] | None, options: Mapping[str, Any], login_method: str
) -> Address:
    scheme = url.partition("://")[0].lower()
    if scheme not in ("amqp", "amqps"):
        raise SetupError("RabbitMQ: url must begin with amqp:// or amqps:// (each one, between semicolons)")
    try:
        parts = url_to_parts(url)
    except ValueError:  # its text may hold the password
        raise SetupError(
            "RabbitMQ: url cannot be read: the port must be a number up to 65535, and special characters of "
            "user and password must be quoted with urllib.parse.quote(text, safe='')"
        ) from None
    if scheme == "amqps" and ssl is False:
        raise SetupError("RabbitMQ: the url says amqps and ssl=False contradicts it: leave one of them out")
    encrypted = scheme == "amqps" or ssl is True or isinstance(ssl, Mapping)
    host = parts.hostname or "localhost"
    found = {**options, **_from_query(parts.query)}
    return Address(
        host=host,
        port=parts.port or (5671 if encrypted else 5672),
        user=parts.username or "guest",
        password=parts.password or "guest",
        vhost=parts.path or "/",
        tls=_tls(ssl, host) if encrypted else None,
        login_method=login_method,
        heartbeat=_heartbeat(found["heartbeat"]),
        connect_timeout=_seconds(found["connect_timeout"]),
    )


def _from_query(query: Mapping[str, str]) -> dict[str, Any]:
    known = {"heartbeat": int, "connect_timeout": float}
    found: dict[str, Any] = {}
    for option, value in query.items():
        if option not in known:
            raise SetupError(
                f"RabbitMQ: the url has the unknown option {option!r}; it may have {', '.join(known)}; "
                "the others are arguments of RabbitMQ(...)"
            )
        try:
            found[option] = known[option](value)
        except ValueError:
            raise SetupError(f"RabbitMQ: {option} in the url must be a number, not {value!r}") from None
    return found


def _heartbeat(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 3600:
        raise SetupError(
            f"RabbitMQ: heartbeat must be a whole number of seconds from 1 to 3600, not {value!r} "
            "(without heartbeats a dead connection is never noticed)"
        )
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SetupError(f"RabbitMQ: connect_timeout must be a positive number of seconds, not {value!r}")
    return float(value)


def _tls(ssl: bool | Mapping[str, Any] | None, host: str) -> dict[str, Any]:
    options = dict(ssl) if isinstance(ssl, Mapping) else {}
    for option in options:
        if option not in _TLS_OPTIONS:
            raise SetupError(
                f"RabbitMQ: ssl has the unknown option {option!r}; it may have {', '.join(_TLS_OPTIONS)}"
            )
    for option in _FILES:
        if options.get(option) is not None and not Path(options[option]).is_file():
            raise SetupError(f"RabbitMQ: ssl option {option} names no file: {str(options[option])!r}")
    if options.get("cert_reqs") != tls_module.CERT_NONE:
        # With a host name, py-amqp verifies that the certificate carries it; without one it does not.
        options.setdefault("server_hostname", host)
    return options


def description_of(servers: Sequence[Address]) -> str:
    """For people, without the password."""
    return ";".join(
        f"{'amqp' if server.tls is None else 'amqps'}://{quote(server.user)}@{server.netloc}/"
        + ("" if server.vhost == "/" else quote(server.vhost, safe=""))
        for server in servers
    )
