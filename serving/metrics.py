"""What the endpoint does, in figures for Prometheus.

Names are vLLM's after the prefix `regraft_`, and the buckets follow its own, so that known panels need
another prefix only. Each process has figures of its own: where several answer behind one address, scrape each
of them (Prometheus adds them up) and not the address. They are not repeated on Ray's own metrics port.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, make_asgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from regraft.records import ModelVersion

LABELS = ("model", "version", "variant")
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
#: Ends that are no fault of the endpoint's; an error or a withdrawal is no success.
_SUCCESSES = ("stop", "length", "aborted")

Dropped = Literal["capture_dropped", "shadow_dropped"]
_DROPPED: dict[Dropped, str] = {
    "capture_dropped": "Exchanges that could not be captured.",
    "shadow_dropped": "Copies of requests that the shadow version had no time for.",
}


class _Series:
    """The figures of one version under one variant: looked up once, not for every token."""

    def __init__(self, metrics: Metrics, labels: tuple[str, ...]) -> None:
        self.first = metrics.first.labels(*labels)
        self.between = metrics.between.labels(*labels)
        self.whole = metrics.whole.labels(*labels)
        self.prompt = metrics.prompt.labels(*labels)
        self.generated = metrics.generated.labels(*labels)
        self.success = {reason: metrics.success.labels(*labels, reason) for reason in _SUCCESSES}


class _Read(Collector):
    """What is read when somebody scrapes.

    Counters that others keep; and what runs: a version may get another variant while it answers, so a gauge
    under the variant would go up here and down there.
    """

    def __init__(self, labels: Callable[[ModelVersion], tuple[str, str, str]]) -> None:
        self.sources: dict[Dropped, Callable[[], int]] = {}
        self.running: dict[tuple[str, int], tuple[ModelVersion, int]] = {}
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "regraft_num_requests_running", "Requests taken on and not ended.", labels=LABELS
        )
        for version, number in list(self.running.values()):
            running.add_metric(self._labels(version), number)
        yield running
        for name, help in _DROPPED.items():
            value = self.sources[name]() if name in self.sources else 0
            yield CounterMetricFamily(f"regraft_{name}", help, value=value)


class Metrics:
    """The figures of one application; as `serving.exchange.Observer` it is told of each exchange.

    Args:
        variant: In which role (champion, challenger, shadow, pinned) a version answers; without it that
            label is empty. What is counted goes to the role that the version has at that moment.
    """

    def __init__(self, variant: Callable[[ModelVersion], str] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._variant = variant
        self._series: dict[tuple[str, int, str], _Series] = {}
        self._read = _Read(self._labels)
        self.registry.register(self._read)
        self.first = self._histogram("time_to_first_token_seconds", "Until the first text.", _FIRST)
        self.between = self._histogram("inter_token_latency_seconds", "Between two texts.", _BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "Until the end.", _WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", "Until the engine began.", _WHOLE)
        self._load = self._histogram("adapter_load_seconds", "To load a version and warm it.", _WHOLE)
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generated = self._counter("generation_tokens", "Tokens of answers.")
        self.success = self._counter("request_success", "Ended requests.", (*LABELS, "finished_reason"))
        self._limited = self._counter("rate_limited", "Requests beyond a limit of their key.", ("limit",))

    def began(self, version: ModelVersion, prompt_tokens: int, /) -> None:
        """A request was taken on."""
        self._of(version).prompt.inc(prompt_tokens)
        key = (version.name, version.version)
        self._read.running[key] = (version, self._read.running.get(key, (version, 0))[1] + 1)

    def first_token(self, version: ModelVersion, seconds: float, /) -> None:
        """The first text is there."""
        self._of(version).first.observe(seconds)

    def token(self, version: ModelVersion, seconds_since_last: float, /) -> None:
        """More text is there."""
        self._of(version).between.observe(seconds_since_last)

    def ended(
        self,
        version: ModelVersion,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        seconds: float,
        /,
    ) -> None:
        """A request is over."""
        key = (version.name, version.version)
        self._read.running[key] = (version, self._read.running[key][1] - 1)
        series = self._of(version)
        series.generated.inc(completion_tokens)
        if reason in series.success:
            series.success[reason].inc()
            series.whole.observe(seconds)

    def queued(self, version: ModelVersion, seconds: float, /) -> None:
        """A request waited so long for an engine."""
        self._queue.labels(*self._labels(version)).observe(seconds)

    def loaded(self, version: ModelVersion, seconds: float) -> None:
        """A version was loaded and warmed in that time."""
        self._load.labels(*self._labels(version)).observe(seconds)

    def rate_limited(self, limit: str) -> None:
        """A request asked for more requests or tokens than its key may."""
        self._limited.labels(limit).inc()

    def watch_dropped(self, name: Dropped, read: Callable[[], int]) -> None:
        """Ask this, at every scrape, how many were dropped since the process began."""
        self._read.sources[name] = read

    def forget(self, version: ModelVersion) -> None:
        """Show an unloaded version no more; a process that lives long would list every one it ever had."""
        self._read.running.pop((version.name, version.version), None)
        for key in [key for key in self._series if key[:2] == (version.name, version.version)]:
            del self._series[key]
        labels = {"model": version.name, "version": str(version.version)}
        for metric in (
            *(self.first, self.between, self.whole, self._queue, self._load),
            *(self.prompt, self.generated, self.success),
        ):
            metric.remove_by_labels(labels)

    def render(self) -> tuple[bytes, str]:
        """The figures as text, and the type of that text."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def app(self) -> ASGIApp:
        """An application that answers every request with the figures; mount it at `/metrics`."""
        app: ASGIApp = make_asgi_app(self.registry)
        return app

    def _of(self, version: ModelVersion) -> _Series:
        variant = self._variant(version) if self._variant is not None else ""
        key = (version.name, version.version, variant)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(self, self._labels(version))
        return series

    def _labels(self, version: ModelVersion) -> tuple[str, str, str]:
        variant = self._variant(version) if self._variant is not None else ""
        return version.name, str(version.version), variant

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"regraft_{name}", help, LABELS, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = LABELS) -> Counter:
        return Counter(f"regraft_{name}", help, labels, registry=self.registry)
