"""Plays README.md by itself, in a temporary directory: `python play.py`.

Exits with 1 unless it comes out as README.md says.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, NullPool, create_engine, text

from idemq import letters

HERE = Path(__file__).resolve().parent
#: Seconds until a wait is given up.
PATIENCE = 90.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="idemq-failures-") as directory:
        os.chdir(directory)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        play()


def play() -> None:
    idemq("db upgrade shop:app")
    shop()
    with running():
        wait(lambda: "pay-bank" in parked(), "the payment that the bank keeps waiting is parked")
        idemq("parked list shop:app")
        wait(lambda: len(dead()) == 3 and not parked(), "three letters are dead, and nothing waits")
        expect(sorted(dead()), ["crashed", "no id", "rejected"])
        idemq("dead list shop:app")
        idemq(f"dead show shop:app {dead()['rejected']}")
        shop("take", "CHF")
        idemq("dead retry shop:app --reason rejected --why 'francs are taken now' --yes")
        wait(lambda: "pay-francs" in receipts(), "the payment in francs has its receipt")
        idemq("dead retry shop:app --reason rejected --why 'once more' --yes")
        idemq("dead drop shop:app --reason 'no id' --why 'published again, with an id' --yes")
        idemq("status shop:app")
    good = [f"pay-{number:02}" for number in range(20)]
    expect(receipts(), Counter([*good, "pay-bank", "pay-francs"]))
    expect(list(dead()), ["crashed"])
    expect(Path("bank.log").read_text().split(), ["asked"] * 3)
    print("as README.md says: each payment that could be done has one receipt, and nothing was lost")


@contextmanager
def running() -> Iterator[None]:
    """The worker, until the block ends."""
    with Path("worker.log").open("w") as log:
        worker = subprocess.Popen([sys.executable, "-m", "idemq", "run", "shop:app"], stderr=log)
        try:
            yield
        finally:
            worker.terminate()
            worker.wait(PATIENCE)


def idemq(command: str) -> None:
    print(f"$ idemq {command}", flush=True)
    subprocess.run([sys.executable, "-m", "idemq", *shlex.split(command)], check=True)


def shop(*arguments: str) -> None:
    subprocess.run([sys.executable, HERE / "shop.py", *arguments], check=True)


def connected() -> Connection:
    return create_engine("sqlite:///shop.db", poolclass=NullPool, connect_args={"timeout": 30}).connect()


def dead() -> dict[str, str]:
    """Reason and id of the dead letters."""
    with connected() as connection:
        return {letter.reason: str(letter.pk) for letter in letters.dead_letters(connection)}


def parked() -> list[str | None]:
    """Ids of the messages that wait to be tried again."""
    with connected() as connection:
        return [letter.id for letter in letters.parked(connection)]


def receipts() -> Counter[str]:
    with connected() as connection:
        return Counter(connection.execute(text("SELECT payment FROM receipts")).scalars())


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise SystemExit(f"found {found}\nwanted {wanted}\n{Path('worker.log').read_text()}")


def wait(condition: Callable[[], object], what: str) -> None:
    """For things in other processes, which send no event."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {PATIENCE:.0f} s: {what}\n{Path('worker.log').read_text()}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
