"""Named points at which a test may kill the worker; off in normal use.

``TBL_REPL_FAIL_AT=name`` in the environment: the process that reaches the point of that name kills itself by
SIGKILL, as the kernel would when memory runs out.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "awake",  # the worker has seen that something is queued
    "before replay",
    "after replay",
    "copy locked",  # a large batch: the locks of the targets are held
    "copy moved",  # its rows are on the target, not committed there
    "copy committed",  # committed there, the position has not moved
    "copy done",
    "piece next",  # a table that is copied in pieces: about to claim one
    "piece moved",  # its rows are on the target, not committed there
    "piece committed",  # committed there, not noted here
    "piece done",
)

_WANTED = os.environ.get("TBL_REPL_FAIL_AT")


def reached(name: str) -> None:
    """End here if the environment says so."""
    if _WANTED is not None and name == _WANTED:
        os.kill(os.getpid(), signal.SIGKILL)
