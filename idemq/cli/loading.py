"""Finds the user's App by its name, and connects to its database, with every failure told in one line."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from traceback import extract_tb
from typing import Annotated, TypeVar

import typer
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.app import App
from idemq.drivers import is_refused, is_transient
from idemq.errors import IdemqError, SchemaError, SetupError
from idemq.names import naming_missing_tables

Result = TypeVar("Result")

#: The first argument of every command that works on an app.
AppName = Annotated[str, typer.Argument(metavar="APP", help="MODULE:NAME of the App, such as shop:app")]


class Failure(Exception):
    """Something outside the app went wrong; the text is for the user."""


class Unreachable(Failure):
    """The database does not answer now; it may later."""


def load(name: str) -> App:
    """The App that `name` (MODULE:NAME) names; modules are found in the working directory as well.

    Raises `SetupError` with one line that says what is wrong.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise SetupError(f"{name!r} does not name an app: write MODULE:NAME, such as shop:app")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    imported = _import(module, here)
    try:
        found = attrgetter(attribute)(imported)
    except AttributeError:
        others = [f"{module}:{key}" for key, value in vars(imported).items() if isinstance(value, App)]
        hint = f"; it has {', '.join(others)}" if others else ""
        raise SetupError(f"the module {module} has no {attribute!r}{hint}") from None
    if isinstance(found, type) or not isinstance(found, App):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise SetupError(f"{name} is {what}, not an idemq App")
    return found


def _import(module: str, here: str) -> object:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise SetupError(
                f"there is no module {error.name} in {here} or where Python is installed"
            ) from None
        raise SetupError(f"importing {module} failed: {error}{_place(error, here)}") from error
    except IdemqError as error:
        raise SetupError(f"{error}{_place(error, here)}") from error
    except Exception as error:
        raise SetupError(
            f"importing {module} failed: {type(error).__name__}: {error}{_place(error, here)}"
        ) from error


def _place(error: Exception, here: str) -> str:
    """Where in the user's own files it happened."""
    frames = [frame for frame in extract_tb(error.__traceback__) if frame.filename.startswith(here + os.sep)]
    return f" ({os.path.relpath(frames[-1].filename, here)}, line {frames[-1].lineno})" if frames else ""


def engine_of(app: App) -> Engine | AsyncEngine:
    """The sync engine where the app has one."""
    engine = app.engine or app.async_engine
    assert engine is not None  # an App is made of one, or of a URL with a driver
    return engine


def with_connection(app: App, work: Callable[[Connection], Result]) -> Result:
    """`work` in one committed transaction of the app's database, by whichever engine it has.

    Raises `Failure` when the database cannot be reached or refuses, without the password.
    """
    connected = False

    def begun(connection: Connection) -> Result:
        nonlocal connected
        connected = True
        return work(connection)

    engine = engine_of(app)
    try:
        if isinstance(engine, AsyncEngine):
            return asyncio.run(_in_a_loop(engine, begun))
        try:
            with engine.begin() as connection:
                return begun(connection)
        finally:
            engine.dispose()
    except Exception as error:
        # Before a connection is there, drivers raise errors of many kinds.
        if connected and not isinstance(error, DBAPIError):
            raise
        action = "refused" if connected else "cannot be reached"
        where = engine.url.render_as_string(hide_password=True)
        lasting = is_refused(error) or (connected and not is_transient(error))
        kind = Failure if lasting else Unreachable
        raise kind(f"the database {where} {action}: {_reason(error, engine.url.password)}") from error


@dataclass(frozen=True, slots=True)
class Database:
    """The database of an app, for commands that read and write its tables."""

    name: str
    app: App

    @property
    def schema(self) -> str | None:
        return self.app.schema

    def do(self, work: Callable[[Connection], Result]) -> Result:
        """`with_connection`; raises `SchemaError` naming the command when there are no tables."""

        def on_tables(connection: Connection) -> Result:
            with naming_missing_tables():
                return work(connection)

        try:
            return with_connection(self.app, on_tables)
        except SchemaError as error:
            raise SchemaError(str(error).replace(" APP`", f" {self.name}`")) from error

    def renamed(self, consumer: str) -> str:
        """What the app calls a consumer now, of which the database knows several names."""
        for name, declared in self.app.consumers.items():
            if consumer in declared.known_as:
                return name
        return consumer


async def _in_a_loop(engine: AsyncEngine, work: Callable[[Connection], Result]) -> Result:
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()  # its connections belong to this loop


def _reason(error: Exception, password: str | None) -> str:
    cause = getattr(error, "orig", None) or error
    words = " ".join(str(cause).split()) or type(cause).__name__
    return words.replace(password, "***") if password else words
