"""OpenTelemetry: a span for each request and each batch, if an endpoint is configured.

Without one this module is not imported and costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fraud.pipeline.requests import DecideRequests, ScoreRequest
from fraud.pipeline.rows import Outcome

MAX_OPEN = 10_000
_SPAN = "fraud.span"
_batch: ContextVar[Any] = ContextVar("batch", default=None)


class Tracing:
    """The spans of one worker.

    Parameters
    ----------
    endpoint : str
        Of an OTLP collector over HTTP, such as ``http://collector:4318``.
    sample_rate : float
        Share of the traces begun here that are sent, 0 to 1; a caller's sampling decision is kept.
    processor : SpanProcessor, optional
        Receives the spans instead of the collector.
    """

    def __init__(self, endpoint: str, sample_rate: float = 1.0, processor: SpanProcessor | None = None) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: "fraud-bento"}),
            sampler=ParentBased(TraceIdRatioBased(sample_rate)),
        )
        exporter = processor or BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"))
        self._provider.add_span_processor(exporter)
        self._tracer = self._provider.get_tracer("fraud.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._open: dict[str, Any] = {}

    def begin(self, call: Any) -> None:
        """Open a request's span, a child of the caller's; a request check of the front door."""
        carrier = {"traceparent": call.headers.get(b"traceparent", b"").decode("latin-1")}
        path = call.route.path  # what the caller wrote may name a customer
        span = self._tracer.start_span(
            f"{call.scope['method']} {path}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": call.scope["method"], "http.route": path},
        )
        span.set_attribute("fraud.request_id", call.request_id)
        call.scope[_SPAN] = span
        self._open[call.request_id] = span.get_span_context()
        if len(self._open) > MAX_OPEN:  # callers who left before their answer
            del self._open[next(iter(self._open))]

    def end(self, call: Any, answer: Any, _seconds: float) -> None:
        """Close a request's span; an observer of the front door."""
        self._open.pop(call.request_id, None)
        span = call.scope.pop(_SPAN, None)
        if span is None:
            return
        span.set_attribute("http.response.status_code", answer.status)
        if answer.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()

    def traced(self, run: DecideRequests) -> DecideRequests:
        """Wrap the batch function: one span a batch, linked to its requests."""

        async def run_traced(requests: Sequence[ScoreRequest]) -> list[list[Outcome]]:
            links = [Link(self._open[r.request_id]) for r in requests if r.request_id in self._open]
            rows = sum(request.n_rows for request in requests)
            with self._tracer.start_as_current_span("batch", links=links, attributes={"fraud.rows": rows}) as span:
                _batch.set(trace.set_span_in_context(span))
                try:
                    return await run(requests)
                finally:
                    _batch.set(None)

        return run_traced

    def stage(self, name: str, seconds: float) -> None:
        """Add a span for a stage that ends now to the current batch."""
        context = _batch.get()
        if context is not None:
            now_ns = time.time_ns()
            span = self._tracer.start_span(name, context=context, start_time=now_ns - int(seconds * 1e9))
            span.end(now_ns)

    def close(self) -> None:
        """Send the queued spans, within the exporter's own limit."""
        self._provider.shutdown()
