"""The views of the contract: their columns, and what is in them."""

from __future__ import annotations

import datetime

import psycopg
import pytest

from support import Pair, wait_until

COLUMNS = {
    "target_status": "target_id source_table server dst_table mode status pending_rows oldest_pending_at last_error"
    " last_error_at last_shipped_at rows_shipped",
    "pending": "target_id source_table op key captured_at",
    "error_log": "at target_id key sqlstate message detail hint statement",
    "quarantine": "target_id key attempts sqlstate message first_failed_at last_failed_at",
    "sync_err_rec": "id nsp_name table_name dst_server dst_query create_time",
    "conflict_log": "at target_id key",
}


@pytest.mark.parametrize("view", COLUMNS)
def test_columns_of_the_views(pair: Pair, view: str) -> None:
    found = [
        row[0]
        for row in pair.source.sql(
            "SELECT column_name::text FROM information_schema.columns WHERE table_schema = 'tbl_repl' AND table_name = %s"
            " ORDER BY ordinal_position",
            [view],
        )
    ]
    wanted = COLUMNS[view].split()
    assert [name for name in found if name in wanted] == wanted


@pytest.fixture
def tables(pair: Pair) -> Pair:
    pair.both(
        'CREATE SCHEMA "My schema"; CREATE TABLE "My schema"."T" (id integer PRIMARY KEY, v text, n integer)'
    )
    return pair


TABLE = '"My schema"."T"'


def status(pair: Pair, target: int, *columns: str) -> tuple[object, ...]:
    return pair.source.sql(
        f"SELECT {', '.join(columns)} FROM tbl_repl.target_status WHERE target_id = {target}"
    )[0]


def test_target_status_of_a_healthy_target(tables: Pair) -> None:
    target = tables.add_target(TABLE)
    everything = (
        "source_table::text",
        "server",
        "dst_table",
        "mode",
        "status",
        "pending_rows",
        "oldest_pending_at",
        "last_error",
        "last_error_at",
        "rows_shipped",
    )
    healthy = (TABLE, tables.server, TABLE, "tolerant", "ok", 0, None, None, None)
    assert status(tables, target, *everything) == (*healthy, 0)
    before = tables.source.one("SELECT clock_timestamp()")
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'a', 1), (2, 'b', 2)")
    tables.source.fresh(f"UPDATE {TABLE} SET n = 3 WHERE id = 1")
    assert status(tables, target, *everything) == (*healthy, 3)
    first = status(tables, target, "last_shipped_at")[0]
    assert isinstance(first, datetime.datetime)
    assert first > before
    tables.source.sql(f"DELETE FROM {TABLE}")
    later, rows = status(tables, target, "last_shipped_at", "rows_shipped")
    assert (later > first, rows) == (True, 5)  # type: ignore[operator]


def test_rows_shipped_and_last_shipped_at_move_in_every_mode(tables: Pair) -> None:
    tables.target.sql(
        f'CREATE TABLE "My schema".u (LIKE {TABLE} INCLUDING ALL); CREATE TABLE "My schema".w (LIKE {TABLE} INCLUDING ALL)'
    )
    targets = {
        "tolerant": tables.add_target(TABLE),
        "sync": tables.add_target(TABLE, dst_table="u", mode="sync"),
        "async": tables.add_target(TABLE, dst_table="w", mode="async"),
    }
    tables.source.sql(f"INSERT INTO {TABLE} SELECT i, 'x', i FROM generate_series(1, 1200) i")
    tables.drain()
    for mode, target in targets.items():
        assert status(tables, target, "rows_shipped", "last_shipped_at IS NOT NULL") == (1200, True), mode


def test_pending_names_operation_and_key(tables: Pair) -> None:
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'a', 1), (2, 'b', 2), (3, 'c', 3)")
    tables.both("CREATE TABLE c (a integer, b text, PRIMARY KEY (b, a))")
    target = tables.add_target(TABLE, mode="async")
    composite = tables.add_target("c", mode="async")
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (4, 'd', 4)")
    tables.source.sql(f"UPDATE {TABLE} SET v = 'x' WHERE id = 1")
    tables.source.sql(f"UPDATE {TABLE} SET id = 20 WHERE id = 2")
    tables.source.sql(f"DELETE FROM {TABLE} WHERE id = 3")
    tables.source.sql(f"TRUNCATE {TABLE}")
    tables.source.sql("INSERT INTO c VALUES (1, 'it''s \"')")
    rows = tables.source.sql(
        "SELECT op, key FROM tbl_repl.pending WHERE target_id = %s ORDER BY captured_at, key->>'id'", [target]
    )
    assert rows == [
        ("insert", {"id": 4}), ("update", {"id": 1}), ("update", {"id": 20}), ("update", {"id": 2}),
        ("delete", {"id": 3}), ("truncate", None),
    ]  # fmt: skip
    assert tables.source.sql(
        "SELECT source_table::text, op, key FROM tbl_repl.pending WHERE target_id = %s", [composite]
    ) == [("c", "insert", {"a": 1, "b": "it's \""})]
    assert status(tables, target, "pending_rows") == (6,)
    oldest = tables.source.one("SELECT min(captured_at) FROM tbl_repl.pending WHERE target_id = %s", [target])
    assert status(tables, target, "oldest_pending_at") == (oldest,)
    # async rows are no errors
    assert tables.source.sql("TABLE tbl_repl.sync_err_rec") == []
    tables.drain()
    assert tables.source.sql("TABLE tbl_repl.pending") == []


def test_errors_are_logged_and_what_is_queued_is_shown_as_sql(tables: Pair) -> None:
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'a', 1)")
    target = tables.add_target(TABLE)
    tables.target.sql(f"ALTER TABLE {TABLE} ADD CONSTRAINT small CHECK (n < 10)")
    tables.source.sql(f"UPDATE {TABLE} SET n = 11")
    assert status(tables, target, "status", "pending_rows") == ("queueing", 1)
    error = status(tables, target, "last_error", "last_error_at IS NOT NULL")
    assert str(error[0]).startswith("23514: ") and error[1] is True
    log = tables.source.sql("SELECT target_id, sqlstate, message, detail, statement FROM tbl_repl.error_log")
    assert log[0][:2] == (target, "23514")
    assert "violates check constraint" in log[0][2]
    assert "Failing row" in log[0][3]
    assert "'11'" in log[0][4]
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (2, 'it''s', 2)")
    tables.source.sql(f"DELETE FROM {TABLE} WHERE id = 2; INSERT INTO {TABLE} VALUES (3, NULL, 3)")
    shown = tables.source.sql(
        "SELECT id, nsp_name, table_name, dst_server, dst_query, create_time FROM tbl_repl.sync_err_rec ORDER BY id"
    )
    assert [row[1:4] for row in shown] == [("My schema", "T", tables.server)] * len(shown)
    assert [row[0] for row in shown] == sorted({row[0] for row in shown})
    queries = [row[4] for row in shown]
    assert queries[0].startswith(f"INSERT INTO {TABLE} AS d (id, v, n) VALUES ('1', 'a', '11')")
    assert queries[-1].startswith(f"INSERT INTO {TABLE} AS d (id, v, n) VALUES ('3', NULL, '3')")
    assert queries[1].startswith(f"DELETE FROM {TABLE} AS d WHERE")
    times = [row[5] for row in shown]
    assert times == sorted(times)
    tables.drain()
    rejected = tables.source.sql(
        "SELECT target_id, key, attempts, sqlstate, message, first_failed_at = last_failed_at FROM tbl_repl.quarantine"
    )
    assert [row[:2] for row in rejected] == [(target, {"id": 1})]
    assert rejected[0][3] == "23514"
    assert tables.source.sql("TABLE tbl_repl.sync_err_rec") == []
    assert {"id": 1} in [row[0] for row in tables.source.sql("SELECT key FROM tbl_repl.error_log")]
    assert tables.target.sql(f"SELECT id FROM {TABLE} ORDER BY id") == [(1,), (3,)]
    attempts = rejected[0][2]
    tables.source.sql("SELECT tbl_repl.replay()")
    assert tables.source.one("SELECT attempts FROM tbl_repl.quarantine") > attempts
    tables.source.sql(f"UPDATE {TABLE} SET n = 5")
    tables.drain()
    assert tables.source.sql("TABLE tbl_repl.quarantine") == []
    tables.assert_same(TABLE)
    assert status(tables, target, "status") == ("ok",)


@pytest.mark.once
def test_the_error_log_is_bounded_and_nobody_waits_for_that(tables: Pair) -> None:
    target = tables.add_target(TABLE)
    fail = "SELECT count(tbl_repl._log_error(%s, NULL, '23514', n::text, NULL, NULL, NULL)) FROM generate_series(%s::int, %s::int) n"
    tables.source.sql(
        "INSERT INTO tbl_repl.error (target_id, sqlstate, message) SELECT %s, '1', '1' FROM generate_series(1, 999)",
        [target],
    )
    tables.source.sql(fail, [target, 1, 2500])
    assert 1000 <= tables.source.one("SELECT count(*) FROM tbl_repl.error_log") < 1300
    assert tables.source.one("SELECT count(*) FROM tbl_repl.error_log WHERE message::int > 1500") == 1000
    with tables.source.connect() as one, tables.source.connect() as two, tables.source.connect() as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        one.execute("BEGIN")
        one.execute(fail, [target, 3001, 3400])
        two.execute("SET statement_timeout = '10 s'")
        two.execute(fail, [target, 3401, 3800])
        one.execute("COMMIT")
        old.execute(fail, [target, 3801, 4200])
        old.execute("COMMIT")
    tables.source.sql(fail, [target, 4201, 4600])
    assert 1000 <= tables.source.one("SELECT count(*) FROM tbl_repl.error_log") < 1300


def test_sync_err_rec_is_what_a_replay_will_run(tables: Pair) -> None:
    """An archive gets no DELETE, a filtered target no TRUNCATE; what is shown leads to what replay leads to."""
    tables.source.sql(f"INSERT INTO {TABLE} SELECT i, 'x', i FROM generate_series(1, 6) i")
    for name in ("archive", "part"):
        tables.target.sql(f'CREATE TABLE "My schema".{name} (LIKE {TABLE} INCLUDING ALL)')
    targets = [
        tables.add_target(TABLE, dst_table="archive", operations=["insert", "update"]),
        tables.add_target(TABLE, dst_table="part", row_filter="n > 3"),
        tables.add_target(TABLE),
    ]
    for target in targets:
        tables.call("pause_target", target_id=target)
    for write in (
        f"DELETE FROM {TABLE} WHERE id = 1",
        f"UPDATE {TABLE} SET n = 10 - n",
        f"UPDATE {TABLE} SET id = 60 WHERE id = 6",
        f"TRUNCATE {TABLE}",
        f"INSERT INTO {TABLE} VALUES (7, 'new', 7), (8, 'new', 1)",
    ):
        tables.source.sql(write)
    shown = [row[0] for row in tables.source.sql("SELECT dst_query FROM tbl_repl.sync_err_rec ORDER BY id")]
    archive = [q for q in shown if "archive" in q]
    assert not [q for q in archive if q.startswith("TRUNCATE")]
    assert not [q for q in shown if q.startswith("TRUNCATE") and "part" in q]
    assert [q for q in shown if q == f"TRUNCATE {TABLE}"]
    with tables.target.connect() as conn:
        conn.execute("BEGIN")
        for statement in shown:
            conn.execute(statement)
        by_hand = [
            conn.execute(f'SELECT r::text FROM "My schema".{t} r ORDER BY id').fetchall()
            for t in ("archive", "part", '"T"')
        ]
        conn.execute("ROLLBACK")
    for target in targets:
        tables.call("resume_target", target_id=target)
    tables.drain()
    replayed = [
        tables.target.sql(f'SELECT r::text FROM "My schema".{t} r ORDER BY id')
        for t in ("archive", "part", '"T"')
    ]
    assert by_hand == replayed


def test_operations_that_are_not_replicated_are_not_pending(tables: Pair) -> None:
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'a', 1)")
    direct = tables.add_target(TABLE, operations=["insert", "update"])
    tables.call("pause_target", target_id=direct)
    tables.source.sql(f"DELETE FROM {TABLE}")
    tables.source.sql(f"TRUNCATE {TABLE}")
    assert status(tables, direct, "pending_rows") == (0,)
    assert tables.source.sql("TABLE tbl_repl.pending") == []


@pytest.mark.once
def test_status_of_a_target_that_waits(tables: Pair) -> None:
    target = tables.add_target(TABLE)
    tables.target.stop()
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'a', 1)")
    assert status(tables, target, "status", "pending_rows", "oldest_pending_at IS NOT NULL") == (
        "queueing",
        1,
        True,
    )
    assert str(status(tables, target, "last_error")[0])[:2] in ("08", "57")
    tables.target.start()
    wait_until(lambda: tables.source.one("SELECT tbl_repl.replay()") == 0)
    assert status(tables, target, "status", "pending_rows", "rows_shipped") == ("ok", 0, 1)
    tables.assert_same(TABLE)


def test_views_go_on_when_the_table_is_gone(tables: Pair) -> None:
    tables.target.sql("CREATE TABLE other (id integer PRIMARY KEY)")
    tables.source.sql("CREATE TABLE other (id integer PRIMARY KEY)")
    gone, kept = tables.add_target(TABLE), tables.add_target("other")
    tables.call("pause_target", target_id=gone)
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'a', 1)")
    tables.source.sql(f"DROP TABLE {TABLE}")
    for view in COLUMNS:
        tables.source.sql(f"TABLE tbl_repl.{view}")
    assert tables.status(kept) == "ok"
    tables.call("drop_target", target_id=gone)
    assert tables.source.sql("SELECT target_id FROM tbl_repl.target_status") == [(kept,)]


def test_views_go_on_when_one_definition_does_not_fit_any_more(tables: Pair) -> None:
    """Keys older than the type of their column, and a target that cannot be rendered."""
    tables.both(
        "CREATE TABLE other (id text PRIMARY KEY, v integer); CREATE TABLE third (id integer PRIMARY KEY)"
    )
    tables.target.sql("ALTER TABLE other ADD CHECK (v < 10)")
    for table in ("other", "third"):
        tables.add_target(table)
    tables.source.sql("INSERT INTO other VALUES ('k2', 99)")
    tables.drain()
    tables.source.sql("SELECT tbl_repl.pause_target(target_id) FROM tbl_repl.target_status")
    tables.source.sql("DELETE FROM other")
    tables.both("ALTER TABLE other ALTER id TYPE integer USING id::integer")
    tables.source.sql("INSERT INTO third VALUES (1)")
    assert tables.source.sql("SELECT key FROM tbl_repl.quarantine") == [({"id": "k2"},)]
    for view in COLUMNS:
        tables.source.sql(f"TABLE tbl_repl.{view}")
    queries = [row[0] for row in tables.source.sql("SELECT dst_query FROM tbl_repl.sync_err_rec")]
    assert [query for query in queries if query.startswith("-- target ")]
    assert [query for query in queries if query.startswith("INSERT INTO public.third")]


def test_readers_see_no_row_contents(tables: Pair) -> None:
    target = tables.add_target(TABLE)
    tables.call("pause_target", target_id=target)
    tables.source.sql(f"INSERT INTO {TABLE} VALUES (1, 'secret', 1)")
    reader = tables.source.role("reader")
    tables.source.sql(f"SELECT tbl_repl.grant_access('{reader}', 'reader')")
    for view in ("target_status", "pending", "quarantine", "conflict_log"):
        assert "secret" not in repr(tables.source.sql(f"TABLE tbl_repl.{view}", user=reader))
    assert tables.source.sql("SELECT status, pending_rows FROM tbl_repl.target_status", user=reader) == [
        ("paused", 1)
    ]
    for query in ("TABLE tbl_repl.sync_err_rec", "TABLE tbl_repl.error_log", f"SELECT tbl_repl.explain_target({target})",
                  "SELECT tbl_repl._pending_sql()", f"TABLE {TABLE}"):  # fmt: skip
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            tables.source.sql(query, user=reader)
    tables.source.sql("SELECT at, target_id, key, sqlstate FROM tbl_repl.error_log", user=reader)


@pytest.mark.once
def test_figures_of_backends_that_have_ended_are_kept_in_one_row(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (LIKE t INCLUDING ALL)")
    target = pair.add_target("t", mode="sync")
    dropped = pair.add_target("u", mode="sync")
    for n in range(8):
        pair.source.fresh(f"INSERT INTO t VALUES ({n}); INSERT INTO u VALUES ({n})")

    def summed_up() -> bool:
        for _ in range(50):
            pair.source.sql("SELECT tbl_repl.replay()")  # one in 64 does it
        return pair.source.admin("SELECT count(*) FROM tbl_repl.shipped WHERE pid = 0")[0] == (2,)

    wait_until(summed_up)
    assert status(pair, target, "rows_shipped") == (8,)
    pair.source.fresh("INSERT INTO t VALUES (100); INSERT INTO u VALUES (100)")
    with pair.source.connect() as dropping, dropping.transaction():
        dropping.execute("SELECT tbl_repl.drop_target(%s)", [dropped])
        pair.source.sql("SET lock_timeout = 1000; SELECT tbl_repl._sum_up_shipped()")
    assert status(pair, target, "rows_shipped") == (9,)
