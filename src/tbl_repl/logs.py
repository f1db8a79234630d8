"""Log lines: ``event key=value ...`` for people, one JSON object for containers; never row contents.

A message of a server may quote a value ("invalid input syntax for type integer: ..."), so of errors only
those are shown whose class speaks of connections, servers and their state, and those that the source itself
raises about rights and names.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

import psycopg

from tbl_repl.errors import TblReplError, printable

# connection, authorization, database, schema, resources, operator intervention, system error
_SHOWN = ("08", "28", "3D", "3F", "53", "57", "58")

# Where PostgreSQL says that a right or a name is missing; what functions and targets say with the same
# SQLSTATE comes from other files.  Where a function makes up a query, a name may be a value: not shown.
_RIGHTS = ("aclchk.c",)
_NAMES = ("namespace.c", "parse_func.c", "parse_relation.c")


def event(log: logging.Logger, level: int, name: str, **fields: object) -> None:
    """One line about one thing that has happened."""
    text = " ".join([name, *(f"{key}={value}" for key, value in fields.items())])
    log.log(level, "%s", printable(text), extra={"event": name, "fields": fields})


def reason(problem: Exception | psycopg.errors.Diagnostic | None) -> str:
    """Why something failed, in one line, without values of rows."""
    if problem is None:
        return "no answer"
    diag = problem.diag if isinstance(problem, psycopg.Error) else problem
    if isinstance(diag, psycopg.errors.Diagnostic) and diag.sqlstate is not None:
        message = diag.message_primary or ""
        shown = (
            diag.sqlstate.startswith(_SHOWN)
            or diag.source_file in _RIGHTS
            or (diag.source_file in _NAMES and diag.context is None)
        )
        return _line(f"{diag.sqlstate} {message}" if shown else diag.sqlstate)
    # of ours, or of libpq: nothing has been answered
    hint = problem.hint if isinstance(problem, TblReplError) else None
    return _line(f"{problem} (HINT: {hint})" if hint else str(problem))


def _line(text: str) -> str:
    return " ".join(text.split())


def is_unicode(stream: TextIO) -> bool:
    """Whether it takes every character: what others make of some of them is no JSON."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        return time.gmtime(seconds)

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.getMessage()),
            **getattr(record, "fields", {}),
            "thread": record.threadName,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=not is_unicode(sys.stderr))


def start(as_json: bool, verbose: bool) -> None:
    """Log to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(threadName)s: %(message)s")
    handler.setFormatter(JsonLines() if as_json else plain)
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
