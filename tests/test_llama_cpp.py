"""Real llama.cpp."""

import pytest

from metagpt_localllm import events, servers
from metagpt_localllm.call import Call, complete
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.tokens import estimate_prompt
from metagpt_localllm.transport import Endpoint


def call(base_url, messages, max_tokens=20):
    body = {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return Call(Endpoint(base_url, "tiny"), LocalSettings(), body, Caller())


async def test_it_is_recognized_with_its_window(llama_cpp):
    identified = await servers.identify(Endpoint(llama_cpp, "tiny"))
    assert (identified.server.name, identified.server.facts.window) == ("llama.cpp", 2048)
    assert not identified.hung


async def test_an_answer_with_the_servers_own_usage(llama_cpp):
    outcome = await complete(call(llama_cpp, [{"role": "user", "content": "hello"}]))
    assert outcome.text.strip() and outcome.usage.completion_tokens == 20
    assert outcome.completion.choices[0].finish_reason == "length"
    assert outcome.completion.model_extra["timings"]["predicted_n"] == 20


async def test_a_long_chat_is_fitted_to_what_the_server_counts(llama_cpp):
    chat = [{"role": "system", "content": "be brief"}]
    chat += [{"role": "user", "content": f"question {n}: " + "the cat is on the mat; " * 40} for n in range(10)]
    seen = []
    unsubscribe = events.subscribe(seen.append)
    try:
        outcome = await complete(call(llama_cpp, chat, 4096))
    finally:
        unsubscribe()
    assert any(isinstance(event, events.Trimmed) for event in seen)
    assert not any(isinstance(event, events.Retry) for event in seen), "the server must not have refused it"
    assert outcome.usage.prompt_tokens + outcome.usage.completion_tokens <= 2048


@pytest.mark.parametrize(
    "text", ["A short sentence of plain English.", "def f(x):\n    return {x: [i ** 2 for i in range(10)]}\n" * 5, "你好，世界。" * 30]
)
async def test_its_own_count_agrees_with_its_usage(llama_cpp, text):
    messages = [{"role": "user", "content": text}]
    endpoint = Endpoint(llama_cpp, "tiny")
    identified = await servers.identify(endpoint)
    counted = await servers.count_tokens(identified.server, endpoint, {"model": "tiny", "messages": messages})
    outcome = await complete(call(llama_cpp, messages))
    assert counted == outcome.usage.prompt_tokens
    assert estimate_prompt(messages) > 0
