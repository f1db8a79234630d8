"""The command line.  Exit codes: 0 well, 1 problem found, 2 usage, 3 cannot connect."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import psycopg

from tbl_repl import verbs as database_verbs
from tbl_repl.database import resolve_dsn
from tbl_repl.errors import TblReplError, UsageError, from_psycopg, tell
from tbl_repl.report import print_json
from tbl_repl.script import version
from tbl_repl.servers import NEWEST, server_of


def _install(args: argparse.Namespace) -> int:
    from tbl_repl.install import install, install_plain, install_tle, tle_statements

    if args.pg_config is not None:
        if args.dsn is not None or args.plain or args.tle:
            raise UsageError("--pg-config goes alone", "Files are for every database of a server.")
        server = server_of(args.pg_config)
        installed = [str(path) for path in install(server)]
        if server.major > NEWEST:
            print(f"tbl-repl: PostgreSQL {server.major} has not been tested, {NEWEST} has", file=sys.stderr)
        following = "next, in the database: CREATE EXTENSION tbl_repl CASCADE;"
    elif args.plain:
        installed = [f"schema tbl_repl, version {install_plain(resolve_dsn(args.dsn))}"]
        following = "next: SELECT tbl_repl.add_target(...)"
    elif args.tle and args.dsn is None:
        statements = "\n".join(tle_statements())
        print_json({"sql": statements}) if args.json else print(statements)
        return 0
    elif args.tle:
        installed = [f"tbl_repl {install_tle(resolve_dsn(args.dsn))} in pg_tle"]
        following = "next, in the database: CREATE EXTENSION tbl_repl CASCADE;"
    else:
        raise UsageError("nothing said about where to", "Give --pg-config P, or --dsn D --plain, or --tle.")
    if args.json:
        print_json({"installed": installed})
    else:
        for what in installed:
            print(f"installed {what}")
        print(following)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from tbl_repl.demo import run

    return run(for_programs=args.json)


class _Parser(argparse.ArgumentParser):
    """A DSN where none belongs is not repeated: there may be a password in it."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"\w+://[^\s']+|\w*password=[^\s']+", "...", message))


def parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    top = _Parser(prog="tbl-repl", description="Replicate single tables between PostgreSQL servers.")
    top.add_argument("--version", action="version", version=f"tbl-repl {version()}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="start two disposable servers and show everything on them")
    demo.add_argument("--json", action="store_true", help="print each step as a line of JSON")
    demo.set_defaults(run=_demo)

    text = "install the extension: its files into a server, or its SQL into a database"
    install = verbs.add_parser("install", help=text, description=text)
    install.add_argument("--pg-config", metavar="P", help="put the files into the server of that pg_config")
    install.add_argument(
        "--dsn",
        action=database_verbs.Once,
        metavar="D",
        help="the database for --plain (default: TBL_REPL_DSN) and --tle",
    )
    way = install.add_mutually_exclusive_group()
    way.add_argument(
        "--plain", action="store_true", help="run the SQL as it is: no files, no CREATE EXTENSION"
    )
    way.add_argument(
        "--tle", action="store_true", help="register with pg_tle; without --dsn, print the statements"
    )
    install.add_argument("--json", action="store_true", help="print JSON")
    install.set_defaults(run=_install)

    database_verbs.register(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as by >&-: who runs it wants to see nothing
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names of tables may have what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except psycopg.Error as error:
        return tell(from_psycopg(error))
    except TblReplError as error:
        return tell(error)
    except BrokenPipeError:
        # who reads has seen enough (| head)
        _leave_stdout()
        return 1
    except OSError as error:
        _leave_stdout()
        return tell(TblReplError(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _leave_stdout() -> None:
    """The interpreter must not try to write the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
