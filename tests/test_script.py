"""Rules over the built install script, and the checkers that know PL/pgSQL."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import sqlparse

from support import Pair
from tbl_repl.script import build_script

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"\bSET search_path = pg_catalog, pg_temp\b")
ROUTINE = re.compile(r"^CREATE (FUNCTION|PROCEDURE) (tbl_repl\.\w+)\s*\(", re.IGNORECASE)
# A procedure that commits must have no SET clause.
UNPINNED = {"tbl_repl.drain"}
# What only a superuser may do, and what the rules of the project exclude.
FORBIDDEN = (
    r"\bEVENT TRIGGER\b",
    r"\bALTER SYSTEM\b",
    r"\bdblink_connect_u\b",
    r"\bLANGUAGE '?(c|internal|plpython3u|plperlu)\b",
    r"\bsession_replication_role\b",
    r"\bpg_(read|write)_(binary_)?file\b",
    r"\bCOPY\b[^;]*\b(PROGRAM|FROM '|TO ')",
    r"\bCREATE (CAST|ACCESS METHOD|TABLESPACE|ROLE|USER(?! MAPPING))\b",
    r"\bWHEN OTHERS THEN\s+RAISE EXCEPTION '%', SQLERRM",
)


def statements() -> list[str]:
    """The script's statements without comments around them."""
    script = "".join(line for line in build_script(ROOT).splitlines(True) if not line.startswith("\\"))
    return [
        stripped
        for statement in sqlparse.split(script)
        if (stripped := re.sub(r"\A(\s*--[^\n]*\n|\s+)*", "", statement).strip()).strip(";")
    ]


def without_comments(sql: str) -> str:
    return re.sub(r"--[^\n]*", "", sql)


def routines() -> list[tuple[str, str, str]]:
    """(name, statement, the statement after it) of every function and procedure."""
    found = statements()
    return [
        (match.group(2), statement, following)
        for statement, following in zip(found, [*found[1:], ""], strict=True)
        if (match := ROUTINE.match(statement))
    ]


def test_script_has_routines() -> None:
    names = [name for name, _, _ in routines()]
    assert "tbl_repl.add_target" in names
    assert "tbl_repl.replay" in names


def is_bound(text: str) -> bool:
    """Whether the body is an SQL-standard one: its names are resolved when it is created."""
    return re.search(r"\bAS\s+[$']", text) is None


def test_every_function_is_pinned_before_its_body() -> None:
    unpinned = {
        name
        for name, text, _ in routines()
        if not is_bound(text) and not PINNED.search(text.split("$", 1)[0])
    }
    assert unpinned <= UNPINNED


def test_every_function_is_commented_at_once() -> None:
    wrong = []
    for name, text, following in routines():
        kind = "PROCEDURE" if text.upper().startswith("CREATE PROCEDURE") else "FUNCTION"
        if not re.match(rf"COMMENT ON {kind} {re.escape(name)}\b", following):
            wrong.append(name)
    assert wrong == []


def test_every_table_and_view_is_commented() -> None:
    script = build_script(ROOT)
    made = re.findall(
        r"^CREATE (?:UNLOGGED )?(TABLE|VIEW|TYPE) (tbl_repl\.\w+)(?! PARTITION OF)\b", script, re.M
    )
    assert made
    missing = [name for kind, name in made if not re.search(rf"^COMMENT ON {kind} {name} IS", script, re.M)]
    assert missing == []


def test_nothing_is_adopted() -> None:
    heads = [statement for statement in statements() if re.match(r"CREATE OR REPLACE\b", statement, re.I)]
    assert heads == []
    assert not [s for s in statements() if re.match(r"CREATE SCHEMA IF NOT EXISTS", s, re.I)]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_forbidden(pattern: str) -> None:
    found = re.findall(rf"[^\n]*{pattern}[^\n]*", without_comments(build_script(ROOT)), re.I)
    assert found == []


def test_security_definer_functions_state_their_reason() -> None:
    script = build_script(ROOT)
    silent = [
        name
        for name, text, _ in routines()
        if "SECURITY DEFINER" in text.split("$", 1)[0]
        and not re.search(rf"^--[^\n]*\nCREATE (FUNCTION|PROCEDURE) {re.escape(name)}\s*\(", script, re.M)
    ]
    assert silent == []


def test_pgspot_finds_nothing(tmp_path: Path) -> None:
    """Each statement is a file of its own, in append mode: pgspot's parser knows no catalog and
    gives up on some bodies (record types of our tables, SQL-standard bodies), not on all behind them.

    CREATE EXTENSION sets the path while the script runs.
    """
    files = []
    for number, text in enumerate(["SET search_path = pg_catalog, pg_temp", *statements()]):
        path = tmp_path / f"{number:04}.sql"
        path.write_text(text + ";\n", encoding="utf-8")
        files.append(str(path))
    program = Path(sysconfig.get_path("scripts")) / "pgspot"
    allowed = [f"--proc-without-search-path={name}" for name in UNPINNED]
    command = [str(program), "--append", *allowed, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "TOTAL:" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.findall(r"^PS\d+:.*|^Unknown \w+:.*", done.stdout, re.M) == []


def has_plpgsql_check(pair: Pair) -> bool:
    query = "SELECT count(*) FROM pg_available_extensions WHERE name = 'plpgsql_check'"
    if not pair.source.one(query):
        return False
    pair.source.admin("CREATE EXTENSION plpgsql_check")
    return True


CHECK_FUNCTIONS = """
SELECT p.oid::regprocedure::text, c.level, c.lineno, c.statement, c.message, c.context
FROM pg_proc p
CROSS JOIN LATERAL plpgsql_check_function_tb(
    p.oid, fatal_errors => false, performance_warnings => false) c
WHERE p.pronamespace = 'tbl_repl'::regnamespace
    AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
    AND p.prorettype <> 'trigger'::regtype
"""
CHECK_TRIGGERS = """
SELECT t.tgname, c.level, c.lineno, c.statement, c.message, c.context
FROM pg_trigger t
JOIN pg_proc p ON p.oid = t.tgfoid
CROSS JOIN LATERAL plpgsql_check_function_tb(
    p.oid, t.tgrelid, fatal_errors => false, performance_warnings => false,
    oldtable => t.tgoldtable, newtable => t.tgnewtable) c
WHERE p.pronamespace = 'tbl_repl'::regnamespace AND NOT t.tgisinternal
    AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
"""


def test_plpgsql_check_finds_nothing(pair: Pair) -> None:
    if not has_plpgsql_check(pair):
        pytest.skip("this server has no plpgsql_check")
    assert pair.source.admin(CHECK_FUNCTIONS) == []


def test_plpgsql_check_finds_nothing_in_triggers(pair: Pair) -> None:
    if not has_plpgsql_check(pair):
        pytest.skip("this server has no plpgsql_check")
    ordinary = "CREATE TABLE t (a integer, b text, v text, PRIMARY KEY (a, b))"
    partitioned = "CREATE TABLE p (a integer PRIMARY KEY, v text) PARTITION BY RANGE (a)"
    leaf = "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100)"
    for ddl in (ordinary, partitioned, leaf):
        pair.both(ddl)
    for mode in ("sync", "async"):
        for table in ("t", "p"):
            pair.add_target(table, mode=mode, dst_table=f"public.{table}", row_filter="a > 0")
        pair.both("ALTER TABLE t RENAME TO t_done")
        pair.both("ALTER TABLE p RENAME TO p_done")
        if mode == "sync":
            pair.both("ALTER TABLE p1 RENAME TO p1_done")
            for ddl in (ordinary, partitioned, leaf):
                pair.both(ddl)
    assert pair.source.admin(CHECK_TRIGGERS) == []


def test_functions_are_created_without_a_warning(node) -> None:  # type: ignore[no-untyped-def]
    """plpgsql.extra_errors = 'all' turns shadowed variables and the like into errors."""
    functions = [text for _, text, _ in routines()]
    node.admin("SET plpgsql.extra_errors = 'all'")
    for text in functions:
        node.admin(re.sub(r"^CREATE ", "CREATE OR REPLACE ", text))
