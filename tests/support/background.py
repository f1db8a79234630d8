"""Several sessions at once: a statement that runs while the test goes on, and a bound on time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import psycopg

from tbl_repl.cluster import rows_of

T = TypeVar("T")


def in_background(call: Callable[[], T]) -> Future[T]:
    """Run it in a thread of its own; .result(timeout) is what it returns or raises."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def start(conn: psycopg.Connection, query: str) -> Future[list[tuple[Any, ...]]]:
    """Start a statement on a connection; .result(timeout) is its last result's rows."""
    return in_background(lambda: rows_of(conn, query))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails when the block takes longer."""
    begin = time.monotonic()
    yield
    took = time.monotonic() - begin
    assert took <= seconds, f"took {took:.2f} s, promised were {seconds:.2f} s"
