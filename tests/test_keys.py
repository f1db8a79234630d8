"""Which columns address a row, and that they do under every name."""

from __future__ import annotations

import psycopg
import pytest

from support import Node, Pair

LONG = "x" * 62  # with one more byte: the longest name there is


def key_of(pair: Pair, target: int) -> tuple[list[str], list[str]]:
    """Key columns on the source and on the target."""
    return pair.source.sql(
        "SELECT s.key_columns::text[], t.dst_keys::text[] FROM tbl_repl.target t JOIN tbl_repl.source s USING (source_id)"
        " WHERE t.target_id = %s",
        [target],
    )[0]


def write_and_compare(pair: Pair, table: str, *writes: str) -> None:
    pair.assert_same(table)
    for write in writes:
        pair.source.sql(write)
        pair.assert_same(table)
    assert pair.source.one("SELECT count(*) FROM tbl_repl.target_status WHERE status <> 'ok'") == 0


def test_composite_key_comes_in_index_order_without_included_columns(pair: Pair) -> None:
    pair.both("CREATE TABLE t (a integer, b text, c date, v text, PRIMARY KEY (c, a, b) INCLUDE (v))")
    pair.source.sql(
        "INSERT INTO t SELECT i % 3, 'b' || i % 5, '2024-01-01'::date + i, 'v' FROM generate_series(1, 20) i"
    )
    target = pair.add_target("t")
    assert key_of(pair, target) == (["c", "a", "b"], ["c", "a", "b"])
    write_and_compare(
        pair,
        "t",
        "UPDATE t SET v = 'w' WHERE a = 1",
        "UPDATE t SET a = a + 10, b = b || '''\"' WHERE a = 2",
        "DELETE FROM t WHERE b LIKE 'b1%'",
        "UPDATE t SET b = E'\\\\ {,} \"x\" \\n' WHERE a = 0",
        "UPDATE t SET v = NULL WHERE a = 0",
        "DELETE FROM t WHERE a = 0",
    )


def test_key_columns_name_a_unique_index_in_any_order(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, a integer NOT NULL, b integer NOT NULL, v text)")
    pair.both("CREATE UNIQUE INDEX ON t (b, a) INCLUDE (v)")
    target = pair.add_target("t", key_columns=["a", "b"])
    assert key_of(pair, target)[0] == ["b", "a"]
    pair.source.sql("INSERT INTO t SELECT i, i, -i, 'v' FROM generate_series(1, 5) i")
    write_and_compare(
        pair, "t", "UPDATE t SET v = 'w', id = id + 10", "UPDATE t SET a = a + 1", "DELETE FROM t WHERE a < 4"
    )


def test_one_table_by_two_keys(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY, code text NOT NULL UNIQUE, v text)")
    pair.target.sql(
        "CREATE TABLE by_id (id integer PRIMARY KEY, v text); CREATE TABLE by_code (code text PRIMARY KEY, v text)"
    )
    pair.add_target("t", dst_table="by_id", columns=["id", "v"])
    pair.add_target("t", dst_table="by_code", columns=["code", "v"], key_columns=["code"])
    pair.source.sql("INSERT INTO t SELECT i, 'c' || i, 'v' FROM generate_series(1, 5) i")
    pair.source.sql(
        "UPDATE t SET code = code || 'x' WHERE id < 3; UPDATE t SET id = id + 10; DELETE FROM t WHERE id = 15"
    )
    assert pair.target.sql("SELECT id FROM by_id ORDER BY id") == [(11,), (12,), (13,), (14,)]
    assert pair.target.sql("SELECT code FROM by_code ORDER BY code") == [("c1x",), ("c2x",), ("c3",), ("c4",)]
    pair.source.sql("TRUNCATE t")
    assert pair.target.rows("by_id") == pair.target.rows("by_code") == []


def test_a_not_null_that_is_not_valid_makes_no_key(pair: Pair) -> None:
    """There may be rows without a value, which comparing would look for again and again."""
    if pair.major < 18:
        pytest.skip("new in 18")
    pair.both("CREATE TABLE t (id integer, u integer UNIQUE, v text)")
    pair.source.sql("INSERT INTO t VALUES (1, NULL, 'x'), (2, 2, 'y')")
    pair.source.sql("ALTER TABLE t ADD CONSTRAINT u_not_null NOT NULL u NOT VALID")
    with pytest.raises(psycopg.errors.InvalidTableDefinition) as caught:
        pair.add_target("t", key_columns=["u"])
    assert "NOT VALID" in str(caught.value.diag.message_hint)
    pair.source.sql("UPDATE t SET u = 1 WHERE id = 1; ALTER TABLE t VALIDATE CONSTRAINT u_not_null")
    target = pair.add_target("t", key_columns=["u"])
    assert key_of(pair, target)[0] == ["u"]
    pair.assert_same("t")


@pytest.mark.once
@pytest.mark.parametrize(
    ("ddl", "key_columns"),
    [
        ("CREATE TABLE t (id integer)", None),
        ("CREATE TABLE t (id integer UNIQUE)", None),
        ("CREATE TABLE t (id integer UNIQUE)", ["id"]),  # may be null
        ("CREATE TABLE t (id integer NOT NULL)", ["id"]),
        ("CREATE TABLE t (id integer PRIMARY KEY, b integer NOT NULL)", ["id", "b"]),
        (
            "CREATE TABLE t (id integer PRIMARY KEY, b integer NOT NULL); CREATE UNIQUE INDEX ON t (b) WHERE id > 0",
            ["b"],
        ),
        (
            "CREATE TABLE t (id integer PRIMARY KEY, b integer NOT NULL); CREATE UNIQUE INDEX ON t ((b + 1))",
            ["b"],
        ),
        ("CREATE TABLE t (id integer PRIMARY KEY, b integer NOT NULL UNIQUE)", []),
        ("CREATE TABLE t (a int4range, b daterange, PRIMARY KEY (a, b WITHOUT OVERLAPS))", None),
    ],
)
def test_no_usable_key_is_refused(pair: Pair, ddl: str, key_columns: list[str] | None) -> None:
    if "OVERLAPS" in ddl and pair.major < 18:
        pytest.skip("new in 18")
    pair.both(ddl)
    with pytest.raises(psycopg.errors.InvalidTableDefinition) as error:
        pair.add_target("t", key_columns=key_columns)
    assert error.value.diag.message_hint
    assert ("WITHOUT OVERLAPS" in str(error.value)) == ("OVERLAPS" in ddl)
    assert "on the target" not in str(error.value)


def test_target_needs_a_unique_index_on_the_key(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (a integer, b integer, PRIMARY KEY (a, b))")
    for ddl in (
        "CREATE TABLE t (a integer, b integer)",
        "CREATE TABLE t (a integer PRIMARY KEY, b integer)",
        "CREATE TABLE t (a integer, b integer, c integer DEFAULT 0, PRIMARY KEY (a, b, c))",
        "CREATE TABLE t (a integer, b integer, UNIQUE (a, b) DEFERRABLE)",
        "CREATE TABLE t (a integer, b integer); CREATE UNIQUE INDEX ON t (a, b) WHERE a > 0",
    ):
        pair.target.sql(f"DROP TABLE IF EXISTS t; {ddl}")
        with pytest.raises(psycopg.errors.InvalidTableDefinition, match=r"unique index on \(a, b\)") as error:
            pair.add_target("t")
        assert "CREATE UNIQUE INDEX" in (error.value.diag.message_hint or "")
    pair.target.sql("DROP TABLE t; CREATE TABLE t (b integer, a integer); CREATE UNIQUE INDEX ON t (b, a)")
    pair.add_target("t")
    pair.source.sql("INSERT INTO t VALUES (1, 2), (3, 4); DELETE FROM t WHERE a = 1")
    assert pair.target.sql("SELECT a, b FROM t") == [(3, 4)]


ODD_NAMES = [
    "with space",
    'quo"te',
    "apo'strophe",
    "back\\slash",
    "percent%s%I%L%1$s",
    "dollar$1$$body$$",
    "new\nline",
    "Ж漢🙂",
    "select",
    "MixedCase",
    "tbl_repl_key",
    "tbl_repl_after",
    "tbl_repl_count",
    "u",
    "keys",
    "changed",
    "former",
    "{op} {keys} {rows} {into}",
    "s",
    "d",
    "excluded",
    "found",
    "deletes",
    LONG + "y",
    "é" * 31,
]


@pytest.mark.parametrize("kind", ["ordinary", "partitioned"])
def test_odd_names_of_schema_table_and_columns(pair: Pair, kind: str) -> None:
    """Each name is schema, table, key column and value column at once; with filter, map and TRUNCATE."""
    failed = {}
    for name in ODD_NAMES:
        quoted = '"' + name.replace('"', '""') + '"'
        table = f"{quoted}.{quoted}"
        other = '"' + name[:15].replace('"', '""') + ' 2"'
        partition = f"PARTITION BY LIST ({quoted})" if kind == "partitioned" else ""
        pair.both(f"CREATE SCHEMA {quoted}")
        pair.source.sql(
            f"CREATE TABLE {table} ({quoted} text, {other} integer, PRIMARY KEY ({quoted}, {other})) {partition}"
        )
        if partition:
            pair.source.sql(f"CREATE TABLE {quoted}.p PARTITION OF {table} DEFAULT")
        pair.target.sql(
            f"CREATE TABLE {table} ({quoted} text, {other} integer, PRIMARY KEY ({quoted}, {other}))"
        )
        try:
            target = pair.add_target(table, row_filter=f"{quoted} <> 'no' AND {other} > 0")
            for write in (
                f"INSERT INTO {table} VALUES ('a', 1), ('b', 2), ('no', 3)",
                f"UPDATE {table} SET {other} = {other} + 1",
                f"UPDATE {table} SET {quoted} = '$1 %s \\ '' \"' WHERE {quoted} = 'a'",
                f"DELETE FROM {table} WHERE {quoted} = 'b'",
                f"TRUNCATE {table}",
                f"INSERT INTO {table} VALUES ('c', 1), ('d', 1)",
            ):
                pair.source.sql(write)
                pair.assert_same(table, where=f"{quoted} <> 'no'")
            assert pair.status(target) == "ok"
        except Exception as error:
            failed[name] = repr(error)
    assert failed == {}


def test_single_text_key_under_odd_names(pair: Pair) -> None:
    for name in ODD_NAMES:
        quoted = '"' + name.replace('"', '""') + '"'
        pair.both(f"CREATE TABLE {quoted} ({quoted} text PRIMARY KEY)")
        pair.add_target(quoted)
        pair.source.sql(f"INSERT INTO {quoted} VALUES ('a'), ('b'), ('c'), ('%s''$$\\')")
        pair.source.sql(f"DELETE FROM {quoted} WHERE {quoted} IN ('a', 'b')")
        pair.source.sql(f"DELETE FROM {quoted} WHERE {quoted} = 'c'")
        assert pair.target.sql(f"TABLE {quoted}") == [("%s'$$\\",)]


def test_names_that_are_equal_when_cut(pair: Pair) -> None:
    """63 bytes of table and server name are the same; so are they after a prefix of ours."""
    names = [LONG + "a", LONG + "b"]
    for name in names:
        pair.both(f'CREATE TABLE "{name}" (id integer PRIMARY KEY, "{LONG}1" text, "{LONG}2" text)')
        server = pair.join(pair.source, pair.target, f'"server{name[8:]}"')
        pair.add_target(f'"{name}"', server=server.strip('"'))
    for name in names:
        pair.source.sql(f"""INSERT INTO "{name}" VALUES (1, '{name[-1]}', 'x')""")
        pair.source.sql(f"""UPDATE "{name}" SET "{LONG}2" = 'y'""")
    for name in names:
        pair.assert_same(f'"{name}"')
        assert pair.target.one(f'SELECT "{LONG}1" FROM "{name}"') == name[-1]


def test_dropped_columns_and_any_order(pair: Pair) -> None:
    pair.source.sql(
        "CREATE TABLE t (gone1 integer, a text, id2 integer, gone2 text, id1 integer, b text, PRIMARY KEY (id1, id2));"
        "ALTER TABLE t DROP COLUMN gone1, DROP COLUMN gone2"
    )
    pair.target.sql(
        "CREATE TABLE t (b text, gone integer, id1 integer, a text, id2 integer, PRIMARY KEY (id2, id1)); ALTER TABLE t DROP gone"
    )
    pair.add_target("t")
    pair.source.sql(
        "INSERT INTO t VALUES ('a', 2, 1, 'b'), ('c', 4, 3, 'd'); UPDATE t SET a = 'x' WHERE id2 = 4"
    )
    assert pair.target.sql("SELECT id1, id2, a, b FROM t ORDER BY 1") == [(1, 2, "a", "b"), (3, 4, "x", "d")]
    pair.source.sql("ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN c text DEFAULT 'new'")
    pair.target.sql("ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN c text DEFAULT 'new'")
    pair.source.sql("DO $$BEGIN PERFORM tbl_repl.alter_target(target_id) FROM tbl_repl.target_status; END$$")
    pair.source.sql("UPDATE t SET c = 'c'; DELETE FROM t WHERE id1 = 1")
    assert pair.target.sql("SELECT id1, id2, a, c FROM t") == [(3, 4, "x", "c")]


def test_deferrable_key_of_the_source(pair: Pair) -> None:
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v text)")
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 5) i")
    pair.add_target("t")
    write_and_compare(pair, "t", "UPDATE t SET id = 6 - id", "UPDATE t SET id = id + 1",
                      "INSERT INTO t VALUES (2, 'twice'); DELETE FROM t WHERE v = 'v5'")  # fmt: skip


CITEXT = "citext"
FUZZY = "text COLLATE fuzzy"


@pytest.mark.once
@pytest.mark.parametrize(
    ("here", "there"),
    [
        (CITEXT, "text"),
        ("text", CITEXT),
        ("numeric", "text"),
        ("text", "numeric"),
        (FUZZY, "text"),
        ("text", FUZZY),
        ("text", "char(5)"),
        ("text", "uuid"),
        ("text", "name"),
        ("timestamp", "date"),
        ("real", "numeric"),
        ("interval", "text"),
        ("nested", "text"),
    ],
)
def test_a_key_that_is_compared_otherwise_there_is_refused(pair: Pair, here: str, there: str) -> None:
    prepare_types(pair, here, there)
    pair.source.sql(f"CREATE TABLE t (part integer, id {here}, v text, PRIMARY KEY (part, id))")
    pair.target.sql(f"CREATE TABLE t (part integer, code {there}, v text, PRIMARY KEY (part, code))")
    with pytest.raises(psycopg.errors.InvalidTableDefinition) as error:
        pair.add_target("t", column_map={"code": "id"}, columns=["part", "v"])
    assert "key column id" in str(error.value)
    assert error.value.diag.message_detail
    assert "key_columns" in (error.value.diag.message_hint or "")


def prepare_types(pair: Pair, *used: str) -> None:
    for node in pair.nodes:
        node.admin("CREATE EXTENSION citext")
    if FUZZY in used:
        if not pair.source.one("SELECT count(*) FROM pg_collation WHERE collname = 'en-x-icu'"):
            pytest.skip("this server has no ICU")
        pair.both(
            "CREATE COLLATION fuzzy (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
        )
    pair.both(
        "CREATE DOMAIN small AS numeric(5, 2); CREATE DOMAIN nested AS small; CREATE TYPE mood AS ENUM ('sad', 'ok')"
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("here", "there", "first", "second"),
    [
        (CITEXT, CITEXT, "a", "A"),
        (FUZZY, FUZZY, "a", "A"),
        ("nested", "numeric", "1.0", "1.00"),
        ("numeric", "nested", "1", "2"),
        ("char(3)", "char(5)", "a", "b"),
        ("smallint", "bigint", "1", "2"),
        ("bigint", "numeric", "1", "2"),
        ("numeric", "integer", "1", "2"),
        ("integer", "text", "1", "2"),
        ("varchar(5)", "text", "a", "A"),
        ("char(3)", "text", "a ", "b"),
        ("inet", "text", "10.0.0.1", "10.0.0.1/24"),
        ("name", "text", "a", "A"),
        ("uuid", "text", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("mood", "text", "sad", "ok"),
        ("text", "mood", "sad", "ok"),
        ("bytea", "text", "a", "b"),
        ("boolean", "text", "true", "false"),
        ("date", "timestamptz", "2024-12-11", "2024-12-12"),
        ("real", "real", "0", "-0"),
    ],
)
def test_a_key_of_another_type_that_is_compared_alike(
    pair: Pair, here: str, there: str, first: str, second: str
) -> None:
    prepare_types(pair, here, there)
    pair.source.sql(f"CREATE TABLE t (id {here} PRIMARY KEY, v text)")
    pair.target.sql(f"CREATE TABLE t (id {there} PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES (%s, 'a')", [first])
    target = pair.add_target("t")
    pair.source.sql("UPDATE t SET id = %s", [second])
    assert (pair.status(target), pair.target.one("SELECT count(*) FROM t")) == ("ok", 1)
    assert pair.source.sql("SELECT * FROM tbl_repl.compare_target(%s)", [target]) == []
    pair.source.sql("DELETE FROM t")
    assert pair.target.rows("t") == []


def test_alter_target_refuses_a_key_that_is_compared_otherwise(pair: Pair) -> None:
    prepare_types(pair)
    pair.both("CREATE TABLE t (id text PRIMARY KEY, v text)")
    pair.target.sql("CREATE TABLE u (id citext PRIMARY KEY, v text)")
    target = pair.add_target("t")
    with pytest.raises(psycopg.errors.InvalidTableDefinition):
        pair.call("alter_target", target_id=target, dst_table="u")


def test_keys_are_ordered_by_the_default_operators_of_their_type(node: Node) -> None:
    """Pages are read by ORDER BY, and go on after the last key: both must mean the same order."""
    node.sql("CREATE TABLE t (id text NOT NULL); CREATE UNIQUE INDEX ON t (id text_pattern_ops)")
    assert node.sql("SELECT equals, greater FROM tbl_repl._key_parts('t', '{id}')") == [
        ("OPERATOR(pg_catalog.=)", "OPERATOR(pg_catalog.>)")
    ]


def test_a_typed_key_means_the_same_in_every_session(node: Node) -> None:
    node.sql("CREATE TABLE t (id text[] PRIMARY KEY); SET array_nulls = off")
    assert node.one("""SELECT tbl_repl._key_from_json('t', '{id}', '{"id": "{NULL}"}')""") == "{NULL}"


def test_a_key_looks_the_same_by_itself_and_among_many(pair: Pair) -> None:
    """There are two ways to show one: for a single key, and as an expression over the keys of a table."""
    pair.source.sql(
        'CREATE TABLE one (id integer PRIMARY KEY); CREATE TABLE two ("k y" text, n bigint, u uuid, PRIMARY KEY ("k y", n, u))'
    )
    keys = {"one": ["1", "-7", "007", "x", None], "two": ['["a", "5", "u"]', '["", "b", null]', None]}
    for table, names in (("one", ["id"]), ("two", ["k y", "n", "u"])):
        expression = pair.source.one(
            "SELECT tbl_repl._key_json_sql(%s::regclass, %s::name[])", [table, names]
        )
        found = pair.source.sql(
            f"SELECT tbl_repl._key_json(%s::regclass, %s::name[], k.key), {expression.replace('%', '%%')}"
            " FROM unnest(%s::text[]) AS k (key)",
            [table, names, keys[table]],
        )
        assert [single for single, _ in found] == [among for _, among in found]
        assert found[-1] == (None, None) and found[0][0]
