"""Build hook: the wheel carries the extension, built from the same sources as by make."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tbl_repl_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ExtensionFiles(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``tbl_repl/_pg/extension/*`` to ordinary wheels.

    An editable wheel gets nothing: there the package finds the checkout itself.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        script = _load(root / "src" / "tbl_repl" / "script.py")
        out = root / "build" / "extension"
        out.mkdir(parents=True, exist_ok=True)
        for name, text in script.build_files(root).items():
            path = out / name
            path.write_text(text, encoding="utf-8")
            build_data["force_include"][str(path)] = f"tbl_repl/_pg/extension/{name}"
