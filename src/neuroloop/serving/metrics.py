"""What a server tells Prometheus, in a registry of its own, so that two apps in one process do not mix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from neuroloop.core.schemas import LABELS, Verdict

_SCORES = tuple(round(0.05 * step, 2) for step in range(1, 21))
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = self._counter("requests", "Answered requests", "method", "route", "status")
        self.request_seconds = self._histogram("request_seconds", "From first byte to last", "route")
        self.predictions = self._counter("predictions", "Recorded predictions; rejected: by the gate", "label")
        self.referrals = self._counter("referrals", "Recorded predictions that a reader should look at", "label")
        self.prediction_seconds = self._histogram("prediction_seconds", "From decoded request to stored object")
        self.feedback = self._counter("feedback", "Recorded verdicts", "verdict")
        # A series that is not there yet is no 0 to Prometheus, and a share of it no share.
        for label in (*LABELS, "rejected"):
            self.predictions.labels(label)
        for label in LABELS:
            self.referrals.labels(label)
        for verdict in Verdict:
            self.feedback.labels(verdict.value)
        self.reloads = self._counter("model_reloads", "Models that were loaded and served")
        self.reload_failures = self._counter("model_reload_failures", "Attempts at a model that would not load")
        self.registry_unreachable = self._counter("registry_unreachable", "Polls that the registry did not answer")
        self.gate_score = Histogram(
            "neuroloop_gate_score", "How surely an upload is a brain MRI", registry=self._registry, buckets=_SCORES
        )
        self._model = self.gauge("model_info", "The model being served", "version", "data_version", "simulated")

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """A new gauge of this server."""
        return Gauge(f"neuroloop_{name}", text, labels, registry=self._registry)

    def serving(self, version: str, data_version: str, simulated: bool) -> None:
        """Note that this model has taken over."""
        self.reloads.inc()
        self._model.clear()
        self._model.labels(version, data_version, str(simulated).lower()).set(1)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"neuroloop_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"neuroloop_{name}", text, labels, registry=self._registry, buckets=_SECONDS)
