"""Replay: batches, positions, quarantine, and the order in which a backlog reaches the target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from support import Node, Pair, Proxy, wait_until
from support.background import start, within


def replay(pair: Pair, server: str | None = None, max_rows: int = 10000) -> int:
    """One batch; rows handled."""
    return int(pair.source.one("SELECT tbl_repl.replay(%s, %s)", [server, max_rows]))


def async_table(pair: Pair, columns: str = "id integer PRIMARY KEY, v text", **options: Any) -> int:
    """An empty table t on every node with an async target; the target_id."""
    pair.both(f"CREATE TABLE t ({columns})")
    return pair.add_target("t", mode="async", **options)


def notices(conn: psycopg.Connection) -> list[str]:
    """The list into which the messages of that session are written from now on."""
    heard: list[str] = []
    conn.add_notice_handler(lambda d: heard.append(f"{d.severity} {d.sqlstate}: {d.message_primary}"))
    return heard


@contextmanager
def transaction(node: Node, isolation: str = "READ COMMITTED") -> Iterator[psycopg.Connection]:
    """A session with an open transaction; committed at the end of the block."""
    conn = node.connect()
    conn.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    try:
        yield conn
        conn.execute("COMMIT")
    finally:
        conn.close()


def quarantined(pair: Pair) -> list[tuple[Any, ...]]:
    return pair.source.sql("SELECT key, sqlstate, attempts FROM tbl_repl.quarantine ORDER BY key::text")


# --- the verbs


def test_replay_ships_one_batch_and_says_how_many_rows(pair: Pair) -> None:
    async_table(pair)
    for i in range(5):
        pair.source.sql("INSERT INTO t SELECT %s * 10 + g, 'x' FROM generate_series(0, 9) g", [i])
    assert [replay(pair, max_rows=20) for _ in range(4)] == [20, 20, 10, 0]
    pair.assert_same("t")


def test_replay_never_splits_a_transaction(pair: Pair) -> None:
    async_table(pair)
    with transaction(pair.source) as conn:
        conn.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 50) g")
        conn.execute("UPDATE t SET v = 'y' WHERE id <= 25")
    pair.source.sql("INSERT INTO t VALUES (99, 'later')")
    assert replay(pair, max_rows=10) == 75
    assert pair.target.one("SELECT count(*) FROM t") == 50
    assert replay(pair, max_rows=10) == 1
    pair.assert_same("t")


def test_a_transaction_larger_than_any_message_arrives_at_once(pair: Pair) -> None:
    async_table(pair)
    pair.source.sql("INSERT INTO t SELECT g, 'x' || g FROM generate_series(1, 12345) g")
    assert replay(pair, max_rows=100) == 12345
    pair.assert_same("t")


def test_drain_commits_after_each_batch(pair: Pair) -> None:
    """On both sides: one transaction a batch."""
    async_table(pair)
    pair.target.sql(
        "CREATE TABLE seen (id integer, xid xid8 DEFAULT pg_current_xact_id());"
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO seen VALUES (NEW.id); RETURN NEW; END$$;"
        "CREATE TRIGGER see AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION see()"
    )
    for i in range(6):
        pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
    before = pair.source.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 2)")
    after = pair.source.one("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    assert after - before >= 3
    assert [row[0] for row in pair.target.sql("SELECT count(*) FROM seen GROUP BY xid")] == [2, 2, 2]


def test_drain_keeps_the_batches_it_has_finished_when_it_is_cancelled(pair: Pair) -> None:
    target_id = async_table(pair, timeout="10 s")
    for i in (1, 2, 3):
        pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
    blocker = pair.target.connect()
    blocker.execute("BEGIN")
    blocker.execute("INSERT INTO t VALUES (2, 'in the way')")
    conn = pair.source.connect()
    errors: list[psycopg.Error] = []

    def drain() -> None:
        try:
            conn.execute("CALL tbl_repl.drain(batch_rows => 1)")
        except psycopg.Error as error:
            errors.append(error)

    thread = threading.Thread(target=drain)
    thread.start()
    wait_until(lambda: pair.pending(target_id) == 2)
    conn.cancel()
    blocker.execute("ROLLBACK")
    thread.join(20)
    assert [error.sqlstate for error in errors] == ["57014"]
    assert pair.pending(target_id) >= 1
    pair.drain()
    pair.assert_same("t")


def test_a_cancelled_replay_leaves_no_remote_transaction_behind(pair: Pair) -> None:
    """The session goes on: what it ships next must commit, not drown in the open transaction."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", timeout="10 s")
    pair.call("pause_target", target_id=target_id)
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) g")
    pair.source.sql("UPDATE tbl_repl.target_state SET status = 'queueing'")
    blocker = pair.target.connect()
    blocker.execute("BEGIN")
    blocker.execute("INSERT INTO t VALUES (2, 'in the way')")
    conn = pair.source.connect()
    errors: list[psycopg.Error] = []

    def run() -> None:
        try:
            conn.execute("SELECT tbl_repl.replay()")
        except psycopg.Error as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(
        lambda: pair.target.admin(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl%' AND wait_event_type = 'Lock'"
        )
    )
    conn.cancel()
    # at once, for nothing is committed by that message; what it has locked there goes when the lock comes
    thread.join(3)
    assert [error.sqlstate for error in errors] == ["57014"]
    blocker.execute("ROLLBACK")
    wait_until(
        lambda: (
            not pair.target.admin(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl%'"
                " AND (state LIKE 'idle in transaction%' OR wait_event_type = 'Lock')"
            )
        )
    )
    conn.execute("CALL tbl_repl.drain()")
    conn.execute("INSERT INTO t VALUES (11, 'direct')")
    assert pair.pending(target_id) == 0
    pair.assert_same("t")


@pytest.mark.parametrize("verb", ["SELECT tbl_repl.replay()", "CALL tbl_repl.drain()"])
def test_a_transaction_that_has_written_may_not_replay(pair: Pair, verb: str) -> None:
    async_table(pair)
    with transaction(pair.source) as conn:
        conn.execute("INSERT INTO t VALUES (1, 'x')")
        with pytest.raises(psycopg.errors.ActiveSqlTransaction):
            conn.execute(verb)
        conn.execute("ROLLBACK; BEGIN")


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_replay_wants_read_committed(pair: Pair, isolation: str) -> None:
    async_table(pair)
    with transaction(pair.source, isolation) as conn, pytest.raises(psycopg.errors.ActiveSqlTransaction):
        conn.execute("SELECT tbl_repl.replay()")


def test_an_unknown_server_and_a_batch_of_nothing_are_refused(pair: Pair) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject, match="nowhere"):
        replay(pair, "nowhere")
    with pytest.raises(psycopg.errors.UndefinedObject, match="nowhere"):
        pair.source.sql("CALL tbl_repl.drain('nowhere')")
    for rows in (0, -1):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            replay(pair, max_rows=rows)


def test_a_paused_target_gets_nothing_until_it_is_resumed(pair: Pair) -> None:
    target_id = async_table(pair)
    pair.call("pause_target", target_id=target_id)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    assert replay(pair) == 0
    assert (pair.status(target_id), pair.pending(target_id)) == ("paused", 1)
    pair.call("resume_target", target_id=target_id)
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_a_replay_that_waited_for_a_pause_ships_nothing(pair: Pair) -> None:
    target_id = async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    answers: list[int] = []
    conn = pair.source.connect()
    with transaction(pair.source) as pausing:
        pausing.execute("SELECT tbl_repl.pause_target(%s)", [target_id])
        thread = threading.Thread(
            target=lambda: answers.append(conn.execute("SELECT tbl_repl.replay()").fetchall()[0][0])
        )
        thread.start()
        wait_until(
            lambda: pair.source.admin("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        )
    thread.join(10)
    assert answers == [0]
    assert pair.target.rows("t") == []
    assert pair.status(target_id) == "paused"


def test_drains_in_several_sessions_at_once_are_all_well(pair: Pair) -> None:
    async_table(pair)
    conns = [pair.source.connect() for _ in range(3)]
    for i in range(200):
        pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
    errors: list[Exception] = []

    def drain(conn: psycopg.Connection) -> None:
        try:
            conn.execute("CALL tbl_repl.drain(batch_rows => 20)")
        except psycopg.Error as error:
            errors.append(error)

    threads = [threading.Thread(target=drain, args=[conn]) for conn in conns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    pair.assert_same("t")


# --- several servers


def test_a_dead_server_does_not_hold_up_the_others(trio: Pair) -> None:
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    assert trio.third
    dead = trio.add_target("t", mode="async", timeout="1 s")
    well = trio.add_target("t", trio.third_server, mode="async")
    trio.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    trio.proxy().set("refuse")
    conn = trio.source.connect()
    heard = notices(conn)
    conn.execute("CALL tbl_repl.drain()")
    trio.assert_same("t", there=trio.third)
    assert (trio.pending(dead), trio.pending(well)) == (2, 0)
    assert [h for h in heard if h.startswith("WARNING 08")], heard
    last_error = trio.source.one("SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [dead])
    assert last_error.startswith("08")
    assert trio.source.one("SELECT count(*) FROM tbl_repl.error_log WHERE target_id = %s", [well]) == 0


@pytest.mark.parametrize("copy", ["none", "background"])
def test_a_table_locked_on_the_source_is_left_for_later_and_hurts_no_other(pair: Pair, copy: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE free (id integer PRIMARY KEY)")
    pair.source.sql("INSERT INTO t VALUES (0)")
    locked = pair.add_target("t", mode="async", initial_copy=copy)
    pair.add_target("free", mode="async")
    pair.source.sql("DELETE FROM t; INSERT INTO t VALUES (1); INSERT INTO free VALUES (1)")
    conn = pair.source.connect()
    heard = notices(conn)
    with transaction(pair.source) as other:
        other.execute("LOCK TABLE t")
        conn.execute("SET statement_timeout = '20 s'")  # so that a failure ends
        assert conn.execute("SELECT tbl_repl.replay()").fetchone() == (1,)
        assert pair.target.rows("free") == ["(1)"]
        assert pair.target.rows("t") == []
    assert heard == [f"WARNING 55P03: target {locked}: the table is locked on the source"]
    assert pair.source.one(
        "SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [locked]
    ) == ("55P03: the table is locked on the source")
    pair.drain()
    pair.assert_same("t")


def test_the_first_replay_after_a_restart_of_the_target_ships(pair: Pair) -> None:
    """The session's connection has died unnoticed."""
    target_id = async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    pair.drain()
    pair.source.sql("INSERT INTO t VALUES (2, 'x')")
    pair.target.admin(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl%'"
    )
    assert replay(pair) == 1
    pair.assert_same("t")
    assert pair.source.one("SELECT count(*) FROM tbl_repl.error_log WHERE target_id = %s", [target_id]) == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_a_drainer_goes_on_after_a_clock_was_set(pair: Pair, rows: int) -> None:
    target_id = async_table(pair)
    with pair.source.connect() as conn:
        conn.execute(f"INSERT INTO t SELECT g, 'a' FROM generate_series(1, {rows}) AS g")
        assert conn.execute("SELECT tbl_repl.replay()").fetchone() == (rows,)
        conn.execute(
            "SELECT dblink_exec(c, 'SET tbl_repl.clock = -3600') FROM unnest(dblink_get_connections()) AS c"
        )
        conn.execute("UPDATE t SET v = 'b'")
        assert conn.execute("SELECT tbl_repl.replay()").fetchone() == (0,)
        assert pair.source.one("SELECT sqlstate FROM tbl_repl.error_log") == "08000"
        assert quarantined(pair) == []
        conn.execute("CALL tbl_repl.drain()")
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_a_division_by_zero_on_the_target_is_an_error_of_the_row(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql(
        "CREATE FUNCTION divide() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM 1 / (NEW.id - 2); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER divide AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION divide()"
    )
    pair.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    pair.drain()
    assert [row[0] for row in pair.target.sql("SELECT id FROM t ORDER BY id")] == [1, 3]
    assert quarantined(pair)[0][:2] == ({"id": 2}, "22012")


def test_single_rows_go_by_statements_that_the_connection_has_prepared(pair: Pair) -> None:
    async_table(pair)
    query = (
        "SELECT name, generic_plans + custom_plans FROM pg_prepared_statements WHERE name ~ '_[ud][0-9]+_'"
    )
    prepared = "FROM unnest(dblink_get_connections()) AS c, dblink(c, %s) AS p (name text, used bigint)"
    with pair.source.connect() as conn:

        def ship(statement: str) -> list[tuple[str, int]]:
            conn.execute(statement)
            assert conn.execute("SELECT tbl_repl.replay()").fetchone() == (1,)
            return conn.execute(
                f"SELECT substr(name, 10, 1), used {prepared} ORDER BY 1 DESC", [query]
            ).fetchall()

        assert ship("INSERT INTO t VALUES (1, 'a')") == [("u", 1), ("d", 0)]
        assert ship("UPDATE t SET v = 'b'") == [("u", 2), ("d", 0)]
        assert ship("DELETE FROM t") == [("u", 2), ("d", 1)]
        conn.execute(f"SELECT dblink_exec(c, 'DEALLOCATE ' || name) {prepared}", [query])
        assert ship("INSERT INTO t VALUES (2, 'a')") == [("u", 1), ("d", 0)]
    pair.assert_same("t")
    assert pair.source.sql("SELECT * FROM tbl_repl.error_log") == []


def test_a_dead_server_does_not_turn_away_the_writers_of_others(trio: Pair) -> None:
    """While a drainer waits for the server that hangs, nobody else's lock is held."""
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    trio.both("CREATE TABLE u (id integer PRIMARY KEY, v text)")
    well = trio.add_target("u", trio.third_server, mode="tolerant")
    hung = trio.add_target("t", mode="async", timeout="2 s")
    trio.source.sql("INSERT INTO t VALUES (1, 'a')")
    # something to settle for the healthy one: a status without anything queued
    trio.source.sql("UPDATE tbl_repl.target_state SET status = 'queueing' WHERE target_id = %s", [well])
    trio.source.sql("INSERT INTO u VALUES (1, 'a')")
    blocker = trio.target.connect()
    blocker.execute("BEGIN")
    blocker.execute("INSERT INTO t VALUES (1, 'in the way')")
    conn = trio.source.connect()
    thread = threading.Thread(target=lambda: conn.execute("CALL tbl_repl.drain()"))
    thread.start()
    wait_until(
        lambda: trio.target.admin(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl%' AND wait_event_type = 'Lock'"
        )
    )
    trio.source.sql("INSERT INTO u VALUES (2, 'b')")
    assert trio.pending(well) == 0
    blocker.execute("ROLLBACK")
    thread.join(20)
    assert trio.pending(hung) == 0


def test_rows_are_counted_where_they_were_shipped_to(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY REFERENCES t)")
    for table in "tu":
        pair.add_target(table, mode="async")
    pair.source.sql(
        "INSERT INTO t SELECT generate_series(1, 3000); INSERT INTO u SELECT generate_series(1, 20)"
    )
    pair.drain()
    assert pair.source.sql("SELECT rows_shipped FROM tbl_repl.target_status ORDER BY target_id") == [
        (3000,),
        (20,),
    ]


def test_two_async_targets_go_on_at_their_own_pace(trio: Pair) -> None:
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    assert trio.third
    first = trio.add_target("t", mode="async")
    second = trio.add_target("t", trio.third_server, mode="async")
    for i in range(6):
        trio.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
    assert replay(trio, trio.server, 4) == 4
    assert replay(trio, trio.third_server, 1) == 1
    assert (trio.pending(first), trio.pending(second)) == (2, 5)
    trio.source.sql("UPDATE t SET v = 'y' WHERE id < 3")
    trio.source.sql("CALL tbl_repl.drain(%s)", [trio.server])
    trio.assert_same("t")
    assert trio.third.one("SELECT count(*) FROM t") == 1
    trio.drain()
    trio.assert_same("t", there=trio.third)
    assert (trio.pending(first), trio.pending(second)) == (0, 0)


# --- positions


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


def together(pair: Pair) -> tuple[int, int]:
    """Async targets of two tables on one server; each holds ten rows."""
    pair.both("CREATE TABLE a (id integer PRIMARY KEY); CREATE TABLE b (id integer PRIMARY KEY)")
    targets = tuple(pair.add_target(table, mode="async") for table in "ab")
    pair.source.sql(
        "INSERT INTO a SELECT generate_series(1, 10); INSERT INTO b SELECT generate_series(1, 10)"
    )
    pair.drain()
    return targets  # type: ignore[return-value]


def counts(pair: Pair) -> tuple[int, int]:
    return pair.target.sql("SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)")[0]  # type: ignore[return-value]


def waits_for_a_lock(node: Node, query: str) -> None:
    wait_until(
        lambda: node.admin(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND query LIKE %s",
            [query],
        )
    )


def test_a_table_with_nothing_queued_is_not_left_behind(pair: Pair) -> None:
    """It is written with the other one, after replay has looked what is queued and before it reads."""
    first, _ = together(pair)
    pair.source.sql("INSERT INTO a VALUES (11)")
    shipper = pair.source.connect()
    shipper.execute("SELECT pg_advisory_lock_shared(tbl_repl._lock_ship(), %s)", [first])
    drainer = start(pair.source.connect(), "SELECT tbl_repl.replay()")
    waits_for_a_lock(pair.source, "SELECT tbl_repl.replay%")
    pair.source.sql("INSERT INTO a VALUES (12); INSERT INTO b VALUES (11)")
    shipper.execute("SELECT pg_advisory_unlock_all()")
    drainer.result(10)
    assert counts(pair) in [(11, 10), (12, 11)]
    pair.drain()
    assert counts(pair) == (12, 11)


def test_what_is_queued_and_its_state_are_of_one_snapshot(pair: Pair) -> None:
    """Both tables are written after replay has listed what is queued, while the target's TRUNCATE waits."""
    together(pair)
    pair.source.sql("TRUNCATE a")
    reader = pair.target.connect()
    reader.execute("BEGIN; SELECT FROM a")
    drainer = start(pair.source.connect(), "SELECT tbl_repl.replay()")
    waits_for_a_lock(pair.target, "%TRUNCATE%")
    pair.source.sql("INSERT INTO a VALUES (1); INSERT INTO b VALUES (11)")
    reader.execute("ROLLBACK")
    drainer.result(10)
    assert counts(pair) == (0, 10)
    pair.drain()
    assert counts(pair) == (1, 11)


def test_sent_in_another_order_it_is_still_of_one_snapshot(pair: Pair) -> None:
    """The first attempt fails on a foreign key of the target; what commits meanwhile is not half in the second."""
    pair.both("CREATE TABLE p (id integer PRIMARY KEY); CREATE TABLE q (id integer PRIMARY KEY)")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p)")
    for table in "pcq":
        pair.add_target(table, mode="async")
    pair.source.sql("INSERT INTO p VALUES (1); INSERT INTO c VALUES (1, 1); INSERT INTO q VALUES (1)")
    pair.drain()
    # the child moves to a new parent, the old one goes: deletes first fail
    pair.source.sql("INSERT INTO p VALUES (2); UPDATE c SET p = 2; DELETE FROM p WHERE id = 1")
    pair.source.sql("INSERT INTO p SELECT generate_series(101, 1200)")  # no small batch, which is read anew
    reader = pair.target.connect()
    reader.execute("BEGIN; SELECT FROM p WHERE id = 1 FOR UPDATE")
    drainer = start(pair.source.connect(), "SELECT tbl_repl.replay()")
    waits_for_a_lock(pair.target, "%DELETE%")
    pair.source.sql("UPDATE c SET p = NULL; DELETE FROM q")
    reader.execute("ROLLBACK")
    drainer.result(10)
    assert pair.target.sql("SELECT p, (SELECT count(*) FROM q) FROM c") == [(2, 1)]
    pair.drain()
    assert pair.target.sql("SELECT p, (SELECT count(*) FROM q) FROM c") == [(None, 0)]


# --- the queue's space


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


# --- the initial copy


def test_a_background_copy_goes_by_pieces_beside_writers(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'old' FROM generate_series(1, 1000) g")
    target_id = pair.add_target("t", initial_copy="background")
    assert pair.status(target_id) == "copying"
    assert replay(pair, max_rows=300) == 300
    assert pair.target.one("SELECT count(*) FROM t") == 300
    pair.source.sql("UPDATE t SET v = 'new' WHERE id IN (1, 999)")  # behind and before the copy
    pair.source.sql("DELETE FROM t WHERE id IN (2, 998)")
    pair.source.sql("UPDATE t SET id = 5000 WHERE id = 3")
    pair.source.sql("UPDATE t SET id = 3 WHERE id = 997")
    pair.source.sql("INSERT INTO t VALUES (-1, 'new'), (6000, 'new')")
    assert pair.status(target_id) == "copying"
    assert pair.target.one("SELECT count(*) FROM t WHERE v = 'new'") == 0
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 300)")
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"
    pair.source.sql("INSERT INTO t VALUES (7000, 'direct')")
    pair.assert_same("t")


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
@pytest.mark.parametrize("rows", [0, 100])
def test_a_background_copy_ends_in_every_mode(pair: Pair, mode: str, rows: int) -> None:
    """100 rows in pieces of 100, and none at all: the ends that are easy to miss."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, %s) g", [rows])
    target_id = pair.add_target("t", mode=mode, initial_copy="background")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 100)")
    assert pair.status(target_id) == "ok"
    assert pair.pending(target_id) == 0
    pair.assert_same("t")


# What ends a page there: keys whose text is empty, the only one, the first one or the last one.
EMPTY_KEYS = {
    "text": ("text", ["''"]),
    "text, more": ("text", ["''", "'a'", "'b'"]),
    "varchar": ("varchar(5)", ["''"]),
    "varbit": ("varbit", ["''", "'1'"]),
    "enum": ("label", ["'b'", "''"]),
}


@pytest.mark.once
@pytest.mark.parametrize("name", EMPTY_KEYS)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_background_copy_ends_where_a_page_ends_at_an_empty_key(pair: Pair, name: str, rows: int) -> None:
    key_type, keys = EMPTY_KEYS[name]
    pair.both(f"CREATE TYPE label AS ENUM ('b', 'a', ''); CREATE TABLE t (id {key_type} PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES " + ", ".join(f"({key}, 'v')" for key in keys))
    target_id = pair.add_target("t", initial_copy="background")
    assert sum(replay(pair, max_rows=rows) for _ in range(8)) <= len(keys) + 1
    assert replay(pair, max_rows=rows) == 0
    assert pair.status(target_id) == "ok"
    pair.assert_same("t")


@pytest.mark.parametrize("name", EMPTY_KEYS)
def test_resync_ends_where_a_page_ends_at_an_empty_key(pair: Pair, name: str) -> None:
    key_type, keys = EMPTY_KEYS[name]
    pair.both(f"CREATE TYPE label AS ENUM ('b', 'a', ''); CREATE TABLE t (id {key_type} PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES " + ", ".join(f"({key}, 'v')" for key in keys))
    target_id = pair.add_target("t", initial_copy="none")
    pair.source.sql("SET statement_timeout = '5 s'")
    assert pair.call("resync_target", target_id=target_id) == len(keys)
    pair.drain()
    pair.assert_same("t")


def test_a_background_copy_survives_a_cut_line(pair: Pair, proxy: Proxy) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1000) g")
    target_id = pair.add_target("t", initial_copy="background", timeout="1 s")
    assert replay(pair, max_rows=100) == 100
    proxy.set("refuse")
    proxy.cut()
    assert replay(pair, max_rows=100) == 0
    assert pair.status(target_id) == "copying"
    proxy.set("pass")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 100)")
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_background_copies_of_linked_tables_keep_the_parents_first(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE parent (id integer PRIMARY KEY);"
        "CREATE TABLE child (id integer PRIMARY KEY, parent_id integer NOT NULL REFERENCES parent)"
    )
    pair.source.sql("INSERT INTO parent SELECT generate_series(1, 500)")
    pair.source.sql("INSERT INTO child SELECT g, 501 - g FROM generate_series(1, 500) g")
    pair.add_target("child", initial_copy="background")
    pair.add_target("parent", initial_copy="background")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 100)")
    pair.assert_same("parent")
    pair.assert_same("child")
    assert pair.source.one("SELECT count(*) FROM tbl_repl.error_log") == 0


def test_without_a_copy_only_later_changes_go(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES (1, 'before'), (2, 'before')")
    target_id = pair.add_target("t", initial_copy="none")
    pair.source.sql("UPDATE t SET v = 'after' WHERE id = 2")
    assert pair.target.rows("t") == ["(2,after)"]
    assert pair.call("resync_target", target_id=target_id) == 2
    pair.drain()
    pair.assert_same("t")


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_copy_that_is_rolled_back_leaves_nothing_on_the_target(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000) g")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("SELECT tbl_repl.add_target('t', %s, mode => %s)", [pair.server, mode])
    conn.execute("INSERT INTO t VALUES (9999, 'x')")
    conn.execute("ROLLBACK")
    assert pair.target.rows("t") == []
    assert pair.source.one("SELECT count(*) FROM tbl_repl.target_status") == 0


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_copy_in_a_transaction_contains_what_it_wrote(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000) g")
    with transaction(pair.source) as conn:
        conn.execute("DELETE FROM t WHERE id = 1")
        conn.execute("SELECT tbl_repl.add_target('t', %s, mode => %s)", [pair.server, mode])
        conn.execute("INSERT INTO t VALUES (9999, 'x')")
        conn.execute("UPDATE t SET v = 'y' WHERE id = 2")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.parametrize("copy", ["now", "background"])
def test_rows_that_are_there_already_are_made_equal(pair: Pair, copy: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 50) g")
    pair.target.sql("INSERT INTO t SELECT g, 'other' FROM generate_series(40, 50) g")
    pair.add_target("t", initial_copy=copy)
    pair.drain()
    pair.assert_same("t")


def test_resync_queues_every_row_behind_what_is_queued(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 50) g")
    pair.target.sql("UPDATE t SET v = 'spoilt' WHERE id < 10; DELETE FROM t WHERE id > 45")
    assert pair.call("resync_target", target_id=target_id) == 50
    assert pair.status(target_id) == "queueing"
    pair.source.sql("UPDATE t SET v = 'y' WHERE id = 1")
    assert pair.target.one("SELECT v FROM t WHERE id = 1") == "spoilt"
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


# --- a target that is slow

SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON t FOR EACH ROW WHEN (NEW.v = 'slow') EXECUTE FUNCTION slow();
"""


@pytest.mark.once
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_batch_too_slow_for_the_timeout_goes_in_smaller_messages(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", mode=mode, timeout="0.5 s")
    pair.target.sql(SLOW.format(seconds=0.002))
    pair.source.sql("INSERT INTO t SELECT g, 'slow' FROM generate_series(1, 1200) g")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []
    assert (pair.status(target_id), pair.pending(target_id)) == ("ok", 0)


@pytest.mark.once
def test_a_row_too_slow_for_the_timeout_goes_into_quarantine(pair: Pair) -> None:
    target_id = async_table(pair, timeout="0.3 s")
    pair.target.sql(SLOW.format(seconds=20))
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE g WHEN 77 THEN 'slow' ELSE 'x' END FROM generate_series(1, 1200) g"
    )
    pair.source.sql("INSERT INTO t VALUES (5000, 'slow')")
    pair.drain()
    pair.assert_same("t", where="v <> 'slow'")
    assert [row[:2] for row in quarantined(pair)] == [({"id": 5000}, "57014"), ({"id": 77}, "57014")]
    assert (pair.status(target_id), pair.pending(target_id)) == ("ok", 0)
    pair.source.sql("UPDATE t SET v = 'x' WHERE id = 77")
    pair.drain()
    assert [row[0] for row in quarantined(pair)] == [{"id": 5000}]
    pair.target.sql("DROP TRIGGER slow ON t")
    pair.drain()
    assert quarantined(pair) == []
    pair.assert_same("t")


@pytest.mark.once
def test_rows_too_slow_are_tried_again_one_by_one(pair: Pair) -> None:
    async_table(pair, timeout="0.2 s")
    pair.target.sql(SLOW.format(seconds=20))
    for i in range(2):
        pair.source.sql("INSERT INTO t VALUES (%s, 'slow')", [i])
        pair.drain()
    before = sum(row[2] for row in quarantined(pair))
    assert replay(pair) == 0
    assert sum(row[2] for row in quarantined(pair)) == before + 1


@pytest.mark.once
def test_a_target_too_slow_for_any_row_fails_and_its_neighbours_go_on(pair: Pair) -> None:
    target_id = async_table(pair, timeout="0.2 s")
    pair.both("CREATE TABLE n (id integer PRIMARY KEY)")
    pair.add_target("n", mode="async", timeout="0.2 s")
    pair.target.sql(SLOW.format(seconds=20))
    pair.source.sql("INSERT INTO t SELECT g, 'slow' FROM generate_series(1, 60) g; INSERT INTO n VALUES (1)")
    pair.drain()
    pair.assert_same("n")
    assert (pair.status(target_id), pair.pending(target_id)) == ("failed", 60)
    assert quarantined(pair) == []
    assert "57014" in pair.source.one(
        "SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [target_id]
    )
    pair.target.sql("DROP TRIGGER slow ON t")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


# --- rows that the target rejects


def test_one_rejected_row_among_thousands_holds_up_no_other(pair: Pair) -> None:
    target_id = async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT no_poison CHECK (v <> 'poison')")
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE g WHEN 3210 THEN 'poison' ELSE 'x' END FROM generate_series(1, 5000) g"
    )
    pair.drain()
    pair.assert_same("t", where="id <> 3210")
    assert quarantined(pair)[0][:2] == ({"id": 3210}, "23514")
    message, hint = pair.source.sql(
        "SELECT message, hint FROM tbl_repl.error_log WHERE target_id = %s AND key = %s::jsonb",
        [target_id, '{"id": 3210}'],
    )[0]
    assert "no_poison" in message
    assert hint
    assert "no_poison" in pair.source.one("SELECT message FROM tbl_repl.quarantine")
    assert (pair.status(target_id), pair.pending(target_id)) == ("ok", 0)


def test_several_rejected_rows_are_all_found_and_counted(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CHECK (id % 400 <> 0)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000) g")
    assert replay(pair) == 2000
    pair.assert_same("t", where="id % 400 <> 0")
    assert [row[0]["id"] for row in quarantined(pair)] == [1200, 1600, 2000, 400, 800]
    first = quarantined(pair)[0][2]
    assert replay(pair) == 0  # tried again, in vain
    assert quarantined(pair)[0][2] == first + 1


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_row_that_the_target_cannot_even_read_hurts_no_other(pair: Pair, mode: str) -> None:
    """The whole message is refused before any of it is executed."""
    name = f"{pair.target.dbname}_latin"
    pair.target.admin(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C' OWNER owner")
    try:
        server = pair.join(pair.source, pair.target, "latin_server")
        pair.source.sql(f"ALTER SERVER {server} OPTIONS (SET dbname '{name}')")
        with pair.target.cluster.connect(name, "owner") as latin:
            for table in ("t", "u"):
                latin.execute(f"CREATE TABLE {table} (id integer PRIMARY KEY, v text)")
                pair.source.sql(f"CREATE TABLE {table} (id integer PRIMARY KEY, v text)")
                pair.call("add_target", source_table=table, server=server, mode=mode)
            pair.source.sql(
                "INSERT INTO t VALUES (1, 'a'), (2, '\u20ac'), (3, 'b'); INSERT INTO u VALUES (1, 'c')"
            )
            pair.drain()
            assert latin.execute("SELECT id FROM t ORDER BY id").fetchall() == [(1,), (3,)]
            assert latin.execute("SELECT id FROM u").fetchall() == [(1,)]
            assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, "22P05")]
            pair.source.sql("UPDATE t SET v = 'c' WHERE id = 2")
            pair.drain()
            assert quarantined(pair) == []
    finally:
        pair.source.forget()
        pair.target.admin(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_row_that_a_policy_of_the_target_forbids_hurts_no_other(pair: Pair) -> None:
    """42501 is the code of a missing right as well, which no row can help."""
    target_id = async_table(pair, "id integer PRIMARY KEY, v integer")
    pair.target.sql("ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY")
    pair.target.sql("CREATE POLICY p ON t USING (true) WITH CHECK (v < 100)")
    pair.source.sql("INSERT INTO t VALUES (1, 1), (2, 100)")
    for _ in range(3):
        pair.drain()  # and tries it again, alone
        assert pair.status(target_id) == "ok"
    assert pair.target.rows("t") == ["(1,1)"]
    assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, "42501")]
    pair.source.sql("UPDATE t SET v = 2 WHERE id = 2")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("code", ["55000", "42704", "XX000"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_row_refused_by_what_looks_like_an_error_of_the_target_is_found(
    pair: Pair, mode: str, code: str
) -> None:
    """A trigger of the target may raise anything; what comes again and again is looked into."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", mode=mode)
    pair.target.sql(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'it is closed' USING ERRCODE = '{code}';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON t FOR EACH ROW
            WHEN (NEW.v = 'closed') EXECUTE FUNCTION refuse()
        """
    )
    pair.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'closed'), (3, 'b')")
    for _ in range(5):
        pair.drain()
    assert pair.target.rows("t") == ["(1,a)", "(3,b)"]
    assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, code)]
    assert pair.status(target_id) == "ok"
    for _ in range(4):
        pair.drain()  # tried again alone, it is not the target's fault either
    assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, code)]
    assert pair.status(target_id) == "ok"
    pair.source.sql("UPDATE t SET v = 'c' WHERE id = 2")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.once
def test_a_target_that_refuses_every_row_keeps_its_queue_and_hurts_no_other(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    refusing, _ = pair.add_target("t", mode="async"), pair.add_target("u", mode="async")
    pair.target.sql(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'it is closed' USING ERRCODE = '55000';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    pair.source.sql("INSERT INTO t VALUES (1), (2), (3); INSERT INTO u VALUES (1)")
    for _ in range(5):
        pair.drain()
    assert pair.target.rows("u") == ["(1)"]
    assert quarantined(pair) == []
    assert pair.pending(refusing) == 3
    pair.target.sql("DROP TRIGGER refuse ON t")
    pair.drain()
    pair.assert_same("t")


NO_TRUNCATE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
CREATE TRIGGER refuse BEFORE TRUNCATE ON t FOR EACH STATEMENT EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_truncate_that_the_target_refuses_fails_that_target_only(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    refusing, other = pair.add_target("t", mode=mode), pair.add_target("u", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1), (2); INSERT INTO u VALUES (1)")
    pair.drain()
    pair.target.sql(NO_TRUNCATE)
    pair.source.sql("TRUNCATE t, u; INSERT INTO t VALUES (3); INSERT INTO u VALUES (2)")
    pair.drain()
    pair.assert_same("u")
    assert (pair.status(refusing), pair.status(other)) == ("failed", "ok")
    last = pair.source.one("SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [refusing])
    assert last == "P0001: TRUNCATE: not this one"
    pair.target.sql("DROP TRIGGER refuse ON t")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(refusing) == "ok"


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_after_a_truncate_rows_that_others_refer_to_stay_and_are_told_of(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    target, _ = pair.add_target("t", mode=mode), pair.add_target("u", mode="async")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 2500)")
    pair.drain()
    pair.target.sql("CREATE TABLE ref (id integer REFERENCES t); INSERT INTO ref VALUES (2), (2400)")
    pair.source.sql("TRUNCATE t; INSERT INTO t VALUES (3), (2501); INSERT INTO u VALUES (1)")
    pair.drain()
    pair.assert_same("u")
    assert pair.target.rows("t") == ["(2)", "(2400)", "(2501)", "(3)"]
    assert pair.source.sql("SELECT key, sqlstate FROM tbl_repl.quarantine ORDER BY key") == [
        ({"id": 2}, "23503"),
        ({"id": 2400}, "23503"),
    ]
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)
    pair.target.sql("DROP TABLE ref")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
def test_after_a_truncate_rows_that_go_slowly_go(pair: Pair) -> None:
    """All together they take longer than the target lets a statement; each by itself does not."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    target = pair.add_target("t", mode="async", timeout="500 ms")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 40)")
    pair.drain()
    pair.target.sql(
        "CREATE TABLE ref (id integer REFERENCES t); INSERT INTO ref VALUES (2);"
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.02); RETURN OLD; END$$;"
        "CREATE TRIGGER slow BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    shipped = pair.source.one("SELECT rows_shipped FROM tbl_repl.target_status")
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == ["(2)"]
    assert [key for key, *_ in quarantined(pair)] == [{"id": 2}]
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)
    assert pair.source.one("SELECT rows_shipped FROM tbl_repl.target_status") == shipped + 39


@pytest.mark.parametrize(
    "parent, child", [("tolerant", "tolerant"), ("tolerant", "async"), ("async", "tolerant")]
)
@pytest.mark.parametrize("key", ["integer", "numeric"])
def test_a_truncate_of_parents_whose_children_are_ahead(
    pair: Pair, parent: str, child: str, key: str
) -> None:
    """Rows that belong there refer to rows that belong there: neither go for the TRUNCATE that is still queued."""
    pair.source.sql(
        "CREATE TABLE p (id integer PRIMARY KEY, v text); CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p)"
    )
    pair.target.sql(
        f"CREATE TABLE p (id {key} PRIMARY KEY, v text CHECK (v <> 'bad')); CREATE TABLE c (id integer PRIMARY KEY, p {key} REFERENCES p);"
        # what the target's own triggers look up by their search_path
        "CREATE TABLE seen (id integer); CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN INSERT INTO seen VALUES (1); RETURN NULL; END $$;"
        " CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON p FOR EACH ROW EXECUTE FUNCTION see()"
    )
    targets = [pair.add_target("p", mode=parent), pair.add_target("c", mode=child)]
    pair.source.sql("INSERT INTO p VALUES (1, 'a'), (2, 'b')")
    pair.drain()
    pair.source.sql("INSERT INTO p VALUES (3, 'bad')")
    pair.source.sql("TRUNCATE p CASCADE")
    pair.source.sql("INSERT INTO p VALUES (1, 'new')")
    pair.source.sql("INSERT INTO c VALUES (10, 1)")
    pair.drain()
    pair.assert_same("p")
    pair.assert_same("c")
    assert [pair.status(target) for target in targets] == ["ok", "ok"]
    assert quarantined(pair) == []


def test_an_expression_may_read_a_table_with_policies(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, name text)")
    pair.source.admin(
        "CREATE TABLE tenant (id integer, name text, owner text); GRANT SELECT ON tenant TO owner"
    )
    pair.source.admin(
        "ALTER TABLE tenant ENABLE ROW LEVEL SECURITY; INSERT INTO tenant VALUES (1, 'x', 'owner'), (1, 'y', 'z')"
    )
    pair.source.admin("CREATE POLICY p ON tenant USING (owner = current_user)")
    pair.source.sql(
        "CREATE FUNCTION nm(i integer) RETURNS text LANGUAGE sql STABLE RETURN (SELECT name FROM tenant WHERE id = i)"
    )
    pair.add_target("t", mode="sync", column_map={"name": "nm(id)"})
    pair.source.sql("INSERT INTO t VALUES (1, '-')")
    assert pair.target.rows("t") == ["(1,x)"]


def test_a_target_is_dropped_beside_a_drainer(pair: Pair) -> None:
    """What the drainer may still want to lock is not locked while it is waited for."""
    target_id = async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    with transaction(pair.source) as drainer, pair.source.connect() as other:
        drainer.execute("SELECT tbl_repl.replay()")
        dropping = start(other, f"SELECT tbl_repl.drop_target({target_id})")
        wait_until(
            lambda: pair.source.admin(
                f"SELECT 1 FROM pg_locks WHERE pid = {other.info.backend_pid} AND NOT granted"
            )
        )
        drainer.execute("SELECT tbl_repl._log_error(%s, NULL, '23505', 'x', NULL, NULL, NULL)", [target_id])
        drainer.execute("COMMIT")
        dropping.result(10)
        drainer.execute("BEGIN")
    assert pair.source.sql("SELECT * FROM tbl_repl.target_status") == []


@pytest.mark.once
def test_nobody_waits_for_a_drop_that_waits_for_a_drainer(pair: Pair) -> None:
    """Nor for long for one that waits for a writer; how long it waits is a matter of lock_timeout."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", mode="async", timeout="1 s")
    dropping = f"SELECT tbl_repl.drop_target({target_id})"
    with pair.source.connect() as drainer, pair.source.connect() as other, pair.source.connect() as writer:
        drainer.execute("SELECT pg_advisory_lock(tbl_repl._lock_ship(), %s)", [target_id])
        other.execute("SET lock_timeout = 300")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute(dropping)
        other.execute("SET lock_timeout = 0")
        dropped = start(other, dropping)
        waits_for_a_lock(pair.source, "SELECT tbl_repl.drop_target%")
        writer.execute("SET lock_timeout = 100; BEGIN; INSERT INTO t VALUES (1, 'x')")
        drainer.execute("SELECT pg_advisory_unlock(tbl_repl._lock_ship(), %s)", [target_id])
        # now it waits for the writer
        waits_for_a_lock(pair.source, "SELECT tbl_repl.drop_target%")
        with within(1):
            pair.source.sql("INSERT INTO t VALUES (2, 'x')")
            drainer.execute("SELECT pg_advisory_lock(tbl_repl._lock_ship(), %s)", [target_id])
        drainer.execute("SELECT pg_advisory_unlock(tbl_repl._lock_ship(), %s)", [target_id])
        assert not dropped.done()
        writer.execute("COMMIT")
        dropped.result(10)
    assert pair.source.one("SELECT count(*) FROM tbl_repl.target") == 0


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_rows_that_a_policy_hides_are_not_taken_for_deleted(pair: Pair, mode: str) -> None:
    """FORCE ROW LEVEL SECURITY comes later, so add_target has not refused it."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    pair.drain()
    pair.source.sql("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    pair.source.sql("UPDATE t SET v = 'y'")
    pair.drain()  # the owner sees everything
    pair.assert_same("t")
    pair.source.sql("CREATE POLICY p ON t USING (id = 1)")
    pair.source.sql("ALTER TABLE t FORCE ROW LEVEL SECURITY")
    pair.source.admin("UPDATE t SET v = 'z'")
    pair.source.admin("UPDATE t SET v = 'zz' WHERE id = 2")
    pair.drain()
    assert pair.target.rows("t") == ["(1,y)", "(2,y)"]
    assert "row-level security" in pair.source.one("SELECT last_error FROM tbl_repl.target_status")
    pair.source.sql("ALTER TABLE t NO FORCE ROW LEVEL SECURITY")
    pair.drain()
    pair.assert_same("t")


def test_a_rejected_row_heals_when_it_is_mended_at_the_source(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'poison')")
    pair.drain()
    assert len(quarantined(pair)) == 1
    pair.source.sql("UPDATE t SET v = 'mended' WHERE id = 2")
    pair.drain()
    assert quarantined(pair) == []
    pair.assert_same("t")


def test_a_rejected_row_heals_when_it_is_deleted_at_the_source(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'poison')")
    pair.drain()
    pair.source.sql("DELETE FROM t WHERE id = 2")
    pair.drain()
    assert quarantined(pair) == []
    pair.assert_same("t")


def test_a_rejected_row_heals_by_replay_when_the_target_is_mended(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT c CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'poison')")
    pair.drain()
    pair.target.sql("ALTER TABLE t DROP CONSTRAINT c")
    assert replay(pair) == 1
    assert quarantined(pair) == []
    pair.assert_same("t")
    assert replay(pair) == 0


def test_a_tolerant_target_returns_to_ok_with_a_row_in_quarantine(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    pair.source.sql("INSERT INTO t VALUES (2, 'poison')")
    assert pair.status(target_id) == "queueing"
    pair.drain()
    assert pair.status(target_id) == "ok"
    assert quarantined(pair)[0][:2] == ({"id": 2}, "23514")
    pair.source.sql("UPDATE t SET v = 'fine' WHERE id = 2")
    pair.assert_same("t")
    pair.drain()
    assert quarantined(pair) == []


@pytest.mark.parametrize("where", ["filter", "map"])
def test_an_expression_that_fails_on_a_row_hurts_only_that_row(pair: Pair, where: str) -> None:
    options: dict[str, Any] = {
        "filter": {"row_filter": "10 / n > 0"},
        "map": {"column_map": {"n": "10 / n"}},
    }[where]
    async_table(pair, "id integer PRIMARY KEY, n integer", **options)
    pair.source.sql("INSERT INTO t VALUES (1, 5), (2, 0), (3, 2)")
    pair.drain()
    assert [row[0] for row in pair.target.sql("SELECT id FROM t ORDER BY id")] == [1, 3]
    assert quarantined(pair)[0][:2] == ({"id": 2}, "22012")
    pair.source.sql("UPDATE t SET n = 1 WHERE id = 2") if where == "map" else pair.source.sql(
        "DELETE FROM t WHERE id = 2"
    )
    pair.drain()
    assert quarantined(pair) == []


def test_a_background_copy_gets_past_a_row_on_which_the_filter_fails(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    pair.source.sql("INSERT INTO t SELECT g, g - 150 FROM generate_series(1, 300) g")
    target_id = pair.add_target("t", row_filter="10 / n < 100", initial_copy="background")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 100)")
    pair.assert_same("t", where="n <> 0")
    assert quarantined(pair)[0][:2] == ({"id": 150}, "22012")
    assert pair.status(target_id) == "ok"


def test_a_table_that_is_gone_fails_its_target_until_it_is_back(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY, v text)"
    )
    gone = pair.add_target("t", mode="async")
    well = pair.add_target("u", mode="async")
    pair.target.sql("DROP TABLE t")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 50) g")
    pair.source.sql("INSERT INTO u SELECT g, 'x' FROM generate_series(1, 50) g")
    pair.drain()
    pair.assert_same("u")
    assert (pair.status(gone), pair.status(well)) == ("failed", "ok")
    assert pair.pending(gone) == 50
    assert pair.source.one(
        "SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [gone]
    ).startswith("42P01")
    assert quarantined(pair) == []
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.drain()
    pair.assert_same("t")
    assert (pair.status(gone), pair.pending(gone)) == ("ok", 0)


def test_the_backlog_of_a_failed_target_does_not_hold_up_its_neighbours(pair: Pair) -> None:
    """Both tables go to one server; the failed one has more queued than a batch takes."""
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY, v text)"
    )
    gone = pair.add_target("t", mode="async")
    pair.add_target("u", mode="async")
    pair.target.sql("DROP TABLE t")
    for i in range(30):
        pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
    pair.source.sql("INSERT INTO u VALUES (1, 'x')")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 10)")
    pair.assert_same("u")
    assert (pair.status(gone), pair.pending(gone)) == ("failed", 30)


def test_truncate_of_a_table_that_is_gone_fails_the_target(pair: Pair) -> None:
    target_id = async_table(pair)
    pair.target.sql("DROP TABLE t")
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.status(target_id) == "failed"
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.drain()
    assert pair.status(target_id) == "ok"


def test_a_row_that_every_key_shares_the_fault_of_is_still_found(pair: Pair) -> None:
    """A batch of one row with a fault that is the row's own does not fail the target."""
    target_id = async_table(pair, "id integer PRIMARY KEY, v text")
    pair.target.sql("ALTER TABLE t ALTER v TYPE integer USING v::integer")
    pair.source.sql("INSERT INTO t VALUES (1, 'not a number')")
    pair.drain()
    assert quarantined(pair)[0][:2] == ({"id": 1}, "22P02")
    assert pair.status(target_id) == "ok"


def test_operations_that_leave_nothing_to_ship_are_passed(pair: Pair) -> None:
    target_id = async_table(pair, operations=["insert", "update"])
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    pair.drain()
    pair.source.sql("DELETE FROM t")
    pair.drain()
    assert pair.pending(target_id) == 0
    assert pair.target.rows("t") == ["(1,x)"]


# --- linked tables, wandering values

LINKED = (
    "CREATE TABLE parent (id integer PRIMARY KEY, v text);"
    "CREATE TABLE child (id integer PRIMARY KEY, parent_id integer NOT NULL REFERENCES parent, v text);"
    "CREATE TABLE grandchild (id integer PRIMARY KEY, child_id integer NOT NULL REFERENCES child)"
)


@pytest.fixture
def family(pair: Pair) -> Pair:
    """Three linked tables, defined from the wrong end, replicated async, with a few rows."""
    pair.both(LINKED)
    for table in ("grandchild", "child", "parent"):
        pair.add_target(table, mode="async")
    pair.source.sql(
        "INSERT INTO parent SELECT g, 'x' FROM generate_series(1, 10) g;"
        "INSERT INTO child SELECT g, 1 + g % 10, 'x' FROM generate_series(1, 50) g;"
        "INSERT INTO grandchild SELECT g, 1 + g % 50 FROM generate_series(1, 100) g"
    )
    pair.drain()
    return pair


def same_family(pair: Pair) -> None:
    for table in ("parent", "child", "grandchild"):
        pair.assert_same(table)
    assert pair.source.sql("SELECT sqlstate, message FROM tbl_repl.error_log") == []


def test_linked_tables_are_filled_parents_first(family: Pair) -> None:
    same_family(family)
    assert "violates foreign key" not in family.target.log()


def test_linked_rows_are_deleted_children_first(family: Pair) -> None:
    family.source.sql(
        "DELETE FROM grandchild; DELETE FROM child WHERE id > 5; DELETE FROM parent WHERE id > 7"
    )
    family.drain()
    same_family(family)
    assert "violates foreign key" not in family.target.log()


def test_children_move_to_a_new_parent_and_the_old_one_goes(family: Pair) -> None:
    family.source.sql(
        "INSERT INTO parent VALUES (100, 'new'); UPDATE child SET parent_id = 100 WHERE parent_id = 1;"
        "DELETE FROM parent WHERE id = 1"
    )
    family.drain()
    same_family(family)


def test_children_of_a_poisoned_batch_still_find_their_parents(family: Pair) -> None:
    """By halves, too: what failed for the sake of another row is tried again."""
    family.target.sql("ALTER TABLE parent ADD CHECK (v <> 'poison')")
    family.source.sql(
        "INSERT INTO parent VALUES (50, 'poison'), (51, 'x'); INSERT INTO child VALUES (500, 50, 'x'), (501, 51, 'x');"
        "INSERT INTO grandchild VALUES (5000, 500), (5001, 501);"
        "DELETE FROM grandchild WHERE child_id = 3; DELETE FROM child WHERE id = 3"
    )
    family.drain()
    family.assert_same("parent", where="id <> 50")
    family.assert_same("child", where="id <> 500")
    family.assert_same("grandchild", where="id <> 5000")
    assert len(quarantined(family)) == 3
    family.source.sql("UPDATE parent SET v = 'mended' WHERE id = 50")
    family.drain()
    for table in ("parent", "child", "grandchild"):
        family.assert_same(table)
    assert quarantined(family) == []


@pytest.mark.parametrize(
    "command", ["TRUNCATE parent, child, grandchild", "TRUNCATE parent CASCADE", "TRUNCATE grandchild"]
)
def test_linked_tables_are_truncated_together(family: Pair, command: str) -> None:
    family.source.sql(command)
    family.source.sql(
        "INSERT INTO parent VALUES (200, 'after'); INSERT INTO child VALUES (200, 200, 'after')"
    )
    family.drain()
    same_family(family)


def test_a_truncate_finds_references_that_only_the_target_has(pair: Pair) -> None:
    """TRUNCATE is refused there, deleting is not."""
    target_id = async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    pair.drain()
    pair.target.sql("CREATE TABLE more (t_id integer REFERENCES t)")
    pair.source.sql("TRUNCATE t")
    pair.source.sql("INSERT INTO t VALUES (3, 'z')")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_an_insert_is_not_lost_to_a_truncate_that_was_queued_before(pair: Pair) -> None:
    """TRUNCATE and insert in two batches, and in one."""
    async_table(pair)
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1500) g")
    pair.drain()
    pair.source.sql("TRUNCATE t")
    pair.source.sql("INSERT INTO t SELECT g, 'y' FROM generate_series(1000, 2500) g")
    assert replay(pair, max_rows=1) == 1
    pair.assert_same("t")
    pair.drain()
    pair.assert_same("t")


def test_truncate_of_a_filtered_source_deletes_only_what_came_from_it(pair: Pair) -> None:
    async_table(pair, row_filter="id < 100")
    pair.target.sql("INSERT INTO t VALUES (500, 'theirs')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (200, 'not sent')")
    pair.drain()
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == ["(500,theirs)"]


def test_truncate_of_one_of_two_sources_leaves_the_rows_of_the_other(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY, v text)"
    )
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'of t')")
    pair.drain()
    pair.add_target("u", dst_table="t", mode="async")
    pair.source.sql("INSERT INTO u VALUES (2, 'of u')")
    pair.drain()
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == ['(2,"of u")']
    pair.source.sql("TRUNCATE u")
    pair.drain()
    assert pair.target.rows("t") == []


@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("change", ["filter", "second source", "moved there"])
def test_a_queued_truncate_is_not_lost_to_a_filter_or_a_second_source(
    pair: Pair, mode: str, change: str
) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("CREATE TABLE b (id integer PRIMARY KEY, v text); INSERT INTO b VALUES (100, 'b')")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 5) g")
    target_id = pair.add_target("t", mode=mode)
    pair.target.sql("CREATE TABLE elsewhere (id integer PRIMARY KEY, v text)")
    if change == "moved there":
        other = pair.add_target("b", dst_table="elsewhere", mode="async")
    pair.drain()
    pair.call("pause_target", target_id=target_id)
    pair.source.sql("TRUNCATE t; INSERT INTO t VALUES (7, 'x')")

    def alter() -> None:
        if change == "filter":
            pair.call("alter_target", target_id=target_id, row_filter="id < 50")
        elif change == "second source":
            pair.add_target("b", dst_table="t", mode="async", initial_copy="background")
        else:
            pair.call("alter_target", target_id=other, dst_table="t")
            pair.call("resync_target", target_id=other)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
        alter()
    assert "drain" in str(caught.value.diag.message_hint)
    pair.call("resume_target", target_id=target_id)
    pair.drain()
    alter()
    pair.source.sql("INSERT INTO t VALUES (8, 'x')")
    pair.drain()
    pair.source.sql("TRUNCATE t")  # from now on with its keys
    alter_again = {"filter": "id < 60"}.get(change)
    if alter_again:
        pair.call("alter_target", target_id=target_id, row_filter=alter_again)
    pair.drain()
    assert pair.target.rows("t") == ([] if change == "filter" else ["(100,b)"])


def test_a_truncate_of_the_same_transaction_is_not_lost_to_a_filter(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    target_id = pair.add_target("t")
    pair.source.sql("INSERT INTO t VALUES (1)")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState), transaction(pair.source) as conn:
        conn.execute("TRUNCATE t")
        conn.execute("SELECT tbl_repl.alter_target(%s, row_filter => 'id < 50')", [target_id])
    pair.assert_same("t")


def test_truncate_of_a_leaf_leaves_the_other_partitions(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);"
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (100) TO (200)"
    )
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(50, 150) g")
    pair.drain()
    pair.source.sql("TRUNCATE t1")
    pair.drain()
    pair.assert_same("t")
    assert pair.target.one("SELECT count(*) FROM t") == 51
    pair.source.sql("TRUNCATE t")
    pair.source.sql("INSERT INTO t VALUES (1, 'after')")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.once
def test_a_tree_in_one_table_is_filled_and_cleared(pair: Pair) -> None:
    """More rows than one message takes, parents with greater keys than their children."""
    async_table(pair, "id integer PRIMARY KEY, up integer REFERENCES t")
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE WHEN g < 1500 THEN g + 1 END FROM generate_series(1500, 1, -1) g"
    )
    pair.drain()
    pair.assert_same("t")
    pair.source.sql("DELETE FROM t WHERE id < 1200")
    pair.source.sql("UPDATE t SET up = 1500 WHERE id < 1499; DELETE FROM t WHERE id = 1499")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


def test_tables_that_refer_to_each_other_need_deferrable_constraints(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE a (id integer PRIMARY KEY, b_id integer NOT NULL);"
        "CREATE TABLE b (id integer PRIMARY KEY, a_id integer NOT NULL REFERENCES a DEFERRABLE INITIALLY DEFERRED);"
        "ALTER TABLE a ADD FOREIGN KEY (b_id) REFERENCES b DEFERRABLE"
    )
    pair.add_target("a", mode="async")
    pair.add_target("b", mode="async")
    pair.source.sql(
        "BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO a SELECT g, g FROM generate_series(1, 20) g;"
        "INSERT INTO b SELECT g, g FROM generate_series(1, 20) g; COMMIT"
    )
    pair.drain()
    pair.source.sql(
        "BEGIN; SET CONSTRAINTS ALL DEFERRED; DELETE FROM a WHERE id < 5; DELETE FROM b WHERE id < 5; COMMIT"
    )
    pair.drain()
    pair.assert_same("a")
    pair.assert_same("b")
    assert pair.source.one("SELECT count(*) FROM tbl_repl.error_log") == 0


@pytest.mark.parametrize("referenced", [False, True])
def test_unique_values_swapped_between_rows_arrive(pair: Pair, referenced: bool) -> None:
    target_id = async_table(pair, "id integer PRIMARY KEY, u text NOT NULL UNIQUE, v text")
    if referenced:
        pair.target.sql("CREATE TABLE more (t_id integer PRIMARY KEY REFERENCES t ON DELETE CASCADE)")
    pair.source.sql("INSERT INTO t SELECT g, 'u' || g, 'x' FROM generate_series(1, 20) g")
    pair.drain()
    if referenced:
        pair.target.sql("INSERT INTO more SELECT id FROM t")
        pair.call("alter_target", target_id=target_id)
    with transaction(pair.source) as conn:
        conn.execute("UPDATE t SET u = 'aside' WHERE id = 1")
        conn.execute("UPDATE t SET u = 'u1' WHERE id = 2")
        conn.execute("UPDATE t SET u = 'u2' WHERE id = 1")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []
    if referenced:
        assert pair.target.one("SELECT count(*) FROM more") == 20


def test_a_swap_never_takes_along_children_that_the_definition_does_not_know(pair: Pair) -> None:
    """The foreign key came after the target: the rows wait in quarantine until alter_target has seen it."""
    target_id = async_table(pair, "id integer PRIMARY KEY, u integer NOT NULL UNIQUE, v text")
    pair.source.sql("INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, 20) g")
    pair.drain()
    pair.target.sql(
        "CREATE TABLE more (t_id integer PRIMARY KEY REFERENCES t ON DELETE CASCADE);"
        "INSERT INTO more SELECT id FROM t WHERE id < 20"
    )
    pair.source.sql(
        "UPDATE t SET u = 0 WHERE id = 1; UPDATE t SET u = 1 WHERE id = 2; UPDATE t SET u = 2 WHERE id = 1;"
        "DELETE FROM t WHERE id = 20"
    )
    pair.drain()
    assert pair.target.one("SELECT count(*) FROM more") == 19
    assert [row[:2] for row in quarantined(pair)] == [({"id": 1}, "23505"), ({"id": 2}, "23505")]
    pair.call("alter_target", target_id=target_id)
    pair.drain()
    pair.assert_same("t")
    assert pair.target.one("SELECT count(*) FROM more") == 19


def test_unique_values_that_wander_from_batch_to_batch_arrive(pair: Pair) -> None:
    """Row 1 wants what row 2 gives up only in the next batch."""
    async_table(pair, "id integer PRIMARY KEY, u integer UNIQUE, v text")
    pair.source.sql("INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, 10) g")
    pair.drain()
    pair.source.sql("UPDATE t SET v = 'y' WHERE id = 1")
    pair.source.sql("UPDATE t SET u = 102 WHERE id = 2")
    pair.source.sql("UPDATE t SET u = 2 WHERE id = 1")
    pair.source.sql("UPDATE t SET u = 1 WHERE id = 2")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 1)")
    pair.assert_same("t")
    assert quarantined(pair) == []


def test_keys_that_change_places_arrive(pair: Pair) -> None:
    async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    pair.drain()
    pair.source.sql(
        "UPDATE t SET id = -1 WHERE id = 1; UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET id = 2 WHERE id = -1"
    )
    pair.drain()
    pair.assert_same("t")
    assert pair.target.rows("t") == ["(1,b)", "(2,a)"]


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
