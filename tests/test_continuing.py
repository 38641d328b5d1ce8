"""An answer that broke off is gone on with, and not computed again."""

import asyncio

import pytest
from conftest import FAST, RawServer, chunk, kinds

from metagpt_localllm import errors, events
from metagpt_localllm.call import complete
from metagpt_localllm.servers.llama_cpp import LlamaCpp
from metagpt_localllm.simulator import Answer, Fault, Machine

LONG = " ".join(f"word{n}" for n in range(400))
CHUNKS = {"llama.cpp": True, "vllm": True, "ollama": False, "lmstudio": False, "transformers": False, "plain": False}


def long(_messages, _tools):
    return Answer(text=LONG)


@pytest.mark.parametrize("dialect, continues", CHUNKS.items())
@pytest.mark.parametrize("kind", ["drop", "close", "stall", "stream_error", "done_without_finish"])
async def test_a_stream_that_breaks_off_ends_in_the_same_answer(simulator, ask, seen, dialect, continues, kind):
    fault = Fault(kind, after=500)
    async with simulator(fault, answer=long, dialect=dialect) as server:
        shown = []
        outcome = await complete(ask(server, show=shown.append, extra={"max_tokens": 4000}))
        assert outcome.text == LONG
        twice = server.stats.decode_tokens - outcome.usage.completion_tokens
    if continues:
        assert twice <= 0.05 * outcome.usage.completion_tokens, "what had come is not computed again"
        assert "".join(shown).strip() == LONG, "nor shown again"
        assert [event.tokens for event in seen if isinstance(event, events.Continued)][0] >= 480
    else:
        assert twice >= 480 and "Continued" not in kinds(seen)


async def test_a_server_that_breaks_off_again_and_again_brings_it_to_an_end_all_the_same(simulator, ask, seen):
    faults = [Fault("close", on=1, times=12, after=60)]
    async with simulator(*faults, answer=long, dialect="llama.cpp") as server:
        outcome = await complete(ask(server, extra={"max_tokens": 4000}))
        assert outcome.text == LONG
        assert server.stats.requests > 4, "more than retry.attempts: each brought it forward"
        assert server.stats.decode_tokens <= 1.2 * outcome.usage.completion_tokens


async def test_attempts_that_bring_nothing_are_counted(simulator, ask):
    async with simulator(Fault("close", times=None, after=3), answer=long, dialect="llama.cpp") as server:
        with pytest.raises(errors.IncompleteStream):
            await complete(ask(server))
    assert server.stats.requests <= 5


@pytest.mark.parametrize(
    "answer", [Answer(text=LONG, reasoning="so " * 300), Answer(tool_name="f", tool_arguments=f'{{"a": "{LONG}"}}')]
)
async def test_thoughts_and_tool_calls_begin_afresh(simulator, ask, seen, answer):
    async with simulator(Fault("drop", after=200), answer=lambda m, t: answer, dialect="llama.cpp") as server:
        outcome = await complete(ask(server, extra={"max_tokens": 4000}))
    assert outcome.text == answer.text and outcome.reasoning == answer.reasoning
    assert "Continued" not in kinds(seen)


async def test_a_server_that_refuses_to_go_on_is_asked_for_all_of_it(ask, seen, monkeypatch):
    async def proves(*_):
        return True

    monkeypatch.setattr(LlamaCpp, "proves", proves)
    refusal = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 37\r\n\r\n" + (
        b'{"error":{"message":"no prefill, sir"}'[:37]
    )
    about = {"/props": {"default_generation_settings": {"n_ctx": 4096}, "build_info": "b11549-x"},
             "/v1/models": {"data": [{"id": "m", "owned_by": "llamacpp"}]}}  # fmt: skip
    beginning = chunk("it begins with words that are not repeated, and there are quite some of them, so that it may go on")
    async with RawServer(beginning, refusal, chunk("all of it", "stop"), beginning, chunk("again", "stop"), about=about) as server:
        assert (await complete(ask(server))).text == "all of it"
        assert kinds(seen).count("Continued") == 1
        assert (await complete(ask(server, "another"))).text == "again"
    assert kinds(seen).count("Continued") == 1, "it is not asked to go on again"


async def test_the_callers_own_limit_holds_for_all_that_is_gone_on_with(simulator, ask):
    machine = Machine(1e6, 200)
    async with simulator(Fault("close", times=None, after=100), machine=machine, answer=long, dialect="llama.cpp", scale=1) as server:
        began = asyncio.get_running_loop().time()
        with pytest.raises(errors.LocalLLMError) as caught:
            await complete(ask(server, extra={"max_tokens": 4000}, call_timeout=1.2))
        assert asyncio.get_running_loop().time() - began < 4
    assert isinstance(caught.value, errors.TotalTimeout)
    assert LONG.startswith(caught.value.partial[:200]) and len(caught.value.partial) > 200


async def test_the_two_parts_make_one_usage(simulator, ask):
    async with simulator(answer=long, dialect="llama.cpp") as server:
        whole = await complete(ask(server, extra={"max_tokens": 4000}, settings={"journal": {"enabled": False}}))
    async with simulator(Fault("drop", after=500), answer=long, dialect="llama.cpp") as server:
        parts = await complete(ask(server, extra={"max_tokens": 4000}, settings={"journal": {"enabled": False}}))
    assert abs(parts.usage.completion_tokens - whole.usage.completion_tokens) <= 2
    assert abs(parts.usage.prompt_tokens - whole.usage.prompt_tokens) <= 2
    assert FAST
