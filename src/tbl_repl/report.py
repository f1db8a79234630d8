"""What the command line prints: tables for people, JSON for programs.

Rich leaves colours away where NO_COLOR is set or the output is no terminal.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tbl_repl.database import Row
from tbl_repl.errors import printable
from tbl_repl.logs import is_unicode

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


HEADINGS = {
    "target_id": "id",
    "source_table": "source",
    "dst_table": "target",
    "pending_rows": "pending",
    "rows_shipped": "shipped",
    "last_shipped_at": "last shipped",
    "next_try_at": "next try",
}
"""Where there is little room."""

FREE_TEXT = ("last_error", "message", "hint", "key")
"""Columns that are wrapped."""

READABLE = 30
"""Narrower than this, free text is no longer read in a column."""


def console() -> Console:
    """The console for people; in a pipe, lines are as long as they are."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=1 << 20)


def show(out: Console, what: RenderableType) -> None:
    """Print it; in a pipe without the spaces that fill up a table's last column."""
    if out.is_terminal:
        out.print(what)
        return
    with out.capture() as capture:
        out.print(what)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def as_json(value: Any) -> str:
    """JSON with times in ISO form."""

    def plain(item: Any) -> Any:
        if isinstance(item, dt.datetime):
            return item.isoformat()
        if isinstance(item, dt.timedelta):
            return item.total_seconds()
        return str(item)

    return json.dumps(value, default=plain, ensure_ascii=not is_unicode(sys.stdout))


def print_json(value: Any) -> None:
    sys.stdout.write(as_json(value) + "\n")


class JsonArray:
    """One array, written while it is found; without its end when something fails before that."""

    def __init__(self) -> None:
        self._written = 0

    def extend(self, values: Iterable[Any]) -> None:
        for value in values:
            sys.stdout.write((", " if self._written else "[") + as_json(value))
            self._written += 1

    def end(self) -> None:
        sys.stdout.write("]\n" if self._written else "[]\n")


def counted(number: int, what: str) -> str:
    """1 row, 2 rows, 1,000 rows."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def one_line(value: Any) -> str:
    """A value of a server for a person: in one line, without control characters."""
    return printable(" ".join(str(value).splitlines()))


def cell(value: Any) -> Text:
    """One value as a person reads it; nothing for NULL, state words in their colour."""
    if value is None:
        return Text("")
    if isinstance(value, dt.datetime):
        return Text(value.astimezone().strftime("%Y-%m-%d %H:%M:%S"))
    if isinstance(value, dict | list):
        return Text(printable(as_json(value)))
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}", justify="right")
    return Text(one_line(value), style=STYLES.get(str(value), ""))


def _shown(row: Row, name: str) -> Text:
    return cell(human_seconds(row["lag"]) if name == "lag" else row.get(name))


def _heading(name: str, short: bool = False) -> str:
    return (HEADINGS.get(name, name) if short else name).replace("_", " ")


def table(rows: Iterable[Row], columns: Sequence[str], short: bool = False) -> Table:
    """Rows as a table; the columns in this order.  short: narrower headings."""
    out = Table(header_style="bold", box=None, pad_edge=False)
    for name in columns:
        out.add_column(_heading(name, short), overflow="fold", no_wrap=name not in FREE_TEXT)
    for row in rows:
        out.add_row(*(_shown(row, name) for name in columns))
    return out


def fitting(rows: Sequence[Row], layouts: Sequence[Sequence[str]], out: Console) -> RenderableType:
    """Rows in the first of these layouts that has room, or else each as a list of names and values.

    No name or number is broken: free text is what gives way.  An error that has no column comes below.
    """
    for n, columns in enumerate(layouts):
        if _width(rows, columns, short=n > 0) <= out.width:
            left = [] if "last_error" in columns else [row for row in rows if row.get("last_error")]
            errors = (Text.assemble(_name(row), ": ", _shown(row, "last_error")) for row in left)
            return Group(table(rows, columns, short=n > 0), *errors)
    return Group(*(_record(row, layouts[0]) for row in rows))


def worst_first(rows: Sequence[Row], limit: int) -> tuple[list[Row], str]:
    """So many target_status rows, those that need somebody first; how many there are besides, by status."""
    order = ("failed", "queueing", "copying", "paused", "ok")
    ranked = sorted(rows, key=lambda row: order.index(row["status"]))
    hidden = Counter(row["status"] for row in ranked[max(0, limit) :])
    return ranked[: max(0, limit)], ", ".join(
        f"{hidden[status]:,} {status}" for status in order if hidden[status]
    )


def _name(row: Row) -> str:
    parts = (row.get("node"), "target", row["target_id"])
    return " ".join(one_line(part) for part in parts if part is not None)


def _width(rows: Iterable[Row], columns: Sequence[str], short: bool) -> int:
    """Characters that a table of these needs for no name or number to be broken."""
    widths = [len(_heading(name, short)) for name in columns]
    for row in rows:
        for n, name in enumerate(columns):
            needed = _shown(row, name).cell_len
            widths[n] = max(widths[n], min(needed, READABLE) if name in FREE_TEXT else needed)
    return sum(widths) + 2 * (len(widths) - 1)


def _record(row: Row, columns: Sequence[str]) -> Table:
    out = Table.grid(padding=(0, 2, 0, 0))
    out.add_column(style="bold", no_wrap=True)
    out.add_column(overflow="fold")
    for name in columns:
        value = _shown(row, name)
        value.justify = "left"
        if value.plain:
            out.add_row(_heading(name, short=True), value)
    out.add_row()
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
