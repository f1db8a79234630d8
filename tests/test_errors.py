"""Refusals: SQLSTATE, message, hint; and what is left behind, which is nothing."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from support import Node, Pair

SNAPSHOT = """
    SELECT 'proc', oid::regprocedure::text, md5(pg_get_functiondef(oid)), proacl::text FROM pg_proc
        WHERE pronamespace IN ('tbl_repl'::regnamespace, 'public'::regnamespace) AND prokind <> 'a'
    UNION ALL SELECT 'trigger', tgrelid::regclass::text, pg_get_triggerdef(oid), tgparentid::text FROM pg_trigger
        WHERE NOT tgisinternal
    UNION ALL SELECT 'class', oid::regclass::text, relkind::text || relhastriggers, relacl::text FROM pg_class
        WHERE relnamespace IN ('tbl_repl'::regnamespace, 'public'::regnamespace) AND relkind <> 'S'
    UNION ALL SELECT 'depend', pg_describe_object(classid, objid, objsubid), pg_describe_object(refclassid, refobjid, refobjsubid), deptype::text
        FROM pg_depend WHERE refclassid = 'pg_class'::regclass AND refobjid = to_regclass('public.t')
    UNION ALL SELECT 'source', s::text, '', '' FROM tbl_repl.source s
    UNION ALL SELECT 'target', t::text, '', '' FROM tbl_repl.target t
    UNION ALL SELECT 'state', s::text, '', '' FROM tbl_repl.target_state s
    UNION ALL SELECT 'change', c::text, '', '' FROM tbl_repl.change c
    UNION ALL SELECT 'stash', s::text, '', '' FROM tbl_repl.stash s
    UNION ALL SELECT 'flush', f::text, '', '' FROM tbl_repl.flush f
    ORDER BY 1, 2, 3, 4
"""


def snapshot(node: Node) -> list[tuple[Any, ...]]:
    return node.admin(SNAPSHOT)


@pytest.fixture
def tables(pair: Pair) -> Pair:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text, n integer)")
    pair.source.sql("INSERT INTO t VALUES (1, 'a', 1)")
    pair.source.sql("CREATE VIEW w AS TABLE t; CREATE TABLE parent (id integer PRIMARY KEY);"
                    "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)")  # fmt: skip
    return pair


def refused(
    pair: Pair, code: str, action: Callable[[], Any], *, hint: str | None = "", node: Node | None = None
) -> psycopg.Error:
    """The action fails with that code, in PostgreSQL's style, and nothing is left behind."""
    node = node or pair.source
    before, there = snapshot(node), pair.target.rows("t")
    with pytest.raises(psycopg.Error) as caught:
        action()
    error = caught.value
    assert error.sqlstate == code, f"{error.sqlstate}: {error}"
    message = error.diag.message_primary or ""
    assert not message.endswith(".")
    assert message[:1] == message[:1].lower() or message.startswith("column_map")
    assert not re.match(r"_?\w+\(\):", message)
    if hint is not None:
        assert hint in (error.diag.message_hint or ""), error.diag.message_hint
        assert (error.diag.message_hint or ".").rstrip().endswith((".", ";")), error.diag.message_hint
    for part in (error.diag.message_detail, error.diag.message_hint):
        assert part is None or part[0].isupper() or part.startswith(("column", "key_columns"))
    assert snapshot(node) == before
    assert pair.target.rows("t") == there
    return error


ADD = {
    "unknown server": ("42704", {"server": "nowhere"}, "CREATE SERVER"),
    "unknown mode": ("22023", {"mode": "fast"}, "sync, tolerant, async"),
    "mode null": ("22023", {"mode": None}, "sync, tolerant, async"),
    "unknown operation": ("22023", {"operations": ["insert", "upsert"]}, "insert, update, delete, truncate"),
    "no operation": ("22023", {"operations": []}, "insert, update, delete, truncate"),
    "operation null": ("22023", {"operations": ["insert", None]}, "insert, update, delete, truncate"),
    "unknown policy": ("22023", {"on_conflict": "last"}, "overwrite, keep, newest, error"),
    "unknown copy": ("22023", {"initial_copy": "later"}, "now, background, none"),
    "unknown forward": ("22023", {"forward": "all"}, "local, any"),
    "timeout zero": ("22023", {"timeout": "0"}, "100 ms"),
    "timeout negative": ("22023", {"timeout": "-1 s"}, "100 ms"),
    "unknown column": ("42703", {"columns": ["id", "nope"]}, "columns"),
    "column null": ("22023", {"columns": ["id", None]}, "columns"),
    "key column null": ("22023", {"key_columns": ["id", None]}, "key_columns"),
    "unknown key column": ("42703", {"key_columns": ["nope"]}, "key_columns"),
    "no usable key": ("42P16", {"key_columns": ["v"]}, "key_columns"),
    "key not sent": ("42P16", {"columns": ["v"]}, "columns"),
    "key transformed": ("42P16", {"column_map": {"id": "id + 1"}}, "column_map"),
    "filter syntax": ("42601", {"row_filter": "n >"}, "expression"),
    "filter column": ("42703", {"row_filter": "nope > 1"}, "expression"),
    "filter not boolean": ("42804", {"row_filter": "n"}, "boolean SQL expression"),
    "filter by table": ("42P01", {"row_filter": "t.n > 1"}, "called s"),
    "filter aggregate": ("42803", {"row_filter": "count(*) > 1"}, "expression"),
    "filter unknown function": ("42883", {"row_filter": "nofunc(n)"}, "expression"),
    "map syntax": ("42601", {"column_map": {"v": "upper(v"}}, "expression"),
    "map empty": ("42601", {"column_map": {"v": ""}}, "expression"),
    "map column": ("42703", {"column_map": {"v": "upper(nope)"}}, "expression"),
    "map set": ("0A000", {"column_map": {"v": "generate_series(1, 2)"}}, "expression"),
    "map window": ("42P20", {"column_map": {"v": "row_number() OVER ()"}}, "expression"),
    "map type": ("42804", {"column_map": {"n": "v || 'x'"}}, "Cast it"),
    "map target column": ("42703", {"column_map": {"nope": "v"}}, "column_map"),
    "map no text": ("22023", {"column_map": {"v": 1}}, "email"),
    "map twice": ("42701", {"column_map": {"x" * 63 + "a": "v", "x" * 63 + "b": "v"}}, None),
    "target table": ("42P01", {"dst_table": "nope"}, "dst_table"),
    "target name": ("22023", {"dst_table": "a.b.c"}, "schema.table"),
    "target name empty": ("22023", {"dst_table": ""}, "schema.table"),
    "target name unclosed": ("22023", {"dst_table": '"a'}, "schema.table"),
    "view": ("42809", {"source_table": "w"}, None),
    "inheritance": ("0A000", {"source_table": "parent"}, "partitioning"),
    "inheritance child": ("0A000", {"source_table": "child"}, "partitioning"),
    "own catalog": ("42809", {"source_table": "tbl_repl.node"}, None),
    "system catalog": ("42501", {"source_table": "pg_class"}, None),
    "no such table": ("42P01", {"source_table": "nope"}, None),
}


@pytest.mark.once
@pytest.mark.parametrize("case", ADD)
def test_add_target_refuses(tables: Pair, case: str) -> None:
    code, options, hint = ADD[case]
    arguments = {"source_table": "t", "server": tables.server, **options}
    refused(tables, code, lambda: tables.call("add_target", **arguments), hint=hint)


ALTER = [
    case
    for case, (_, options, _) in ADD.items()
    if case != "mode null" and not {"source_table", "server", "key_columns", "initial_copy"} & set(options)
]


@pytest.mark.once
@pytest.mark.parametrize("case", ALTER)
def test_alter_target_refuses(tables: Pair, case: str) -> None:
    code, options, hint = ADD[case]
    target = tables.add_target("t", row_filter="n > 0", column_map={"v": "upper(v)"})
    refused(tables, code, lambda: tables.call("alter_target", target_id=target, **options), hint=hint)
    tables.source.sql("INSERT INTO t VALUES (7, 'seven', 7)")
    assert tables.target.one("SELECT v FROM t WHERE id = 7") == "SEVEN"


def test_same_target_twice(tables: Pair) -> None:
    tables.add_target("t")
    refused(tables, "42710", lambda: tables.add_target("t"), hint="alter_target")
    refused(
        tables,
        "42710",
        lambda: tables.add_target("t", dst_table="public.t", mode="async"),
        hint="alter_target",
    )
    refused(
        tables,
        "42710",
        lambda: tables.add_target("t", columns=["id"], row_filter="n > 1"),
        hint="alter_target",
    )
    for node in tables.nodes:
        node.sql("ALTER TABLE t ADD other integer NOT NULL DEFAULT 0, ADD UNIQUE (id, other)")
    refused(tables, "42710", lambda: tables.add_target("t", key_columns=["id", "other"]), hint="alter_target")
    tables.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    second = tables.add_target("t", dst_table="u")
    refused(tables, "42710", lambda: tables.call("alter_target", target_id=second, dst_table="t"), hint=None)


def test_alter_target_of_a_table_that_was_dropped(tables: Pair) -> None:
    target = tables.add_target("t")
    tables.source.sql("DROP TABLE t CASCADE")
    refused(tables, "42P01", lambda: tables.call("alter_target", target_id=target), hint="drop_target")
    tables.call("drop_target", target_id=target)
    assert tables.source.sql("SELECT * FROM tbl_repl.target_status") == []


def test_source_and_server_must_be_given(tables: Pair) -> None:
    refused(
        tables, "22004", lambda: tables.call("add_target", source_table=None, server=tables.server), hint=None
    )
    refused(tables, "22004", lambda: tables.call("add_target", source_table="t", server=None), hint=None)
    for arguments in ("NULL, NULL", "'t', NULL", f"NULL, '{tables.server}'"):
        dropping = f"SELECT tbl_repl.drop_target({arguments})"
        refused(tables, "22004", partial(tables.source.sql, dropping), hint=None)


@pytest.mark.once
def test_a_filter_that_is_not_boolean_is_told_in_words_that_were_written(tables: Pair) -> None:
    error = refused(tables, "42804", lambda: tables.add_target("t", row_filter="n + 1"))
    assert error.diag.message_primary == "row_filter must be boolean, not integer"


def test_server_without_mapping_or_usage(tables: Pair) -> None:
    tables.source.sql(f"DROP USER MAPPING FOR owner SERVER {tables.server}")
    error = refused(tables, "42704", lambda: tables.add_target("t"), hint="CREATE USER MAPPING")
    assert "owner" in str(error)
    role = tables.source.role("other")
    tables.source.sql(f"CREATE SCHEMA own AUTHORIZATION owner; GRANT {role} TO owner", user="postgres")
    tables.source.sql("SELECT tbl_repl.grant_access('other', 'operator')")
    tables.source.sql("CREATE TABLE own.t (id integer PRIMARY KEY); GRANT USAGE ON SCHEMA own TO other")
    tables.source.sql("ALTER TABLE own.t OWNER TO other", user="postgres")
    refused(
        tables, "42501",
        lambda: tables.source.sql(f"SELECT tbl_repl.add_target('own.t', '{tables.server}')", user="other"),
        hint="GRANT USAGE ON FOREIGN SERVER",
    )  # fmt: skip


def test_only_the_owner_of_the_table_may_add_a_target(tables: Pair) -> None:
    role = tables.source.role("operator_of_nothing")
    tables.source.sql(
        f"SELECT tbl_repl.grant_access('{role}', 'operator'); GRANT ALL ON t TO {role}; GRANT USAGE ON FOREIGN SERVER {tables.server} TO {role}"
    )
    refused(
        tables,
        "42501",
        lambda: tables.source.sql(f"SELECT tbl_repl.add_target('t', '{tables.server}')", user=role),
        hint=None,
    )


VERBS = [
    "pause_target({})",
    "resume_target({})",
    "drop_target({})",
    "alter_target({}, mode => 'async')",
    "explain_target({})",
    "resync_target({})",
    "compare_target({})",
    "repair_target({})",
]


@pytest.mark.once
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_unknown_and_foreign_targets(tables: Pair, verb: str) -> None:
    role = tables.source.role("stranger")
    tables.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    target = tables.add_target("t")
    refused(
        tables,
        "42704",
        lambda: tables.source.sql(f"SELECT tbl_repl.{verb.format(4711)}"),
        hint="target_status",
    )
    refused(
        tables,
        "42704",
        lambda: tables.source.sql(f"SELECT tbl_repl.{verb.format('NULL')}"),
        hint="target_status",
    )
    refused(
        tables,
        "42501",
        lambda: tables.source.sql(f"SELECT tbl_repl.{verb.format(target)}", user=role),
        hint=None,
    )


def test_drop_target_by_name(tables: Pair) -> None:
    def drop(*arguments: str) -> None:
        tables.source.sql(f"SELECT tbl_repl.drop_target({', '.join(arguments)})")

    refused(tables, "42704", lambda: drop("'t'", f"'{tables.server}'"), hint="target_status")
    tables.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    tables.add_target("t")
    tables.add_target("t", dst_table="u")
    refused(tables, "42P08", lambda: drop("'t'", f"'{tables.server}'"), hint="dst_table")
    refused(tables, "42704", lambda: drop("'t'", f"'{tables.server}'", "'nope'"), hint="target_status")
    refused(tables, "22023", lambda: drop("'t'", f"'{tables.server}'", "'a.b.c'"), hint="schema.table")
    drop("'t'", f"'{tables.server}'", "'u'")
    drop("'t'", f"'{tables.server}'")
    assert tables.source.sql("TABLE tbl_repl.target_status") == []


def test_states(tables: Pair) -> None:
    target = tables.add_target("t")
    refused(tables, "55000", lambda: tables.call("resume_target", target_id=target), hint="paused")
    tables.call("pause_target", target_id=target)
    assert tables.status(target) == "paused"
    tables.source.sql("INSERT INTO t VALUES (2, 'queued', 2)")
    assert (tables.pending(target), tables.target.one("SELECT count(*) FROM t")) == (1, 1)
    tables.drain()
    assert (tables.status(target), tables.pending(target)) == ("paused", 1)
    tables.call("resume_target", target_id=target)
    assert tables.status(target) == "queueing"
    tables.drain()
    assert tables.status(target) == "ok"
    tables.assert_same("t")
    tables.call("pause_target", target_id=target)
    tables.call("resume_target", target_id=target)
    tables.drain()
    assert tables.status(target) == "ok"


def test_copy_needs_read_committed_and_replay_a_transaction_of_its_own(tables: Pair) -> None:
    conn = tables.source.connect()
    for level in ("REPEATABLE READ", "SERIALIZABLE"):
        before = snapshot(tables.source)
        conn.execute(f"BEGIN ISOLATION LEVEL {level}")
        with pytest.raises(psycopg.errors.ActiveSqlTransaction):
            conn.execute(f"SELECT tbl_repl.add_target('t', '{tables.server}')")
        conn.execute("ROLLBACK")
        assert snapshot(tables.source) == before
    conn.execute("BEGIN; INSERT INTO t VALUES (9, 'x', 9)")
    with pytest.raises(psycopg.errors.ActiveSqlTransaction) as caught:
        conn.execute("SELECT tbl_repl.replay()")
    assert caught.value.diag.message_hint
    conn.execute("ROLLBACK")
    for call, code in (("replay(max_rows => 0)", "22023"), ("replay('nowhere')", "42704")):
        refused(tables, code, lambda call=call: tables.source.sql(f"SELECT tbl_repl.{call}"), hint=None)  # type: ignore[misc]


def test_target_refuses_to_be_written(tables: Pair) -> None:
    tables.target.sql("CREATE TABLE locked (id integer PRIMARY KEY, v text, n integer)", user="postgres")
    refused(tables, "42501", lambda: tables.add_target("t", dst_table="locked"), hint="GRANT SELECT, INSERT")
    tables.target.sql("CREATE TABLE needs (id integer PRIMARY KEY, v text, n integer, more text NOT NULL)")
    refused(tables, "23502", lambda: tables.add_target("t", dst_table="needs"), hint="default")
    tables.target.sql(
        "CREATE TABLE made (id integer PRIMARY KEY, v text, n integer GENERATED ALWAYS AS (id) STORED)"
    )
    refused(tables, "428C9", lambda: tables.add_target("t", dst_table="made"), hint="columns")
    tables.target.sql("CREATE TABLE typed (id integer PRIMARY KEY, v text, n date)")
    refused(tables, "42804", lambda: tables.add_target("t", dst_table="typed"), hint="Cast it")
    tables.target.sql("CREATE VIEW seen AS TABLE t")
    error = refused(tables, "42809", lambda: tables.add_target("t", dst_table="seen"), hint="dst_table")
    assert "public.seen on the target is a view" in str(error)
    tables.target.sql("CREATE MATERIALIZED VIEW kept AS TABLE t; CREATE UNIQUE INDEX ON kept (id)")
    error = refused(tables, "42809", lambda: tables.add_target("t", dst_table="kept"), hint="dst_table")
    assert "materialized view" in str(error)
    tables.target.admin(
        "CREATE SERVER far FOREIGN DATA WRAPPER dblink_fdw; CREATE FOREIGN TABLE away (id integer) SERVER far"
    )
    error = refused(tables, "42809", lambda: tables.add_target("t", dst_table="away"), hint="dst_table")
    assert "foreign table" in str(error)


@pytest.mark.once
def test_what_is_empty_or_null_is_called_so(tables: Pair) -> None:
    for options, message in (
        ({"operations": []}, "operations is empty"),
        ({"operations": ["insert", None]}, "operations contains NULL"),
        ({"columns": ["id", None]}, "columns contains NULL"),
        ({"key_columns": [None]}, "key_columns contains NULL"),
    ):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
            tables.add_target("t", **options)  # type: ignore[arg-type]


@pytest.mark.once
@pytest.mark.parametrize("name", ["", " ", "a b", "köln", "x" * 33, None], ids=repr)
def test_names_that_a_node_cannot_have(tables: Pair, name: str | None) -> None:
    refused(
        tables,
        "22023",
        lambda: tables.source.sql("SELECT tbl_repl.set_node_name(%s)", [name]),
        hint="short name",
    )


@pytest.mark.once
@pytest.mark.parametrize(
    "expression",
    ["n >", "upper(", "", " ", "n > 1 /* open", "'open", "CASE WHEN n > 1 THEN true", "n > 1 END"],
)
def test_syntax_errors_speak_of_what_was_written(tables: Pair, expression: str) -> None:
    """Not of what tbl_repl has put around the expression to look at it."""
    for options in ({"row_filter": expression}, {"column_map": {"v": expression}}):
        if options.get("row_filter", "x").strip() == "":
            continue  # no filter
        with pytest.raises(psycopg.errors.SyntaxError) as caught:
            tables.add_target("t", **options)  # type: ignore[arg-type]
        message = caught.value.diag.message_primary or ""
        assert ("END" in message) == ("END" in expression), message
        assert 'near ")"' not in message
        assert "end of expression" in message or "open" in message or "END" in message
        assert not (caught.value.diag.message_detail or "").endswith(" ")


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_a_table_is_not_replicated_into_itself(tables: Pair, mode: str) -> None:
    server = tables.join(tables.source, tables.source, "home")
    error = refused(
        tables, "55000", lambda: tables.add_target("t", server=server, mode=mode), hint="dst_table"
    )
    assert "same table" in str(error)
    tables.source.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    target = tables.add_target("t", server=server, mode=mode, dst_table="u")
    refused(
        tables,
        "55000",
        lambda: tables.call("alter_target", target_id=target, dst_table="t"),
        hint="dst_table",
    )
    tables.drain()
    assert tables.source.rows("u") == tables.source.rows("t") == ["(1,a,1)"]


def test_copy_that_fails_leaves_nothing(tables: Pair) -> None:
    tables.target.sql("CREATE TABLE strict (id integer PRIMARY KEY, v text, n integer CHECK (n < 5))")
    tables.source.sql("INSERT INTO t SELECT i, 'x', i FROM generate_series(2, 8) i")
    refused(tables, "23514", lambda: tables.add_target("t", dst_table="strict"), hint=None)
    assert tables.target.rows("strict") == []


def test_target_out_of_reach_leaves_nothing(tables: Pair) -> None:
    before = snapshot(tables.source)
    tables.target.stop()
    with pytest.raises(psycopg.OperationalError) as caught:
        tables.source.fresh(f"SELECT tbl_repl.add_target('t', '{tables.server}')")
    assert (caught.value.sqlstate or "").startswith("08")
    assert snapshot(tables.source) == before


def test_rolled_back_add_target_leaves_nothing(tables: Pair) -> None:
    before = snapshot(tables.source)
    tables.source.sql(
        f"BEGIN; SELECT tbl_repl.add_target('t', '{tables.server}'); INSERT INTO t VALUES (2, 'x', 2); ROLLBACK"
    )
    assert snapshot(tables.source) == before
    assert tables.target.rows("t") == []


def test_last_drop_target_leaves_the_table_as_it_was(pair: Pair) -> None:
    pair.source.sql(
        """
        CREATE TABLE t (id integer PRIMARY KEY, v text, n integer);
        CREATE TABLE p (id integer PRIMARY KEY, v text, n integer) PARTITION BY RANGE (id);
        CREATE TABLE p_1 PARTITION OF p FOR VALUES FROM (0) TO (10);
        CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER own BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION own();
        GRANT SELECT ON t TO writer;
        """
    )
    pair.target.sql(
        "CREATE TABLE t (id integer PRIMARY KEY, v text, n integer); CREATE TABLE u (LIKE t INCLUDING ALL); CREATE TABLE v (LIKE t INCLUDING ALL)"
    )

    def state() -> list[tuple[Any, ...]]:
        # relhastriggers stays true until the next VACUUM, as after any DROP TRIGGER
        return [row for row in snapshot(pair.source) if row[0] != "class"]

    before, dump = state(), schema_dump(pair.source)
    targets = [
        pair.add_target("t", row_filter="n > 1"),
        pair.add_target("t", dst_table="u", mode="async"),
        pair.add_target("p", dst_table="v", row_filter="n > 1", mode="sync"),
    ]
    pair.source.sql(
        "INSERT INTO t SELECT i, 'x', i FROM generate_series(1, 5) i; INSERT INTO p VALUES (1, 'x', 1), (2, 'x', 2)"
    )
    assert state() != before
    for target in targets:
        pair.call("drop_target", target_id=target)
    assert state() == before
    assert schema_dump(pair.source) == dump
    pair.source.sql("INSERT INTO t VALUES (9, 'x', 9); TRUNCATE t, p")
    assert pair.target.one("SELECT count(*) FROM t") == 4


def test_drop_extension_refuses_while_targets_exist(tables: Pair) -> None:
    tables.add_target("t")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist) as caught:
        tables.source.sql("DROP EXTENSION tbl_repl")
    assert "table t" in (caught.value.diag.message_detail or "")
    assert tables.status(1) == "ok"
    tables.call("drop_target", target_id=1)
    tables.source.sql("DROP EXTENSION tbl_repl")
    assert tables.source.one("SELECT to_regnamespace('tbl_repl')") is None
    tables.source.sql("INSERT INTO t VALUES (2, 'x', 2)")
    tables.source.sql("CREATE EXTENSION tbl_repl")
    tables.add_target("t")
    tables.assert_same("t")


# --- dump and restore


def pg_dump(node: Node, *options: str) -> str:
    cluster = node.cluster
    command = [
        str(cluster.server.bindir / "pg_dump"),
        "-h",
        str(cluster.socket_dir),
        "-p",
        str(cluster.port),
        "-U",
        "owner",
        *options,
        node.dbname,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"PGPASSWORD": "secret"}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def schema_dump(node: Node) -> str:
    return re.sub(r"(?m)^\\(un)?restrict .*$", "", pg_dump(node, "--schema-only"))


@pytest.mark.parametrize("role", ["owner", "postgres"])
def test_a_plain_dump_keeps_targets_and_queue_whoever_restores_it(tables: Pair, role: str) -> None:
    """Restored by a superuser, the extension is his; the owner of the targets goes on all the same."""
    tables.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    direct = tables.add_target("t", row_filter="n < 100", column_map={"v": "upper(v)"})
    queued = tables.add_target("t", dst_table="u", mode="async")
    tables.call("pause_target", target_id=direct)
    tables.source.sql("INSERT INTO t VALUES (2, 'queued', 2), (3, 'queued', 3); DELETE FROM t WHERE id = 1")
    text = pg_dump(tables.source)
    restored = Node(tables.source.cluster, extension=role == "owner")
    try:
        command = [str(restored.cluster.server.bindir / "psql"), "-X", "-q", "-h", str(restored.cluster.socket_dir),
                   "-p", str(restored.cluster.port), "-U", role, restored.dbname]  # fmt: skip
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env={"PGPASSWORD": "secret"}, check=False
        )
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        # the extensions dblink and postgres_fdw are not the owner's, here as everywhere
        assert [
            e for e in errors if not re.search(r"extension (dblink|postgres_fdw)|foreign-data wrapper", e)
        ] == []
        assert restored.rows("t") == tables.source.rows("t")
        view = "SELECT target_id, source_table::text, server, dst_table, mode, status, pending_rows FROM tbl_repl.target_status ORDER BY 1"
        assert restored.sql(view) == tables.source.sql(view)
        pending = "SELECT target_id, op, key FROM tbl_repl.pending ORDER BY 1, captured_at, key::text"
        assert restored.sql(pending) == tables.source.sql(pending) != []
        copies = "SELECT count(*) FROM tbl_repl.check() WHERE code = 'restored'"
        assert restored.one(copies) == 2
        restored.sql(f"SELECT tbl_repl.resume_target({direct})")
        restored.sql("CALL tbl_repl.drain()")
        restored.sql("INSERT INTO t VALUES (4, 'after', 4)")
        assert tables.target.sql("SELECT id, v FROM t ORDER BY id") == [
            (2, "QUEUED"),
            (3, "QUEUED"),
            (4, "AFTER"),
        ]
        restored.sql("CALL tbl_repl.drain()")
        assert tables.target.sql("SELECT id, v FROM u ORDER BY id") == [
            (2, "queued"),
            (3, "queued"),
            (4, "after"),
        ]
        assert restored.one(copies) == 0
        tables.target.sql("CREATE TABLE z (LIKE t INCLUDING ALL)")
        new = restored.one(f"SELECT tbl_repl.add_target('t', '{tables.server}', 'z')")
        assert new > queued
    finally:
        restored.close()


def test_a_restore_without_owners_by_a_superuser_is_mended_by_alter_target(tables: Pair) -> None:
    tables.both("CREATE TABLE u (LIKE t INCLUDING ALL)")
    targets = [
        tables.add_target("t", row_filter="n < 100"),
        tables.add_target("u", dst_table="t", mode="async"),
    ]
    text = pg_dump(tables.source, "--no-owner")
    restored = Node(tables.source.cluster, extension=False)
    try:
        restored.cluster.sql("GRANT CREATE ON SCHEMA public TO owner", dbname=restored.dbname)
        command = [str(restored.cluster.server.bindir / "psql"), "-X", "-q", "-h", str(restored.cluster.socket_dir),
                   "-p", str(restored.cluster.port), "-U", "postgres", restored.dbname]  # fmt: skip
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, env={"PGPASSWORD": "secret"}
        )
        assert "ERROR" not in done.stderr, done.stderr
        found = "SELECT code, hint FROM tbl_repl.check() WHERE severity = 'error' ORDER BY target_id, code"
        as_owner = restored.sql(found)
        # the filter is in the trigger function, which runs as the superuser now
        assert [code for code, _ in as_owner] == ["function_changed"] + [
            "owner_changed",
            "server_privilege",
        ] * 2
        assert "as that role: SELECT tbl_repl.alter_target(1);" in as_owner[1][1]
        restored.admin(
            f"ALTER TABLE t OWNER TO owner; ALTER TABLE u OWNER TO owner; ALTER SERVER {tables.server} OWNER TO owner"
        )
        restored.admin("INSERT INTO t VALUES (50, 'before', 50)")
        for target in targets:
            restored.sql(f"SELECT tbl_repl.alter_target({target})")
        assert restored.sql(found) == []
        assert restored.admin(
            "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'tbl_repl'::regnamespace AND proname ~ '_[0-9]+$'"
        ) == [("owner",)]
        restored.sql("INSERT INTO t VALUES (51, 'after', 51); INSERT INTO u VALUES (52, 'after', 52)")
        restored.sql("CALL tbl_repl.drain()")
        assert restored.sql("SELECT code FROM tbl_repl.check() WHERE code <> 'dblink_public'") == []
        assert tables.target.sql("SELECT id FROM t WHERE id >= 50 ORDER BY id") == [(50,), (51,), (52,)]
        for target in targets:
            restored.sql(f"SELECT tbl_repl.drop_target({target})")
    finally:
        restored.close()


def test_no_role(tables: Pair) -> None:
    refused(tables, "22004", lambda: tables.source.fresh("SELECT tbl_repl.grant_access(NULL, 'reader')"))
