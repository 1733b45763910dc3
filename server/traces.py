"""Traces: an OpenTelemetry span a request, sent to a collector. Needs the extra `otel`."""

from collections.abc import Iterable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPORT_S = 2  # retries included: a stopping server waits for no longer


class Traced:
    """Pure ASGI: a server span a request, a child of the caller's `traceparent` where it has one.

    Spans go in batches, off the event loop, to `endpoint` by OTLP over HTTP; a collector that is
    away costs spans, never requests.
    """

    def __init__(self, app: ASGIApp, endpoint: str, version: str) -> None:
        resource = Resource.create({"service.name": "trunkline", "service.version": version})
        self.app, self.provider = app, TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("trunkline", version)
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller = self._propagator.extract(_text(scope["headers"]))
        name = scope["method"]
        with self._tracer.start_as_current_span(name, caller, SpanKind.SERVER) as span:

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self.app(scope, receive, send_and_note)
            route = getattr(scope.get("route"), "path", "unmatched")
            span.update_name(f"{name} {route}")
            span.set_attributes(_attributes(scope, route))


def _text(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def _attributes(scope: Scope, route: str) -> dict[str, Any]:
    """By the conventions of HTTP, and what the handler told of the request."""
    state = scope.get("state", {})
    return {
        "http.request.method": scope["method"],
        "http.route": route,
        "trunkline.request_id": state.get("request_id", ""),
        **{f"trunkline.{name}": value for name, value in state.get("facts", dict)().items()},
    }
