"""Alembic scripts that make and change the tables of idemq, and which of them a database has seen.

A script is frozen once it is released: it spells its tables out and imports nothing of idemq. It takes its
`Operations` as an argument instead of Alembic's global `op`, so that upgrading from a thread, from several
tasks of an event loop, or from inside the user's own Alembic script is safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def scripts() -> ScriptDirectory:
    return ScriptDirectory(Path(__file__).parent)


def options(schema: str | None) -> dict[str, Any]:
    """For a `MigrationContext`: the version is kept apart from the user's `alembic_version`."""
    return {"version_table": "idemq_version", "version_table_schema": schema}


def version(connection: Connection, schema: str | None = None) -> str | None:
    """The version that the database says it has; None when idemq never made its tables there."""
    return MigrationContext.configure(connection, opts=options(schema)).get_current_revision()


def newest() -> str:
    """The version that an upgrade leads to."""
    head = scripts().get_current_head()
    assert head is not None
    return head
