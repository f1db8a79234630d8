"""The extension's files, as text: taken from the installed package or built from a checkout.

Standard library only: the build hook loads this module before anything is installed.
"""

from __future__ import annotations

import re
from pathlib import Path

PACKAGED = Path(__file__).parent / "_pg" / "extension"
CHECKOUT = Path(__file__).parents[2]


def control_version(control: str) -> str:
    """The version number that a control file's text states."""
    found = re.search(r"^default_version\s*=\s*'([^']+)'", control, re.MULTILINE)
    if found is None:
        raise ValueError("no default_version in the control file")
    return found.group(1)


def version() -> str:
    """The version of this package, which is that of its control file."""
    root = PACKAGED if PACKAGED.is_dir() else CHECKOUT
    return control_version((root / "tbl_repl.control").read_text(encoding="utf-8"))


def build_script(root: Path) -> str:
    """The install script, from the sources under root: what ``make script`` builds."""
    order = (root / "sql" / "order").read_text(encoding="utf-8").split()
    text = "".join((root / name).read_text(encoding="utf-8") for name in order)
    return re.sub(r"^CREATE OR REPLACE ", "CREATE ", text, flags=re.MULTILINE)


def build_files(root: Path) -> dict[str, str]:
    """Every file that belongs into a server's extension directory: name -> text."""
    control = (root / "tbl_repl.control").read_text(encoding="utf-8")
    files = {
        "tbl_repl.control": control,
        f"tbl_repl--{control_version(control)}.sql": build_script(root),
    }
    for update in sorted((root / "sql" / "updates").glob("tbl_repl--*--*.sql")):
        files[update.name] = update.read_text(encoding="utf-8")
    return files


def extension_files() -> dict[str, str]:
    """The extension's files, name -> text: those of the wheel, else built from the checkout."""
    if PACKAGED.is_dir():
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(PACKAGED.iterdir())}
    if (CHECKOUT / "sql" / "order").is_file():
        return build_files(CHECKOUT)
    raise FileNotFoundError(f"the extension's files are neither in {PACKAGED} nor in {CHECKOUT}")


def plain_script(files: dict[str, str] | None = None) -> str:
    """The install script without what only CREATE EXTENSION understands.

    Runs in one transaction, with the schema of dblink in search_path.
    """
    files = files or extension_files()
    text = files[f"tbl_repl--{control_version(files['tbl_repl.control'])}.sql"]
    text = re.sub(r"^\\.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^SELECT pg_catalog\.pg_extension_config_dump\([^;]*\);\n", "", text, flags=re.MULTILINE)
