"""The worker: brings what is queued to every server, all the time.

One drainer (a thread with a connection of its own, while there are not too many) for each server of each
database, so that a dead target hurts nobody else, and one watcher for each database, which waits for changes.
What is right is decided in SQL: a drainer calls ``tbl_repl._replay`` until nothing is left that can be
shipped now; which targets wait for their next try is kept there, too.

Waking up.  NOTIFY takes a lock of the whole cluster at commit, so writers notify only while the
worker sleeps.  Asleep means: the watcher holds an advisory lock that every writer tries to share.
Writers that got it hold it to their commit, so the watcher, once it has it, has only to look at the
queue once more: whoever comes later finds it taken and notifies.  While a drainer is at work the
watcher does not sleep, it looks at the other servers every few milliseconds.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psycopg

from tbl_repl import bulk, copy, failpoint
from tbl_repl.database import Connection, Row, connect, name_of, require_extension, require_rights, settle
from tbl_repl.errors import CannotConnect, TblReplError, from_psycopg
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

COPIES = 4
"""How many copies in the background are made at a time, of one database."""

COPY_JOBS = 2
"""How many connections a copy in the background uses, and one more on the source."""

SHORTEST_LOOK_SECONDS = 0.002
LONGEST_LOOK_SECONDS = 0.05
"""How often a watcher that is awake looks at the servers that are idle."""

HUNG_SECONDS = 0.5
"""How long a drainer has to be at work until somebody looks whether it hangs; how often at writers."""

LONGEST_PAUSE_SECONDS = 0.04
"""How far apart a drainer begins small batches when there is always something to do."""

FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 30.0

ABORT_SECONDS = 1.0
"""How long an interrupted worker waits for its threads."""


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
    longest: float = min(LONGEST_PAUSE_SECONDS, SHORTEST_LOOK_SECONDS * 2 ** min(streak, 12))
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


class Copier(threading.Thread):
    """Makes the copies in the background that one server waits for, one after the other, in pieces.

    Beside the drainer, which goes on with what is queued for other targets meanwhile.  What it cannot do is
    left to replay: targets of owners whose mapping the worker's role may not use, those with a conflict
    policy, rows that a target rejects.
    """

    def __init__(
        self,
        dsn: str,
        server: str,
        targets: list[int],
        stop: threading.Event,
        observer: Observer,
        left_to_replay: set[int],
    ) -> None:
        super().__init__(name=f"copier {server}", daemon=True)
        self.dsn = dsn
        self.server = server
        self.targets = targets
        self.stop = stop
        self.observer = observer
        self.left_to_replay = left_to_replay
        self.broken = False

    def run(self) -> None:
        for target in self.targets:
            if self.stop.is_set():
                return
            try:
                if not self._copy(target):
                    return  # those that refer to it would have to wait as well
            except Exception:
                self.broken = True
                log.exception("copier failed server=%s", self.server)
                return

    def _copy(self, target: int) -> bool:
        begun = time.monotonic()
        rows = 0

        def seen(now: copy.Progress) -> None:
            nonlocal rows
            rows = now.rows

        try:
            ended = copy.copy(self.dsn, target, COPY_JOBS, on_progress=seen, stop=self.stop, background=True)
        except CannotConnect:
            return False  # the source is gone: the watcher says so
        except (
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.FeatureNotSupported,
            TblReplError,
        ) as error:
            self.left_to_replay.add(target)
            event(
                log, logging.INFO, "copy left to replay",
                server=self.server, target=target, reason=reason(error),
            )  # fmt: skip
            return True
        except psycopg.Error as error:
            return self._failed(target, error)
        seconds = time.monotonic() - begun
        if rows:
            self.observer.on_batch(Batch(name_of(self.dsn), self.server, rows, seconds))
        event(
            log, logging.INFO, "copied" if ended else "copy interrupted",
            server=self.server, target=target, rows=rows, seconds=round(seconds, 3),
        )  # fmt: skip
        return ended

    def _failed(self, target: int, error: psycopg.Error) -> bool:
        """Whether the next target can be tried."""
        code = error.sqlstate or "08006"
        event(
            log, logging.WARNING, "copy failed", server=self.server, target=target, reason=reason(error)
        )  # fmt: skip
        self.observer.on_batch(Batch(name_of(self.dsn), self.server, 0, 0.0, code))
        try:
            with connect(self.dsn, "worker") as source:
                row = source.execute(
                    "SELECT tbl_repl._copy_failed(%s, %s, %s) AS again",
                    (target, code, error.diag.message_primary or str(error)),
                ).fetchone()
        except (psycopg.Error, TblReplError):
            return False  # the source is gone: the watcher says so
        if row is not None and not row["again"]:
            self.left_to_replay.add(target)
        return False


class Watcher(threading.Thread):
    """Watches one database: one worker at a time, a drainer for each server, sleep and wake-up."""

    def __init__(self, dsn: str, options: Options, stop: threading.Event, observer: Observer) -> None:
        super().__init__(name=f"watcher {name_of(dsn)}", daemon=True)
        self.dsn = dsn
        self.options = options
        self.stop = stop
        self.observer = observer
        self.drainers: dict[str, Drainer] = {}
        self.copiers: dict[str, Copier] = {}
        self._broken = False
        self._failures = 0
        self._left_to_replay: set[int] = set()
        self._settled = threading.Event()
        self._slots = Slots(CONNECTIONS)
        self._connecting: dict[tuple[int, int], float] = {}
        self._hung_due = 0.0
        self._everybody_due = 0.0

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with settle(connect(self.dsn, "worker")) as connection:
                    require_extension(connection)
                    require_rights(connection)
                    if not self._take_turn(connection):
                        break
                    self._watch(connection)
            except (psycopg.Error, TblReplError) as error:
                self._rest(reason(error))
            except Exception:
                self._broken = True
                log.exception("watcher failed database=%s", name_of(self.dsn))
                self._rest("internal error")
        for drainer in self.drainers.values():
            drainer.wake()
        for thread in (*self.drainers.values(), *self.copiers.values()):
            thread.join()

    @property
    def broken(self) -> bool:
        """Whether a thread of this database has failed in a way that nobody has thought of."""
        threads: list[Drainer | Copier] = [*self.drainers.values(), *self.copiers.values()]
        return self._broken or any(thread.broken for thread in threads)

    def _rest(self, why: str) -> None:
        self._failures += 1
        delay = retry_after(self._failures)
        event(
            log, logging.WARNING, "source failed",
            database=name_of(self.dsn), reason=why, retry_in_seconds=round(delay, 1),
        )  # fmt: skip
        self.stop.wait(delay)

    def _take_turn(self, connection: Connection) -> bool:
        """Wait until no other worker serves this database."""
        said = False
        while not self.stop.is_set():
            row = connection.execute(
                "SELECT pg_try_advisory_lock(tbl_repl._lock_worker(), 0) AS mine"
            ).fetchone()
            if row and row["mine"]:
                event(log, logging.INFO, "serving", database=name_of(self.dsn))
                return True
            if not said:
                event(
                    log, logging.INFO, "waiting",
                    database=name_of(self.dsn), reason="another worker serves it",
                )  # fmt: skip
                said = True
            self.stop.wait(0.5)
        return False

    def _watch(self, connection: Connection) -> None:
        connection.execute("LISTEN tbl_repl")
        pause = SHORTEST_LOOK_SECONDS
        self._everybody_due = 0.0
        just_looked = False
        while not self.stop.is_set():
            if not just_looked:
                self._wake(connection)
            just_looked = False
            self._cancel_hung(connection)
            self._failures = 0  # a whole look has worked
            if not self._all_settled(pause):
                pause = min(pause * 2, LONGEST_LOOK_SECONDS)
                continue
            # From here to the unlock writers notify.
            if not self._try(connection, "pg_try_advisory_lock"):
                self.stop.wait(pause)  # writers in flight: look again soon
                pause = min(pause * 2, LONGEST_LOOK_SECONDS)
                continue
            pause = SHORTEST_LOOK_SECONDS
            try:
                wait = self._wake(connection)
                if wait > 0:
                    if self._sleep(connection, wait):
                        self._all_settled(SHORTEST_LOOK_SECONDS)  # it comes first
                    else:
                        self._wake(connection)
                just_looked = True
            finally:
                if not connection.closed:
                    self._try(connection, "pg_advisory_unlock")

    def _wake(self, connection: Connection) -> float:
        """Wake the drainers of servers that something can be shipped to; seconds until there is more to do.

        Once in a while all of them: for what nobody has said, as rows in quarantine.
        """
        everybody = time.monotonic() >= self._everybody_due
        if everybody:
            self._everybody_due = time.monotonic() + self.options.poll_seconds
        wait = self._everybody_due - time.monotonic()
        idle = {drainer.server for drainer in self.drainers.values() if drainer.ready}
        busy = [server for server in self.drainers if server not in idle]
        for row in connection.execute("SELECT * FROM tbl_repl._servers_to_replay(%s::name[])", (busy,)):
            due = row["wait_seconds"] == 0
            idle.discard(str(row["server"]))
            if row["copies"] is not None:
                self._copy(str(row["server"]), row["copies"])
                due = due or not self._left_to_replay.isdisjoint(row["copies"])
            if due:
                failpoint.reached("awake")
            drainer = self._drainer(str(row["server"]))
            if due or (everybody and drainer.may_look):
                drainer.wake(due)
                wait = 0
            elif row["wait_seconds"] is not None:
                wait = min(wait, float(row["wait_seconds"]))
        for server in idle:  # without targets by now
            drainer = self.drainers.pop(server)
            self._broken = self._broken or drainer.broken
            drainer.retire()
        return wait

    def _copy(self, server: str, targets: list[int]) -> None:
        """Let targets be copied in the background, unless it is being done already."""
        copier = self.copiers.get(server)
        wanted = [target for target in targets if target not in self._left_to_replay]
        at_work = sum(other.is_alive() for other in self.copiers.values())
        if wanted and at_work < COPIES and (copier is None or not copier.is_alive()):
            self._broken = self._broken or (copier is not None and copier.broken)
            copier = Copier(self.dsn, server, wanted, self.stop, self.observer, self._left_to_replay)
            self.copiers[server] = copier
            copier.start()

    def _sleep(self, connection: Connection, seconds: float) -> bool:
        """Until somebody notifies, or so long; whether the only drainer there is has been woken."""
        until = time.monotonic() + seconds
        while not self.stop.is_set():
            left = until - time.monotonic()
            if left <= 0:
                return False
            if any(connection.notifies(timeout=min(left, 0.2), stop_after=1)):
                drainers = list(self.drainers.values())
                if len(drainers) == 1 and drainers[0].ready:
                    drainers[0].wake()  # most likely it is meant: whether others are is asked when it is done
                    return True
                return False
        return False

    @staticmethod
    def _try(connection: Connection, function: str) -> bool:
        row = connection.execute(f"SELECT {function}(tbl_repl._lock_sleep(), 0) AS done").fetchone()
        return bool(row and row["done"])

    def _all_settled(self, seconds: float) -> bool:
        """Wait until no drainer is at work, at most so long."""
        until = time.monotonic() + seconds
        while True:
            self._settled.clear()
            if not any(drainer.busy for drainer in self.drainers.values()):
                return True
            left = until - time.monotonic()
            if left <= 0 or self.stop.is_set():
                return False
            self._settled.wait(left)

    def _cancel_hung(self, connection: Connection) -> None:
        """From PostgreSQL 16 on nothing else bounds connecting by dblink, a drainer's or a writer's."""
        now = time.monotonic()
        if connection.info.server_version < 160000:
            return
        if now < self._hung_due and not any(
            d.busy and now - d.busy_since > HUNG_SECONDS for d in self.drainers.values()
        ):
            return
        if now > self._hung_due + 10 * HUNG_SECONDS:
            self._connecting.clear()  # who was connecting then need not have been at it all the time
        self._hung_due = now + HUNG_SECONDS
        seen: dict[tuple[int, int], float] = {}
        for row in connection.execute("SELECT * FROM tbl_repl._connecting()"):
            who = (int(row["pid"]), int(row["lock_key"]))
            seen[who] = self._connecting.get(who, now)
            if now - seen[who] > float(row["patience_seconds"] or 5.0):
                event(log, logging.WARNING, "connecting hangs", pid=who[0])
                seen[who] = now
                ours = [d for d in self.drainers.values() if d.pid == who[0] and d.busy]
                for drainer in ours:
                    drainer.cancel()
                if not ours:
                    with suppress(psycopg.errors.InsufficientPrivilege):
                        connection.execute("SELECT tbl_repl._cancel_connecting(%s)", (who[1],))
        self._connecting = seen

    def _drainer(self, server: str) -> Drainer:
        drainer = self.drainers.get(server)
        if drainer is None:
            drainer = Drainer(
                self.dsn, server, self.options, self.stop, self.observer, self._settled, self._left_to_replay,
                self._slots,
            )  # fmt: skip
            self.drainers[server] = drainer
            drainer.start()
        return drainer


class Worker:
    """Every database that was named, until told to stop.

    ``stop`` lets the batches in progress end; ``abort`` interrupts them.
    """

    def __init__(
        self, dsns: Iterable[str], options: Options | None = None, observer: Observer | None = None
    ) -> None:
        self._stop = threading.Event()
        self._aborted_at: float | None = None
        self._watchers = [
            Watcher(dsn, options or Options(), self._stop, observer or Observer()) for dsn in dsns
        ]

    def run(self) -> bool:
        """Until stopped; False if batches had to be interrupted, or there was an internal error."""
        for watcher in self._watchers:
            watcher.start()
        for watcher in self._watchers:
            while watcher.is_alive():
                watcher.join(0.2)
                if self._aborted_at is not None and time.monotonic() - self._aborted_at > ABORT_SECONDS:
                    return False
        return self._aborted_at is None and not any(watcher.broken for watcher in self._watchers)

    def stop(self) -> None:
        event(log, logging.INFO, "stopping")
        self._stop.set()
        for watcher in self._watchers:
            for drainer in list(watcher.drainers.values()):
                drainer.wake()

    def abort(self) -> None:
        self.stop()
        self._aborted_at = self._aborted_at or time.monotonic()
        for watcher in self._watchers:
            for drainer in list(watcher.drainers.values()):
                threading.Thread(target=drainer.cancel, daemon=True).start()


@dataclass(frozen=True)
class Drained:
    """What is left when everything was drained once, and what has failed meanwhile.

    left: rows of target_status, and their ``database``, of those targets for which something is still pending
    or in quarantine (``held``).  reached: databases that have been looked at.
    """

    left: list[Row]
    problems: list[TblReplError]
    reached: list[str]


def drain_once(
    dsns: Sequence[str],
    options: Options | None = None,
    observer: Observer | None = None,
    stop: threading.Event | None = None,
) -> Drained:
    """Drain every server of every database once, all servers at a time; what fails hinders nothing else."""
    stop = stop or threading.Event()
    problems: dict[str, TblReplError] = {}  # what several drainers say alike is said once
    drainers: list[tuple[str, threading.Semaphore, Drainer]] = []
    reachable: list[str] = []
    left: list[Row] = []

    def attempt(dsn: str, call: Callable[[], None]) -> None:
        try:
            call()
            return
        except psycopg.Error as error:
            problem = from_psycopg(error)
        except TblReplError as error:
            problem = error
        except Exception as error:
            log.exception("drain failed")
            problem = TblReplError(f"internal error: {type(error).__name__}")
        where = f"{name_of(dsn)}: " if len(dsns) > 1 else ""
        said = f"{where}{problem}"
        problems[said] = type(problem)(said, problem.hint)

    def drain(dsn: str, room: threading.Semaphore, drainer: Drainer) -> None:
        with room:
            attempt(dsn, drainer.drain)
            drainer.close()

    def find(dsn: str) -> None:
        with connect(dsn, "worker") as connection:
            require_extension(connection)
            require_rights(connection)
            room = threading.Semaphore(CONNECTIONS)
            for row in connection.execute("SELECT server FROM tbl_repl._servers_to_replay()"):
                server = str(row["server"])
                drainer = Drainer(dsn, server, options or Options(), stop, observer or Observer())
                drainers.append((dsn, room, drainer))
        reachable.append(dsn)

    def look(dsn: str) -> None:
        with connect(dsn, "worker") as connection:
            left.extend(
                {"database": name_of(dsn), **row}
                for row in connection.execute(
                    "SELECT * FROM (SELECT s.*, (SELECT count(*) FROM tbl_repl.quarantine AS q "
                    "                            WHERE q.target_id = s.target_id) AS held "
                    "               FROM tbl_repl.target_status AS s) AS s "
                    "WHERE (pending_rows > 0 OR held > 0) AND status <> 'paused' ORDER BY target_id"
                )
            )

    for dsn in dsns:
        attempt(dsn, partial(find, dsn))
    threads = [threading.Thread(target=drain, args=each, daemon=True) for each in drainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
    for dsn in reachable:
        attempt(dsn, partial(look, dsn))
    return Drained(left, list(problems.values()), reachable)


__all__ = [
    "Batch",
    "Drainer",
    "Observer",
    "Options",
    "Watcher",
    "Worker",
    "drain_once",
    "retry_after",
]
