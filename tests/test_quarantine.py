"""Quarantine: a row that the target rejects holds up no other, and heals."""

from __future__ import annotations

from typing import Any

import pytest

from support import Pair
from support.tables import async_table, quarantined, replay

SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON t FOR EACH ROW WHEN (NEW.v = 'slow') EXECUTE FUNCTION slow();
"""


@pytest.mark.once
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_batch_too_slow_for_the_timeout_goes_in_smaller_messages(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", mode=mode, timeout="0.5 s")
    pair.target.sql(SLOW.format(seconds=0.002))
    pair.source.sql("INSERT INTO t SELECT g, 'slow' FROM generate_series(1, 1200) g")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []
    assert (pair.status(target_id), pair.pending(target_id)) == ("ok", 0)


@pytest.mark.once
def test_a_row_too_slow_for_the_timeout_goes_into_quarantine(pair: Pair) -> None:
    target_id = async_table(pair, timeout="0.3 s")
    pair.target.sql(SLOW.format(seconds=20))
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE g WHEN 77 THEN 'slow' ELSE 'x' END FROM generate_series(1, 1200) g"
    )
    pair.source.sql("INSERT INTO t VALUES (5000, 'slow')")
    pair.drain()
    pair.assert_same("t", where="v <> 'slow'")
    assert [row[:2] for row in quarantined(pair)] == [({"id": 5000}, "57014"), ({"id": 77}, "57014")]
    assert (pair.status(target_id), pair.pending(target_id)) == ("ok", 0)
    pair.source.sql("UPDATE t SET v = 'x' WHERE id = 77")
    pair.drain()
    assert [row[0] for row in quarantined(pair)] == [{"id": 5000}]
    pair.target.sql("DROP TRIGGER slow ON t")
    pair.drain()
    assert quarantined(pair) == []
    pair.assert_same("t")


@pytest.mark.once
def test_rows_too_slow_are_tried_again_one_by_one(pair: Pair) -> None:
    async_table(pair, timeout="0.2 s")
    pair.target.sql(SLOW.format(seconds=20))
    for i in range(2):
        pair.source.sql("INSERT INTO t VALUES (%s, 'slow')", [i])
        pair.drain()
    before = sum(row[2] for row in quarantined(pair))
    assert replay(pair) == 0
    assert sum(row[2] for row in quarantined(pair)) == before + 1


@pytest.mark.once
def test_a_target_too_slow_for_any_row_fails_and_its_neighbours_go_on(pair: Pair) -> None:
    target_id = async_table(pair, timeout="0.2 s")
    pair.both("CREATE TABLE n (id integer PRIMARY KEY)")
    pair.add_target("n", mode="async", timeout="0.2 s")
    pair.target.sql(SLOW.format(seconds=20))
    pair.source.sql("INSERT INTO t SELECT g, 'slow' FROM generate_series(1, 60) g; INSERT INTO n VALUES (1)")
    pair.drain()
    pair.assert_same("n")
    assert (pair.status(target_id), pair.pending(target_id)) == ("failed", 60)
    assert quarantined(pair) == []
    assert "57014" in pair.source.one(
        "SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [target_id]
    )
    pair.target.sql("DROP TRIGGER slow ON t")
    pair.drain()
    pair.assert_same("t")
    assert pair.status(target_id) == "ok"


def test_one_rejected_row_among_thousands_holds_up_no_other(pair: Pair) -> None:
    target_id = async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT no_poison CHECK (v <> 'poison')")
    pair.source.sql(
        "INSERT INTO t SELECT g, CASE g WHEN 3210 THEN 'poison' ELSE 'x' END FROM generate_series(1, 5000) g"
    )
    pair.drain()
    pair.assert_same("t", where="id <> 3210")
    assert quarantined(pair)[0][:2] == ({"id": 3210}, "23514")
    message, hint = pair.source.sql(
        "SELECT message, hint FROM tbl_repl.error_log WHERE target_id = %s AND key = %s::jsonb",
        [target_id, '{"id": 3210}'],
    )[0]
    assert "no_poison" in message
    assert hint
    assert "no_poison" in pair.source.one("SELECT message FROM tbl_repl.quarantine")
    assert (pair.status(target_id), pair.pending(target_id)) == ("ok", 0)


def test_several_rejected_rows_are_all_found_and_counted(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CHECK (id % 400 <> 0)")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000) g")
    assert replay(pair) == 2000
    pair.assert_same("t", where="id % 400 <> 0")
    assert [row[0]["id"] for row in quarantined(pair)] == [1200, 1600, 2000, 400, 800]
    first = quarantined(pair)[0][2]
    assert replay(pair) == 0  # tried again, in vain
    assert quarantined(pair)[0][2] == first + 1


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_row_that_the_target_cannot_even_read_hurts_no_other(pair: Pair, mode: str) -> None:
    """The whole message is refused before any of it is executed."""
    name = f"{pair.target.dbname}_latin"
    pair.target.admin(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C' OWNER owner")
    try:
        server = pair.join(pair.source, pair.target, "latin_server")
        pair.source.sql(f"ALTER SERVER {server} OPTIONS (SET dbname '{name}')")
        with pair.target.cluster.connect(name, "owner") as latin:
            for table in ("t", "u"):
                latin.execute(f"CREATE TABLE {table} (id integer PRIMARY KEY, v text)")
                pair.source.sql(f"CREATE TABLE {table} (id integer PRIMARY KEY, v text)")
                pair.call("add_target", source_table=table, server=server, mode=mode)
            pair.source.sql(
                "INSERT INTO t VALUES (1, 'a'), (2, '\u20ac'), (3, 'b'); INSERT INTO u VALUES (1, 'c')"
            )
            pair.drain()
            assert latin.execute("SELECT id FROM t ORDER BY id").fetchall() == [(1,), (3,)]
            assert latin.execute("SELECT id FROM u").fetchall() == [(1,)]
            assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, "22P05")]
            pair.source.sql("UPDATE t SET v = 'c' WHERE id = 2")
            pair.drain()
            assert quarantined(pair) == []
    finally:
        pair.source.forget()
        pair.target.admin(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_row_that_a_policy_of_the_target_forbids_hurts_no_other(pair: Pair) -> None:
    """42501 is the code of a missing right as well, which no row can help."""
    target_id = async_table(pair, "id integer PRIMARY KEY, v integer")
    pair.target.sql("ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY")
    pair.target.sql("CREATE POLICY p ON t USING (true) WITH CHECK (v < 100)")
    pair.source.sql("INSERT INTO t VALUES (1, 1), (2, 100)")
    for _ in range(3):
        pair.drain()  # and tries it again, alone
        assert pair.status(target_id) == "ok"
    assert pair.target.rows("t") == ["(1,1)"]
    assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, "42501")]
    pair.source.sql("UPDATE t SET v = 2 WHERE id = 2")
    pair.drain()
    pair.assert_same("t")
    assert quarantined(pair) == []


@pytest.mark.once
@pytest.mark.parametrize("code", ["55000", "42704", "XX000"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_a_row_refused_by_what_looks_like_an_error_of_the_target_is_found(
    pair: Pair, mode: str, code: str
) -> None:
    """A trigger of the target may raise anything; what comes again and again is looked into."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", mode=mode)
    pair.target.sql(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'it is closed' USING ERRCODE = '{code}';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON t FOR EACH ROW
            WHEN (NEW.v = 'closed') EXECUTE FUNCTION refuse()
        """
    )
    pair.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'closed'), (3, 'b')")
    for _ in range(5):
        pair.drain()
    assert pair.target.rows("t") == ["(1,a)", "(3,b)"]
    assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, code)]
    assert pair.status(target_id) == "ok"
    for _ in range(4):
        pair.drain()  # tried again alone, it is not the target's fault either
    assert [row[:2] for row in quarantined(pair)] == [({"id": 2}, code)]
    assert pair.status(target_id) == "ok"
    pair.source.sql("UPDATE t SET v = 'c' WHERE id = 2")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.once
def test_a_target_that_refuses_every_row_keeps_its_queue_and_hurts_no_other(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    refusing, _ = pair.add_target("t", mode="async"), pair.add_target("u", mode="async")
    pair.target.sql(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'it is closed' USING ERRCODE = '55000';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION refuse()
        """
    )
    pair.source.sql("INSERT INTO t VALUES (1), (2), (3); INSERT INTO u VALUES (1)")
    for _ in range(5):
        pair.drain()
    assert pair.target.rows("u") == ["(1)"]
    assert quarantined(pair) == []
    assert pair.pending(refusing) == 3
    pair.target.sql("DROP TRIGGER refuse ON t")
    pair.drain()
    pair.assert_same("t")


def test_an_expression_may_read_a_table_with_policies(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, name text)")
    pair.source.admin(
        "CREATE TABLE tenant (id integer, name text, owner text); GRANT SELECT ON tenant TO owner"
    )
    pair.source.admin(
        "ALTER TABLE tenant ENABLE ROW LEVEL SECURITY; INSERT INTO tenant VALUES (1, 'x', 'owner'), (1, 'y', 'z')"
    )
    pair.source.admin("CREATE POLICY p ON tenant USING (owner = current_user)")
    pair.source.sql(
        "CREATE FUNCTION nm(i integer) RETURNS text LANGUAGE sql STABLE RETURN (SELECT name FROM tenant WHERE id = i)"
    )
    pair.add_target("t", mode="sync", column_map={"name": "nm(id)"})
    pair.source.sql("INSERT INTO t VALUES (1, '-')")
    assert pair.target.rows("t") == ["(1,x)"]


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_rows_that_a_policy_hides_are_not_taken_for_deleted(pair: Pair, mode: str) -> None:
    """FORCE ROW LEVEL SECURITY comes later, so add_target has not refused it."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    pair.drain()
    pair.source.sql("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    pair.source.sql("UPDATE t SET v = 'y'")
    pair.drain()  # the owner sees everything
    pair.assert_same("t")
    pair.source.sql("CREATE POLICY p ON t USING (id = 1)")
    pair.source.sql("ALTER TABLE t FORCE ROW LEVEL SECURITY")
    pair.source.admin("UPDATE t SET v = 'z'")
    pair.source.admin("UPDATE t SET v = 'zz' WHERE id = 2")
    pair.drain()
    assert pair.target.rows("t") == ["(1,y)", "(2,y)"]
    assert "row-level security" in pair.source.one("SELECT last_error FROM tbl_repl.target_status")
    pair.source.sql("ALTER TABLE t NO FORCE ROW LEVEL SECURITY")
    pair.drain()
    pair.assert_same("t")


def test_a_rejected_row_heals_when_it_is_mended_at_the_source(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'poison')")
    pair.drain()
    assert len(quarantined(pair)) == 1
    pair.source.sql("UPDATE t SET v = 'mended' WHERE id = 2")
    pair.drain()
    assert quarantined(pair) == []
    pair.assert_same("t")


def test_a_rejected_row_heals_when_it_is_deleted_at_the_source(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'poison')")
    pair.drain()
    pair.source.sql("DELETE FROM t WHERE id = 2")
    pair.drain()
    assert quarantined(pair) == []
    pair.assert_same("t")


def test_a_rejected_row_heals_by_replay_when_the_target_is_mended(pair: Pair) -> None:
    async_table(pair)
    pair.target.sql("ALTER TABLE t ADD CONSTRAINT c CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'poison')")
    pair.drain()
    pair.target.sql("ALTER TABLE t DROP CONSTRAINT c")
    assert replay(pair) == 1
    assert quarantined(pair) == []
    pair.assert_same("t")
    assert replay(pair) == 0


def test_a_tolerant_target_returns_to_ok_with_a_row_in_quarantine(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'poison')")
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    pair.source.sql("INSERT INTO t VALUES (2, 'poison')")
    assert pair.status(target_id) == "queueing"
    pair.drain()
    assert pair.status(target_id) == "ok"
    assert quarantined(pair)[0][:2] == ({"id": 2}, "23514")
    pair.source.sql("UPDATE t SET v = 'fine' WHERE id = 2")
    pair.assert_same("t")
    pair.drain()
    assert quarantined(pair) == []


@pytest.mark.parametrize("where", ["filter", "map"])
def test_an_expression_that_fails_on_a_row_hurts_only_that_row(pair: Pair, where: str) -> None:
    options: dict[str, Any] = {
        "filter": {"row_filter": "10 / n > 0"},
        "map": {"column_map": {"n": "10 / n"}},
    }[where]
    async_table(pair, "id integer PRIMARY KEY, n integer", **options)
    pair.source.sql("INSERT INTO t VALUES (1, 5), (2, 0), (3, 2)")
    pair.drain()
    assert [row[0] for row in pair.target.sql("SELECT id FROM t ORDER BY id")] == [1, 3]
    assert quarantined(pair)[0][:2] == ({"id": 2}, "22012")
    pair.source.sql("UPDATE t SET n = 1 WHERE id = 2") if where == "map" else pair.source.sql(
        "DELETE FROM t WHERE id = 2"
    )
    pair.drain()
    assert quarantined(pair) == []


def test_a_background_copy_gets_past_a_row_on_which_the_filter_fails(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    pair.source.sql("INSERT INTO t SELECT g, g - 150 FROM generate_series(1, 300) g")
    target_id = pair.add_target("t", row_filter="10 / n < 100", initial_copy="background")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 100)")
    pair.assert_same("t", where="n <> 0")
    assert quarantined(pair)[0][:2] == ({"id": 150}, "22012")
    assert pair.status(target_id) == "ok"


def test_a_table_that_is_gone_fails_its_target_until_it_is_back(pair: Pair) -> None:
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY, v text)"
    )
    gone = pair.add_target("t", mode="async")
    well = pair.add_target("u", mode="async")
    pair.target.sql("DROP TABLE t")
    pair.source.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 50) g")
    pair.source.sql("INSERT INTO u SELECT g, 'x' FROM generate_series(1, 50) g")
    pair.drain()
    pair.assert_same("u")
    assert (pair.status(gone), pair.status(well)) == ("failed", "ok")
    assert pair.pending(gone) == 50
    assert pair.source.one(
        "SELECT last_error FROM tbl_repl.target_status WHERE target_id = %s", [gone]
    ).startswith("42P01")
    assert quarantined(pair) == []
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.drain()
    pair.assert_same("t")
    assert (pair.status(gone), pair.pending(gone)) == ("ok", 0)


def test_the_backlog_of_a_failed_target_does_not_hold_up_its_neighbours(pair: Pair) -> None:
    """Both tables go to one server; the failed one has more queued than a batch takes."""
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY, v text)"
    )
    gone = pair.add_target("t", mode="async")
    pair.add_target("u", mode="async")
    pair.target.sql("DROP TABLE t")
    for i in range(30):
        pair.source.sql("INSERT INTO t VALUES (%s, 'x')", [i])
    pair.source.sql("INSERT INTO u VALUES (1, 'x')")
    pair.source.sql("CALL tbl_repl.drain(batch_rows => 10)")
    pair.assert_same("u")
    assert (pair.status(gone), pair.pending(gone)) == ("failed", 30)


def test_a_row_that_every_key_shares_the_fault_of_is_still_found(pair: Pair) -> None:
    """A batch of one row with a fault that is the row's own does not fail the target."""
    target_id = async_table(pair, "id integer PRIMARY KEY, v text")
    pair.target.sql("ALTER TABLE t ALTER v TYPE integer USING v::integer")
    pair.source.sql("INSERT INTO t VALUES (1, 'not a number')")
    pair.drain()
    assert quarantined(pair)[0][:2] == ({"id": 1}, "22P02")
    assert pair.status(target_id) == "ok"
