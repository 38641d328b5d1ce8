"""The prompt fits the window that the server has loaded, whatever its tokenizer, and changes only at its end."""

import json
import random
import time

import httpx
import pytest
from conftest import FAST, WORDS, RawServer, chunk

from metagpt_localllm import context, errors, events, servers
from metagpt_localllm.call import Call, complete
from metagpt_localllm.context import prepare, window_is_too_large
from metagpt_localllm.run import Run
from metagpt_localllm.servers import UNKNOWN, Facts
from metagpt_localllm.servers.llama_cpp import LlamaCpp
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.simulator import Answer, Machine
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

WINDOW, WANTED = 2048, 256
SAID = {
    "english": "The quick brown fox jumps over the lazy dog, and nobody knows why it would do so again. ",
    "chinese": "大型语言模型在个人电脑上运行缓慢，因此需要明确的超时与重试。",
    "code": "def f(x):\n    return {x: [i ** 2 for i in range(10)]}\n\n",
    "mixed": "Ошибка 404: {'id': 17, \"名前\": 'ねこ', '🎉': 3.14}\n",
}


def history(kind, turns, seed=0):
    dice = random.Random(seed)
    chat = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "TASK: count the words."}]
    for n in range(turns):
        for role in ("assistant", "user"):
            kinds = list(SAID) if kind == "all" else [kind]
            text = "".join(SAID[dice.choice(kinds)] for _ in range(dice.randint(1, 2)))
            chat.append({"role": role, "content": f"{role} {n}: {text}"})
    return chat


def call(base_url, messages, settings=None, tools=None, max_tokens=WANTED, **options):
    body = {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    if tools:
        body["tools"] = tools
    return Call(Endpoint(base_url, "tiny"), LocalSettings(**FAST, context=settings or {}), body, Caller(), **options)


async def prompt_of(base_url, messages, settings=None, tools=None):
    """The prompt that would be sent, and its tokens by the server's own count."""
    run = Run(call(base_url, messages, settings, tools))
    run.server = (await servers.identify(run.call.endpoint)).server
    prompt = await prepare(run)
    sent = json.loads(prompt.content)["messages"]
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        body = {"messages": sent, **({"tools": tools} if tools else {})}
        counted = (await client.post(base_url + "/chat/completions/input_tokens", json=body)).json()["input_tokens"]
    return prompt, sent, counted


# ------------------------------------------------------------------ real llama.cpp: the truth


@pytest.mark.parametrize("policy", ["oldest", "middle", "observations"])
@pytest.mark.parametrize("kind", [*SAID, "all"])
async def test_a_growing_history_never_exceeds_the_budget_and_keeps_its_beginning(llama_cpp, kind, policy):
    whole = history(kind, 14)
    before, last, steady, used = [], 0, 0, []
    for end in range(4, len(whole) + 1, 2):
        messages = [dict(message) for message in whole[:end]]
        prompt, sent, counted = await prompt_of(llama_cpp, messages, {"policy": policy})
        budget = WINDOW - WANTED
        assert counted <= budget, "never over"
        assert sent[:2] == whole[:2] and sent[-1] == whole[end - 1], "the system, the task and the latest message"
        positions = [next(i for i, one in enumerate(messages) if one["content"][:12] == m["content"][:12]) for m in sent
                     if not m["content"].startswith("[output")]  # fmt: skip
        assert positions == sorted(set(positions)), "in their order"
        if before:
            grew = sent[: len(before)] == before
            steady += grew
            if not grew:
                used.append(last / budget)
        before, last = sent, counted
    assert used, "it was trimmed"
    assert steady >= 2 * len(used) or len(used) <= 2, "between trims it only grows"
    assert min(used) > 0.6, "nothing is thrown away while there is room"


async def test_the_same_history_gives_the_same_bytes(llama_cpp):
    chat = history("all", 14)
    first, _, _ = await prompt_of(llama_cpp, chat)
    again, _, _ = await prompt_of(llama_cpp, [dict(message) for message in chat])
    assert again.content == first.content


async def test_tools_count(llama_cpp):
    tools = [{"type": "function", "function": {"name": "run", "description": "word " * 100, "parameters": {"type": "object"}}}]
    chat = history("english", 12)
    prompt, sent, counted = await prompt_of(llama_cpp, chat, tools=tools)
    assert counted == prompt.tokens <= WINDOW - WANTED and sent[-1] == chat[-1]


async def test_a_long_history_is_not_counted_again_at_each_call(llama_cpp, monkeypatch):
    asked = []
    count = LlamaCpp.count_tokens

    async def counting(self, ask, prompt):
        asked.append(sum(len(message["content"]) for message in prompt["messages"]))
        return await count(self, ask, prompt)

    monkeypatch.setattr(LlamaCpp, "count_tokens", counting)
    chat, calls = history("english", 1), 0
    for n in range(20):
        chat.append({"role": "user", "content": f"{n} " + "word " * 15})
        await complete(call(llama_cpp, chat, max_tokens=8))
        calls += 1
    assert len(asked) < calls / 2


@pytest.mark.parametrize("text", [SAID["english"] * 400, SAID["code"] * 400, "x" * 60_000, SAID["chinese"] * 300])
async def test_a_huge_message_is_cut_so_that_the_window_is_used_well(llama_cpp, text):
    prompt, sent, counted = await prompt_of(llama_cpp, [{"role": "user", "content": "BEGIN " + text + " END"}])
    assert 0.8 * (WINDOW - WANTED) <= counted <= WINDOW - WANTED
    assert sent[0]["content"].startswith("BEGIN") and sent[0]["content"].endswith("END")


# ------------------------------------------------------------------ 200 pages


PAGES = "Chapter 1. It was a dark and stormy night, and the rain fell in torrents on the roofs of the town.\n" * 6000


async def test_two_hundred_pages_are_cut_with_a_clear_line(simulator, ask, seen):
    async with simulator(machine=Machine(1e7, 1e7, context=4096), dialect="llama.cpp") as server:
        began = time.process_time()
        outcome = await complete(ask(server, PAGES))
        own = time.process_time() - began
        small = time.process_time()
        await complete(ask(server, PAGES[: len(PAGES) // 10]))
        small = time.process_time() - small
    assert outcome.text == WORDS and own < 25 * small, "linear"
    (trim, _) = [event for event in seen if isinstance(event, events.Trimmed)]
    assert trim.shortened_messages == 1 and trim.removed_tokens > 90_000 and trim.prompt_tokens <= trim.budget
    assert outcome.trims == [trim]


async def test_two_hundred_pages_are_refused_where_that_is_configured(simulator, ask):
    async with simulator(machine=Machine(1e7, 1e7, context=4096), dialect="llama.cpp") as server:
        with pytest.raises(errors.ContextOverflow) as caught:
            await complete(ask(server, PAGES, {"context": {"oversized": "refuse"}}))
    said = str(caught.value)
    assert server.stats.requests == 0
    assert "context window of 4,096" in said and "--ctx-size" in said and "context.oversized: cut" in said


# ------------------------------------------------------------------ what the server does without a word


@pytest.mark.parametrize("dialect, remedy", [("ollama", "OLLAMA_CONTEXT_LENGTH"), ("lmstudio", "--context-length")])
async def test_a_silent_truncation_ends_in_a_whole_answer_and_a_remedy(simulator, ask, seen, dialect, remedy):
    prompts = []

    def answer(messages, _tools):
        prompts.append(messages)
        return Answer(text=WORDS)

    chat, settings = history("english", 200), {"context": {"window": 16384}}
    machine = Machine(1e6, 1e6, context=2048)
    async with simulator(machine=machine, dialect=dialect, answer=answer, tells_window=False) as server:
        outcome = await complete(ask(server, chat, settings))
        assert outcome.text == WORDS and server.stats.requests in (2, 3)
        assert prompts[-1][0] == chat[0] and prompts[-1][1] == chat[1] and prompts[-1][-1] == chat[-1]
        warnings = [event.detail for event in seen if isinstance(event, events.Retry)]
        assert warnings and all(remedy in said for said in warnings)
        requests = server.stats.requests
        await complete(ask(server, [*chat, {"role": "user", "content": "more"}], settings))
        assert server.stats.requests == requests + 1, "it has learned"


@pytest.mark.parametrize("dialect, remedy", [("ollama", "OLLAMA_CONTEXT_LENGTH"), ("lmstudio", "--context-length")])
async def test_a_window_that_is_not_loaded_is_not_believed(simulator, ask, seen, dialect, remedy):
    chat = history("english", 200)
    async with simulator(machine=Machine(1e6, 1e6, context=2048), dialect=dialect) as server:
        call = ask(server, chat, {"context": {"window": 16384}})
        await complete(call)
        assert server.stats.requests == 1 and server.stats.prefill_tokens <= 1536
    assert remedy in window_is_too_large(call) and "2,048" in window_is_too_large(call)


@pytest.mark.parametrize("dialect", ["ollama", "lmstudio"])
async def test_a_model_that_was_loaded_anew_with_a_far_smaller_context_still_answers(simulator, ask, dialect):
    """LM Studio unloads what idles, and loads it again with its default of 4,096 tokens."""
    async with simulator(machine=Machine(1e6, 1e6, context=16384), dialect=dialect) as server:
        await complete(ask(server))
        server.machine = Machine(1e6, 1e6, context=2048)
        outcome = await complete(ask(server, history("english", 60)))
        assert outcome.text == WORDS and outcome.trims
        assert server.stats.requests <= 4


async def test_a_server_that_counts_otherwise_is_believed_the_second_time(ask, seen):
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 300, "completion_tokens": 3}}\n\n'
    models = {"/v1/models": {"data": [{"id": "m", "owned_by": "library"}]}}  # Ollama behind a proxy
    async with RawServer(chunk("fine", "stop") + usage, about=models) as server:
        chat = history("english", 40)
        assert (await complete(ask(server, chat))).text == "fine"
        assert len(server.requests) == 2
        assert (await complete(ask(server, chat))).text == "fine"
        assert len(server.requests) == 3


async def test_an_empty_answer_to_a_short_prompt_is_no_truncation(simulator, ask):
    async with simulator(dialect="lmstudio", answer=lambda m, t: Answer(text="")) as server:
        assert (await complete(ask(server))).text == ""
    assert server.stats.requests == 1


# ------------------------------------------------------------------ the end of an answer


@pytest.mark.parametrize("size, wanted, cut_by", [(4096, 4, "max_tokens"), (600, 4096, "window")])
async def test_max_tokens_and_the_windows_end_are_told_apart(simulator, ask, seen, size, wanted, cut_by):
    machine = Machine(1e6, 1e6, context=size)
    async with simulator(machine=machine, answer=lambda m, t: Answer(text="word " * 2000)) as server:
        await complete(ask(server, extra={"max_tokens": wanted}))
    assert [event.cut_by for event in seen if isinstance(event, events.Done)] == [cut_by]


# ------------------------------------------------------------------ settings


async def test_compress_type_counts_where_no_policy_is_set(llama_cpp):
    chat = history("english", 14)
    for compress_type, chosen, kept in [
        ("pre_cut_by_msg", {}, 2), ("post_cut_by_msg", {}, -3), ("", {}, -3), ("pre_cut_by_msg", {"policy": "oldest"}, -3),
    ]:  # fmt: skip
        servers.detection._learned.clear()
        run = Run(call(llama_cpp, [*chat, {"role": "user", "content": compress_type + str(chosen)}], chosen, compress_type=compress_type))
        run.server = (await servers.identify(run.call.endpoint)).server
        sent = (await prepare(run)).messages
        assert chat[kept] in sent and len(sent) < len(chat)
        run.history.conversations._kept.clear()


async def test_a_policy_of_the_users_own(llama_cpp, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from metagpt_localllm.policies import Drop\ndef last_first(turns, room):\n    return map(Drop, reversed(turns))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    chat = history("english", 14)
    _, sent, _ = await prompt_of(llama_cpp, chat, {"policy": "mine:last_first"})
    assert sent[:6] == chat[:6] and sent[-1] == chat[-1]


async def test_more_context_gives_back_what_was_cut(llama_cpp):
    chat = history("english", 14)
    endpoint = Endpoint(llama_cpp, "tiny")
    first = Run(call(llama_cpp, chat))
    first.server = LlamaCpp(Facts(window=1024))
    assert (await prepare(first)).changed
    second = Run(call(llama_cpp, [*chat, {"role": "assistant", "content": "ok"}]))
    second.server = LlamaCpp(Facts(window=1 << 20))
    assert not (await prepare(second)).changed
    assert endpoint.model == "tiny" and UNKNOWN.facts.window is None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "=" * 9000 + "\n" + "-" * 9000},
        {"role": "assistant", "content": "<think>" + "so it is. " * 900 + "</think>yes"},
        {"role": "assistant", "content": "yes", "reasoning_content": "so it is. " * 900},
        {"role": "assistant", "content": "| 1 | 2 | 3 |\n" * 500},
    ],
)
async def test_a_good_answer_is_never_taken_for_one_to_a_part(ask, seen, message):
    # What vocabularies have long runs of, and templates leave out: Ollama counts far less than we estimate.
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 400, "completion_tokens": 3}}\n\n'
    models = {"/v1/models": {"data": [{"id": "m", "owned_by": "library"}]}}
    async with RawServer(chunk("fine", "stop") + usage, about=models) as server:
        settings = {"context": {"window": 32768}}
        for n in range(3):
            chat = [{"role": "user", "content": f"the task {n}"}, message, {"role": "user", "content": "go on"}]
            assert (await complete(ask(server, chat, settings))).text == "fine"
    assert len(server.requests) == 3 and not any(isinstance(event, events.Trimmed) for event in seen)


async def test_one_empty_answer_costs_no_context(ask):
    loaded = {"models": [{"key": "m", "loaded_instances": [{"id": "m", "config": {"context_length": 8192}}]}]}
    about = {"/v1/models": {"data": [{"id": "m", "owned_by": "organization_owner"}]}, "/api/v1/models": loaded}
    chat = [{"role": "user", "content": "a word " * 2000}]
    async with RawServer(b"data: [DONE]\n\n", chunk("fine", "stop"), about=about) as server:
        call = ask(server, chat)
        assert (await complete(call)).text == "fine"
    assert server.requests[0] == server.requests[1] and servers.learned(call.endpoint).window is None


async def test_a_count_that_cannot_be_teaches_nothing(ask):
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 1000000000, "completion_tokens": 3}}\n\n'
    async with RawServer(chunk("fine", "stop") + usage, about={"/v1/models": {"data": [{"id": "m"}]}}) as server:
        for _ in range(3):
            assert (await complete(ask(server, "hello", {"context": {"window": 4096}}))).text == "fine"


async def test_a_window_that_was_learned_may_grow(ask, monkeypatch):
    monkeypatch.setattr(context, "_ASK_AGAIN", 0.0)
    entry = {"name": "m", "model": "m", "context_length": 2048, "size": 1, "size_vram": 1}
    about = {"/v1/models": {"data": [{"id": "m", "owned_by": "library"}]}, "/api/version": {"version": "0.33.0"},
             "/api/ps": {"models": [entry]}}  # fmt: skip
    chat = history("english", 60)
    async with RawServer(chunk("fine", "stop"), about=about) as server:
        servers.learned(ask(server, chat).endpoint).window = 2048
        await complete(ask(server, chat))
        small = len(server.requests[0])
        entry["context_length"] = 32768
        await complete(ask(server, chat))
    assert len(server.requests[1]) > 2 * small
