"""The app under attack, as its own processes: `idemq run tests.attacked:app`; the environment says where.

Each call of the handler leaves a line in the file `begun`, before the effect is written. A handler whose
message is named in the file `hold` waits, in its transaction, until that file is gone. One whose message is
named in the file `deadly` ends its process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sqlalchemy import URL, make_url

from idemq import App, Message
from idemq.broker import Source
from idemq.rabbitmq import RabbitMQ
from tests.contract.brokers import Broker, RabbitBroker, attach, spec
from tests.contract.running import Shop
from tests.servers import eventually


def act(message: Message) -> None:
    with open("begun", "a") as begun:
        print(os.getpid(), message.id, file=begun, flush=True)
    if Path("deadly").exists() and Path("deadly").read_text() == message.id:
        os._exit(7)
    while Path("hold").exists() and Path("hold").read_text() == message.id:
        time.sleep(0.01)


def source(broker: Broker) -> Source:
    """As quick as the servers allow to notice who is frozen."""
    if isinstance(broker, RabbitBroker):
        arguments = broker.arguments if broker.single else None
        return RabbitMQ(broker.address, heartbeat=1).queue(broker.name, arguments=arguments)
    return broker.source()


def __getattr__(name: str) -> App:
    if name != "app":
        raise AttributeError(name)
    url = make_url(os.environ["ATTACKED_DATABASE"])
    broker = attach(os.environ["ATTACKED_BROKER"])
    options = {"concurrency": 2} | json.loads(os.environ["ATTACKED_OPTIONS"])
    return Shop(url, source(broker), os.environ["ATTACKED_KIND"], act, prepare=False, **options).app


@dataclass
class Field:
    """Where the attacked processes run, and what they leave there."""

    directory: Path
    url: URL
    broker: Broker
    kind: str
    #: Of the consumer.
    options: dict[str, object] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "ATTACKED_DATABASE": self.url.render_as_string(hide_password=False),
            "ATTACKED_BROKER": spec(self.broker),
            "ATTACKED_KIND": self.kind,
            "ATTACKED_OPTIONS": json.dumps(self.options),
            "PYTHONPATH": os.getcwd(),
        }
        command = [sys.executable, "-m", "idemq", "run", "tests.attacked:app", *options]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def hold(self, identifier: str) -> None:
        (self.directory / "hold").write_text(identifier)

    def poison(self, identifier: str) -> None:
        """The message ends whatever process runs it."""
        (self.directory / "deadly").write_text(identifier)

    def release(self) -> None:
        (self.directory / "hold").unlink()

    def begun(self) -> list[tuple[int, str]]:
        """Process and message of each call of the handler."""
        file = self.directory / "begun"
        if not file.exists():
            return []
        lines = [line.split() for line in file.read_text().splitlines()]
        return [(int(line[0]), line[1]) for line in lines if len(line) == 2]

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def end(self, process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
        """Its exit code, once it has ended after the signal."""
        process.send_signal(number)
        return process.wait(90)


@contextmanager
def attacked(directory: Path, url: URL, broker: Broker, kind: str) -> Iterator[tuple[Field, Shop]]:
    """A field, and the shop whose tables the processes write to. Nothing is left running."""
    shop = Shop(url, broker.source(), kind)
    scene = Field(directory, url, broker, kind)
    try:
        yield scene, shop
    except BaseException:
        print(scene.log())
        raise
    finally:
        for process in scene.processes:
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        shop.dispose()


def children(pid: int) -> list[int]:
    """Of the main thread and of all others: whoever starts a process is its parent."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def freeze(*pids: int) -> None:
    """Stop them; each of their threads stands still on return, which takes a moment after the signal."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        eventually(partial(_stands_still, pid), f"process {pid} stops")


def _stands_still(pid: int) -> bool:
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def gone(pid: int) -> bool:
    """Ended, and waited for by whoever has to."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_gone(*pids: int) -> None:
    eventually(lambda: all(gone(pid) for pid in pids), f"processes {pids} end")
