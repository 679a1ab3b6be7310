"""The relay: sends what was planned, after its commit. One pump for each broker and each declared effect."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, Pool
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.bridge import EventLoop
from idemq.broker import Broker
from idemq.effect_calls import EffectPump
from idemq.effects import Effect
from idemq.pumps import Database, MessagePump, Pump

log = logging.getLogger("idemq.relay")


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a relay is run with: the brokers and effects that the app declares, and where the rows are."""

    brokers: Sequence[Broker]
    effects: Sequence[Effect]
    engine: Engine | AsyncEngine
    schema: str | None

    @property
    def pool(self) -> Pool:
        """Which has to give the relay one connection."""
        return self.engine.sync_engine.pool if isinstance(self.engine, AsyncEngine) else self.engine.pool

    @property
    def asynchronous(self) -> bool:
        return isinstance(self.engine, AsyncEngine) or any(effect.asynchronous for effect in self.effects)


class Relay:
    """All pumps of one process."""

    def __init__(self, leaving: Leaving, loop: EventLoop | None) -> None:
        database, schema = Database(leaving.engine, loop), leaving.schema
        self._effects = [EffectPump(effect, database, schema, loop) for effect in leaving.effects]
        messages = [MessagePump(broker, database, schema) for broker in leaving.brokers]
        self._pumps: list[Pump] = [*self._effects, *messages]
        for pump in self._pumps:
            pump.start()

    def wake(self) -> None:
        """Something was planned."""
        for pump in self._pumps:
            pump.wake()

    def pause(self) -> None:
        """Begin nothing more."""
        for pump in self._pumps:
            pump.stop()

    def close(self, grace: float) -> bool:
        """Wait for what was begun. False: a call did not end within `grace` seconds; it will be in doubt."""
        end = time.monotonic() + grace
        for pump in self._pumps:
            pump.join(max(0.0, end - time.monotonic()))
        calls = [pump.join_calls(max(0.0, end - time.monotonic())) for pump in self._effects]
        self.report()
        return all(calls) and not any(pump.is_alive() for pump in self._pumps)

    def report(self) -> None:
        """One line for each of what happened since the start."""
        for pump in self._pumps:
            if pump.counts:
                counts = ", ".join(f"{name} {count}" for name, count in sorted(pump.counts.items()))
                log.info("%s: %s", pump.title, counts)
