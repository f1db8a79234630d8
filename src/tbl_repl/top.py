"""The targets as status and top show them, and their rates, over time."""

from __future__ import annotations

import time
from collections import deque

import psycopg
from rich.console import Console, Group
from rich.text import Text

from tbl_repl.database import Connection, Row, connect, name_of
from tbl_repl.errors import CannotConnect, printable
from tbl_repl.report import fitting, lag, worst_first

TOP_COLUMNS = (
    "target_id", "source_table", "server", "mode", "status", "pending_rows", "lag", "rows_per_s",
    "last_error",
)  # fmt: skip
TOP_LAYOUTS = (TOP_COLUMNS, TOP_COLUMNS[:-1], (*TOP_COLUMNS[:2], *TOP_COLUMNS[3:-1]))


def target_rows(connection: Connection) -> list[Row]:
    """Rows of target_status with lag in seconds."""
    rows = connection.execute("SELECT * FROM tbl_repl.target_status ORDER BY target_id").fetchall()
    for row in rows:
        row["lag"] = lag(row)
        row["source_table"] = str(row["source_table"])
    return rows


class Top:
    """Targets with their rates; outlives restarts of the server, keeps what it saw last meanwhile."""

    def __init__(self, dsn: str, connection: Connection, interval: float, out: Console) -> None:
        self._dsn = dsn
        self._out = out
        self._connection = connection
        self._interval = interval
        self._history: dict[int, deque[tuple[float, int]]] = {}
        self._rows: list[Row] = []
        self.problem: str | None = None

    def look(self) -> list[Row]:
        """Every target; rows_per_s over the last few looks."""
        try:
            if self._connection.closed:
                self._connection = connect(self._dsn)
            self._rows = target_rows(self._connection)
            self.problem = None
        except (psycopg.OperationalError, CannotConnect) as error:
            self._connection.close()
            self.problem = f"cannot connect: {' '.join(str(error).split())}"
            return self._rows
        now = time.monotonic()
        for row in self._rows:
            seen = self._history.setdefault(int(row["target_id"]), deque(maxlen=6))
            seen.append((now, int(row["rows_shipped"])))
            seconds = seen[-1][0] - seen[0][0]
            row["rows_per_s"] = round((seen[-1][1] - seen[0][1]) / seconds) if seconds > 0 else None
        return self._rows

    def view(self) -> Group:
        rows = self.look()
        head = f"{name_of(self._dsn)}   {time.strftime('%H:%M:%S')}   every {self._interval:g} s, Ctrl-C ends"
        parts = [Text(head, style="dim")]
        if self.problem:
            parts.append(Text(printable(self.problem), style="bold red"))
        live = self._out.is_terminal and not self._out.is_dumb_terminal
        if live and len(rows) > (lines := self._out.height - len(parts) - 1):
            rows, hidden = worst_first(rows, lines - 1)
            parts.append(Text(f"not shown, for want of lines: {hidden}", style="dim"))
        return Group(*parts, fitting(rows, TOP_LAYOUTS, self._out))

    def close(self) -> None:
        self._connection.close()
