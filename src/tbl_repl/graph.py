"""The topology as a Mermaid diagram: nodes, tables, targets, modes and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tbl_repl.database import Row
from tbl_repl.errors import printable

_SHAPES = {"sync": "==>", "tolerant": "-->", "async": "-.->"}
_CLASSES = {
    "ok": "fill:#dcfce7,stroke:#15803d,color:#14532d",
    "copying": "fill:#cffafe,stroke:#0e7490,color:#164e63",
    "queueing": "fill:#fef9c3,stroke:#a16207,color:#713f12",
    "paused": "fill:#f3e8ff,stroke:#7e22ce,color:#581c87",
    "failed": "fill:#fee2e2,stroke:#b91c1c,color:#7f1d1d",
}
_WORST = ("failed", "paused", "queueing", "copying", "ok")


@dataclass(frozen=True)
class Node:
    """One source database: its name, host:port/database, rows of target_status, where its servers lead.

    source_table is the full name.
    """

    name: str
    place: str
    targets: Sequence[Row]
    servers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Box:
    """One database of the picture: its title and its tables, table -> worst status of what arrives there."""

    title: str
    tables: dict[str, str | None] = field(default_factory=dict)

    def add(self, table: str, status: str | None) -> None:
        known = self.tables.get(table)
        if known is None or (status is not None and _WORST.index(status) < _WORST.index(known)):
            self.tables[table] = status


def _quoted(text: object) -> str:
    """Text inside a Mermaid label: what Mermaid would take for syntax or markup as entities."""
    escaped = str(text).replace("#", "#35;").replace("&", "#amp;").replace('"', "#quot;")
    escaped = escaped.replace("<", "#lt;").replace(">", "#gt;").replace("`", "#96;")
    return '"' + printable(" ".join(escaped.split())) + '"'


def _label(row: Row) -> str:
    parts = [str(row["mode"])]
    if row["status"] != "ok":
        parts.append(str(row["status"]))
    if row["pending_rows"]:
        parts.append(f"{row['pending_rows']} pending")
    return ", ".join(parts)


def mermaid(nodes: Sequence[Node]) -> str:
    """A flowchart: a box for each database, in it its tables, arrows from source to target tables.

    A server that leads to one of the nodes is drawn as that node, so that chains and rings of nodes are
    seen as such.  Target tables have the colour of their status; sync arrows are thick, async ones dotted.
    """
    boxes: dict[str, _Box] = {}
    arrows: list[tuple[str, str, str, str, str, str]] = []
    for node in nodes:
        boxes[node.place] = _Box(node.name)
    for node in nodes:
        for row in node.targets:
            server = str(row["server"])
            place = node.servers.get(server, server)
            there = boxes.setdefault(place, _Box(f"{server}: {place}" if place != server else server))
            source, target = str(row["source_table"]), str(row["dst_table"])
            boxes[node.place].add(source, None)
            there.add(target, str(row["status"]))
            arrows.append((node.place, source, _SHAPES[str(row["mode"])], _label(row), place, target))
    keys: dict[tuple[str, str], str] = {}
    lines = ["flowchart LR"]
    for n, (place, box) in enumerate(boxes.items()):
        lines.append(f"    subgraph n{n}[{_quoted(box.title)}]")
        for i, (table, status) in enumerate(box.tables.items()):
            keys[place, table] = f"n{n}_{i}"
            lines.append(f"        n{n}_{i}[{_quoted(table)}]" + (f":::{status}" if status else ""))
        lines.append("    end")
    lines += [
        f"    {keys[here, source]} {shape}|{_quoted(label)}| {keys[there, target]}"
        for here, source, shape, label, there, target in arrows
    ]
    lines += [f"    classDef {status} {style}" for status, style in _CLASSES.items()]
    return "\n".join(lines) + "\n"
