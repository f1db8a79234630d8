"""Nothing breaks out of a literal, no search_path leads astray, writers have no right on anything of ours."""

from __future__ import annotations

import psycopg
import pytest

from support import Pair

NASTY = [
    "'",
    "''); DELETE FROM victim; --",
    "'); DELETE FROM victim; --",
    "\\'); DELETE FROM victim; --",
    "\\",
    "\\\\'",
    "$$); DELETE FROM victim; --",
    "$body$ $sql$ $function$ $piece$",
    "$1 $2 $99",
    "%s %I %L %1$s %%",
    "{op} {keys} {rows} {into} {clause}",
    '"',
    '"; DELETE FROM victim; --',
    "new\nline\r\n\ttab",
    "/* comment",
    "-- comment",
    "E'\\x27'",
    "\\x27 \\047 U&'\\0027'",
    "NULL",
    '{a,"b",NULL}',
    '["json", null]',
    "‘’ʼ＇",
    "",
]


@pytest.fixture
def victim(pair: Pair) -> Pair:
    pair.both("CREATE TABLE victim (id integer PRIMARY KEY); INSERT INTO victim VALUES (1)")
    return pair


def unharmed(pair: Pair) -> bool:
    return all(node.one("SELECT count(*) FROM victim") == 1 for node in pair.nodes)


@pytest.mark.parametrize("conforming", ["on", "off"])
@pytest.mark.parametrize("key", ["id", "id, v"])
def test_values_cannot_break_out(victim: Pair, key: str, conforming: str) -> None:
    victim.both(f"CREATE TABLE t (id text, v text NOT NULL, PRIMARY KEY ({key}))")
    victim.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    direct = victim.add_target("t")
    victim.add_target("t", dst_table="u", mode="async")
    conn = victim.source.connect()
    conn.execute(
        f"SET standard_conforming_strings = {conforming}; SET escape_string_warning = off; SET backslash_quote = on"
    )
    for value in NASTY:
        conn.execute("INSERT INTO t VALUES (%s, %s)", [value, value])
    victim.assert_same("t")
    conn.execute("UPDATE t SET id = id || '!', v = id || v")
    victim.assert_same("t")
    for value in NASTY[::2]:
        conn.execute("DELETE FROM t WHERE id = %s", [value + "!"])
    conn.execute("CALL tbl_repl.drain()")
    victim.assert_same("t")
    victim.assert_same("t", "u")
    assert victim.status(direct) == "ok"
    assert unharmed(victim)


def test_values_in_what_is_shown_are_the_sql_that_is_sent(victim: Pair) -> None:
    """explain_target and sync_err_rec can be run as they stand, and then the row is there."""
    victim.both("CREATE TABLE t (id text PRIMARY KEY, v text)")
    target = victim.add_target("t")
    victim.call("pause_target", target_id=target)
    for value in NASTY:
        victim.source.sql("INSERT INTO t VALUES (%s, %s)", [value, value])
    shown = [row[0] for row in victim.source.sql("SELECT dst_query FROM tbl_repl.sync_err_rec ORDER BY id")]
    assert len(shown) == len(NASTY)
    with victim.target.connect() as conn:
        for statement in shown:
            conn.execute(statement)
    victim.assert_same("t")
    victim.target.sql("TRUNCATE t")
    with victim.target.connect() as conn:
        for value in NASTY:
            for (statement,) in victim.source.sql(
                "SELECT tbl_repl.explain_target(%s, jsonb_build_object('id', %s::text))", [target, value]
            ):
                conn.execute(statement)
    victim.assert_same("t")
    assert unharmed(victim)


@pytest.mark.parametrize("conforming", ["on", "off"])
def test_literals_of_filters_and_maps_cannot_break_out(victim: Pair, conforming: str) -> None:
    """They mean the same in every session, also where a backslash escapes."""
    victim.both("CREATE TABLE t (id integer PRIMARY KEY, v text, w text)")
    for n, value in enumerate(NASTY):
        literal = "'" + value.replace("'", "''") + "'"
        victim.target.sql(f"CREATE TABLE t{n} (LIKE t INCLUDING ALL)")
        victim.add_target("t", dst_table=f"t{n}", row_filter=f"v = {literal}", column_map={"w": f"v || {literal}"},
                          mode="tolerant" if n % 2 else "async")  # fmt: skip
    conn = victim.source.connect()
    conn.execute(f"SET standard_conforming_strings = {conforming}; SET escape_string_warning = off")
    for n, value in enumerate(NASTY):
        conn.execute("INSERT INTO t VALUES (%s, %s, 'w')", [n, value])
    conn.execute("CALL tbl_repl.drain()")
    for n, value in enumerate(NASTY):
        assert victim.target.sql(f"TABLE t{n}") == [(n, value, value * 2)], value
    conn.execute("TRUNCATE t")
    conn.execute("CALL tbl_repl.drain()")
    assert [victim.target.one(f"SELECT count(*) FROM t{n}") for n in range(len(NASTY))] == [0] * len(NASTY)
    assert unharmed(victim)


def test_one_filter_alone_in_a_session_where_a_backslash_escapes(victim: Pair) -> None:
    """The filter is in the trigger function only where it is the only one."""
    victim.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    victim.add_target("t", row_filter=r"v = 'a\' || ''''")
    conn = victim.source.connect()
    conn.execute("SET standard_conforming_strings = off; SET escape_string_warning = off")
    conn.execute("INSERT INTO t VALUES (1, %s), (2, 'b')", ["a\\'"])
    assert victim.target.sql("TABLE t") == [(1, "a\\'")]


def test_server_names_and_passwords_cannot_break_out(victim: Pair) -> None:
    victim.target.sql("CREATE TABLE t (id integer PRIMARY KEY)")
    victim.source.sql("CREATE TABLE t (id integer PRIMARY KEY)")
    password = 'it\'s "q" \\ $$ %s'
    role = victim.target.role("odd role")
    victim.target.admin("ALTER ROLE \"odd role\" PASSWORD 'it''s \"q\" \\ $$ %s'")
    victim.target.sql('GRANT ALL ON t TO "odd role"')
    for name in NASTY:
        if not name:
            continue
        server = '"' + name.replace('"', '""') + '"'
        port, dbname = victim.target.cluster.port, victim.target.dbname
        victim.source.sql(
            f"CREATE SERVER {server} FOREIGN DATA WRAPPER dblink_fdw OPTIONS (host '127.0.0.1', port '{port}', dbname '{dbname}')"
        )
        literal = password.replace("'", "''")
        victim.source.sql(
            f"CREATE USER MAPPING FOR owner SERVER {server} OPTIONS (user '{role}', password '{literal}')"
        )
        target = victim.add_target("t", server=name)
        victim.source.sql("INSERT INTO t VALUES (1)")
        assert victim.target.one("SELECT count(*) FROM t") == 1, name
        assert victim.source.one("SELECT server FROM tbl_repl.target_status") == name
        victim.source.sql("SELECT tbl_repl.replay(%s)", [name])
        victim.call("drop_target", target_id=target)
        victim.source.sql("TRUNCATE t")
        victim.target.sql("TRUNCATE t")
    assert unharmed(victim)


INJECTIONS = [
    "true) OR (SELECT true",
    "true); DELETE FROM victim; --",
    "true; DELETE FROM victim",
    "true) FROM victim AS s; DELETE FROM victim; SELECT (true",
    "true) AS tbl_repl_x FROM t AS s; DELETE FROM victim; --",
    "true) AS tbl_repl_x FROM t AS s --",
    "true) AS tbl_repl_x, (true",
    "true) UNION SELECT (true",
    "true) UNION ALL SELECT FROM victim WHERE (true",
    "true) GROUP BY (v",
    "true) FOR UPDATE --",
    "true) INTO victim --",
    "true /*",
    "(WITH d AS (DELETE FROM victim RETURNING *) SELECT true FROM d)",
    "EXISTS (DELETE FROM victim RETURNING *)",
    "'",
    "$$",
    "\\",
    "",
]


@pytest.mark.parametrize("mapped", [False, True], ids=["row_filter", "column_map"])
def test_injection_through_expressions_is_refused(victim: Pair, mapped: bool) -> None:
    """Nothing of it runs, not even what comes before the error."""
    victim.both("CREATE TABLE t (id integer PRIMARY KEY, v boolean)")
    accepted = []
    for text in INJECTIONS:
        if text == "" and not mapped:
            continue
        try:
            target = victim.add_target(
                "t", **({"column_map": {"v": text}} if mapped else {"row_filter": text})
            )
        except psycopg.Error as error:
            assert (error.sqlstate or "")[:2] in ("42", "0A"), (text, error)
        else:
            accepted.append(
                (text, victim.source.one("SELECT coalesce(filter_expr, sent_exprs[2]) FROM tbl_repl.target"))
            )
            victim.call("drop_target", target_id=target)
        assert unharmed(victim), text
    assert accepted == []


@pytest.mark.parametrize(
    "dst_table",
    [
        "t; DELETE FROM victim",
        "t AS d (id) VALUES (1); DELETE FROM victim; --",
        't"; DELETE FROM victim; --',
        "t(id)",
    ],
)
def test_injection_through_dst_table_is_refused(victim: Pair, dst_table: str) -> None:
    victim.both("CREATE TABLE t (id integer PRIMARY KEY)")
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        victim.add_target("t", dst_table=dst_table)
    with pytest.raises(psycopg.errors.UndefinedTable):
        victim.add_target("t", dst_table='"' + dst_table.replace('"', '""') + '"')
    assert unharmed(victim)


def test_names_of_map_entries_cannot_break_out(victim: Pair) -> None:
    for n, name in enumerate(NASTY):
        if not name:
            continue
        quoted = '"' + name.replace('"', '""') + '"'
        victim.source.sql(f"CREATE TABLE t{n} (id integer PRIMARY KEY, v text)")
        victim.target.sql(f"CREATE TABLE t{n} (id integer PRIMARY KEY, {quoted} text)")
        victim.add_target(f"t{n}", columns=["id"], column_map={name: "upper(v)"})
        victim.source.sql(f"INSERT INTO t{n} VALUES (1, 'a'), (2, 'b'); UPDATE t{n} SET v = 'c' WHERE id = 1")
        assert victim.target.sql(f"TABLE t{n} ORDER BY id") == [(1, "C"), (2, "B")], name
    assert unharmed(victim)


# --- rights


def test_a_writer_needs_and_has_no_right_on_anything_of_ours(victim: Pair) -> None:
    victim.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    victim.add_target("t", row_filter="v <> ''")
    victim.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    victim.add_target("t", dst_table="u", mode="async")
    victim.source.sql("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON t TO writer")
    writer = victim.source.connect("writer")
    writer.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    writer.execute("UPDATE t SET v = 'c'; DELETE FROM t WHERE id = 2")
    victim.assert_same("t")
    writer.execute("TRUNCATE t")
    victim.assert_same("t")
    rights = victim.source.admin(
        """
        SELECT 'schema', 'tbl_repl' WHERE has_schema_privilege('writer', 'tbl_repl', 'USAGE, CREATE')
        UNION ALL SELECT 'function', oid::regprocedure::text FROM pg_proc
            WHERE pronamespace = 'tbl_repl'::regnamespace AND has_function_privilege('writer', oid, 'EXECUTE')
        UNION ALL SELECT 'table', oid::regclass::text FROM pg_class
            WHERE relnamespace = 'tbl_repl'::regnamespace AND CASE relkind WHEN 'S' THEN has_sequence_privilege('writer', oid, 'USAGE, SELECT, UPDATE')
                WHEN 'i' THEN false WHEN 'I' THEN false
                ELSE has_any_column_privilege('writer', oid, 'SELECT, INSERT, UPDATE, REFERENCES') OR has_table_privilege('writer', oid, 'DELETE, TRUNCATE, TRIGGER') END
        """
    )
    assert rights == []
    for statement in (
        "TABLE tbl_repl.target",
        "TABLE tbl_repl.target_status",
        "SELECT tbl_repl.replay()",
        "SELECT tbl_repl.render_1('{1}', false, true, 'plain')",
        "SELECT tbl_repl.page_1(NULL, 10)",
        "SELECT tbl_repl.connect_1('x', now(), now())",
        "INSERT INTO tbl_repl.change DEFAULT VALUES",
        "CREATE TEMP TABLE x (id integer); CREATE TRIGGER x AFTER INSERT ON x EXECUTE FUNCTION tbl_repl.capture_1()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            writer.execute(statement)
    public = victim.source.admin(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'tbl_repl'::regnamespace"
        " AND (proacl IS NULL OR EXISTS (SELECT FROM aclexplode(proacl) AS a WHERE a.grantee = 0))"
    )
    assert public == []


def test_a_hostile_search_path_of_the_writer_is_not_used(victim: Pair) -> None:
    """The writer's own functions, operators and tables come first in his path; none of ours calls them."""
    victim.both("CREATE TABLE t (id integer PRIMARY KEY, v text, at timestamptz)")
    victim.add_target("t", row_filter="length(v) > 1 AND at < now() + '1 day'", column_map={"v": "upper(v)"})
    victim.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    victim.add_target("t", dst_table="u", mode="async")
    victim.source.sql(
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON t TO writer; GRANT USAGE ON SCHEMA public TO writer"
    )
    victim.source.admin(
        "CREATE SCHEMA hostile AUTHORIZATION writer; CREATE TABLE public.caught (who text, what text); GRANT ALL ON public.caught TO writer, owner"
    )
    writer = victim.source.connect("writer")
    body = (
        "LANGUAGE plpgsql AS $$BEGIN INSERT INTO public.caught VALUES (current_user, '{}'); RETURN {}; END$$"
    )
    for signature, kind, result in (
        ("upper(text)", "text", "'hijacked'"),
        ("length(text)", "integer", "1"),
        ("now()", "timestamptz", "'infinity'"),
        ("format(text, VARIADIC text[])", "text", "'SELECT 1'"),
        ("format(text, integer)", "text", "'SELECT 1'"),
        ("current_setting(text, boolean)", "text", "'x'"),
        ("current_setting(text)", "text", "'x'"),
        ("cardinality(text[])", "integer", "0"),
        ("array_agg_(text)", "text", "'x'"),
        ("clock_timestamp()", "timestamptz", "'infinity'"),
        ("concat_ws(text, VARIADIC text[])", "text", "'x'"),
        ("pg_current_xact_id()", "xid8", "'1'"),
        ("equal_int(integer, integer)", "boolean", "false"),
        ("equal_text(text, text)", "boolean", "false"),
        ("greater_int(integer, integer)", "boolean", "false"),
    ):
        writer.execute(
            f"CREATE FUNCTION hostile.{signature} RETURNS {kind} {body.format(signature.split('(')[0], result)}"
        )
    writer.execute(
        "CREATE OPERATOR hostile.= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = hostile.equal_int);"
        "CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.equal_text);"
        "CREATE OPERATOR hostile.> (LEFTARG = integer, RIGHTARG = integer, FUNCTION = hostile.greater_int);"
        "CREATE TABLE hostile.stash (id integer); CREATE TABLE hostile.change (id integer); CREATE TABLE hostile.new_rows (id integer);"
        "CREATE TABLE hostile.pg_class (oid oid); CREATE DOMAIN hostile.text AS pg_catalog.text CHECK (false)"
    )
    writer.execute("SET search_path = hostile, pg_catalog, public")
    writer.execute(
        "CREATE TEMP TABLE pg_proc (oid oid); CREATE TEMP TABLE new_rows (id integer); CREATE TEMP TABLE target (id integer)"
    )
    writer.execute(
        "INSERT INTO public.t VALUES (1, 'a', '2024-01-01'), (2, 'bb', '2024-01-01'), (3, 'cc', '2024-01-01')"
    )
    writer.execute("UPDATE public.t SET v = 'dd', at = '2025-01-01' WHERE id OPERATOR(pg_catalog.=) 2")
    writer.execute("DELETE FROM public.t WHERE id OPERATOR(pg_catalog.=) 3")
    assert victim.target.sql("SELECT id, v FROM t") == [(2, "DD")]
    victim.drain()
    victim.assert_same("t", "u")
    writer.execute("TRUNCATE public.t")
    victim.drain()
    assert victim.target.rows("t") == victim.target.rows("u") == []
    assert victim.source.admin("TABLE public.caught") == []


def test_expressions_mean_what_they_meant_to_their_author(victim: Pair) -> None:
    """Resolved once, by the caller's path; later objects of the same name change nothing."""
    victim.source.sql(
        "CREATE SCHEMA app; CREATE FUNCTION app.mask(text) RETURNS text LANGUAGE sql AS $$SELECT 'app ' || $1$$;"
        "CREATE FUNCTION app.wanted(integer) RETURNS boolean LANGUAGE sql AS $$SELECT $1 > 1$$;"
        "CREATE TYPE app.level AS ENUM ('low', 'high')"
    )
    victim.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v text, l app.level)")
    victim.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text, l text)")
    conn = victim.source.connect()
    conn.execute("SET search_path = app, public")
    conn.execute(
        f"""SELECT tbl_repl.add_target('t', '{victim.server}', row_filter => 'wanted(id) AND l = ''high''::level',
            column_map => '{{"v": "mask(v)"}}')"""
    )
    victim.source.sql(
        "CREATE FUNCTION public.mask(text) RETURNS text LANGUAGE sql AS $$SELECT 'public ' || $1$$;"
        "CREATE FUNCTION public.wanted(integer) RETURNS boolean LANGUAGE sql AS 'SELECT false'; GRANT INSERT ON t TO writer"
    )
    victim.source.sql(
        "INSERT INTO t VALUES (1, 'a', 'high'), (2, 'b', 'high'), (3, 'c', 'low')", user="writer"
    )
    assert victim.target.sql("TABLE t") == [(2, "app b", "high")]


def test_filter_and_map_run_as_the_owner_of_the_definition(victim: Pair) -> None:
    victim.source.sql(
        "CREATE TABLE secret (id integer PRIMARY KEY, name text); INSERT INTO secret VALUES (1, 'one')"
    )
    victim.source.sql("CREATE FUNCTION who() RETURNS text LANGUAGE sql STABLE AS 'SELECT current_user::text'")
    victim.source.sql("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    victim.target.sql("CREATE TABLE t (id integer PRIMARY KEY, v text, who text)")
    victim.add_target(
        "t", columns=["id"], column_map={"v": "(SELECT name FROM secret WHERE secret.id = s.id)", "who": "who()"},
        row_filter="EXISTS (SELECT FROM secret WHERE secret.id = s.id)",
    )  # fmt: skip
    victim.source.sql("GRANT INSERT, UPDATE ON t TO writer")
    victim.source.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')", user="writer")
    assert victim.target.sql("TABLE t") == [(1, "one", "owner")]


def test_targets_of_two_owners_do_not_run_each_others_expressions(victim: Pair) -> None:
    """A role that may act for the table's owner defines the second target: its filter runs as itself."""
    victim.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    victim.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    helper = victim.source.role("helper")
    victim.source.admin(f"GRANT owner TO {helper}")
    victim.source.sql(f"GRANT USAGE ON FOREIGN SERVER {victim.server} TO {helper};"
                      f"CREATE USER MAPPING FOR {helper} SERVER {victim.server} OPTIONS (user 'owner', password 'secret')")  # fmt: skip
    victim.source.sql(
        "CREATE FUNCTION is_owner() RETURNS boolean LANGUAGE sql STABLE AS $$SELECT current_user = 'owner'$$"
    )
    victim.add_target("t", row_filter="is_owner()")
    victim.source.sql(
        f"SELECT tbl_repl.add_target('t', '{victim.server}', 'u', row_filter => 'NOT is_owner()')",
        user=helper,
    )
    victim.source.sql("INSERT INTO t VALUES (1, 'x')")
    victim.source.sql("UPDATE t SET v = 'y'")
    assert victim.target.sql("TABLE t") == victim.target.sql("TABLE u") == [(1, "y")]
