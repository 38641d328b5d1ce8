"""What every server is held to, simulated or real: each check takes an endpoint and what its kind promises."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Optional

import httpx

from metagpt_localllm import servers
from metagpt_localllm.answer import Answer, may_continue
from metagpt_localllm.call import Call, complete
from metagpt_localllm.servers.base import Ask, Timings
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

#: A few hundred tokens.
LONG = "the cat is on the mat and it was not for him; " * 30


@dataclass(frozen=True)
class Promise:
    """What a kind promises.

    Attributes:
        name: of the kind.
        facts: as they must be.
        counts: it counts as it bills.
        progress: the prefill shows in its stream.
        usage: its stream tells token counts.
        cached: its stream tells the tokens that came from the cache.
        clock: its stream tells seconds.
        work: it shows its work while it runs.
        continues: "repeats" the beginning where the answer is not streamed, gives "new" text only, or "".
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    counts: bool = False
    progress: bool = False
    usage: bool = True
    cached: bool = False
    clock: bool = False
    work: bool = False
    continues: str = ""


def endpoint_of(base_url, model):
    return Endpoint(base_url, model)


def body_for(endpoint, text="hello", max_tokens=20, **more):
    messages = [{"role": "user", "content": text}]
    return {"model": endpoint.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}


async def post(endpoint, body):
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        response = await client.post(endpoint.chat_url, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def read_stream(endpoint, body):
    """The chunks, the comments (without colon) and the text of a streamed answer."""
    chunks, comments = [], []
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        async with client.stream("POST", endpoint.chat_url, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith(":"):
                    comments.append(line[1:].encode())
                elif line.startswith("data: ") and line != "data: [DONE]":
                    chunks.append(json.loads(line[6:]))
    texts = [c["choices"][0].get("delta", {}).get("content") or "" for c in chunks if c["choices"]]
    return chunks, comments, "".join(texts)


async def identified(endpoint, named="auto"):
    return (await servers.identify(endpoint, named)).server


async def is_recognized_with_its_facts(endpoint, promise):
    server = await identified(endpoint)
    assert server.name == promise.name
    assert {key: getattr(server.facts, key) for key in promise.facts} == promise.facts


async def gives_a_whole_answer(endpoint, promise):
    outcome = await complete(Call(endpoint, LocalSettings(), body_for(endpoint), Caller()))
    assert outcome.text.strip() and outcome.completion.choices[0].finish_reason in ("stop", "length")
    assert outcome.usage.prompt_tokens > 0 and outcome.usage.completion_tokens > 0


async def counts_as_it_bills(endpoint, promise):
    server = await identified(endpoint)
    for text in ("hello", LONG, "def f(x):\n    return {x: [i ** 2 for i in range(10)]}\n", "你好，世界。"):
        counted = await servers.count_tokens(server, endpoint, body_for(endpoint, text))
        if not promise.counts:
            assert counted is None
            continue
        assert counted == (await post(endpoint, body_for(endpoint, text, 2)))["usage"]["prompt_tokens"]


async def takes_its_extras_and_shows_its_prefill(endpoint, promise):
    server = await identified(endpoint)
    chunks, comments, text = await read_stream(endpoint, {**body_for(endpoint, LONG), **server.extras()})
    assert text.strip()
    seen = [*map(server.progress, chunks), *map(server.progress_of_comment, comments)]
    seen = [progress for progress in seen if progress is not None]
    assert bool(seen) == promise.progress
    processed = [progress.processed for progress in seen]
    assert processed == sorted(processed)
    assert all(progress.total and progress.processed <= progress.total for progress in seen)


async def tells_its_times(endpoint, promise):
    server = await identified(endpoint)
    await post(endpoint, body_for(endpoint, "the cat sat. " + LONG))
    chunks, _, _ = await read_stream(endpoint, {**body_for(endpoint, "the cat sat. " + LONG), **server.extras()})
    told = [server.timings(chunk) for chunk in chunks if chunk.get("usage") or chunk.get("timings")]
    assert any(chunk.get("usage") for chunk in chunks) == promise.usage
    last = told[-1] if told else Timings()
    assert (last.cached_tokens is not None) == promise.cached
    if promise.cached:
        assert last.cached_tokens > 100, "the second time comes from the cache"
    assert (last.prefill is not None and last.decode is not None) == promise.clock


async def shows_its_work_or_is_left_alone(endpoint, promise, pause=0.2, max_tokens=20):
    server = await identified(endpoint)
    assert server.watchable or not promise.work
    if not promise.work:
        return
    markers, ask = [], Ask(endpoint)
    running = asyncio.ensure_future(post(endpoint, body_for(endpoint, LONG, max_tokens)))
    while not running.done():
        work = await server.work(ask)
        if work is not None and work.busy:
            markers.append(work.marker)
        await asyncio.sleep(pause)
    await running
    assert len(set(markers)) > 1, markers
    assert not (await server.work(ask)).busy


async def continues_where_it_can(endpoint, promise):
    server = await identified(endpoint)
    body = body_for(endpoint)
    whole = (await post(endpoint, body))["choices"][0]["message"]["content"]
    partial = whole[: whole.index(" ", len(whole) // 2)]
    request: Optional[dict] = server.continuation(body, partial)
    assert (request is not None) == bool(promise.continues)
    if request is None:
        return
    for streamed in (False, True):
        if streamed:
            _, _, text = await read_stream(endpoint, {**request, **server.extras()})
        else:
            text = (await post(endpoint, request))["choices"][0]["message"]["content"]
        assert text.startswith(partial) == (promise.continues == "repeats" and not streamed)
        joined = text if text.startswith(partial) else partial + text
        assert joined.startswith(whole)


async def joins_a_cut_answer_to_what_it_would_have_been(endpoint, promise):
    server = await identified(endpoint)
    body = body_for(endpoint, max_tokens=60)
    chunks, _, text = await read_stream(endpoint, {**body, **server.extras()})
    whole = Answer()
    for chunk in chunks:
        whole.add(chunk)
    joined = 0
    for cut in range(len(chunks)):
        first = Answer()
        shown = "".join([first.add(chunk)[1] for chunk in chunks[:cut]])
        if first.finish_reason is not None or not may_continue(first.partial, server.repeats):
            continue
        if first.tokens >= 60:
            break
        assert first.continuable
        request = await servers.continuation(server, endpoint, body, first.partial, first.partial_tokens)
        assert (request is not None) == bool(promise.continues)
        if request is None:
            return
        second = Answer.begun(first.partial, first.partial_tokens, server.repeats, shown)
        for chunk in (await read_stream(endpoint, {**request, **server.extras()}))[0]:
            shown += second.add(chunk)[1]
        assert (second.content, shown, second.finish_reason) == (text, text, whole.finish_reason)
        assert not second.restarted and second.tokens == whole.tokens
        if whole.usage:
            for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert second.usage[key] == whole.usage[key]
        joined += 1
    assert joined or not promise.continues


async def is_taken_for_what_the_user_says(endpoint, promise):
    server = await identified(endpoint, promise.name)
    assert server.name == promise.name


CHECKS = (
    is_recognized_with_its_facts,
    gives_a_whole_answer,
    counts_as_it_bills,
    takes_its_extras_and_shows_its_prefill,
    tells_its_times,
    shows_its_work_or_is_left_alone,
    continues_where_it_can,
    joins_a_cut_answer_to_what_it_would_have_been,
    is_taken_for_what_the_user_says,
)
