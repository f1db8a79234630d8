"""The watcher of one database: wakes a drainer for each server that something is queued for, and sleeps.

Waking up.  NOTIFY takes a lock of the whole cluster at commit, so writers notify only while the
worker sleeps.  Asleep means: the watcher holds an advisory lock that every writer tries to share.
Writers that got it hold it to their commit, so the watcher, once it has it, has only to look at the
queue once more: whoever comes later finds it taken and notifies.  While a drainer is at work the
watcher does not sleep, it looks at the other servers every few milliseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress

import psycopg

from tbl_repl import copy, failpoint
from tbl_repl.database import Connection, connect, name_of, require_extension, require_rights, settle
from tbl_repl.drainer import CONNECTIONS, Batch, Drainer, Observer, Options, Slots, retry_after
from tbl_repl.errors import CannotConnect, TblReplError
from tbl_repl.logs import event, reason

log = logging.getLogger("tbl_repl.worker")

COPIES = 4
"""How many copies in the background are made at a time, of one database."""

COPY_JOBS = 2
"""How many connections a copy in the background uses, and one more on the source."""

SHORTEST_LOOK_SECONDS = 0.002
LONGEST_LOOK_SECONDS = 0.05
"""How often a watcher that is awake looks at the servers that are idle."""

HUNG_SECONDS = 0.5
"""How long a drainer has to be at work until somebody looks whether it hangs; how often at writers."""


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
