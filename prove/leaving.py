"""What leaves, under fire: the relay killed at every step of an effect, and of the outbox."""

from __future__ import annotations

import random
import time
from typing import Any

from prove.cases import TELLING, every
from prove.fire import Fire
from prove.relayed import RelayLoop
from prove.stage import Stage

#: What other scenarios count and these do not.
NOTHING = dict.fromkeys(
    ("copies", "torn", "stray", "dead", "blamed", "spared", "parked", "disorder", "leftovers"), 0
)


class Leaving(Stage):
    """Judged by the gateway's log, or by what a consumer has received, instead of by the checker."""

    def execute(self) -> dict[str, Any]:
        self.directory.mkdir(parents=True)
        started = time.monotonic()
        verdict = self.play()
        return {**NOTHING, **verdict, "seconds": round(time.monotonic() - started, 1)}


class Effects(Leaving):
    """Every step with every fault and provider; with a broken core only the cases that tell."""

    def play(self) -> dict[str, Any]:
        control = self.plan.control
        cases = list(TELLING) if control else every()
        random.Random(self.plan.seed).shuffle(cases)
        fire = Fire(cases, self.database, self.directory, control)
        outcomes = fire.run()
        return {
            "red": not all(outcome.right for outcome in outcomes),
            "messages": len(outcomes),
            "kills": fire.kills,
            "hits": sum(outcome.killed for outcome in outcomes),
            "lost": sum(not outcome.texts and not outcome.in_doubt for outcome in outcomes),
            "double": sum(outcome.texts > 1 for outcome in outcomes),
            "in doubt": sum(outcome.in_doubt for outcome in outcomes),
            "outcomes": outcomes,
        }


class Outbox(Leaving):
    """The outbox's relay, step after step."""

    def play(self) -> dict[str, Any]:
        plan = self.plan
        loop = RelayLoop(plan.kills, self.broker, self.name, self.database, self.directory, plan.control)
        found = loop.run(lambda kills: self.show({"kills": kills}))
        return {
            "red": not found.right,
            "messages": found.messages,
            "kills": found.kills,
            "hits": found.kills,
            "lost": found.lost,
            "double": found.double,
            "unconfirmed": found.unconfirmed,
        }
