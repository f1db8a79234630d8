"""Real servers for the tests: a World of clusters per version, a Pair of databases per test."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
import pytest
from psycopg import sql as pgsql
from psycopg.types.json import Jsonb
from pytest_postgresql.janitor import DatabaseJanitor

from support.proxy import Proxy
from tbl_repl.cluster import SUPERUSER, Cluster, make_workdir, rows_of
from tbl_repl.errors import TblReplError
from tbl_repl.install import install_for
from tbl_repl.servers import Server

PASSWORD = "secret"
# Roles that every cluster has; none is a superuser.
ROLES = {
    "owner": "LOGIN",  # owns the databases and, in most tests, the tables, on every node
    "writer": "LOGIN",  # an application: no right on anything
    "replicator": "LOGIN",  # for tests that map another role than owner
}
SETTINGS = {"max_prepared_transactions": "10", "max_connections": "100"}
WITH_EXTENSION = "template_with"
WITHOUT_EXTENSION = "template_without"

Params = Sequence[Any] | Mapping[str, Any] | None
_numbers = itertools.count(1)


class World:
    """The clusters of one server version; each is started when it is first asked for."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.workdir = make_workdir(in_memory=True)
        self._clusters: dict[str, Cluster] = {}

    def cluster(self, name: str) -> Cluster:
        """The running cluster of that name: 'source', 'target', 'third'."""
        if name not in self._clusters:
            cluster = Cluster(self.server, name, workdir=self.workdir, password=PASSWORD, settings=SETTINGS)
            try:
                install_for(cluster)
            except TblReplError as error:
                pytest.skip(f"cannot install into {cluster.server}: {error}")
            self._clusters[name] = cluster
            cluster.start()
            _prepare(cluster)
        return self._clusters[name]

    @property
    def clusters(self) -> list[Cluster]:
        return list(self._clusters.values())

    def repair(self) -> None:
        """After a test: running, with the settings of the beginning."""
        for cluster in self.clusters:
            if not cluster.running():
                cluster.start()
            auto = cluster.data / "postgresql.auto.conf"
            changed = [line for line in auto.read_text().splitlines() if line and not line.startswith("#")]
            if changed:
                cluster.sql("ALTER SYSTEM RESET ALL")
                cluster.restart()

    def close(self) -> None:
        for cluster in self.clusters:
            cluster.remove()
        shutil.rmtree(self.workdir, ignore_errors=True)


def _prepare(cluster: Cluster) -> None:
    """Roles and the two template databases."""
    with cluster.connect() as conn:
        for role, attributes in ROLES.items():
            conn.execute(f"CREATE ROLE {role} {attributes} PASSWORD '{PASSWORD}'")
        conn.execute("GRANT pg_signal_backend TO owner")  # who owns the extension: check() asks for it
        for template in (WITHOUT_EXTENSION, WITH_EXTENSION):
            conn.execute(f"CREATE DATABASE {template} OWNER owner")
    _create_extension(cluster, WITH_EXTENSION)
    cluster.sql("CHECKPOINT")


def _create_extension(cluster: Cluster, dbname: str) -> None:
    with cluster.connect(dbname) as conn:
        conn.execute("CREATE EXTENSION dblink")
        conn.execute("CREATE EXTENSION postgres_fdw")
        conn.execute("GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw, postgres_fdw TO owner")
    with cluster.connect(dbname, "owner") as conn:
        conn.execute("CREATE EXTENSION tbl_repl")


class Node:
    """One database of one test."""

    def __init__(
        self, cluster: Cluster, *, extension: bool = True, user: str = "owner", encoding: str | None = None
    ) -> None:
        """encoding: of the database, if it is not to be that of the cluster."""
        self.cluster = cluster
        self.user = user
        self.dbname = f"t_{os.getpid()}_{next(_numbers)}"
        self._connections: list[psycopg.Connection] = []
        self._cached: dict[str, psycopg.Connection] = {}
        self._roles: list[str] = []
        self.log_mark = cluster.log_size()
        self._janitor = DatabaseJanitor(
            user=SUPERUSER,
            host=str(cluster.socket_dir),
            port=cluster.port,
            dbname=self.dbname,
            template_dbname=WITH_EXTENSION if extension else WITHOUT_EXTENSION,
        )
        if encoding is None:
            self._janitor.init()
            cluster.sql(f"ALTER DATABASE {self.dbname} OWNER TO owner")
        else:
            cluster.sql(
                f"CREATE DATABASE {self.dbname} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C' OWNER owner"
            )
            if extension:
                _create_extension(cluster, self.dbname)

    # --- SQL

    def connect(self, user: str | None = None, *, tcp: bool = False, **more: str | int) -> psycopg.Connection:
        """A new connection in autocommit mode, closed when the test ends."""
        conn = self.cluster.connect(self.dbname, user or self.user, tcp=tcp, **more)
        self._connections.append(conn)
        return conn

    def sql(self, query: str, params: Params = None, *, user: str | None = None) -> list[tuple[Any, ...]]:
        """Run on this node's kept connection of that role; the last result's rows.

        Several statements at once are one transaction, as psql -c has it.
        """
        return rows_of(self._kept(user or self.user), query, params)

    def one(self, query: str, params: Params = None, *, user: str | None = None) -> Any:
        """The first column of the first row, or None."""
        rows = self.sql(query, params, user=user)
        return rows[0][0] if rows else None

    def admin(self, query: str, params: Params = None) -> list[tuple[Any, ...]]:
        """Run as the superuser."""
        return self.sql(query, params, user="postgres")

    def fresh(self, query: str, params: Params = None, *, user: str | None = None) -> list[tuple[Any, ...]]:
        """Run in a new session, closed afterwards: no persistent remote connection is left from before."""
        return self.cluster.sql(query, params, dbname=self.dbname, user=user or self.user)

    def forget(self) -> None:
        """Close the kept connections; the next sql() is a new session."""
        for conn in self._cached.values():
            conn.close()
        self._cached.clear()

    def _kept(self, user: str) -> psycopg.Connection:
        conn = self._cached.get(user)
        if conn is None or conn.closed or conn.broken:
            conn = self._cached[user] = self.connect(user)
        return conn

    def role(self, name: str, attributes: str = "LOGIN PASSWORD 'secret'") -> str:
        """Create a role that is dropped when the test ends."""
        self.admin(f'CREATE ROLE "{name}" {attributes}')
        self._roles.append(name)
        return name

    def rows(self, table: str, columns: str = "*", where: str = "true") -> list[str]:
        """The table's rows as sorted text."""
        chosen = f"SELECT {columns} FROM {table} WHERE {where}"
        query = f'SELECT r::text FROM ({chosen}) r ORDER BY (r::text) COLLATE "C"'
        return [row[0] for row in self.sql(query)]

    # --- faults

    def stop(self, mode: str = "fast") -> None:
        """Stop the server of this node ('fast' or 'immediate')."""
        self.forget()
        self.cluster.stop(mode)  # type: ignore[arg-type]

    def start(self) -> None:
        self.cluster.start()

    def demote(self) -> None:
        """Start the server of this node anew as a standby, of nobody."""
        self.stop()
        (self.cluster.data / "standby.signal").touch()
        self.start()

    def promote(self) -> None:
        self.admin("SELECT pg_promote()")
        self.forget()

    def kill(self) -> None:
        """SIGKILL to the whole server."""
        self.forget()
        self.cluster.kill()

    def backends(self, application_name: str = "tbl_repl%") -> list[int]:
        """Process ids of this database's sessions whose application_name is LIKE that."""
        return [
            row[0]
            for row in self.admin(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND application_name LIKE %s ORDER BY pid",
                [application_name],
            )
        ]

    @contextlib.contextmanager
    def frozen(self, application_name: str = "tbl_repl%") -> Iterator[list[int]]:
        """SIGSTOP to those backends; SIGCONT at the end, whatever happened."""
        pids = self.backends(application_name)
        assert pids, f"no backend with application_name LIKE {application_name!r}"
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """What the server has logged since the test began."""
        return self.cluster.log(self.log_mark)

    def close(self) -> None:
        self.forget()
        for conn in self._connections:
            conn.close()
        if not self.cluster.running():
            self.cluster.start()
        with self.cluster.connect() as conn:
            for (gid,) in conn.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = %s", [self.dbname]
            ).fetchall():
                with self.cluster.connect(self.dbname) as there:
                    there.execute(pgsql.SQL("ROLLBACK PREPARED {}").format(pgsql.Literal(gid)))
        self._janitor.drop()
        with self.cluster.connect() as conn:
            for role in reversed(self._roles):
                conn.execute(pgsql.SQL("DROP ROLE IF EXISTS {}").format(pgsql.Identifier(role)))


# How each parameter of add_target and alter_target is passed.
_CASTS = {
    "source_table": "regclass",
    "columns": "name[]",
    "key_columns": "name[]",
    "operations": "text[]",
    "column_map": "jsonb",
    "timeout": "interval",
}


class Pair:
    """A source and a target database (and, for ``trio``, a third), joined by foreign servers.

    server: the foreign server on the source that leads to the target; the user mapping of
    'owner' logs in as 'owner' there, by TCP and password.  third_server: the same to third.
    """

    def __init__(
        self,
        world: World,
        *,
        with_third: bool = False,
        plain_target: bool = False,
        plain_source: bool = False,  # then there is no foreign server either: dblink is missing
        encodings: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.world = world
        self.major = world.server.major
        self.server = "target_server"
        self.third_server = "third_server"
        self._proxies: list[Proxy] = []
        ours, theirs = encodings
        self.source = Node(world.cluster("source"), extension=not plain_source, encoding=ours)
        self.target = Node(world.cluster("target"), extension=not plain_target, encoding=theirs)
        self.third = Node(world.cluster("third"), extension=not plain_target) if with_third else None
        if not plain_source:
            self.join(self.source, self.target, self.server)
        if self.third:
            self.join(self.source, self.third, self.third_server)

    @property
    def nodes(self) -> list[Node]:
        return [node for node in (self.source, self.target, self.third) if node]

    def join(
        self,
        here: Node,
        there: Node,
        server: str,
        *,
        user: str = "owner",
        fdw: str = "dblink_fdw",
        port: int | None = None,
    ) -> str:
        """Create a foreign server on one node that leads to the other, with owner's mapping; its name."""
        here.sql(
            f"""
            CREATE SERVER {server} FOREIGN DATA WRAPPER {fdw}
                OPTIONS (host '127.0.0.1', port '{port or there.cluster.port}', dbname '{there.dbname}');
            CREATE USER MAPPING FOR {here.user} SERVER {server}
                OPTIONS (user '{user}', password '{PASSWORD}')
            """
        )
        return server

    def proxy(self, server: str | None = None, there: Node | None = None) -> Proxy:
        """Put a proxy between source and target: from now on new connections go through it."""
        proxy = Proxy((there or self.target).cluster.port)
        self._proxies.append(proxy)
        self.source.sql(f"ALTER SERVER {server or self.server} OPTIONS (SET port '{proxy.port}')")
        return proxy

    # --- the verbs, with Python values

    def both(self, ddl: str) -> None:
        """The same statement on every node."""
        for node in self.nodes:
            node.sql(ddl)

    def add_target(self, source_table: str, server: str | None = None, **options: Any) -> int:
        """tbl_repl.add_target as owner of the source; the target_id."""
        return int(
            self.call("add_target", source_table=source_table, server=server or self.server, **options)
        )

    def call(self, function: str, *, node: Node | None = None, **arguments: Any) -> Any:
        """Call a function of tbl_repl by named arguments on the source; its first value."""
        parts, values = [], {}
        for name, value in arguments.items():
            cast = f"::{_CASTS[name]}" if name in _CASTS else ""
            parts.append(f"{name} => %({name})s{cast}")
            values[name] = Jsonb(value) if isinstance(value, dict) else value
        return (node or self.source).one(f"SELECT * FROM tbl_repl.{function}({', '.join(parts)})", values)

    def status(self, target_id: int) -> str:
        """The status word of target_status."""
        return str(
            self.source.one("SELECT status FROM tbl_repl.target_status WHERE target_id = %s", [target_id])
        )

    def pending(self, target_id: int) -> int:
        """pending_rows of target_status."""
        return int(
            self.source.one(
                "SELECT pending_rows FROM tbl_repl.target_status WHERE target_id = %s", [target_id]
            )
        )

    def drain(self) -> None:
        self.source.sql("CALL tbl_repl.drain()")

    def begin_copy(self, target_id: int, piece_rows: int) -> Any:
        """As ``tbl-repl copy`` begins; the number of pieces."""
        self.source.sql("SELECT tbl_repl._copy_begin(%s)", (target_id,))
        return self.source.one("SELECT tbl_repl._copy_divide(%s, %s)", (target_id, piece_rows))

    def assert_same(
        self,
        table: str,
        dst: str | None = None,
        columns: str = "*",
        where: str = "true",
        there: Node | None = None,
    ) -> None:
        """Both tables hold the same rows."""
        ours = self.source.rows(table, columns, where)
        theirs = (there or self.target).rows(dst or table, columns)
        missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        assert ours == theirs, f"missing on target: {missing[:5]}, extra there: {extra[:5]}"

    # --- end

    def logs(self) -> list[tuple[str, str]]:
        """(name, log since the test began) of every node."""
        names = ("source", "target", "third")
        return [(name, node.log()) for name, node in zip(names, self.nodes, strict=False)]

    def close(self) -> None:
        for node in self.nodes:
            node.forget()
        for proxy in self._proxies:
            proxy.close()
        for node in self.nodes:
            node.close()
            node.cluster.sql(f"ALTER ROLE owner PASSWORD '{PASSWORD}'")
        self.world.repair()
