"""change_token and wait_for: read your writes on another server."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from support import Node, Pair, wait_until
from support.background import start, within
from support.programs import WorkerProcess
from support.tables import replicate


def token(conn: Node | psycopg.Connection) -> str:
    if isinstance(conn, Node):
        return str(conn.one("SELECT tbl_repl.change_token()"))
    row = conn.execute("SELECT tbl_repl.change_token()").fetchone()
    assert row
    return str(row[0])


def arrived(pair: Pair, target: int, at: str, timeout: str = "0 s") -> bool:
    return bool(pair.source.one("SELECT tbl_repl.wait_for(%s, %s, %s::interval)", [target, at, timeout]))


@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_a_direct_target_has_it_at_once(pair: Pair, mode: str) -> None:
    target = replicate(pair, mode=mode)
    conn = pair.source.connect()
    for n in range(20):
        conn.execute(f"BEGIN; INSERT INTO t VALUES ({n}, 'x')")
        at = token(conn)
        conn.execute("COMMIT")
        assert arrived(pair, target, at)
        assert pair.target.rows("t", where=f"id = {n}")
        pair.source.sql(f"UPDATE t SET v = 'y' WHERE id = {n}")
        assert arrived(pair, target, token(pair.source))


def test_an_async_target_has_it_when_somebody_has_shipped_it(pair: Pair) -> None:
    target = replicate(pair, mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    at = token(pair.source)
    assert not arrived(pair, target, at)
    with within(5):
        assert not arrived(pair, target, at, "100 ms")
    waiter = start(pair.source.connect(), f"SELECT tbl_repl.wait_for({target}, '{at}')")
    wait_until(
        lambda: pair.source.admin(
            "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT tbl_repl.wait_for%'"
        )
    )
    assert not waiter.done()
    pair.drain()
    assert waiter.result(10) == [(True,)]
    pair.assert_same("t")


def test_read_your_writes(pair: Pair) -> None:
    """As the application would: write here, read there, every time."""
    target = replicate(pair, mode="async")
    writer, reader = pair.source.connect(), pair.target.connect()
    with WorkerProcess(pair.source):
        for n in range(100):
            with writer.transaction():
                writer.execute(
                    "INSERT INTO t VALUES (1, %s) ON CONFLICT (id) DO UPDATE SET v = excluded.v", [str(n)]
                )
                at = token(writer)
            assert writer.execute("SELECT tbl_repl.wait_for(%s, %s)", [target, at]).fetchone() == (True,)
            assert reader.execute("SELECT v FROM t WHERE id = 1").fetchone() == (str(n),)


def test_what_comes_later_is_not_waited_for(pair: Pair) -> None:
    target = replicate(pair, mode="async")
    other = replicate(pair, "o", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    at = token(pair.source)
    pair.drain()
    pair.source.sql("INSERT INTO t VALUES (2, 'later'); INSERT INTO o VALUES (1, 'elsewhere')")
    assert arrived(pair, target, at)
    assert not arrived(pair, target, token(pair.source))
    assert pair.pending(other) == 1


def test_others_are_not_waited_for(pair: Pair) -> None:
    """A transaction that was open when the token was taken, and queued later."""
    target = replicate(pair, mode="async")
    other = pair.source.connect()
    other.execute("BEGIN; INSERT INTO t VALUES (1, 'open')")
    pair.source.sql("INSERT INTO t VALUES (2, 'x')")
    at = token(pair.source)
    pair.drain()
    other.execute("COMMIT")
    assert pair.pending(target) == 1
    assert arrived(pair, target, at)


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_a_transaction_that_is_still_open_is_waited_for(pair: Pair, end: str) -> None:
    target = replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("BEGIN; INSERT INTO t VALUES (1, 'x')")
    at = token(conn)
    assert not arrived(pair, target, at)
    waiter = start(pair.source.connect(), f"SELECT tbl_repl.wait_for({target}, '{at}')")
    conn.execute(end)
    assert waiter.result(10) == [(True,)]
    pair.assert_same("t")


def test_a_tolerant_target_that_queues_is_waited_for(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    pair.call("pause_target", target_id=target)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    at = token(pair.source)
    assert not arrived(pair, target, at)
    pair.call("resume_target", target_id=target)
    pair.drain()
    assert arrived(pair, target, at)


def test_rows_in_quarantine_count_as_handled(pair: Pair) -> None:
    target = replicate(pair, mode="async")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    pair.source.sql("INSERT INTO t VALUES (1, 'bad')")
    at = token(pair.source)
    pair.drain()
    assert pair.source.one("SELECT count(*) FROM tbl_repl.quarantine") == 1
    assert arrived(pair, target, at)


def test_what_a_target_does_not_take_is_not_waited_for(pair: Pair) -> None:
    target = replicate(pair, mode="async", operations=["insert"])
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    pair.drain()
    pair.source.sql("UPDATE t SET v = 'y'")
    assert arrived(pair, target, token(pair.source))


def test_looking_at_a_large_queue_of_others_leaves_the_processor_alone(pair: Pair) -> None:
    target = replicate(pair, mode="async")
    replicate(pair, "o", mode="async")
    pair.source.sql("""
        DO $$ BEGIN
            FOR n IN 1 .. 20000 LOOP INSERT INTO o VALUES (n, 'x'); COMMIT; END LOOP;
        END $$
        """)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    at = token(pair.source)
    looks = "SELECT sum(idx_scan + seq_scan)::integer FROM pg_stat_all_tables WHERE relname IN ('change_0', 'change_1')"
    conn = pair.source.connect()
    pair.source.admin("SELECT pg_stat_reset()")
    assert conn.execute("SELECT tbl_repl.wait_for(%s, %s, '1 s')", [target, at]).fetchone() == (False,)
    wait_until(lambda: pair.source.one(looks) > 0)
    assert pair.source.one(looks) < 500


# --- refusals


@pytest.mark.once
@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "x",
        "1:2:",
        "1:2:/3",
        "1:2:/3/elsewhere",
        "2:1:/3/{node}",
        "1:2:/99999999999999999999999/{node}",
        "1:2:/999999999999/{node}",
        "1:2:x/3/{node}",
    ],
)
def test_what_is_no_token_of_this_node_is_refused(pair: Pair, bad: str | None) -> None:
    target = replicate(pair, mode="sync")
    if bad is not None:
        bad = bad.replace("{node}", str(pair.source.one("SELECT tbl_repl.node_name()")))
    with pytest.raises(errors.InvalidParameterValue) as caught:
        pair.source.sql("SELECT tbl_repl.wait_for(%s, %s)", [target, bad])
    assert caught.value.diag.message_hint


@pytest.mark.parametrize("timeout", [None, "-1 s"])
def test_a_bad_timeout_is_refused(pair: Pair, timeout: str | None) -> None:
    target = replicate(pair, mode="sync")
    with pytest.raises(errors.InvalidParameterValue, match="timeout"):
        pair.source.sql(
            "SELECT tbl_repl.wait_for(%s, %s, %s::interval)", [target, token(pair.source), timeout]
        )


def test_an_unknown_target_is_refused(pair: Pair) -> None:
    for target in (99, None):
        with pytest.raises(errors.UndefinedObject):
            pair.source.sql("SELECT tbl_repl.wait_for(%s::integer, %s)", [target, token(pair.source)])


def test_a_target_that_is_dropped_meanwhile_is_unknown(pair: Pair) -> None:
    target = replicate(pair, mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    waiter = start(pair.source.connect(), f"SELECT tbl_repl.wait_for({target}, '{token(pair.source)}')")
    wait_until(
        lambda: pair.source.admin(
            "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT tbl_repl.wait_for%'"
        )
    )
    pair.call("drop_target", target_id=target)
    with pytest.raises(errors.UndefinedObject):
        waiter.result(10)


def test_where_waiting_is_vain_it_is_refused(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("BEGIN; INSERT INTO t VALUES (1, 'x')")
    with pytest.raises(errors.ActiveSqlTransaction, match="not been committed"):
        conn.execute("SELECT tbl_repl.wait_for(%s, %s)", [target, token(conn)])
    conn.execute("ROLLBACK")
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(errors.ActiveSqlTransaction, match="READ COMMITTED"):
        conn.execute("SELECT tbl_repl.wait_for(%s, %s)", [target, token(conn)])


def test_readers_may_wait_and_others_may_not(pair: Pair) -> None:
    target = replicate(pair, mode="async")
    role = pair.source.role("waiter")
    pair.source.sql(f"GRANT INSERT ON t TO writer; SELECT tbl_repl.grant_access('{role}', 'reader')")
    pair.source.sql(f"GRANT INSERT ON t TO {role}; INSERT INTO t VALUES (1, 'x')")
    conn = pair.source.connect(role)
    conn.execute("BEGIN; INSERT INTO t VALUES (2, 'y')")
    at = token(conn)
    conn.execute("COMMIT")
    pair.drain()
    assert conn.execute("SELECT tbl_repl.wait_for(%s, %s, '0 s')", [target, at]).fetchone() == (True,)
    with pytest.raises(errors.InsufficientPrivilege):
        pair.source.sql("SELECT tbl_repl.wait_for(1, 'x')", user="writer")


def test_a_copy_in_the_background_is_waited_for(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) AS g")
    target = pair.add_target("t", mode="async", initial_copy="background")
    at = token(pair.source)
    assert not arrived(pair, target, at)
    pair.source.sql("SELECT tbl_repl.replay(max_rows => 60)")
    assert not arrived(pair, target, at)
    pair.drain()
    assert arrived(pair, target, at)
