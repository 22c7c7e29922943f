"""What the monitor saw last, in figures for Prometheus: over HTTP, or as a file of its textfile collector."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from regraft.errors import ConfigError, ServiceError
from regraft.records import DriftReport, RetrainDecision

LABELS = ("model", "version")
_STATUSES: tuple[str, ...] = get_args(DriftReport.model_fields["status"].annotation)


class _Latest(Collector):
    """The last report of each model. A version that is watched no more is shown no more: nor is its alarm."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self.reports: dict[str, tuple[DriftReport, float]] = {}

    def collect(self) -> Iterator[Metric]:
        """Everything of the last reports, at the moment somebody asks."""
        with self._lock:
            reports = list(self.reports.values())
        signal, status = (*LABELS, "signal"), (*LABELS, "status")
        p_value = _gauge("drift_p_value", "p-value of the last check's drift test.")
        effect = _gauge("drift_effect", "Share of the window that the reference does not account for.")
        rows = _gauge("drift_window_rows", "Exchanges that the last check compared.")
        last = _gauge("drift_last_check_timestamp_seconds", "When the last check ended.")
        evidence = _gauge("drift_evidence", "Evidence that the checks add up to.", signal)
        alarm = _gauge("drift_alarm", "Whether it alarms.", signal)
        verdict = _gauge("drift_last_verdict", "1 for what the last check said.", status)
        quality = _gauge("quality", "Quality over the last window.", signal)
        before = _gauge("quality_reference", "Quality of the reference.", signal)
        for report, at in reports:
            own = [report.model, str(report.model_version)]
            rows.add_metric(own, report.rows)
            last.add_metric(own, at)
            if report.p_value is not None:
                p_value.add_metric(own, report.p_value)
            if report.effect is not None:
                effect.add_metric(own, report.effect)
            for name, found in sorted(report.evidence.items()):
                evidence.add_metric([*own, name], found.value)
            for name in sorted({*report.evidence, *report.alarms}):
                alarm.add_metric([*own, name], name in report.alarms)
            for name in _STATUSES:
                verdict.add_metric([*own, name], name == report.status)
            for each in report.quality:
                if each.value is not None:
                    quality.add_metric([*own, each.name], each.value)
                if each.reference is not None:
                    before.add_metric([*own, each.name], each.reference)
        yield from (p_value, effect, rows, last, evidence, alarm, verdict, quality, before)


class _Totals(Collector):
    """What this process counted since it began."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self.checks: Counter[tuple[str, ...]] = Counter()
        self.decisions: Counter[tuple[str, ...]] = Counter()
        self.failures: Counter[tuple[str, ...]] = Counter()

    def collect(self) -> Iterator[Metric]:
        """All counters, at the moment somebody asks."""
        for name, help, label, counted in (
            ("monitor_checks", "Checks, by what they said.", ("status",), self.checks),
            ("monitor_decisions", "Decisions, by what is done.", ("action",), self.decisions),
            ("monitor_failures", "Checks that came to no report.", (), self.failures),
        ):
            family = CounterMetricFamily(f"regraft_{name}", help, labels=(*LABELS, *label))
            with self._lock:
                found = sorted(counted.items())
            for labels, count in found:
                family.add_metric(labels, count)
            yield family


class Gauges:
    """The monitor's figures, in a registry of their own.

    The counters (`regraft_monitor_..._total`) are of this process and only served over HTTP. They are left
    out of the file: a scheduled process that writes it lives for one check, and its counters would always
    start from zero. There `regraft_drift_last_check_timestamp_seconds` tells whether checks still run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest, self._totals = _Latest(self._lock), _Totals(self._lock)
        self.registry, self._lasting = CollectorRegistry(), CollectorRegistry()
        self.registry.register(self._latest)
        self.registry.register(self._totals)
        self._lasting.register(self._latest)

    def update(
        self, report: DriftReport, decision: RetrainDecision | None = None, *, at: float | None = None
    ) -> None:
        """Show a check in place of the model's check before, and count it.

        Args:
            report: What was seen.
            decision: What was decided, if anything was.
            at: When the check ended, in seconds since 1970; now if not given.
        """
        own = (report.model, str(report.model_version))
        with self._lock:
            self._latest.reports[report.model] = (report, time.time() if at is None else at)
            self._totals.checks[(*own, report.status)] += 1
            self._totals.failures.setdefault(own, 0)  # a series that begins at 1 shows no increase
            if decision is not None:
                self._totals.decisions[(*own, decision.action)] += 1

    def failed(self, model: str, version: int | None = None) -> None:
        """Count a check that came to no report; the version is "" where it is not known."""
        with self._lock:
            self._totals.failures[(model, "" if version is None else str(version))] += 1

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Answer scrapes from a thread until the process ends.

        Args:
            host: Where to listen.
            port: 0 for any that is free.

        Returns:
            The port.

        Raises:
            ServiceError: If the address cannot be listened on.
        """
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except (OSError, OverflowError) as error:
            raise ServiceError(
                f"monitor.metrics_port: cannot listen on {host}:{port}: {error}", "give a port that is free"
            ) from error
        return int(server.server_port)

    def write(self, path: Path) -> None:
        """Write the gauges for Prometheus' textfile collector: a reader sees the old file or the new one.

        Args:
            path: Ends in `.prom`; folders are made.

        Raises:
            ConfigError: If it has another ending, which the collector passes over.
        """
        if path.suffix != ".prom":
            raise ConfigError(
                f"monitor.metrics_file: {path.name} does not end in .prom",
                "the textfile collector reads *.prom only: name it so",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(path), self._lasting)


def _gauge(name: str, help: str, labels: tuple[str, ...] = LABELS) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"regraft_{name}", help, labels=labels)
