"""check() names every problem, on both sides, with a hint that mends it; and is silent when all is well."""

from __future__ import annotations

import re
import time

import pytest
from psycopg import errors

from support import Node, Pair, wait_until
from support.background import start
from support.programs import dsn_of, tbl_repl

# On every server where nobody has revoked it; it has a test of its own.
EVERYWHERE = "dblink_public"


def problems(pair: Pair, user: str | None = None) -> list[tuple[str, str, int | None]]:
    """(severity, code, target_id) of every row but those about dblink; each has message and hint."""
    rows = pair.source.sql("SELECT * FROM tbl_repl.check()", user=user)
    assert all(message and hint for _, _, _, message, hint in rows)
    return [(severity, code, target) for target, severity, code, _, _ in rows if code != EVERYWHERE]


def codes(pair: Pair) -> list[str]:
    return [code for _, code, _ in problems(pair)]


def hint(pair: Pair, code: str) -> str:
    rows = [row for row in pair.source.sql("SELECT * FROM tbl_repl.check()") if row[2] == code]
    assert len(rows) == 1, rows
    return str(rows[0][4])


def mend(pair: Pair, code: str, node: Node | None = None) -> None:
    """Run the first command of the hint."""
    found = re.search(r"(SELECT|CALL|ALTER|GRANT|CREATE) [^;]*;", hint(pair, code))
    assert found, hint(pair, code)
    (node or pair.source).sql(found.group(0))


@pytest.fixture
def well(pair: Pair) -> Pair:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    return pair


def test_nothing_to_say_without_targets(pair: Pair) -> None:
    assert pair.source.sql("SELECT * FROM tbl_repl.check()") == []


@pytest.mark.parametrize("mode", ["sync", "tolerant", "async"])
def test_silent_when_all_is_well(well: Pair, mode: str) -> None:
    well.both("""
        CREATE TABLE p (id text, d date, g text GENERATED ALWAYS AS (id) STORED, v jsonb, PRIMARY KEY (d, id)) PARTITION BY RANGE (d);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
        CREATE TABLE k (id integer PRIMARY KEY, t integer REFERENCES t, u text UNIQUE, f float8, n numeric(4,1))
        """)
    for table in ("t", "p", "k"):
        well.add_target(table, mode=mode)
    well.source.sql("CREATE TABLE m (id integer PRIMARY KEY, email text, secret text)")
    well.target.sql("CREATE TABLE m (no integer PRIMARY KEY, mail text)")
    well.add_target(
        "m",
        mode=mode,
        columns=[],
        column_map={"no": "id", "mail": "md5(email) || E'\\\\'"},
        row_filter="id > 0",
    )
    well.source.sql(
        "INSERT INTO t VALUES (1); INSERT INTO k VALUES (1, 1, 'u', 0.1, 2); INSERT INTO p VALUES ('a', '2026-01-02')"
    )
    well.target.sql("SELECT tbl_repl.protect('t')")
    well.drain()
    assert problems(well) == []


@pytest.mark.plain_target
def test_silent_with_a_plain_target(well: Pair) -> None:
    well.add_target("t")
    assert problems(well) == []


def test_dblink_open_to_everybody_and_the_commands_that_close_it(well: Pair) -> None:
    target = well.add_target("t", mode="sync")
    rows = [row for row in well.source.sql("SELECT * FROM tbl_repl.check()") if row[2] == EVERYWHERE]
    assert len(rows) == 1
    assert rows[0][:2] == (None, "warning")
    commands = re.search(r"DO .*;", rows[0][4])
    assert commands and len(rows[0][4]) < 700
    well.source.admin(commands.group(0))
    well.source.forget()
    assert well.source.sql("SELECT * FROM tbl_repl.check()") == []
    # a writer can no longer reach the target through our connection, and we still can
    well.source.sql("GRANT SELECT, INSERT ON t TO writer")
    writer = well.source.connect("writer")
    writer.execute("INSERT INTO t VALUES (1, 'by a writer')")
    well.assert_same("t")
    with pytest.raises(Exception, match="permission denied"):
        writer.execute("SELECT dblink_get_connections()")
    well.call("compare_target", target_id=target)
    well.drain()


def test_targets_of_one_server_have_different_timeouts(well: Pair) -> None:
    well.both("CREATE TABLE u (id integer PRIMARY KEY)")
    well.add_target("t", timeout="5 s")
    second = well.add_target("u", timeout="6 s")
    assert problems(well) == [("warning", "timeouts_differ", second)]
    hint = well.source.one("SELECT hint FROM tbl_repl.check() WHERE code = 'timeouts_differ'")
    well.source.sql(hint)
    assert problems(well) == []


@pytest.mark.once
def test_a_server_that_takes_no_writes(trio: Pair) -> None:
    """A standby, to which a name or address leads after a switch."""
    trio.both("CREATE TABLE t (id integer PRIMARY KEY)")
    target = trio.add_target("t", mode="async")
    trio.target.demote()
    try:
        assert ("error", "remote_read_only", target) in problems(trio)
    finally:
        trio.target.promote()
    trio.source.sql("INSERT INTO t VALUES (1)")
    trio.drain()
    trio.assert_same("t")


@pytest.mark.once
def test_a_promoted_source_is_told_of_until_its_targets_are_repaired(pair: Pair) -> None:
    """What it has lost nobody can know; restored to an earlier time it is promoted, too."""
    for table in "tuvw":
        pair.both(f"CREATE TABLE {table} (id integer PRIMARY KEY)")
    targets = [pair.add_target(table) for table in "tuvw"]
    pair.source.demote()
    pair.source.promote()
    pair.source.sql("INSERT INTO t VALUES (1)")
    pair.drain()
    assert problems(pair) == [("warning", "timeline_changed", target) for target in targets]
    pair.target.sql("INSERT INTO t VALUES (2)")
    hint = pair.source.one("SELECT hint FROM tbl_repl.check() WHERE target_id = %s", [targets[0]])
    for command in hint.partition(": ")[2].partition(" or ")[0].split(";")[:3]:
        pair.source.sql(command)
    pair.assert_same("t")
    pair.call("resync_target", target_id=targets[1])
    pair.call("alter_target", target_id=targets[3])
    pair.drain()
    assert tbl_repl("repair", str(targets[2]), "--dsn", dsn_of(pair.source)).returncode == 0
    left = [targets[1], targets[3]]
    assert problems(pair) == [("warning", "timeline_changed", target) for target in left]
    for target in left:
        pair.call("repair_target", target_id=target)
    assert problems(pair) == []


def test_a_role_that_is_read_only_by_default_writes_all_the_same(pair: Pair) -> None:
    """Nor do its bounds for transactions hold for those that wait for the source."""
    pair.source.sql("CREATE TABLE t (id integer PRIMARY KEY)")
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, slow text)")
    role = pair.target.user
    settings = {"default_transaction_read_only": "on", "idle_in_transaction_session_timeout": "1"}
    if pair.major >= 17:
        settings["transaction_timeout"] = "300"
    with pair.target.cluster.connect() as superuser:
        for name, value in settings.items():
            superuser.execute(f"ALTER ROLE {role} IN DATABASE {pair.target.dbname} SET {name} = {value}")
    pair.add_target(
        "t", mode="sync", column_map={"slow": "CASE WHEN id % 100 = 0 THEN pg_sleep(0.03)::text END"}
    )
    pair.source.sql("INSERT INTO t SELECT generate_series(1, 2000)")
    assert pair.target.one("SELECT count(*) FROM t") == 2000
    assert codes(pair) == []


def test_a_session_that_quotes_all_identifiers_finds_the_same(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", row_filter="id > 0")
    with pair.source.connect() as conn:
        conn.execute("SET quote_all_identifiers = on")
        assert (
            conn.execute("SELECT code FROM tbl_repl.check() WHERE code <> 'dblink_public'").fetchall() == []
        )
        conn.execute("SELECT tbl_repl.alter_target(1, row_filter => 'id > 1')")
    assert codes(pair) == []


def test_check_beside_targets_that_come_and_go(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY)")
    with pair.source.connect() as conn:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        pair.call("drop_target", target_id=pair.add_target("t"))
        found = conn.execute(
            "SELECT code FROM tbl_repl._target_problems((SELECT ROW(t.*)::tbl_repl.target FROM"
            ' jsonb_populate_record(NULL::tbl_repl.target, \'{"target_id": 1, "source_id": 1}\') AS t))'
        ).fetchall()
        assert found == []
        assert conn.execute("SELECT rows FROM tbl_repl._pending_rows(1)").fetchone() == (0,)


def test_a_target_that_is_down_hides_no_other(trio: Pair) -> None:
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY)")
    first = trio.add_target("t", timeout="1 s")
    again = trio.add_target("u", timeout="1 s")
    second = trio.add_target("t", trio.third_server)
    assert trio.third is not None
    trio.third.sql("DROP TABLE t")
    trio.proxy().set("blackhole")
    trio.source.forget()
    if trio.major < 16:  # from there on dblink cannot bound connecting
        started = time.monotonic()
        found = problems(trio)
        assert time.monotonic() - started < 5
    else:
        trio.proxy().set("refuse")
        found = problems(trio)
    assert found == [
        ("error", "unreachable", first),
        ("error", "unreachable", again),
        ("error", "remote_table_missing", second),
    ]


def test_a_target_that_hangs_is_waited_for_once(trio: Pair) -> None:
    trio.both("CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE u (id integer PRIMARY KEY)")
    first = trio.add_target("t", timeout="1 s")
    again = trio.add_target("u", timeout="1 s")
    trio.add_target("t", trio.third_server)
    assert problems(trio) == []
    with trio.target.frozen():
        started = time.monotonic()
        found = problems(trio)
        assert time.monotonic() - started < 3.5
    assert found == [("error", "unreachable", first), ("error", "unreachable", again)]


def test_server_dropped(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql(f"DROP SERVER {well.server} CASCADE")
    assert problems(well) == [("error", "server_missing", target)]


def test_mapping_dropped(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql(f"DROP USER MAPPING FOR owner SERVER {well.server}")
    assert problems(well) == [("error", "mapping_missing", target)]
    assert "CREATE USER MAPPING FOR owner SERVER target_server" in hint(well, "mapping_missing")


def test_no_right_on_the_server(well: Pair) -> None:
    well.add_target("t")
    well.source.admin(f"ALTER SERVER {well.server} OWNER TO postgres")
    assert codes(well) == ["server_privilege"]
    found = re.search(r"GRANT .*;", hint(well, "server_privilege"))
    assert found
    well.source.admin(found.group(0))
    assert problems(well) == []


@pytest.fixture
def definers(well: Pair) -> tuple[Pair, int]:
    """t belongs to role definer, who has defined its tolerant target; role heir has no rights."""
    for role in ("definer", "heir"):
        well.source.role(role)
    well.source.sql(f"""
        SELECT tbl_repl.grant_access('definer', 'operator'); GRANT USAGE ON FOREIGN SERVER {well.server} TO definer;
        CREATE USER MAPPING FOR definer SERVER {well.server} OPTIONS (user 'owner', password 'secret')
        """)
    well.source.admin(
        "ALTER TABLE t OWNER TO definer; GRANT SELECT ON t TO owner; GRANT USAGE, CREATE ON SCHEMA public TO definer, heir"
    )
    return well, well.source.one(f"SELECT tbl_repl.add_target('t', '{well.server}')", user="definer")


def test_a_definer_who_lost_the_rights_on_tbl_repl(definers: tuple[Pair, int]) -> None:
    pair, target = definers
    assert problems(pair) == []
    pair.source.admin("""
        REVOKE ALL ON ALL TABLES IN SCHEMA tbl_repl FROM definer; REVOKE ALL ON ALL ROUTINES IN SCHEMA tbl_repl FROM definer;
        REVOKE ALL ON SCHEMA tbl_repl FROM definer
        """)
    with pytest.raises(errors.InsufficientPrivilege):
        pair.source.sql("INSERT INTO t VALUES (1)", user="definer")
    assert problems(pair) == [("error", "capture_without_rights", target)]
    mend(pair, "capture_without_rights")
    assert problems(pair) == []
    pair.source.sql("INSERT INTO t VALUES (1)", user="definer")
    pair.assert_same("t")
    pair.source.admin("REVOKE INSERT ON tbl_repl.stash FROM definer")
    assert problems(pair) == [("error", "capture_without_rights", target)]
    mend(pair, "capture_without_rights")
    pair.source.admin(
        'REVOKE EXECUTE ON FUNCTION tbl_repl._capture_by_snapshot(integer, text[], "char", text[], text[]) FROM definer'
    )
    assert problems(pair) == [("error", "capture_without_rights", target)]
    mend(pair, "capture_without_rights")
    assert problems(pair) == []


def test_a_definer_without_rights_beside_a_capture_that_works(definers: tuple[Pair, int]) -> None:
    pair, target = definers
    pair.source.sql("SELECT tbl_repl.grant_access('heir', 'operator')")
    pair.source.admin("""
        GRANT definer TO heir; ALTER FUNCTION tbl_repl.capture_1() OWNER TO heir; REVOKE ALL ON SCHEMA tbl_repl FROM definer
        """)
    assert problems(pair) == [("error", "target_without_rights", target)]
    mend(pair, "target_without_rights")
    assert problems(pair) == []


def test_what_belongs_to_a_role_without_rights_since_reassign_owned(definers: tuple[Pair, int]) -> None:
    pair, target = definers
    pair.source.admin("REASSIGN OWNED BY definer TO heir")
    with pytest.raises(errors.InsufficientPrivilege):
        pair.source.sql("INSERT INTO t VALUES (1)", user="heir")
    found = problems(pair)
    assert found[0] == ("error", "capture_without_rights", target)
    assert not {"definition_broken", "unreachable"} & {code for _, code, _ in found}
    assert (
        "role heir"
        in pair.source.sql("SELECT message FROM tbl_repl.check() WHERE code = 'capture_without_rights'")[0][0]
    )
    mend(pair, "capture_without_rights")
    pair.source.sql("INSERT INTO t VALUES (1)", user="heir")
    assert [row for row in problems(pair) if row[0] == "error"] == [("error", "owner_changed", target)]
    pair.source.admin("GRANT ALL ON t TO definer")
    with pytest.raises(errors.InsufficientPrivilege, match="belong to role heir") as caught:
        pair.source.sql(f"SELECT tbl_repl.alter_target({target})", user="definer")
    assert "add it anew" in (caught.value.diag.message_hint or "")
    command = hint(pair, "owner_changed").removeprefix("As the owner of the table: ").partition(";")[0]
    pair.source.sql(command, user="heir")
    pair.source.sql("INSERT INTO t VALUES (2)", user="heir")
    assert problems(pair) == []


def test_a_trigger_function_whose_owner_does_not_exist(definers: tuple[Pair, int]) -> None:
    pair, target = definers
    pair.source.admin("UPDATE pg_proc SET proowner = 1 WHERE proname = 'capture_1'")
    assert problems(pair)[0] == ("error", "capture_without_rights", target)
    pair.source.admin("ALTER FUNCTION tbl_repl.capture_1() OWNER TO definer")
    assert problems(pair) == []


def test_wrong_password(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql(f"ALTER USER MAPPING FOR owner SERVER {well.server} OPTIONS (SET password 'wrong')")
    well.source.forget()
    rows = well.source.sql("SELECT * FROM tbl_repl.check() WHERE code = 'unreachable'")
    assert [row[0] for row in rows] == [target]
    assert "password authentication failed" in rows[0][3]
    assert "wrong" not in str(rows)


def test_remote_table_dropped(well: Pair) -> None:
    target = well.add_target("t")
    well.target.sql("DROP TABLE t")
    assert problems(well) == [("error", "remote_table_missing", target)]


def test_remote_unique_index_dropped(well: Pair) -> None:
    well.add_target("t")
    well.target.sql("ALTER TABLE t DROP CONSTRAINT t_pkey")
    assert codes(well) == ["remote_key_missing"]
    mend(well, "remote_key_missing", well.target)
    assert problems(well) == []


def test_remote_privilege_revoked(well: Pair) -> None:
    well.source.sql(f"ALTER USER MAPPING FOR owner SERVER {well.server} OPTIONS (SET user 'replicator')")
    well.target.sql("GRANT ALL ON t TO replicator; SELECT tbl_repl.grant_access('replicator', 'operator')")
    well.add_target("t")
    assert problems(well) == []
    well.target.sql("REVOKE DELETE ON t FROM replicator")
    assert codes(well) == ["remote_privilege"]
    mend(well, "remote_privilege", well.target)
    assert problems(well) == []


def test_row_security_on_the_target(well: Pair) -> None:
    well.source.sql(f"ALTER USER MAPPING FOR owner SERVER {well.server} OPTIONS (SET user 'replicator')")
    well.target.sql("GRANT ALL ON t TO replicator; SELECT tbl_repl.grant_access('replicator', 'operator')")
    target = well.add_target("t")
    well.source.sql("INSERT INTO t VALUES (1, 'a')")
    warned = [("warning", "remote_row_security", target)]
    for policies in (
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY r ON t FOR SELECT USING (true); CREATE POLICY i ON t FOR INSERT WITH CHECK (true);"
        "CREATE POLICY u ON t FOR UPDATE USING (true)",
        "CREATE POLICY d ON t FOR DELETE TO owner USING (true)",
    ):
        well.target.sql(policies)
        assert problems(well) == warned
    well.source.sql("DELETE FROM t")
    assert well.target.rows("t") == ["(1,a)"]  # what is warned of
    well.target.sql("DELETE FROM t; ALTER POLICY d ON t TO replicator")
    assert problems(well) == []
    well.target.sql(
        "DROP POLICY r ON t; DROP POLICY i ON t; DROP POLICY u ON t; DROP POLICY d ON t; CREATE POLICY a ON t USING (id > 0)"
    )
    assert problems(well) == warned
    well.target.sql("ALTER POLICY a ON t USING (true)")
    assert problems(well) == []
    well.target.sql("CREATE POLICY n ON t AS RESTRICTIVE FOR DELETE USING (false)")
    assert problems(well) == warned
    well.target.admin("ALTER ROLE replicator BYPASSRLS")
    try:
        assert problems(well) == []
    finally:
        well.target.admin("ALTER ROLE replicator NOBYPASSRLS")


def test_usage_of_the_schema_revoked_on_the_target(pair: Pair) -> None:
    for node in pair.nodes:
        node.sql(
            "CREATE SCHEMA s; CREATE TABLE s.t (id integer PRIMARY KEY); CREATE TABLE s.u (id integer PRIMARY KEY)"
        )
    pair.target.admin("ALTER SCHEMA s OWNER TO postgres; GRANT USAGE ON SCHEMA s TO owner")
    target = pair.add_target("s.t")
    assert problems(pair) == []
    pair.target.admin("REVOKE USAGE ON SCHEMA s FROM owner")
    assert problems(pair) == [("error", "remote_privilege", target)]
    with pytest.raises(errors.InsufficientPrivilege, match="may not use schema s on the target") as caught:
        pair.add_target("s.u")
    assert caught.value.diag.message_hint == hint(pair, "remote_privilege")
    pair.target.admin(hint(pair, "remote_privilege").removeprefix("There: "))
    assert problems(pair) == []
    pair.add_target("s.u")


@pytest.mark.parametrize(
    ("ddl", "code"),
    [
        ("ALTER TABLE t DROP COLUMN v", "remote_column_missing"),
        ("ALTER TABLE t ALTER v TYPE varchar(50)", "remote_column_changed"),
        ("ALTER TABLE t ADD more integer NOT NULL", "remote_column_required"),
        ("ALTER TABLE t ADD UNIQUE (v)", "remote_constraints_changed"),
        ("CREATE TABLE child (t integer REFERENCES t)", "remote_constraints_changed"),
    ],
)
def test_drift_on_the_target(well: Pair, ddl: str, code: str) -> None:
    well.add_target("t")
    well.target.sql(ddl)
    assert codes(well) == [code]
    if "changed" in code:
        mend(well, code)
        assert problems(well) == []


def test_what_the_target_may_have_more_is_no_problem(well: Pair) -> None:
    well.add_target("t")
    well.target.sql(
        "ALTER TABLE t ADD more integer DEFAULT 1 NOT NULL, ADD other text; ALTER TABLE t ALTER v SET NOT NULL"
    )
    well.target.sql("CREATE INDEX ON t (v)")
    assert problems(well) == []


def test_a_column_added_on_the_source(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("ALTER TABLE t ADD more integer")
    assert problems(well) == [("notice", "column_not_sent", target)]
    well.target.sql("ALTER TABLE t ADD more integer")
    mend(well, "column_not_sent")
    assert problems(well) == []


def test_a_column_that_was_left_out_on_purpose_is_none(well: Pair) -> None:
    well.source.sql("ALTER TABLE t ADD more integer, ADD raw text")
    well.add_target("t", columns=["id"], column_map={"v": "upper(raw)"})
    assert problems(well) == []


def test_a_column_dropped_on_the_source(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("ALTER TABLE t DROP COLUMN v")
    assert problems(well) == [("error", "source_column_missing", target)]
    mend(well, "source_column_missing")
    assert problems(well) == []


def test_an_expression_whose_column_was_dropped(well: Pair) -> None:
    well.source.sql("ALTER TABLE t ADD raw text, ADD flag boolean")
    mapped = well.add_target("t", columns=["id"], column_map={"v": "upper(raw)"})
    well.both("CREATE TABLE u (LIKE t INCLUDING ALL)")
    filtered = well.add_target("t", dst_table="u", columns=["id"], row_filter="flag")
    well.source.sql("ALTER TABLE t DROP COLUMN raw, DROP COLUMN flag")
    assert [row for row in problems(well) if row[1] == "definition_broken"] == [
        ("error", "definition_broken", mapped),
        ("error", "definition_broken", filtered),
    ]


def test_the_type_of_a_key_altered(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("ALTER TABLE t ALTER id TYPE bigint")
    found = problems(well)
    assert ("error", "function_changed", target) in found
    mend_all = f"SELECT tbl_repl.alter_target({target})"
    assert mend_all in str(well.source.sql("SELECT hint FROM tbl_repl.check()"))
    well.source.sql(mend_all)
    assert problems(well) == []


def test_the_key_of_the_source_dropped(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("ALTER TABLE t DROP CONSTRAINT t_pkey")
    assert ("error", "source_key_missing", target) in problems(well)


def test_a_key_column_dropped(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("ALTER TABLE t DROP COLUMN id")
    with pytest.raises(errors.UndefinedColumn):
        well.source.sql("INSERT INTO t VALUES ('a')")
    assert problems(well) == [
        ("error", "source_key_missing", target),
        ("error", "source_column_missing", target),
    ]
    assert hint(well, "source_key_missing") == hint(well, "source_column_missing")
    mend(well, "source_key_missing")
    well.both("ALTER TABLE t ALTER v SET NOT NULL, ADD UNIQUE (v)")
    well.target.sql("ALTER TABLE t DROP COLUMN id")
    well.source.sql("INSERT INTO t VALUES ('a')")
    well.add_target("t", key_columns=["v"])
    assert problems(well) == []
    well.assert_same("t")


def test_a_key_column_renamed(well: Pair) -> None:
    target = well.add_target("t")
    well.both("ALTER TABLE t RENAME id TO no")
    assert ("error", "source_key_missing", target) in problems(well)
    mend(well, "source_key_missing")
    assert problems(well) == []


def test_the_source_table_dropped(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("DROP TABLE t")
    assert ("error", "source_missing", target) in problems(well)
    mend(well, "source_missing")
    assert problems(well) == []


@pytest.mark.parametrize("suffix", ["insert", "update", "delete", "truncate"])
def test_a_trigger_dropped_or_disabled(well: Pair, suffix: str) -> None:
    target = well.add_target("t")
    trigger = well.source.one("SELECT tgname FROM pg_trigger WHERE tgname LIKE %s", [f"%\\_{suffix}"])
    well.source.sql(f"ALTER TABLE t DISABLE TRIGGER {trigger}")
    assert problems(well) == [("error", "trigger_disabled", target)]
    mend(well, "trigger_disabled")
    assert problems(well) == []
    well.source.sql(f"DROP TRIGGER {trigger} ON t")
    assert problems(well) == [("error", "trigger_missing", target)]
    mend(well, "trigger_missing")
    assert problems(well) == []


def test_triggers_disabled_on_one_partition(pair: Pair) -> None:
    pair.both("""
        CREATE TABLE p (id integer PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)
        """)
    pair.add_target("p")
    assert problems(pair) == []
    pair.source.sql("ALTER TABLE p1 DISABLE TRIGGER USER")
    assert set(codes(pair)) == {"trigger_disabled"}


def test_children_by_inheritance(well: Pair) -> None:
    well.add_target("t")
    well.source.sql("CREATE TABLE child () INHERITS (t)")
    assert codes(well) == ["inheritance"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_table_that_becomes_a_partition(well: Pair, mode: str) -> None:
    target = well.add_target("t", mode=mode)
    well.source.sql("CREATE TABLE root (LIKE t INCLUDING ALL) PARTITION BY RANGE (id)")
    well.source.sql("ALTER TABLE root ATTACH PARTITION t DEFAULT")
    assert ("error", "became_partition", target) in problems(well)
    mend(well, "became_partition")
    well.source.sql(
        "INSERT INTO root VALUES (1, 'x'), (2, 'x'); UPDATE root SET v = 'y'; DELETE FROM root WHERE id = 2"
    )
    well.drain()
    well.assert_same("t")
    assert problems(well) == []


def test_a_table_that_gets_a_parent_or_a_child(well: Pair) -> None:
    target = well.add_target("t", mode="async")
    well.source.sql("CREATE TABLE parent (id integer NOT NULL, v text); ALTER TABLE t INHERIT parent")
    assert problems(well) == [("error", "inheritance", target)]
    well.source.sql("ALTER TABLE t NO INHERIT parent; CREATE TABLE child () INHERITS (t)")
    assert problems(well) == [("error", "inheritance", target)]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_partition_that_was_detached_is_a_table_of_its_own(well: Pair, mode: str) -> None:
    well.both("CREATE TABLE p (id integer PRIMARY KEY) PARTITION BY RANGE (id)")
    well.both("CREATE TABLE p_1 PARTITION OF p DEFAULT")
    target = well.add_target("p", mode=mode)
    well.source.sql("INSERT INTO p VALUES (1), (2)")
    well.drain()
    well.source.sql("ALTER TABLE p DETACH PARTITION p_1")
    assert problems(well) == [("warning", "trigger_left", target)]
    well.source.sql("TRUNCATE p_1")
    well.drain()
    assert well.target.rows("p") == ["(1)", "(2)"]
    mend(well, "trigger_left")
    assert (
        well.source.sql(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'p_1'::regclass AND tgname LIKE '%tbl_repl%'"
        )
        == []
    )


@pytest.mark.once
@pytest.mark.parametrize("name", ["capture", "render", "page", "connect", "row", "digest"])
def test_generated_functions_that_were_changed_or_dropped(well: Pair, name: str) -> None:
    target = well.add_target("t", mode="async")
    oid, body = well.source.sql(
        "SELECT oid::regprocedure::text, pg_get_functiondef(oid) FROM pg_proc"
        " WHERE pronamespace = 'tbl_repl'::regnamespace AND proname ~ %s",
        [f"^{name}_[0-9]+$"],
    )[0]
    well.source.sql(f"ALTER FUNCTION {oid} SECURITY INVOKER")
    assert problems(well) == [("error", "function_changed", target)]
    mend(well, "function_changed")
    well.source.sql(f"ALTER FUNCTION {oid} SET search_path = public")
    assert problems(well) == [("error", "function_changed", target)]
    mend(well, "function_changed")
    well.source.sql(body.replace("BEGIN", "BEGIN /* changed */", 1))
    assert problems(well) == [("error", "function_changed", target)]
    mend(well, "function_changed")
    assert problems(well) == []
    if name != "capture":  # its triggers hold that one
        well.source.sql(f"DROP FUNCTION {oid}")
        assert ("error", "function_missing", target) in problems(well)
        mend(well, "function_missing")
        assert problems(well) == []


def test_the_quarantine(well: Pair) -> None:
    target = well.add_target("t", mode="async")
    well.target.sql("ALTER TABLE t ADD CONSTRAINT good CHECK (v <> 'bad')")
    well.source.sql("INSERT INTO t VALUES (1, 'bad')")
    well.drain()
    assert problems(well) == [("warning", "quarantine", target)]
    well.target.sql("ALTER TABLE t DROP CONSTRAINT good")
    mend(well, "quarantine")
    assert problems(well) == []


def test_a_failed_target(well: Pair) -> None:
    target = well.add_target("t", mode="async")
    well.target.sql("ALTER TABLE t RENAME v TO w")
    well.source.sql("INSERT INTO t VALUES (1, 'x')")
    well.drain()
    assert well.status(target) == "failed"
    assert problems(well) == [("error", "failed", target), ("error", "remote_column_missing", target)]
    well.target.sql("ALTER TABLE t RENAME w TO v")
    mend(well, "failed")
    well.drain()
    assert problems(well) == []
    well.assert_same("t")


def test_queueing_after_an_error(well: Pair) -> None:
    target = well.add_target("t")
    lock = well.target.connect()
    well.source.sql(f"SELECT tbl_repl.alter_target({target}, timeout => '500 ms')")
    with lock.transaction():
        lock.execute("LOCK TABLE t IN SHARE MODE")
        well.source.sql("INSERT INTO t VALUES (1, 'x')")
        assert problems(well) == [("warning", "queueing", target)]
    mend(well, "queueing")
    assert problems(well) == []


def test_a_paused_target(well: Pair) -> None:
    target = well.add_target("t")
    well.call("pause_target", target_id=target)
    assert problems(well) == [("notice", "paused", target)]
    mend(well, "paused")
    assert problems(well) == []


def test_old_rows_in_the_queue(well: Pair) -> None:
    target = well.add_target("t", mode="async")
    well.source.sql("INSERT INTO t VALUES (1, 'x')")
    assert problems(well) == []
    well.source.sql("UPDATE tbl_repl.change SET captured_at = now() - interval '1 hour'")
    assert problems(well) == [("warning", "queue_old", target)]
    mend(well, "queue_old")
    assert problems(well) == []


def test_a_large_queue(well: Pair) -> None:
    target = well.add_target("t", mode="async")
    well.source.sql("INSERT INTO t VALUES (1, 'x')")
    well.source.sql("UPDATE tbl_repl.change SET row_count = 2000000")
    assert problems(well) == [("warning", "queue_large", target)]


def test_a_copy_of_the_database_in_another_cluster(well: Pair) -> None:
    target = well.add_target("t", mode="async")
    well.source.sql("UPDATE tbl_repl.target_state SET system_identifier = 1")
    assert problems(well) == [("warning", "restored", target)]


def test_a_copy_of_the_database_in_this_cluster(well: Pair) -> None:
    """CREATE DATABASE ... TEMPLATE: the copy is told, ships what is queued, and settles no receipt of the original."""
    queued = well.add_target("t", mode="async")
    well.both("CREATE TABLE u (id integer PRIMARY KEY, v text)")
    direct = well.add_target("u")
    well.source.sql("INSERT INTO t VALUES (1, 'queued'); INSERT INTO u VALUES (1, 'shipped')")
    receipts = "SELECT r::text FROM tbl_repl.receipt AS r ORDER BY 1"
    before = well.target.sql(receipts)
    assert len(before) == 1
    well.source.forget()
    cluster, copy = well.source.cluster, f"{well.source.dbname}_copy"
    cluster.sql(f"CREATE DATABASE {copy} TEMPLATE {well.source.dbname} OWNER owner")
    try:
        told = "SELECT target_id, hint FROM tbl_repl.check() WHERE code = 'restored' ORDER BY 1"
        with cluster.connect(copy, "owner") as conn:
            assert [row[0] for row in conn.execute(told).fetchall()] == [queued, direct]
            conn.execute("SELECT tbl_repl.set_node_name('x')")
            assert all("set_node_name" in row[1] for row in conn.execute(told).fetchall())
            conn.execute("DELETE FROM tbl_repl.node")
            conn.execute("CALL tbl_repl.drain()")
            assert conn.execute(told).fetchall() == []
            conn.execute("INSERT INTO t VALUES (2, 'copy'); INSERT INTO u VALUES (2, 'copy')")
            conn.execute("CALL tbl_repl.drain()")
    finally:
        cluster.sql(f"DROP DATABASE {copy} WITH (FORCE)")
    assert well.target.rows("t") == ["(1,queued)", "(2,copy)"]
    assert well.target.rows("u") == ["(1,shipped)", "(2,copy)"]
    assert set(before) <= set(well.target.sql(receipts))
    assert problems(well) == []


def test_a_database_that_was_renamed_is_no_copy(well: Pair) -> None:
    well.add_target("t", mode="async")
    well.source.sql("INSERT INTO t VALUES (1, 'a')")
    well.source.forget()
    cluster, name = well.source.cluster, well.source.dbname
    cluster.sql(f"ALTER DATABASE {name} RENAME TO {name}_new")
    try:
        with cluster.connect(f"{name}_new", "owner") as conn:
            found = conn.execute("SELECT code FROM tbl_repl.check() WHERE code <> 'dblink_public'").fetchall()
            assert found == []
            conn.execute("CALL tbl_repl.drain()")
    finally:
        cluster.sql(f"ALTER DATABASE {name}_new RENAME TO {name}")
    well.assert_same("t")


def test_two_nodes_of_one_name(well: Pair) -> None:
    target = well.add_target("t")
    for node in well.nodes:
        node.sql("SELECT tbl_repl.set_node_name('twin')")
    assert problems(well) == [("error", "node_name_taken", target)]


def test_a_target_in_this_very_database_has_no_name_of_its_own(well: Pair) -> None:
    well.join(well.source, well.source, "loop_back")
    well.source.sql("CREATE TABLE u (LIKE t INCLUDING ALL)")
    well.add_target("t", "loop_back", dst_table="u", mode="async")
    assert problems(well) == []


def test_every_problem_at_once(well: Pair) -> None:
    well.add_target("t", mode="async")
    well.source.sql("ALTER TABLE t DISABLE TRIGGER USER; ALTER TABLE t ADD more integer")
    well.target.sql("ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t DROP COLUMN v")
    assert set(codes(well)) == {
        "trigger_disabled",
        "column_not_sent",
        "remote_key_missing",
        "remote_column_missing",
    }


def test_checking_changes_nothing(well: Pair) -> None:
    target = well.add_target("t")
    well.source.sql("INSERT INTO t VALUES (1)")
    state = "SELECT s::text, t::text FROM tbl_repl.target_state s, tbl_repl.target t"
    before = well.source.sql(state)
    well.target.sql("DROP TABLE t")
    assert codes(well) == ["remote_table_missing"]
    assert well.source.sql(state) == before
    assert well.status(target) == "ok"


def test_an_operator_sees_what_is_his_and_is_told_what_is_not(well: Pair) -> None:
    target = well.add_target("t")
    role = well.source.role("operator_2")
    well.source.sql(f"SELECT tbl_repl.grant_access('{role}', 'operator')")
    assert problems(well, role) == [("notice", "not_looked_at", target)]


def test_expressions_do_not_run_as_who_checks(well: Pair) -> None:
    well.source.sql("""
        CREATE FUNCTION spy(i integer) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN
            IF current_user <> 'owner' THEN
                RAISE EXCEPTION 'run as %', current_user;
            END IF;
            RETURN true;
        END $$
        """)
    well.add_target("t", row_filter="spy(id) AND spy(7)", columns=["id"], column_map={"v": "v || spy(8)"})
    found = well.source.admin("SELECT code, message FROM tbl_repl.check() WHERE code <> 'dblink_public'")
    assert found == []


@pytest.mark.once
def test_the_caller_s_intervalstyle_is_no_problem(well: Pair) -> None:
    well.add_target("t", timeout="1 day")
    well.source.sql("SET intervalstyle = 'sql_standard'")
    assert problems(well) == []


@pytest.mark.once
def test_a_target_that_hangs_while_connecting_hides_no_other(trio: Pair) -> None:
    """From PostgreSQL 16 on somebody has to cancel it, as a running worker does."""
    trio.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    hung = trio.add_target("t", timeout="2 s")
    other = trio.add_target("u", trio.third_server)
    trio.third.sql("DROP TABLE u")
    trio.proxy().set("blackhole")
    conn = trio.source.connect()
    found = start(conn, "SELECT target_id, code FROM tbl_repl.check() WHERE severity = 'error'")
    late = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = %s AND query_start < clock_timestamp() - interval '1.5 s'"
    if trio.major >= 16:
        wait_until(lambda: trio.source.admin(late, [conn.info.backend_pid]))
    assert found.result(20) == [(hung, "unreachable"), (other, "remote_table_missing")]


@pytest.mark.once
def test_an_owner_who_may_cancel_nobody(well: Pair) -> None:
    well.add_target("t")
    well.source.admin("REVOKE pg_signal_backend FROM owner")
    try:
        found = problems(well)
    finally:
        well.source.admin("GRANT pg_signal_backend TO owner")
    assert found == ([("notice", "cannot_cancel", None)] if well.major >= 16 else [])


@pytest.mark.once
def test_a_filter_on_a_table_whose_rows_take_others_along(pair: Pair) -> None:
    pair.both("CREATE TABLE p (id integer PRIMARY KEY, active boolean)")
    pair.both("CREATE TABLE c (id integer PRIMARY KEY, p integer REFERENCES p ON DELETE CASCADE)")
    target = pair.add_target("p", row_filter="active")
    assert problems(pair) == [("warning", "filter_cascades", target)]
