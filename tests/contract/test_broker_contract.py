"""What the worker relies on, on every broker: `idemq/broker.py`, one sentence each."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from idemq.errors import BrokerUnavailable, NoId, SetupError
from idemq.message import message_id
from tests.contract.brokers import MARKS, SINGLY, TYPED, Broker, KafkaBroker, Sent, spec
from tests.contract.inbox import Inbox, ack, consuming, ids
from tests.servers import eventually


def some(count: int, start: int = 0) -> list[Sent]:
    return [(f"m{n}", b'{"n": %d}' % n) for n in range(start, start + count)]


def names(messages: list[Sent]) -> list[str]:
    return [str(id) for id, _ in messages]


def test_a_message_is_delivered_once_with_body_id_and_headers_intact(broker: Broker) -> None:
    broker.publish([("m1", b'{"amount": 7}')], {"trace": "abc", "text": "ü ☃", "empty": ""})
    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        message = delivery.message
        assert message.body == b'{"amount": 7}'
        assert message_id(message, None) == "m1"
        assert {name: message.headers[name] for name in ("trace", "text", "empty")} == {
            "trace": "abc",
            "text": "ü ☃",
            "empty": "",
        }
        assert message.unreadable is None
        assert not message.redelivered
        assert message.origin["broker"]
        ack([delivery])
        assert inbox.quiet()
    assert broker.left() == 0


def test_header_values_keep_their_types(broker: Broker) -> None:
    if TYPED not in broker.features:
        pytest.skip("its headers are bytes")
    headers: dict[str, object] = {"int": 5, "large": 2**40, "negative": -1, "true": True, "none": None}
    headers |= {"list": [1, "a"], "table": {"deep": {"er": "x"}}}
    broker.publish([("m1", b"{}")], headers)
    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        assert {name: delivery.message.headers[name] for name in headers} == headers
        ack([delivery])


@pytest.mark.parametrize("body", [b"", b"\x00\xff\xfe not text", b"{"], ids=["empty", "binary", "cut"])
def test_a_body_is_bytes_and_nothing_else(broker: Broker, body: bytes) -> None:
    broker.publish([("m1", body)])
    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        assert delivery.message.body == body
        ack([delivery])


def test_a_large_body_arrives_whole(broker: Broker) -> None:
    body = bytes(range(256)) * (broker.large // 256)
    broker.publish([("m1", body)])
    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        assert delivery.message.body == body
        ack([delivery])
    assert broker.left() == 0


def test_a_message_without_an_id_is_delivered_without_one(broker: Broker) -> None:
    broker.publish([(None, b"{}")])
    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        with pytest.raises(NoId):
            message_id(delivery.message, None)
        ack([delivery])


def test_messages_come_in_the_order_in_which_they_were_published(broker: Broker) -> None:
    broker.publish(some(200))
    with consuming(broker.source(), prefetch=7) as (inbox, _):
        seen = []
        for _ in range(200):
            (delivery,) = inbox.take()
            seen += ids([delivery])
            ack([delivery])
    assert seen == names(some(200))
    assert broker.left() == 0


def test_unacknowledged_messages_come_again_after_close_in_their_order(broker: Broker) -> None:
    broker.publish(some(10))
    with consuming(broker.source()) as (inbox, _):
        first = inbox.take(10)
        ack(first[:3])
        for delivery in first[5:]:
            delivery.drop()
    assert broker.left() == 7
    with consuming(broker.source()) as (inbox, _):
        again = inbox.take(7)
        assert ids(again) == names(some(10))[3:]
        assert [d.message.body for d in again] == [d.message.body for d in first[3:]]
        if MARKS in broker.features:
            assert all(delivery.message.redelivered for delivery in again)
        ack(again)
    assert broker.left() == 0


def test_what_was_settled_out_of_order_stays_settled(broker: Broker) -> None:
    if SINGLY not in broker.features:
        pytest.skip("it settles a partition up to a position")
    broker.publish(some(10))
    with consuming(broker.source()) as (inbox, _):
        first = inbox.take(10)
        ack([first[8], first[1], first[4]])
    with consuming(broker.source()) as (inbox, _):
        again = inbox.take(7)
        assert ids(again) == [f"m{n}" for n in (0, 2, 3, 5, 6, 7, 9)]
        ack(again)
        assert inbox.quiet()
    assert broker.left() == 0


def test_acknowledged_messages_do_not_come_again(broker: Broker) -> None:
    broker.publish(some(20))
    with consuming(broker.source()) as (inbox, _):
        ack(inbox.take(20))
    broker.publish([("last", b"{}")])
    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        assert ids([delivery]) == ["last"]
        ack([delivery])


def test_settling_everything_out_of_order_leaves_nothing(broker: Broker) -> None:
    broker.publish(some(50))
    with consuming(broker.source()) as (inbox, _):
        ack(inbox.take(50)[::-1])
    assert broker.left() == 0


def test_prefetch_bounds_what_is_unsettled(broker: Broker) -> None:
    broker.publish(some(12))
    with consuming(broker.source(), prefetch=3) as (inbox, _):
        held = inbox.take(3)
        assert inbox.quiet()
        ack([held.pop(0)])
        held += inbox.take(1)
        assert inbox.quiet()
        ack(held)
        rest = inbox.take(3)
        assert inbox.quiet()
        ack(rest)
        ack(inbox.take(3))
        ack(inbox.take(2))
    assert broker.left() == 0


def test_a_prefetch_of_one_takes_one_after_the_other(broker: Broker) -> None:
    broker.publish(some(5))
    with consuming(broker.source(), prefetch=1) as (inbox, _):
        for n in range(5):
            (delivery,) = inbox.take()
            assert ids([delivery]) == [f"m{n}"]
            assert inbox.empty
            ack([delivery])
    assert broker.left() == 0


def test_a_prefetch_of_zero_is_refused(broker: Broker) -> None:
    with pytest.raises(SetupError, match="prefetch"):
        broker.source().subscribe("contract", Inbox(), 0)


def test_pause_stops_deliveries_and_what_was_delivered_can_be_settled(broker: Broker) -> None:
    broker.publish(some(2))
    with consuming(broker.source()) as (inbox, subscription):
        held = inbox.take(2)
        subscription.pause()
        published = 2

        def stopped() -> bool:
            nonlocal published
            broker.publish(some(1, published))
            published += 1
            return inbox.quiet()

        eventually(stopped, what="a message that is not delivered")
        broker.publish(some(3, published))
        assert inbox.quiet()
        ack(held)
        assert inbox.quiet()
    assert broker.left() == published + 1


def test_a_delivery_is_settled_from_any_thread(broker: Broker) -> None:
    broker.publish(some(40))
    with consuming(broker.source()) as (inbox, _):
        deliveries = inbox.take(40)
        threads = [threading.Thread(target=ack, args=(deliveries[n::8],)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert broker.left() == 0


@pytest.mark.hazard("H8")
def test_after_close_nothing_starts_and_an_ack_settles_nothing(broker: Broker) -> None:
    broker.publish(some(3))
    with consuming(broker.source()) as (inbox, _):
        old = inbox.take(3)
        assert all(delivery.start() for delivery in old)
    assert not any(delivery.start() for delivery in old)
    with consuming(broker.source()) as (inbox, _):
        new = inbox.take(3)
        for delivery in old:
            delivery.ack()  # the tags of the new deliveries may be the same
    assert broker.left() == 3
    with consuming(broker.source()) as (inbox, _):
        assert ids(inbox.take(3)) == ids(new)


def test_close_can_be_called_twice_and_nothing_is_delivered_afterwards(broker: Broker) -> None:
    broker.publish(some(1))
    with consuming(broker.source()) as (inbox, subscription):
        ack(inbox.take())
        subscription.close(10)
        subscription.close(10)
        assert not subscription.connected
        assert subscription.failure is None
        broker.publish(some(2, 1))
        assert inbox.quiet()
    assert broker.left() == 2


def test_a_message_published_later_is_delivered_and_the_subscription_is_connected(broker: Broker) -> None:
    with consuming(broker.source()) as (inbox, subscription):
        eventually(lambda: subscription.connected, what="connected")
        broker.publish(some(1))
        ack(inbox.take())
        assert subscription.connected
        assert subscription.failure is None
    assert broker.left() == 0


def test_two_subscriptions_share_the_work(broker: Broker) -> None:
    if isinstance(broker, KafkaBroker):
        broker.remove()
        broker.partitions = 4
        broker.name += "-shared"
        broker.create()
    with ExitStack() as stack:
        inboxes = [stack.enter_context(consuming(broker.source(), prefetch=4))[0] for _ in range(2)]
        published: set[str] = set()
        idle = list(inboxes)

        def both_work() -> bool:
            fresh = some(8, len(published))
            broker.publish(fresh)
            published.update(names(fresh))
            # Who has got one is not asked again: nothing is settled, and at `prefetch` nothing more comes.
            idle[:] = [inbox for inbox in idle if inbox.quiet(0.1)]
            return not idle

        eventually(both_work, what="both get messages")
    # What `quiet` took was not settled; everything comes to whoever stays.
    with consuming(broker.source(), prefetch=4) as (inbox, _):
        seen: set[str] = set()
        while seen != published:
            deliveries = inbox.take()
            seen.update(ids(deliveries))
            ack(deliveries)
    assert broker.left() == 0


@pytest.mark.hazard("H4")
def test_the_deliveries_of_a_killed_process_come_again(broker: Broker) -> None:
    broker.publish(some(5))
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.contract.child", spec(broker)], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(5)] == names(some(5))
        child.kill()
    with consuming(broker.source()) as (inbox, _):
        again = inbox.take(5, seconds=45)
        assert ids(again) == names(some(5))
        if MARKS in broker.features:
            assert all(delivery.message.redelivered for delivery in again)
        ack(again)
    assert broker.left() == 0


def test_a_missing_source_is_an_error_that_names_it_and_the_remedy(broker: Broker) -> None:
    broker.source().check()
    with pytest.raises(SetupError, match=f"{broker.name}-missing.*declare=True"):
        broker.missing().check()


def test_a_missing_source_is_made_when_the_user_says_so(broker: Broker) -> None:
    source = broker.missing(declare=True)
    source.check()
    source.check()
    broker.missing().check()


def test_an_unreachable_broker_is_told_by_check_and_retried_by_subscribe(broker: Broker) -> None:
    source = broker.unreachable()
    if source is None:
        pytest.skip("it has no server")
    with pytest.raises(BrokerUnavailable) as caught:
        source.check()
    assert "secret" not in str(caught.value)
    with consuming(source) as (inbox, subscription):
        assert inbox.quiet(0.2)
        assert not subscription.connected
        assert subscription.failure is None


def test_the_description_names_the_source_without_secrets(broker: Broker) -> None:
    for source in (broker.source(), broker.unreachable()):
        if source is not None:
            assert broker.name in source.description
            assert "secret" not in source.description
