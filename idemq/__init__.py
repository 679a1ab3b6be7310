"""Idempotent message consumers: each message's id and its effect commit together."""

from idemq import letters
from idemq.app import App
from idemq.effects import AsyncEffects, Effects
from idemq.errors import (
    BadMessage,
    BrokerUnavailable,
    BrokeTransaction,
    Conflict,
    IdemqError,
    InFlight,
    NoId,
    NotSent,
    NotSettled,
    Refused,
    Reject,
    RetryLater,
    SchemaError,
    SetupError,
)
from idemq.letters import Letter
from idemq.message import Message
from idemq.once import claim, once
from idemq.outbox import AsyncOutbox, Outbox

__version__ = "0.1.0"

__all__ = [
    "App",
    "AsyncEffects",
    "AsyncOutbox",
    "BadMessage",
    "BrokeTransaction",
    "BrokerUnavailable",
    "Conflict",
    "Effects",
    "IdemqError",
    "InFlight",
    "Letter",
    "Message",
    "NoId",
    "NotSent",
    "NotSettled",
    "Outbox",
    "Refused",
    "Reject",
    "RetryLater",
    "SchemaError",
    "SetupError",
    "claim",
    "letters",
    "once",
]
