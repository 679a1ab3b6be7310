"""Per key in order while workers are killed, or frozen for longer than their broker waits, and thawed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prove.loop import KillLoop

#: Seconds that a worker is frozen: a bit longer than the broker waits for a sign of life (see `prove.shop`),
#: and sometimes long enough for its messages to be parked by who has them now.
FROZEN = {"short": (2.5, 5.0), "long": (8.0, 18.0)}


class Ordered(KillLoop):
    """Freezes and kills in turn, at random moments, mostly while a handler runs."""

    def play(self) -> dict[str, Any]:
        self._frozen = 0
        return {**super().play(), "freezes": self._frozen}

    def _kill_many(self, publish: Callable[[int], None]) -> None:
        rounds = ["freeze"] * self.plan.freezes + ["kill"] * self.plan.kills
        self._chosen.shuffle(rounds)
        share = max(1, self.plan.messages // len(rounds))
        for what in rounds:
            publish(share)
            begun = self._begun()
            time.sleep(self._chosen.uniform(*self.plan.after))
            if what == "freeze":
                self._freeze(self._chosen.choice(begun))
            else:
                victims = self._all() if self.broker.kills_all else [self._chosen.choice(begun)]
                self._aim(victims)
                for victim in victims:
                    self._kill(victim)
                self.broker.evict(self.name)
            self.show({"kills": self._kills, "freezes": self._frozen, "hits": self._hits})

    def _freeze(self, victim: int) -> None:
        self._aim([victim])
        try:
            os.kill(victim, signal.SIGSTOP)
        except ProcessLookupError:
            return  # it ran suspects, and there were none any more
        self._frozen += 1
        self._hits += b"1" in self._calls(victim)
        try:
            time.sleep(self._chosen.uniform(*FROZEN["long" if self.broker.kills_all else "short"]))
            if self._chosen.random() < 0.3:
                time.sleep(12)  # until what it has in hand is parked
        finally:
            with suppress(ProcessLookupError):  # it had ended already, and was waited for meanwhile
                os.kill(victim, signal.SIGCONT)
