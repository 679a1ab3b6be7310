"""The kill loop: publish a share, kill a process at random, again and again, and let the rest drain."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prove.stage import PATIENCE, Stage

#: The share of kills that wait until a handler runs in a victim, and for how many seconds at most.
AIMED, AIM = 0.6, 1.0

#: The share of kills that wait for a process that runs suspects to kill it, and for how many seconds at most.
ALONE, APPEARS = 0.25, 8.0


class KillLoop(Stage):
    """Kills worker processes, and the processes that they start for suspects."""

    def play(self) -> dict[str, Any]:
        self.supervised = False
        self._chosen = random.Random(self.plan.seed)
        self._kills = self._hits = self._alone = 0
        with self.publisher() as publish:
            self._kill_many(publish)
        self.settle_down()
        return {"kills": self._kills, "hits": self._hits, "alone": self._alone}

    def _kill_many(self, publish: Callable[[int], None]) -> None:
        """Publish a share before each kill, and kill only processes that have begun to work on something."""
        share = max(1, self.plan.messages // self.plan.kills)
        while self._kills < self.plan.kills:
            publish(share * (self.plan.workers if self.broker.kills_all else 1))
            self._begun()
            time.sleep(self._chosen.uniform(*self.plan.after))
            alone = self._quarantined() if self._chosen.random() < ALONE else []
            victims = self._all() if self.broker.kills_all else [self._chosen.choice(alone or self._begun())]
            if self.broker.kills_all or self._chosen.random() < AIMED:  # else few of those would hit anything
                self._aim(victims)
            for victim in victims:
                self._kill(victim)
            self.broker.evict(self.name)
            self.show({"kills": self._kills, "hits": self._hits, "alone": self._alone})

    def _all(self) -> list[int]:
        """All workers; of their processes for suspects half, because the others stop by themselves then."""
        alone = [victim for victim in self.suspects() if self._chosen.random() < 0.5]
        return alone + [worker.pid for worker in self.workers]

    def _quarantined(self) -> list[int]:
        """The processes that have begun to run suspects; waits a while for the first one."""
        end = time.monotonic() + APPEARS
        while time.monotonic() < end:
            self.staff()
            if begun := [pid for pid in self.suspects() if self._calls(pid)]:
                return begun
            time.sleep(0.02)
        return []

    def _begun(self) -> list[int]:
        """The processes that have called a handler; waits for the first one."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.staff()
            running = [worker.pid for worker in self.workers] + self.suspects()
            if begun := [pid for pid in running if self._calls(pid)]:
                return begun
            time.sleep(0.02)
        raise RuntimeError(f"no worker did anything for {PATIENCE:.0f} s; see {self.directory}/workers.log")

    def _aim(self, victims: list[int]) -> None:
        """Until one of them is in a handler, or for a moment."""
        end = time.monotonic() + AIM
        while time.monotonic() < end and not any(b"1" in self._calls(victim) for victim in victims):
            time.sleep(0.001)

    def _calls(self, pid: int) -> bytes:
        """One byte for each thread that has called a handler: 1 in a call."""
        try:
            return self._busy(pid).read_bytes()
        except FileNotFoundError:
            return b""

    def _busy(self, pid: int) -> Path:
        return self.directory / f"{pid}.busy"

    def _kill(self, victim: int) -> None:
        worker = next((worker for worker in self.workers if worker.pid == victim), None)
        if worker is not None:
            worker.kill()
            worker.wait()
        elif victim in self.suspects():
            os.kill(victim, signal.SIGKILL)
            self.wait_until(lambda: victim not in self.suspects(), "a killed process ends")
            self._alone += 1
        else:
            return  # it had nothing more to do and left
        self._kills += 1
        self._hits += b"1" in self._calls(victim)
        self._busy(victim).unlink(missing_ok=True)
