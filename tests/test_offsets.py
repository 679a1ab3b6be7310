from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idemq.offsets import Tracker

#: Gaps between offsets (compaction and transaction markers leave some), then steps by name.
GAPS = st.lists(st.integers(1, 5), min_size=1, max_size=30)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["deliver", "finish", "finish", "finish", "commit", "confirm", "skip", "revoke", "late"]
        ),
        st.integers(0, 10_000),
    ),
    max_size=120,
)


class Partition:
    """A partition in a small model: records at offsets with gaps, and what is committed for it."""

    def __init__(self, gaps: list[int]) -> None:
        self.offsets: list[int] = []
        at = -1
        for gap in gaps:
            at += gap
            self.offsets.append(at)
        self.finished: set[int] = set()
        self.committed = 0
        self.old: list[tuple[Tracker, list[int]]] = []
        self.assign()

    def assign(self) -> None:
        self.tracker = Tracker()
        self.read = self.committed
        self.open: list[int] = []
        self.offered: int | None = None

    def step(self, name: str, number: int) -> None:
        getattr(self, f"_{name}")(number)
        unfinished = [offset for offset in self.offsets if offset not in self.finished]
        assert not unfinished or self.committed <= unfinished[0]

    def _deliver(self, number: int) -> None:
        fresh = [offset for offset in self.offsets if offset >= self.read][: 1 + number % 5]
        if fresh:
            self.tracker.delivered(fresh)
            self.open += fresh
            self.read = fresh[-1] + 1

    def _finish(self, number: int) -> None:
        if self.open:
            offset = self.open.pop(number % len(self.open))
            assert self.tracker.start(offset)
            self.finished.add(offset)
            self.tracker.finished(offset)

    def _commit(self, number: int) -> None:
        position = self.tracker.committable()
        if position is not None:
            self.committed = self.offered = position

    def _confirm(self, number: int) -> None:
        if self.offered is not None:
            self.tracker.committed(self.offered)
            assert self.tracker.uncommitted >= len(self.open)

    def _skip(self, number: int) -> None:
        following = [offset for offset in self.offsets if offset >= self.read]
        self.read = max(self.read, following[0] if following else self.offsets[-1] + 1 + number % 3)
        self.tracker.skipped_to(self.read)

    def _revoke(self, number: int) -> None:
        self.tracker.stop_starting()
        assert not self.tracker.start(0)
        if number % 2:
            self._commit(number)
        self.tracker.end()
        self.old.append((self.tracker, self.open))
        self.assign()

    def _late(self, number: int) -> None:
        """A record of an old epoch is finished now; its own tracker may not act on it."""
        if self.old:
            tracker, left = self.old[number % len(self.old)]
            for offset in left:
                tracker.finished(offset)
            assert tracker.committable() is None


@pytest.mark.hazard("H10")
@settings(max_examples=3000, deadline=None)
@given(gaps=GAPS, steps=STEPS)
def test_the_committed_position_never_passes_an_unfinished_record(
    gaps: list[int], steps: list[tuple[str, int]]
) -> None:
    partition = Partition(gaps)
    for name, number in steps:
        partition.step(name, number)


@pytest.mark.hazard("H10")
@settings(max_examples=500, deadline=None)
@given(gaps=GAPS, seed=st.randoms(use_true_random=False))
def test_when_everything_is_finished_the_position_is_behind_the_last_record(
    gaps: list[int], seed: object
) -> None:
    partition = Partition(gaps)
    partition.tracker.delivered(partition.offsets)
    order = list(partition.offsets)
    seed.shuffle(order)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    for offset in order:
        partition.tracker.finished(offset)
    position = partition.tracker.committable()
    assert position == partition.offsets[-1] + 1
    partition.tracker.committed(position)
    assert partition.tracker.uncommitted == 0
    assert partition.tracker.committable() is None


def test_a_tail_without_records_is_passed_only_when_nothing_is_unfinished() -> None:
    tracker = Tracker()
    tracker.delivered([3, 4])
    tracker.finished(4)
    tracker.skipped_to(9)
    assert tracker.committable() is None
    tracker.finished(3)
    assert tracker.committable() == 5
    tracker.skipped_to(9)
    assert tracker.committable() == 9


def test_offsets_that_go_back_are_refused() -> None:
    tracker = Tracker()
    tracker.delivered([5])
    with pytest.raises(ValueError, match="offset 0 after 5"):
        tracker.delivered([0])


def test_a_dropped_record_holds_the_position() -> None:
    tracker = Tracker()
    tracker.delivered([0, 1])
    assert tracker.start(0)
    assert tracker.start(1)
    tracker.resting(0)
    tracker.finished(1)
    assert tracker.running == 0
    assert tracker.committable() is None
