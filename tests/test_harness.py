"""The fixtures themselves: what the other tests rely on when they break things."""

from __future__ import annotations

import psycopg
import pytest

from support import Pair, Proxy, wait_until


def test_a_pair_is_two_databases_joined_by_a_foreign_server(pair: Pair) -> None:
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.both("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    pair.assert_same("t")
    pair.source.sql("SELECT dblink_connect('c', 'target_server')")
    query = "SELECT * FROM dblink('c', 'SELECT current_database()::text') AS r(name text)"
    assert pair.source.one(query) == pair.target.dbname
    pair.target.sql("DELETE FROM t WHERE id = 1")
    with pytest.raises(AssertionError, match=r"missing on target: \['\(1,a\)'\]"):
        pair.assert_same("t")


@pytest.mark.plain_target
def test_a_plain_target_has_no_extension(pair: Pair) -> None:
    assert pair.target.one("SELECT to_regnamespace('tbl_repl')") is None
    assert pair.source.one("SELECT to_regnamespace('tbl_repl')") is not None


def test_the_proxy_breaks_the_line_in_every_way(pair: Pair, proxy: Proxy) -> None:
    def connect(name: str) -> None:
        pair.source.sql("SELECT dblink_connect(%s, 'target_server')", [name])

    ask = "SELECT * FROM dblink('a', 'SELECT 1') AS r(i integer)"
    connect("a")
    assert pair.source.one(ask) == 1
    proxy.set("blackhole")
    pair.source.sql("SELECT dblink_send_query('a', 'SELECT 1')")
    assert pair.source.one("SELECT pg_sleep(0.05), dblink_is_busy('a')") == ""
    assert pair.source.one("SELECT dblink_is_busy('a')") == 1
    proxy.set("pass")
    assert wait_until(lambda: pair.source.one("SELECT dblink_is_busy('a')") == 0)
    pair.source.sql("SELECT dblink_disconnect('a')")

    connect("a")
    proxy.cut()
    with pytest.raises(psycopg.Error):
        pair.source.sql(ask)
    for mode in ("refuse", "reset"):
        proxy.set(mode)
        with pytest.raises(psycopg.Error, match="could not establish connection"):
            connect("b")
    proxy.set("pass")
    connect("b")


def test_a_killed_server_comes_back_with_its_data(pair: Pair) -> None:
    pair.target.sql("CREATE TABLE t (id integer)")
    pair.target.kill()
    assert not pair.target.cluster.running()
    pair.target.start()
    assert pair.target.one("SELECT count(*) FROM t") == 0


def test_a_frozen_backend_goes_on_afterwards(pair: Pair) -> None:
    pair.source.sql("SELECT dblink_connect('c', 'target_server')")
    pair.source.sql("SELECT dblink_exec('c', $$SET application_name = 'tbl_repl test'$$)")
    with pair.target.frozen("tbl_repl%"):
        pair.source.sql("SELECT dblink_send_query('c', 'SELECT 1')")
        assert pair.source.one("SELECT dblink_is_busy('c')") == 1
    assert wait_until(lambda: pair.source.one("SELECT dblink_is_busy('c')") == 0)
