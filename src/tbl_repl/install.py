"""Put the extension's files where a server looks for them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tbl_repl.cluster import Cluster
from tbl_repl.errors import TblReplError
from tbl_repl.script import extension_files
from tbl_repl.servers import Server, server_of


def install_into(directory: Path) -> list[Path]:
    """Write control file and scripts into that directory; the paths written.

    Each file is replaced as a whole, so a CREATE EXTENSION at the same time never reads half a script.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in extension_files().items():
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=".tbl_repl")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            written.append(Path(temporary).replace(directory / name))
    except OSError as error:
        raise TblReplError(
            f"cannot write into {directory}: {error.strerror}",
            "Run it as a user who may write there, for example by sudo.",
        ) from error
    return written


def install(target: Server | str | Path) -> list[Path]:
    """Install into the server that a pg_config belongs to; the paths written."""
    server = target if isinstance(target, Server) else server_of(target)
    return install_into(server.extension_dir)


def install_for(cluster: Cluster) -> None:
    """Make a disposable cluster find the extension; before its first start.

    From PostgreSQL 18 on without a trace in the server's own directories.
    """
    if cluster.server.major < 18:
        install(cluster.server)
        return
    directory = cluster.workdir / "ext"
    install_into(directory / "extension")
    cluster.settings["extension_control_path"] = f"{directory}:$system"
