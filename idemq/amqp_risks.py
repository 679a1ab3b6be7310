"""What RabbitMQ may do to the messages of a queue by itself, as far as the queue's arguments tell.

idemq parks and buries what fails in the database, and rejects nothing: a limit of the broker's own only drops
messages, among them neighbours of the one that keeps ending its worker. Policies say the same things as
arguments, and AMQP does not tell them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What a quorum queue of RabbitMQ 4 has where nothing is said.
DEFAULT_LIMIT = 20

#: What it takes for dead-lettering to lose nothing; with another overflow RabbitMQ falls back silently.
_SAFE = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def risks(arguments: Mapping[str, Any], version: str) -> list[str]:
    """Each in words, with its remedy. `version` is the server's."""
    exchange = arguments.get("x-dead-letter-exchange")
    safely = ", ".join(f"{name}={value}" for name, value in _SAFE.items())
    if exchange is not None:
        if all(arguments.get(name) == value for name, value in _SAFE.items()):
            return []
        return [
            f"what RabbitMQ moves to the dead-letter exchange {exchange!r} may be lost on the way: make the "
            f"queue with {safely}"
        ]
    limit, whose = arguments.get("x-delivery-limit"), ""
    if limit is None and arguments.get("x-queue-type") == "quorum" and _major(version) >= 4:
        limit, whose = DEFAULT_LIMIT, ", the default of RabbitMQ 4"
    if not isinstance(limit, int) or limit < 0:
        return []
    remedy = "x-delivery-limit=-1" if _major(version) >= 4 else "no x-delivery-limit"
    return [
        f"a message that was delivered more often than its delivery limit ({limit}{whose}) is dropped, also "
        f"where another message ended the worker each time: declare the queue with {remedy}, or with an "
        f"x-dead-letter-exchange and {safely}"
    ]


def _major(version: str) -> int:
    number = version.partition(".")[0]
    return int(number) if number.isdecimal() else 0
