"""The worker: brings what is queued to every server, all the time.

One drainer (a thread with a connection of its own, while there are not too many) for each server of each
database, so that a dead target hurts nobody else, and one watcher for each database, which waits for changes.
What is right is decided in SQL: a drainer calls ``tbl_repl._replay`` until nothing is left that can be
shipped now; which targets wait for their next try is kept there, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import psycopg

from tbl_repl.database import Row, connect, name_of, require_extension, require_rights
from tbl_repl.drainer import CONNECTIONS, Drainer, Observer, Options
from tbl_repl.errors import TblReplError, from_psycopg
from tbl_repl.logs import event
from tbl_repl.watcher import Watcher

log = logging.getLogger("tbl_repl.worker")

ABORT_SECONDS = 1.0
"""How long an interrupted worker waits for its threads."""


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
