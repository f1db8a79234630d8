"""Direct modes: what is shipped at COMMIT, and what never is."""

from __future__ import annotations

import os
import signal

import psycopg
import pytest
from psycopg import errors

from support import Node, Pair, Proxy, wait_until
from support.background import in_background, start, within
from support.tables import MANY, MODES, assert_shipped_directly, errors_of, replicate, transaction

# --- sync: both sides or neither -------------------------------------------------------------------


def test_a_sync_failure_has_the_remote_sqlstate_message_detail_and_hint(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.target.sql(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION USING ERRCODE = 'P0042', MESSAGE = 'not here: "x"', DETAIL = 'the reason', HINT = 'the cure';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON t FOR EACH ROW WHEN (NEW.v = 'bad') EXECUTE FUNCTION refuse()
        """
    )
    with pytest.raises(psycopg.Error) as caught:
        pair.source.sql("INSERT INTO t VALUES (1, 'bad')")
    diag = caught.value.diag
    assert (diag.sqlstate, diag.message_primary) == ("P0042", 'not here: "x"')
    assert (diag.message_detail, diag.message_hint) == ("the reason", "the cure")
    assert pair.source.rows("t") == pair.target.rows("t") == []
    pair.source.sql("INSERT INTO t VALUES (1, 'good')")
    assert pair.target.rows("t") == ["(1,good)"]


@pytest.mark.parametrize("rows", [1, MANY])
def test_a_sync_failure_names_the_server(pair: Pair, rows: int) -> None:
    replicate(pair, mode="sync")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    with pytest.raises(errors.CheckViolation) as caught:
        pair.source.sql("INSERT INTO t SELECT g, 'bad' FROM generate_series(1, %s) AS g", [rows])
    assert pair.server in str(caught.value.diag.message_detail) or "bad" in str(
        caught.value.diag.message_detail
    )
    assert "rolled back" in str(caught.value.diag.message_hint)


def test_a_sync_failure_leaves_nothing_half_done_on_either_side(pair: Pair) -> None:
    replicate(pair, "a", mode="sync")
    replicate(pair, "b", mode="sync")
    pair.target.sql("ALTER TABLE b ADD CHECK (v <> 'bad')")
    with pytest.raises(errors.CheckViolation):
        pair.source.sql("INSERT INTO a VALUES (1, 'x'), (2, 'x'); INSERT INTO b VALUES (1, 'x'), (2, 'bad')")
    for table in ("a", "b"):
        assert pair.source.rows(table) == pair.target.rows(table) == []


def test_a_missing_table_on_the_target_is_told_as_such(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.target.sql("DROP TABLE t")
    with pytest.raises(errors.UndefinedTable, match='relation "public.t" does not exist'):
        pair.source.fresh("INSERT INTO t VALUES (1, 'x')")


def constrain(node: Node, deferred: str) -> None:
    """Row values 'bad' are refused, at once or at the node's own commit."""
    if deferred == "at once":
        node.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    else:
        node.sql(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RAISE check_violation USING MESSAGE = 'refused at commit'; END $$;
            CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON t DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW WHEN (NEW.v = 'bad') EXECUTE FUNCTION refuse()
            """
        )


@pytest.mark.once
@pytest.mark.parametrize("refused", ["at once", "deferred"])
@pytest.mark.parametrize("rows", [2, MANY])
@pytest.mark.parametrize("bad_one", ["target", "third"])
def test_several_sync_targets_have_a_transaction_all_or_none(
    trio: Pair, rows: int, refused: str, bad_one: str
) -> None:
    assert trio.third
    replicate(trio, mode="sync")
    trio.add_target("t", trio.third_server, mode="sync")
    constrain(trio.target if bad_one == "target" else trio.third, refused)
    trio.source.sql(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
    trio.assert_same("t")
    trio.assert_same("t", there=trio.third)
    with pytest.raises(errors.CheckViolation):
        trio.source.sql("UPDATE t SET v = CASE id WHEN 2 THEN 'bad' ELSE 'y' END")
    assert trio.source.one("SELECT count(*) FROM t WHERE v = 'x'") == rows
    trio.assert_same("t")
    trio.assert_same("t", there=trio.third)
    # and nothing is left open on a connection
    trio.source.sql("UPDATE t SET v = 'z' WHERE id = 1")
    trio.assert_same("t")
    trio.assert_same("t", there=trio.third)


@pytest.mark.parametrize("rows", [2, MANY])
@pytest.mark.parametrize("shared", [True, False], ids=["one server", "two servers"])
def test_a_tolerant_target_does_not_fail_a_sync_one_in_the_same_transaction(
    trio: Pair, shared: bool, rows: int
) -> None:
    there = trio.target if shared else trio.third
    assert there
    sync = replicate(trio, "a", mode="sync")
    tolerant = replicate(trio, "b", mode="tolerant", server=trio.server if shared else trio.third_server)
    there.sql("ALTER TABLE b ADD CHECK (v <> 'bad')")
    write = f"INSERT INTO a SELECT g, 'x' FROM generate_series(1, {rows}) g; INSERT INTO b SELECT g, 'bad' FROM generate_series(1, {rows}) g"
    trio.source.sql(write)
    trio.assert_same("a")
    assert there.rows("b") == []
    assert trio.status(sync) == "ok"
    assert trio.status(tolerant) == "queueing"
    assert trio.pending(tolerant) == rows
    assert errors_of(trio)[0][0] == "23514"
    there.sql("ALTER TABLE b DROP CONSTRAINT b_v_check")
    trio.drain()
    trio.assert_same("b", there=there)
    assert trio.status(tolerant) == "ok"


@pytest.mark.parametrize("rows", [2, MANY])
@pytest.mark.parametrize("shared", [True, False], ids=["one server", "two servers"])
def test_a_sync_failure_reaches_no_tolerant_target(trio: Pair, shared: bool, rows: int) -> None:
    there = trio.target if shared else trio.third
    assert there
    replicate(trio, "b", mode="tolerant", server=trio.server if shared else trio.third_server)
    replicate(trio, "a", mode="sync")
    trio.target.sql("ALTER TABLE a ADD CHECK (v <> 'bad')")
    with pytest.raises(errors.CheckViolation):
        trio.source.sql(
            f"INSERT INTO b SELECT g, 'x' FROM generate_series(1, {rows}) g;"
            f"INSERT INTO a SELECT g, 'bad' FROM generate_series(1, {rows}) g"
        )
    assert trio.source.rows("b") == there.rows("b") == []
    assert_shipped_directly(trio)


def test_a_bad_tolerant_target_does_not_queue_for_its_neighbours_on_the_server(pair: Pair) -> None:
    good = replicate(pair, "a", mode="tolerant")
    bad = replicate(pair, "b", mode="tolerant")
    pair.target.sql("ALTER TABLE b ADD CHECK (v <> 'bad')")
    pair.source.sql("INSERT INTO a VALUES (1, 'x'); INSERT INTO b VALUES (1, 'bad')")
    assert pair.target.rows("a") == ["(1,x)"]
    assert (pair.status(good), pair.status(bad)) == ("ok", "queueing")


# --- tolerant: succeed and queue -------------------------------------------------------------------


def test_a_tolerant_failure_is_logged_and_queued_with_the_sql_in_order(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT no_bad CHECK (v <> 'bad')")
    pair.source.sql("INSERT INTO t VALUES (1, 'bad')")
    assert pair.source.rows("t") == ["(1,bad)"]
    assert pair.target.rows("t") == []
    [(target_id, key, sqlstate, message, statement)] = pair.source.sql(
        "SELECT target_id, key, sqlstate, message, statement FROM tbl_repl.error_log"
    )
    assert (target_id, key, sqlstate) == (target, None, "23514")
    assert 'violates check constraint "no_bad"' in message
    assert "bad" in statement
    [(status, pending, last_error, logged)] = pair.source.sql(
        "SELECT status, pending_rows, last_error, last_error_at IS NOT NULL AND oldest_pending_at IS NOT NULL FROM tbl_repl.target_status"
    )
    assert (status, pending, logged) == ("queueing", 1, True)
    assert last_error == f"23514: {message}"

    # Later changes queue behind it, although the target would take them.
    pair.source.sql("INSERT INTO t VALUES (2, 'it''s good')")
    pair.source.sql("DELETE FROM t WHERE id = 1")
    assert pair.target.rows("t") == []
    assert len(errors_of(pair)) == 1
    queued = pair.source.sql(
        "SELECT id, nsp_name, table_name, dst_server, dst_query FROM tbl_repl.sync_err_rec ORDER BY id"
    )
    assert [row[:4] for row in queued] == [(n, "public", "t", pair.server) for n in (1, 2, 3)]
    first, second, third = (row[4] for row in queued)
    # What a replay will run is the present state: row 1 is gone meanwhile.
    assert first == third
    assert first.startswith("DELETE FROM public.t") and "'{1}'" in first
    assert second.startswith("INSERT INTO public.t") and "it''s good" in second
    for statement in (first, second, third):
        pair.target.sql(statement)
    pair.assert_same("t")

    pair.drain()
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)
    assert pair.source.sql("SELECT 1 FROM tbl_repl.sync_err_rec") == []
    pair.source.sql("INSERT INTO t VALUES (3, 'direct again')")
    pair.assert_same("t")


ASSERT = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        ASSERT NEW.v <> 'bad', 'must not be';
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION refuse()
"""


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, MANY])
def test_a_failed_assertion_of_a_target_is_an_error_like_any_other(trio: Pair, rows: int) -> None:
    """PL/pgSQL's OTHERS does not catch it."""
    replicate(trio)
    second = trio.add_target("t", server=trio.third_server)
    trio.third.sql(ASSERT)
    trio.source.sql("INSERT INTO t SELECT g, 'bad' FROM generate_series(1, %s) AS g", [rows])
    trio.assert_same("t")
    assert errors_of(trio) == [("P0004", "must not be")]
    assert trio.status(second) == "queueing"
    trio.source.sql("INSERT INTO t VALUES (0, 'good')")
    trio.drain()
    assert trio.third.rows("t") == ["(0,good)"]
    assert trio.source.one("SELECT count(*) FROM tbl_repl.quarantine WHERE sqlstate = 'P0004'") == rows


@pytest.mark.once
@pytest.mark.parametrize("where", ["map", "filter"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_failed_assertion_in_an_expression_does_not_fail_the_writer(
    pair: Pair, mode: str, where: str
) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql(
        """
        CREATE FUNCTION checked(v text) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN
            ASSERT v <> 'bad', 'must not be';
            RETURN v;
        END $$
        """
    )
    chosen = {"column_map": '{"v": "checked(v)"}'} if where == "map" else {"row_filter": "checked(v) <> ''"}
    pair.add_target("t", mode=mode, **chosen)
    pair.source.sql("INSERT INTO t VALUES (1, 'bad'), (2, 'good')")
    pair.drain()
    assert pair.target.rows("t") == ["(2,good)"]
    assert pair.source.sql("SELECT key, sqlstate FROM tbl_repl.quarantine") == [({"id": 1}, "P0004")]


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 20, MANY])
@pytest.mark.parametrize("mode", MODES)
def test_a_table_dropped_by_the_transaction_that_has_written_it_fails_nobody(
    pair: Pair, mode: str, rows: int
) -> None:
    replicate(pair, mode=mode)
    replicate(pair, "u", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (0, 'before')")
    pair.source.sql(
        f"INSERT INTO t SELECT g, 'gone' FROM generate_series(1, {rows}) AS g;"
        " INSERT INTO u VALUES (1, 'x'); DROP TABLE t"
    )
    pair.assert_same("u")
    assert errors_of(pair) == []
    assert pair.source.one("SELECT sum(pending_rows) FROM tbl_repl.target_status") == 0


def test_large_tolerant_transactions_fail_and_queue_as_well(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT no_bad CHECK (v <> 'bad')")
    pair.source.sql(
        f"INSERT INTO t SELECT g, CASE g WHEN 7 THEN 'bad' ELSE 'x' END FROM generate_series(1, {MANY}) g"
    )
    assert pair.target.rows("t") == []
    assert errors_of(pair)[0][0] == "23514"
    assert (pair.status(target), pair.pending(target)) == ("queueing", MANY)


# --- nothing that was rolled back ------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_rollback_reaches_no_target(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("UPDATE t SET v = 'y'")
    conn.execute("INSERT INTO t VALUES (2, 'y')")
    conn.execute("ROLLBACK")
    conn.execute("UPDATE t SET v = 'z' WHERE false")
    assert pair.target.rows("t") == ["(1,x)"]
    assert_shipped_directly(pair)


@pytest.mark.parametrize("mode", MODES)
def test_rollback_to_savepoint_reaches_no_target(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("SAVEPOINT s")
    conn.execute("UPDATE t SET v = 'undone'")
    conn.execute("ROLLBACK TO s")
    conn.execute("UPDATE t SET v = 'kept' WHERE id = 1")
    conn.execute("SAVEPOINT s2")
    conn.execute("DELETE FROM t")
    conn.execute("ROLLBACK TO s2")
    conn.execute("COMMIT")
    assert pair.target.rows("t") == ["(1,kept)", "(2,x)"]
    assert_shipped_directly(pair)


@pytest.mark.parametrize("mode", MODES)
def test_a_transaction_whose_only_write_was_in_a_savepoint_rolled_back_ships_nothing(
    pair: Pair, mode: str
) -> None:
    replicate(pair, mode=mode)
    pair.source.forget()
    wait_until(lambda: not pair.target.backends())
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("SAVEPOINT s")
    conn.execute("INSERT INTO t VALUES (1, 'undone')")
    conn.execute("ROLLBACK TO s")
    conn.execute("COMMIT")
    assert pair.target.rows("t") == []
    assert pair.target.backends() == []


@pytest.mark.parametrize("mode", MODES)
def test_what_an_exception_block_undoes_reaches_no_target(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    pair.source.sql(
        """
        DO $$
        BEGIN
            INSERT INTO t VALUES (1, 'kept');
            BEGIN
                INSERT INTO t VALUES (2, 'undone');
                UPDATE t SET v = 'undone';
                PERFORM 1 / 0;
            EXCEPTION WHEN division_by_zero THEN
                INSERT INTO t VALUES (3, 'from the handler');
            END;
        END $$
        """
    )
    assert pair.target.rows("t") == ["(1,kept)", '(3,"from the handler")']
    assert_shipped_directly(pair)


DEFERRED = {
    "foreign key": (
        "CREATE TABLE p (id integer PRIMARY KEY);"
        "ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES p DEFERRABLE INITIALLY DEFERRED",
        errors.ForeignKeyViolation,
    ),
    "unique": (
        "ALTER TABLE t ADD UNIQUE (v) DEFERRABLE INITIALLY DEFERRED",
        errors.UniqueViolation,
    ),
    "constraint trigger": (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE check_violation; END $$;"
        "CREATE CONSTRAINT TRIGGER zz AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()",
        errors.CheckViolation,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DEFERRED)
def test_a_failed_deferred_constraint_reaches_no_target(pair: Pair, kind: str, mode: str) -> None:
    replicate(pair, mode=mode)
    ddl, error = DEFERRED[kind]
    pair.source.sql(ddl)
    with pytest.raises(error):
        pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    assert pair.source.rows("t") == pair.target.rows("t") == []


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 2, 4, 9])
def test_deferred_checks_behind_deferred_triggers_come_before_shipping(
    pair: Pair, depth: int, mode: str
) -> None:
    """A deferred trigger writes another table, whose deferred trigger writes the next; the last one's key fails."""
    replicate(pair, mode=mode)
    ddl = ["CREATE TABLE p (id integer PRIMARY KEY)"]
    for n in range(1, depth + 1):
        key = " REFERENCES p DEFERRABLE INITIALLY DEFERRED" if n == depth else ""
        ddl.append(f"CREATE TABLE s{n} (id integer{key})")
        before = "t" if n == 1 else f"s{n - 1}"
        ddl.append(
            f"CREATE FUNCTION step{n}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO s{n} VALUES (NEW.id); RETURN NULL; END $$"
        )
        ddl.append(
            f"CREATE CONSTRAINT TRIGGER step AFTER INSERT ON {before} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION step{n}()"
        )
    pair.source.sql(";".join(ddl))
    with pytest.raises(errors.ForeignKeyViolation):
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    assert pair.target.rows("t") == []
    pair.source.sql("INSERT INTO p VALUES (1); INSERT INTO t VALUES (1, 'x')")
    pair.assert_same("t")


@pytest.mark.parametrize("mode", MODES)
def test_what_a_deferred_trigger_writes_is_shipped_in_the_same_transaction(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    replicate(pair, "log", mode=mode)
    pair.source.sql(
        """
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO log VALUES (NEW.id, 'noted'); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER note AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note()
        """
    )
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    assert pair.target.rows("log") == ["(1,noted)"]
    xmins = {pair.target.one(f"SELECT xmin::text FROM {table}") for table in ("t", "log")}
    assert len(xmins) == 1
    assert_shipped_directly(pair)


# --- early SET CONSTRAINTS -------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before", "after", "twice"])
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_set_constraints_all_immediate_ships_nothing_before_commit(
    pair: Pair, when: str, end: str, mode: str
) -> None:
    replicate(pair, mode=mode)
    conn = pair.source.connect()
    conn.execute("BEGIN")
    if when != "after":
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    if when != "before":
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert pair.target.rows("t") == []
    conn.execute("INSERT INTO t VALUES (2, 'x')")
    assert pair.target.rows("t") == []
    conn.execute(end)
    assert pair.target.rows("t") == (["(1,x)", "(2,x)"] if end == "COMMIT" else [])
    assert_shipped_directly(pair)


def test_set_constraints_inside_a_function_ships_nothing_before_commit(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute(
        """
        DO $$
        BEGIN
            INSERT INTO t VALUES (1, 'x');
            SET CONSTRAINTS ALL IMMEDIATE;
            INSERT INTO t VALUES (2, 'x');
            SET CONSTRAINTS ALL IMMEDIATE;
        END $$
        """
    )
    assert pair.target.rows("t") == []
    conn.execute("ROLLBACK")
    assert pair.target.rows("t") == []


def test_after_set_constraints_the_last_deferred_check_still_comes_first(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.source.sql(
        "CREATE TABLE p (id integer PRIMARY KEY);"
        "ALTER TABLE t ADD CONSTRAINT fk FOREIGN KEY (id) REFERENCES p DEFERRABLE INITIALLY DEFERRED"
    )
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    conn.execute("SET CONSTRAINTS fk DEFERRED")
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    with pytest.raises(errors.ForeignKeyViolation):
        conn.execute("COMMIT")
    assert pair.target.rows("t") == []


# --- late messages ---------------------------------------------------------------------------------


def session_with_connection(pair: Pair) -> tuple[psycopg.Connection, int]:
    """A session that has shipped already, and its backend on the target."""
    before = set(pair.target.backends())
    conn = pair.source.connect()
    conn.execute("UPDATE t SET v = v || '' WHERE id = 1")
    [pid] = set(pair.target.backends()) - before
    return conn, pid


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def thaw(node: Node, pid: int) -> None:
    """Let it go on, and wait until it has worked off what it has got and found its client gone."""
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not node.admin("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]))


@pytest.mark.parametrize("rows", [1, MANY])
def test_a_late_message_of_a_tolerant_writer_does_not_overwrite_a_newer_value(pair: Pair, rows: int) -> None:
    target = replicate(pair, mode="tolerant", timeout="600 ms")
    pair.source.sql(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
    writer, pid = session_with_connection(pair)
    freeze(pid)
    try:
        with within(1.6):
            writer.execute("UPDATE t SET v = 'old'")
        assert pair.status(target) == "queueing"
        pair.source.sql("UPDATE t SET v = 'new'")
        pair.drain()
        pair.assert_same("t")
    finally:
        thaw(pair.target, pid)
    assert pair.source.one("SELECT DISTINCT v FROM t") == "new"
    pair.assert_same("t")
    assert pair.status(target) == "ok"


def set_clock_of_target(conn: psycopg.Connection, seconds: int) -> None:
    """What setting the clock there by so many seconds does to the connections that are open."""
    conn.execute(
        "SELECT dblink_exec(c, format('SET tbl_repl.clock = %%L', x.clock::numeric - %s))"
        " FROM unnest(dblink_get_connections()) AS c, dblink(c, 'SHOW tbl_repl.clock') AS x (clock text)",
        [seconds],
    )


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
@pytest.mark.parametrize("seconds", [3600, -3600])
def test_writers_do_not_notice_that_a_clock_was_set(pair: Pair, mode: str, rows: int, seconds: int) -> None:
    target = replicate(pair, mode=mode)
    pair.source.sql(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
    with pair.source.connect() as conn:
        conn.execute("UPDATE t SET v = 'y'")
        set_clock_of_target(conn, seconds)
        for v in "zab":
            with within(2):
                conn.execute("UPDATE t SET v = %s", [v])
            pair.assert_same("t")
    assert pair.status(target) == "ok"
    assert pair.source.sql("SELECT * FROM tbl_repl.error_log") == []


def test_two_sync_targets_do_not_notice_that_a_clock_was_set(trio: Pair) -> None:
    assert trio.third
    replicate(trio, mode="sync")
    trio.add_target("t", trio.third_server, mode="sync")
    with trio.source.connect() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'x')")
        set_clock_of_target(conn, 3600)
        with within(2):
            conn.execute("UPDATE t SET v = 'y'")
    trio.assert_same("t")
    trio.assert_same("t", there=trio.third)


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_one_large_statement_fails_after_a_clock_was_set(pair: Pair, mode: str) -> None:
    """Several messages cannot be repeated; the connection that follows has measured the clocks anew."""
    target = replicate(pair, mode=mode)
    pair.source.sql(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {MANY}) g")
    with pair.source.connect() as conn:
        conn.execute("UPDATE t SET v = 'y'")
        set_clock_of_target(conn, 3600)
        with within(2):
            if mode == "sync":
                with pytest.raises(errors.ConnectionException, match="too late"):
                    conn.execute("UPDATE t SET v = 'z'")
            else:
                conn.execute("UPDATE t SET v = 'z'")
                assert pair.source.one("SELECT sqlstate FROM tbl_repl.error_log") == "08000"
                pair.drain()
        conn.execute("UPDATE t SET v = 'a'")
    pair.assert_same("t")
    assert pair.status(target) == "ok"


@pytest.mark.parametrize("rows", [1, MANY])
def test_a_late_message_of_a_sync_writer_does_not_overwrite_a_newer_value(pair: Pair, rows: int) -> None:
    replicate(pair, mode="sync", timeout="600 ms")
    pair.source.sql(f"INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) g")
    other, _ = session_with_connection(pair)
    writer, pid = session_with_connection(pair)
    freeze(pid)
    try:
        with within(1.6), pytest.raises(errors.ConnectionFailure, match="did not answer in time"):
            writer.execute("UPDATE t SET v = 'old'")
        other.execute("UPDATE t SET v = 'new'")
        pair.assert_same("t")
    finally:
        thaw(pair.target, pid)
    assert pair.target.one("SELECT DISTINCT v FROM t") == "new"
    pair.assert_same("t")


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_comes_late_does_not_overwrite_a_newer_value(trio: Pair, mode: str) -> None:
    """Several targets: rows first, then all commits.  Third has its rows and is frozen before its commit."""
    third = trio.third
    assert third
    replicate(trio, mode="sync", timeout="600 ms")
    trio.add_target("t", trio.third_server, mode=mode, timeout="600 ms")
    trio.source.sql("INSERT INTO t VALUES (1, 'x')")
    writer = trio.source.connect()
    writer.execute("UPDATE t SET v = 'y'")
    [pid] = set(third.backends()) - set(
        third.backends("%" + f" {trio.source.sql('SELECT pg_backend_pid()')[0][0]}.%")
    )
    # The rows of the first target are held back by a lock meanwhile.
    holder = trio.target.connect()
    holder.execute("BEGIN; SELECT FROM t FOR UPDATE")
    writing = start(writer, "UPDATE t SET v = 'old'")
    idle = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'idle in transaction'"
    wait_until(lambda: third.admin(idle, [pid]))
    freeze(pid)
    try:
        holder.execute("ROLLBACK")
        if mode == "sync":
            with pytest.raises(psycopg.Error):
                writing.result(5)
        else:
            writing.result(5)
            assert trio.target.rows("t") == ["(1,old)"]
    finally:
        thaw(third, pid)
    assert third.rows("t") == ["(1,y)"]
    trio.source.sql("UPDATE t SET v = 'new'")
    trio.drain()
    trio.assert_same("t")
    trio.assert_same("t", there=third)


# --- isolation levels ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_ghost_row_under_repeatable_read_is_not_shipped(pair: Pair, mode: str) -> None:
    """The snapshot still shows a row that another transaction has deleted; it is not our state."""
    replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'ghost'), (2, 'x')")
    conn = pair.source.connect()
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    conn.execute("SELECT FROM t")
    pair.source.sql("DELETE FROM t WHERE id = 1")
    conn.execute("INSERT INTO t VALUES (1, 'short-lived')")
    conn.execute("DELETE FROM t WHERE id = 1 AND v = 'short-lived'")
    conn.execute("COMMIT")
    assert pair.source.rows("t") == ["(2,x)"]
    pair.assert_same("t")
    assert_shipped_directly(pair)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize("savepoint", [False, True])
def test_delete_and_reinsert_on_an_older_snapshot_ships_our_row(
    pair: Pair, mode: str, rows: int, savepoint: bool
) -> None:
    replicate(pair, mode=mode)
    pair.source.sql(f"INSERT INTO t SELECT g, 'ghost' FROM generate_series(1, {rows}) g")
    conn = pair.source.connect()
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    conn.execute("SELECT FROM t")
    pair.source.sql("DELETE FROM t")
    if savepoint:
        conn.execute("SAVEPOINT s")
    conn.execute(f"INSERT INTO t SELECT g, 'ours' FROM generate_series(1, {rows}) g")
    if savepoint:
        conn.execute("RELEASE s")
    conn.execute("COMMIT")
    assert pair.source.one("SELECT count(*) FROM t WHERE v = 'ours'") == rows
    pair.assert_same("t")
    assert_shipped_directly(pair)


def test_a_repeatable_read_writer_with_an_old_view_of_the_status_queues(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT no_bad CHECK (v <> 'bad')")
    conn = pair.source.connect()
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    conn.execute("SELECT FROM t")
    pair.source.sql("UPDATE t SET v = 'bad' WHERE id = 1")
    assert pair.status(target) == "queueing"
    conn.execute("UPDATE t SET v = 'y' WHERE id = 2")
    conn.execute("COMMIT")
    assert pair.target.rows("t") == ["(1,x)", "(2,x)"]
    assert pair.pending(target) == 2


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
def test_a_repeatable_read_writer_waits_for_nobody_who_changes_the_target(pair: Pair, mode: str) -> None:
    """Not for longer than the timeout; who may queue does not wait at all."""
    target = replicate(pair, mode=mode, timeout="1 s")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    with pair.source.connect() as conn, transaction(pair.source) as other:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; UPDATE t SET v = 'y'")
        other.execute("SELECT tbl_repl.pause_target(%s)", [target])
        committing = start(conn, "COMMIT")
        if mode == "sync":
            with pytest.raises(errors.LockNotAvailable):
                committing.result(5)
        else:
            committing.result(0.9)
    assert pair.source.rows("t") == ["(1,x)" if mode == "sync" else "(1,y)"]
    pair.call("resume_target", target_id=target)
    pair.drain()
    pair.assert_same("t")


@pytest.mark.once
def test_a_repeatable_read_writer_of_a_sync_target_that_is_paused_meanwhile_queues(pair: Pair) -> None:
    target = replicate(pair, mode="sync")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    with pair.source.connect() as conn:
        with transaction(pair.source) as other:
            conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; UPDATE t SET v = 'y'")
            other.execute("SELECT tbl_repl.pause_target(%s)", [target])
            committing = start(conn, "COMMIT")
            wait_until(
                lambda: pair.source.admin(
                    f"SELECT 1 FROM pg_stat_activity WHERE pid = {conn.info.backend_pid} AND wait_event = 'PgSleep'"
                )
            )
        committing.result(5)
    assert pair.target.rows("t") == ["(1,x)"]
    assert (pair.status(target), pair.pending(target)) == ("paused", 1)


DEFINES = {
    "add_target": "SELECT tbl_repl.add_target('t', '{server}', mode => '{mode}')",
    "another target": "SELECT tbl_repl.add_target('t', '{server}', 'o', '{mode}')",
    "anew": "SELECT tbl_repl.drop_target({target}), tbl_repl.add_target('t', '{server}', mode => '{mode}')",
    "alter_target": "SELECT tbl_repl.alter_target({target}, mode => '{mode}', timeout => '4 s')",
}


@pytest.mark.once
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", DEFINES)
@pytest.mark.parametrize("write", ["INSERT INTO t VALUES (3, 'new')", "UPDATE t SET v = 'new'", "TRUNCATE t"])
def test_a_target_that_is_newer_than_the_snapshot_misses_nothing(
    pair: Pair, isolation: str, mode: str, how: str, write: str
) -> None:
    """Triggers are those of now, what the transaction sees of the catalog is not: it fails, or queues."""
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE o (id integer PRIMARY KEY, v text)"
    )
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    target = (
        0 if how == "add_target" else pair.add_target("t", mode="async" if how == "alter_target" else mode)
    )
    conn = pair.source.connect()
    conn.execute(f"BEGIN ISOLATION LEVEL {isolation}; SELECT FROM o")
    pair.source.sql(DEFINES[how].format(mode=mode, target=target, server=pair.server))
    if mode == "sync":
        with pytest.raises(errors.SerializationFailure) as caught:
            conn.execute(write)
        assert caught.value.diag.message_hint
        conn.execute("ROLLBACK")
        assert pair.source.rows("t") == ["(1,x)", "(2,x)"]
    else:
        conn.execute(write)
        conn.execute("COMMIT")
        assert pair.source.rows("t") != ["(1,x)", "(2,x)"]
    pair.drain()
    pair.assert_same("t")
    if how == "another target":
        assert pair.target.rows("o") == pair.source.rows("t")
    assert errors_of(pair) == []


@pytest.mark.parametrize("mode", MODES)
def test_who_sees_an_older_definition_does_not_write_into_the_former_table(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE o (id integer PRIMARY KEY, v text)")
    target = replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    conn = pair.source.connect()
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM o")
    pair.source.sql(f"SELECT tbl_repl.alter_target({target}, 'o', 'tolerant')")
    conn.execute("TRUNCATE t; INSERT INTO t VALUES (2, 'y')")
    conn.execute("COMMIT")
    pair.drain()
    assert pair.target.rows("t") == ["(1,x)"]
    assert pair.target.rows("o") == ["(2,y)"]
    assert errors_of(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_captured_is_shipped_although_no_other_trigger_fires_any_more(
    pair: Pair, mode: str, rows: int
) -> None:
    replicate(pair, mode=mode)
    with pair.source.cluster.connect(pair.source.dbname) as superuser:
        superuser.execute(
            f"BEGIN; INSERT INTO t SELECT g, 'x' FROM generate_series(1, {rows}) AS g;"
            "SET LOCAL session_replication_role = replica; INSERT INTO t VALUES (9, 'not captured'); COMMIT"
        )
    pair.drain()
    assert pair.target.one("SELECT count(*) FROM t") == rows
    assert pair.source.one("SELECT count(*) FROM tbl_repl.flush") == 0


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_table_that_takes_the_name_of_a_replicated_one_is_not_taken_for_it(pair: Pair, mode: str) -> None:
    target = replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x'); CREATE TABLE other (LIKE t INCLUDING ALL)")
    pair.drain()
    pair.source.sql("BEGIN; ALTER TABLE t RENAME TO old; ALTER TABLE other RENAME TO t; COMMIT")
    write = "UPDATE old SET v = 'y' WHERE id = 2"
    if mode == "sync":
        with pytest.raises(errors.UndefinedTable, match="another table") as caught:
            pair.source.sql(write)
        assert caught.value.diag.message_hint
    else:
        pair.source.sql(write)
        pair.drain()
        assert (pair.status(target), pair.pending(target)) == ("failed", 1)
        assert "another table" in pair.source.one("SELECT last_error FROM tbl_repl.target_status")
    assert pair.target.rows("t") == ["(1,x)", "(2,x)"]
    pair.call("alter_target", target_id=target)
    if mode == "sync":
        pair.source.sql(write)
    pair.drain()
    assert pair.target.rows("t") == ["(1,x)", "(2,y)"]


def test_a_serializable_writer_queues_for_a_tolerant_target(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    conn = pair.source.connect()
    conn.execute("SET default_transaction_isolation = 'serializable'")
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    assert pair.target.rows("t") == []
    assert (pair.status(target), pair.pending(target)) == ("queueing", 1)
    conn.execute("UPDATE t SET v = 'y'")
    pair.source.sql("INSERT INTO t VALUES (2, 'read committed')")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target) == "ok"
    assert errors_of(pair) == []


@pytest.mark.plain_target
def test_a_serializable_writer_is_refused_by_a_sync_target(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    with pytest.raises(errors.FeatureNotSupported) as caught:
        conn.execute("BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO t VALUES (1, 'x'); COMMIT")
    assert caught.value.diag.message_hint
    conn.execute("ROLLBACK")
    assert pair.source.rows("t") == pair.target.rows("t") == []


def test_a_serializable_writer_ships_to_a_sync_target_where_receipts_are_left(pair: Pair) -> None:
    sync, tolerant = replicate(pair, mode="sync"), 0
    pair.target.sql("CREATE TABLE u (id integer PRIMARY KEY, v text)")
    tolerant = pair.add_target("t", dst_table="u", mode="tolerant")
    conn = pair.source.connect()
    conn.execute("SET default_transaction_isolation = 'serializable'")
    conn.execute(
        "BEGIN; INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'z'); UPDATE t SET v = 'new' WHERE id = 1; DELETE FROM t WHERE id = 2; COMMIT"
    )
    pair.assert_same("t")
    assert (pair.status(sync), pair.pending(sync)) == ("ok", 0)
    assert pair.status(tolerant) == "queueing"
    conn.execute("INSERT INTO t VALUES (4, 'single')")
    conn.execute("BEGIN; INSERT INTO t VALUES (5, 'undone'); ROLLBACK")
    pair.assert_same("t")
    pair.drain()
    pair.assert_same("t", dst="u")


def test_serializable_writers_that_fail_at_commit_leave_nothing_on_a_sync_target(pair: Pair) -> None:
    """Whoever fails with 40001 may have shipped already; receipts heal that."""
    replicate(pair, mode="sync")
    conns = [pair.source.connect() for _ in range(5)]

    def write(number: int) -> tuple[int, int]:
        conn, done, failed = conns[number], 0, 0
        conn.execute("SET default_transaction_isolation = 'serializable'")
        for n in range(30):
            try:
                conn.execute(f"INSERT INTO t VALUES ({n * 5 + number}, 'x')")
                done += 1
            except errors.SerializationFailure:
                failed += 1
        return done, failed

    results = [future.result(60) for future in [in_background(lambda n=n: write(n)) for n in range(5)]]
    assert sum(done for done, _ in results) == pair.source.one("SELECT count(*) FROM t") > 0
    pair.drain()
    pair.assert_same("t")


def test_serializable_writers_that_do_not_conflict_do_not_fail(pair: Pair) -> None:
    replicate(pair, mode="tolerant")
    writers, rounds = 6, 25
    conns = [pair.source.connect() for _ in range(writers)]

    def write(number: int) -> int:
        conn = conns[number]
        conn.execute("SET default_transaction_isolation = 'serializable'")
        for n in range(rounds):
            conn.execute(f"INSERT INTO t VALUES ({number * 1000 + n}, 'x')")
        return rounds

    done = [in_background(lambda number=number: write(number)) for number in range(writers)]
    assert sum(future.result(60) for future in done) == writers * rounds
    pair.drain()
    pair.assert_same("t")


def test_a_prepared_transaction_queues_for_a_tolerant_target(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    for gid in ("kept", "undone"):
        pair.source.sql(f"BEGIN; INSERT INTO t VALUES ({len(gid)}, '{gid}'); PREPARE TRANSACTION '{gid}'")
    assert pair.target.rows("t") == []
    # others are not held up, a drain finds nothing it could ship
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    assert pair.target.rows("t") == ["(1,x)"]
    pair.drain()
    pair.source.sql("COMMIT PREPARED 'kept'")
    pair.source.sql("ROLLBACK PREPARED 'undone'")
    assert (pair.status(target), pair.pending(target)) == ("queueing", 1)
    pair.drain()
    assert pair.target.rows("t") == ["(1,x)", "(4,kept)"]
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)


def test_a_prepared_transaction_is_refused_by_a_sync_target(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    with pytest.raises(errors.FeatureNotSupported) as caught:
        conn.execute("/* two phases */ prepare  TRANSACTION 'x'")
    assert caught.value.diag.message_hint
    assert pair.source.rows("t") == pair.target.rows("t") == []
    assert pair.source.sql("SELECT 1 FROM pg_prepared_xacts WHERE database = current_database()") == []


def test_a_commit_that_only_mentions_prepare_transaction_ships(pair: Pair) -> None:
    replicate(pair, mode="sync")
    conn = pair.source.connect()
    conn.execute("BEGIN")
    conn.execute("INSERT INTO t VALUES (1, 'x')")
    conn.execute("COMMIT /* not PREPARE TRANSACTION 'x' */ -- prepare transaction")
    conn.execute("INSERT INTO t VALUES (2, '; prepare transaction')")
    pair.assert_same("t")


# --- order of statements on the target -------------------------------------------------------------

FOREIGN_KEYS = {
    "no action": "",
    "deferrable": " DEFERRABLE INITIALLY DEFERRED",
    "cascade": " ON DELETE CASCADE ON UPDATE CASCADE",
}


@pytest.mark.parametrize("rows", [2, MANY])
@pytest.mark.parametrize("kind", FOREIGN_KEYS)
def test_children_move_to_a_new_parent_and_the_old_one_goes(pair: Pair, kind: str, rows: int) -> None:
    replicate(pair, "parent", "id integer PRIMARY KEY, v text", mode="sync")
    replicate(
        pair, "child", f"id integer PRIMARY KEY, p integer REFERENCES parent{FOREIGN_KEYS[kind]}", mode="sync"
    )
    pair.source.sql(
        f"INSERT INTO parent VALUES (1, 'old'); INSERT INTO child SELECT g, 1 FROM generate_series(1, {rows}) g"
    )
    pair.source.sql(
        "INSERT INTO parent VALUES (2, 'new'); UPDATE child SET p = 2; DELETE FROM parent WHERE id = 1"
    )
    assert pair.source.rows("parent") == ["(2,new)"]
    pair.assert_same("parent")
    pair.assert_same("child")
    # the same the other way round, so that target order of creation does not matter
    pair.source.sql("DELETE FROM child; DELETE FROM parent")
    pair.assert_same("parent")
    pair.assert_same("child")


@pytest.mark.parametrize("rows", [2, MANY])
def test_parents_and_children_go_and_come_in_an_order_that_foreign_keys_allow(pair: Pair, rows: int) -> None:
    # the child is defined first: its target_id is the smaller one
    pair.both(
        "CREATE TABLE parent (id integer PRIMARY KEY); CREATE TABLE child (id integer PRIMARY KEY, p integer REFERENCES parent)"
    )
    pair.add_target("child", mode="sync")
    pair.add_target("parent", mode="sync")
    pair.source.sql(
        f"INSERT INTO parent SELECT generate_series(1, {rows}); INSERT INTO child SELECT g, g FROM generate_series(1, {rows}) g"
    )
    pair.assert_same("child")
    pair.source.sql("DELETE FROM child; DELETE FROM parent")
    pair.assert_same("parent")


@pytest.mark.parametrize("rows", [2, MANY])
def test_unique_values_are_swapped_between_rows(pair: Pair, rows: int) -> None:
    replicate(pair, "t", "id integer PRIMARY KEY, u integer NOT NULL UNIQUE, v text", mode="sync")
    pair.source.sql(f"INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, {rows}) g")
    pair.source.sql(f"UPDATE t SET u = -u; UPDATE t SET u = {rows} + 1 - id")
    pair.assert_same("t")
    assert_shipped_directly(pair)


@pytest.mark.once
@pytest.mark.parametrize("rows", [2, MANY])
@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "NO ACTION"])
def test_unique_values_swapped_on_a_parent_leave_its_children_alone(
    pair: Pair, action: str, rows: int
) -> None:
    replicate(pair, "parent", "id integer PRIMARY KEY, u integer NOT NULL UNIQUE", mode="sync")
    ddl = f"CREATE TABLE child (id integer PRIMARY KEY, p integer REFERENCES parent ON DELETE {action})"
    pair.target.sql(ddl)  # the children live on the target only
    pair.call("alter_target", target_id=1, timeout="6 s")  # looks at the target again
    pair.source.sql(f"INSERT INTO parent SELECT g, g FROM generate_series(1, {rows}) g")
    pair.target.sql("INSERT INTO child VALUES (10, 1), (20, 2)")
    pair.source.sql(f"UPDATE parent SET u = -u; UPDATE parent SET u = {rows} + 1 - id")
    pair.assert_same("parent")
    assert pair.target.rows("child") == ["(10,1)", "(20,2)"]


@pytest.mark.parametrize("mode", MODES)
def test_keys_swapped_between_rows_arrive(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'one'), (2, 'two')")
    pair.source.sql("UPDATE t SET id = id + 10; UPDATE t SET id = 13 - id")
    assert pair.target.rows("t") == ["(1,two)", "(2,one)"]
    assert_shipped_directly(pair)


# --- TRUNCATE --------------------------------------------------------------------------------------


# --- one transaction, one round trip ---------------------------------------------------------------


def test_a_single_row_transaction_is_one_message(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    pair.target.admin(f"ALTER DATABASE {pair.target.dbname} SET log_statement = 'all'")
    conn, _ = session_with_connection(pair)
    mark = pair.target.cluster.log_size()
    for statement in (
        "INSERT INTO t VALUES (3, 'x')",
        "UPDATE t SET v = 'one message' WHERE id = 1",
        "DELETE FROM t WHERE id = 2",
    ):
        conn.execute(statement)
    lines = [
        line for line in pair.target.cluster.log(mark).splitlines() if "LOG:  " in line and "tbl_repl" in line
    ]
    statements = [line.split("LOG:  ")[1] for line in lines]
    assert len(statements) == 3, statements
    assert all(s.startswith("statement: EXECUTE tbl_repl_") for s in statements), statements
    pair.assert_same("t")


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_more_keys_than_fit_into_work_mem_take_no_longer_each(pair: Pair, mode: str) -> None:
    """A hash of keys whose number the planner did not foresee was filled anew for nearly each of them."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 30000) AS g")
    pair.drain()
    pair.source.sql("SET work_mem = '64kB'")
    with within(20):
        pair.source.sql("UPDATE t SET id = id + 1000000")
        pair.drain()
    pair.assert_same("t")


def test_several_tables_of_one_server_are_one_message_and_move_together(pair: Pair) -> None:
    replicate(pair, "a", "id integer PRIMARY KEY, n integer", mode="sync")
    replicate(pair, "b", "id integer PRIMARY KEY, n integer", mode="tolerant")
    pair.source.sql("INSERT INTO a VALUES (1, 0); INSERT INTO b VALUES (1, 0)")
    reader = pair.target.connect()
    stop = False
    seen: set[bool] = set()

    def read() -> int:
        while not stop:
            for row in reader.execute("SELECT a.n = b.n FROM a, b"):
                seen.add(row[0])
        return 0

    reading = in_background(read)
    conn = pair.source.connect()
    for n in range(1, 40):
        conn.execute(f"BEGIN; UPDATE a SET n = {n}; UPDATE b SET n = {n}; COMMIT")
    stop = True
    reading.result(10)
    assert seen == {True}
    assert pair.target.rows("a") == pair.target.rows("b") == ["(1,39)"]
    assert (
        pair.target.one(
            "SELECT count(DISTINCT x) FROM (SELECT xmin::text AS x FROM a UNION ALL SELECT xmin::text FROM b) AS x"
        )
        == 1
    )


def test_targets_of_one_server_with_different_timeouts_do_not_cut_each_other_off(pair: Pair) -> None:
    replicate(pair, "a", mode="sync", timeout="5 s")
    replicate(pair, "b", mode="sync", timeout="4 s")
    conn = pair.source.connect()
    for n in range(3):
        conn.execute(f"BEGIN; INSERT INTO a VALUES ({n}, 'x'); INSERT INTO b VALUES ({n}, 'x'); COMMIT")
    pids = [
        row[0]
        for row in pair.target.admin(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s", [f"%{conn.info.backend_pid}.%"]
        )
    ]
    assert len(pids) == 2
    conn.execute("INSERT INTO a VALUES (9, 'x'); INSERT INTO b VALUES (9, 'x')")
    assert pids == [
        row[0]
        for row in pair.target.admin(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s", [f"%{conn.info.backend_pid}.%"]
        )
    ]
    pair.assert_same("a")
    pair.assert_same("b")
    # a timeout that nobody has any more leaves no connection behind
    pair.call("alter_target", target_id=2, timeout="5 s")
    conn.execute("INSERT INTO b VALUES (10, 'x')")
    pair.call("alter_target", target_id=1, timeout="3 s")
    conn.execute("INSERT INTO a VALUES (10, 'x')")
    pair.assert_same("a")


# --- no trace in the application -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_application_sees_nothing_of_us(pair: Pair, mode: str) -> None:
    replicate(pair, "t", "id integer PRIMARY KEY, v text", mode=mode)
    pair.source.sql(
        "CREATE SEQUENCE own START 41; CREATE SCHEMA app; GRANT INSERT, UPDATE, DELETE, SELECT ON t TO writer"
    )
    conn = pair.source.connect()
    conn.execute(
        "SET search_path = app, public; SET DateStyle = 'SQL, DMY'; SET statement_timeout = '20s'; SET lock_timeout = '10s'"
    )
    settings = "SELECT name, setting FROM pg_settings WHERE name NOT LIKE '%.%' ORDER BY name"
    before = conn.execute(settings).fetchall()
    assert conn.execute("SELECT nextval('public.own')").fetchone() == (41,)
    with conn.transaction():
        assert conn.execute(
            "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3) g RETURNING id"
        ).fetchall() == [(1,), (2,), (3,)]
        assert conn.execute("UPDATE t SET v = 'y' WHERE id < 3").rowcount == 2
        assert conn.execute("SELECT lastval()").fetchone() == (41,)
    assert conn.execute("SELECT lastval()").fetchone() == (41,)
    assert conn.execute("DELETE FROM t WHERE id = 3").rowcount == 1
    assert conn.execute("DELETE FROM t WHERE id = 3").rowcount == 0
    assert conn.execute(settings).fetchall() == before
    conn.execute(
        """
        DO $$
        DECLARE n bigint;
        BEGIN
            UPDATE t SET v = 'z' WHERE id = 77;
            IF FOUND THEN RAISE 'found nothing, FOUND is true'; END IF;
            UPDATE t SET v = 'z';
            GET DIAGNOSTICS n = ROW_COUNT;
            IF NOT FOUND OR n <> 2 THEN RAISE 'FOUND %, ROW_COUNT %', FOUND, n; END IF;
        END $$
        """
    )
    pair.assert_same("t")
    # a writer with no right on anything of ours
    pair.source.fresh("INSERT INTO t VALUES (9, 'by another role')", user="writer")
    pair.assert_same("t")
    assert pair.source.admin("SELECT count(*) FROM tbl_repl.stash, tbl_repl.flush") == [(0,)]


def test_a_settings_reset_inside_the_transaction_does_not_lose_changes(pair: Pair) -> None:
    replicate(pair, mode="sync")
    pair.source.sql("BEGIN; INSERT INTO t VALUES (1, 'x'); RESET ALL; COMMIT")
    pair.assert_same("t")


# --- writers that die ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_terminated_writer_leaves_nothing_behind_that_a_later_write_does_not_heal(
    pair: Pair, mode: str
) -> None:
    replicate(pair, mode=mode, timeout="600 ms")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    writer, pid = session_with_connection(pair)
    freeze(pid)
    try:
        writing = start(writer, "UPDATE t SET v = 'of the dead'")
        shipping = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: pair.source.admin(shipping, [writer.info.backend_pid]) == [(True,)])
        pair.source.admin("SELECT pg_terminate_backend(%s, 5000)", [writer.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            writing.result(5)
        assert pair.source.rows("t") == ["(1,x)"]
        # A new session finds the orphan on the target, and does not write before it is harmless.
        fresh = in_background(lambda: pair.source.fresh("UPDATE t SET v = 'new'"))
        if mode == "tolerant":
            fresh.result(5)
        else:
            with pytest.raises(psycopg.Error):
                fresh.result(5)
    finally:
        thaw(pair.target, pid)
    pair.source.fresh("UPDATE t SET v = 'newest'")
    pair.drain()
    assert pair.target.rows("t") == ["(1,newest)"]


@pytest.mark.once
def test_a_sync_target_whose_second_try_was_lost_and_healed_has_it(pair: Pair, proxy: Proxy) -> None:
    """A tolerant one beside it fails the common message; what follows is not taken for a failure."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.target.sql("CREATE TABLE u (id integer PRIMARY KEY CHECK (id < 0)); CREATE SEQUENCE tries")
    pair.target.sql(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " IF nextval('tries') = 2 THEN PERFORM pg_advisory_xact_lock(99); END IF; RETURN NEW; END$$;"
        "CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    pair.add_target("t", mode="sync")
    tolerant = pair.add_target("t", dst_table="u", mode="tolerant")
    with pair.target.connect() as gate, pair.source.connect() as writer:
        gate.execute("SELECT pg_advisory_lock(99)")
        writing = start(writer, "INSERT INTO t VALUES (1)")
        wait_until(
            lambda: pair.target.admin(
                "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl%%' AND wait_event = 'advisory'"
            )
        )
        proxy.cut()
        writing.result(10)
    pair.assert_same("t")
    assert pair.target.one("SELECT last_value FROM tries") > 2
    assert pair.pending(tolerant) == 1
