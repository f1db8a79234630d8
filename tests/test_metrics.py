"""Prometheus metrics of the worker, and the dashboard that reads them."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from support import Node, Pair, Proxy, wait_until
from support.programs import WorkerProcess, dsn_of
from tbl_repl.database import name_of

DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana" / "tbl_repl.json"
TABLE = "CREATE TABLE t (id integer PRIMARY KEY, v text)"


class Served:
    """What a worker's port says."""

    def __init__(self, port: int) -> None:
        self.port = port

    def families(self, host: str = "127.0.0.1") -> dict[str, Metric]:
        with urllib.request.urlopen(f"http://{host}:{self.port}/metrics", timeout=20) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            text = answer.read().decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, sample: str, **labels: str) -> float | None:
        """The one sample of that name with these labels; None without."""
        found = [
            s.value
            for family in self.families().values()
            for s in family.samples
            if s.name == sample and labels.items() <= s.labels.items()
        ]
        assert len(found) <= 1, found
        return found[0] if found else None


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serving(port: int, *nodes: Node, **more: Any) -> WorkerProcess:
    return WorkerProcess(*nodes, options=("--metrics-port", str(port)), **more)


def test_metrics_count_what_is_shipped_and_what_waits(pair: Pair, port: int) -> None:
    pair.both(TABLE)
    target = pair.add_target("t", mode="async")
    database = name_of(dsn_of(pair.source))
    label = {"database": database, "server": pair.server, "target": str(target), "table": "t"}
    lane = {"database": database, "server": pair.server}
    with serving(port, pair.source):
        served = Served(port)
        pair.source.sql("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 7) AS i")
        wait_until(lambda: served.value("tbl_repl_shipped_rows_total", **label) == 7)
        wait_until(lambda: served.value("tbl_repl_batches_total", **lane))
        assert served.value("tbl_repl_source_up", database=database) == 1
        assert served.value("tbl_repl_pending_rows", **label) == 0
        assert served.value("tbl_repl_oldest_pending_seconds", **label) == 0
        assert served.value("tbl_repl_target_status", **label, status="ok") == 1
        batches = served.value("tbl_repl_batches_total", **lane)
        assert served.value("tbl_repl_batch_seconds_count", **lane) == batches
        assert served.value("tbl_repl_batch_seconds_bucket", **lane, le="+Inf") == batches
        pair.call("pause_target", target_id=target)
        pair.source.sql("INSERT INTO t VALUES (8, 'waits'), (9, 'waits')")
        assert served.value("tbl_repl_pending_rows", **label) == 2
        assert (served.value("tbl_repl_oldest_pending_seconds", **label) or 0) > 0
        states = {
            state: served.value("tbl_repl_target_status", **label, status=state)
            for state in ("ok", "copying", "queueing", "paused", "failed")
        }
        assert states == {"ok": 0, "copying": 0, "queueing": 0, "paused": 1, "failed": 0}


@pytest.mark.once
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_metrics_are_served_on_all_addresses(node: Node, port: int) -> None:
    with serving(port, node):
        hosts = ("127.0.0.1", "[::1]")
        assert all("tbl_repl_source_up" in Served(port).families(host) for host in hosts)


def test_metrics_count_errors_by_sqlstate_and_rows_in_quarantine(pair: Pair, port: int, proxy: Proxy) -> None:
    pair.both(TABLE)
    target = pair.add_target("t", mode="async")
    pair.target.sql("ALTER TABLE t ADD CHECK (v <> 'bad')")
    with serving(port, pair.source):
        served = Served(port)
        pair.source.sql("INSERT INTO t VALUES (1, 'bad'), (2, 'good')")
        wait_until(lambda: served.value("tbl_repl_quarantined_rows", target=str(target)) == 1)
        assert served.value("tbl_repl_errors_total", server=pair.server) is None
        proxy.set("refuse")
        proxy.cut()
        pair.source.sql("INSERT INTO t VALUES (3, 'x')")

        def errors() -> list[str]:
            family = served.families().get("tbl_repl_errors")
            return (
                [s.labels["sqlstate"] for s in family.samples if s.name.endswith("_total")] if family else []
            )

        wait_until(errors)
        assert all(state.startswith("08") for state in errors())


def test_metrics_of_the_others_are_served_while_a_source_is_down(pair: Pair, port: int) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="async")
    dead = "host=127.0.0.1 port=1 dbname=nowhere"
    with serving(port, pair.source, dsns=(dead,)):
        served = Served(port)
        assert served.value("tbl_repl_source_up", database=name_of(dead)) == 0
        assert served.value("tbl_repl_source_up", database=name_of(dsn_of(pair.source))) == 1
        assert served.value("tbl_repl_pending_rows", table="t") == 0


def test_every_metric_has_a_help_text_and_no_password(pair: Pair, port: int) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="async")
    dsn = pair.source.cluster.dsn(pair.source.dbname, "owner", tcp=True, password="secret")
    with WorkerProcess(options=("--metrics-port", str(port)), dsns=(dsn,)) as worker:
        wait_until(lambda: worker.events("serving"))
        families = Served(port).families()
        assert all(family.documentation for family in families.values())
        assert all(name.startswith("tbl_repl_") for name in families)
        labels = [
            value for family in families.values() for s in family.samples for value in s.labels.values()
        ]
        assert labels and not any("secret" in value for value in labels)


# --- the dashboard


def expressions(node: Any) -> list[str]:
    """Every PromQL expression of a dashboard: of panels and of variables."""
    if isinstance(node, dict):
        own = [node["expr"]] if "expr" in node else []
        if isinstance(node.get("query"), str) and node.get("type") == "query":
            own.append(node["query"])
        return own + [found for value in node.values() for found in expressions(value)]
    if isinstance(node, list):
        return [found for value in node for found in expressions(value)]
    return []


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(pair: Pair, port: int, proxy: Proxy) -> None:
    pair.both(TABLE)
    pair.add_target("t", mode="async")
    asked = expressions(json.loads(DASHBOARD.read_text()))
    assert len(asked) > 8
    with serving(port, pair.source):
        served = Served(port)
        pair.source.sql("INSERT INTO t VALUES (1, 'x')")
        wait_until(lambda: served.value("tbl_repl_batches_total", server=pair.server))
        proxy.set("refuse")
        proxy.cut()
        pair.source.sql("INSERT INTO t VALUES (2, 'x')")
        wait_until(
            lambda: "tbl_repl_errors" in served.families() and served.families()["tbl_repl_errors"].samples
        )
        samples = [s for family in served.families().values() for s in family.samples]
    known = {
        name: {key for s in samples if s.name == name for key in s.labels}
        for name in {s.name for s in samples}
    }
    used = {name for text in asked for name in re.findall(r"\btbl_repl_\w+", text)}
    assert used <= set(known), used - set(known)
    shown = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in used}
    offered = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in known}
    assert offered == shown, "every metric is on the dashboard"
    for text in asked:
        for name, inside in re.findall(r"\b(tbl_repl_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)) <= known[name], text
        for grouping in re.findall(r"\bby \(([^)]*)\)", text):
            names = re.findall(r"\btbl_repl_\w+", text)
            assert set(grouping.replace(" ", "").split(",")) <= known[names[0]], text


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"] == "tbl_repl"
    assert dashboard["id"] is None and dashboard["uid"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    places = set()
    for panel in panels:
        assert panel["title"] and panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["refId"] and target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
    for text in expressions(dashboard):
        assert set(re.findall(r"\$(?!__)\{?(\w+)", text)) <= variables, text
