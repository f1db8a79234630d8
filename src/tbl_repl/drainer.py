"""A drainer: brings what is queued to one server, whenever it is woken."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg

from tbl_repl import bulk, failpoint
from tbl_repl.database import Connection, Row, connect, name_of, require_rights, settle
from tbl_repl.errors import TblReplError
from tbl_repl.logs import event, reason

log = logging.getLogger("tbl_repl.worker")

POLL_SECONDS = 1.0
"""How often a sleeping watcher looks at the queue although nobody has woken it."""

QUARANTINE_SECONDS = 60.0
"""How often rows in quarantine get another chance although they have not changed."""

BULK_PAUSE_SECONDS = 60.0
"""How long replay does everything after a COPY that did not work."""

CONNECTIONS = 20
"""How many drainers of one database are connected to it at a time: with many servers they take turns."""

TURN_SECONDS = 1.0
"""How long a drainer that has always something to do goes on while another one waits for its connection."""

FIRST_PAUSE_SECONDS = 0.002
LONGEST_PAUSE_SECONDS = 0.04
"""How far apart a drainer begins small batches when there is always something to do."""

FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 30.0


def retry_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, with jitter, bounded.

    For what is wrong on the source's side; ``tbl_repl._note_retry`` says the same of targets.
    """
    longest: float = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 12))
    return longest * random.uniform(0.5, 1.0)


def pause_after(streak: int) -> float:
    """How far apart the next two small batches begin after so many in a row, in seconds.

    Under load few batches of many rows cost less than many of few; who has waited for the first change after
    a quiet time is not delayed.
    """
    if streak < 2:
        return 0.0
    longest: float = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(streak, 12))
    return longest


@dataclass(frozen=True)
class Batch:
    """What one call of replay has done."""

    database: str
    server: str
    rows: int
    seconds: float
    sqlstate: str | None = None


@dataclass(frozen=True)
class Options:
    """How a worker works; the defaults are right unless measured otherwise."""

    batch_rows: int = 10_000
    poll_seconds: float = POLL_SECONDS


@dataclass
class Observer:
    """Who wants to know about batches (metrics, tests)."""

    on_batch: Callable[[Batch], None] = field(default=lambda _: None)


class Slots:
    """Who of the drainers of one database may be connected to it.

    Who is done keeps the connection until another one needs it; then the one that has been idle longest
    gives it away.  So while somebody waits, nobody is idle and connected.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._idle: dict[Drainer, None] = {}  # those idle and connected, longest first
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @property
    def spare(self) -> bool:
        return self._free > 0

    @property
    def wanted(self) -> bool:
        return bool(self._waiting)

    def take(self, drainer: Drainer, stop: threading.Event) -> bool:
        """Before it works; False: stopped before it was its turn."""
        with self._lock:
            if drainer in self._idle:
                del self._idle[drainer]
                return True
            if self._free:
                self._free -= 1
                return True
            if self._idle:
                other = next(iter(self._idle))
                del self._idle[other]
                other.close()
                return True
            turn = threading.Event()
            self._waiting.append(turn)
        while not turn.wait(0.2):
            if stop.is_set():
                return False
        return True

    def give(self, drainer: Drainer, keep: bool = True) -> None:
        """When it is done; keep: it may stay connected."""
        with self._lock:
            if keep and drainer.connected and not self._waiting:
                self._idle[drainer] = None
                return
            drainer.close()
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def leave(self, drainer: Drainer) -> None:
        """When it ends, idle."""
        with self._lock:
            if drainer in self._idle:
                del self._idle[drainer]
                self._free += 1
            drainer.close()


class Drainer(threading.Thread):
    """Drains one server of one database whenever it is woken."""

    def __init__(
        self,
        dsn: str,
        server: str,
        options: Options,
        stop: threading.Event,
        observer: Observer,
        settled: threading.Event | None = None,
        copies: set[int] | None = None,
        slots: Slots | None = None,
    ) -> None:
        """copies: targets whose copy in the background it makes as well; None: all."""
        super().__init__(name=f"drainer {server}", daemon=True)
        self.dsn = dsn
        self.server = server
        self.options = options
        self.stop = stop
        self.observer = observer
        self.busy = False
        self.busy_since = 0.0
        self.rest_until = 0.0
        self.broken = False
        self.pid: int | None = None
        self._copies = copies
        self._settled = settled or threading.Event()
        self._slots = slots or Slots(1)
        self._failures = 0
        self._retired = False
        self._due = False
        self._fruitless = 0
        self._quarantine_due = 0.0
        self._bulk_due = 0.0
        self._wanted = threading.Event()
        self._connection: Connection | None = None
        self._warning: tuple[str, str] | None = None

    @property
    def ready(self) -> bool:
        """Whether it would start at once if it were woken."""
        return not self.busy and time.monotonic() >= self.rest_until

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def may_look(self) -> bool:
        """Whether it is worth waking although nothing is due: it takes no connection from another one."""
        return self.connected or self._slots.spare or time.monotonic() >= self._quarantine_due

    def wake(self, due: bool = False) -> None:
        """Something may be queued; due: something is.  Called by the watcher, and by whoever stops it."""
        self._due = due
        self.busy_since = time.monotonic()
        self.busy = True
        self._wanted.set()

    def retire(self) -> None:
        """End it, which is idle."""
        self._retired = True
        self._wanted.set()

    def cancel(self) -> None:
        """Interrupt the batch in progress."""
        connection = self._connection
        if connection is not None:
            try:
                connection.cancel_safe(timeout=2)
            except psycopg.Error:
                log.debug("nothing to cancel server=%s", self.server)

    def run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self.stop.is_set() or self._retired or not self._slots.take(self, self.stop):
                break
            fine = False
            try:
                self.drain()
                self._failures = 0
                fine = True
            except (psycopg.Error, TblReplError) as error:
                if not self.stop.is_set():
                    self._rest(reason(error))
            except Exception:
                self.broken = True
                log.exception("drainer failed server=%s", self.server)
                self._rest("internal error")
            self._slots.give(self, keep=fine)
            self.busy = False
            self._settled.set()
        self.busy = False
        self._settled.set()
        self._slots.leave(self)

    def drain(self) -> None:
        """Replay until nothing is left that can be shipped now, or it is another one's turn."""
        connection = self._connected()
        turn_ends = time.monotonic() + TURN_SECONDS
        done = streak = 0
        while not self.stop.is_set():
            self._warning = None
            begun = time.monotonic()
            if done and begun > turn_ends and self._slots.wanted:
                return
            retry = begun >= self._quarantine_due
            failpoint.reached("before replay")
            row = self._replay(connection, retry, leave_large=begun >= self._bulk_due)
            moved: int | None = 0
            if row["rows"] < 0:
                moved = self._ship_by_copy(connection, begun)
                if moved:
                    done += moved
                    continue
                row = self._replay(connection, retry, leave_large=False)
            failpoint.reached("after replay")
            rows = int(row["rows"])
            sqlstate, why = self._warning or (None, "")
            if rows or sqlstate:
                self._report(rows, time.monotonic() - begun, sqlstate)
            if rows:
                done += rows
                streak += 1
                self.stop.wait(max(0.0, begun + pause_after(streak) - time.monotonic()))
                continue
            if retry:
                self._quarantine_due = begun + QUARANTINE_SECONDS
            if sqlstate is not None:
                if moved is None:
                    self._bulk_due = 0.0  # COPY failed for the same reason
                self._note_retry(connection, row, why)
            elif self._due and not done:
                # somebody else ships it, or holds it: do not ask without end
                self._fruitless = min(self._fruitless + 1, 9)
                self.rest_until = time.monotonic() + 0.001 * 2**self._fruitless
                return
            self._fruitless = 0
            return

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self.pid = None

    def _replay(self, connection: Connection, retry: bool, leave_large: bool) -> Row:
        row = connection.execute(
            "SELECT clock_timestamp() AS since, tbl_repl._replay(%s, %s, %s, %s::int[], %s) AS rows",
            (
                self.server,
                self.options.batch_rows,
                retry,
                None if self._copies is None else list(self._copies),
                leave_large,
            ),
            prepare=True,
        ).fetchone()
        assert row is not None
        return row

    def _ship_by_copy(self, connection: Connection, begun: float) -> int | None:
        """Rows shipped by COPY, 0: no batch is large enough; None: it did not work."""
        moved = bulk.ship(connection, self.server, bulk.MIN_ROWS)
        if moved is None:
            self._bulk_due = begun + BULK_PAUSE_SECONDS
        elif moved:
            self._report(moved, time.monotonic() - begun, None)
        return moved

    def _report(self, rows: int, seconds: float, sqlstate: str | None) -> None:
        self.observer.on_batch(Batch(name_of(self.dsn), self.server, rows, seconds, sqlstate))
        if rows:
            event(log, logging.INFO, "batch", server=self.server, rows=rows, seconds=round(seconds, 3))

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self.dsn, f"worker {self.server}")
            settle(self._connection)
            require_rights(self._connection)
            # a position that a crash takes back only means that the same is shipped again
            self._connection.execute("SET synchronous_commit = off")
            self._connection.add_notice_handler(self._on_notice)
            self.pid = self._connection.info.backend_pid
        return self._connection

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        # the diagnostic is valid during this call only
        if notice.severity_nonlocalized == "WARNING":
            self._warning = (notice.sqlstate or "01000", reason(notice))

    def _note_retry(self, connection: Connection, row: Row, why: str) -> None:
        """Let the targets that have failed wait; if it is not known which, this server as a whole."""
        noted = connection.execute(
            "SELECT tbl_repl._note_retry(%s, %s) AS seconds", (self.server, row["since"])
        ).fetchone()
        if noted is None or noted["seconds"] is None:
            self._rest(why)
            return
        event(
            log, logging.WARNING, "target failed",
            server=self.server, reason=why, retry_in_seconds=round(max(0.0, noted["seconds"]), 1),
        )  # fmt: skip

    def _rest(self, why: str) -> None:
        self._failures += 1
        delay = retry_after(self._failures)
        self.rest_until = time.monotonic() + delay
        event(
            log, logging.WARNING, "drainer failed",
            server=self.server, reason=why, retry_in_seconds=round(delay, 1),
        )  # fmt: skip
