"""Every example of the documentation is run, and shows what the page says it shows.

A page's blocks run in order on two fresh databases: ``sql source`` and ``sql target`` on that
side, through psql, as an ordinary role that owns the database.  A ``text`` block right behind
one is what psql must print; '...' in it stands for anything.  Other blocks are not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import Node, Pair, World

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(info string, text, line number) of every fenced block."""
    content = page.read_text(encoding="utf-8")
    return [
        (m["info"].strip(), m["text"], content.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(content)
    ]


RUN = [page for page in PAGES if any(info in ("sql source", "sql target") for info, _, _ in blocks(page))]


@pytest.fixture
def bare(world: World) -> Iterator[Pair]:
    """A pair with dblink, as an administrator leaves it, and no tbl_repl."""
    pair = Pair(world, plain_source=True, plain_target=True)
    try:
        for node in pair.nodes:
            node.admin("CREATE EXTENSION dblink")
            node.admin("GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw TO owner")
        yield pair
    finally:
        pair.close()


def at_home(sql: str, there: Node) -> str:
    """The example with this machine's addresses and passwords in place of the page's: they lead to the other node."""
    here = f"host '127.0.0.1', port '{there.cluster.port}', dbname '{there.dbname}'"
    sql = re.sub(r"host '[^']*'(, port '[^']*')?, dbname '[^']*'", here, sql)
    return re.sub(r"user '[^']*', password '[^']*'", "user 'owner', password 'secret'", sql)


def matches(expected: str, said: str) -> bool:
    """Equal but for the width of columns; '...' stands for anything."""

    def clean(text: str) -> str:
        lines = [line for line in text.strip().splitlines() if not line.startswith("NOTICE")]
        return "\n".join(re.sub("-{2,}", "--", re.sub(" +", " ", line.strip())) for line in lines)

    pattern = re.escape(clean(expected)).replace(re.escape("..."), ".*?")
    return re.search(rf"(^|\n){pattern}$", clean(said), re.S) is not None


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_the_page_do_what_it_says(bare: Pair, page: Path) -> None:
    said = ""
    for info, text, line in blocks(page):
        where = f"{page.name}, line {line}"
        if info in ("sql source", "sql target"):
            node = bare.source if info == "sql source" else bare.target
            # From a file, not by -c: each statement is a transaction of its own, as when typed.
            script = bare.world.workdir / "example.sql"
            script.write_text(
                at_home(text, bare.source if node is bare.target else bare.target), encoding="utf-8"
            )
            script.chmod(0o644)
            try:
                said = node.cluster.psql("-f", str(script), dbname=node.dbname, user="owner")
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error
        elif info == "text" and said:
            assert matches(text, said), f"{where}: psql said\n{said}"
            said = ""
        else:
            said = ""


def test_links_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
