"""Copying in pieces: parallel, interruptible, beside writers, never over something newer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import psycopg
import pytest

from support import Pair, Proxy, wait_until
from support.background import start
from support.programs import dsn_of, environment, started, tbl_repl
from support.tables import replay, transaction
from tbl_repl import bulk, copy

# beside a row that fills a buffer
SLOW_FILTER = """
    CREATE FUNCTION passes(v text) RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN IF v = 'slow' THEN PERFORM pg_sleep(1.6); END IF; RETURN v <> 'no'; END $$
"""
DDL = "CREATE TABLE item (id integer PRIMARY KEY, name text, price numeric(10,2))"


def run(pair: Pair, *args: str) -> subprocess.CompletedProcess[str]:
    return tbl_repl(*args, "--dsn", dsn_of(pair.source))


@pytest.fixture
def filled(pair: Pair) -> Pair:
    pair.both(DDL)
    pair.source.sql("INSERT INTO item SELECT g, 'n' || g, g / 7.0 FROM generate_series(1, 5000) AS g")
    return pair


def test_copy_moves_every_row_and_the_target_returns_to_ok(filled: Pair) -> None:
    target = filled.add_target("item", mode="sync", initial_copy="none")
    said = run(filled, "copy", str(target), "--piece-rows", "700", "--jobs", "3", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["rows"] == 5000
    filled.drain()
    filled.assert_same("item")
    assert filled.status(target) == "ok"
    assert filled.source.one("SELECT count(*) FROM tbl_repl.piece") == 0


def test_rows_that_are_there_already_are_corrected(filled: Pair) -> None:
    filled.target.sql("INSERT INTO item SELECT g, 'old', 0 FROM generate_series(1, 2500, 3) AS g")
    target = filled.add_target("item", initial_copy="none")
    assert run(filled, "copy", str(target), "--piece-rows", "1000").returncode == 0
    filled.drain()
    filled.assert_same("item")


def test_writers_go_on_and_what_they_write_wins(filled: Pair) -> None:
    target = filled.add_target("item", mode="tolerant", initial_copy="none")
    stop = threading.Event()
    written: list[int] = []

    def write() -> None:
        with filled.source.connect() as connection:
            n = 0
            while not stop.is_set():
                n += 1
                connection.execute("UPDATE item SET name = 'w' || %s WHERE id = %s", (n, n * 37 % 5000 + 1))
                connection.execute("DELETE FROM item WHERE id = %s", (n * 91 % 5000 + 1,))
                connection.execute("INSERT INTO item VALUES (%s, 'new', 1)", (10_000 + n,))
                written.append(n)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        wait_until(lambda: len(written) > 5)
        said = run(filled, "copy", str(target), "--piece-rows", "200", "--jobs", "2")
        assert said.returncode == 0, said.stderr
    finally:
        stop.set()
        writer.join()
    filled.drain()
    filled.assert_same("item")


def test_a_sync_writer_does_not_wait_while_a_table_is_divided(filled: Pair) -> None:
    target = filled.add_target("item", mode="sync", initial_copy="none")
    with filled.source.connect() as copier:
        copier.execute("SELECT tbl_repl._copy_begin(%s)", (target,))
        copier.execute("BEGIN")
        copier.execute("SELECT tbl_repl._copy_divide(%s, 10)", (target,))
        filled.source.sql("SET lock_timeout = 500; UPDATE item SET name = 'later' WHERE id = 1")
        copier.execute("COMMIT")
    filled.drain()
    filled.assert_same("item")


def test_replay_ships_nothing_to_a_target_that_is_being_copied(filled: Pair) -> None:
    target = filled.add_target("item", mode="async", initial_copy="none")
    assert filled.begin_copy(target, 1000) == 5
    filled.source.sql("UPDATE item SET name = 'later' WHERE id = 1")
    with filled.source.connect() as copier:
        copier.execute("SELECT pg_advisory_lock(tbl_repl._lock_copy(), %s)", (target,))
        filled.drain()
    assert filled.target.one("SELECT count(*) FROM item") == 0
    assert filled.pending(target) >= 1
    assert run(filled, "copy", str(target)).returncode == 0
    filled.drain()
    filled.assert_same("item")


def test_an_interrupted_copy_goes_on_where_it_was(filled: Pair) -> None:
    target = filled.add_target("item", initial_copy="none")
    assert filled.begin_copy(target, 500) == 10
    piece = filled.source.one("SELECT n FROM tbl_repl._copy_next(%s)", (target,))
    filled.source.sql("SELECT tbl_repl._copy_done(%s, %s, 500, 1)", (target, piece))
    filled.source.sql("SELECT tbl_repl._copy_next(%s)", (target,))  # claimed by one that has died
    said = run(filled, "copy", str(target), "--json")
    assert said.returncode == 0, said.stderr
    assert filled.target.one("SELECT count(*) FROM item") == 4500  # the piece that was done is not done again
    filled.source.sql("SELECT tbl_repl.resync_target(%s)", (target,))
    filled.drain()
    filled.assert_same("item")


def test_the_rows_of_an_earlier_run_do_not_count_as_speed(filled: Pair) -> None:
    target = filled.add_target("item", mode="async", initial_copy="none")
    filled.begin_copy(target, 100)
    filled.source.sql("UPDATE tbl_repl.piece SET state = 'done', rows_copied = 100000 WHERE n <= 49")
    program = (
        "import sys, tbl_repl.cli, tbl_repl.progress as p; p.LINE_SECONDS = 0; sys.exit(tbl_repl.cli.main())"
    )
    command = [sys.executable, "-c", program, "copy", str(target), "--dsn", dsn_of(filled.source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stderr.splitlines()
    assert f"target {target}: 4,900,000 of 4,900,000 rows, 0 rows/s" in first
    (speed,) = re.findall(r"rows, ([\d,]+) rows/s", last)
    assert 0 < int(speed.replace(",", "")) < 100_000, "of 100 rows"


def test_two_copies_of_one_target_do_not_meet(filled: Pair) -> None:
    target = filled.add_target("item", initial_copy="none")
    with filled.source.connect() as other:
        other.execute("SELECT pg_advisory_lock(tbl_repl._lock_copy(), %s)", (target,))
        said = run(filled, "copy", str(target))
    assert said.returncode == 1
    assert "is being copied by another session" in said.stderr


@pytest.mark.once
def test_a_killed_copy_can_be_repeated(filled: Pair) -> None:
    target = filled.add_target("item", mode="sync", initial_copy="none")
    with filled.target.connect() as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        process = started("copy", str(target), "--piece-rows", "500", "--dsn", dsn_of(filled.source))
        wait_until(
            lambda: filled.source.one("SELECT count(*) FROM tbl_repl.piece WHERE state = 'running'") > 0
        )
        process.kill()
        process.wait()
    said = run(filled, "copy", str(target))
    assert said.returncode == 0, said.stderr
    filled.drain()
    filled.assert_same("item")


def test_a_copy_that_nobody_repeats_is_ended_by_whoever_drains(filled: Pair) -> None:
    target = filled.add_target("item", mode="tolerant", initial_copy="none")
    assert filled.begin_copy(target, 1000) == 5
    filled.source.sql("SELECT n FROM tbl_repl._copy_next(%s)", (target,))  # by one that has died
    filled.source.sql("UPDATE item SET name = 'later' WHERE id = 1")
    filled.drain()
    assert filled.status(target) == "ok"
    filled.assert_same("item")
    assert filled.source.sql("SELECT * FROM tbl_repl.copy_progress") == []


def test_nothing_is_shipped_while_a_piece_is_on_its_way(filled: Pair) -> None:
    """The session that leads a copy may have gone before its jobs."""
    target = filled.add_target("item", mode="async", initial_copy="none")
    assert filled.begin_copy(target, 1000) == 5
    filled.source.sql("DELETE FROM item")
    with filled.source.connect() as job:
        job.execute("SELECT pg_advisory_lock_shared(tbl_repl._lock_piece(), %s)", (target,))
        filled.drain()
        assert filled.status(target) == "copying"
        said = run(filled, "copy", str(target))
        assert "is being copied by another session" in said.stderr
    wait_until(lambda: not filled.source.backends("tbl-repl copy%"))
    filled.drain()
    assert filled.status(target) == "ok"
    filled.assert_same("item")


@pytest.mark.once
def test_jobs_hold_the_lock_that_says_so(filled: Pair) -> None:
    target = filled.add_target("item", mode="async", initial_copy="none")
    with filled.target.connect() as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        process = started("copy", str(target), "--piece-rows", "500", "--dsn", dsn_of(filled.source))
        held = "SELECT count(*) FROM pg_locks WHERE classid = tbl_repl._lock_piece()::oid AND objid = %s AND granted"
        wait_until(lambda: filled.source.admin(held, [target]) == [(2,)])
    assert process.wait(60) == 0
    assert filled.source.admin(held, [target]) == [(0,)]


def test_there_are_no_more_jobs_than_pieces(filled: Pair) -> None:
    target = filled.add_target("item", mode="async", initial_copy="none")
    filled.source.admin(f"ALTER DATABASE {filled.source.dbname} CONNECTION LIMIT 10")
    assert run(filled, "copy", str(target), "--jobs", "50").returncode == 0


def test_a_copy_that_ends_while_its_target_is_paused_has_ended(filled: Pair) -> None:
    target = filled.add_target("item", mode="async", initial_copy="none")
    assert filled.begin_copy(target, 5000) == 1
    filled.source.sql("SELECT n FROM tbl_repl._copy_next(%s)", (target,))
    filled.call("pause_target", target_id=target)
    filled.source.sql("SELECT tbl_repl._copy_done(%s, 1, 5000, 1)", (target,))
    assert filled.source.one("SELECT tbl_repl._copy_finish(%s)", (target,))
    assert filled.status(target) == "paused"
    filled.call("resume_target", target_id=target)
    assert filled.status(target) in ("queueing", "ok")
    filled.drain()
    assert filled.target.one("SELECT count(*) FROM item") == 0  # nothing is copied twice


@pytest.mark.once
def test_a_target_is_paused_while_replay_takes_over_a_copy(filled: Pair) -> None:
    target = filled.add_target("item", mode="tolerant", initial_copy="none")
    filled.begin_copy(target, 1000)
    with (
        filled.source.connect() as shipper,
        filled.source.connect() as pausing,
        filled.source.connect() as draining,
    ):
        shipper.execute("BEGIN")
        shipper.execute("SELECT pg_advisory_xact_lock_shared(tbl_repl._lock_ship(), %s)", (target,))
        waits = "SELECT count(*) FROM pg_locks WHERE pid = ANY (%s) AND NOT granted"
        paused = start(pausing, f"SELECT tbl_repl.pause_target({target})")
        wait_until(lambda: filled.source.admin(waits, [[pausing.info.backend_pid]]) == [(1,)])
        drained = start(draining, "SELECT tbl_repl.replay()")
        both = [pausing.info.backend_pid, draining.info.backend_pid]
        wait_until(lambda: filled.source.admin(waits, [both]) == [(2,)])
        shipper.execute("COMMIT")
        paused.result(10)
        drained.result(10)
    assert filled.status(target) == "paused"


def test_a_row_that_is_rejected_does_not_keep_a_copy_from_ending(filled: Pair) -> None:
    filled.target.sql("ALTER TABLE item ADD CHECK (id <> 1234)")
    target = filled.add_target("item", mode="tolerant", initial_copy="none")
    said = run(filled, "copy", str(target), "--piece-rows", "1000")
    assert said.returncode == 1
    assert "violates check constraint" in said.stderr
    filled.source.sql("INSERT INTO item VALUES (6000, 'later', 1)")
    filled.drain()
    assert filled.target.one("SELECT count(*) FROM item") == 5000
    assert filled.source.sql("SELECT key FROM tbl_repl.quarantine") == [({"id": 1234},)]
    assert filled.status(target) == "ok"


def test_nothing_is_begun_for_a_target_that_is_out_of_reach(filled: Pair) -> None:
    target = filled.add_target("item", mode="tolerant", initial_copy="none")
    filled.target.stop()
    assert run(filled, "copy", str(target)).returncode == 3
    assert filled.source.sql("SELECT * FROM tbl_repl.copy_progress") == []
    assert filled.status(target) == "ok"


@pytest.mark.parametrize("background", [False, True])
def test_a_piece_may_end_at_an_empty_key(pair: Pair, background: bool) -> None:
    pair.both("CREATE TABLE t (id text PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES ('', 'v'), ('a', 'v')")
    target = pair.add_target("t", initial_copy="background" if background else "none")
    if background:
        assert pair.source.one("SELECT tbl_repl.replay(%s, 1)", [pair.server]) == 1
    said = run(pair, "copy", str(target), "--piece-rows", "1", "--jobs", "2", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["rows"] == (1 if background else 2)
    pair.drain()
    pair.assert_same("t")


def test_replay_goes_on_with_a_copy_whose_pieces_it_takes_over(pair: Pair) -> None:
    """The first piece begins before the first key, the second one at the key '': neither is done."""
    pair.both("CREATE TABLE t (id text PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES ('', 'v'), ('a', 'v')")
    for done in (0, 1):
        target = pair.add_target("t", initial_copy="background")
        assert pair.begin_copy(target, 1) == 2
        pair.source.sql("UPDATE tbl_repl.piece SET state = 'done' WHERE n <= %s", [done])
        pair.drain()
        assert pair.target.sql("SELECT id FROM t ORDER BY id") == [("",), ("a",)][done:]
        pair.call("drop_target", target_id=target)
        pair.target.sql("TRUNCATE t")


def test_an_unknown_target_is_a_problem(filled: Pair) -> None:
    said = run(filled, "copy", "99")
    assert said.returncode == 1
    assert "target 99 does not exist" in said.stderr


def test_a_target_that_settles_conflicts_is_not_copied_in_pieces(pair: Pair) -> None:
    """Pieces would be written over newer rows of the target."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES (1, 'ours'), (2, 'ours')")
    pair.target.sql("INSERT INTO t VALUES (1, 'theirs')")
    target = pair.add_target("t", mode="async", on_conflict="keep", initial_copy="none")
    said = run(pair, "copy", str(target))
    assert said.returncode == 1
    assert "cannot be copied in pieces" in said.stderr and "resync_target" in said.stderr
    assert pair.target.rows("t") == ["(1,theirs)"]


@pytest.mark.parametrize("key", ['"a$1"', '"a$1", "b$2"'])
def test_names_with_a_dollar_sign(pair: Pair, key: str) -> None:
    pair.both(f'CREATE TABLE t ("a$1" integer, "b$2" text, PRIMARY KEY ({key}))')
    pair.source.sql("INSERT INTO t SELECT g, '$1' FROM generate_series(1, 10) AS g")
    target = pair.add_target("t", mode="async", initial_copy="none")
    pair.begin_copy(target, 4)
    found = []
    for _ in range(3):
        query = pair.source.one("SELECT rows_query FROM tbl_repl._copy_next(%s)", [target])
        found += [int(row[0]) for row in pair.source.sql(query)]
    assert found == list(range(1, 11))


@pytest.mark.once
@pytest.mark.parametrize("encodings", [(None, "LATIN1"), ("LATIN1", None)], ids=str)
def test_databases_of_different_encodings(pair: Pair) -> None:
    pair.both('CREATE TABLE "données" ("clé" text PRIMARY KEY, v text)')
    pair.source.sql("INSERT INTO \"données\" SELECT 'é' || g, 'à côté' FROM generate_series(1, 50) g")
    pair.target.sql("INSERT INTO \"données\" VALUES ('é5', 'old'), ('é45', 'old')")
    target = pair.add_target('"données"', mode="async", initial_copy="none")
    said = run(pair, "copy", str(target), "--piece-rows", "20")
    assert said.returncode == 0, said.stderr
    pair.drain()
    pair.assert_same('"données"')


def test_a_filter_with_a_backslash_where_literals_do_not_conform(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, code text)")
    pair.source.sql("INSERT INTO t VALUES (1, '7'), (2, 'd')")
    target = pair.add_target("t", mode="async", row_filter=r"code ~ '\d+'", initial_copy="none")
    pair.source.admin(f"ALTER DATABASE {pair.source.dbname} SET standard_conforming_strings = off")
    said = run(pair, "copy", str(target))
    assert said.returncode == 0, said.stderr
    assert pair.target.rows("t") == ["(1,7)"]


@pytest.mark.once
def test_a_source_that_takes_long_for_its_rows_is_waited_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "SILENCE_SECONDS", 0.5)
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql(SLOW_FILTER)
    pair.source.sql("INSERT INTO t VALUES (1, repeat('x', 300000)), (2, 'slow'), (3, 'y')")
    target = pair.add_target("t", mode="async", row_filter="public.passes(v)", initial_copy="none")
    assert copy.copy(dsn_of(pair.source), target, 1)
    pair.assert_same("t")


def test_the_first_error_of_a_piece_is_the_one_that_is_raised(
    filled: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the target cannot be told any more."""
    target = filled.add_target("item", mode="async", initial_copy="none")

    def fail(*_: object) -> tuple[int, int]:
        sessions = "tbl_repl %.b01d"
        filled.target.admin(
            "SELECT pg_terminate_backend(p) FROM unnest(%s) AS p", [filled.target.backends(sessions)]
        )
        wait_until(lambda: not filled.target.backends(sessions))
        raise psycopg.errors.DataException("the first")

    monkeypatch.setattr(bulk, "pump", fail)
    with pytest.raises(psycopg.errors.DataException, match="the first"):
        copy.copy(dsn_of(filled.source), target, 1)


@pytest.mark.once
def test_a_missing_right_on_the_server_is_told_as_such(filled: Pair) -> None:
    target = filled.add_target("item", mode="async", initial_copy="none")
    filled.source.admin(f"ALTER SERVER {filled.server} OWNER TO postgres")
    said = run(filled, "copy", str(target))
    assert said.returncode == 1
    assert f"permission denied for foreign server {filled.server}" in said.stderr


# --- by replay


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


@pytest.mark.once
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
