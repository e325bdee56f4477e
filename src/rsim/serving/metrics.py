"""What ``/metrics`` shows, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rsim.serving.play import Usage


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter("rsim_requests", "Requests", ["kind", "planned", "status"], registry=registry)
        self.seconds = Histogram("rsim_request_seconds", "Seconds per request", ["planned"], registry=registry)
        self.steps = Counter("rsim_steps", "Steps by strategy", ["strategy"], registry=registry)
        self.tokens = Counter("rsim_tokens", "Tokens of planned answers, as the upstream counts", ["kind"], registry=registry)
        self.active = Gauge("rsim_active_requests", "Planned requests in hand", registry=registry)
        self.refused = Counter("rsim_refused", "Requests refused with 429", registry=registry)
        self.planner_seconds = Gauge("rsim_planner_seconds", "Seconds spent in the planner so far", registry=registry)

    def done(self, kind: str, *, planned: bool, status: int, seconds: float) -> None:
        self.requests.labels(kind, str(planned).lower(), str(status)).inc()
        self.seconds.labels(str(planned).lower()).observe(seconds)

    def spent(self, usage: Usage) -> None:
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("completion").inc(usage.completion_tokens)
