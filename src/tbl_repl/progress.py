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
"""Takes rows done, rows planned and bytes carried (0: not known)."""


def _speed(rows: int, size: int, seconds: float) -> str:
    if seconds <= 0:
        return ""
    speed = f"{rows / seconds:,.0f} rows/s"
    return f"{speed}, {size / seconds / 1e6:,.1f} MB/s" if size else speed


@contextmanager
def progress(target: int, quiet: bool) -> Iterator[Show]:
    """Show progress on stderr, so that what the command prints can go elsewhere."""
    out = Console(stderr=True, highlight=False)
    begun = time.monotonic()
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
                speed = _speed(rows, size, time.monotonic() - begun)
                bar.update(task, total=max(rows, planned), completed=rows, speed=speed)

            yield show
    else:
        due = begun + LINE_SECONDS

        def say(rows: int, planned: int, size: int) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due:
                due = now + LINE_SECONDS
                left = (max(rows, planned) - rows) / (rows / (now - begun)) if rows else None
                print(
                    f"target {target}: {rows:,} of {max(rows, planned):,} rows, "
                    f"{_speed(rows, size, now - begun)}, {human_seconds(left)} left",
                    file=sys.stderr,
                    flush=True,
                )

        yield say
