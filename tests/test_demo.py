"""``tbl-repl demo`` as a person starts it: from outside, as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEMO = [sys.executable, "-m", "tbl_repl", "demo"]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The demo's temporary directory: what it leaves there, it forgot."""
    path = Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environment(scratch: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(scratch), "COLUMNS": "120", **more}


def assert_told_the_story(done: subprocess.CompletedProcess[str], scratch: Path) -> None:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "checks, all well" in done.stdout
    for word in (
        "10003",
        "sync_err_rec",
        "password authentication failed",
        "23514",
        "25006",
        "TRUNCATE TABLE",
    ):
        assert word in done.stdout, word
    assert list(scratch.iterdir()) == []


def test_demo_tells_the_story_and_cleans_up(scratch: Path) -> None:
    done = subprocess.run(
        DEMO, env=environment(scratch), capture_output=True, text=True, check=False, timeout=300
    )
    assert_told_the_story(done, scratch)


def test_demo_for_programs_is_a_json_object_a_line(scratch: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--json"], env=environment(scratch), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last["checks"] > 10
    assert {line["side"] for line in lines if "sql" in line} == {"source", "target"}
    assert any("sync_err_rec" in line.get("sql", "") for line in lines)


def test_demo_works_as_an_ordinary_user(scratch: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the other test is as an ordinary user already")
    ordinary: dict[str, Any] = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
    # The virtual environment's own Python may be one that lies in root's home: any other of the
    # same version will do.
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    env = environment(
        scratch,
        HOME=str(scratch),
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONPATH=os.pathsep.join(filter(None, packages)),
    )
    code = f"import sys, tbl_repl.demo; assert sys.version_info[:2] == {sys.version_info[:2]}"
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info[1]}", "/usr/bin/python3"):
        reached = ["/bin/sh", "-c", 'test -x "$0" && exec "$0" -c "$1"', python, code]
        if (
            subprocess.run(reached, cwd="/", env=env, capture_output=True, check=False, **ordinary).returncode
            == 0
        ):
            break
    else:
        pytest.skip("an ordinary user can reach no Python with these packages")
    done = subprocess.run(
        [python, "-m", "tbl_repl", "demo"],
        env=env,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **ordinary,
    )
    assert_told_the_story(done, scratch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_demo_leaves_nothing(scratch: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        DEMO, env=environment(scratch, PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "A table here" in line:
                demo.send_signal(number)
                break
        demo.stdout.read()
        assert demo.wait(60) == 130
    assert list(scratch.iterdir()) == []
