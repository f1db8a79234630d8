"""What goes where: columns, maps, names, and changing them later."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import errors

from support import Pair, wait_until
from support.background import start, within

SOURCE = "CREATE TABLE t (id integer PRIMARY KEY, email text, n integer, secret text)"


@pytest.fixture
def source(pair: Pair) -> Pair:
    pair.source.sql(SOURCE)
    pair.source.sql("INSERT INTO t VALUES (1, 'a@x', 10, 's'), (2, 'b@x', 20, 's')")
    return pair


def test_column_list(source: Pair) -> None:
    source.target.sql("CREATE TABLE t (n integer, more text DEFAULT 'kept', id integer PRIMARY KEY)")
    source.add_target("t", columns=["n", "id"])
    source.target.sql("UPDATE t SET more = 'local' WHERE id = 1")
    source.source.sql("UPDATE t SET n = n + 1, email = 'new'; INSERT INTO t VALUES (3, 'c@x', 30, 's')")
    assert source.target.sql("SELECT id, n, more FROM t ORDER BY id") == [
        (1, 11, "local"),
        (2, 21, "kept"),
        (3, 31 - 1, "kept"),
    ]


def test_map_renames_transforms_and_masks(source: Pair) -> None:
    source.target.sql(
        'CREATE TABLE t (pk integer PRIMARY KEY, email text, "Double n" bigint, label text, secret text)'
    )
    source.add_target(
        "t",
        columns=["email", "secret"],
        column_map={
            "pk": "id",
            "email": "md5(email)",
            "Double n": "n * 2",
            "label": "format('%s: %s', id, n)",
            "secret": "NULL",
        },
    )
    source.source.sql("UPDATE t SET n = 11 WHERE id = 1; UPDATE t SET id = 5 WHERE id = 2")
    expected = source.source.sql("SELECT id, md5(email), n * 2, id || ': ' || n, NULL FROM t ORDER BY id")
    assert source.target.sql("TABLE t ORDER BY pk") == expected
    source.source.sql("DELETE FROM t WHERE id = 5; INSERT INTO t (id) VALUES (9)")
    expected = source.source.sql(
        "SELECT id, md5(email), n * 2, id || ': ' || coalesce(n::text, ''), NULL FROM t ORDER BY id"
    )
    assert source.target.sql("TABLE t ORDER BY pk") == expected


def test_only_the_map_is_sent(source: Pair) -> None:
    source.target.sql("CREATE TABLE t (key integer PRIMARY KEY, domain text)")
    source.add_target("t", columns=[], column_map={"key": "id", "domain": "split_part(email, '@', 2)"})
    source.source.sql("UPDATE t SET email = 'q@y' WHERE id = 1; DELETE FROM t WHERE id = 2")
    assert source.target.sql("TABLE t") == [(1, "y")]


@pytest.mark.once
@pytest.mark.parametrize("expression", ["id", " id ", "ID", '"id"', "s.id", "(id)", "s . id -- the key"])
def test_rename_of_the_key_in_any_spelling(source: Pair, expression: str) -> None:
    source.target.sql("CREATE TABLE t (pk integer PRIMARY KEY, n integer)")
    source.add_target("t", columns=["n"], column_map={"pk": expression})
    source.source.sql("DELETE FROM t WHERE id = 1; UPDATE t SET n = 5")
    assert source.target.sql("TABLE t") == [(2, 5)]


def test_an_expression_is_sql_not_a_name(pair: Pair) -> None:
    """A column may be called as a function is; unquoted, SQL takes the function."""
    pair.source.sql('CREATE TABLE t (id integer PRIMARY KEY, "user" text, "Id" integer)')
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, a text, b text, c integer)")
    pair.add_target("t", columns=["id"], column_map={"a": "user", "b": '"user"', "c": '"Id"'})
    pair.source.sql("INSERT INTO t VALUES (1, 'column', 7)")
    assert pair.target.sql("TABLE t") == [(1, "owner", "column", 7)]
    with pytest.raises(psycopg.errors.UndefinedColumn):
        pair.source.sql('CREATE TABLE o ("Id" integer PRIMARY KEY)')
        pair.add_target("o", dst_table="t", columns=["Id"], column_map={"id": "nope"})


def test_key_sent_twice(source: Pair) -> None:
    source.target.sql("CREATE TABLE t (id integer, again integer PRIMARY KEY)")
    with pytest.raises(psycopg.errors.InvalidTableDefinition):  # under its own name it is the key
        source.add_target("t", columns=["id"], column_map={"again": "id"})
    source.target.sql("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id)")
    source.add_target("t", columns=["id"], column_map={"again": "id"})
    source.source.sql("UPDATE t SET id = 7 WHERE id = 1")
    assert source.target.sql("TABLE t ORDER BY id") == [(2, 2), (7, 7)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("dst_table", "schema", "name"),
    [
        (None, "public", "t"),
        ("u", "public", "u"),
        ("other.u", "other", "u"),
        ("OTHER.U", "other", "u"),
        ('"Other".u', "Other", "u"),
        ('other."a.b"', "other", "a.b"),
        (' other . "q""q" ', "other", 'q"q'),
    ],
)
def test_name_of_the_target_table(source: Pair, dst_table: str | None, schema: str, name: str) -> None:
    quoted = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, name))
    source.target.sql(
        f'CREATE SCHEMA IF NOT EXISTS "{schema}"; ' + SOURCE.replace("TABLE t", f"TABLE {quoted}")
    )
    source.add_target("t", dst_table=dst_table)
    source.source.sql("DELETE FROM t WHERE id = 1")
    source.assert_same("t", quoted)


def test_table_name_alone_means_the_schema_of_the_source(pair: Pair) -> None:
    pair.both("CREATE SCHEMA app")
    pair.source.sql("CREATE TABLE app.t (id integer PRIMARY KEY)")
    pair.target.sql("CREATE TABLE app.u (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    pair.add_target("app.t", dst_table="u")
    pair.source.sql("INSERT INTO app.t VALUES (1)")
    assert (pair.target.rows("app.u"), pair.target.rows("u")) == (["(1)"], [])


def test_generated_columns_are_not_sent_unless_named(pair: Pair) -> None:
    ddl = (
        "CREATE TABLE t (id integer PRIMARY KEY, n integer, twice integer GENERATED ALWAYS AS (n * 2) STORED)"
    )
    pair.both(ddl)
    pair.target.sql("CREATE TABLE u (id integer PRIMARY KEY, n integer, twice integer)")
    pair.add_target("t")
    pair.add_target("t", dst_table="u", columns=["id", "twice"])
    pair.source.sql("INSERT INTO t VALUES (1, 5), (2, 6); UPDATE t SET n = 7 WHERE id = 1")
    pair.assert_same("t")
    assert pair.target.sql("TABLE u ORDER BY id") == [(1, None, 14), (2, None, 12)]


def test_virtual_generated_columns(pair: Pair) -> None:
    if pair.major < 18:
        pytest.skip("new in 18")
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, n integer, twice integer GENERATED ALWAYS AS (n * 2))")
    pair.target.sql("CREATE TABLE u (id integer PRIMARY KEY, twice integer, thrice integer)")
    pair.add_target("t")
    pair.add_target(
        "t",
        dst_table="u",
        columns=["id", "twice"],
        column_map={"thrice": "twice + n"},
        row_filter="twice < 100",
    )
    pair.source.sql(
        "INSERT INTO t VALUES (1, 5), (2, 60); UPDATE t SET n = CASE id WHEN 1 THEN 7 ELSE 8 END; INSERT INTO t VALUES (3, 99)"
    )
    pair.assert_same("t")
    assert pair.target.sql("TABLE u ORDER BY id") == [(1, 14, 21), (2, 16, 24)]


@pytest.mark.parametrize("referenced", [False, True])
def test_identity_always(pair: Pair, referenced: bool) -> None:
    """Key and another column, on both sides; the values are the source's."""
    pair.both("CREATE TABLE k (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, no integer GENERATED ALWAYS AS IDENTITY, v text)")
    if referenced:
        pair.target.sql("CREATE TABLE child (k integer REFERENCES k, c integer REFERENCES c)")
    targets = [pair.add_target("k"), pair.add_target("c")]
    pair.target.sql("SELECT setval('k_id_seq', 500), setval('c_no_seq', 500)")
    for write in (
        "INSERT INTO k (v) VALUES ('a'), ('b'); INSERT INTO c (id, v) VALUES (1, 'a'), (2, 'b')",
        "UPDATE k SET v = 'x'; UPDATE c SET v = 'x'",
        "UPDATE c SET no = DEFAULT WHERE id = 1",
        "INSERT INTO k OVERRIDING SYSTEM VALUE VALUES (7000, 'over'); INSERT INTO c OVERRIDING SYSTEM VALUE VALUES (3, 7000, 'over')",
        "DELETE FROM k WHERE id = 1; DELETE FROM c WHERE id = 2",
        "INSERT INTO k (v) SELECT 'many' FROM generate_series(1, 1500)",
        "UPDATE c SET id = id + 10",
    ):
        pair.source.sql(write)
        pair.assert_same("k")
        pair.assert_same("c")
    assert [pair.status(t) for t in targets] == ["ok", "ok"]


def test_identity_always_is_the_only_column(pair: Pair) -> None:
    pair.both("CREATE TABLE k (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY)")
    pair.add_target("k")
    pair.source.sql("INSERT INTO k DEFAULT VALUES; INSERT INTO k DEFAULT VALUES; DELETE FROM k WHERE id = 1")
    pair.source.sql("INSERT INTO k DEFAULT VALUES")
    pair.assert_same("k")


def test_target_with_triggers_defaults_and_other_indexes(source: Pair) -> None:
    """The target's own triggers run with its own search_path."""
    source.target.sql(
        SOURCE.replace("secret text", "secret text, seen timestamptz DEFAULT now()")
        + """; CREATE TABLE audit (id integer, op text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO audit VALUES (coalesce(NEW.id, OLD.id), TG_OP); RETURN NULL; END';
        CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION note()"""
    )
    source.add_target("t")
    source.source.sql("UPDATE t SET n = 0 WHERE id = 1; DELETE FROM t WHERE id = 2")
    source.source.sql("UPDATE t SET n = 0 WHERE id = 1")  # changes nothing: costs the target nothing
    assert source.target.sql("SELECT op, id FROM audit ORDER BY op, id") == [
        ("DELETE", 2),
        ("INSERT", 1),
        ("INSERT", 2),
        ("UPDATE", 1),
    ]
    assert source.target.one("SELECT seen IS NOT NULL FROM t WHERE id = 1")


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_renamed_key_column_is_found_by_alter_target(pair: Pair, mode: str) -> None:
    pair.both("CREATE TABLE t (gone integer, part integer, id text, v integer, PRIMARY KEY (part, id))")
    pair.both("ALTER TABLE t DROP gone")
    target = pair.add_target("t", mode=mode)
    pair.source.sql("INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 1)")
    pair.drain()
    pair.call("pause_target", target_id=target)
    pair.source.sql("UPDATE t SET v = 2 WHERE part = 1")
    pair.target.sql("ALTER TABLE t RENAME id TO ident")
    pair.source.sql(f"ALTER TABLE t RENAME id TO ident; SELECT tbl_repl.alter_target({target})")
    pair.source.sql("UPDATE t SET ident = 'c' WHERE part = 2")
    assert pair.source.sql("SELECT key FROM tbl_repl.pending ORDER BY key::text") == [
        ({"part": 1, "ident": "a"},),
        ({"part": 2, "ident": "b"},),
        ({"part": 2, "ident": "c"},),
    ]
    pair.call("resume_target", target_id=target)
    pair.drain()
    pair.assert_same("t")
    # and only here
    pair.source.sql(
        "ALTER TABLE t RENAME part TO piece; "
        f"SELECT tbl_repl.alter_target({target}, column_map => '{{\"part\": \"piece\"}}', columns => '{{ident,v}}')"
    )
    pair.source.sql("UPDATE t SET piece = 3 WHERE piece = 1; DELETE FROM t WHERE piece = 2")
    pair.drain()
    assert pair.target.rows("t") == pair.source.rows("t") == ["(3,a,2)"]


def test_alter_target_changes_what_is_given(source: Pair) -> None:
    source.target.sql(SOURCE + ";" + SOURCE.replace("TABLE t", "TABLE u"))
    target = source.add_target("t", timeout="7 s")

    def alter(**changes: object) -> None:
        source.call("alter_target", target_id=target, **changes)

    alter(row_filter="n > 15", column_map={"email": "md5(email)"})
    source.source.sql("UPDATE t SET secret = 'x'")
    # a new filter says what is sent from now on; what is there already is repair_target's business
    assert source.target.sql("SELECT id, length(email), secret FROM t ORDER BY id") == [
        (1, 3, "s"),
        (2, 32, "x"),
    ]
    assert source.call("repair_target", target_id=target, delete_extra=True) == 1
    source.drain()
    assert source.target.sql("SELECT id FROM t") == [(2,)]
    alter(row_filter="", column_map={})
    source.source.sql("UPDATE t SET secret = 'y'")
    source.assert_same("t")
    alter(columns=["id", "n"])
    source.source.sql("UPDATE t SET n = 0, secret = 'z'")
    assert source.target.sql("SELECT n, secret FROM t") == [(0, "y"), (0, "y")]
    alter(dst_table="u", mode="sync")
    source.source.sql("UPDATE t SET n = 1")
    assert source.target.sql("SELECT id, n FROM u ORDER BY id") == [(1, 1), (2, 1)]
    assert source.target.sql("SELECT n FROM t") == [(0,), (0,)]
    assert source.source.sql("SELECT mode, status, dst_table FROM tbl_repl.target_status") == [
        ("sync", "ok", "public.u")
    ]
    assert source.source.one("SELECT timeout = '7 s' FROM tbl_repl.target") is True


@pytest.mark.once
@pytest.mark.parametrize("before", ["sync", "tolerant", "async"])
@pytest.mark.parametrize("after", ["sync", "tolerant", "async"])
def test_mode_can_be_changed_with_rows_queued(source: Pair, before: str, after: str) -> None:
    source.target.sql(SOURCE + ";" + SOURCE.replace("TABLE t", "TABLE u"))
    target = source.add_target("t", mode=before)
    source.add_target("t", dst_table="u", mode="async")  # shares the queue
    source.call("pause_target", target_id=target)
    source.source.sql("UPDATE t SET n = 1; INSERT INTO t VALUES (3, 'c', 3, 's')")
    source.call("resume_target", target_id=target)
    source.call("alter_target", target_id=target, mode=after)
    source.source.sql("UPDATE t SET n = 2 WHERE id = 3; DELETE FROM t WHERE id = 1")
    source.drain()
    source.assert_same("t")
    source.assert_same("t", "u")
    assert source.status(target) == "ok"
    source.source.sql("UPDATE t SET n = 9")
    if after != "async":
        source.assert_same("t")
    source.drain()
    source.assert_same("t")
    source.assert_same("t", "u")


def test_target_that_has_never_been_ok_keeps_no_lock_after_drop(source: Pair) -> None:
    source.target.sql(SOURCE)
    target = source.add_target("t", initial_copy="background")
    assert source.status(target) == "copying"
    source.source.sql("INSERT INTO t VALUES (3, 'c', 3, 's')")
    source.call("drop_target", target_id=target)
    assert source.source.one("SELECT count(*) FROM tbl_repl.change") == 0
    source.drain()
    assert source.target.rows("t") == []


def test_drop_target_and_define_it_again_in_one_transaction(source: Pair) -> None:
    source.target.sql(SOURCE)
    source.add_target("t")
    source.source.sql(
        f"BEGIN; INSERT INTO t VALUES (3, 'c', 3, 's'); SELECT tbl_repl.drop_target('t', '{source.server}');"
        f"INSERT INTO t VALUES (4, 'd', 4, 's'); SELECT tbl_repl.add_target('t', '{source.server}', mode => 'sync');"
        "INSERT INTO t VALUES (5, 'e', 5, 's'); COMMIT"
    )
    source.assert_same("t")
    source.source.sql("DELETE FROM t")
    source.assert_same("t")


def tables_t_and_u(pair: Pair, partitioned: bool) -> None:
    """Table t on the source, t and u on the target."""
    pair.source.sql(
        f"CREATE TABLE t (id integer PRIMARY KEY, n integer){' PARTITION BY HASH (id)' if partitioned else ''}"
    )
    if partitioned:
        pair.source.sql("CREATE TABLE t_all PARTITION OF t FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    pair.target.sql(
        "CREATE TABLE t (id integer PRIMARY KEY, n integer); CREATE TABLE u (LIKE t INCLUDING ALL)"
    )


@pytest.mark.once
@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize(
    "options, change",
    [
        ({}, "SELECT tbl_repl.drop_target({0})"),
        ({"row_filter": "n > 0"}, "SELECT tbl_repl.drop_target({0}), tbl_repl.drop_target({1})"),
        ({"row_filter": "n > 0"}, "SELECT tbl_repl.drop_target({0})"),
        ({"row_filter": "n > 0"}, "SELECT tbl_repl.alter_target({0}, row_filter => '')"),
        ({}, "SELECT tbl_repl.alter_target({0}, row_filter => 'n > 0')"),
        ({}, "SELECT tbl_repl.alter_target({0}, forward => 'any')"),
        ({"forward": "any"}, "SELECT tbl_repl.alter_target({0}, forward => 'local')"),
        ({}, "SELECT tbl_repl.add_target('t', '{server}', 'u', 'async', forward => 'any')"),
    ],
)
def test_who_has_read_the_table_may_still_write_it(
    pair: Pair, options: dict[str, str], change: str, partitioned: bool
) -> None:
    """Both would wait for each other, if the lock that is needed for a trigger to go were not taken at once."""
    tables_t_and_u(pair, partitioned)
    first = pair.add_target("t", mode="async", **options)
    two = "{1}" in change or (partitioned and "add_target" not in change)
    second = pair.add_target("t", mode="async", dst_table="u") if two else 0
    writer = pair.source.connect()
    writer.execute("BEGIN; SELECT FROM t")
    changing = start(pair.source.connect(), change.format(first, second, server=pair.server))
    wait_until(lambda: pair.source.one("SELECT count(*) FROM pg_locks WHERE NOT granted") or changing.done())
    writer.execute("INSERT INTO t VALUES (1, 1)")
    writer.execute("COMMIT")
    changing.result(10)
    pair.source.sql("INSERT INTO t VALUES (2, 1)")
    pair.drain()
    if "drop_target" not in change:
        pair.assert_same("t")


@contextlib.contextmanager
def repeated(pair: Pair, statements: list[str]) -> Iterator[None]:
    """Each is run over and over by a session of its own, which looks for deadlocks early where it may."""
    stop = threading.Event()

    def run(statement: str) -> None:
        with pair.source.connect() as conn:
            if pair.major >= 15:
                conn.execute("SET deadlock_timeout = '100 ms'")
            while not stop.is_set():
                conn.execute(statement)

    if pair.major >= 15:
        with pair.source.cluster.connect() as superuser:
            superuser.execute("GRANT SET ON PARAMETER deadlock_timeout TO owner")
    with ThreadPoolExecutor(len(statements)) as pool:
        running = [pool.submit(run, statement) for statement in statements]
        try:
            yield
        finally:
            stop.set()
        for each in running:
            each.result(30)


@pytest.mark.once
@pytest.mark.parametrize("partitioned", [False, True])
def test_dropping_a_target_beside_drainers_and_readers(pair: Pair, partitioned: bool) -> None:
    """Readers that come and go, a drainer that has ship and wants to read: nobody is the victim of a deadlock."""
    tables_t_and_u(pair, partitioned)
    statements = ["SELECT count(*), pg_sleep(0.2) FROM t", "INSERT INTO t SELECT coalesce(max(id), 0) + 1, 1 FROM t",
                  "SELECT tbl_repl.replay()"]  # fmt: skip
    with repeated(pair, statements):
        for _ in range(5):
            first = pair.add_target("t", mode="async", initial_copy="none", row_filter="n > 0")
            second = pair.add_target("t", mode="async", initial_copy="none", dst_table="u")
            with within(10):
                pair.call("drop_target", target_id=first)
                pair.call("drop_target", target_id=second)


@pytest.mark.once
def test_a_target_of_a_table_that_is_always_in_use_is_dropped(source: Pair) -> None:
    """Eight sessions use it in turns; there is no tenth of a second in which all of them end."""
    source.target.sql(SOURCE)
    target = source.add_target("t", mode="async")
    uses = ["SELECT FROM t", "UPDATE t SET n = n + 1 WHERE id = 1", "UPDATE t SET n = n + 1 WHERE id = 2"]
    statements = [f"{use}; SELECT pg_sleep(0.2 + random() / 10)" for use in uses + uses[:1] * 5]
    with repeated(source, statements):
        wait_until(
            lambda: source.source.one("SELECT count(*) >= 8 FROM pg_locks WHERE relation = 't'::regclass")
        )
        source.source.fresh(f"SET lock_timeout = '10 s'; SELECT tbl_repl.drop_target({target})")


@pytest.mark.parametrize("change", ["alter", "add"])
def test_who_defines_a_target_that_hangs_is_in_nobody_s_way(trio: Pair, change: str) -> None:
    trio.source.sql("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    trio.target.sql("CREATE TABLE t (id integer PRIMARY KEY, n integer)")
    proxy = trio.proxy()
    target = trio.add_target("t", mode="async", timeout="1 s")
    proxy.set("blackhole")
    proxy.cut()
    statement = {
        "alter": f"SELECT tbl_repl.alter_target({target}, row_filter => 'n > 0')",
        "add": f"SELECT tbl_repl.add_target('t', '{trio.server}', 'u', 'async', timeout => '1 s')",
    }[change]
    before = proxy.connections
    changing = start(trio.source.connect(), statement)
    wait_until(lambda: proxy.connections > before or changing.done())
    with within(0.5):
        trio.source.sql("SELECT count(*) FROM t; INSERT INTO t VALUES (1, 1)")
    proxy.set("pass")
    proxy.cut()
    with contextlib.suppress(psycopg.Error):
        changing.result(60)


@pytest.mark.once
@pytest.mark.parametrize("initial_copy", ["now", "background", "none"])
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_initial_copy(source: Pair, initial_copy: str, mode: str) -> None:
    source.target.sql(SOURCE)
    source.source.sql("INSERT INTO t SELECT i, 'x', i, 's' FROM generate_series(3, 2500) i")
    target = source.add_target("t", initial_copy=initial_copy, mode=mode)
    count = source.target.one("SELECT count(*) FROM t")
    assert count == (2500 if initial_copy == "now" else 0)
    assert source.status(target) == ("copying" if initial_copy == "background" else "ok")
    source.source.sql("UPDATE t SET n = -1 WHERE id <= 5; DELETE FROM t WHERE id = 6")
    source.drain()
    assert source.status(target) == "ok"
    if initial_copy == "none":
        assert source.target.one("SELECT count(*) FROM t") == 5
        assert source.call("resync_target", target_id=target) == 2499
        source.drain()
    source.assert_same("t")


TYPES = {
    "date to timestamp": ("date", "timestamp", "'2026-03-04'", "'2026-03-04 12:00:01'"),
    "timestamp to timestamptz": ("timestamp", "timestamptz", "'2026-03-04 1:00'", "'2026-03-05 1:00'"),
    "char to text": ("char(5)", "text", "'ab'", "'cd  '"),
    "text to date": ("text", "date USING c::date", "'2026-03-04'", "'05/06/2026'"),
    "integer to float": ("integer", "float8", "1", "3.14159265358979"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_column_of_another_type_is_no_other_value(pair: Pair, mode: str, name: str) -> None:
    """Until alter_target it is an error, at commit or when it is shipped, whatever the session's settings."""
    was, becomes, first, then = TYPES[name]
    pair.both(f"CREATE TABLE t (id integer PRIMARY KEY, c {was})")
    pair.source.sql(f"INSERT INTO t VALUES (1, {first}), (2, {first})")
    target = pair.add_target("t", mode=mode)
    pair.both(f"ALTER TABLE t ALTER c TYPE {becomes}")
    session = pair.source.connect()
    session.execute("SET datestyle = 'SQL, DMY'; SET timezone = 'Asia/Tokyo'; SET extra_float_digits = -10")
    for statement in (f"INSERT INTO t VALUES (3, {then})", f"UPDATE t SET c = {then} WHERE id < 3"):
        if mode == "sync":
            with pytest.raises(errors.UndefinedFunction) as caught:
                session.execute(statement)
            assert f"alter_target({target})" in (caught.value.diag.message_hint or "")
        else:
            session.execute(statement)
    pair.source.sql("SELECT tbl_repl.replay()")
    assert pair.target.one("SELECT count(*) FROM t") == 2
    pair.source.sql(f"SELECT tbl_repl.alter_target({target})")
    session.execute(f"INSERT INTO t VALUES (4, {then})")
    pair.drain()
    pair.assert_same("t")
    assert pair.pending(target) == 0


@pytest.mark.once
@pytest.mark.parametrize(
    "name", ["date to timestamp", "timestamp to timestamptz", "char to text", "text to date"]
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_key_of_another_type_is_not_taken_for_another_key(pair: Pair, mode: str, name: str) -> None:
    was, becomes, first, then = TYPES[name]
    pair.both(f"CREATE TABLE t (c {was} PRIMARY KEY, v text)")
    pair.source.sql(f"INSERT INTO t VALUES ({first})")
    target = pair.add_target("t", mode=mode)
    pair.both(f"ALTER TABLE t ALTER c TYPE {becomes}")
    for statement in (f"INSERT INTO t VALUES ({then})", f"UPDATE t SET c = {then}", "DELETE FROM t"):
        with pytest.raises(errors.UndefinedFunction, match="_is_(text|type)"):
            pair.source.sql(statement)
    pair.source.sql(f"SELECT tbl_repl.alter_target({target})")
    pair.source.sql(f"INSERT INTO t VALUES ({then}, 'x'); UPDATE t SET v = 'y'")
    pair.drain()
    pair.assert_same("t")


@pytest.mark.parametrize("mode", ["tolerant", "async"])
def test_an_integer_key_may_become_a_larger_one(pair: Pair, mode: str) -> None:
    """Writers go on, and what does not fit what is known waits for alter_target."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    target = pair.add_target("t", mode=mode)
    pair.both("ALTER TABLE t ALTER id TYPE bigint")
    pair.source.sql("INSERT INTO t VALUES (3000000000, 'x')")
    pair.source.sql(
        "UPDATE t SET v = 'y'; UPDATE t SET id = 4000000000 WHERE id = 1; DELETE FROM t WHERE id = 2"
    )
    pair.source.sql(f"SELECT tbl_repl.alter_target({target})")
    pair.drain()
    pair.assert_same("t")
    assert (pair.pending(target), pair.status(target)) == (0, "ok")


@pytest.mark.once
@pytest.mark.parametrize("path", ["other", "''", '"$user", other, public'])
def test_an_expression_keeps_its_meaning_when_something_else_is_altered(pair: Pair, path: str) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    for schema, answer in (("mine", "true"), ("other", "false")):
        pair.source.sql(
            f"CREATE SCHEMA {schema};"
            f"CREATE FUNCTION {schema}.keep(integer) RETURNS boolean LANGUAGE sql RETURN {answer};"
            f"CREATE FUNCTION {schema}.shown(text) RETURNS text LANGUAGE sql RETURN '{schema}'"
        )
    pair.source.sql("SET search_path = mine, public")
    target = pair.add_target("t", mode="async", row_filter="keep(id)", column_map={"v": "shown(v)"})
    pair.source.sql(f"SET search_path = {path}")
    pair.call("alter_target", target_id=target, timeout="2 s")
    pair.source.sql("INSERT INTO public.t VALUES (1, 'x')")
    pair.drain()
    assert pair.target.rows("t") == ["(1,mine)"]
    if path == "other":
        pair.call("alter_target", target_id=target, column_map={"v": "shown(v)"})
        pair.source.sql("INSERT INTO public.t VALUES (2, 'x')")
        pair.drain()
        assert pair.target.rows("t") == ["(1,mine)", "(2,other)"]


def test_expressions_that_begin_with_a_keyword(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target(
        "t",
        mode="sync",
        column_map={"v": "CASE WHEN id < 2 THEN 'low' ELSE 'high' END"},
        row_filter="CASE WHEN id < 9 THEN true ELSE false END",
    )
    pair.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x'), (9, 'x')")
    assert pair.target.rows("t") == ["(1,low)", "(2,high)"]
    pair.call("alter_target", target_id=1, row_filter="NOT id > 5", column_map={"v": "ROW(id)::text"})
    pair.call(
        "alter_target", target_id=1, row_filter="EXISTS (VALUES (1))", column_map={"v": "array[id]::text"}
    )


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_type_that_was_renamed_or_moved_is_the_same(pair: Pair, mode: str) -> None:
    pair.both(
        "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN low AS integer CHECK (VALUE < 9); CREATE SCHEMA other"
    )
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, m mood, d low)")
    pair.both("CREATE TABLE k (m mood PRIMARY KEY)")
    pair.add_target("t", mode=mode)
    pair.add_target("k", mode="async")
    pair.source.sql(
        "ALTER TYPE mood RENAME TO temper; ALTER TYPE temper SET SCHEMA other; ALTER DOMAIN low RENAME TO little"
    )
    pair.source.fresh("INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2)")
    pair.source.fresh("UPDATE t SET m = 'b' WHERE id = 1")
    pair.source.fresh("INSERT INTO k VALUES ('a'); UPDATE k SET m = 'b'")
    pair.source.sql("SELECT tbl_repl.alter_target(2)")
    pair.drain()
    pair.assert_same("t")
    pair.assert_same("k")


def waits(pair: Pair) -> object:
    return wait_until(lambda: pair.source.admin("SELECT 1 FROM pg_locks WHERE NOT granted"))


@pytest.mark.once
def test_two_who_alter_a_target_both_have_their_way(source: Pair) -> None:
    source.target.sql(SOURCE)
    target = source.add_target("t", mode="async")
    first, second = source.source.connect(), source.source.connect()
    first.execute(f"BEGIN; SELECT tbl_repl.alter_target({target}, row_filter => 'id > 5')")
    waiting = start(second, f"SELECT tbl_repl.alter_target({target}, mode => 'tolerant')")
    waits(source)
    first.execute("COMMIT")
    waiting.result(10)
    assert source.source.sql("SELECT mode, row_filter FROM tbl_repl.target") == [("tolerant", "id > 5")]


@pytest.mark.once
def test_who_alters_a_target_that_goes_is_told(source: Pair) -> None:
    source.target.sql(SOURCE)
    target = source.add_target("t", mode="async")
    first, second = source.source.connect(), source.source.connect()
    first.execute(f"BEGIN; SELECT tbl_repl.drop_target({target})")
    waiting = start(second, f"SELECT tbl_repl.alter_target({target}, mode => 'sync')")
    waits(source)
    first.execute("COMMIT")
    with pytest.raises(errors.UndefinedObject, match=f"target {target} does not exist"):
        waiting.result(10)


@pytest.mark.once
@pytest.mark.parametrize("mode", ["sync", "tolerant"])
@pytest.mark.parametrize(
    "write",
    [
        "INSERT INTO t VALUES (70)",
        "DELETE FROM t",
        "INSERT INTO t VALUES (7), (8); DELETE FROM t WHERE id < 8",
    ],
)
def test_what_was_written_before_the_target_became_async_is_shipped(
    source: Pair, mode: str, write: str
) -> None:
    source.target.sql(SOURCE)
    target = source.add_target("t", mode=mode)
    source.source.sql(f"BEGIN; {write}; SELECT tbl_repl.alter_target({target}, mode => 'async'); COMMIT")
    source.drain()
    source.assert_same("t")


@pytest.mark.once
def test_the_last_two_targets_of_a_table_are_dropped_at_once(source: Pair) -> None:
    source.target.sql(SOURCE + "; CREATE TABLE u (LIKE t INCLUDING ALL)")
    targets = [source.add_target("t", dst_table=name, mode="async") for name in "tu"]
    first, second = source.source.connect(), source.source.connect()
    first.execute(f"BEGIN; SELECT tbl_repl.drop_target({targets[0]})")
    waiting = start(second, f"SELECT tbl_repl.drop_target({targets[1]})")
    waits(source)
    first.execute("COMMIT")
    waiting.result(20)
    assert source.source.sql("SELECT tgname FROM pg_trigger WHERE tgrelid = 't'::regclass") == []
    assert source.source.sql("SELECT 1 FROM tbl_repl.source") == []


@pytest.mark.once
def test_a_drop_that_waits_for_a_reader_keeps_no_other_one_waiting(source: Pair) -> None:
    source.target.sql(SOURCE)
    target = source.add_target("t", mode="async")
    reader = source.source.connect()
    reader.execute("BEGIN; SELECT FROM t")
    dropping = start(source.source.connect(), f"SELECT tbl_repl.drop_target({target})")
    waits(source)
    for _ in range(20):
        with within(0.5):
            source.source.sql("SELECT FROM t; INSERT INTO t SELECT max(id) + 1 FROM t")
    reader.execute("COMMIT")
    dropping.result(10)
