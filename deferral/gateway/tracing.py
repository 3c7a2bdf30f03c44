"""OpenTelemetry spans: a request, the decision on it, each attempt at an expert, the record.  Never a text of anybody.

Imported only where traces are switched on.  What becomes of spans is said by the standard variables OTEL_*: where they go
(OTEL_EXPORTER_OTLP_ENDPOINT), of which requests there are any (OTEL_TRACES_SAMPLER), the service's name (OTEL_SERVICE_NAME).
Attributes follow the semantic conventions of HTTP and GenAI; those of the router begin with "deferral.".
"""

import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from yarl import URL

from deferral.errors import installing
from deferral.gateway.experts_file import Expert
from deferral.gateway.rows import DecisionRow, plain

try:
    from opentelemetry import context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
    from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    raise ValueError(f"traces: {error}; they need {installing('traces')}") from None

if TYPE_CHECKING:
    from deferral.gateway.choice import Choice
    from deferral.gateway.upstream import Reply

__all__ = ["Attempt", "Exchanged", "Tracing", "provider"]

_log = logging.getLogger("deferral.gateway")

_ENDING = 5.0
_OPERATIONS = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings", "responses": "chat"}
_CONTEXT = (b"traceparent", b"tracestate")
_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]{1,200})"')
_HEAD = 4096
_MOST = 100
_propagator = TraceContextTextMapPropagator()


def provider() -> TracerProvider:
    """As the variables OTEL_* say; ValueError where they name an exporter that is not there."""
    own = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    made = TracerProvider(resource=Resource.create({} if own else {"service.name": "deferral-gateway"}))
    if (exporter := _exporter(os.environ.get("OTEL_TRACES_EXPORTER", "otlp"))) is not None:
        made.add_span_processor(BatchSpanProcessor(exporter))
    return made


def _exporter(name: str) -> SpanExporter | None:
    if name == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if name not in ("console", "none"):
        raise ValueError(f"OTEL_TRACES_EXPORTER: expected otlp (over HTTP), console or none, got {name[:100]!r}")
    return ConsoleSpanExporter() if name == "console" else None


class Tracing:
    """Makes spans for one gateway."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("deferral.gateway")

    def request(self, kind: str, path: str, headers: Mapping[bytes, bytes]) -> "Exchanged":
        """The span of a request, which goes on with the trace of its client; what follows in this task is within it."""
        carrier = {name.decode(): headers[name].decode("latin-1") for name in _CONTEXT if name in headers}
        attributes = {"http.request.method": "POST", "url.path": f"/v1{path}", "gen_ai.operation.name": _OPERATIONS[kind]}
        span = self._tracer.start_span(
            f"POST /v1{path}", _propagator.extract(carrier), kind=SpanKind.SERVER, attributes=attributes
        )
        return Exchanged(span, self)

    @contextmanager
    def step(self, name: str) -> Iterator[Span]:
        """A part of the request that is under way."""
        span = self._tracer.start_span(name)
        try:
            yield span
        except Exception as error:
            _failed(span, getattr(error, "code", type(error).__name__))
            raise
        finally:
            span.end()

    def attempt(self, expert: Expert, path: str, number: int) -> "Attempt":
        """One attempt at an expert, from the request to the last byte of its reply."""
        # The first part of a path is the kind.
        operation = _OPERATIONS[path.split("/")[1]]
        url = URL(expert.base_url)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation, "gen_ai.request.model": expert.model, "server.address": url.host or "",
            "server.port": url.port or 0, "deferral.expert": expert.name, "deferral.attempt": number,
        }  # fmt: skip
        return Attempt(
            self._tracer.start_span(f"{operation} {expert.model}", kind=SpanKind.CLIENT, attributes=attributes), expert
        )

    def close(self) -> None:
        """What is waiting is sent, if its collector takes it soon: the exporter by itself tries for half a minute."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(_ENDING)
        if ending.is_alive():
            _log.warning("the last spans are given up: their collector does not answer")


class Exchanged:
    """The span of a request."""

    def __init__(self, span: Span, tracing: Tracing) -> None:
        self._span, self._tracing = span, tracing
        self._token = context.attach(set_span_in_context(span))

    @contextmanager
    def deciding(self) -> Iterator[Callable[["Choice"], None]]:
        """The decision; what is yielded is to be told of it."""
        with self._tracing.step("decide") as span:

            def decided(choice: "Choice") -> None:
                span.set_attributes(_known({
                    "deferral.expert": choice.ranking[0], "deferral.propensity": choice.propensity,
                    "deferral.price_of_error": choice.price_of_error, "deferral.fast_path": choice.fast_path,
                    "deferral.cost": choice.cost.get(choice.ranking[0], math.nan),
                    "deferral.expected_price": choice.price.get(choice.ranking[0], math.nan),
                }))  # fmt: skip

            yield decided

    def record(self, row: DecisionRow, add: Callable[[DecisionRow], None]) -> None:
        """Put the row on record, and what it says of the request on its span."""
        with self._tracing.step("record"):
            add(row)
        self._span.set_attributes(_known({
            "gen_ai.request.model": plain(row.requested)[:_MOST], "gen_ai.response.id": plain(row.reply_id)[:_MOST],
            "gen_ai.usage.input_tokens": row.input_tokens, "gen_ai.usage.output_tokens": row.output_tokens,
            "deferral.id": row.id, "deferral.expert": row.expert, "deferral.chosen": row.chosen,
            "deferral.propensity": row.propensity, "deferral.price": row.price, "deferral.estimated": row.estimated,
            "deferral.cost": row.expected_cost.get(row.expert, math.nan), "deferral.outcome": row.outcome,
            "deferral.attempts": row.attempts,
            **({"deferral.first": row.cascade.first, "deferral.cascade": row.cascade.ending} if row.cascade else {}),
        }))  # fmt: skip

    def answered(self, attempt: "Attempt | None") -> None:
        """Who wrote the reply."""
        if attempt is not None:
            self._span.set_attribute("gen_ai.response.model", attempt.model)

    def end(self, status: int) -> None:
        """The status is the client's."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _failed(self._span, str(status))
        self._span.end()
        context.detach(self._token)


class Attempt:
    """The span of one attempt."""

    def __init__(self, span: Span, expert: Expert) -> None:
        self._span, self.model = span, expert.model

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """With this span as the parent of what the upstream does."""
        sent = {name: value for name, value in headers.items() if name not in ("traceparent", "tracestate")}
        _propagator.inject(sent, set_span_in_context(self._span))
        return sent

    def began(self, reply: "Reply") -> None:
        """The reply has begun: its status, and the model that it names."""
        found = _MODEL.search(reply.body[:_HEAD])
        self.model = found.group(1).decode("utf-8", "replace") if found else self.model
        self._span.set_attributes({"http.response.status_code": reply.status, "gen_ai.response.model": self.model})

    def failed(self, error: BaseException) -> None:
        """There is no reply."""
        _failed(self._span, getattr(error, "code", type(error).__name__))
        self._span.end()

    def end(self, good: bool | None) -> None:
        """The reply is over; it was not good, or nothing can be said (None)."""
        if good is False:
            _failed(self._span, "upstream_bad_reply")
        self._span.end()


def _failed(span: Span, kind: str) -> None:
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", kind)


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value != "" and value == value}
