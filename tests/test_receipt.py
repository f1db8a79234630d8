"""Receipts: what a target has committed and the source has not is found and healed without anybody asking."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from support import Pair, wait_until
from support.background import start


def replicate(pair: Pair, **options: object) -> int:
    """Table t with rows 1 to 3 on both sides, and a target; its id."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3) AS g")
    options.setdefault("timeout", "5 s")
    return pair.add_target("t", **options)


def receipts(pair: Pair) -> int:
    return int(pair.target.one("SELECT count(*) FROM tbl_repl.receipt"))


def in_doubt(pair: Pair, target: int) -> int:
    return int(
        pair.source.one("SELECT in_doubt FROM tbl_repl.target_status WHERE target_id = %s", [target])
    )


@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_a_session_has_one_receipt_whatever_it_writes(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    for n in range(10, 30):
        pair.source.sql(f"INSERT INTO t VALUES ({n}, 'y')")
        pair.source.sql(f"UPDATE t SET v = 'z' WHERE id IN (1, {n})")
    pair.assert_same("t")
    assert receipts(pair) == 1
    pair.drain()
    assert receipts(pair) == 0
