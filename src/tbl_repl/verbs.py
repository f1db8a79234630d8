"""The verbs that talk to a source database; their names are those of the SQL functions."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections import deque
from typing import Any

import psycopg
from rich.console import Group
from rich.live import Live
from rich.text import Text

from tbl_repl.database import Connection, Row, connect, name_of, require_extension, resolve_dsn
from tbl_repl.errors import TblReplError, UsageError
from tbl_repl.report import as_json, console, human_seconds, lag, print_json, table

STATUS_COLUMNS = (
    "target_id", "source_table", "server", "dst_table", "mode", "status", "pending_rows", "lag",
    "rows_shipped", "last_shipped_at", "next_try_at", "last_error",
)  # fmt: skip


def _open(args: argparse.Namespace) -> Connection:
    connection = connect(resolve_dsn(args.dsn))
    require_extension(connection)
    return connection


def target_rows(connection: Connection) -> list[Row]:
    """Rows of target_status with lag in words."""
    rows = connection.execute("SELECT * FROM tbl_repl.target_status ORDER BY target_id").fetchall()
    for row in rows:
        row["lag"] = human_seconds(lag(row))
        row["source_table"] = str(row["source_table"])
    return rows


def _status(args: argparse.Namespace) -> int:
    with _open(args) as connection:
        rows = target_rows(connection)
        if args.graph:
            from tbl_repl.graph import mermaid

            node = connection.execute("SELECT tbl_repl.node_name() AS name").fetchone()
            sys.stdout.write(mermaid([(str(node["name"]) if node else "source", rows)]))
        elif args.json:
            print_json(rows)
        elif rows:
            console().print(table(rows, STATUS_COLUMNS))
        else:
            print("no targets; define one with SELECT tbl_repl.add_target(...)")
    return int(any(row["status"] in ("failed", "queueing") for row in rows))


def _check(args: argparse.Namespace) -> int:
    with _open(args) as connection:
        rows = connection.execute("SELECT * FROM tbl_repl.check()").fetchall()
    if args.json:
        print_json(rows)
    elif rows:
        console().print(table(rows, ("severity", "target_id", "code", "message", "hint")))
    else:
        print("all is well")
    return int(any(row["severity"] in ("error", "warning") for row in rows))


def _replay(args: argparse.Namespace) -> int:
    from tbl_repl.worker import drain_once

    begun = time.monotonic()
    shipped = 0

    def count(batch: Any) -> None:
        nonlocal shipped
        shipped += batch.rows

    from tbl_repl.worker import Observer

    left = drain_once([resolve_dsn(args.dsn)], args.batch_rows, Observer(count))
    seconds = time.monotonic() - begun
    if args.json:
        print_json(
            {"rows": shipped, "seconds": seconds, "pending": sum(int(row["pending_rows"]) for row in left)}
        )
    else:
        print(f"{shipped:,} rows in {human_seconds(seconds)}")
        for row in left:
            print(
                f"target {row['target_id']} ({row['server']}): {row['pending_rows']:,} rows left, "
                f"status {row['status']}: {row['last_error']}",
                file=sys.stderr,
            )
    return int(bool(left))


def _compare(args: argparse.Namespace) -> int:
    with _open(args) as connection, console().status(f"comparing target {args.target}") as _:
        rows = connection.execute("SELECT * FROM tbl_repl.compare_target(%s)", (args.target,)).fetchall()
    if args.json:
        print_json(rows)
    elif rows:
        console().print(table(rows, ("difference", "key")))
        print(f"{len(rows):,} differences")
    else:
        print("equal")
    return int(bool(rows))


def _repair(args: argparse.Namespace) -> int:
    with _open(args) as connection, console().status(f"repairing target {args.target}") as _:
        row = connection.execute(
            "SELECT tbl_repl.repair_target(%s, %s) AS rows", (args.target, args.delete_extra)
        ).fetchone()
    rows = int(row["rows"]) if row else 0
    if args.json:
        print_json({"queued": rows})
    else:
        print(f"{rows:,} rows queued; the worker or tbl-repl replay ships them")
    return 0


def _top(args: argparse.Namespace) -> int:
    """Refresh until interrupted; rows/s over the last few seconds."""
    history: dict[int, deque[tuple[float, int]]] = {}

    def view(connection: Connection) -> Group:
        rows = target_rows(connection)
        now = time.monotonic()
        for row in rows:
            seen = history.setdefault(int(row["target_id"]), deque(maxlen=6))
            seen.append((now, int(row["rows_shipped"])))
            seconds = seen[-1][0] - seen[0][0]
            row["rows_per_s"] = round((seen[-1][1] - seen[0][1]) / seconds) if seconds > 0 else None
        head = Text(
            f"{name_of(args.dsn)}   {time.strftime('%H:%M:%S')}   every {args.interval:g} s, Ctrl-C ends",
            style="dim",
        )
        columns = (
            "target_id",
            "source_table",
            "server",
            "mode",
            "status",
            "pending_rows",
            "lag",
            "rows_per_s",
            "last_error",
        )
        return Group(head, table(rows, columns))

    args.dsn = resolve_dsn(args.dsn)
    with _open(args) as connection:
        if args.json:
            while True:
                print(as_json(target_rows(connection)), flush=True)
                if args.once:
                    return 0
                time.sleep(args.interval)
        out = console()
        if args.once:
            out.print(view(connection))
            return 0
        with Live(view(connection), console=out, screen=out.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(args.interval)
                live.update(view(connection), refresh=True)


class _JsonLines(logging.Formatter):
    """One JSON object a line, for containers."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "thread": record.threadName,
                "message": record.getMessage(),
            }
        )


def _logging(args: argparse.Namespace) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonLines()
        if args.json
        else logging.Formatter("%(asctime)s %(levelname)s %(threadName)s: %(message)s")
    )
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, handlers=[handler])


def _worker(args: argparse.Namespace) -> int:
    from tbl_repl.worker import Observer, Worker, drain_once

    _logging(args)
    dsns = [resolve_dsn(dsn) for dsn in (args.dsn or [None])]
    observer = Observer()
    if args.metrics_port is not None:
        try:
            from tbl_repl.metrics import Metrics
        except ImportError as error:
            raise UsageError(
                "metrics need the package prometheus-client", "pip install 'tbl-repl[metrics]'"
            ) from error
        metrics = Metrics(dsns)
        observer = Observer(metrics.on_batch)
        metrics.serve(args.metrics_port)
    if args.once:
        return int(bool(drain_once(dsns, args.batch_rows, observer)))
    for dsn in dsns:
        try:
            with connect(dsn) as connection:
                require_extension(connection)
        except psycopg.Error as error:
            raise TblReplError(str(error).strip()) from error
    worker = Worker(dsns, args.batch_rows, observer)
    signals = 0

    def on_signal(*_: object) -> None:
        nonlocal signals
        signals += 1
        (worker.stop if signals == 1 else worker.abort)()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    worker.run()
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def register(verbs: Any) -> None:
    """Add the verbs of this module to the command line."""

    def verb(
        name: str, run: Any, text: str, dsn_help: str = "source database (default: TBL_REPL_DSN)"
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
        parser.set_defaults(run=run)
        parser.add_argument("--json", action="store_true", help="print JSON")
        if name == "worker":
            parser.add_argument(
                "--dsn", action="append", metavar="D", help=dsn_help + "; several are served at once"
            )
        else:
            parser.add_argument("--dsn", metavar="D", help=dsn_help)
        return parser

    worker = verb("worker", _worker, "bring what is queued to every server, all the time")
    worker.add_argument(
        "--once", action="store_true", help="drain once and end; exit code 1 if something is left"
    )
    worker.add_argument("--metrics-port", type=int, metavar="N", help="serve Prometheus metrics on this port")
    worker.add_argument(
        "--batch-rows", type=_positive, default=10_000, metavar="N", help="rows of a batch (10000)"
    )
    worker.add_argument("--verbose", action="store_true", help="log more")

    status = verb("status", _status, "show every target")
    status.add_argument("--graph", action="store_true", help="print the topology as a Mermaid diagram")

    top = verb("top", _top, "show every target, live")
    top.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    top.add_argument("--once", action="store_true", help="look once and end")

    verb("check", _check, "show every problem, on both sides")

    replay = verb("replay", _replay, "ship what is queued, until nothing is left")
    replay.add_argument(
        "--batch-rows", type=_positive, default=10_000, metavar="N", help="rows of a batch (10000)"
    )

    compare = verb("compare", _compare, "compare a target with its source")
    compare.add_argument("target", type=_positive, metavar="TARGET", help="target_id")

    repair = verb("repair", _repair, "queue what differs between a target and its source")
    repair.add_argument("target", type=_positive, metavar="TARGET", help="target_id")
    repair.add_argument(
        "--delete-extra", action="store_true", help="also delete rows that only the target has"
    )
