"""Rules over the built install script, and the checkers that know PL/pgSQL."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import psycopg
import pytest
import sqlparse

from support import Pair
from tbl_repl.script import build_script

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"\bSET search_path = pg_catalog, pg_temp\b")
ROUTINE = re.compile(r"^CREATE (FUNCTION|PROCEDURE) (tbl_repl\.\w+)\s*\(", re.IGNORECASE)
# A procedure that commits must have no SET clause; the other two resolve the names in filters and
# maps by the caller's path.
UNPINNED = {
    "tbl_repl.drain",
    "tbl_repl.add_target",
    "tbl_repl.alter_target",
    "tbl_repl._settle",
    "tbl_repl._is_type",
}
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
        if not is_bound(text) and not PINNED.search(re.split(r"\bAS\s+[$']", text)[0])
    }
    assert unpinned <= UNPINNED


def test_whoever_catches_everything_catches_failed_assertions() -> None:
    """OTHERS stands for all but two conditions; the other one is query_canceled."""
    script = build_script(ROOT)
    assert re.findall(r".*(?<!assert_failure OR )\bOTHERS\b.*", script) == []


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


def test_every_advisory_lock_has_a_class_of_its_own() -> None:
    text = without_comments(build_script(ROOT))
    classes = re.findall(
        r"FUNCTION tbl_repl\._lock_\w+\(\) RETURNS integer\s+LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN (\d+)",
        text,
    )
    assert len(classes) > 5
    assert len(set(classes)) == len(classes)
    calls = re.findall(
        r"advisory_(?:xact_)?(?:un)?lock(?:_shared)?\((?!tbl_repl\._lock_\w+\(\), |%)[^\n]*", text
    )
    assert calls == []


def test_no_quote_is_escaped_by_a_backslash() -> None:
    """Refused while a session has backslash_quote off, or a client_encoding such as GBK or SJIS."""
    found = re.findall(r"[^\n]*(?<!\\)(?:\\\\)*\\'(?!')[^\n]*", build_script(ROOT))
    assert found == []


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_forbidden(pattern: str) -> None:
    found = re.findall(rf"[^\n]*{pattern}[^\n]*", without_comments(build_script(ROOT)), re.I)
    assert found == []


def test_security_definer_functions_state_their_reason() -> None:
    """In the comment above the function, or in the one that is kept with it: 'SECURITY DEFINER: reason'."""
    script = build_script(ROOT)
    silent = []
    for name, text, following in routines():
        above = re.search(r"(?:^--[^\n]*\n)*\Z", script[: script.index(text)], re.M)
        said = re.sub(r"\n--\s*", " ", above[0] if above else "") + following
        if "SECURITY DEFINER" in text.split("$", 1)[0] and not re.search(
            r"SECURITY DEFINER(, each)?(:|,| as) \w", said
        ):
            silent.append(name)
    assert silent == []


def raised() -> set[str]:
    """Every ERRCODE that the script's functions raise: a condition's name, or a code."""
    found: set[str] = set()
    for expression in re.findall(r"\bERRCODE\s*=\s*(.+)", without_comments(build_script(ROOT))):
        # in a CASE what is compared is no code of ours
        words = re.findall(r"(?:^|THEN |ELSE )'(\w+)'", expression)
        # a variable: what another server has said is passed on
        assert words or re.match(r"[a-z_.]+,", expression), f"which SQLSTATE is this? {expression}"
        found.update(words)
    return found


# Raised to end a subtransaction, and caught right behind it.
CAUGHT_AT_ONCE = {"TR001"}


def test_every_sqlstate_stands_on_the_page_of_errors() -> None:
    # by the class, as read_only_sql_transaction is ReadOnlySqlTransaction: two codes share some names
    codes = {
        word
        if re.fullmatch(r"[0-9A-Z]{5}", word)
        else getattr(psycopg.errors, word.title().replace("_", "")).sqlstate
        for word in raised() - CAUGHT_AT_ONCE
    }
    assert len(codes) > 20
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    told = {
        code for codes in re.findall(r"^\| ([0-9A-Z, ]+)", page, re.M) for code in re.findall(r"\w{5}", codes)
    }
    assert codes - told == set()


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
    done = subprocess.run([str(program), "--append", *files], capture_output=True, text=True, check=False)
    assert "TOTAL:" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.findall(r"^PS\d+:.*|^Unknown \w+:.*", done.stdout, re.M)
    allowed = re.compile(rf"^PS005: .*: ({'|'.join(map(re.escape, UNPINNED))})\(")
    assert [line for line in found if not allowed.match(line)] == []


def has_plpgsql_check(pair: Pair) -> bool:
    query = "SELECT count(*) FROM pg_available_extensions WHERE name = 'plpgsql_check'"
    if not pair.source.one(query):
        return False
    pair.source.admin("CREATE EXTENSION plpgsql_check")
    return True


CHECK_FUNCTIONS = """
SELECT p.oid::regprocedure::text, c.level, c.lineno, c.message, c.context
FROM pg_proc p
CROSS JOIN LATERAL plpgsql_check_function_tb(
    p.oid, fatal_errors => false, performance_warnings => false) c
WHERE p.pronamespace = 'tbl_repl'::regnamespace
    AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
    AND p.prorettype <> 'trigger'::regtype
"""
CHECK_TRIGGERS = """
SELECT t.tgname, c.level, c.lineno, c.message, c.context
FROM pg_trigger t
JOIN pg_proc p ON p.oid = t.tgfoid
CROSS JOIN LATERAL plpgsql_check_function_tb(
    p.oid, t.tgrelid, fatal_errors => false, performance_warnings => false,
    -- one function serves every statement trigger; what it does not get it does not look at
    oldtable => coalesce(t.tgoldtable, 'old_rows'), newtable => coalesce(t.tgnewtable, 'new_rows')) c
WHERE p.pronamespace = 'tbl_repl'::regnamespace AND NOT t.tgisinternal
    AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
"""


# plpgsql_check does not see what EXECUTE puts into a record, nor that a helper always raises; the last is taste.
NOISE = re.compile(
    r"record .* is not assigned yet|cannot determinate a result of dynamic SQL|never read variable"
    r"|target type is different type than source type|control reached end of function without RETURN"
    r"|OUT variable .* is maybe unmodified|composite OUT variable .* is not single argument"
)


def complaints(pair: Pair, query: str) -> list[str]:
    return [
        f"{name}, line {line}, {level}: {message} ({context or ''})"
        for name, level, line, message, context in pair.source.admin(query)
        if not NOISE.search(message)
    ]


def test_plpgsql_check_finds_nothing(pair: Pair) -> None:
    if not has_plpgsql_check(pair):
        pytest.skip("this server has no plpgsql_check")
    assert complaints(pair, CHECK_FUNCTIONS) == []


def test_plpgsql_check_finds_nothing_in_triggers(pair: Pair) -> None:
    if not has_plpgsql_check(pair):
        pytest.skip("this server has no plpgsql_check")
    for mode in ("sync", "async"):
        pair.both(f"""
            CREATE TABLE t_{mode} (a integer, b text, v text, PRIMARY KEY (a, b));
            CREATE TABLE p_{mode} (a integer PRIMARY KEY, v text) PARTITION BY RANGE (a);
            CREATE TABLE p_{mode}_1 PARTITION OF p_{mode} FOR VALUES FROM (0) TO (100)
            """)
        for table in (f"t_{mode}", f"p_{mode}"):
            pair.add_target(table, mode=mode, row_filter="a > 0")
    assert complaints(pair, CHECK_TRIGGERS) == []


def test_functions_are_created_without_a_warning(node) -> None:  # type: ignore[no-untyped-def]
    """plpgsql.extra_errors = 'all' turns shadowed variables and the like into errors."""
    functions = [text for _, text, _ in routines()]
    node.admin("SET plpgsql.extra_errors = 'all'")
    for text in functions:
        node.admin(re.sub(r"^CREATE ", "CREATE OR REPLACE ", text))
