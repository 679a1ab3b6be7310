"""Idempotent message consumers: each message's id and its effect commit together."""

from idemq import letters
from idemq.app import App
from idemq.errors import (
    BadMessage,
    BrokerUnavailable,
    BrokeTransaction,
    Conflict,
    IdemqError,
    InFlight,
    NoId,
    NotSettled,
    Reject,
    RetryLater,
    SchemaError,
    SetupError,
)
from idemq.letters import Letter
from idemq.message import Message
from idemq.once import claim, once

__version__ = "0.1.0"

__all__ = [
    "App",
    "BadMessage",
    "BrokeTransaction",
    "BrokerUnavailable",
    "Conflict",
    "IdemqError",
    "InFlight",
    "Letter",
    "Message",
    "NoId",
    "NotSettled",
    "Reject",
    "RetryLater",
    "SchemaError",
    "SetupError",
    "claim",
    "letters",
    "once",
]
