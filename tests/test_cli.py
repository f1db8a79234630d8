"""The command line, run as a user runs it: what it prints, its exit codes, its JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support import Node, Pair, Proxy, World, wait_until
from support.background import in_background
from support.programs import dsn_of, environment, tbl_repl
from tbl_repl.database import name_of
from tbl_repl.graph import Node as GraphNode
from tbl_repl.graph import mermaid
from tbl_repl.install import tle_statements
from tbl_repl.script import extension_files, plain_script, version

ROOT = Path(__file__).parents[1]
TABLE = "CREATE TABLE t (id integer PRIMARY KEY, v text)"
VERBS = ("status", "top", "check", "replay", "compare", "repair", "copy", "worker", "install", "demo")
NOWHERE = "host=127.0.0.1 port=1 dbname=nowhere"
ESCAPE = "\x1b"


def verb(pair: Pair | Node, name: str, *args: str, code: int = 0, **env: str) -> str:
    """What the verb prints about the source; fails when it ends otherwise."""
    node = pair.source if isinstance(pair, Pair) else pair
    done = tbl_repl(name, *args, "--dsn", dsn_of(node), env=env)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def as_json(pair: Pair | Node, name: str, *args: str, code: int = 0) -> Any:
    return json.loads(verb(pair, name, *args, "--json", code=code))


@pytest.fixture
def target(pair: Pair) -> int:
    """A tolerant target of table t; its id."""
    pair.both(TABLE)
    return pair.add_target("t")


def broken(pair: Pair, proxy: Proxy) -> None:
    """One change is queued behind an error."""
    proxy.set("refuse")
    proxy.cut()
    pair.source.forget()
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")


# --- what a person reads


def test_status_without_targets_says_what_to_do(node: Node) -> None:
    assert "tbl_repl.add_target" in verb(node, "status")
    assert as_json(node, "status") == []


def test_status_shows_every_target(pair: Pair, target: int) -> None:
    pair.source.sql("INSERT INTO t VALUES (1, 'x')")
    shown = verb(pair, "status")
    for word in ("t", pair.server, "public.t", "tolerant", "ok"):
        assert re.search(rf"(^|\s){word}(\s|$)", shown, re.M), word
    (row,) = as_json(pair, "status")
    assert {
        "target_id": target,
        "source_table": "t",
        "server": pair.server,
        "dst_table": "public.t",
        "mode": "tolerant",
        "status": "ok",
        "pending_rows": 0,
        "rows_shipped": 1,
        "last_error": None,
        "lag": None,
    }.items() <= row.items()


def test_status_ends_with_1_while_something_is_wrong(pair: Pair, target: int, proxy: Proxy) -> None:
    broken(pair, proxy)
    (row,) = as_json(pair, "status", code=1)
    assert (row["status"], row["pending_rows"]) == ("queueing", 1)
    assert row["last_error"] and row["oldest_pending_at"]
    assert row["lag"] > 0, "seconds"
    assert re.search(r"\bqueueing +1 +\d+\.\d s\b", verb(pair, "status", code=1))


def test_status_of_several_databases(trio: Pair) -> None:
    trio.both(TABLE)
    trio.add_target("t")
    trio.join(trio.target, trio.source, "back")
    trio.target.sql("CREATE TABLE u (id integer PRIMARY KEY)")
    trio.source.sql("CREATE TABLE u (id integer PRIMARY KEY)")
    trio.call("add_target", node=trio.target, source_table="u", server="back")
    rows = as_json(trio.source, "status", "--dsn", dsn_of(trio.target))
    names = [node.one("SELECT tbl_repl.node_name()") for node in (trio.target, trio.source)]
    assert [(row["node"], row["source_table"]) for row in rows] == [(names[0], "u"), (names[1], "t")]


def test_check_shows_every_problem_and_ends_with_1(pair: Pair, target: int) -> None:
    (before,) = [row for row in as_json(pair, "check", code=1) if row["code"] == "dblink_public"]
    assert (before["severity"], "REVOKE EXECUTE" in before["hint"]) == ("warning", True)
    pair.target.sql("DROP TABLE t")
    rows = as_json(pair, "check", code=1)
    assert {"error"} <= {row["severity"] for row in rows if row["target_id"] == target}
    assert all(set(row) == {"target_id", "severity", "code", "message", "hint"} for row in rows)
    assert "error" in verb(pair, "check", code=1)


def test_check_ends_with_0_when_all_is_well(node: Node) -> None:
    assert verb(node, "check") == "all is well\n"
    assert as_json(node, "check") == []


def test_replay_ships_what_is_queued(pair: Pair, target: int, proxy: Proxy) -> None:
    broken(pair, proxy)
    said = as_json(pair, "replay", code=1)
    assert (said["rows"], said["pending"], said["quarantined"]) == (0, 1, 0)
    done = tbl_repl("replay", "--dsn", dsn_of(pair.source))
    assert done.returncode == 1
    assert f"target {target}" in done.stderr
    proxy.set("pass")
    said = as_json(pair, "replay")
    assert (said["rows"], said["pending"]) == (1, 0)
    assert said["seconds"] >= 0
    pair.assert_same("t")
    assert verb(pair, "replay").startswith("0 rows in ")


@pytest.mark.once
def test_compare_and_repair(pair: Pair, target: int) -> None:
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 5) AS i")
    assert verb(pair, "compare", str(target)) == "equal\n"
    assert as_json(pair, "compare", str(target)) == []
    pair.target.sql(
        "DELETE FROM t WHERE id = 1; UPDATE t SET v = 'other' WHERE id = 2; INSERT INTO t VALUES (9, 'extra')"
    )
    found = as_json(pair, "compare", str(target), code=1)
    assert sorted((row["difference"], row["key"]["id"]) for row in found) == [
        ("different", 2),
        ("extra_on_target", 9),
        ("missing_on_target", 1),
    ]
    shown = verb(pair, "compare", str(target), code=1)
    assert "missing_on_target" in shown and '{"id": 1}' in shown and "3 differences" in shown
    assert as_json(pair, "repair", str(target)) == {"queued": 2}
    verb(pair, "replay")
    assert [row["difference"] for row in as_json(pair, "compare", str(target), code=1)] == ["extra_on_target"]
    assert "1 row queued" in verb(pair, "repair", str(target), "--delete-extra")
    verb(pair, "replay")
    assert verb(pair, "compare", str(target)) == "equal\n"


@pytest.mark.once
def test_compare_shows_a_thousand_differences_and_lists_all(pair: Pair) -> None:
    pair.both(TABLE)
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 1500) AS i")
    target = str(pair.add_target("t", mode="async", initial_copy="none"))
    shown = verb(pair, "compare", target, code=1).splitlines()
    assert shown[0].split() == ["difference", "key"]
    assert shown[-2:] == ["and 500 more; --json lists all", "1,500 differences"]
    assert len(shown) == 1 + 1000 + 2
    found = as_json(pair, "compare", target, code=1)
    assert sorted(row["key"]["id"] for row in found) == list(range(1, 1501))


@pytest.mark.once
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_memory_does_not_grow_with_the_differences(pair: Pair, more: tuple[str, ...], side: str) -> None:
    program = (
        "import resource, sys, tbl_repl.cli\n"
        "code = tbl_repl.cli.main()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    )
    peaks = []
    for table, rows in (("few", 10_000), ("many", 60_000)):
        pair.both(f"CREATE TABLE {table} (id integer PRIMARY KEY)")
        node = pair.source if side == "source" else pair.target
        node.sql(f"INSERT INTO {table} SELECT generate_series(1, {rows})")
        target = str(pair.add_target(table, mode="async", initial_copy="none"))
        command = [sys.executable, "-c", program, "compare", target, *more, "--dsn", dsn_of(pair.source)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(), check=False, timeout=90
        )
        assert (f'"id": {rows}' in done.stdout) == (more != ())
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 30_000_000, peaks


@pytest.mark.once
@pytest.mark.parametrize("name", ["compare", "repair", "copy"])
def test_progress_is_told_in_lines_on_stderr(pair: Pair, target: int, name: str) -> None:
    """A line a second; here every look is one."""
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i; ANALYZE t")
    program = (
        "import sys, tbl_repl.cli, tbl_repl.progress as p; p.LINE_SECONDS = 0; sys.exit(tbl_repl.cli.main())"
    )
    command = [sys.executable, "-c", program, name, str(target), "--piece-rows", "1000"]
    command += ["--dsn", dsn_of(pair.source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"target {target}: 3,000 of 3,000 rows, [\d,]+ rows/s(, [\d.,]+ MB/s)?, 0.0 s left", last
    ), done.stderr
    assert "rows/s" not in done.stdout
    quiet = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, env=environment(), check=False, timeout=60
    )
    assert quiet.stderr == ""


def test_top_once_shows_every_target(pair: Pair, target: int) -> None:
    shown = verb(pair, "top", "--once")
    assert "tolerant" in shown and "rows per s" in shown
    assert "Ctrl-C" not in shown
    (row,) = as_json(pair, "top", "--once")
    assert row["target_id"] == target


# --- a live view in a terminal


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *args: str, **env: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "tbl_repl", *args]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(**{"TERM": "xterm", "COLUMNS": "160", "LINES": "40", **env}),
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def read(self) -> str:
        """Everything so far."""
        while select.select([self._master], [], [], 0)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            self.text += data.decode("utf-8", "replace")
        return self.text

    def end(self) -> int:
        """Its exit code; what it prints until then is read, or it could not end."""
        wait_until(lambda: (self.read(), self.process.poll() is not None)[1], 20)
        self.read()
        return int(self.process.returncode)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    started: list[Terminal] = []
    yield started
    for terminal in started:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_top_refreshes_and_ends_by_ctrl_c(
    pair: Pair, target: int, terminals: list[Terminal], number: signal.Signals
) -> None:
    top = Terminal("top", "--interval", "0.05", "--dsn", dsn_of(pair.source))
    terminals.append(top)
    wait_until(lambda: "tolerant" in top.read(), 20)
    pair.call("pause_target", target_id=target)
    wait_until(lambda: "paused" in top.read(), 20)
    assert ESCAPE in top.text
    top.process.send_signal(number)
    assert top.end() == 130
    assert "Traceback" not in top.text
    assert top.text.count(f"{ESCAPE}[?1049l") == top.text.count(f"{ESCAPE}[?1049h") == 1, (
        "the screen is given back"
    )


@pytest.mark.once
def test_top_with_few_lines_shows_the_worst(pair: Pair, target: int, terminals: list[Terminal]) -> None:
    for n in range(8):
        pair.both(f"CREATE TABLE more_{n} (id integer PRIMARY KEY)")
        last = pair.add_target(f"more_{n}")
    pair.call("pause_target", target_id=last)
    top = Terminal("top", "--interval", "0.05", "--dsn", dsn_of(pair.source), LINES="6")
    terminals.append(top)
    wait_until(lambda: "not shown, for want of lines: 6 ok" in top.read(), 20)
    wait_until(lambda: "paused" in top.read(), 20)
    assert "more_7" in top.text and "more_6" not in top.text


@pytest.mark.once
def test_top_without_cursor_movements_shows_one_look_after_the_other(
    pair: Pair, target: int, terminals: list[Terminal]
) -> None:
    dumb = Terminal("top", "--interval", "0.05", "--dsn", dsn_of(pair.source), TERM="dumb")
    terminals.append(dumb)
    wait_until(lambda: dumb.read().count("tolerant") > 2, 20)
    assert ESCAPE not in dumb.text
    with subprocess.Popen(
        [sys.executable, "-m", "tbl_repl", "top", "--interval", "0.05", "--dsn", dsn_of(pair.source)],
        stdout=subprocess.PIPE, text=True, env=environment(),
    ) as piped:  # fmt: skip
        assert piped.stdout is not None
        lines = [piped.stdout.readline() for _ in range(6)]
        piped.stdout.close()
        assert piped.wait(20) == 1
    assert all("every 0.05 s" in line for line in lines[::3]), lines
    assert all("tolerant" in line for line in lines[2::3]), lines


def test_top_outlives_a_restart_of_the_server(pair: Pair, target: int, terminals: list[Terminal]) -> None:
    top = Terminal("top", "--interval", "0.05", "--dsn", dsn_of(pair.source))
    terminals.append(top)
    wait_until(lambda: "tolerant" in top.read(), 20)
    pair.source.stop()
    wait_until(lambda: "cannot connect" in top.read(), 20)
    pair.source.start()
    pair.call("pause_target", target_id=target)
    wait_until(lambda: "paused" in top.read(), 20)


@pytest.mark.parametrize("name", ["compare", "repair", "copy"])
def test_progress_is_a_bar_in_a_terminal(
    pair: Pair, target: int, terminals: list[Terminal], name: str
) -> None:
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 3000) AS i; ANALYZE t")
    shown = Terminal(name, str(target), "--dsn", dsn_of(pair.source))
    terminals.append(shown)
    assert shown.end() == 0, shown.text
    assert "3000/3000" in shown.text
    assert f"{ESCAPE}[" in shown.text and "rows/s" in shown.text


@pytest.mark.once
def test_no_color_is_respected_in_a_terminal(pair: Pair, target: int, terminals: list[Terminal]) -> None:
    def colours(text: str) -> list[str]:
        return [
            m for m in re.findall(r"\x1b\[([0-9;]*)m", text) if re.search(r"(^|;)(3[0-7]|38|9[0-7])(;|$)", m)
        ]

    plain = Terminal("status", "--dsn", dsn_of(pair.source), NO_COLOR="1")
    coloured = Terminal("status", "--dsn", dsn_of(pair.source))
    terminals += [plain, coloured]
    assert (plain.end(), coloured.end()) == (0, 0)
    assert "tolerant" in plain.text and "tolerant" in coloured.text
    assert colours(coloured.text)
    assert not colours(plain.text)


def screen(text: str) -> list[str]:
    """Lines of a terminal without colours."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


@pytest.mark.once
@pytest.mark.parametrize("columns", [40, 70, 80, 120, 200])
def test_status_breaks_no_word_in_a_terminal(
    pair: Pair, proxy: Proxy, terminals: list[Terminal], columns: int
) -> None:
    pair.both("CREATE TABLE customer_orders (id integer PRIMARY KEY)")
    pair.add_target("customer_orders")
    proxy.set("refuse")
    proxy.cut()
    pair.source.forget()
    pair.source.sql("INSERT INTO customer_orders VALUES (1)")
    shown = Terminal("status", "--dsn", dsn_of(pair.source), COLUMNS=str(columns))
    terminals.append(shown)
    assert shown.end() == 1, shown.text
    lines = screen(shown.text)
    assert max(len(line) for line in lines) <= columns
    words = " ".join(lines).split()
    (row,) = as_json(pair, "status", code=1)
    assert row["last_error"]
    server = [pair.server] if columns >= 80 else []
    for word in ("customer_orders", *server, "tolerant", "queueing", *str(row["last_error"]).split()):
        assert word in words, shown.text


@pytest.mark.once
def test_a_pipe_gets_each_target_in_one_line(pair: Pair, target: int, proxy: Proxy) -> None:
    broken(pair, proxy)
    pair.source.sql("UPDATE tbl_repl.target_state SET last_error = repeat('word ', 200) || E'\nend'")
    head, row = verb(pair, "status", code=1, COLUMNS="40").splitlines()
    assert head.split()[:2] == ["target", "id"]
    (known,) = as_json(pair, "status", code=1)
    missing = {name for name in known if name.replace("_", " ") not in head}
    assert missing == set(), "everything is shown"
    for name in ("oldest_pending_at", "last_error_at"):
        assert datetime.fromisoformat(known[name]).astimezone().strftime("%Y-%m-%d %H:%M:%S") in row
    assert row.endswith("word  end")


@pytest.mark.once
@pytest.mark.parametrize(
    "args",
    [("status",), ("top", "--once"), ("check",), ("compare", "1"), ("repair", "1"), ("replay",)],
    ids=lambda a: a[0],
)
def test_a_pipe_gets_no_escape_sequences_and_whole_lines(
    pair: Pair, target: int, proxy: Proxy, args: tuple[str, ...]
) -> None:
    pair.target.sql("INSERT INTO t VALUES (7, 'extra')")
    done = tbl_repl(*args, "--dsn", dsn_of(pair.source), env={"TERM": "xterm-256color"})
    assert done.returncode in (0, 1)
    assert done.stdout
    assert ESCAPE not in done.stdout + done.stderr


@pytest.mark.once
@pytest.mark.parametrize(
    "args",
    [("status",), ("status", "--graph"), ("top", "--once"), ("check",), ("replay",), ("worker", "--once"),
     ("compare", "1"), ("copy", "1")],
    ids=" ".join,
)  # fmt: skip
def test_control_characters_of_names_and_messages_reach_no_terminal(
    pair: Pair, terminals: list[Terminal], args: tuple[str, ...]
) -> None:
    evil = "\x1b]0;title\x07\x7f\x9b31mred"
    quoted = f'"{evil}"'
    pair.join(pair.source, pair.target, quoted)
    pair.both(f"CREATE TABLE {quoted} (id text PRIMARY KEY)")
    pair.source.sql(f"INSERT INTO {quoted} VALUES (%s)", [evil])
    pair.call("add_target", source_table=quoted, server=evil, mode="async", initial_copy="none")
    if args[0] != "compare":
        pair.target.sql(f"DROP TABLE {quoted}")
    pair.source.sql(f"INSERT INTO {quoted} VALUES ('x')")
    for more in ({"TERM": "dumb"}, {"COLUMNS": "60"}):
        shown = Terminal(*args, "--dsn", dsn_of(pair.source), NO_COLOR="1", **more)
        terminals.append(shown)
        assert shown.end() in (0, 1)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.text)  # rich's own
        assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", text), repr(text)
        assert r"\x7F" in text


def test_who_closes_a_pipe_early_sees_no_traceback(pair: Pair, target: int) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tbl_repl",
            "top",
            "--json",
            "--interval",
            "0.05",
            "--dsn",
            dsn_of(pair.source),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())[0]["target_id"] == target
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(20) == 1
    process.stderr.close()
    assert said == ""


@pytest.mark.once
@pytest.mark.parametrize(
    "args", [("status",), ("status", "--json"), ("status", "--graph"), ("check",)], ids=" ".join
)
@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_names_that_the_encoding_has_not_are_escaped(
    pair: Pair, args: tuple[str, ...], env: dict[str, str]
) -> None:
    pair.both('CREATE TABLE "größe€😀" (id integer PRIMARY KEY)')
    pair.add_target('"größe€😀"')
    pair.target.sql('DROP TABLE "größe€😀"')
    done = tbl_repl(*args, "--dsn", dsn_of(pair.source), env=env)
    assert done.returncode in (0, 1) and done.stderr == ""
    if "--json" in args:
        assert json.loads(done.stdout)[0]["dst_table"] == 'public."größe€😀"'
    else:
        assert r"gr\xf6\xdfe\u20ac\U0001f600" in done.stdout


@pytest.mark.once
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_output_that_cannot_be_written_is_one_line_and_ends_with_1(
    pair: Pair, target: int, more: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tbl_repl", "status", *more, "--dsn", dsn_of(pair.source)],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False, timeout=60,
        )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.once
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
@pytest.mark.parametrize("args", ["status", "status --json", "replay"])
def test_closed_streams_are_no_error(pair: Pair, target: int, closed: str, args: str) -> None:
    command = f'exec "$0" -m tbl_repl {args} --dsn "$1" {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, dsn_of(pair.source)],
        capture_output=True, text=True, env=environment(), check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# --- whatever the source says

SETTINGS = [
    ("SQL, MDY", "postgres"), ("German, DMY", "sql_standard"),
    ("Postgres, YMD", "postgres_verbose"), ("ISO, DMY", "iso_8601"),
]  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize(("dates", "intervals"), SETTINGS)
@pytest.mark.parametrize("where", ["database", "environment"])
def test_every_verb_reads_times_whatever_their_style(
    pair: Pair, dates: str, intervals: str, where: str
) -> None:
    env: dict[str, str] = {}
    if where == "database":
        for name, value in (("datestyle", dates), ("intervalstyle", intervals)):
            pair.source.admin(f"ALTER DATABASE {pair.source.dbname} SET {name} = '{value}'")
        pair.source.forget()
    else:
        env = {"PGDATESTYLE": dates, "PGOPTIONS": f"-c intervalstyle={intervals}"}
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, at timestamptz, took interval)")
    target = str(pair.add_target("t", mode="async"))
    insert = "INSERT INTO t SELECT i, now(), '1 day 02:03:04.5' FROM generate_series({}, {}) AS i"
    pair.source.sql(insert.format(1, 3000))
    assert verb(pair, "worker", "--once", **env) == ""
    pair.source.sql(insert.format(3001, 3010))
    for name in ("status", "top"):
        more = ("--once",) if name == "top" else ()
        (row,) = json.loads(verb(pair, name, *more, "--json", **env))
        assert (row["pending_rows"], row["lag"] < 60) == (10, True)
        assert re.match(r"\d{4}-\d\d-\d\dT", row["last_shipped_at"])
        assert "async" in verb(pair, name, *more, **env)
    assert verb(pair, "replay", **env).startswith("10 rows in ")
    assert verb(pair, "compare", target, **env) == "equal\n"
    copied = verb(pair, "copy", target, **env)
    assert copied.startswith("3,010 rows in ") and "tbl-repl replay" in copied
    assert "0 rows queued" in verb(pair, "repair", target, **env)
    verb(pair, "check", code=1, **env)


# --- several databases


@pytest.fixture
def two(trio: Pair) -> Pair:
    """Table t replicated from source to target, u the other way."""
    trio.both("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE u (id integer PRIMARY KEY)")
    trio.add_target("t", mode="async")
    trio.join(trio.target, trio.source, "back")
    trio.call("add_target", node=trio.target, source_table="u", server="back", mode="async")
    return trio


@pytest.mark.once
def test_check_shows_the_problems_of_every_database(two: Pair) -> None:
    two.source.sql("DROP TABLE u")
    rows = as_json(two, "check", "--dsn", dsn_of(two.target), code=1)
    names = {name_of(dsn_of(node)) for node in (two.source, two.target)}
    assert {row["database"] for row in rows} == names
    bad = {row["database"] for row in rows if row["severity"] == "error"}
    assert bad == {name_of(dsn_of(two.target))}, "named first, and not the last"


@pytest.mark.once
def test_replay_ships_what_is_queued_in_every_database(two: Pair) -> None:
    two.source.sql("INSERT INTO t VALUES (1), (2)")
    two.target.sql("INSERT INTO u VALUES (1)")
    said = as_json(two, "replay", "--dsn", dsn_of(two.target))
    assert (said["rows"], said["pending"]) == (3, 0)
    assert (two.target.rows("t"), two.source.rows("u")) == (["(1)", "(2)"], ["(1)"])


@pytest.mark.once
@pytest.mark.parametrize("name", ["status", "check"])
@pytest.mark.parametrize("more", [(), ("--json",), ("--graph",)], ids=lambda more: " ".join(more) or "text")
def test_a_database_that_is_down_hides_no_other(two: Pair, name: str, more: tuple[str, ...]) -> None:
    if more == ("--graph",) and name == "check":
        return
    done = tbl_repl(name, *more, "--dsn", NOWHERE, "--dsn", dsn_of(two.source))
    assert done.returncode == 3
    assert done.stdout and "127.0.0.1:1/nowhere" in done.stderr
    if more == ("--json",):
        assert {"t"} >= {row["source_table"] for row in json.loads(done.stdout) if "source_table" in row}


@pytest.mark.once
def test_replay_ships_and_tells_although_databases_are_down(two: Pair) -> None:
    two.source.sql("INSERT INTO t VALUES (1), (2)")
    elsewhere = NOWHERE.replace("nowhere", "elsewhere")
    down = ("--dsn", NOWHERE, "--dsn", elsewhere, "--dsn", dsn_of(two.source))
    done = tbl_repl("replay", "--json", *down)
    assert done.returncode == 3
    assert (json.loads(done.stdout)["rows"], two.target.rows("t")) == (2, ["(1)", "(2)"])
    assert all(f"127.0.0.1:1/{name}: " in done.stderr for name in ("nowhere", "elsewhere"))
    two.source.sql("INSERT INTO t VALUES (3)")
    done = tbl_repl("replay", *down)
    assert done.returncode == 3 and done.stdout.startswith("1 row in")


@pytest.mark.once
def test_once_tells_what_is_left_although_a_database_is_down(two: Pair) -> None:
    two.source.sql("INSERT INTO t VALUES (1)")
    two.target.sql("DROP TABLE t")
    done = tbl_repl("worker", "--once", "--json", "--dsn", NOWHERE, "--dsn", dsn_of(two.source))
    assert done.returncode == 3
    assert '"event": "left"' in done.stderr and "127.0.0.1:1/nowhere: " in done.stderr


@pytest.mark.once
@pytest.mark.parametrize("name", ["top", "compare", "repair", "copy", "install"])
def test_verbs_for_one_database_refuse_several(server: object, name: str) -> None:
    more = ("1",) if name in ("compare", "repair", "copy") else ("--plain",) if name == "install" else ()
    done = tbl_repl(name, *more, "--dsn", NOWHERE, "--dsn", NOWHERE)
    assert done.returncode == 2
    assert "more than once" in done.stderr


# --- rights


@pytest.mark.once
def test_without_rights_nothing_runs_for_ever_and_the_cure_is_told(pair: Pair, target: int) -> None:
    for level in (None, "reader"):
        role = pair.source.role(f"no operator {level}")
        if level:
            pair.source.sql(f"SELECT tbl_repl.grant_access('\"{role}\"', '{level}')")
        for args in (("worker",), ("worker", "--once"), ("replay",)):
            done = tbl_repl(*args, "--dsn", dsn_of(pair.source, role))
            assert done.returncode == 1
            assert f"role {role} has no right to replay in database" in done.stderr
            assert f"grant_access('\"{role}\"', 'operator')" in done.stderr.split("HINT: ")[1]


# --- what has failed in a way that nobody has thought of


@pytest.mark.once
@pytest.mark.parametrize("args", [("replay",), ("worker", "--once")], ids=" ".join)
def test_an_internal_error_is_no_success(pair: Pair, target: int, args: tuple[str, ...]) -> None:
    program = (
        "import sys, tbl_repl.cli, tbl_repl.drainer as d\n"
        "def drain(self): raise NotImplementedError\n"
        "d.Drainer.drain = drain\n"
        "sys.exit(tbl_repl.cli.main())"
    )
    command = [sys.executable, "-c", program, *args, "--dsn", dsn_of(pair.source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=60)
    assert done.returncode == 1
    assert "tbl-repl: internal error: NotImplementedError" in done.stderr


@pytest.mark.once
@pytest.mark.parametrize("name", ["status", "top", "check", "compare", "repair", "copy"])
def test_who_has_no_right_on_the_schema_is_told_the_cure(pair: Pair, target: int, name: str) -> None:
    more = (str(target),) if name in ("compare", "repair", "copy") else ()
    done = tbl_repl(name, *more, "--dsn", dsn_of(pair.source, "writer"))
    assert done.returncode == 1
    hint = f"SELECT tbl_repl.grant_access('writer', '{'operator' if more else 'reader'}');"
    assert hint in done.stderr, done.stderr


# --- how it is called


@pytest.mark.once
@pytest.mark.parametrize("name", VERBS)
def test_help_says_what_a_verb_does(server: object, name: str) -> None:
    done = tbl_repl(name, "--help")
    assert done.returncode == 0
    assert f"usage: tbl-repl {name}" in done.stdout
    assert name in tbl_repl("--help").stdout
    options = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(.*)$", done.stdout, re.M)
    assert options
    # each option has a text, beside it or on the next line
    for option, _ in options:
        (text,) = re.findall(rf"^  (?:-\w, )?{option}\b[^\n]*(?:\n {{20,}}[^\n]*)*", done.stdout, re.M)[:1]
        assert re.search(r"\s{2,}\w", text.strip()), option


@pytest.mark.once
def test_the_reference_names_every_verb_and_option(server: object) -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^    (\w+) ", tbl_repl("--help").stdout, re.M)) == set(VERBS)
    for name in VERBS:
        (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
        known = set(re.findall(r"(--[a-z][a-z-]+)", tbl_repl(name, "--help").stdout)) - {"--help", "--json"}
        assert known - {"--dsn"} == set(re.findall(r"(--[a-z][a-z-]+)", section)) - {"--dsn", "--json"}, name


@pytest.mark.once
def test_version_is_that_of_the_control_file(server: object) -> None:
    assert tbl_repl("--version").stdout == f"tbl-repl {version()}\n"


@pytest.mark.once
@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("status", "--nonsense"),
        ("status",),  # no DSN
        ("status", "--dsn", "host=x nonsense"),
        ("status", "--dsn", "nonsense=1"),
        ("worker", "--dsn", "postgresql://[::1"),
        ("status", "--dsn", "host=127.0.0.1 port=abc"),
        ("status", "--dsn", "host=127.0.0.1 port=70000"),
        ("worker", "--dsn", "host=127.0.0.1 sslmode=bogus"),
        ("check", "--dsn", "service=nosuch"),
        ("replay", "--dsn", "host=127.0.0.1 port=1 connect_timeout=abc"),
        ("top", "--dsn", "host=127.0.0.1 port=1 keepalives=abc"),
        ("compare", "1", "--dsn", "host=127.0.0.1,127.0.0.1 port=1,2,3"),
        ("compare", "--dsn", NOWHERE),
        ("compare", "one", "--dsn", NOWHERE),
        ("compare", "0", "--dsn", NOWHERE),
        ("compare", "2147483648", "--dsn", NOWHERE),
        ("repair", "1", "--jobs", "1001", "--dsn", NOWHERE),
        ("copy", "1", "--piece-rows", "2147483648", "--dsn", NOWHERE),
        ("replay", "--batch-rows", "2147483648", "--dsn", NOWHERE),
        ("worker", "--batch-rows", "0", "--dsn", NOWHERE),
        ("worker", "--metrics-port", "abc", "--dsn", NOWHERE),
        ("worker", "--poll-seconds", "abc", "--dsn", NOWHERE),
        ("worker", "--metrics-port", "65536", "--dsn", NOWHERE),
        ("worker", "--poll-seconds", "0", "--dsn", NOWHERE),
        ("top", "--interval", "-1", "--dsn", NOWHERE),
        ("install",),
        ("install", "--plain"),
        ("install", "--plain", "--tle", "--dsn", NOWHERE),
        ("install", "--plain", "--pg-config", "x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(server: object, args: tuple[str, ...]) -> None:
    done = tbl_repl(*args)
    assert done.returncode == 2, done.stderr
    assert done.stderr and not done.stdout
    assert "Traceback" not in done.stderr
    assert not re.search(r"invalid _\w+ value", done.stderr), "names of functions mean nothing to a user"


@pytest.mark.once
@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://app:hunter2%zz@127.0.0.1/app",
        "postgresql://app:hun@hunter2@127.0.0.1/app",
        "postgresql://app:hun/hunter2@127.0.0.1/app",
        "postgresql://app:hunter2/a?b@127.0.0.1/app",
        "postgresql://app:hun@hunter2/@127.0.0.1:1/app",
        "postgresql://app:hunter2@[::1/app",
        "postgres+x://app:hunter2@127.0.0.1/app",
        "host=127.0.0.1 password=hun hunter2",
        "host=127.0.0.1 password=hun hunter2=1",
    ],
)
@pytest.mark.parametrize("way", ["--dsn", "environment"])
def test_of_an_invalid_dsn_no_piece_of_the_password_is_shown(server: object, dsn: str, way: str) -> None:
    done = (
        tbl_repl("status", "--dsn", dsn) if way == "--dsn" else tbl_repl("status", env={"TBL_REPL_DSN": dsn})
    )
    assert done.returncode == 2, done.stderr
    assert "invalid DSN" in done.stderr and "LIBPQ-CONNSTRING" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.once
@pytest.mark.parametrize("args", [("status",), ("compare",), ()], ids=lambda args: " ".join(args) or "none")
def test_a_dsn_in_the_wrong_place_is_not_repeated(server: object, args: tuple[str, ...]) -> None:
    done = tbl_repl(*args, "postgresql://app:hunter2@127.0.0.1/app")
    assert (done.returncode, done.stdout) == (2, "")
    assert "hunter2" not in done.stderr


@pytest.mark.once
@pytest.mark.parametrize(
    "dsn", ["postgresql://u@127.0.0.1:1/db@x", "postgresql://:1/db@x", "host=127.0.0.1 port=' 1 '"]
)
def test_what_libpq_takes_is_taken(server: object, dsn: str) -> None:
    """Nobody listens there: 3, not 2."""
    assert tbl_repl("status", "--dsn", dsn).returncode == 3


@pytest.mark.once
def test_a_uri_with_an_encoded_password_is_taken(pair: Pair) -> None:
    role = pair.source.role("uri", "LOGIN PASSWORD 'a@b/c%'")
    place = f"127.0.0.1:{pair.source.cluster.port}/{pair.source.dbname}"
    done = tbl_repl("status", "--dsn", f"postgresql://{role}:a%40b%2Fc%25@{place}?application_name=a@b")
    assert "role uri has no right to use tbl_repl" in done.stderr


@pytest.mark.once
@pytest.mark.parametrize("name", ["compare", "repair", "copy"])
def test_a_target_out_of_reach_is_named(pair: Pair, target: int, name: str, proxy: Proxy) -> None:
    proxy.set("refuse")
    done = tbl_repl(name, str(target), "--dsn", dsn_of(pair.source))
    assert done.returncode == 3, done.stderr
    said = (
        f"tbl-repl: server {pair.server} (127.0.0.1:{proxy.port}/{pair.target.dbname}) of target {target}: "
    )
    assert done.stderr.startswith(said), done.stderr
    assert "secret" not in done.stderr


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in VERBS if name not in ("install", "demo")])
def test_without_a_connection_it_ends_with_3(server: object, name: str) -> None:
    more = ("1",) if name in ("compare", "repair", "copy") else ()
    done = tbl_repl(name, *more, "--dsn", NOWHERE)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.once
def test_a_wrong_password_ends_with_3_and_is_not_shown(pair: Pair) -> None:
    dsn = pair.source.cluster.dsn(pair.source.dbname, "owner", tcp=True, password="wrong-secret")
    done = tbl_repl("status", "--dsn", dsn)
    assert done.returncode == 3
    assert "wrong-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["status", "worker", "replay", "check"])
def test_a_database_without_tbl_repl_is_told_from_one_that_is_down(world: World, name: str) -> None:
    bare = Node(world.cluster("source"), extension=False)
    try:
        done = tbl_repl(name, "--dsn", dsn_of(bare))
        assert done.returncode == 1
        assert "extension tbl_repl is not in database" in done.stderr
        assert "HINT: CREATE EXTENSION tbl_repl CASCADE" in done.stderr
    finally:
        bare.close()


@contextmanager
def under_way(pair: Pair, *args: str) -> Iterator[subprocess.Popen[str]]:
    """The verb, which waits for a lock on the target until the block ends."""
    with pair.target.connect() as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE t")
        process = subprocess.Popen(
            [sys.executable, "-m", "tbl_repl", *args, "--dsn", dsn_of(pair.source)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        waiting = (
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name LIKE 'tbl_repl%' AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: pair.target.admin(waiting) == [(True,)], 20)
        yield process


@pytest.mark.once
@pytest.mark.parametrize("name", ["compare", "repair", "copy"])
def test_a_target_that_is_dropped_meanwhile_is_told(pair: Pair, name: str) -> None:
    pair.both(TABLE)
    target = pair.add_target("t", mode="async", timeout="60 s")
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 5000) AS i")
    with under_way(pair, name, str(target), "--piece-rows", "100") as process:
        dropped = in_background(lambda: pair.call("drop_target", target_id=target))
        waiting = (
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE '%drop_target%' AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: pair.source.admin(waiting) == [(True,)], 20)
    dropped.result(20)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (1, f"tbl-repl: target {target} was dropped")


@pytest.mark.once
@pytest.mark.parametrize("name", ["compare", "repair", "copy"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_the_side_that_is_lost_meanwhile_is_named(pair: Pair, name: str, side: str) -> None:
    pair.both(TABLE)
    target = pair.add_target("t", mode="async", timeout="60 s")
    pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 5000) AS i")
    node, sessions, named = (
        (pair.source, "tbl-repl %", name_of(dsn_of(pair.source)))
        if side == "source"
        else (pair.target, "tbl_repl%", f"server {pair.server} (127.0.0.1:{pair.target.cluster.port}/")
    )
    with under_way(pair, name, str(target), "--piece-rows", "100") as process:
        for pid in node.backends(sessions):
            node.admin("SELECT pg_terminate_backend(%s)", [pid])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"tbl-repl: {named}" in said and "Traceback" not in said, said


def test_an_error_of_the_server_is_shown_with_its_hint_and_ends_with_1(pair: Pair, target: int) -> None:
    done = tbl_repl("compare", str(target + 1), "--dsn", dsn_of(pair.source))
    assert done.returncode == 1
    assert re.search(r"^tbl-repl: .*\b" + str(target + 1), done.stderr, re.M)
    assert "Traceback" not in done.stderr


def test_the_dsn_may_come_from_the_environment(pair: Pair, target: int) -> None:
    done = tbl_repl("status", "--json", env={"TBL_REPL_DSN": dsn_of(pair.source)})
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["target_id"] == target
    done = tbl_repl(
        "status", "--json", "--dsn", dsn_of(pair.target), env={"TBL_REPL_DSN": dsn_of(pair.source)}
    )
    assert json.loads(done.stdout) == [], "--dsn goes before the environment"


@pytest.mark.once
@pytest.mark.parametrize("way", ["environment", "service in the environment", "service"])
def test_a_database_is_named_by_what_the_environment_says(
    pair: Pair, target: int, tmp_path: Path, way: str
) -> None:
    cluster = pair.source.cluster
    services = tmp_path / "services"
    services.write_text(
        f"[s1]\nhost={cluster.socket_dir}\nport={cluster.port}\ndbname={pair.source.dbname}\n"
    )
    env = {"PGSERVICEFILE": str(services)}
    dsn, name = f"user={pair.source.user}", f"{cluster.socket_dir}:{cluster.port}/{pair.source.dbname}"
    if way == "environment":
        env = {
            "PGHOST": str(cluster.socket_dir), "PGPORT": str(cluster.port), "PGDATABASE": pair.source.dbname,
        }  # fmt: skip
    elif way == "service":
        dsn, name = f"{dsn} service=s1", "service=s1"
    else:
        env["PGSERVICE"] = "s1"
    done = tbl_repl("check", "--json", "--dsn", dsn, "--dsn", NOWHERE, env=env)
    assert {row["database"] for row in json.loads(done.stdout)} == {name}


@pytest.mark.once
def test_a_metrics_port_in_use_is_told(node: Node) -> None:
    taken = node.cluster.port
    done = tbl_repl("worker", "--once", "--metrics-port", str(taken), "--dsn", dsn_of(node))
    assert done.returncode == 1
    assert f"cannot serve metrics on port {taken}" in done.stderr


# --- a picture


def parsed(text: str) -> tuple[dict[str, dict[str, tuple[str, str]]], list[tuple[str, str, str, str]]]:
    """A Mermaid flowchart: {title of a box: {table: (key, class)}}, [(from, arrow, label, to)].

    Knows exactly what the syntax allows there, and fails on anything else.
    """
    first, *lines = text.splitlines()
    assert first == "flowchart LR"
    boxes: dict[str, dict[str, tuple[str, str]]] = {}
    arrows = []
    keys: set[str] = set()
    inside: str | None = None
    quoted = r'"([^"<>`]*)"'
    for line in lines:
        if m := re.fullmatch(rf"    subgraph (\w+)\[{quoted}\]", line):
            assert inside is None and m[1] not in keys
            keys.add(m[1])
            inside = m[2]
            boxes[inside] = {}
        elif m := re.fullmatch(rf"        (\w+)\[{quoted}\](?::::(\w+))?", line):
            assert inside is not None and m[1] not in keys
            keys.add(m[1])
            boxes[inside][m[2]] = (m[1], m[3] or "")
        elif line == "    end":
            inside = None
        elif m := re.fullmatch(rf"    (\w+) (==>|-->|-\.->)\|{quoted}\| (\w+)", line):
            assert {m[1], m[4]} <= keys
            arrows.append((m[1], m[2], m[3], m[4]))
        else:
            assert re.fullmatch(r"    classDef \w+ fill:#\w+,stroke:#\w+,color:#\w+", line), line
    return boxes, arrows


def test_graph_draws_tables_modes_and_states(pair: Pair, target: int) -> None:
    pair.source.sql(
        'CREATE SCHEMA "odd <&> ""name"; CREATE TABLE "odd <&> ""name"."e#nd" (id integer PRIMARY KEY)'
    )
    pair.target.sql("CREATE TABLE plain (id integer PRIMARY KEY)")
    second = pair.add_target('"odd <&> ""name"."e#nd"', dst_table="public.plain", mode="async")
    pair.source.sql('INSERT INTO "odd <&> ""name"."e#nd" VALUES (1)')
    pair.call("pause_target", target_id=second)
    boxes, arrows = parsed(verb(pair, "status", "--graph"))
    here, there = boxes.values()
    assert list(here) == ["public.t", "#quot;odd #lt;#amp;#gt; #quot;#quot;name#quot;.#quot;e#35;nd#quot;"]
    assert {name: css for name, (_, css) in there.items()} == {"public.t": "ok", "public.plain": "paused"}
    assert [(arrow, label) for _, arrow, label, _ in arrows] == [
        ("-->", "tolerant"),
        ("-.->", "async, paused, 1 pending"),
    ]


def test_graph_for_programs(pair: Pair, target: int) -> None:
    assert as_json(pair, "status", "--graph") == {"graph": verb(pair, "status", "--graph")}


def test_graph_of_several_databases_shows_a_ring_as_such(pair: Pair) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="sync")
    pair.join(pair.target, pair.source, "back")
    pair.call("add_target", node=pair.target, source_table="t", server="back", mode="async")
    dsn = "host=127.0.0.1 port={} dbname={} user=owner password=secret"
    here, there = (dsn.format(node.cluster.port, node.dbname) for node in (pair.source, pair.target))
    done = tbl_repl("status", "--graph", "--dsn", here, "--dsn", there)
    boxes, arrows = parsed(done.stdout)
    names = [node.one("SELECT tbl_repl.node_name()") for node in (pair.source, pair.target)]
    assert list(boxes) == names
    (first,), (second,) = (box.values() for box in boxes.values())
    assert {(a, arrow, b) for a, arrow, _, b in arrows} == {
        (first[0], "==>", second[0]),
        (second[0], "-.->", first[0]),
    }
    assert "secret" not in done.stdout


@pytest.mark.once
def test_graph_shows_the_worst_of_several_arrivals(server: object) -> None:
    def row(source: str, status: str) -> dict[str, object]:
        return {
            "server": "s",
            "source_table": source,
            "dst_table": "public.d",
            "mode": "sync",
            "status": status,
            "pending_rows": 0,
        }

    boxes, _ = parsed(
        mermaid([GraphNode("n", "p", [row("a", "ok"), row("b", "failed"), row("c", "queueing")])])
    )
    assert boxes["s"]["public.d"][1] == "failed"


# --- install


@pytest.fixture
def bare(world: World) -> Iterator[Pair]:
    """A pair without the extension on either side, with dblink on the source in a schema of its own."""
    pair = Pair(world, plain_source=True, plain_target=True)
    try:
        pair.source.admin("CREATE SCHEMA elsewhere; CREATE EXTENSION dblink SCHEMA elsewhere")
        pair.source.admin(
            "GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw TO owner; GRANT USAGE ON SCHEMA elsewhere TO owner"
        )
        yield pair
    finally:
        pair.close()


@pytest.mark.once
@pytest.mark.parametrize(
    ("said", "code"), [("9.6.24", 1), ("12.1", 1), ("13.23 (Debian)", 1), ("14.0", 0), ("19beta1", 0)]
)
def test_files_go_into_servers_of_a_version_that_is_supported(tmp_path: Path, said: str, code: int) -> None:
    pg_config = tmp_path / "pg_config"
    pg_config.write_text(
        f"""#!/bin/sh
        case $1 in --version) echo PostgreSQL {said.split()[0]} ;; *) echo {tmp_path} ;; esac
        """
    )
    pg_config.chmod(0o755)
    done = tbl_repl("install", "--pg-config", str(pg_config))
    assert done.returncode == code, done.stderr
    assert (tmp_path / "extension").exists() == (code == 0)
    assert ("needs PostgreSQL 14 or later" in done.stderr) == (code == 1)
    assert ("has not been tested" in done.stderr) == said.startswith("19")


def test_plain_install_needs_no_extension_and_everything_works(bare: Pair) -> None:
    said = verb(bare, "install", "--plain")
    assert f"installed schema tbl_repl, version {version()}" in said
    assert bare.source.sql("SELECT 1 FROM pg_extension WHERE extname = 'tbl_repl'") == []
    bare.join(bare.source, bare.target, bare.server)
    bare.both(TABLE)
    direct = bare.add_target("t")
    bare.source.sql("INSERT INTO t VALUES (1, 'x')")
    bare.assert_same("t")
    bare.both("CREATE TABLE u (id integer PRIMARY KEY)")
    bare.add_target("u", mode="async")
    bare.source.sql("INSERT INTO u VALUES (1)")
    assert tbl_repl("worker", "--once", "--dsn", dsn_of(bare.source)).returncode == 0
    bare.assert_same("u")
    assert verb(bare, "compare", str(direct)) == "equal\n"
    assert all(row["severity"] != "error" for row in as_json(bare, "check", code=1))
    # what an operator may do is granted without pg_depend
    operator = bare.source.role("plain_operator")
    bare.source.sql(f"SELECT tbl_repl.grant_access('{operator}', 'operator')")
    assert bare.source.sql("SELECT tbl_repl.replay()", user=operator) == [(0,)]
    with pytest.raises(Exception, match="permission denied"):
        bare.source.sql("SELECT tbl_repl.set_node_name('x')", user=operator)


def test_plain_install_changes_nothing_where_it_is_already(bare: Pair) -> None:
    verb(bare, "install", "--plain")
    bare.source.sql("SELECT tbl_repl.set_node_name('mine')")
    done = tbl_repl("install", "--plain", "--dsn", dsn_of(bare.source))
    assert done.returncode == 1
    assert "schema tbl_repl exists already" in done.stderr
    assert bare.source.one("SELECT tbl_repl.node_name()") == "mine"


def test_plain_install_is_all_or_nothing(bare: Pair) -> None:
    """A role that may not do the last step leaves nothing behind."""
    bare.source.admin(
        """
        CREATE FUNCTION stop_it() RETURNS event_trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity = 'tbl_repl.sync_err_rec') THEN
                RAISE EXCEPTION 'not here';
            END IF;
        END $$;
        CREATE EVENT TRIGGER stop_it ON ddl_command_end EXECUTE FUNCTION stop_it();
        """
    )
    done = tbl_repl("install", "--plain", "--dsn", dsn_of(bare.source))
    assert done.returncode == 1
    assert "not here" in done.stderr
    assert bare.source.one("SELECT to_regnamespace('tbl_repl')") is None


def test_plain_install_says_who_must_bring_dblink(world: World) -> None:
    bare = Node(world.cluster("source"), extension=False)
    try:
        done = tbl_repl("install", "--plain", "--dsn", dsn_of(bare))
        assert done.returncode == 1
        assert "dblink is missing" in done.stderr and "As a superuser" in done.stderr
        assert tbl_repl("install", "--plain", "--dsn", dsn_of(bare, "postgres")).returncode == 0
    finally:
        bare.close()


def test_plain_script_has_nothing_that_only_an_extension_can(server: object) -> None:
    script = plain_script()
    assert "pg_extension_config_dump" not in script
    assert not re.search(r"^\\", script, re.M)
    assert "@ext" not in script


# pg_tle itself is not here: a function of its name and signature notes what it was called with.
STUB = """
CREATE SCHEMA pgtle;
CREATE TABLE pgtle.called (name text, version text, description text, script text, requires text[]);
CREATE FUNCTION pgtle.install_extension(name text, version text, description text, ext text, requires text[] DEFAULT NULL)
RETURNS boolean LANGUAGE sql AS $$
    INSERT INTO pgtle.called VALUES (name, version, description, ext, requires) RETURNING true
$$;
"""


@pytest.mark.parametrize("way", ["run", "printed"])
def test_tle_registers_the_script_as_it_is(bare: Pair, way: str) -> None:
    if way == "run":
        done = tbl_repl("install", "--tle", "--dsn", dsn_of(bare.source))
        assert done.returncode == 1
        assert "pg_tle is not in database" in done.stderr
    bare.source.sql(STUB)
    if way == "run":
        assert "in pg_tle" in verb(bare, "install", "--tle")
    else:
        file = bare.world.workdir / "tle.sql"
        file.write_text(tbl_repl("install", "--tle").stdout, encoding="utf-8")
        file.chmod(0o644)
        bare.source.cluster.psql("-f", str(file), dbname=bare.source.dbname, user="owner")
    ((name, number, _, script, requires),) = bare.source.sql("SELECT * FROM pgtle.called")
    assert (name, number, requires) == ("tbl_repl", version(), ["dblink"])
    built = extension_files()[f"tbl_repl--{number}.sql"]
    assert script == re.sub(r"\A\\echo [^\n]*\n", "", built)
    # what pg_tle would run is what the plain installation runs, and that has been tested above
    assert (
        re.sub(r"^SELECT pg_catalog\.pg_extension_config_dump\([^;]*\);\n", "", script, flags=re.M)
        == plain_script()
    )


@pytest.mark.once
def test_tle_statements_for_programs(server: object) -> None:
    done = tbl_repl("install", "--tle", "--json")
    assert json.loads(done.stdout) == {"sql": "\n".join(tle_statements())}


def test_tle_statements_are_two(server: object) -> None:
    first, second = tle_statements()
    assert first == "SET standard_conforming_strings = on;"
    assert second.startswith("SELECT pgtle.install_extension(")
