"""Receipts: what a target has committed and the source has not is found and healed without anybody asking.

The window between the two commits is held open by a deferred trigger that comes after the flush: it queues
itself anew for more rounds than the flush waits while others write.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import psycopg
import pytest

from support import Node, Pair, Proxy, wait_until
from support.background import start
from support.programs import WorkerProcess

CYCLES = 40 if os.environ.get("TBL_REPL_LONG") else 4
MANY = 1500  # more rows than one message carries
COLUMNS = "id integer PRIMARY KEY, v text, u integer UNIQUE"

# Every way in which a transaction is shipped: one row, few, many, the whole table.
WRITES = {
    "insert": "INSERT INTO t VALUES (50000, 'new', 50000)",
    "update": "UPDATE t SET v = 'new' WHERE id = 1",
    "delete": "DELETE FROM t WHERE id = 2",
    "key change": "UPDATE t SET id = 60000 WHERE id = 3",
    "few rows": "UPDATE t SET v = 'new' WHERE id IN (1, 2, 3); DELETE FROM t WHERE id = 4; INSERT INTO t VALUES (70000, 'new', 7)",
    "unique values swapped": "UPDATE t SET u = NULL WHERE id = 5; UPDATE t SET u = 1000005 WHERE id = 6; UPDATE t SET u = 1000006 WHERE id = 5",
    "many rows": f"INSERT INTO t SELECT g, 'new', -g FROM generate_series(100001, {100000 + MANY}) AS g; DELETE FROM t WHERE id < 100",
    "truncate": "TRUNCATE t; INSERT INTO t VALUES (1, 'new', 1)",
}

LATE = """
CREATE TABLE late (n integer);
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.n < 120 THEN
        INSERT INTO late VALUES (NEW.n + 1);
    ELSIF current_setting('test.late') = 'raise' THEN
        RAISE EXCEPTION USING ERRCODE = 'P0099', MESSAGE = 'too late';
    ELSIF current_setting('test.late') = 'terminate' THEN
        PERFORM pg_terminate_backend(pg_backend_pid());
        PERFORM pg_sleep(60);
    ELSIF current_setting('test.late') = 'wait' THEN
        PERFORM pg_advisory_xact_lock_shared(42);
    ELSE
        EXECUTE current_setting('test.late');
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late();
GRANT INSERT ON late TO PUBLIC
"""


def replicate(pair: Pair, **options: object) -> int:
    """Table t with rows 1 to 10 on every node, a target, and the trigger that comes late; the target_id."""
    pair.both(f"CREATE TABLE t ({COLUMNS})")
    pair.source.sql("INSERT INTO t SELECT g, 'x', 1000000 + g FROM generate_series(1, 10) AS g")
    pair.source.sql(LATE)
    options.setdefault("timeout", "5 s")
    return pair.add_target("t", **options)


def fails_late(conn: psycopg.Connection, write: str, how: str) -> None:
    """A transaction that is shipped and then does not commit."""
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(f"BEGIN; SET LOCAL test.late = '{how}'; {write}; INSERT INTO late VALUES (0); COMMIT")
    assert caught.value.sqlstate in ("P0099", "57P01", None), caught.value
    if not conn.closed:
        conn.execute("ROLLBACK")


def paused(pair: Pair, write: str, user: str | None = None) -> psycopg.Connection:
    """A session that has shipped and has not committed yet; it goes on when advisory lock 42 is free."""
    conn = pair.source.connect(user)
    before = waiting(pair)
    start(conn, f"BEGIN; SET LOCAL test.late = 'wait'; {write}; INSERT INTO late VALUES (0); COMMIT")
    wait_until(lambda: waiting(pair) == before + 1, 10, "the writer has shipped")
    return conn


def waiting(pair: Pair) -> int:
    return int(
        pair.source.admin(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )[0][0]
    )


def hold(pair: Pair) -> psycopg.Connection:
    """Who waits late, waits for this session."""
    conn = pair.source.connect()
    conn.execute("SELECT pg_advisory_lock(42)")
    return conn


def receipts(node: Node) -> int:
    return int(node.one("SELECT count(*) FROM tbl_repl.receipt"))


def in_doubt(pair: Pair, target: int) -> int:
    return int(pair.source.one("SELECT in_doubt FROM tbl_repl.target_status WHERE target_id = %s", [target]))


def differ(pair: Pair, there: Node | None = None) -> bool:
    return pair.source.rows("t") != (there or pair.target).rows("t")


def assert_settled(pair: Pair, *targets: int) -> None:
    """Equal, and nothing left over, here or there."""
    pair.assert_same("t")
    assert receipts(pair.target) == 0
    for target in targets:
        assert (pair.status(target), pair.pending(target), in_doubt(pair, target)) == ("ok", 0, 0)


# --- what it costs


@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_a_session_has_one_receipt_whatever_it_writes(pair: Pair, mode: str) -> None:
    target = replicate(pair, mode=mode)
    for n in range(10):
        pair.source.sql(f"INSERT INTO t VALUES ({n + 100}, 'y')")
        pair.source.sql("UPDATE t SET v = 'z' WHERE id IN (1, 2)")
        if n % 3 == 0:
            pair.source.sql(
                f"INSERT INTO t SELECT g, 'many' FROM generate_series({n + 1}0001, {n + 1}0000 + {MANY}) AS g"
            )
            assert receipts(pair.target) > 1
    pair.source.sql("UPDATE t SET v = 'z' WHERE id = 1")
    assert receipts(pair.target) == 1
    pair.source.sql(
        "SET test.late = 'UPDATE t SET v = ''once more'' WHERE id = 2'; INSERT INTO late VALUES (0)"
    )
    pair.source.sql(
        "UPDATE t SET v = 'z' WHERE id = 1; SET test.late = 'UPDATE t SET v = ''again'' WHERE id = 2'; INSERT INTO late VALUES (0)"
    )
    assert receipts(pair.target) == 2
    pair.source.sql("UPDATE t SET v = 'z' WHERE id = 1")
    assert receipts(pair.target) == 1
    pair.drain()
    assert_settled(pair, target)
    assert pair.source.sql("SELECT * FROM tbl_repl.error_log") == []


def test_a_receipt_names_what_was_shipped(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.source.sql("UPDATE t SET id = 11 WHERE id = 1; DELETE FROM t WHERE id = 2")
    (row,) = pair.target.sql("SELECT node, target_id, boot, xid::text::bigint, keys FROM tbl_repl.receipt")
    node, target_id, boot, xid, keys = row
    assert (node, target_id, boot) == (
        pair.source.one("SELECT tbl_repl.node_name()"),
        target,
        pair.source.one("SELECT id FROM tbl_repl.boot"),
    )
    assert pair.source.one("SELECT pg_xact_status(%s::text::xid8)", [xid]) == "committed"
    assert sorted(keys) == ["1", "11", "2"]


@pytest.mark.plain_target
def test_a_target_without_the_extension_gets_none(pair: Pair) -> None:
    replicate(pair, mode="sync")
    fails_late(pair.source.connect(), WRITES["update"], "raise")
    assert differ(pair)
    pair.drain()
    # as documented: only comparing finds it
    assert differ(pair)
    assert pair.call("repair_target", target_id=1) == 1
    pair.drain()
    pair.assert_same("t")


# --- the local transaction fails, or its session dies, between the two commits


@pytest.mark.once
@pytest.mark.parametrize("how", ["raise", "terminate"])
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_what_does_not_commit_here_is_taken_back_there(pair: Pair, mode: str, how: str) -> None:
    target = replicate(pair, mode=mode)
    conn = pair.source.connect()
    for _ in range(CYCLES):
        for name, write in WRITES.items():
            if conn.closed:
                conn = pair.source.connect()
            fails_late(conn, write, how)
            assert differ(pair), name
            assert in_doubt(pair, target) == 0
            assert pair.source.one("SELECT tbl_repl.replay()") > 0, name
            pair.assert_same("t")
            assert in_doubt(pair, target) > 0
            pair.drain()
            assert_settled(pair, target)
    logged = pair.source.sql("SELECT DISTINCT sqlstate FROM tbl_repl.error_log")
    assert logged == [("40003",)]


@pytest.mark.parametrize("table", ["partitioned", "filtered", "some operations"])
def test_whatever_the_target_takes(pair: Pair, table: str) -> None:
    options: dict[str, object] = {}
    if table == "partitioned":
        pair.both("""
            CREATE TABLE t (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);
            CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100); CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (100) TO (1000000)
            """)
    else:
        pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
        options = (
            {"row_filter": "id > 0"}
            if table == "filtered"
            else {"operations": ["insert", "update", "truncate"]}
        )
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) AS g")
    pair.source.sql(LATE)
    target = pair.add_target("t", mode="sync", **options)
    conn = pair.source.connect()
    for write in (
        "INSERT INTO t VALUES (500, 'new')",
        "UPDATE t SET id = id + 1000 WHERE id < 4",
        f"INSERT INTO t SELECT g, 'new' FROM generate_series(100001, {100000 + MANY}) AS g",
        "TRUNCATE t",
    ):
        fails_late(conn, write, "raise")
        assert differ(pair)
        pair.drain()
        assert_settled(pair, target)


def test_sessions_that_fail_do_not_disturb_those_that_do_not(pair: Pair) -> None:
    """Each writes rows of its own, one in three transactions fails; the worker heals meanwhile."""
    target = replicate(pair, mode="sync")
    conns = [pair.source.connect() for _ in range(4)]
    failures = []

    def write(number: int) -> None:
        conn = conns[number]
        try:
            for n in range(30 * CYCLES // 4):
                write = f"INSERT INTO t VALUES ({(number + 1) * 1000 + n % 7}, '{n}') ON CONFLICT (id) DO UPDATE SET v = excluded.v"
                if n % 3 == 0:
                    fails_late(conn, write, "raise")
                else:
                    conn.execute(write)
        except Exception as error:
            failures.append(error)

    with WorkerProcess(pair.source):
        threads = [threading.Thread(target=write, args=(n,)) for n in range(len(conns))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert failures == []
        wait_until(
            lambda: not differ(pair) and receipts(pair.target) == 0, 30, "the worker has healed the target"
        )
    pair.drain()
    assert_settled(pair, target)


def test_several_targets_of_a_transaction(trio: Pair) -> None:
    assert trio.third
    first = replicate(trio, mode="sync")
    second = trio.add_target("t", trio.third_server, mode="sync")
    for write in WRITES.values():
        fails_late(trio.source.connect(), write, "raise")
        assert differ(trio)
        assert differ(trio, trio.third)
        trio.drain()
        assert_settled(trio, first, second)
        trio.assert_same("t", there=trio.third)
        assert receipts(trio.third) == 0


def test_several_tables_over_one_connection(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.both("CREATE TABLE o (a integer, b text, PRIMARY KEY (a, b))")
    other = pair.add_target("o", mode="sync")
    for n in range(CYCLES * 5):
        fails_late(
            pair.source.connect(),
            f"{WRITES['few rows']}; INSERT INTO o VALUES ({n}, '\"\\'), ({n}, 'b, c')",
            "raise",
        )
        assert len(pair.target.rows("o")) == 2
        pair.drain()
        assert_settled(pair, target, other)
        pair.assert_same("o")


def test_one_in_flight_is_left_alone(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    holder = hold(pair)
    writer = paused(pair, WRITES["update"])
    for _ in range(3):
        assert pair.source.one("SELECT tbl_repl.replay()") == 0
        assert (receipts(pair.target), in_doubt(pair, target)) == (1, 0)
    holder.execute("SELECT pg_advisory_unlock_all()")
    wait_until(lambda: writer.info.transaction_status == psycopg.pq.TransactionStatus.IDLE)
    pair.assert_same("t")
    pair.drain()
    assert_settled(pair, target)
    assert pair.source.sql("SELECT * FROM tbl_repl.error_log") == []


# --- the one who heals fails too


@pytest.mark.parametrize("connections", [1, 2])
def test_a_receipt_stays_until_its_keys_are_safely_queued(pair: Pair, connections: int) -> None:
    """Over whatever connection it is seen: another timeout, another connection."""
    targets = [replicate(pair, mode="sync")]
    if connections == 2:
        pair.both("CREATE TABLE o (id integer PRIMARY KEY)")
        targets.append(pair.add_target("o", mode="sync", timeout="4 s"))
    fails_late(pair.source.connect(), WRITES["few rows"], "raise")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    assert conn.execute("SELECT tbl_repl.replay()").fetchone() == (5,)
    conn.execute("ROLLBACK")
    assert receipts(pair.target) == 1
    # undo what it has shipped, as if it had not come so far
    pair.target.sql("UPDATE t SET v = 'new' WHERE id IN (1, 2, 3)")
    assert in_doubt(pair, targets[0]) == 0
    pair.drain()
    assert_settled(pair, *targets)


def test_receipts_are_found_over_a_connection_that_has_died(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    drainer = pair.source.connect()
    drainer.execute("CALL tbl_repl.drain()")
    fails_late(pair.source.connect(), WRITES["few rows"], "raise")
    ended = pair.target.admin(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl %'"
    )
    assert (True,) in ended
    drainer.execute("CALL tbl_repl.drain()")
    assert not differ(pair)
    pair.drain()
    assert_settled(pair, target)


def test_the_healer_is_killed_again_and_again(pair: Pair) -> None:
    """Wherever it is, the next one finds everything."""
    target = replicate(pair, mode="sync")
    for n in range(CYCLES * 5):
        fails_late(pair.source.connect(), list(WRITES.values())[n % len(WRITES)], "raise")
        conn = pair.source.connect()
        drainer = start(conn, "CALL tbl_repl.drain()")
        # a little later each time
        pair.source.admin(
            "SELECT pg_sleep(%s), pg_terminate_backend(%s)", [n * 0.0007, conn.info.backend_pid]
        )
        with contextlib.suppress(psycopg.Error):
            drainer.result(20)
        pair.drain()
        assert_settled(pair, target)


# --- crashes


@pytest.mark.parametrize("how", ["immediate", "kill", "one backend"])
def test_the_source_crashes_between_the_two_commits(pair: Pair, how: str) -> None:
    target = replicate(pair, mode="sync")
    pair.source.sql("UPDATE t SET v = 'committed' WHERE id = 10")
    hold(pair)
    writers = [paused(pair, f"UPDATE t SET v = 'lost' WHERE id = {n}") for n in (1, 2, 3)]
    writers.append(
        paused(pair, f"INSERT INTO t SELECT g, 'lost' FROM generate_series(100, {100 + MANY}) AS g")
    )
    assert len(pair.target.rows("t", where="v = 'lost'")) == 3 + MANY + 1
    if how == "immediate":
        pair.source.stop("immediate")
    elif how == "kill":
        pair.source.kill()
    else:
        os.kill(writers[0].info.backend_pid, signal.SIGKILL)
        wait_until(lambda: writers[3].broken or ended(writers[3]), 10, "the server restarts")
    if how != "one backend":
        pair.source.start()
    pair.source.forget()
    wait_until(lambda: accepts(pair.source), 30, "it is back")
    assert differ(pair)
    pair.drain()
    assert_settled(pair, target)


def ended(conn: psycopg.Connection) -> bool:
    try:
        conn.execute("SELECT 1")
    except psycopg.Error:
        return conn.closed
    return False


def accepts(node: Node) -> bool:
    try:
        node.fresh("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def test_a_transaction_id_that_was_given_out_twice_deceives_nobody(pair: Pair) -> None:
    """What a crash has lost gives its id to another transaction, which commits."""
    target = replicate(pair, mode="sync")
    pair.source.admin("ALTER SYSTEM SET wal_writer_delay = '10 s'")
    pair.source.admin("SELECT pg_reload_conf()")
    pair.source.admin("CHECKPOINT")
    hold(pair)
    paused(pair, WRITES["update"])
    lost = pair.target.one("SELECT max(xid::text::bigint) FROM tbl_repl.receipt")
    pair.source.kill()
    pair.source.start()
    for _ in range(50):
        if pair.source.one("SELECT pg_current_xact_id()::text::bigint") >= lost:
            break
    assert pair.source.one("SELECT pg_xact_status(%s::text::xid8)", [lost]) == "committed"
    assert differ(pair)
    pair.drain()
    assert_settled(pair, target)


def test_a_message_in_flight_when_the_source_crashes(pair: Pair) -> None:
    target = replicate(pair, mode="sync", timeout="20 s")
    for _ in range(CYCLES // 2):
        blocker = pair.target.connect()
        blocker.execute("BEGIN; SELECT FROM t WHERE id = 1 FOR UPDATE")
        start(pair.source.connect(), "UPDATE t SET v = 'in flight' WHERE id = 1")
        wait_until(lambda: blocked(pair.target), 10, "the message waits for the row")
        pair.source.kill()
        blocker.execute("ROLLBACK")
        wait_until(lambda: pair.target.rows("t", where="v = 'in flight'"), 10, "it has taken effect")
        pair.source.start()
        assert differ(pair)
        pair.drain()
        assert_settled(pair, target)


def blocked(node: Node) -> bool:
    return bool(
        node.admin(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name LIKE 'tbl_repl%' AND wait_event_type = 'Lock'"
        )
    )


def test_an_answer_that_was_lost(pair: Pair, proxy: Proxy) -> None:
    target = replicate(pair, mode="sync", timeout="1 s")
    for _ in range(CYCLES // 2):
        blocker = pair.target.connect()
        blocker.execute("BEGIN; SELECT FROM t WHERE id = 1 FOR UPDATE")
        writer = start(pair.source.connect(), "UPDATE t SET v = 'unheard' WHERE id = 1")
        wait_until(lambda: blocked(pair.target), 10, "the message waits for the row")
        proxy.set("refuse")
        proxy.cut()
        blocker.execute("ROLLBACK")
        with pytest.raises(psycopg.Error) as caught:
            writer.result(20)
        assert caught.value.sqlstate is not None
        assert caught.value.sqlstate.startswith("08")
        assert pair.target.rows("t", where="v = 'unheard'")
        assert not pair.source.rows("t", where="v = 'unheard'")
        assert pair.source.one("SELECT tbl_repl.replay()") == 0  # out of reach: and nobody is told off
        proxy.set("pass")
        pair.drain()
        assert_settled(pair, target)


# --- rights, and targets that come and go


def by_replicator(pair: Pair, **options: object) -> int:
    """Ship as a role that owns nothing on the target."""
    pair.source.sql(f"ALTER USER MAPPING FOR owner SERVER {pair.server} OPTIONS (SET user 'replicator')")
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.target.sql("GRANT ALL ON t TO replicator")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) AS g")
    pair.source.sql(LATE)
    return pair.add_target("t", mode="sync", **options)


def told(pair: Pair) -> dict[str, str]:
    return {
        code: hint
        for _, _, code, _, hint in pair.source.sql("SELECT * FROM tbl_repl.check()")
        if code != "dblink_public"
    }


def test_a_role_without_the_right_ships_all_the_same_and_check_says_how_to_mend_it(pair: Pair) -> None:
    target = by_replicator(pair)
    pair.source.sql("UPDATE t SET v = 'y' WHERE id = 1")
    pair.assert_same("t")
    assert receipts(pair.target) == 0
    hint = told(pair).pop("receipts_not_allowed")
    there, here = [part[part.index("SELECT") :] for part in hint.rstrip(";").split(";")]
    pair.target.sql(there)
    assert "receipts_not_used" in told(pair)
    pair.source.sql(here)
    assert told(pair) == {}
    fails_late(pair.source.connect(), "UPDATE t SET v = 'new' WHERE id = 1", "raise")
    assert receipts(pair.target) == 1
    pair.drain()
    assert_settled(pair, target)


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 2, MANY])
@pytest.mark.parametrize("gone", ["right", "extension"])
def test_a_right_that_is_taken_away_fails_nobody(pair: Pair, gone: str, rows: int) -> None:
    pair.target.sql("SELECT tbl_repl.grant_access('replicator', 'operator')")
    by_replicator(pair)
    pair.source.sql("UPDATE t SET v = 'y' WHERE id = 1")
    assert receipts(pair.target) == 1
    if gone == "extension":
        pair.target.sql("DROP EXTENSION tbl_repl CASCADE")
    else:
        pair.target.sql("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tbl_repl FROM replicator")
    for n in range(2):
        pair.source.sql(
            f"INSERT INTO t SELECT g, 'z' FROM generate_series({n + 1}0001, {n + 1}0000 + {rows}) AS g"
        )
        pair.assert_same("t")
    pair.drain()
    pair.assert_same("t")
    assert pair.source.sql("SELECT * FROM tbl_repl.error_log") == []


def test_receipts_of_dropped_targets_go(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.both("CREATE TABLE o (id integer PRIMARY KEY)")
    other = pair.add_target("o", mode="sync")
    fails_late(pair.source.connect(), WRITES["update"], "raise")
    pair.call("drop_target", target_id=target)
    assert receipts(pair.target) == 1
    pair.drain()
    assert receipts(pair.target) == 0
    assert (pair.status(other), pair.pending(other)) == ("ok", 0)


@pytest.mark.once
def test_receipts_of_a_target_that_is_being_dropped_wait(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    fails_late(pair.source.connect(), WRITES["update"], "raise")
    with pair.source.connect() as drainer, pair.source.connect() as dropping:
        dropping.execute("BEGIN")
        dropping.execute("SELECT tbl_repl.drop_target(%s)", [target])
        start(drainer, "CALL tbl_repl.drain()").result(10)
        assert in_doubt(pair, target) == 0
        dropping.execute("ROLLBACK")
    pair.drain()
    assert_settled(pair, target)


@pytest.mark.parametrize("status", ["paused", "async"])
def test_a_target_that_is_no_longer_shipped_to_at_commit(pair: Pair, status: str) -> None:
    target = replicate(pair, mode="tolerant")
    fails_late(pair.source.connect(), WRITES["update"], "raise")
    if status == "paused":
        pair.call("pause_target", target_id=target)
        pair.drain()
        assert in_doubt(pair, target) == 1
        assert differ(pair)
        pair.call("resume_target", target_id=target)
    else:
        pair.call("alter_target", target_id=target, mode="async")
    pair.drain()
    assert_settled(pair, target)


@pytest.mark.once
def test_the_worker_heals_a_quiet_target(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    with WorkerProcess(pair.source):
        for name in ("few rows", "many rows"):
            fails_late(pair.source.connect(), WRITES[name], "raise")
            wait_until(
                lambda: not differ(pair) and receipts(pair.target) == 0,
                15,
                "the worker has healed the target",
            )
    pair.drain()
    assert_settled(pair, target)
