"""Every kind of write arrives, with statement triggers and with row triggers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from support import Pair

PLAIN = "CREATE TABLE {} (id integer PRIMARY KEY, v text, n integer NOT NULL DEFAULT 0)"
# The second leaf has another column order and a dropped column.
PARTITIONED = """
    CREATE TABLE t (id integer PRIMARY KEY, v text, n integer NOT NULL DEFAULT 0) PARTITION BY RANGE (id);
    CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (MINVALUE) TO (100);
    CREATE TABLE t_high (n integer NOT NULL DEFAULT 0, gone text, id integer NOT NULL, v text);
    ALTER TABLE t_high DROP COLUMN gone;
    ALTER TABLE t ATTACH PARTITION t_high FOR VALUES FROM (100) TO (MAXVALUE);
"""
ROWS = "INSERT INTO t VALUES (1, 'a', 10), (2, 'b', 20), (3, 'c', 30), (150, 'd', 40), (160, 'e', 50)"


@dataclass
class Replicated:
    """Table t with a tolerant target t and an async target u."""

    pair: Pair
    direct: int
    queued: int

    def check(self) -> None:
        self.pair.assert_same("t")
        assert self.pair.pending(self.direct) == 0
        self.pair.drain()
        self.pair.assert_same("t", "u")
        assert self.pair.status(self.direct) == "ok"
        assert self.pair.source.one("SELECT count(*) FROM tbl_repl.stash") == 0


@pytest.fixture(params=["ordinary", "partitioned"])
def both(pair: Pair, request: pytest.FixtureRequest) -> Replicated:
    pair.source.sql(PLAIN.format("t") if request.param == "ordinary" else PARTITIONED)
    pair.source.sql(ROWS)
    pair.target.sql(PLAIN.format("t") + ";" + PLAIN.format("u"))
    return Replicated(pair, pair.add_target("t"), pair.add_target("t", dst_table="u", mode="async"))


WRITES = {
    "insert": "INSERT INTO t VALUES (4, 'x'), (170, 'y')",
    "insert_select": "INSERT INTO t SELECT i, 'x' || i FROM generate_series(50, 130) i",
    "update": "UPDATE t SET v = v || '!', n = n + 1",
    "update_to_null": "UPDATE t SET v = NULL WHERE id IN (1, 150)",
    "update_of_no_row": "UPDATE t SET v = 'x' WHERE false",
    "delete": "DELETE FROM t WHERE id IN (2, 160)",
    "delete_all": "DELETE FROM t",
    "delete_returning_insert": "WITH d AS (DELETE FROM t WHERE id < 3 RETURNING *) "
    "INSERT INTO t SELECT id + 500, v, n FROM d",
    "truncate": "TRUNCATE t",
    "truncate_and_insert": "TRUNCATE t; INSERT INTO t VALUES (1, 'new')",
    "insert_and_truncate": "INSERT INTO t VALUES (7, 'new'); TRUNCATE t",
    "key_change": "UPDATE t SET id = 40 WHERE id = 1",
    "key_change_and_back": "UPDATE t SET id = 40 WHERE id = 1; UPDATE t SET id = 1 WHERE id = 40",
    "key_taken_over": "DELETE FROM t WHERE id = 2; UPDATE t SET id = 2 WHERE id = 1",
    "insert_then_delete": "INSERT INTO t VALUES (9, 'x'); DELETE FROM t WHERE id = 9",
    "delete_then_insert": "DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (3, 'again')",
    "on_conflict_update": "INSERT INTO t VALUES (1, 'z'), (8, 'z') ON CONFLICT (id) DO UPDATE SET v = excluded.v",
    "on_conflict_nothing": "INSERT INTO t VALUES (1, 'z'), (8, 'z') ON CONFLICT DO NOTHING",
    "update_from": "UPDATE t SET v = o.v FROM t AS o WHERE o.id = t.id + 1",
    "delete_using": "DELETE FROM t USING t AS o WHERE o.id = t.id + 1",
    "chain_of_writing_ctes": "WITH i AS (INSERT INTO t VALUES (11, 'i') RETURNING id),"
    " u AS (UPDATE t SET v = 'u' WHERE id = 1 RETURNING id),"
    " d AS (DELETE FROM t WHERE id = 2 RETURNING id) SELECT * FROM i, u, d",
    "rolled_back_savepoint": "INSERT INTO t VALUES (12, 'stays'); SAVEPOINT a; UPDATE t SET v = 'lost';"
    " ROLLBACK TO a; INSERT INTO t VALUES (13, 'stays')",
    "exception_block": "DO $$BEGIN BEGIN UPDATE t SET v = 'lost'; RAISE 'x'; EXCEPTION WHEN OTHERS THEN"
    " INSERT INTO t VALUES (14, 'kept'); END; END$$",
    "prepared_statement": "PREPARE p AS UPDATE t SET v = $1 WHERE id = $2; EXECUTE p ('p', 1); EXECUTE p ('q', 150)",
    "set_role": "SET LOCAL search_path = ''; INSERT INTO public.t VALUES (15, 'x')",
}


@pytest.mark.once
@pytest.mark.parametrize("write", WRITES)
def test_write_arrives(both: Replicated, write: str) -> None:
    statements = WRITES[write]
    both.pair.source.sql(f"BEGIN; {statements}; COMMIT")
    both.check()


def test_write_of_every_kind_one_after_the_other_arrives(both: Replicated) -> None:
    for name, statements in WRITES.items():
        if name != "chain_of_writing_ctes":
            both.pair.source.sql(f"{ROWS} ON CONFLICT DO NOTHING")
            with contextlib.suppress(psycopg.errors.UniqueViolation):
                both.pair.source.fresh(f"BEGIN; {statements}; COMMIT")
    both.check()


@pytest.mark.parametrize(
    "change",
    [
        "id = 3 - id WHERE id < 3",  # swap
        "id = id + 1",  # shift
        "id = CASE id WHEN 1 THEN 2 WHEN 2 THEN 3 ELSE 1 END WHERE id <= 3",  # rotate
        "id = CASE id WHEN 1 THEN 150 ELSE 1 END WHERE id IN (1, 150)",  # swap between the leaves
    ],
)
def test_keys_that_change_places_arrive(pair: Pair, change: str) -> None:
    # Within one statement PostgreSQL allows that only where the key is deferrable.
    pair.source.sql(PLAIN.format("t").replace("PRIMARY KEY", "PRIMARY KEY DEFERRABLE"))
    pair.source.sql(ROWS)
    pair.target.sql(PLAIN.format("t") + ";" + PLAIN.format("u"))
    both = Replicated(pair, pair.add_target("t"), pair.add_target("t", dst_table="u", mode="async"))
    pair.source.sql(f"UPDATE t SET {change}")
    both.check()


def test_copy_arrives(both: Replicated) -> None:
    with both.pair.source.connect() as conn, conn.cursor().copy("COPY t (id, v) FROM STDIN") as copy:
        for i in range(1000, 3500):
            copy.write_row((i - 4000, f"row {i}"))
        copy.write_row((5000, 'tab\t and "quotes" \\N'))
    both.check()
    assert both.pair.target.one("SELECT count(*) FROM t") == 2506


def test_merge_arrives(both: Replicated) -> None:
    if both.pair.major < 15:
        pytest.skip("MERGE is new in 15")
    both.pair.source.sql(
        """
        MERGE INTO t USING (VALUES (1, 'm'), (2, 'm'), (3, 'm'), (200, 'm')) AS s (id, v) ON s.id = t.id
        WHEN MATCHED AND s.id = 1 THEN DELETE
        WHEN MATCHED AND s.id = 2 THEN DO NOTHING
        WHEN MATCHED THEN UPDATE SET v = s.v
        WHEN NOT MATCHED THEN INSERT (id, v) VALUES (s.id, s.v)
        """
    )
    both.check()
    assert both.pair.target.sql("SELECT id, v FROM t ORDER BY id")[:2] == [(2, "b"), (3, "m")]


def test_write_through_a_view_arrives(both: Replicated) -> None:
    source = both.pair.source
    source.sql("CREATE VIEW w AS SELECT id AS key, v AS value FROM t WHERE id < 1000 WITH CHECK OPTION")
    source.sql("INSERT INTO w VALUES (20, 'by view'); UPDATE w SET value = 'u' WHERE key = 1;"
               " DELETE FROM w WHERE key = 150")  # fmt: skip
    both.check()


def test_triggers_of_the_application_are_replicated(both: Replicated) -> None:
    """An AFTER trigger that updates the same row, a BEFORE trigger that changes it, one that writes others."""
    both.pair.source.sql(
        """
        CREATE FUNCTION after_row() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
            UPDATE t SET n = n + 1 WHERE id = NEW.id AND n < 1000;
            INSERT INTO t VALUES (NEW.id + 1000, 'made by a trigger') ON CONFLICT DO NOTHING;
            RETURN NULL; END$$;
        CREATE FUNCTION before_row() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
            NEW.v := upper(NEW.v); RETURN NEW; END$$;
        CREATE TRIGGER zz_after AFTER INSERT ON t FOR EACH ROW WHEN (NEW.id < 500) EXECUTE FUNCTION after_row();
        CREATE TRIGGER aa_before BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION before_row();
        """
    )
    both.pair.source.sql("INSERT INTO t VALUES (30, 'x'), (130, 'y')")
    both.check()
    assert both.pair.target.sql("SELECT id, v, n FROM t WHERE id IN (30, 1130) ORDER BY id") == [
        (30, "X", 1),
        (1130, "MADE BY A TRIGGER", 0),
    ]


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "SET DEFAULT"])
def test_foreign_key_actions_arrive(pair: Pair, action: str) -> None:
    pair.both(
        f"""
        CREATE TABLE parent (id integer PRIMARY KEY);
        CREATE TABLE child (id integer PRIMARY KEY, parent_id integer DEFAULT 0
            REFERENCES parent ON DELETE {action} ON UPDATE {action});
        """
    )
    pair.source.sql(
        "INSERT INTO parent SELECT generate_series(0, 5); INSERT INTO child SELECT i, i FROM generate_series(1, 5) i"
    )
    targets = [pair.add_target(table, mode=mode) for mode in ("tolerant",) for table in ("parent", "child")]
    pair.source.sql("DELETE FROM parent WHERE id IN (1, 2); UPDATE parent SET id = 40 WHERE id = 4")
    for table in ("parent", "child"):
        pair.assert_same(table)
    assert [pair.status(t) for t in targets] == ["ok", "ok"]


def test_the_application_sees_no_trace(both: Replicated) -> None:
    source = both.pair.source
    source.sql("CREATE SEQUENCE app; CREATE TABLE other (id serial, v text)")
    with source.connect() as conn:
        conn.execute("SET search_path = public, pg_catalog")
        conn.execute("SET datestyle = 'German'")
        conn.execute("INSERT INTO other (v) VALUES ('x')")
        found = conn.execute("INSERT INTO t SELECT i, 'x' FROM generate_series(90, 110) i RETURNING id")
        assert (found.rowcount, len(found.fetchall())) == (21, 21)
        assert conn.execute("UPDATE t SET v = 'y' WHERE id IN (90, 110, 999)").rowcount == 2
        assert conn.execute("DELETE FROM t WHERE id IN (91, 111)").rowcount == 1
        assert conn.execute("SELECT lastval()").fetchone() == (1,)
        assert conn.execute("SHOW search_path").fetchone() == ("public, pg_catalog",)
        assert conn.execute("SHOW datestyle").fetchone() == ("German, DMY",)
        conn.execute(
            "DO $$BEGIN UPDATE t SET v = 'z' WHERE id = 92; IF NOT FOUND THEN RAISE 'lost'; END IF;"
            " UPDATE t SET v = 'z' WHERE id = -92; IF FOUND THEN RAISE 'found'; END IF; END$$"
        )
    both.check()


# --- partitions


@pytest.fixture
def parts(pair: Pair) -> Replicated:
    pair.source.sql(PARTITIONED + ROWS)
    pair.target.sql(PLAIN.format("t") + ";" + PLAIN.format("u"))
    return Replicated(pair, pair.add_target("t"), pair.add_target("t", dst_table="u", mode="async"))


@pytest.mark.once
@pytest.mark.parametrize(
    "write",
    [
        "INSERT INTO t_low (id, v) VALUES (60, 'leaf')",
        "UPDATE t_high SET v = 'leaf', id = id + 1000",
        "DELETE FROM t_low WHERE id = 1",
        "TRUNCATE t_low",
        "TRUNCATE ONLY t_low, t_high",
        "TRUNCATE t_high; INSERT INTO t_high (id, v) VALUES (150, 'again')",
        "UPDATE t SET id = id + 100 WHERE id < 100",  # to the other leaf
        "UPDATE t SET id = 250 - id WHERE id IN (3, 150)",
    ],
)
def test_write_to_a_leaf_arrives(parts: Replicated, write: str) -> None:
    parts.pair.source.sql(write)
    parts.check()


def test_partition_added_later_is_replicated(parts: Replicated) -> None:
    source = parts.pair.source
    source.sql(
        "ALTER TABLE t DETACH PARTITION t_high; DELETE FROM t_high; DROP TABLE t_high;"
        " CREATE TABLE t_mid PARTITION OF t FOR VALUES FROM (100) TO (200);"
        " CREATE TABLE t_rest PARTITION OF t DEFAULT PARTITION BY LIST (id);"
        " CREATE TABLE t_rest_any PARTITION OF t_rest DEFAULT"
    )
    for target in (parts.direct, parts.queued):
        parts.pair.call("resync_target", target_id=target)
    parts.pair.target.sql("DELETE FROM t WHERE id >= 100; DELETE FROM u WHERE id >= 100")
    source.sql("INSERT INTO t VALUES (101, 'x', 1), (300, 'y', 1); INSERT INTO t_mid VALUES (102, 'x', 1)")
    source.sql("UPDATE t SET id = 103 WHERE id = 300")
    parts.pair.drain()
    parts.check()
    source.sql("TRUNCATE t")
    parts.check()
    assert parts.pair.target.one("SELECT count(*) FROM t") == 0


def test_truncate_of_a_filtered_root_reaches_partitions_added_later(pair: Pair) -> None:
    pair.source.sql(PARTITIONED + ROWS)
    pair.target.sql(PLAIN.format("t"))
    pair.add_target("t", row_filter="n > 10")
    pair.source.sql("ALTER TABLE t DETACH PARTITION t_low; DROP TABLE t_low;"
                    " CREATE TABLE t_new PARTITION OF t FOR VALUES FROM (MINVALUE) TO (100)")  # fmt: skip
    pair.target.sql("DELETE FROM t WHERE id < 100")
    pair.source.sql("INSERT INTO t VALUES (5, 'x', 60), (6, 'x', 1)")
    pair.assert_same("t", where="n > 10")
    pair.source.sql("TRUNCATE t")
    assert pair.target.rows("t") == []


def test_single_partition_as_source(pair: Pair) -> None:
    pair.source.sql(PARTITIONED + ROWS)
    pair.target.sql(PLAIN.format("t_low") + ";" + PLAIN.format("u"))
    pair.target.sql("INSERT INTO t_low VALUES (700, 'not of this source', 1); INSERT INTO u TABLE t_low")
    both = Replicated(pair, pair.add_target("t_low"), pair.add_target("t_low", dst_table="u", mode="async"))

    def check() -> None:
        pair.assert_same("t_low", "(SELECT * FROM t_low WHERE id <> 700) AS x")
        pair.drain()
        pair.assert_same("t_low", "(SELECT * FROM u WHERE id <> 700) AS x")
        assert pair.status(both.direct) == "ok"

    check()
    for write in (
        "INSERT INTO t VALUES (7, 'by root'), (107, 'other')",
        "INSERT INTO t_low VALUES (8, 'direct')",
        "UPDATE t SET id = id + 100 WHERE id = 1",
        "UPDATE t SET id = id - 100 WHERE id = 160",
        "TRUNCATE t_high",
        "TRUNCATE t_low",
        "INSERT INTO t VALUES (9, 'again')",
        "TRUNCATE t",
    ):
        pair.source.sql(write)
        check()
    assert pair.target.one("SELECT count(*) FROM t_low") == 1


def test_partitioned_target(pair: Pair) -> None:
    pair.source.sql(PLAIN.format("t") + ";" + ROWS)
    pair.target.sql(PARTITIONED)
    direct = pair.add_target("t")
    pair.source.sql("UPDATE t SET id = id + 100 WHERE id < 3; INSERT INTO t VALUES (7, 'x')")
    pair.assert_same("t", columns="id, v, n")
    pair.source.sql("DELETE FROM t WHERE id > 100; UPDATE t SET v = 'y'")
    pair.assert_same("t", columns="id, v, n")
    pair.source.sql("TRUNCATE t; INSERT INTO t VALUES (1, 'x'), (100, 'y')")
    pair.assert_same("t", columns="id, v, n")
    assert pair.status(direct) == "ok"


# --- filters, two targets, operations


def test_rows_enter_and_leave_the_filter(both: Replicated) -> None:
    pair = both.pair
    for table in ("f", "g"):
        pair.target.sql(PLAIN.format(table))
    direct = pair.add_target("t", dst_table="f", row_filter="n >= 30")
    pair.add_target("t", dst_table="g", row_filter="n >= 30", mode="async")

    def check() -> None:
        pair.assert_same("t", "f", where="n >= 30")
        pair.drain()
        pair.assert_same("t", "g", where="n >= 30")
        assert pair.status(direct) == "ok"

    check()
    for write in (
        "UPDATE t SET n = 70 - n",
        "UPDATE t SET n = 100, id = id + 1000 WHERE id = 1",
        "UPDATE t SET n = 0, id = 2000 WHERE id = 1001",
        "INSERT INTO t VALUES (50, 'in', 31), (51, 'out', 29)",
        "DELETE FROM t WHERE id IN (50, 51)",
        "TRUNCATE t",
        "INSERT INTO t VALUES (1, 'x', 30)",
    ):
        pair.source.sql(write)
        check()


@pytest.mark.parametrize("kind", ["ordinary", "partitioned"])
def test_filter_that_is_null_or_about_a_column_not_sent(pair: Pair, kind: str) -> None:
    pair.source.sql(PLAIN.format("t") if kind == "ordinary" else PARTITIONED)
    pair.source.sql(ROWS + "; INSERT INTO t VALUES (5, NULL, 1)")
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    pair.add_target("t", row_filter="v < 'c'", columns=["id", "n"])
    expected = "SELECT id, n FROM t WHERE v < 'c' ORDER BY id"

    def check() -> None:
        assert pair.target.sql("TABLE t ORDER BY id") == pair.source.sql(expected)

    check()
    for write in (
        "UPDATE t SET v = NULL WHERE id = 1",
        "UPDATE t SET v = 'a' WHERE id = 5",
        "UPDATE t SET v = 'd' WHERE id = 2",
        "INSERT INTO t VALUES (150 + 8, NULL, 1), (159, 'b', 1)",
    ):
        pair.source.sql(write)
        check()


def test_filter_that_fails_on_a_row_does_not_fail_the_write(both: Replicated) -> None:
    """Tolerant: queued and logged; the row is shipped when the filter can be computed."""
    pair = both.pair
    pair.target.sql(PLAIN.format("f"))
    pair.call("drop_target", target_id=both.queued)
    pair.call("drop_target", target_id=both.direct)
    target = pair.add_target("t", dst_table="f", row_filter="100 / n >= 2")
    pair.source.sql("INSERT INTO t VALUES (6, 'zero', 0), (7, 'fine', 1)")
    assert pair.status(target) == "queueing"
    assert pair.source.one("SELECT sqlstate FROM tbl_repl.error_log") == "22012"
    pair.drain()
    assert pair.target.one("SELECT v FROM f WHERE id = 7") == "fine"
    pair.source.sql("UPDATE t SET n = 2 WHERE id = 6")
    pair.drain()
    pair.assert_same("t", "f", where="100 / n >= 2")


def test_filter_that_fails_on_a_row_fails_the_write_of_a_sync_target(both: Replicated) -> None:
    pair = both.pair
    pair.target.sql(PLAIN.format("f"))
    pair.add_target("t", dst_table="f", row_filter="100 / n >= 2", mode="sync")
    with pytest.raises(psycopg.errors.DivisionByZero):
        pair.source.sql("INSERT INTO t VALUES (6, 'zero', 0)")
    both.check()


def test_two_targets_with_different_filters(pair: Pair) -> None:
    pair.source.sql(PLAIN.format("t") + ";" + ROWS)
    pair.target.sql(PLAIN.format("low") + ";" + PLAIN.format("high"))
    pair.add_target("t", dst_table="low", row_filter="n < 25")
    pair.add_target("t", dst_table="high", row_filter="n > 35", mode="async")
    for write in (
        "SELECT",
        "UPDATE t SET n = 60 - n",
        "UPDATE t SET n = n + 7",
        "UPDATE t SET id = 300 - id",
        "DELETE FROM t WHERE id % 2 = 0",
        "TRUNCATE t",
        "INSERT INTO t VALUES (1, 'low', 1), (2, 'none', 30), (3, 'high', 99)",
    ):
        pair.source.sql(write)
        pair.assert_same("t", "low", where="n < 25")
        pair.drain()
        pair.assert_same("t", "high", where="n > 35")


@pytest.mark.parametrize("kind", ["ordinary", "partitioned"])
def test_rows_that_no_target_wants_are_not_queued(pair: Pair, kind: str) -> None:
    pair.source.sql(PLAIN.format("t") if kind == "ordinary" else PARTITIONED)
    pair.target.sql(PLAIN.format("low") + ";" + PLAIN.format("high"))
    low = pair.add_target("t", dst_table="low", row_filter="n < 25", mode="async")
    pair.add_target("t", dst_table="high", row_filter="n > 35", mode="async")
    pair.source.sql("INSERT INTO t SELECT i, 'x', i FROM generate_series(20, 39) i")
    assert pair.pending(low) == 5 + 4
    assert {key["id"] for (key,) in pair.source.sql("SELECT key FROM tbl_repl.pending")} == {
        *range(20, 25),
        *range(36, 40),
    }
    pair.drain()
    pair.source.sql("UPDATE t SET v = 'y' WHERE n BETWEEN 25 AND 35")
    pair.source.sql("DELETE FROM t WHERE n BETWEEN 25 AND 35")
    assert pair.source.one("SELECT count(*) FROM tbl_repl.pending") == 0


@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("kind", ["ordinary", "partitioned"])
def test_archive_keeps_what_is_deleted(pair: Pair, kind: str, mode: str) -> None:
    pair.source.sql(PLAIN.format("t") if kind == "ordinary" else PARTITIONED)
    pair.source.sql(ROWS)
    pair.target.sql(PLAIN.format("t"))
    pair.add_target("t", mode=mode, operations=["insert", "update"])
    for write in (
        "UPDATE t SET v = 'last' WHERE id = 1",
        "DELETE FROM t WHERE id IN (1, 150)",
        "INSERT INTO t VALUES (9, 'new')",
        "INSERT INTO t VALUES (10, 'gone at commit'); DELETE FROM t WHERE id = 10",
    ):
        pair.source.sql(write)
        pair.drain()
    kept = [(1, "last"), (2, "b"), (3, "c"), (9, "new"), (150, "d"), (160, "e")]
    assert pair.target.sql("SELECT id, v FROM t ORDER BY id") == kept
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.sql("SELECT id, v FROM t ORDER BY id") == kept
    assert pair.source.one("SELECT count(*) FROM tbl_repl.pending") == 0


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_only_the_operations_named_are_replicated(pair: Pair, mode: str) -> None:
    pair.both(PLAIN.format("t"))
    pair.source.sql(ROWS)
    target = pair.add_target("t", mode=mode, operations=["insert"])

    def after(write: str) -> list[tuple[int, str]]:
        pair.source.sql(write)
        pair.drain()
        return [(row[0], row[1]) for row in pair.target.sql("SELECT id, v FROM t WHERE id < 5 ORDER BY id")]

    before = [(1, "a"), (2, "b"), (3, "c")]
    assert after("UPDATE t SET v = 'u'") == before
    assert after("UPDATE t SET id = id + 1000 WHERE id = 1") == before
    assert after("DELETE FROM t WHERE id = 2; TRUNCATE t") == before
    assert after("INSERT INTO t VALUES (4, 'new')") == [*before, (4, "new")]
    pair.call("alter_target", target_id=target, operations=["delete"])
    assert after("DELETE FROM t WHERE id = 4") == before
    assert after("INSERT INTO t VALUES (2, 'not sent'), (3, 'not sent'); DELETE FROM t WHERE id = 2") == [
        (1, "a"),
        (3, "c"),
    ]
    pair.call("alter_target", target_id=target, operations=["truncate"])
    assert after("DELETE FROM t") == [(1, "a"), (3, "c")]
    pair.source.sql("TRUNCATE t")
    pair.drain()
    assert pair.target.rows("t") == []


def test_two_sources_of_one_table_do_not_empty_each_other(pair: Pair) -> None:
    pair.source.sql(PLAIN.format("a") + ";" + PLAIN.format("b"))
    pair.source.sql("INSERT INTO a VALUES (1, 'a'); INSERT INTO b VALUES (2, 'b')")
    pair.target.sql(PLAIN.format("t"))
    pair.add_target("a", dst_table="t")
    pair.add_target("b", dst_table="t")
    assert pair.target.sql("SELECT id, v FROM t ORDER BY id") == [(1, "a"), (2, "b")]
    pair.source.sql("TRUNCATE a")
    assert pair.target.sql("SELECT id, v FROM t ORDER BY id") == [(2, "b")]
    pair.source.sql("INSERT INTO a VALUES (3, 'a'); TRUNCATE b")
    assert pair.target.sql("SELECT id, v FROM t ORDER BY id") == [(3, "a")]
    pair.call("drop_target", source_table="b", server=pair.server)
    pair.source.sql("TRUNCATE a")
    assert pair.target.sql("SELECT id, v FROM t ORDER BY id") == []


@pytest.mark.once
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize(
    "partitioned, truncated, row_filter",
    [
        (False, "t", None),
        (True, "t", None),
        (False, "t", "id > 0"),
        (True, "t", "id > 0"),
        (True, "t_low", None),
    ],
)
def test_truncate_of_rows_that_the_snapshot_does_not_show(
    pair: Pair, isolation: str, mode: str, partitioned: bool, truncated: str, row_filter: str | None
) -> None:
    """They are removed all the same: where keys have to be kept it is refused."""
    pair.source.sql(PARTITIONED if partitioned else PLAIN.format("t"))
    pair.target.sql(PLAIN.format("t"))
    pair.add_target("t", mode=mode, row_filter=row_filter)
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    conn = pair.source.connect()
    conn.execute(f"BEGIN ISOLATION LEVEL {isolation}; SELECT FROM t")
    pair.source.sql("INSERT INTO t VALUES (2, 'later')")
    pair.drain()
    if row_filter or truncated != "t":
        with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
            conn.execute(f"TRUNCATE {truncated}")
        assert caught.value.diag.message_hint
        conn.execute("ROLLBACK")
    else:
        conn.execute(f"TRUNCATE {truncated}")
        conn.execute("COMMIT")
        assert pair.source.rows("t") == []
    pair.drain()
    pair.assert_same("t")


@pytest.mark.once
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("how", ["filtered", "partition", "operations", "locked root"])
def test_truncate_older_than_what_its_target_asks_for(
    pair: Pair, isolation: str, mode: str, how: str
) -> None:
    """What has to be kept is not found out from the catalog that the snapshot shows."""
    partitioned = how in ("partition", "locked root")
    pair.source.sql(PARTITIONED if partitioned else PLAIN.format("t"))
    pair.target.sql(PLAIN.format("t"))
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    options: dict[str, Any] = {} if partitioned else {"row_filter": "id > 0"}
    older = how in ("operations", "locked root")
    if older:
        kinds = "{insert,update,delete}" if how == "operations" else "{insert,update,delete,truncate}"
        target = pair.add_target("t", mode=mode, operations=kinds, **options)
    conn = pair.source.connect()
    conn.execute(f"BEGIN ISOLATION LEVEL {isolation}; SELECT count(*) FROM pg_class")
    if not older:
        pair.add_target("t", mode=mode, **options)
    elif how == "operations":
        pair.call("alter_target", target_id=target, operations="{insert,update,delete,truncate}")
    pair.source.sql("INSERT INTO t VALUES (2, 'later')")
    if how == "locked root":
        conn.execute("LOCK TABLE t")
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        conn.execute("TRUNCATE t_low" if partitioned else "TRUNCATE t")
    conn.execute("ROLLBACK")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("kind", ["STORED", "VIRTUAL"])
def test_generated_columns_in_a_filter(pair: Pair, kind: str, partitioned: bool) -> None:
    """A virtual generated column has no value in a trigger."""
    if kind == "VIRTUAL" and pair.major < 18:
        pytest.skip("new in 18")
    columns = f"id integer PRIMARY KEY, n integer, twice integer GENERATED ALWAYS AS (n * 2) {kind}"
    pair.source.sql(f"CREATE TABLE t ({columns}) {'PARTITION BY RANGE (id)' if partitioned else ''}")
    if partitioned:
        pair.source.sql("CREATE TABLE t_all PARTITION OF t DEFAULT")
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    target = pair.add_target("t", row_filter="twice > 10")
    pair.source.sql("INSERT INTO t VALUES (1, 5), (2, 6), (3, 7)")
    pair.source.sql("UPDATE t SET n = CASE id WHEN 1 THEN 9 WHEN 2 THEN 1 ELSE 8 END")
    assert pair.target.sql("TABLE t ORDER BY id") == [(1, 9), (3, 8)]
    assert pair.status(target) == "ok"


def test_wide_transactions_of_several_tables_arrive_together(both: Replicated) -> None:
    pair = both.pair
    pair.both("CREATE TABLE other (id integer PRIMARY KEY, v text)")
    other = pair.add_target("other")
    pair.source.sql(
        "INSERT INTO other SELECT i, repeat('x', 100) FROM generate_series(1, 2500) i;"
        "UPDATE t SET n = n + 1; UPDATE other SET v = 'y' WHERE id % 2 = 0; DELETE FROM other WHERE id % 3 = 0"
    )
    pair.assert_same("other")
    both.check()
    assert pair.status(other) == "ok"
