"""Against native logical replication (PUBLICATION, SUBSCRIPTION): a worker on one side, an apply worker on the other."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
from contenders import ASYNC, DBNAME, OWNER, PLAIN, ROWS, Contender, create_tables
from cpu import cpu_seconds, peak_mib
from report import Goal, Results
from workloads import UPDATE_AND_INSERT, Bench

from tbl_repl.cluster import SUPERUSER
from tbl_repl.errors import CheckFailed

PATIENCE_SECONDS = 600.0


def _publish(source: psycopg.Connection, table: str) -> None:
    source.execute(f"CREATE PUBLICATION pub_{table} FOR TABLE {table}")


NATIVE = Contender("logical replication", "t_native", _publish)
CONTENDERS = (ASYNC, NATIVE, PLAIN)


@dataclass
class Native:
    """The same two clusters; what replicates runs only while it is measured."""

    bench: Bench
    results: Results
    say: Callable[[str], None]
    soak_seconds: int
    backlog_rows: int
    row_bytes: int

    # --- what is measured

    def oltp(self) -> list[Goal]:
        """Four clients; source throughput, CPU of all processes, how long until the target has caught up."""
        tps, cpu = "UPDATE + INSERT, 4 clients, tps", "the same, CPU of all processes, us a transaction"
        top = "the same, CPU on top of no trigger, us a transaction"
        behind = "the same, caught up after the load, s"

        for row in (tps, cpu, top, behind):
            self.results.values[row].clear()  # in this order

        def measure(contender: Contender, _: int) -> None:
            self.bench.settle(contender.table)
            with self.replicating(contender, contender.table) as pids:
                before = cpu_seconds([os.getpid(), *pids])
                rate, transactions = self.bench.pgbench_counted(contender, UPDATE_AND_INSERT, 4)
                if contender.replicated:
                    self.results.add(behind, contender.name, self.marked(contender.table, time.monotonic()))
                spent = cpu_seconds([os.getpid(), *pids]) - before
            self.results.add(tps, contender.name, rate)
            self.results.add(cpu, contender.name, spent / transactions * 1e6)

        self.rounds("oltp", CONTENDERS, measure)
        bare = self.results.median(cpu, PLAIN.name) or 0.0
        for contender in (ASYNC, NATIVE):
            self.results.add(top, contender.name, (self.results.median(cpu, contender.name) or 0.0) - bare)
        return [
            Goal(tps, ASYNC.name, NATIVE.name, "at least", 1.0),
            Goal(cpu, ASYNC.name, NATIVE.name, "at most", 1.0),
            Goal(top, ASYNC.name, NATIVE.name, "at most", 1.0),
            Goal(behind, ASYNC.name, "", "at most", 0.2),
        ]

    def delay(self) -> list[Goal]:
        """From the return of a commit until the row is seen on the target, 50 commits a second."""
        median, worst = "commit to visible, 50 commits/s, p50, ms", "commit to visible, 50 commits/s, p99, ms"

        def measure(contender: Contender, _: int) -> None:
            self.bench.settle(contender.table)
            with self.replicating(contender, contender.table):
                delays = sorted(self._delays(contender.table))
            self.results.add(median, contender.name, statistics.median(delays) * 1000)
            self.results.add(worst, contender.name, delays[int(len(delays) * 0.99)] * 1000)

        self.rounds("delay", (ASYNC, NATIVE), measure)
        return [
            Goal(median, ASYNC.name, "", "at most", 3),
            Goal(worst, ASYNC.name, "", "at most", 15),
        ]

    def statements(self) -> list[Goal]:
        """One statement each; from its start until the target is identical."""
        bulk = self.bench.sizes.bulk
        rows = {"INSERT": bulk, "UPDATE": bulk // 5, "DELETE": bulk // 10}
        row = {kind: f"{kind} of {n:,} rows until the target is identical, s" for kind, n in rows.items()}
        statement = {
            "INSERT": "INSERT INTO {table} " + ROWS.format(first=1, last=rows["INSERT"]),
            "UPDATE": f"UPDATE {{table}} SET counter = counter + 1 WHERE id BETWEEN 1 AND {rows['UPDATE']}",
            "DELETE": f"DELETE FROM {{table}} WHERE id BETWEEN 1 AND {rows['DELETE']}",
        }

        def measure(contender: Contender, number: int) -> None:
            table = f"{contender.table}_n{number}"
            with self.fresh_table(contender, table), self.replicating(contender, table):
                for kind, text in statement.items():
                    self.bench.checkpoint()
                    with self.bench.source.connect(DBNAME, OWNER) as here:
                        begun = time.monotonic()
                        done = here.execute(text.format(table=table)).rowcount
                        if done != rows[kind]:
                            raise CheckFailed(f"{kind} of {done} rows, not {rows[kind]}")
                    self.results.add(row[kind], contender.name, self.marked(table, begun))
                    self.bench.compare(table)

        self.rounds("statements", (ASYNC, NATIVE), measure, compare=False)
        return [Goal(name, ASYNC.name, NATIVE.name, "at most", 1.0) for name in row.values()]

    def snapshot(self) -> list[Goal]:
        """A snapshot held open on the source all the time: whether draining gets slower, and the queue small again.

        The table without triggers shows what the snapshot does to the writers themselves.
        """
        first, last = "rows a second, first tenth", "rows a second, last tenth"
        held, after = "queue on disk while a snapshot is held, MiB", "queue on disk afterwards, MiB"
        tenth = self.soak_seconds / 10

        def load(contender: Contender, count: Callable[[], int]) -> None:
            self.say(f"snapshot: {self.soak_seconds} s, {contender.name}")
            with self.bench.source.connect(DBNAME, OWNER) as holder:
                holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                holder.execute(f"SELECT count(*) FROM {contender.table} WHERE id = 1")
                writers = threading.Thread(
                    target=self.bench.pgbench,
                    args=(contender, UPDATE_AND_INSERT, 4, self.soak_seconds),
                    daemon=True,
                )
                begun, samples = time.monotonic(), [(0.0, count())]
                writers.start()
                while writers.is_alive():
                    writers.join(min(1.0, tenth / 2))
                    samples.append((time.monotonic() - begun, count()))
                self.results.add(first, contender.name, _rate(samples, 0, tenth))
                self.results.add(
                    last, contender.name, _rate(samples, self.soak_seconds - tenth, self.soak_seconds)
                )
                if contender is ASYNC:
                    self.results.add(held, contender.name, self._queue_mib())

        self.bench.settle(ASYNC.table)
        with self.replicating(ASYNC, ASYNC.table):
            begun = time.monotonic()
            load(ASYNC, self._shipped)
            self.marked(ASYNC.table, begun)
            # the segments take turns with what comes next
            for _ in range(20):
                self.marked(ASYNC.table, begun)
            self.results.add(after, ASYNC.name, self._queue_mib())
        self.bench.compare(ASYNC.table)
        self.bench.settle(PLAIN.table)
        load(PLAIN, self._written)
        return [
            Goal(last, ASYNC.name, ASYNC.name, "at least", 0.8, to_row=first),
            Goal(after, ASYNC.name, "", "at most", 16),
        ]

    def memory(self) -> list[Goal]:
        """The worker's memory after a small batch, a large backlog, a huge row."""
        small = "memory of the worker after 1,000 rows, MiB"
        backlog = f"memory of the worker after a backlog of {self.backlog_rows:,} rows, MiB"
        huge = f"memory of the worker after a row of {self.row_bytes / 1e6:g} MB, MiB"
        table, size = "t_memory", self.row_bytes
        self.say("memory")
        with self.fresh_table(ASYNC, table), self.bench.source.connect(DBNAME, OWNER) as here:
            for row, statement in (
                (small, f"INSERT INTO {table} {ROWS.format(first=1, last=1000)}"),
                (backlog, f"INSERT INTO {table} {ROWS.format(first=1001, last=self.backlog_rows)}"),
                (huge, f"UPDATE {table} SET note = repeat(md5(id::text), {size} / 32) WHERE id = 1"),
            ):
                here.execute(statement)  # before the worker starts: a backlog
                with self.replicating(ASYNC, table) as pids:
                    self.marked(table, time.monotonic())
                    self.results.add(row, ASYNC.name, peak_mib(pids[-1]))
                self.bench.compare(table)
        return [
            Goal(backlog, ASYNC.name, ASYNC.name, "at most", 1.5, to_row=small),
            Goal(huge, ASYNC.name, ASYNC.name, "at most", 1.5, to_row=small),
        ]

    # --- how

    def rounds(
        self,
        title: str,
        contenders: tuple[Contender, ...],
        measure: Callable[[Contender, int], None],
        compare: bool = True,
    ) -> None:
        for number in range(1, self.bench.sizes.rounds + 1):
            self.say(f"{title}: round {number} of {self.bench.sizes.rounds}")
            for contender in contenders:
                measure(contender, number)
                if compare and contender.replicated:
                    self.bench.compare(contender.table)

    @contextlib.contextmanager
    def replicating(self, contender: Contender, table: str) -> Iterator[list[int]]:
        """What replicates is at work on an equal table; the processes whose descendants count, the worker last."""
        source, target = self.bench.source, self.bench.target
        pids = [pid for pid in (source.postmaster_pid(), target.postmaster_pid()) if pid]
        if contender is NATIVE:
            publisher = source.dsn(DBNAME, SUPERUSER)
            with target.connect(DBNAME, SUPERUSER) as there:
                there.execute(
                    f"CREATE SUBSCRIPTION sub CONNECTION '{publisher}' PUBLICATION pub_{table} WITH (copy_data = false)"
                )
                try:
                    self.marked(table, time.monotonic())
                    yield pids
                finally:
                    there.execute("DROP SUBSCRIPTION sub")
        elif contender is ASYNC:
            command = [sys.executable, "-m", "tbl_repl", "worker", "--dsn", source.dsn(DBNAME, OWNER)]
            worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            try:
                self.marked(table, time.monotonic())
                yield [*pids, worker.pid]
            finally:
                worker.send_signal(signal.SIGTERM)
                worker.wait(60)
        else:
            yield pids

    @contextlib.contextmanager
    def fresh_table(self, contender: Contender, table: str) -> Iterator[None]:
        with (
            self.bench.source.connect(DBNAME, OWNER) as here,
            self.bench.target.connect(DBNAME, OWNER) as there,
        ):
            create_tables(here, there, table, 0)
            contender.attach(here, table)
            yield
            if contender is ASYNC:
                here.execute("SELECT tbl_repl.drop_target(%s::text::regclass, 'target')", [table])
            for conn in (here, there):
                conn.execute(f"DROP TABLE {table}")

    def marked(self, table: str, since: float) -> float:
        """Write a last row and wait until it is on the target; the seconds since."""
        with (
            self.bench.source.connect(DBNAME, OWNER) as here,
            self.bench.target.connect(DBNAME, OWNER) as there,
        ):
            row = here.execute(
                f"INSERT INTO {table} (id, counter, note) VALUES (nextval('more'), 0, 'marker') RETURNING id"
            ).fetchone()
            assert row is not None
            query, late = f"SELECT FROM {table} WHERE id = %s", time.monotonic() + PATIENCE_SECONDS
            while there.execute(query, row, prepare=True).rowcount == 0:
                if time.monotonic() > late:
                    raise CheckFailed(f"the target's {table} does not catch up")
                time.sleep(0.001)
            return time.monotonic() - since

    def _delays(self, table: str) -> list[float]:
        first, count = (
            5_000_000_000 + time.monotonic_ns() // 1_000_000 * 100_000,
            self.bench.sizes.seconds * 50,
        )
        committed: dict[int, float] = {}
        seen: dict[int, float] = {}

        def poll() -> None:
            late = time.monotonic() + self.bench.sizes.seconds + 60
            with self.bench.target.connect(DBNAME, OWNER) as there:
                while len(seen) < count and time.monotonic() < late:
                    row = there.execute(f"SELECT max(id) FROM {table}", prepare=True).fetchone()
                    now, top = time.monotonic(), int(row[0]) if row and row[0] else 0
                    for number in range(first + len(seen), min(top, first + count - 1) + 1):
                        seen[number] = now
                    time.sleep(0.0003)

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        with self.bench.source.connect(DBNAME, OWNER) as here:
            due = time.monotonic()
            for number in range(first, first + count):
                due += 0.02
                time.sleep(max(0.0, due - time.monotonic()))
                here.execute(
                    f"INSERT INTO {table} (id, counter, note) VALUES (%s, 1, repeat('x', 60))",
                    [number],
                    prepare=True,
                )
                committed[number] = time.monotonic()
        poller.join()
        if len(seen) < count:
            raise CheckFailed(f"{count - len(seen)} rows were never seen on the target")
        return [max(0.0, seen[number] - committed[number]) for number in committed]

    def _shipped(self) -> int:
        (row,) = self.bench.source.sql(
            "SELECT g.rows FROM tbl_repl.progress AS g JOIN tbl_repl.target AS t USING (target_id)"
            f" WHERE t.dst_name = '{ASYNC.table}'", dbname=DBNAME, user=OWNER,
        )  # fmt: skip
        return int(row[0])

    def _written(self) -> int:
        (row,) = self.bench.source.sql(
            "SELECT n_tup_ins + n_tup_upd FROM pg_stat_user_tables WHERE relid = %s::regclass",
            [PLAIN.table], dbname=DBNAME, user=OWNER,
        )  # fmt: skip
        return int(row[0])

    def _queue_mib(self) -> float:
        query = "SELECT sum(pg_total_relation_size(c)) / 1048576.0 FROM unnest('{tbl_repl.change_0,tbl_repl.change_1}'::regclass[]) AS c"
        return float(self.bench.source.sql(query, dbname=DBNAME, user=OWNER)[0][0])


def _rate(samples: list[tuple[float, int]], since: float, until: float) -> float:
    """Rows a second between two moments, from the samples nearest to them."""

    def nearest(moment: float) -> tuple[float, int]:
        return min(samples, key=lambda sample: abs(sample[0] - moment))

    (begun, before), (ended, after) = nearest(since), nearest(until)
    return (after - before) / (ended - begun) if ended > begun else float("nan")


PARTS: dict[str, Callable[[Native], list[Goal]]] = {
    "oltp": Native.oltp,
    "delay": Native.delay,
    "statements": Native.statements,
}
SOAK: dict[str, Callable[[Native], list[Goal]]] = {"snapshot": Native.snapshot, "memory": Native.memory}
