"""Connections to source databases, as the command line and the worker make them."""

from __future__ import annotations

import os
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from tbl_repl.errors import CannotConnect, TblReplError, UsageError

Row = dict[str, Any]
Connection = psycopg.Connection[Row]


def resolve_dsn(dsn: str | None) -> str:
    """The DSN given, or that of TBL_REPL_DSN; UsageError without either."""
    found = dsn or os.environ.get("TBL_REPL_DSN")
    if not found:
        raise UsageError("no database named", "Give --dsn, or set TBL_REPL_DSN.")
    try:
        conninfo_to_dict(found)
    except psycopg.ProgrammingError as error:
        raise UsageError(f"invalid DSN: {error}".strip()) from error
    return found


def connect(dsn: str, what: str = "cli") -> Connection:
    """A connection in autocommit whose rows are dicts; raises CannotConnect.

    A connection that only listens notices within half a minute that its peer is gone.
    """
    bounds = {
        "connect_timeout": "10",
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
    }
    given = conninfo_to_dict(dsn)
    missing = {name: value for name, value in bounds.items() if name not in given}
    conninfo = make_conninfo(dsn, application_name=f"tbl-repl {what}", **missing)
    try:
        return psycopg.connect(conninfo, autocommit=True, row_factory=dict_row)
    except psycopg.OperationalError as error:
        raise CannotConnect(str(error).strip()) from error


def require_extension(connection: Connection) -> None:
    """Raise TblReplError unless the extension is in this database."""
    row = connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'tbl_repl'").fetchone()
    if row is None:
        raise TblReplError(
            f"extension tbl_repl is not in database {connection.info.dbname}",
            "CREATE EXTENSION tbl_repl CASCADE;",
        )


def name_of(dsn: str) -> str:
    """What a person reads in place of a DSN: host, port, database; never a password."""
    parts = conninfo_to_dict(dsn)
    return f"{parts.get('host', 'local')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
