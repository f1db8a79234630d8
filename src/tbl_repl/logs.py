"""Log lines: ``event key=value ...`` for people, one JSON object for containers; never row contents.

A message of a server may quote a value ("invalid input syntax for type integer: ..."), so of errors only
those are shown whose class speaks of connections, servers and their state.
"""

from __future__ import annotations

import json
import logging
import sys
import time

import psycopg

# connection, authorization, database, schema, resources, operator intervention, system error
_SHOWN = ("08", "28", "3D", "3F", "53", "57", "58")


def event(log: logging.Logger, level: int, name: str, **fields: object) -> None:
    """One line about one thing that has happened."""
    text = " ".join([name, *(f"{key}={value}" for key, value in fields.items())])
    log.log(level, "%s", text, extra={"event": name, "fields": fields})


def reason(problem: Exception | psycopg.errors.Diagnostic | None) -> str:
    """Why something failed, in one line, without values of rows."""
    if problem is None:
        return "no answer"
    diag = problem.diag if isinstance(problem, psycopg.Error) else problem
    if isinstance(diag, psycopg.errors.Diagnostic) and diag.sqlstate is not None:
        message = diag.message_primary or ""
        shown = diag.sqlstate.startswith(_SHOWN)
        return _line(f"{diag.sqlstate} {message}" if shown else diag.sqlstate)
    # of ours, or of libpq: nothing has been answered
    return _line(str(problem))


def _line(text: str) -> str:
    return " ".join(text.split())


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
        return json.dumps(line, default=str, ensure_ascii=False)


def start(as_json: bool, verbose: bool) -> None:
    """Log to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(threadName)s: %(message)s")
    handler.setFormatter(JsonLines() if as_json else plain)
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
