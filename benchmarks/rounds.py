"""Rounds of both sides in turn, and what comes out of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Engine, create_engine, make_url, text

from benchmarks.sides import Side
from benchmarks.work import Base, Pace
from idemq import migrate


@dataclass(slots=True)
class Race:
    """One row of the table: two ways to do the same work."""

    name: str
    #: None where nobody would write such a loop by hand.
    sides: dict[str, AbstractContextManager[Side] | None]
    paces: dict[str, list[Pace]] = field(default_factory=lambda: {"idemq": [], "hand": []})

    def run(self, rounds: int, warm_up: int, messages: int) -> None:
        """In turn, so that what else the machine does meets both sides alike; each goes first as often."""
        with ExitStack() as stack:
            sides = {name: stack.enter_context(side) for name, side in self.sides.items() if side is not None}
            for side in sides.values():
                side.round(warm_up, messages)  # connects, prepares statements
            for number in range(rounds):
                for name in sorted(sides, reverse=bool(number % 2)):
                    self.paces[name].append(sides[name].round(warm_up, messages))

    def per_second(self, side: str) -> float | None:
        paces = self.paces[side]
        return 1 / statistics.median(pace.wall for pace in paces) if paces else None

    def cpu(self, side: str) -> float | None:
        """Microseconds of this process for a message."""
        paces = self.paces[side]
        return 1e6 * statistics.median(pace.cpu for pace in paces) if paces else None

    @property
    def ratio(self) -> float | None:
        ours, hand = self.per_second("idemq"), self.per_second("hand")
        return ours / hand if ours is not None and hand is not None else None

    @property
    def paired(self) -> float | None:
        """The median of the rounds' own ratios: steadier where the machine's speed drifts."""
        pairs = list(zip(self.paces["hand"], self.paces["idemq"], strict=False))
        return statistics.median(hand.wall / ours.wall for hand, ours in pairs) if pairs else None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ratio": self.ratio,
            "ratio_in_pairs": self.paired,
            "sides": {
                side: {
                    "messages_per_second": self.per_second(side),
                    "cpu_us": self.cpu(side),
                    "wall_us": [round(1e6 * pace.wall, 1) for pace in paces],
                }
                for side, paces in self.paces.items()
                if paces
            },
        }


@contextmanager
def database(server: str) -> Iterator[URL]:
    """A PostgreSQL database of the benchmark's own, with the tables of both sides."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    name = f"bench_{uuid4().hex[:12]}"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        url = make_url(server).set(database=name)
        engine = create_engine(url)
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
            migrate.upgrade(connection)
        engine.dispose()
        yield url
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def check(engine: Engine) -> None:
    """A side that skips or repeats messages would not be measured fairly."""
    with engine.connect() as connection:
        found = connection.execute(text("SELECT count(*), count(DISTINCT payment) FROM postings")).one()
        claims = "SELECT (SELECT count(*) FROM inbox) + (SELECT count(*) FROM idemq_processed)"
        if not found[0] == found[1] == connection.execute(text(claims)).scalar():
            raise RuntimeError(f"{found[0]} postings of {found[1]} payments")
