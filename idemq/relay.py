"""The relay: sends what was planned, after its commit. One pump for each broker and each declared effect."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection, Engine, Pool, func, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq import schema as tables
from idemq.bridge import EventLoop
from idemq.broker import Broker
from idemq.effect_calls import EffectPump
from idemq.effects import Effect
from idemq.ledger import clock
from idemq.listening import Listener, can_listen
from idemq.outgoing import EFFECT, MESSAGE, REPLY, relays
from idemq.packing import shown
from idemq.pumps import Database, MessagePump, Pump

log = logging.getLogger("idemq.relay")

#: What is due for so long and has no pump is told of, and again after as long, in seconds.
TELL_EVERY = 60.0


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a relay is run with: the brokers and effects that the app declares, and where the rows are."""

    brokers: Sequence[Broker]
    effects: Sequence[Effect]
    engine: Engine | AsyncEngine
    schema: str | None

    @property
    def pool(self) -> Pool:
        """Which has to give the relay its connections."""
        return self.engine.sync_engine.pool if isinstance(self.engine, AsyncEngine) else self.engine.pool

    @property
    def connections(self) -> int:
        """One for all that is sent, and one to listen."""
        return 2 if can_listen(self.engine) else 1

    @property
    def asynchronous(self) -> bool:
        """It needs an event loop. What a function returns shows only then whether it is to be awaited."""
        return isinstance(self.engine, AsyncEngine) or bool(self.effects)


class Strays(Pump):
    """Sends nothing: it tells of what waits for a broker or effect that is not declared, so has no pump."""

    def __init__(self, leaving: Leaving, database: Database) -> None:
        super().__init__("undeclared", database, self)
        self._table = tables.table("idemq_outgoing", leaving.schema)
        brokers = [broker.name.encode() for broker in leaving.brokers]
        self._declared = {
            MESSAGE: brokers,
            REPLY: brokers,
            EFFECT: [effect.name.encode() for effect in leaving.effects],
        }
        self._tell_at = float("-inf")

    def round(self) -> bool:
        return False

    def reap(self, connection: Connection) -> None:
        if time.monotonic() < self._tell_at:
            return
        c = self._table.c
        strange = or_(*((c.kind == kind) & c.target.not_in(names) for kind, names in self._declared.items()))
        # Not what another app, which declares them, is about to send.
        due = c.not_before <= clock(connection) - timedelta(seconds=TELL_EVERY)
        query = select(c.kind, c.target, func.count(), func.min(c.at)).where(strange, due)
        for kind, target, count, since in connection.execute(query.group_by(c.kind, c.target)):
            what, where = ("effect", "@app.effect") if kind == EFFECT else ("broker", "App(brokers=...)")
            name, then = shown(target.decode()), since.isoformat(" ", "seconds")
            text = "%d for the %s %r wait, since %s: this app does not declare it, see %s; they are kept"
            log.error(text, count, what, name, then, where)
        self._tell_at = time.monotonic() + TELL_EVERY


class Relay:
    """All pumps of one process."""

    def __init__(self, leaving: Leaving, loop: EventLoop | None) -> None:
        database, schema = Database(leaving.engine, loop), leaving.schema
        effects = [EffectPump(effect, database, schema, loop) for effect in leaving.effects]
        messages = [MessagePump(broker, database, schema) for broker in leaving.brokers]
        self._pumps: list[Pump] = [*effects, *messages, Strays(leaving, database)]
        self._listener = None
        if can_listen(leaving.engine):
            self._listener = Listener(leaving.engine, loop, self.wake)
            self._listener.start()
        relays.add(self)
        for pump in self._pumps:
            pump.start()

    def wake(self) -> None:
        """Something was planned."""
        for pump in self._pumps:
            pump.wake()

    def pause(self) -> None:
        """Begin nothing more."""
        relays.discard(self)
        if self._listener is not None:
            self._listener.stop()
        for pump in self._pumps:
            pump.stop()

    def close(self, grace: float) -> bool:
        """Wait for what was begun. False: a call did not end within `grace` seconds; it will be in doubt."""
        end = time.monotonic() + grace
        for pump in self._pumps:
            pump.join(max(0.0, end - time.monotonic()))
        if self._listener is not None:
            self._listener.join(max(1.0, end - time.monotonic()))
        self.report()
        return not any(pump.is_alive() for pump in self._pumps)

    def report(self) -> None:
        """One line for each of what happened since the start."""
        for pump in self._pumps:
            if pump.counts:
                counts = ", ".join(f"{name} {count}" for name, count in sorted(pump.counts.items()))
                log.info("%s: %s", pump.title, counts)
