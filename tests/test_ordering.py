"""Per key in order: over retries, parked messages, two owners of a partition, frozen and dead workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import App, RetryLater, letters, parking, process
from idemq.embedded import Embedded
from idemq.errors import Reject, SetupError
from idemq.failures import RELEASED, WAITING, Outcome
from idemq.kafka import Kafka
from idemq.lanes import Item, Kept
from idemq.message import Dead, Message, Parked, Release, lane_of
from idemq.ordering import Keys
from idemq.rabbitmq import RabbitMQ
from tests.core_tools import NOWHERE, PROCESSED, REPEATED, Attempts, Shop, on, write

COUNTED = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("postgres", "asyncpg"), ("mariadb", "pymysql")]
SERVERS = COUNTED[1:]

#: What fails is parked, for a minute.
POLICY = Retrying(stop=stop_after_attempt(9), wait=wait_fixed(60))

BEHIND = Parked("behind", 0.0, "")
MINUTE = Parked("failed", 60.0, "ValueError: on purpose")


def keyed(id: str, key: str | None = "k", **values: Any) -> Message:
    """A message whose effect is its id."""
    return Message(id=id, body=id.encode(), key=key.encode() if key is not None else None, **values)


@dataclass
class Part:
    """A handler that does for some ids something else than its work."""

    acts: dict[str, Callable[[], None]] = field(default_factory=dict)

    def __call__(self, given: Message, session: Session) -> None:
        write(given, session)
        assert given.id is not None
        self.acts.get(given.id, lambda: None)()


def failing() -> None:
    raise ValueError("on purpose")


def rejecting() -> None:
    raise Reject("never")


def later() -> None:
    raise RetryLater(30)


def opened(shop: Shop, part: Part | None = None, **options: Any) -> Attempts:
    return shop.attempts(part or Part(), ordered=True, **{"retry": POLICY, **options})


def ordered_ids(shop: Shop) -> list[str]:
    """Which messages wait or are dead, in the order of their places."""
    return [str(row.body, "utf-8") for row in shop.dead()]


def drain(shop: Shop, *attempts: Attempts, rounds: int = 20) -> None:
    """Let time pass, and everybody run what is due, until nothing waits."""
    for _ in range(rounds):
        if not any(row.state == WAITING for row in shop.dead()):
            return
        shop.time_passes()
        for each in attempts:
            each.again(inline=True)
    raise AssertionError(f"it still waits: {ordered_ids(shop)}")


# ---- behind a parked message


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_what_follows_a_parked_message_of_its_key_is_parked_and_runs_after_it_in_order(shop: Shop) -> None:
    part = Part({"a1": failing})
    here, elsewhere = opened(shop, part), opened(shop, part)
    assert here(keyed("a1")) == MINUTE
    assert [here(keyed("a2")), elsewhere(keyed("a3")), here(keyed("a4"))] == [BEHIND] * 3
    assert here(keyed("b1", "other")) == PROCESSED
    assert shop.effects() == ["b1"]
    assert elsewhere.again() == []  # what is behind is due, but not its turn
    part.acts.clear()
    shop.time_passes()
    assert [job.message.id for job in here.look()] == ["a1"]  # one at a time
    assert elsewhere.again() == []
    shop.time_passes()
    drain(shop, elsewhere, here)
    assert shop.effects() == ["b1", "a1", "a2", "a3", "a4"]
    assert here(keyed("a5")) == PROCESSED
    assert [here(keyed(id)) for id in ("a1", "a3")] == [REPEATED, REPEATED]
    assert (shop.dead(), shop.claims()) == ([], 6)


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_what_runs_behind_a_parked_message_may_fail_and_park_as_well(shop: Shop) -> None:
    part = Part({"a1": failing, "a2": failing, "a3": later})
    attempts = opened(shop, part)
    for number in range(1, 6):
        attempts(keyed(f"a{number}"))
    del part.acts["a1"]
    shop.time_passes()
    assert attempts.again() == [PROCESSED]
    assert attempts.again() == [MINUTE]
    assert attempts.again() == []
    assert ordered_ids(shop) == ["a2", "a3", "a4", "a5"]
    del part.acts["a2"]
    shop.time_passes()
    assert attempts.again() == [PROCESSED]
    assert attempts.again() == [Parked("later", 30, "RetryLater: again in 30 s")]
    assert attempts.again() == []
    part.acts.clear()
    drain(shop, attempts)
    assert shop.effects() == ["a1", "a2", "a3", "a4", "a5"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_what_follows_a_suspect_of_its_key_waits_for_it(shop: Shop) -> None:
    attempts = opened(shop)
    suspect = attempts.consumer.suspect(keyed("a1"))
    assert attempts(suspect) == Parked("suspect", 0.0)
    assert attempts(keyed("a2")) == BEHIND
    assert attempts(attempts.consumer.suspect(keyed("a3"))) == Parked("suspect", 0.0)
    assert attempts.again() == []
    assert attempts.again(alone=True) == [PROCESSED]
    assert attempts.again(alone=True) == []
    assert attempts.again() == [PROCESSED]
    assert attempts.again(alone=True) == [PROCESSED]
    assert shop.effects() == ["a1", "a2", "a3"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_a_dead_letter_opens_the_way_for_what_follows(shop: Shop) -> None:
    part = Part({"a1": failing, "a3": rejecting})
    attempts = opened(shop, part)
    for number in (1, 2, 3, 4):
        attempts(keyed(f"a{number}"))
    part.acts["a1"] = rejecting
    drain(shop, attempts)
    assert shop.effects() == ["a2", "a4"]
    assert attempts(keyed("a5")) == PROCESSED
    assert [(row.reason, row.body) for row in shop.dead()] == [("rejected", b"a1"), ("rejected", b"a3")]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_with_hold_dead_a_dead_letter_holds_its_key_until_it_is_retried_or_dropped(shop: Shop) -> None:
    part = Part({"a1": rejecting, "a3": rejecting})
    attempts = opened(shop, part, hold_dead=True)
    assert attempts(keyed("a1")) == Dead("rejected")
    assert [attempts(keyed(f"a{number}")) for number in (2, 3, 4)] == [BEHIND] * 3
    assert attempts(keyed("b1", "other")) == PROCESSED
    assert attempts.again() == []
    del part.acts["a1"]
    with shop.engine.begin() as connection:
        assert letters.retry(connection, by="a test") == 1
    assert [attempts.again() for _ in range(4)] == [[PROCESSED], [PROCESSED], [Dead("rejected")], []]
    assert attempts(keyed("a5")) == BEHIND
    with shop.engine.begin() as connection:
        assert letters.drop(connection, by="a test", why="it is wrong") == 1
    drain(shop, attempts)
    assert shop.effects() == ["b1", "a1", "a2", "a4", "a5"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_with_hold_dead_what_cannot_be_judged_holds_its_key_as_well(shop: Shop) -> None:
    attempts = opened(shop, hold_dead=True)
    assert attempts(replace(keyed("a1"), id=None)) == Dead("no id")
    assert attempts(replace(keyed("b1", "b"), unreadable="torn")) == Dead("unreadable")
    assert [attempts(keyed("a2")), attempts(keyed("b2", "b"))] == [BEHIND, BEHIND]
    with shop.engine.begin() as connection:
        assert letters.drop(connection, by="a test", why="nobody knows what it was") == 2
    drain(shop, attempts)
    assert shop.effects() == ["a2", "b2"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_too_many_behind_a_parked_message_stay_with_the_broker(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "MOST_BEHIND", 3)
    monkeypatch.setattr(process, "MOST_BEHIND", 3)
    part = Part({"a1": failing})
    attempts = opened(shop, part)
    attempts(keyed("a1"))
    assert [attempts(keyed("a2")), attempts(keyed("a3"))] == [BEHIND, BEHIND]
    kept = attempts(keyed("a4"))
    assert isinstance(kept, Release)
    assert not any((kept.failed, kept.outage, kept.stop))
    assert attempts(keyed("b1", "other")) == PROCESSED
    assert shop.claims() == 4
    part.acts.clear()
    drain(shop, attempts)
    assert attempts(keyed("a4")) == PROCESSED
    assert shop.effects() == ["b1", "a1", "a2", "a3", "a4"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_a_dead_letter_that_is_retried_by_hand_holds_what_comes_after_it(shop: Shop) -> None:
    part = Part({"a1": rejecting})
    attempts = opened(shop, part)
    assert [attempts(keyed("a1")), attempts(keyed("a2"))] == [Dead("rejected"), PROCESSED]
    part.acts["a1"] = failing
    with shop.engine.begin() as connection:
        letters.retry(connection, by="a test")
    assert attempts(keyed("a3")) == BEHIND
    assert attempts.again() == [MINUTE]
    assert attempts.again() == []
    part.acts.clear()
    drain(shop, attempts)
    assert shop.effects() == ["a2", "a1", "a3"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_an_id_that_comes_again_is_absorbed_and_a_conflict_opens_its_key(shop: Shop) -> None:
    part = Part({"a1": failing})
    attempts = opened(shop, part)
    attempts(keyed("a1"))
    attempts(keyed("a2"))
    assert [attempts(keyed("a1")), attempts(keyed("a2"))] == [REPEATED, REPEATED]
    assert attempts(replace(keyed("a2"), body=b"another")) == Dead("conflict")
    part.acts.clear()
    drain(shop, attempts)
    assert attempts(keyed("a3")) == PROCESSED
    assert shop.effects() == ["a1", "a2", "a3"]


@pytest.mark.hazard("H35")
@on(*COUNTED)
def test_messages_without_a_key_are_in_order_with_each_other(shop: Shop) -> None:
    part = Part({"a1": failing})
    attempts = opened(shop, part)
    origins = {"topic": "t", "partition": 0}
    attempts(keyed("a1", None, origin=origins))
    assert attempts(keyed("a2", None, origin=origins)) == BEHIND
    assert attempts(keyed("b1", None, origin={"topic": "t", "partition": 1})) == PROCESSED
    assert attempts(keyed("c1", "c", origin=origins)) == PROCESSED


# ---- two owners


@contextmanager
def meanwhile(attempts: Attempts, statement: str, do: Callable[[], object]) -> Iterator[list[object]]:
    """`do`, from another thread, right before these attempts send `statement` for the first time."""
    engine = attempts.engine
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    done: list[object] = []

    def before(_conn: Any, _cursor: Any, sql: str, *_more: object) -> None:
        if not done and sql.startswith(statement):
            done.append(None)
            with ThreadPoolExecutor(1) as pool:
                done[0] = pool.submit(do).result(60)

    event.listen(sync, "before_cursor_execute", before)
    try:
        yield done
    finally:
        event.remove(sync, "before_cursor_execute", before)
    assert done, f"nobody sent {statement}"


def kept_too_long(attempts: Attempts, given: Message) -> object:
    """What a worker does with a message whose twin stays in flight."""
    job = attempts.consumer.job(given)
    verdict = attempts(job)
    assert isinstance(verdict, Release)
    assert verdict.twin
    job.outcome = Outcome(RELEASED, None, 10.0, verdict.cause)
    return attempts(job)


@pytest.mark.hazard("H34")
@pytest.mark.parametrize("end", ["parks", "fails for good", "done"])
@pytest.mark.parametrize("step", ["INSERT INTO effects", "INSERT INTO idemq_failed"])
@on(("postgres", "psycopg"), ("postgres", "asyncpg"))
def test_a_worker_that_freezes_while_it_has_a_message_does_not_change_its_place(
    shop: Shop, step: str, end: str
) -> None:
    """Also when it freezes right before it writes the row: the next owner has written one meanwhile."""
    part = Part({"done": {}, "parks": {"a1": failing}}.get(end, {"a1": rejecting}))
    if end == "done" and step != "INSERT INTO effects":
        pytest.skip("what is done is not parked")
    frozen, owner = opened(shop, part, wait=1.0), opened(shop, part, wait=1.0)

    def goes_on() -> object:
        return kept_too_long(owner, keyed("a1")), owner(keyed("a2")), owner(keyed("a3"))

    with meanwhile(frozen, step, goes_on) as done:
        verdict = frozen(keyed("a1"))
    assert verdict == {"parks": MINUTE, "fails for good": Dead("rejected"), "done": PROCESSED}[end]
    assert done == [(Parked("released", 10.0, "its twin is still in flight"), BEHIND, BEHIND)]
    assert [frozen(keyed(f"a{number}")) for number in (2, 3)] == [REPEATED, REPEATED]
    assert frozen(keyed("a4")) == BEHIND
    if end == "parks":  # and fails once more, whoever runs it
        shop.time_passes()
        for _ in range(3):
            owner.again()
            shop.time_passes()
        assert shop.effects() == []
    part.acts.clear()
    drain(shop, owner, frozen)
    first = [] if end == "fails for good" else ["a1"]
    assert shop.effects() == [*first, "a2", "a3", "a4"]
    assert shop.claims() == 4


@pytest.mark.hazard("H34")
@on(("postgres", "psycopg"))
def test_with_hold_dead_a_dead_letter_of_a_frozen_worker_holds_what_the_next_owner_parked(shop: Shop) -> None:
    part = Part({"a1": rejecting})
    frozen, owner = opened(shop, part, wait=1.0, hold_dead=True), opened(shop, part, wait=1.0, hold_dead=True)

    def goes_on() -> object:
        return kept_too_long(owner, keyed("a1")), owner(keyed("a2"))

    with meanwhile(frozen, "INSERT INTO idemq_failed", goes_on):
        assert frozen(keyed("a1")) == Dead("rejected")
    for _ in range(3):
        shop.time_passes()
        owner.again()
    assert shop.effects() == []
    part.acts.clear()
    with shop.engine.begin() as connection:
        assert letters.retry(connection, by="a test") == 1
    drain(shop, owner)
    assert shop.effects() == ["a1", "a2"]


@pytest.mark.hazard("H34")
@on(*SERVERS)
def test_a_copy_that_waited_for_a_retry_in_flight_leaves_the_message_its_place(shop: Shop) -> None:
    part = Part({"a1": failing})
    here, owner = opened(shop, part, wait=1.0), opened(shop, part, wait=1.0)
    assert [here(keyed("a1")), here(keyed("a2"))] == [MINUTE, BEHIND]
    # As after a claim that waited for the retry: parked without the claim, at the end of its key.
    copy = owner.consumer.job(keyed("a1"))
    copy.outcome = Outcome(RELEASED, None, 10.0)
    owner(copy)
    for _ in range(3):
        shop.time_passes()
        owner.again()
    assert shop.effects() == []
    part.acts.clear()
    drain(shop, here)
    assert shop.effects() == ["a1", "a2"]


@pytest.mark.hazard("H34")
@on(*COUNTED)
def test_a_worker_that_froze_between_two_messages_does_nothing_anew(shop: Shop) -> None:
    part = Part({"a3": failing})
    frozen, owner = opened(shop, part), opened(shop, part)
    assert frozen(keyed("a1")) == PROCESSED
    assert owner(keyed("a1")) == REPEATED
    assert [owner(keyed(f"a{number}")) for number in (2, 3, 4)] == [PROCESSED, MINUTE, BEHIND]
    assert [frozen(keyed(f"a{number}")) for number in (2, 3, 4, 5)] == [REPEATED, REPEATED, REPEATED, BEHIND]
    assert owner(keyed("a5")) == REPEATED
    part.acts.clear()
    shop.time_passes()
    assert frozen.again() == [PROCESSED]
    assert owner(keyed("a6")) == BEHIND
    drain(shop, owner)
    assert shop.effects() == [f"a{number}" for number in range(1, 7)]


@pytest.mark.hazard("H34")
@on(*COUNTED)
def test_a_row_that_was_picked_too_early_goes_back_to_its_place(shop: Shop) -> None:
    """Whoever picks: what runs is looked at once more in its own transaction."""
    part = Part({"a1": rejecting})
    attempts = opened(shop, part)
    suspect = attempts.consumer.suspect(keyed("a2"))
    assert [attempts(keyed("a1")), attempts(suspect)] == [Dead("rejected"), Parked("suspect", 0.0)]
    (picked,) = attempts.look(alone=True)
    part.acts["a1"] = failing
    with shop.engine.begin() as connection:
        letters.retry(connection, by="a test")
    assert attempts.again() == [MINUTE]
    assert attempts(picked) == BEHIND
    assert [row.starts for row in shop.dead()] == [0, 1]  # still a suspect
    assert attempts.again(inline=True) == []
    part.acts.clear()
    drain(shop, attempts)
    assert shop.effects() == ["a1", "a2"]


# ---- in one process, and at the declaration


def keys(*numbers: int) -> list[Item]:
    """Items of the key that is the number's last digit."""
    return [Item(Kept(Message(id=f"{number}", body=b"", key=b"%d" % (number % 10)))) for number in numbers]


def test_keys_let_one_item_of_a_key_begin_and_the_next_when_it_is_settled() -> None:
    lane = Keys(lambda message: lane_of(message, message.key))
    items = keys(1, 11, 2, 21, 12)
    assert lane.admit(items) == [items[0], items[2]]
    assert lane.settled(items[0]) == [items[1]]
    assert lane.settled(items[0]) == []  # once only
    assert lane.clear() == [items[3], items[4]]
    assert (lane.settled(items[1]), lane.settled(items[2])) == ([], [])
    again = keys(1, 11)
    assert lane.admit(again) == [again[0]]


def test_what_is_not_ordered_waits_for_nothing() -> None:
    lane, items = Keys(None), keys(1, 11)
    assert lane.admit(items) == items
    assert lane.settled(items[0]) == lane.clear() == []


@pytest.mark.hazard("H35")
@pytest.mark.parametrize(
    "rule", ["shop-key", lambda message: message.headers["shop-key"]], ids=["header", "function"]
)
@on(("sqlite", "pysqlite"))
def test_the_key_may_be_a_header_or_what_a_function_says(shop: Shop, rule: Any) -> None:
    part = Part({"a1": failing})
    attempts = opened(shop, part, key=rule)
    assert attempts(keyed("a1", headers={"shop-key": "a"})) == MINUTE
    assert attempts(keyed("a2", headers={"shop-key": "a"})) == BEHIND
    assert attempts(keyed("b1", headers={"shop-key": b"b"})) == PROCESSED
    assert attempts(keyed("c1", headers={"shop-key": 7})) == PROCESSED


@pytest.mark.hazard("H35")
@on(("sqlite", "pysqlite"))
def test_the_key_is_told_once_for_the_process_and_for_the_table(shop: Shop) -> None:
    """Of the message as it was delivered, also where the id comes from somewhere else."""
    attempts = opened(shop, id="shop-id", key=lambda message: message.id)
    given = Message(id="of the broker", body=b"a1", headers={"shop-id": "a1"})
    assert attempts.consumer.job(given).lane == attempts.consumer.lane(given)


@pytest.mark.hazard("H35")
def test_a_source_without_an_order_is_refused_and_so_is_a_wrong_rule(tmp_path: Path) -> None:
    def handler(message: Message) -> None: ...

    app, rabbit = App(f"sqlite:///{tmp_path / 'shop.db'}"), RabbitMQ("amqp://localhost")
    embedded = Embedded(str(tmp_path / "broker.db"))
    unordered = ((embedded.queue("q"), "ordered=True"), (rabbit.queue("q"), "x-single-active-consumer"))
    for source, remedy in unordered:
        with pytest.raises(SetupError, match=remedy):
            app.consumer("a", source, ordered=True)(handler)
    with pytest.raises(SetupError, match="key="):
        app.consumer("a", NOWHERE, ordered=True, key=3)(handler)  # type: ignore[arg-type]  # what it refuses
    single = rabbit.queue("q", arguments={"x-single-active-consumer": True})
    app.consumer("a", single, ordered=True)(handler)
    app.consumer("b", Kafka("localhost").topic("t", group="g"), ordered=True)(handler)
