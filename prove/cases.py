"""What may happen to one effect: the provider, the gateway's fault, and the steps at which its process dies.

pick      | nothing of it was picked, everything was planned
picked    | `sending` is committed, nothing was called
connected | during the call, the gateway has nothing of it
accepted  | during the call, the text has left, and no answer was read
answered  | the outcome is known here, and not written down
written   | it is written down
reap      | what a process left in `sending` is about to be in doubt
reaped    | it is in doubt
asking    | picked for a look-up, which was not asked
told      | the look-up has answered, which is not written down
recorded  | it is written down
again ... | the steps of a further attempt
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from prove.gateway import FAULTS

PROVIDERS = ("key", "look-up", "none")

FIRST = ("picked", "connected", "accepted", "answered", "written")
AGAIN = tuple(f"again {step}" for step in FIRST)
LOOK_UP = ("asking", "told", "recorded")

#: Each phase ends with the death of the process, when all its cases stand at their step.
PHASES = (("pick",), FIRST, ("reap",), ("reaped",), LOOK_UP + AGAIN)


@dataclass(frozen=True, slots=True)
class Case:
    """One payment."""

    provider: str
    fault: str
    #: Where its process is killed, one after another.
    steps: tuple[str, ...]

    @property
    def payment(self) -> str:
        return "/".join([self.provider, self.fault, *self.steps]).replace(" ", "_")

    @classmethod
    def of(cls, payment: str) -> Case:
        provider, fault, *steps = payment.replace("_", " ").split("/")
        return cls(provider, fault, tuple(steps))


#: They show whether anything is sent again of which nobody knows.
TELLING = (Case("none", "no fault", ("accepted",)), Case("none", "500", ("written",)))


def phase(step: str) -> int:
    return next(number for number, steps in enumerate(PHASES) if step in steps)


def every() -> list[Case]:
    """Each step that can be reached with each fault and provider."""
    return [
        Case(provider, fault, steps)
        for provider in PROVIDERS
        for fault in FAULTS
        for steps in _steps(provider, fault)
    ]


def sample(count: int, seed: int) -> list[Case]:
    """`count` of them, with each step, fault and provider among them."""
    chosen = random.Random(seed)
    cases = every()
    chosen.shuffle(cases)
    taken: list[Case] = []
    seen: set[tuple[str, str]] = set()
    for case in cases:  # first those that bring something new, then any
        new = {(case.provider, step) for step in case.steps} | {("fault", case.fault)}
        if not new <= seen:
            taken.append(case)
            seen |= new
    return (taken + [case for case in cases if case not in taken])[:count]


def _steps(provider: str, fault: str) -> Iterator[tuple[str, ...]]:
    reached = [
        step
        for step in FIRST
        if not (step == "connected" and fault == "closed")
        and not (step == "accepted" and fault in ("closed", "reset"))
    ]
    yield ("pick",)
    yield from ((step,) for step in reached)
    latest = "accepted" if "accepted" in reached else "picked"
    yield from ((latest, step) for step in ("reap", "reaped"))
    if provider == "look-up":
        by_itself = fault in ("reset", "500", "drop", "hang")
        yield from ((step,) if by_itself else (latest, step) for step in LOOK_UP)
    if provider != "none":
        yield from (("picked", step) for step in AGAIN)
    if provider == "key" and latest == "accepted":
        yield from (("accepted", step) for step in AGAIN)
