"""Every type arrives as it is, whatever the session of the writer has set."""

from __future__ import annotations

import psycopg
import pytest

from support import Node, Pair

# What could change the text form of a value, set as no one would.
HOSTILE = {
    "datestyle": "'SQL, DMY'",
    "intervalstyle": "'sql_standard'",
    "bytea_output": "'escape'",
    "extra_float_digits": "-15",
    "timezone": "'Asia/Kathmandu'",
    "xmlbinary": "'hex'",
    "xmloption": "'document'",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "backslash_quote": "on",
    "array_nulls": "off",
    "lc_monetary": "'C.UTF-8'",
    "quote_all_identifiers": "on",
    "search_path": "'hostile', 'pg_temp'",
    "enable_seqscan": "off",
    "transform_null_equals": "on",
    "row_security": "off",
}

PREPARE = """
    CREATE TYPE mood AS ENUM ('sad', 'it''s ok', '{', '"', ',', '\\');
    CREATE TYPE pair_of AS (a integer, b text, c date[]);
    CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
    CREATE DOMAIN tags AS text[] CHECK (cardinality(VALUE) < 10);
    CREATE DOMAIN code AS char(3);
"""

VALUES: dict[str, list[str]] = {
    "smallint": ["-32768", "32767"],
    "bigint": ["-9223372036854775808"],
    "boolean": ["true", "false"],
    "real": ["'NaN'", "'-Infinity'", "1.17549435e-38", "0.1", "-0.0", "16777217"],
    "double precision": ["'NaN'", "'Infinity'", "1e-300", "0.1 + 0.2::float8", "'-0'", "1.7976931348623157e308", "5e-324"],
    "numeric": ["'NaN'", "1.00", "1e-300", "-0.000", "'Infinity'", "12345678901234567890.123456789"],
    "numeric(10,2)": ["1.005"],
    "money": ["1234567.89", "-0.01"],
    "text": ["''", "'NULL'", "E'a\\nb\\tc'", "E'back\\\\slash'", "'it''s \"q\" $1 $$ %s %I'", "'ж漢🙂'", "repeat('x', 100000)"],
    "varchar(5)": ["'a    '"],
    "char(5)": ["'a'", "'  a'", "''"],
    '"char"': ["'x'", "''"],
    "name": ["'a name'"],
    "bytea": ["E'\\\\x00ff5c27'", "''", "decode('6120276227', 'hex')"],
    "date": ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'2024-12-11'", "'5874897-12-31'"],
    "time": ["'24:00:00'", "'01:02:03.456789'"],
    "timetz": ["'01:02:03+05:45'", "'00:00-15:59'"],
    "timestamp": ["'infinity'", "'2024-12-11 10:09:08.070605'", "'0001-01-01 BC'"],
    "timestamptz": ["'-infinity'", "'2024-10-27 02:30:00+01'", "'4713-01-01 BC'", "'2024-01-02 03:04:05.000001 Asia/Kathmandu'"],
    "interval": ["'-1 year 2 mons -3 days 04:05:06.789'", "'-1 day +02:03'", "'-3 days -04:05:06'", "'1 mon -1 day'", "'0'"],
    "uuid": ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"],
    "bit(5)": ["B'10101'"],
    "bit varying": ["B''", "B'0001'"],
    "inet": ["'192.168.1.5/24'", "'::1'", "'10.0.0.1'"],
    "cidr": ["'10.1.0.0/16'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "macaddr8": ["'08:00:2b:01:02:03:04:05'"],
    "json": ["'{\"a\":1, \"a\" :2}'", "'null'", "'\"x\\u0041\"'"],
    "jsonb": ["'{\"a\":1,\"b\":[null,\"\\\\\\\\\"]}'", "'null'", "'1.10'"],
    "xml": ["'<a b=\"c\">d &amp; e</a>'", "'text <b/> more'"],
    "tsvector": ["'a:1A fat:2B,4C cat''s:5'", "'''quoted ''''word'':1'"],
    "tsquery": ["'fat & (rat | !cat:*)'"],
    "point": ["'(1.1,-2e-300)'"],
    "box": ["'(2,2),(0,0)'"],
    "polygon": ["'((0,0),(1,1e15),(2,0))'"],
    "circle": ["'<(1,2),3>'"],
    "int4range": ["'[1,5)'", "'empty'", "'(,)'"],
    "numrange": ["'[1.50,]'"],
    "tstzrange": ["'[2024-01-01 00:00+00,infinity)'", "'(-infinity,2024-01-01 BC]'"],
    "daterange": ["'[2024-12-11,2024-12-13)'"],
    "datemultirange": ["'{[2024-12-11,2024-12-13),[2025-01-01,)}'", "'{}'"],
    "integer[]": ["'{}'", "'{1,NULL,3}'", "'[0:1][-1:0]={{1,2},{3,4}}'"],
    "text[]": ["'{NULL,\"NULL\",\"\",\"a,b\",\"{}\",\"\\\"\",\"\\\\\"}'", "ARRAY[E'\\n', '''']"],
    "timestamptz[]": ["'{2024-10-27 02:30:00+01,infinity}'"],
    "float8[]": ["'{0.1,NaN,1e-300}'"],
    "bytea[]": ["ARRAY[decode('00ff', 'hex'), '']"],
    "interval[]": ["'{-1 day +02:03,NULL}'"],
    "mood": ["'it''s ok'", "'\"'", "'{'", "E'\\\\'"],
    "mood[]": ["ARRAY['{', '\"', ',', NULL, E'\\\\']::mood[]"],
    "pair_of": ["ROW(1, 'a\"b, (c)', '{2024-12-11}')", "ROW(NULL, '', NULL)", "ROW(NULL, NULL, NULL)"],
    "pair_of[]": ["ARRAY[ROW(1, '''', '{}')::pair_of, NULL]"],
    "positive": ["1"],
    "tags": ["'{a,NULL,\"c d\"}'"],
    "code": ["'ab'"],
    "pg_lsn": ["'16/B374D848'"],
    "pg_snapshot": ["'10:20:10,14'"],
    "xid8": ["'18446744073709551615'"],
    "oid": ["4294967295"],
    "regclass": ["'pg_catalog.pg_class'"],
    "regtype": ["'timestamp with time zone'"],
    "jsonpath": ["'$.a[*] ? (@ > 1)'"],
}  # fmt: skip


def values_of(node: Node) -> dict[str, list[str]]:
    """VALUES that this server knows: some are built without libxml."""
    try:
        node.sql("SELECT xml '<a/>'")
    except psycopg.errors.FeatureNotSupported:
        return {kind: values for kind, values in VALUES.items() if kind != "xml"}
    return VALUES


def hostile(node: Node) -> psycopg.Connection:
    """A session of the owner in which nothing is as expected."""
    conn = node.connect()
    for name, value in HOSTILE.items():
        conn.execute(f"SET {name} = {value}")
    return conn


def text_of(node: Node, table: str) -> list[tuple[str, str]]:
    return node.sql(
        "SET datestyle = ISO; SET intervalstyle = postgres; SET extra_float_digits = 3; SET timezone = UTC;"
        f'SET bytea_output = hex; SELECT id::text, t::text FROM {table} t ORDER BY id::text COLLATE "C"'
    )


def test_every_type_arrives_from_a_hostile_session(pair: Pair) -> None:
    pair.both(PREPARE)
    known = values_of(pair.source)
    columns = ", ".join(f'"c {i}" {kind}' for i, kind in enumerate(known))
    pair.both(f"CREATE TABLE t (id integer PRIMARY KEY, {columns})")
    direct = pair.add_target("t")
    pair.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    pair.add_target("t", dst_table="u", mode="async")
    pair.source.sql("CREATE TABLE stage (LIKE t)")
    longest = max(map(len, known.values()))
    for n in range(longest):
        values = ", ".join(f"({v[n] if n < len(v) else 'NULL'})::{k}" for k, v in known.items())
        pair.source.sql(f"INSERT INTO stage VALUES ({n}, {values})")
    conn = hostile(pair.source)
    for n in range(longest):
        conn.execute(f"INSERT INTO public.t SELECT * FROM public.stage WHERE id = {n}")
    assert text_of(pair.target, "t") == text_of(pair.source, "t")
    assert len(text_of(pair.target, "t")) == longest
    conn.execute("UPDATE public.t SET id = id + 100")
    assert text_of(pair.target, "t") == text_of(pair.source, "t")
    assert pair.status(direct) == "ok"
    with pair.source.connect() as drainer:
        for name, value in HOSTILE.items():
            drainer.execute(f"SET {name} = {value}")
        drainer.execute("CALL tbl_repl.drain()")
    assert text_of(pair.target, "u") == text_of(pair.source, "t")
    assert pair.source.one("SELECT count(*) FROM tbl_repl.error_log") == 0


@pytest.mark.plain_target
def test_settings_of_the_target_change_no_value(pair: Pair) -> None:
    """The role that writes there has hostile settings of its own."""
    pair.both(PREPARE)
    known = values_of(pair.source)
    columns = ", ".join(f'"c {i}" {kind}' for i, kind in enumerate(known))
    pair.both(f"CREATE TABLE t (id integer PRIMARY KEY, {columns})")
    for name, value in HOSTILE.items():
        if name != "search_path":
            pair.target.sql(
                f"ALTER ROLE owner IN DATABASE {pair.target.dbname} SET {name} = {value}", user="postgres"
            )
    pair.add_target("t")
    for n in range(max(map(len, known.values()))):
        values = ", ".join(f"({v[n] if n < len(v) else 'NULL'})::{k}" for k, v in known.items())
        pair.source.sql(f"INSERT INTO t VALUES ({n}, {values})")
    there = pair.target.connect("postgres")
    query = "SELECT t::text FROM t ORDER BY id"
    settings = "SET datestyle = ISO; SET intervalstyle = postgres; SET timezone = UTC; SET bytea_output = hex; SET lc_monetary = 'C'"
    there.execute(settings)
    pair.source.sql(settings)
    assert there.execute(query).fetchall() == pair.source.sql(query)


@pytest.mark.parametrize(
    "setting", ["client_encoding = 'GBK'", "client_encoding = 'SJIS'", "backslash_quote = off"]
)
def test_sessions_that_take_no_escaped_quote_may_write(pair: Pair, setting: str) -> None:
    r"""In a client's encoding where \ can be part of a character, PostgreSQL refuses \' in literals."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target_id = pair.add_target("t", mode="sync")
    conn = pair.source.connect()
    conn.execute(f"SET {setting}")
    conn.execute("INSERT INTO t VALUES (1, E'\\\\ ''\u6f22'), (2, 'b')")
    pair.assert_same("t")
    conn.execute("SELECT tbl_repl.pause_target(%s)", [target_id])
    conn.execute("UPDATE t SET v = v || E'\\\\'")
    conn.execute("SELECT tbl_repl.resume_target(%s)", [target_id])
    conn.execute("CALL tbl_repl.drain()")
    pair.assert_same("t")
    assert conn.execute("SELECT * FROM tbl_repl.compare_target(%s)", [target_id]).fetchall() == []
    assert [
        row for row in conn.execute("SELECT * FROM tbl_repl.check()").fetchall() if row[1] == "error"
    ] == []


KEYS = {
    "date": ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'2024-12-11'", "'2024-11-12'"],
    "timestamptz": ["'infinity'", "'2024-10-27 02:30:00+01'", "'2024-10-27 02:30:00+02'", "'0001-01-01 BC'"],
    "timestamp": ["'2024-12-11 10:09:08.070605'", "'2024-11-12 10:09:08.070605'"],
    "interval": ["'1 day -02:03'", "'-1 year 2 mons'"],
    "bytea": ["decode('00ff5c27', 'hex')", "decode('', 'hex')", "decode('6127', 'hex')"],
    "numeric": ["1.0", "1e-300", "'NaN'", "0", "-12345678901234567890.5"],
    "float8": ["0.1 + 0.2::float8", "0.3", "'NaN'", "1e-300", "'-0'", "'Infinity'"],
    "real": ["0.1", "1.17549435e-38"],
    "uuid": ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", "gen_random_uuid()"],
    "text": ["''", "'NULL'", "E'a\\nb'", "E'\\\\'", "''''", "'\"{,}'", "'$1 $$ %s %L'", "' a '", "'ж漢🙂'"],
    "char(5)": ["'a'", "'  a'", "''"],
    "varchar(3)": ["'a'", "'a '"],
    '"char"': ["'a'", "'b'"],
    "boolean": ["true", "false"],
    "mood": ["'it''s ok'", "'{'", "'\"'", "','"],
    "positive": ["1", "2"],
    "code": ["'a'", "'abc'"],
    "inet": ["'192.168.1.5/24'", "'::1'"],
    "bit(5)": ["B'10101'", "B'00000'"],
    "money": ["1234.56", "-0.01"],
    "regclass": ["'pg_class'", "'pg_type'", "'pg_proc'"],
    "regtype": ["'integer'", "'timestamp with time zone'", "'integer[]'"],
    "jsonb": ["'{\"a\": \"''\"}'", "'null'", "'1.10'"],
    "int4range": ["'[1,5)'", "'empty'"],
    "tstzrange": ["'[2024-01-01 00:00+00,infinity)'"],
    "integer[]": ["'{1,NULL}'", "'{}'", "'[0:1]={1,2}'"],
    "text[]": ["'{NULL,\"NULL\",\"a,b\",\"\\\"\"}'", "'{}'"],
    "tags": ["'{a}'", "'{\"b c\"}'"],
    "pair_of": ["ROW(1, 'a\"b, (c)', '{2024-12-11}')"],
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("composite", [False, True], ids=["single", "composite"])
@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_every_type_of_key_is_found_again(pair: Pair, composite: bool, mode: str) -> None:
    """Insert, update, change of the rest of the key and delete, each seen by key on the target."""
    pair.both(PREPARE)
    conn = hostile(pair.source)
    conn.execute("SET search_path = public")
    tables = []
    for number, (kind, values) in enumerate(KEYS.items()):
        table = f"k{number}"
        tables.append((table, kind))
        key = "id, part" if composite else "id"
        pair.both(
            f"CREATE TABLE {table} (part integer NOT NULL DEFAULT 7, id {kind}, v text, PRIMARY KEY ({key}))"
        )
        pair.add_target(table, mode=mode, initial_copy="none")
        rows = ", ".join(f"({n}, ({value})::{kind})" for n, value in enumerate(values))
        pair.source.sql(f"CREATE TABLE s_{table} (n integer, id {kind}); INSERT INTO s_{table} VALUES {rows}")
        conn.execute(f"INSERT INTO {table} (id, v) SELECT id, 'a' FROM s_{table}")
    pair.drain()
    different = {}

    def compare(step: str) -> None:
        pair.drain()
        for table, kind in tables:
            if pair.target.rows(table) != pair.source.rows(table):
                different[step, kind] = (pair.source.rows(table), pair.target.rows(table))

    compare("insert")
    for table, _ in tables:
        conn.execute(f"UPDATE {table} SET v = 'b'")
    compare("update")
    for table, _ in tables:
        conn.execute(f"UPDATE {table} SET v = 'one' WHERE id = (SELECT id FROM s_{table} WHERE n = 0)")
    compare("update of one")
    for table, _ in tables:
        conn.execute(f"DELETE FROM {table} WHERE id = (SELECT id FROM s_{table} WHERE n = 0)")
    compare("delete of one")
    for table, _ in tables:
        conn.execute(f"DELETE FROM {table}")
    compare("delete")
    assert different == {}
    assert pair.source.one("SELECT count(*) FROM tbl_repl.error_log") == 0
    assert pair.source.one("SELECT count(*) FROM tbl_repl.target_status WHERE status <> 'ok'") == 0


def test_equal_keys_that_look_different(pair: Pair) -> None:
    """1.0 and 1.00 are one key, and so are 0 and -0; what is sent is the row's own form."""
    pair.both(
        "CREATE TABLE n (id numeric PRIMARY KEY, v text); CREATE TABLE f (id float8 PRIMARY KEY, v text)"
    )
    for table in "nf":
        pair.add_target(table)
    pair.source.sql("INSERT INTO n VALUES (1.0, 'a'); INSERT INTO f VALUES (0, 'a')")
    pair.source.sql("UPDATE n SET id = 1.00; UPDATE f SET id = '-0'")
    assert pair.target.sql("SELECT id::text FROM n UNION ALL SELECT id::text FROM f") == [("1.00",), ("-0",)]
    pair.source.sql("UPDATE n SET v = 'b'; DELETE FROM f WHERE id = 0")
    for table in "nf":
        pair.assert_same(table)


def test_citext_key_is_compared_as_its_type_does(pair: Pair) -> None:
    for node in pair.nodes:
        node.admin("CREATE EXTENSION citext")
    pair.both("CREATE TABLE c (id citext PRIMARY KEY, v citext, n integer)")
    pair.source.sql(
        "INSERT INTO c SELECT chr(97 + i % 26 - 32 * (i % 2)) || i / 26, 'V', i FROM generate_series(0, 259) i"
    )
    background = pair.add_target("c", initial_copy="background")
    while pair.source.one("SELECT tbl_repl.replay(max_rows => 7)"):
        pass
    pair.assert_same("c")
    assert pair.status(background) == "ok"
    pair.source.sql("UPDATE c SET id = lower(id), v = lower(v) WHERE id = 'B3'")
    pair.source.sql("UPDATE c SET id = upper(id) WHERE n < 100; DELETE FROM c WHERE id = 'A0'")
    pair.assert_same("c")


def test_values_that_are_equal_but_not_the_same_are_sent(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, n numeric, f float8, c char(3), j json, i interval)")
    pair.add_target("t")
    pair.source.sql("INSERT INTO t VALUES (1, 1.0, 0, 'a', '{\"a\": 1}', '1 day')")
    pair.source.sql("UPDATE t SET n = 1.00, f = '-0', j = '{\"a\":  1}', i = '24 hours'")
    assert pair.target.one("SELECT t::text FROM t") == pair.source.one("SELECT t::text FROM t")


def test_types_with_another_name_or_size_on_the_target(pair: Pair) -> None:
    pair.source.sql("CREATE TYPE mood AS ENUM ('sad', 'ok')")
    pair.source.sql(
        "CREATE TABLE t (id smallint PRIMARY KEY, m mood, n integer, d date, v varchar(5), j json, u uuid, b boolean)"
    )
    pair.target.sql(
        "CREATE TABLE t (id bigint PRIMARY KEY, m text, n numeric, d timestamptz, v text, j jsonb, u text, b boolean)"
    )
    pair.add_target("t")
    pair.source.sql(
        "INSERT INTO t VALUES (1, 'ok', 2, '2024-12-11', 'x', '{\"a\": 1}', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', true)"
    )
    assert pair.target.sql(
        "SELECT id, m, n::int, d AT TIME ZONE 'UTC' = '2024-12-11', v, j ->> 'a', u, b FROM t"
    ) == [(1, "ok", 2, True, "x", "1", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", True)]
    pair.source.sql("DELETE FROM t")
    assert pair.target.rows("t") == []


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
@pytest.mark.parametrize("sent", [["id", "at", "z"], ["id", "z"]], ids=["sent", "not sent"])
def test_what_a_filter_wants_does_not_depend_on_who_asks(pair: Pair, mode: str, sent: list[str]) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, at timestamptz, z integer)")
    pair.source.sql("SET timezone = 'UTC'")
    target = pair.add_target("t", mode=mode, columns=sent, row_filter="at::date = '2024-01-01'")
    kathmandu = pair.source.connect()
    kathmandu.execute("SET timezone = 'Asia/Kathmandu'")

    def there() -> list[tuple[int, int]]:
        kathmandu.execute("CALL tbl_repl.drain()")
        return pair.target.sql("SELECT id, z FROM t ORDER BY id")

    kathmandu.execute(
        "INSERT INTO t VALUES (1, '2024-01-01 23:30+00', 0), (2, '2023-12-31 23:30+00', 0); BEGIN; UPDATE t SET z = 1; COMMIT"
    )
    assert there() == [(1, 1)]
    kathmandu.execute("INSERT INTO t VALUES (3, '2024-01-01 12:00+00', 3)")
    pair.target.sql("DELETE FROM t WHERE id = 1")
    assert kathmandu.execute("SELECT difference FROM tbl_repl.compare_target(%s)", [target]).fetchall() == [
        ("missing_on_target",)
    ]
    kathmandu.execute("SELECT tbl_repl.repair_target(%s, delete_extra => true)", [target])
    assert there() == [(1, 1), (3, 3)]
    pair.target.sql("TRUNCATE t")
    assert kathmandu.execute("SELECT tbl_repl.resync_target(%s)", [target]).fetchone() == (2,)
    assert there() == [(1, 1), (3, 3)]


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_filter_that_reads_other_tables_decides_at_commit(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.source.sql("CREATE TABLE chosen (id integer)")
    pair.add_target("t", mode=mode, row_filter="EXISTS (SELECT FROM chosen AS c WHERE c.id = s.id)")
    pair.source.sql("BEGIN; INSERT INTO t VALUES (1), (2); INSERT INTO chosen VALUES (2); COMMIT")
    pair.drain()
    assert pair.target.rows("t") == ["(2)"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("integer", "uuid"),
        ("timestamptz", "json"),
        ("timestamptz", "integer[]"),
        ("integer", "point"),
        ("integer", "inet"),
        ("time", "timestamp"),
        ("money", "numeric"),
    ],
)
def test_a_type_of_which_no_value_can_arrive_is_refused_at_once(pair: Pair, here: str, there: str) -> None:
    pair.source.sql(f"CREATE TABLE t (id integer PRIMARY KEY, v {here})")
    pair.target.sql(f"CREATE TABLE t (id integer PRIMARY KEY, v {there})")
    with pytest.raises(psycopg.errors.DatatypeMismatch) as error:
        pair.add_target("t")
    assert "column_map" in (error.value.diag.message_hint or "")
