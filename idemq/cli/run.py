"""`idemq run`: whatever can be wrong is an error before the first delivery; then the worker takes over."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer
from sqlalchemy import Connection, Engine, Pool, QueuePool
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from idemq import migrate, names
from idemq.app import App, Declared
from idemq.cli.isolation import Isolation
from idemq.cli.loading import AppName, Failure, Unreachable, engine_of, load, with_connection
from idemq.cli.logs import Format, configure
from idemq.cli.supervisor import supervise
from idemq.errors import BrokerUnavailable, IdemqError, SchemaError, SetupError
from idemq.lanes import Feed
from idemq.quarantine import Quarantine
from idemq.relay import Leaving
from idemq.worker import Worker

log = logging.getLogger("idemq.run")

Result = TypeVar("Result")

Pairs = list[tuple[Feed, Engine | AsyncEngine]]


#: `--only` with this name runs the relay.
RELAY = "relay"

Only = Annotated[
    list[str] | None, typer.Option("--only", help="Run this consumer, or `relay`, only (repeatable).")
]
Processes = Annotated[int, typer.Option(min=1, help="Worker processes; what dies is started again.")]
LogFormat = Annotated[Format, typer.Option(help="How log lines are written.")]
Grace = Annotated[float, typer.Option(min=0, help="Seconds that a stop waits for running handlers.")]
Child = Annotated[bool, typer.Option("--child", hidden=True)]
Suspects = Annotated[str, typer.Option("--suspects", hidden=True)]


def run(
    app: AppName,
    only: Only = None,
    processes: Processes = 1,
    log_format: LogFormat = Format.text,
    grace: Grace = 30.0,
    child: Child = False,
    suspects: Suspects = "",
) -> None:
    """Run the consumers of an app until SIGTERM or Ctrl-C; a second signal ends it at once, which is safe."""
    configure(log_format)
    if not child:
        raise SystemExit(supervise(sys.argv[1:], processes))
    _stop_with_parent()
    loaded = load(app)
    try:
        feeds = prepare(loaded, _chosen(loaded, only), brokers=not suspects)
        leaving = loaded.leaving() if not only or RELAY in only else None
    except (IdemqError, Failure) as error:  # nothing of this is mended by starting the process again
        raise SetupError(str(error).replace(" APP`", f" {app}`")) from None
    pairs = [(feed, loaded.engine_for(feed.consumer)) for feed in feeds]
    if suspects:
        _run_suspects(pairs, bytes.fromhex(suspects), grace)
    else:
        _run_worker(pairs, grace, Isolation(app, log_format.value, grace), leaving)


def _run_worker(pairs: Pairs, grace: float, isolation: Isolation, leaving: Leaving | None) -> None:
    worker = Worker(pairs, isolation, leaving)

    def stop() -> None:
        isolation.let_go()  # at once: both graces run at the same time
        worker.stop()

    _stop_on_signals(stop)
    ended = worker.run(grace, lambda: log.info("started, process %d", os.getpid()))
    isolation.close()
    if not ended:
        log.warning("a call did not end within %.0f s: ending the process; its message comes again", grace)
        os._exit(1)
    if isinstance(worker.failure, SetupError):
        raise worker.failure
    if worker.failure is not None:
        raise Failure(str(worker.failure))


def _run_suspects(pairs: Pairs, owner: bytes, grace: float) -> None:
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        end = threading.Timer(grace, os._exit, (1,))
        end.daemon = True
        end.start()

    _stop_on_signals(stop)
    log.info("started for suspects, process %d", os.getpid())
    Quarantine(pairs, owner, stopping).run()


def _chosen(app: App, only: list[str] | None) -> list[Declared]:
    relay = [RELAY] if app.leaving() is not None else []
    unknown = [name for name in only or () if name not in [*app.consumers, *relay]]
    if unknown:
        known = ", ".join([*app.consumers, *relay]) or "none"
        raise SetupError(f"--only {unknown[0]}: there is no such consumer; declared are: {known}")
    if not app.consumers and not relay:
        raise SetupError("the app declares no consumers")
    return [declared for name, declared in app.consumers.items() if not only or name in only]


def prepare(app: App, chosen: list[Declared], *, brokers: bool = True) -> list[Feed]:
    """Check tables, names and brokers, waiting for servers that do not answer yet.

    Raises `SetupError`, `SchemaError` or `Failure` for what waiting does not mend.
    """
    refuse_small_pools(app, chosen)
    trigger = _patiently(lambda: with_connection(app, lambda connection: _check_tables(app, connection)))
    return [_feed(app, declared, trigger, brokers=brokers) for declared in chosen]


def refuse_small_pools(app: App, chosen: list[Declared]) -> None:
    """Raise `SetupError` where an engine of the user's cannot give every lane a connection.

    A lane holds its connection, so one that came too late would never get any.
    """
    users: dict[Pool, list[Declared]] = {}
    for declared in chosen:
        engine = app.engine_for(declared.consumer)
        pool = engine.sync_engine.pool if isinstance(engine, AsyncEngine) else engine.pool
        users.setdefault(pool, []).append(declared)
    leaving = app.leaving()
    for pool, several in users.items():
        if not isinstance(pool, QueuePool) or pool._max_overflow < 0:
            continue  # it gives as many as are wanted
        needed, most = sum(each.concurrency for each in several), pool.size() + pool._max_overflow
        relay = leaving.connections if leaving is not None and leaving.pool is pool else 0
        if needed + relay > most:
            names = ", ".join(repr(each.consumer.name) for each in several)
            and_relay = f" and {relay} for the relay" if relay else ""
            raise SetupError(
                f"consumer {names}: concurrency needs {needed} connections, one for each message worked on"
                f"{and_relay}, but the pool of the engine gives {most}: "
                f"create_engine(..., pool_size={needed + relay}), "
                "or a lower concurrency"
            )


def _feed(app: App, declared: Declared, trigger: bool, *, brokers: bool) -> Feed:
    consumer, source = declared.consumer, declared.source
    number = _patiently(lambda: _register(app, declared))
    feed = Feed(consumer, source, declared.concurrency, declared.prefetch, number, trigger)
    if not brokers:
        return feed
    try:
        warnings = _patiently(source.check)
    except SetupError as error:
        raise SetupError(f"consumer {consumer.name!r}: {error}") from None
    log.info(
        "%s: from %s, %d at a time in this process (prefetch %d), into %s",
        consumer.name,
        source.description,
        declared.concurrency,
        declared.prefetch,
        engine_of(app).url.render_as_string(hide_password=True),
    )
    for warning in warnings:
        log.warning("%s: %s: %s", consumer.name, source.description, warning)
    return feed


def _check_tables(app: App, connection: Connection) -> bool:
    problems = migrate.check(connection, app.schema)
    if problems:
        raise SchemaError("; ".join(problems))
    for warning in migrate.durability(connection):
        log.warning("the database: %s", warning)
    return migrate.has_strict(connection, app.schema)


def _register(app: App, declared: Declared) -> int:
    name, before = declared.consumer.name, declared.known_as
    number: int = Retrying(  # another process may register the same name at the same moment
        retry=retry_if_exception_type(Failure),
        stop=stop_after_attempt(8),
        wait=wait_random(0, 0.5),
        reraise=True,
    )(with_connection, app, lambda connection: names.register(connection, name, before, app.schema))
    return number


def _patiently(call: Callable[[], Result]) -> Result:
    """Until the server answers; one line each time that it does not."""
    return Retrying(
        retry=retry_if_exception_type((Unreachable, BrokerUnavailable)),
        wait=wait_exponential(multiplier=0.5, max=15) + wait_random(0, 1),
        before_sleep=lambda state: log.warning(
            "%s; tried again", state.outcome and state.outcome.exception()
        ),
    )(call)


def _stop_on_signals(stop_in_order: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT stops in order; the second ends the process at once."""
    signalled: list[int] = []  # no lock: the handler may interrupt itself

    def stop(number: int, _frame: object) -> None:
        if signalled:
            os._exit(128 + number)
        signalled.append(number)
        stop_in_order()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, lambda *_: stop_in_order())


def _stop_with_parent() -> None:
    """The parent holds the other end of standard input; when it closes that or dies, we stop in order."""

    def wait() -> None:
        try:
            while os.read(0, 1024):
                pass
        except OSError:
            pass
        os.kill(os.getpid(), signal.SIGHUP)  # of its own kind: it counts as no SIGTERM

    signal.signal(signal.SIGHUP, lambda *_: os._exit(0))  # nothing has begun yet
    threading.Thread(target=wait, name="idemq-parent", daemon=True).start()
