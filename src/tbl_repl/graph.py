"""The topology as a Mermaid diagram: nodes, tables, targets, modes and state."""

from __future__ import annotations

from collections.abc import Sequence

from tbl_repl.database import Row

_SHAPES = {"sync": "==>", "tolerant": "-->", "async": "-.->"}
_CLASSES = {
    "ok": "fill:#dcfce7,stroke:#15803d,color:#14532d",
    "copying": "fill:#cffafe,stroke:#0e7490,color:#164e63",
    "queueing": "fill:#fef9c3,stroke:#a16207,color:#713f12",
    "paused": "fill:#f3e8ff,stroke:#7e22ce,color:#581c87",
    "failed": "fill:#fee2e2,stroke:#b91c1c,color:#7f1d1d",
}


def _quoted(text: object) -> str:
    """Text inside a Mermaid label: quotes and angle brackets as entities."""
    escaped = str(text).replace("&", "#amp;").replace('"', "#quot;")
    return '"' + escaped.replace("<", "#lt;").replace(">", "#gt;") + '"'


def mermaid(nodes: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """A flowchart of (node name, rows of target_status) pairs.

    Source tables on the left, grouped by node; target tables on the right, grouped by server and coloured
    by status; sync arrows are thick, async ones dotted.
    """
    lines = ["flowchart LR"]
    edges: list[str] = []
    servers: dict[str, dict[str, tuple[str, str]]] = {}
    for n, (node, rows) in enumerate(nodes):
        tables = {
            name: f"s{n}_{i}"
            for i, name in enumerate(dict.fromkeys(str(row["source_table"]) for row in rows))
        }
        lines.append(f"    subgraph n{n}[{_quoted(node)}]")
        lines += [f"        {key}[{_quoted(name)}]" for name, key in tables.items()]
        lines.append("    end")
        for row in rows:
            place = servers.setdefault(str(row["server"]), {})
            key = f"t{n}_{row['target_id']}"
            place[key] = (str(row["dst_table"]), str(row["status"]))
            label = f"{row['mode']}"
            if row["status"] != "ok":
                label += f", {row['status']}"
            if row["pending_rows"]:
                label += f", {row['pending_rows']} pending"
            edges.append(
                f"    {tables[str(row['source_table'])]} {_SHAPES[str(row['mode'])]}|{_quoted(label)}| {key}"
            )
    for n, (server, targets) in enumerate(servers.items()):
        lines.append(f"    subgraph v{n}[{_quoted(server)}]")
        lines += [f"        {key}[{_quoted(name)}]:::{status}" for key, (name, status) in targets.items()]
        lines.append("    end")
    lines += edges
    lines += [f"    classDef {status} {style}" for status, style in _CLASSES.items()]
    return "\n".join(lines) + "\n"
