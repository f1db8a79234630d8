"""Every way to install: files where a server looks for them, plain SQL, or by way of pg_tle."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psycopg
from psycopg import sql

from tbl_repl.cluster import Cluster
from tbl_repl.database import Connection, connect
from tbl_repl.errors import TblReplError, from_psycopg
from tbl_repl.script import control_version, extension_files, plain_script
from tbl_repl.servers import OLDEST, Server, server_of


def install_into(directory: Path) -> list[Path]:
    """Write control file and scripts into that directory; the paths written.

    Each file is replaced as a whole, so a CREATE EXTENSION at the same time never reads half a script.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in extension_files().items():
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=".tbl_repl")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            written.append(Path(temporary).replace(directory / name))
    except OSError as error:
        raise TblReplError(
            f"cannot write into {directory}: {error.strerror}",
            "Run it as a user who may write there, for example by sudo.",
        ) from error
    return written


def install(target: Server | str | Path) -> list[Path]:
    """Install into the server that a pg_config belongs to; the paths written."""
    server = target if isinstance(target, Server) else server_of(target)
    if server.major < OLDEST:
        raise TblReplError(
            f"PostgreSQL {server.major} is too old: {server.pg_config}",
            f"tbl_repl needs PostgreSQL {OLDEST} or later.",
        )
    return install_into(server.extension_dir)


def install_for(cluster: Cluster) -> None:
    """Make a disposable cluster find the extension; before its first start.

    From PostgreSQL 18 on without a trace in the server's own directories.
    """
    if cluster.server.major < 18:
        install(cluster.server)
        return
    directory = cluster.workdir / "ext"
    install_into(directory / "extension")
    cluster.settings["extension_control_path"] = f"{directory}:$system"


def _dblink_schema(connection: Connection) -> str:
    """The schema of dblink, which is created if this role may."""
    query = (
        "SELECT n.nspname FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace "
        "WHERE e.extname = 'dblink'"
    )
    row = connection.execute(query).fetchone()
    if row is None:
        try:
            connection.execute("CREATE EXTENSION dblink")
        except psycopg.Error as error:
            raise TblReplError(
                f"dblink is missing: {from_psycopg(error)}",
                "As a superuser, in this database: CREATE EXTENSION dblink;",
            ) from error
        row = connection.execute(query).fetchone()
    assert row is not None
    return str(row["nspname"])


def install_plain(dsn: str) -> str:
    """Create schema tbl_repl in a database by running the script, without an extension; its version.

    For servers where no files can be placed.  All or nothing: one transaction.
    """
    files = extension_files()
    with connect(dsn, "install") as connection, connection.transaction():
        row = connection.execute("SELECT to_regnamespace('tbl_repl') IS NOT NULL AS found").fetchone()
        if row and row["found"]:
            raise TblReplError(
                f"schema tbl_repl exists already in database {connection.info.dbname}",
                "Nothing was changed. To begin anew, drop its targets, then the schema.",
            )
        schema = _dblink_schema(connection)
        # as CREATE EXTENSION would have it
        connection.execute(
            sql.SQL("SET LOCAL search_path = pg_catalog, {}, pg_temp").format(sql.Identifier(schema))
        )
        connection.execute(plain_script(files).encode())
        version = control_version(files["tbl_repl.control"])
        connection.execute(
            sql.SQL("COMMENT ON SCHEMA tbl_repl IS {}").format(
                sql.Literal(f"tbl_repl {version}, installed by plain SQL")
            )
        )
    return version


def tle_statements(files: dict[str, str] | None = None) -> list[str]:
    """The SQL that makes pg_tle know the extension, ready to be run as it is."""
    files = files or extension_files()
    version = control_version(files["tbl_repl.control"])
    script = files[f"tbl_repl--{version}.sql"]
    # psql's commands mean nothing there; no text in the script ends a literal of standard_conforming_strings
    body = "".join(line for line in script.splitlines(True) if not line.startswith("\\"))
    quoted = body.replace("'", "''")
    return [
        "SET standard_conforming_strings = on;",
        f"""SELECT pgtle.install_extension(
    'tbl_repl',
    '{version}',
    'replicate single tables, columns or rows to other PostgreSQL servers, in real time',
    '{quoted}',
    ARRAY['dblink']
);""",
    ]


def install_tle(dsn: str) -> str:
    """Register the extension with pg_tle in a database, for CREATE EXTENSION tbl_repl; its version."""
    files = extension_files()
    with connect(dsn, "install") as connection, connection.transaction():
        row = connection.execute(
            "SELECT to_regprocedure('pgtle.install_extension(text, text, text, text, text[])') AS found"
        ).fetchone()
        if row is None or row["found"] is None:
            raise TblReplError(
                f"pg_tle is not in database {connection.info.dbname}",
                "CREATE EXTENSION pg_tle; or print the statements without --dsn: tbl-repl install --tle",
            )
        for statement in tle_statements(files):
            connection.execute(statement.encode())
    return control_version(files["tbl_repl.control"])
