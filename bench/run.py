"""Compare tbl_repl with the triggers that people write by hand, and with logical replication; see README.md."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import native
from contenders import ASYNC, DBLINK, FDW, PLAIN, SYNC, Contender, prepare
from report import Goal, Results, figures_table, goals_table, section, show, write_page
from rich.console import Console
from workloads import QUICK, Bench, Sizes

from tbl_repl.cluster import Cluster, make_workdir
from tbl_repl.errors import TblReplError
from tbl_repl.install import install_for
from tbl_repl.servers import Server, discover

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "performance.md"

# Durable, with memory and WAL enough that no checkpoint falls into a measurement.
SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "on",
    "autovacuum_naptime": "1min",
}


class Run:
    """One run: every point, the contenders of a point in turn, as many rounds as the sizes say."""

    def __init__(self, bench: Bench, console: Console) -> None:
        self.bench, self.console = bench, console
        self.results = Results()

    def rounds(
        self, title: str, contenders: Sequence[Contender], measure: Callable[[Contender, int], None]
    ) -> None:
        """A,B,C,A,B,C: what disturbs the machine for a while hits all of them alike."""
        for number in range(1, self.bench.sizes.rounds + 1):
            self.console.print(f"{title}: round {number} of {self.bench.sizes.rounds}", highlight=False)
            for contender in contenders:
                measure(contender, number)
        # Without a drain before: a sync target that only queued would not have been measured.
        for contender in contenders:
            if contender is ASYNC:
                self.bench.drain()
            if contender.replicated:
                self.bench.compare(contender.table)

    def all(self) -> list[Goal]:
        sizes, bench, add = self.bench.sizes, self.bench, self.results.add
        one = "single-row UPDATE, 1 client, ms"
        four = "single-row UPDATE, 4 clients, tps"
        many = f"one UPDATE of {sizes.statement:,} rows, s"
        each = f"one UPDATE of {sizes.statement:,} rows, us a row"
        large = f"one UPDATE of {sizes.large:,} rows, s"
        large_each = f"one UPDATE of {sizes.large:,} rows, us a row"
        many_memory = f"memory, UPDATE of {sizes.statement:,} rows, MiB"
        large_memory = f"memory, UPDATE of {sizes.large:,} rows, MiB"
        capture = "UPDATE + INSERT, 4 clients, tps"
        insert = f"one INSERT of {sizes.bulk:,} rows, s"
        update = f"one UPDATE of {sizes.bulk:,} rows, s"

        self.rounds("one client", (SYNC, FDW, DBLINK, PLAIN),
                    lambda c, _: add(one, c.name, bench.update_one(c, 1)[0]))  # fmt: skip
        self.rounds("four clients", (SYNC, FDW, DBLINK, PLAIN),
                    lambda c, _: add(four, c.name, bench.update_one(c, 4)[1]))  # fmt: skip

        def measure_many(contender: Contender, _: int) -> None:
            seconds, memory = bench.update_many(contender, sizes.statement)
            add(many, contender.name, seconds)
            add(each, contender.name, seconds / sizes.statement * 1e6)
            add(many_memory, contender.name, memory)

        def measure_large(contender: Contender, _: int) -> None:
            seconds, memory = bench.update_many(contender, sizes.large)
            add(large, contender.name, seconds)
            add(large_each, contender.name, seconds / sizes.large * 1e6)
            add(large_memory, contender.name, memory)

        self.rounds("one large statement", (SYNC, FDW, DBLINK, PLAIN), measure_many)
        self.rounds("one very large statement", (SYNC, PLAIN), measure_large)
        self.rounds("async capture", (ASYNC, PLAIN),
                    lambda c, _: add(capture, c.name, bench.update_and_insert(c)))  # fmt: skip

        def measure_bulk(contender: Contender, number: int) -> None:
            inserted, updated = bench.bulk(contender, number)
            add(insert, contender.name, inserted)
            add(update, contender.name, updated)

        self.rounds("async bulk", (ASYNC, PLAIN), measure_bulk)
        return [
            Goal(one, SYNC.name, FDW.name, "at most", 0.85),
            Goal(four, SYNC.name, FDW.name, "at least", 1.15),
            Goal(many, FDW.name, SYNC.name, "at least", 20),
            Goal(many, DBLINK.name, SYNC.name, "at least", 20),
            Goal(large_each, SYNC.name, SYNC.name, "at most", 1.25, to_row=each),
            Goal(capture, ASYNC.name, PLAIN.name, "at least", 0.80),
            Goal(insert, ASYNC.name, PLAIN.name, "at most", 1.25),
            Goal(update, ASYNC.name, PLAIN.name, "at most", 1.25),
        ]


def chosen(name: str) -> Server:
    """The wheel's PostgreSQL or the newest found; or the one of that major version or name."""
    found = discover()
    for server in found:
        if name in ("", str(server.major), str(server)):
            return server
    raise TblReplError(
        f"no such PostgreSQL: {name or 'none at all'}", f"Found: {', '.join(map(str, found)) or 'none'}."
    )


def measure(part: str, server: Server, options: argparse.Namespace, console: Console) -> None:
    """Measure one part on two new clusters; show it and write it onto the page."""
    sizes = QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    settings = dict(SETTINGS) if part == TRIGGERS else {**SETTINGS, "wal_level": "logical"}
    with contextlib.ExitStack() as stack:
        workdir = make_workdir()
        stack.callback(shutil.rmtree, workdir, ignore_errors=True)
        source, target = (
            Cluster(server, n, workdir=workdir, settings=settings) for n in ("source", "target")
        )
        install_for(source)
        stack.enter_context(source)
        stack.enter_context(target)
        bench = Bench(source, target, sizes)
        if part == TRIGGERS:
            prepare(source, target, sizes.rows)
            run = Run(bench, console)
            goals, results = run.all(), run.results
        else:
            prepare(source, target, sizes.rows, native.CONTENDERS)
            results = Results()
            bounds = (options.soak_seconds, sizes.bulk * 10, 2_000_000 if options.quick else 100_000_000)
            goals = ALL_NATIVE[part](
                native.Native(bench, results, lambda text: console.print(text, highlight=False), *bounds)
            )
        version = source.sql("SHOW server_version")[0][0]
    known = [c.name for c in (SYNC, FDW, DBLINK, ASYNC, native.NATIVE, PLAIN)]
    names = [name for name in known if any(name in by_name for by_name in results.values.values())]
    show(console, f"{part}: medians (least to greatest)", figures_table(results, names))
    show(console, f"{part}: goals", goals_table(results, goals))
    page = options.page or (None if options.quick else PAGE)
    if page:
        said = ", ".join(f"{key} = {value}" for key, value in settings.items())
        write_page(page, part, section(results, goals, names, version, said))
        console.print(f"written: {page}")


TRIGGERS = "figures"
ALL_NATIVE = {**native.PARTS, **native.SOAK}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pg", default="", help="major version or name of a server found (default: the newest)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing"
    )
    parser.add_argument(
        "--only",
        metavar="A,B",
        help=f"these parts: {', '.join(('triggers', *ALL_NATIVE))} (default: all but the last two)",
    )
    parser.add_argument("--soak", action="store_true", help="also the parts that take long: snapshot, memory")
    parser.add_argument(
        "--soak-seconds", type=int, metavar="S", help="how long a snapshot is held (600; --quick: 4)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each point (5)")
    parser.add_argument(
        "--page", type=Path, help="where to write the figures (default: the documentation; --quick: nowhere)"
    )
    options = parser.parse_args()
    options.soak_seconds = options.soak_seconds or (4 if options.quick else 600)
    wanted = (
        options.only.split(",")
        if options.only
        else ["triggers", *(ALL_NATIVE if options.soak else native.PARTS)]
    )
    unknown = set(wanted) - {"triggers", *ALL_NATIVE}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    console = Console()
    # so that the clusters go, too
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        server = chosen(options.pg)
        for part in wanted:
            measure(TRIGGERS if part == "triggers" else part, server, options, console)
    except TblReplError as error:
        console.print(f"[bold red]{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
