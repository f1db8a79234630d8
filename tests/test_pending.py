"""Pending: which rows of the queue a target still has to get.

The rule is told by _pending_from.  For speed it is written out again in _has_pending and _small_batch, and once more
in _rotate: here they are compared, on queues that transactions write side by side while targets are shipped to.
"""

from __future__ import annotations

import random
from typing import Any

import psycopg
import pytest
from hypothesis import settings

from support import Pair

SESSIONS = 3
# What their modes, origins and tables have a target take; two sources share one queue.
TARGETS: list[dict[str, Any]] = [
    {"source_table": "t", "dst_table": "t_async", "mode": "async"},
    {"source_table": "t", "dst_table": "t_carried", "mode": "async", "forward": "any"},
    {"source_table": "t", "dst_table": "t_direct"},
    {"source_table": "t", "dst_table": "t_direct_carried", "forward": "any"},
    {"source_table": "u", "dst_table": "u_async", "mode": "async"},
]
PENDING = """
SELECT tbl_repl._pending_from(t, tbl_repl._position(t.target_id)) FROM tbl_repl.target AS t ORDER BY t.target_id
"""
COUNTS = "SELECT count(*), coalesce(sum(c.row_count), 0), count(DISTINCT c.keys[1]) FROM "
COPIES = """
SELECT tbl_repl._has_pending(t.target_id), b.rows, b.counts
FROM tbl_repl.target AS t, tbl_repl._small_batch(ARRAY[t.target_id], 1000) AS b ORDER BY t.target_id
"""

STEPS = {"write": 6, "end": 5, "ship_all": 4, "ship_first": 1, "turn": 1, "rotate": 2}


class Queue:
    """The queue of a source, some targets, and sessions that write beside each other."""

    def __init__(self, pair: Pair) -> None:
        self.node = pair.source
        self.there = pair.target.one("SELECT tbl_repl.node_name()")
        self.open: dict[int, psycopg.Connection] = {}
        self.sessions = [pair.source.connect() for _ in range(SESSIONS)]
        for table in "tu":
            pair.source.sql(f"CREATE TABLE {table} (id integer PRIMARY KEY)")
        self.targets = []
        for options in TARGETS:
            pair.target.sql(f"CREATE TABLE {options['dst_table']} (id integer PRIMARY KEY)")
            self.targets.append(pair.add_target(**options, initial_copy="none"))
        assert self.targets == sorted(self.targets)

    def reset(self) -> None:
        for n in list(self.open):
            self.end(n, "ROLLBACK")
        self.node.sql("TRUNCATE tbl_repl.change")
        self.node.sql("UPDATE tbl_repl.progress SET position = pg_current_snapshot()")

    def do(self, choice: random.Random) -> str:
        """A step that comes to mind; its name."""
        [what] = choice.choices(list(STEPS), list(STEPS.values()))
        n, only = choice.randrange(SESSIONS), choice.choice([None, *self.targets])
        if what == "write":
            origin = choice.choice([None, "elsewhere", self.there])
            self.write(n, choice.choice("tu"), only, origin, choice.randrange(4))
        elif what == "end":
            self.end(n, choice.choice(["COMMIT", "COMMIT", "ROLLBACK"]))
        elif what == "ship_all":
            self.ship_all(only)
        elif what == "ship_first":
            self.ship_first(choice.randrange(len(TARGETS)))
        else:
            getattr(self, what)()
        return what

    def write(self, n: int, source: str, only: int | None, origin: str | None, key: int) -> None:
        """A row of the queue, as capture, the flush and repair_target write them."""
        if n not in self.open:
            self.open[n] = self.sessions[n]
            self.open[n].execute("BEGIN")
        self.open[n].execute(
            """
            INSERT INTO tbl_repl.change (segment, source_id, target_id, op, keys, row_count, origin)
            SELECT h.segment, s.source_id, %s, 'U', ARRAY[%s], 1, %s
            FROM tbl_repl.queue_head AS h, tbl_repl.source AS s WHERE s.source_table = %s::regclass
            """,
            [only, str(key), origin, source],
        )

    def end(self, n: int, how: str) -> None:
        if n in self.open:
            self.open.pop(n).execute(how)

    def ship_all(self, only: int | None) -> None:
        """What a batch leaves: a position with everything in it that is visible now."""
        self.node.sql(
            "UPDATE tbl_repl.progress SET position = pg_current_snapshot() WHERE target_id = coalesce(%s, target_id)",
            [only],
        )

    def ship_first(self, n: int) -> None:
        """What a batch leaves that ends at the first transaction of several."""
        pending = self.node.sql(PENDING)[n][0]
        self.node.sql(
            f"""
            UPDATE tbl_repl.progress AS p
            SET position = tbl_repl._position_after(p.position, pg_current_snapshot(), cut.txid,
                ARRAY(SELECT DISTINCT c.txid FROM {pending} AND c.txid > cut.txid))
            FROM (SELECT min(c.txid::text::bigint)::text::xid8 AS txid FROM {pending}) AS cut
            WHERE p.target_id = {self.targets[n]} AND cut.txid IS NOT NULL
            """
        )

    def turn(self) -> None:
        self.node.sql("UPDATE tbl_repl.queue_head SET segment = 1 - segment")

    def rotate(self) -> None:
        """The segment that is full rests, and what has committed since targets were shipped to is still in it."""
        self.ship_all(None)
        for n in list(self.open):
            self.end(n, "COMMIT")
        self.turn()
        before = self.counts()
        self.node.sql("SELECT tbl_repl._rotate()")
        assert self.counts() == before, before

    def counts(self) -> list[tuple[int, int, int]]:
        """Pending lines, rows and different keys of each target, by _pending_from."""
        return [self.node.sql(COUNTS + pending)[0] for (pending,) in self.node.sql(PENDING)]

    def check(self, where: str) -> None:
        for options, (lines, rows, keys), (any_, found, shipped) in zip(
            TARGETS, self.counts(), self.node.sql(COPIES), strict=True
        ):
            assert any_ == (lines > 0), f"{where}: {options}"
            assert found == rows, f"{where}: {options}"
            # none: there is nothing, or something that only the long way can ship
            assert shipped in ([], [keys]), f"{where}: {options}"


@pytest.mark.once
def test_everybody_takes_the_same_rows_for_pending(pair: Pair) -> None:
    queue = Queue(pair)
    # not found by hypothesis: to shorten a history takes minutes, and the last steps tell
    for seed in range(settings().max_examples):
        queue.reset()
        choice, done = random.Random(seed), []
        for _ in range(100):
            done.append(queue.do(choice))
            queue.check(f"seed {seed}, after {len(done)} steps, the last ones {done[-10:]}")
