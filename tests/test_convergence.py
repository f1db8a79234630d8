"""Convergence: whatever happened, once the queue is empty the target holds exactly the source's rows.

A machine does what comes to its mind on three tables (two linked ones, one with a filter, a map and another
name over there), inside and outside transactions, while the line goes and comes; every drain point compares.
A history that goes wrong is to be kept below, as a test with a name.
"""

from __future__ import annotations

from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support import Pair, Proxy

PLAIN = """
CREATE TABLE parent (a integer, b text, u integer UNIQUE, v integer, PRIMARY KEY (b, a));
CREATE TABLE child (id integer PRIMARY KEY, a integer, b text, v integer NOT NULL,
    FOREIGN KEY (b, a) REFERENCES parent ON UPDATE CASCADE ON DELETE CASCADE);
"""
ALONE = "CREATE TABLE alone (id integer PRIMARY KEY DEFERRABLE, v integer, secret text);"
PARTS = """
CREATE TABLE parent (a integer, b text, u integer, v integer, PRIMARY KEY (b, a)) PARTITION BY HASH (b, a);
CREATE TABLE child (id integer PRIMARY KEY, a integer, b text, v integer NOT NULL,
    FOREIGN KEY (b, a) REFERENCES parent ON UPDATE CASCADE ON DELETE CASCADE) PARTITION BY RANGE (id);
CREATE TABLE alone (id integer PRIMARY KEY, v integer, secret text) PARTITION BY RANGE (id);
CREATE TABLE parent_0 PARTITION OF parent FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE parent_1 PARTITION OF parent FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE child_0 PARTITION OF child FOR VALUES FROM (MINVALUE) TO (4);
CREATE TABLE child_1 PARTITION OF child DEFAULT;
CREATE TABLE alone_0 PARTITION OF alone FOR VALUES FROM (MINVALUE) TO (4);
CREATE TABLE alone_1 PARTITION OF alone DEFAULT;
"""
THERE = "CREATE TABLE \"Alone there\" (v integer, hidden text, extra text DEFAULT 'kept', key integer PRIMARY KEY);"

ROWS = """
INSERT INTO parent SELECT g, CASE WHEN g < 4 THEN 'x' ELSE 'y' END, g, g FROM generate_series(0, 5) g;
INSERT INTO child SELECT g, g % 4, 'x', g FROM generate_series(0, 6) g;
INSERT INTO alone SELECT g, g, 'word' FROM generate_series(0, 6) g;
"""

ALONE_OPTIONS: dict[str, Any] = {
    "dst_table": '"Alone there"',
    "columns": ["v"],
    "column_map": {"key": "id", "hidden": "md5(secret)"},
    "row_filter": "v > 2",
}


class Scene:
    """The three tables and their targets on a pair; made anew by reset()."""

    def __init__(self, pair: Pair, proxy: Proxy, mode: str, capture: str) -> None:
        self.pair, self.proxy, self.mode, self.capture = pair, proxy, mode, capture
        self.targets: list[int] = []
        self.conn = pair.source.connect()
        self.in_transaction = False
        self.savepoint = False

    def reset(self) -> None:
        self.conn.close()
        self.proxy.set("pass")
        for target_id in self.targets:
            self.pair.call("drop_target", target_id=target_id)
        self.pair.both("DROP TABLE IF EXISTS child, parent, alone")
        self.pair.target.sql('DROP TABLE IF EXISTS "Alone there"')
        self.pair.source.sql(PARTS if self.capture == "row" else PLAIN + ALONE)
        self.pair.target.sql(PLAIN.replace("UNIQUE", "") if self.capture == "row" else PLAIN)
        self.pair.target.sql(THERE)
        self.pair.source.sql(ROWS)
        self.pair.source.sql("BEGIN")  # one copy of linked tables, so that their order does not matter
        self.targets = [
            self.pair.add_target(table, mode=self.mode, timeout="2 s", **options)
            for table, options in (
                ("child", {"row_filter": "v <> 3"}),
                ("alone", ALONE_OPTIONS),
                ("parent", {}),
            )
        ]
        self.pair.source.sql("COMMIT")
        self.conn = self.pair.source.connect()
        self.in_transaction = self.savepoint = False

    def do(self, *statements: str) -> None:
        """One transaction, or one step of the one that is open; whether it is refused is no concern of ours."""
        own = not self.in_transaction
        self.conn.execute("BEGIN" if own else "SAVEPOINT step")
        try:
            for statement in statements:
                self.conn.execute(statement)
            self.conn.execute("COMMIT" if own else "RELEASE step")
        except psycopg.Error:
            self.conn.execute("ROLLBACK" if own else "ROLLBACK TO step")

    def begin(self, isolation: str) -> None:
        self.conn.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        self.in_transaction, self.savepoint = True, False

    def finish(self, how: str) -> None:
        try:
            self.conn.execute(how)
        except psycopg.Error:
            assert self.mode == "sync"
        self.in_transaction = self.savepoint = False

    def set_savepoint(self) -> None:
        self.conn.execute("SAVEPOINT mine")
        self.savepoint = True

    def rollback_to_savepoint(self) -> None:
        self.conn.execute("ROLLBACK TO mine")

    def away(self) -> None:
        self.proxy.set("refuse")
        self.proxy.cut()

    def kill(self) -> None:
        self.pair.target.admin(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'tbl_repl%'"
        )

    def replay(self, rows: int) -> None:
        self.pair.source.sql("SELECT tbl_repl.replay(max_rows => %s)", [rows])

    def pause(self, n: int) -> None:
        if self.pair.status(self.targets[n]) != "paused":
            self.pair.call("pause_target", target_id=self.targets[n])

    def resume(self, n: int) -> None:
        if self.pair.status(self.targets[n]) == "paused":
            self.pair.call("resume_target", target_id=self.targets[n])

    def check(self) -> None:
        """Heal everything, drain, compare."""
        if self.in_transaction:
            self.finish("COMMIT")
        self.proxy.set("pass")
        for n in range(3):
            self.resume(n)
        self.pair.source.sql("CALL tbl_repl.drain()")
        status = self.pair.source.sql(
            "SELECT target_id, status, pending_rows FROM tbl_repl.target_status"
            " WHERE status <> 'ok' OR pending_rows <> 0"
        )
        assert status == []
        assert self.pair.source.sql("SELECT target_id, key, message FROM tbl_repl.quarantine") == []
        source, target = self.pair.source, self.pair.target
        assert target.rows("parent") == source.rows("parent")
        assert target.rows("child") == source.rows("child", where="v <> 3")
        assert target.rows('"Alone there"', "key, v, hidden, extra") == source.rows(
            "alone", "id, v, md5(secret), 'kept'::text", "v > 2"
        )


number = st.integers(0, 6)
letter = st.sampled_from("xy")


class Machine(RuleBasedStateMachine):
    """One history; the scene is put in by the test."""

    scene: ClassVar[Scene]

    @initialize()
    def reset(self) -> None:
        self.scene.reset()

    # rows

    @rule(a=number, b=letter, u=number, v=number)
    def put_parent(self, a: int, b: str, u: int, v: int) -> None:
        self.scene.do(
            f"INSERT INTO parent VALUES ({a}, '{b}', {u}, {v})"
            " ON CONFLICT (b, a) DO UPDATE SET u = excluded.u, v = excluded.v"
        )

    @rule(a=number)
    def delete_parents(self, a: int) -> None:
        self.scene.do(f"DELETE FROM parent WHERE a = {a}")

    @rule(a=number, b=letter, to=number)
    def move_parent(self, a: int, b: str, to: int) -> None:
        self.scene.do(f"UPDATE parent SET a = {to} WHERE a = {a} AND b = '{b}'")

    @rule(a=number, b=number)
    def swap_unique(self, a: int, b: int) -> None:
        self.scene.do(
            f"UPDATE parent SET u = -1 WHERE u = {a}",
            f"UPDATE parent SET u = {a} WHERE u = {b}",
            f"UPDATE parent SET u = {b} WHERE u = -1",
        )

    @rule()
    def shift_unique(self) -> None:
        self.scene.do("UPDATE parent SET u = NULL WHERE u = 6", "UPDATE parent SET u = u + 1")

    @rule(first=number, count=st.integers(1, 4), a=number, b=letter, v=number)
    def put_children(self, first: int, count: int, a: int, b: str, v: int) -> None:
        self.scene.do(
            f"INSERT INTO child SELECT g, {a}, '{b}', {v} FROM generate_series({first}, {first + count}) g"
            " ON CONFLICT (id) DO UPDATE SET a = excluded.a, b = excluded.b, v = excluded.v"
        )

    @rule(a=number, b=letter, to=number)
    def children_move_and_the_parent_goes(self, a: int, b: str, to: int) -> None:
        self.scene.do(
            f"INSERT INTO parent VALUES ({to}, '{b}', NULL, 0) ON CONFLICT DO NOTHING",
            f"UPDATE child SET a = {to} WHERE a = {a} AND b = '{b}'",
            f"DELETE FROM parent WHERE a = {a} AND b = '{b}' AND a <> {to}",
        )

    @rule(v=number, to=number)
    def children_cross_the_filter(self, v: int, to: int) -> None:
        self.scene.do(f"UPDATE child SET v = {to} WHERE v = {v}")

    @rule(key=number, v=number, word=letter)
    def put_alone(self, key: int, v: int, word: str) -> None:
        self.scene.do(
            f"DELETE FROM alone WHERE id = {key}", f"INSERT INTO alone VALUES ({key}, {v}, '{word}')"
        )

    @rule(key=number, to=number)
    def move_alone(self, key: int, to: int) -> None:
        self.scene.do(f"UPDATE alone SET id = {to} WHERE id = {key}")

    @rule(by=st.sampled_from([-1, 1]))
    def shift_keys(self, by: int) -> None:
        self.scene.do(f"UPDATE alone SET id = id + {by}, v = v + {by}")

    @rule()
    def many_alone(self) -> None:
        self.scene.do(
            "INSERT INTO alone SELECT g, g % 5, 'many' FROM generate_series(100, 1400) g WHERE NOT EXISTS"
            " (SELECT FROM alone WHERE id > 90)"
        )

    @rule()
    def few_alone(self) -> None:
        self.scene.do("DELETE FROM alone WHERE id > 90")

    @rule(what=st.sampled_from(["parent CASCADE", "child", "alone", "parent, child, alone"]))
    def truncate(self, what: str) -> None:
        self.scene.do(f"TRUNCATE {what}")

    @precondition(lambda self: self.scene.capture == "row")
    @rule(what=st.sampled_from(["child_0", "alone_1"]))
    def truncate_partition(self, what: str) -> None:
        self.scene.do(f"TRUNCATE {what}")

    # transactions

    @precondition(lambda self: not self.scene.in_transaction)
    @rule(isolation=st.sampled_from(["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]))
    def begin(self, isolation: str) -> None:
        self.scene.begin(isolation)

    @precondition(lambda self: self.scene.in_transaction)
    @rule(how=st.sampled_from(["COMMIT", "COMMIT", "ROLLBACK"]))
    def finish(self, how: str) -> None:
        self.scene.finish(how)

    @precondition(lambda self: self.scene.in_transaction)
    @rule()
    def set_savepoint(self) -> None:
        self.scene.set_savepoint()

    @precondition(lambda self: self.scene.savepoint)
    @rule()
    def rollback_to_savepoint(self) -> None:
        self.scene.rollback_to_savepoint()

    # the line, and those who look after it

    @rule()
    def line_goes(self) -> None:
        self.scene.away()

    @rule()
    def line_comes(self) -> None:
        self.scene.proxy.set("pass")

    @rule()
    def kill(self) -> None:
        self.scene.kill()

    @rule(rows=st.sampled_from([1, 3, 10000]))
    def replay(self, rows: int) -> None:
        self.scene.replay(rows)

    @precondition(lambda self: not self.scene.in_transaction)
    @rule(n=st.integers(0, 2))
    def pause(self, n: int) -> None:
        self.scene.pause(n)

    @precondition(lambda self: not self.scene.in_transaction)
    @rule(n=st.integers(0, 2))
    def resume(self, n: int) -> None:
        self.scene.resume(n)

    @rule()
    def check(self) -> None:
        self.scene.check()

    def teardown(self) -> None:
        self.scene.check()


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("capture", ["statement", "row"])
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_every_history_converges(pair: Pair, proxy: Proxy, mode: str, capture: str) -> None:
    machine = type("History", (Machine,), {"scene": Scene(pair, proxy, mode, capture)})
    run_state_machine_as_test(machine, settings=settings())


# --- histories that went wrong once


@pytest.mark.parametrize("capture", ["statement", "row"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_replay_beside_an_open_transaction_that_has_truncated(
    pair: Pair, proxy: Proxy, mode: str, capture: str
) -> None:
    """It waited for the tables, without end, for that transaction was not going to end before it."""
    scene = Scene(pair, proxy, mode, capture)
    scene.reset()
    scene.away()
    scene.do("INSERT INTO child SELECT g, 5, 'x', 0 FROM generate_series(0, 4) g ON CONFLICT DO NOTHING")
    scene.proxy.set("pass")
    scene.begin("READ COMMITTED")
    scene.do("TRUNCATE parent, child, alone")
    pair.source.sql("SET statement_timeout = '30 s'")
    scene.replay(1)
    scene.check()
