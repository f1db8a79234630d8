"""Many writers: histories in which several nodes write the same few rows, end with the same rows everywhere."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import Node, Pair, wait_until

TABLE = "CREATE TABLE t (id integer PRIMARY KEY, v text, at {version} NOT NULL)"
LONG = bool(os.environ.get("TBL_REPL_LONG"))


def connect_all(pair: Pair, nodes: list[Node], edges: list[tuple[int, int]]) -> None:
    """A server on each node for each edge that leaves it, named by the number of the node it leads to."""
    for here, there in edges:
        pair.join(nodes[here], nodes[there], f"n{there}")


def mesh(count: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(count) for b in range(count) if a != b]


def add_targets(nodes: list[Node], edges: list[tuple[int, int]], **options: Any) -> None:
    given_ = {"mode": "async", "initial_copy": "none", **options}
    names = ", ".join(f"{name} => %({name})s" for name in given_)
    for here, there in edges:
        nodes[here].fresh(f"SELECT tbl_repl.add_target('t', 'n{there}', {names})", given_)


def pending(nodes: list[Node]) -> int:
    return sum(n.one("SELECT coalesce(sum(pending_rows), 0) FROM tbl_repl.target_status") for n in nodes)


def start_thread(call: Any) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def settle(nodes: list[Node]) -> None:
    """Drain everywhere until nothing is queued anywhere."""

    def done() -> bool:
        for node in nodes:
            node.fresh("CALL tbl_repl.drain()")
        return pending(nodes) == 0

    wait_until(done, timeout=60)


def rows(node: Node) -> list[Any]:
    return node.sql("SELECT * FROM t ORDER BY id")


def assert_equal(nodes: list[Node]) -> None:
    first = rows(nodes[0])
    for node in nodes[1:]:
        assert rows(node) == first


@pytest.fixture
def nodes(trio: Pair) -> list[Node]:
    assert trio.third is not None
    return [trio.source, trio.target, trio.third]


# --- carrying on


CHAIN = [(0, 1), (1, 2)]
CHAIN_BOTH = [(0, 1), (1, 2), (2, 1), (1, 0)]
RING = [(0, 1), (1, 2), (2, 0)]
STAR = [(0, 1), (1, 0), (0, 2), (2, 0)]


@pytest.mark.once
@pytest.mark.parametrize("mode", ["async", "tolerant", "sync"])
@pytest.mark.parametrize(
    ("edges", "writers"), [(CHAIN, [0]), (CHAIN_BOTH, [0, 1, 2]), (RING, [0, 1, 2]), (STAR, [0, 1, 2])]
)
def test_changes_are_carried_on_and_never_back(
    trio: Pair, nodes: list[Node], edges: list[tuple[int, int]], writers: list[int], mode: str
) -> None:
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, edges)
    add_targets(nodes, edges, mode=mode, forward="any")
    for n in writers:
        nodes[n].sql(
            f"INSERT INTO t SELECT 10 * {n} + g, 'from {n}', '2020-01-01' FROM generate_series(1, 4) g"
        )
        settle(nodes)
    assert_equal(nodes)
    assert len(rows(nodes[0])) == 4 * len(writers)
    for n in writers:
        nodes[n].sql(f"UPDATE t SET v = 'again', id = id + 100 WHERE id % 10 = 1 AND id / 10 = {n}")
        nodes[n].sql(f"DELETE FROM t WHERE id % 10 = 2 AND id / 10 = {n}")
        settle(nodes)
    assert_equal(nodes)
    before = [n.one("SELECT sum(rows_shipped) FROM tbl_repl.target_status") for n in nodes]
    settle(nodes)
    assert [n.one("SELECT sum(rows_shipped) FROM tbl_repl.target_status") for n in nodes] == before
    nodes[0].sql("TRUNCATE t")
    settle(nodes)
    assert rows(nodes[0]) == rows(nodes[1]) == rows(nodes[2]) == []


def test_the_middle_is_removed_while_writes_go_on(trio: Pair, nodes: list[Node]) -> None:
    """From A -> B -> C to A -> B and A -> C."""
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, [*CHAIN, (0, 2)])
    add_targets(nodes, CHAIN, forward="any")
    stop = threading.Event()

    def write() -> int:
        conn = nodes[0].connect()
        n = 0
        while not stop.is_set():
            n += 1
            conn.execute(
                "INSERT INTO t VALUES (%s, %s, now()) ON CONFLICT (id) DO UPDATE SET v = excluded.v",
                [n % 50, str(n)],
            )
        conn.close()
        return n

    writer = start_thread(write)
    wait_until(lambda: nodes[0].one("SELECT count(*) FROM t") == 50)
    nodes[0].fresh("CALL tbl_repl.drain()")
    nodes[1].fresh("CALL tbl_repl.drain()")
    assert nodes[2].one("SELECT count(*) FROM t") > 0
    nodes[0].fresh("SELECT tbl_repl.add_target('t', 'n2', mode => 'async')")
    nodes[1].fresh("CALL tbl_repl.drain()")
    nodes[1].fresh("SELECT tbl_repl.drop_target('t', 'n2')")
    stop.set()
    writer.join()
    settle(nodes)
    assert_equal(nodes)


def test_local_targets_do_not_carry_on(trio: Pair, nodes: list[Node]) -> None:
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, CHAIN)
    add_targets(nodes, CHAIN)
    nodes[0].sql("INSERT INTO t VALUES (1, 'a', '2020-01-01')")
    nodes[1].sql("INSERT INTO t VALUES (2, 'b', '2020-01-01')")
    settle(nodes)
    assert [r[0] for r in rows(nodes[2])] == [2]


def test_keep_holds_for_what_is_carried_on(trio: Pair, nodes: list[Node]) -> None:
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, CHAIN)
    add_targets(nodes, CHAIN, forward="any", on_conflict="keep")
    nodes[0].sql("INSERT INTO t VALUES (1, 'a', '2020-01-01'), (2, 'a', '2020-01-01')")
    settle(nodes)
    nodes[2].sql("UPDATE t SET v = 'corrected' WHERE id = 1")
    nodes[0].sql("UPDATE t SET v = 'b'")
    settle(nodes)
    assert [r[1] for r in rows(nodes[2])] == ["corrected", "b"]
    nodes[0].sql("DELETE FROM t")
    settle(nodes)
    assert [r[1] for r in rows(nodes[2])] == ["corrected"]


def test_conflicts_are_noted_at_the_end_of_a_chain(trio: Pair, nodes: list[Node]) -> None:
    """The change comes from a node that this one has no target to."""
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, CHAIN_BOTH)
    add_targets(nodes, CHAIN_BOTH, forward="any", on_conflict="newest", version_column="at")
    nodes[0].sql("INSERT INTO t VALUES (1, 'a', '2020-01-01')")
    settle(nodes)
    nodes[2].sql("UPDATE t SET v = 'c', at = '2021-01-01'")
    nodes[0].sql("UPDATE t SET v = 'a', at = '2022-01-01'")
    nodes[0].fresh("CALL tbl_repl.drain()")
    settle(nodes[:2])
    settle(nodes)
    assert_equal(nodes)
    log = nodes[2].sql("SELECT key, conflict_type, origin, resolution FROM tbl_repl.conflict_log")
    assert log == [
        ({"id": 1}, "update_origin_differs", nodes[0].one("SELECT tbl_repl.node_name()"), "applied")
    ]


def test_a_row_goes_with_the_origin_of_its_last_change(trio: Pair, nodes: list[Node]) -> None:
    """Changed elsewhere, then here: the other node has to get it, too."""
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, RING)
    add_targets(nodes, RING, forward="any")
    nodes[0].sql("INSERT INTO t VALUES (1, 'a', '2020-01-01'), (2, 'a', '2020-01-01')")
    nodes[0].fresh("CALL tbl_repl.drain()")
    nodes[1].sql("UPDATE t SET v = 'b' WHERE id = 1")
    settle(nodes)
    assert_equal(nodes)
    assert [r[1] for r in rows(nodes[0])] == ["b", "a"]


def test_seed_two_sided(pair: Pair) -> None:
    """Ten thousand rows on each side with disjoint keys, then updates, deletes, TRUNCATE."""
    both = [pair.source, pair.target]
    pair.both(TABLE.format(version="timestamptz"))
    connect_all(pair, both, mesh(2))
    add_targets(both, mesh(2))
    for n, node in enumerate(both):
        node.sql(f"INSERT INTO t SELECT 2 * g + {n}, 'x', now() FROM generate_series(1, 10000) g")
    settle(both)
    assert_equal(both)
    for n, node in enumerate(both):
        node.sql(f"UPDATE t SET v = 'from {n}' WHERE id % 4 = {n}")
        node.sql(f"DELETE FROM t WHERE id % 8 = {n + 4}")
    settle(both)
    assert_equal(both)
    assert len(rows(both[0])) == 15_000
    both[0].sql("TRUNCATE t")
    settle(both)
    assert rows(both[0]) == rows(both[1]) == []


# --- newest


ACTION = st.tuples(
    st.sampled_from(["insert", "update", "delete", "move", "truncate", "drain", "cut", "heal", "kill"]),
    st.integers(0, 2),  # node
    st.integers(0, 3),  # row
    st.integers(0, 5),  # version
)
# eight kinds of scene: 200 histories, 5,000 in the long run
EXAMPLES = 625 if LONG else 25


def act(node: Node, what: str, row: int, version: int, kind: str) -> None:
    at = (
        f"('2020-01-01'::timestamptz + {version} * interval '1 day')"
        if kind == "timestamptz"
        else str(version)
    )
    word = f"'{what[0]}{row}{version}'"
    statement = {
        "insert": f"INSERT INTO t VALUES ({row}, {word}, {at}) ON CONFLICT (id) DO UPDATE SET v = excluded.v, at = excluded.at",
        "update": f"UPDATE t SET v = {word}, at = {at} WHERE id = {row}",
        "delete": f"DELETE FROM t WHERE id = {row}",
        "move": f"UPDATE t SET id = {row + 4}, at = {at} WHERE id = {row} AND NOT EXISTS (SELECT FROM t WHERE id = {row + 4})",
        "truncate": "TRUNCATE t",
        "drain": "CALL tbl_repl.drain()",
    }[what]
    node.fresh(statement)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["timestamptz", "bigint"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("modes", ["async", "mixed"])
def test_newest_converges_whatever_the_order(
    trio: Pair, nodes: list[Node], kind: str, count: int, modes: str
) -> None:
    nodes = nodes[:count]
    for node in nodes:
        node.sql(TABLE.format(version=kind))
    connect_all(trio, nodes, mesh(count))
    proxy = trio.proxy("n1", nodes[1])
    for number, edge in enumerate(mesh(count)):
        mode = "async" if modes == "async" else ("tolerant", "async", "sync")[number % 3]
        add_targets(nodes, [edge], mode=mode, on_conflict="newest", version_column="at")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not LONG,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(ACTION, min_size=3, max_size=14))
    def history(actions: list[tuple[str, int, int, int]]) -> None:
        for what, number, row, version in actions:
            node = nodes[number % count]
            if what in ("cut", "heal"):
                proxy.set("refuse" if what == "cut" else "pass")
                proxy.cut()
            elif what == "kill":
                for pid in node.backends("tbl_repl%"):
                    node.admin("SELECT pg_terminate_backend(%s, 5000)", [pid])
            else:
                try:
                    act(node, what, row, version, kind)
                except psycopg.Error as error:
                    # a sync target is out of reach, or waits for what this very statement has locked
                    assert modes == "mixed" and (error.sqlstate or "")[:2] in ("08", "55", "57"), error
        proxy.set("pass")
        settle(nodes)
        assert_equal(nodes)

    history()


@pytest.mark.once
@pytest.mark.parametrize("mode", ["async", "tolerant"])
def test_newest_converges_under_a_storm(trio: Pair, nodes: list[Node], mode: str) -> None:
    """Writers on all three nodes and drainers everywhere at once, on few rows that move on."""
    for node in nodes:
        node.sql(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, mesh(3))
    add_targets(nodes, mesh(3), mode=mode, on_conflict="newest", version_column="at", timeout="2 s")
    until = time.monotonic() + (40 if LONG else 5)
    failures: list[str] = []

    def write(node: Node, seed: int) -> None:
        rng = random.Random(seed)
        conn = node.connect()
        n = 0
        while time.monotonic() < until:
            n += 1
            row = n // 20 + rng.randrange(4)
            try:
                kind = rng.randrange(4)
                if kind < 2:
                    conn.execute(
                        "INSERT INTO t VALUES (%s, %s, clock_timestamp()) ON CONFLICT (id) DO UPDATE SET v = excluded.v, at = excluded.at",
                        [row, f"{seed}-{n}"],
                    )
                elif kind == 2:
                    conn.execute(
                        "UPDATE t SET v = %s, at = clock_timestamp() WHERE id = %s", [f"{seed}-{n}", row]
                    )
                else:
                    conn.execute("DELETE FROM t WHERE id = %s", [row])
            except (
                psycopg.errors.LockNotAvailable,
                psycopg.errors.QueryCanceled,
                psycopg.errors.DeadlockDetected,
            ):
                pass
            except psycopg.Error as error:
                failures.append(str(error))
        conn.close()

    def drain(node: Node) -> None:
        conn = node.connect()
        while time.monotonic() < until:
            conn.execute("SELECT tbl_repl.replay()")
        conn.close()

    threads = [
        threading.Thread(target=write, args=(node, 10 * i + k))
        for i, node in enumerate(nodes)
        for k in range(2)
    ]
    threads += [threading.Thread(target=drain, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    settle(nodes)
    assert_equal(nodes)
    assert len(rows(nodes[0])) > 0


# --- sync on both sides


def test_sync_writers_that_lock_each_other_end_by_timeout_with_a_hint(pair: Pair) -> None:
    both = [pair.source, pair.target]
    pair.both(TABLE.format(version="timestamptz"))
    connect_all(pair, both, mesh(2))
    add_targets(both, mesh(2), mode="sync", timeout="1 s")
    pair.source.sql("INSERT INTO t VALUES (1, 'a', now())")
    conns = [node.connect() for node in both]
    for conn in conns:
        conn.execute("BEGIN")
        conn.execute("UPDATE t SET v = %s WHERE id = 1", [str(id(conn))])
    begun = time.monotonic()
    raised: list[psycopg.Error] = []

    def commit(conn: psycopg.Connection) -> None:
        try:
            conn.execute("COMMIT")
        except psycopg.Error as error:
            raised.append(error)

    threads = [threading.Thread(target=commit, args=(conn,)) for conn in conns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun < 5
    assert raised
    for error in raised:
        assert error.sqlstate in ("55P03", "57014")
        assert "waits for this one" in error.diag.message_hint
    settle(both)
    assert_equal(both)


@pytest.mark.once
@pytest.mark.parametrize("edges", [STAR, CHAIN_BOTH], ids=["star", "chain"])
def test_a_change_does_not_come_back_from_where_it_was_carried_to(
    trio: Pair, nodes: list[Node], edges: list[tuple[int, int]]
) -> None:
    """There it would be older by then than what the node in the middle has."""
    middle, ends = (0, (1, 2)) if edges is STAR else (1, (0, 2))
    trio.both(TABLE.format(version="timestamptz"))
    connect_all(trio, nodes, edges)
    add_targets(nodes, edges, forward="any")
    nodes[ends[0]].sql("INSERT INTO t VALUES (1, 'v1', '2020-01-01')")
    for n in (ends[0], middle):
        nodes[n].fresh("CALL tbl_repl.drain()")
    nodes[ends[0]].sql("UPDATE t SET v = 'v2'")
    for n in ends:
        nodes[n].fresh("CALL tbl_repl.drain()")
    settle(nodes)
    assert [node.one("SELECT v FROM t") for node in nodes] == ["v2"] * 3


@pytest.mark.once
def test_rows_keep_their_origin_when_one_is_rejected_and_in_quarantine(trio: Pair, nodes: list[Node]) -> None:
    trio.both(TABLE.format(version="timestamptz") + "; CREATE TABLE u (id integer PRIMARY KEY)")
    connect_all(trio, nodes, CHAIN)
    for here, there in CHAIN:
        for table in "tu":
            nodes[here].fresh(
                f"SELECT tbl_repl.add_target('{table}', 'n{there}', mode => 'async', forward => 'any', initial_copy => 'none')"
            )
    nodes[1].sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    last = nodes[2].one("SELECT tbl_repl.node_name()")
    nodes[0].fresh(
        f"SET tbl_repl.origin = '{last}'; INSERT INTO t VALUES (1, 'x', '2020-01-01'), (2, 'bad', '2020-01-01')"
    )
    nodes[0].sql("INSERT INTO u VALUES (10)")
    for node in nodes[:2]:
        node.fresh("CALL tbl_repl.drain()")
    assert nodes[2].rows("u") == ["(10)"]
    assert nodes[2].rows("t") == [], "it was made there"
    nodes[1].sql("ALTER TABLE t DROP CONSTRAINT t_v_check")
    for node in nodes[:2]:
        node.fresh("CALL tbl_repl.drain()")
    assert nodes[1].one("SELECT count(*) FROM t") == 2
    assert nodes[2].rows("t") == [], "it was made there, too"
