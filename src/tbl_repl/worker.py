"""The worker: brings what is queued to every server, all the time.

One drainer (a thread with a connection of its own) for each server of each database, so that a dead
target hurts nobody else, and one watcher for each database, which waits for changes.  What is right
is decided in SQL: a drainer calls ``tbl_repl.replay`` until nothing is left.

Waking up.  NOTIFY takes a lock of the whole cluster at commit, so writers notify only while the
worker sleeps.  Asleep means: the watcher holds an advisory lock that every writer tries to share.
Writers that got it hold it to their commit, so the watcher, once it has it, has only to look at the
queue once more: whoever comes later finds it taken and notifies.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psycopg

from tbl_repl import bulk
from tbl_repl.database import Connection, Row, connect, name_of, require_extension
from tbl_repl.errors import CannotConnect, TblReplError, from_psycopg

log = logging.getLogger("tbl_repl.worker")

POLL_SECONDS = 1.0
"""How often a sleeping watcher looks at the queue although nobody has woken it."""

QUARANTINE_SECONDS = 60.0
"""How often rows in quarantine get another chance although they have not changed."""

BULK_PAUSE_SECONDS = 60.0
"""How long replay does everything after a COPY that did not work."""

FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 30.0


def retry_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, with jitter, bounded."""
    longest: float = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 12))
    return longest * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Batch:
    """What one call of replay has done."""

    database: str
    server: str
    rows: int
    seconds: float
    sqlstate: str | None = None


@dataclass
class Observer:
    """Who wants to know about batches (metrics, tests)."""

    on_batch: Callable[[Batch], None] = field(default=lambda _: None)


class Drainer(threading.Thread):
    """Drains one server of one database; sleeps until it is woken or its next try is due."""

    def __init__(
        self, dsn: str, server: str, batch_rows: int, stop: threading.Event, observer: Observer
    ) -> None:
        super().__init__(name=f"drainer {server}", daemon=True)
        self.dsn = dsn
        self.server = server
        self.batch_rows = batch_rows
        self.stop = stop
        self.observer = observer
        self.failures = 0
        self._lock = threading.Lock()
        self._retrying = False
        self._quarantine_due = 0.0
        self._bulk_due = 0.0
        self._wanted = threading.Event()
        self._idle = threading.Event()
        self._connection: Connection | None = None
        self._warning: psycopg.errors.Diagnostic | None = None

    def wake(self) -> None:
        """Something is queued, or may be; one that waits for its next try goes on waiting."""
        with self._lock:
            if not self._retrying:
                self._idle.clear()
            self._wanted.set()

    @property
    def idle(self) -> bool:
        """Nothing left when it last looked, or it waits until it may try again."""
        return self._idle.is_set()

    def cancel(self) -> None:
        """Interrupt the batch in progress."""
        connection = self._connection
        if connection is not None:
            connection.cancel_safe(timeout=2)

    def run(self) -> None:
        while not self.stop.is_set():
            self._wanted.wait()
            if self.stop.is_set():
                break
            with self._lock:
                self._wanted.clear()
                self._idle.clear()
            try:
                failed = self._drain()
            except (psycopg.Error, TblReplError) as error:
                failed = True
                self._drop()
                log.warning(
                    "drain failed server=%s error=%s", self.server, str(error).strip().replace("\n", " ")
                )
            if failed and not self.stop.is_set():
                self._wait_for_next_try()
            else:
                self.failures = 0
            self._idle.set()
        self._idle.set()
        self._drop()

    def _wait_for_next_try(self) -> None:
        """Idle as far as the others are concerned."""
        self.failures += 1
        delay = retry_after(self.failures)
        self._note_retry(delay)
        log.warning("retry server=%s failures=%d in_seconds=%.1f", self.server, self.failures, delay)
        with self._lock:
            self._retrying = True
            self._idle.set()
        self.stop.wait(delay)
        with self._lock:
            self._retrying = False
            self._wanted.set()

    def _drain(self) -> bool:
        """Replay until nothing is left; whether the target failed."""
        connection = self._connected()
        while not self.stop.is_set():
            self._warning = None
            begun = time.monotonic()
            if begun >= self._bulk_due:
                moved = bulk.ship(connection, self.server)
                if moved is None:
                    self._bulk_due = begun + BULK_PAUSE_SECONDS
                elif moved:
                    self._report(moved, time.monotonic() - begun, None)
                    continue
            retry = begun >= self._quarantine_due
            row = connection.execute(
                "SELECT tbl_repl._replay(%s, %s, %s) AS rows", (self.server, self.batch_rows, retry)
            ).fetchone()
            rows = int(row["rows"]) if row else 0
            seconds = time.monotonic() - begun
            if retry and rows == 0:
                self._quarantine_due = begun + QUARANTINE_SECONDS
            sqlstate = self._warning.sqlstate if self._warning is not None else None
            if rows or sqlstate:
                self._report(rows, seconds, sqlstate)
            if rows == 0:
                if self._warning is not None:
                    log.warning(
                        "target server=%s sqlstate=%s %s",
                        self.server,
                        sqlstate,
                        self._warning.message_primary,
                    )
                return self._warning is not None
        return False

    def _report(self, rows: int, seconds: float, sqlstate: str | None) -> None:
        self.observer.on_batch(Batch(name_of(self.dsn), self.server, rows, seconds, sqlstate))
        log.info("batch server=%s rows=%d seconds=%.3f", self.server, rows, seconds)

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self.dsn, f"worker {self.server}")
            self._connection.add_notice_handler(self._on_notice)
        return self._connection

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warning = notice

    def _note_retry(self, delay: float) -> None:
        try:
            self._connected().execute("SELECT tbl_repl._note_retry(%s, %s)", (self.server, delay))
        except (psycopg.Error, TblReplError):
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Watcher(threading.Thread):
    """Watches one database: one worker at a time, a drainer for each server, sleep and wake-up."""

    def __init__(self, dsn: str, batch_rows: int, stop: threading.Event, observer: Observer) -> None:
        super().__init__(name=f"watcher {name_of(dsn)}", daemon=True)
        self.dsn = dsn
        self.batch_rows = batch_rows
        self.stop = stop
        self.observer = observer
        self.drainers: dict[str, Drainer] = {}

    def run(self) -> None:
        failures = 0
        while not self.stop.is_set():
            try:
                with connect(self.dsn, "worker") as connection:
                    require_extension(connection)
                    if not self._take_turn(connection):
                        break
                    failures = 0
                    self._watch(connection)
            except (psycopg.Error, TblReplError) as error:
                failures += 1
                delay = retry_after(failures)
                log.warning(
                    "source database=%s error=%s retry_in_seconds=%.1f",
                    name_of(self.dsn), str(error).strip().replace("\n", " "), delay,
                )  # fmt: skip
                self.stop.wait(delay)
        for drainer in self.drainers.values():
            drainer.wake()
        for drainer in self.drainers.values():
            drainer.join()

    def _take_turn(self, connection: Connection) -> bool:
        """Wait until no other worker serves this database."""
        said = False
        while not self.stop.is_set():
            row = connection.execute(
                "SELECT pg_try_advisory_lock(tbl_repl._lock_worker(), 0) AS mine"
            ).fetchone()
            if row and row["mine"]:
                log.info("serving database=%s", name_of(self.dsn))
                return True
            if not said:
                log.info("waiting database=%s reason=another worker serves it", name_of(self.dsn))
                said = True
            self.stop.wait(0.5)
        return False

    def _watch(self, connection: Connection) -> None:
        connection.execute("LISTEN tbl_repl")
        pause = 0.002
        while not self.stop.is_set():
            for drainer in self._drainers(connection):
                drainer.wake()
            if not self._wait_idle():
                return
            # From here to the unlock writers notify.
            if not self._try(connection, "pg_try_advisory_lock"):
                self.stop.wait(pause)  # writers in flight: look again soon
                pause = min(pause * 2, 0.05)
                continue
            pause = 0.002
            try:
                row = connection.execute("SELECT tbl_repl._anything_to_replay() AS something").fetchone()
                if not (row and row["something"]):
                    self._sleep(connection)
            finally:
                if not connection.closed:
                    self._try(connection, "pg_advisory_unlock")

    def _sleep(self, connection: Connection) -> None:
        until = time.monotonic() + POLL_SECONDS
        while not self.stop.is_set():
            left = until - time.monotonic()
            if left <= 0 or any(connection.notifies(timeout=min(left, 0.2), stop_after=1)):
                return

    @staticmethod
    def _try(connection: Connection, function: str) -> bool:
        row = connection.execute(f"SELECT {function}(tbl_repl._lock_sleep(), 0) AS done").fetchone()
        return bool(row and row["done"])

    def _wait_idle(self) -> bool:
        for drainer in self.drainers.values():
            while not drainer._idle.wait(0.2):
                if self.stop.is_set():
                    return False
        return not self.stop.is_set()

    def _drainers(self, connection: Connection) -> Iterable[Drainer]:
        servers = [
            str(row["server"])
            for row in connection.execute("SELECT DISTINCT server FROM tbl_repl.target_status ORDER BY 1")
        ]
        for server in servers:
            if server not in self.drainers:
                drainer = Drainer(self.dsn, server, self.batch_rows, self.stop, self.observer)
                self.drainers[server] = drainer
                drainer.start()
        return [self.drainers[server] for server in servers]


class Worker:
    """Every database that was named, until told to stop.

    ``stop`` lets the batches in progress end; ``abort`` interrupts them.
    """

    def __init__(self, dsns: list[str], batch_rows: int = 10_000, observer: Observer | None = None) -> None:
        self._stop = threading.Event()
        self._watchers = [Watcher(dsn, batch_rows, self._stop, observer or Observer()) for dsn in dsns]

    def run(self) -> None:
        for watcher in self._watchers:
            watcher.start()
        for watcher in self._watchers:
            while watcher.is_alive():
                watcher.join(0.2)

    def stop(self) -> None:
        self._stop.set()
        for watcher in self._watchers:
            for drainer in list(watcher.drainers.values()):
                drainer.wake()

    def abort(self) -> None:
        self.stop()
        for watcher in self._watchers:
            for drainer in list(watcher.drainers.values()):
                drainer.cancel()


def drain_once(dsns: list[str], batch_rows: int = 10_000, observer: Observer | None = None) -> list[Row]:
    """Drain every server of every database once, all servers at a time.

    Returns the rows of target_status of those targets for which something is still pending.
    """
    observer = observer or Observer()
    left: list[Row] = []
    for dsn in dsns:
        with connect(dsn, "worker") as connection:
            require_extension(connection)
            servers = [
                str(r["server"])
                for r in connection.execute("SELECT DISTINCT server FROM tbl_repl.target_status")
            ]
            drainers = [Drainer(dsn, server, batch_rows, threading.Event(), observer) for server in servers]
            errors: list[Exception] = []

            def drain(drainer: Drainer, errors: list[Exception] = errors) -> None:
                try:
                    drainer._drain()
                except psycopg.Error as error:
                    errors.append(from_psycopg(error))
                except TblReplError as error:
                    errors.append(error)
                finally:
                    drainer._drop()

            threads = [threading.Thread(target=drain, args=(drainer,)) for drainer in drainers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]
            left += connection.execute(
                "SELECT * FROM tbl_repl.target_status "
                "WHERE pending_rows > 0 AND status <> 'paused' ORDER BY target_id"
            ).fetchall()
    return left


__all__ = ["Batch", "CannotConnect", "Drainer", "Observer", "Watcher", "Worker", "drain_once", "retry_after"]
