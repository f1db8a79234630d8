"""Order: deletions on the target take nothing along that the source still has."""

from __future__ import annotations

import pytest
from psycopg import errors

from support import Pair
from support.programs import WorkerProcess
from support.tables import quarantined
from support.waiting import wait_until

TREE = """
    CREATE TABLE p (id integer PRIMARY KEY{column});
    CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p ON UPDATE CASCADE ON DELETE {action});
    CREATE TABLE g (id integer PRIMARY KEY, c integer REFERENCES c ON UPDATE CASCADE ON DELETE {below})
"""
TABLES = ("p", "c", "g")
CHANGES = {
    "keys": "UPDATE p SET id = id + 100000",
    "merged": "BEGIN; INSERT INTO p VALUES (0); UPDATE c SET p = 0; DELETE FROM p WHERE id > 0; COMMIT",
}


def plant(
    pair: Pair, mode: str, rows: int, column: str = "", action: str = "CASCADE", below: str = "CASCADE"
) -> list[int]:
    """Parents, children and grandchildren, so many of each; the target_ids."""
    pair.both(TREE.format(column=column and f", {column}", action=action, below=below))
    targets = [pair.add_target(table, mode=mode, timeout="20 s") for table in TABLES]
    pair.source.sql(
        f"BEGIN; INSERT INTO p SELECT g{', g' if column else ''} FROM generate_series(1, {rows}) g; "
        f"INSERT INTO c SELECT g, g FROM generate_series(1, {rows}) g; "
        f"INSERT INTO g SELECT g, g FROM generate_series(1, {rows}) g; COMMIT"
    )
    pair.drain()
    return targets


def same(pair: Pair) -> None:
    for table in TABLES:
        pair.assert_same(table)


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_tables_may_come_one_after_the_other(pair: Pair, mode: str) -> None:
    ddl = TREE.format(column="", action="CASCADE", below="CASCADE").split(";")
    for create, table in zip(ddl, TABLES, strict=False):
        pair.both(create)
        pair.add_target(table, mode=mode)
    pair.source.sql(
        "BEGIN; INSERT INTO p VALUES (1); INSERT INTO c VALUES (1, 1); INSERT INTO g VALUES (1, 1); COMMIT"
    )
    pair.drain()
    pair.source.sql("UPDATE p SET id = 2")
    pair.drain()
    same(pair)
    assert pair.target.rows("g") == ["(1,1)"]


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", [3, 1200])
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_grandchildren_of_a_parent_that_gives_way_stay(pair: Pair, mode: str, rows: int, change: str) -> None:
    targets = plant(pair, mode, rows)
    pair.source.sql(CHANGES[change])
    if mode == "async":
        pair.drain()
    same(pair)
    assert pair.source.one("SELECT count(*) FROM g") == rows
    assert [pair.status(target) for target in targets] == ["ok"] * 3
    assert pair.source.sql("SELECT sqlstate, message FROM tbl_repl.error_log") == []


@pytest.mark.once
@pytest.mark.parametrize("below", ["SET NULL", "SET DEFAULT"])
def test_grandchildren_keep_what_they_refer_to(pair: Pair, below: str) -> None:
    plant(pair, "sync", 3, below=below)
    pair.source.sql(CHANGES["merged"])
    same(pair)
    assert pair.target.one("SELECT count(c) FROM g") == 3


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGES)
def test_grandchildren_stay_where_the_target_rejects_another_row(pair: Pair, change: str) -> None:
    plant(pair, "async", 3)
    pair.target.sql("ALTER TABLE c ADD CHECK (id <> 4)")
    pair.source.sql(CHANGES[change])
    pair.source.sql("INSERT INTO p VALUES (7); INSERT INTO c VALUES (4, 7)")
    pair.drain()
    assert [code for _, code, _ in quarantined(pair)] == ["23514"]
    pair.assert_same("p")
    pair.assert_same("g")
    pair.target.sql("ALTER TABLE c DROP CONSTRAINT c_id_check")
    pair.drain()
    same(pair)


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGES)
def test_grandchildren_stay_where_rows_go_by_copy(pair: Pair, change: str) -> None:
    plant(pair, "async", 1500)
    with WorkerProcess(pair.source, constants={"bulk.MIN_ROWS": 2000}) as worker:
        pair.source.sql(CHANGES[change])
        wait_until(lambda: sum(int(event["rows"]) for event in worker.events("batch")) >= 3000, 30)
    same(pair)
    assert pair.target.one("SELECT count(*) FROM g") == 1500


@pytest.mark.once
def test_a_tree_in_one_table_keeps_its_lower_branches(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE e (id integer PRIMARY KEY, boss integer REFERENCES e ON UPDATE CASCADE ON DELETE CASCADE)"
    )
    pair.add_target("e", mode="sync")
    pair.source.sql(
        "INSERT INTO e VALUES (1, NULL), (2, 1), (3, 2), (4, 3); UPDATE e SET id = 10 WHERE id = 1"
    )
    pair.assert_same("e")
    assert pair.target.one("SELECT count(*) FROM e") == 4


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
@pytest.mark.parametrize("action", ["CASCADE", "NO ACTION", "RESTRICT"])
@pytest.mark.parametrize("change", ["key", "replaced"])
def test_a_parent_with_another_unique_column_gives_way(
    pair: Pair, mode: str, action: str, change: str
) -> None:
    """Its successor wants the e-mail while children still refer to it."""
    plant(pair, mode, 0, "email text NOT NULL UNIQUE", action)
    pair.source.sql(
        "INSERT INTO p VALUES (1, 'a'), (2, 'b'); INSERT INTO c VALUES (1, 1), (2, 2); INSERT INTO g VALUES (1, 1)"
    )
    pair.drain()
    pair.source.sql(
        "UPDATE p SET id = 11 WHERE id = 1"
        if change == "key"
        else "BEGIN; UPDATE p SET email = 'old' WHERE id = 1; INSERT INTO p VALUES (9, 'a'); "
        "UPDATE c SET p = 9 WHERE p = 1; DELETE FROM p WHERE id = 1; COMMIT"
    )
    if mode == "async":
        pair.drain()
    same(pair)
    assert quarantined(pair) == []
    assert pair.source.one("SELECT count(*) FROM tbl_repl.target_status WHERE status <> 'ok'") == 0


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_ranges_that_exclude_each_other_are_exchanged(pair: Pair, mode: str) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, during int4range, EXCLUDE USING gist (during WITH &&))"
    )
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, '[1,5)'), (2, '[5,9)')")
    pair.source.sql(
        "BEGIN; UPDATE t SET during = '[1,3)' WHERE id = 1; UPDATE t SET during = '[3,9)' WHERE id = 2; COMMIT"
    )
    pair.source.sql(
        "BEGIN; UPDATE t SET during = 'empty' WHERE id = 1; UPDATE t SET during = '[1,3)' WHERE id = 2; "
        "UPDATE t SET during = '[3,9)' WHERE id = 1; COMMIT"
    )
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_only_the_target_has_in_a_row_stays_when_unique_values_wander(pair: Pair, mode: str) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v text NOT NULL UNIQUE)")
    pair.target.sql(
        "CREATE TABLE t (id integer PRIMARY KEY, v text NOT NULL UNIQUE, own text UNIQUE DEFAULT 'none')"
    )
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'a')")
    pair.drain()
    pair.target.sql("UPDATE t SET own = 'one'")
    pair.source.sql("INSERT INTO t VALUES (2, 'b')")
    pair.drain()
    pair.target.sql("UPDATE t SET own = 'two' WHERE id = 2")
    pair.source.sql(
        "BEGIN; UPDATE t SET v = 'c' WHERE id = 1; UPDATE t SET v = 'a' WHERE id = 2; UPDATE t SET v = 'b' WHERE id = 1; COMMIT"
    )
    pair.drain()
    assert pair.target.rows("t") == ["(1,b,one)", "(2,a,two)"]


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_unique_values_swapped_in_a_tree_arrive(pair: Pair, mode: str) -> None:
    """One of the rows has a child, and cannot be deleted to make room."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, up integer REFERENCES t, slug text NOT NULL UNIQUE)")
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, NULL, 'a'), (2, NULL, 'b'), (3, 1, 'c')")
    pair.drain()
    pair.source.sql(
        "BEGIN; UPDATE t SET slug = 'x' WHERE id = 1; UPDATE t SET slug = 'a' WHERE id = 2; UPDATE t SET slug = 'b' WHERE id = 1; COMMIT"
    )
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_referenced_row_is_not_renewed_for_the_value_of_an_identity_column(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, n integer GENERATED ALWAYS AS IDENTITY)")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, t integer REFERENCES t ON DELETE CASCADE)")
    for table in ("t", "c"):
        pair.add_target(table, mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1), (2); INSERT INTO c VALUES (1, 1)")
    pair.drain()
    pair.assert_same("t")
    pair.assert_same("c")
    change = "UPDATE t SET n = DEFAULT WHERE id = 1"
    if mode == "sync":
        with pytest.raises(errors.InvalidTextRepresentation, match="GENERATED ALWAYS"):
            pair.source.fresh(change)
    else:
        pair.source.fresh(change)
        pair.drain()
        assert [(key, code) for key, code, _ in quarantined(pair)] == [({"id": 1}, "22P02")]
    pair.assert_same("c")


UNIQUE = {
    "number": "v numeric UNIQUE NOT NULL",
    "checked": "v integer UNIQUE NOT NULL CHECK (v > 0)",
    "by expression": "v integer NOT NULL, EXCLUDE USING btree ((v + 1) WITH =)",
}


@pytest.mark.once
@pytest.mark.parametrize("column", UNIQUE)
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
@pytest.mark.parametrize("rows", [1, 1200])
def test_a_unique_value_that_a_deleted_row_had_goes_to_another_one(
    pair: Pair, mode: str, column: str, rows: int
) -> None:
    pair.both(f"CREATE TABLE p (id integer PRIMARY KEY, {UNIQUE[column]})")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p ON DELETE CASCADE)")
    targets = [pair.add_target(table, mode=mode, timeout="20 s") for table in ("p", "c")]
    pair.source.sql(
        f"INSERT INTO p SELECT g, g FROM generate_series(1, {rows}) g; INSERT INTO c VALUES (1, 1)"
    )
    pair.drain()
    pair.source.sql(
        f"BEGIN; DELETE FROM p; INSERT INTO p SELECT g + {rows}, g FROM generate_series(1, {rows}) g; COMMIT"
    )
    pair.drain()
    pair.assert_same("p")
    assert pair.target.rows("c") == []
    assert [pair.status(target) for target in targets] == ["ok", "ok"]


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_value_that_a_deleted_row_referred_to_changes(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE p (id integer PRIMARY KEY, code text UNIQUE)")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p ON DELETE CASCADE)")
    pair.both("CREATE TABLE d (id integer PRIMARY KEY, code text REFERENCES p (code))")
    for table in "pcd":
        pair.add_target(table, mode=mode)
    pair.source.sql("INSERT INTO p VALUES (1, 'a'); INSERT INTO d VALUES (1, 'a')")
    pair.drain()
    pair.source.sql("BEGIN; DELETE FROM d; UPDATE p SET code = 'z'; COMMIT")
    pair.drain()
    pair.assert_same("p")
    assert pair.target.rows("d") == []


@pytest.mark.once
@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("column", UNIQUE)
def test_grandchildren_stay_where_a_parent_cannot_give_way(pair: Pair, mode: str, column: str) -> None:
    """Its successor wants its unique value: that is for a person to solve, by deleting and inserting on the source."""
    plant(pair, mode, 3, UNIQUE[column])
    pair.source.sql("UPDATE p SET id = id + 100")
    pair.drain()
    assert pair.target.rows("g") == ["(1,1)", "(2,2)", "(3,3)"]
    assert quarantined(pair)


@pytest.mark.once
@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("rows", [3, 1200])
@pytest.mark.parametrize("child", ["paused", "rejected", "over another connection"])
def test_a_parent_waits_for_children_that_are_still_to_leave_it(
    pair: Pair, mode: str, rows: int, child: str
) -> None:
    _, c, _ = plant(pair, mode, rows)
    if child == "paused":
        pair.call("pause_target", target_id=c)
    elif child == "rejected":
        pair.target.sql("ALTER TABLE c ADD CONSTRAINT held CHECK (p <> 100002) NOT VALID")
    else:
        pair.call("alter_target", target_id=c, timeout="19 s")
        pair.call("pause_target", target_id=c)
    pair.source.sql(CHANGES["keys"])
    pair.drain()
    assert len(pair.target.rows("g")) == rows
    if child == "rejected":
        pair.target.sql("ALTER TABLE c DROP CONSTRAINT held")
    else:
        pair.call("resume_target", target_id=c)
    pair.drain()
    pair.drain()
    same(pair)
    assert quarantined(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_only_the_target_has_in_a_row_is_not_forgotten_for_the_value_of_an_identity_column(
    pair: Pair, mode: str
) -> None:
    columns = "id integer PRIMARY KEY, n integer GENERATED ALWAYS AS IDENTITY, v text"
    pair.source.sql(f"CREATE TABLE t ({columns})")
    pair.target.sql(f"CREATE TABLE t ({columns}, own text DEFAULT 'none')")
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t (id, v) VALUES (1, 'a'), (2, 'b')")
    pair.drain()
    pair.target.sql("UPDATE t SET own = 'mine'")
    pair.source.sql("UPDATE t SET v = 'c' WHERE id = 2")
    change = "UPDATE t SET n = DEFAULT WHERE id = 1"
    if mode == "sync":
        with pytest.raises(errors.InvalidTextRepresentation, match="columns that are not sent"):
            pair.source.fresh(change)
    else:
        pair.source.fresh(change)
        pair.drain()
        assert [(key, code) for key, code, _ in quarantined(pair)] == [({"id": 1}, "22P02")]
    assert pair.target.rows("t") == ["(1,1,a,mine)", "(2,2,c,mine)"]


@pytest.mark.once
@pytest.mark.parametrize("mode", ["tolerant", "async"])
@pytest.mark.parametrize("action", ["CASCADE", "SET NULL"])
def test_what_refers_to_another_column_stays_when_the_key_changes(pair: Pair, mode: str, action: str) -> None:
    pair.both("CREATE TABLE p (id integer PRIMARY KEY, code text UNIQUE)")
    pair.both(f"CREATE TABLE d (id integer PRIMARY KEY, code text REFERENCES p (code) ON DELETE {action})")
    for table in "pd":
        pair.add_target(table, mode=mode)
    pair.source.sql("INSERT INTO p VALUES (1, 'a'); INSERT INTO d VALUES (1, 'a')")
    pair.drain()
    pair.source.sql("UPDATE p SET id = 2")
    pair.drain()
    assert pair.target.rows("d") == ["(1,a)"]
    assert {code for _, code, _ in quarantined(pair)} <= {"23503", "23505"}
    pair.source.sql("DELETE FROM d")
    pair.drain()
    pair.drain()
    pair.assert_same("p")
    assert quarantined(pair) == []
