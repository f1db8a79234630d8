"""What is shown is what is sent."""

from __future__ import annotations

import re

import psycopg
import pytest

from support import Pair


def sent(pair: Pair) -> list[str]:
    """The statements that tbl_repl has sent to the target, without its lease and receipt; EXECUTE is written out there."""
    found = []
    for text in re.findall(r"(?m)^.* LOG:  statement: ((?:.*)(?:\n\t.*)*)", pair.target.log()):
        text = re.sub(r"; EXECUTE tbl_repl_(lease|receipt)\(.*", "", text, flags=re.S)
        found.append(text.replace("\n\t", "\n"))
    return found


@pytest.mark.parametrize("filtered", [False, True])
def test_explain_target_shows_the_sql_that_is_sent(pair: Pair, filtered: bool) -> None:
    pair.source.sql("CREATE TABLE t (a integer, b text, v text, PRIMARY KEY (a, b))")
    pair.target.sql("CREATE TABLE t (b text, a integer, v text, PRIMARY KEY (a, b))")
    options = {"row_filter": "a > 0", "column_map": {"v": "upper(v)"}} if filtered else {}
    target = pair.add_target("t", **options)
    pair.target.admin(f"ALTER DATABASE {pair.target.dbname} SET log_statement = 'all'")

    def explained(key: str) -> str:
        return "; ".join(
            row[0] for row in pair.source.sql(f"SELECT tbl_repl.explain_target({target}, '{key}')")
        )

    # two rows at a time are sent as they are shown
    pair.source.fresh("INSERT INTO t VALUES (1, 'x''y', 'v'), (2, 'z', NULL)")
    one, two = explained('{"a": 1, "b": "x\'\'y"}'), explained('{"a": 2, "b": "z"}')
    head, rest = one.split(" VALUES ")
    row_one, tail = rest[: rest.index(") ON CONFLICT") + 1], rest[rest.index(") ON CONFLICT") + 1 :]
    row_two = two.split(" VALUES ")[1].removesuffix(tail)
    assert row_one == "('1', 'x''y', '%s')" % ("V" if filtered else "v")
    assert row_two == "('2', 'z', NULL)"
    assert any(
        s in sent(pair)
        for s in (f"{head} VALUES {row_one}, {row_two}{tail}", f"{head} VALUES {row_two}, {row_one}{tail}")
    )
    # a row that is gone
    pair.source.fresh("DELETE FROM t")
    gone = explained('{"a": 1, "b": "x\'\'y"}')
    assert gone.startswith("DELETE FROM public.t AS d USING")
    assert [s for s in sent(pair) if s.startswith("DELETE FROM public.t AS d USING unnest(")]


def test_a_single_row_is_sent_as_the_prepared_form_of_what_is_shown(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target = pair.add_target("t")
    pair.target.admin(f"ALTER DATABASE {pair.target.dbname} SET log_statement = 'all'")
    pair.source.fresh("INSERT INTO t VALUES (1, 'a')")
    shown = pair.source.one(f"SELECT tbl_repl.explain_target({target})")
    prepared = next(s for s in sent(pair) if "PREPARE tbl_repl_u" in s)
    # $1 is the deadline
    assert shown.replace("('1', 'a')", "($2, $3)") in prepared
    assert re.search(rf"EXECUTE tbl_repl_u{target}_\d+ \('infinity', '1', 'a'\)", "\n".join(sent(pair)))
    # once connected, without detours
    conn = pair.source.connect()
    for statement in ("UPDATE t SET v = 'b'", "UPDATE t SET v = 'd'", "DELETE FROM t"):
        conn.execute(statement)
    text = "\n".join(sent(pair))
    assert re.search(rf"EXECUTE tbl_repl_u{target}_\d+ \(\d+\.\d+, '1', 'd'\)", text)
    assert re.search(rf"EXECUTE tbl_repl_d{target}_\d+ \('\d+\.\d+', '1'\)", text)


def test_explain_target_sends_and_changes_nothing(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    target = pair.add_target("t")
    assert "INSERT INTO public.t" in pair.source.one(
        f"SELECT tbl_repl.explain_target({target})"
    )  # no row there yet
    pair.source.sql("INSERT INTO t VALUES (7, 'a')")
    pair.target.sql("DELETE FROM t")
    pair.target.stop()
    explained = pair.source.sql(f'SELECT tbl_repl.explain_target({target}, \'{{"id": "007"}}\')')
    assert len(explained) == 1
    assert "('7', 'a')" in explained[0][0]
    assert pair.source.sql(f"SELECT tbl_repl.explain_target({target}, '{{\"id\": 8}}')") == [
        ("DELETE FROM public.t AS d WHERE d.id OPERATOR(pg_catalog.=) ANY ('{8}')",)
    ]
    pair.target.start()
    assert pair.target.rows("t") == []
    for key, code in (
        ("{}", "22023"),
        ('{"nope": 1}', "22023"),
        ('{"id": "x"}', "22P02"),
        ("[1]", "22023"),
        ('{"id": null}', "22023"),
    ):
        with pytest.raises(Exception) as caught:
            pair.source.sql(f"SELECT tbl_repl.explain_target({target}, '{key}')")
        assert caught.value.sqlstate == code, key  # type: ignore[attr-defined]


def test_rows_that_are_equal_already_are_not_written(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text, n numeric, j json)")
    pair.add_target("t")
    pair.source.sql("INSERT INTO t SELECT i, 'v', 1.0, '{}' FROM generate_series(1, 3) i")
    before = pair.target.sql("SELECT id, xmin::text FROM t ORDER BY id")
    pair.source.sql("UPDATE t SET v = v")
    assert pair.target.sql("SELECT id, xmin::text FROM t ORDER BY id") == before
    pair.source.sql("UPDATE t SET n = 1.00 WHERE id = 1; UPDATE t SET j = NULL WHERE id = 2")
    after = pair.target.sql("SELECT id, xmin::text FROM t ORDER BY id")
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True]
    pair.assert_same("t")


def test_nondeterministic_collation_on_the_target(pair: Pair) -> None:
    """Equal there is not the same."""
    try:
        pair.both("CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("built without ICU")
    pair.both("CREATE TABLE t (id text COLLATE ci PRIMARY KEY, v text COLLATE ci)")
    pair.add_target("t")
    pair.source.sql("INSERT INTO t VALUES ('a', 'x'), ('b', 'x')")
    pair.source.sql("UPDATE t SET v = 'X'")
    pair.assert_same("t")
    pair.source.sql("UPDATE t SET id = upper(id)")
    pair.assert_same("t")
    pair.source.sql("DELETE FROM t WHERE id = 'A'")
    pair.assert_same("t")


def test_shifted_identity_and_swapped_unique_values(pair: Pair) -> None:
    pair.source.sql(
        "CREATE TABLE t (id integer PRIMARY KEY, u text NOT NULL UNIQUE DEFERRABLE, v integer UNIQUE DEFERRABLE)"
    )
    pair.target.sql("CREATE TABLE t (id integer PRIMARY KEY, u text NOT NULL UNIQUE, v integer UNIQUE)")
    target = pair.add_target("t")
    pair.source.sql("INSERT INTO t SELECT i, 'u' || i, i FROM generate_series(1, 6) i")
    for write in (
        "UPDATE t SET u = 'u' || (7 - id), v = 7 - id",
        "UPDATE t SET v = v + 1",
        "UPDATE t SET v = CASE id WHEN 1 THEN 6 WHEN 2 THEN 7 ELSE v END WHERE id < 3",
    ):
        pair.source.sql(write)
        pair.assert_same("t")
    assert pair.status(target) == "ok"
