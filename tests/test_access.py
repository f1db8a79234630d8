"""Who may do what: writers nothing, readers read, operators run targets of their own tables."""

from __future__ import annotations

import pytest
from psycopg import errors

from support import Node, Pair

# Every right that a role could have on anything in schema tbl_repl, as the catalog knows it.
RIGHTS = """
SELECT kind, name, privilege FROM (
    SELECT 'schema' AS kind, n.nspname::text AS name, p AS privilege, has_schema_privilege({role}, n.oid, p) AS granted
    FROM pg_namespace n, unnest('{{USAGE,CREATE}}'::text[]) p WHERE n.nspname = 'tbl_repl'
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'sequence' ELSE 'relation' END, c.oid::regclass::text, p,
           CASE WHEN c.relkind = 'S' THEN has_sequence_privilege({role}, c.oid, p) ELSE has_table_privilege({role}, c.oid, p) END
    FROM pg_class c
    CROSS JOIN LATERAL unnest(CASE c.relkind WHEN 'S' THEN '{{USAGE,SELECT,UPDATE}}'::text[]
        ELSE '{{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}' END) p
    WHERE c.relnamespace = 'tbl_repl'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
    UNION ALL
    SELECT 'column', c.oid::regclass || '.' || a.attname, p, has_column_privilege({role}, c.oid, a.attnum, p)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped,
         unnest('{{SELECT,INSERT,UPDATE,REFERENCES}}'::text[]) p
    WHERE c.relnamespace = 'tbl_repl'::regnamespace AND c.relkind IN ('r', 'p', 'v')
    UNION ALL
    SELECT 'routine', f.oid::regprocedure::text, 'EXECUTE', has_function_privilege({role}, f.oid, 'EXECUTE')
    FROM pg_proc f WHERE f.pronamespace = 'tbl_repl'::regnamespace
) AS r WHERE granted
"""

# What may be done with nothing but 'reader': no row contents, no effect on anything.
READABLE = {"target_status", "pending", "quarantine", "conflict_log", "copy_progress", "node"}


def rights(node: Node, role: str) -> set[tuple[str, str, str]]:
    rows = node.admin(RIGHTS.format(role=f"'{role}'"))
    return {(kind, name.removeprefix("tbl_repl."), privilege) for kind, name, privilege in rows}


@pytest.fixture
def used(pair: Pair) -> Pair:
    """Targets in every mode, so that everything that is generated is there."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.both("""
        CREATE TABLE p (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)
        """)
    for mode, table in (("sync", "t"), ("tolerant", "u"), ("async", "v")):
        if table != "t":
            pair.both(f"CREATE TABLE {table} (id integer PRIMARY KEY, v text)")
        pair.add_target(table, mode=mode, row_filter="id < 1000")
    pair.add_target("p")
    pair.target.sql("SELECT tbl_repl.protect('p')")
    return pair


def test_the_catalog_query_sees_rights(used: Pair) -> None:
    """Or the tests below would prove nothing."""
    found = rights(used.source, "owner")
    assert {kind for kind, _, _ in found} == {"schema", "relation", "column", "sequence", "routine"}
    assert len(found) > 200


def test_writers_have_no_right_on_anything(used: Pair) -> None:
    used.source.sql("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON t, u, v, p TO writer")
    for node in used.nodes:
        assert rights(node, "writer") == set()


def test_and_yet_their_writes_are_replicated(used: Pair) -> None:
    used.source.sql("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON t, u, v, p TO writer")
    for table in "tuvp":
        used.source.sql(f"INSERT INTO {table} VALUES (1, 'a'), (2, 'b')", user="writer")
        used.source.sql(f"UPDATE {table} SET id = 3 WHERE id = 1", user="writer")
        used.source.sql(f"DELETE FROM {table} WHERE id = 2", user="writer")
    used.drain()
    for table in "tuvp":
        used.assert_same(table)
        assert used.target.rows(table) == ["(3,a)"]


def test_public_has_no_right_on_anything(used: Pair) -> None:
    public = """
        SELECT 'routine', f.oid::regprocedure::text FROM pg_proc f
        CROSS JOIN LATERAL aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) a
        WHERE f.pronamespace = 'tbl_repl'::regnamespace AND a.grantee = 0
        UNION ALL
        SELECT 'relation', c.oid::regclass::text FROM pg_class c
        CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
        WHERE c.relnamespace = 'tbl_repl'::regnamespace AND a.grantee = 0
        UNION ALL
        SELECT 'schema', n.nspname::text FROM pg_namespace n
        CROSS JOIN LATERAL aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
        WHERE n.nspname = 'tbl_repl' AND a.grantee = 0
        """
    for node in used.nodes:
        assert node.admin(public) == []


def test_functions_made_on_a_target_are_not_for_everybody(used: Pair) -> None:
    target = used.source.one("SELECT min(target_id) FROM tbl_repl.target")
    used.call("protect_target", target_id=target)
    name = used.target.one(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE '\\_tbl\\_repl\\_guard%'"
    )
    assert name
    assert not used.target.admin("SELECT has_function_privilege('writer', %s, 'EXECUTE')", [name])[0][0]


def test_readers_read_the_views_and_nothing_else(used: Pair) -> None:
    role = used.source.role("reader_1")
    used.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'reader')")
    found = rights(used.source, role)
    assert {name for kind, name, privilege in found if kind == "relation"} == READABLE
    assert {privilege for kind, _, privilege in found if kind != "routine"} == {"USAGE", "SELECT"}
    assert ("schema", "tbl_repl", "CREATE") not in found
    assert {name for kind, name, _ in found if kind == "sequence"} == set()
    # of the log of errors everything but the statements, for rows are in them
    logged = {name for kind, name, _ in found if kind == "column" and name.startswith("error_log")}
    assert logged == {f"error_log.{c}" for c in ("at", "target_id", "key", "sqlstate", "message", "hint")}
    executable = {name for kind, name, _ in found if kind == "routine"}
    assert executable
    others = {"node_name()", "change_token()", "wait_for(integer,text,interval)"}
    assert all(name.startswith(("_pending_", "_key_")) or name in others for name in executable)
    assert rights(used.source, "writer") == set()


def test_readers_can_really_read(used: Pair) -> None:
    role = used.source.role("reader_2")
    used.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'reader')")
    used.source.sql("INSERT INTO v VALUES (5, 'secret')")
    read = {
        "SELECT count(*) FROM tbl_repl.target_status": 4,
        "SELECT key FROM tbl_repl.pending": {"id": 5},
        "SELECT count(*) FROM tbl_repl.quarantine": 0,
        "SELECT count(*) FROM tbl_repl.conflict_log": 0,
        "SELECT count(message) FROM tbl_repl.error_log": 0,
        "SELECT length(tbl_repl.node_name()) > 0": True,
    }
    for query, expected in read.items():
        assert used.source.one(query, user=role) == expected, query
    for query in (
        "SELECT * FROM tbl_repl.sync_err_rec",
        "SELECT statement FROM tbl_repl.error_log",
        "SELECT * FROM tbl_repl.target",
        "SELECT * FROM tbl_repl.check()",
        "SELECT tbl_repl.replay()",
        "SELECT tbl_repl.explain_target(1)",
        "SELECT * FROM tbl_repl.compare_target(1)",
        "SELECT tbl_repl.grant_access(current_user::regrole, 'operator')",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            used.source.sql(query, user=role)


def test_operators_run_targets_of_their_own_tables(pair: Pair) -> None:
    role = pair.source.role("operator_1")
    pair.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    pair.source.sql(f"GRANT USAGE ON FOREIGN SERVER {pair.server} TO {role}")
    pair.source.sql(
        f"CREATE USER MAPPING FOR {role} SERVER {pair.server} OPTIONS (user 'owner', password 'secret')"
    )
    pair.both(
        "CREATE TABLE mine (id integer PRIMARY KEY, v text); CREATE TABLE others (id integer PRIMARY KEY)"
    )
    pair.source.admin(f"ALTER TABLE mine OWNER TO {role}; GRANT SELECT ON mine TO owner")
    other = pair.add_target("others")
    for mode in ("sync", "async"):
        target = pair.source.one(
            f"SELECT tbl_repl.add_target('mine', '{pair.server}', mode => '{mode}')", user=role
        )
        pair.source.sql("INSERT INTO mine VALUES (1, 'a')", user=role)
        pair.source.sql("CALL tbl_repl.drain()", user=role)
        assert pair.target.rows("mine") == ["(1,a)"]
        assert pair.source.sql("SELECT * FROM tbl_repl.compare_target(%s)", [target], user=role) == []
        pair.target.sql("DELETE FROM mine")
        assert pair.source.one("SELECT tbl_repl.repair_target(%s)", [target], user=role) == 1
        pair.source.sql("CALL tbl_repl.drain()", user=role)
        pair.source.sql("SELECT tbl_repl.protect_target(%s)", [target], user=role)
        with pytest.raises(errors.ReadOnlySqlTransaction):
            pair.target.sql("DELETE FROM mine")
        pair.source.sql("SELECT tbl_repl.unprotect_target(%s)", [target], user=role)
        assert pair.source.one("SELECT count(*) FROM tbl_repl.explain_target(%s)", [target], user=role) == 1
        for verb in ("pause_target", "resume_target", "resync_target", "alter_target"):
            pair.source.sql(f"SELECT tbl_repl.{verb}({target})", user=role)
        found = pair.source.sql(
            "SELECT code FROM tbl_repl.check() WHERE target_id = %s AND severity = 'error'",
            [target],
            user=role,
        )
        assert found == []
        pair.source.sql("CALL tbl_repl.drain()", user=role)
        pair.assert_same("mine")
        pair.source.sql(f"SELECT tbl_repl.drop_target({target})", user=role)
        pair.source.sql("DELETE FROM mine", user=role)
        pair.target.sql("DELETE FROM mine")
    for verb in (
        "pause_target",
        "resume_target",
        "resync_target",
        "drop_target",
        "alter_target",
        "protect_target",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            pair.source.sql(f"SELECT tbl_repl.{verb}({other})", user=role)
    with pytest.raises(errors.InsufficientPrivilege):
        pair.source.sql(f"SELECT tbl_repl.add_target('others', '{pair.server}', 'public.mine')", user=role)
    with pytest.raises(errors.InsufficientPrivilege):
        pair.source.sql("SELECT tbl_repl.set_node_name('x')", user=role)


def test_operators_may_run_whatever_runs_as_owner_of_a_target(node: Node) -> None:
    """Everything but what only the extension's owner does, and what triggers call."""
    role = node.role("operator")
    node.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    assert node.sql(
        "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'tbl_repl'::regnamespace"
        " AND NOT has_function_privilege(%s, oid, 'EXECUTE') ORDER BY 1",
        [role],
    ) == [("_flush",), ("grant_access",), ("set_node_name",)]


def test_operators_cannot_make_a_definition_run_as_somebody_else(used: Pair) -> None:
    role = used.source.role("operator_2")
    used.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    with pytest.raises(errors.InsufficientPrivilege):
        used.source.sql(
            "INSERT INTO tbl_repl.target SELECT (t).* FROM (SELECT t FROM tbl_repl.target t LIMIT 1) x",
            user=role,
        )
    before = used.source.sql("SELECT t::text FROM tbl_repl.target t ORDER BY 1")
    used.source.sql("UPDATE tbl_repl.target SET filter_expr = 'evil()'", user=role)
    used.source.sql("DELETE FROM tbl_repl.target", user=role)
    assert used.source.sql("SELECT t::text FROM tbl_repl.target t ORDER BY 1") == before


@pytest.mark.parametrize("level", ["admin", "", None])
def test_unknown_levels_are_refused_with_the_known_ones(node: Node, level: str | None) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        node.sql("SELECT tbl_repl.grant_access('writer', %s)", [level])
    assert "operator, reader" in str(caught.value.diag.message_hint)
    assert rights(node, "writer") == set()


def test_access_can_be_granted_to_a_role_with_an_odd_name(node: Node) -> None:
    role = node.role('Odd "role"'.replace('"', ""))
    node.sql("SELECT tbl_repl.grant_access(%s::regrole, 'reader')", [f'"{role}"'])
    assert node.one("SELECT count(*) FROM tbl_repl.target_status", user=role) == 0


def two_targets(pair: Pair, *names: str) -> list[int]:
    """Roles that are operators, and two targets of t, defined by the first role, which owns t."""
    for name in names:
        role = pair.source.role(name)
        pair.source.sql(
            f"SELECT tbl_repl.grant_access('{role}', 'operator'); GRANT USAGE ON SCHEMA public TO {role}"
        )
    definer = names[0]
    pair.source.sql(
        f"GRANT USAGE ON FOREIGN SERVER {pair.server} TO {definer};"
        f"CREATE USER MAPPING FOR {definer} SERVER {pair.server} OPTIONS (user 'owner', password 'secret')"
    )
    pair.both(
        "CREATE TABLE t (id integer PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE t_1 PARTITION OF t DEFAULT"
    )
    pair.target.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    pair.source.admin(f"ALTER TABLE t OWNER TO {definer}; ALTER TABLE t_1 OWNER TO {definer}")
    return [
        pair.source.one(
            f"SELECT tbl_repl.add_target('t', '{pair.server}', '{dst}', mode => '{mode}')", user=definer
        )
        for dst, mode in (("t", "tolerant"), ("u", "async"))
    ]


LEFT = """
    SELECT count(*) FROM pg_trigger WHERE tgrelid IN ('t'::regclass, 't_1'::regclass) AND NOT tgisinternal
    UNION ALL SELECT count(*) FROM pg_proc WHERE pronamespace = 'tbl_repl'::regnamespace AND proname ~ '_[0-9]+$'
    UNION ALL SELECT count(*) FROM tbl_repl.source UNION ALL SELECT count(*) FROM tbl_repl.target
    UNION ALL SELECT count(*) FROM tbl_repl.change
"""


@pytest.mark.once
@pytest.mark.parametrize("who", ["definer", "new_owner", "owner", "postgres"])
def test_a_target_is_dropped_when_its_table_belongs_to_somebody_else(pair: Pair, who: str) -> None:
    """By the role that defined it, the owner of the table, that of the extension, a superuser."""
    targets = two_targets(pair, "definer", "new_owner", "stranger")
    pair.source.admin("ALTER TABLE t OWNER TO new_owner; ALTER TABLE t_1 OWNER TO new_owner")
    pair.source.sql("INSERT INTO t VALUES (1)", user="new_owner")
    with pytest.raises(errors.InsufficientPrivilege) as caught:
        pair.source.sql(f"SELECT tbl_repl.drop_target({targets[0]})", user="stranger")
    assert "owner of the table" in (caught.value.diag.message_hint or "")
    if who == "owner":
        # the triggers of another role's table are not his to make
        pair.source.sql(f"SELECT tbl_repl.drop_target({targets[1]})", user="definer")
        targets.pop()
    for target in targets:
        pair.source.sql(f"SELECT tbl_repl.drop_target({target})", user=who)
        pair.source.sql("INSERT INTO t SELECT max(id) + 1 FROM t", user="new_owner")
    assert [n for (n,) in pair.source.admin(LEFT)] == [0] * 5


def test_what_is_left_goes_on_when_the_owner_of_the_table_drops_a_target(pair: Pair) -> None:
    first, second = two_targets(pair, "definer", "new_owner")
    pair.source.admin(
        "ALTER TABLE t OWNER TO new_owner; ALTER TABLE t_1 OWNER TO new_owner; GRANT SELECT ON t TO definer"
    )
    pair.source.sql(f"SELECT tbl_repl.drop_target({first})", user="new_owner")
    pair.source.sql("INSERT INTO t VALUES (1), (2); DELETE FROM t WHERE id = 1", user="new_owner")
    pair.source.sql("CALL tbl_repl.drain()", user="definer")
    assert pair.target.rows("u") == ["(2)"]
    pair.source.sql(f"SELECT tbl_repl.drop_target({second})", user="new_owner")
    assert [n for (n,) in pair.source.admin(LEFT)] == [0] * 5


def test_who_drops_the_last_target_when_the_owner_of_the_table_has_dropped_another(pair: Pair) -> None:
    first, second = two_targets(pair, "definer", "new_owner")
    pair.source.admin(
        "ALTER TABLE t OWNER TO new_owner; ALTER TABLE t_1 OWNER TO new_owner; GRANT SELECT ON t TO definer"
    )
    pair.source.sql(f"SELECT tbl_repl.drop_target({first})", user="new_owner")
    with pytest.raises(errors.InsufficientPrivilege, match="must be owner of table") as caught:
        pair.source.sql(f"SELECT tbl_repl.drop_target({second})", user="definer")
    assert caught.value.diag.message_hint == "Let role new_owner drop it."
    pair.source.sql(f"SELECT tbl_repl.drop_target({second})", user="new_owner")
    pair.source.sql("INSERT INTO t VALUES (1)", user="new_owner")
    assert [n for (n,) in pair.source.admin(LEFT)] == [0] * 5


def test_a_definer_that_is_no_member_of_the_owner_any_more_drops_his_target(pair: Pair) -> None:
    targets = two_targets(pair, "definer", "new_owner")
    pair.source.admin(
        "ALTER TABLE t OWNER TO new_owner; GRANT new_owner TO definer; REVOKE new_owner FROM definer"
    )
    pair.source.sql(f"SELECT tbl_repl.drop_target('t', '{pair.server}', 'u')", user="definer")
    pair.source.sql("INSERT INTO t VALUES (1)", user="new_owner")
    pair.source.sql(f"SELECT tbl_repl.drop_target({targets[0]})", user="definer")
    assert [n for (n,) in pair.source.admin(LEFT)] == [0] * 5


def test_nobody_drops_functions_that_are_needed(pair: Pair) -> None:
    targets = two_targets(pair, "definer", "stranger")
    # as a restore without owners leaves them: only the role that defined the target has them go
    pair.source.admin(f"ALTER FUNCTION tbl_repl.page_{targets[0]}(text, integer) OWNER TO owner")
    before = pair.source.admin(LEFT)
    for target in targets:
        pair.source.sql(
            f"SELECT tbl_repl._drop_orphans({target}, source_id) FROM tbl_repl.source", user="stranger"
        )
    assert pair.source.admin(LEFT) == before
    pair.source.sql(f"BEGIN; SAVEPOINT s; SELECT tbl_repl.alter_target({targets[0]}); COMMIT", user="definer")
    assert pair.source.admin(LEFT) == before
    assert (
        pair.source.one(
            "SELECT proowner::regrole::text FROM pg_proc WHERE proname = %s", [f"page_{targets[0]}"]
        )
        == "definer"
    )


def test_a_superuser_drops_the_target_of_a_role_that_was_renamed(pair: Pair) -> None:
    targets = two_targets(pair, "definer")
    pair.source.admin("ALTER ROLE definer RENAME TO definer_2")
    try:
        for target in targets:
            pair.source.admin(f"SELECT tbl_repl.drop_target({target})")
    finally:
        pair.source.admin("ALTER ROLE definer_2 RENAME TO definer")
    assert [n for (n,) in pair.source.admin(LEFT)] == [0] * 5


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_role_that_was_renamed_is_in_nobodys_way(pair: Pair, analyzed: bool) -> None:
    """Its targets are dropped by the owner of the table, who is that role; another one runs his own."""
    targets = two_targets(pair, "definer", "neighbour")
    pair.both("CREATE TABLE n (id integer PRIMARY KEY)")
    pair.source.admin(f"""
        ALTER TABLE n OWNER TO neighbour; GRANT USAGE ON FOREIGN SERVER {pair.server} TO neighbour;
        CREATE USER MAPPING FOR neighbour SERVER {pair.server} OPTIONS (user 'owner', password 'secret')
        """)
    other = pair.source.one(f"SELECT tbl_repl.add_target('n', '{pair.server}')", user="neighbour")
    pair.source.admin("ALTER ROLE definer RENAME TO definer_2; ALTER ROLE definer_2 PASSWORD 'secret'")
    try:
        if analyzed:  # the rows are looked at in another order
            pair.source.admin("ANALYZE")
        for verb in ("alter_target", "pause_target", "resume_target"):
            pair.source.sql(f"SELECT tbl_repl.{verb}({other})", user="neighbour")
        with pytest.raises(errors.InsufficientPrivilege, match="must be owner of target") as caught:
            pair.source.sql(f"SELECT tbl_repl.alter_target({targets[0]})", user="definer_2")
        assert "rename it back" in (caught.value.diag.message_hint or "")
        hints = pair.source.admin(
            "SELECT hint FROM tbl_repl.check() WHERE code = 'owner_missing' ORDER BY target_id"
        )
        assert ["rename it back" in hint for (hint,) in hints] == [True, True]
        pair.source.sql(f"SELECT tbl_repl.drop_target({other})", user="neighbour")
        for target in targets:
            pair.source.sql(f"SELECT tbl_repl.drop_target({target})", user="definer_2")
        pair.source.sql("INSERT INTO t VALUES (1)", user="definer_2")
    finally:
        pair.source.admin("ALTER ROLE definer_2 RENAME TO definer")
    assert [n for (n,) in pair.source.admin(LEFT)] == [0] * 5
