from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from idemq import embedded_consumer, embedded_file
from idemq.broker import Delivery
from idemq.embedded import Embedded
from idemq.errors import BrokerUnavailable, SetupError
from idemq.message import Message
from tests.attacked import freeze
from tests.contract.brokers import EmbeddedBroker, spec
from tests.contract.inbox import Inbox, ack, consuming, ids
from tests.servers import eventually


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Embedded]:
    with closing(Embedded(tmp_path / "broker.db")) as embedded:
        embedded.declare("q")
        yield embedded


def fill(broker: Embedded, count: int) -> list[str]:
    names = [f"m{n}" for n in range(count)]
    broker.publish_many("q", [Message(body=b"{}", id=name) for name in names])
    return names


@contextmanager
def raw(broker: Embedded) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(broker.path, isolation_level=None)) as connection:
        yield connection


@contextmanager
def write_lock(broker: Embedded) -> Iterator[None]:
    with raw(broker) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code`, killed at the end."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def holder(broker: Embedded, count: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `count` deliveries and settles none."""
    text = spec(EmbeddedBroker(str(broker.path), "q"))
    command = [sys.executable, "-m", "tests.contract.child", text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            lines(child, count)
            yield child
        finally:
            child.kill()


def rest(child: subprocess.Popen[str]) -> list[str]:
    # Not `communicate`, which would miss what `readline` has buffered.
    assert child.stdout is not None
    return child.stdout.read().split()


def lines(child: subprocess.Popen[str], count: int) -> list[str]:
    assert child.stdout is not None
    return [child.stdout.readline().strip() for _ in range(count)]


def test_depth_counts_ready_and_unacknowledged(broker: Embedded) -> None:
    fill(broker, 5)
    assert broker.depth("q") == (5, 0)
    with consuming(broker.queue("q"), prefetch=3) as (inbox, _):
        deliveries = inbox.take(3)
        assert broker.depth("q") == (2, 3)
        ack(deliveries)
        inbox.take(2)
        assert broker.depth("q") == (0, 2)
    assert broker.depth("q") == (2, 0)


def test_what_was_published_is_what_comes(broker: Embedded) -> None:
    sent_at = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    odd = "ü \ud800 \x00"
    broker.publish(
        "q", b"1", id=odd, headers={"a": [1, None, odd]}, content_type="text/plain", sent_at=sent_at
    )
    with consuming(broker.queue("q")) as (inbox, _):
        (delivery,) = inbox.take()
        origin = {"broker": "embedded", "queue": "q"}
        assert delivery.message == Message(
            body=b"1",
            id=odd,
            headers={"a": [1, None, odd]},
            content_type="text/plain",
            sent_at=sent_at,
            origin=origin,
        )


def test_a_message_is_dated_now_unless_the_publisher_says_otherwise(broker: Embedded) -> None:
    before = datetime.now(UTC)
    broker.publish("q", b"{}")
    with consuming(broker.queue("q")) as (inbox, _):
        (delivery,) = inbox.take()
    assert delivery.message.sent_at is not None
    assert before - timedelta(seconds=1) <= delivery.message.sent_at <= datetime.now(UTC)


@pytest.mark.parametrize(
    "bad",
    [
        Message(body=None),
        Message(body=b"", headers={"raw": b"bytes"}),
        Message(body=b"", headers={"n": float("nan")}),
        Message(body=b"", sent_at=datetime(2026, 1, 1)),
    ],
    ids=["no body", "bytes header", "nan header", "time without zone"],
)
def test_a_batch_with_a_message_that_cannot_be_kept_is_not_published(broker: Embedded, bad: Message) -> None:
    with pytest.raises((TypeError, ValueError)):
        broker.publish_many("q", [Message(body=b"good"), bad])
    assert broker.depth("q") == (0, 0)


def test_it_delivers_in_no_order_because_consumers_share_a_queue_out(broker: Embedded) -> None:
    with pytest.raises(SetupError, match=r"queue 'q' in .* Kafka topic or .*x-single-active-consumer"):
        broker.queue("q").orders()


@pytest.mark.parametrize("body", [7, [1, 2], True, "text", None])
def test_a_body_that_is_not_bytes_is_refused(broker: Embedded, body: Any) -> None:
    with pytest.raises(TypeError, match=f"body .* bytes, not {type(body).__name__}"):
        broker.publish("q", body)
    assert broker.depth("q") == (0, 0)


def test_a_body_may_be_any_kind_of_bytes(broker: Embedded) -> None:
    bodies: list[Any] = [b"x", bytearray(b"x"), memoryview(b"x")]
    for body in bodies:
        broker.publish("q", body)
    assert broker.depth("q") == (3, 0)


def test_queues_whose_names_differ_only_in_case_or_accents_are_different(broker: Embedded) -> None:
    names = ["abc", "ABC", "abc ", "ábc"]
    for name in names:
        broker.declare(name)
        broker.publish(name, name.encode())
    for name in names:
        with consuming(broker.queue(name)) as (inbox, _):
            (delivery,) = inbox.take()
            assert delivery.message.body == name.encode()


def test_publishing_to_a_missing_queue_or_file_is_an_error_that_names_it(
    broker: Embedded, tmp_path: Path
) -> None:
    with pytest.raises(SetupError, match=r"no queue 'other'.*declare=True"):
        broker.publish("other", b"{}")
    with pytest.raises(SetupError, match=r"no embedded broker at .*absent"):
        Embedded(tmp_path / "absent").publish("q", b"{}")
    assert not (tmp_path / "absent").exists()
    with pytest.raises(SetupError, match=r"directory .*nowhere"):
        Embedded(tmp_path / "nowhere" / "broker.db").declare("q")


def test_names_are_short_texts(broker: Embedded) -> None:
    for attempt in (
        lambda: Embedded("x.db", name=""),
        lambda: broker.queue(""),
        lambda: broker.declare("ü" * 128),
    ):
        with pytest.raises(SetupError, match="1 to 255 bytes"):
            attempt()


@pytest.mark.parametrize("path", ["", ":memory:", "file:x?mode=memory"])
def test_a_path_that_processes_cannot_share_is_refused(path: str) -> None:
    with pytest.raises(SetupError, match="path of a file"):
        Embedded(path)


def test_the_database_of_an_application_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE receipts (id)")
    before = path.read_bytes()
    embedded = Embedded(path)
    for attempt in (
        lambda: embedded.declare("q"),
        lambda: embedded.publish("q", b""),
        lambda: embedded.depth("q"),
        lambda: embedded.queue("q", declare=True).check(),
    ):
        with pytest.raises(SetupError, match=r"another SQLite database.*'receipts'.*file of its own"):
            attempt()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_broker_file_that_an_application_has_put_its_tables_into_is_refused(broker: Embedded) -> None:
    with raw(broker) as connection:
        connection.execute("CREATE TABLE idemq_processed (id)")
    with pytest.raises(SetupError, match="'idemq_processed'"):
        broker.queue("q").check()


def test_a_file_that_is_no_database_a_directory_and_another_shape_are_refused(
    broker: Embedded, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("some text that is long enough to be read as a header of SQLite" * 9)
    with pytest.raises(SetupError, match="not the file of an embedded broker"):
        Embedded(tmp_path / "text").declare("q")
    with pytest.raises(SetupError, match="is a directory"):
        Embedded(tmp_path).declare("q")
    with raw(broker) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(SetupError, match="another version"):
        broker.queue("q").check()


def test_publishes_are_synced_to_the_disk_and_settles_need_not_be(broker: Embedded) -> None:
    def setting(connection: embedded_file.Connection) -> tuple[object, ...]:
        with closing(connection):
            return tuple(
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
            )

    assert setting(embedded_file.connect(broker.path)) == (b"wal", 2)
    assert setting(broker.queue("q").connect()) == (b"wal", 1)


def test_many_processes_make_the_same_file_at_once(tmp_path: Path) -> None:
    code = """
import sys
from idemq.embedded import Embedded
embedded = Embedded(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
embedded.declare("q")
embedded.publish("q", b"{}")
embedded.close()
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "broker.db")]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    for child in children:
        lines(child, 1)
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
        assert child.returncode == 0
    with closing(Embedded(tmp_path / "broker.db")) as embedded:
        assert embedded.depth("q") == (6, 0)


@pytest.mark.hazard("H40")
def test_four_processes_publish_and_consume_ten_thousand_messages_each_once(broker: Embedded) -> None:
    code = """
import queue, sys, threading
from idemq.embedded import Embedded
from idemq.message import Message
path, me = sys.argv[1], sys.argv[2]
embedded, arrived = Embedded(path), queue.SimpleQueue()
subscription = embedded.queue("q").subscribe("c", lambda many: [arrived.put(d) for d in many], 20)
def publish():
    for n in range(0, 2500, 25):
        embedded.publish_many("q", [Message(body=b"{}", id=f"{me}-{i}") for i in range(n, n + 25)])
publisher = threading.Thread(target=publish)
publisher.start()
seen = []
while publisher.is_alive() or sum(embedded.depth("q")):
    try:
        delivery = arrived.get(timeout=0.05)
    except queue.Empty:
        continue
    assert delivery.start() and not delivery.message.redelivered
    seen.append(delivery.message.id)
    delivery.ack()
subscription.close(10)
embedded.close()
print(" ".join(seen))
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(broker.path), str(n)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    seen: list[str] = []
    for child in children:
        out, error = child.communicate()
        assert (child.returncode, error) == (0, "")
        seen += out.split()
    assert sorted(seen) == sorted(f"{n}-{i}" for n in range(4) for i in range(2500))
    assert broker.depth("q") == (0, 0)


@pytest.mark.hazard("H4")
def test_nothing_is_lost_while_consumers_are_killed(broker: Embedded) -> None:
    code = """
import queue, sys
from idemq.embedded import Embedded
arrived = queue.SimpleQueue()
source = Embedded(sys.argv[1]).queue("q")
subscription = source.subscribe("c", lambda many: [arrived.put(d) for d in many], 10)
print("started", flush=True)
while True:
    delivery = arrived.get()
    if delivery.start():
        print(delivery.message.id, flush=True)
        delivery.ack()
"""
    published: set[str] = set()
    seen: set[str] = set()
    for round in range(5):
        fresh = [f"{round}-{n}" for n in range(300)]
        with process(code, broker.path) as killed:
            broker.publish_many("q", [Message(body=b"{}", id=name) for name in fresh])
            published.update(fresh)
            seen.update(lines(killed, 50))
            with process(code, broker.path) as other:
                lines(other, 1)
                killed.kill()
                seen.update(rest(killed))
                other.kill()
                seen.update(rest(other))
    with consuming(broker.queue("q")) as (inbox, _):
        while broker.depth("q") != (0, 0) or not inbox.empty:
            deliveries = inbox.take()
            seen.update(ids(deliveries))
            ack(deliveries)
            eventually(lambda: not inbox.empty or broker.depth("q") == (0, 0))
    assert seen - {"started"} == published


def test_what_a_killed_process_held_is_taken_over_by_a_running_consumer(broker: Embedded) -> None:
    names = fill(broker, 5)
    with holder(broker, 5) as child, consuming(broker.queue("q")) as (inbox, _):
        assert inbox.quiet()
        child.kill()
        again = inbox.take(5)
        assert ids(again) == names
        assert all(delivery.message.redelivered for delivery in again)
    owners = embedded_file.owners(broker.path)
    assert [path.name for path in owners.iterdir()] == ["setup"]


def test_a_stopped_process_keeps_what_it_holds(broker: Embedded) -> None:
    fill(broker, 5)
    with holder(broker, 5) as child, consuming(broker.queue("q")) as (inbox, _):
        freeze(child.pid)
        assert inbox.quiet(1)
        child.kill()
        assert len(inbox.take(5)) == 5


@pytest.mark.hazard("H53")
def test_a_child_forked_by_a_consumer_does_not_keep_it_alive(broker: Embedded) -> None:
    code = """
import os, sys, threading, warnings
from idemq.embedded import Embedded
warnings.simplefilter("ignore")
arrived = threading.Event()
subscription = Embedded(sys.argv[1]).queue("q").subscribe("c", lambda many: arrived.set(), 10)
arrived.wait()
child = os.fork()
if child:
    print(child, flush=True)
threading.Event().wait()
"""
    names = fill(broker, 3)
    with process(code, broker.path) as parent:
        (child,) = map(int, lines(parent, 1))
        try:
            with consuming(broker.queue("q")) as (inbox, _):
                assert inbox.quiet()
                parent.kill()
                assert ids(inbox.take(3)) == names
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.hazard("H53")
def test_a_process_forked_while_the_file_was_open_is_refused_it(broker: Embedded) -> None:
    code = """
import os, sys, threading, warnings
from idemq.embedded import Embedded
from idemq.errors import SetupError
warnings.simplefilter("ignore")
embedded, held, arrived = Embedded(sys.argv[1]), [], threading.Event()
embedded.publish("q", b"{}")
subscription = embedded.queue("q").subscribe("c", lambda many: (held.extend(many), arrived.set()), 10)
arrived.wait()

def refused(work):
    try:
        work()
    except SetupError as error:
        return True
    return False

child = os.fork()
if not child:
    new = Embedded(sys.argv[1])
    held[0].ack()
    good = not held[0].start() and not subscription.connected and all(map(refused, [
        lambda: embedded.publish("q", b""), lambda: embedded.depth("q"), lambda: new.publish("q", b""),
        lambda: new.declare("q"), lambda: new.queue("q").check(), lambda: subscription.close(1),
    ]))
    embedded.close()  # without effect: the connection is the parent's
    os._exit(0 if good else 1)
assert os.waitpid(child, 0)[1] == 0
assert held[0].start()
held[0].ack()
subscription.close(10)
assert embedded.depth("q") == (0, 0)
embedded.close()
child = os.fork()
if not child:
    embedded.publish("q", b"{}")
    embedded.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert embedded.depth("q") == (1, 0)
embedded.close()
"""
    with process(code, broker.path) as child:
        _, error = child.communicate()
        assert (child.returncode, error) == (0, "")


def test_consumers_of_one_process_take_nothing_from_each_other_until_one_closes(broker: Embedded) -> None:
    names = fill(broker, 3)
    with consuming(broker.queue("q")) as (first, subscription):
        held = first.take(3)
        with consuming(broker.queue("q")) as (second, _):
            assert second.quiet()
            ack(held[:1])
            subscription.close(10)
            again = second.take(2)
            assert ids(again) == names[1:]
            ack(held[1:] if held[1].start() else [])
            assert broker.depth("q") == (0, 2)


def test_a_publish_wakes_the_consumers_of_its_process(
    broker: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_consumer, "POLL", (600.0, 600.0))
    with consuming(broker.queue("q")) as (inbox, subscription):
        eventually(lambda: subscription.connected)
        for n in range(20):
            broker.publish("q", b"{}", id=str(n))
            ack(inbox.take())


def test_an_idle_consumer_writes_nothing(broker: Embedded) -> None:
    with consuming(broker.queue("q")) as (inbox, subscription), raw(broker) as connection:
        eventually(lambda: subscription.connected)
        before = connection.execute("PRAGMA data_version").fetchone()
        assert inbox.quiet(1)
        assert connection.execute("PRAGMA data_version").fetchone() == before


def test_ack_waits_for_no_lock_and_arrives_when_the_file_is_free(broker: Embedded) -> None:
    fill(broker, 3)
    with consuming(broker.queue("q")) as (inbox, _):
        deliveries = inbox.take(3)
        with write_lock(broker):
            ack(deliveries)  # would not return before the lock is free
        eventually(lambda: broker.depth("q") == (0, 0))


def test_a_file_that_cannot_be_written_is_tried_again_and_nothing_is_given_up(
    broker: Embedded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded_file, "BUSY", 0.05)
    monkeypatch.setattr(embedded_consumer, "RETRY", 0.05)
    broker.close()
    fill(broker, 3)
    with caplog.at_level(logging.WARNING), consuming(broker.queue("q"), prefetch=2) as (inbox, subscription):
        deliveries = inbox.take(2)
        with write_lock(broker):
            ack(deliveries[:1])
            eventually(lambda: "trying again" in caplog.text)
            with pytest.raises(BrokerUnavailable, match="locked"):
                broker.publish("q", b"{}")
            assert deliveries[1].start()
        (third,) = inbox.take()
        ack([deliveries[1], third])
        eventually(lambda: broker.depth("q") == (0, 0))
        assert subscription.failure is None
    assert "Traceback" not in caplog.text


def test_close_returns_in_time_while_the_file_is_locked_and_loses_nothing(broker: Embedded) -> None:
    names = fill(broker, 3)
    subscription = broker.queue("q").subscribe("c", inbox := Inbox(), 10)
    deliveries = inbox.take(3)
    with write_lock(broker):
        subscription.close(0.1)
        assert not deliveries[0].start()
    with consuming(broker.queue("q")) as (inbox, _):
        assert ids(inbox.take(3)) == names


@pytest.mark.hazard("H9")
def test_a_removed_file_ends_the_consumer_and_is_not_published_into(broker: Embedded) -> None:
    with consuming(broker.queue("q")) as (_, subscription):
        eventually(lambda: subscription.connected)
        for path in broker.path.parent.glob("broker.db*"):
            if path.is_file():
                path.unlink()
        eventually(lambda: subscription.failure)
        assert isinstance(subscription.failure, SetupError)
        assert not subscription.connected
        with pytest.raises(SetupError, match="no embedded broker"):
            broker.publish("q", b"{}")


@pytest.mark.hazard("H9")
def test_a_missing_queue_ends_the_consumer(broker: Embedded) -> None:
    with consuming(broker.queue("other")) as (_, subscription):
        eventually(lambda: subscription.failure)
        assert "no queue 'other'" in str(subscription.failure)
        assert not subscription.connected


def test_a_live_consumer_whose_lock_file_was_removed_ends_and_settles_nothing_of_others(
    broker: Embedded,
) -> None:
    fill(broker, 2)
    with consuming(broker.queue("q")) as (inbox, subscription):
        inbox.take(2)
        with raw(broker) as connection:  # as another process takes over what seems dead
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE messages SET owner = NULL, redelivered = 1")
            connection.execute("DELETE FROM owners")
            connection.execute("COMMIT")
        eventually(lambda: subscription.failure)
        assert "was removed" in str(subscription.failure)
    with consuming(broker.queue("q")) as (inbox, _):
        assert len(inbox.take(2)) == 2


@pytest.mark.hazard("H8")
def test_an_ack_deletes_no_message_that_somebody_else_holds(broker: Embedded) -> None:
    fill(broker, 2)
    with consuming(broker.queue("q"), prefetch=2) as (inbox, _):
        deliveries = inbox.take(2)
        with raw(broker) as connection:
            connection.execute("INSERT INTO owners (id, token, queue) VALUES (99, X'78', 1)")
            connection.execute("UPDATE messages SET owner = 99 WHERE seq = 1")
        ack(deliveries)
        (again,) = inbox.take()  # its other owner has no lock file: it is dead
        assert ids([again]) == ids(deliveries[:1])
        assert broker.depth("q") == (0, 1)


def test_an_error_of_the_receiver_ends_the_consumer_and_gives_its_messages_back(broker: Embedded) -> None:
    names = fill(broker, 3)

    def fail(deliveries: Sequence[Delivery]) -> None:
        raise OSError("a bug")

    subscription = broker.queue("q").subscribe("c", fail, 10)
    eventually(lambda: subscription.failure)
    assert str(subscription.failure) == "a bug"
    with consuming(broker.queue("q")) as (inbox, _):
        assert ids(inbox.take(3)) == names
    subscription.close(10)


@pytest.mark.hazard("H24")
@pytest.mark.parametrize(
    "damage",
    [
        "headers = X'FF'",
        "headers = 'no json'",
        "headers = X'5B315D'",
        "headers = 7",
        "id = 5",
        "id = X'FF'",
        "sent_at = 'soon'",
        "sent_at = 9e18",
        "body = 5",
    ],
)
def test_a_damaged_message_is_delivered_as_unreadable_and_stops_nothing(
    broker: Embedded, damage: str
) -> None:
    fill(broker, 2)
    with raw(broker) as connection:
        connection.execute(f"UPDATE messages SET {damage} WHERE seq = 1")
    with consuming(broker.queue("q")) as (inbox, _):
        bad, good = inbox.take(2)
        assert bad.message.unreadable
        assert good.message.unreadable is None
        ack([bad, good])
    assert broker.depth("q") == (0, 0)
