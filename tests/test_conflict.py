"""Several nodes that write the same table: origins, policies, tombstones."""

from __future__ import annotations

import json

import psycopg
import pytest
from psycopg import errors

from support import Node, Pair, wait_until
from support.background import in_background, start, within

TABLE = "CREATE TABLE t (id integer PRIMARY KEY, v text, at timestamptz NOT NULL DEFAULT clock_timestamp())"


@pytest.fixture
def two(pair: Pair) -> Pair:
    """Table t on both nodes; `there` leads from the target back to the source."""
    pair.both(TABLE)
    pair.join(pair.target, pair.source, "there")
    return pair


def both_ways(pair: Pair, **options: object) -> tuple[int, int]:
    """Targets in both directions."""
    forth = pair.add_target("t", **options)
    back = pair.target.one(
        "SELECT tbl_repl.add_target('t', 'there', mode => %(mode)s, on_conflict => %(on_conflict)s, "
        "version_column => %(version_column)s, initial_copy => 'none')",
        {"mode": "tolerant", "on_conflict": "overwrite", "version_column": None, **options},
    )
    return forth, int(back)


def drain_all(*nodes: Node) -> None:
    """Until no node has anything queued for another."""

    def done() -> bool:
        for node in nodes:
            node.fresh("CALL tbl_repl.drain()")
        return all(
            node.one("SELECT coalesce(sum(pending_rows), 0) FROM tbl_repl.target_status") == 0
            for node in nodes
        )

    wait_until(done, timeout=30)


def content(node: Node) -> list[object]:
    return node.sql("SELECT * FROM t ORDER BY id")


def conflicts(node: Node) -> list[object]:
    return node.sql("SELECT conflict_type, key, resolution FROM tbl_repl.conflict_log ORDER BY at")


# --- origins


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_change_does_not_come_back(two: Pair, mode: str) -> None:
    both_ways(two, mode=mode)
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'here')")
    two.target.sql("INSERT INTO t (id, v) VALUES (2, 'there')")
    drain_all(two.source, two.target)
    two.source.sql("UPDATE t SET v = 'b' WHERE id = 2")
    two.target.sql("DELETE FROM t WHERE id = 1")
    drain_all(two.source, two.target)
    assert content(two.source) == content(two.target)
    assert [row[:2] for row in content(two.source)] == [(2, "b")]
    shipped = [n.one("SELECT rows_shipped FROM tbl_repl.target_status") for n in (two.source, two.target)]
    assert shipped == [2, 2]
    assert two.source.admin("SELECT count(*) FROM tbl_repl.conflict") == [(0,)]


def test_two_nodes_of_one_name_are_refused(two: Pair) -> None:
    two.source.admin("SELECT tbl_repl.set_node_name('same')")
    two.target.admin("SELECT tbl_repl.set_node_name('same')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="has the name of this node"):
        two.add_target("t")


def test_a_node_of_the_same_name_is_found_out_also_where_older_sessions_have_to_go(two: Pair) -> None:
    two.source.admin("SELECT tbl_repl.set_node_name('same')")
    two.add_target("t", mode="sync")
    two.target.admin("SELECT tbl_repl.set_node_name('same')")
    left = two.target.connect(application_name="tbl_repl same 1.1.0000")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="has the name of this node"):
        two.source.fresh("INSERT INTO t VALUES (1, 'a')")
    with pytest.raises(errors.AdminShutdown):
        left.execute("SELECT 1")


def test_a_physical_copy_of_this_node_is_refused(two: Pair) -> None:
    """It has this node's name and system identifier, but was started at another time."""
    facts = """jsonb_build_object('node', tbl_repl.node_name(), 'database', current_database(),
        'system', (SELECT c.system_identifier::text FROM pg_control_system() AS c),
        'started', extract(epoch FROM pg_postmaster_start_time() {})::text)"""
    two.source.sql(f"SELECT tbl_repl._check_node({facts.format('')})")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="has the name of this node"):
        two.source.sql(f"SELECT tbl_repl._check_node({facts.format(chr(43) + ' interval ' + repr('1 s'))})")


# --- policies


def test_keep_keeps_what_was_changed_on_the_target(two: Pair) -> None:
    two.add_target("t", mode="async", on_conflict="keep")
    two.source.sql(
        "INSERT INTO t VALUES (1, 'a', '2020-01-01'), (2, 'a', '2020-01-01'), (3, 'a', '2020-01-01'), (4, 'a', '2020-01-01')"
    )
    two.target.sql("INSERT INTO t VALUES (2, 'theirs', '2020-01-01')")
    two.drain()
    assert [r[:2] for r in content(two.target)] == [(1, "a"), (2, "theirs"), (3, "a"), (4, "a")]
    two.target.sql("UPDATE t SET v = 'theirs' WHERE id IN (3, 4)")
    two.source.sql("UPDATE t SET v = 'b' WHERE id IN (1, 3); DELETE FROM t WHERE id = 4")
    two.drain()
    assert [r[:2] for r in content(two.target)] == [(1, "b"), (2, "theirs"), (3, "theirs"), (4, "theirs")]
    two.target.sql("DELETE FROM t WHERE id = 1")
    two.source.sql("UPDATE t SET v = 'c' WHERE id = 1")
    two.drain()
    assert sorted(conflicts(two.target), key=str) == sorted(
        [
            ("insert_exists", {"id": 2}, "kept"),
            ("update_origin_differs", {"id": 3}, "kept"),
            ("delete_origin_differs", {"id": 4}, "kept"),
            ("update_missing", {"id": 1}, "kept"),
        ],
        key=str,
    )


@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_keep_in_the_direct_modes(two: Pair, mode: str) -> None:
    two.add_target("t", mode=mode, on_conflict="keep")
    two.source.sql("INSERT INTO t VALUES (1, 'a', '2020-01-01')")
    two.source.sql("UPDATE t SET v = 'b'")
    two.assert_same("t")
    two.target.sql("UPDATE t SET v = 'theirs'")
    two.source.sql("UPDATE t SET v = 'c'")
    assert content(two.target)[0][1] == "theirs"
    assert conflicts(two.target) == [("update_origin_differs", {"id": 1}, "kept")]


def test_error_puts_the_row_into_quarantine_with_both_versions(two: Pair) -> None:
    two.add_target("t", mode="async", on_conflict="error")
    two.source.sql("INSERT INTO t VALUES (1, 'ours', '2020-01-01'), (2, 'a', '2020-01-01')")
    two.target.sql("INSERT INTO t VALUES (1, 'theirs', '2020-01-01')")
    two.drain()
    assert [r[:2] for r in content(two.target)] == [(1, "theirs"), (2, "a")]
    [(key, code, message)] = two.source.sql("SELECT key, sqlstate, message FROM tbl_repl.quarantine")
    assert (key, code) == ({"id": 1}, "23000")
    assert "insert_exists" in message and "ours" in message and "theirs" in message
    # it stays there until somebody decides
    two.drain()
    assert two.source.one("SELECT count(*) FROM tbl_repl.quarantine") == 1
    two.target.sql("DELETE FROM t WHERE id = 1")
    two.drain()
    two.assert_same("t")
    assert two.source.one("SELECT count(*) FROM tbl_repl.quarantine") == 0


def test_error_fails_a_sync_writer(two: Pair) -> None:
    two.add_target("t", mode="sync", on_conflict="error")
    two.target.sql("INSERT INTO t VALUES (1, 'theirs', '2020-01-01')")
    with pytest.raises(errors.IntegrityConstraintViolation, match="insert_exists"):
        two.source.sql("INSERT INTO t VALUES (1, 'ours', '2020-01-01')")
    assert content(two.source) == []


@pytest.mark.once
def test_overwrite_notes_what_it_overwrites_row_by_row_too(pair: Pair) -> None:
    """Partitioned tables are captured by row triggers; a long backlog must not be searched for each row."""
    pair.both(
        "CREATE TABLE t (id integer, p integer, v text, PRIMARY KEY (id, p)) PARTITION BY LIST (p); "
        "CREATE TABLE t_1 PARTITION OF t FOR VALUES IN (1); CREATE TABLE t_2 PARTITION OF t FOR VALUES IN (2)"
    )
    pair.join(pair.target, pair.source, "there")
    both_ways(pair, mode="async")
    pair.source.sql("INSERT INTO t SELECT g, 1, 'ours' FROM generate_series(1, 5000) AS g")
    pair.target.sql("INSERT INTO t SELECT g, 1 + g % 2, 'theirs' FROM generate_series(1, 5000) AS g")
    with within(10):
        pair.drain()
    assert pair.source.one("SELECT count(*) FROM tbl_repl.quarantine") == 0
    drain_all(pair.source, pair.target)
    pair.assert_same("t")
    assert pair.source.one("SELECT count(*) FROM t") == 7500
    log = "SELECT conflict_type, resolution, count(*), min(key ->> 'id') FROM tbl_repl.conflict_log GROUP BY 1, 2"
    assert pair.target.sql(log) == [("insert_exists", "applied", 2500, "10")]
    pair.target.sql("UPDATE t SET v = 'again' WHERE id = 2")
    pair.source.sql("DELETE FROM t WHERE id = 2")
    pair.drain()
    assert pair.target.sql(log + " ORDER BY 1")[0] == ("delete_origin_differs", "applied", 1, "2")


@pytest.mark.parametrize("policy", ["keep", "error"])
def test_a_row_in_quarantine_is_no_conflict_once_it_fits(two: Pair, policy: str) -> None:
    two.add_target("t", mode="async", on_conflict=policy)
    two.source.sql("INSERT INTO t SELECT g, 'a', '2020-01-01' FROM generate_series(1, 4) g")
    two.drain()
    two.target.sql("ALTER TABLE t ADD CONSTRAINT short CHECK (length(v) < 3)")
    two.source.sql("UPDATE t SET v = 'long' WHERE id < 4")
    two.drain()
    assert two.source.sql("SELECT sqlstate FROM tbl_repl.quarantine") == [("23514",)] * 3
    # once more while it is there; and one that is corrected on the target meanwhile
    two.source.sql("UPDATE t SET v = 'longer' WHERE id = 1; UPDATE t SET v = 'b' WHERE id = 2")
    two.drain()
    assert two.source.one("SELECT count(*) FROM tbl_repl.quarantine") == 2
    two.target.sql("UPDATE t SET v = 'c' WHERE id = 3; ALTER TABLE t DROP CONSTRAINT short")
    two.drain()
    assert [r[1] for r in content(two.target)] == ["longer", "b", "c", "a"]
    if policy == "keep":
        assert conflicts(two.target) == [("update_origin_differs", {"id": 3}, "kept")]
    else:
        assert two.source.sql("SELECT key, sqlstate FROM tbl_repl.quarantine") == [({"id": 3}, "23000")]
        two.target.sql("DELETE FROM t WHERE id = 3")
        two.drain()
        two.assert_same("t")


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_error_does_not_bring_back_what_was_deleted_on_the_target(two: Pair, mode: str) -> None:
    target = two.add_target("t", mode=mode, on_conflict="error")
    two.source.sql("INSERT INTO t SELECT g, 'a', '2020-01-01' FROM generate_series(1, 3) g")
    two.drain()
    two.target.sql("DELETE FROM t")
    two.source.sql("UPDATE t SET v = 'b'")
    for _ in range(3):
        two.drain()
        assert two.target.rows("t") == []
        messages = [row[0] for row in two.source.sql("SELECT message FROM tbl_repl.quarantine")]
        assert len(messages) == 3 and all("update_missing" in message for message in messages)
    two.source.sql("DELETE FROM t WHERE id = 1; UPDATE t SET v = 'c' WHERE id = 2")
    two.drain()
    assert two.source.sql("SELECT key FROM tbl_repl.quarantine ORDER BY key::text") == [
        ({"id": 2},),
        ({"id": 3},),
    ]
    two.call("repair_target", target_id=target)
    two.drain()
    two.assert_same("t")
    assert two.source.sql("SELECT * FROM tbl_repl.quarantine") == []


@pytest.mark.once
@pytest.mark.parametrize("new", ["keep", "error", "newest"])
@pytest.mark.parametrize("old", ["overwrite", "keep", "newest"])
def test_the_policy_changes_while_changes_are_queued(two: Pair, old: str, new: str) -> None:
    """What was kept of old rows for one policy means nothing to another."""
    target = two.add_target("t", mode="async", on_conflict=old, version_column="at")
    two.source.sql("INSERT INTO t SELECT g, 'a', '2020-01-01' FROM generate_series(1, 5) g")
    two.drain()
    two.source.sql(
        "UPDATE t SET v = 'b' WHERE id = 1; DELETE FROM t WHERE id = 2; UPDATE t SET id = 30 WHERE id = 3"
    )
    two.call("alter_target", target_id=target, on_conflict=new)
    two.source.sql("UPDATE t SET v = 'c', at = '2021-01-01' WHERE id = 4")
    two.drain()
    two.assert_same("t")
    assert conflicts(two.target) == []


def test_other_columns_are_sent_while_changes_are_queued_under_keep(two: Pair) -> None:
    target = two.add_target("t", mode="async", on_conflict="keep")
    two.source.sql("INSERT INTO t SELECT g, 'a', '2020-01-01' FROM generate_series(1, 3) g")
    two.drain()
    two.source.sql("UPDATE t SET v = 'b' WHERE id = 1")
    two.call("alter_target", target_id=target, columns=["id", "v"])
    two.drain()
    two.assert_same("t")


@pytest.mark.parametrize("policy", ["keep", "error", "newest"])
@pytest.mark.parametrize("change", ["RENAME v TO w", "DROP v", "RENAME at TO changed_at"])
@pytest.mark.parametrize("shape", ["ordinary", "partitioned"])
@pytest.mark.once
def test_writers_go_on_where_a_column_is_gone_that_a_policy_looks_at(
    two: Pair, policy: str, change: str, shape: str
) -> None:
    table = "u"
    two.target.sql("CREATE TABLE u (id integer PRIMARY KEY, v text, at timestamptz)")
    two.source.sql(
        "CREATE TABLE u (id integer PRIMARY KEY, v text, at timestamptz)"
        + (
            " PARTITION BY RANGE (id); CREATE TABLE u_1 PARTITION OF u DEFAULT"
            if shape == "partitioned"
            else ""
        )
    )
    version = "at" if policy == "newest" else None
    target = two.add_target(table, mode="async", on_conflict=policy, version_column=version)
    two.source.sql("INSERT INTO u VALUES (1, 'x', now()), (2, 'x', now()), (3, 'x', now())")
    two.drain()
    two.source.sql(f"ALTER TABLE u {change}")
    two.source.sql(
        "UPDATE u SET id = 4 WHERE id = 1; DELETE FROM u WHERE id = 2; INSERT INTO u (id) VALUES (5)"
    )
    two.source.sql("UPDATE u SET id = id; TRUNCATE u")
    assert two.pending(target) > 0


def test_overwrite_notes_what_it_overwrites(two: Pair) -> None:
    both_ways(two, mode="async")
    two.source.sql("INSERT INTO t VALUES (1, 'ours', '2020-01-01')")
    two.target.sql("INSERT INTO t VALUES (1, 'theirs', '2020-01-01')")
    drain_all(two.source, two.target)
    assert content(two.source) == content(two.target)
    assert [r[1] for r in content(two.source)] == ["ours"]
    assert conflicts(two.target) == [("insert_exists", {"id": 1}, "applied")]


@pytest.mark.parametrize("first", ["source", "target"])
@pytest.mark.parametrize("version", ["timestamptz", "bigint"])
def test_newest_wins_on_both_sides(pair: Pair, first: str, version: str) -> None:
    pair.both(f"CREATE TABLE t (id integer PRIMARY KEY, v text, at {version} NOT NULL)")
    pair.join(pair.target, pair.source, "there")
    old, new = ("'2020-01-01'", "'2021-01-01'") if version == "timestamptz" else ("1", "2")
    both_ways(pair, mode="async", on_conflict="newest", version_column="at")
    pair.source.sql(f"INSERT INTO t VALUES (1, 'old', {old}), (2, 'new', {new}), (3, 'a', {old})")
    pair.target.sql(f"INSERT INTO t VALUES (1, 'new', {new}), (2, 'old', {old}), (3, 'b', {old})")
    nodes = (pair.source, pair.target) if first == "source" else (pair.target, pair.source)
    drain_all(*nodes)
    assert content(pair.source) == content(pair.target)
    assert [r[1] for r in content(pair.source)] == ["new", "new", "b"]
    assert conflicts(pair.source) + conflicts(pair.target) != []


@pytest.mark.parametrize("first", ["source", "target"])
def test_newest_a_delete_beats_an_older_update_and_loses_against_a_newer_one(two: Pair, first: str) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t VALUES (1, 'a', '2020-01-01'), (2, 'a', '2020-01-01')")
    drain_all(two.source, two.target)
    two.source.sql("DELETE FROM t")
    two.target.sql("UPDATE t SET v = 'older', at = '2020-01-02' WHERE id = 1")
    two.target.sql("UPDATE t SET v = 'newer', at = '2999-01-01' WHERE id = 2")
    nodes = (two.source, two.target) if first == "source" else (two.target, two.source)
    drain_all(*nodes)
    assert content(two.source) == content(two.target)
    assert [r[:2] for r in content(two.source)] == [(2, "newer")]


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
def test_newest_in_the_direct_modes(two: Pair, mode: str) -> None:
    both_ways(two, mode=mode, on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'a'), (2, 'a')")
    two.target.sql("UPDATE t SET v = 'b', at = clock_timestamp() WHERE id = 1")
    two.source.sql("DELETE FROM t WHERE id = 2")
    assert content(two.source) == content(two.target)
    # an older value is refused, and answered by the newer one
    two.target.sql("INSERT INTO t (id, v) VALUES (3, 'newer')")
    two.source.sql("UPDATE t SET v = 'older', at = '2000-01-01' WHERE id = 3")
    drain_all(two.source, two.target)
    assert content(two.source) == content(two.target)
    assert content(two.source)[-1][1] == "newer"


@pytest.mark.parametrize(("version", "least"), [("timestamptz", "-infinity"), ("bigint", str(-(2**63)))])
def test_newest_takes_no_version_for_the_least(pair: Pair, version: str, least: str) -> None:
    pair.both(f"CREATE TABLE t (id integer PRIMARY KEY, v text, at {version})")
    pair.join(pair.target, pair.source, "there")
    both_ways(pair, mode="async", on_conflict="newest", version_column="at")
    pair.source.sql("INSERT INTO t VALUES (1, 'a', NULL), (2, 'b', NULL), (3, 'z', NULL)")
    pair.target.sql(
        "INSERT INTO t VALUES (1, 'b', NULL), (2, 'a', %s), (3, 'a', %s)",
        [least, "epoch" if version == "timestamptz" else "1"],
    )
    drain_all(pair.source, pair.target)
    pair.assert_same("t")
    assert pair.source.sql("SELECT v FROM t ORDER BY id") == [("b",), ("b",), ("a",)]
    pair.source.sql("DELETE FROM t")
    drain_all(pair.source, pair.target)
    assert content(pair.target) == []


@pytest.mark.once
@pytest.mark.parametrize("policy", ["newest", "keep"])
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_linked_tables_are_settled_in_an_order_that_foreign_keys_allow(
    two: Pair, mode: str, policy: str
) -> None:
    two.both(
        "CREATE TABLE child (id integer PRIMARY KEY, parent integer REFERENCES t, at timestamptz DEFAULT clock_timestamp())"
    )
    for table in ("t", "child"):
        two.add_target(table, mode=mode, on_conflict=policy, version_column="at")
    two.source.sql("INSERT INTO t (id) VALUES (1), (2); INSERT INTO child VALUES (1, 1), (2, 2)")
    two.drain()
    two.source.sql("DELETE FROM child WHERE id = 1; DELETE FROM t WHERE id = 1")
    two.drain()
    two.source.sql(
        "INSERT INTO t (id) VALUES (3); UPDATE child SET parent = 3, at = clock_timestamp(); DELETE FROM t WHERE id = 2"
    )
    two.drain()
    two.assert_same("t")
    two.assert_same("child")
    assert two.source.sql("SELECT message FROM tbl_repl.error_log") == []


@pytest.mark.parametrize("policy", ["newest", "keep"])
def test_rows_that_refer_to_each_other_are_settled_in_any_order(two: Pair, policy: str) -> None:
    two.both("ALTER TABLE t ADD parent integer REFERENCES t")
    two.add_target("t", mode="sync", on_conflict=policy, version_column="at")
    two.source.sql("INSERT INTO t (id, parent) VALUES (10, NULL), (1, 10), (20, 1), (2, 20)")
    two.assert_same("t")
    two.source.sql(
        "UPDATE t SET parent = 2, at = clock_timestamp() WHERE id = 1; DELETE FROM t WHERE id = 10"
    )
    two.source.sql("DELETE FROM t")
    assert content(two.target) == []


@pytest.mark.once
@pytest.mark.parametrize("policy", ["newest", "keep", "error"])
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_unique_values_wander_between_rows(two: Pair, mode: str, policy: str) -> None:
    two.both("CREATE UNIQUE INDEX ON t (v)")
    two.add_target("t", mode=mode, on_conflict=policy, version_column="at")
    two.source.sql("INSERT INTO t (id, v) SELECT g, 'v' || g FROM generate_series(1, 6) g")
    two.drain()
    # a chain, against the order of keys; then a ring
    two.source.sql(
        """
        UPDATE t SET v = 'new', at = clock_timestamp() WHERE id = 3;
        UPDATE t SET v = 'v3', at = clock_timestamp() WHERE id = 2;
        UPDATE t SET v = 'v2', at = clock_timestamp() WHERE id = 1
        """
    )
    two.drain()
    two.assert_same("t")
    two.source.sql(
        """
        UPDATE t SET v = 'aside' WHERE id = 4;
        UPDATE t SET v = 'v4', at = clock_timestamp() WHERE id = 5;
        UPDATE t SET v = 'v5', at = clock_timestamp() WHERE id = 4
        """
    )
    two.drain()
    two.assert_same("t")
    # one of them is taken by a row of the target alone
    two.target.sql("INSERT INTO t (id, v, at) VALUES (100, 'taken', '2020-01-01')")
    if mode == "sync":
        with pytest.raises(errors.UniqueViolation):
            two.source.sql("UPDATE t SET v = 'taken', at = clock_timestamp() WHERE id = 6")
    else:
        two.source.sql("UPDATE t SET v = 'taken', at = clock_timestamp() WHERE id = 6")
        two.drain()
        assert two.source.sql("SELECT key, sqlstate FROM tbl_repl.quarantine") == [({"id": 6}, "23505")]
    assert (6, "v6") in [r[:2] for r in content(two.target)]


def test_repair_deletes_what_only_the_target_has_under_newest(two: Pair) -> None:
    forth, _ = both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.target.sql(
        "SET tbl_repl.origin = 'nowhere'; INSERT INTO t (id, v) VALUES (1, 'extra'); RESET tbl_repl.origin"
    )
    assert two.call("repair_target", target_id=forth, delete_extra=True) == 1
    drain_all(two.source, two.target)
    assert content(two.target) == content(two.source) == []


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_newest_a_delete_older_than_its_target(two: Pair, mode: str) -> None:
    for node in (two.source, two.target):
        node.sql("INSERT INTO t VALUES (1, 'x', '2026-01-01')")
    conn = two.source.connect()
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class")
    both_ways(two, mode=mode, on_conflict="newest", version_column="at")
    conn.execute("DELETE FROM t WHERE id = 1")
    conn.execute("COMMIT")
    drain_all(two.source, two.target)
    assert two.source.rows("t") == two.target.rows("t") == []


@pytest.mark.once
@pytest.mark.parametrize("policy", ["newest", "keep", "error"])
def test_policies_for_tables_of_many_columns(pair: Pair, policy: str) -> None:
    more = ", ".join(f"c{n} integer DEFAULT {n}" for n in range(150))
    pair.both(f"CREATE TABLE wide (id integer PRIMARY KEY, version bigint NOT NULL, {more})")
    pair.add_target("wide", on_conflict=policy, version_column="version")
    pair.source.sql(
        "INSERT INTO wide VALUES (1, 1), (2, 1); UPDATE wide SET version = 2, c149 = 0 WHERE id = 1"
    )
    assert pair.source.one("SELECT count(*) FROM tbl_repl.quarantine") == 0
    pair.assert_same("wide")


def test_newest_truncate_deletes_every_row(two: Pair) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t (id, v) SELECT g, 'a' FROM generate_series(1, 5) g")
    drain_all(two.source, two.target)
    two.source.sql("TRUNCATE t")
    two.target.sql("INSERT INTO t (id, v) VALUES (9, 'meanwhile')")
    drain_all(two.source, two.target)
    assert content(two.source) == content(two.target)
    assert [r[0] for r in content(two.source)] == [9]


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"on_conflict": "newest"}, errors.InvalidParameterValue),
        ({"on_conflict": "newest", "version_column": "nope"}, errors.UndefinedColumn),
        ({"on_conflict": "newest", "version_column": "v"}, errors.InvalidParameterValue),
        (
            {"on_conflict": "newest", "version_column": "at", "row_filter": "id > 0"},
            errors.FeatureNotSupported,
        ),
        (
            {"on_conflict": "newest", "version_column": "at", "columns": ["id", "at"]},
            errors.FeatureNotSupported,
        ),
        ({"on_conflict": "keep", "column_map": {"n": "id"}}, errors.FeatureNotSupported),
    ],
)
def test_policies_that_cannot_work_are_refused(
    two: Pair, options: dict[str, object], error: type[psycopg.Error]
) -> None:
    two.target.sql("ALTER TABLE t ADD n integer GENERATED ALWAYS AS IDENTITY")
    with pytest.raises(error):
        two.add_target("t", **options)
    assert two.source.one("SELECT count(*) FROM tbl_repl.target_status") == 0


@pytest.mark.plain_target
@pytest.mark.parametrize("policy", ["keep", "newest", "error"])
def test_policies_need_the_extension_on_the_target(pair: Pair, policy: str) -> None:
    pair.both(TABLE)
    with pytest.raises(errors.ObjectNotInPrerequisiteState) as caught:
        pair.add_target("t", on_conflict=policy, version_column="at")
    assert "CREATE EXTENSION" in str(caught.value.diag.message_hint)


def test_tombstones_are_kept_until_nobody_needs_them(two: Pair) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'a'), (2, 'a')")
    drain_all(two.source, two.target)
    two.source.sql("DELETE FROM t WHERE id = 1")
    for node in (two.source, two.target):
        node.admin("UPDATE tbl_repl.tombstone SET at = at - interval '31 days'")
    two.source.sql("SELECT 1")
    assert two.source.admin("SELECT key FROM tbl_repl.tombstone") == [("1",)]
    drain_all(two.source, two.target)
    two.source.sql("UPDATE t SET v = 'b', at = clock_timestamp()")
    drain_all(two.source, two.target)
    assert two.source.admin("SELECT key FROM tbl_repl.tombstone") == []
    assert two.target.admin("SELECT key FROM tbl_repl.tombstone") == [("1",)]  # it has got it just now


def test_tombstones_go_where_nothing_is_shipped_and_where_values_only_come(two: Pair) -> None:
    both_ways(two, mode="tolerant", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'a'), (2, 'a')")
    two.source.sql("DELETE FROM t WHERE id = 1")
    for node in (two.source, two.target):
        node.admin("UPDATE tbl_repl.tombstone SET at = at - interval '31 days'")

    def purged() -> bool:
        for _ in range(32):  # by one settled value in sixteen
            two.source.sql("UPDATE t SET v = v || 'b', at = clock_timestamp()")
        return two.target.admin("SELECT key FROM tbl_repl.tombstone") == []

    wait_until(purged)
    assert two.source.one("SELECT tbl_repl.replay()") == 0
    assert two.source.admin("SELECT key FROM tbl_repl.tombstone") == []


def test_a_node_that_was_cut_off_for_too_long_is_refused(two: Pair) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'a')")
    two.source.admin("UPDATE tbl_repl.change SET captured_at = captured_at - interval '31 days'")
    two.source.fresh("CALL tbl_repl.drain()")
    assert content(two.target) == []
    status, error = two.source.sql("SELECT status, last_error FROM tbl_repl.target_status")[0]
    assert status == "failed" and "cut off" in error
    assert two.source.one("SELECT hint FROM tbl_repl.error_log").startswith("What is queued")


def test_check_reports_what_keeps_conflicts_from_being_settled(two: Pair) -> None:
    two.add_target("t", mode="async", on_conflict="newest", version_column="at")
    codes = two.source.sql("SELECT severity, code FROM tbl_repl.check() WHERE code <> 'dblink_public'")
    assert codes == [("warning", "newest_one_way")]
    two.target.admin("SELECT tbl_repl.set_node_name('renamed')")
    codes = two.source.sql("SELECT code FROM tbl_repl.check() WHERE code <> 'dblink_public'")
    assert ("node_renamed",) in codes


@pytest.mark.parametrize("leaves_alone", [False, True])
def test_check_reports_triggers_that_change_the_version_of_rows_that_arrive(
    two: Pair, leaves_alone: bool
) -> None:
    condition = "WHEN (coalesce(current_setting('tbl_repl.origin', true), '') = '')" if leaves_alone else ""
    two.both(
        f"""
        CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN NEW.at := clock_timestamp(); RETURN NEW; END $$;
        CREATE FUNCTION shorten() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN NEW.v := rtrim(NEW.v); RETURN NEW; END $$;
        CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON t FOR EACH ROW {condition} EXECUTE FUNCTION touch();
        CREATE TRIGGER shorten BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION shorten()
        """
    )
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'a'), (2, 'a')")
    drain_all(two.source, two.target)
    two.target.sql("UPDATE t SET v = 'b' WHERE id = 2")
    drain_all(two.source, two.target)
    assert (content(two.source) == content(two.target)) == leaves_alone
    found = two.source.sql("SELECT code, message FROM tbl_repl.check() WHERE code <> 'dblink_public'")
    message = "trigger touch of table public.t on the target sets the version of rows that arrive, too"
    assert found == ([] if leaves_alone else [("version_changed", message)])


def test_check_reports_nothing_between_two_newest_nodes(two: Pair) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    for node in (two.source, two.target):
        assert node.sql("SELECT code FROM tbl_repl.check() WHERE code <> 'dblink_public'") == []


def test_a_background_copy_is_settled_too(two: Pair) -> None:
    two.source.sql("INSERT INTO t (id, v, at) SELECT g, 'ours', '2020-01-01' FROM generate_series(1, 20) g")
    two.target.sql("INSERT INTO t (id, v, at) VALUES (3, 'newer', '2021-01-01'), (4, 'older', '2019-01-01')")
    two.add_target("t", mode="async", on_conflict="newest", version_column="at", initial_copy="background")
    two.drain()
    found = {row[0]: row[1] for row in content(two.target)}
    assert len(found) == 20
    assert found[3] == "newer" and found[4] == "ours"


def test_a_copy_in_pieces_is_refused_for_conflict_policies(two: Pair) -> None:
    target = two.add_target("t", mode="async", on_conflict="keep")
    with pytest.raises(errors.FeatureNotSupported) as caught:
        two.begin_copy(target, 1000)
    assert "resync_target" in str(caught.value.diag.message_hint)


@pytest.mark.parametrize("first", ["source", "target"])
def test_newest_settles_rows_without_a_version(pair: Pair, first: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text, at bigint)")
    pair.join(pair.target, pair.source, "there")
    both_ways(pair, mode="async", on_conflict="newest", version_column="at")
    pair.source.sql("INSERT INTO t VALUES (1, 'greater')")
    pair.target.sql("INSERT INTO t VALUES (1, 'a')")
    drain_all(*((pair.source, pair.target) if first == "source" else (pair.target, pair.source)))
    assert content(pair.source) == content(pair.target) == [(1, "greater", None)]


OLD, NEW = "2026-01-01 00:00:00+00", "2026-01-02 00:00:00+00"


def settle(conn: psycopg.Connection, ids: range, version: str, *, gone: bool) -> None:
    """What another node sends for these keys under newest."""
    items = [
        {
            "k": [str(n)],
            "r": None if gone else [str(n), "x", version],
            "t": None if gone else f"'{version}','{n}','x'",
            "v": version,
        }
        for n in ids
    ]
    conn.execute(
        "SELECT tbl_repl._settle('public.t', 'newest', '{id,v,at}', '{id}', 'at', %s)", [json.dumps(items)]
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("deletion_first", [False, True])
def test_newest_a_row_and_its_deletion_that_arrive_at_once_end_as_deleted(
    two: Pair, deletion_first: bool, count: int
) -> None:
    two.add_target("t", mode="async", on_conflict="newest", version_column="at")
    ids = range(1, count + 1)
    one, other = two.source.connect(), two.source.connect()
    for conn, origin in ((one, "x"), (other, "y")):
        conn.execute(f"SET tbl_repl.origin = '{origin}'")
        conn.execute("BEGIN")
    settle(one, ids, NEW if deletion_first else OLD, gone=deletion_first)
    second = in_background(
        lambda: settle(other, ids, OLD if deletion_first else NEW, gone=not deletion_first)
    )
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
    wait_until(lambda: second.done() or two.source.admin(waiting, [other.info.backend_pid]) == [(1,)])
    one.execute("COMMIT")
    second.result(10)
    other.execute("COMMIT")
    assert content(two.source) == []
    assert two.source.admin("SELECT DISTINCT version FROM tbl_repl.tombstone") == [(NEW,)]


def test_a_tombstone_is_found_by_its_whole_key(two: Pair) -> None:
    conn = two.target.connect()
    conn.execute("BEGIN")
    conn.execute(
        "INSERT INTO tbl_repl.tombstone SELECT 't'::regclass, g::text, %s FROM generate_series(1, 1000) AS g",
        [OLD],
    )
    settle(conn, range(2000, 2001), NEW, gone=True)
    read = conn.execute("SELECT pg_stat_get_xact_tuples_returned('tbl_repl.tombstone_pkey'::regclass)")
    assert read.fetchone()[0] < 100  # type: ignore[index]


def test_many_values_are_settled_at_once_and_by_no_operator_of_others(two: Pair) -> None:
    two.add_target("t", mode="async", on_conflict="newest", version_column="at")
    two.target.admin("GRANT CREATE ON SCHEMA public TO writer")
    two.target.sql(
        """
        CREATE TABLE trap (who name DEFAULT current_user);
        GRANT INSERT ON trap TO PUBLIC;
        CREATE FUNCTION spring(regclass, oid) RETURNS boolean LANGUAGE sql AS 'INSERT INTO public.trap DEFAULT VALUES; SELECT $1::oid OPERATOR(pg_catalog.=) $2';
        CREATE OPERATOR = (LEFTARG = regclass, RIGHTARG = oid, FUNCTION = spring);
        CREATE FUNCTION spring(jsonb, jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $1';
        CREATE OPERATOR -> (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = spring);
        CREATE FUNCTION spring_text(jsonb, jsonb) RETURNS text LANGUAGE sql AS $$SELECT 'x'$$;
        CREATE OPERATOR ->> (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = spring_text)
        """,
        user="writer",
    )
    # a deletion is known: the look for it is what the trap waits for
    two.target.admin("INSERT INTO tbl_repl.tombstone SELECT 't'::regclass, '1', '2999-01-01 00:00:00+00'")
    two.source.sql("INSERT INTO t (id, v) VALUES (1, 'a'), (2, 'a'), (3, 'a'), (4, 'a')")
    two.drain()
    two.source.sql("DELETE FROM t WHERE id IN (2, 3)")
    two.drain()
    assert [row[0] for row in content(two.target)] == [4]
    assert two.target.sql("SELECT who FROM trap", user="writer") == []
    assert "ERROR" not in two.target.log()


def test_keep_finds_what_was_known_of_a_row_also_in_a_long_list(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target = pair.add_target("t", mode="async", on_conflict="keep")
    pair.source.sql("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100000) AS g")
    with within(1):
        known = pair.source.admin(
            "SELECT count(*) FROM tbl_repl._expected(%s, ARRAY(SELECT g::text FROM generate_series(99001, 100000) AS g))"
            " WHERE digests = '{\"\"}'",
            [target],
        )
    assert known == [(1000,)]


def test_a_long_backlog_is_not_searched_for_conflicts(two: Pair) -> None:
    both_ways(two, mode="async")
    two.target.sql("INSERT INTO t (id, v) SELECT g, 'a' FROM generate_series(1, 50) AS g")
    two.target.admin("UPDATE tbl_repl.change SET row_count = 100001")
    here = two.target.admin("SELECT * FROM tbl_repl._changed_here('t', '{1}', %s)", [node_name(two.source)])
    assert here == []
    two.target.admin("UPDATE tbl_repl.change SET row_count = 50")
    here = two.target.admin("SELECT * FROM tbl_repl._changed_here('t', '{1}', %s)", [node_name(two.source)])
    assert here == [("1", "I")]


def node_name(node: Node) -> str:
    return str(node.one("SELECT tbl_repl.node_name()"))


@pytest.mark.parametrize("name", ["{keys}", "{op}", "{gone}", "a\nb", "100%s"])
def test_newest_with_names_that_look_like_something_else(pair: Pair, name: str) -> None:
    pair.both(
        f'CREATE TABLE "{name}" ("{name}" integer PRIMARY KEY, v text, at timestamptz DEFAULT clock_timestamp())'
    )
    pair.add_target(f'"{name}"', mode="async", on_conflict="newest", version_column="at")
    for statement in (
        "INSERT INTO \"{0}\" VALUES (1, 'a'), (2, 'a'), (3, 'a')",
        'UPDATE "{0}" SET "{0}" = 20, at = clock_timestamp() WHERE "{0}" = 2',
        'DELETE FROM "{0}" WHERE "{0}" = 1',
        'TRUNCATE "{0}"',
        "INSERT INTO \"{0}\" VALUES (3, 'b')",
    ):
        pair.source.sql(statement.replace("{0}", name))
        pair.drain()
        pair.assert_same(f'"{name}"')


@pytest.mark.parametrize("policy", ["keep", "overwrite"])
def test_conflicts_are_forgotten_after_a_while(two: Pair, policy: str) -> None:
    both_ways(two, mode="async", on_conflict=policy)
    for n in (1, 2):
        two.source.sql("INSERT INTO t VALUES (%s, 'ours', '2020-01-01')", [n])
        two.target.sql("INSERT INTO t VALUES (%s, 'theirs', '2020-01-01')", [n])
        two.drain()
        assert conflicts(two.target)[-1][1] == {"id": n}  # type: ignore[index]
        assert len(conflicts(two.target)) == 1
        two.target.admin("UPDATE tbl_repl.conflict SET at = at - interval '31 days'")


@pytest.mark.parametrize(
    ("here", "there", "value"),
    [
        ("numeric(10,3)", "numeric(10,2)", "1.234"),
        ("timestamp(6)", "timestamp(3)", "'2026-01-02 03:04:05.678901'"),
    ],
)
def test_a_value_that_the_other_side_rounds_is_not_sent_to_and_fro(
    pair: Pair, here: str, there: str, value: str
) -> None:
    """Sent once more (a lost answer, an update that changes nothing) it is refused by nobody."""
    source, target = pair.source, pair.target
    source.sql(f"CREATE TABLE t (id integer PRIMARY KEY, v {here}, at bigint NOT NULL)")
    target.sql(f"CREATE TABLE t (id integer PRIMARY KEY, v {there}, at bigint NOT NULL)")
    pair.join(target, source, "back")
    options = {"mode": "async", "on_conflict": "newest", "version_column": "at"}
    pair.add_target("t", **options)
    pair.call("add_target", node=target, source_table="t", server="back", initial_copy="none", **options)
    source.sql(f"INSERT INTO t VALUES (1, {value}, 1)")
    for _ in range(3):
        for node in (source, target):
            node.fresh("CALL tbl_repl.drain()")
        source.sql("UPDATE t SET v = v")
    seen = []
    for _ in range(4):
        for node in (source, target):
            node.fresh("CALL tbl_repl.drain()")
        seen.append([node.one("SELECT count(*) FROM tbl_repl.conflict_log") for node in (source, target)])
    assert seen[-1] == seen[0]
    for node in (source, target):
        assert node.one("SELECT sum(pending_rows) FROM tbl_repl.target_status") == 0


def test_the_version_may_be_of_a_smaller_type_on_the_other_side(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v text, at bigint)")
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text, at integer)")
    pair.add_target("t", mode="async", on_conflict="newest", version_column="at")
    pair.source.sql("INSERT INTO t VALUES (1, 'a', NULL), (2, 'b', 1), (3, 'c', 1)")
    pair.source.fresh("CALL tbl_repl.drain()")
    pair.source.sql("UPDATE t SET v = v || '!', at = 2 WHERE id < 3; DELETE FROM t WHERE id = 3")
    pair.source.fresh("CALL tbl_repl.drain()")
    pair.assert_same("t")


def test_newest_a_row_beside_a_greater_tombstone_is_dead(two: Pair) -> None:
    """Written while its deletion was on its way; else the two nodes would refuse each other's values for ever."""
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t VALUES (1, 'dead', '2020-01-10')")
    drain_all(two.source, two.target)
    for node in (two.source, two.target):
        node.admin("INSERT INTO tbl_repl.tombstone SELECT 't'::regclass, '1', '2020-01-15 00:00:00+00'")
    two.target.sql("UPDATE t SET v = 'older than the tombstone', at = '2020-01-12'")
    two.source.admin(
        "INSERT INTO tbl_repl.tombstone SELECT 't'::regclass, '1', '2020-01-15 00:00:00+00' ON CONFLICT DO NOTHING"
    )
    drain_all(two.source, two.target)
    assert content(two.source) == content(two.target) == []


def test_targets_that_are_added_anew_remember_no_deletion(two: Pair) -> None:
    first = both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t VALUES (1, 'old', '2020-01-01')")
    drain_all(two.source, two.target)
    two.source.sql("DELETE FROM t")
    drain_all(two.source, two.target)
    assert two.target.admin("SELECT key FROM tbl_repl.tombstone") == [("1",)]
    for node, target in zip((two.source, two.target), first, strict=True):
        node.sql(f"SELECT tbl_repl.drop_target({target})")
        assert node.admin("SELECT key FROM tbl_repl.tombstone") == []
    two.source.sql("INSERT INTO t VALUES (1, 'again', '2020-01-02')")
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    drain_all(two.source, two.target)
    assert content(two.source) == content(two.target) != []


@pytest.mark.parametrize("copy", ["now", "background"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_node_that_joins_is_told_what_was_deleted_meanwhile(two: Pair, mode: str, copy: str) -> None:
    """It has got the row from another node, whose deletion of it came before this target was there."""
    two.source.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    two.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    two.source.sql("INSERT INTO u VALUES (1, 'x', '2020-01-01'), (2, 'x', '2020-01-01')")
    elsewhere = two.add_target("u", dst_table="t", mode="async", on_conflict="newest", version_column="at")
    two.source.sql("DELETE FROM u WHERE id = 1")
    two.drain()
    two.target.sql(
        "SET tbl_repl.origin = 'elsewhere'; INSERT INTO u VALUES (1, 'x', '2020-01-01'); RESET tbl_repl.origin"
    )
    two.add_target("u", mode=mode, on_conflict="newest", version_column="at", initial_copy=copy)
    two.drain()
    assert [row[0] for row in two.target.sql("SELECT id FROM u")] == [2]
    assert elsewhere


def test_a_restored_table_finds_its_tombstones(two: Pair) -> None:
    """Nothing generated names it by its number."""
    two.add_target("t", mode="async", on_conflict="newest", version_column="at")
    bodies = two.source.admin(
        "SELECT prosrc FROM pg_proc WHERE pronamespace = 'tbl_repl'::regnamespace AND proname ~ '_1$'"
    )
    oid = two.source.one("SELECT 't'::regclass::oid::text")
    assert len(bodies) > 3
    assert not any(f"'{oid}'" in body for (body,) in bodies)


def test_who_inserts_a_deleted_row_again_does_not_deadlock_with_one_that_arrives(two: Pair) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t VALUES (1, 'x', '2020-01-01')")
    drain_all(two.source, two.target)
    two.source.sql("DELETE FROM t")
    drain_all(two.source, two.target)
    two.target.sql(
        "CREATE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN PERFORM pg_advisory_xact_lock(77); RETURN NULL; END$$;"
        'CREATE TRIGGER "A_held" AFTER INSERT ON t EXECUTE FUNCTION held()'
    )
    two.source.sql("INSERT INTO t VALUES (1, 'arrives', '2999-01-01')")
    with two.target.connect() as gate, two.target.connect() as writer, two.source.connect() as drainer:
        gate.execute("SELECT pg_advisory_lock(77)")
        writing = start(writer, "INSERT INTO t VALUES (1, 'here', '2999-01-02')")
        waits = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        wait_until(lambda: two.target.admin(waits, [writer.info.backend_pid]))
        shipping = start(drainer, "SELECT tbl_repl.replay()")
        wait_until(
            lambda: two.target.admin(
                "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'tbl_repl%%' AND wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
        )
        gate.execute("SELECT pg_advisory_unlock(77)")
        writing.result(10)
        shipping.result(10)
    drain_all(two.source, two.target)
    assert [row[1] for row in content(two.source)] == [row[1] for row in content(two.target)] == ["here"]
    assert two.source.sql("SELECT sqlstate FROM tbl_repl.error_log") == []


@pytest.mark.once
def test_newest_a_table_that_takes_the_name_is_not_asked_what_was_deleted(two: Pair) -> None:
    both_ways(two, mode="async", on_conflict="newest", version_column="at")
    two.source.sql("INSERT INTO t VALUES (1, 'x', '2020-01-01')")
    drain_all(two.source, two.target)
    two.source.sql(
        "ALTER TABLE t RENAME TO t_old; CREATE TABLE t (LIKE t_old INCLUDING ALL); INSERT INTO t SELECT * FROM t_old"
    )
    with pytest.raises(errors.UndefinedTable, match="another table"):
        two.source.fresh("DELETE FROM t_old")
    two.source.sql("SELECT tbl_repl.alter_target(target_id) FROM tbl_repl.target")
    two.source.sql("DELETE FROM t_old")
    drain_all(two.source, two.target)
    assert two.target.rows("t") == []
