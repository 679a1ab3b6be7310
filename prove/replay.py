"""Messages that go dead for a reason, which is then mended: `idemq dead retry` brings all of them through."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

from prove.stage import APP, Stage


class Replay(Stage):
    """Copies arrive while the messages are dead, and after they were retried."""

    def play(self) -> dict[str, Any]:
        flag, messages = self.directory / "flag", self.plan.messages
        flag.touch()
        with self.publisher() as publish:
            publish(messages)
            self.staff()
            self._wait_for_dead(messages)
            publish(int(messages * self.plan.copies / 3))  # copies, which come after all originals
            self.wait_until(lambda: self.broker.left(self.name) == 0, "copies of dead messages are absorbed")
            buried, early = self.dead(), self.effects()
            flag.unlink()
            first = self._retry()
            publish(int(messages * self.plan.copies / 3))
            self.wait_until(lambda: self.effects() >= messages, "retried messages are processed")
        self.settle_down()
        second = self._retry()
        before = self.effects()
        self.staff()
        self.settle_down()
        red = (buried, early, first, second) != (messages, 0, messages, 0) or self.effects() != before
        return {"red": red, "buried": buried, "retried": first, "retried again": second}

    def _wait_for_dead(self, messages: int) -> None:
        """As long as more and more are dead."""
        while (dead := self.dead()) < messages:
            self.show({"dead": dead})
            self.wait_until(partial(self._more_than, dead), "more messages are dead")

    def _more_than(self, dead: int) -> bool:
        return self.dead() > dead

    def _retry(self) -> int:
        """How many dead letters it took from the table."""
        before = self.dead()
        command = [sys.executable, "-m", "idemq", "dead", "retry", APP, "--consumer", "prove", "--yes"]
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"idemq dead retry: {done.stdout}")
        return before - self.dead()
