"""Queue: positions, what is pending, and the space it takes."""

from __future__ import annotations

import threading

import pytest

from support import Node, Pair, Proxy
from support.tables import async_table, replay, transaction


def test_what_commits_after_a_drain_with_a_lower_xid_is_not_lost(pair: Pair) -> None:
    target_id = async_table(pair)
    with transaction(pair.source) as early:
        early.execute("INSERT INTO t VALUES (1, 'early')")
        pair.source.sql("INSERT INTO t VALUES (2, 'late')")
        pair.drain()
        assert pair.target.rows("t") == ["(2,late)"]
    assert pair.pending(target_id) == 1
    pair.drain()
    pair.assert_same("t")


def test_partial_batches_pass_over_running_transactions(pair: Pair) -> None:
    """Positions that end in the middle of the queue, with transactions still running on both sides of it."""
    target_id = async_table(pair)
    with transaction(pair.source) as first:
        first.execute("INSERT INTO t VALUES (1, 'first')")
        for i in (2, 3):
            pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
        with transaction(pair.source) as second:
            second.execute("INSERT INTO t VALUES (4, 'second')")
            for i in (5, 6, 7):
                pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
            assert [replay(pair, max_rows=1) for _ in range(3)] == [1, 1, 1]
            assert [row[0] for row in pair.target.sql("SELECT id FROM t ORDER BY id")] == [2, 3, 5]
        # lower xid than what has been shipped
        assert replay(pair, max_rows=1) == 1
        assert 4 in [row[0] for row in pair.target.sql("SELECT id FROM t")]
    assert pair.pending(target_id) == 3
    assert [replay(pair, max_rows=2) for _ in range(3)] == [2, 1, 0]
    pair.assert_same("t")


@pytest.mark.parametrize(
    ("old", "snapshot", "cut", "remaining", "expected"),
    [
        ("10:10:", "20:20:", 12, [15], "13:13:"),
        ("10:10:", "11:20:11,14", 12, [15], "11:13:11"),
        ("10:10:", "11:20:11,14", 15, [17, 18], "11:16:11,14"),
        # below the old end: a transaction that was running then
        ("10:30:10,20", "40:40:", 10, [20, 35], "20:30:20"),
        ("10:30:10,20,25", "25:40:25", 10, [20], "20:30:20,25"),
    ],
)
def test_the_position_after_a_part_keeps_everything_else_outside(
    node: Node, old: str, snapshot: str, cut: int, remaining: list[int], expected: str
) -> None:
    answer = node.one(
        "SELECT tbl_repl._position_after(%s::pg_snapshot, %s::pg_snapshot, %s::text::xid8, %s::text[]::xid8[])::text",
        [old, snapshot, str(cut), [str(x) for x in remaining]],
    )
    assert answer == expected


def test_a_hot_row_ships_once(pair: Pair) -> None:
    async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, '0')")
    pair.drain()
    pair.target.sql(
        "CREATE TABLE written (v text);"
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO written VALUES (NEW.v); RETURN NEW; END$$;"
        "CREATE TRIGGER note BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION note()"
    )
    with transaction(pair.source) as conn:
        for i in range(500):
            conn.execute("UPDATE t SET v = %s", [str(i)])
    conn = pair.source.connect()
    for i in range(500, 1000):
        conn.execute("UPDATE t SET v = %s", [str(i)])
    pair.drain()
    assert pair.target.rows("written") == ["(999)"]
    pair.assert_same("t")


def test_a_target_that_leaves_async_takes_its_backlog_along(trio: Pair) -> None:
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    assert trio.third
    target_id = trio.add_target("t", mode="async")
    other = trio.add_target("t", trio.third_server, mode="async")
    trio.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    trio.call("alter_target", target_id=target_id, mode="tolerant")
    assert (trio.status(target_id), trio.pending(target_id), trio.pending(other)) == ("queueing", 2, 2)
    trio.source.sql("UPDATE t SET v = 'c' WHERE id = 1")
    trio.source.sql("DELETE FROM t WHERE id = 2")
    assert trio.target.rows("t") == []
    trio.drain()
    trio.assert_same("t")
    trio.assert_same("t", there=trio.third)
    assert trio.status(target_id) == "ok"
    trio.source.sql("INSERT INTO t VALUES (3, 'direct')")
    trio.assert_same("t")


def test_a_target_that_becomes_async_keeps_what_was_queued(pair: Pair, proxy: Proxy) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", timeout="1 s")
    proxy.set("refuse")
    proxy.cut()
    pair.source.sql("INSERT INTO t VALUES (1, 'a')")
    pair.call("pause_target", target_id=target_id)
    proxy.set("pass")
    pair.call("alter_target", target_id=target_id, mode="async")
    pair.source.sql("INSERT INTO t VALUES (2, 'b')")
    assert pair.pending(target_id) == 2
    pair.call("resume_target", target_id=target_id)
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_a_position_from_another_cluster_is_not_believed(pair: Pair) -> None:
    """As after a restore: transaction numbers of the queue and of the position come from elsewhere."""
    target_id = async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'a')")
    pair.source.sql("UPDATE tbl_repl.change SET txid = '9000000000000000'")
    pair.source.sql(
        "UPDATE tbl_repl.progress SET position = '9000000000000:9000000000000:'; UPDATE tbl_repl.target_state SET system_identifier = 1"
    )
    pair.source.sql("INSERT INTO t VALUES (2, 'b')")
    answers = [replay(pair) for _ in range(4)]
    pair.assert_same("t")
    assert answers[-1] == 0
    assert pair.pending(target_id) == 0


def queue_size(pair: Pair) -> int:
    return int(
        pair.source.one("SELECT pg_table_size('tbl_repl.change_0') + pg_table_size('tbl_repl.change_1')")
    )


WIDE_ROWS = (
    "INSERT INTO t SELECT md5(g::text) || md5('a' || g) || md5('b' || g) || md5('c' || g), 'x'"
    " FROM generate_series(1, 2000) g"
)


def fill_queue(pair: Pair, where: str = "true") -> None:
    """More than a segment takes: keys of rows that do not compress."""
    for i in range(6):
        pair.source.sql(f"UPDATE t SET v = %s WHERE {where}", [str(i)])


@pytest.fixture
def wide(pair: Pair) -> Pair:
    """A table t whose every update queues a quarter of a megabyte of keys."""
    async_table(pair, "id text PRIMARY KEY, v text")
    pair.source.sql(WIDE_ROWS)
    pair.drain()
    return pair


def test_what_everybody_has_passed_gives_its_space_back(wide: Pair) -> None:
    """Also while another transaction keeps vacuum from removing anything."""
    with transaction(wide.source, "REPEATABLE READ") as old:
        old.execute("SELECT FROM pg_class LIMIT 1")
        for _ in range(2):
            fill_queue(wide)
            assert queue_size(wide) > 1_000_000
            wide.drain()
            assert queue_size(wide) < 100_000
    wide.assert_same("t")


def test_a_segment_that_somebody_needs_is_kept(trio: Pair) -> None:
    trio.both("CREATE TABLE t (id text PRIMARY KEY, v text)")
    assert trio.third
    trio.add_target("t", mode="async")
    slow = trio.add_target("t", trio.third_server, mode="async")
    trio.source.sql(WIDE_ROWS)
    trio.drain()
    trio.call("pause_target", target_id=slow)
    fill_queue(trio)
    trio.drain()
    fill_queue(trio)
    trio.source.sql("DELETE FROM t WHERE id < '8'")
    trio.drain()
    trio.assert_same("t")
    trio.call("resume_target", target_id=slow)
    trio.drain()
    trio.assert_same("t", there=trio.third)
    assert queue_size(trio) < 100_000


def test_a_writer_in_flight_keeps_its_segment(wide: Pair) -> None:
    wide.source.sql("INSERT INTO t VALUES ('one', 'x')")
    with transaction(wide.source) as conn:
        conn.execute("UPDATE t SET v = 'mine' WHERE id = 'one'")
        for _ in range(3):
            fill_queue(wide, "id <> 'one'")
            wide.drain()
    wide.drain()
    wide.assert_same("t")


@pytest.mark.parametrize(
    ("table", "statement"),
    [("progress", "tbl_repl._advance(%s, 1)"), ("shipped", "tbl_repl._count_shipped(%s, 1)")],
    ids=["batches", "commits"],
)
def test_nothing_gets_slower_while_somebody_holds_a_snapshot(pair: Pair, table: str, statement: str) -> None:
    """A report that runs for hours keeps every version of a row; who looks for the newest must not meet them all."""
    target_id = async_table(pair)
    statement %= target_id
    holder, conn = pair.source.connect(), pair.source.connect()
    holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    holder.execute("SELECT 1 FROM t")
    conn.execute("SET synchronous_commit = off")
    conn.execute(f"DO $$BEGIN FOR i IN 1 .. 5000 LOOP PERFORM {statement}; COMMIT; END LOOP; END$$")
    fetched = (
        "SELECT sum(pg_stat_get_xact_blocks_fetched(c.oid)) FROM pg_class c WHERE c.oid = %s::regclass"
        " OR c.oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = %s::regclass)"
    )
    blocks = []
    with conn.transaction():
        conn.execute("SET LOCAL enable_seqscan = off")  # as in a commit
        for _ in range(2):
            row = conn.execute(fetched, [f"tbl_repl.{table}"] * 2).fetchone()
            assert row is not None
            blocks.append(row[0])
            conn.execute(f"SELECT {statement}")
    assert 0 < blocks[1] - blocks[0] < 20
    assert (
        pair.source.one(f"SELECT sum(rows) FROM tbl_repl.{table} WHERE target_id = %s", [target_id]) == 5002
    )


def test_what_is_counted_side_by_side_is_all_counted(pair: Pair) -> None:
    """As pieces of a copy are, also while the row moves on in its index."""
    target_id = async_table(pair)
    before = pair.source.one("SELECT batches FROM tbl_repl.progress")

    def count() -> None:
        conn = pair.source.connect()
        conn.execute("SET synchronous_commit = off")
        for _ in range(200):
            conn.execute("SELECT tbl_repl._advance(%s, 1)", [target_id])

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pair.source.sql("SELECT batches FROM tbl_repl.progress") == [(before + 800,)]


@pytest.mark.once
def test_the_queue_is_emptied_behind_a_large_batch_of_tables_that_refer_to_each_other(pair: Pair) -> None:
    pair.both("CREATE TABLE p (id text PRIMARY KEY); CREATE TABLE c (id text REFERENCES p ON DELETE CASCADE)")
    pair.add_target("p", mode="async")
    pair.source.sql("INSERT INTO p SELECT md5(g::text) FROM generate_series(1, 40000) g")
    assert (
        pair.source.one(
            "SELECT max(pg_table_size(s)) FROM unnest('{tbl_repl.change_0,tbl_repl.change_1}'::regclass[]) s"
        )
        > 1048576
    )
    pair.source.sql("CALL tbl_repl.drain()")
    pair.assert_same("p")
    assert pair.source.one("SELECT count(*) FROM tbl_repl.change") == 0
