"""Each sin of a handler, on every driver, with and without a SIGKILL: no ack while work is missing.

What no check can see without `strict` or the trigger is written down as what it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import pytest

from idemq.message import Ack, Dead, Release, Verdict
from tests.sins.conftest import DRIVERS, KINDS
from tests.sins.handlers import SINS
from tests.sins.play import Kill, Player, Stage, found, message, perish

Stages = Callable[[str, bool], Stage]


def settle(player: Player, identifier: uuid.UUID, sin: str, more: bool) -> tuple[Verdict, str]:
    """Deliver the message with a sin, an innocent one on the same unit, then the first again."""
    player.part.more, player.part.sin = more, sin
    job = player.consumer.job(message(str(identifier)))
    verdict, word, innocent = player.run(job), "acked", uuid.uuid4()
    player.part.sin = "nothing"
    assert player.run(player.consumer.job(message(str(innocent)))) == Ack()
    assert outcome(player, innocent, Ack(), "acked", "nothing", more) == "acked"
    for _ in range(20):
        if not isinstance(verdict, Release):
            break
        verdict, word = player.run(job), "retried"
    return verdict, word


def outcome(player: Player, identifier: uuid.UUID, verdict: Verdict, word: str, sin: str, more: bool) -> str:
    """`word`, or `dead`, or what became of the guarantee; the broker repeats the message once more."""
    assert not isinstance(verdict, Release), verdict
    stage, parts = player.stage, {"before"}
    parts |= ({"after"} if more else set()) | ({"elsewhere"} if sin == "another_engine" else set())
    settled = found(stage, identifier.bytes)
    again = player.run(player.consumer.job(message(str(identifier))))
    rows = found(stage, identifier.bytes)
    claims, dead = rows.pop("claim"), rows.pop("dead")
    if isinstance(verdict, Dead) and claims == dead == 1 and again == Ack(duplicate=True):
        return "dead"
    if parts - settled.keys():
        return "lost"
    if any(count > 1 for count in rows.values()):
        return "twice"
    assert (set(rows), claims, dead) == (parts, 1, 0)
    assert again == Ack(duplicate=True)
    return word


def plain(stage: Stage, sin: str, more: bool, strict: bool) -> str:
    identifier = uuid.uuid4()
    with Player(stage, strict=strict) as player:
        verdict, word = settle(player, identifier, sin, more)
        return outcome(player, identifier, verdict, word, sin, more)


def killed(stage: Stage, processes: ForkServerContext, sin: str, more: bool, kill: Kill, strict: bool) -> str:
    """The first delivery's process dies in the handler, and the message comes again, to another process."""
    identifier = uuid.uuid4()
    process = processes.Process(target=perish, args=(stage, str(identifier), sin, more, kill, strict))
    process.start()
    process.join()
    assert process.exitcode == -9
    with Player(stage, strict=strict) as player:
        again = sin if sin == "another_engine" else "nothing"
        verdict, _ = settle(player, identifier, again, more)
        return outcome(player, identifier, verdict, "retried", sin, more)


def play(stage: Stage, processes: ForkServerContext, sin: str, strict: bool = False) -> tuple[str, ...]:
    """The five cases of a row; two where killing would add nothing, because the driver has a twin."""
    row = (plain(stage, sin, False, strict), plain(stage, sin, True, strict))
    if stage.url.drivername in ("mysql+asyncmy", "sqlite+aiosqlite") or (
        stage.asynchronous and stage.url.drivername == "postgresql+psycopg"
    ):
        return row
    return (
        *row,
        killed(stage, processes, sin, False, "after the sin", strict),
        killed(stage, processes, sin, True, "after the sin", strict),
        killed(stage, processes, sin, True, "at the end", strict),
    )


A, R, D, LOST, TWICE = "acked", "retried", "dead", "lost", "twice"

#: What is neither refused nor undone. The cases: the sin alone, with more work after it; killed right after
#: it, the same with more work planned, killed after that work. docs/guard.md says what sees these.
KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    # Past SQLAlchemy: committed before anybody can look. A process that dies then leaves half of the work.
    "driver_text_commit": {
        "psycopg": (D, A, R, LOST, LOST),
        "psycopg-async": (D, A),
        "asyncpg": (D, D, R, LOST, R),
        "pymysql": (D, A, R, LOST, LOST),
        "asyncmy": (A, A),
        "sqlite": (D, D, R, LOST, LOST),
        "aiosqlite": (D, A),
    },
    # These connections are not Python objects that could be shadowed.
    "driver_commit": {"asyncpg": (D, A, R, LOST, LOST), "sqlite": (D, D, R, LOST, LOST)},
    "driver_autocommit": {"sqlite": (D, D, R, LOST, R), "aiosqlite": (D, D)},
    "driver_rollback": {"asyncpg": (R, LOST, R, R, R)},
    # What comes after it is in another transaction (asyncpg: in none), and the driver says that all is well.
    "driver_text_rollback": {
        "psycopg": (R, LOST, R, R, R),
        "psycopg-async": (R, LOST),
        "asyncpg": (R, TWICE, R, R, TWICE),
        "pymysql": (R, LOST, R, R, R),
        "asyncmy": (LOST, LOST),
        "aiosqlite": (R, LOST),
    },
    # Not in the transaction at all, or its very row.
    "another_engine": dict.fromkeys(DRIVERS, (A, A, TWICE, TWICE, TWICE)),
    "claim_deleted": dict.fromkeys(DRIVERS, (TWICE, TWICE, R, R, R)),
}

CASES = [
    pytest.param(driver, sin.name, id=f"{driver}-{sin.name}")
    for driver in DRIVERS
    for sin in SINS.values()
    if KINDS[driver] in sin.kinds
]


@pytest.mark.hazard("H2")
@pytest.mark.hazard("H3")
@pytest.mark.parametrize(("driver", "sin"), CASES)
def test_a_sin_is_undone_and_tried_again_or_becomes_a_dead_letter(
    driver: str, sin: str, stages: Stages, processes: ForkServerContext
) -> None:
    stage = stages(driver, False)
    first = A if stage.kind in SINS[sin].allowed else R
    row = play(stage, processes, sin)
    assert row == KNOWN.get(sin, {}).get(driver, (first, first, R, R, R))[: len(row)]


@pytest.mark.hazard("H28")
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "pymysql", "asyncmy"])
def test_a_swallowed_deadlock_is_not_acknowledged(
    driver: str, stages: Stages, processes: ForkServerContext
) -> None:
    row = play(stages(driver, False), processes, "deadlock_swallowed")
    assert set(row) == {R}


STRICT = [
    "nothing",
    "savepoint_in_text",
    "error_recovered_by_a_savepoint",
    "driver_rollback",
    "driver_text_rollback",
]


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("sin", STRICT)
@pytest.mark.parametrize("driver", DRIVERS)
def test_strict_sees_a_rollback_of_the_driver_that_is_followed_by_more_work(
    driver: str, sin: str, stages: Stages
) -> None:
    stage = stages(driver, False)
    first = A if stage.kind in SINS[sin].allowed else R
    # After its transaction, asyncpg commits every statement by itself: only a look before it could help.
    more = TWICE if (driver, sin) == ("asyncpg", "driver_text_rollback") else first
    assert (plain(stage, sin, False, True), plain(stage, sin, True, True)) == (first, more)


TRIGGER = [
    "nothing",
    "savepoint_in_text",
    "text_commit",
    "transaction_commit",
    "driver_commit",
    "driver_text_commit",
]


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("sin", TRIGGER)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg-async", "asyncpg"])
def test_with_the_strict_trigger_no_commit_of_the_handlers_succeeds(
    driver: str, sin: str, stages: Stages, processes: ForkServerContext
) -> None:
    stage = stages(driver, True)
    first = A if stage.kind in SINS[sin].allowed else R
    row, expected = play(stage, processes, sin), (first, first, R, R, R)
    if (driver, sin) == ("asyncpg", "driver_text_commit"):
        expected = (
            R,
            TWICE,
            R,
            R,
            TWICE,
        )  # the COMMIT is refused, and asyncpg commits what follows by itself
    assert row == expected[: len(row)]
