"""Replicated tables for a test, and what has become of their changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from support.nodes import Node, Pair

MODES = ("sync", "tolerant")
MANY = 1500  # more rows than one message carries


def replicate(
    pair: Pair, name: str = "t", columns: str = "id integer PRIMARY KEY, v text", **options: object
) -> int:
    """Create the table on every node and replicate it; the target_id."""
    pair.both(f"CREATE TABLE {name} ({columns})")
    options.setdefault("timeout", "5 s")
    return pair.add_target(name, **options)


def errors_of(pair: Pair) -> list[tuple[str, str]]:
    return pair.source.sql("SELECT sqlstate, message FROM tbl_repl.error_log ORDER BY at")


def assert_shipped_directly(pair: Pair) -> None:
    """No target has failed, nothing waits in the queue."""
    assert errors_of(pair) == []
    assert (
        pair.source.sql(
            "SELECT target_id FROM tbl_repl.target_status WHERE status <> 'ok' OR pending_rows > 0"
        )
        == []
    )


def replay(pair: Pair, server: str | None = None, max_rows: int = 10000) -> int:
    """One batch; rows handled."""
    return int(pair.source.one("SELECT tbl_repl.replay(%s, %s)", [server, max_rows]))


def async_table(pair: Pair, columns: str = "id integer PRIMARY KEY, v text", **options: Any) -> int:
    """An empty table t on every node with an async target; the target_id."""
    pair.both(f"CREATE TABLE t ({columns})")
    return pair.add_target("t", mode="async", **options)


@contextmanager
def transaction(node: Node, isolation: str = "READ COMMITTED") -> Iterator[psycopg.Connection]:
    """A session with an open transaction; committed at the end of the block."""
    conn = node.connect()
    conn.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    try:
        yield conn
        conn.execute("COMMIT")
    finally:
        conn.close()


def quarantined(pair: Pair) -> list[tuple[Any, ...]]:
    return pair.source.sql("SELECT key, sqlstate, attempts FROM tbl_repl.quarantine ORDER BY key::text")
