"""How far a long command has got: a bar in a terminal, a line a second elsewhere, nothing for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tbl_repl.report import human_seconds

LINE_SECONDS = 1.0

Show = Callable[[int, int, int], None]
"""Takes rows done, rows planned and bytes carried (0: not known); called first before anything is done."""


class _Rate:
    """Rows and bytes a second since the first look: what an earlier run has done does not count."""

    def __init__(self) -> None:
        self._begun: tuple[float, int, int] | None = None
        self.rows = self.bytes = 0.0

    def look(self, rows: int, size: int) -> None:
        now = time.monotonic()
        begun, rows_before, size_before = self._begun = self._begun or (now, rows, size)
        if now > begun:
            self.rows = (rows - rows_before) / (now - begun)
            self.bytes = (size - size_before) / (now - begun)

    def __str__(self) -> str:
        speed = f"{self.rows:,.0f} rows/s"
        return f"{speed}, {self.bytes / 1e6:,.1f} MB/s" if self.bytes else speed


@contextmanager
def progress(target: int, quiet: bool) -> Iterator[Show]:
    """Show progress on stderr, so that what the command prints can go elsewhere."""
    out = Console(stderr=True, highlight=False)
    rate = _Rate()
    if quiet:
        yield lambda rows, planned, size: None
    elif out.is_terminal:
        columns = (
            TextColumn("target {task.fields[target]}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"),
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=out) as bar:
            task = bar.add_task("rows", total=None, target=target, speed="")

            def show(rows: int, planned: int, size: int) -> None:
                rate.look(rows, size)
                bar.update(task, total=max(rows, planned), completed=rows, speed=str(rate))

            yield show
    else:
        due = time.monotonic() + LINE_SECONDS

        def say(rows: int, planned: int, size: int) -> None:
            nonlocal due
            rate.look(rows, size)
            now = time.monotonic()
            if now >= due:
                due = now + LINE_SECONDS
                left = (max(rows, planned) - rows) / rate.rows if rate.rows else None
                print(
                    f"target {target}: {rows:,} of {max(rows, planned):,} rows, "
                    f"{rate}, {human_seconds(left)} left",
                    file=sys.stderr,
                    flush=True,
                )

        yield say
