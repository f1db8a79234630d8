"""Every way in: make, PGXN, wheel; and one version number in all of them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import Pair, World
from tbl_repl.script import build_files, build_script, control_version
from tbl_repl.servers import Server

ROOT = Path(__file__).parents[1]
VERSION = control_version((ROOT / "tbl_repl.control").read_text())


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """They write into the checkout: one version at a time."""
    with (Path(tempfile.gettempdir()) / "tbl_repl-packaging.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command: object, **options: object) -> str:
    """Run in the checkout; what it printed.  Fails with the whole output."""
    env = {**os.environ, "PYTHONWARNINGS": "default", "MAKEFLAGS": "", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=env | options.pop("env", {}),  # type: ignore[operator]
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture
def bare(world: World) -> Iterator[Pair]:
    """A pair without the extension on either side."""
    pair = Pair(world, plain_source=True, plain_target=True)
    try:
        yield pair
    finally:
        pair.close()


@pytest.fixture
def uninstalled(server: Server) -> Iterator[Path]:
    """The server's extension directory, without tbl_repl; what was there comes back."""
    directory = server.extension_dir
    if not os.access(directory, os.W_OK):
        pytest.skip(f"cannot write into {directory}")
    before = {path: path.read_bytes() for path in directory.glob("tbl_repl*")}
    for path in before:
        path.unlink()
    try:
        yield directory
    finally:
        for path in directory.glob("tbl_repl*"):
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


def assert_a_row_arrives(pair: Pair) -> None:
    pair.source.admin("GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw TO owner")
    pair.join(pair.source, pair.target, pair.server)
    pair.both("CREATE TABLE t (id integer PRIMARY KEY, v text)")
    pair.add_target("t", mode="sync")
    pair.source.sql("INSERT INTO t VALUES (1, 'arrived')")
    assert pair.target.sql("SELECT * FROM t") == [(1, "arrived")]


def in_directory(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.glob("tbl_repl*")}


def test_make_and_python_build_the_same_script() -> None:
    run("make", "script")
    assert (ROOT / f"tbl_repl--{VERSION}.sql").read_text() == build_script(ROOT)


def test_every_source_file_is_in_the_order_once() -> None:
    order = (ROOT / "sql" / "order").read_text().split()
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "sql").rglob("*.sql")}
    assert sorted(order) == sorted(name for name in found if not name.startswith("sql/updates/"))


def test_make_install_and_uninstall(server: Server, uninstalled: Path, bare: Pair) -> None:
    run("make", "install", f"PG_CONFIG={server.pg_config}", env=server.env)
    assert in_directory(uninstalled) == build_files(ROOT)
    bare.source.admin("CREATE EXTENSION dblink")
    bare.source.sql("CREATE EXTENSION tbl_repl")
    assert_a_row_arrives(bare)
    run("make", "uninstall", f"PG_CONFIG={server.pg_config}", env=server.env)
    assert in_directory(uninstalled) == {}


def test_pgxn_install_and_load_end_with_a_replicated_row(
    server: Server, uninstalled: Path, bare: Pair
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("make dist needs the repository")
    run("make", "dist")
    archive = ROOT / f"tbl_repl-{VERSION}.zip"
    with zipfile.ZipFile(archive) as zipped:
        assert f"tbl_repl-{VERSION}/META.json" in zipped.namelist()
    pgxn = Path(sysconfig.get_path("scripts")) / "pgxn"
    run(pgxn, "install", "--nosudo", "--pg_config", server.pg_config, f"./{archive.name}", env=server.env)
    assert (uninstalled / f"tbl_repl--{VERSION}.sql").exists()
    bare.source.admin("CREATE EXTENSION dblink")
    where = ["-h", bare.source.cluster.socket_dir, "-p", bare.source.cluster.port]
    # fmt: off
    run(
        pgxn, "load", "--yes", "--pg_config", server.pg_config, *where, "-U", "owner",
        "-d", bare.source.dbname, f"./{archive.name}", env=server.env,
    )
    # fmt: on
    assert_a_row_arrives(bare)


def test_wheel_carries_the_extension_and_installs_it(
    server: Server, uninstalled: Path, bare: Pair, wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as zipped:
        prefix = "tbl_repl/_pg/extension/"
        packed = {
            name.removeprefix(prefix): zipped.read(name).decode()
            for name in zipped.namelist()
            if name.startswith(prefix)
        }
    assert packed == build_files(ROOT)
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    program = [sys.executable, "-m", "tbl_repl", "install", "--pg-config", server.pg_config]
    said = run(*program, env={"PYTHONPATH": str(site)})
    assert "CREATE EXTENSION tbl_repl CASCADE" in said
    assert in_directory(uninstalled) == packed
    bare.source.admin("CREATE EXTENSION dblink")
    bare.source.sql("CREATE EXTENSION tbl_repl")
    assert_a_row_arrives(bare)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT)
    (found,) = directory.glob("*.whl")
    assert found.name == f"tbl_repl-{VERSION}-py3-none-any.whl"
    return found


def test_installcheck_passes(server: Server, world: World) -> None:
    cluster = world.cluster("source")
    where = {"PGHOST": str(cluster.socket_dir), "PGPORT": str(cluster.port), "PGUSER": "postgres"}
    said = run("make", "installcheck", f"PG_CONFIG={server.pg_config}", env=server.env | where)
    assert "All " in said


def test_install_says_what_is_wrong(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tbl_repl", "install", "--pg-config", str(tmp_path / "none")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot run" in done.stderr
    done = subprocess.run(program[:-2], capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_meta_json_is_complete_and_states_the_version_of_the_control_file() -> None:
    meta = json.loads((ROOT / "META.json").read_text())
    for field in ("name", "version", "abstract", "maintainer", "license", "provides", "meta-spec"):
        assert meta.get(field), field
    assert meta["name"] == "tbl_repl"
    assert meta["version"] == meta["provides"]["tbl_repl"]["version"] == VERSION
    assert (ROOT / meta["provides"]["tbl_repl"]["file"]).is_file()
    assert meta["meta-spec"]["version"] == "1.0.0"


def test_version_stands_in_the_control_file_only() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    # META.json is compared above, the changelog is history.
    allowed = {"tbl_repl.control", "META.json", "CHANGELOG.md"}
    pattern = rf"(^|[^0-9.]){re.escape(VERSION)}($|[^0-9.])"
    done = subprocess.run(
        ["git", "grep", "-lE", pattern, "--", ":!docs", ":!sql/updates"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) <= allowed
