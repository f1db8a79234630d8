"""The guard: a target table that only tbl_repl writes."""

from __future__ import annotations

import subprocess

import psycopg
import pytest
from psycopg import errors

from support import Node, Pair

WRITES = {
    "insert": "INSERT INTO t VALUES (9, 'x')",
    "update": "UPDATE t SET v = 'x'",
    "update of no row": "UPDATE t SET v = 'x' WHERE false",
    "delete": "DELETE FROM t",
    "truncate": "TRUNCATE t",
    "insert on conflict": "INSERT INTO t VALUES (1, 'x') ON CONFLICT (id) DO NOTHING",
    "merge": """MERGE INTO t USING (VALUES (1)) AS s (i) ON t.id = s.i
                WHEN MATCHED THEN UPDATE SET v = 'x'""",
}


def refused(node: Node, sql: str, user: str | None = None) -> errors.ReadOnlySqlTransaction:
    with pytest.raises(errors.ReadOnlySqlTransaction) as caught:
        node.sql(sql, user=user)
    return caught.value


def as_tbl_repl(node: Node, user: str = "owner") -> psycopg.Connection:
    """A session of that role that says to be tbl_repl."""
    return node.connect(user, application_name="tbl_repl test")


@pytest.fixture
def guarded(pair: Pair) -> Pair:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.target.sql("INSERT INTO t VALUES (1, 'a')")
    pair.target.sql("SELECT tbl_repl.protect('t')")
    return pair


@pytest.mark.once
@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_refused(guarded: Pair, name: str) -> None:
    if name == "merge" and guarded.major < 15:
        pytest.skip("MERGE came with 15")
    before = guarded.target.rows("t")
    error = refused(guarded.target, WRITES[name])
    assert error.diag.sqlstate == "25006"
    assert "public.t" in str(error.diag.message_primary)
    assert error.diag.message_hint
    assert guarded.target.rows("t") == before


def test_copy_is_refused(guarded: Pair) -> None:
    conn = guarded.target.connect()
    with pytest.raises(errors.ReadOnlySqlTransaction), conn.cursor().copy("COPY t FROM STDIN") as copy:
        copy.write("5\tx\n")
    assert guarded.target.rows("t") == ["(1,a)"]


def test_superusers_are_refused_too(guarded: Pair) -> None:
    with pytest.raises(errors.ReadOnlySqlTransaction):
        guarded.target.admin("DELETE FROM t")


def test_rows_can_be_read_and_locked(guarded: Pair) -> None:
    assert guarded.target.sql("SELECT v FROM t FOR UPDATE") == [("a",)]


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_replication_passes_the_guard(guarded: Pair, mode: str) -> None:
    guarded.add_target("t", mode=mode)
    guarded.source.sql("INSERT INTO t VALUES (2, 'b'), (3, 'c')")
    guarded.source.sql("UPDATE t SET id = 4, v = 'd' WHERE id = 3")
    guarded.source.sql("DELETE FROM t WHERE id = 2")
    guarded.drain()
    assert guarded.target.rows("t") == ["(1,a)", "(4,d)"]
    guarded.source.sql("TRUNCATE t")
    guarded.drain()
    assert guarded.target.rows("t") == []


def test_a_writer_that_only_may_write_the_table_meets_the_guard(guarded: Pair) -> None:
    """The trigger function asks for no right on schema tbl_repl."""
    guarded.target.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON t TO writer")
    refused(guarded.target, "DELETE FROM t", user="writer")


def test_an_application_name_alone_passes_where_no_replicator_was_given(guarded: Pair) -> None:
    """As the documentation says."""
    as_tbl_repl(guarded.target).execute("UPDATE t SET v = 'forged'")
    assert guarded.target.rows("t") == ["(1,forged)"]


def test_a_replicator_cannot_be_forged_by_an_application_name(guarded: Pair) -> None:
    guarded.target.sql("SELECT tbl_repl.protect('t', replicator => 'replicator')")
    guarded.target.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON t TO replicator, writer")
    for user in ("writer", "owner"):
        with pytest.raises(errors.ReadOnlySqlTransaction) as caught:
            as_tbl_repl(guarded.target, user).execute("UPDATE t SET v = 'forged'")
        assert "replicator" in str(caught.value)
    refused(guarded.target, "UPDATE t SET v = 'x'", user="replicator")
    as_tbl_repl(guarded.target, "replicator").execute("UPDATE t SET v = 'real'")
    assert guarded.target.rows("t") == ["(1,real)"]


def test_the_session_user_counts_not_the_current_one(guarded: Pair) -> None:
    guarded.target.sql("SELECT tbl_repl.protect('t', replicator => 'replicator')")
    guarded.target.sql("GRANT UPDATE, SELECT ON t TO replicator")
    role = guarded.target.role("impostor")
    conn = as_tbl_repl(guarded.target, role)
    guarded.target.sql("""
        CREATE FUNCTION write_t() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'UPDATE t SET v = 1'
        """)
    guarded.target.admin("ALTER FUNCTION write_t() OWNER TO replicator")
    with pytest.raises(errors.ReadOnlySqlTransaction):
        conn.execute("SELECT write_t()")


def test_members_of_the_replicator_pass(guarded: Pair) -> None:
    role = guarded.target.role("shipping", "LOGIN PASSWORD 'secret' IN ROLE replicator")
    guarded.target.sql("SELECT tbl_repl.protect('t', replicator => 'replicator')")
    guarded.target.sql("GRANT SELECT, UPDATE ON t TO replicator")
    as_tbl_repl(guarded.target, role).execute("UPDATE t SET v = 'm'")
    assert guarded.target.rows("t") == ["(1,m)"]


def test_a_replicator_that_is_gone_lets_nobody_through(guarded: Pair) -> None:
    role = guarded.target.role("short lived", "LOGIN PASSWORD 'secret'")
    guarded.target.sql("SELECT tbl_repl.protect('t', replicator => '\"short lived\"')")
    guarded.target.admin('ALTER ROLE "short lived" RENAME TO "other name"')
    try:
        with pytest.raises(errors.ReadOnlySqlTransaction):
            as_tbl_repl(guarded.target).execute("UPDATE t SET v = 'x'")
    finally:
        guarded.target.admin(f'ALTER ROLE "other name" RENAME TO "{role}"')


def test_protect_again_changes_the_replicator(guarded: Pair) -> None:
    guarded.target.sql("SELECT tbl_repl.protect('t', 'replicator')")
    with pytest.raises(errors.ReadOnlySqlTransaction):
        as_tbl_repl(guarded.target).execute("UPDATE t SET v = 'x'")
    guarded.target.sql("SELECT tbl_repl.protect('t')")
    as_tbl_repl(guarded.target).execute("UPDATE t SET v = 'x'")
    refused(guarded.target, "DELETE FROM t")


def test_unprotect_leaves_the_table_as_it_was(pair: Pair) -> None:
    pair.target.sql("""
        CREATE TABLE p (id integer PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)
        """)
    catalog = "SELECT count(*) FROM pg_trigger UNION ALL SELECT count(*) FROM pg_proc"
    before = pair.target.sql(catalog)
    pair.target.sql("SELECT tbl_repl.protect('p')")
    assert pair.target.sql(catalog) != before
    pair.target.sql("SELECT tbl_repl.unprotect('p')")
    assert pair.target.sql(catalog) == before
    pair.target.sql("SELECT tbl_repl.unprotect('p')")
    pair.target.sql("INSERT INTO p VALUES (1); TRUNCATE p1")


def test_cascades_pass_where_tbl_repl_deletes_the_parent(pair: Pair) -> None:
    pair.both("""
        CREATE TABLE t (id integer PRIMARY KEY);
        CREATE TABLE child (id integer PRIMARY KEY, t integer REFERENCES t ON UPDATE CASCADE ON DELETE CASCADE)
        """)
    pair.source.sql("INSERT INTO t VALUES (1), (2); INSERT INTO child VALUES (1, 1), (2, 2)")
    pair.add_target("t")
    pair.add_target("child")
    pair.target.sql("SELECT tbl_repl.protect('child')")
    pair.source.sql("DELETE FROM t WHERE id = 1")
    pair.source.sql("UPDATE t SET id = 3")
    pair.drain()
    assert pair.target.rows("child") == pair.source.rows("child") == ["(2,3)"]
    # but not where somebody else does: the parent is not guarded, the rows of the child would go
    refused(pair.target, "DELETE FROM t")
    assert pair.target.rows("child") == ["(2,3)"]


PARTITIONED = """
    CREATE TABLE t (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (0) TO (10);
    CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (10) TO (100) PARTITION BY RANGE (id);
    CREATE TABLE t_10 PARTITION OF t_high FOR VALUES FROM (10) TO (20);
    """


@pytest.mark.parametrize("way", ["protect", "protect_target"])
def test_partitions_cannot_be_written_directly(pair: Pair, way: str) -> None:
    pair.both(PARTITIONED)
    pair.source.sql("INSERT INTO t VALUES (1, 'a'), (11, 'b')")
    target = pair.add_target("t")
    if way == "protect":
        pair.target.sql("SELECT tbl_repl.protect('t')")
    else:
        pair.call("protect_target", target_id=target)
    pair.target.sql("CREATE TABLE t_20 PARTITION OF t_high FOR VALUES FROM (20) TO (30)")
    for sql in (
        "INSERT INTO t_low VALUES (2, 'x')",
        "INSERT INTO t_high VALUES (12, 'x')",
        "INSERT INTO t_20 VALUES (20, 'x')",
        "UPDATE t_10 SET v = 'x'",
        "DELETE FROM t_low",
        "TRUNCATE t_low",
        "TRUNCATE t_high",
        "TRUNCATE t_10",
        "TRUNCATE t",
    ):
        refused(pair.target, sql)
    pair.source.sql("UPDATE t SET id = 5 WHERE id = 11")
    pair.source.sql("TRUNCATE t_low")
    pair.source.sql("INSERT INTO t VALUES (15, 'c')")
    pair.drain()
    pair.assert_same("t")


def test_protecting_again_takes_in_new_partitions(pair: Pair) -> None:
    pair.target.sql(PARTITIONED)
    pair.target.sql("SELECT tbl_repl.protect('t')")
    pair.target.sql("CREATE TABLE t_20 PARTITION OF t_high FOR VALUES FROM (20) TO (30)")
    pair.target.sql("SELECT tbl_repl.protect('t')")
    refused(pair.target, "TRUNCATE t_20")


@pytest.mark.parametrize("way", ["protect", "protect_target"])
def test_unprotect_finds_what_is_left_on_detached_partitions(pair: Pair, way: str) -> None:
    pair.both(PARTITIONED)
    pair.target.sql("CREATE TABLE u (id integer PRIMARY KEY) PARTITION BY RANGE (id);"
                    "CREATE TABLE u_1 PARTITION OF u FOR VALUES FROM (0) TO (10); SELECT tbl_repl.protect('u')")  # fmt: skip
    catalog = "SELECT count(*) FROM pg_trigger UNION ALL SELECT count(*) FROM pg_proc"
    before = pair.target.sql(catalog)
    target = pair.add_target("t")

    def guard(verb: str) -> None:
        if way == "protect":
            pair.target.sql(f"SELECT tbl_repl.{verb}('t')")
        else:
            pair.call(f"{verb}_target", target_id=target)

    guard("protect")
    pair.target.sql("ALTER TABLE t DETACH PARTITION t_low; ALTER TABLE t DETACH PARTITION t_high")
    guard("unprotect")
    assert pair.target.sql(catalog) == before
    pair.target.sql("TRUNCATE t_low, t_high, t")
    refused(pair.target, "TRUNCATE u_1")


def test_a_guarded_partition_refuses_writes_that_name_its_parent(pair: Pair) -> None:
    pair.target.sql(PARTITIONED)
    pair.target.sql("SELECT tbl_repl.protect('t_low')")
    refused(pair.target, "INSERT INTO t VALUES (1, 'x')")
    pair.target.sql("INSERT INTO t VALUES (11, 'x')")
    # the guard of the parent takes over that of the partition
    pair.target.sql("SELECT tbl_repl.protect('t')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState) as caught:
        pair.target.sql("SELECT tbl_repl.unprotect('t_low')")
    assert "public.t" in str(caught.value.diag.message_hint)
    pair.target.sql("SELECT tbl_repl.unprotect('t')")
    pair.target.sql("INSERT INTO t_low VALUES (1, 'x'); TRUNCATE t")


@pytest.mark.plain_target
def test_protect_target_needs_no_extension_there(pair: Pair) -> None:
    pair.both('CREATE SCHEMA "Odd schema"; CREATE TABLE "Odd schema"."o\'dd" (id integer PRIMARY KEY)')
    functions = (
        "SELECT count(*) FROM pg_proc UNION ALL SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal"
    )
    before = pair.target.sql(functions)
    target = pair.add_target('"Odd schema"."o\'dd"')
    for _ in range(2):
        pair.call("protect_target", target_id=target)
    refused(pair.target, 'DELETE FROM "Odd schema"."o\'dd"')
    pair.source.sql('INSERT INTO "Odd schema"."o\'dd" VALUES (1)')
    pair.drain()
    assert pair.target.rows('"Odd schema"."o\'dd"') == ["(1)"]
    for _ in range(2):
        pair.call("unprotect_target", target_id=target)
    pair.target.sql('DELETE FROM "Odd schema"."o\'dd"')
    assert pair.target.sql(functions) == before


def test_protect_target_keeps_a_replicator(guarded: Pair) -> None:
    guarded.target.sql("SELECT tbl_repl.protect('t', 'owner')")
    target = guarded.add_target("t")
    guarded.call("protect_target", target_id=target)
    guarded.target.sql("GRANT UPDATE, SELECT ON t TO writer")
    with pytest.raises(errors.ReadOnlySqlTransaction):
        as_tbl_repl(guarded.target, "writer").execute("UPDATE t SET v = 'forged'")
    guarded.call("unprotect_target", target_id=target)
    guarded.target.sql("UPDATE t SET v = 'free'")


@pytest.mark.plain_target
def test_protect_target_says_what_it_needs(pair: Pair) -> None:
    """The mapped role must own the table and may create functions in its schema."""
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.source.sql("CREATE SCHEMA s; CREATE TABLE s.u (id integer PRIMARY KEY)")
    pair.target.admin("""
        CREATE SCHEMA s; CREATE TABLE s.u (id integer PRIMARY KEY);
        GRANT USAGE ON SCHEMA s TO owner; ALTER TABLE s.u OWNER TO owner;
        ALTER TABLE t OWNER TO writer; GRANT ALL ON t TO owner
        """)
    for table, word in (("t", "owner of table public.t"), ("s.u", "schema s")):
        target = pair.add_target(table)
        with pytest.raises(errors.InsufficientPrivilege) as caught:
            pair.call("protect_target", target_id=target)
        assert word in str(caught.value.diag.message_primary)
        assert caught.value.diag.message_hint
    assert pair.target.one("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%guard%'") == 0


def test_protect_target_is_for_the_owner_of_the_target(guarded: Pair) -> None:
    target = guarded.add_target("t")
    role = guarded.source.role("stranger")
    guarded.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    for verb in ("protect_target", "unprotect_target"):
        with pytest.raises(errors.InsufficientPrivilege):
            guarded.source.sql(f"SELECT tbl_repl.{verb}({target})", user=role)
        with pytest.raises(errors.UndefinedObject):
            guarded.source.sql(f"SELECT tbl_repl.{verb}(4711)")


def test_a_target_that_is_down_is_an_error_in_time(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    target = pair.add_target("t", timeout="1 s")
    proxy = pair.proxy()
    proxy.set("refuse")
    with pytest.raises(errors.OperationalError) as caught:
        pair.source.fresh(f"SELECT tbl_repl.protect_target({target})")
    assert str(caught.value.diag.sqlstate).startswith("08")


@pytest.mark.parametrize(
    ("call", "sqlstate"),
    [
        ("protect('v')", "42809"),
        ("unprotect('v')", "42809"),
        ("protect('theirs')", "42501"),
        ("unprotect('theirs')", "42501"),
        ("protect(NULL)", "22004"),
        ("protect('mine', 0::regrole)", "42704"),
        ("protect('mine', 'nobody_at_all')", "42704"),
    ],
)
def test_refusals(node: Node, call: str, sqlstate: str) -> None:
    node.sql("CREATE TABLE mine (i integer); CREATE VIEW v AS SELECT 1 AS i")
    node.admin("CREATE TABLE theirs (i integer); GRANT ALL ON theirs TO owner")
    with pytest.raises(psycopg.Error) as caught:
        node.sql(f"SELECT tbl_repl.{call}")
    assert caught.value.sqlstate == sqlstate
    assert node.one("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%guard%'") == 0


def test_guards_survive_dump_and_restore(guarded: Pair) -> None:
    guarded.target.sql("CREATE TABLE u (i integer PRIMARY KEY)")
    guarded.source.sql("CREATE TABLE u (i integer PRIMARY KEY)")
    target = guarded.add_target("u")
    guarded.target.sql("SELECT tbl_repl.protect('t', 'replicator')")
    guarded.call("protect_target", target_id=target)  # without a function of the extension
    cluster, name = guarded.target.cluster, guarded.target.dbname
    copy = f"{name}_copy"

    def run(program: str, *arguments: str, **options: bytes) -> bytes:
        command = [str(guarded.world.server.bindir / program), *arguments]
        env = guarded.world.server.env
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env, **options).stdout

    cluster.sql(f"CREATE DATABASE {copy}")
    try:
        run("pg_restore", "-d", cluster.dsn(copy), input=run("pg_dump", "-Fc", "-d", cluster.dsn(name)))
        with cluster.connect(copy) as conn:
            assert conn.execute("SELECT v FROM t").fetchall() == [("a",)]
            for table in ("t", "u"):
                with pytest.raises(errors.ReadOnlySqlTransaction):
                    conn.execute(f"DELETE FROM {table}")
            conn.execute("SET application_name = 'tbl_repl x'")
            conn.execute("DELETE FROM t")  # a superuser is a member of every role
        with cluster.connect(copy, "owner") as conn:
            conn.execute("SET application_name = 'tbl_repl x'")
            with pytest.raises(errors.ReadOnlySqlTransaction):
                conn.execute("DELETE FROM t")
            conn.execute("DELETE FROM u")
    finally:
        cluster.sql(f"DROP DATABASE {copy}")


def test_the_extension_cannot_be_dropped_under_a_guard(guarded: Pair) -> None:
    with pytest.raises(errors.DependentObjectsStillExist):
        guarded.target.sql("DROP EXTENSION tbl_repl")
    guarded.target.sql("SELECT tbl_repl.unprotect('t')")
    guarded.target.sql("DROP EXTENSION tbl_repl")
