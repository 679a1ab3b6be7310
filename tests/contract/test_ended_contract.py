"""What no process survives, on every broker and with both kinds of handlers: `idemq run` as it is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.attacked import Field, attacked, wait_gone
from tests.contract.brokers import Broker
from tests.contract.running import Shop, once_each, sent
from tests.servers import eventually

#: The classic queue ends its consumers like the quorum queue.
pytestmark = pytest.mark.parametrize("broker", ["embedded", "rabbitmq", "kafka"], indirect=True)


@pytest.fixture
def scene(tmp_path: Path, url: URL, broker: Broker, kind: str) -> Iterator[tuple[Field, Shop]]:
    with attacked(tmp_path, url, broker, kind) as made:
        yield made


def reasons(shop: Shop) -> list[str]:
    """Of all that is parked or dead."""
    return [reason for reason, _ in shop.dead()]


@pytest.mark.hazard("H21")
def test_a_message_that_ends_its_process_is_one_dead_letter_and_blames_nobody(
    broker: Broker, scene: tuple[Field, Shop]
) -> None:
    field, shop = scene
    field.options["max_crashes"] = 2
    field.poison("m3")
    parent = field.start()
    broker.publish(sent(*range(1, 9), 3))
    eventually(lambda: len(shop.counts()) == 7 and reasons(shop) == ["crashed"])
    assert field.end(parent) == 0
    assert shop.counts() == once_each(1, 2, 4, 5, 6, 7, 8)
    assert reasons(shop) == ["crashed"]
    assert broker.left() == 0
    assert [id for _, id in field.begun()].count("m3") == 3  # once among others, and twice alone


@pytest.mark.hazard("H54")
def test_a_second_sigterm_ends_everything_at_once_and_the_message_comes_again(
    broker: Broker, scene: tuple[Field, Shop]
) -> None:
    field, shop = scene
    field.hold("m1")
    busy = field.start("--child")
    broker.publish(sent(1))
    eventually(field.begun)
    busy.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping" in field.log())
    assert field.end(busy) == 128 + signal.SIGTERM  # in the middle of its handler
    wait_gone(busy.pid)
    assert shop.counts() == once_each()
    field.release()
    other = field.start()
    eventually(lambda: shop.counts() == once_each(1))
    assert field.end(other) == 0
    assert shop.counts() == once_each(1)
    assert broker.left() == 0
