"""The simulated server behaves as its machine and its script say."""

import asyncio
import json

import httpx
import pytest

from metagpt_localllm.failures import Kind, from_error_body, from_response
from metagpt_localllm.simulator import DIALECTS, Answer, Fault, Machine, Simulator, parse_fault
from metagpt_localllm.simulator.dialects import clip
from metagpt_localllm.simulator.machine import render


async def post(server, text="hello", **body):
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        request = {"model": "m", "messages": [{"role": "user", "content": text}], **body}
        return await client.post(server.base_url + "/chat/completions", json=request)


async def test_it_answers_whole_or_streamed(simulator):
    async with simulator() as server:
        whole = (await post(server)).json()
        streamed = (await post(server, stream=True, stream_options={"include_usage": True})).text
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_has_no_more_tokens_than_are_asked_for(simulator, name):
    async with simulator() as server:
        said = (await post(server, **{name: 3})).json()
    assert said["usage"]["completion_tokens"] == 3 and said["choices"][0]["finish_reason"] == "length"


async def test_the_same_beginning_is_processed_once(simulator):
    async with simulator() as server:
        await post(server, "the same long beginning " * 20 + "one")
        first = server.stats.prefill_tokens
        await post(server, "the same long beginning " * 20 + "two")
    assert server.stats.prefill_tokens - first < first / 4
    assert server.stats.cached_tokens > 0


async def test_one_slot_serves_one_request_after_another(simulator):
    machine = Machine(prefill_speed=1e6, decode_speed=20)
    async with simulator(machine=machine, scale=1, answer=lambda m, t: Answer(text="a b c d e f")) as server:
        loop = asyncio.get_running_loop()

        async def timed():
            await post(server)
            return loop.time()

        one, two = sorted(await asyncio.gather(timed(), timed()))
    assert two - one > 0.1


SMALL = Machine(1e6, 1e6, context=100)


@pytest.mark.parametrize("dialect, word", [
    ("llama.cpp", "exceed_context_size_error"), ("vllm", "maximum context length"), ("lmstudio", "n_keep"),
    ("ollama", "exceed_context_size_error"), ("llama-cpp-python", "context_length_exceeded"),
])  # fmt: skip
async def test_a_prompt_over_the_context_is_refused_in_the_servers_words(simulator, dialect, word):
    async with simulator(dialect=dialect, machine=SMALL, too_long="refused") as server:
        response = await post(server, "word " * 200)
    assert response.status_code == 400 and word in response.text
    failure = from_response(response, response.text)
    assert (failure.kind, failure.window) == (Kind.OVERFLOW, 100) and failure.prompt_tokens > 200


def turns(*texts):
    """A chat of a system's message and those of a user."""
    roles = ["system", *["user"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, ["be brief", *texts])]


async def test_ollama_drops_the_oldest_messages_and_never_the_systems_nor_the_last(simulator):
    seen = []

    def note(messages, _tools):
        seen.append([message["content"] for message in messages])
        return Answer("ok")

    texts = [f"{name} " + "word " * 20 for name in ("a", "b", "c", "d")]
    async with simulator(dialect="ollama", machine=SMALL, answer=note) as server:
        usage = (await post(server, messages=turns(*texts))).json()["usage"]
        assert seen == [["be brief", *texts[1:]]]
        assert usage["prompt_tokens"] == len(render(turns(*texts[1:]))) < 100
        await post(server, messages=turns(*texts[:3], "word " * 200))
    assert seen[1] == ["be brief", "word " * 200]


@pytest.mark.parametrize("context, too_long, left", [(100, None, 52), (4096, None, 2050), (4096, "clipped", 4096)])
async def test_ollama_cuts_a_long_message_down_to_half_the_context(simulator, context, too_long, left):
    machine = Machine(1e6, 1e6, context=context)
    async with simulator(dialect="ollama", machine=machine, too_long=too_long) as server:
        response = await post(server, "word " * 2 * context)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] == left


@pytest.mark.parametrize("halved, fits", [(True, 99), (False, 100)])
def test_what_is_left_of_a_prompt_is_its_first_four_tokens_and_its_end(halved, fits):
    tokens = [str(n) for n in range(300)]
    left = clip(tokens, 100, halved=halved)
    assert left[:4] == tokens[:4] and left[4:] == tokens[-len(left) + 4 :] and len(left) <= 100
    assert clip(tokens[:fits], 100, halved=halved) == tokens[:fits]


async def test_lm_studio_leaves_a_long_prompt_without_a_token(simulator):
    async with simulator(dialect="lmstudio", machine=SMALL) as server:
        whole = (await post(server, "word " * 200)).json()
        streamed = (await post(server, "word " * 200, stream=True, stream_options={"include_usage": True})).text
    assert (whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]) == ("", "stop")
    assert whole["usage"]["prompt_tokens"] > 200 and whole["usage"]["completion_tokens"] == 0
    events = [line[6:] for line in streamed.splitlines() if line]
    assert events[-1] == "[DONE]" and json.loads(events[0])["choices"][0]["finish_reason"] == "stop"
    assert "error" not in streamed and json.loads(events[1])["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_lm_studio_may_report_a_long_prompt_in_a_200(simulator, stream):
    async with simulator(dialect="lmstudio", machine=SMALL, too_long="reported") as server:
        response = await post(server, "word " * 200, stream=stream)
    assert response.status_code == 200
    text = response.text
    if stream:
        assert text.startswith("event: error\ndata: ") and "[DONE]" not in text
        text = text.split("data: ")[1]
    failure = from_error_body(json.loads(text), response.request)
    assert (failure.kind, failure.window) == (Kind.OVERFLOW, 100) and failure.prompt_tokens > 200


@pytest.mark.parametrize("dialect, too_long", [("llama-cpp-python", None), ("lmstudio", "broken")])
async def test_a_stream_may_end_without_a_word_for_a_long_prompt(simulator, dialect, too_long):
    async with simulator(dialect=dialect, machine=SMALL, too_long=too_long) as server:
        streamed, whole = await post(server, "word " * 200, stream=True), await post(server, "word " * 200)
    assert (streamed.status_code, streamed.content, whole.status_code) == (200, b"", 400)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_fault_truncate_strikes_only_a_prompt_over_the_context(simulator, dialect):
    async with simulator(Fault("truncate", times=None), dialect=dialect, machine=SMALL) as server:
        short = (await post(server, "word " * 10, max_tokens=5)).json()
        long = (await post(server, "word " * 200, max_tokens=5)).json()
    assert short["usage"]["prompt_tokens"] < 60 and short["choices"][0]["message"]["content"]
    blank = dialect == "lmstudio"
    assert bool(long["choices"][0]["message"]["content"]) != blank
    assert (long["usage"]["prompt_tokens"] > 200) if blank else (long["usage"]["prompt_tokens"] == 52)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_may_hide_its_window(simulator, dialect):
    machine = Machine(1e6, 1e6, context=7777)
    async with simulator(dialect=dialect, machine=machine, tells_window=False) as server:
        async with httpx.AsyncClient(trust_env=False) as client:
            root = server.base_url[:-3]
            paths = ("/v1/models", "/props", "/slots", "/api/ps", "/api/v1/models", "/v1/model", "/upstream/m/props")
            told = [(await client.get(root + path)).text for path in paths]
            told.append((await client.post(root + "/tokenize", json={"messages": []})).text)
    assert "7777" not in "".join(told)


def test_an_unknown_way_of_long_prompts_is_refused():
    with pytest.raises(ValueError, match="blank"):
        Simulator(too_long="balnk")


async def test_work_for_a_client_that_goes_away_is_counted_as_waste(simulator):
    machine = Machine(prefill_speed=100, decode_speed=1, batch=10)
    async with simulator(machine=machine, scale=1) as server:
        task = asyncio.create_task(post(server, "word " * 100))
        while not server.stats.prefill_tokens:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            if server.stats.cancelled:
                break
            await asyncio.sleep(0.05)
    assert server.stats.cancelled == 1 and server.stats.wasted_tokens >= 10


def test_faults_from_text():
    assert parse_fault("stall:on=3,after=20") == Fault("stall", on=3, after=20)
    assert parse_fault("hang:times=always").times is None
    assert parse_fault("loading:duration=90s").duration == 90
    with pytest.raises(ValueError, match="'stall'"):
        parse_fault("stal")
    with pytest.raises(ValueError, match="key=value"):
        parse_fault("stall:then=3")
    with pytest.raises(ValueError, match="on must be a number, not 'x'"):
        parse_fault("stall:on=x")


@pytest.mark.parametrize("fault, struck", [(Fault("hang", on=2), [2]), (Fault("hang", on=2, times=2), [2, 3]),
                                           (Fault("hang", every=2, times=None), [1, 3, 5])])  # fmt: skip
def test_a_fault_strikes_when_the_script_says(fault, struck):
    assert [n for n in range(1, 6) if fault.strikes(n, "")] == struck


async def ask_ollama(server, **body):
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **body}
        return await client.post(server.base_url.replace("/v1", "/api/chat"), json=asked)


async def test_ollama_speaks_its_own_api_too(simulator):
    async with simulator(dialect="ollama", answer=lambda m, t: Answer(text="four words are here")) as server:
        lines = [json.loads(line) for line in (await ask_ollama(server)).text.splitlines()]
        whole = (await ask_ollama(server, stream=False)).json()
        short = (await ask_ollama(server, stream=False, options={"num_predict": 2})).json()
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"] == "four words are here"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] == whole["eval_count"] and whole["done_reason"] == "stop"
    assert (short["done_reason"], short["eval_count"]) == ("length", 2)


@pytest.mark.parametrize("fault, last", [("close", {}), ("done_without_finish", {}), ("stream_error", {"error": "the model"})])
async def test_ollama_ends_a_broken_answer_without_its_last_line(simulator, fault, last):
    async with simulator(parse_fault(f"{fault}:after=2"), dialect="ollama") as server:
        lines = [json.loads(line) for line in (await ask_ollama(server)).text.splitlines()]
    assert not any(line.get("done") for line in lines)
    assert lines[-1].get("error", "")[:9] == last.get("error", "")


async def test_only_ollama_has_its_api_and_says_its_errors_there_as_plain_text(simulator):
    async with simulator(parse_fault("error:status=500"), dialect="ollama") as server:
        failed = await ask_ollama(server)
    assert failed.status_code == 500 and isinstance(failed.json()["error"], str)
    async with simulator(dialect="lmstudio") as server:
        assert (await ask_ollama(server)).status_code == 404
