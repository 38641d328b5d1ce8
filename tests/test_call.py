"""One call against a server that misbehaves, over real sockets."""

import asyncio
import time

import openai
import pytest
from conftest import WORDS, kinds

from metagpt_localllm import errors, events
from metagpt_localllm.call import complete
from metagpt_localllm.simulator import Answer, Fault, Machine


@pytest.mark.parametrize("dialect", ["llama.cpp", "ollama", "lmstudio", "vllm", "plain"])
async def test_a_whole_answer_from_every_server(simulator, ask, dialect):
    async with simulator(dialect=dialect) as server:
        outcome = await complete(ask(server))
    assert outcome.text == WORDS
    assert outcome.completion.choices[0].finish_reason == "stop"
    assert outcome.usage.completion_tokens == outcome.completion.usage.completion_tokens > 0
    assert server.requests[0]["stream"] is True
    assert ("return_progress" in server.requests[0]) == (dialect == "llama.cpp")


@pytest.mark.parametrize(
    "kind",
    ["hang", "hang_after_headers", "keepalive_only", "stall", "drop", "close", "done_without_finish", "stream_error",
     "empty", "busy", "error", "html", "reset"],
)  # fmt: skip
async def test_a_fault_on_the_first_attempt_ends_in_a_whole_answer_on_the_second(simulator, ask, seen, kind):
    async with simulator(Fault(kind, retry_after=0.01)) as server:
        outcome = await complete(ask(server))
    assert outcome.text == WORDS
    assert server.stats.requests == 2
    assert server.raw_requests[0] == server.raw_requests[1], "a retry must be byte-identical"
    assert kinds(seen) == ["Sent", "Retry", "Sent", "Done"]


@pytest.mark.parametrize("kind", ["no_done", "no_usage"])
async def test_an_answer_is_whole_once_its_finish_reason_was_seen(simulator, ask, kind):
    async with simulator(Fault(kind)) as server:
        outcome = await complete(ask(server))
    assert outcome.text == WORDS and server.stats.requests == 1
    assert outcome.usage.prompt_tokens > 0 and outcome.usage.completion_tokens > 0


@pytest.mark.parametrize(
    "kind, error, caught_as, setting",
    [
        ("hang", errors.FirstTokenTimeout, openai.APITimeoutError, "llm.local.timeouts.first_token"),
        ("keepalive_only", errors.FirstTokenTimeout, openai.APITimeoutError, "llm.local.timeouts.first_token"),
        ("stall", errors.StreamStalled, openai.APITimeoutError, "llm.local.timeouts.stall"),
        ("close", errors.IncompleteStream, openai.APIConnectionError, "llm.local.retry.attempts"),
        ("drop", errors.IncompleteStream, openai.APIConnectionError, "llm.local.retry.attempts"),
        ("error", errors.ServerFailed, openai.InternalServerError, "llm.local.retry.attempts"),
    ],
)
async def test_a_lasting_fault_ends_in_an_error_that_says_what_to_do(simulator, ask, kind, error, caught_as, setting):
    async with simulator(Fault(kind, times=None)) as server:
        with pytest.raises(error) as caught:
            await complete(ask(server, settings={"retry": {"attempts": 2, "backoff": {"initial": 0, "max": 0}}}))
    assert isinstance(caught.value, caught_as) and isinstance(caught.value, errors.LocalLLMError)
    message = str(caught.value)
    assert server.stats.requests == 2
    assert setting in message and "attempt 2 of 2" in message and "tier 'default'" in message
    if kind in ("stall", "close"):
        assert caught.value.partial and WORDS.startswith(caught.value.partial)
    if kind == "keepalive_only":
        assert "keep-alive comments" in message


async def test_total_ends_an_attempt_whose_tokens_keep_coming(simulator, ask):
    machine = Machine(prefill_speed=1e6, decode_speed=10)
    settings = {"timeouts": {"first_token": 1, "stall": 1, "total": 1}, "retry": {"attempts": 1}}
    async with simulator(machine=machine, scale=1, answer=lambda m, t: Answer(text="word " * 100)) as server:
        with pytest.raises(errors.TotalTimeout, match=r"timeouts\.total"):
            await complete(ask(server, settings=settings))


async def test_the_callers_own_timeout_caps_the_whole_call(simulator, ask):
    async with simulator(Fault("hang", times=None)) as server:
        with pytest.raises(errors.TotalTimeout, match="caller"):
            await complete(ask(server, call_timeout=0.7))
        assert server.stats.requests == 1


async def test_llm_timeout_caps_one_attempt_and_is_named(simulator, ask):
    async with simulator(Fault("hang", times=None)) as server:
        with pytest.raises(errors.LocalLLMError, match=r"llm\.timeout"):
            await complete(ask(server, attempt_cap=0.5, settings={"retry": {"attempts": 1}}))


async def test_prefill_progress_keeps_a_slow_prompt_alive(simulator, ask):
    machine = Machine(prefill_speed=200, decode_speed=1e6, batch=50)
    settings = {"timeouts": {"first_token": 1, "stall": 1, "total": 20}, "retry": {"attempts": 1}}
    async with simulator(machine=machine, scale=1) as server:
        outcome = await complete(ask(server, "word " * 400, settings))
    assert outcome.text == WORDS and outcome.usage.prompt_tokens > 300


async def test_a_loading_server_is_waited_for_without_spending_an_attempt(simulator, ask, seen):
    settings = {"retry": {"attempts": 1, "backoff": {"initial": 0.05, "max": 1}}}
    async with simulator(machine=Machine(1e6, 1e6, load_time=500), scale=1000) as server:
        outcome = await complete(ask(server, settings=settings))
    assert outcome.text == WORDS
    assert kinds(seen) == ["Sent", "Loading", "Sent", "Done"]


async def test_a_server_that_is_not_up_yet_is_waited_for(simulator, ask, seen):
    server = simulator()
    async with server:
        pass  # it has its port now, and is down
    settings = {"retry": {"attempts": 1, "backoff": {"initial": 0.05, "max": 1}, "wait_for_server": 20}}
    call = asyncio.create_task(complete(ask(server, settings=settings)))
    await asyncio.sleep(0.4)
    assert not call.done()
    async with server:
        assert (await call).text == WORDS
    assert "Waiting" in kinds(seen)


async def test_a_server_that_never_comes_up_is_given_up_and_named(simulator, ask):
    server = simulator()
    async with server:
        pass
    with pytest.raises(errors.ServerUnavailable, match=r"wait_for_server") as caught:
        await complete(ask(server, settings={"retry": {"wait_for_server": 0.3, "backoff": {"initial": 0.05, "max": 1}}}))
    assert isinstance(caught.value, openai.APIConnectionError)


async def test_a_wrong_key_fails_at_once_and_is_never_shown(simulator, ask):
    async with simulator(api_key="right") as server:
        with pytest.raises(openai.AuthenticationError, match=r"llm\.api_key") as caught:
            await complete(ask(server, api_key="wrong-secret"))
        assert server.paths.count("/v1/chat/completions") == 1
        assert (await complete(ask(server, api_key="right"))).text == WORDS
    assert "wrong-secret" not in str(caught.value) + repr(caught.value.__dict__)


async def test_a_prompt_too_long_is_trimmed_to_the_servers_own_count(simulator, ask, seen):
    chat = [{"role": "system", "content": "be brief"}]
    chat += [{"role": "user", "content": f"message {n} " + "lorem ipsum " * 100} for n in range(12)]
    async with simulator(machine=Machine(1e6, 1e6, context=1500)) as server:
        outcome = await complete(ask(server, chat))
    sent = server.requests[0]
    assert outcome.text == WORDS and server.stats.requests == 1
    assert sent["messages"][0] == chat[0] and sent["messages"][-1] == chat[-1]
    assert sent["max_tokens"] + outcome.usage.prompt_tokens <= 1500
    trimmed = next(event for event in seen if isinstance(event, events.Trimmed))
    assert trimmed.dropped_messages == len(chat) - len(sent["messages"]) > 0


@pytest.mark.parametrize("too_long", ["refused", "reported"])
async def test_an_overflow_teaches_the_window_and_is_sent_once_more(simulator, ask, too_long):
    # A server that does not say how large its window is until it is exceeded.
    machine = Machine(1e6, 1e6, context=1000)
    async with simulator(dialect="lmstudio", machine=machine, too_long=too_long, tells_window=False) as server:
        settings = {"context": {"window": 8000}}
        outcome = await complete(ask(server, "first. " + "lorem ipsum dolor " * 300 + " last.", settings))
    assert outcome.text == WORDS and server.stats.requests == 2
    content = server.requests[1]["messages"][0]["content"]
    assert content.startswith("first.") and content.endswith("last.") and "left out here" in content


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_sent(simulator, ask):
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}] * 4}]
    async with simulator(dialect="plain") as server:
        with pytest.raises(errors.ContextOverflow, match=r"context\.window") as caught:
            await complete(ask(server, chat, {"context": {"window": 4096}}))
        assert isinstance(caught.value, openai.BadRequestError) and server.stats.requests == 0
        # A window that nobody has named is no reason to refuse: the server may hold more.
        assert (await complete(ask(server, chat))).text == WORDS


async def test_tool_calls_and_reasoning_are_put_together(simulator, ask):
    answer = Answer(reasoning="let me think", tool_name="execute", tool_arguments='{"code": "print(1)"}')
    tools = [{"type": "function", "function": {"name": "execute"}}]
    async with simulator(answer=lambda m, t: answer) as server:
        outcome = await complete(ask(server, extra={"tools": tools}))
    call = outcome.completion.choices[0].message.tool_calls[0].function
    assert (call.name, call.arguments) == ("execute", '{"code": "print(1)"}')
    assert outcome.completion.choices[0].finish_reason == "tool_calls"
    assert outcome.reasoning == "let me think" and outcome.text == ""


async def test_cancelling_closes_the_connection_so_that_the_server_stops(simulator, ask):
    machine = Machine(prefill_speed=1e6, decode_speed=5)
    async with simulator(machine=machine, scale=1, answer=lambda m, t: Answer(text="word " * 500)) as server:
        call = asyncio.create_task(complete(ask(server)))
        while server.stats.decode_tokens < 2:
            await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        end = time.monotonic() + 10
        while not server.stats.cancelled and time.monotonic() < end:
            await asyncio.sleep(0.05)
    assert server.stats.cancelled == 1


async def test_many_calls_at_once_keep_apart(simulator, ask):
    def echo(messages, _tools):
        return Answer(text=messages[-1]["content"])

    async with simulator(machine=Machine(1e6, 1e6, slots=4), answer=echo) as server:
        texts = [f"question number {n}" for n in range(20)]
        outcomes = await asyncio.gather(*(complete(ask(server, text)) for text in texts))
    assert [outcome.text for outcome in outcomes] == texts


async def test_a_tier_gives_its_own_deadlines_and_is_named(simulator, ask):
    settings = {"tiers": [{"name": "coding", "match": {"action": "WriteC*"}, "first_token": 0.4}], "retry": {"attempts": 1}}
    async with simulator(Fault("hang_after_headers", times=None)) as server:
        with pytest.raises(errors.FirstTokenTimeout, match=r"tiers\[coding\]\.first_token"):
            await complete(ask(server, settings=settings))


async def test_what_a_subscriber_does_wrong_harms_no_call(simulator, ask):
    def broken(_event):
        raise RuntimeError("a bug of a user interface")

    unsubscribe = events.subscribe(broken)
    try:
        async with simulator() as server:
            assert (await complete(ask(server))).text == WORDS
    finally:
        unsubscribe()
