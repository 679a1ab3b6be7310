"""The judge. Knows nothing of idemq but its two tables; run as a program of its own.

    python -m prove.checker PUBLISHED DATABASE [--left N]

PUBLISHED lists the ids that the broker confirmed, one a line, copies included. Prints one JSON object:
lost (published, no effect and no dead letter), double (more than one effect), torn (an effect without its
claim, or a claim without its effect), dead (dead letters), stray (an effect of something never published),
leftovers (transactions left open). Exits with 1 when anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg


def judge(published: Counter[UUID], database: str) -> dict[str, Any]:
    with psycopg.connect(database) as connection:
        effects = Counter(row[0] for row in connection.execute("SELECT id FROM effects"))
        claims = {row[0] for row in connection.execute("SELECT id FROM idemq_processed")}
        dead = {row[0] for row in connection.execute("SELECT identity FROM idemq_failed")}
        open_transactions = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
        ).fetchone()
    assert open_transactions is not None
    expected = set(published)
    return {
        "messages": len(expected),
        "copies": published.total() - len(expected),
        "effects": effects.total(),
        "lost": len(expected - set(effects) - dead),
        "double": sum(count > 1 for count in effects.values()),
        "torn": len(set(effects) ^ (claims - dead)),
        "stray": len(set(effects) - expected),
        "dead": len(dead),
        "leftovers": open_transactions[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("published", type=Path)
    parser.add_argument("database")
    parser.add_argument("--left", type=int, default=0, help="messages that the broker still holds")
    arguments = parser.parse_args()
    published = Counter(UUID(line) for line in arguments.published.read_text().split())
    verdict = judge(published, arguments.database)
    verdict["leftovers"] += arguments.left
    sys.stdout.write(json.dumps(verdict) + "\n")
    wrong = ("lost", "double", "torn", "stray", "dead", "leftovers")
    sys.exit(1 if any(verdict[name] for name in wrong) or not verdict["messages"] else 0)


if __name__ == "__main__":
    main()
