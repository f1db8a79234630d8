"""Compare a target with its source in pieces, over several connections, and queue what differs.

What a difference is, is decided in SQL (sql/functions/compare.sql); here pieces are handed out and results
put together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tbl_repl.database import Connection, Row, source_session

PIECE_ROWS = 20_000

Range = tuple[str | None, str | None]
"""Keys after the first (None: from the start) and up to the second (None: to the end)."""


@dataclass(frozen=True)
class Progress:
    """How far a comparison has got; rows_planned is an estimate until every piece is known."""

    rows: int
    rows_planned: int


@dataclass
class _Work:
    """What the jobs share; guarded by the lock."""

    rows_planned: int
    next_after: str | None = None
    handed_out: bool = False  # every piece has been
    rows: int = 0
    ordered: bool = True
    ranges: dict[str | None, str] = field(default_factory=dict)  # not equal: after -> upto
    extra: list[Range] = field(default_factory=list)
    last: str | None = None
    failures: list[Exception] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def compare(
    dsn: str,
    target_id: int,
    jobs: int = 2,
    piece_rows: int = PIECE_ROWS,
    on_found: Callable[[list[Row]], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    repair: bool = False,
    delete_extra: bool = False,
) -> int:
    """Find every difference; the number of rows that repair has queued, 0 without it.

    on_found gets rows with difference, key_text (None: no row of the source can have that key) and key,
    piece by piece in no particular order, and is called by one thread at a time.  Raises what the first job
    to fail has raised.
    """
    with source_session(dsn, f"compare {target_id}") as source:
        row = source.execute("SELECT tbl_repl._compare_begin(%s) AS rows", (target_id,)).fetchone()
    work = _Work(int(row["rows"] or 0) if row else 0)
    queued = 0

    def handle(source: Connection, found: list[Row]) -> None:
        nonlocal queued
        if not found:
            return
        keys = [
            row["key_text"]
            for row in found
            if row["key_text"] is not None and (row["difference"] != "extra_on_target" or delete_extra)
        ]
        if repair and keys:
            source.execute("SELECT tbl_repl._queue_found(%s, %s)", (target_id, keys))
        with work.lock:
            queued += len(keys) if repair else 0
            on_found(found)

    def first_pass(source: Connection) -> None:
        while (piece := _next_piece(source, target_id, piece_rows, work)) is not None:
            chunks = source.execute(
                "SELECT * FROM tbl_repl._compare_rows(%s, %s, %s)", (target_id, *piece)
            ).fetchall()
            handle(source, [found for chunk in chunks for found in chunk["differences"]])
            with work.lock:
                work.rows += sum(int(chunk["rows"]) for chunk in chunks)
                for chunk in chunks:
                    work.ordered = work.ordered and bool(chunk["in_order"])
                    if not chunk["is_equal"]:
                        work.ranges[chunk["after"]] = str(chunk["upto"])

    def second_pass(source: Connection) -> None:
        while not work.stop.is_set():
            with work.lock:
                if not work.extra:
                    return
                piece = work.extra.pop()
            # as many as the target has: they are not to be here all at once
            with source.transaction(), source.cursor("extra") as cursor:
                cursor.execute(
                    "SELECT 'extra_on_target' AS difference, key_text, key "
                    "FROM tbl_repl._compare_extra(%s, %s, %s)",
                    (target_id, *piece),
                )
                while found := cursor.fetchmany(PIECE_ROWS):
                    handle(source, found)

    def report() -> None:
        on_progress(Progress(work.rows, work.rows_planned))

    _in_parallel(dsn, target_id, jobs, first_pass, work, report)
    # Bounds that do not ascend on the target say nothing about what lies between them.
    work.extra = [*joined(work.ranges), (work.last, None)] if work.ordered else [(None, None)]
    _in_parallel(dsn, target_id, min(jobs, len(work.extra)), second_pass, work, report)
    if repair:
        with source_session(dsn, f"compare {target_id}") as source:
            source.execute("SELECT tbl_repl._note_timeline(%s)", (target_id,))
    return queued


def joined(ranges: dict[str | None, str]) -> list[Range]:
    """Ranges (after -> upto) with those that follow on one another put together."""
    inner = set(ranges.values())
    out: list[Range] = []
    for after in ranges:
        if after in inner:
            continue
        upto = ranges[after]
        while upto in ranges:
            upto = ranges[upto]
        out.append((after, upto))
    return out


def _next_piece(source: Connection, target_id: int, rows: int, work: _Work) -> Range | None:
    """The next piece that nobody has taken; None when there is none, or everybody is to stop."""
    with work.lock:
        if work.handed_out or work.stop.is_set():
            return None
        after = work.next_after
        row = source.execute(
            "SELECT upto, rows FROM tbl_repl._compare_piece(%s, %s, %s)", (target_id, after, rows)
        ).fetchone()
        assert row is not None
        upto: str | None = row["upto"]
        if upto is None:
            work.handed_out = True
            return None
        work.next_after = work.last = upto
        return after, upto


def _in_parallel(
    dsn: str,
    target_id: int,
    jobs: int,
    run: Callable[[Connection], None],
    work: _Work,
    report: Callable[[], None],
) -> None:
    """Run it in so many sessions; all of them stop when one fails."""

    def job() -> None:
        try:
            with source_session(dsn, f"compare {target_id}") as source:
                run(source)
        except Exception as error:
            work.failures.append(error)
            work.stop.set()

    threads = [threading.Thread(target=job, name=f"compare {n}", daemon=True) for n in range(jobs)]
    report()
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                report()
    except BaseException:
        work.stop.set()
        raise
    report()
    if work.failures:
        raise work.failures[0]
