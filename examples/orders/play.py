"""Plays README.md by itself, in a directory, database and queues of its own: `python play.py`.

Exits with 1 unless each order is there once, what was ordered has left the stock once, and the order that was
paid stays paid. The broker and the database server are those of the environment, as for the shop.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, NullPool, Row, create_engine, make_url, text

from idemq import letters

HERE = Path(__file__).resolve().parent
#: Seconds until a wait is given up.
PATIENCE = 60.0
#: The lines of the journal that were printed.
TOLD: list[str] = []


def main() -> None:
    with ExitStack() as stack:
        os.chdir(stack.enter_context(tempfile.TemporaryDirectory(prefix="idemq-orders-")))
        name = f"orders-{uuid4().hex[:8]}"
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        os.environ |= {"PYTHONPATH": path, "ORDERS": name}
        if url := os.environ.get("DATABASE_URL"):
            os.environ["DATABASE_URL"] = stack.enter_context(own_database(url, name.replace("-", "_")))
        if url := os.environ.get("RABBITMQ_URL"):
            stack.callback(remove_queues, url, [f"{name}.create", f"{name}.status"])
        idemq("db", "upgrade", "shop:app")
        shop()
        play()


def play() -> None:
    with running(["orders", "statuses"]):
        an_order_is_sent_again()
        there_is_not_enough()
        paid_comes_first()
        with running(["relay"]):
            created_comes_late()
    with tables() as connection:
        expect(letters.parked(connection), [])
        expect(letters.dead_letters(connection), [])
    print("as README.md says: each order once, the stock right, the paid order paid, and no dead letter")


def an_order_is_sent_again() -> None:
    print(
        "1. An order for 4 of 10 pears. Its message comes twice, and then whoever ordered, impatient, sends"
    )
    print("   the order again, under another message id.")
    order = placed("o-1", 4)
    send("create", ("m-1", order), ("m-1", order), ("m-2", order))
    # The copy came before the second of these, and has no line in the journal.
    told("o-1 create: applied", "o-1 create: done before")
    expect((orders(), stock()), ({"o-1": ["new"]}, 6))
    print("   3 messages, 1 order, 6 pears left; the copy's handler did not even run")


def there_is_not_enough() -> None:
    print("2. An order for 7 pears, one for 6, and one more.")
    send("create", ("m-3", placed("o-2", 7)), ("m-4", placed("o-3", 6)), ("m-5", placed("o-4", 1)))
    told("o-2 create: not enough", "o-3 create: applied", "o-4 create: not enough")
    expect(orders(), {"o-1": ["new"], "o-2": ["declined"], "o-3": ["new"], "o-4": ["declined"]})
    expect(stock(), 0)
    print("   0 pears left, and never less")


def paid_comes_first() -> None:
    print(
        "3. What the shop publishes about its orders, `created`, waits in the outbox. Meanwhile o-1 is paid,"
    )
    print("   and the bank says so twice, under two message ids.")
    paid = json.dumps({"order": "o-1", "state": "paid"})
    send("status", ("m-6", paid), ("m-7", paid))
    told("o-1 paid: applied", "o-1 paid: already so")
    expect(orders()["o-1"], ["paid"])


def created_comes_late() -> None:
    print("4. The relay publishes: `created` comes, for o-1 after `paid`.")
    told("o-1 created: refused", "o-3 created: applied")
    expect(orders(), {"o-1": ["paid"], "o-2": ["declined"], "o-3": ["created"], "o-4": ["declined"]})
    expect((len(journal()), stock()), (9, 0))
    print("   o-1 stays paid: the late message changes nothing and is no error; o-3 is created")


def placed(order: str, quantity: int) -> str:
    return json.dumps({"order": order, "item": "pears", "quantity": quantity})


def send(queue: str, *messages: tuple[str, str]) -> None:
    """Ids and bodies."""
    shop("send", queue, *(part for message in messages for part in message))


def told(*lines: str) -> None:
    """Wait until the journal has so many lines more; they must be these."""
    before = len(TOLD)
    wait_for(before + len(lines))
    TOLD.extend(journal()[before:])
    for line in TOLD[before:]:
        print(f"     {line}")
    expect(sorted(TOLD[before:]), sorted(lines))


def wait_for(lines: int) -> None:
    """The worker is another process, and sends no event."""
    end = time.monotonic() + PATIENCE
    while len(journal()) < lines:
        if time.monotonic() > end:
            raise SystemExit(f"not within {PATIENCE:.0f} s: line {lines} of the journal{logs()}")
        time.sleep(0.05)


def journal() -> list[str]:
    query = "SELECT number, asked, became FROM journal ORDER BY row"
    return [f"{line.number} {line.asked}: {line.became}" for line in rows(query)]


def orders() -> dict[str, list[str]]:
    """The states of the rows that each order has."""
    found: dict[str, list[str]] = {}
    for order in rows("SELECT number, state FROM orders ORDER BY number"):
        found.setdefault(order.number, []).append(order.state)
    return found


def stock() -> int:
    return int(rows("SELECT stock FROM items")[0][0])


def rows(query: str) -> Sequence[Row[Any]]:
    """From the shop's own tables."""
    with tables() as connection:
        return connection.execute(text(query)).all()


def tables() -> Connection:
    url = os.environ.get("DATABASE_URL", "sqlite:///shop.db")
    arguments = {"timeout": 30} if url.startswith("sqlite") else {}
    return create_engine(url, poolclass=NullPool, connect_args=arguments).connect()


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise SystemExit(f"found {found}\nwanted {wanted}{logs()}")


def logs() -> str:
    return "".join(f"\n{log.read_text()}" for log in Path().glob("worker-*.log"))


@contextmanager
def running(only: Sequence[str]) -> Iterator[None]:
    """A worker for these consumers, until the block ends."""
    options = [part for name in only for part in ("--only", name)]
    with Path(f"worker-{only[0]}.log").open("w") as log:
        worker = subprocess.Popen([sys.executable, "-m", "idemq", "run", "shop:app", *options], stderr=log)
    try:
        yield
    finally:
        worker.terminate()
        worker.wait(PATIENCE)


def idemq(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "idemq", *arguments], check=True)


def shop(*arguments: str) -> None:
    subprocess.run([sys.executable, HERE / "shop.py", *arguments], check=True)


def remove_queues(url: str, names: Sequence[str]) -> None:
    import kombu

    with kombu.Connection(url) as connection, closing(connection.channel()) as channel:
        for name in names:
            channel.queue_delete(name)


@contextmanager
def own_database(url: str, name: str) -> Iterator[str]:
    """An empty database on the server that `url` names, until the block ends."""
    server = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield make_url(url).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


if __name__ == "__main__":
    main()
