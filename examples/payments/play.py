"""Plays README.md by itself, in a temporary directory: `python play.py`.

Exits with 1 unless each payment is debited once and every retry gets the first answer. The database is that
of the environment, as for the shop.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from sqlalchemy import Connection, NullPool, create_engine, text

HERE = Path(__file__).resolve().parent
#: Seconds until a wait is given up.
PATIENCE = 60.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="idemq-payments-") as directory:
        os.chdir(directory)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["SHOP"] = f"http://127.0.0.1:{probe.getsockname()[1]}"
        subprocess.run([sys.executable, HERE / "shop.py"], check=True)
        with shop() as process:
            the_answer_is_lost()
            a_double_click()
            another_amount()
            a_refusal()
            the_shop_dies(process)
        print("as README.md says: each payment was debited once, and every retry got the first answer")


def the_answer_is_lost() -> None:
    alice = customer("alice", 100)
    print("1. The money is taken, the answer is lost, the client asks again.")
    ask(alice, 30, "order-1", hang_up=True)
    wait(lambda: debits(alice) == [30], "the shop has taken the money")
    print("  no answer, and 30 are gone: asking again, with the same key")
    answer = pay(alice, 30, "order-1")
    told(answer, 201, replayed=True)
    expect((debits(alice), balance(alice)), ([30], 70))


def a_double_click() -> None:
    bob = customer("bob", 100)
    print("2. Twenty requests with one key at the same time.")
    with ThreadPoolExecutor(20) as clients:
        asked = [clients.submit(ask, bob, 30, "order-2") for _ in range(20)]
        answers = [each.result() for each in asked]
    expect({each.status if each else 0 for each in answers} <= {201, 409}, True)
    first = [each.text for each in answers if each and each.status == 201 and not each.replayed]
    again = [each.text for each in answers if each and each.replayed]
    later = 20 - len(first + again)
    print(f"  {len(first)} made the payment, {len(again)} got its answer, {later} were told to ask later")
    expect((len(first), set(again) <= set(first)), (1, True))
    expect((debits(bob), balance(bob)), ([30], 70))


def another_amount() -> None:
    carol = customer("carol", 100)
    print("3. The key of one payment with the amount of another.")
    told(pay(carol, 10, "order-3"), 201)
    told(pay(carol, 20, "order-3"), 422)
    expect((debits(carol), balance(carol)), ([10], 90))


def a_refusal() -> None:
    dave = customer("dave", 5)
    print("4. A payment is refused. Money comes in, and a late copy of the request arrives.")
    told(pay(dave, 30, "order-4"), 402)
    money_comes_in(dave, 95)
    told(pay(dave, 30, "order-4"), 402, replayed=True)
    told(pay(dave, 30, "order-5"), 201)
    expect((debits(dave), balance(dave)), ([30], 70))


def the_shop_dies(process: "subprocess.Popen[bytes]") -> None:
    erin = customer("erin", 100)
    print("5. The shop is killed in the middle of a payment, and started again.")
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(pay, erin, 60, "order-6")
        wait(lambda: erin in bank_log(), "the payment has reached the bank")
        process.kill()
        process.wait()
        print(f"  killed, with {balance(erin)} of 100 in the account: nothing was committed")
        expect((debits(erin), balance(erin)), ([], 100))
        with shop():
            told(asked.result(), 201)
            told(pay(erin, 60, "order-6"), 201, replayed=True)
    expect((debits(erin), balance(erin)), ([60], 40))


@dataclass(frozen=True)
class Answer:
    status: int
    replayed: bool
    text: str

    def __str__(self) -> str:
        return f"{self.status} {self.text}" + (" (the first answer again)" if self.replayed else "")


def ask(customer: str, amount: int, key: str, *, hang_up: bool = False) -> Answer | None:
    """One request. None: no answer came; `hang_up` does not wait for it."""
    shop = urlsplit(os.environ["SHOP"])
    headers = {"Customer": customer, "Idempotency-Key": f'"{key}"', "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection(shop.hostname or "", shop.port, timeout=30)) as connection:
        try:
            connection.request("POST", "/payments", json.dumps({"amount": amount}), headers)
            if hang_up:
                return None
            response = connection.getresponse()
            replayed = response.headers.get("Idempotency-Replayed") == "true"
            return Answer(response.status, replayed, response.read().decode())
        except (OSError, http.client.HTTPException):
            return None


def pay(customer: str, amount: int, key: str) -> Answer:
    """What a client should do: ask, with one key, until there is an answer that will not change any more."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        answer = ask(customer, amount, key)
        if answer is not None and answer.status != 409 and answer.status < 500:
            return answer
        time.sleep(0.5)
    raise SystemExit("the shop does not answer")


@contextmanager
def shop() -> Iterator["subprocess.Popen[bytes]"]:
    """The shop's process, until the block ends."""
    port = os.environ["SHOP"].rpartition(":")[2]
    with Path("shop.log").open("a") as log:
        command = [sys.executable, "-m", "uvicorn", "shop:app", "--port", port]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait(lambda: process.poll() is not None or ask("nobody", 0, "hello") is not None, "the shop answers")
        yield process
    finally:
        process.kill()
        process.wait()


def told(answer: Answer, status: int, *, replayed: bool = False) -> None:
    print(f"  {answer}")
    expect((answer.status, answer.replayed), (status, replayed))


def customer(who: str, money: int) -> str:
    """A new customer with so much money."""
    name = f"{who}-{uuid4().hex[:8]}"
    with shop_tables() as connection:
        values = {"customer": name, "money": money}
        connection.execute(text("INSERT INTO accounts VALUES (:customer, :money)"), values)
    return name


def money_comes_in(customer: str, money: int) -> None:
    with shop_tables() as connection:
        change = text("UPDATE accounts SET balance = balance + :money WHERE customer = :customer")
        connection.execute(change, {"customer": customer, "money": money})


def debits(customer: str) -> list[int]:
    with shop_tables() as connection:
        query = text("SELECT amount FROM debits WHERE customer = :customer")
        return list(connection.execute(query, {"customer": customer}).scalars())


def balance(customer: str) -> int:
    with shop_tables() as connection:
        query = text("SELECT balance FROM accounts WHERE customer = :customer")
        return int(connection.execute(query, {"customer": customer}).scalar_one())


def shop_tables() -> AbstractContextManager[Connection]:
    """The shop's own tables, in a transaction; idemq's are not asked."""
    return create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"), poolclass=NullPool).begin()


def bank_log() -> str:
    path = Path("bank.log")
    return path.read_text() if path.exists() else ""


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise SystemExit(f"found {found}\nwanted {wanted}\n{Path('shop.log').read_text()}")


def wait(condition: Callable[[], object], what: str) -> None:
    """For things in other processes, which send no event."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {PATIENCE:.0f} s: {what}\n{Path('shop.log').read_text()}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
