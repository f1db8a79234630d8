"""tbl-repl worker, as a process of its own, on real servers."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from support import Node, Pair, Proxy, wait_until
from support.background import in_background, within
from support.programs import WorkerProcess, dsn_of, tbl_repl
from tbl_repl import failpoint
from tbl_repl.drainer import LONGEST_PAUSE_SECONDS, LONGEST_RETRY_SECONDS, pause_after, retry_after

TABLE = "CREATE TABLE t (id integer PRIMARY KEY, v text)"
NEVER = ("--poll-seconds", "3600")  # who does not hear a NOTIFY waits an hour


def count(node: Node, table: str = "t") -> int:
    return int(node.one(f"SELECT count(*) FROM {table}"))


def arrives(node: Node, rows: int, table: str = "t", timeout: float = 15) -> None:
    wait_until(lambda: count(node, table) == rows, timeout, f"{rows} rows in {table}")


def same(pair: Pair, table: str = "t", there: Node | None = None, timeout: float = 30) -> None:
    """Wait until both tables hold the same."""
    node = there or pair.target
    wait_until(lambda: pair.source.rows(table) == node.rows(table), timeout, f"{table} is the same")


def drained(pair: Pair, timeout: float = 15) -> None:
    query = "SELECT coalesce(sum(pending_rows), 0) = 0 FROM tbl_repl.target_status"
    wait_until(lambda: pair.source.one(query), timeout, "nothing is pending")


def state(pair: Pair, target: int) -> dict[str, object]:
    names = ("status", "pending_rows", "last_error", "last_error_at", "next_try_at", "failures")
    (row,) = pair.source.sql(
        "SELECT s.status, s.pending_rows, s.last_error, s.last_error_at, s.next_try_at, st.failures "
        "FROM tbl_repl.target_status AS s JOIN tbl_repl.target_state AS st USING (target_id) WHERE target_id = %s",
        [target],
    )
    return dict(zip(names, row, strict=True))


def asleep(node: Node) -> bool:
    """Whether the worker of this database sleeps: it holds the lock that writers try to share."""
    return bool(
        node.admin(
            "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock'"
            " AND classid = tbl_repl._lock_sleep()::oid"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
    )


def falls_asleep(node: Node) -> None:
    """Long enough that it is not about to wake up: two looks in a row, nothing at work."""
    wait_until(
        lambda: (
            asleep(node)
            and node.one(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name LIKE 'tbl-repl worker%' AND state = 'active'"
            )
            == 0
            and asleep(node)
        ),
        15,
        "the worker sleeps",
    )


def has_settled(node: Node, server: str) -> None:
    """That drainer has looked again after its last batch, and found nothing."""
    query = (
        "SELECT bool_and(state = 'idle' AND clock_timestamp() - state_change > '30 ms') FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = %s"
    )
    wait_until(lambda: node.one(query, [f"tbl-repl worker {server}"]), 15, f"the drainer of {server} is idle")


@contextmanager
def held(node: Node, query: str) -> Iterator[psycopg.Connection]:
    """A session of an application that has a transaction open after this statement."""
    with node.connect() as session:
        session.execute("BEGIN")
        session.execute(query)
        yield session
        if not session.closed:
            session.execute("ROLLBACK")


def waits_for_lock(node: Node) -> None:
    """Our session on the target waits for somebody's lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name LIKE 'tbl_repl%' AND wait_event_type = 'Lock'"
    )
    wait_until(lambda: node.admin(query)[0][0] > 0, 15, "shipping waits for the lock")


@pytest.fixture
def queue(pair: Pair) -> int:
    """An async target of table t; its id."""
    pair.both(TABLE)
    return pair.add_target("t", mode="async", timeout="60 s")


# --- what it serves


def test_every_server_of_every_database_is_drained(trio: Pair) -> None:
    assert trio.third is not None
    trio.both(TABLE)
    trio.both("CREATE TABLE back (id integer PRIMARY KEY)")
    trio.add_target("t", mode="async")
    trio.add_target("t", trio.third_server, mode="async")
    trio.join(trio.target, trio.source, "first")
    trio.call("add_target", node=trio.target, source_table="back", server="first", mode="async")
    with WorkerProcess(trio.source, trio.target):
        trio.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 10) AS i")
        trio.target.sql("INSERT INTO back VALUES (7)")
        arrives(trio.target, 10)
        arrives(trio.third, 10)
        arrives(trio.source, 1, "back")


def test_the_session_for_a_server_without_targets_ends(pair: Pair, queue: int) -> None:
    session = f"tbl-repl worker {pair.server}"
    with WorkerProcess(pair.source, options=("--poll-seconds", "0.1")) as worker:
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        assert pair.source.backends(session)
        pair.call("drop_target", target_id=queue)
        pair.source.sql(f"DROP SERVER {pair.server} CASCADE")
        wait_until(lambda: not pair.source.backends(session))
        pair.join(pair.source, pair.target, pair.server)
        pair.add_target("t", mode="async")
        pair.source.sql("INSERT INTO t VALUES (2, 'x')")
        arrives(pair.target, 2)
        assert pair.source.backends(session)
        assert not worker.events("drainer failed")
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0


@pytest.fixture
def many(pair: Pair) -> list[str]:
    """Six servers, each with a target of the table of its own name."""
    names = [f"s{n}" for n in range(6)]
    for name in names:
        pair.join(pair.source, pair.target, name)
        pair.both(f"CREATE TABLE {name} (id integer PRIMARY KEY)")
        pair.add_target(name, name, mode="async")
    return names


def test_many_servers_share_few_connections(pair: Pair, many: list[str]) -> None:
    """That of the watcher comes on top."""

    def sessions() -> int:
        return len(pair.source.backends("tbl-repl worker%"))

    with WorkerProcess(pair.source, constants={"watcher.CONNECTIONS": 2}) as worker:
        for rows in (1, 2, 3):
            for name in many:
                pair.source.sql(f"INSERT INTO {name} VALUES ({rows})")
            for name in many:
                arrives(pair.target, rows, name)
            wait_until(lambda: sessions() <= 3, 5, "two drainers are connected")
        kept = pair.source.backends("tbl-repl worker s%")
        assert len(kept) == 2, "who is idle stays connected while nobody waits"
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0
        assert not worker.events("drainer failed")


def test_who_always_has_something_to_do_lets_others_have_their_turn(pair: Pair, many: list[str]) -> None:
    others, done = many[1:], threading.Event()

    def load() -> None:
        with pair.source.connect() as session:
            for n in range(1_000_000):
                session.execute("INSERT INTO s0 VALUES (%s)", [n])
                if done.is_set():
                    return

    with WorkerProcess(pair.source, constants={"watcher.CONNECTIONS": 1}):
        writing = in_background(load)
        wait_until(lambda: count(pair.target, "s0") > 100, 15)
        for name in others:
            pair.source.sql(f"INSERT INTO {name} VALUES (1)")
        try:
            for name in others:
                arrives(pair.target, 1, name)
        finally:
            done.set()
            writing.result(20)
        same(pair, "s0")


def test_a_drainer_that_cannot_connect_gives_its_place_away(pair: Pair, many: list[str]) -> None:
    with WorkerProcess(pair.source, constants={"watcher.CONNECTIONS": 1}):
        for rows in (1, 2):
            for name in many:
                pair.source.sql(f"INSERT INTO {name} VALUES ({rows})")
            for name in many:
                arrives(pair.target, rows, name)
            for session in pair.source.backends("tbl-repl worker%"):
                pair.source.admin("SELECT pg_terminate_backend(%s)", [session])


def test_once_has_few_connections_too(pair: Pair, many: list[str]) -> None:
    for name in many:
        pair.source.sql(f"INSERT INTO {name} VALUES (1)")
    pair.source.admin(f"ALTER DATABASE {pair.source.dbname} CONNECTION LIMIT 5")
    pair.source.forget()
    with WorkerProcess(
        pair.source, options=("--once",), constants={"worker.CONNECTIONS": 1}, wait=False
    ) as worker:
        assert worker.ended() == 0, worker.output
    assert [count(pair.target, name) for name in many] == [1] * 6


def test_a_hung_server_delays_no_other(trio: Pair) -> None:
    assert trio.third is not None
    trio.both(TABLE)
    trio.add_target("t", mode="async")
    trio.add_target("t", trio.third_server, mode="async", timeout="600 s")
    with held(trio.third, "LOCK TABLE t"), WorkerProcess(trio.source):
        for i in range(1, 4):
            trio.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
            waits_for_lock(trio.third)
            arrives(trio.target, i)
            has_settled(trio.source, trio.server)
        waits_for_lock(trio.third)


def test_a_dead_server_delays_no_other(trio: Pair) -> None:
    trio.both(TABLE)
    trio.add_target("t", mode="async")
    dead = trio.add_target("t", trio.third_server, mode="async")
    with WorkerProcess(trio.source):
        trio.proxy(trio.third_server, trio.third).set("refuse")
        for i in range(1, 6):
            trio.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
            arrives(trio.target, i)
            has_settled(trio.source, trio.server)
        wait_until(lambda: state(trio, dead)["next_try_at"])
        assert trio.pending(dead) == 5


def test_a_dead_source_delays_no_other(pair: Pair, queue: int) -> None:
    dead = "host=127.0.0.1 port=1 dbname=nowhere"
    with WorkerProcess(pair.source, dsns=(dead,)) as worker:
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        wait_until(lambda: worker.events("source failed"))


def test_a_failed_target_delays_no_neighbour_on_its_server(pair: Pair, queue: int) -> None:
    pair.both("CREATE TABLE bad (id integer PRIMARY KEY)")
    bad = pair.add_target("bad", mode="async")
    pair.target.sql("DROP TABLE bad")
    with WorkerProcess(pair.source):
        pair.source.sql("INSERT INTO bad VALUES (1)")
        wait_until(lambda: pair.status(bad) == "failed" and state(pair, bad)["next_try_at"])
        # as after many failures
        pair.source.sql(
            "UPDATE tbl_repl.target_state SET next_try_at = clock_timestamp() + '25 s' WHERE target_id = %s",
            [bad],
        )
        pair.target.sql("CREATE TABLE bad (id integer PRIMARY KEY)")
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        falls_asleep(pair.source)
        assert (pair.status(bad), count(pair.target, "bad")) == ("failed", 0), "its next try is not due"
        pair.source.sql("CALL tbl_repl.drain()")
        assert (pair.status(bad), count(pair.target, "bad")) == ("ok", 1), "a person need not wait"


def test_a_try_far_ahead_is_due_for_the_clock_was_set_back(pair: Pair, queue: int) -> None:
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    for wait, due in (("25 s", False), ("1 h", True)):
        pair.source.sql(f"UPDATE tbl_repl.target_state SET next_try_at = clock_timestamp() + '{wait}'")
        seconds = pair.source.one("SELECT wait_seconds FROM tbl_repl._servers_to_replay()")
        assert (seconds == 0) is due
    with WorkerProcess(pair.source):
        arrives(pair.target, 1)


def test_targets_whose_connection_was_lost_come_back_together(pair: Pair) -> None:
    """A transaction over both is not torn by the backoff of one of them."""
    pair.both("CREATE TABLE a (id integer PRIMARY KEY); CREATE TABLE b (a integer PRIMARY KEY)")
    pair.target.sql("ALTER TABLE b ADD FOREIGN KEY (a) REFERENCES a")
    first = pair.add_target("a", mode="async")
    pair.add_target("b", mode="async")
    pair.source.sql("INSERT INTO a VALUES (1); INSERT INTO b VALUES (1)")
    pair.source.sql(
        "UPDATE tbl_repl.target_state SET next_try_at = clock_timestamp() + '25 s', failures = 9,"
        " last_error = '08006: gone' WHERE target_id = %s",
        [first],
    )
    with pair.source.connect() as conn:
        assert conn.execute("SELECT tbl_repl._replay(NULL, 10000, false)").fetchone() == (2,)
    for table in "ab":
        pair.assert_same(table)


@pytest.mark.once
def test_a_row_that_ends_the_session_keeps_no_other_table_waiting(pair: Pair) -> None:
    pair.both("CREATE TABLE a (id integer PRIMARY KEY); CREATE TABLE b (id integer PRIMARY KEY)")
    pair.target.sql(
        "CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END$$;"
        "CREATE TRIGGER leave BEFORE INSERT ON b FOR EACH ROW EXECUTE FUNCTION leave()"
    )
    for table in "ab":
        pair.add_target(table, mode="async")
    with WorkerProcess(pair.source) as worker:
        pair.source.sql("INSERT INTO b VALUES (1)")
        wait_until(lambda: worker.events("target failed"), 20)
        for i in range(3):
            pair.source.sql("INSERT INTO a VALUES (%s)", [i])
            wait_until(lambda n=i + 1: pair.target.one("SELECT count(*) FROM a") == n, 20)


def test_a_table_locked_on_the_source_delays_no_neighbour(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE free (id integer PRIMARY KEY)")
    for table in ("t", "free"):
        pair.add_target(table, mode="async")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 3000)")
    other = pair.source.connect()
    other.execute("BEGIN; LOCK TABLE t")
    pair.source.sql("INSERT INTO free VALUES (1)")
    with WorkerProcess(pair.source, constants={"bulk.MIN_ROWS": 2000}):
        wait_until(lambda: pair.target.rows("free") == ["(1)"])
        assert pair.target.rows("t") == []
        other.execute("COMMIT")
        wait_until(lambda: pair.target.one("SELECT count(*) FROM t") == 3000)


def test_targets_come_and_go_while_it_runs(pair: Pair) -> None:
    pair.both(TABLE)
    pair.both("CREATE TABLE u (id integer PRIMARY KEY)")
    with WorkerProcess(pair.source) as worker:
        first = pair.add_target("t", mode="async")
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        second = pair.join(pair.source, pair.target, "another")
        pair.add_target("u", second, mode="async")
        pair.source.sql("INSERT INTO u VALUES (1)")
        arrives(pair.target, 1, "u")
        pair.call("drop_target", target_id=first)
        pair.source.sql(f"DROP SERVER {pair.server} CASCADE")
        pair.source.sql("INSERT INTO t VALUES (2, 'y')")
        pair.source.sql("INSERT INTO u VALUES (2)")
        arrives(pair.target, 2, "u")
        falls_asleep(pair.source)
        assert count(pair.target) == 1
        assert not worker.events("drainer failed")


# --- the initial copy in the background


def copied(pair: Pair, target: int, timeout: float = 30) -> None:
    wait_until(lambda: pair.status(target) == "ok", timeout, "the copy has ended")


def test_an_initial_copy_in_the_background_is_made_in_pieces(pair: Pair) -> None:
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 5000) AS i")
    with WorkerProcess(pair.source, constants={"copy.PIECE_ROWS": 700}) as worker:
        target = pair.add_target("t", mode="tolerant", initial_copy="background")
        copied(pair, target)
        pair.assert_same("t")
        (said,) = worker.events("copied")
        assert (said["rows"], said["server"]) == (5000, pair.server)
    assert pair.source.one("SELECT count(*) FROM tbl_repl.piece") == 0


def test_a_copy_in_the_background_delays_no_neighbour(pair: Pair, queue: int) -> None:
    pair.both("CREATE TABLE u (id integer PRIMARY KEY)")
    pair.source.sql("INSERT INTO u SELECT generate_series(1, 50)")
    with WorkerProcess(pair.source), held(pair.target, "LOCK TABLE u"):
        target = pair.add_target("u", mode="async", initial_copy="background", timeout="60 s")
        waits_for_lock(pair.target)
        pair.source.sql("INSERT INTO t VALUES (1, 'x'); INSERT INTO u VALUES (100)")
        arrives(pair.target, 1)
        assert pair.status(target) == "copying"


@pytest.mark.once
def test_tables_that_refer_to_each_other_are_copied_in_order_while_writers_go_on(pair: Pair) -> None:
    pair.both("CREATE TABLE parent (id integer PRIMARY KEY)")
    pair.both("CREATE TABLE child (id integer PRIMARY KEY, parent integer NOT NULL REFERENCES parent)")
    pair.source.sql("INSERT INTO parent SELECT generate_series(1, 3000)")
    pair.source.sql("INSERT INTO child SELECT i, i FROM generate_series(1, 3000) AS i")
    stop = threading.Event()

    def write() -> None:
        i = 10_000
        with pair.source.connect() as session:
            while not stop.is_set():
                i += 1
                session.execute("INSERT INTO parent VALUES (%s)", [i])
                session.execute("INSERT INTO child VALUES (%s, %s)", [i, i])

    writer = in_background(write)
    try:
        with WorkerProcess(pair.source, constants={"copy.PIECE_ROWS": 500}) as worker:
            with pair.source.connect() as session, session.transaction():
                for table in ("child", "parent"):
                    session.execute(
                        "SELECT tbl_repl.add_target(%s::regclass, %s, mode => 'async', initial_copy => 'background')",
                        [table, pair.server],
                    )
            wait_until(
                lambda: (
                    not pair.source.one("SELECT count(*) FROM tbl_repl.target_state WHERE status = 'copying'")
                ),
                60,
            )
            stop.set()
            writer.result(20)
            same(pair, "parent")
            same(pair, "child")
            wait_until(
                lambda: not pair.source.one("SELECT count(*) FROM tbl_repl.target_state WHERE status <> 'ok'")
            )
            assert worker.events("copied")
    finally:
        stop.set()


@pytest.mark.once
@pytest.mark.parametrize("point", [name for name in failpoint.POINTS if name.startswith("piece")])
@pytest.mark.parametrize("then", ["worker", "drain"])
def test_killed_at_any_step_of_a_piece_the_tables_become_equal(pair: Pair, point: str, then: str) -> None:
    """Another worker goes on with the pieces; where none comes, replay does."""
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i")
    target = pair.add_target("t", mode="tolerant", initial_copy="background")
    constants = {"copy.PIECE_ROWS": 500}
    with WorkerProcess(
        pair.source, env={"TBL_REPL_FAIL_AT": point}, constants=constants, wait=False
    ) as worker:
        assert worker.ended() == -signal.SIGKILL
    assert pair.status(target) == "copying"
    pair.source.sql("UPDATE t SET v = 'newer' WHERE id <= 700; DELETE FROM t WHERE id BETWEEN 900 AND 1100")
    pair.source.sql("INSERT INTO t VALUES (5000, 'new')")
    if then == "worker":
        with WorkerProcess(pair.source, constants=constants):
            copied(pair, target)
    else:
        # the copier's own session may still be ending
        wait_until(lambda: (pair.drain(), pair.status(target) == "ok")[1], 20)
    pair.assert_same("t")


def test_replay_leaves_a_copy_alone_that_is_being_made_in_pieces(pair: Pair) -> None:
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 50) AS i")
    target = pair.add_target("t", mode="async", initial_copy="background")
    with pair.source.connect() as copier:
        copier.execute("SELECT pg_advisory_lock(tbl_repl._lock_copy(), %s)", [target])
        assert pair.begin_copy(target, 20) == 3
        pair.drain()
        assert count(pair.target) == 0
        assert pair.source.one("SELECT count(*) FROM tbl_repl.piece") == 3
    wait_until(lambda: (pair.drain(), pair.status(target) == "ok")[1], 20)
    pair.assert_same("t")


def test_a_row_that_the_target_rejects_does_not_stop_a_copy_in_the_background(pair: Pair) -> None:
    pair.both(TABLE)
    pair.target.sql("ALTER TABLE t ADD CHECK (id <> 1234)")
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i")
    with WorkerProcess(pair.source, constants={"copy.PIECE_ROWS": 500}) as worker:
        target = pair.add_target("t", mode="async", initial_copy="background")
        copied(pair, target)
        assert count(pair.target) == 2999
        assert pair.source.one("SELECT key FROM tbl_repl.quarantine") == {"id": 1234}
        assert worker.events("copy failed")


def test_a_copy_in_the_background_waits_for_a_target_that_is_down(pair: Pair, proxy: Proxy) -> None:
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i")
    target = pair.add_target("t", mode="async", initial_copy="background")
    proxy.set("refuse")
    with WorkerProcess(pair.source, constants={"copy.PIECE_ROWS": 500}) as worker:
        wait_until(lambda: worker.events("copy failed") and state(pair, target)["next_try_at"], 20)
        assert "08" in str(state(pair, target)["last_error"])
        proxy.set("pass")
        copied(pair, target)
        pair.assert_same("t")
        assert worker.events("copied")


def test_a_role_that_may_not_read_the_mapping_leaves_the_copy_to_replay(pair: Pair) -> None:
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 500) AS i")
    operator = pair.source.role("copy_operator")
    pair.source.admin(f"SELECT tbl_repl.grant_access('{operator}', 'operator')")
    with WorkerProcess(dsns=(dsn_of(pair.source, operator),), wait=False) as worker:
        target = pair.add_target("t", mode="async", initial_copy="background")
        copied(pair, target)
        pair.assert_same("t")
        assert not worker.events("copied")


def test_an_operator_may_run_it(pair: Pair, queue: int) -> None:
    operator = pair.source.role("worker_operator")
    pair.source.sql(f"SELECT tbl_repl.grant_access('{operator}', 'operator')")
    with WorkerProcess(dsns=(dsn_of(pair.source, operator),), constants={"bulk.MIN_ROWS": 2000}) as worker:
        pair.source.sql("INSERT INTO t VALUES (0, 'x')")
        arrives(pair.target, 1)
        pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i")
        arrives(pair.target, 3001)
        assert not worker.events("drainer failed")
        assert not worker.events("source failed")


def test_a_paused_target_is_left_alone_and_its_neighbours_are_not(pair: Pair, queue: int) -> None:
    pair.both("CREATE TABLE u (id integer PRIMARY KEY)")
    pair.add_target("u", mode="async")
    pair.call("pause_target", target_id=queue)
    with WorkerProcess(pair.source):
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        pair.source.sql("INSERT INTO u VALUES (1)")
        arrives(pair.target, 1, "u")
        falls_asleep(pair.source)
        assert (pair.status(queue), pair.pending(queue), count(pair.target)) == ("paused", 1, 0)
        pair.call("resume_target", target_id=queue)
        arrives(pair.target, 1)


# --- waking up


def test_a_commit_wakes_a_sleeping_worker(pair: Pair, queue: int) -> None:
    with WorkerProcess(pair.source, options=NEVER):
        for i in range(1, 6):
            falls_asleep(pair.source)
            pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
            arrives(pair.target, i)


def test_what_nobody_has_announced_is_found_by_polling(pair: Pair, queue: int) -> None:
    """PREPARE TRANSACTION does not allow NOTIFY, so the worker is not told."""
    with WorkerProcess(pair.source, options=("--poll-seconds", "0.2")):
        falls_asleep(pair.source)
        pair.source.sql("BEGIN; INSERT INTO t VALUES (1, 'x'); PREPARE TRANSACTION 'p'")
        pair.source.sql("COMMIT PREPARED 'p'")
        arrives(pair.target, 1)


def test_serializable_writers_succeed_while_it_sleeps_and_arrive(pair: Pair, queue: int) -> None:
    with WorkerProcess(pair.source, options=("--poll-seconds", "0.2")):
        for i in range(1, 4):
            falls_asleep(pair.source)
            pair.source.sql(f"BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO t VALUES ({i}, 'x'); COMMIT")
        arrives(pair.target, 3)


def test_a_worker_at_work_is_not_notified(pair: Pair, queue: int) -> None:
    """NOTIFY takes a lock of the whole cluster at commit: it is for the one who sleeps."""
    with pair.source.connect() as listener, WorkerProcess(pair.source, options=NEVER):
        listener.execute("LISTEN tbl_repl")
        falls_asleep(pair.source)
        with held(pair.target, "LOCK TABLE t"):
            wait_until(lambda: asleep(pair.source))
            pair.source.sql("INSERT INTO t VALUES (0, 'wakes it')")
            waits_for_lock(pair.target)
            heard = len(list(listener.notifies(timeout=0)))
            assert heard > 0
            wait_until(lambda: not asleep(pair.source))
            for i in range(1, 21):
                pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
            assert list(listener.notifies(timeout=0)) == []
        arrives(pair.target, 21)


def test_another_server_is_served_while_one_is_at_work(trio: Pair) -> None:
    """The watcher neither sleeps nor waits then."""
    assert trio.third is not None
    trio.both(TABLE)
    trio.both("CREATE TABLE u (id integer PRIMARY KEY)")
    trio.add_target("t", trio.third_server, mode="async", timeout="600 s")
    trio.add_target("u", mode="async")
    with held(trio.third, "LOCK TABLE t"), WorkerProcess(trio.source, options=NEVER):
        trio.source.sql("INSERT INTO t VALUES (1, 'x')")
        waits_for_lock(trio.third)
        for i in range(1, 4):
            trio.source.sql("INSERT INTO u VALUES (%s)", [i])
            arrives(trio.target, i, "u")
            has_settled(trio.source, trio.server)


def test_batches_under_load_begin_further_apart_up_to_a_bound() -> None:
    """Also after more of them than a float has powers of two."""
    pauses = [pause_after(streak) for streak in range(1, 3000)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0, LONGEST_PAUSE_SECONDS)


# --- what fails


def test_waiting_doubles_with_jitter_up_to_a_bound() -> None:
    waits = [[retry_after(n) for _ in range(50)] for n in range(1, 40)]
    assert all(0.05 <= wait <= 0.1 for wait in waits[0])
    assert all(0.8 <= wait <= 1.6 for wait in waits[4])
    assert all(LONGEST_RETRY_SECONDS / 2 <= wait <= LONGEST_RETRY_SECONDS for wait in waits[-1])
    assert all(len(set(row)) > 1 for row in waits)


def test_waiting_for_the_next_try_is_shown_grows_and_ends_with_success(
    pair: Pair, queue: int, proxy: Proxy
) -> None:
    with WorkerProcess(pair.source) as worker:
        proxy.set("refuse")
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        wait_until(lambda: state(pair, queue)["failures"] == 4, 20)
        seen = state(pair, queue)
        assert "08" in str(seen["last_error"])
        # 0.1 s doubled three times, from half of it on
        (waited,) = pair.source.sql(
            "SELECT next_try_at - last_error_at BETWEEN '0.4 s' AND '1.2 s' FROM tbl_repl.target_status"
        )
        assert waited == (True,)
        proxy.set("pass")
        arrives(pair.target, 1)
        wait_until(lambda: state(pair, queue)["next_try_at"] is None)
        assert state(pair, queue)["failures"] == 0
        failed = worker.events("target failed")
        assert {line["server"] for line in failed} == {pair.server}
        assert all(line["retry_in_seconds"] >= 0 and line["reason"].startswith("08") for line in failed)


def test_two_that_fail_together_do_not_come_back_together(pair: Pair, queue: int) -> None:
    """Jitter: each target waits for a time of its own."""
    pair.both("CREATE TABLE u (id integer PRIMARY KEY)")
    pair.add_target("u", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    pair.source.sql("INSERT INTO u VALUES (1)")
    pair.source.sql("UPDATE tbl_repl.target_state SET last_error_at = clock_timestamp()")
    for _ in range(9):
        pair.source.sql("SELECT tbl_repl._note_retry(%s, '-infinity')", [pair.server])
    query = "SELECT extract(epoch FROM next_try_at - clock_timestamp())::float FROM tbl_repl.target_state"
    waits = [row[0] for row in pair.source.sql(query)]
    assert abs(waits[0] - waits[1]) > 0.001, "more than the time between two rows"
    assert all(11 <= wait <= 26 for wait in waits)


def test_connecting_that_hangs_is_given_up_shown_and_tried_again(pair: Pair, proxy: Proxy) -> None:
    pair.both(TABLE)
    target = pair.add_target("t", mode="async", timeout="1 s")
    with WorkerProcess(pair.source) as worker:
        proxy.set("blackhole")
        proxy.cut()
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        wait_until(lambda: state(pair, target)["next_try_at"], 20)
        assert "08" in str(state(pair, target)["last_error"])
        assert not worker.events("drainer failed")
        proxy.set("pass")
        proxy.cut()
        arrives(pair.target, 1, timeout=30)


def test_a_sync_writer_that_hangs_in_connecting_is_given_up(pair: Pair, proxy: Proxy) -> None:
    """Nobody else waits for that server, and no drainer is at work."""
    pair.both(TABLE)
    pair.add_target("t", mode="sync", timeout="1 s")
    with WorkerProcess(pair.source):
        falls_asleep(pair.source)
        proxy.set("blackhole")
        proxy.cut()
        with (
            within(10),
            pytest.raises(psycopg.OperationalError, match="does not answer|timeout|did not answer"),
        ):
            pair.source.fresh("INSERT INTO t VALUES (1, 'x')")
    assert count(pair.source) == 0


def test_rows_in_quarantine_are_tried_again_only_once_in_a_while(pair: Pair, queue: int) -> None:
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    attempts = "SELECT attempts FROM tbl_repl.quarantine"
    with WorkerProcess(pair.source, options=("--poll-seconds", "0.1")):
        # the minute begins when the worker looks for the first time
        pair.source.sql("INSERT INTO t VALUES (0, 'first')")
        arrives(pair.target, 1)
        falls_asleep(pair.source)
        pair.source.sql("INSERT INTO t VALUES (1, 'bad')")
        wait_until(lambda: pair.source.one(attempts))
        for i in range(2, 12):
            pair.source.sql("INSERT INTO t VALUES (%s, 'good')", [i])
            arrives(pair.target, i)
        assert pair.source.one(attempts) == 1
    with WorkerProcess(
        pair.source, options=("--poll-seconds", "0.1"), constants={"drainer.QUARANTINE_SECONDS": 0.2}
    ):
        wait_until(lambda: pair.source.one(attempts) > 3)
        pair.target.sql("ALTER TABLE t DROP CONSTRAINT t_v_check")
        arrives(pair.target, 12)
        wait_until(lambda: pair.source.sql(attempts) == [])


# --- ending


def test_sigterm_lets_the_batch_end(pair: Pair, queue: int) -> None:
    with WorkerProcess(pair.source) as worker:
        with held(pair.target, "LOCK TABLE t"):
            pair.source.sql("INSERT INTO t VALUES (1, 'x')")
            waits_for_lock(pair.target)
            worker.send(signal.SIGTERM)
            wait_until(lambda: worker.events("stopping"))
            assert worker.alive
        assert worker.ended() == 0
    assert (count(pair.target), pair.pending(queue)) == (1, 0)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_second_signal_interrupts_the_batch(pair: Pair, queue: int, signum: signal.Signals) -> None:
    with WorkerProcess(pair.source) as worker, held(pair.target, "LOCK TABLE t"):
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        waits_for_lock(pair.target)
        worker.send(signum)
        wait_until(lambda: worker.events("stopping"))
        worker.send(signum)
        assert worker.ended() == 1
        # nor does its session on the source go on waiting, for the timeout of the target
        wait_until(lambda: pair.source.backends("tbl-repl worker%") == [], 5)
        assert pair.pending(queue) == 1
    pair.drain()
    pair.assert_same("t")


def test_it_ends_at_once_while_it_sleeps(pair: Pair, queue: int) -> None:
    with WorkerProcess(pair.source, options=NEVER) as worker:
        falls_asleep(pair.source)
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0


def test_a_second_worker_waits_and_takes_over(pair: Pair, queue: int) -> None:
    with (
        WorkerProcess(pair.source) as first,
        WorkerProcess(pair.source, options=NEVER, wait=False) as second,
    ):
        wait_until(lambda: second.events("waiting"))
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        assert not second.events("batch")
        first.kill()
        wait_until(lambda: second.events("serving"))
        falls_asleep(pair.source)
        pair.source.sql("INSERT INTO t VALUES (2, 'y')")
        arrives(pair.target, 2)
        wait_until(lambda: second.events("batch"))


def test_once_drains_and_ends(pair: Pair, queue: int) -> None:
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 30) AS i")
    done = tbl_repl("worker", "--once", "--json", "--batch-rows", "10", "--dsn", dsn_of(pair.source))
    assert done.returncode == 0, done.stderr
    pair.assert_same("t")


def test_once_says_by_its_exit_code_that_something_is_left(trio: Pair) -> None:
    trio.both(TABLE)
    trio.add_target("t", trio.third_server, mode="async")
    trio.add_target("t", mode="async")
    trio.source.sql("INSERT INTO t VALUES (1, 'x')")
    proxy = trio.proxy(trio.third_server, trio.third)
    proxy.set("refuse")
    dead = "host=127.0.0.1 port=1 dbname=nowhere"
    program = ("worker", "--once", "--dsn")
    assert tbl_repl(*program, dsn_of(trio.source)).returncode == 1
    assert count(trio.target) == 1, "what can be shipped is"
    trio.source.sql("INSERT INTO t VALUES (2, 'x')")
    assert tbl_repl(*program, dead, "--dsn", dsn_of(trio.source)).returncode == 3
    assert count(trio.target) == 2, "what can be shipped is"
    proxy.set("pass")
    trio.target.sql("ALTER TABLE t ADD CHECK (id < 3)")
    trio.source.sql("INSERT INTO t VALUES (3, 'rejected')")
    done = tbl_repl(*program, dsn_of(trio.source))
    assert done.returncode == 1
    assert re.search(r"left target=\d+ server=target_server status=ok pending=0 quarantined=1", done.stderr)
    trio.target.sql("ALTER TABLE t DROP CONSTRAINT t_id_check")
    assert tbl_repl(*program, dsn_of(trio.source)).returncode == 0


# --- surviving


class Load:
    """Writers that go on whatever happens to the servers."""

    def __init__(self, pair: Pair, large: bool = False) -> None:
        """large: now and then a statement that changes every row from 1000 on."""
        self._dsn = dsn_of(pair.source)
        self._large = large
        self._stop = threading.Event()
        self.commits = 0
        self._done = in_background(self._run)

    def _run(self) -> None:
        i = 0
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True) as session:
                    while not self._stop.is_set():
                        i += 1
                        session.execute(
                            "INSERT INTO t VALUES (%s, 'x') ON CONFLICT (id) DO UPDATE SET v = t.v || 'y'",
                            [i % 50],
                        )
                        self.commits += 1
                        if i % 7 == 0:
                            session.execute("DELETE FROM t WHERE id = %s", [i * 3 % 50])
                        if self._large and i % 10 == 0:
                            session.execute("UPDATE t SET v = %s WHERE id >= 1000", [str(i)])
            except psycopg.OperationalError:
                self._stop.wait(0.02)

    def goes_on(self) -> None:
        before = self.commits
        wait_until(lambda: self.commits > before + 20, 20, "writers go on")

    def end(self) -> None:
        self._stop.set()
        self._done.result(20)


@pytest.mark.parametrize("side", ["source", "target"])
def test_it_survives_the_crash_of_either_server_under_load(pair: Pair, side: str) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="async")
    node = pair.source if side == "source" else pair.target
    with WorkerProcess(pair.source) as worker:
        load = Load(pair)
        try:
            load.goes_on()
            node.stop("immediate")
            node.start()
            load.goes_on()
        finally:
            load.end()
        same(pair)
        drained(pair)
        assert worker.alive


def test_it_survives_a_cut_line_under_load(pair: Pair, proxy: Proxy) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="async", timeout="1 s")
    with WorkerProcess(pair.source):
        load = Load(pair)
        try:
            for mode in ("reset", "refuse"):
                load.goes_on()
                proxy.set(mode)  # type: ignore[arg-type]
                proxy.cut()
                load.goes_on()
                proxy.set("pass")
        finally:
            load.end()
        same(pair)


WAYS = ("small batches", "copy", "pieces")
FAULTS = ("cut", "black hole", "slow line", "crash of the source", "crash of the target")


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_whatever_breaks_under_load_the_tables_become_equal(
    pair: Pair, proxy: Proxy, way: str, fault: str
) -> None:
    """In the middle of each way in which rows travel; the worker itself goes on."""
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1000, 3999) AS i")
    initial = "background" if way == "pieces" else "now"
    timeout = "10 s" if fault == "slow line" else "1 s"
    target = pair.add_target("t", mode="async", timeout=timeout, initial_copy=initial)
    constants = {
        "bulk.MIN_ROWS": 2000,
        "bulk.SILENCE_SECONDS": 60.0 if fault == "slow line" else 1.0,
        "bulk.MERGE_SECONDS": 60.0 if fault == "slow line" else 2.0,
        "copy.PIECE_ROWS": 50,
        "drainer.LONGEST_RETRY_SECONDS": 1.0,
    }
    sessions = "tbl_repl %" if way == "small batches" else "tbl_repl %.b01d"

    def shipped() -> int:
        return int(pair.source.one("SELECT rows_shipped FROM tbl_repl.target_status"))

    load = Load(pair, large=way == "copy")
    try:
        # pieces are there from the start: the worker is not waited for, or they would be done
        with WorkerProcess(pair.source, constants=constants, wait=way != "pieces") as worker:
            wait_until(lambda: pair.target.backends(sessions), 20, f"rows travel: {way}")
            if fault == "cut":
                proxy.cut()
            elif fault == "black hole":
                proxy.set("blackhole")
                wait_until(lambda: state(pair, target)["last_error"], 30, "the worker has given up")
            elif fault == "slow line":
                proxy.delay = 0.2
                before = shipped()
                wait_until(lambda: shipped() > before, 30, "rows travel, slowly")
            else:
                node = pair.source if fault.endswith("source") else pair.target
                node.stop("immediate")
                node.start()
            load.goes_on()
            proxy.set("pass")
            if fault == "black hole":
                proxy.cut()  # what has been swallowed is gone
            load.goes_on()
            load.end()
            proxy.delay = 0.0
            same(pair, timeout=60)
            drained(pair)
            wait_until(lambda: pair.status(target) == "ok", 20)
            assert worker.alive
    finally:
        load.end()


@pytest.mark.once
def test_a_standby_is_refused_waited_for_and_served_after_its_promotion(pair: Pair, queue: int) -> None:
    pair.source.demote()
    dsn = dsn_of(pair.source)
    for verb in ("status", "check", "replay", "top"):
        done = tbl_repl(verb, "--dsn", dsn)
        assert done.returncode == 1 and "is a standby" in done.stderr, done.stderr
        assert "target_session_attrs=primary" in done.stderr
    with WorkerProcess(dsns=(dsn,), wait=False) as worker:
        failed = wait_until(lambda: worker.events("source failed")[3:], 20)
        assert "is a standby" in failed[0]["reason"]
        assert failed[0]["retry_in_seconds"] >= 0.4, "each time twice as long"
        assert not worker.events("serving")
        pair.source.promote()
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0


def test_it_survives_the_end_of_its_sessions(pair: Pair, queue: int) -> None:
    with WorkerProcess(pair.source) as worker:
        for i in range(1, 4):
            pair.source.admin(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE 'tbl-repl worker%'"
            )
            pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
            arrives(pair.target, i)
        assert worker.alive


def test_settings_of_the_role_do_not_hold_it_up(pair: Pair, queue: int) -> None:
    for setting in (
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "statement_timeout = '300ms'",
        "idle_session_timeout = '300ms'",
    ):
        pair.source.admin(f"ALTER ROLE owner IN DATABASE {pair.source.dbname} SET {setting}")
    with WorkerProcess(pair.source) as worker:
        with held(pair.target, "LOCK TABLE t"):
            pair.source.admin("INSERT INTO t VALUES (1, 'x')")
            waits_for_lock(pair.target)
            # longer than statement_timeout: seen from the target's clock
            began = pair.target.one("SELECT clock_timestamp()")
            wait_until(
                lambda: pair.target.one("SELECT clock_timestamp() > %s::timestamptz + '0.5 s'", [began])
            )
        arrives(pair.target, 1)
        assert not worker.events("drainer failed")
        assert not worker.events("source failed")


@pytest.mark.parametrize("point", [name for name in failpoint.POINTS if " replay" in name or name == "awake"])
def test_killed_at_any_step_the_tables_become_equal(pair: Pair, queue: int, point: str) -> None:
    with WorkerProcess(pair.source, env={"TBL_REPL_FAIL_AT": point}, wait=False) as worker:
        pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 100) AS i")
        pair.source.sql("UPDATE t SET v = 'y' WHERE id <= 50; DELETE FROM t WHERE id > 90")
        assert worker.ended() == -signal.SIGKILL
    pair.source.sql("UPDATE t SET v = 'z' WHERE id <= 10; INSERT INTO t VALUES (95, 'again')")
    with WorkerProcess(pair.source):
        same(pair)
        drained(pair)


def test_killed_in_the_middle_of_a_batch_the_tables_become_equal(pair: Pair, queue: int) -> None:
    with WorkerProcess(pair.source) as worker, held(pair.target, "LOCK TABLE t"):
        pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 100) AS i")
        waits_for_lock(pair.target)
        worker.kill()
        pair.source.sql("UPDATE t SET v = 'newer'")
    with WorkerProcess(pair.source):
        same(pair)
        drained(pair)


@pytest.mark.once
@pytest.mark.parametrize("point", [name for name in failpoint.POINTS if name.startswith("copy")])
def test_killed_at_any_step_of_a_copy_the_tables_become_equal(pair: Pair, queue: int, point: str) -> None:
    """A large batch; and nothing is applied over what is newer."""
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i")
    constants = {"bulk.MIN_ROWS": 2000}
    with WorkerProcess(
        pair.source, env={"TBL_REPL_FAIL_AT": point}, constants=constants, wait=False
    ) as worker:
        assert worker.ended() == -signal.SIGKILL
    pair.source.sql("UPDATE t SET v = 'newer' WHERE id <= 150; DELETE FROM t WHERE id > 2900")
    with WorkerProcess(pair.source, constants=constants):
        same(pair)
        drained(pair)


# --- what it says, what it needs


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_log_lines_carry_no_row_contents(pair: Pair, queue: int, as_json: bool) -> None:
    """Not in errors of the target either, which quote values."""
    pair.target.sql(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.v LIKE '%state%' THEN RAISE EXCEPTION 'no: %', NEW.v USING ERRCODE = '55000'; END IF;
            IF NEW.v LIKE '%value%' THEN RAISE EXCEPTION 'no: %', NEW.v USING ERRCODE = '22023'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    with WorkerProcess(pair.source, options=("--verbose",), as_json=as_json, wait=False) as worker:
        pair.source.sql("INSERT INTO t VALUES (1, 'sesame good'), (2, 'sesame value')")
        wait_until(
            lambda: count(pair.target) == 1 and pair.source.one("SELECT count(*) FROM tbl_repl.quarantine")
        )
        pair.source.sql("INSERT INTO t VALUES (3, 'sesame state')")
        wait_until(lambda: state(pair, queue)["next_try_at"])
        wait_until(lambda: "55000" in worker.output)
        worker.send(signal.SIGTERM)
        assert worker.ended() == 0
        assert "sesame" in str(state(pair, queue)["last_error"]), "the target did quote a value"
        assert "sesame" not in worker.output
        if as_json:
            (batch, *_) = worker.events("batch")
            assert batch["server"] == pair.server
            assert (batch["rows"], batch["level"]) == (1, "info") or batch["rows"] == 2
            assert len(worker.lines) == sum(line.startswith("{") for line in worker.lines)
        else:
            assert f"batch server={pair.server} rows=" in worker.output


def test_rights_that_are_gone_are_named_with_their_cure(pair: Pair, queue: int) -> None:
    role = pair.source.role("runs_it")
    pair.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    with WorkerProcess(dsns=(dsn_of(pair.source, role),)) as worker:
        wait_until(lambda: worker.events("serving"))
        pair.source.sql(f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tbl_repl FROM {role}")

        def reasons() -> str:
            events = [*worker.events("drainer failed"), *worker.events("source failed")]
            return " ".join(str(line["reason"]) for line in events)

        wait_until(lambda: "42501 permission denied for function" in reasons(), 20)
        wait_until(lambda: f"grant_access('{role}', 'operator')" in reasons(), 20)
        pair.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)


@pytest.mark.once
@pytest.mark.parametrize("method", ["Watcher._watch", "Drainer.drain"])
def test_an_internal_error_is_survived_and_told_at_the_end(pair: Pair, queue: int, method: str) -> None:
    """The first call fails in a way that nobody has thought of."""
    break_once = (
        f"real, calls = w.{method}, iter([1])\n"
        "def fail(self, *args): return 1 / 0 if next(calls, 0) else real(self, *args)\n"
        f"w.{method} = fail\n"
    )
    with WorkerProcess(pair.source, program=break_once) as worker:
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        assert "ZeroDivisionError" in worker.output
        worker.send(signal.SIGTERM)
        assert worker.ended() == 1


@pytest.mark.once
def test_memory_does_not_grow_with_the_backlog(pair: Pair) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="async", timeout="60 s")
    with WorkerProcess(pair.source) as worker:
        pair.source.sql("INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 1000) AS i")
        arrives(pair.target, 1000)
        small = worker.rss()
        pair.source.sql("INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1001, 100000) AS i")
        arrives(pair.target, 100000, timeout=60)
        assert worker.rss() - small < 30_000_000, "a hundred megabytes have passed through"


HUGE = 60_000_000
"""Bytes of a row."""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("way", ["batch", "pieces"])
def test_memory_of_a_huge_row(pair: Pair, way: str) -> None:
    """It does not pass through the worker in a batch; by COPY the worker holds it about twice, not more."""
    pair.both(TABLE)
    pair.add_target("t", mode="async", timeout="60 s")
    with WorkerProcess(pair.source) as worker:
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        arrives(pair.target, 1)
        small = worker.rss()
        if way == "pieces":
            pair.source.sql("SELECT tbl_repl.drop_target('t', %s)", [pair.server])
            pair.target.sql("DELETE FROM t")
        pair.source.sql("UPDATE t SET v = repeat('x', %s)", [HUGE])
        if way == "pieces":
            pair.add_target("t", mode="async", timeout="60 s", initial_copy="background")
        query = "SELECT coalesce(max(length(v)), 0) FROM t"
        wait_until(lambda: pair.target.one(query) == HUGE, 60)
        if way == "pieces":
            wait_until(lambda: worker.events("copied"), 20)
        assert worker.rss() - small < (10_000_000 if way == "batch" else 3.2 * HUGE)
