"""Persistent connections to the targets: kept, prepared, noticed when dead, renewed when told to."""

from __future__ import annotations

import re

import psycopg
import pytest
from psycopg import errors

from support import Pair, wait_until
from support.background import start
from support.tables import MODES, replicate, transaction


def healthy(pair: Pair) -> bool:
    return (
        pair.source.sql("SELECT sqlstate FROM tbl_repl.error_log") == []
        and pair.source.sql("SELECT 1 FROM tbl_repl.target_status WHERE status <> 'ok'") == []
    )


def test_a_session_keeps_one_connection_for_all_targets_of_a_server(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.both("CREATE TABLE u (id integer PRIMARY KEY)")
    pair.add_target("u", mode="tolerant")
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    mine = f"tbl_repl % {conn.info.backend_pid}.%"
    [pid] = pair.target.backends(mine)
    for n in range(2, 5):
        conn.execute(f"INSERT INTO t VALUES ({n}, 'x'); INSERT INTO u VALUES ({n})")
    assert pair.target.backends(mine) == [pid]
    conn.close()
    wait_until(lambda: pair.target.backends(mine) == [])


def test_single_rows_go_through_prepared_statements(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.target.admin(f"ALTER DATABASE {pair.target.dbname} SET log_statement = 'all'")
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    mark = pair.target.cluster.log_size()
    conn.execute("UPDATE t SET v = 'y'")
    conn.execute("DELETE FROM t")
    log = pair.target.cluster.log(mark)
    assert re.search(r"EXECUTE tbl_repl_u1_\d+ \(\d+\.\d+, '1', 'y'\)", log)
    assert re.search(r"EXECUTE tbl_repl_d1_\d+ \('\d+\.\d+', '1'\)", log)
    assert "statement: PREPARE" not in log


def test_a_session_on_the_target_notices_within_a_minute_that_its_writer_is_lost(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    [idle, interval, count] = conn.execute(
        "SELECT v FROM unnest(dblink_get_connections()) c, unnest('{idle,interval,count}'::text[]) WITH ORDINALITY s (name, n),"
        " dblink(c, format('SHOW tcp_keepalives_%s', name)) AS r (v integer) ORDER BY n"
    ).fetchall()
    assert 0 < idle[0] + interval[0] * count[0] <= 60


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 1500])
def test_a_killed_idle_connection_is_noticed_and_opened_again(pair: Pair, mode: str, rows: int) -> None:
    replicate(pair, mode=mode)
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (0, 'x')")
    for pid in pair.target.backends():
        pair.target.admin("SELECT pg_terminate_backend(%s, 5000)", [pid])
    conn.execute(f"INSERT INTO t SELECT g, 'y' FROM generate_series(1, {rows}) g")
    pair.assert_same("t")
    assert healthy(pair)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 1500])
def test_a_restarted_target_is_noticed_and_connected_to_again(pair: Pair, mode: str, rows: int) -> None:
    replicate(pair, mode=mode)
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (0, 'x')")
    pair.target.stop("immediate")
    pair.target.start()
    conn.execute(f"INSERT INTO t SELECT g, 'y' FROM generate_series(1, {rows}) g")
    pair.assert_same("t")
    assert healthy(pair)


def test_killed_connections_to_several_sync_targets_are_opened_again(trio: Pair) -> None:
    assert trio.third
    replicate(trio, mode="sync")
    trio.add_target("t", trio.third_server, mode="sync")
    conn = trio.source.connect()
    conn.execute("INSERT INTO t VALUES (0, 'x')")
    for node in (trio.target, trio.third):
        for pid in node.backends():
            node.admin("SELECT pg_terminate_backend(%s, 5000)", [pid])
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    trio.assert_same("t")
    trio.assert_same("t", there=trio.third)


def test_a_connection_cut_on_the_way_is_opened_again(pair: Pair) -> None:
    proxy = pair.proxy()
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (0, 'x')")
    proxy.cut()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    pair.assert_same("t")


def test_an_error_of_the_target_leaves_the_connection_in_use(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    mine = f"tbl_repl % {conn.info.backend_pid}.%"
    before = pair.target.backends(mine)
    with pytest.raises(errors.CheckViolation):
        conn.execute("UPDATE t SET v = 'bad'")
    conn.execute("UPDATE t SET v = 'y'")
    assert pair.target.backends(mine) == before
    assert pair.target.admin("SELECT state FROM pg_stat_activity WHERE pid = %s", before) == [("idle",)]
    pair.assert_same("t")


def test_alter_target_takes_effect_in_sessions_with_an_old_connection(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.target.sql("CREATE TABLE u (id integer PRIMARY KEY, v text)")
    conn = pair.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    pair.call("alter_target", target_id=target, column_map={"v": "upper(v)"})
    conn.execute("INSERT INTO t VALUES (2, 'masked')")
    assert pair.target.rows("t", where="id = 2") == ["(2,MASKED)"]
    pair.call("alter_target", target_id=target, dst_table="u")
    conn.execute("INSERT INTO t VALUES (3, 'elsewhere')")
    assert pair.target.rows("t", where="id = 3") == []
    assert pair.target.rows("u", where="id = 3") == ["(3,ELSEWHERE)"]
    pair.call("alter_target", target_id=target, row_filter="id < 100")
    conn.execute("INSERT INTO t VALUES (4, 'x'), (400, 'x')")
    assert pair.target.rows("u", where="id >= 4") == ["(4,X)"]
    pair.call("alter_target", target_id=target, mode="async")
    conn.execute("INSERT INTO t VALUES (5, 'x')")
    assert pair.target.rows("u", where="id = 5") == []
    assert pair.pending(target) == 1


def test_a_server_that_was_moved_is_followed_by_sessions_with_an_old_connection(trio: Pair) -> None:
    assert trio.third
    replicate(trio, mode="sync")
    conn = trio.source.connect()
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    trio.source.sql(
        f"ALTER SERVER {trio.server} OPTIONS (SET port '{trio.third.cluster.port}', SET dbname '{trio.third.dbname}')"
    )
    conn.execute("INSERT INTO t VALUES (2, 'x')")
    assert trio.target.rows("t") == ["(1,x)"]
    assert trio.third.rows("t") == ["(2,x)"]


def test_settings_of_the_target_role_do_not_change_what_arrives(pair: Pair) -> None:
    columns = "id integer PRIMARY KEY, d date, i interval, ts timestamptz, b bytea, f float8"
    pair.both(f"CREATE TABLE t ({columns})")
    pair.add_target("t", mode="sync")
    pair.target.admin(
        f"ALTER ROLE owner IN DATABASE {pair.target.dbname} SET DateStyle = 'SQL, DMY';"
        f"ALTER ROLE owner IN DATABASE {pair.target.dbname} SET IntervalStyle = 'iso_8601';"
        f"ALTER ROLE owner IN DATABASE {pair.target.dbname} SET TimeZone = 'Asia/Tokyo';"
        f"ALTER ROLE owner IN DATABASE {pair.target.dbname} SET standard_conforming_strings = off"
        if pair.major < 19
        else "SELECT"
    )
    conn = pair.source.connect()
    conn.execute(
        "SET DateStyle = 'German'; SET IntervalStyle = 'sql_standard'; SET extra_float_digits = 0; SET TimeZone = 'America/Lima'; SET bytea_output = 'escape'"
    )
    conn.execute(
        r"INSERT INTO t VALUES (1, '05.04.2026', '1 year -2 days', '01.02.2026 03:04:05+00', '\x00ff5c27', 0.1::float8 + 0.2)"
    )
    query = "SELECT id, d = '2026-04-05', i = '1 year -2 days', extract(epoch FROM ts) = 1769915045, b = '\\x00ff5c27'::bytea, f = 0.1::float8 + 0.2 FROM t"
    assert pair.target.admin(query) == [(1, True, True, True, True, True)]


def test_what_a_session_leaves_in_our_setting_fails_no_commit(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    for word in ("nonsense", "7", "99999999999/1", "/"):
        conn.execute("SELECT set_config('tbl_repl.spins_in_vain', %s, false)", [word])
        conn.execute("INSERT INTO t VALUES ((SELECT count(*) FROM t), %s)", [word])
    pair.assert_same("t")


def test_waiting_that_fails_leaves_no_lock_behind(pair: Pair) -> None:
    conn = pair.source.connect()
    with pytest.raises(errors.ConnectionDoesNotExist):
        conn.execute("SELECT tbl_repl._receive('gone', clock_timestamp() + interval '1 second')")
    held = conn.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
    assert held.fetchall() == []


@pytest.mark.once
@pytest.mark.parametrize("verb", ["compare_target", "repair_target", "protect_target"])
def test_a_verb_opens_a_connection_that_died_while_it_was_idle(pair: Pair, verb: str) -> None:
    target = replicate(pair, mode="sync")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    for pid in pair.target.backends("tbl_repl%"):
        pair.target.admin("SELECT pg_terminate_backend(%s)", [pid])
    wait_until(lambda: pair.target.backends("tbl_repl%") == [])
    pair.source.sql(f"SELECT tbl_repl.{verb}({target})")


def test_a_rule_on_the_target_says_why_a_deletion_cannot_arrive(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.target.sql("CREATE RULE nothing AS ON DELETE TO t DO INSTEAD NOTHING")
    for session in (pair.source.connect(), pair.source.connect()):
        session.execute("INSERT INTO t VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET v = 'y'")
        for _ in range(2):
            with pytest.raises(errors.FeatureNotSupported, match="DELETE RETURNING"):
                session.execute("DELETE FROM t")


def test_why_nobody_is_let_in_is_told_by_the_status(pair: Pair) -> None:
    replicate(pair, mode="tolerant")
    pair.source.admin(f"ALTER USER MAPPING FOR owner SERVER {pair.server} OPTIONS (SET password 'wrong')")
    pair.source.fresh("INSERT INTO t VALUES (1, 'x')")
    assert "password authentication failed" in pair.source.one(
        "SELECT last_error FROM tbl_repl.target_status"
    )


def test_the_log_of_errors_has_sql_that_people_can_read(pair: Pair) -> None:
    replicate(pair, mode="tolerant")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    pair.source.sql("INSERT INTO t VALUES (1, 'good')")
    pair.source.sql("UPDATE t SET v = 'bad'")
    statement = pair.source.one("SELECT statement FROM tbl_repl.error_log")
    assert statement.startswith("INSERT INTO public.t") and "'bad'" in statement


def refused(pair: Pair, statement: str) -> psycopg.errors.Diagnostic:
    with pytest.raises(errors.SqlclientUnableToEstablishSqlconnection) as caught:
        pair.source.fresh(statement)
    return caught.value.diag


@pytest.mark.once
def test_who_is_not_let_in_is_told_by_which_server_why_and_what_to_do(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.source.sql(f"ALTER USER MAPPING FOR owner SERVER {pair.server} OPTIONS (SET password 'wrong')")
    for statement in (
        "INSERT INTO t VALUES (1, 'x')",
        f"SELECT tbl_repl.add_target('t', '{pair.server}', 'u')",
        f"SELECT * FROM tbl_repl.compare_target({target})",
    ):
        said = refused(pair, statement)
        assert said.message_primary == f"could not connect to server {pair.server}"
        assert "password authentication failed" in (said.message_detail or "")
        assert "user mapping" in (said.message_hint or "")
        assert (f"pause_target({target})" in (said.message_hint or "")) == statement.startswith("INSERT")


@pytest.mark.once
def test_a_session_that_is_lost_while_it_prepares_is_opened_again(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    ours = "application_name LIKE 'tbl_repl%' AND wait_event_type = 'Lock' AND datname = current_database()"
    with pair.source.connect() as writer, transaction(pair.target) as other:
        writer.execute("UPDATE t SET v = 'y'")
        pair.call("alter_target", target_id=target)  # the writer's next statement is to be prepared again
        other.execute("LOCK TABLE t")
        writing = start(writer, "UPDATE t SET v = 'z'")
        wait_until(
            lambda: pair.target.admin(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
        )
        other.execute("ROLLBACK")
        writing.result(10)
    assert pair.target.rows("t") == ["(1,z)"]
