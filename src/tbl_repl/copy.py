"""Copy a table in pieces, over several connections, while writers go on; interrupted, it can go on later.

The pieces and their state are in the source database; here rows are carried.  See sql/functions/copy.sql for
why a piece may be copied at any time, and twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from tbl_repl import bulk, failpoint
from tbl_repl.database import Connection, Row, source_session
from tbl_repl.errors import TblReplError

PIECE_ROWS = 50_000


@dataclass(frozen=True)
class Progress:
    """How far a copy has got; rows_planned as counted when the table was divided."""

    rows: int
    rows_planned: int
    bytes: int


def progress(source: Connection, target_id: int) -> Progress | None:
    """The present state of a copy; None when none is under way."""
    row = source.execute("SELECT * FROM tbl_repl.copy_progress WHERE target_id = %s", (target_id,)).fetchone()
    if row is None:
        return None
    return Progress(int(row["rows_copied"]), int(row["rows_planned"]), int(row["bytes_copied"]))


def copy(
    dsn: str,
    target_id: int,
    jobs: int = 2,
    piece_rows: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: threading.Event | None = None,
    background: bool = False,
) -> bool:
    """Copy every row of a target; whether it has ended (False: stopped, goes on when called again).

    background: only what initial_copy => 'background' has left to do.  Raises TblReplError when somebody
    else copies this target or drops it, CannotConnect when the source is lost, psycopg.Error when the target
    is out of reach, or a piece fails: the pieces that are done stay done, the rest is left to whoever drains.
    What was written meanwhile is queued, and shipped by replay afterwards.
    """
    failed = threading.Event()

    def stopped() -> bool:
        return failed.is_set() or (stop is not None and stop.is_set())

    with source_session(dsn, f"copy {target_id}") as source:
        _take_lock(source, target_id, 10_000 if background else 1_000)
        lane = source.execute(
            "SELECT ARRAY[target_id] AS targets, owner, server, timeout "
            "FROM tbl_repl.target WHERE target_id = %s",
            (target_id,),
        ).fetchone()
        if lane is not None:
            with _target_of(source, lane):
                pass  # nothing is begun for one that is out of reach
        source.execute("SELECT tbl_repl._copy_begin(%s, %s)", (target_id, background))
        failpoint.reached("copy begun")
        left = source.execute(
            "SELECT tbl_repl._copy_divide(%s, %s) AS pieces", (target_id, piece_rows or PIECE_ROWS)
        ).fetchone()
        assert lane is not None and left is not None
        failures: list[Exception] = []

        def look() -> None:
            seen = progress(source, target_id)
            if seen is not None:
                on_progress(seen)

        def work() -> None:
            try:
                _job(dsn, lane, stopped)
            except Exception as error:
                failures.append(error)
                failed.set()

        threads = [
            threading.Thread(target=work, name=f"copy {n}", daemon=True)
            for n in range(min(jobs, int(left["pieces"])))
        ]
        look()
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
                    look()
        finally:
            failed.set()
            for thread in threads:
                thread.join()
        look()
        if failures:
            if not background:
                _leave(source, target_id, failures[0])
            raise failures[0]
        if not source.execute("SELECT FROM tbl_repl.target WHERE target_id = %s", (target_id,)).fetchall():
            raise TblReplError(f"target {target_id} was dropped")  # and its pieces with it
        done = source.execute("SELECT tbl_repl._copy_finish(%s) AS done", (target_id,)).fetchone()
        return bool(done and done["done"])


def _take_lock(source: Connection, target_id: int, milliseconds: int) -> None:
    """One copies at a time; replay, which may be at a page of the same copy, is waited for."""
    source.execute(f"SET lock_timeout = {milliseconds}")
    try:
        source.execute("SELECT pg_advisory_lock(tbl_repl._lock_copy(), %s)", (target_id,))
        # jobs of one that has gone end the piece that is on its way
        source.execute("SELECT pg_advisory_lock(tbl_repl._lock_piece(), %s)", (target_id,))
        source.execute("SELECT pg_advisory_unlock(tbl_repl._lock_piece(), %s)", (target_id,))
    except psycopg.errors.LockNotAvailable as error:
        raise TblReplError(f"target {target_id} is being copied by another session") from error
    source.execute("SET lock_timeout = 0")


@contextmanager
def _target_of(source: Connection, lane: Row) -> Iterator[bulk.Target]:
    way = bulk.way_to(source, str(lane["server"]), lane)
    if way is None:
        raise TblReplError(
            f"the user mapping of role {lane['owner']} cannot be read",
            f"Connect as {lane['owner']} or a member of that role; where the mapping is for PUBLIC, "
            "as the owner of the server. CALL tbl_repl.drain() copies without reading it.",
        )
    with bulk.open_target(way) as target:
        yield target


def _leave(source: Connection, target_id: int, error: Exception) -> None:
    """To the worker, or to replay, which finds the rows that are to blame."""
    if isinstance(error, psycopg.Error):
        source.execute(
            "SELECT tbl_repl._copy_failed(%s, %s, %s)",
            (target_id, error.sqlstate or "08006", error.diag.message_primary or str(error)),
        )


def _job(dsn: str, lane: Row, stopped: Callable[[], bool]) -> None:
    target_id = int(lane["targets"][0])
    with (
        source_session(dsn, f"copy {target_id}") as source,
        _target_of(source, lane) as target,
    ):
        # to the end of the session: nothing else is shipped to the target while a piece is on its way
        source.execute("SELECT pg_advisory_lock_shared(tbl_repl._lock_piece(), %s)", (target_id,))
        while not stopped():
            failpoint.reached("piece next")
            piece = source.execute("SELECT * FROM tbl_repl._copy_next(%s)", (target_id,)).fetchone()
            if piece is None:
                return
            rows, size = _copy_piece(source, target, lane, piece)
            failpoint.reached("piece committed")
            source.execute("SELECT tbl_repl._copy_done(%s, %s, %s, %s)", (target_id, piece["n"], rows, size))
            failpoint.reached("piece done")


def _copy_piece(source: Connection, target: bulk.Target, lane: Row, piece: Row) -> tuple[int, int]:
    """The number of rows and of bytes."""
    with source.transaction():
        bulk.as_owner(source, lane)
        target.execute("BEGIN; SET CONSTRAINTS ALL DEFERRED; SAVEPOINT tbl_repl")
        query, binary = str(piece["rows_query"]), bool(piece["is_binary"])
        try:
            into = f"{piece['dst_table']} ({piece['dst_columns']})"
            moved = bulk.pump(source, target, query, into, binary)
        except psycopg.errors.UniqueViolation:
            # rows that are there already: of an earlier copy, or of this one before it was interrupted
            target.execute("ROLLBACK TO tbl_repl")
            target.execute(str(piece["stage"]))
            moved = bulk.pump(source, target, query, "pg_temp.tbl_repl_rows", binary)
            target.execute(str(piece["merge"]), bulk.MERGE_SECONDS)
    failpoint.reached("piece moved")
    bulk.commit(target, float(lane["timeout"].total_seconds()))
    return moved
