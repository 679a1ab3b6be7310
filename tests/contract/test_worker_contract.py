"""What a user relies on, on every broker and with both kinds of handlers: the effect of each id once."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import pytest
from sqlalchemy import URL

from idemq import Message, Reject
from idemq.payload import MAX_BODY_BYTES
from tests.contract.brokers import Broker, Properties, spec
from tests.contract.running import Make, once_each, sent
from tests.servers import eventually

pytestmark = pytest.mark.hazard("H43")


def test_each_message_is_processed_and_acknowledged(broker: Broker, make: Make) -> None:
    shop = make(concurrency=4)
    broker.publish(sent(*range(60)))
    with shop.running():
        eventually(lambda: len(shop.counts()) == 60)
    assert shop.counts() == once_each(*range(60))
    assert shop.claims() == 60
    assert broker.left() == 0


@pytest.mark.pattern("dedup-table")
def test_what_comes_again_is_acknowledged_and_skipped(broker: Broker, make: Make) -> None:
    shop = make(concurrency=4)
    broker.publish(sent(1, 1, 2, 1, 3, 2, 3, 4))
    with shop.running():
        eventually(lambda: len(shop.counts()) == 4)
        broker.publish(sent(4, 3, 2, 1, 5))
        eventually(lambda: len(shop.counts()) == 5)
    with shop.running():
        broker.publish(sent(1, 6))
        eventually(lambda: len(shop.counts()) == 6)
    with shop.running():  # it also takes what the last stop gave back
        broker.publish(sent(7))
        eventually(lambda: len(shop.counts()) == 7)
    assert shop.counts() == once_each(*range(1, 8))


def test_a_failed_handler_leaves_nothing_and_is_tried_again(broker: Broker, make: Make) -> None:
    attempts: Counter[str | None] = Counter()

    def fail_twice(message: Message) -> None:
        attempts[message.id] += 1
        if message.id == "m1" and attempts[message.id] < 3:
            raise RuntimeError("not now")

    shop = make(fail_twice)
    broker.publish(sent(1, 2, 3))
    with shop.running():
        eventually(lambda: len(shop.counts()) == 3)
    assert attempts == {"m1": 3, "m2": 1, "m3": 1}
    assert shop.counts() == once_each(1, 2, 3)
    assert broker.left() == 0


@pytest.mark.hazard("H11")
@pytest.mark.hazard("H25")
@pytest.mark.hazard("S2")
def test_what_cannot_be_judged_is_a_dead_letter_and_its_neighbours_get_through(
    broker: Broker, make: Make
) -> None:
    shop = make()
    broker.publish(sent(1))
    bad: list[tuple[str, bytes]] = []

    def publish(
        reason: str,
        id: str | None,
        body: bytes,
        headers: Mapping[str, Any] | None = None,
        **properties: Unpack[Properties],
    ) -> None:
        broker.publish([(id, body)], headers, **properties)
        broker.publish(sent(100 + len(bad)))
        bad.append((reason, body))

    publish("no id", None, b'{"n": 5}')
    publish("no id", None, b'{"n": 6}', {"message-id": "x" * 1025})
    publish("unreadable", "not-json", b"not json")
    publish("unreadable", "not-utf-8", b'{"n": "\xff"}')
    publish("unreadable", "deep", b"[" * 100_000)
    publish("unreadable", "empty", b"")
    publish("unreadable", "type", b'{"n": 7}', content_type="application/x-python-serialize")
    publish("unreadable", "encoding", b'{"n": 8}', encoding="nope")
    publish("unreadable", "bomb", gzip.compress(bytes(MAX_BODY_BYTES + 1)), encoding="gzip")
    publish(
        "unreadable", "bomb2", gzip.compress(bytes(MAX_BODY_BYTES + 1)), {"compression": "application/x-gzip"}
    )
    if broker.kind == "kafka":
        publish("no id", None, b'{"n": 9}', {"message-id": ["a", "b"]})
    with shop.running():
        eventually(lambda: len(shop.dead()) == len(bad) and len(shop.counts()) == len(bad) + 1)
    assert shop.dead() == bad
    assert shop.counts() == once_each(1, *range(100, 100 + len(bad)))
    assert broker.left() == 0


@pytest.mark.hazard("H30")
def test_the_same_id_with_another_body_is_a_conflict_and_the_first_effect_stays(
    broker: Broker, make: Make
) -> None:
    shop = make()
    broker.publish([*sent(1), ("m1", b'{"n": 2}'), ("m1", b'{"n": 2}'), *sent(1)])
    with shop.running():
        eventually(lambda: shop.dead())
        broker.publish(sent(9))
        eventually(lambda: len(shop.counts()) == 2)
    assert shop.dead() == [("conflict", b'{"n": 2}')]
    assert shop.counts() == once_each(1, 9)


def test_a_rejected_message_is_a_dead_letter_and_its_copy_is_absorbed(broker: Broker, make: Make) -> None:
    calls: list[str | None] = []

    def reject(message: Message) -> None:
        calls.append(message.id)
        if message.id == "m1":
            raise Reject("the amount must be positive")

    shop = make(reject)
    broker.publish(sent(1, 2, 1))
    with shop.running():
        eventually(lambda: shop.dead() and shop.counts())
    with shop.running():
        broker.publish(sent(3))
        eventually(lambda: len(shop.counts()) == 2)
    assert shop.dead() == [("rejected", b'{"n": 1}')]
    assert calls.count("m1") == 1
    assert shop.counts() == once_each(2, 3)


@pytest.mark.hazard("H54")
def test_a_stop_lets_what_runs_finish_and_gives_the_rest_back(broker: Broker, make: Make, kind: str) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold(message: Message) -> None:
        entered.set()
        assert release.wait(90)

    shop = make(hold, prefetch=10)
    broker.publish(sent(1, 2, 3, 4))
    with shop.running() as worker:
        assert entered.wait(90)
        worker.stop()
        # The stop is noticed before the handler returns: nothing else may be begun after it.
        eventually(lambda: all(each._stopping for each in worker.consumers))
        release.set()
    assert shop.counts() == once_each(1)
    with shop.running():
        eventually(lambda: len(shop.counts()) == 4)
    assert shop.counts() == once_each(1, 2, 3, 4)
    assert broker.left() == 0


def test_two_workers_share_the_work(broker: Broker, make: Make) -> None:
    first, second = make(concurrency=2), make(concurrency=2)
    numbers = range(100)
    broker.publish(sent(*numbers, *numbers[::10]))
    with first.running(), second.running():
        eventually(lambda: len(first.counts()) == 100)
    assert first.counts() == once_each(*numbers)


KILLED = """
import os, signal, sys
from sqlalchemy import make_url
from tests.contract.brokers import attach
from tests.contract.running import Shop

def act(message):
    if os.path.exists("kill"):
        os.unlink("kill")
        os.kill(os.getpid(), signal.SIGKILL)

app = Shop(make_url(os.environ["URL"]), attach(os.environ["SPEC"]).source(), os.environ["KIND"], act).app
"""


@pytest.mark.hazard("H54")
def test_a_worker_that_is_killed_in_a_handler_loses_and_doubles_nothing(
    broker: Broker, make: Make, kind: str, url: URL, tmp_path: Path
) -> None:
    shop = make()
    broker.publish(sent(1, 2, 3, 1))
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "kill").touch()
    environment = {
        **os.environ,
        "URL": url.render_as_string(hide_password=False),
        "SPEC": spec(broker),
        "KIND": kind,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()]),
    }
    command = [sys.executable, "-m", "idemq", "run", "killed:app"]
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            # The parent starts the killed child again.
            eventually(lambda: len(shop.counts()) == 3, (tmp_path / "log").read_text())
        finally:
            parent.send_signal(signal.SIGTERM)
            code = parent.wait(90)
    assert not (tmp_path / "kill").exists()
    assert "SIGKILL" in (tmp_path / "log").read_text()
    assert code == 0
    assert shop.counts() == once_each(1, 2, 3)
