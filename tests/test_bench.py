"""The benchmark runs and says what it measured.  Its figures are nobody's business here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tbl_repl.servers import Server

RUN = Path(__file__).parents[1] / "bench" / "run.py"


@pytest.mark.slow
@pytest.mark.once
def test_the_benchmark_measures_every_point_and_writes_the_page(server: Server, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(RUN), "--quick", "--only", "triggers", "--pg", str(server), "--page", str(page)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    goals = re.findall(
        r"^\| .* \| at (?:most|least) [\d.]+ \| ([\d.]+) \| (met|missed) \|$", text, re.MULTILINE
    )
    assert len(goals) == 8
    for contender in (
        "tbl_repl, sync",
        "postgres_fdw trigger",
        "dblink trigger",
        "tbl_repl, async",
        "no trigger",
    ):
        assert contender in text


@pytest.mark.slow
@pytest.mark.once
def test_every_point_against_logical_replication_is_measured(server: Server, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    parts = {"oltp": 4, "delay": 2, "statements": 3, "snapshot": 2, "memory": 2}
    page.write_text("".join(f"<!-- {part}: begin -->\n<!-- {part}: end -->\n" for part in parts))
    done = subprocess.run(
        [
            *(sys.executable, str(RUN), "--quick", "--soak", "--pg", str(server)),
            *("--only", ",".join(parts), "--page", str(page)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text(encoding="utf-8")
    for part, goals in parts.items():
        (section,) = re.findall(rf"<!-- {part}: begin -->\n(.*?)<!-- {part}: end -->", text, re.DOTALL)
        measured = re.findall(
            r"^\| .* \| at (?:most|least) [\d.]+ \| [\d.]+ \| (?:met|missed) \|$", section, re.M
        )
        assert len(measured) == goals, section
        assert "tbl_repl, async" in section
        assert ("logical replication |" in section) == (part in ("oltp", "delay", "statements"))


@pytest.mark.once
def test_a_version_that_is_not_there_is_refused(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, str(RUN), "--pg", "9"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no such PostgreSQL: 9" in done.stdout
