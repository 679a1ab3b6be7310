"""What a handler, a signal or a fault can do to a running worker, and what must be true all the same."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from idemq import Message
from tests.contract.brokers import EmbeddedBroker
from tests.contract.running import Shop
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
        eventually(lambda: shop.counts() == Counter(["m1"]), 10)
        if harm is _cancel_later:
            assert _over.wait(10)
        broker.publish(sent(2, 3))
        eventually(lambda: len(shop.counts()) == 3, 10)
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
        eventually(lambda: len(shop.counts()) == 2, 10)
        assert worker.failure is None
        assert worker.consumers[0].counts["failures"] == 1
    assert shop.counts() == Counter(["m1", "m2"])
    assert broker.left() == 0
