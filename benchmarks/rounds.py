"""Rounds of both sides in turn, and what comes out of them."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Engine, create_engine, make_url, text

from benchmarks.work import Base, Pace
from idemq import migrate

#: One round of one side.
Round = Callable[[], Pace]


@dataclass(slots=True)
class Race:
    """One row of the table: two ways to do the same work."""

    name: str
    ours: Round
    #: None where nobody would write such a loop by hand.
    hand: Round | None
    paces: dict[str, list[Pace]] = field(default_factory=lambda: {"idemq": [], "hand": []})

    def run(self, engine: Engine, rounds: int, expected: int) -> None:
        """In turn, so that what else the machine does meets both sides alike; each goes first as often."""
        for number in range(rounds):
            sides = [("idemq", self.ours), ("hand", self.hand)]
            for side, consume in sides if number % 2 else reversed(sides):
                if consume is not None:
                    _empty(engine)
                    gc.collect()
                    self.paces[side].append(consume())
                    _check(engine, expected)

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

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ratio": self.ratio,
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


def _empty(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE postings, inbox, idemq_processed, idemq_failed"))


def _check(engine: Engine, expected: int) -> None:
    """A side that skips messages would be fast."""
    with engine.connect() as connection:
        found = connection.execute(text("SELECT count(*), count(DISTINCT payment) FROM postings")).one()
    if found[0] < expected or found[0] != found[1]:
        raise RuntimeError(f"{found[0]} postings of {found[1]} payments, where {expected} were to be made")
