"""Which scenarios are run with which figures: short for every change, LONG=1 for the full ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from prove.brokers import Broker
from prove.controls import CONTROLS, EFFECT_CONTROLS, ORDER_CONTROLS, OUTBOX_CONTROLS
from prove.leaving import Effects, Outbox
from prove.loop import KillLoop
from prove.ordered import Ordered
from prove.outage import Outage
from prove.poison import Poison
from prove.replay import Replay
from prove.stage import Plan, Stage

#: The messages of this run come through a file; on which broker they come makes no difference to it.
EMBEDDED = "embedded"


class Scene(NamedTuple):
    """One run: its broker, its scenario's name, and what is to happen."""

    broker: str
    scenario: str
    plan: Plan

    @property
    def label(self) -> str:
        control = f", {self.plan.control}" if self.plan.control else ""
        return f"{self.broker} {self.scenario}{control}"


SCENARIOS: dict[str, type[Stage]] = {
    "kills": KillLoop,
    "failures": KillLoop,
    "poison": Poison,
    "replay": Replay,
    "order": Ordered,
    "outbox": Outbox,
    "effects": Effects,
    "outage": Outage,
}


def scenes(brokers: dict[str, Broker], seed: int, *, long: bool) -> Iterator[Scene]:
    for label, broker in brokers.items():
        for plan in _kills(broker, seed, long=long):
            yield Scene(label, "kills", plan)
        yield Scene(label, "failures", _failures(broker, seed, long=long))
        yield Scene(label, "poison", _poison(broker, seed, long=long))
        messages = 1000 if long else 500
        replay = Plan(messages, seed, kinds={"flagged": messages}, copies=0.2, apart=(messages, messages))
        yield Scene(label, "replay", replay)
        for plan in _order(broker, seed, long=long):
            yield Scene(label, "order", plan)
        for control in ("", *OUTBOX_CONTROLS):
            kills = 10 if control else 100 if long else 20
            yield Scene(label, "outbox", Plan(0, seed, kills=kills, control=control))
    for control in ("", *EFFECT_CONTROLS):
        yield Scene(EMBEDDED, "effects", Plan(0, seed, control=control))
    # More messages than the scenario has time for: the rest comes at its end.
    down, restarts, messages = (60.0, 3, 12_000) if long else (10.0, 1, 4_000)
    yield Scene("RabbitMQ", "outage", Plan(messages, seed, down=down, restarts=restarts))


def _kills(broker: Broker, seed: int, *, long: bool) -> Iterator[Plan]:
    workers, after = (3, (0.0, 0.6)) if broker.kills_all else (5, (0.0, 0.3))
    messages, kills = (20_000, 300) if long else (2_000, 30) if broker.kills_all else (3_000, 45)
    yield Plan(messages, seed, kills=kills, workers=workers, after=after)
    for control in CONTROLS:
        yield Plan(1000, seed, kills=20, workers=workers, after=after, control=control)


def _failures(broker: Broker, seed: int, *, long: bool) -> Plan:
    """5 % fail twice, 1 % are rejected; copies of 20 %, up to a fifth of all messages later."""
    workers, after = (3, (0.0, 3.0)) if broker.kills_all else (4, (0.0, 0.8))
    kills = (60 if broker.kills_all else 200) if long else 30
    messages = 5000 if long else 1000
    kinds = {"failing": messages // 20, "rejected": messages // 100}
    return Plan(
        messages,
        seed,
        kills=kills,
        workers=workers,
        after=after,
        kinds=kinds,
        copies=0.2,
        apart=(0, messages // 5),
    )


def _poison(broker: Broker, seed: int, *, long: bool) -> Plan:
    poison = (10 if broker.kills_all else 50) if long else 5
    kinds = {"exits": poison - poison // 2, "garbled": poison // 2}
    return Plan((1000 if long else 200) + poison, seed, kinds=kinds, max_crashes=3)


def _order(broker: Broker, seed: int, *, long: bool) -> Iterator[Plan]:
    """64 keys, 5 % fail twice, 1 % are rejected; a broken core on one broker only, which is enough."""
    messages, freezes, kills = (5_000, 20, 40) if long else (1_000, 2, 3)
    kinds = {"failing": messages // 20, "rejected": messages // 100}
    plan = Plan(messages, seed, kills, workers=3, after=(0.0, 0.6), kinds=kinds, keys=64, freezes=freezes)
    yield plan
    for control in ORDER_CONTROLS if long or broker.kills_all else ():
        yield replace(plan, messages=600, kills=2, freezes=0, kinds={"failing": 60}, control=control)
