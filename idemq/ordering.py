"""One message of a key at a time, in the order in which they came.

Why nothing has to be fenced off when a partition changes its owner, or a frozen one thaws: every owner begins
with the first message that is not settled, takes up a message only when the one before it of the same key is
settled (done, dead or parked), and settles it by its claim. So two owners walk the same messages in the same
order, each message is done by one of them, and neither can be ahead of what is claimed.

What follows a parked message is parked behind it: whether one is there is asked in the transaction that would
run the message, of a parked one as well, after its claim. `seq` is given when a row is written, and the next
message of its key is taken up only after that has committed, so `seq` is the order of the key. A message may
have two rows: one without its claim, written by an owner that could not wait for a frozen one, and the one
that the frozen one writes later. The first keeps the place, and hands it on when it goes.

Where this ends, because what is claimed or in the table no longer tells what was done:

* claims that were pruned while the broker still gives the message again, or offsets that were set back
  further than that: old messages run again, after newer ones. Those that say when they were sent go dead.
* a broker that does not keep the order: a producer that sends again without idempotence, a key that is in
  several partitions (more of them were made, or `key=` is not what the producer chose the partition by), a
  quorum queue whose worker dies with messages in hand after `prefetch=` was made smaller.
* a letter that is retried by hand after its key went on, as it does without `hold_dead`: it runs now.
* a change of `key=`, or of `ordered=` to True, while messages are parked: their rows know an old key or none.
* READ UNCOMMITTED, which sees a parked message gone before its work is there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from idemq.lanes import Item
from idemq.message import Message


class Keys:
    """What was delivered here and is not settled, by key. Thread-safe. Without `lane` nothing waits."""

    def __init__(self, lane: Callable[[Message], bytes] | None) -> None:
        self._lane = lane
        self._lock = threading.Lock()
        self._waiting: dict[bytes, deque[Item]] = {}

    def admit(self, items: list[Item]) -> list[Item]:
        """Those that may begin; the others wait for the one before them. To be called in the order of
        delivery, by one thread at a time."""
        return items if self._lane is None else [item for item in items if self._admitted(item)]

    def _admitted(self, item: Item) -> bool:
        assert self._lane is not None
        item.lane = lane = self._lane(item.delivery.message)
        with self._lock:
            if (waiting := self._waiting.get(lane)) is not None:
                waiting.append(item)
                return False
            self._waiting[lane] = deque()
            return True

    def settled(self, item: Item) -> list[Item]:
        """What may begin now that `item` is settled, or not ours any more."""
        if item.lane is None:
            return []
        with self._lock:
            lane, item.lane = item.lane, None
            waiting = self._waiting[lane]
            if waiting:
                return [waiting.popleft()]
            del self._waiting[lane]
            return []

    def clear(self) -> list[Item]:
        """What waited: it will not begin any more."""
        with self._lock:
            items = [item for waiting in self._waiting.values() for item in waiting]
            for waiting in self._waiting.values():
                waiting.clear()
            return items
