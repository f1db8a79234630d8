"""Copy a table in pieces, over several connections, while writers go on; interrupted, it can go on later.

The pieces and their state are in the source database; here rows are carried.  See sql/functions/copy.sql for
why a piece may be copied at any time, and twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from tbl_repl import bulk
from tbl_repl.database import Connection, Row, connect
from tbl_repl.errors import TblReplError

PIECE_ROWS = 50_000


@dataclass(frozen=True)
class Progress:
    """How far a copy has got; rows_planned as counted when the table was divided."""

    rows: int
    rows_planned: int
    bytes: int
    pieces: int
    pieces_done: int


def progress(source: Connection, target_id: int) -> Progress | None:
    """The present state of a copy; None when none is under way."""
    row = source.execute("SELECT * FROM tbl_repl.copy_progress WHERE target_id = %s", (target_id,)).fetchone()
    if row is None:
        return None
    return Progress(
        int(row["rows_copied"]), int(row["rows_planned"]), int(row["bytes_copied"]),
        int(row["pieces"]), int(row["pieces_done"]),
    )  # fmt: skip


def copy(
    dsn: str,
    target_id: int,
    jobs: int = 2,
    piece_rows: int = PIECE_ROWS,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> bool:
    """Copy every row of a target; whether it has ended (False: stopped, goes on when called again).

    Raises TblReplError when somebody else copies this target, or a piece fails: the pieces that are done stay
    done.  What was written meanwhile is queued, and shipped by replay afterwards.
    """
    stop = stop or threading.Event()
    with connect(dsn, f"copy {target_id}") as source:
        row = source.execute(
            "SELECT pg_try_advisory_lock(tbl_repl._lock_copy(), %s) AS mine", (target_id,)
        ).fetchone()
        if not (row and row["mine"]):
            raise TblReplError(f"target {target_id} is being copied by another session")
        source.execute("SELECT tbl_repl._copy_begin(%s, %s)", (target_id, piece_rows))
        lane = source.execute(
            "SELECT ARRAY[target_id] AS targets, owner, server, timeout "
            "FROM tbl_repl.target WHERE target_id = %s",
            (target_id,),
        ).fetchone()
        assert lane is not None
        failures: list[Exception] = []
        threads = [
            threading.Thread(target=_job, args=(dsn, lane, stop, failures), name=f"copy {n}", daemon=True)
            for n in range(jobs)
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.2) if threads[0].is_alive() else stop.wait(0.2)
                seen = progress(source, target_id)
                if seen is not None:
                    on_progress(seen)
        finally:
            if any(thread.is_alive() for thread in threads):
                stop.set()
            for thread in threads:
                thread.join()
        seen = progress(source, target_id)
        if seen is not None:
            on_progress(seen)
        if failures:
            raise failures[0]
        done = source.execute("SELECT tbl_repl._copy_finish(%s) AS done", (target_id,)).fetchone()
        return bool(done and done["done"])


def _job(dsn: str, lane: Row, stop: threading.Event, failures: list[Exception]) -> None:
    target_id = int(lane["targets"][0])
    try:
        with connect(dsn, f"copy {target_id}") as source:
            conninfo, settings = bulk.way_to(source, str(lane["server"]), lane)
            if conninfo is None:
                raise TblReplError(
                    f"the user mapping of role {lane['owner']} cannot be read",
                    f"Connect as {lane['owner']}, or as a member of that role.",
                )
            with bulk.open_target(conninfo, settings) as (target, offset):
                while not stop.is_set():
                    piece = source.execute("SELECT * FROM tbl_repl._copy_next(%s)", (target_id,)).fetchone()
                    if piece is None:
                        return
                    rows, size = _copy_piece(source, target, offset, lane, piece)
                    source.execute(
                        "SELECT tbl_repl._copy_done(%s, %s, %s, %s)", (target_id, piece["n"], rows, size)
                    )
    except (psycopg.Error, TblReplError) as error:
        failures.append(error)
        stop.set()


def _copy_piece(
    source: Connection, target: bulk.Target, offset: float, lane: Row, piece: Row
) -> tuple[int, int]:
    watchdog = bulk.Watchdog(target)
    try:
        with source.transaction():
            bulk.as_owner(source, lane)
            target.execute("BEGIN; SET CONSTRAINTS ALL DEFERRED; SAVEPOINT tbl_repl")
            query, binary = str(piece["rows_query"]), bool(piece["is_binary"])
            try:
                moved = bulk.pump(
                    source, target, watchdog, query, f"{piece['dst_table']} ({piece['dst_columns']})", binary
                )
            except psycopg.errors.UniqueViolation:
                # rows that are there already: of an earlier copy, or of this one before it was interrupted
                target.execute("ROLLBACK TO tbl_repl")
                target.execute(str(piece["stage"]).encode())
                moved = bulk.pump(source, target, watchdog, query, "pg_temp.tbl_repl_rows", binary)
                watchdog.expect(bulk.MERGE_SECONDS)
                target.execute(str(piece["merge"]).encode())
        bulk.commit(target, watchdog, offset, float(lane["timeout"].total_seconds()))
    except BaseException:
        if not target.closed:
            target.execute("ROLLBACK")
        raise
    finally:
        watchdog.stop()
    return moved
