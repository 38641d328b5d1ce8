"""One call against servers that say odd things, byte for byte, and against limits that must hold all the same."""

import asyncio
import copy
import gzip
import io
import json
import pickle
import time

import httpx
import openai
import pytest
from conftest import WORDS, RawServer, chunk

from metagpt_localllm import errors, servers
from metagpt_localllm.call import complete
from metagpt_localllm.checking import see
from metagpt_localllm.simulator import Answer, Fault, Machine

WHOLE = chunk("fine") + chunk(finish="stop")
LLAMA = {"default_generation_settings": {"n_ctx": 4096}, "modalities": {"vision": False}}


def http(status, body, *headers, kind="application/json"):
    head = [f"HTTP/1.1 {status} Whatever", f"content-type: {kind}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "answer",
    [
        b"event: ping\ndata:\n\n" + WHOLE,
        b": comment\r\n\r\n" + WHOLE.replace(b"\n", b"\r\n"),
        chunk("fi") + b'data: "a string"\n\n' + b"data: 17\n\n" + chunk("ne") + chunk(finish="stop"),
        chunk("fi") + chunk(role="assistant", content=None) + chunk("ne", "stop") + chunk(" and more after the end"),
        http(200, gzip.compress(WHOLE), "content-encoding: gzip", kind="text/event-stream"),
        http(200, WHOLE + b"data: [DONE]\n\n"),
        http(200, b'{"choices": [{"message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}]}'),
        WHOLE.rstrip(b"\n"),
    ],
    ids=["empty event", "carriage returns", "no objects", "text after the end", "gzip", "wrong content type",
         "not a stream", "no blank line at the end"],
)  # fmt: skip
async def test_a_whole_answer_is_taken_however_it_is_wrapped(ask, answer):
    async with RawServer(answer) as server:
        outcome = await complete(ask(server))
    assert outcome.text == "fine" and len(server.requests) == 1


async def test_a_byte_that_is_no_utf8_costs_a_character_and_not_the_answer(ask):
    async with RawServer(chunk("f?ne").replace(b"?", b"\xff") + chunk(finish="stop")) as server:
        assert (await complete(ask(server))).text == "f\ufffdne"


@pytest.mark.parametrize(
    "answer",
    [
        chunk("half") + chunk(finish="error"),
        chunk("half") + chunk(finish="abort"),
        b"data: {broken\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"choices": [17]}\n\n',
        http(200, b"not JSON at all"),
    ],
    ids=["error", "abort", "broken JSON", "endless nesting", "odd shape", "text"],
)
async def test_what_is_no_whole_answer_is_tried_again(ask, answer):
    async with RawServer(answer, WHOLE) as server:
        assert (await complete(ask(server))).text == "fine"
    assert len(server.requests) == 2 and server.requests[0] == server.requests[1]


async def test_a_connection_kept_open_after_the_finish_reason_does_not_keep_the_call(ask):
    async with RawServer(WHOLE, hold=True) as server:
        settings = {"timeouts": {"first_token": 30, "stall": 0.3, "total": 60}}
        assert (await asyncio.wait_for(complete(ask(server, settings=settings)), 20)).text == "fine"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "parts, calls",
    [
        ([{"index": 0, "id": "a", "function": {"name": "f", "arguments": {"x": 1}}}], [("f", '{"x": 1}')]),
        ([{"index": 0, "id": 7, "function": {"name": "f", "arguments": "{}"}}], [("f", "{}")]),
        ([{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}},
          {"index": 0, "id": "b", "function": {"name": "g", "arguments": "["}},
          {"index": 0, "function": {"arguments": "]"}}], [("f", "{}"), ("g", "[]")]),
    ],
    ids=["arguments as an object", "a number as id", "the same index twice"],
)  # fmt: skip
async def test_odd_tool_calls_are_put_together(ask, parts, calls):
    stream = b"".join(chunk(tool_calls=[part]) for part in parts) + chunk(finish="tool_calls")
    async with RawServer(stream) as server:
        outcome = await complete(ask(server))
    made = outcome.completion.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in made] == calls


async def test_usage_is_kept_wherever_it_stands(ask):
    usage = {"prompt_tokens": 77, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 70}}
    last = b"data: " + json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}).encode() + b"\n\n"
    async with RawServer(chunk("fine") + last) as server:
        outcome = await complete(ask(server))
    assert (outcome.usage.prompt_tokens, outcome.usage.completion_tokens, outcome.usage.total_tokens) == (77, 5, 82)
    assert outcome.usage.model_dump()["prompt_tokens_details"]["cached_tokens"] == 70


async def test_a_console_that_cannot_show_the_answer_does_not_lose_it(ask):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    async with RawServer(chunk("✅ done") + chunk(finish="stop")) as server:
        outcome = await complete(ask(server, show=lambda text: print(text, end="", file=console)))
    assert outcome.text == "✅ done" and len(server.requests) == 1


# ------------------------------------------------------------------------------------------- limits


async def test_an_endless_error_page_is_not_read_to_its_end(ask):
    endless = b"HTTP/1.1 500 No\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n" + b"x" * (3 << 20)
    async with RawServer(endless, WHOLE) as server:
        assert (await complete(ask(server))).text == "fine"


async def test_a_server_that_says_it_is_up_while_it_loads_is_not_flooded(ask):
    loading = http(503, b'{"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}')
    settings = {"retry": {"backoff": {"initial": 0, "max": 1}, "wait_for_server": 1.5}}
    async with RawServer(loading, about={"/health": {"status": "ok"}}) as server:
        with pytest.raises(errors.ServerUnavailable, match="not even after 1.5 s"):
            await complete(ask(server, settings=settings))
    assert 2 < len(server.requests) < 12


async def test_counting_that_hangs_is_given_up_with_the_callers_own_limit(ask):
    async def never():
        await asyncio.sleep(60)

    chat = [{"role": "user", "content": "word " * 3000}] * 3
    about = {"/props": LLAMA, "/v1/chat/completions/input_tokens": never}
    async with RawServer(WHOLE, about=about) as server:
        with pytest.raises(errors.TotalTimeout, match="caller"):
            await asyncio.wait_for(complete(ask(server, chat, call_timeout=0.5)), 4)


async def test_the_callers_limit_holds_while_a_server_is_waited_for(simulator, ask):
    server = simulator()
    async with server:
        pass
    started = time.monotonic()
    with pytest.raises(errors.TotalTimeout, match="caller"):
        await complete(ask(server, call_timeout=0.5))
    assert time.monotonic() - started < 3


async def test_calls_that_begin_together_ask_only_once_what_the_server_is(simulator, ask):
    async with simulator(machine=Machine(1e6, 1e6, slots=20)) as server:
        await asyncio.gather(*(complete(ask(server)) for _ in range(20)))
    assert server.paths.count("/props") == 1


# ------------------------------------------------------------------------------------------- context


async def test_a_dense_last_message_is_cut_no_further_than_it_must(ask):
    """The server counts words as one token and digits as one each, unlike our estimate."""
    counts = []

    def count_of(body):
        text = " ".join(message["content"] for message in json.loads(body)["messages"])
        return sum(c.isdigit() for c in text) + len([w for w in text.split() if not w.isdigit()])

    class Counting(RawServer):
        async def _serve(self, reader, writer):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"input_tokens" not in head:
                reader._buffer[:0] = head
                return await super()._serve(reader, writer)
            length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line).split(b":")[1])
            counts.append(count_of(await reader.readexactly(length)))
            await self._about_count(writer)

        async def _about_count(self, writer):
            body = json.dumps({"input_tokens": counts[-1]}).encode()
            writer.write(http(200, body))
            await writer.drain()
            writer.close()

    chat = [{"role": "user", "content": "international documentation considerations " * 1500},
            {"role": "user", "content": "0123456789" * 800}]  # fmt: skip
    async with Counting(WHOLE, about={"/props": LLAMA}) as server:
        await complete(ask(server, chat, max_tokens=1024))
    sent = count_of(server.requests[0])
    assert 0.8 * 3072 < sent <= 3072


async def test_what_an_overflow_has_taught_is_known_to_the_next_call(simulator, ask):
    async with simulator(dialect="plain", machine=Machine(1e6, 1e6, context=1000)) as server:
        for _ in range(3):
            await complete(ask(server, "lorem ipsum dolor " * 400))
    assert server.stats.requests == 4  # only the first call was refused once


async def test_a_server_that_comes_back_with_another_window_is_asked_again(simulator, ask):
    server = simulator(machine=Machine(1e6, 1e6, context=8000))
    async with server:
        await complete(ask(server))
    server.machine = Machine(1e6, 1e6, context=1000)
    server.faults = [Fault("loading", on=2, duration=10)]
    async with server:
        await complete(ask(server, "lorem ipsum dolor " * 400))
    assert server.stats.requests == 3 and servers.known(ask(server).endpoint).facts.window == 1000


async def test_a_proxy_in_front_of_a_server_that_starts_is_not_taken_for_the_server(simulator, ask):
    async with RawServer(http(502, b"bad gateway"), WHOLE) as proxy:
        proxy._about = lambda writer, path: proxy._chat(writer, http(502, b"bad gateway"))
        await complete(ask(proxy))
        assert servers.known(ask(proxy).endpoint) is None


# ------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("status", [401, 500, 422])
async def test_an_error_carries_neither_the_key_nor_the_prompt(ask, status):
    body = b'{"error": {"message": "no: sk-secret"}}'
    async with RawServer(http(status, body)) as server:
        with pytest.raises(errors.LocalLLMError) as caught:
            await complete(ask(server, "my secret prompt", {"retry": {"attempts": 1}}, api_key="sk-secret"))
    error = caught.value
    held = [repr(error), str(error), str(vars(error))]
    for part in (error, error.__cause__, error.response):
        request = getattr(part, "request", None)
        if request is not None:
            held += [str(request.headers), str(request.content)]
    held.append(str(error.response.headers) + error.response.text)
    assert "secret" not in " ".join(held)


async def test_a_password_in_the_address_is_not_shown(ask):
    async with RawServer(b"") as server:
        base_url = server.base_url
    call = ask(server, settings={"retry": {"wait_for_server": 0}})
    call = copy.replace(call) if hasattr(copy, "replace") else call
    object.__setattr__(call.endpoint, "base_url", base_url.replace("//", "//user:hunter2@"))
    with pytest.raises(errors.ServerUnavailable) as caught:
        await complete(call)
    assert "hunter2" not in str(caught.value) and "127.0.0.1" in str(caught.value)


async def test_an_error_can_be_copied_and_pickled(simulator, ask):
    async with simulator(Fault("stall", times=None), answer=lambda m, t: Answer(text=WORDS)) as server:
        with pytest.raises(errors.StreamStalled) as caught:
            await complete(ask(server, settings={"retry": {"attempts": 1}}))
    for again in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert isinstance(again, openai.APITimeoutError) and str(again) == str(caught.value)
        assert (again.partial, again.attempts, again.setting) == (
            caught.value.partial, 1, "llm.local.timeouts.stall")  # fmt: skip


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_takes_neither_key_nor_prompt_elsewhere(ask, status):
    async with RawServer(WHOLE, about={"/v1/models": {"data": []}}) as elsewhere:
        away = http(status, b"", f"location: {elsewhere.base_url}/chat/completions?k=sk-secret")
        async with RawServer(away) as server:
            server._about = lambda writer, path: server._chat(writer, away)
            with pytest.raises(errors.RequestRejected, match="The address redirects to http://127.0.0.1") as caught:
                await complete(ask(server, "my secret prompt", api_key="sk-secret"))
            await servers.identify(ask(server, api_key="sk-secret").endpoint)
    assert elsewhere.requests == elsewhere.others == [] and "secret" not in str(caught.value)


async def test_what_a_server_sends_back_of_the_key_is_nowhere_in_the_error(ask):
    broken = b"HTTP/1.1 500 X\r\nx-echo: Bearer sk-secret\r\nx-odd: caf\xc3\xa9 \xff\r\nconnection: close\r\n\r\nno: sk-secret"
    worse = b"HTTP/1.1 sk-secret \x1b[2J\r\n\r\n"
    for answer in (broken, worse):
        async with RawServer(answer) as server:
            with pytest.raises(errors.LocalLLMError) as caught:
                await complete(ask(server, settings={"retry": {"attempts": 1}}, api_key="sk-secret"))
        error = caught.value
        held = f"{error} {error!r} {error.__cause__} {vars(error)} {getattr(error, 'response', httpx.Response(200)).headers}"
        assert "sk-secret" not in held and "\x1b" not in str(error)


async def test_a_check_shows_nothing_of_the_key_that_a_server_sends_back(ask):
    listing = {"data": [{"id": "like sk-secret"}]}
    for about in (b"HTTP/1.1 401 X\r\ncontent-length: 3\r\xd7x: sk-secret\r\n\r\n", listing):
        async with RawServer(WHOLE, about={"/v1/models": about}) as server:
            said = (await see(ask(server, api_key="sk-secret").endpoint)).sentence("llm")
        assert "sk-secret" not in said and "…" in said
