"""What people decide about effects, on real databases, while machines find out about them as well."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, select, text, update
from sqlalchemy.exc import DBAPIError

from idemq import doubt, migrate, schema
from idemq.doubt import Decision
from idemq.drivers import is_contention
from idemq.effect_rows import LOOK, SEND, EffectRows, Repeats
from idemq.effects import Effects, declare
from idemq.errors import NotSent, Refused, SetupError
from idemq.outbox import Outbox
from idemq.outgoing import IN_DOUBT, Row
from idemq.status import leaving
from tests.core_tools import Shop, on
from tests.servers import eventually
from tests.test_outgoing import QUEUE, TABLE, A, B, begun, plan, rows, send_sms
from tests.test_relay import Provider, plan_sms, scene_of

AUDIT = schema.table("idemq_audit")
BY_LOOK_UP = Repeats(settle=0.0)

DATABASES = on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))


def send_mail(payload: dict[str, str], key: str) -> None:
    raise AssertionError("nobody calls it here")


declare("mail", send_mail, repeat=None, key_lifetime=None, settle=0.0, retry=None, concurrency=1)


@pytest.fixture
def engine(shop: Shop) -> Iterator[Engine]:
    engine = shop.new_engine()
    assert isinstance(engine, Engine)
    with begun(engine) as connection:
        connection.execute(TABLE.delete())
    yield engine
    engine.dispose()


def effects_of(owner: bytes = A, repeats: Repeats | None = None) -> EffectRows:
    return EffectRows("sms", owner, None, repeats or Repeats())


def sending(engine: Engine, owner: bytes = A, repeats: Repeats | None = None) -> Row:
    """The first effect that is due, being sent."""
    with engine.connect() as connection:
        ((row, step),) = effects_of(owner, repeats).pick(connection, 1)
    assert step == SEND
    return row


def doubtful(engine: Engine) -> tuple[UUID, Row]:
    """An effect whose first attempt ended in doubt."""
    key = plan(engine)
    row = sending(engine)
    with engine.connect() as connection:
        assert effects_of().in_doubt(connection, row, TimeoutError("no answer"), 0.0)
    return key, row


def resolve(engine: Engine, key: UUID, decision: Decision, **seen: Any) -> bool:
    with begun(engine) as connection:
        return doubt.resolve(connection, key, decision, by="ann", why="asked the provider", **seen)


def seen(engine: Engine, key: UUID) -> doubt.Doubt | None:
    with engine.connect() as connection:
        return doubt.effect(connection, key)


def entries(engine: Engine) -> list[tuple[Any, ...]]:
    query = select(AUDIT.c.who, AUDIT.c.action, AUDIT.c.pk, AUDIT.c.reason, AUDIT.c.why)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(AUDIT.c.seq))]


# --- looking --------------------------------------------------------------------------------------------


@DATABASES
def test_what_is_in_doubt_or_failed_is_listed_and_nothing_else(engine: Engine) -> None:
    unclear, _ = doubtful(engine)
    refused = plan(engine)
    with engine.connect() as connection:
        assert effects_of().refused(connection, sending(engine), Refused("no such number"))
    plan(engine)
    sending(engine)
    plan(engine)
    with begun(engine) as connection:
        Outbox(connection).publish(QUEUE, b"a message")
        first, second = doubt.in_doubt(connection)
    assert (first.key, first.effect, first.state, first.attempts) == (unclear, "sms", "in doubt", 1)
    assert (second.key, second.state, second.first_sending_at is None) == (refused, "failed", False)
    assert first.planned_at <= first.last_at
    assert first.first_sending_at is not None
    assert (first.due, first.size, first.payload) == (None, len(b'{"to":"1"}'), None)
    assert "TimeoutError: no answer" in (first.error or "")


@DATABASES
def test_effects_are_chosen_by_name_state_age_and_number(engine: Engine) -> None:
    old, _ = doubtful(engine)
    new, _ = doubtful(engine)
    with begun(engine) as connection:
        mail = Effects(connection).plan(send_mail, {"to": "1"})
        changes = {"state": IN_DOUBT, "not_before": None}
        connection.execute(update(TABLE).where(TABLE.c.pk == mail.bytes).values(**changes))
        planned = TABLE.c.at
        for row in connection.execute(select(TABLE.c.seq, planned).where(TABLE.c.pk == old.bytes)).all():
            before = row.at - timedelta(days=8)
            connection.execute(update(TABLE).where(TABLE.c.seq == row.seq).values(at=before))

        def chosen(**which: Any) -> list[UUID]:
            return [each.key for each in doubt.in_doubt(connection, **which)]

        assert chosen() == [old, new, mail]
        assert chosen(effect="mail") == [mail]
        assert chosen(state="failed") == []
        assert chosen(state="in doubt", limit=2) == [old, new]
        assert chosen(older_than=timedelta(days=7)) == [old]
        assert chosen(effect="nothing") == []


@DATABASES
def test_one_effect_has_its_payload_in_every_state_and_is_found_by_its_beginning(engine: Engine) -> None:
    key = plan(engine)
    with engine.connect() as connection:
        found = doubt.effect(connection, key)
        assert found is not None
        assert (found.state, found.payload, found.due is not None) == ("waiting", b'{"to":"1"}', True)
        for prefix in (str(key), key.hex[:30], str(key)[:30].upper()):
            assert [each.key for each in doubt.find(connection, prefix)] == [key]
        assert doubt.find(connection, "ffffffff") == []
        assert doubt.effect(connection, uuid4()) is None
        with pytest.raises(SetupError, match="no id of an effect"):
            doubt.find(connection, "sms")
    sending(engine)
    again = seen(engine, key)
    assert again is not None
    assert (again.state, again.attempts) == ("sending", 1)


# --- deciding -------------------------------------------------------------------------------------------


@DATABASES
@pytest.mark.parametrize("decision", ["done", "failed"])
def test_what_is_done_or_given_up_is_gone_and_recorded(engine: Engine, decision: Decision) -> None:
    key, _ = doubtful(engine)
    assert resolve(engine, key, decision) is True
    assert rows(engine) == []
    assert entries(engine) == [("ann", decision, key.bytes, "sms", "asked the provider")]
    with engine.connect() as connection:
        ((at, *words),) = doubt.history(connection, key)
    assert at.tzinfo is not None
    assert words == ["ann", decision, "sms", "asked the provider"]
    assert resolve(engine, key, decision) is False
    assert len(entries(engine)) == 1


@DATABASES
def test_what_is_sent_again_has_the_same_key_and_payload_and_the_next_attempt(engine: Engine) -> None:
    key, row = doubtful(engine)
    assert resolve(engine, key, "resend") is True
    waiting = seen(engine, key)
    assert waiting is not None
    assert (waiting.state, waiting.attempts, waiting.first_sending_at) == ("waiting", 1, None)
    assert "no answer" in (waiting.error or "")
    again = sending(engine, B)
    assert (again.pk, again.message.body, again.attempts) == (row.pk, row.message.body, 2)
    with engine.connect() as connection:
        assert effects_of().done(connection, row) is False  # of the first attempt: too late
        assert effects_of(B).done(connection, again) is True


@DATABASES
@pytest.mark.hazard("H48")
def test_the_time_of_a_key_begins_anew_when_a_person_says_that_nothing_was_sent(engine: Engine) -> None:
    key, by_key = plan(engine), Repeats(key_lifetime=3600.0)
    row = sending(engine, A, by_key)
    with begun(engine) as connection:
        assert row.message.sent_at is not None
        long_ago = row.message.sent_at - timedelta(hours=2)
        connection.execute(update(TABLE).values(first_sending_at=long_ago))
    with engine.connect() as connection:
        assert effects_of(A, by_key).in_doubt(connection, row, TimeoutError(), 0.0)
        assert effects_of(A, by_key).pick(connection, 1) == []
    found = seen(engine, key)
    assert found is not None
    assert (found.state, found.due) == ("in doubt", None)
    assert resolve(engine, key, "resend") is True
    assert sending(engine, A, by_key).attempts == 2


@DATABASES
def test_what_was_refused_may_be_sent_again(engine: Engine) -> None:
    key = plan(engine)
    row = sending(engine)
    with engine.connect() as connection:
        assert effects_of().refused(connection, row, Refused("no credit"))
    assert resolve(engine, key, "resend", state="failed", attempts=1) is True
    assert sending(engine).attempts == 2


@DATABASES
def test_only_what_is_in_doubt_or_failed_is_decided(engine: Engine) -> None:
    key = plan(engine)
    with begun(engine) as connection:
        message = UUID(Outbox(connection).publish(QUEUE, b"a message"))
    decisions: tuple[Decision, ...] = ("done", "resend", "failed")
    for each in (key, message, uuid4()):
        assert [resolve(engine, each, decision) for decision in decisions] == [False] * 3
    sending(engine)
    before = rows(engine)
    assert [resolve(engine, key, decision) for decision in decisions] == [False] * 3
    assert rows(engine) == before
    assert entries(engine) == []


@DATABASES
@pytest.mark.hazard("H50")
def test_what_changed_since_it_was_seen_is_not_decided(engine: Engine) -> None:
    key, row = doubtful(engine)
    with engine.connect() as connection:
        assert effects_of().refused(connection, row, Refused("no")) is True
    assert resolve(engine, key, "done", state="in doubt", attempts=1) is False
    assert resolve(engine, key, "resend", state="failed", attempts=1) is True
    again = sending(engine)
    with engine.connect() as connection:
        assert effects_of().in_doubt(connection, again, TimeoutError(), 0.0)
    assert resolve(engine, key, "failed", state="in doubt", attempts=1) is False
    assert [action for _, action, *_ in entries(engine)] == ["resend"]
    assert resolve(engine, key, "failed", state="in doubt", attempts=2) is True


@DATABASES
@pytest.mark.hazard("H50")
def test_a_look_up_that_answers_after_the_decision_changes_nothing_but_done(engine: Engine) -> None:
    keys, look = [plan(engine) for _ in range(3)], effects_of(B, BY_LOOK_UP)
    for _ in keys:
        row = sending(engine, A, BY_LOOK_UP)
        with engine.connect() as connection:
            assert effects_of(A, BY_LOOK_UP).in_doubt(connection, row, TimeoutError(), 0.0)
    with engine.connect() as connection:
        picked = look.pick(connection, 3)
    assert [step for _, step in picked] == [LOOK] * 3
    looked = [row for row, _ in picked]
    for key in keys:
        assert resolve(engine, key, "resend", state="in doubt", attempts=1) is True
    with engine.connect() as connection:
        assert look.absent(connection, looked[0]) is False
        assert look.unknown(connection, looked[1], LookupError(), 60.0) is False
        assert look.done(connection, looked[2]) is True
    assert [UUID(bytes=row.pk) for row in rows(engine)] == keys[:2]
    assert [(step, row.attempts) for row, step in _picked(engine, 10)] == [(SEND, 2)] * 2


def _picked(engine: Engine, count: int) -> list[tuple[Row, str]]:
    with engine.connect() as connection:
        return [(row, step) for row, step in effects_of().pick(connection, count)]


@DATABASES
def test_a_decision_is_taken_back_with_its_transaction(engine: Engine) -> None:
    key, _ = doubtful(engine)
    before = rows(engine)
    with engine.connect() as connection:
        assert doubt.resolve(connection, key, "done", by="ann", why="x") is True
        connection.rollback()
    assert rows(engine) == before
    assert entries(engine) == []


@DATABASES
def test_who_and_why_must_be_said_and_a_decision_be_one(engine: Engine) -> None:
    key, _ = doubtful(engine)
    with engine.connect() as connection:
        for by, why, decision, words in (
            ("", "x", "done", "who does it"),
            ("ann", " ", "done", "say why"),
            ("ann", "\0", "resend", "say why"),
            ("ann", "x", "drop", "no decision"),
        ):
            with pytest.raises(SetupError, match=words):
                doubt.resolve(connection, key, decision, by=by, why=why)  # type: ignore[arg-type]  # "drop"
    assert len(rows(engine)) == 1
    assert entries(engine) == []


@DATABASES
def test_every_name_and_reason_can_be_recorded(engine: Engine) -> None:
    key, _ = doubtful(engine)
    name = "Überweisung\0" + "ß" * 100
    with begun(engine) as connection:
        connection.execute(update(TABLE).values(target=name.encode()))
        doubt.resolve(connection, key, "done", by="änn\0", why="\ud800 \U0001f4a9")
    ((who, _, _, reason, why),) = entries(engine)
    assert (who, why) == ("änn", "? \U0001f4a9")
    assert reason.startswith("\\xdcberweisung")
    assert len(reason) <= 40


@on(("postgres", "psycopg"), own=True)
def test_the_tables_may_be_in_a_schema_of_their_own(engine: Engine) -> None:
    other = "audited"
    with begun(engine) as connection:
        connection.execute(text(f"CREATE SCHEMA {other}"))
        migrate.upgrade(connection, other)
        key = Effects(connection, schema=other).plan(send_sms, {"to": "1"})
        table = schema.table("idemq_outgoing", other)
        connection.execute(update(table).values(state=IN_DOUBT, not_before=None))
    with begun(engine) as connection:
        assert doubt.in_doubt(connection) == []
        (found,) = doubt.in_doubt(connection, schema=other)
        assert [each.key for each in doubt.find(connection, str(key), schema=other)] == [found.key] == [key]
        assert [each.in_doubt for each in leaving(connection, schema=other)] == [1]
        assert not doubt.resolve(connection, key, "done", by="ann", why="x")
        assert doubt.resolve(connection, key, "done", by="ann", why="x", schema=other)
        assert doubt.effect(connection, key, schema=other) is None
        assert len(doubt.history(connection, key, schema=other)) == 1
        assert leaving(connection, schema=other, effects=["sms"])[0].declared


@on(("sqlite", "pysqlite"), ("sqlite", "aiosqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))
@pytest.mark.hazard("H47")
def test_what_a_person_sends_again_is_sent_by_the_relay_under_its_key(shop: Shop) -> None:
    provider = Provider(TimeoutError("no answer"), None)
    with scene_of(shop) as scene:
        key = UUID(plan_sms(scene, provider))
        with scene.relaying():
            eventually(lambda: [row.state for row in scene.rows()] == [IN_DOUBT])
            assert len(provider.calls) == 1
            assert resolve(scene.engine, key, "resend", state="in doubt", attempts=1)
            eventually(lambda: scene.rows() == [])
        assert not resolve(scene.engine, key, "resend")
    assert provider.calls == [({"to": "1"}, str(key))] * 2


# --- races ----------------------------------------------------------------------------------------------


def doubtful_many(engine: Engine, count: int) -> list[Row]:
    """Effects in doubt, as after the end of their leases, and what their late workers know them by."""
    with begun(engine) as connection:
        for _ in range(count):
            Effects(connection).plan(send_sms, {"to": "1"})
    with engine.connect() as connection:
        found = [row for row, _ in effects_of().pick(connection, count)]
    changes = {"state": IN_DOUBT, "owner": None, "lease_until": None, "not_before": None}
    with begun(engine) as connection:
        connection.execute(update(TABLE).values(**changes))
    assert len(found) == count
    return found


def late(connection: Connection, number: int, row: Row) -> tuple[str, bool]:
    """What a worker writes down that was frozen: the effect is done, refused, or was not sent."""
    effects = effects_of()
    steps: list[tuple[str, Callable[[], bool]]] = [
        ("done", lambda: effects.done(connection, row)),
        ("refused", lambda: effects.refused(connection, row, Refused("no"))),
        ("not sent", lambda: effects.not_sent(connection, row, NotSent("no route"), None)),
    ]
    action, step = steps[number % len(steps)]
    while True:
        try:
            return action, step()
        except DBAPIError as error:  # it waits for nobody, and comes again
            if not is_contention(error):
                raise


def person(decisions: tuple[Decision, ...]) -> Callable[[Connection, int, Row], tuple[str, bool]]:
    def decide(connection: Connection, number: int, row: Row) -> tuple[str, bool]:
        decision, key = decisions[number % len(decisions)], UUID(bytes=row.pk)
        with connection.begin():
            return decision, doubt.resolve(connection, key, decision, by="ann", why="x", attempts=1)

    return decide


def webhook(connection: Connection, number: int, row: Row) -> tuple[str, bool]:
    with connection.begin():
        return "confirm", Effects(connection).confirm(row.key)


CONTENDERS = {
    "first person": person(("done", "resend")),
    "second person": person(("failed", "done", "resend")),
    "webhook": webhook,
    "worker": late,
}


@pytest.mark.hazard("H50")
@pytest.mark.parametrize(
    ("shop", "races"),
    [
        (("sqlite", "pysqlite", False), 700),
        (("postgres", "psycopg", False), 200),
        (("mariadb", "pymysql", False), 100),
    ],
    indirect=["shop"],
    ids=["sqlite", "postgres", "mariadb"],
)
def test_two_people_a_webhook_and_a_late_worker_have_one_winner(engine: Engine, races: int) -> None:
    effects = doubtful_many(engine, races)
    won: dict[str, list[str | None]] = {name: [] for name in CONTENDERS}
    start = threading.Barrier(len(CONTENDERS), timeout=60)

    def contend(name: str) -> None:
        try:
            with engine.connect() as connection:
                for number, row in enumerate(effects):
                    start.wait()
                    action, mine = CONTENDERS[name](connection, number, row)
                    won[name].append(action if mine else None)
        except BaseException:
            start.abort()
            raise

    threads = [threading.Thread(target=contend, args=(name,)) for name in CONTENDERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(each) for each in won.values()} == {races}
    assert rows(engine) == []
    recorded = Counter((pk, action) for _, action, pk, *_ in entries(engine))
    decided: Counter[tuple[bytes, str]] = Counter()
    for number, row in enumerate(effects):
        people = [each for name in ("first person", "second person") if (each := won[name][number])]
        assert len(people) <= 1
        ended = [*people, won["webhook"][number], won["worker"][number]]
        assert sum(each in ("done", "failed", "confirm") for each in ended) == 1, ended
        decided.update((row.pk, each) for each in people)
    assert recorded == decided
