"""Every error that idemq raises.

IdemqError
├── SetupError          the app is declared or configured wrongly; says what to change
├── SchemaError         the tables are missing or wrong; says which command mends them
├── BrokerUnavailable   the broker cannot be reached now; it is tried again
├── Conflict            the id was processed with another body
├── InFlight            the id is being processed elsewhere, and the bounded wait ran out
├── LockTimeout         somebody else held a row's lock for longer than the bounded wait
├── LockLost            the lock ended before its holder did; the fencing number refuses what came too late
├── BrokeTransaction    the handler ended, or tried to end, the transaction that it was lent
├── DeadlinePassed      the handler ran longer than its deadline
├── NotSettled          a delivery may not be acknowledged yet, and the time to try was used up
└── BadMessage          a message that cannot be judged; becomes a dead letter with this reason
    ├── NoId            no id, an ambiguous one, or one over the limit
    ├── Unreadable      a body or header that the decoder refuses
    └── Crashed         it ended the process that ran it, alone, too often

Raised by handlers on purpose:
Reject                  this message is wrong: a dead letter now, without another try
RetryLater              not now: another try after so many seconds, and no failure counted

Without an argument the docstring is the message.
"""

from __future__ import annotations


class IdemqError(Exception):
    """Something went wrong in idemq."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class SetupError(IdemqError):
    """The app is declared wrongly."""


class SchemaError(IdemqError):
    """The tables of idemq are missing or wrong; `idemq db upgrade APP` makes them."""


class BrokerUnavailable(IdemqError):
    """The broker cannot be reached now."""


class Conflict(IdemqError):
    """The id was processed before with another body."""


class InFlight(IdemqError):
    """The id is being processed by somebody else, and the wait for it ran out."""


class LockTimeout(IdemqError):
    """Somebody else held the lock for longer than the wait."""


class LockLost(IdemqError):
    """The lock was lost: somebody else may hold it."""


class BrokeTransaction(IdemqError):
    """The handler ended the transaction that it was lent."""


class DeadlinePassed(IdemqError):
    """The handler ran longer than the consumer's deadline."""


class NotSettled(IdemqError):
    """The message is not processed yet: do not acknowledge it."""


class BadMessage(IdemqError):
    """The message cannot be judged."""

    #: The reason under which the dead letter is filed.
    reason = "unreadable"


class NoId(BadMessage):
    """The message has no usable id."""

    reason = "no id"


class Unreadable(BadMessage):
    """The message cannot be decoded."""


class Crashed(BadMessage):
    """The message ended the process that ran it, again and again, while it ran alone there."""

    reason = "crashed"


class Reject(Exception):
    """Raise it from a handler: the message is wrong and becomes a dead letter now, with this reason."""


class RetryLater(Exception):
    """Raise it from a handler: what the message needs is not there yet. Its work is rolled back, it is tried
    again after `seconds` (at most 30 days), and no failure is counted."""

    def __init__(self, seconds: float, reason: str = "") -> None:
        if not 0 <= seconds <= 30 * 86_400:
            raise ValueError(f"RetryLater({seconds!r}): must be from 0 to 2,592,000 seconds")
        super().__init__(reason or f"again in {seconds} s")
        self.seconds = seconds


class NotSent(Exception):
    """Raise it from an effect: this call has not reached the provider, for certain; it is tried again."""


class Refused(Exception):
    """Raise it from an effect: the provider has said no, for good, and has done nothing."""
