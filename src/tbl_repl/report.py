"""What the command line prints: tables for people, JSON for programs.

Rich leaves colours away where NO_COLOR is set or the output is no terminal.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tbl_repl.database import Row

STYLES = {
    "ok": "green",
    "copying": "cyan",
    "queueing": "yellow",
    "paused": "magenta",
    "failed": "bold red",
    "error": "bold red",
    "warning": "yellow",
    "notice": "cyan",
}


def console() -> Console:
    """The console for people; in a pipe, lines are not cut at a terminal's width."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=250)


def as_json(value: Any) -> str:
    """JSON with times in ISO form."""

    def plain(item: Any) -> Any:
        if isinstance(item, dt.datetime):
            return item.isoformat()
        if isinstance(item, dt.timedelta):
            return item.total_seconds()
        return str(item)

    return json.dumps(value, default=plain, ensure_ascii=False)


def print_json(value: Any) -> None:
    sys.stdout.write(as_json(value) + "\n")


def cell(value: Any) -> Text:
    """One value as a person reads it; nothing for NULL, state words in their colour."""
    if value is None:
        return Text("")
    if isinstance(value, dt.datetime):
        return Text(value.astimezone().strftime("%Y-%m-%d %H:%M:%S"))
    if isinstance(value, dict | list):
        return Text(as_json(value))
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}", justify="right")
    return Text(str(value), style=STYLES.get(str(value), ""))


def table(rows: Iterable[Row], columns: Sequence[str], title: str | None = None) -> Table:
    """Rows as a table; the columns in this order."""
    out = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        out.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        out.add_row(
            *(cell(human_seconds(row["lag"]) if name == "lag" else row.get(name)) for name in columns)
        )
    return out


def lag(row: Row, now: dt.datetime | None = None) -> float | None:
    """Seconds that the oldest pending row of a target_status row has waited; None without one."""
    oldest: dt.datetime | None = row.get("oldest_pending_at")
    if oldest is None:
        return None
    waited: dt.timedelta = (now or dt.datetime.now(dt.UTC)) - oldest
    return max(0.0, waited.total_seconds())


def human_seconds(seconds: float | None) -> str:
    """0.2 s, 45 s, 3 min 05 s, 2 h 10 min; '-' for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
