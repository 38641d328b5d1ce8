"""Telemetry: a span for each call by the GenAI conventions, delivered over a real socket; nothing that nobody asked for."""

import asyncio
import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import WORDS, RawServer, chunk
from pydantic import ValidationError

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry import metrics, trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from metagpt_localllm import errors, events, genai, otlp, telemetry
from metagpt_localllm.answer import Answer as AnswerOf
from metagpt_localllm.call import complete
from metagpt_localllm.journal import CallRecord
from metagpt_localllm.session import Session
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.simulator import Fault, Machine

KEY = "the-very-secret-key"
OWN = "metagpt_localllm."
QUICK = {"retry": {"backoff": {"initial": 0.01, "max": 0.05}}}


class Receiver:
    """Takes spans as OTLP over HTTP, like a collector."""

    def __init__(self, status=200):
        self.bodies, self.paths = [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                self.paths.append(handler.path)
                self.bodies.append(handler.rfile.read(int(handler.headers["content-length"])))
                handler.send_response(status)
                handler.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def settings(self, **more):
        return {"telemetry": {"enabled": True, "endpoint": self.endpoint, **more}}

    def resources(self):
        otlp.provider_for(self.endpoint, telemetry._say).force_flush()
        return [resource for body in self.bodies for resource in ExportTraceServiceRequest.FromString(body).resource_spans]

    def spans(self):
        return [span for resource in self.resources() for scope in resource.scope_spans for span in scope.spans]

    @property
    def bytes(self):
        return b"".join(self.bodies)


def plain(attributes):
    """Of a protobuf, as Python's own types."""

    def value(any_value):
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(one) for one in found.values] if kind == "array_value" else found

    return {pair.key: value(pair.value) for pair in attributes}


@pytest.fixture
def receiver():
    with Receiver() as made:
        yield made


@pytest.fixture(scope="module")
def application():
    """The program that uses us has a TracerProvider and a MeterProvider of its own; both can be set once per process."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader], shutdown_on_exit=False))
    return exporter, reader


@pytest.fixture
def spans(application):
    """The spans that have ended, oldest first."""
    application[0].clear()
    return application[0].get_finished_spans


ON = {"telemetry": {"enabled": True}}
WITH_CONTENT = {"telemetry": {"enabled": True, "content": True}}


def of_calls(finished):
    return [span for span in finished if span.name.startswith("chat ")]


def attempts(finished):
    return [span for span in finished if span.name.startswith("attempt ")]


def names(span):
    return [event.name[len(OWN) :] for event in span.events]


# ---------------------------------------------------------------------- over a real socket


async def test_a_call_arrives_as_a_span_by_the_conventions(simulator, ask, receiver):
    async with simulator(api_key=KEY) as server:
        settings = {**receiver.settings(), "context": {"window": 4096}}
        body = {"temperature": 0.5, "stop": "END", "seed": 7, "response_format": {"type": "json_object"}}
        outcome = await complete(ask(server, "a question of mine", settings, api_key=KEY, extra=body))
        port = int(server.base_url.split(":")[2].split("/")[0])
    attempt, call = receiver.spans()
    assert (call.name, call.kind) == (f"chat {server.model}", call.SPAN_KIND_CLIENT)
    known = plain(call.attributes)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama.cpp",
        "gen_ai.request.model": server.model,
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 512,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.stop_sequences": ["END"],
        "gen_ai.request.seed": 7,
        "gen_ai.output.type": "json",
        "gen_ai.response.model": outcome.completion.model,
        "gen_ai.response.id": outcome.completion.id,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": outcome.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.agent.name": "Engineer",
        "server.address": "127.0.0.1",
        "server.port": port,
        OWN + "action": "WriteCode",
        OWN + "role": "Engineer",
        OWN + "tier": "default",
        OWN + "attempts": 1,
        OWN + "usage.estimated": False,
        OWN + "replayed": False,
    }
    assert {name: known.get(name) for name in expected} == expected
    assert known["gen_ai.response.time_to_first_chunk"] > 0
    assert not [name for name in known if "messages" in name or name == "error.type"]
    assert call.status.code == 0
    assert attempt.parent_span_id == call.span_id and attempt.trace_id == call.trace_id
    assert call.start_time_unix_nano <= attempt.start_time_unix_nano <= attempt.events[0].time_unix_nano
    assert attempt.events[0].time_unix_nano <= attempt.end_time_unix_nano <= call.end_time_unix_nano
    (resource,) = receiver.resources()
    assert plain(resource.resource.attributes)["service.name"] == "metagpt"
    assert set(receiver.paths) == {"/v1/traces"}
    for secret in (KEY, "a question of mine", WORDS):
        assert secret.encode() not in receiver.bytes


async def test_content_goes_along_when_it_is_asked_for_and_the_key_never(simulator, ask, receiver):
    async with simulator(api_key=KEY) as server:
        conversation = [{"role": "system", "content": "You write."}, {"role": "user", "content": f"写 about {KEY}"}]
        await complete(ask(server, conversation, receiver.settings(content=True), api_key=KEY))
    known = plain(receiver.spans()[-1].attributes)
    assert json.loads(known["gen_ai.input.messages"]) == [
        {"role": "system", "parts": [{"type": "text", "content": "You write."}]},
        {"role": "user", "parts": [{"type": "text", "content": "写 about …"}]},
    ]
    assert json.loads(known["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": WORDS}], "finish_reason": "stop"}
    ]
    assert KEY.encode() not in receiver.bytes


@pytest.mark.parametrize("content", [False, True])
async def test_what_a_server_quotes_in_an_error_is_content_and_the_key_never_goes(ask, receiver, content):
    said = json.dumps({"error": {"message": f"cannot parse 'my private prompt' of {KEY}", "code": 400}}).encode()
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n" + said
    async with RawServer(answer) as server:
        with pytest.raises(errors.RequestRejected):
            await complete(ask(server, "my private prompt", receiver.settings(content=content), api_key=KEY))
    attempt, call = receiver.spans()
    assert plain(call.attributes)["error.type"] == plain(attempt.attributes)["error.type"] == "RequestRejected"
    assert call.status.code == attempt.status.code == call.status.STATUS_CODE_ERROR
    assert call.status.message and ("my private prompt" in call.status.message) is content
    assert (b"my private prompt" in receiver.bytes) is content
    assert KEY.encode() not in receiver.bytes


async def test_half_characters_and_words_that_look_like_a_short_key_do_no_harm(ask, receiver):
    async with RawServer(chunk("ollama \ud83d", "stop")) as server:
        await complete(ask(server, "ollama", receiver.settings(content=True), api_key="ollama"))
    known = plain(receiver.spans()[-1].attributes)
    assert json.loads(known["gen_ai.output.messages"])[0]["parts"] == [{"type": "text", "content": "ollama ?"}]
    assert "ollama" in known["gen_ai.input.messages"]


async def test_an_endpoint_of_our_own_is_not_made_known_to_the_application(simulator, ask, receiver):
    before = trace.get_tracer_provider()
    async with simulator() as server:
        await complete(ask(server, settings=receiver.settings()))
    assert len(receiver.spans()) == 2 and trace.get_tracer_provider() is before


def test_the_path_of_otlp_is_added_once():
    for written in ("http://h:4318", "http://h:4318/", "http://h:4318/v1/traces", "http://h:4318/v1/traces/"):
        assert otlp.traces_url(written) == "http://h:4318/v1/traces"
    assert otlp.traces_url("https://h/otlp") == "https://h/otlp/v1/traces"


# ---------------------------------------------------------------------- what happens on the way


async def test_attempts_that_fail_are_spans_of_their_own_and_the_call_is_well(simulator, ask, spans):
    async with simulator(Fault("stall", on=1, after=5), Fault("error", on=2)) as server:
        settings = {**ON, **QUICK, "timeouts": {"stall": 0.5}}
        await complete(ask(server, settings=settings))
    (call,), tried = of_calls(spans()), attempts(spans())
    assert [span.attributes.get("error.type") for span in tried] == ["StreamStalled", "ServerFailed", None]
    assert [span.status.status_code for span in tried] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [names(span) for span in tried] == [["first_token"], [], ["first_token"]]
    assert all(span.kind is SpanKind.INTERNAL and span.parent.span_id == call.context.span_id for span in tried)
    assert not [name for span in tried for name in span.attributes if name.startswith("gen_ai.")]
    assert call.status.status_code is StatusCode.UNSET and call.attributes[OWN + "attempts"] == 3
    retries = [event for event in call.events if event.name == OWN + "retry"]
    assert [retry.attributes["error.type"] for retry in retries] == ["StreamStalled", "ServerFailed"]
    assert all(isinstance(retry.attributes[OWN + "retry.delay"], float) for retry in retries)
    assert all(OWN + "retry.detail" not in retry.attributes for retry in retries)


async def test_a_call_that_fails_says_why_and_which_setting_helps(simulator, ask, spans):
    async with simulator(Fault("hang")) as server:
        with pytest.raises(errors.FirstTokenTimeout) as caught:
            await complete(ask(server, settings={**ON, "timeouts": {"first_token": 0.2}, "retry": {"attempts": 1}}))
    (call,) = of_calls(spans())
    assert call.attributes["error.type"] == "FirstTokenTimeout"
    assert call.attributes[OWN + "setting"] == caught.value.setting
    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, errors.FirstTokenTimeout.__doc__)
    assert "gen_ai.usage.output_tokens" not in call.attributes and "gen_ai.response.model" not in call.attributes


async def test_a_call_whose_caller_leaves_ends_its_span(simulator, ask, spans):
    async with simulator(Fault("stall", after=3)) as server:
        came = asyncio.Event()
        task = asyncio.ensure_future(complete(ask(server, settings=WITH_CONTENT, show=lambda text: came.set())))
        await came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    attempt, call = spans()
    assert call.attributes["error.type"] == attempt.attributes["error.type"] == "CancelledError"
    (said,) = json.loads(call.attributes["gen_ai.output.messages"])
    assert said["finish_reason"] == "error" and WORDS.startswith(said["parts"][0]["content"])


async def test_waits_loads_stalls_and_trims_are_events_of_the_span(simulator, ask, spans, monkeypatch):
    monkeypatch.setattr("metagpt_localllm.attempt._STALLED", 0.2)
    turns = [{"role": role, "content": f"{role} says " + "x " * 400} for _ in range(8) for role in ("user", "assistant")]
    async with simulator(Fault("loading", on=1, duration=100), Fault("stall", on=2, after=5)) as server:
        settings = {**ON, **QUICK, "timeouts": {"stall": 0.7}, "context": {"window": 2048}}
        await complete(ask(server, [*turns, {"role": "user", "content": "go on"}], settings))
    (call,) = of_calls(spans())
    assert [name for name in dict.fromkeys(names(call))] == ["trimmed", "loading", "stalled", "retry"]
    trimmed = call.events[0]
    assert trimmed.attributes[OWN + "trimmed.dropped_messages"] > 0 and trimmed.attributes[OWN + "trimmed.window"] == 2048
    loading = next(event for event in call.events if event.name == OWN + "loading")
    assert loading.attributes[OWN + "loading.limit"] > 0 and OWN + "loading.cause" not in loading.attributes
    assert attempts(spans())[0].attributes["error.type"] == "ServerUnavailable"
    assert call.attributes[OWN + "changed_messages"] > 0


async def test_words_of_what_happened_go_along_with_content(simulator, ask, spans):
    async with simulator(Fault("error", on=1)) as server:
        await complete(ask(server, settings=WITH_CONTENT))
    (retry,) = of_calls(spans())[0].events
    assert "500" in retry.attributes[OWN + "retry.detail"]


async def test_a_replay_is_no_call_to_the_server(simulator, ask, spans, monkeypatch):
    left = CallRecord(number=3, digest="", outcome="done", answer=_record("an earlier answer"))
    monkeypatch.setattr(Session, "recall", lambda self, asked, wanted: (left, True))
    async with simulator() as server:
        assert (await complete(ask(server, settings={**WITH_CONTENT, "journal": {"enabled": True}}))).replayed
    (replayed,) = spans()
    assert replayed.kind is SpanKind.INTERNAL and replayed.attributes[OWN + "replayed"] is True
    assert names(replayed) == ["replayed"] and "gen_ai.usage.output_tokens" not in replayed.attributes
    assert "an earlier answer" in replayed.attributes["gen_ai.output.messages"]


def _record(text):
    answer = AnswerOf()
    answer.add({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]})
    return answer.as_record()


async def test_tokens_that_the_server_did_not_count_are_said_to_be_estimated(simulator, ask, spans):
    async with simulator(Fault("no_usage")) as server:
        await complete(ask(server, settings=ON))
    (call,) = of_calls(spans())
    assert call.attributes[OWN + "usage.estimated"] is True and call.attributes["gen_ai.usage.output_tokens"] > 0


# ---------------------------------------------------------------------- whose span is whose


async def test_a_call_nests_under_the_users_span_and_what_runs_in_it_under_the_call(simulator, ask, spans):
    tracer = trace.get_tracer("the application")

    def show(text):
        tracer.start_span("shown").end()

    async with simulator() as server:
        with tracer.start_as_current_span("the user's work") as outer:
            await complete(ask(server, settings=ON, show=show))
            assert trace.get_current_span() is outer
    (call,) = of_calls(spans())
    assert call.parent.span_id == outer.get_span_context().span_id
    shown = [span for span in spans() if span.name == "shown"]
    assert {span.parent.span_id for span in shown} == {call.context.span_id}
    assert {span.context.trace_id for span in spans()} == {outer.get_span_context().trace_id}


async def test_calls_at_the_same_time_do_not_mix(simulator, ask, spans):
    tracer = trace.get_tracer("the application")

    async def one(server, number):
        with tracer.start_as_current_span(f"user {number}"):
            await complete(ask(server, f"question {number}", {**WITH_CONTENT, **QUICK}))

    faults = [Fault("error", on=number) for number in (2, 5)]
    async with simulator(*faults, machine=Machine(prefill_speed=2000, decode_speed=2000, slots=3), scale=20) as server:
        await asyncio.gather(*(one(server, number) for number in range(9)))
    users = {span.context.span_id: span for span in spans() if span.name.startswith("user ")}
    calls = of_calls(spans())
    assert len(calls) == len(users) == 9
    for call in calls:
        number = users[call.parent.span_id].name.split()[1]
        assert f"question {number}\"" in call.attributes["gen_ai.input.messages"]
        tried = [span for span in attempts(spans()) if span.parent.span_id == call.context.span_id]
        assert len(tried) == call.attributes[OWN + "attempts"] == 1 + names(call).count("retry")
        assert {span.context.trace_id for span in tried} == {call.context.trace_id}
    assert sum(names(call).count("retry") for call in calls) == 2
    assert any("queued" in names(call) and call.attributes[OWN + "queued"] > 0 for call in calls)
    assert not telemetry._open


# ---------------------------------------------------------------------- metrics


async def test_the_applications_meters_get_duration_and_tokens(simulator, ask, application):
    async with simulator(model="measured") as server:
        outcome = await complete(ask(server, settings=ON))
    async with simulator(Fault("error", status=400), model="measured") as server:
        with pytest.raises(errors.LocalLLMError):
            await complete(ask(server, settings=ON))
    data = application[1].get_metrics_data()
    points = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            if point.attributes["gen_ai.request.model"] == "measured":
                about = point.attributes.get("gen_ai.token.type") or point.attributes.get("error.type", "")
                points[metric.name, about] = point
    tokens, duration = "gen_ai.client.token.usage", "gen_ai.client.operation.duration"
    assert points[tokens, "input"].sum == outcome.usage.prompt_tokens
    assert points[tokens, "output"].sum == outcome.usage.completion_tokens
    assert points[duration, ""].count == points[duration, "RequestRejected"].count == 1
    assert points["gen_ai.client.operation.time_to_first_chunk", ""].sum <= points[duration, ""].sum
    assert points[duration, ""].attributes["gen_ai.provider.name"] == "llama.cpp"


# ---------------------------------------------------------------------- it harms nothing


@pytest.mark.parametrize("where", ["_tracer", "_Trace.end", "_Trace.take", "_Trace._outcome"])
async def test_whatever_fails_in_telemetry_harms_no_call(simulator, ask, spans, monkeypatch, where):
    def broken(*_args):
        raise RuntimeError("broken")

    told = []
    monkeypatch.setattr(telemetry, "_tell", told.append)
    monkeypatch.setattr(telemetry, "_told", set())
    monkeypatch.setattr(f"metagpt_localllm.telemetry.{where}", broken)
    async with simulator() as server:
        for _ in range(2):
            assert (await complete(ask(server, settings=ON))).text == WORDS
    assert len(told) == (0 if where == "_Trace.take" else 1) and not telemetry._open
    assert trace.get_current_span() is trace.INVALID_SPAN
    if where == "_Trace._outcome":
        assert len(of_calls(spans())) == 2


def test_nothing_is_done_per_token():
    def listens(kind):
        return any(getattr(callback, "__module__", "") == telemetry.__name__ for callback in events._subscribers[kind])

    assert listens(events.Retry)
    assert not any(map(listens, (events.Token, events.Prefill, events.Working)))


@pytest.mark.parametrize("status, word", [(404, "404"), (None, "refused")])
async def test_a_receiver_that_takes_no_spans_is_told_of_once(simulator, ask, monkeypatch, caplog, status, word):
    told = []
    monkeypatch.setattr(telemetry, "_tell", told.append)
    with Receiver(status or 200) as receiver:
        if status is None:
            receiver.endpoint = f"http://user:password@127.0.0.1:{_closed_port()}"
        async with simulator() as server:
            for _ in range(2):
                assert (await complete(ask(server, settings=receiver.settings()))).text == WORDS
                receiver.spans()
    assert len(told) == 1 and word in told[0] and "llm.local.telemetry.endpoint" in told[0] and "password" not in told[0]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


#: A whole program: a server that answers, calls with these settings, and the end of the process.
PROGRAM = """
import asyncio, json, os, sys
from metagpt_localllm.call import Call, complete
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.simulator import Simulator
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

async def main(settings):
    if settings.telemetry.endpoint:
        from metagpt_localllm import otlp
        otlp._PATIENCE = 0.5
    async with Simulator(scale=1000) as server:
        body = {"model": server.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}
        for _ in range(2):
            await complete(Call(Endpoint(server.base_url, server.model, "the-very-secret-key"), settings, body, Caller()))
    print("ANSWERED", *sorted(name for name in sys.modules if name.startswith("opentelemetry")))

asyncio.run(main(LocalSettings.model_validate(json.loads(sys.argv[1]))))
"""


def run(telemetry, tmp_path, **environment):
    settings = {"journal": {"enabled": False, "path": str(tmp_path / "state.db")}, "telemetry": telemetry}
    return run_program(PROGRAM, tmp_path, json.dumps(settings), **environment)


def run_program(program, tmp_path, *arguments, **environment):
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HOME": str(tmp_path), **environment}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=here, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )


def test_the_end_of_the_process_delivers_what_there_is(tmp_path, receiver):
    ended = run({"enabled": True, "endpoint": receiver.endpoint}, tmp_path, OTEL_RESOURCE_ATTRIBUTES="service.name=mine")
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert len(receiver.spans()) == 4
    assert plain(receiver.resources()[0].resource.attributes)["service.name"] == "mine"


def test_a_receiver_that_is_down_harms_neither_calls_nor_the_end(tmp_path):
    ended = run({"enabled": True, "endpoint": f"http://127.0.0.1:{_closed_port()}"}, tmp_path)
    assert ended.returncode == 0 and "ANSWERED" in ended.stdout
    assert ended.stderr.count("\n") == 1 and "cannot be delivered" in ended.stderr


def test_a_receiver_that_never_answers_does_not_keep_the_process(tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        ended = run({"enabled": True, "endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}, tmp_path)
    assert ended.returncode == 0 and "ANSWERED" in ended.stdout
    assert ended.stderr.count("\n") == 1 and "did not reach" in ended.stderr


def test_with_nothing_configured_nothing_of_opentelemetry_is_imported(tmp_path):
    ended = run({}, tmp_path)
    assert ended.stdout.strip() == "ANSWERED" and not ended.stderr, ended.stderr


async def test_with_nowhere_to_send_spans_to_it_is_said_once(simulator, ask, monkeypatch):
    told = []
    monkeypatch.setattr(telemetry, "_tell", told.append)
    monkeypatch.setattr(telemetry, "_told", set())
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    async with simulator() as server:
        for _ in range(2):
            assert (await complete(ask(server, settings=ON))).text == WORDS
    assert len(told) == 1 and "Set llm.local.telemetry.endpoint" in told[0]


WITHOUT_THE_EXTRA = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from metagpt_localllm.settings import LocalSettings
LocalSettings.model_validate({"telemetry": {"enabled": False, "endpoint": "http://localhost:4318"}})
print("OFF")
LocalSettings.model_validate({"telemetry": {"enabled": True}})
print("ON")
"""


def test_without_the_extra_it_says_at_start_what_to_install(tmp_path):
    ended = run_program(WITHOUT_THE_EXTRA, tmp_path)
    assert ended.returncode == 1 and ended.stdout.strip() == "OFF"
    assert "telemetry" in ended.stderr and "pip install 'metagpt-localllm[otel]'" in ended.stderr


def _closed_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


# ---------------------------------------------------------------------- settings, and the words of the conventions


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"endpoint": "localhost:4318"}, "http://localhost:4318"),
        ({"endpoint": "grpc://localhost:4317"}, "OTLP over HTTP"),
        ({"endpoint": "http://"}, "OTLP over HTTP"),
        ({"endpoint": "http://h:99999"}, "OTLP over HTTP"),
        ({"enabled": "yes"}, "bool"),
        ({"content": "all"}, "bool"),
        ({"enable": True}, "'enabled'"),
    ],
)
def test_nonsense_is_refused_with_its_path(settings, word):
    with pytest.raises(ValidationError) as caught:
        LocalSettings.model_validate({"telemetry": settings})
    (problem,) = caught.value.errors()
    assert problem["loc"][0] == "telemetry" and word in problem["msg"]


def test_a_conversation_with_tools_images_and_thoughts_in_the_form_of_the_conventions():
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"code": "1"}'}}
    conversation = [
        {"role": "user", "content": [
            {"type": "text", "text": "look"},
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        ]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]  # fmt: skip
    tool_call = {"type": "tool_call", "id": "c1", "name": "run", "arguments": {"code": "1"}}
    assert json.loads(genai.input_messages(conversation)) == [
        {"role": "user", "parts": [
            {"type": "text", "content": "look"},
            {"type": "uri", "modality": "image", "uri": "https://example.org/a.png"},
            {"type": "image_url", "left_out": True},
        ]},
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "hm"}, tool_call]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "2"}]},
    ]  # fmt: skip
    assert json.loads(genai.output_messages("text", "", [(0, "c1", "run", "{broken")], "tool_calls")) == [
        {"role": "assistant", "finish_reason": "tool_call", "parts": [
            {"type": "text", "content": "text"}, {**tool_call, "arguments": "{broken"},
        ]},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}]
    assert json.loads(genai.tool_definitions(tools)) == [{"name": "run", "parameters": {"type": "object"}, "type": "function"}]


def test_a_server_of_which_nothing_is_known_speaks_the_dialect_of_openai():
    assert genai.provider("plain") == "openai" and genai.provider("ollama") == "ollama"
    assert genai.identity("m", "https://host/v1", "plain")["server.port"] == 443
    assert genai.identity("m", "http://[::1]:8080/v1", "vllm")["server.address"] == "::1"
