"""Connections to source databases, as the command line and the worker make them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from tbl_repl.errors import CannotConnect, IsStandby, TblReplError, UsageError, from_psycopg

Row = dict[str, Any]
Connection = psycopg.Connection[Row]

ENCODING = "UTF8"
"""Of every connection, whatever that of the database: bytes go from one to the other as they are."""

_FORM = (
    "The form of a DSN: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING; "
    "in a URI, special characters of user and password are percent-encoded "
    "('@' is %40, '/' is %2F, '%' is %25)."
)

# What libpq says of values before it has asked anybody; a server's words come behind "FATAL:".
_INVALID_VALUE = re.compile(
    r"(?:connection is bad: )?(?:connection to server .* failed: )?"
    r"((?:invalid (?:integer value|port number|\S+ value)|definition of service|"
    r"could not (?:match|parse))\b.*)"
)


def resolve_dsn(dsn: str | None) -> str:
    """The DSN given, or that of TBL_REPL_DSN; UsageError without either."""
    found = dsn or os.environ.get("TBL_REPL_DSN")
    if not found:
        raise UsageError("no database named", "Give --dsn, or set TBL_REPL_DSN.")
    try:
        given = conninfo_to_dict(found)
    except psycopg.ProgrammingError as error:
        # libpq quotes what it does not understand, and that may be a piece of a password
        why = "it cannot be parsed" if re.search("://|pass|secret|key", found) else str(error).strip()
        raise UsageError(f"invalid DSN: {why}", _FORM) from None
    if _user_is_ambiguous(found):
        raise UsageError("invalid DSN: '@' in user or password must be percent-encoded", _FORM)
    for port in str(given.get("port") or "").replace(" ", "").split(","):
        if port and not (port.isdecimal() and 0 < int(port) < 65536):
            raise UsageError("invalid DSN: port is not a number from 1 to 65535", _FORM)
    return found


def _user_is_ambiguous(dsn: str) -> bool:
    """Whether a URI has an '@' where libpq would take the end of a password for a host or a database.

    For libpq the first '@' ends the password, and a '/' before it the host.
    """
    uri = re.match(r"postgres(?:ql)?://([^@/]*@)?([^?/]*)([^?]*)", dsn)
    return uri is not None and ("@" in uri[2] or ("@" in uri[3] and ":" in (uri[1] or "")))


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
    conninfo = make_conninfo(dsn, application_name=f"tbl-repl {what}", client_encoding=ENCODING, **missing)
    try:
        connection = psycopg.connect(conninfo, autocommit=True, row_factory=dict_row)
    except psycopg.OperationalError as error:
        invalid = _INVALID_VALUE.match(str(error))
        if invalid:
            raise UsageError(f"invalid DSN: {invalid[1]}", _FORM) from error
        raise CannotConnect(str(error).strip()) from error
    except psycopg.ProgrammingError as error:
        raise UsageError(f"invalid DSN: {error}", _FORM) from error
    try:
        # psycopg reads no other styles, and role, database or environment may set them
        connection.execute(
            "SELECT set_config('datestyle', 'ISO, MDY', false), "
            "set_config('intervalstyle', 'postgres', false)"
        )
    except psycopg.OperationalError as error:
        connection.close()
        raise CannotConnect(str(error).strip()) from error
    return connection


def settle(connection: Connection) -> Connection:
    """Free a connection that stays for long from what the role or the database sets for short ones."""
    settings = {
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_session_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "default_transaction_isolation": "read committed",
        "default_transaction_read_only": "off",
        # the server, too, finds out that we are gone, or another worker would wait for our locks
        "tcp_keepalives_idle": "30",
        "tcp_keepalives_interval": "10",
        "tcp_keepalives_count": "3",
    }
    if connection.info.server_version >= 170000:
        settings["transaction_timeout"] = "0"
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    return connection


@contextmanager
def source_session(dsn: str, what: str) -> Iterator[Connection]:
    """A connection that stays for long.

    CannotConnect when it is lost: another exception than that of a target that is.
    """
    with settle(connect(dsn, what)) as connection:
        try:
            yield connection
        except psycopg.Error as error:
            if not connection.closed:
                raise
            raise CannotConnect(f"{name_of(dsn)}: {from_psycopg(error)}") from error


def require_rights(connection: Connection) -> None:
    """Raise TblReplError unless this role may replay."""
    row = connection.execute(
        """
        SELECT current_user AS role, quote_literal(quote_ident(current_user)) AS quoted,
               has_schema_privilege(n.oid, 'USAGE')
               AND (SELECT bool_and(has_function_privilege(p.oid, 'EXECUTE'))
                    FROM pg_proc AS p WHERE p.pronamespace = n.oid AND p.proname = '_replay') AS allowed
        FROM pg_namespace AS n WHERE n.nspname = 'tbl_repl'
        """
    ).fetchone()
    if row is not None and not row["allowed"]:
        raise TblReplError(
            f"role {row['role']} has no right to replay in database {connection.info.dbname}",
            f"As the owner of tbl_repl: SELECT tbl_repl.grant_access({row['quoted']}, 'operator');",
        )


def require_usage(connection: Connection, access: str) -> None:
    """Raise TblReplError unless this role may use the schema; access: what grant_access is to give it."""
    row = connection.execute(
        "SELECT current_user AS role, quote_literal(quote_ident(current_user)) AS quoted, "
        "has_schema_privilege('tbl_repl', 'USAGE') AS allowed"
    ).fetchone()
    if row is not None and not row["allowed"]:
        raise TblReplError(
            f"role {row['role']} has no right to use tbl_repl in database {connection.info.dbname}",
            f"As the owner of tbl_repl: SELECT tbl_repl.grant_access({row['quoted']}, '{access}');",
        )


def require_extension(connection: Connection) -> None:
    """Raise TblReplError unless tbl_repl is in this database, as an extension or not, of a primary."""
    row = connection.execute(
        "SELECT to_regnamespace('tbl_repl') IS NOT NULL AS found, pg_is_in_recovery() AS is_standby"
    ).fetchone()
    if row is not None and row["is_standby"]:
        raise IsStandby(
            f"the server of database {connection.info.dbname} is a standby",
            "Connect to the primary, as by target_session_attrs=primary and several hosts in the DSN.",
        )
    if row is None or not row["found"]:
        raise TblReplError(
            f"extension tbl_repl is not in database {connection.info.dbname}",
            "CREATE EXTENSION tbl_repl CASCADE;",
        )


def name_of(dsn: str) -> str:
    """What a person reads in place of a DSN: host, port, database; never a password.

    What the DSN leaves to environment and service file is looked up there, as libpq does; a service that the
    DSN names itself is called by its name, because libpq reads it only when it connects.
    """
    given = conninfo_to_dict(dsn)
    if "service" in given:
        return f"service={given['service']}" + (f"/{given['dbname']}" if "dbname" in given else "")
    found = {d.keyword.decode(): d.val.decode() for d in pq.Conninfo.get_defaults() if d.val} | given
    return place_of({"dbname": found.get("user"), **found})


def place_of(options: Mapping[str, Any]) -> str:
    """host:port/database of libpq's options."""
    host = options.get("host") or options.get("hostaddr") or "local"
    return f"{host}:{options.get('port') or 5432}/{options.get('dbname') or ''}"
