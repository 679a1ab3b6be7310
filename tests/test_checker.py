"""The judge of `make prove` judges: for each thing that may be wrong there is a database in which it is."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import URL

from prove.checker import DEAD, WAITING, WRONG, judge

Published = list[tuple[UUID, str, str]]


@pytest.fixture
def database(postgres_url: URL) -> str:
    """The two tables as far as the checker reads them, and the effects."""
    plain = postgres_url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain) as connection:
        connection.execute("CREATE TABLE effects (seq bigserial, id uuid NOT NULL)")
        connection.execute("CREATE TABLE idemq_processed (id uuid NOT NULL)")
        connection.execute("CREATE TABLE idemq_failed (identity uuid, state int, reason text)")
    return plain


class Books:
    """What brokers and workers would have left behind."""

    def __init__(self, database: str) -> None:
        self._database = database
        self.published: Published = []

    def message(
        self,
        kind: str = "good",
        *,
        effects: int = 0,
        claim: bool = True,
        rows: tuple[tuple[int, str], ...] = (),
        published: int = 1,
        place: int | None = None,
    ) -> None:
        identifier = uuid4()
        at = len(self.published) if place is None else place
        self.published[at:at] = [(identifier, kind, "key")] * published
        with psycopg.connect(self._database) as connection:
            for _ in range(effects):
                connection.execute("INSERT INTO effects (id) VALUES (%s)", [identifier])
            if claim:
                connection.execute("INSERT INTO idemq_processed VALUES (%s)", [identifier])
            for state, reason in rows:
                connection.execute(
                    "INSERT INTO idemq_failed VALUES (%s, %s, %s)", [identifier, state, reason]
                )

    @property
    def wrong(self) -> dict[str, Any]:
        verdict = judge(self.published, self._database)
        return {name: verdict[name] for name in WRONG if verdict[name]}


@pytest.fixture
def books(database: str) -> Books:
    """Everything is as it should be."""
    books = Books(database)
    books.message(effects=1)
    books.message("failing", effects=1, published=2)
    books.message("rejected", rows=((DEAD, "rejected"),), published=2)
    books.message("exits", rows=((DEAD, "crashed"),))
    assert books.wrong == {}
    return books


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ({"claim": False}, {"lost": 1}),
        ({"effects": 2}, {"double": 1}),
        ({"effects": 1, "claim": False}, {"torn": 1}),
        ({}, {"lost": 1, "torn": 1}),  # claimed, and nothing done
        ({"effects": 1, "published": 0}, {"stray": 1}),
        ({"rows": ((DEAD, "crashed"),)}, {"blamed": 1}),
        ({"effects": 1, "rows": ((DEAD, "rejected"),)}, {"blamed": 1}),
        ({"kind": "exits", "rows": ((DEAD, "rejected"),)}, {"blamed": 1}),
        ({"kind": "exits", "rows": ((DEAD, "crashed"), (DEAD, "crashed"))}, {"blamed": 1}),
        ({"kind": "exits", "effects": 1}, {"spared": 2}),
        ({"kind": "rejected", "rows": ((WAITING, "suspect"),)}, {"spared": 1, "parked": 1}),
        ({"effects": 1, "rows": ((WAITING, "failed"),)}, {"parked": 1}),
        ({"effects": 1, "place": 0}, {"disorder": 1}),
    ],
)
def test_whatever_is_wrong_with_one_message_is_noticed(
    books: Books, message: dict[str, Any], wrong: dict[str, int]
) -> None:
    books.message(**message)
    assert books.wrong == wrong


def test_a_transaction_left_open_is_noticed(books: Books, database: str) -> None:
    with psycopg.connect(database) as forgotten:
        forgotten.execute("SELECT 1")
        assert books.wrong == {"leftovers": 1}
