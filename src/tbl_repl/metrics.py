"""Prometheus metrics of the worker, read from target_status whenever they are asked for."""

from __future__ import annotations

import datetime as dt
import logging
import socket
from collections.abc import Iterator

import psycopg
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tbl_repl.database import connect, name_of
from tbl_repl.drainer import Batch
from tbl_repl.errors import TblReplError
from tbl_repl.report import lag

log = logging.getLogger("tbl_repl.metrics")

_LABELS = ["database", "server", "target", "table"]
STATES = ("ok", "copying", "queueing", "paused", "failed")


class TargetCollector(Collector):
    """Asks each database for its targets when Prometheus asks us."""

    def __init__(self, dsns: list[str]) -> None:
        self.dsns = dsns

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        up = GaugeMetricFamily(
            "tbl_repl_source_up", "Whether the source database answers.", labels=["database"]
        )
        pending = GaugeMetricFamily("tbl_repl_pending_rows", "Changed rows that wait.", labels=_LABELS)
        age = GaugeMetricFamily(
            "tbl_repl_oldest_pending_seconds", "Age of the oldest pending row.", labels=_LABELS
        )
        shipped = CounterMetricFamily("tbl_repl_shipped_rows", "Rows shipped.", labels=_LABELS)
        held = GaugeMetricFamily("tbl_repl_quarantined_rows", "Rows that the target rejects.", labels=_LABELS)
        status = GaugeMetricFamily(
            "tbl_repl_target_status", "1 for the present status.", labels=[*_LABELS, "status"]
        )
        for dsn in self.dsns:
            database = name_of(dsn)
            try:
                with connect(dsn, "metrics", seconds=3) as connection:
                    rows = connection.execute(
                        "SELECT s.*, (SELECT count(*) FROM tbl_repl.quarantine AS q "
                        "WHERE q.target_id = s.target_id) AS held "
                        "FROM tbl_repl.target_status AS s ORDER BY s.target_id"
                    ).fetchall()
            except (psycopg.Error, TblReplError) as error:
                log.warning("metrics database=%s error=%s", database, str(error).strip().replace("\n", " "))
                up.add_metric([database], 0)
                continue
            up.add_metric([database], 1)
            now = dt.datetime.now(dt.UTC)
            for row in rows:
                labels = [database, str(row["server"]), str(row["target_id"]), str(row["source_table"])]
                pending.add_metric(labels, float(row["pending_rows"]))
                age.add_metric(labels, lag(row, now) or 0.0)
                shipped.add_metric(labels, float(row["rows_shipped"]))
                held.add_metric(labels, float(row["held"]))
                for state in STATES:
                    status.add_metric([*labels, state], float(row["status"] == state))
        yield from (up, pending, age, shipped, held, status)


def _every_address() -> str:
    """What stands for all of them: that of IPv6 where it takes IPv4 as well."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            only = probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    except OSError:
        only = 1
    return "0.0.0.0" if only else "::"


class Metrics:
    """Counters that only the worker knows, and the collector above, served by HTTP."""

    def __init__(self, dsns: list[str]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(TargetCollector(dsns))
        self.batches = Counter(
            "tbl_repl_batches", "Batches shipped.", ["database", "server"], registry=self.registry
        )
        self.errors = Counter(
            "tbl_repl_errors",
            "Batches that failed, by SQLSTATE.",
            ["database", "server", "sqlstate"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "tbl_repl_batch_seconds",
            "Duration of a batch.",
            ["database", "server"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )

    def on_batch(self, batch: Batch) -> None:
        if batch.sqlstate is not None:
            self.errors.labels(batch.database, batch.server, batch.sqlstate).inc()
        if batch.rows:
            self.batches.labels(batch.database, batch.server).inc()
            self.seconds.labels(batch.database, batch.server).observe(batch.seconds)

    def serve(self, port: int) -> None:
        """Serve /metrics from a thread of its own, on all addresses."""
        start_http_server(port, addr=_every_address(), registry=self.registry)
