"""The verbs that talk to a source database; their names are those of the SQL functions."""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import psycopg
from rich.live import Live

from tbl_repl import logs
from tbl_repl.database import (
    Connection,
    Row,
    connect,
    name_of,
    place_of,
    require_extension,
    require_rights,
    require_usage,
    resolve_dsn,
)
from tbl_repl.drainer import POLL_SECONDS, Batch, Observer, Options
from tbl_repl.errors import CannotConnect, IsStandby, TblReplError, UsageError, from_psycopg, tell
from tbl_repl.graph import Node, mermaid
from tbl_repl.progress import progress
from tbl_repl.report import (
    JsonArray,
    as_json,
    console,
    counted,
    fitting,
    human_seconds,
    one_line,
    print_json,
    show,
    table,
)
from tbl_repl.signals import terminated_as_interrupted
from tbl_repl.top import TOP_LAYOUTS, Top, target_rows
from tbl_repl.worker import Worker, drain_once

log = logging.getLogger("tbl_repl.verbs")

STATUS_COLUMNS = (
    "target_id", "source_table", "server", "dst_table", "mode", "status", "pending_rows", "lag",
    "rows_shipped", "last_shipped_at", "next_try_at", "last_error",
)  # fmt: skip
EVERY_STATUS_COLUMN = (
    *STATUS_COLUMNS[:8], "oldest_pending_at", "in_doubt", *STATUS_COLUMNS[8:-1],
    "last_error_at", "last_error",
)  # fmt: skip
STATUS_LAYOUTS = (
    EVERY_STATUS_COLUMN,
    STATUS_COLUMNS,
    STATUS_COLUMNS[:-1],
    STATUS_COLUMNS[:8],
    (*STATUS_COLUMNS[:3], *STATUS_COLUMNS[4:8]),
    (*STATUS_COLUMNS[:2], *STATUS_COLUMNS[4:8]),
)
SHOWN_DIFFERENCES = 1000
"""How many compare shows to a person."""

CHECK_COLUMNS = ("severity", "target_id", "code", "message", "hint")


def _dsns(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(resolve_dsn(dsn) for dsn in (args.dsn or [None])))


def _open(args: argparse.Namespace, access: str = "reader") -> Connection:
    connection = connect(resolve_dsn(args.dsn))
    require_extension(connection)
    require_usage(connection, access)
    return connection


def _each(dsns: Sequence[str], look: Callable[[str, Connection], None]) -> list[TblReplError]:
    """Look at every database; what is wrong with those that do not answer."""
    problems: list[TblReplError] = []
    for dsn in dsns:
        try:
            with connect(dsn) as connection:
                require_extension(connection)
                require_usage(connection, "reader")
                look(dsn, connection)
        except (psycopg.Error, TblReplError) as error:
            if len(dsns) == 1:
                raise
            problem = from_psycopg(error) if isinstance(error, psycopg.Error) else error
            problems.append(type(problem)(f"{name_of(dsn)}: {problem}", problem.hint))
    return problems


def _end(code: int, problems: list[TblReplError]) -> int:
    """Say what is wrong, behind what has been printed; the worst exit code."""
    sys.stdout.flush()
    return max([code, *(tell(problem) for problem in problems)])


@contextmanager
def _toward(args: argparse.Namespace) -> Iterator[None]:
    """Of a target out of reach, say which one it is, and where its server leads; or that it was dropped."""

    def server() -> str | None:
        row = connection.execute(
            "SELECT server FROM tbl_repl.target_status WHERE target_id = %s", (args.target,)
        ).fetchone()
        return str(row["server"]) if row else None

    with _open(args, "operator") as connection:
        name = server()
        place = _places(connection).get(name) if name else None
    try:
        yield
    except psycopg.Error as error:
        if name is None:
            raise
        # only of the target: of the source that is raised already as such
        problem = from_psycopg(error)
        if not isinstance(problem, CannotConnect):
            with _open(args) as connection:
                if server() is None:
                    raise TblReplError(f"target {args.target} was dropped") from error
            raise
        raise CannotConnect(
            f"server {name} ({place}) of target {args.target}: {problem}", problem.hint
        ) from error


def _node_name(connection: Connection) -> str:
    row = connection.execute("SELECT tbl_repl.node_name() AS name").fetchone()
    assert row is not None
    return str(row["name"])


def _places(connection: Connection) -> dict[str, str]:
    """Where each foreign server leads: name -> host:port/database."""
    return {
        str(row["server"]): place_of(row["options"])
        for row in connection.execute(
            """
            SELECT f.srvname AS server,
                   (SELECT coalesce(jsonb_object_agg(option_name, option_value), '{}')
                    FROM pg_options_to_table(f.srvoptions)) AS options
            FROM pg_foreign_server AS f
            """
        )
    }


def _status(args: argparse.Namespace) -> int:
    nodes: list[Node] = []

    def look(dsn: str, connection: Connection) -> None:
        if args.graph:  # tables of all nodes by their full names
            connection.execute("SET search_path = pg_catalog")
        rows = target_rows(connection)
        nodes.append(Node(_node_name(connection), name_of(dsn), rows, _places(connection)))

    dsns = _dsns(args)
    problems = _each(dsns, look)
    first = ("node",) if len(dsns) > 1 else ()
    everything = [{"node": node.name, **row} if first else row for node in nodes for row in node.targets]
    if args.graph and nodes:
        if args.json:
            print_json({"graph": mermaid(nodes)})
        else:
            sys.stdout.write(mermaid(nodes))
    elif args.json and nodes:
        print_json(everything)
    elif everything:
        out = console()
        show(out, fitting(everything, [(*first, *columns) for columns in STATUS_LAYOUTS], out))
    elif not problems:
        print("no targets; define one with SELECT tbl_repl.add_target(...)")
    return _end(int(any(row["status"] in ("failed", "queueing") for row in everything)), problems)


def _check(args: argparse.Namespace) -> int:
    rows: list[Row] = []
    dsns = _dsns(args)
    first = ("database",) if len(dsns) > 1 else ()

    def look(dsn: str, connection: Connection) -> None:
        found = connection.execute("SELECT * FROM tbl_repl.check()").fetchall()
        rows.extend({"database": name_of(dsn), **row} if first else row for row in found)

    problems = _each(dsns, look)
    if args.json and len(problems) < len(dsns):
        print_json(rows)
    elif rows:
        out = console()
        show(out, fitting(rows, [(*first, *CHECK_COLUMNS)], out))
    elif not problems:
        print("all is well")
    return _end(int(any(row["severity"] in ("error", "warning") for row in rows)), problems)


def _replay(args: argparse.Namespace) -> int:
    begun = time.monotonic()
    shipped = 0

    def count(batch: Batch) -> None:
        nonlocal shipped
        shipped += batch.rows

    dsns = _dsns(args)
    drained = drain_once(dsns, Options(args.batch_rows), Observer(count))
    left = drained.left
    seconds = time.monotonic() - begun
    if not drained.reached:
        return _end(0, drained.problems)
    if args.json:
        print_json(
            {
                "rows": shipped,
                "seconds": round(seconds, 3),
                "pending": sum(int(row["pending_rows"]) for row in left),
                "quarantined": sum(int(row["held"]) for row in left),
            }
        )
    else:
        print(f"{counted(shipped, 'row')} in {human_seconds(seconds)}")
        for row in left:
            where = f"{row['database']}: " if len(dsns) > 1 else ""
            left_rows = counted(row["pending_rows"], "row")
            line = (
                f"{where}target {row['target_id']} ({row['server']}): {left_rows} left, "
                f"{row['held']:,} in quarantine, status {row['status']}: {row['last_error']}"
            )
            print(one_line(line), file=sys.stderr)
    return _end(int(bool(left)), drained.problems)


def _compare(args: argparse.Namespace) -> int:
    from tbl_repl.compare import compare

    listed = JsonArray()
    shown: list[Row] = []
    differences = 0

    def note(found: list[Row]) -> None:
        nonlocal differences
        differences += len(found)
        rows = ({"difference": row["difference"], "key": row["key"]} for row in found)
        if args.json:
            listed.extend(rows)
        else:
            shown.extend(islice(rows, SHOWN_DIFFERENCES - len(shown)))

    dsn = resolve_dsn(args.dsn)
    with _toward(args), progress(args.target, args.json) as tick:
        compare(
            dsn,
            args.target,
            args.jobs,
            args.piece_rows,
            on_found=note,
            on_progress=lambda seen: tick(seen.rows, seen.rows_planned, 0),
        )
    if args.json:
        listed.end()
    elif differences:
        show(console(), table(shown, ("difference", "key")))
        if differences > len(shown):
            print(f"and {differences - len(shown):,} more; --json lists all")
        print(counted(differences, "difference"))
    else:
        print("equal")
    return int(differences > 0)


def _repair(args: argparse.Namespace) -> int:
    from tbl_repl.compare import compare

    out_of_reach = 0

    def count(found: list[Row]) -> None:
        nonlocal out_of_reach
        out_of_reach += sum(row["key_text"] is None for row in found)

    dsn = resolve_dsn(args.dsn)
    with _toward(args), progress(args.target, args.json) as tick:
        queued = compare(
            dsn,
            args.target,
            args.jobs,
            args.piece_rows,
            on_found=count,
            on_progress=lambda seen: tick(seen.rows, seen.rows_planned, 0),
            repair=True,
            delete_extra=args.delete_extra,
        )
    if args.json:
        print_json({"queued": queued})
    else:
        print(f"{counted(queued, 'row')} queued; the worker or tbl-repl replay ships them")
    if out_of_reach and args.delete_extra:
        print(
            f"{counted(out_of_reach, 'row')} of the target with keys that no row of the source can have: "
            "delete them there, tbl-repl compare lists them",
            file=sys.stderr,
        )
    return 0


def _copy(args: argparse.Namespace) -> int:
    from tbl_repl.copy import Progress, copy

    dsn = resolve_dsn(args.dsn)
    begun = time.monotonic()
    last = Progress(0, 0, 0)
    with _toward(args), progress(args.target, args.json) as tick:

        def seen(now: Progress) -> None:
            nonlocal last
            last = now
            tick(now.rows, now.rows_planned, now.bytes)

        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        ended = copy(dsn, args.target, args.jobs, args.piece_rows, seen, stop)
    seconds = time.monotonic() - begun
    if args.json:
        print_json({"rows": last.rows, "bytes": last.bytes, "seconds": seconds, "ended": ended})
    elif ended:
        print(
            f"{counted(last.rows, 'row')} in {human_seconds(seconds)}; the worker or tbl-repl replay ships "
            "what was written meanwhile, and sets the target back to ok"
        )
    else:
        print("stopped; the same command goes on with it")
    return int(not ended)


def _top(args: argparse.Namespace) -> int:
    """Refresh until interrupted."""
    dsn = resolve_dsn(args.dsn)
    out = console()
    top = Top(dsn, _open(args), args.interval, out)
    try:
        if args.json:
            while True:
                rows = top.look()
                if not top.problem:
                    print(as_json(rows), flush=True)
                if args.once:
                    return 0
                time.sleep(args.interval)
        if args.once:
            show(out, fitting(top.look(), TOP_LAYOUTS, out))
            return 0
        if not out.is_terminal or out.is_dumb_terminal:
            while True:
                show(out, top.view())
                sys.stdout.flush()
                time.sleep(args.interval)
        with terminated_as_interrupted(), Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                live.update(top.view(), refresh=True)
                time.sleep(args.interval)
    finally:
        top.close()


def _serve_metrics(dsns: list[str], port: int) -> Observer:
    """Serve Prometheus metrics; who counts the batches."""
    try:
        from tbl_repl.metrics import Metrics
    except ImportError as error:
        raise UsageError(
            "metrics need the package prometheus-client",
            "In a checkout of tbl_repl: pip install '.[metrics]'",
        ) from error
    metrics = Metrics(dsns)
    try:
        metrics.serve(port)
    except OSError as error:
        raise TblReplError(f"cannot serve metrics on port {port}: {error.strerror or error}") from error
    return Observer(metrics.on_batch)


def _reachable(dsns: list[str]) -> None:
    """Raise where the worker could serve none of the databases, or one has no tbl_repl, or no right to it."""
    problems: list[CannotConnect] = []
    for dsn in dsns:
        try:
            with connect(dsn) as connection:
                require_extension(connection)
                require_rights(connection)
        except CannotConnect as error:
            problems.append(error)
        except IsStandby as error:
            log.warning("%s", error)  # it may be promoted
    if len(problems) == len(dsns):
        raise problems[0]


def _worker(args: argparse.Namespace) -> int:
    logs.start(args.json, args.verbose)
    dsns = _dsns(args)
    observer = Observer() if args.metrics_port is None else _serve_metrics(dsns, args.metrics_port)
    options = Options(args.batch_rows, args.poll_seconds)
    if args.once:
        drained = drain_once(dsns, options, observer)
        for row in drained.left:
            logs.event(
                log,
                logging.WARNING,
                "left",
                target=row["target_id"],
                server=row["server"],
                status=row["status"],
                pending=row["pending_rows"],
                quarantined=row["held"],
                database=row["database"],
            )
        return _end(int(bool(drained.left)), drained.problems)
    _reachable(dsns)
    worker = Worker(dsns, options, observer)
    signals = 0

    def on_signal(*_: object) -> None:
        nonlocal signals
        signals += 1
        (worker.stop if signals == 1 else worker.abort)()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return 0 if worker.run() else 1


def _whole(text: str, least: int = 1, most: int = 2_147_483_647) -> int:
    """A whole number; the most is that of SQL's integer, which the functions take."""
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {text!r}")
    return int(text)


def _jobs(text: str) -> int:
    return _whole(text, most=1000)


def _port(text: str) -> int:
    return _whole(text, 0, 65_535)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds greater than 0, and less than a day, not {text!r}"
        )
    return value


def _add_pieces(parser: argparse.ArgumentParser, rows: int) -> None:
    parser.add_argument("--jobs", type=_jobs, default=2, metavar="N", help="connections at once (2)")
    parser.add_argument(
        "--piece-rows", type=_whole, default=rows, metavar="N", help=f"rows of a piece ({rows})"
    )


class Once(argparse.Action):
    """An option of which a second one is not silently taken for the first."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} was given more than once; this verb works on one database")
        setattr(namespace, self.dest, values)


def register(verbs: Any) -> None:
    """Add the verbs of this module to the command line."""

    def verb(name: str, run: Any, text: str, several: str | None = None) -> argparse.ArgumentParser:
        dsn_help = "source database (default: TBL_REPL_DSN)"
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
        parser.set_defaults(run=run)
        parser.add_argument("--json", action="store_true", help="print JSON")
        if several is not None:
            parser.add_argument("--dsn", action="append", metavar="D", help=f"{dsn_help}; {several}")
        else:
            parser.add_argument("--dsn", action=Once, metavar="D", help=dsn_help)
        return parser

    worker = verb(
        "worker",
        _worker,
        "bring what is queued to every server, all the time",
        several="several are served at once",
    )
    worker.add_argument(
        "--once", action="store_true", help="drain once and end; exit code 1 if something is left"
    )
    worker.add_argument(
        "--metrics-port", type=_port, metavar="N", help="serve Prometheus metrics on this port"
    )
    worker.add_argument(
        "--batch-rows", type=_whole, default=10_000, metavar="N", help="rows of a batch (10000)"
    )
    worker.add_argument(
        "--poll-seconds",
        type=_seconds,
        default=POLL_SECONDS,
        metavar="S",
        help=f"look at the queue so often although nobody has said anything ({POLL_SECONDS:g})",
    )
    worker.add_argument("--verbose", action="store_true", help="log more")

    status = verb("status", _status, "show every target", several="several are shown together")
    status.add_argument("--graph", action="store_true", help="print the topology as a Mermaid diagram")

    top = verb("top", _top, "show every target, live")
    top.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between two looks (1)"
    )
    top.add_argument("--once", action="store_true", help="look once and end")

    verb(
        "check",
        _check,
        "show every problem, on both sides",
        several="several are checked one after the other",
    )

    replay = verb(
        "replay",
        _replay,
        "ship what is queued, until nothing is left",
        several="several are drained at once",
    )
    replay.add_argument(
        "--batch-rows", type=_whole, default=10_000, metavar="N", help="rows of a batch (10000)"
    )

    compare = verb("compare", _compare, "compare a target with its source")
    compare.add_argument("target", type=_whole, metavar="TARGET", help="target_id")
    _add_pieces(compare, 20_000)

    copy = verb("copy", _copy, "copy every row of a target, in pieces, while writers go on")
    copy.add_argument("target", type=_whole, metavar="TARGET", help="target_id")
    _add_pieces(copy, 50_000)

    repair = verb("repair", _repair, "queue what differs between a target and its source")
    repair.add_argument("target", type=_whole, metavar="TARGET", help="target_id")
    _add_pieces(repair, 20_000)
    repair.add_argument(
        "--delete-extra", action="store_true", help="also delete rows that only the target has"
    )
