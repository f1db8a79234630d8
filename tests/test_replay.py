"""Replay: batches, several servers, and the order in which a backlog reaches the target."""

from __future__ import annotations

import threading

import psycopg
import pytest

from support import Node, Pair, wait_until
from support.background import start, within
from support.tables import async_table, quarantined, replay, transaction


def notices(conn: psycopg.Connection) -> list[str]:
    """The list into which the messages of that session are written from now on."""
    heard: list[str] = []
    conn.add_notice_handler(lambda d: heard.append(f"{d.severity} {d.sqlstate}: {d.message_primary}"))
    return heard


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


# --- the initial copy


# --- a target that is slow


# --- rows that the target rejects


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
def test_a_server_that_is_down_beside_an_open_drop_holds_up_nobody(trio: Pair) -> None:
    """What went wrong is not noted for a target that is being dropped, or has been."""
    for name in ("a", "b", "c"):
        trio.both(f"CREATE TABLE {name} (id integer PRIMARY KEY)")
    proxy = trio.proxy()
    lost, dropped = (trio.add_target(name, mode="async", timeout="1 s") for name in ("a", "b"))
    trio.add_target("c", trio.third_server, mode="async", timeout="1 s")
    trio.source.sql("INSERT INTO a VALUES (1); INSERT INTO b VALUES (1); INSERT INTO c VALUES (1)")
    proxy.set("refuse")
    proxy.cut()
    with trio.source.connect() as drainer, transaction(trio.source) as dropping:
        dropping.execute("SELECT tbl_repl.drop_target(%s)", [dropped])
        start(drainer, "CALL tbl_repl.drain()").result(10)
        assert trio.third is not None
        assert trio.third.rows("c") == ["(1)"]
    assert trio.source.sql("SELECT DISTINCT target_id FROM tbl_repl.error_log") == [(lost,)]
    trio.source.sql("SELECT tbl_repl._log_error(%s, NULL, '08006', 'x', NULL, NULL, NULL)", [dropped])


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
