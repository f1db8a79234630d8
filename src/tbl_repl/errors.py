"""One exception tree; each class knows the exit code of the command line."""

from __future__ import annotations

import re
import sys

import psycopg


class TblReplError(Exception):
    """Something that a person has to read: message, and perhaps what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(TblReplError):
    """The command was called wrongly."""

    exit_code = 2


class CannotConnect(TblReplError):
    """No connection to a server that was named."""

    exit_code = 3


class IsStandby(TblReplError):
    """A database that can only be read, until its server is promoted."""


class ServerError(TblReplError):
    """A PostgreSQL program (initdb, pg_ctl, pg_config) failed or is missing."""


class CheckFailed(TblReplError):
    """Two things that had to be equal are not."""


# SQLSTATE, or its class, -> ours.  Exact codes are looked up before classes.
_BY_SQLSTATE: dict[str, type[TblReplError]] = {
    "08": CannotConnect,
    "28": CannotConnect,
    "3D": CannotConnect,
    "57P01": CannotConnect,
    "57P02": CannotConnect,
    "57P03": CannotConnect,
}


def from_psycopg(error: psycopg.Error) -> TblReplError:
    """Translate an error of the driver, keeping the server's own words and HINT."""
    state = error.sqlstate or ""
    kind = _BY_SQLSTATE.get(state) or _BY_SQLSTATE.get(state[:2])
    if kind is None:
        lost = isinstance(error, psycopg.OperationalError) and not state
        kind = CannotConnect if lost else TblReplError
    message = error.diag.message_primary or str(error).strip() or type(error).__name__
    return kind(message, error.diag.message_hint)


def printable(text: str) -> str:
    r"""Text for a terminal: control characters as \xNN, as psql has them; tabs and line ends stay.

    Names and messages come from servers, and may hold sequences that a terminal obeys.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02X}", text)


def tell(problem: TblReplError) -> int:
    """Say on stderr what is wrong, and what to do about it; the exit code."""
    print(printable(f"tbl-repl: {problem}"), file=sys.stderr)
    if problem.hint:
        print(printable(f"HINT: {problem.hint}"), file=sys.stderr)
    return problem.exit_code
