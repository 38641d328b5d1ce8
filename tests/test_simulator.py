"""The simulated server behaves as its machine and its script say."""

import asyncio
import json

import httpx
import pytest

from metagpt_localllm.simulator import Answer, Fault, Machine, parse_fault


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


@pytest.mark.parametrize("dialect, word", [("llama.cpp", "exceed_context_size_error"), ("vllm", "maximum context length"),
                                           ("lmstudio", "n_keep")])  # fmt: skip
async def test_a_prompt_over_the_context_is_refused_in_the_servers_words(simulator, dialect, word):
    async with simulator(dialect=dialect, machine=Machine(1e6, 1e6, context=100)) as server:
        response = await post(server, "word " * 200)
    assert response.status_code == 400 and word in response.text


async def test_ollama_cuts_a_long_prompt_silently(simulator):
    async with simulator(dialect="ollama", machine=Machine(1e6, 1e6, context=100)) as server:
        response = await post(server, "word " * 200)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] <= 100


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
