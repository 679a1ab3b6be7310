"""When a failed attempt is tried again: the user's tenacity policy, asked one attempt at a time.

Attempts are far apart and in different processes, so tenacity's own loop is not used: its `stop`, `wait` and
`retry` are asked with a state made for the attempt (https://tenacity.readthedocs.io).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

from tenacity import (
    AsyncRetrying,
    BaseRetrying,
    RetryCallState,
    Retrying,
    stop_after_attempt,
    stop_never,
    wait_chain,
    wait_exponential,
    wait_fixed,
    wait_none,
    wait_random,
)

from idemq.errors import SetupError

log = logging.getLogger("idemq.retry")

#: Waits after the first failures, in seconds, each lengthened by up to a quarter; the last one repeats.
WAITS = (0.1, 0.5, 10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0)

#: Exceptions that say that the code is wrong: time does not mend them, a new release does.
BUGS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, SyntaxError, AssertionError)

#: The longest wait that a policy may ask for, in seconds: thirty days.
MAX_WAIT = 30 * 86_400.0


#: How long what was not done rests before it is tried again where it is, in seconds.
PAUSE = wait_exponential(multiplier=0.1, max=30) + wait_random(0, 0.1)


class _Stop(stop_after_attempt):
    """Four tries for a bug (about 11 s), twelve for everything else (about 5 hours)."""

    def __init__(self) -> None:
        super().__init__(12)

    def __call__(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        return super().__call__(state) or (isinstance(error, BUGS) and state.attempt_number >= 4)


#: What holds where a consumer says nothing.
DEFAULT = Retrying(
    stop=_Stop(), wait=wait_chain(*(wait_fixed(each) + wait_random(0, each / 4) for each in WAITS))
)

#: Seconds to wait before the next attempt, or None for no other attempt, for: how many attempts failed, the
#: seconds since the first one, and the last error.
Policy = Callable[[int, float, BaseException], float | None]


def policy(consumer: str, retrying: BaseRetrying | None) -> Policy:
    """What a consumer's `retry=` means.

    Raises `SetupError` for what is no `tenacity.Retrying`, and for one that would neither stop nor wait.
    Where one of its functions raises, `DEFAULT` decides, and that is logged.
    """
    if retrying is None:
        retrying = DEFAULT
    if not isinstance(retrying, BaseRetrying) or isinstance(retrying, AsyncRetrying):
        raise SetupError(
            f"consumer {consumer!r}: retry= takes a tenacity.Retrying(stop=..., wait=..., retry=...)"
        )
    if retrying.stop is stop_never and isinstance(retrying.wait, wait_none):
        raise SetupError(f"consumer {consumer!r}: retry= neither stops nor waits; give it stop= and wait=")
    for part in (retrying.stop, retrying.wait, retrying.retry):
        if inspect.iscoroutinefunction(part) or inspect.iscoroutinefunction(type(part).__call__):
            raise SetupError(f"consumer {consumer!r}: retry= takes no async functions")

    def decide(attempts: int, elapsed: float, error: BaseException) -> float | None:
        try:
            return _ask(retrying, attempts, elapsed, error)
        except BaseException:  # SystemExit would end a lane, each time
            if retrying is DEFAULT:
                raise
            log.exception("consumer %r: its retry= failed; the default policy decides", consumer)
            return _ask(DEFAULT, attempts, elapsed, error)

    return decide


def _ask(retrying: BaseRetrying, attempts: int, elapsed: float, error: BaseException) -> float | None:
    state = _state(retrying, attempts, elapsed, error)
    if not retrying.retry(state):
        if isinstance(error, Exception):
            return None
        # tenacity means Exceptions where nothing else is said; here a handler that was cancelled, or that
        # called sys.exit, has failed like any other.
        likewise = RuntimeError(f"{type(error).__name__}: {error}")
        if not retrying.retry(_state(retrying, attempts, elapsed, likewise)):
            return None
    wait = retrying.wait(state)
    if wait != wait:
        raise ValueError("wait= gave no number")
    state.upcoming_sleep = float(min(max(0.0, wait), MAX_WAIT))
    return None if retrying.stop(state) else state.upcoming_sleep


def _state(retrying: BaseRetrying, attempts: int, elapsed: float, error: BaseException) -> RetryCallState:
    state = RetryCallState(retrying, None, (), {})
    state.attempt_number = attempts
    state.set_exception((type(error), error, error.__traceback__))
    assert state.outcome_timestamp is not None
    state.start_time = state.outcome_timestamp - elapsed
    return state


def pause(times: int) -> float:
    """Seconds to rest before what has failed so many times, for no fault of a message, is tried again."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = times
    return PAUSE(state)
