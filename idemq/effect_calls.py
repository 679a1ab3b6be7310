"""Calls the functions of effects, and writes down what is known of each call."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from idemq import outgoing
from idemq.bridge import EventLoop
from idemq.effect_rows import LOOK, EffectRows, Step
from idemq.effects import Effect
from idemq.errors import NotSent, Refused
from idemq.outgoing import Row
from idemq.packing import shown, words
from idemq.pumps import LOOK_EVERY, Database, Pump
from idemq.retry import pause

log = logging.getLogger("idemq.relay")


class EffectPump(Pump):
    """Calls the function of one effect, each in a thread of its own."""

    def __init__(
        self, effect: Effect, database: Database, schema: str | None, loop: EventLoop | None
    ) -> None:
        self._effects = EffectRows(effect.name, uuid4().bytes, schema, effect.repeats)
        super().__init__(effect.name, database, self._effects)
        self._effect, self._loop = effect, loop
        self._running: dict[int, threading.Thread] = {}
        self._renewed = time.monotonic()

    def round(self) -> bool:
        self._running = {seq: thread for seq, thread in self._running.items() if thread.is_alive()}
        if self._running and time.monotonic() >= self._renewed + outgoing.LEASE / 4:
            self._renew()
        free = self._effect.concurrency - len(self._running)
        if not free:
            return False
        # The lease is for the way to the call, and for the call's way to the provider.
        until = time.monotonic() + outgoing.LEASE / 2
        picked = self.database.run(lambda connection: self._effects.pick(connection, free))
        for row, step in picked:
            call = self._look_up if step == LOOK else partial(self._send, until=until)
            thread = threading.Thread(target=self._attempt, args=(call, row), name=self.name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads; the others of this batch may get one
                self._not_begun(row, step, error)
            else:
                self._running[row.seq] = thread
        return len(picked) == free

    def _reap(self) -> None:
        if self._running:  # after an outage our own leases may have ended
            self._renew()
        super()._reap()

    def _not_begun(self, row: Row, step: Step, error: RuntimeError) -> None:
        effects, rest = self._effects, pause(row.attempts)
        if step == LOOK:
            self.database.run(lambda connection: effects.unknown(connection, row, error, rest))
        else:
            self.database.run(lambda connection: effects.not_sent(connection, row, error, rest))

    def _attempt(self, call: Callable[[Row, Any], Callable[[Connection], bool]], row: Row) -> None:
        try:
            payload = self._effect.decoder(row.message.body or b"")
        except Exception as error:
            wrong = error
            log.error("%s: %s cannot be decoded (%s)", self.title, row.key, shown(words(error)))
            self._write(lambda connection: self._effects.not_sent(connection, row, wrong, None, hope=False))
        else:
            self._write(call(row, payload))
        self.wake()

    def _send(self, row: Row, payload: Any, until: float) -> Callable[[Connection], bool]:
        """Call the function; how to write down what came of it.

        Not after the moment `until`: this process was frozen, and another one may be sending it.
        """
        effects, name = self._effects, self.title
        if time.monotonic() >= until:
            late = NotSent("this process was frozen before the call")
            return lambda connection: effects.not_sent(connection, row, late, 0.0)
        try:
            self._called(self._effect.function, payload, row.key)
        except NotSent as error:
            not_sent, since = error, row.message.sent_at
            elapsed = 0.0  # it may have been planned long before its first attempt
            if since is not None and row.attempts > 1:
                elapsed = max(0.0, (datetime.now(UTC) - since).total_seconds())
            delay = self._effect.policy(row.attempts, elapsed, error)
            end = "" if delay is not None else "; retries used up: see `idemq doubt list`"
            log.warning("%s: %s not sent (%s)%s", name, row.key, shown(words(error)), end)
            return lambda connection: effects.not_sent(connection, row, not_sent, delay)
        except Refused as error:
            refused = error
            log.error("%s: %s refused (%s); see `idemq doubt list`", name, row.key, shown(words(error)))
            return lambda connection: effects.refused(connection, row, refused)
        except BaseException as error:  # also SystemExit: nobody knows how far the call got
            doubt, rest = error, pause(row.attempts)
            decides = (
                "a person decides: `idemq doubt list`" if self._effect.repeats.due is None else "to be seen"
            )
            log.error("%s: %s is in doubt (%s); %s", name, row.key, shown(words(error)), decides)
            return lambda connection: effects.in_doubt(connection, row, doubt, rest)
        return lambda connection: effects.done(connection, row)

    def _look_up(self, row: Row, payload: Any) -> Callable[[Connection], bool]:
        """Ask the provider; how to write down what it says."""
        effects, look_up = self._effects, self._effect.look_up
        rest = max(1.0, self._effect.repeats.settle or 0.0)
        try:
            assert look_up is not None
            there = self._called(look_up, payload, row.key)
            if not isinstance(there, bool):
                raise LookupError(f"the look-up cannot tell ({there!r})")
        except BaseException as error:
            unclear = error
            log.warning("%s: %s is in doubt (%s)", self.title, row.key, shown(words(error)))
            return lambda connection: effects.unknown(connection, row, unclear, rest)
        if there:
            return lambda connection: effects.done(connection, row)
        return lambda connection: effects.absent(connection, row)

    def _called(self, function: Callable[..., Any], payload: Any, key: str) -> Any:
        result = function(payload, key)
        if inspect.isawaitable(result):
            assert self._loop is not None
            result = self._loop.run(_awaited(result))
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError("it returned a generator, of which nothing has run")
        return result

    def _write(self, step: Callable[[Connection], bool]) -> None:
        """What is known of a call is written down while this process lives, however long it takes."""
        failures = 0
        while True:
            try:
                written = self.database.run(step)
            except Exception as error:
                failures += 1
                log.warning("%s: %s", self.title, shown(words(error)))
                time.sleep(pause(failures))
                continue
            self.counts["settled" if written else "too late"] += 1
            return

    def _renew(self) -> None:
        self.database.run(lambda connection: self._effects.renew(connection, list(self._running)))
        self._renewed = time.monotonic()

    def leave(self) -> None:
        """Until all calls have ended: their leases are renewed for so long."""
        while self._running:
            next(iter(self._running.values())).join(LOOK_EVERY)
            self._running = {seq: thread for seq, thread in self._running.items() if thread.is_alive()}
            if self._running and time.monotonic() >= self._renewed + outgoing.LEASE / 4:
                try:
                    self._renew()
                except Exception as error:
                    log.warning("%s: %s", self.title, shown(words(error)))


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
