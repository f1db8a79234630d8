"""Connections to source databases, as the command line and the worker make them."""

from __future__ import annotations

import os
from collections.abc import Mapping
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


def connect(dsn: str, what: str = "cli", seconds: int = 10) -> Connection:
    """A connection in autocommit whose rows are dicts; raises CannotConnect after so many seconds.

    A connection that only listens notices within half a minute that its peer is gone.
    """
    bounds = {
        "connect_timeout": str(seconds),
        "tcp_user_timeout": "30000",
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


def settle(connection: Connection) -> Connection:
    """Free a connection that stays for long from what the role or the database sets for short ones."""
    settings = {
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_session_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "default_transaction_isolation": "read committed",
        "default_transaction_read_only": "off",
    }
    if connection.info.server_version >= 170000:
        settings["transaction_timeout"] = "0"
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    return connection


def require_extension(connection: Connection) -> None:
    """Raise TblReplError unless tbl_repl is in this database, as an extension or by plain SQL."""
    row = connection.execute("SELECT to_regnamespace('tbl_repl') IS NOT NULL AS found").fetchone()
    if row is None or not row["found"]:
        raise TblReplError(
            f"extension tbl_repl is not in database {connection.info.dbname}",
            "CREATE EXTENSION tbl_repl CASCADE;",
        )


def name_of(dsn: str) -> str:
    """What a person reads in place of a DSN: host, port, database; never a password."""
    return place_of(conninfo_to_dict(dsn))


def place_of(options: Mapping[str, Any]) -> str:
    """host:port/database of libpq's options."""
    host = options.get("host") or options.get("hostaddr") or "local"
    return f"{host}:{options.get('port') or 5432}/{options.get('dbname') or options.get('service') or ''}"
