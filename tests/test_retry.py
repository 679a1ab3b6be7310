"""What `retry=` means, asked one attempt at a time."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_before_delay,
    wait_chain,
    wait_exponential,
    wait_fixed,
)

from idemq.errors import SetupError
from idemq.retry import MAX_WAIT, WAITS, policy

ERROR = ValueError("on purpose")


def waits(given: Retrying | None, error: BaseException = ERROR) -> list[float]:
    """The waits after each failure, until no other attempt is made."""
    decide = policy("shop", given)
    found: list[float] = []
    while (delay := decide(len(found) + 1, sum(found), error)) is not None:
        found.append(delay)
        assert len(found) < 100
    return found


def test_stop_wait_and_retry_are_the_users() -> None:
    chain = wait_chain(wait_fixed(1), wait_fixed(5), wait_fixed(60))
    assert waits(Retrying(stop=stop_after_attempt(5), wait=chain)) == [1, 5, 60, 60]
    assert waits(Retrying(stop=stop_after_attempt(4), wait=wait_exponential(multiplier=2))) == [2, 4, 8]
    assert waits(Retrying(stop=stop_after_attempt(3))) == [0, 0]
    only = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(1), retry=retry_if_exception_type(OSError))
    assert (waits(only), waits(only, ConnectionError())) == ([], [1, 1])
    never = Retrying(stop=stop_after_attempt(3), retry=retry_if_not_exception_type(ValueError))
    assert (waits(never), waits(never, KeyError())) == ([], [0, 0])


def test_time_is_counted_from_the_first_attempt() -> None:
    assert waits(Retrying(stop=stop_after_delay(100), wait=wait_fixed(30))) == [30, 30, 30, 30]
    assert waits(Retrying(stop=stop_before_delay(100), wait=wait_fixed(30))) == [30, 30, 30]


def test_by_default_bugs_stop_early_and_everything_else_is_tried_for_hours() -> None:
    usual = waits(None)
    assert len(usual) == 11
    assert all(
        least <= each <= least * 1.25 for least, each in zip([*WAITS, *[3600.0] * 3], usual, strict=True)
    )
    assert 4 * 3600 < sum(usual) < 7 * 3600
    for bug in (TypeError(), AttributeError(), NameError(), ImportError(), AssertionError()):
        assert len(waits(None, bug)) == 3
        assert sum(waits(None, bug)) < 15


def raising(*_: object) -> Any:
    raise RuntimeError("the user's policy is broken")


def exiting(*_: object) -> Any:
    raise SystemExit("the user's policy is broken")


def returning(value: object) -> Callable[[RetryCallState], Any]:
    return lambda state: value


BROKEN = {
    "stop": Retrying(stop=raising, wait=wait_fixed(1)),
    "wait": Retrying(stop=stop_after_attempt(2), wait=raising),
    "retry": Retrying(stop=stop_after_attempt(2), wait=wait_fixed(1), retry=raising),
    "exit": Retrying(stop=stop_after_attempt(2), wait=wait_fixed(1), retry=exiting),
    "wait that returns None": Retrying(stop=stop_after_attempt(2), wait=returning(None)),
    "wait that returns a timedelta": Retrying(stop=stop_after_attempt(2), wait=returning(timedelta(1))),
    "wait that returns no number": Retrying(stop=stop_after_attempt(2), wait=returning(math.nan)),
}


@pytest.mark.hazard("H23")
@pytest.mark.parametrize("name", BROKEN)
def test_where_the_users_policy_raises_the_default_one_holds_and_it_is_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = waits(BROKEN[name])
    assert len(found) == 11
    assert found[2] >= 10
    assert len(waits(BROKEN[name], TypeError())) == 3
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert told
    assert all("'shop'" in record.getMessage() and "retry=" in record.getMessage() for record in told)


def test_a_wait_is_never_negative_nor_longer_than_thirty_days() -> None:
    for value, delay in ((-5, 0.0), (1e12, MAX_WAIT), (math.inf, MAX_WAIT), (10**400, MAX_WAIT)):
        assert waits(Retrying(stop=stop_after_attempt(2), wait=returning(value))) == [delay]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(1), GeneratorExit()])
def test_what_is_no_exception_is_tried_again_like_one(error: BaseException) -> None:
    assert len(waits(None, error)) == 11
    assert waits(Retrying(stop=stop_after_attempt(3)), error) == [0, 0]
    only = Retrying(stop=stop_after_attempt(3), retry=retry_if_exception_type(type(error)))
    assert waits(only, error) == [0, 0]
    other = Retrying(stop=stop_after_attempt(3), retry=retry_if_exception_type(OSError))
    assert waits(other, error) == []


async def later(state: RetryCallState) -> float:
    return 1.0


class Later:
    async def __call__(self, state: RetryCallState) -> float:
        return 1.0


@pytest.mark.parametrize(
    "given",
    [
        AsyncRetrying(stop=stop_after_attempt(3)),
        Retrying(),
        Retrying(retry=retry_if_exception_type(OSError)),
        Retrying,
        3,
        stop_after_attempt(3),
        Retrying(stop=stop_after_attempt(3), wait=later),  # type: ignore[arg-type]  # that is the mistake
        Retrying(stop=stop_after_attempt(3), retry=Later()),  # type: ignore[arg-type]  # and here
    ],
)
def test_what_is_no_policy_is_refused_at_declaration(given: Any) -> None:
    with pytest.raises(SetupError, match="consumer 'shop': retry="):
        policy("shop", given)
