"""What a declared consumer is to the path of its messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import Connection

from idemq import failures
from idemq.broker import Broker
from idemq.errors import BadMessage, SetupError
from idemq.failures import MAX_KEPT, Job, Outcome
from idemq.handlers import Handler
from idemq.ledger import WAIT, Ledger, clock
from idemq.message import IdRule, Message, fingerprint_of, key_of, lane_of, message_id
from idemq.packing import size
from idemq.retry import Policy
from idemq.sessions import Sessions

#: Pruning forgets nothing that was sent less than so many seconds ago: no need to ask it.
RECENT = 3600.0

#: A time further than this from now, in seconds (negative: to come), is not believed.
AHEAD = -300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """What the path needs to know of a declared consumer."""

    name: str
    handler: Handler
    id: IdRule | None = None
    #: The number that is compared for the same id (four bytes, signed); None compares nothing.
    fingerprint: Callable[[Message], int | None] = lambda message: fingerprint_of(message.body)
    #: Seconds that a repeat waits for its twin in flight.
    wait: float = WAIT
    strict: bool = False
    #: When a failed message is tried again; None: at once, by whoever runs it.
    policy: Policy | None = None
    #: There is a worker that takes up what is parked.
    parks: bool = False
    #: Seconds that a handler may run.
    deadline: float | None = None
    #: How often a message may end a process in which it runs alone.
    max_crashes: int = 3
    #: What becomes of a message that does not say when it was sent, or says a time to come.
    undated: Literal["run", "park"] = "run"
    #: The largest message that is parked or made a dead letter, in bytes.
    max_kept: int = MAX_KEPT
    #: One message of a key at a time, in order; by this key, and None for those without one.
    ordered: bool = False
    key: Callable[[Message], str | bytes | None] = lambda message: message.key
    #: A dead letter holds what comes after it of its key.
    hold_dead: bool = False
    #: Where the messages come from, for a consumer that answers them.
    answers: Broker | None = None
    schema: str | None = None
    sessions: Sessions

    def job(self, message: Message) -> Job:
        """Never raises: what cannot be judged becomes a job that is buried."""
        lane = None
        try:
            # Of the message as it was delivered, which is what `lane` sees.
            lane = lane_of(message, self.key(message)) if self.ordered else None
            identifier = message_id(message, self.id)
            if message.id != identifier:
                message = replace(message, id=identifier)
            if message.sent_at is not None and not _tells(message.sent_at):
                message = replace(message, sent_at=None)
            job = Job(message, key_of(identifier), self.fingerprint(message))
            job.bad = BadMessage(message.unreadable) if message.unreadable else None
        except BaseException as error:  # also from the user's functions for key, id, fingerprint
            if not isinstance(error, Exception) and not self.parks:
                raise  # in place, Ctrl-C and exits are the caller's; here they would end a lane, each time
            bad = error if isinstance(error, BadMessage) else BadMessage(f"{type(error).__name__}: {error}")
            job = Job(message, None, None, bad=BadMessage(message.unreadable) if message.unreadable else bad)
        job.lane = lane
        return job

    def lane(self, message: Message) -> bytes:
        """Never raises; a message whose key cannot be told is buried by `job`."""
        try:
            return lane_of(message, self.key(message))
        except BaseException:  # SystemExit would end the broker's thread
            return lane_of(message, None)

    def suspect(self, message: Message) -> Job:
        """The job of a message that may have ended the process that had it: it is parked, and not decoded."""
        job = self.job(message)
        if self.parks and job.bad is None and size(message) <= self.max_kept:
            job.outcome, job.suspect = Outcome(failures.SUSPECT, None, 0.0), True
        return job


def _tells(sent_at: datetime) -> bool:
    """It is a moment, and one for which every database has a place."""
    return sent_at.tzinfo is not None and 1 < sent_at.year < 9999


def too_late(
    consumer: Consumer, message: Message, ledger: Ledger, connection: Connection, number: int
) -> str | None:
    """Why a message that nobody has claimed may have been processed and forgotten all the same."""
    sent_at = message.sent_at
    if sent_at is not None and (age := (datetime.now(UTC) - sent_at).total_seconds()) > AHEAD:
        if age < RECENT:
            return None
        horizon = ledger.horizon(connection, number)
        return failures.TOO_OLD if horizon is not None and sent_at <= horizon else None
    if consumer.undated == "run":
        return None
    if sent_at is not None and (sent_at - clock(connection)).total_seconds() <= -AHEAD:
        return None  # it is our own clock that is behind
    return failures.UNDATED


def key_by(
    name: str, rule: str | Callable[[Message], object] | None
) -> Callable[[Message], str | bytes | None]:
    """What a consumer's `key=` means: a header, a function of the message, or the record's own key."""
    if rule is None:
        return lambda message: message.key
    if not isinstance(rule, str) and not callable(rule):
        raise SetupError(f"consumer {name!r}: key= takes a header name or a function of the message")

    def key(message: Message) -> str | bytes | None:
        found = message.headers.get(rule) if isinstance(rule, str) else rule(message)
        return found if isinstance(found, str | bytes | None) else str(found)

    return key


def fingerprint_by(
    name: str, function: Callable[[Message], bytes | str] | bool | None
) -> Callable[[Message], int | None]:
    """What a consumer's `fingerprint=` means."""
    if function is None or function is False:
        return lambda message: None
    if not callable(function):
        raise SetupError(f"consumer {name!r}: fingerprint= takes a function of the message, or None")

    def digest(message: Message) -> int:
        value = function(message)
        return fingerprint_of(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)

    return digest
