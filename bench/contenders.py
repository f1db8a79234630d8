"""What is compared: ways to get a table's changes into a table of another server.

Each contender has a table of its own on the same two clusters, with the same rows.  All of them write as
the same ordinary role and reach the target over TCP with a password.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from tbl_repl.cluster import SUPERUSER, Cluster

DBNAME = "bench"
OWNER = "app"
PASSWORD = "secret"

TABLE = """
CREATE TABLE {table} (
    id      bigint PRIMARY KEY,
    counter integer NOT NULL,
    note    text NOT NULL,
    changed timestamptz NOT NULL DEFAULT now(),
    amount  numeric(12,2)
)"""

ROWS = "SELECT g, g % 1000, rpad(md5(g::text), 60, md5(g::text)), now(), (g % 100000) / 100.0 FROM generate_series({first}, {last}) AS g"


def create_tables(source: psycopg.Connection, target: psycopg.Connection, table: str, rows: int) -> None:
    """The same table with the same rows on both sides, without any trigger."""
    for conn in (source, target):
        conn.execute(TABLE.format(table=table))
    source.execute(f"INSERT INTO {table} {ROWS.format(first=1, last=rows)}")
    with (
        source.cursor().copy(f"COPY {table} TO STDOUT") as taken,
        target.cursor().copy(f"COPY {table} FROM STDIN") as given,
    ):
        for block in taken:
            given.write(block)
    for conn in (source, target):
        conn.execute(f"VACUUM ANALYZE {table}")


def _no_trigger(source: psycopg.Connection, table: str) -> None:
    """The plain table."""


def _add_target(source: psycopg.Connection, table: str, mode: str) -> None:
    source.execute(
        "SELECT tbl_repl.add_target(%s::text::regclass, 'target', mode => %s, initial_copy => 'none')",
        [table, mode],
    )


def _sync(source: psycopg.Connection, table: str) -> None:
    _add_target(source, table, "sync")


def _async(source: psycopg.Connection, table: str) -> None:
    _add_target(source, table, "async")


def _fdw_trigger(source: psycopg.Connection, table: str) -> None:
    """A foreign table, and a row trigger that does to it what was done here."""
    source.execute(
        f"""
        CREATE SCHEMA IF NOT EXISTS there;
        IMPORT FOREIGN SCHEMA public LIMIT TO ({table}) FROM SERVER target_fdw INTO there;
        CREATE FUNCTION repeat_{table}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            CASE TG_OP
            WHEN 'INSERT' THEN
                INSERT INTO there.{table} VALUES (NEW.*);
            WHEN 'UPDATE' THEN
                UPDATE there.{table} AS t
                SET id = NEW.id, counter = NEW.counter, note = NEW.note, changed = NEW.changed, amount = NEW.amount
                WHERE t.id = OLD.id;
            WHEN 'DELETE' THEN
                DELETE FROM there.{table} AS t WHERE t.id = OLD.id;
            END CASE;
            RETURN NULL;
        END $$;
        CREATE TRIGGER repeat AFTER INSERT OR UPDATE OR DELETE ON {table}
            FOR EACH ROW EXECUTE FUNCTION repeat_{table}()
        """
    )


def _dblink_trigger(source: psycopg.Connection, table: str) -> None:
    """A row trigger with one named connection a session, which sends DELETE and INSERT as text."""
    source.execute(
        f"""
        CREATE FUNCTION send_{table}() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            message text := '';
        BEGIN
            IF NOT coalesce('bench' = ANY (dblink_get_connections()), false) THEN
                PERFORM dblink_connect('bench', 'target');
            END IF;
            IF TG_OP <> 'INSERT' THEN
                message := format('DELETE FROM {table} WHERE id = %L;', OLD.id);
            END IF;
            IF TG_OP <> 'DELETE' THEN
                message := message || format('INSERT INTO {table} VALUES (%L, %L, %L, %L, %L)',
                                             NEW.id, NEW.counter, NEW.note, NEW.changed, NEW.amount);
            END IF;
            PERFORM dblink_exec('bench', message);
            RETURN NULL;
        END $$;
        CREATE TRIGGER send AFTER INSERT OR UPDATE OR DELETE ON {table}
            FOR EACH ROW EXECUTE FUNCTION send_{table}()
        """
    )


@dataclass(frozen=True)
class Contender:
    """One way to replicate.

    name: as it stands in the table of results.  table: of its own, on both sides.
    attach: makes the table replicated.  replicated: whether the target has to equal the source.
    """

    name: str
    table: str
    attach: Callable[[psycopg.Connection, str], None]
    replicated: bool = True


SYNC = Contender("tbl_repl, sync", "t_sync", _sync)
ASYNC = Contender("tbl_repl, async", "t_async", _async)
FDW = Contender("postgres_fdw trigger", "t_fdw", _fdw_trigger)
DBLINK = Contender("dblink trigger", "t_dblink", _dblink_trigger)
PLAIN = Contender("no trigger", "t_plain", _no_trigger, replicated=False)
ALL = (SYNC, ASYNC, FDW, DBLINK, PLAIN)


def prepare(source: Cluster, target: Cluster, rows: int, contenders: tuple[Contender, ...] = ALL) -> None:
    """Databases, extensions, servers, the table of every contender."""
    for cluster in (source, target):
        with cluster.connect() as conn:
            conn.execute(f"CREATE ROLE {OWNER} LOGIN PASSWORD '{PASSWORD}'")
            conn.execute(f"CREATE DATABASE {DBNAME} OWNER {OWNER}")
    with source.connect(DBNAME, SUPERUSER) as conn:
        conn.execute("CREATE EXTENSION dblink")
        conn.execute("CREATE EXTENSION postgres_fdw")
        conn.execute(f"GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw, postgres_fdw TO {OWNER}")
    with source.connect(DBNAME, OWNER) as here, target.connect(DBNAME, OWNER) as there:
        here.execute("CREATE EXTENSION tbl_repl")
        here.execute("CREATE SEQUENCE more START 1000000000")
        for server, wrapper in (("target", "dblink_fdw"), ("target_fdw", "postgres_fdw")):
            here.execute(
                f"""
                CREATE SERVER {server} FOREIGN DATA WRAPPER {wrapper}
                    OPTIONS (host '127.0.0.1', port '{target.port}', dbname '{DBNAME}');
                CREATE USER MAPPING FOR {OWNER} SERVER {server} OPTIONS (user '{OWNER}', password '{PASSWORD}')
                """
            )
        for contender in contenders:
            create_tables(here, there, contender.table, rows)
            contender.attach(here, contender.table)
