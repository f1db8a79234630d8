"""The command line as a process of its own, and a worker that runs while a test goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.nodes import Node
from support.waiting import wait_until

SOURCES = Path(__file__).parents[2] / "src"


def environment(**more: str) -> dict[str, str]:
    """Without what the caller's shell says about databases and colours."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "TBL_REPL")) and name not in ("NO_COLOR", "FORCE_COLOR", "TERM")
    }
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "default", **more}


def dsn_of(node: Node, user: str | None = None) -> str:
    """What --dsn takes for a node of a test."""
    return node.cluster.dsn(node.dbname, user or node.user)


def tbl_repl(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``tbl-repl ...`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tbl_repl", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment(**(env or {})),
    )


def started(*args: str) -> subprocess.Popen[bytes]:
    """``tbl-repl ...`` that goes on while a test does; what it says is not kept."""
    return subprocess.Popen(
        [sys.executable, "-m", "tbl_repl", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )


class WorkerProcess:
    """``tbl-repl worker`` for these nodes, in JSON lines unless said otherwise; killed at the end.

    constants: of modules of tbl_repl ("bulk.MIN_ROWS"), set before it starts.  program: what is run before it
    starts, with tbl_repl.watcher as w.
    """

    def __init__(
        self,
        *nodes: Node,
        options: tuple[str, ...] = (),
        as_json: bool = True,
        env: dict[str, str] | None = None,
        constants: dict[str, float] | None = None,
        program: str = "",
        dsns: tuple[str, ...] = (),
        wait: bool = True,
    ) -> None:
        command = [sys.executable, "-m", "tbl_repl"]
        if program:
            start = "import sys, tbl_repl.cli, tbl_repl.watcher as w\n{}sys.exit(tbl_repl.cli.main())"
            command = [sys.executable, "-c", start.format(program)]
        elif constants:
            changes = "; ".join(f"tbl_repl.{name} = {value}" for name, value in constants.items())
            command = [
                sys.executable,
                "-c",
                f"import sys, tbl_repl.cli; {changes}; sys.exit(tbl_repl.cli.main())",
            ]
        command.append("worker")
        for dsn in (*(dsn_of(node) for node in nodes), *dsns):
            command += ["--dsn", dsn]
        if as_json:
            command.append("--json")
        self.process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**(env or {})),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            for _ in nodes:
                wait_until(lambda: len(self.events("serving")) >= len(nodes) or not self.alive, 20)
            assert self.alive, self.output

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of that event (JSON workers only)."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in found if line["event"] == name]

    def send(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.ended()

    def ended(self, timeout: float = 20) -> int:
        """Its exit code (negative: the signal)."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def rss(self) -> int:
        """The most memory it has ever had, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(peak.split()[1]) * 1024

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive:
            self.process.kill()
        self.ended()
        if error is not None:
            error.add_note(f"the worker said:\n{self.output[-4000:]}")
        assert self.process.stderr is not None
        self.process.stderr.close()
