"""Large batches by COPY: whatever is in them, the tables become equal, and nothing is left to replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from support import Pair, wait_until
from support.background import in_background
from support.programs import dsn_of
from tbl_repl import bulk, copy, database

# beside a row that fills a buffer
SLOW_FILTER = """
    CREATE FUNCTION passes(v text) RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN IF v = 'slow' THEN PERFORM pg_sleep(1.6); END IF; RETURN v <> 'no'; END $$
"""
COMPOSITE = "CREATE TABLE t (a text, b integer, v text, PRIMARY KEY (b, a))"


def ship(pair: Pair) -> int | None:
    """What is queued, by COPY; the number of keys."""
    with database.connect(dsn_of(pair.source), "worker") as connection:
        return bulk.ship(connection, pair.server, 1)


def everything_at_once(pair: Pair, key: str) -> None:
    """Rows that come, change, go, come back, move and swap their keys; key: SQL expression over g."""
    for statement in (
        f"INSERT INTO t (id, v) SELECT {key}, 'new' FROM generate_series(101, 140) g",
        f"UPDATE t SET v = v || '!' WHERE id IN (SELECT {key} FROM generate_series(1, 30) g)",
        f"UPDATE t SET v = v || '?' WHERE id IN (SELECT {key} FROM generate_series(20, 40) g)",
        f"DELETE FROM t WHERE id IN (SELECT {key} FROM generate_series(41, 60) g)",
        f"INSERT INTO t (id, v) SELECT {key}, 'back' FROM generate_series(55, 60) g",
        f"DELETE FROM t WHERE id IN (SELECT {key} FROM generate_series(131, 140) g)",
        f"UPDATE t SET id = (SELECT {key} FROM (VALUES (777)) AS x (g)) WHERE id = (SELECT {key} FROM (VALUES (61)) AS x (g))",
    ):
        pair.source.sql(statement)


@pytest.mark.once
@pytest.mark.parametrize("in_array", [True, False], ids=["one array", "more keys than an array takes"])
@pytest.mark.parametrize(
    ("key_type", "key"),
    [
        ("bigint", "g"),
        ("text", "E'it''s \"' || g || E'\" \\\\ 100%%'"),
        ("integer[]", "ARRAY[g, NULL]"),
        ("timestamptz", "'2026-01-01 00:00+00'::timestamptz + g * interval '1 hour'"),
    ],
    ids=["bigint", "text", "array", "timestamptz"],
)
def test_every_kind_of_change_in_one_batch(pair: Pair, key_type: str, key: str, in_array: bool) -> None:
    pair.both(f"CREATE TABLE t (id {key_type} PRIMARY KEY, v text)")
    pair.source.sql(f"INSERT INTO t SELECT {key}, 'old' FROM generate_series(1, 100) g")
    target_id = pair.add_target("t", mode="async")
    if not in_array:
        pair.source.sql(
            "CREATE OR REPLACE FUNCTION tbl_repl._keys_per_array() RETURNS integer LANGUAGE sql RETURN 1"
        )
    everything_at_once(pair, key)
    assert ship(pair)
    pair.assert_same("t")
    assert pair.pending(target_id) == 0


def test_composite_keys(pair: Pair) -> None:
    pair.both(COMPOSITE)
    pair.source.sql("INSERT INTO t SELECT 'a''\"' || g, g, 'old' FROM generate_series(1, 50) g")
    pair.add_target("t", mode="async")
    pair.source.sql("DELETE FROM t WHERE b <= 10")
    pair.source.sql("UPDATE t SET a = a || 'x' WHERE b BETWEEN 11 AND 20")
    pair.source.sql("UPDATE t SET v = 'new' WHERE b > 40")
    assert ship(pair) == 10 + 20 + 10
    pair.assert_same("t")


def test_only_deletions_and_only_updates(pair: Pair) -> None:
    pair.both(COMPOSITE)
    pair.source.sql("INSERT INTO t SELECT g::text, g, 'old' FROM generate_series(1, 50) g")
    pair.add_target("t", mode="async")
    for statement in ("UPDATE t SET v = 'new' WHERE b < 30", "DELETE FROM t WHERE b > 20", "DELETE FROM t"):
        pair.source.sql(statement)
        assert ship(pair)
        pair.assert_same("t")


def test_inserted_rows_go_straight_into_the_table_in_their_order(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT g, 'n' FROM generate_series(300, 1, -1) g")
    assert ship(pair) == 300
    pair.assert_same("t")
    assert pair.target.admin(
        "SELECT array_agg(id ORDER BY ctid) = array_agg(id ORDER BY id DESC) FROM t"
    ) == [(True,)]


def test_inserted_rows_that_the_target_has_already(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode="async")
    pair.target.sql("INSERT INTO t SELECT g, 'stale' FROM generate_series(1, 300, 3) g")
    pair.source.sql("INSERT INTO t SELECT g, 'n' FROM generate_series(1, 300) g")
    assert ship(pair) == 300
    pair.assert_same("t")


def test_a_deletion_that_nobody_has_captured_leaves_the_rest_to_replay(pair: Pair) -> None:
    """Then one key is queued as inserted twice."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT g, 'first' FROM generate_series(1, 10) g")
    pair.source.admin("SET session_replication_role = replica; DELETE FROM t WHERE id = 5")
    pair.source.sql("INSERT INTO t VALUES (5, 'again')")
    assert ship(pair) is None
    pair.drain()
    pair.assert_same("t")


def test_rows_that_enter_and_leave_the_filter(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE WHEN g % 2 = 0 THEN 'yes' ELSE 'no' END FROM generate_series(1, 100) g"
    )
    pair.add_target("t", mode="async", row_filter="v = 'yes' OR v IS NULL")
    pair.source.sql(
        "UPDATE t SET v = CASE v WHEN 'yes' THEN 'no' ELSE 'yes' END WHERE id <= 50; UPDATE t SET v = NULL WHERE id = 70"
    )
    assert ship(pair)
    pair.assert_same("t", where="v = 'yes' OR v IS NULL")


def test_expressions_are_for_rows_that_are_there(pair: Pair) -> None:
    """What a map makes of NULL must not matter for a row that is gone."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql(
        "CREATE FUNCTION strict_about(v text) RETURNS text LANGUAGE plpgsql AS "
        "$$BEGIN IF v IS NULL THEN RAISE 'there is no value'; END IF; RETURN upper(v); END$$"
    )
    pair.source.sql("INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 50) g")
    pair.add_target("t", mode="async", column_map={"v": "public.strict_about(v)"})
    pair.source.sql("DELETE FROM t WHERE id <= 20; UPDATE t SET v = 'w' WHERE id > 40")
    assert ship(pair) == 30
    assert pair.target.rows("t") == pair.source.rows("t", "id, upper(v)")


def test_text_where_types_differ_and_truncate_with_rows_after_it(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v integer)")
    pair.target.sql("CREATE TABLE t (id bigint PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, g FROM generate_series(1, 50) g")
    pair.add_target("t", mode="async")
    pair.source.sql("DELETE FROM t WHERE id <= 5; UPDATE t SET v = -v WHERE id > 30")
    assert ship(pair) == 25
    pair.assert_same("t")
    pair.source.sql("TRUNCATE t; INSERT INTO t SELECT g, g FROM generate_series(11, 20) g")
    assert ship(pair) == 10
    pair.assert_same("t")


def test_parents_and_children(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE p (id integer PRIMARY KEY); CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p)"
    )
    pair.source.sql(
        "INSERT INTO p SELECT generate_series(1, 20); INSERT INTO c SELECT g, (g + 1) / 2 FROM generate_series(1, 40) g"
    )
    for table in "pc":
        pair.add_target(table, mode="async")
    pair.source.sql(
        "INSERT INTO p VALUES (100); UPDATE c SET p = 100 WHERE p = 20; DELETE FROM c WHERE p <= 5; DELETE FROM p WHERE id <= 5"
    )
    assert ship(pair)
    for table in "pc":
        pair.assert_same(table)


def test_a_target_that_falls_silent_after_the_login_is_given_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "SILENCE_SECONDS", 0.2)
    with (
        pytest.raises(psycopg.OperationalError),
        bulk.open_target(
            bulk.Way(pair.server, dsn_of(pair.target), "SELECT pg_sleep(20)", "SELECT 'there'", "there", "")
        ),
    ):
        pass


@pytest.mark.once
@pytest.mark.parametrize("how", ["worker", "copy"])
def test_a_server_that_is_another_one_for_the_worker_gets_nothing(
    trio: Pair, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Host and port lead the worker to the third node, as localhost does in a container."""
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    trio.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) AS g")
    third, proxy = trio.third, trio.proxy()
    assert third is not None
    name = trio.target.dbname
    with third.cluster.connect() as there:
        there.execute(f"CREATE DATABASE {name} OWNER owner")
    with third.cluster.connect(name, "owner") as there:
        there.execute("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target = trio.add_target("t", mode="async", initial_copy="none")
    trio.source.sql("UPDATE t SET v = 'y'")
    open_target = bulk.open_target

    @contextlib.contextmanager
    def led_astray(way: bulk.Way) -> Iterator[bulk.Target]:
        proxy.upstream = third.cluster.port
        with open_target(way) as there:
            yield there

    monkeypatch.setattr(bulk, "open_target", led_astray)
    if how == "worker":
        assert ship(trio) is None
    else:
        with pytest.raises(bulk.ElsewhereError):
            copy.copy(dsn_of(trio.source), target, 1)
    assert trio.status(target) == "ok"
    proxy.upstream = trio.target.cluster.port
    with third.cluster.connect(name) as there:
        assert there.execute("TABLE t").fetchall() == []
    with third.cluster.connect() as there:
        there.execute(f"DROP DATABASE {name} WITH (FORCE)")
    assert trio.target.rows("t") == []
    trio.drain()
    trio.assert_same("t")


@pytest.mark.once
def test_a_source_that_takes_long_for_its_rows_is_waited_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "SILENCE_SECONDS", 0.5)
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql(SLOW_FILTER)
    pair.add_target("t", mode="async", row_filter="public.passes(v)")
    pair.source.sql("INSERT INTO t VALUES (1, repeat('x', 300000)), (2, 'slow'), (3, 'y')")
    assert ship(pair) == 3
    pair.assert_same("t")


@pytest.mark.once
@pytest.mark.parametrize("step", ["stage", "rows", "commit"])
def test_a_target_that_hangs_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Its session stays, so that nothing but the watchdog can end the waiting."""
    monkeypatch.setattr(bulk, "SILENCE_SECONDS", 0.5)
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target = pair.add_target("t", mode="async", timeout="1 s")
    pair.source.sql("INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g")
    move, commit, pump = bulk._move, bulk.commit, bulk.pump
    frozen = contextlib.ExitStack()

    def freeze(call: Callable[..., Any]) -> Callable[..., Any]:
        def frozen_first(*args: Any) -> Any:
            frozen.enter_context(pair.target.frozen("tbl_repl %.b01d"))
            return call(*args)

        return frozen_first

    name = {"stage": "_move", "rows": "pump", "commit": "commit"}[step]
    monkeypatch.setattr(bulk, name, freeze({"stage": move, "rows": pump, "commit": commit}[step]))
    with frozen:
        assert ship(pair) is None
    monkeypatch.undo()
    pair.drain()
    assert pair.pending(target) == 0
    pair.assert_same("t")


def test_a_commit_that_comes_too_late_is_undone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 10)")
    commit = bulk.commit
    failures = []

    def late(there: bulk.Target, timeout: float) -> None:
        try:
            commit(there, -0.1)
        except psycopg.Error as error:
            failures.append(error.sqlstate)
            raise

    monkeypatch.setattr(bulk, "commit", late)
    assert ship(pair) is None
    assert failures == ["08000"]
    assert pair.target.rows("t") == []
    monkeypatch.undo()
    assert ship(pair) == 10
    pair.assert_same("t")


def test_a_role_that_may_not_use_the_mapping_leaves_it_to_replay(pair: Pair) -> None:
    """The worker asks again after a while only."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 10)")
    operator = pair.source.role("bulk_operator")
    pair.source.sql(f"SELECT tbl_repl.grant_access('{operator}', 'operator')")
    with database.connect(dsn_of(pair.source, operator), "worker") as connection:
        assert bulk.ship(connection, pair.server, 1) is None
    pair.drain()
    pair.assert_same("t")


def test_domains_that_take_no_null(pair: Pair) -> None:
    """Beside a key that is gone there are no values."""
    pair.both(
        "CREATE DOMAIN word AS text NOT NULL; CREATE DOMAIN good_word AS word CHECK (VALUE IS NOT NULL);"
        ' CREATE TABLE t (id integer PRIMARY KEY, v word, "W x" good_word, n integer[])'
    )
    pair.source.sql("INSERT INTO t SELECT g, 'x', 'y', ARRAY[g] FROM generate_series(1, 50) g")
    pair.add_target("t", mode="async")
    pair.source.sql("DELETE FROM t WHERE id <= 10; UPDATE t SET v = 'z', \"W x\" = 'w' WHERE id > 40")
    assert ship(pair) == 20
    pair.assert_same("t")


@pytest.mark.once
def test_a_target_that_was_paused_while_the_batch_waited_is_left_alone(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (LIKE t INCLUDING ALL)")
    first, second = (pair.add_target(name, mode="async") for name in "tu")
    for name in "tu":
        pair.source.sql(f"INSERT INTO {name} SELECT g, 'x' FROM generate_series(1, 100) g")
    pausing = pair.source.connect()
    pausing.execute("BEGIN")
    pausing.execute("SELECT tbl_repl.pause_target(%s)", [second])
    batch = in_background(lambda: ship(pair))
    wait_until(
        lambda: pair.source.admin(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
    )
    pausing.execute("COMMIT")
    assert batch.result(10) == 100
    pair.assert_same("t")
    assert pair.target.rows("u") == []
    assert (pair.pending(first), pair.pending(second)) == (0, 100)
    pair.call("resume_target", target_id=second)
    assert ship(pair) == 100
    pair.assert_same("u")


@pytest.mark.once
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "text"])
@pytest.mark.parametrize("encodings", [(None, "LATIN1"), ("LATIN1", None), ("LATIN1", "LATIN1")], ids=str)
def test_databases_of_different_encodings(pair: Pair, binary: bool) -> None:
    ddl = 'CREATE TABLE t (id integer PRIMARY KEY, "prix élevé" text, n {} DEFAULT 1)'
    pair.source.sql(ddl.format("integer"))
    pair.target.sql(ddl.format("integer" if binary else "bigint"))
    pair.add_target("t", mode="async")
    for statement in (
        "INSERT INTO t SELECT g, 'à côté ' || g FROM generate_series(1, 50) g",
        "UPDATE t SET \"prix élevé\" = 'üß' WHERE id <= 20; DELETE FROM t WHERE id > 40",
        "TRUNCATE t; INSERT INTO t SELECT g, 'ÿ' FROM generate_series(1, 10) g",
    ):
        pair.source.sql(statement)
        assert ship(pair)
        pair.assert_same("t")


@pytest.mark.parametrize("encodings", [(None, "LATIN1")], ids=str)
def test_a_character_that_the_target_has_not_is_left_to_replay(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'é'), (2, '€'), (3, 'ê')")
    assert ship(pair) is None
    pair.drain()
    pair.assert_same("t", where="id <> 2")
    assert pair.source.sql("SELECT key, sqlstate FROM tbl_repl.quarantine") == [({"id": 2}, "22P05")]


def test_a_filter_with_a_backslash_where_literals_do_not_conform(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, code text)")
    pair.add_target("t", mode="async", row_filter=r"code ~ '\d+'")
    pair.source.admin(f"ALTER DATABASE {pair.source.dbname} SET standard_conforming_strings = off")
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE WHEN g % 2 = 0 THEN 'd' ELSE '7' END FROM generate_series(1, 20) g"
    )
    assert ship(pair)
    pair.assert_same("t", where="id % 2 = 1")


def test_nulls_in_arrays_where_the_target_reads_them_as_words(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v text[])")
    pair.target.sql("CREATE TABLE t (id bigint PRIMARY KEY, v text[])")
    pair.add_target("t", mode="async")
    pair.target.admin(f"ALTER ROLE owner IN DATABASE {pair.target.dbname} SET array_nulls = off")
    pair.source.sql("INSERT INTO t VALUES (1, ARRAY[NULL, 'NULL'])")
    assert ship(pair) == 1
    assert pair.target.sql("SELECT v[1] IS NULL, v[2] FROM t") == [(True, "NULL")]


@pytest.mark.once
def test_writers_of_other_tables_do_not_wait_for_a_copy(pair: Pair) -> None:
    pair.both("; ".join(f"CREATE TABLE {table} (id integer PRIMARY KEY)" for table in "asq"))
    backlog, _, quiet = (
        pair.add_target(table, mode=mode)
        for table, mode in zip("asq", ("async", "sync", "async"), strict=True)
    )
    pair.source.sql("INSERT INTO a SELECT generate_series(1, 100)")
    lanes = pair.source.admin("SELECT targets FROM tbl_repl._bulk_lanes(%s, 1)", [pair.server])
    assert lanes == [([backlog, quiet],)]


@pytest.mark.once
def test_a_copy_ends_what_a_lost_one_has_left_on_the_target(pair: Pair) -> None:
    """The line was lost on one side only: there the transaction is still open, with its locks."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.add_target("t", mode="async", timeout="2 s")
    with database.connect(dsn_of(pair.source), "worker") as connection:
        row = connection.execute("SELECT (tbl_repl._bulk_session('1 s')).application_name AS name").fetchone()
        assert row is not None
        lost = pair.target.connect()
        lost.execute("SELECT set_config('application_name', %s, false)", [row["name"]])
        lost.execute("BEGIN; LOCK TABLE t")
        pair.source.sql("INSERT INTO t SELECT generate_series(1, 100)")
        assert bulk.ship(connection, pair.server, 1) == 100
    pair.assert_same("t")
