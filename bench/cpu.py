"""CPU time and memory of processes, from /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def _processes() -> dict[int, tuple[int, float]]:
    """pid -> (its parent, CPU seconds of its own and of its children that have ended)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (
                    (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                )
            except OSError:
                continue  # it has ended meanwhile
            found[int(entry.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / TICK)
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU seconds that these processes and all that descend from them have used so far."""
    everything, wanted = _processes(), set(roots)

    def ours(pid: int) -> bool:
        while pid in everything:
            if pid in wanted:
                return True
            pid = everything[pid][0]
        return False

    return sum(cpu for pid, (_, cpu) in everything.items() if ours(pid))


def peak_mib(pid: int) -> float:
    """The most memory that a process has ever had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")
