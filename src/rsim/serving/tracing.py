"""OpenTelemetry spans of requests, decisions and steps, by its GenAI conventions; without ``rsim-rl[otel]`` there are none.

A request's ``traceparent`` is where its spans hang. It goes on to the upstream: each step's call names the step's own span.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rsim.errors import UserError

ON = find_spec("opentelemetry") is not None and find_spec("opentelemetry.sdk") is not None
_NAMES = (b"traceparent", b"tracestate")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
Headers = Sequence[tuple[bytes, bytes]]
Note = Callable[[dict[str, Any]], None]  # takes more attributes


def export() -> None:
    """Sends spans to the collector that OpenTelemetry's own variables name, if one does."""
    if not ON or not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    from opentelemetry import trace

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UserError("OpenTelemetry's exporter is not installed", "pip install 'rsim-rl[otel]'") from error
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "rsim")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def begin(name: str, headers: Mapping[str, str], attributes: dict[str, Any]) -> Note:
    """A request's span: current in this task and in those that it starts. What is returned ends it."""
    if not ON:
        return lambda more: None
    from opentelemetry import context, propagate, trace

    parent = propagate.extract({k: headers[k] for k in ("traceparent", "tracestate") if k in headers})
    own = trace.get_tracer("rsim").start_span(name, parent, trace.SpanKind.SERVER, attributes)
    context.attach(trace.set_span_in_context(own, parent))

    def end(more: dict[str, Any]) -> None:
        own.set_attributes(more)
        own.end()

    return end


@contextmanager
def span(name: str, attributes: dict[str, Any]) -> Iterator[Note]:
    """A span within the current one."""
    if not ON:
        yield lambda more: None
        return
    from opentelemetry import trace

    with trace.get_tracer("rsim").start_as_current_span(name, attributes=attributes) as own:
        yield own.set_attributes


def received(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Those of a request's headers that say which trace it is of."""
    return [(k, v) for k, v in headers if k.lower() in _NAMES]


def passed_on(headers: Headers) -> Headers:
    """``headers`` with the current span as their ``traceparent``; as they are, where there is none."""
    if not ON:
        return headers
    from opentelemetry import propagate

    current: dict[str, str] = {}
    propagate.inject(current)
    if not current:
        return headers
    return [*((k, v) for k, v in headers if k.lower() not in _NAMES), *((k.encode(), v.encode()) for k, v in current.items())]
