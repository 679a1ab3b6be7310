from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idemq.offsets import CAP, LEFT, Tracker, suspects_before

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


HISTORY = st.lists(
    st.tuples(
        st.sampled_from(
            ["produce", "deliver", "start", "start", "rest", "finish", "finish", "commit", "leave", "die"]
        ),
        st.integers(0, 10_000),
    ),
    max_size=150,
)


class Group:
    """Owners of a partition that follow one another, what is committed, and which records are suspicious."""

    def __init__(self) -> None:
        self.end = 0
        self.committed = (0, "")
        self.finished: set[int] = set()
        #: Started by an owner that died with it, or left while it was under way.
        self.suspicious: set[int] = set()
        self.owners = 0
        self.clean = True
        self._assign()

    def _assign(self) -> None:
        self.owner = f"{self.owners:x}"
        self.owners += 1
        self.tracker = Tracker()
        position, mark = self.committed
        self.tracker.begin(position, min(self.end, suspects_before(mark, self.owner)))
        self.committed = position, self.tracker.mark(position, self.owner)
        self.tracker.committed(position)
        self.read = position
        self.held: list[int] = []
        self.running: list[int] = []

    def step(self, name: str, number: int) -> None:
        getattr(self, f"_{name}")(number)

    def _produce(self, number: int) -> None:
        self.end += number % 7

    def _deliver(self, number: int) -> None:
        fresh = range(self.read, min(self.end, self.read + number % 7))
        self.tracker.delivered(fresh)
        self.read = max(self.read, fresh.stop)
        self.held += fresh
        for offset in fresh:
            suspect = self.tracker.suspect(offset)
            assert suspect or offset not in self.suspicious
            assert not (suspect and self.clean)

    def _start(self, number: int) -> None:
        if self.held:
            offset = self.held.pop(number % len(self.held))
            assert self.tracker.start(offset)
            self.running.append(offset)

    def _rest(self, number: int) -> None:
        if self.running:
            offset = self.running.pop(number % len(self.running))
            self.tracker.resting(offset)
            self.held.append(offset)

    def _finish(self, number: int) -> None:
        if self.running:
            offset = self.running.pop(number % len(self.running))
            self.tracker.finished(offset)
            self.finished.add(offset)
            self.suspicious.discard(offset)

    def _commit(self, number: int) -> None:
        position = self.tracker.committable()
        if position is not None:
            self.committed = position, self.tracker.mark(position, self.owner)
            self.tracker.committed(position)

    def _leave(self, number: int) -> None:
        self.tracker.stop_starting()
        last = self.tracker.leaving(self.owner)
        assert last is not None
        self.committed = last
        self.suspicious.update(self.running)
        self.clean = self.clean and not self.running
        assert (last[1] == LEFT) or not self.clean
        self._assign()

    def _die(self, number: int) -> None:
        self.suspicious.update(self.running)
        self.clean = False
        self._assign()


@pytest.mark.hazard("H20")
@settings(max_examples=500, deadline=None)
@given(steps=HISTORY)
def test_what_an_owner_ended_with_is_a_suspect_until_it_is_finished_and_nothing_is_while_all_leave_in_order(
    steps: list[tuple[str, int]],
) -> None:
    group = Group()
    for name, number in steps:
        group.step(name, number)


@pytest.mark.hazard("H20")
def test_as_many_records_are_suspects_as_an_owner_may_have_uncommitted() -> None:
    tracker = Tracker()
    tracker.begin(0, 10 * CAP)
    offsets = range(0, 4 * CAP, 2)  # transactions leave gaps
    tracker.delivered(offsets)
    assert [offset for offset in offsets if tracker.suspect(offset)] == list(offsets[:CAP])


def test_suspicion_ends_when_its_records_are_passed() -> None:
    tracker = Tracker()
    tracker.begin(5, suspects_before("open", "a1"))
    assert tracker.mark(5, "a1") == "open", "suspects for everybody, this owner too"
    tracker.begin(5, suspects_before("open to 7", "a1"))
    tracker.committed(5)
    tracker.delivered([5, 6, 7])
    assert tracker.leaving("a1") == (5, "open to 7")
    tracker.finished(5)
    tracker.finished(6)
    assert tracker.mark(7, "a1") == "open by a1"
    assert tracker.leaving("a1") == (7, LEFT)


def test_an_owner_suspects_what_others_had_and_not_what_it_had_itself() -> None:
    tracker = Tracker()
    tracker.begin(5, 0)
    tracker.delivered([5, 6, 7])
    assert tracker.start(6)
    for mark in (tracker.mark(5, "a1"), tracker.leaving("a1")):
        text = mark if isinstance(mark, str) else mark[1] if mark else ""
        assert suspects_before(text, "a1") == 0
        assert suspects_before(text, "b2") >= 7


@pytest.mark.parametrize("mark", [None, "", LEFT, "opened", "open by", "open to x", "open to 7 ", "OPEN"])
def test_what_is_no_mark_makes_no_suspects(mark: str | None) -> None:
    assert suspects_before(mark, "a1") == 0


def test_an_epoch_that_never_began_leaves_the_mark_of_the_one_before() -> None:
    assert Tracker().leaving("a1") is None
