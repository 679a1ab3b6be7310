"""What a handler, a signal or a fault can do to a running worker, and what must be true all the same."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, make_url, text
from sqlalchemy.orm import Session, sessionmaker

from idemq import Message
from idemq.sessions import Sessions
from tests.attacked import Field, attacked, children, freeze, source, wait_gone
from tests.contract.brokers import Broker, EmbeddedBroker, KafkaBroker, RabbitBroker
from tests.contract.running import Shop
from tests.proxy import proxy
from tests.rabbitmq_tools import Proxy
from tests.servers import eventually


@pytest.fixture
def broker(tmp_path: Path, unique: str) -> EmbeddedBroker:
    made = EmbeddedBroker(str(tmp_path / "broker.db"), unique)
    made.create()
    return made


@pytest.fixture
def make(broker: EmbeddedBroker, tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    shops: list[Shop] = []

    def shop(act: Callable[[Message], None], kind: str = "async") -> Shop:
        shops.append(Shop(make_url(f"sqlite:///{tmp_path / 'shop.db'}"), broker.source(), kind, act))
        return shops[-1]

    yield shop
    for each in shops:
        each.dispose()


def sent(*numbers: int) -> list[tuple[str | None, bytes]]:
    return [(f"m{n}", b'{"n": %d}' % n) for n in numbers]


def at_first(harm: Callable[[], None]) -> Callable[[Message], None]:
    """`harm`, at the first message only."""
    done: list[str | None] = []

    def act(message: Message) -> None:
        done.append(message.id)
        if len(done) == 1:
            harm()

    return act


def _cancel_now() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


def _cancel_later() -> None:
    """A time limit of the handler's own that it forgets to take back."""
    task = asyncio.current_task()
    assert task is not None

    def over() -> None:
        task.cancel()
        _over.set()

    asyncio.get_running_loop().call_later(0.2, over)


def _exit_in_a_task() -> None:
    async def leave() -> None:
        raise SystemExit(3)

    _kept.append(asyncio.get_running_loop().create_task(leave()))


def _stop_loop() -> None:
    asyncio.get_running_loop().stop()


_kept: list[asyncio.Task[None]] = []
_over = threading.Event()


@pytest.mark.hazard("H42")
@pytest.mark.parametrize("harm", [_cancel_now, _cancel_later, _exit_in_a_task, _stop_loop])
def test_what_an_async_handler_does_to_its_task_or_loop_ends_with_its_message(
    broker: EmbeddedBroker, make: Callable[..., Shop], harm: Callable[[], None]
) -> None:
    shop = make(at_first(harm))
    broker.publish(sent(1))
    with shop.running() as worker:
        eventually(lambda: shop.counts() == Counter(["m1"]))
        if harm is _cancel_later:
            assert _over.wait(90)
        broker.publish(sent(2, 3))
        eventually(lambda: len(shop.counts()) == 3)
        assert worker.failure is None
    assert shop.counts() == Counter(["m1", "m2", "m3"])
    assert broker.left() == 0


@pytest.mark.hazard("H42")
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopIteration()]
)
def test_whatever_a_handler_raises_is_a_failed_attempt(
    broker: EmbeddedBroker, make: Callable[..., Shop], kind: str, error: BaseException
) -> None:
    def harm() -> None:
        raise error

    shop = make(at_first(harm), kind)
    broker.publish(sent(1, 2))
    with shop.running() as worker:
        eventually(lambda: len(shop.counts()) == 2)
        assert worker.failure is None
        assert worker.consumers[0].counts["failures"] == 1
    assert shop.counts() == Counter(["m1", "m2"])
    assert broker.left() == 0


class _Leaving(Session):
    left = 0

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        _Leaving.left += 1
        if _Leaving.left == 1:
            raise SystemExit(3)
        super().flush(objects)


@pytest.mark.hazard("H42")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_whatever_the_users_session_raises_at_its_flush_is_a_failed_attempt(
    broker: EmbeddedBroker, make: Callable[..., Shop], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Leaving, "left", 0)
    shop = make(lambda message: None, kind)
    sessions = Sessions(sessionmaker(class_=_Leaving, autoflush=False))
    declared = shop.app.consumers["shop"]
    consumer = replace(declared.consumer, sessions=sessions)
    shop.app.consumers["shop"] = replace(declared, consumer=consumer)
    broker.publish(sent(1))
    with shop.running() as worker:
        eventually(lambda: shop.counts() == Counter(["m1"]))
        assert worker.failure is None
        assert worker.consumers[0].counts["failures"] == 1
    assert broker.left() == 0


# ---- real processes


def place(request: pytest.FixtureRequest, kind: str, tmp_path: Path, unique: str) -> tuple[Broker, URL]:
    """A fresh queue, and a database that goes with it."""
    if kind == "embedded":
        broker: Broker = EmbeddedBroker(str(tmp_path / "broker.db"), unique)
        return broker, make_url(f"sqlite:///{tmp_path / 'shop.db'}")
    if kind == "kafka":
        broker = KafkaBroker(request.getfixturevalue("kafka_servers"), unique)
    else:
        broker = RabbitBroker(request.getfixturevalue("rabbitmq_url"), unique, kind)
    return broker, request.getfixturevalue("postgres_url")


@pytest.fixture
def scene(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> Iterator[tuple[Field, Shop, Broker]]:
    """Parametrized with (broker, kind of handler)."""
    on, kind = request.param
    broker, url = place(request, on, tmp_path, unique)
    broker.create()
    with attacked(tmp_path, url, broker, kind) as (field, shop):
        yield field, shop, broker
    broker.remove()


Scene = tuple[Field, Shop, Broker]


@pytest.mark.hazard("H34")
@pytest.mark.hazard("H26")
@pytest.mark.parametrize("lost", [False, True], ids=["transaction kept", "transaction lost"])
@pytest.mark.parametrize(
    "scene", [("kafka", "sync"), ("kafka", "async"), ("rabbitmq", "sync")], indirect=True, ids="-".join
)
def test_a_worker_frozen_in_its_transaction_and_thawed_leaves_one_effect(scene: Scene, lost: bool) -> None:
    field, shop, broker = scene
    field.hold("m1")
    frozen = field.start("--child")
    broker.publish(sent(1))
    eventually(lambda: field.begun() == [(frozen.pid, "m1")])
    freeze(frozen.pid)
    field.release()
    other = field.start("--child")
    # Longer than the heartbeats or the session timeout: the broker gives the message to the other worker.
    eventually(lambda: "its twin is still in flight" in field.log())
    assert shop.counts() == Counter()
    if lost:  # the database gives up on the frozen client
        with shop.engine.connect() as connection:
            connection.execute(text(IDLE_ENDS))
        eventually(lambda: shop.counts() == Counter(["m1"]))
    frozen.send_signal(signal.SIGCONT)
    broker.publish(sent(2))
    eventually(lambda: shop.counts() == Counter(["m1", "m2"]))
    assert [field.end(each) for each in (frozen, other)] == [0, 0]
    assert shop.counts() == Counter(["m1", "m2"])
    assert shop.claims() == 2
    assert broker.left() == 0


IDLE_ENDS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND state = 'idle in transaction' AND pid <> pg_backend_pid()
"""


@pytest.mark.hazard("H54")
@pytest.mark.parametrize(
    "scene",
    [("embedded", "sync"), ("rabbitmq", "async"), ("kafka", "sync")],
    indirect=True,
    ids="-".join,
)
def test_a_storm_of_sigterms_loses_and_doubles_nothing(scene: Scene) -> None:
    field, shop, broker = scene
    chosen = random.Random(1)
    numbers = range(60)
    broker.publish(sent(*numbers, *numbers[::6]))
    for _ in range(2):
        parent = field.start("--processes", "2")
        begun = len(field.begun())  # what an earlier one gave back runs in a process of its own
        eventually(partial(_goes_on, field, shop, begun, len(numbers)))
        struck = [parent.pid, *children(parent.pid)]
        until = time.monotonic() + chosen.uniform(0, 0.1)
        while parent.poll() is None and time.monotonic() < until:
            _strike(chosen.choice(struck))
        assert parent.poll() is not None or field.end(parent) is not None
        wait_gone(*struck)
    last = field.start("--processes", "2")
    eventually(lambda: len(shop.counts()) == len(numbers))
    assert field.end(last) == 0
    assert shop.counts() == Counter(f"m{n}" for n in numbers)
    assert shop.claims() == len(numbers)


def _goes_on(field: Field, shop: Shop, begun: int, count: int) -> bool:
    return len(field.begun()) > begun or len(shop.counts()) == count


def _strike(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


@pytest.mark.hazard("H54")
@pytest.mark.parametrize("scene", [("embedded", "sync"), ("embedded", "async")], indirect=True, ids="-".join)
def test_one_stop_that_reaches_parent_and_children_lets_what_runs_finish(scene: Scene) -> None:
    field, shop, broker = scene
    field.hold("m1")
    parent = field.start()
    broker.publish(sent(1))
    eventually(lambda: field.begun())
    for pid in (parent.pid, *children(parent.pid)):  # as a service manager does
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: "stopping" in field.log())
    field.release()
    assert parent.wait(90) == 0
    assert len(field.begun()) == 1
    assert shop.counts() == Counter(["m1"])
    assert broker.left() == 0


@pytest.mark.hazard("H54")
@pytest.mark.parametrize("scene", [("embedded", "sync")], indirect=True, ids="-".join)
def test_a_second_sigterm_ends_processes_that_are_frozen_and_busy(scene: Scene) -> None:
    field, shop, broker = scene
    field.hold("m1")
    parent = field.start("--processes", "2")
    eventually(lambda: field.log().count("started, process") == 2)
    broker.publish(sent(1))
    eventually(field.begun)
    processes = children(parent.pid)
    freeze(processes[0])
    parent.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping" in field.log())
    assert field.end(parent) != 0
    wait_gone(*processes)
    assert shop.counts() == Counter()
    assert broker.left() == 1


@pytest.mark.hazard("H54")
@pytest.mark.parametrize("scene", [("embedded", "async")], indirect=True, ids="-".join)
def test_children_end_in_order_when_their_parent_is_killed(scene: Scene) -> None:
    field, shop, broker = scene
    field.hold("m1")
    parent = field.start("--processes", "2")
    eventually(lambda: field.log().count("started, process") == 2)
    broker.publish(sent(1))
    eventually(field.begun)
    processes = children(parent.pid)
    parent.kill()
    eventually(lambda: "stopping" in field.log())
    field.release()
    wait_gone(*processes)
    assert shop.counts() == Counter(["m1"])
    assert broker.left() == 0


STUBBORN = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
print("up", flush=True)
sys.stdin.read()
"""

SUPERVISOR = """
import sys
from idemq.cli.supervisor import Supervisor
sys.exit(Supervisor([sys.executable, "-c", sys.argv[1]], 2).run())
"""


@pytest.mark.hazard("H54")
def test_signals_that_interrupt_their_own_handler_stop_the_parent() -> None:
    command = [sys.executable, "-c", SUPERVISOR, STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert [parent.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
            until = time.monotonic() + 15
            while parent.poll() is None and time.monotonic() < until:
                _strike(parent.pid)
            assert parent.returncode in (0, signal.SIGKILL, -signal.SIGTERM)
        finally:
            parent.kill()


@pytest.mark.hazard("H54")
def test_a_process_that_cannot_be_started_is_tried_again() -> None:
    script = "import sys\nfrom idemq.cli.supervisor import Supervisor\n"
    script += "sys.exit(Supervisor([sys.argv[1]], 1).run())"
    command = [sys.executable, "-c", script, "/nowhere/python"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stderr is not None
            lines = iter(parent.stderr.readline, "")
            assert sum("started" in next(lines) for _ in range(4)) == 4
            parent.send_signal(signal.SIGTERM)
            parent.wait(90)
        finally:
            parent.kill()


@pytest.mark.hazard("H17")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_handler_that_blocks_for_three_heartbeats_keeps_its_delivery(
    rabbitmq_url: str, unique: str, postgres_url: URL, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = RabbitBroker(rabbitmq_url, unique)
    broker.create()
    begun, entered, release = list[str | None](), threading.Event(), threading.Event()

    def block(message: Message) -> None:  # an async handler blocks its event loop, too
        begun.append(message.id)
        entered.set()
        release.wait(90)

    shop = Shop(postgres_url, source(broker), kind, block)
    broker.publish(sent(1))
    with caplog.at_level("WARNING"), shop.running() as worker:
        assert entered.wait(90)
        release.wait(4)  # heartbeats are sent each second
        assert worker.consumers[0].subscription.connected
        release.set()
        eventually(shop.counts)
    assert begun == ["m1"]
    assert shop.counts() == Counter(["m1"])
    assert not caplog.messages
    assert broker.left() == 0
    shop.dispose()
    broker.remove()


@pytest.mark.hazard("H54")
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_stop_ends_while_the_database_does_not_answer(
    postgres_url: URL, broker: EmbeddedBroker, tmp_path: Path, driver: str
) -> None:
    frozen = Proxy((postgres_url.host or "", postgres_url.port or 5432))
    through = postgres_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=frozen.port)
    with attacked(tmp_path, postgres_url, broker, "async") as (field, shop):
        field.url = through
        worker = field.start("--child")
        broker.publish(sent(1))
        eventually(lambda: shop.counts() == Counter(["m1"]))
        eventually(lambda: broker.left() == 0)
        frozen.freeze()
        field.end(worker)
    frozen.close()


@pytest.mark.hazard("H55")
def test_a_database_that_fails_while_a_process_starts_is_waited_for(
    postgres_url: URL, broker: EmbeddedBroker, tmp_path: Path
) -> None:
    with (
        proxy(postgres_url.host or "", postgres_url.port or 5432) as between,
        attacked(tmp_path, postgres_url, broker, "sync") as (field, shop),
    ):
        field.url = postgres_url.set(host="127.0.0.1", port=between.port)
        between.cut(b"consumer_names", "reply")  # once; as when the server restarts
        parent = field.start()
        assert between.cut_done.wait(90)
        broker.publish(sent(1))
        eventually(lambda: shop.counts() == Counter(["m1"]))
        assert field.end(parent) == 0


@pytest.mark.hazard("H55")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_while_the_database_is_down_the_log_stays_short_and_nothing_is_settled(
    postgres_url: URL, broker: EmbeddedBroker, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    between = Proxy((postgres_url.host or "", postgres_url.port or 5432))
    through = postgres_url.set(host="127.0.0.1", port=between.port)
    shop = Shop(postgres_url, broker.source(), kind)
    unreachable = Shop(through, broker.source(), kind, prepare=False, prefetch=200, concurrency=4)
    unreachable.number = shop.number
    between.close()
    numbers = range(200)
    broker.publish(sent(*numbers))
    began = time.monotonic()
    with caplog.at_level("WARNING", "idemq"), unreachable.running() as worker:
        # One message tries for all 200, ever more seldom.
        eventually(lambda: worker.consumers[0].counts["released"] > 6)
        assert worker.consumers[0].counts["released"] < 20
        assert len(caplog.messages) <= time.monotonic() - began + 10
        assert worker.consumers[0].counts["failures"] == 0
    assert shop.claims() == 0
    assert broker.left() == len(numbers)
    with shop.running():
        eventually(lambda: len(shop.counts()) == len(numbers))
    assert shop.counts() == Counter(f"m{n}" for n in numbers)
    for each in (shop, unreachable):
        each.dispose()
