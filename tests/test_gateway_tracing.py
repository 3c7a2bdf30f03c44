"""Spans of requests, through a real gateway and a real upstream; and that nothing of it is there where it is off."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from deferral.gateway import tracing as module
from deferral.gateway.experts_file import Expert
from deferral.gateway.rows import CascadeRow
from deferral.gateway.settings import Settings
from deferral.gateway.tracing import Tracing, provider
from tests.faulty_upstream import Upstream
from tests.gateway_rows import row
from tests.running_gateway import EASY, HARD, RunningGateway, small_router
from tests.test_gateway_shadow import until

pytestmark = pytest.mark.ci_slow
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def served(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningGateway, InMemorySpanExporter]]:
    kept, made = InMemorySpanExporter(), TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(kept))
    experts = {name: Expert(name=name, base_url=upstream.url) for name in ("small", "large")}
    running = RunningGateway(small_router(), experts, Settings(database=str(tmp_path_factory.mktemp("t") / "g.db")))
    running.state.traces = Tracing(made)
    with running:
        yield running, kept


def spans_of(kept: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """Those that have ended, once the request has, by name."""
    until(lambda: any(span.kind == SpanKind.SERVER for span in kept.get_finished_spans()))
    found: dict[str, list[ReadableSpan]] = {}
    for span in kept.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    kept.clear()
    return found


def test_a_request_is_one_trace_that_its_client_began_and_its_upstream_goes_on_with(served, upstream: Upstream) -> None:
    gateway, kept = served
    secret = f"{EASY} 4417 and 4418"
    body = {"model": "auto", "messages": [{"role": "user", "content": secret}]}
    status, said, _ = gateway.ask("POST", "/v1/chat/completions", body, traceparent=PARENT, tracestate="vendor=1")
    assert (status, said["x-deferral-expert"]) == (200, "small")
    spans = spans_of(kept)
    assert {name: len(found) for name, found in spans.items()} == {
        "POST /v1/chat/completions": 1, "decide": 1, "chat small": 1, "record": 1,
    }  # fmt: skip
    request, attempt = spans["POST /v1/chat/completions"][0], spans["chat small"][0]
    assert (request.kind, attempt.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert format(request.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(request.parent.span_id, "016x") == PARENT.split("-")[2]
    for name in ("decide", "chat small", "record"):
        assert spans[name][0].parent.span_id == request.context.span_id
        assert spans[name][0].context.trace_id == request.context.trace_id
    passed = {name.lower(): value for name, value in upstream.asked("small")[-1].headers.items()}
    assert passed["traceparent"] == f"00-{PARENT.split('-')[1]}-{attempt.context.span_id:016x}-01"
    assert passed["tracestate"] == "vendor=1"
    told = request.attributes
    assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("chat", "auto")
    assert (told["gen_ai.response.model"], attempt.attributes["gen_ai.request.model"]) == ("small", "small")
    assert told["gen_ai.usage.input_tokens"] > 0
    assert told["gen_ai.usage.output_tokens"] > 0
    assert (told["deferral.expert"], told["deferral.propensity"], told["deferral.outcome"]) == ("small", 1.0, "ok")
    assert told["deferral.id"] == said["x-deferral-id"]
    assert told["deferral.cost"] == pytest.approx(float(said["x-deferral-expected-cost"]), rel=1e-4)
    assert told["http.response.status_code"] == 200
    everything = repr([(span.name, dict(span.attributes), span.events) for found in spans.values() for span in found])
    assert "4417" not in everything


def test_each_retry_and_fall_back_has_its_own_span_and_says_what_was_wrong(served, upstream: Upstream) -> None:
    gateway, kept = served
    upstream.behave("large", "status-500")
    try:
        status, said, _ = gateway.chat(f"{HARD} number 5 in full")
    finally:
        upstream.behave("large", "good")
    assert (status, said["x-deferral-expert"]) == (200, "small")
    spans = spans_of(kept)
    assert [span.attributes["error.type"] for span in spans["chat large"]] == ["upstream_error"] * len(spans["chat large"])
    assert all(span.status.status_code == StatusCode.ERROR for span in spans["chat large"])
    numbers = [span.attributes["deferral.attempt"] for span in (*spans["chat large"], *spans["chat small"])]
    assert numbers == list(range(1, int(said["x-deferral-attempts"]) + 1))
    assert len(numbers) >= 2
    assert "error.type" not in spans["chat small"][0].attributes
    assert spans["POST /v1/chat/completions"][0].attributes["deferral.chosen"] == "large"


def test_a_stream_ends_its_span_with_its_last_byte_and_a_refusal_has_one_too(served) -> None:
    gateway, kept = served
    status, _, body = gateway.chat(EASY, stream=True)
    assert status == 200
    assert b"[DONE]" in body
    spans = spans_of(kept)
    [attempt], [request] = spans["chat small"], spans["POST /v1/chat/completions"]
    assert request.start_time < attempt.start_time < attempt.end_time <= request.end_time
    assert request.attributes["gen_ai.response.model"] == "small"
    assert gateway.chat(EASY, model="nobody")[0] == 404
    spans = spans_of(kept)
    assert spans["decide"][0].attributes["error.type"] == "model_not_found"
    assert spans["POST /v1/chat/completions"][0].attributes["http.response.status_code"] == 404


def test_who_answered_first_is_told() -> None:
    kept, made = InMemorySpanExporter(), TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(kept))
    for cascade in (CascadeRow("small", "deferred"), None):
        exchanged = Tracing(made).request("chat", "/chat/completions", {})
        exchanged.record(row(attempts=2, cascade=cascade), lambda kept: None)
        exchanged.end(200)
    told, alone = (span.attributes for span in kept.get_finished_spans() if span.kind == SpanKind.SERVER)
    assert (told["deferral.first"], told["deferral.cascade"], told["deferral.attempts"]) == ("small", "deferred", 2)
    assert not {"deferral.first", "deferral.cascade"} & alone.keys()
    made.shutdown()


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(module, "_ENDING", 0.05)
    answers = threading.Event()
    Tracing(SimpleNamespace(get_tracer=lambda name: None, shutdown=lambda: answers.wait(10))).close()  # type: ignore[arg-type]
    assert "the last spans are given up" in caplog.text
    answers.set()


def test_the_standard_variables_say_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my gateway")
    made = provider()
    assert made.resource.attributes["service.name"] == "my gateway"
    made.shutdown()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    with pytest.raises(ValueError, match="expected otlp"):
        provider()
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.delenv("OTEL_SERVICE_NAME")
    made = provider()
    assert made.resource.attributes["service.name"] == "deferral-gateway"
    made.shutdown()


def test_switched_off_nothing_of_it_is_imported_and_missing_it_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
from deferral.gateway.app import gateway
from deferral.gateway.settings import Settings
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
sys.modules["opentelemetry"] = None
try:
    import deferral.gateway.tracing
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install '.[traces]'" in done.stdout
