"""compare_target finds every difference and no other; repair_target queues what it finds."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest
from psycopg import errors

from support import Pair, wait_until
from support.background import in_background
from support.programs import dsn_of
from tbl_repl import compare


def differences(pair: Pair, target: int) -> list[tuple[str, Any]]:
    """(difference, key) of every row; a key of one column is shown as its value."""
    rows = pair.source.sql("SELECT difference, key FROM tbl_repl.compare_target(%s)", [target])
    return sorted(((word, next(iter(key.values())) if len(key) == 1 else key) for word, key in rows), key=str)


def repaired(pair: Pair, target: int, **options: bool) -> int:
    """repair_target, and what was queued shipped; how many it queued."""
    queued = pair.call("repair_target", target_id=target, **options)
    pair.drain()
    return int(queued)


@pytest.fixture
def simple(pair: Pair) -> Pair:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text, n numeric(10,2))")
    pair.source.sql("INSERT INTO t SELECT i, 'v' || i, i FROM generate_series(1, 20) i")
    return pair


def spoil(pair: Pair) -> None:
    """One row missing, one extra, one different in each way."""
    pair.target.sql("""
        DELETE FROM t WHERE id = 3;
        INSERT INTO t VALUES (99, 'extra', 0);
        UPDATE t SET v = NULL WHERE id = 5;
        UPDATE t SET n = 7.01 WHERE id = 7
        """)


SPOILED = [
    ("different", 5),
    ("different", 7),
    ("extra_on_target", 99),
    ("missing_on_target", 3),
]


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_every_difference_is_found_and_no_other(simple: Pair, mode: str) -> None:
    target = simple.add_target("t", mode=mode)
    assert differences(simple, target) == []
    spoil(simple)
    assert differences(simple, target) == SPOILED


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_repair_heals_and_deletes_only_when_told(simple: Pair, mode: str) -> None:
    target = simple.add_target("t", mode=mode)
    spoil(simple)
    assert repaired(simple, target) == 3
    assert differences(simple, target) == [("extra_on_target", 99)]
    assert repaired(simple, target, delete_extra=True) == 1
    assert differences(simple, target) == []
    assert repaired(simple, target, delete_extra=True) == 0
    simple.assert_same("t")
    assert simple.status(target) == "ok"


def test_repair_only_queues(simple: Pair) -> None:
    target = simple.add_target("t")
    spoil(simple)
    assert simple.call("repair_target", target_id=target) == 3
    assert simple.pending(target) == 3
    assert simple.status(target) == "queueing"
    assert "(99,extra,0.00)" in simple.target.rows("t")


@pytest.mark.plain_target
def test_the_target_needs_nothing_installed(simple: Pair) -> None:
    target = simple.add_target("t")
    spoil(simple)
    assert differences(simple, target) == SPOILED


def test_what_is_queued_is_no_difference(simple: Pair) -> None:
    target = simple.add_target("t", mode="async")
    spoil(simple)
    simple.source.sql("UPDATE t SET v = 'new' WHERE id IN (3, 8)")
    simple.source.sql("DELETE FROM t WHERE id = 9")
    simple.source.sql("INSERT INTO t VALUES (99, 'not extra', 1), (21, 'new', 1)")
    assert differences(simple, target) == [("different", 5), ("different", 7)]
    simple.drain()
    assert differences(simple, target) == [("different", 5), ("different", 7)]


def test_a_queued_truncate_explains_everything(simple: Pair) -> None:
    target = simple.add_target("t", mode="async")
    spoil(simple)
    simple.source.sql("TRUNCATE t")
    simple.source.sql("INSERT INTO t VALUES (1, 'again', 1)")
    assert differences(simple, target) == []
    simple.drain()
    simple.assert_same("t")


def test_what_is_queued_for_another_target_is_a_difference(simple: Pair) -> None:
    simple.both("CREATE TABLE u (LIKE t INCLUDING ALL)")
    target = simple.add_target("t")
    other = simple.add_target("t", dst_table="u")
    simple.call("pause_target", target_id=other)
    simple.source.sql("UPDATE t SET v = 'new'")
    simple.target.sql("DELETE FROM t WHERE id = 4")
    assert differences(simple, target) == [("missing_on_target", 4)]
    assert differences(simple, other) == []


def test_rows_in_quarantine_are_differences(simple: Pair) -> None:
    target = simple.add_target("t", mode="async")
    simple.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    simple.source.sql("INSERT INTO t VALUES (30, 'bad', 1)")
    simple.source.sql("UPDATE t SET v = 'bad' WHERE id = 2")
    simple.drain()
    assert differences(simple, target) == [("different", 2), ("missing_on_target", 30)]


@pytest.mark.once
def test_many_rows_in_several_chunks(simple: Pair) -> None:
    simple.source.sql("INSERT INTO t SELECT i, repeat('x', 50), i FROM generate_series(21, 5000) i")
    target = simple.add_target("t")
    simple.target.sql(
        "DELETE FROM t WHERE id % 1000 = 0; INSERT INTO t SELECT -i FROM generate_series(1, 2500) i"
    )
    simple.target.sql("UPDATE t SET v = 'x' WHERE id = 4999")
    found = differences(simple, target)
    assert [key for word, key in found if word == "missing_on_target"] == [1000, 2000, 3000, 4000, 5000]
    assert [key for word, key in found if word == "different"] == [4999]
    assert sum(word == "extra_on_target" for word, _ in found) == 2500
    assert repaired(simple, target, delete_extra=True) == 2506
    simple.assert_same("t")


def test_only_chunks_that_differ_are_sent(simple: Pair) -> None:
    """Rows that are equal travel as a hash: the target's log never sees their values."""
    simple.source.sql("INSERT INTO t SELECT i, 'value-' || i, i FROM generate_series(21, 3000) i")
    target = simple.add_target("t")
    simple.target.sql("UPDATE t SET v = 'x' WHERE id IN (1, 3000)")
    simple.target.admin(f"ALTER DATABASE {simple.target.dbname} SET log_statement = 'all'")
    simple.source.forget()
    assert differences(simple, target) == [("different", 1), ("different", 3000)]
    log = simple.target.log()
    assert "value-3000" in log
    assert "value-1500'" not in log
    assert '"1500"' not in log, "nor is its key sent"


def test_filter_columns_and_map_are_known(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, tenant text, email text, secret text)")
    pair.target.sql(
        "CREATE TABLE t (no integer PRIMARY KEY, mail text, tenant text, more text DEFAULT 'own')"
    )
    pair.source.sql("INSERT INTO t SELECT i, 'a', i || '@x', 's' FROM generate_series(1, 5) i")
    pair.source.sql("INSERT INTO t SELECT i, 'b', i || '@x', 's' FROM generate_series(6, 9) i")
    target = pair.add_target(
        "t",
        columns=["tenant"],
        column_map={"no": "id", "mail": "md5(email)"},
        row_filter="tenant = 'a'",
    )
    assert differences(pair, target) == []
    pair.target.sql("UPDATE t SET more = 'not ours'")
    assert differences(pair, target) == []
    pair.target.sql("UPDATE t SET mail = '1@x' WHERE no = 1")
    pair.target.sql("DELETE FROM t WHERE no = 2")
    # one that the filter keeps away, one that the source does not have at all
    pair.target.sql("INSERT INTO t VALUES (6, 'm', 'b'), (77, 'm', 'a')")
    assert differences(pair, target) == [
        ("different", 1),
        ("extra_on_target", 6),
        ("extra_on_target", 77),
        ("missing_on_target", 2),
    ]
    assert repaired(pair, target, delete_extra=True) == 4
    assert differences(pair, target) == []
    assert pair.target.sql("SELECT no FROM t ORDER BY no") == [(i,) for i in range(1, 6)]


def test_rows_of_other_targets_in_a_shared_table_are_not_extra(pair: Pair) -> None:
    pair.both("CREATE TABLE t (a integer, b text, v text, PRIMARY KEY (a, b))")
    pair.source.sql("CREATE TABLE u (y text, x integer, v text, PRIMARY KEY (y, x))")
    pair.source.sql("INSERT INTO t SELECT i, 't', 'v' FROM generate_series(1, 6) i")
    pair.source.sql("INSERT INTO u SELECT 'u', i, 'v' FROM generate_series(1, 3) i")
    low = pair.add_target("t", row_filter="a < 3")
    other = pair.add_target("u", dst_table="t", columns=["v"], column_map={"a": "x", "b": "y"}, mode="async")
    for target in (low, other):
        assert differences(pair, target) == []
    pair.target.sql("INSERT INTO t VALUES (5, 't', 'filtered'), (9, 'u', 'nobody''s')")
    extra = [("extra_on_target", 5), ("extra_on_target", 9)]
    assert [(word, key["a"]) for word, key in differences(pair, low)] == extra
    assert [(word, key["x"]) for word, key in differences(pair, other)] == extra
    # what the other one is about to delete is not ours to report
    pair.source.sql("DELETE FROM u WHERE x = 3")
    assert [key["a"] for _, key in differences(pair, low)] == [5, 9]
    assert repaired(pair, low, delete_extra=True) == 2
    assert differences(pair, low) == differences(pair, other) == []
    # one whose table is gone accounts for whatever there is
    pair.source.sql("DROP TABLE u")
    pair.target.sql("INSERT INTO t VALUES (5, 't', 'filtered')")
    assert differences(pair, low) == []


TYPES = {
    "integer in numeric": ("integer", "numeric(12,2)", "7", "8.00", "7.01"),
    "numeric rounded": ("numeric", "numeric(12,2)", "1.005", "1.01", "1.02"),
    "float in numeric": ("double precision", "numeric", "0.1", "0.1", "0.2"),
    "text in varchar": ("text", "varchar(5)", "'abc'", "'abc'", "'ab'"),
    "trailing blanks": ("text", "varchar(3)", "'abc  '", "'abc'", "'ab'"),
    "char": ("text", "char(8)", "'ab'", "'ab'", "'ac'"),
    "char and more": ("char(4)", "char(8)", "'ab'", "'ab'", "'ac'"),
    "timestamp rounded": (
        "timestamp",
        "timestamp(0)",
        "'2026-01-01 1:00:00.7'",
        "'2026-01-01 1:00:01'",
        "'2026-01-01 1:00:00'",
    ),
    "text in json": ("text", "jsonb", '\'{"b": 1,   "a": 2}\'', '\'{"a":2,"b":1}\'', "'{}'"),
    "case of text": ("text", "text", "'A'", "'A'", "'a'"),
    "scale": ("numeric", "numeric", "1.0", "1.0", "1.00"),
    "array": ("integer[]", "bigint[]", "'{1,NULL}'", "'{1,NULL}'", "'{1}'"),
    "bytes": ("bytea", "bytea", r"'\x00ff'", r"'\x00ff'", r"'\x00fe'"),
    "null": ("text", "text", "NULL", "NULL", "''"),
    "bit": ("bit(3)", "bit(3)", "'101'", "'101'", "'100'"),
    "odd text": ("text", "text", "'it''s \\ %s $1 %L\t\n\"é'", "'it''s \\ %s $1 %L\t\n\"é'", "'x'"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", TYPES)
def test_values_are_compared_in_the_form_of_the_target(pair: Pair, name: str) -> None:
    here, there, value, _equal, other = TYPES[name]
    pair.source.sql(f"CREATE TABLE t (id integer PRIMARY KEY, v {here})")
    pair.target.sql(f"CREATE TABLE t (id bigint PRIMARY KEY, v {there})")
    pair.source.sql(f"INSERT INTO t VALUES (1, {value}), (2, {value})")
    target = pair.add_target("t", initial_copy="none")
    assert differences(pair, target) == [("missing_on_target", 1), ("missing_on_target", 2)]
    pair.call("resync_target", target_id=target)
    pair.drain()
    assert differences(pair, target) == []
    pair.target.sql(f"UPDATE t SET v = {other} WHERE id = 2")
    assert differences(pair, target) == [("different", 2)]
    assert repaired(pair, target) == 1
    assert differences(pair, target) == []


@pytest.mark.once
@pytest.mark.parametrize("where", ["filter", "map", "raise"])
def test_a_row_on_which_an_expression_fails_is_a_difference(pair: Pair, where: str) -> None:
    """Of many: the others are compared all the same."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    pair.source.sql(
        "CREATE FUNCTION checked(n integer) RETURNS integer LANGUAGE plpgsql AS"
        " $$BEGIN IF n = 0 THEN RAISE EXCEPTION 'no'; END IF; RETURN n; END$$"
    )
    options: dict[str, Any] = {
        "filter": {"row_filter": "10 / n > -100"},
        "map": {"column_map": {"n": "10 / n"}},
        "raise": {"column_map": {"n": "public.checked(n)"}},
    }[where]
    target = pair.add_target("t", mode="async", **options)
    pair.source.sql(
        "INSERT INTO t SELECT g, 5 FROM generate_series(1, 2500) AS g; UPDATE t SET n = 0 WHERE id IN (7, 9)"
    )
    pair.drain()
    pair.target.sql("DELETE FROM t WHERE id = 1500; INSERT INTO t VALUES (9, 1), (3000, 1)")
    found = [
        ("different", 9),
        ("extra_on_target", 3000),
        ("missing_on_target", 7),
        ("missing_on_target", 1500),
    ]
    assert sorted(differences(pair, target), key=str) == sorted(found, key=str)
    repaired(pair, target, delete_extra=True)
    assert sorted(differences(pair, target), key=str) == sorted([found[0], found[2]], key=str)
    pair.source.sql("UPDATE t SET n = 3 WHERE n = 0")
    pair.drain()
    assert differences(pair, target) == []


def test_what_the_target_cannot_hold_is_a_difference(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id bigint PRIMARY KEY, v text, n integer, c text)")
    pair.target.sql("""
        CREATE DOMAIN small AS integer CHECK (value < 100);
        CREATE TABLE t (id integer PRIMARY KEY, v varchar(3), n small, c char(3));
        INSERT INTO t SELECT i, 'abc', 1, 'abc' FROM generate_series(1, 6) i;
        DELETE FROM t WHERE id = 5
        """)
    pair.source.sql("""
        INSERT INTO t VALUES (1, 'abc', 1, 'abc'), (2, 'abcdef', 1, 'abc'), (3, 'abc', 1000, 'abc'),
            (4, 'abc', 1, 'abc  '), (5, 'abcdef', 1, 'abc'), (6, 'abc', 1, 'abcdef'), (5000000000, 'abc', 1, 'abc')
        """)
    target = pair.add_target("t", initial_copy="none", mode="async")
    assert differences(pair, target) == [
        ("different", 2),
        ("different", 3),
        ("different", 6),
        ("missing_on_target", 5),
        ("missing_on_target", 5000000000),
    ]


@pytest.mark.once
@pytest.mark.parametrize(
    ("here", "there", "value", "extra"),
    [
        ("integer", "numeric(12,2)", "7", "7.50"),
        ("integer", "text", "7", "'007'"),
        ("integer", "text", "7", "'seven'"),
        ("bigint", "integer", "7", "8"),
        ("bytea", "text", "'ab'", "'ac'"),
        ("varchar(8)", "text", "'ab'", "'ab '"),
        ("numeric", "bigint", "7", "8"),
        ("uuid", "text", "'5bfcf2d8-e394-6745-5033-2640d72db509'", "'x'"),
        ("date", "timestamp", "'2026-01-02'", "'2026-01-02 12:00'"),
        ("timestamptz", "timestamptz", "'2026-01-02 12:00+3'", "'2026-01-02 12:00+2'"),
        ("float8", "float8", "0.1", "0.30000000000000004"),
        ("text[]", "text[]", "ARRAY[NULL, 'a']", "ARRAY['b']"),
    ],
)
def test_extra_rows_are_found_where_key_types_differ(
    pair: Pair, here: str, there: str, value: str, extra: str
) -> None:
    pair.source.sql(f"CREATE TABLE t (id {here} PRIMARY KEY, v text)")
    pair.target.sql(f"CREATE TABLE t (id {there} PRIMARY KEY, v text)")
    pair.source.sql(
        "SET datestyle = 'German'; SET extra_float_digits = -3; SET timezone = 'Asia/Tokyo'; SET array_nulls = off"
    )
    pair.source.sql(f"INSERT INTO t VALUES ({value}, 'v')")
    target = pair.add_target("t")
    assert differences(pair, target) == []
    pair.target.sql(f"INSERT INTO t VALUES ({extra}, 'v')")
    assert [word for word, _ in differences(pair, target)] == ["extra_on_target"]


def test_extra_rows_that_no_key_of_the_source_can_address_are_told(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.target.sql("CREATE TABLE t (id text PRIMARY KEY)")
    pair.source.sql("INSERT INTO t VALUES (7)")
    target = pair.add_target("t")
    pair.target.sql("INSERT INTO t VALUES ('seven'), ('007'), ('8')")
    assert [key for _, key in differences(pair, target)] == ["007", "seven", 8]
    conn = pair.source.connect()
    notices: list[str] = []
    conn.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    assert conn.execute("SELECT tbl_repl.repair_target(%s, true)", [target]).fetchone() == (1,)
    assert any(notice.startswith("2 rows of table public.t") for notice in notices)
    pair.drain()
    assert pair.target.rows("t") == ["(007)", "(7)", "(seven)"]


def test_text_keys_that_sort_differently_on_the_two_sides(pair: Pair) -> None:
    pair.source.sql('CREATE TABLE t (id text COLLATE "C" PRIMARY KEY, v text)')
    collation = pair.target.one(
        "SELECT quote_ident(collname) FROM pg_collation WHERE collprovider = 'i' AND collname = 'en-x-icu'"
    )
    if collation is None:
        pytest.skip("this server has no ICU")
    pair.target.sql(f"CREATE TABLE t (id text COLLATE {collation} PRIMARY KEY, v text)")
    pair.source.sql(
        "INSERT INTO t SELECT chr(c) || i, 'v' FROM unnest('{65,97,66,98,233,36}'::int[]) c, generate_series(1, 400) i"
    )
    target = pair.add_target("t")
    assert differences(pair, target) == []
    pair.target.sql("DELETE FROM t WHERE id IN ('A1', 'é400'); INSERT INTO t VALUES ('a0'), ('Z9'), ('ä')")
    assert differences(pair, target) == [
        ("extra_on_target", "Z9"),
        ("extra_on_target", "a0"),
        ("extra_on_target", "ä"),
        ("missing_on_target", "A1"),
        ("missing_on_target", "é400"),
    ]


@pytest.mark.once
@pytest.mark.parametrize("keys", [["''"], ["''", "'a'"], ["'b'", "''"]])
@pytest.mark.parametrize("key_type", ["text", "label"])
def test_an_empty_key_is_a_key_like_any_other(pair: Pair, key_type: str, keys: list[str]) -> None:
    pair.both(f"CREATE TYPE label AS ENUM ('b', 'a', ''); CREATE TABLE t (id {key_type} PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES " + ", ".join(f"({key}, 'v')" for key in keys))
    pair.source.sql("SET statement_timeout = '5 s'")
    target = pair.add_target("t")
    assert differences(pair, target) == in_pieces(pair, target, piece_rows=1) == []
    pair.target.sql("UPDATE t SET v = 'x' WHERE id = ''")
    assert differences(pair, target) == in_pieces(pair, target, piece_rows=1) == [("different", "")]
    assert repaired(pair, target) == 1
    pair.target.sql("DELETE FROM t")
    assert len(differences(pair, target)) == len(in_pieces(pair, target, piece_rows=1)) == len(keys)
    assert repaired(pair, target) == len(keys)
    pair.source.sql("DELETE FROM t")
    pair.drain()
    pair.target.sql("INSERT INTO t VALUES ('')")
    assert differences(pair, target) == in_pieces(pair, target) == [("extra_on_target", "")]
    assert repaired(pair, target, delete_extra=True) == 1
    assert pair.target.rows("t") == []


@pytest.mark.once
def test_a_name_that_the_target_does_not_know_is_a_difference(pair: Pair) -> None:
    pair.source.sql(
        "CREATE TABLE only_here (); CREATE TABLE t (id integer PRIMARY KEY, r regclass, n integer)"
    )
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, r regclass, n regclass)")
    target = pair.add_target("t", mode="async")
    pair.source.sql(
        "INSERT INTO t VALUES (1, 'pg_class', 1259), (2, 'only_here', 1259), (3, '0', 1), (4, NULL, NULL)"
    )
    pair.drain()
    assert differences(pair, target) == [("missing_on_target", 2)]
    pair.target.sql("INSERT INTO t VALUES (2, 'pg_class', 'pg_class')")
    assert differences(pair, target) == [("different", 2)]
    pair.source.sql("DROP TABLE only_here")
    pair.target.sql("UPDATE t SET r = 'pg_type' WHERE id = 1")
    assert differences(pair, target) == [("different", 1), ("different", 2)]


# Types whose operators the search_path does not lead to, and not by the names that row comparisons use: the extension,
# two values in their order, one that only the target has.
FAR_TYPES = {
    "ltree": ("a.b", "a.c", "a.d"),
    "hstore": ('"a"=>"1"', '"a"=>"2"', '"a"=>"3"'),
    "citext": ("a", "B", "c"),
}


@pytest.mark.once
@pytest.mark.parametrize("key", ["id", "id, n", "n, id"])
@pytest.mark.parametrize("name", FAR_TYPES)
def test_keys_of_types_that_the_search_path_does_not_reach(pair: Pair, name: str, key: str) -> None:
    """On the target in another schema than on the source."""
    one, two, extra = FAR_TYPES[name]
    for node, schema in ((pair.source, "far"), (pair.target, "farther")):
        if not node.one("SELECT count(*) FROM pg_available_extensions WHERE name = %s", [name]):
            pytest.skip(f"this server has no {name}")
        node.admin(
            f"CREATE SCHEMA {schema}; CREATE EXTENSION {name} SCHEMA {schema}; GRANT USAGE ON SCHEMA {schema} TO PUBLIC"
        )
        node.sql(f"CREATE TABLE t (id {schema}.{name}, n integer DEFAULT 1, v text, PRIMARY KEY ({key}))")
    pair.source.sql("INSERT INTO t VALUES (%s, 1, 'v'), (%s, 1, 'v')", [one, two])
    target = pair.add_target("t")
    assert differences(pair, target) == in_pieces(pair, target, piece_rows=1) == []
    facts = pair.source.sql("SELECT is_equal, in_order FROM tbl_repl._compare_rows(%s, NULL, NULL)", [target])
    assert facts == [(True, True)]
    pair.target.sql("INSERT INTO t VALUES (%s, 1, 'v')", [extra])
    pair.target.sql(f"UPDATE t SET v = 'x' WHERE id::text = '{one}'; DELETE FROM t WHERE id::text = '{two}'")
    words = ["different", "extra_on_target", "missing_on_target"]
    assert [word for word, _ in differences(pair, target)] == words
    assert [word for word, _ in in_pieces(pair, target, piece_rows=1)] == words
    assert repaired(pair, target, delete_extra=True) == 3
    assert pair.target.rows("t") == pair.source.rows("t")


def test_a_composite_key_without_any_value_is_a_key_like_any_other(pair: Pair) -> None:
    """IS NULL of a row is true where all its fields are null, and IS NOT NULL false where one is."""
    pair.both("CREATE TYPE spot AS (a integer, b text); CREATE TABLE t (id spot PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES ('(,)', 'v'), ('(1,)', 'v'), ('(1,x)', 'v')")
    target = pair.add_target("t")
    assert differences(pair, target) == in_pieces(pair, target, piece_rows=1) == []
    pair.target.sql("UPDATE t SET v = 'x'")
    expected = [("different", "(,)"), ("different", "(1,)"), ("different", "(1,x)")]
    assert sorted(differences(pair, target)) == sorted(in_pieces(pair, target, piece_rows=1)) == expected
    assert repaired(pair, target) == 3
    pair.source.sql("DELETE FROM t")
    pair.drain()
    pair.target.sql("INSERT INTO t VALUES ('(,)', 'v'), ('(2,)', 'v')")
    assert sorted(differences(pair, target)) == [("extra_on_target", "(,)"), ("extra_on_target", "(2,)")]
    assert repaired(pair, target, delete_extra=True) == 2
    assert pair.target.rows("t") == []


def test_composite_keys_with_odd_values(pair: Pair) -> None:
    pair.both('CREATE TABLE t ("A key" text, d date, v text, PRIMARY KEY (d, "A key"))')
    pair.source.sql("SET datestyle = 'German'")
    for odd in ("it's", 'say "so"', "back\\slash", "new\nline\ttab", "%s $1", "é☃", "", "\x01"):
        pair.source.sql("INSERT INTO t VALUES (%s, '2026-02-01', 'v')", [odd])
    target = pair.add_target("t")
    assert differences(pair, target) == []
    pair.target.sql("UPDATE t SET v = 'x'")
    assert len(differences(pair, target)) == 8
    assert repaired(pair, target) == 8
    assert differences(pair, target) == []
    pair.source.sql("DELETE FROM t")
    pair.target.sql("INSERT INTO t VALUES ('it''s \"\\', '2026-03-04', 'v')")
    assert differences(pair, target) == [("extra_on_target", {"A key": "it's \"\\", "d": "2026-03-04"})]
    assert repaired(pair, target, delete_extra=True) == 1
    assert pair.target.rows("t") == []


def test_partitioned_tables(pair: Pair) -> None:
    pair.both("""
        CREATE TABLE t (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (0) TO (10);
        CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (10) TO (100)
        """)
    pair.source.sql("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 20) i")
    target = pair.add_target("t")
    pair.target.sql(
        "DELETE FROM t WHERE id = 12; UPDATE t_low SET v = 'x' WHERE id = 2; INSERT INTO t VALUES (50)"
    )
    assert differences(pair, target) == [("different", 2), ("extra_on_target", 50), ("missing_on_target", 12)]
    assert repaired(pair, target, delete_extra=True) == 3
    pair.assert_same("t")


def test_operations_that_are_not_replicated_make_no_differences(simple: Pair) -> None:
    target = simple.add_target("t", operations=["insert"])
    spoil(simple)
    assert differences(simple, target) == [("missing_on_target", 3)]
    simple.source.sql("SELECT tbl_repl.alter_target(%s, operations => '{insert,update}')", [target])
    assert differences(simple, target) == [("different", 5), ("different", 7), ("missing_on_target", 3)]
    assert repaired(simple, target, delete_extra=True) == 3
    assert "(99,extra,0.00)" in simple.target.rows("t")


def test_a_guarded_target_can_be_compared_and_repaired(simple: Pair) -> None:
    target = simple.add_target("t")
    spoil(simple)
    simple.target.sql("SELECT tbl_repl.protect('t')")
    assert differences(simple, target) == SPOILED
    assert repaired(simple, target, delete_extra=True) == 4
    simple.assert_same("t")


def test_comparing_writes_nothing_on_either_side(simple: Pair) -> None:
    target = simple.add_target("t")
    spoil(simple)
    before = [(node.rows("t", "xmin::text, xmax::text, *")) for node in simple.nodes]
    queue = simple.source.admin("SELECT * FROM tbl_repl.change")
    differences(simple, target)
    assert [(node.rows("t", "xmin::text, xmax::text, *")) for node in simple.nodes] == before
    assert simple.source.admin("SELECT * FROM tbl_repl.change") == queue


def test_a_row_that_is_being_written_is_not_reported(simple: Pair) -> None:
    """Neither the one that is queued in a transaction in flight, nor the one just shipped."""
    target = simple.add_target("t", mode="sync")
    writer = simple.source.connect()
    with writer.transaction():
        writer.execute("UPDATE t SET v = 'new' WHERE id < 5")
        writer.execute("DELETE FROM t WHERE id = 9")
        assert differences(simple, target) == []
    assert differences(simple, target) == []


def test_a_target_being_copied_is_refused(simple: Pair) -> None:
    target = simple.add_target("t", initial_copy="background")
    with pytest.raises(errors.ObjectNotInPrerequisiteState) as caught:
        differences(simple, target)
    assert caught.value.diag.message_hint
    simple.drain()
    assert differences(simple, target) == []


def test_what_is_missing_on_the_target_is_an_error_with_a_hint(simple: Pair) -> None:
    target = simple.add_target("t")
    simple.target.sql("ALTER TABLE t RENAME v TO w")
    with pytest.raises(errors.UndefinedColumn) as caught:
        differences(simple, target)
    assert "tbl_repl.check()" in str(caught.value.diag.message_hint)
    simple.target.sql("DROP TABLE t")
    with pytest.raises(errors.UndefinedTable):
        differences(simple, target)


def test_comparing_is_for_the_owner_of_the_target(simple: Pair) -> None:
    target = simple.add_target("t")
    role = simple.source.role("stranger")
    simple.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    for call in (f"compare_target({target})", f"repair_target({target})"):
        with pytest.raises(errors.InsufficientPrivilege):
            simple.source.sql(f"SELECT tbl_repl.{call}", user=role)
    with pytest.raises(errors.UndefinedObject):
        differences(simple, 4711)


def test_the_filter_does_not_run_as_who_compares(simple: Pair) -> None:
    """A superuser who compares must not lend his rights to the expressions of a target."""
    simple.source.sql("""
        CREATE TABLE seen (who name);
        CREATE FUNCTION spy(i integer) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN
            IF current_user <> 'owner' THEN
                RAISE EXCEPTION 'run as %', current_user;
            END IF;
            RETURN i > 0;
        END $$
        """)
    target = simple.add_target("t", row_filter="spy(id) AND spy(7)", column_map={"v": "v || spy(8)"})
    simple.target.sql("DELETE FROM t WHERE id = 1; INSERT INTO t VALUES (99)")
    found = simple.source.admin("SELECT difference FROM tbl_repl.compare_target(%s)", [target])
    assert sorted(found) == [("extra_on_target",), ("missing_on_target",)]


def test_a_target_that_is_down_is_an_error_in_time(simple: Pair) -> None:
    target = simple.add_target("t", timeout="1 s")
    proxy = simple.proxy()
    proxy.set("refuse")
    with pytest.raises(errors.OperationalError) as caught:
        simple.source.fresh(f"SELECT * FROM tbl_repl.compare_target({target})")
    assert str(caught.value.diag.sqlstate).startswith("08")


def test_a_target_that_hangs_is_an_error_in_time(simple: Pair) -> None:
    target = simple.add_target("t", timeout="500 ms")
    assert differences(simple, target) == []
    with simple.target.frozen(), pytest.raises(errors.OperationalError):
        differences(simple, target)


def test_case_under_a_collation_that_ignores_it(pair: Pair) -> None:
    """Where 'a' = 'A', an update of one to the other is still one."""
    if not pair.target.one("SELECT count(*) FROM pg_collation WHERE collname = 'en-x-icu'"):
        pytest.skip("this server has no ICU")
    pair.target.admin("""
        CREATE COLLATION public.ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)
        """)
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text COLLATE ci)")
    pair.source.sql("INSERT INTO t VALUES (1, 'a'), (2, 'a')")
    target = pair.add_target("t")
    pair.source.sql("UPDATE t SET v = 'A' WHERE id = 1")
    pair.assert_same("t")
    pair.target.sql("UPDATE t SET v = 'A' WHERE id = 2")
    assert differences(pair, target) == [("different", 2)]
    assert repaired(pair, target) == 1
    pair.assert_same("t")


# --- several sessions at once, as the command line compares


def in_pieces(pair: Pair, target: int, piece_rows: int = 700, jobs: int = 3, **options: Any) -> list[Any]:
    """(difference, key) of every row, and what was queued where it repairs."""
    found: list[Any] = []
    queued = compare.compare(dsn_of(pair.source), target, jobs, piece_rows, on_found=found.extend, **options)
    words = sorted(((row["difference"], next(iter(row["key"].values()))) for row in found), key=str)
    return [*words, queued] if options else words


@pytest.fixture
def even(simple: Pair) -> Pair:
    """Some chunks of rows with even numbers."""
    simple.source.sql(
        "DELETE FROM t; INSERT INTO t SELECT 2 * i, 'v' || i, i FROM generate_series(1, 5000) i"
    )
    return simple


EXTRA = [-1, 1, 1999, 2001, 4001, 9999, 10001, 20000]


@pytest.mark.once
@pytest.mark.parametrize("jobs", [1, 3])
def test_pieces_find_what_the_function_finds(even: Pair, jobs: int) -> None:
    target = even.add_target("t")
    assert in_pieces(even, target, jobs=jobs) == []
    even.target.sql(
        "DELETE FROM t WHERE id IN (2, 2000, 10000); UPDATE t SET v = 'x' WHERE id IN (1400, 1402)"
    )
    even.target.sql("INSERT INTO t SELECT unnest(%s::int[])", [EXTRA])
    expected = sorted(
        [("missing_on_target", i) for i in (2, 2000, 10000)]
        + [("different", i) for i in (1400, 1402)]
        + [("extra_on_target", i) for i in EXTRA],
        key=str,
    )
    assert differences(even, target) == expected
    assert in_pieces(even, target, jobs=jobs) == expected
    assert in_pieces(even, target, repair=True, delete_extra=False)[-1] == 5
    even.drain()
    assert in_pieces(even, target, repair=True, delete_extra=True)[-1] == len(EXTRA)
    even.drain()
    even.assert_same("t")


@pytest.mark.parametrize(("there", "index"), [("text", "id, part"), ("integer", "part, id")])
def test_extra_rows_are_found_where_ranges_mean_something_else_there(
    pair: Pair, there: str, index: str
) -> None:
    """Numbers in a text column sort as text; an index in another order does not help to find a range."""
    pair.source.sql("CREATE TABLE t (id integer, part integer DEFAULT 1, v text, PRIMARY KEY (id, part))")
    pair.target.sql(f"CREATE TABLE t (id {there}, part integer, v text, PRIMARY KEY ({index}))")
    pair.source.sql("INSERT INTO t (id, v) SELECT i, 'v' FROM generate_series(1, 3000) i")
    target = pair.add_target("t")
    assert differences(pair, target) == in_pieces(pair, target) == []
    pair.target.sql("DELETE FROM t WHERE id = '1500'")
    pair.target.sql("INSERT INTO t VALUES ('15', 2), ('99999', 1), ('2500', 7), ('-3', 1)")
    found = {(row[0], row[1]["id"], row[1]["part"]) for row in differences(pair, target)}
    assert found == {
        ("missing_on_target", 1500, 1),
        ("extra_on_target", 15, 2),
        ("extra_on_target", 99999, 1),
        ("extra_on_target", 2500, 7),
        ("extra_on_target", -3, 1),
    }
    assert [word for word, _ in in_pieces(pair, target)] == ["extra_on_target"] * 4 + ["missing_on_target"]


def test_an_extra_row_beside_one_that_goes_meanwhile_is_found(even: Pair) -> None:
    """The piece was divided by a row that is no longer there when its turn comes."""
    target = even.add_target("t")
    even.target.sql("INSERT INTO t VALUES (1001)")
    even.source.sql("DELETE FROM t WHERE id BETWEEN 1000 AND 1002")
    chunks = even.source.sql(
        "SELECT after, upto, is_equal FROM tbl_repl._compare_rows(%s, '2', '1002')", [target]
    )
    assert chunks == [("2", "998", True), ("998", "1002", False)]
    even.target.sql("DELETE FROM t WHERE id = 1001")
    chunks = even.source.sql(
        "SELECT after, upto, is_equal FROM tbl_repl._compare_rows(%s, '2', '1002')", [target]
    )
    assert chunks == [("2", "998", True), ("998", "1002", True)]


def test_ranges_that_follow_on_one_another_are_put_together() -> None:
    assert compare.joined({}) == []
    ranges: dict[str | None, str] = {"c": "d", None: "", "b": "c", "x": "y"}
    assert sorted(compare.joined(ranges), key=str) == [("b", "d"), ("x", "y"), (None, "")]
    assert compare.joined({"": "a", None: ""}) == [(None, "a")]


def test_what_writers_do_meanwhile_is_no_difference(even: Pair) -> None:
    target = even.add_target("t", mode="async")
    stop = threading.Event()
    written: list[int] = []

    def write() -> None:
        with even.source.connect() as connection:
            n = 0
            while not stop.is_set():
                n += 1
                connection.execute("UPDATE t SET v = 'w' || %s WHERE id = %s", (n, n * 34 % 10000 + 2))
                connection.execute("DELETE FROM t WHERE id = %s", (n * 62 % 10000 + 2,))
                connection.execute("INSERT INTO t VALUES (%s, 'new')", (n * 2 - 1,))
                if n % 10 == 0:
                    connection.execute("CALL tbl_repl.drain()")
                written.append(n)

    writer = in_background(write)
    try:
        wait_until(lambda: len(written) > 20)
        before = len(written)
        for _ in range(3):
            assert in_pieces(even, target) == []
        assert len(written) > before
    finally:
        stop.set()
        writer.result(20)


def test_a_target_that_is_being_copied_in_pieces_is_not_compared(even: Pair) -> None:
    target = even.add_target("t", initial_copy="none")
    even.begin_copy(target, 1000)
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="still being copied"):
        differences(even, target)


def test_the_first_failure_of_a_job_ends_all(even: Pair) -> None:
    target = even.add_target("t")
    even.target.sql("ALTER TABLE t RENAME TO gone")
    with pytest.raises(psycopg.Error, match="does not exist"):
        in_pieces(even, target)


@pytest.mark.once
@pytest.mark.parametrize("encodings", [(None, "LATIN1"), ("LATIN1", None)], ids=str)
def test_databases_of_different_encodings(pair: Pair) -> None:
    pair.both('CREATE TABLE "données" ("clé" text PRIMARY KEY, v text)')
    pair.source.sql("INSERT INTO \"données\" SELECT 'é' || g, 'à côté' FROM generate_series(1, 20) g")
    target = pair.add_target('"données"', mode="async")
    pair.drain()
    found: list[dict[str, Any]] = []

    def run(**options: bool) -> int:
        return compare.compare(dsn_of(pair.source), target, 2, 7, on_found=found.extend, **options)

    run()
    assert found == []
    pair.target.sql("UPDATE \"données\" SET v = 'à coté' WHERE \"clé\" = 'é7'")
    pair.target.sql(
        "DELETE FROM \"données\" WHERE \"clé\" = 'é9'; INSERT INTO \"données\" VALUES ('è', 'extra')"
    )
    assert run(repair=True, delete_extra=True) == 3
    assert sorted((row["difference"], row["key"]["clé"]) for row in found) == [
        ("different", "é7"),
        ("extra_on_target", "è"),
        ("missing_on_target", "é9"),
    ]
    pair.drain()
    pair.assert_same('"données"')


@pytest.mark.once
def test_a_piece_may_take_longer_than_statements_of_the_role(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.source.sql(
        "CREATE FUNCTION slow(id integer) RETURNS boolean LANGUAGE plpgsql AS "
        "$$BEGIN PERFORM pg_sleep(0.6); RETURN true; END$$; INSERT INTO t VALUES (1), (2)"
    )
    target = pair.add_target("t", mode="async", row_filter="public.slow(id)", timeout="30 s")
    pair.drain()
    pair.source.admin(f"ALTER ROLE owner IN DATABASE {pair.source.dbname} SET statement_timeout = '1 s'")
    assert compare.compare(dsn_of(pair.source), target) == 0
