"""Nobody waits longer than promised: targets that are down, locked, hung, out of reach."""

from __future__ import annotations

import os
import signal
import time

import psycopg
import pytest
from psycopg import errors

from support import Pair, Proxy, wait_until
from support.background import in_background, start, within

SLACK = 1.0  # what the contract allows beyond timeout


def replicate(pair: Pair, name: str = "t", **options: object) -> int:
    pair.both(f"CREATE TABLE {name} (id integer PRIMARY KEY, v text)")
    options.setdefault("timeout", "700 ms")
    return pair.add_target(name, **options)


def warm(pair: Pair) -> psycopg.Connection:
    """A session whose connections to the targets are open and prepared."""
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (0, 'warm'); DELETE FROM t WHERE id = 0")
    conn.execute("INSERT INTO t VALUES (0, 'warm')")
    return conn


def assert_queues_at_once(pair: Pair, target: int) -> None:
    """Everybody: a session that was there before, and a new one."""
    assert pair.status(target) == "queueing"
    before = pair.pending(target)
    with within(0.5):
        pair.source.sql("INSERT INTO t VALUES (5000, 'at once')")
    with within(0.5):
        pair.source.fresh("INSERT INTO t VALUES (5001, 'at once')")
    assert pair.pending(target) == before + 2


def assert_heals(pair: Pair, target: int) -> None:
    pair.drain()
    pair.assert_same("t")
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)


def sqlstates(pair: Pair) -> list[str]:
    return [row[0] for row in pair.source.sql("SELECT sqlstate FROM tbl_repl.error_log ORDER BY at")]


def connecting(pair: Pair) -> object:
    return pair.source.admin(
        "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = tbl_repl._lock_connect()::oid AND granted"
    )


# --- one target ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 1500])
def test_a_target_that_is_down_delays_a_tolerant_writer_once(pair: Pair, rows: int) -> None:
    target = replicate(pair, mode="tolerant")
    conn = warm(pair)
    pair.target.stop()
    with within(0.7 + SLACK):
        conn.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
    assert sqlstates(pair)[0].startswith(("08", "57P"))
    assert_queues_at_once(pair, target)
    pair.target.start()
    assert_heals(pair, target)


def test_no_plan_is_compiled_while_a_writer_waits(pair: Pair) -> None:
    """That takes longer than anything else here; a sequential scan that cannot be helped looks dear enough for it."""
    pair.source.sql("CREATE TABLE allowed (v text); INSERT INTO allowed VALUES ('warm'), ('x')")
    target = replicate(
        pair, mode="tolerant", row_filter="EXISTS (SELECT FROM public.allowed AS a WHERE a.v = s.v)"
    )
    conn = pair.source.connect("postgres")
    if not conn.execute("SELECT pg_jit_available()").fetchone()[0]:  # type: ignore[index]
        pytest.skip("this server cannot compile plans")
    try:
        conn.execute("LOAD 'auto_explain'")
    except errors.UndefinedFile:
        pytest.skip("this server has no auto_explain")
    conn.execute(
        "SET jit = on; SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on;"
        "SET auto_explain.log_nested_statements = on"
    )
    pair.source.sql("INSERT INTO t VALUES (0, 'warm')")
    conn.execute("SELECT tbl_repl.explain_target(%s)", [target])
    conn.execute("INSERT INTO t VALUES (1, 'warm')")
    with pair.target.frozen():
        conn.execute("INSERT INTO t VALUES (2, 'x')")
    assert pair.status(target) == "queueing"
    assert "INSERT INTO tbl_repl.change" in pair.source.log()
    assert "JIT:" not in pair.source.log()


def test_a_sync_writer_fails_when_the_target_is_down_and_goes_on_when_it_is_back(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = warm(pair)
    pair.target.stop()
    with within(0.7 + SLACK), pytest.raises(psycopg.Error) as caught:
        conn.execute("INSERT INTO t VALUES (1, 'x')")
    assert str(caught.value.sqlstate).startswith("08")
    pair.target.start()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    pair.assert_same("t")


@pytest.mark.parametrize("rows", [1, 1500])
def test_a_row_lock_on_the_target_is_not_waited_for_longer_than_timeout(pair: Pair, rows: int) -> None:
    target = replicate(pair, mode="tolerant")
    conn = warm(pair)
    holder = pair.target.connect()
    holder.execute("BEGIN; UPDATE t SET v = 'held'")
    with within(0.7 + SLACK):
        conn.execute(f"UPDATE t SET v = 'x'; INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
    assert sqlstates(pair) == ["55P03"]
    assert_queues_at_once(pair, target)
    holder.execute("ROLLBACK")
    assert_heals(pair, target)


def test_a_sync_writer_gets_55p03_for_a_row_lock_on_the_target(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = warm(pair)
    holder = pair.target.connect()
    holder.execute("BEGIN; UPDATE t SET v = 'held'")
    with within(0.7 + SLACK), pytest.raises(errors.LockNotAvailable):
        conn.execute("UPDATE t SET v = 'x'")
    holder.execute("ROLLBACK")
    pair.assert_same("t")


@pytest.mark.parametrize(
    "statement", ["UPDATE t SET v = 'x'", "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1500) g"]
)
def test_a_statement_that_takes_too_long_on_the_target_is_ended_there(pair: Pair, statement: str) -> None:
    replicate(pair, mode="tolerant")
    pair.target.sql(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(20); RETURN NEW; END $$;
        CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON t FOR EACH ROW WHEN (NEW.v = 'x') EXECUTE FUNCTION slow()
        """
    )
    conn = warm(pair)
    with within(0.7 + SLACK):
        conn.execute(statement)
    assert sqlstates(pair) == ["57014"]
    assert pair.target.admin("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == []


@pytest.mark.parametrize("rows", [1, 1500])
def test_a_stopped_backend_delays_a_tolerant_writer_once(pair: Pair, rows: int) -> None:
    target = replicate(pair, mode="tolerant")
    conn = warm(pair)
    with pair.target.frozen():
        with within(0.7 + SLACK):
            conn.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
        assert_queues_at_once(pair, target)
    assert_heals(pair, target)


def test_a_black_hole_behind_an_open_connection_delays_a_tolerant_writer_once(
    pair: Pair, proxy: Proxy
) -> None:
    target = replicate(pair, mode="tolerant")
    conn = warm(pair)
    proxy.set("blackhole")
    with within(0.7 + SLACK):
        conn.execute("INSERT INTO t VALUES (1, 'x')")
    assert sqlstates(pair) == ["08006"]
    assert_queues_at_once(pair, target)
    proxy.set("pass")
    assert_heals(pair, target)


def test_a_sync_writer_fails_within_timeout_behind_a_black_hole(pair: Pair, proxy: Proxy) -> None:
    replicate(pair, mode="sync")
    conn = warm(pair)
    proxy.set("blackhole")
    with within(0.7 + SLACK), pytest.raises(errors.ConnectionFailure) as caught:
        conn.execute("INSERT INTO t VALUES (1, 'x')")
    assert caught.value.diag.message_hint
    proxy.set("pass")
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    pair.assert_same("t")


def test_a_large_message_into_a_black_hole_is_bounded_too(pair: Pair, proxy: Proxy) -> None:
    """Larger than what the sockets between take, so that sending blocks; tcp_user_timeout ends it.

    The kernel looks at that with its probes, whose intervals double: some times timeout, not timeout.
    """
    target = replicate(pair, mode="tolerant", timeout="1 s")
    conn = warm(pair)
    proxy.set("blackhole")
    start(conn, "INSERT INTO t VALUES (1, repeat('large', 3000000))").result(10)
    assert_queues_at_once(pair, target)
    proxy.set("pass")
    assert_heals(pair, target)


def test_while_one_session_hangs_in_connecting_others_queue_within_timeout(pair: Pair, proxy: Proxy) -> None:
    """From PostgreSQL 16 on dblink does not bound connecting: only the first session pays, and not for ever."""
    target = replicate(pair, mode="tolerant", timeout="1 s")
    pair.source.forget()
    first, second = pair.source.connect(), pair.source.connect()
    proxy.set("blackhole")
    hanging = start(first, "INSERT INTO t VALUES (1, 'first')")
    wait_until(lambda: connecting(pair))
    with within(1 + SLACK):
        second.execute("INSERT INTO t VALUES (2, 'second')")
    assert_queues_at_once(pair, target)
    # who waited has ended the one that hung
    assert hanging.result(3) == []
    proxy.set("pass")
    assert_heals(pair, target)


def test_a_short_timeout_ends_nobody_s_connecting_with_a_long_one(pair: Pair, proxy: Proxy) -> None:
    """From PostgreSQL 16 on who has waited for his timeout cancels the one that hangs."""
    replicate(pair, mode="tolerant", timeout="20 s")
    hasty = replicate(pair, "u", mode="tolerant", timeout="1 s")
    pair.source.forget()
    first, *others = (pair.source.connect() for _ in range(3))
    proxy.set("blackhole")
    waiting = start(first, "INSERT INTO t VALUES (1, 'x')")
    wait_until(lambda: connecting(pair))
    for writing in [start(conn, f"INSERT INTO u VALUES ({i}, 'x')") for i, conn in enumerate(others)]:
        writing.result(5)
    assert (pair.status(hasty), waiting.done()) == ("queueing", False)
    proxy.set("pass")
    proxy.cut()
    waiting.result(10)
    assert "57014" not in sqlstates(pair)
    pair.drain()
    pair.assert_same("t")


@pytest.mark.parametrize("how", ["refuse", "reset"])
def test_a_connection_that_is_refused_costs_no_waiting(pair: Pair, proxy: Proxy, how: str) -> None:
    target = replicate(pair, mode="tolerant", timeout="5 s")
    proxy.set(how)  # type: ignore[arg-type]
    with within(2):
        pair.source.fresh("INSERT INTO t VALUES (1, 'x')")
    assert_queues_at_once(pair, target)
    proxy.set("pass")
    assert_heals(pair, target)


# --- a hung target beside a healthy one ------------------------------------------------------------


def hang(pair: Pair, conn: psycopg.Connection) -> list[int]:
    """SIGSTOP to that session's backends on the first target."""
    pids = pair.target.backends(f"tbl_repl % {conn.info.backend_pid}.%")
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


@pytest.mark.parametrize("rows", [1, 1500])
@pytest.mark.parametrize("healthy", ["sync", "tolerant"])
def test_a_healthy_target_is_served_beside_a_hung_one_within_timeout(
    trio: Pair, healthy: str, rows: int
) -> None:
    assert trio.third
    hung = replicate(trio, mode="tolerant")
    other = trio.add_target("t", trio.third_server, mode=healthy, timeout="700 ms")
    conn = warm(trio)
    pids = hang(trio, conn)
    try:
        with within(0.7 + SLACK):
            conn.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
        trio.assert_same("t", there=trio.third)
        assert (trio.status(hung), trio.status(other)) == ("queueing", "ok")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert_heals(trio, hung)


def test_a_healthy_target_sees_the_change_while_the_hung_one_is_still_waited_for(trio: Pair) -> None:
    assert trio.third
    replicate(trio, mode="tolerant", timeout="5 s")
    trio.add_target("t", trio.third_server, mode="tolerant", timeout="5 s")
    conn = warm(trio)
    pids = hang(trio, conn)
    try:
        writing = start(conn, "INSERT INTO t VALUES (1, 'x')")
        wait_until(lambda: "(1,x)" in trio.third.rows("t"), timeout=3)  # type: ignore[union-attr]
        assert not writing.done()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    writing.result(8)


def test_a_healthy_target_that_has_to_try_another_way_is_not_held_up_by_a_hung_one(trio: Pair) -> None:
    """The healthy one first answers with 23505, for two values are swapped."""
    assert trio.third
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    trio.third.sql("CREATE UNIQUE INDEX ON t (v)")
    hung = trio.add_target("t", mode="tolerant", timeout="700 ms")
    healthy = trio.add_target("t", trio.third_server, mode="tolerant", timeout="700 ms")
    conn = warm(trio)
    conn.execute("INSERT INTO t VALUES (1, 'one'), (2, 'two')")
    pids = hang(trio, conn)
    try:
        with within(0.7 + SLACK):
            conn.execute("UPDATE t SET v = CASE id WHEN 1 THEN 'two' WHEN 2 THEN 'one' ELSE v END")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    trio.assert_same("t", there=trio.third)
    assert (trio.status(hung), trio.status(healthy)) == ("queueing", "ok")


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 1500])
@pytest.mark.parametrize("fault", ["hung", "locked", "hung and locked"])
def test_the_waiting_for_several_bad_targets_does_not_add_up(trio: Pair, fault: str, rows: int) -> None:
    assert trio.third
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    servers = [trio.join(trio.source, trio.target, f"bad_{n}") for n in range(3)]
    for n, server in enumerate(servers):
        trio.target.sql(f"CREATE TABLE t_{n} (LIKE t INCLUDING ALL)")
        trio.add_target("t", server, dst_table=f"t_{n}", timeout="2 s")
    healthy = trio.add_target("t", trio.third_server, timeout="2 s")
    conn = warm(trio)
    conn.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1500) g")
    pids: list[int] = []
    holder = trio.target.connect()
    holder.execute("BEGIN")
    try:
        if fault == "hung and locked":
            holder.execute("LOCK TABLE t_1, t_2")
        elif fault == "locked":
            holder.execute("LOCK TABLE t_0, t_1, t_2")
        if fault == "hung":
            pids = hang(trio, conn)
        elif fault == "hung and locked":
            pids = hang(trio, conn)[:1]
            for pid in trio.target.backends(f"tbl_repl % {conn.info.backend_pid}.%")[1:]:
                os.kill(pid, signal.SIGCONT)
        with within(2 + SLACK):
            conn.execute(f"UPDATE t SET v = 'y' WHERE id <= {rows}")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    trio.assert_same("t", there=trio.third)
    assert trio.status(healthy) == "ok"
    holder.execute("ROLLBACK")
    trio.drain()
    for n in range(3):
        trio.assert_same("t", f"t_{n}")


@pytest.mark.parametrize("rows", [1, 1500])
def test_a_hung_sync_target_fails_the_transaction_everywhere(trio: Pair, rows: int) -> None:
    assert trio.third
    replicate(trio, mode="sync")
    trio.add_target("t", trio.third_server, mode="tolerant", timeout="700 ms")
    conn = warm(trio)
    pids = hang(trio, conn)
    try:
        with within(0.7 + SLACK), pytest.raises(errors.ConnectionFailure):
            conn.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
        trio.assert_same("t", there=trio.third)
        assert trio.source.one("SELECT count(*) FROM t") == 1
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    trio.assert_same("t")


def test_a_target_that_hangs_in_connecting_does_not_cost_the_healthy_one_its_time(trio: Pair) -> None:
    assert trio.third
    proxy = trio.proxy()
    trio.source.forget()
    hung = replicate(trio, mode="tolerant", timeout="2 s")
    healthy = trio.add_target("t", trio.third_server, mode="sync", timeout="2 s")
    trio.source.forget()
    conn = trio.source.connect()
    waiting = trio.source.connect()
    proxy.set("blackhole")
    writing = start(conn, "INSERT INTO t VALUES (1, 'x')")
    # from 16 on it is the next one who ends a session that hangs in connecting
    wait_until(lambda: connecting(trio))
    with within(2 + SLACK):
        waiting.execute("INSERT INTO t VALUES (2, 'x')")
    writing.result(4)
    trio.assert_same("t", there=trio.third)
    assert (trio.status(hung), trio.status(healthy)) == ("queueing", "ok")


# --- cancels and limits of the writer --------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "statement_timeout", "lock_timeout"])
def test_a_tolerant_writer_that_is_canceled_while_waiting_queues(pair: Pair, how: str) -> None:
    target = replicate(pair, mode="tolerant")
    conn = warm(pair)
    if how != "cancel":
        conn.execute(f"SET {how} = '100ms'")
    with pair.target.frozen():
        with within(0.7 + SLACK):
            writing = start(conn, "INSERT INTO t VALUES (1, 'x')")
            if how == "cancel":
                waiting = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
                wait_until(lambda: pair.source.admin(waiting, [conn.info.backend_pid]))
                assert pair.source.admin("SELECT pg_cancel_backend(%s)", [conn.info.backend_pid]) == [(True,)]
            writing.result(3)
        assert pair.source.rows("t") == ["(0,warm)", "(1,x)"]
        assert pair.status(target) == "queueing"
    assert_heals(pair, target)


def test_a_canceled_sync_writer_does_not_give_up_before_the_fate_of_its_message_is_known(pair: Pair) -> None:
    replicate(pair, mode="sync", timeout="3 s")
    conn = warm(pair)
    with pair.target.frozen():
        writing = start(conn, "INSERT INTO t VALUES (1, 'x')")
        waiting = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
        wait_until(lambda: pair.source.admin(waiting, [conn.info.backend_pid]))
        pair.source.admin("SELECT pg_cancel_backend(%s)", [conn.info.backend_pid])
        wait_until(lambda: pair.source.admin(waiting, [conn.info.backend_pid]))
        assert not writing.done()
    writing.result(3)  # the target has it, so the commit goes through
    assert "(1,x)" in pair.source.rows("t")
    pair.assert_same("t")


def test_concurrent_tolerant_writers_wait_for_a_hung_target_at_the_same_time(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    conns = [warm_session(pair, n) for n in range(4)]
    with pair.target.frozen():
        begin = time.monotonic()
        done = [
            in_background(lambda n=n, c=c: c.execute(f"UPDATE t SET v = 'x' WHERE id = {n}"))
            for n, c in enumerate(conns)
        ]
        for future in done:
            future.result(5)
        assert time.monotonic() - begin <= 0.7 + SLACK
        assert_queues_at_once(pair, target)
    assert_heals(pair, target)


def warm_session(pair: Pair, number: int) -> psycopg.Connection:
    conn = pair.source.connect()
    conn.execute(f"INSERT INTO t VALUES ({number}, 'warm')")
    return conn


@pytest.mark.plain_target
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_cancel_behind_the_sending_undoes_nothing(pair: Pair, mode: str, rows: int) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode=mode)
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'a'), (2, 'a')")
    # the first time, it takes long to note what was shipped
    pair.source.admin(
        """
        CREATE SEQUENCE turn;
        CREATE FUNCTION rest() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$ BEGIN IF nextval('public.turn') = 1 THEN PERFORM pg_sleep(50); END IF; RETURN NEW; END $$;
        CREATE TRIGGER rest BEFORE INSERT OR UPDATE ON tbl_repl.shipped FOR EACH ROW EXECUTE FUNCTION rest()
        """
    )
    writing = start(conn, f"UPDATE t SET v = 'b' WHERE id <= {rows}")
    wait_until(lambda: pair.source.admin("SELECT last_value FROM turn WHERE is_called") == [(1,)])
    wait_until(lambda: pair.target.one("SELECT count(*) FROM t WHERE v = 'b'") == rows)
    pair.source.admin("SELECT pg_cancel_backend(%s)", [conn.info.backend_pid])
    writing.result(10)
    assert pair.source.one("SELECT count(*) FROM t WHERE v = 'b'") == rows
    pair.assert_same("t")


def test_a_drainer_that_is_killed_leaves_no_batch_behind_that_takes_effect_later(pair: Pair) -> None:
    """The next one has a connection of its own already, and need not look who was there before."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target = pair.add_target("t", mode="async", timeout="20 s")
    pair.source.sql("INSERT INTO t VALUES (1, 'a')")
    first, second = pair.source.connect(), pair.source.connect()
    first.execute("SELECT tbl_repl.replay()")
    backends = set(pair.target.backends(f"tbl_repl % {first.info.backend_pid}.%"))
    pair.source.sql("UPDATE t SET v = 'b'")
    second.execute("SELECT tbl_repl.replay()")
    pair.source.sql("UPDATE t SET v = 'old'")
    for pid in backends:
        os.kill(pid, signal.SIGSTOP)
    try:
        running = start(first, "SELECT tbl_repl.replay()")
        wait_until(
            lambda: pair.source.admin(
                "SELECT pid FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'",
                [first.info.backend_pid],
            )
        )
        pair.source.admin("SELECT pg_terminate_backend(%s)", [first.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            running.result(10)
        pair.source.sql("UPDATE t SET v = 'new'")
        second.execute("SELECT tbl_repl.replay()")
    finally:
        for pid in backends:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not backends & set(pair.target.backends()))
    pair.assert_same("t")
    assert pair.pending(target) == 0


def test_a_cancelled_replay_ends_although_the_line_is_silent(pair: Pair, proxy: Proxy) -> None:
    """Also one that has a statement_timeout, which fires once: nothing may be connected anew then."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode="async", timeout="3 s")
    pair.source.sql("INSERT INTO t VALUES (1, 'a')")
    conn = pair.source.connect()
    conn.execute("CALL tbl_repl.drain()")
    pair.source.sql("UPDATE t SET v = 'b'")
    proxy.set("blackhole")
    conn.execute("SET statement_timeout = '500ms'")
    with within(3.5), pytest.raises(errors.QueryCanceled):
        conn.execute("SELECT tbl_repl.replay()")
    proxy.set("pass")
    proxy.cut()
    conn.execute("SET statement_timeout = 0")
    conn.execute("CALL tbl_repl.drain()")
    pair.assert_same("t")


# --- a table that is locked there is nobody else's affair ---------------------------------------------


@pytest.mark.once
def test_a_paused_target_whose_table_is_locked_delays_no_fresh_session(pair: Pair) -> None:
    """It shares the connection with the others, which a fresh session has to open and prepare."""
    for name, mode in (("a", "sync"), ("b", "tolerant"), ("t", "sync"), ("u", "tolerant")):
        target = replicate(pair, name, mode=mode, timeout="2 s")
        if name in "ab":
            pair.call("pause_target", target_id=target)
    with pair.target.connect() as lock, lock.transaction():
        lock.execute("LOCK TABLE a, b")
        for name in "tu":
            with within(1):
                pair.source.fresh(f"INSERT INTO {name} VALUES (1, 'x')")
        assert (
            pair.source.sql("SELECT source_table::text FROM tbl_repl.target_status WHERE status = 'queueing'")
            == []
        )
    pair.assert_same("t")
    pair.assert_same("u")


@pytest.mark.once
@pytest.mark.parametrize("other", ["another table", "the same table"])
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_a_locked_table_does_not_fail_the_sync_target_beside_it(pair: Pair, mode: str, other: str) -> None:
    replicate(pair, mode="sync", timeout="2 s")
    if other == "the same table":
        pair.target.sql("CREATE TABLE locked (LIKE t INCLUDING ALL)")
        if mode == "sync":
            return  # then it is waited for, as it has to be
        pair.add_target("t", dst_table="locked", mode=mode, timeout="2 s")
    else:
        replicate(pair, "locked", mode=mode, timeout="2 s")
    with pair.target.connect() as lock, lock.transaction():
        lock.execute("LOCK TABLE locked")
        for n in range(2):
            with within(2 + SLACK if n == 0 and other == "the same table" else 1):
                pair.source.fresh(f"INSERT INTO t VALUES ({n}, 'x')")
    pair.assert_same("t")


@pytest.mark.once
def test_a_sync_writer_is_told_of_the_lock_also_beside_a_tolerant_target(pair: Pair) -> None:
    replicate(pair, mode="sync", timeout="1 s")
    pair.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    pair.add_target("t", dst_table="u", mode="tolerant", timeout="1 s")
    conn = warm(pair)
    with pair.target.connect() as lock, lock.transaction():
        lock.execute("SELECT FROM t FOR UPDATE")
        with within(1 + SLACK), pytest.raises(errors.LockNotAvailable):
            conn.execute("UPDATE t SET v = 'y'")
