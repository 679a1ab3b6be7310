"""Plays README.md by itself, in a directory, queue and database of its own: `python play.py 200`.

Exits with 1 unless each payment has one receipt and one text, with a worker killed in between. The broker
and the database server are those of the environment, as for the shop.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from brokers import broker
from count import counts, select
from sqlalchemy import NullPool, create_engine, make_url, text

HERE = Path(__file__).resolve().parent
#: Seconds until a wait is given up.
PATIENCE = 60.0


def main() -> None:
    payments = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="idemq-sms-"))
        os.chdir(directory)
        name = f"sms-{uuid4().hex[:8]}"
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ |= {"PYTHONPATH": path, "PAYMENTS": name}
        if url := os.environ.get("DATABASE_URL"):
            os.environ["DATABASE_URL"] = stack.enter_context(own_database(url, name.replace("-", "_")))
        os.environ["GATEWAY"] = stack.enter_context(gateway())
        sys.exit(play(payments))


def play(payments: int) -> int:
    messages = broker()
    python("-m", "idemq", "db", "upgrade", "shop:app")
    python("shop.py")
    workers = [Worker(1), Worker(2)]
    try:
        wait(lambda: all(worker.children() for worker in workers), "both workers are started")
        while not kill_at_work(workers[0], payments):
            pass
        while True:
            wait(lambda: not (missing() or messages.left() or planned()), "every text has left")
            for worker in workers:
                worker.stop()
            if not messages.left():  # now also without what a worker held
                break
            workers = [Worker(3)]
        return subprocess.run([sys.executable, HERE / "count.py"], check=False).returncode
    finally:
        for worker in workers:
            worker.end()
        messages.remove()


def kill_at_work(worker: "Worker", payments: int) -> bool:
    """Send payments and kill the worker's process when a third of the texts have left.

    False: everything was done before the signal came, which shows nothing.
    """
    before = texts()
    with subprocess.Popen([sys.executable, HERE / "send.py", str(payments)]):
        wait(lambda: texts() >= before + payments // 3, "a third of the texts have left")
        killed = worker.kill()
        left = before + payments - texts()
    print(f"worker process {killed} was killed with {left} of {payments} texts still to leave")
    wait(lambda: worker.children()[-1] != killed, "the killed process is replaced")
    return left > 0


class Worker:
    """One `idemq run`: a parent that starts its worker process anew when it dies."""

    def __init__(self, number: int) -> None:
        self._log = Path(f"worker-{number}.log")
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "idemq", "run", "hurried:app"], stderr=log
            )

    def children(self) -> list[int]:
        """The process ids of its worker processes, as it logs them."""
        if self._process.poll() is not None:
            raise SystemExit(f"a worker has ended:\n{self._log.read_text()}")
        return [int(found) for found in re.findall(r"started, process (\d+)", self._log.read_text())]

    def kill(self) -> int:
        child = self.children()[-1]
        os.kill(child, signal.SIGKILL)
        return child

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # its worker process ends with it
            self._process.wait()


def python(*arguments: str) -> None:
    command = [HERE / part if part.endswith(".py") else part for part in arguments]
    subprocess.run([sys.executable, *command], check=True)


def texts() -> int:
    return Path("gateway.log").read_text().count("sent ")


def missing() -> int:
    """Payments without a receipt, or without a text."""
    return counts().lost


def planned() -> int:
    """Texts that are to be sent, or asked for again."""
    return len(list(select("SELECT kind FROM idemq_outgoing")))


def wait(condition: Callable[[], object], what: str) -> None:
    """For things in other processes, which send no event."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(log.read_text() for log in Path().glob("worker-*.log"))
            raise SystemExit(f"not within {PATIENCE:.0f} s: {what}\n{logs}")
        time.sleep(0.01)


@contextmanager
def gateway() -> Iterator[str]:
    """A gateway on a free port."""
    command = [sys.executable, str(HERE / "gateway.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


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
