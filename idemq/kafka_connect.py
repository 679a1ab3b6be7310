"""How to reach a Kafka cluster: the options, checked when they are given, and the first knock at the door."""

from __future__ import annotations

import logging
import re
import secrets
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from idemq.errors import BrokerUnavailable, IdemqError, SetupError

log = logging.getLogger("idemq.kafka")

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")
#: How long one server may take to answer when it is only asked whether it is there.
REACH_SECONDS = 10.0


class Stuck(IdemqError):
    """The consumer makes no progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read, by whom, and how long things may take."""

    broker: str
    topic: str
    group: str
    description: str
    options: Mapping[str, Any] = field(repr=False)  # holds the password
    session_timeout: float
    rebalance_timeout: float
    stuck_after: float
    #: Marks the epochs of this subscription, and of no other.
    owner: str = field(default_factory=lambda: secrets.token_hex(8))


def server_list(servers: str | Sequence[str]) -> list[str]:
    names = [name.strip() for name in (servers.split(",") if isinstance(servers, str) else servers)]
    # A name that is refused is not repeated: somebody may have put a password into it.
    if not names or not all(_SERVER.fullmatch(name) for name in names):
        raise SetupError(
            "Kafka(servers): give host:port, several separated by commas, without scheme or password; "
            "user and password belong into sasl_username and sasl_password"
        )
    return [name if (found := _SERVER.fullmatch(name)) and found[2] else f"{name}:9092" for name in names]


def ssl_options(
    protocol: str, context: ssl.SSLContext | None, files: dict[str, str | None]
) -> dict[str, ssl.SSLContext]:
    given = [option for option, path in files.items() if path is not None]
    if context is not None:
        given.append("ssl_context")
    if "SSL" not in protocol.split("_"):
        if given:
            raise SetupError(f"Kafka({given[0]}=...) needs security_protocol='SSL' or 'SASL_SSL'")
        return {}
    if context is not None:
        if len(given) > 1:
            raise SetupError(f"Kafka(ssl_context=...) replaces {given[0]}: give only one of them")
        return {"ssl_context": context}
    if files["ssl_keyfile"] and not files["ssl_certfile"]:
        raise SetupError("Kafka(ssl_keyfile=...) needs ssl_certfile=... too")
    try:
        context = ssl.create_default_context(cafile=files["ssl_cafile"])
        if files["ssl_certfile"]:
            context.load_cert_chain(files["ssl_certfile"], files["ssl_keyfile"])
    except OSError as error:
        raise SetupError(f"Kafka({', '.join(given)}): {told(error)}") from None
    return {"ssl_context": context}


def sasl_options(
    protocol: str, mechanism: str | None, username: str | None, password: str | None, provider: Any
) -> dict[str, Any]:
    options = {
        "sasl_mechanism": mechanism,
        "sasl_username": username,
        "sasl_password": password,
        "sasl_token_provider": provider,
    }
    given = [option for option, value in options.items() if value is not None]
    if not protocol.startswith("SASL_"):
        if given:
            raise SetupError(f"Kafka({given[0]}=...) needs security_protocol='SASL_SSL' or 'SASL_PLAINTEXT'")
        return {}
    if mechanism not in MECHANISMS:
        raise SetupError(f"Kafka(sasl_mechanism=...) must be one of {', '.join(MECHANISMS)}")
    needed = ["sasl_token_provider"] if mechanism == "OAUTHBEARER" else ["sasl_username", "sasl_password"]
    for option in needed:
        if option not in given:
            raise SetupError(f"Kafka(sasl_mechanism={mechanism!r}) needs {option}=...")
    _hide_logins()
    if mechanism == "OAUTHBEARER":
        return {"sasl_mechanism": mechanism, "sasl_oauth_token_provider": provider}
    return {
        "sasl_mechanism": mechanism,
        "sasl_plain_username": username,
        "sasl_plain_password": password,
    }


def _hide_logins() -> None:
    """aiokafka logs every request at DEBUG, the one with the password too."""
    logging.getLogger("aiokafka.conn").addFilter(_no_login)


def _no_login(record: logging.LogRecord) -> bool:
    return "sasl_auth_bytes" not in record.getMessage()


def missing(description: str) -> SetupError:
    return SetupError(
        f"{description}: there is no such topic (or this user may not see it); "
        "create it, or let idemq create it with declare=True"
    )


def told(error: BaseException) -> str:
    """One line about `error` for people, of bounded length."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def reach(options: dict[str, Any]) -> None:
    """Connect to one of the servers and log in.

    Raises `SetupError` when a server refuses the credentials or cannot prove its identity, and
    `BrokerUnavailable` when none answers. aiokafka's clients would log such an error and then say only that
    they are not connected.
    """
    from aiokafka import conn
    from aiokafka.client import collect_hosts
    from aiokafka.errors import (
        AuthenticationFailedError,
        IllegalSaslStateError,
        KafkaError,
        SaslAuthenticationFailed,
        UnsupportedSaslMechanismError,
    )

    refused = (
        AuthenticationFailedError,
        SaslAuthenticationFailed,
        IllegalSaslStateError,
        UnsupportedSaslMechanismError,
        ssl.SSLCertVerificationError,
    )
    names = ",".join(options["bootstrap_servers"])
    rest = {key: value for key, value in options.items() if key != "bootstrap_servers"}
    errors = []
    for host, port, _ in collect_hosts(options["bootstrap_servers"]):
        try:
            opened = await conn.create_conn(host, port, request_timeout_ms=int(REACH_SECONDS * 1000), **rest)
        except refused as error:
            raise SetupError(f"kafka://{names} refuses the connection: {told(error)}") from None
        except (KafkaError, OSError, TimeoutError) as error:
            errors.append(told(error))
        else:
            await opened.close()
            return
    raise BrokerUnavailable(f"kafka://{names}: {'; '.join(dict.fromkeys(errors))}")
