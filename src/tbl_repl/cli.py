"""The command line.  Exit codes: 0 well, 1 problem found, 2 usage, 3 cannot connect."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import psycopg

from tbl_repl import verbs as database_verbs
from tbl_repl.errors import TblReplError, from_psycopg
from tbl_repl.script import version


def _install(args: argparse.Namespace) -> int:
    from tbl_repl.install import install

    paths = install(args.pg_config)
    if args.json:
        print(json.dumps({"installed": [str(path) for path in paths]}))
    else:
        for path in paths:
            print(f"installed {path}")
        print("next, in the database: CREATE EXTENSION tbl_repl CASCADE;")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from tbl_repl.demo import run

    return run()


def parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    top = argparse.ArgumentParser(
        prog="tbl-repl", description="Replicate single tables between PostgreSQL servers."
    )
    top.add_argument("--version", action="version", version=f"tbl-repl {version()}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="start two disposable servers and show everything on them")
    demo.set_defaults(run=_demo)

    install = verbs.add_parser("install", help="put the extension's files into a server's directory")
    install.add_argument("--pg-config", required=True, metavar="P", help="path of that server's pg_config")
    install.add_argument("--json", action="store_true", help="print JSON")
    install.set_defaults(run=_install)

    database_verbs.register(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except psycopg.Error as error:
        problem: TblReplError = from_psycopg(error)
    except TblReplError as error:
        problem = error
    except BrokenPipeError:
        # who reads has seen enough (| head); the interpreter must not try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"tbl-repl: {problem}", file=sys.stderr)
    if problem.hint:
        print(f"HINT: {problem.hint}", file=sys.stderr)
    return problem.exit_code
