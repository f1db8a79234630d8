"""Medians, ratios, goals; the table for the terminal and for the page."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """value(of) / value(to) is to be at most, or at least, the limit; row: what both are taken from.

    to: nothing where it is the value itself that counts.
    """

    row: str
    of: str
    to: str
    word: str  # 'at most' or 'at least'
    limit: float
    to_row: str = ""  # where the other value stands in another row


@dataclass
class Results:
    """Every measured value, by row of the table and contender."""

    values: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, row: str, contender: str, value: float) -> None:
        self.values[row][contender].append(value)

    def median(self, row: str, contender: str) -> float | None:
        found = self.values.get(row, {}).get(contender)
        return median(found) if found else None

    def ratio(self, goal: Goal) -> float | None:
        of = self.median(goal.row, goal.of)
        if not goal.to:
            return of
        to = self.median(goal.to_row or goal.row, goal.to)
        return of / to if of is not None and to else None

    def met(self, goal: Goal) -> bool | None:
        ratio = self.ratio(goal)
        if ratio is None:
            return None
        return ratio <= goal.limit if goal.word == "at most" else ratio >= goal.limit


def short(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    """Median (least to greatest)."""
    if not values:
        return ""
    if len(values) == 1:
        return short(values[0])
    return f"{short(median(values))} ({short(min(values))} to {short(max(values))})"


def figures_table(results: Results, contenders: list[str]) -> list[list[str]]:
    """Head and rows of what was measured."""
    head = ["", *contenders]
    return [head] + [
        [row, *(spread(by_name.get(name, [])) for name in contenders)]
        for row, by_name in results.values.items()
    ]


def goals_table(results: Results, goals: list[Goal]) -> list[list[str]]:
    """Head and rows of what was to be reached."""
    rows = [["", "ratio of medians", "goal", "measured", ""]]
    for goal in goals:
        if not goal.to:
            of = goal.of
        else:
            of = f"{goal.of} / {goal.to}" if goal.of != goal.to else f"{goal.of} / the same: {goal.to_row}"
        word = {True: "met", False: "missed", None: "not measured"}[results.met(goal)]
        rows.append([goal.row, of, f"{goal.word} {goal.limit:g}", short(results.ratio(goal)), word])
    return rows


def show(console: Console, title: str, rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Processor and system, in words."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    cpu = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{os.cpu_count()} processors ({cpu}), {platform.system()} {platform.release()}"


def section(results: Results, goals: list[Goal], contenders: list[str], server: str, settings: str) -> str:
    """What goes between the marks of the page."""
    today = datetime.datetime.now(datetime.UTC).date()
    return "\n\n".join(
        [
            f"{today}, PostgreSQL {server}, {machine()}. Both clusters: {settings}.",
            "Goals:",
            markdown(goals_table(results, goals)),
            "Medians (least to greatest):",
            markdown(figures_table(results, contenders)),
        ]
    )


def write_page(page: Path, name: str, text: str) -> None:
    """Put the text between the page's marks of that name; where there are none, at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in old:
        old = f"{old}{begin}\n{end}\n"
    before, _, rest = old.partition(begin)
    _, _, after = rest.partition(end)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
