"""OpenTelemetry traces, sent as OTLP over HTTP where an endpoint is set (optional extra `otel`).

Without an endpoint none of it is imported and a span costs a branch. W3C's `traceparent` travels in the
`Origin`, so spans of the API process, of workers and of a client's own tracer make one trace. Sampling is
OpenTelemetry's own: its SDK reads OTEL_TRACES_SAMPLER, and by default a caller's decision not to record is kept.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engines.origin import caused_by, current_origin

EXPORT_SECONDS = 3.0
"""For a collector to take what has gathered; a process that ends waits no longer for one that is away."""
Attributes = Mapping[str, str | int | float | bool]
_provider: Any = None
"""OpenTelemetry's TracerProvider; None while nothing is traced."""


class TracingUnavailableError(Exception):
    """An endpoint is set, and the packages that would send to it are not installed."""


class Span:
    """What is under way; of the one that stands for none, nothing is kept."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def rename(self, name: str) -> None:
        if self._span is not None:
            self._span.update_name(name)

    def describe(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    def fail(self, message: str) -> None:
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, message))


_NO_SPAN = Span()


def set_up_tracing(process: str, endpoint: str | None) -> None:
    """Trace from now on; without an endpoint, nothing happens.

    Args:
        process: what this process is: "api", "worker".
        endpoint: base address of an OTLP collector, such as http://localhost:4318.

    Raises:
        TracingUnavailableError
    """
    global _provider
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracingUnavailableError(
            "LATHE_OTLP_ENDPOINT needs OpenTelemetry: pip install 'lathe[otel]'"
        ) from None
    resource = Resource.create({"service.name": "lathe", "lathe.process": process})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    _provider.add_span_processor(BatchSpanProcessor(exporter))


def shut_down_tracing() -> None:
    """Send what has gathered, and trace no more."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def is_tracing() -> bool:
    return _provider is not None


@contextmanager
def span(
    name: str, attributes: Attributes | None = None, *, serves: bool = False
) -> Iterator[Span]:
    """The body is a span of the origin's trace, or begins one; what it causes becomes its child.

    Args:
        serves: somebody outside waits for it.
    """
    if _provider is None:
        yield _NO_SPAN
        return
    from opentelemetry.trace import SpanKind

    kind = SpanKind.SERVER if serves else SpanKind.INTERNAL
    made = _tracer().start_span(name, _parent(), kind, dict(attributes or {}))
    try:
        with caused_by(replace(current_origin(), traceparent=_traceparent(made))):
            yield Span(made)
    except BaseException as error:
        Span(made).fail(type(error).__name__)
        raise
    finally:
        made.end()


def record_span(name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
    """A span that is over. Times are of the monotonic clock."""
    if _provider is None:
        return
    zero = time.time_ns() - time.monotonic_ns()
    made = _tracer().start_span(
        name, _parent(), attributes=dict(attributes or {}), start_time=zero + round(start * 1e9)
    )
    made.end(zero + round(end * 1e9))


def _tracer() -> Any:
    return _provider.get_tracer("lathe")


def _parent() -> Any:
    """OpenTelemetry's context of the origin's traceparent; an empty one begins a trace."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    traceparent = current_origin().traceparent
    if traceparent is None:
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    known = SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
    return set_span_in_context(NonRecordingSpan(known), Context())


def _traceparent(made: Any) -> str:
    context = made.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
