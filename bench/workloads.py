"""What is measured: pgbench for many small transactions, one session for one large statement."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from contenders import DBNAME, OWNER, ROWS, Contender, create_tables

from tbl_repl.cluster import Cluster
from tbl_repl.errors import CheckFailed, TblReplError
from tbl_repl.servers import Server, discover

UPDATE_ONE = """\\set k random(1, {rows})
UPDATE {table} SET counter = counter + 1, changed = now() WHERE id = :k;
"""

UPDATE_AND_INSERT = """\\set k random(1, {rows})
BEGIN;
UPDATE {table} SET counter = counter + 1, changed = now() WHERE id = :k;
INSERT INTO {table} (id, counter, note, amount)
    VALUES (nextval('more'), 1, '0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmn', 12.34);
COMMIT;
"""


@dataclass(frozen=True)
class Sizes:
    """How much: the figures of performance.md, or (quick) only enough to see that everything works."""

    rows: int = 100_000
    rounds: int = 5
    seconds: int = 5
    statement: int = 5_000
    large: int = 100_000
    bulk: int = 500_000


QUICK = Sizes(rows=2_000, rounds=1, seconds=1, statement=200, large=2_000, bulk=5_000)


def pgbench_of(server: Server) -> Path:
    """The server's own pgbench, or that of another installation: it works with every version."""
    for one in (server, *discover()):
        program = one.bindir / "pgbench"
        if program.exists():
            return program
    raise TblReplError("no pgbench was found", "It comes with PostgreSQL: name a pg_config in PG_CONFIGS.")


def _figure(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise TblReplError(f"pgbench does not say {pattern}:\n{text}")
    return float(found[1])


@dataclass
class Bench:
    """Two clusters with the tables of every contender."""

    source: Cluster
    target: Cluster
    sizes: Sizes

    # --- many small transactions

    def pgbench(
        self, contender: Contender, script: str, clients: int, seconds: int | None = None
    ) -> tuple[float, float]:
        """(mean latency in ms, transactions per second)."""
        done = self._pgbench(contender, script, clients, seconds)
        return _figure(done, r"latency average = ([\d.]+) ms"), _figure(done, r"tps = ([\d.]+)")

    def pgbench_counted(self, contender: Contender, script: str, clients: int) -> tuple[float, int]:
        """(transactions per second, number of transactions)."""
        done = self._pgbench(contender, script, clients, None)
        return _figure(done, r"tps = ([\d.]+)"), int(_figure(done, r"actually processed: (\d+)"))

    def _pgbench(self, contender: Contender, script: str, clients: int, seconds: int | None) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
            file.write(script.format(table=contender.table, rows=self.sizes.rows))
            file.flush()
            # fmt: off
            command = [
                str(pgbench_of(self.source.server)), "-n", "-M", "prepared", "-f", file.name,
                "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(seconds or self.sizes.seconds),
                self.source.dsn(DBNAME, OWNER),
            ]
            # fmt: on
            done = subprocess.run(
                command, env=self.source.server.env, capture_output=True, text=True, check=False
            )
        if done.returncode != 0 or re.search(r"failed transactions: [1-9]", done.stdout):
            raise TblReplError(f"pgbench failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def update_one(self, contender: Contender, clients: int) -> tuple[float, float]:
        self.settle(contender.table)
        return self.pgbench(contender, UPDATE_ONE, clients)

    def update_and_insert(self, contender: Contender) -> float:
        self.settle(contender.table)
        return self.pgbench(contender, UPDATE_AND_INSERT, 4)[1]

    # --- one large statement

    def update_many(self, contender: Contender, rows: int) -> tuple[float, float]:
        """(seconds, growth of the session's own memory in MiB) of one UPDATE, in a session that is connected."""
        table = contender.table
        self.settle(table)
        with self.source.connect(DBNAME, OWNER) as conn:
            conn.execute(f"UPDATE {table} SET counter = counter + 1 WHERE id = 1")
            with Memory(conn.info.backend_pid) as memory:
                begun = time.monotonic()
                done = conn.execute(f"UPDATE {table} SET counter = counter + 1 WHERE id <= {rows}").rowcount
                seconds = time.monotonic() - begun
        if done != rows:
            raise CheckFailed(f"{done} rows were updated, not {rows}")
        return seconds, memory.growth

    def bulk(self, contender: Contender, round_number: int) -> tuple[float, float]:
        """Seconds of one INSERT and of one UPDATE of all its rows, in a table of its own."""
        table, rows = f"{contender.table}_bulk_{round_number}", self.sizes.bulk
        with self.source.connect(DBNAME, OWNER) as here, self.target.connect(DBNAME, OWNER) as there:
            create_tables(here, there, table, 0)
            contender.attach(here, table)
            taken = []
            for statement in (
                f"INSERT INTO {table} {ROWS.format(first=1, last=rows)}",
                f"UPDATE {table} SET counter = counter + 1",
            ):
                self.checkpoint()
                begun = time.monotonic()
                done = here.execute(statement).rowcount
                taken.append(time.monotonic() - begun)
                if done != rows:
                    raise CheckFailed(f"{done} rows, not {rows}: {statement}")
            if contender.replicated and round_number == 1:
                here.execute("CALL tbl_repl.drain('target')")
                self.compare(table)
            if contender.replicated:
                here.execute("SELECT tbl_repl.drop_target(%s::text::regclass, 'target')", [table])
            for conn in (here, there):
                conn.execute(f"DROP TABLE {table}")
        return taken[0], taken[1]

    # --- between measurements

    def settle(self, table: str) -> None:
        """The same footing for everybody: vacuumed, and a checkpoint just before."""
        for cluster in (self.source, self.target):
            with cluster.connect(DBNAME) as conn:
                conn.execute(f"VACUUM {table}")
        self.checkpoint()

    def checkpoint(self) -> None:
        for cluster in (self.source, self.target):
            cluster.sql("CHECKPOINT")

    def compare(self, table: str) -> None:
        """Both sides hold the same rows, or nothing that was measured counts."""
        query = f"SELECT count(*), sum(hashtextextended(t::text, 0)) FROM {table} AS t"
        here, there = (c.sql(query, dbname=DBNAME, user=OWNER) for c in (self.source, self.target))
        if here != there:
            raise CheckFailed(f"the target's {table} is not the source's: {there[0]} there, {here[0]} here")

    def drain(self) -> None:
        self.source.sql("CALL tbl_repl.drain()", dbname=DBNAME, user=OWNER)


class Memory:
    """The greatest amount of private memory that a server process holds meanwhile, less what it began with."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._first = self._peak = self._now()

    @property
    def growth(self) -> float:
        """In MiB; not a number where the system does not tell."""
        return self._peak - self._first

    def _now(self) -> float:
        try:
            found = re.search(r"^RssAnon:\s+(\d+) kB", self._status.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            return float("nan")
        return int(found[1]) / 1024 if found else float("nan")

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._now())
