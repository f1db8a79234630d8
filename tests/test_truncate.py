"""TRUNCATE: the one change that is not state."""

from __future__ import annotations

import psycopg
import pytest

from support import Pair
from support.programs import dsn_of
from support.tables import (
    MODES,
    assert_shipped_directly,
    async_table,
    quarantined,
    replay,
    replicate,
    transaction,
)
from tbl_repl import bulk, database

NO_TRUNCATE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
CREATE TRIGGER refuse BEFORE TRUNCATE ON t FOR EACH STATEMENT EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize("mode", MODES)
def test_truncate_and_inserts_in_one_transaction(pair: Pair, mode: str) -> None:
    replicate(pair, mode=mode)
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 20) g")
    pair.target.sql("INSERT INTO t VALUES (99, 'extra')")
    pair.source.sql(
        "INSERT INTO t VALUES (30, 'gone'); TRUNCATE t; INSERT INTO t VALUES (1, 'y'), (2, 'y'); DELETE FROM t WHERE id = 2"
    )
    assert pair.target.rows("t") == ["(1,y)"]
    conn = pair.source.connect()
    conn.execute("BEGIN; TRUNCATE t; ROLLBACK")
    assert pair.target.rows("t") == ["(1,y)"]
    assert_shipped_directly(pair)


@pytest.mark.parametrize("mode", MODES)
def test_tables_linked_by_foreign_keys_are_truncated_together(pair: Pair, mode: str) -> None:
    replicate(pair, "parent", "id integer PRIMARY KEY", mode=mode)
    replicate(pair, "child", "id integer PRIMARY KEY, p integer REFERENCES parent", mode=mode)
    pair.source.sql("INSERT INTO parent VALUES (1); INSERT INTO child VALUES (1, 1)")
    pair.source.sql("TRUNCATE parent, child; INSERT INTO parent VALUES (2)")
    assert pair.target.rows("parent") == ["(2)"]
    assert pair.target.rows("child") == []
    pair.source.sql("INSERT INTO child VALUES (1, 2); TRUNCATE parent CASCADE")
    assert pair.target.rows("parent") == pair.target.rows("child") == []
    assert_shipped_directly(pair)


def test_an_insert_that_overtakes_a_queued_truncate_survives(pair: Pair) -> None:
    target = replicate(pair, mode="tolerant")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    # The TRUNCATE is queued by a prepared transaction, the status stays ok: the insert is shipped at once.
    pair.source.sql("BEGIN; TRUNCATE t; PREPARE TRANSACTION 'truncate'")
    pair.source.sql("COMMIT PREPARED 'truncate'")
    pair.source.sql("INSERT INTO t VALUES (2, 'overtakes')")
    assert "(2,overtakes)" in pair.target.rows("t")
    pair.drain()
    assert pair.target.rows("t") == ["(2,overtakes)"]
    assert pair.status(target) == "ok"


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_truncate_that_the_target_refuses_fails_that_target_only(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    refusing, other = pair.add_target("t", mode=mode), pair.add_target("u", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1), (2); INSERT INTO u VALUES (1)")
    pair.drain()
    pair.target.sql(NO_TRUNCATE)
    pair.source.sql("TRUNCATE t, u; INSERT INTO t VALUES (3); INSERT INTO u VALUES (2)")
    pair.drain()
    pair.assert_same("u")
    assert (pair.status(refusing), pair.status(other)) == ("failed", "ok")
    last = pair.source.one("SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [refusing])
    assert last == "P0001: TRUNCATE: not this one"
    pair.target.sql("DROP TRIGGER refuse ON t")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(refusing) == "ok"


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_after_a_truncate_rows_that_others_refer_to_stay_and_are_told_of(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    target, _ = pair.add_target("t", mode=mode), pair.add_target("u", mode="async")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 2500)")
    pair.drain()
    pair.target.sql("CREATE TABLE ref (id integer REFERENCES t); INSERT INTO ref VALUES (2), (2400)")
    pair.source.sql("TRUNCATE t; INSERT INTO t VALUES (3), (2501); INSERT INTO u VALUES (1)")
    pair.drain()
    pair.assert_same("u")
    assert pair.target.rows("t") == ["(2)", "(2400)", "(2501)", "(3)"]
    assert pair.source.sql("SELECT key, sqlstate FROM tbl_repl.quarantine ORDER BY key") == [
        ({"id": 2}, "23503"),
        ({"id": 2400}, "23503"),
    ]
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)
    pair.target.sql("DROP TABLE ref")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
def test_after_a_truncate_rows_that_go_slowly_go(pair: Pair) -> None:
    """All together they take longer than the target lets a statement; each by itself does not."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    target = pair.add_target("t", mode="async", timeout="500 ms")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 40)")
    pair.drain()
    pair.target.sql(
        "CREATE TABLE ref (id integer REFERENCES t); INSERT INTO ref VALUES (2);"
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.02); RETURN OLD; END$$;"
        "CREATE TRIGGER slow BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    shipped = pair.source.one("SELECT rows_shipped FROM tbl_repl.target_status")
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == ["(2)"]
    assert [key for key, *_ in quarantined(pair)] == [{"id": 2}]
    assert (pair.status(target), pair.pending(target)) == ("ok", 0)
    assert pair.source.one("SELECT rows_shipped FROM tbl_repl.target_status") == shipped + 39


@pytest.mark.once
@pytest.mark.parametrize(
    "parent, child", [("tolerant", "tolerant"), ("tolerant", "async"), ("async", "tolerant")]
)
@pytest.mark.parametrize("key", ["integer", "numeric"])
def test_a_truncate_of_parents_whose_children_are_ahead(
    pair: Pair, parent: str, child: str, key: str
) -> None:
    """Rows that belong there refer to rows that belong there: neither go for the TRUNCATE that is still queued."""
    pair.source.sql(
        "CREATE TABLE p (id integer PRIMARY KEY, v text); CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p)"
    )
    pair.target.sql(
        f"CREATE TABLE p (id {key} PRIMARY KEY, v text CHECK (v <> 'bad')); CREATE TABLE c (id integer PRIMARY KEY, p {key} REFERENCES p);"
        # what the target's own triggers look up by their search_path
        "CREATE TABLE seen (id integer); CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN INSERT INTO seen VALUES (1); RETURN NULL; END $$;"
        " CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON p FOR EACH ROW EXECUTE FUNCTION see()"
    )
    targets = [pair.add_target("p", mode=parent), pair.add_target("c", mode=child)]
    pair.source.sql("INSERT INTO p VALUES (1, 'a'), (2, 'b')")
    pair.drain()
    pair.source.sql("INSERT INTO p VALUES (3, 'bad')")
    pair.source.sql("TRUNCATE p CASCADE")
    pair.source.sql("INSERT INTO p VALUES (1, 'new')")
    pair.source.sql("INSERT INTO c VALUES (10, 1)")
    pair.drain()
    pair.assert_same("p")
    pair.assert_same("c")
    assert [pair.status(target) for target in targets] == ["ok", "ok"]
    assert quarantined(pair) == []


def test_truncate_of_a_table_that_is_gone_fails_the_target(pair: Pair) -> None:
    target_id = async_table(pair)
    pair.target.sql("DROP TABLE t")
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.status(target_id) == "failed"
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.drain()
    assert pair.status(target_id) == "ok"


def test_a_truncate_finds_references_that_only_the_target_has(pair: Pair) -> None:
    """TRUNCATE is refused there, deleting is not."""
    target_id = async_table(pair)
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    pair.drain()
    pair.target.sql("CREATE TABLE more (t_id integer REFERENCES t)")
    pair.source.sql("TRUNCATE t")
    pair.source.sql("INSERT INTO t VALUES (3, 'z')")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_an_insert_is_not_lost_to_a_truncate_that_was_queued_before(pair: Pair) -> None:
    """TRUNCATE and insert in two batches, and in one."""
    async_table(pair)
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1500) g")
    pair.drain()
    pair.source.sql("TRUNCATE t")
    pair.source.sql("INSERT INTO t SELECT g, 'y' FROM generate_series(1000, 2500) g")
    assert replay(pair, max_rows=1) == 1
    pair.assert_same("t")
    pair.drain()
    pair.assert_same("t")


def test_truncate_of_a_filtered_source_deletes_only_what_came_from_it(pair: Pair) -> None:
    async_table(pair, row_filter="id < 100")
    pair.target.sql("INSERT INTO t VALUES (500, 'theirs')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (200, 'not sent')")
    pair.drain()
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == ["(500,theirs)"]


def test_truncate_of_one_of_two_sources_leaves_the_rows_of_the_other(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY, v text)"
    )
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t VALUES (1, 'of t')")
    pair.drain()
    pair.add_target("u", dst_table="t", mode="async")
    pair.source.sql("INSERT INTO u VALUES (2, 'of u')")
    pair.drain()
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == ['(2,"of u")']
    pair.source.sql("TRUNCATE u")
    pair.drain()
    assert pair.target.rows("t") == []


@pytest.mark.once
@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("change", ["filter", "second source", "moved there"])
def test_a_queued_truncate_is_not_lost_to_a_filter_or_a_second_source(
    pair: Pair, mode: str, change: str
) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("CREATE TABLE b (id integer PRIMARY KEY, v text); INSERT INTO b VALUES (100, 'b')")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 5) g")
    target_id = pair.add_target("t", mode=mode)
    pair.target.sql("CREATE TABLE elsewhere (id integer PRIMARY KEY, v text)")
    if change == "moved there":
        other = pair.add_target("b", dst_table="elsewhere", mode="async")
    pair.drain()
    pair.call("pause_target", target_id=target_id)
    pair.source.sql("TRUNCATE t; INSERT INTO t VALUES (7, 'x')")

    def alter() -> None:
        if change == "filter":
            pair.call("alter_target", target_id=target_id, row_filter="id < 50")
        elif change == "second source":
            pair.add_target("b", dst_table="t", mode="async", initial_copy="background")
        else:
            pair.call("alter_target", target_id=other, dst_table="t")
            pair.call("resync_target", target_id=other)

    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
        alter()
    assert "drain" in str(caught.value.diag.message_hint)
    pair.call("resume_target", target_id=target_id)
    pair.drain()
    alter()
    pair.source.sql("INSERT INTO t VALUES (8, 'x')")
    pair.drain()
    pair.source.sql("TRUNCATE t")  # from now on with its keys
    alter_again = {"filter": "id < 60"}.get(change)
    if alter_again:
        pair.call("alter_target", target_id=target_id, row_filter=alter_again)
    pair.drain()
    assert pair.target.rows("t") == ([] if change == "filter" else ["(100,b)"])


def test_a_truncate_of_the_same_transaction_is_not_lost_to_a_filter(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    target_id = pair.add_target("t")
    pair.source.sql("INSERT INTO t VALUES (1)")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState), transaction(pair.source) as conn:
        conn.execute("TRUNCATE t")
        conn.execute("SELECT tbl_repl.alter_target(%s, row_filter => 'id < 50')", [target_id])
    pair.assert_same("t")


def test_truncate_of_a_leaf_leaves_the_other_partitions(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);"
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (100) TO (200)"
    )
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(50, 150) g")
    pair.drain()
    pair.source.sql("TRUNCATE t1")
    pair.drain()
    pair.assert_same("t")
    assert pair.target.one("SELECT count(*) FROM t") == 51
    pair.source.sql("TRUNCATE t")
    pair.source.sql("INSERT INTO t VALUES (1, 'after')")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.once
def test_a_tree_in_one_table_is_filled_and_cleared(pair: Pair) -> None:
    """More rows than one message takes, parents with greater keys than their children."""
    async_table(pair, "id integer PRIMARY KEY, up integer REFERENCES t")
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE WHEN g < 1500 THEN g + 1 END FROM generate_series(1500, 1, -1) g"
    )
    pair.drain()
    pair.assert_same("t")
    pair.source.sql("DELETE FROM t WHERE id < 1200")
    pair.source.sql("UPDATE t SET up = 1500 WHERE id < 1499; DELETE FROM t WHERE id = 1499")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("modes", [("tolerant", "tolerant"), ("async", "sync")], ids="/".join)
def test_a_truncate_of_a_parent_leaves_children_that_are_ahead(pair: Pair, modes: tuple[str, str]) -> None:
    """They have been shipped already, and would go with the parents' rows."""
    pair.both("CREATE TABLE p (id integer PRIMARY KEY, v integer)")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p ON DELETE CASCADE)")
    parents, _ = (pair.add_target(table, mode=mode) for table, mode in zip("pc", modes, strict=True))
    pair.source.sql("INSERT INTO p VALUES (1, 1), (2, 2)")
    pair.drain()
    pair.source.sql("INSERT INTO c VALUES (10, 1), (20, 2)")
    pair.target.sql("ALTER TABLE p ADD CHECK (v < 100)")
    pair.source.sql("UPDATE p SET v = 500 WHERE id = 1")
    pair.source.sql("TRUNCATE p CASCADE")
    pair.source.sql("INSERT INTO p VALUES (1, 11), (2, 12)")
    pair.source.sql("INSERT INTO c VALUES (10, 1), (20, 2)")
    pair.drain()
    pair.assert_same("p")
    pair.assert_same("c")
    assert (pair.status(parents), pair.target.one("SELECT count(*) FROM c")) == ("ok", 2)


@pytest.mark.once
def test_without_the_right_to_truncate_a_partitioned_child_goes_with_its_parent(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE p (id integer PRIMARY KEY);"
        "CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p ON DELETE CASCADE) PARTITION BY RANGE (id);"
        "CREATE TABLE c1 PARTITION OF c FOR VALUES FROM (0) TO (100)"
    )
    for table in "pc":
        pair.add_target(table, mode="sync")
    pair.source.sql("INSERT INTO p VALUES (1), (2); INSERT INTO c VALUES (1, 1)")
    pair.target.admin(
        "ALTER TABLE p OWNER TO postgres; ALTER TABLE c OWNER TO postgres; ALTER TABLE c1 OWNER TO postgres;"
        "GRANT SELECT, INSERT, UPDATE, DELETE, REFERENCES ON p, c, c1 TO owner"
    )
    pair.source.sql(
        "BEGIN; TRUNCATE p CASCADE; INSERT INTO p VALUES (2); INSERT INTO c VALUES (9, 2); COMMIT"
    )
    pair.assert_same("p")
    pair.assert_same("c")
    assert_shipped_directly(pair)


@pytest.mark.once
def test_a_reference_that_is_checked_late_holds_up_no_other_table(pair: Pair) -> None:
    """Rows that only the target has refer to one that a TRUNCATE takes away."""
    pair.both("CREATE TABLE p (id integer PRIMARY KEY, v integer); CREATE TABLE b (id integer PRIMARY KEY)")
    for table in "pb":
        pair.add_target(table, mode="async")
    pair.source.sql("INSERT INTO p VALUES (1, 1), (2, 2), (3, 3)")
    pair.drain()
    pair.target.sql(
        "CREATE TABLE r (id integer REFERENCES p DEFERRABLE INITIALLY DEFERRED); INSERT INTO r VALUES (1)"
    )
    pair.source.sql("TRUNCATE p")
    pair.source.sql("INSERT INTO p VALUES (2, 22); INSERT INTO b VALUES (1)")
    pair.drain()
    pair.assert_same("b")
    assert pair.target.rows("p") == ["(1,1)", "(2,22)"]
    assert [(key, code) for key, code, _ in quarantined(pair)] == [({"id": 1}, "23503")]


@pytest.mark.once
def test_a_truncate_of_a_partition_goes_by_copy_as_well(pair: Pair) -> None:
    pair.source.sql(
        "CREATE TABLE t (id integer PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (100); CREATE TABLE high PARTITION OF t DEFAULT"
    )
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.add_target("t", mode="async")
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 50)")
    pair.drain()
    pair.source.sql("TRUNCATE low")
    pair.source.sql("INSERT INTO t SELECT generate_series(200, 300)")
    with database.connect(dsn_of(pair.source), "worker") as connection:
        assert bulk.ship(connection, pair.server, 1) is not None
    pair.assert_same("t")
