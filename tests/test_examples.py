"""The examples show what they claim: each plays its story by itself and judges the outcome."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import URL

ROOT = Path(__file__).parent.parent
SMS = ROOT / "examples" / "sms" / "play.py"
FAILURES = ROOT / "examples" / "failures" / "play.py"
#: Enough that a kill finds both workers busy.
PAYMENTS = 48


def play(script: Path, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", script, *arguments],
        env={name: value for name, value in os.environ.items() if not name.endswith(("_URL", "_SERVERS"))}
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.situation(5)
def test_one_text_for_each_payment_without_any_server() -> None:
    assert _with_trouble(play(SMS, str(PAYMENTS)))


@pytest.mark.situation(5)
@pytest.mark.parametrize("broker", ["rabbitmq", "kafka"])
def test_one_text_for_each_payment_on_servers(
    broker: str, postgres_url: URL, request: pytest.FixtureRequest
) -> None:
    variable, fixture = {
        "rabbitmq": ("RABBITMQ_URL", "rabbitmq_url"),
        "kafka": ("KAFKA_SERVERS", "kafka_servers"),
    }[broker]
    where = request.getfixturevalue(fixture)
    database = postgres_url.render_as_string(hide_password=False)
    assert _with_trouble(play(SMS, str(PAYMENTS), **{variable: where, "DATABASE_URL": database}))


def _with_trouble(printed: str) -> bool:
    """A worker was killed, and the gateway had its bad moments."""
    return "was killed" in printed and re.search(r"^troubled +[1-9]", printed, re.MULTILINE) is not None


def test_the_outcome_is_judged(tmp_path: Path) -> None:
    """A payment with two texts, and one without a receipt, are found."""
    (tmp_path / "published.txt").write_text("pay-1\npay-1\npay-2\n")
    (tmp_path / "gateway.log").write_text("sent pay-1\nsent pay-1\nsent pay-2\n")
    make = "import sqlite3; c = sqlite3.connect('shop.db'); c.execute('CREATE TABLE receipts (payment)');"
    fill = "c.execute('INSERT INTO receipts VALUES (?)', ('pay-1',)); c.commit()"
    subprocess.run([sys.executable, "-c", make + fill], cwd=tmp_path, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    count = [sys.executable, str(SMS.with_name("count.py"))]
    judged = subprocess.run(count, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    figures = dict(line.replace("asked again", "again").split()[:2] for line in judged.stdout.splitlines())
    assert judged.returncode == 1
    assert (figures["lost"], figures["double"]) == ("1", "1")


def test_what_fails_is_parked_or_dead_and_nothing_is_lost() -> None:
    printed = play(FAILURES)
    assert "as README.md says" in printed
    told = re.findall(r"^ +(idemq (?:db|dead|parked|status) [^#\n]*[^# \n])", _readme(FAILURES), re.MULTILINE)
    done = re.sub(r"dead show shop:app \S+", "dead show shop:app ID", printed)
    assert len(told) == 8
    assert [command for command in told if f"$ {command}\n" not in done] == []


def _readme(script: Path) -> str:
    return script.with_name("README.md").read_text(encoding="utf-8")
