"""Results, notices and errors as psql shows them, in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = 100) -> str:
    """The rows aligned in columns; one record under the other where they are wider than width."""
    cells = [[_text(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(v is None or _is_number(v) for v in column)
        for column in (zip(*rows, strict=True) if rows else ([],) * len(columns))
    ]
    widths = [
        max([len(name), *(len(line) for row in cells for line in row[i].split("\n"))])
        for i, name in enumerate(columns)
    ]
    if sum(widths) + 3 * len(widths) > width and rows:
        return _expanded(columns, cells)
    lines = [
        " " + " | ".join(_centered(name, w) for name, w in zip(columns, widths, strict=True)).rstrip(),
        "-" + "-+-".join("-" * w for w in widths) + "-",
    ]
    for row in cells:
        shown = [
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append((" " + " | ".join(shown)).rstrip())
    lines.append(f"({len(rows)} row{'' if len(rows) == 1 else 's'})")
    return "\n".join(lines)


def _expanded(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    widest = max(len(name) for name in columns)
    lines = []
    for number, row in enumerate(cells, 1):
        lines.append(f"-[ RECORD {number} ]".ljust(widest + 1, "-") + "-" * 20)
        for name, cell in zip(columns, row, strict=True):
            first, *more = cell.split("\n")
            lines.append(f"{name.ljust(widest)} | {first}".rstrip())
            lines.extend(f"{' ' * widest} | {line}" for line in more)
    return "\n".join(lines)


def error(problem: psycopg.Error) -> str:
    """ERROR with SQLSTATE, DETAIL and HINT, as psql's VERBOSITY shows them."""
    diag = problem.diag
    lines = [f"ERROR:  {problem.sqlstate or '?????'}: {diag.message_primary or str(problem).strip()}"]
    if diag.message_detail:
        lines.append(f"DETAIL:  {diag.message_detail}")
    if diag.message_hint:
        lines.append(f"HINT:  {diag.message_hint}")
    return "\n".join(lines)


def notice(diag: psycopg.errors.Diagnostic) -> str:
    """One NOTICE or WARNING."""
    lines = [f"{diag.severity}:  {diag.message_primary}"]
    if diag.message_hint:
        lines.append(f"HINT:  {diag.message_hint}")
    return "\n".join(lines)


def _centered(name: str, width: int) -> str:
    return (" " * ((width - len(name)) // 2) + name).ljust(width)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
