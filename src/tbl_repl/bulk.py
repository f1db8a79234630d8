"""Large batches by COPY: from the source to the target, in large buffers, without looking inside.

What is read and run is decided in SQL (``tbl_repl._bulk_jobs``); here it is carried.  The order is that of
every drainer: lock, then snapshot, then ship and commit there, then move the position here.  Whatever does
not work is left to ``replay``, which finds the rows that are to blame.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row

from tbl_repl import failpoint
from tbl_repl.database import ENCODING, Connection, Row
from tbl_repl.errors import TblReplError

log = logging.getLogger("tbl_repl.bulk")

MIN_ROWS = 20_000
"""Fewer pending rows go through replay: one message is quicker than a COPY."""

BUFFER_BYTES = 1 << 18
SILENCE_SECONDS = 60.0
"""How long a target may take for one buffer before it counts as hung."""

MERGE_SECONDS = 3600.0
"""How long one statement over a whole batch may take."""


class Watchdog:
    """Ends a connection whose peer is waited for too long: a hung target must not hold the locks.

    What is waited for elsewhere meanwhile, as for the source's rows, does not count.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        # libpq takes one thread for a connection, so this one has the socket alone, by a number of its own
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._due = math.inf
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def expect(self, seconds: float | None = None) -> None:
        """The next step may take so long; as long as one buffer may, if nothing is said."""
        self._due = time.monotonic() + (SILENCE_SECONDS if seconds is None else seconds)

    def rest(self) -> None:
        """Nothing is expected until further notice."""
        self._due = math.inf

    @contextmanager
    def waiting(self, seconds: float | None = None) -> Iterator[None]:
        """``expect`` and ``rest`` around one step."""
        self.expect(seconds)
        try:
            yield
        finally:
            self.rest()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._done.wait(0.5):
            if time.monotonic() > self._due:
                log.warning("target does not answer, connection closed")
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                return


class ElsewhereError(TblReplError):
    """Host and port of a foreign server mean another server here than they do on the source."""

    def __init__(self, server: str) -> None:
        super().__init__(
            f"server {server} leads to another server from here than from the source",
            "Give it a host that means the same on both machines, or leave the rows to replay: "
            "SELECT tbl_repl.resync_target(N); CALL tbl_repl.drain();",
        )


@dataclass(frozen=True)
class Way:
    """How a target is reached from here.

    place: what place_query says over the source's own connection; lease: statement that fails there once
    the time $1, in seconds of our clock, is over.
    """

    server: str
    conninfo: str
    settings: str
    place_query: str
    place: str
    lease: str


@dataclass(frozen=True)
class Target:
    """A connection to a target, and the way it has come."""

    connection: psycopg.Connection[tuple[object, ...]]
    watchdog: Watchdog
    way: Way

    def execute(self, statement: str, seconds: float | None = None) -> psycopg.Cursor[tuple[object, ...]]:
        """Within so many seconds, SILENCE_SECONDS if nothing is said."""
        with self.watchdog.waiting(seconds):
            return self.connection.execute(statement.encode())


def ship(source: Connection, server: str, min_rows: int = MIN_ROWS) -> int | None:
    """Ship one large batch for one server; the number of rows, 0 if there is none, None if it did not work.

    ``source`` is in autocommit.  Holds the locks ``ship`` of the targets meanwhile.
    """
    lanes = source.execute("SELECT * FROM tbl_repl._bulk_lanes(%s, %s)", (server, min_rows)).fetchall()
    total, left = 0, False
    for lane in lanes:
        try:
            rows = _ship_lane(source, server, lane)
        except psycopg.Error as error:
            if source.closed or source.broken:
                raise
            log.info("left to replay server=%s sqlstate=%s", server, error.sqlstate)
            return total or None
        except ElsewhereError:
            log.info("left to replay server=%s reason=leads elsewhere from here", server)
            rows = None
        if rows is None:
            left = True
        else:
            total += rows
    return total or (None if left else 0)


def _ship_lane(source: Connection, server: str, lane: Row) -> int | None:
    """None where this role may not use the owner's mapping."""
    targets: list[int] = lane["targets"]
    way = way_to(source, server, lane)
    if way is None:
        log.info("left to replay server=%s reason=mapping of role %s", server, lane["owner"])
        return None
    with _locked(source, targets, lane), open_target(way) as target:
        failpoint.reached("copy locked")
        snapshot, counts = _move(source, target, lane)
        failpoint.reached("copy moved")
        if counts:
            commit(target, float(lane["timeout"].total_seconds()))
        failpoint.reached("copy committed")
        source.execute("SELECT tbl_repl._bulk_done(%s::pg_snapshot, %s)", (snapshot, json.dumps(counts)))
        failpoint.reached("copy done")
    return sum(counts.values())


@contextmanager
def open_target(way: Way) -> Iterator[Target]:
    """A connection to a target; whatever is not committed at the end is rolled back by its closing.

    The offset of its clock is rounded down: a lease may end early, never late.
    Raises ElsewhereError if it leads to another server than the source's own connection.
    """
    options = conninfo_to_dict(way.conninfo)
    options.setdefault("options", "")  # PGOPTIONS is meant for the source
    # what bounds one message is too short for a COPY, which the target takes at its own pace
    unsent = max(int(options.get("tcp_user_timeout") or 0), int(SILENCE_SECONDS * 1000))
    options["tcp_user_timeout"] = str(unsent)
    connection = psycopg.connect(
        make_conninfo("", **options), autocommit=True, row_factory=tuple_row, client_encoding=ENCODING
    )
    with closing(connection):
        watchdog = Watchdog(connection)
        try:
            with watchdog.waiting():
                place = connection.execute(way.place_query.encode()).fetchone()
                if place != (way.place,):
                    raise ElsewhereError(way.server)
                connection.execute(way.settings.encode())
                now = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
                assert now is not None
                connection.execute(f"SET tbl_repl.clock = '{float(str(now[0])) - time.time():.6f}'".encode())
            yield Target(connection, watchdog, way)
        finally:
            watchdog.stop()


def commit(target: Target, timeout: float) -> None:
    """Commit within the lease; a message whose fate is unknown is outlived before the error is raised."""
    deadline = time.time() + timeout
    try:
        target.execute(
            f"SET CONSTRAINTS ALL IMMEDIATE; {target.way.lease.replace('$1', str(deadline))}; COMMIT", timeout
        )
    except psycopg.errors.InvalidTextRepresentation as error:
        if "tbl_repl: lease over" in str(error):
            raise psycopg.errors.ConnectionException("the target has got the message too late") from error
        raise
    except psycopg.OperationalError:
        time.sleep(max(0.0, deadline - time.time()))
        raise


def way_to(source: Connection, server: str, lane: Row) -> Way | None:
    """None where this role may not use the owner's mapping.

    Opening the source's own connection first ends what a worker that has died has left there.
    """
    row = source.execute("SELECT * FROM tbl_repl._bulk_session(%s)", (lane["timeout"],)).fetchone()
    assert row is not None
    place = source.execute("SELECT tbl_repl._bulk_connect(%s) AS place", (lane["targets"][0],)).fetchone()
    assert place is not None
    try:
        with source.transaction():
            source.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(lane["owner"])))
            info = source.execute(
                "SELECT tbl_repl._conninfo(%s, %s, %s) AS conninfo",
                (server, lane["timeout"], row["application_name"]),
            ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return None
    if info is None or info["conninfo"] is None:
        return None
    return Way(server, info["conninfo"], row["settings"], row["place_query"], place["place"], row["lease"])


@contextmanager
def _locked(source: Connection, targets: list[int], lane: Row) -> Iterator[None]:
    """Hold ``ship`` of the targets for the session: waits for shippers in flight, bounded."""
    milliseconds = int(lane["timeout"].total_seconds() * 2000)
    held: list[int] = []
    try:
        source.execute(sql.SQL("SET lock_timeout = {}").format(sql.Literal(milliseconds)))
        for target in targets:
            source.execute("SELECT pg_advisory_lock(tbl_repl._lock_ship(), %s)", (target,))
            held.append(target)
        source.execute("RESET lock_timeout")
        yield
    finally:
        if not source.closed:
            source.execute("RESET lock_timeout")
            for target in held:
                source.execute("SELECT pg_advisory_unlock(tbl_repl._lock_ship(), %s)", (target,))


def _move(source: Connection, target: Target, lane: Row) -> tuple[str, dict[int, int]]:
    """Read in one snapshot and apply in one remote transaction, which is left open."""
    counts: dict[int, int] = {}
    with source.transaction():
        source.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        # a table may be locked here for long, and by somebody who waits for the locks that we hold
        source.execute("SET LOCAL lock_timeout = 1000")
        row = source.execute("SELECT pg_current_snapshot()::text AS snapshot").fetchone()
        assert row is not None
        jobs = source.execute("SELECT * FROM tbl_repl._bulk_jobs(%s)", (lane["targets"],)).fetchall()
        if not jobs:
            return str(row["snapshot"]), counts
        as_owner(source, lane)
        target.execute("BEGIN; SET CONSTRAINTS ALL DEFERRED")
        emptied = ", ".join(str(job["dst_table"]) for job in jobs if job["whole"])
        if emptied:
            target.execute(f"TRUNCATE {emptied}")
        for job in jobs:
            target.execute(str(job["stage"]))
        by_rank = sorted(jobs, key=lambda job: int(job["fk_rank"]))
        staged = [job for job in by_rank if job["batch_query"] is not None]
        for job in staged:
            into = f"pg_temp.tbl_repl_rows_{job['target_id']}"
            rows, _ = pump(source, target, str(job["batch_query"]), into, bool(job["is_binary"]))
            counts[int(job["target_id"])] = rows

        def remove() -> None:
            for job in reversed(staged):
                if job["gone"] is None or target.execute(str(job["gone"]), MERGE_SECONDS).rowcount:
                    target.execute(str(job["remove"]), MERGE_SECONDS)

        def merge() -> None:
            for job in by_rank:
                if job in staged:
                    target.execute(str(job["merge"]), MERGE_SECONDS)
                else:
                    counts[int(job["target_id"])] = _straight(source, target, job)

        for step in (merge, remove) if any(job["cascades"] for job in jobs) else (remove, merge):
            step()
    return str(row["snapshot"]), counts


def as_owner(source: Connection, lane: Row) -> None:
    """For this transaction: the target's owner, and settings under which a value has one text form."""
    row = source.execute("SELECT tbl_repl._text_session('LOCAL') AS settings").fetchone()
    assert row is not None
    source.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(lane["owner"])))
    source.execute("SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL row_security = off")
    source.execute(str(row["settings"]).encode())


def _straight(source: Connection, target: Target, job: Row) -> int:
    """COPY rows into the table itself; by way of a temporary one if the target has some of them already."""
    query, binary = str(job["rows_query"]), bool(job["is_binary"])
    target.execute("SAVEPOINT tbl_repl")
    try:
        return pump(source, target, query, f"{job['dst_table']} ({job['dst_columns']})", binary)[0]
    except psycopg.errors.UniqueViolation:
        target.execute("ROLLBACK TO tbl_repl")
    into = f"pg_temp.tbl_repl_rows_{job['target_id']} ({job['dst_columns']})"
    rows, _ = pump(source, target, query, into, binary)
    target.execute(str(job["merge"]), MERGE_SECONDS)
    return rows


def pump(source: Connection, target: Target, query: str, into: str, binary: bool) -> tuple[int, int]:
    """COPY a query's rows into a table; the number of rows and of bytes."""
    form = " (FORMAT binary)" if binary else ""
    with source.cursor() as reading, target.connection.cursor() as writing:
        with (
            reading.copy(f"COPY ({query}) TO STDOUT{form}".encode()) as rows,
            _copying(writing, f"COPY {into} FROM STDIN{form}", target.watchdog) as write,
        ):
            buffer, size = bytearray(), 0
            for row in rows:
                if len(row) >= BUFFER_BYTES:
                    # as it is: a huge row is not copied once more
                    size += len(buffer) + len(row)
                    write(bytes(buffer))
                    buffer.clear()
                    write(row)
                    continue
                buffer += row
                if len(buffer) >= BUFFER_BYTES:
                    size += len(buffer)
                    write(bytes(buffer))
                    buffer.clear()
            size += len(buffer)
            write(bytes(buffer))
        # "COPY 500000"
        return int((writing.statusmessage or "COPY 0").split()[-1]), size


@contextmanager
def _copying(
    cursor: psycopg.Cursor[tuple[object, ...]], statement: str, watchdog: Watchdog
) -> Iterator[Callable[[Buffer], None]]:
    """COPY FROM STDIN, watched over while it begins, is written to and ends."""

    def write(data: Buffer) -> None:
        with watchdog.waiting():
            copy.write(data)

    try:
        watchdog.expect()
        with cursor.copy(statement.encode()) as copy:
            watchdog.rest()
            try:
                yield write
            except BaseException:
                watchdog.expect()
                raise
            watchdog.expect(MERGE_SECONDS)
    finally:
        watchdog.rest()
