"""Each kind of server against its dialect of the simulator: one contract for all, and the traps of each."""

import asyncio
import json

import httpx
import pytest
from conftest import RawServer, chunk
from contract import (
    CHECKS,
    Promise,
    body_for,
    endpoint_of,
    identified,
    joins_a_cut_answer_to_what_it_would_have_been,
    post,
    read_stream,
    shows_its_work_or_is_left_alone,
)

from metagpt_localllm import servers
from metagpt_localllm.call import complete
from metagpt_localllm.servers import KINDS
from metagpt_localllm.servers.base import Ask, Facts, Progress
from metagpt_localllm.servers.llama_cpp import LlamaCpp
from metagpt_localllm.servers.mlx_lm import MLXLM
from metagpt_localllm.servers.vllm import VLLM
from metagpt_localllm.simulator import DIALECTS, Answer, Machine

LLAMA_CPP = {"window": 4096, "slots": 1, "images": False, "loaded": True, "quantization": "Q4_K - Medium"}
SHOWS_ALL = {"counts": True, "progress": True, "cached": True, "clock": True, "work": True}
SHOWS_ALL["continues"] = "repeats"
PROMISES = {
    "llama.cpp": Promise("llama.cpp", {**LLAMA_CPP, "largest_window": 16384}, **SHOWS_ALL),
    "llama.cpp-router": Promise("llama.cpp", {**LLAMA_CPP, "largest_window": 16384}, **SHOWS_ALL),
    "llama-swap": Promise("llama-swap", LLAMA_CPP, **SHOWS_ALL),
    "ollama": Promise(
        "ollama",
        {"window": 4096, "largest_window": 16384, "quantization": "Q4_K_M", "gpu_share": 0.5, "images": False,
         "loaded": True, "version": "0.33.0", "slots": None},
    ),
    "lmstudio": Promise(
        "lmstudio",
        {"window": 4096, "largest_window": 16384, "quantization": "Q4_K_M", "slots": 1, "images": False, "loaded": True},
        cached=True,
    ),
    "vllm": Promise("vllm", {"window": 4096, "loaded": True, "slots": None}, counts=True, continues="new"),
    "ray-serve": Promise("ray-serve", {"window": 4096, "slots": None}, counts=True, continues="new"),
    "sglang": Promise("sglang", {"window": 4096, "loaded": True}, continues="new"),
    "tabbyapi": Promise(
        "tabbyapi", {"window": 4096, "largest_window": 16384, "slots": 1, "images": False, "loaded": True}, continues="new"
    ),
    "llama-cpp-python": Promise("llama-cpp-python", {"window": None, "slots": 1, "loaded": True}, usage=False),
    "litellm": Promise("litellm", {"window": 4096, "slots": 1, "loaded": None}, cached=True),
    "mlx-lm": Promise("mlx-lm", {"window": None, "loaded": True}, progress=True, cached=True),
    "transformers": Promise("transformers", {"window": None, "loaded": None}),
    "plain": Promise("plain", {"window": None}, cached=True),
}  # fmt: skip
FAST = Machine(prefill_speed=1e6, decode_speed=1e6, batch=64)
LINES = "A dog barks.\n\nThe snake:\n    eats (an apple) ...\n" * 3 + "6 \U0001f600 like \u4f60\u597d\u3002\n\n" + "x" * 40


def long(_messages, _tools):
    return Answer(text=LINES)


SLOW = Machine(prefill_speed=1500, decode_speed=60, batch=64)


def test_every_kind_has_a_dialect_and_every_dialect_a_promise():
    assert set(PROMISES) == set(DIALECTS)
    assert {promise.name for promise in PROMISES.values()} == {kind.name for kind in KINDS} | {"plain"}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_server_keeps_the_contract(simulator, dialect, check):
    slow = check is shows_its_work_or_is_left_alone
    more = {"answer": long} if check is joins_a_cut_answer_to_what_it_would_have_been else {}
    async with simulator(dialect=dialect, machine=SLOW if slow else FAST, scale=1 if slow else 1000, **more) as server:
        await check(endpoint_of(server.base_url, server.model), PROMISES[dialect])
        if dialect == "llama-cpp-python":
            asked = [path for path in server.paths if not path.endswith("/chat/completions")]
            assert asked in ([], ["/v1/models"]), "a second question would cut a stream"
    for request in server.requests:
        assert not {"num_ctx", "options", "keep_alive"} & set(request)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_real_llama_cpp_keeps_the_contract(llama_cpp, check):
    facts = {"window": 2048, "largest_window": 16384, "loaded": True, "images": False}
    more = {"max_tokens": 1200} if check is shows_its_work_or_is_left_alone else {}
    await check(endpoint_of(llama_cpp, "tiny"), Promise("llama.cpp", facts, **SHOWS_ALL), **more)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_server_answers_at_the_first_request(simulator, ask, dialect):
    async with simulator(dialect=dialect) as server:
        await complete(ask(server))
    assert len(server.requests) == 1
    assert ("stream_options" in server.requests[0]) == (dialect not in ("llama-cpp-python", "transformers"))


@pytest.mark.parametrize("name", ["auto", *(kind.name for kind in KINDS)])
async def test_a_server_behind_a_proxy_that_knows_only_chats_answers_all_the_same(ask, name):
    async with RawServer(chunk("hi") + chunk(finish="stop")) as proxy:
        outcome = await complete(ask(proxy, settings={"server": name}))
        server = await identified(ask(proxy).endpoint)
    assert outcome.text == "hi"
    assert server.name == ("llama-cpp-python" if name == "llama-cpp-python" else "plain")


# ------------------------------------------------------------------------------------------ llama-cpp-python


async def test_llama_cpp_python_is_found_by_one_question(simulator):
    async with simulator(dialect="llama-cpp-python") as server:
        await identified(endpoint_of(server.base_url, server.model))
    assert server.paths == ["/v1/models"]


async def test_llama_cpp_python_is_never_asked_anything_when_the_user_names_it(simulator, ask):
    async with simulator(dialect="llama-cpp-python") as server:
        await complete(ask(server, settings={"server": "llama-cpp-python"}))
    assert server.paths == ["/v1/chat/completions"]


async def test_llama_cpp_python_is_not_asked_again_while_an_answer_may_run(simulator):
    async with simulator(dialect="llama-cpp-python") as server:
        endpoint = endpoint_of(server.base_url, server.model)
        await identified(endpoint)
        servers.forget(endpoint)
        await identified(endpoint)
        await identified(endpoint_of(server.base_url, "another"))
        assert server.paths == ["/v1/models"]
        servers.forget(endpoint, restarted=True)
        await identified(endpoint)
        assert server.paths == ["/v1/models"] * 2


async def test_llama_cpp_python_cuts_its_stream_for_any_second_request(simulator):
    async with simulator(dialect="llama-cpp-python", machine=SLOW, scale=1) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        stream = asyncio.ensure_future(read_stream(endpoint, body_for(endpoint, max_tokens=500)))
        await asyncio.sleep(0.3)
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(server.base_url + "/models")
        with pytest.raises(httpx.RemoteProtocolError):
            await stream


async def test_a_prompt_over_the_usual_window_of_llama_cpp_python_is_trimmed_before_it_is_sent(simulator, ask):
    chat = [{"role": "user", "content": f"question {n}: " + "the cat is on the mat; " * 40} for n in range(20)]
    async with simulator(dialect="llama-cpp-python", machine=Machine(1e6, 1e6, context=2048)) as server:
        await complete(ask(server, chat))
    assert len(server.requests) == 1 and len(server.requests[0]["messages"]) < 20


# ------------------------------------------------------------------------------------------ transformers


async def test_transformers_refuses_fields_it_does_not_know(simulator):
    async with simulator(dialect="transformers") as server:
        endpoint = endpoint_of(server.base_url, server.model)
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.post(endpoint.chat_url, json=body_for(endpoint, return_progress=True))
    assert response.status_code == 422


async def test_transformers_is_found_even_when_it_cannot_list_its_models():
    described = {"paths": {"/load_model": {}}}
    async with _Picky({"/v1/models": 500, "/openapi.json": described}, "uvicorn") as server:
        found = await identified(endpoint_of(server.base_url, "m"))
    assert found.name == "transformers" and dict(found.extras()) == {}


async def test_mlx_lm_is_found_by_its_software_even_when_its_list_is_empty():
    async with _Picky({"/v1/models": b"", "/health": {"status": "ok"}}, "BaseHTTP/0.6 Python/3.11.7") as server:
        assert (await identified(endpoint_of(server.base_url, "m"))).name == "mlx-lm"
    async with _Picky({"/v1/models": b"", "/health": {"status": "ok"}}, "nginx") as server:
        assert (await identified(endpoint_of(server.base_url, "m"))).name == "plain"


@pytest.mark.parametrize("comment, progress", [(b" keepalive 9/10", Progress(9, 10)), (b"keepalive 0/3", Progress(0, 3)), (b" keep-alive", None),
                                                (b" ping - 2026-01-01", None), (b"", None)])  # fmt: skip
def test_only_mlx_lms_own_comments_are_progress(comment, progress):
    kind = servers.kind_named("mlx-lm")
    assert kind().progress_of_comment(comment) == progress
    assert servers.kind_named("plain")().progress_of_comment(comment) is None


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("dialect", ["ollama", "lmstudio"])
async def test_a_model_is_loaded_before_it_is_asked(simulator, dialect):
    machine = Machine(1e6, 1e6, load_time=0.5)
    async with simulator(dialect=dialect, machine=machine, scale=1) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        first = await identified(endpoint)
        assert first.facts.loaded is False and first.facts.window is None
        await first.load(Ask(endpoint), server.model)
        second = await identified(endpoint)
        assert second.facts.loaded is True and second.facts.window == 4096
        before = list(server.paths)
        await second.load(Ask(endpoint), server.model)
        assert server.paths == before, "it is loaded already"


async def test_ollama_loses_the_load_when_the_client_leaves_during_it(simulator):
    async with simulator(dialect="ollama", machine=Machine(1e6, 1e6, load_time=1), scale=1) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(post(endpoint, body_for(endpoint)), 0.4)
        await asyncio.sleep(0.1)
        assert (await identified(endpoint)).facts.loaded is False
        await (await identified(endpoint)).load(Ask(endpoint), server.model)
        await asyncio.wait_for(post(endpoint, body_for(endpoint)), 0.4)


async def test_ollama_is_asked_to_load_with_nothing_that_would_load_it_again(simulator, monkeypatch):
    asked = []
    async with simulator(dialect="ollama", machine=Machine(1e6, 1e6, load_time=0.1), scale=1) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        found = await identified(endpoint)
        plain = Ask.json

        async def spy(self, path, body=None):
            asked.append((path, body))
            return await plain(self, path, body)

        monkeypatch.setattr(Ask, "json", spy)
        await found.load(Ask(endpoint), server.model)
    [(path, body)] = asked
    assert path == "/api/generate" and set(body) == {"model", "keep_alive"}


@pytest.mark.parametrize("dialect", ["ollama", "llama-swap", "llama.cpp-router", "lmstudio"])
async def test_a_model_that_is_being_loaded_counts_as_work(simulator, dialect):
    async with simulator(dialect=dialect, machine=Machine(1e6, 1e6, load_time=0.6), scale=1) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        found = await identified(endpoint)
        assert found.facts.loaded is False
        chat = asyncio.ensure_future(post(endpoint, body_for(endpoint)))
        await asyncio.sleep(0.2)
        looks = [await found.work(Ask(endpoint))]
        await asyncio.sleep(0.1)
        looks.append(await found.work(Ask(endpoint)))
        await chat
    assert all(look.busy and look.loading for look in looks)
    if dialect == "ollama":
        assert looks[0].marker != looks[1].marker


@pytest.mark.parametrize("dialect", ["llama-swap", "llama.cpp-router"])
async def test_nothing_is_asked_of_a_model_that_another_would_have_to_leave_for(simulator, dialect):
    async with simulator(dialect=dialect, machine=Machine(1e6, 1e6, load_time=0.2), scale=1) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        found = await identified(endpoint)
        await servers.count_tokens(found, endpoint, body_for(endpoint))
        await found.work(Ask(endpoint))
        assert not any(path.startswith("/upstream") or path.endswith("input_tokens") for path in server.paths)
        await post(endpoint, body_for(endpoint))
        assert (await identified(endpoint)).facts.window == 4096, "it is asked again until it is loaded"


async def test_the_routers_questions_about_a_model_forbid_it_to_load_the_model(simulator, monkeypatch):
    asked = []
    plain = Ask._answer

    async def spy(self, path, body):
        asked.append(path)
        return await plain(self, path, body)

    monkeypatch.setattr(Ask, "_answer", spy)
    async with simulator(dialect="llama.cpp-router", model="a/b:Q4") as server:
        endpoint = endpoint_of(server.base_url, server.model)
        await (await identified(endpoint)).work(Ask(endpoint))
    about = [path for path in asked if "?" in path]
    assert about == [f"/{what}?model=a%2Fb%3AQ4&autoload=false" for what in ("props", "slots")]


async def test_llama_swap_in_front_of_another_server_promises_nothing():
    models = {"data": [{"id": "real", "owned_by": "llama-swap", "meta": {"llamaswap": {"aliases": ["nick"]}}}]}
    about = {"/v1/models": models, "/running": {"running": [{"model": "real", "state": "ready"}]}}
    async with _Picky(about) as server:
        found = await identified(endpoint_of(server.base_url, "nick"))
        assert "return_progress" not in found.extras() and found.facts.loaded
        assert await found.work(Ask(endpoint_of(server.base_url, "nick"))) is None
        assert found.continuation(body_for(endpoint_of(server.base_url, "nick")), "x") is None


@pytest.mark.parametrize("version, repeats", [
    ("b0-unknown", None), ("b10144-1234", False), ("b9141", False), ("b9140", None), ("", None),
])  # fmt: skip
def test_what_llama_cpp_of_each_build_goes_on_with(version, repeats):
    assert LlamaCpp(Facts(version=version)).repeats is repeats


# ------------------------------------------------------------------------------------------ continuation

FORMS = [{"response_format": {"type": "json_object"}}, {"grammar": "root ::= x"}, {"tool_choice": "required"},
         {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"n": 2}, {"logprobs": True}]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_an_answer_that_must_have_a_form_is_never_gone_on_with(kind, form):
    assert kind().continuation({"messages": [], **form}, "some text") is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_continuation_has_the_tokens_that_are_left(kind):
    body = {"messages": [], "max_tokens": 10, "response_format": {"type": "text"}, "tool_choice": "auto"}
    request = kind().continuation(body, "some text", 4)
    assert (request is not None) == (kind.name in ("llama.cpp", "llama-swap", "vllm", "ray-serve", "sglang", "tabbyapi"))
    assert request is None or request["max_tokens"] == 6
    assert kind().continuation(body, "some text", 10) is None


@pytest.mark.parametrize("answers", [
    {}, {"/apply-template": {"prompt": "the same"}},
    {"/tokenize": {"tokens": [1, 2]}, "/detokenize": {"prompt": "else"}},
])  # fmt: skip
@pytest.mark.parametrize("kind", [LlamaCpp, VLLM])
async def test_what_is_not_proved_is_not_gone_on_with(kind, answers):
    async with RawServer(chunk("x"), about=answers) as server:
        endpoint = endpoint_of(server.base_url, "m")
        assert await servers.continuation(kind(), endpoint, body_for(endpoint), "some text", 2) is None
        assert server.others


# ------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
async def test_a_continuation_that_asks_for_a_new_turn_too_is_refused(simulator, dialect):
    async with simulator(dialect=dialect) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        request = servers.kind_named(dialect)().continuation(body_for(endpoint), "word")
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.post(endpoint.chat_url, json={**request, "add_generation_prompt": True})
    assert response.status_code == 400


@pytest.mark.parametrize("dialect, gone_on", [("llama.cpp", False), ("mlx-lm", True), ("transformers", True),
                                              ("llama-cpp-python", True), ("vllm", False)])  # fmt: skip
async def test_some_servers_go_on_when_nobody_waits_for_a_whole_answer(simulator, dialect, gone_on):
    async with simulator(
        dialect=dialect, machine=Machine(1e6, 20), scale=1, answer=lambda m, t: Answer(text="a " * 20)
    ) as server:
        endpoint, stats = endpoint_of(server.base_url, server.model), server.stats
        asking = asyncio.ensure_future(post(endpoint, body_for(endpoint, max_tokens=500)))
        while not stats.decode_tokens:
            await asyncio.sleep(0.01)
        asking.cancel()
        while not (stats.cancelled or stats.completed):
            await asyncio.sleep(0.01)
    assert (stats.decode_tokens >= 20) == gone_on


@pytest.mark.parametrize("dialect", ["mlx-lm", "transformers"])
async def test_some_servers_check_no_context(simulator, dialect):
    async with simulator(dialect=dialect, machine=Machine(1e6, 1e6, context=100)) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        usage = (await post(endpoint, body_for(endpoint, "word " * 300)))["usage"]
    assert usage["prompt_tokens"] > 100


@pytest.mark.parametrize("metrics, prefill, decode", [
    ({"time_to_first_token_ms": 900.0, "queue_time_ms": 400.0, "generation_time_ms": 2000.0}, 0.5, 2.0),
    ({"time_to_first_token_ms": 900.0}, 0.9, None),
    ("odd", None, None),
])  # fmt: skip
def test_vllms_metrics_are_read_where_they_are_on(metrics, prefill, decode):
    timings = servers.kind_named("vllm")().timings({"metrics": metrics})
    assert (timings.prefill, timings.decode) == (prefill, decode)


async def test_an_old_llama_cpp_counts_through_its_template():
    async with _Picky({"/apply-template": {"prompt": "abc"}, "/tokenize": {"tokens": [1, 2, 3]}}) as server:
        endpoint = endpoint_of(server.base_url, "m")
        kind = servers.kind_named("llama.cpp")
        assert await kind().count_tokens(Ask(endpoint), {"model": "m", "messages": []}) == 3


# ------------------------------------------------------------------------------------------ windows

REMEDIES = {
    "llama.cpp": ["`llama-server --ctx-size 8192`"],
    "llama.cpp-router": ["`ctx-size = 8192`", "[codebooga-34b]", "--models-preset"],
    "llama-swap": ["`--ctx-size 8192`", "codebooga-34b", "config.yaml"],
    "ollama": ["OLLAMA_CONTEXT_LENGTH=8192 ollama serve", "FROM codebooga-34b", "PARAMETER num_ctx 8192"],
    "lmstudio": ["`lms unload codebooga-34b`", "`lms load codebooga-34b --context-length 8192`", "Context Length"],
    "vllm": ["--max-model-len 8192"],
    "ray-serve": ["`max_model_len: 8192`", "engine_kwargs"],
    "sglang": ["--context-length 8192"],
    "tabbyapi": ["`max_seq_len: 8192`", "`cache_size: 8192`", "config.yml"],
    "llama-cpp-python": ["--n_ctx 8192"],
    "litellm": ["at least 8192 tokens", "`max_input_tokens: 8192`", "config.yaml"],
    "mlx-lm": ["no limit"],
    "transformers": ["no limit"],
    "plain": ["at least 8192 tokens"],
}


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_each_server_names_its_own_setting_for_a_larger_context(simulator, dialect):
    async with simulator(dialect=dialect) as server:
        found = await identified(endpoint_of(server.base_url, server.model))
    told = found.remedy(8192)
    assert all(words in told for words in REMEDIES[dialect]), told
    assert told.endswith(".") and ". " not in told and "made for" not in told
    kind = servers.kind_named(found.name)
    assert kind().remedy(8192).endswith("."), "it need not have been asked"


def test_slots_that_divide_the_context_are_reckoned_with():
    told = servers.kind_named("llama.cpp")(Facts(slots=4)).remedy(8192)
    assert "--ctx-size 8192" in told and "32768 where `--parallel 4`" in told
    assert "`cache_size: 10240`" in servers.kind_named("tabbyapi")(Facts()).remedy(10_000)


def test_no_more_is_asked_for_than_the_model_was_made_for():
    for kind in (*KINDS, servers.kind_named("plain")):
        told = kind(Facts(window=2048, largest_window=4096)).remedy(8192)
        assert "no limit" in told or ("4096" in told and "8192" not in told and "made for 4,096" in told), told
        told = kind(Facts(window=4096, largest_window=4096)).remedy(8192)
        assert "no limit" in told or "another model" in told, told


def test_what_becomes_of_a_prompt_that_is_too_long_is_known_of_each_kind():
    assert [kind.name for kind in KINDS if kind.truncates] == ["ollama"]
    assert [kind.name for kind in KINDS if kind.blank] == ["lmstudio", "llama-cpp-python"]


# A router always tells.
@pytest.mark.parametrize("dialect", [dialect for dialect in DIALECTS if dialect != "llama.cpp-router"])
async def test_a_server_that_hides_its_window_is_recognized_all_the_same(simulator, dialect):
    async with simulator(dialect=dialect, tells_window=False) as server:
        endpoint = endpoint_of(server.base_url, server.model)
        found = await identified(endpoint)
        before = list(server.paths)
        await identified(endpoint)
        again = ["/running"] * found.shares  # whether it is still loaded
        assert server.paths == before + again, "it is asked once"
        await found.load(Ask(endpoint), server.model)
        assert server.paths == before + again, "it is loaded, or cannot tell"
    assert found.name == PROMISES[dialect].name and found.facts.window is None


@pytest.mark.parametrize("owner, name", [("library", "ollama"), ("organization_owner", "lmstudio")])
async def test_a_proxy_that_knows_only_v1_hides_the_window_and_not_the_kind(owner, name):
    async with _Picky({"/v1/models": {"data": [{"id": "m", "owned_by": owner}]}}) as server:
        found = await identified(endpoint_of(server.base_url, "m"))
    assert found.name == name and found.settled and found.facts == Facts()


class _Picky(RawServer):
    """Answers what it is given with the ``server`` header given: JSON, bytes as they are, or a status."""

    def __init__(self, about, software=""):
        super().__init__(b"", about=about)
        self.software = software

    async def _about(self, writer, path):
        found = self.about.get(path, 404)
        status = f"{found} X" if isinstance(found, int) else "200 OK"
        body = found if isinstance(found, bytes) else b"{}" if isinstance(found, int) else json.dumps(found).encode()
        head = (
            f"HTTP/1.1 {status}\r\nserver: {self.software}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()


@pytest.mark.parametrize("dialect", ["ollama", "lmstudio"])
async def test_calls_that_begin_together_load_the_model_once(simulator, ask, dialect):
    async with simulator(dialect=dialect, machine=Machine(1e6, 1e6, load_time=300), scale=1000) as server:
        await asyncio.gather(*(complete(ask(server, f"question {n}")) for n in range(5)))
    assert len(server.requests) == 5 + (dialect == "lmstudio")  # LM Studio loads by the shortest chat
    assert server.paths.count("/api/generate") == (dialect == "ollama")


# ------------------------------------------------------------------------------------------- absurd numbers

HUGE = 10**400


@pytest.mark.parametrize("number", [HUGE, -1, True, 1.5, float("nan"), float("inf"), "4096", [4096], None])
async def test_what_no_server_can_mean_is_no_number(ask, number):
    props = {"default_generation_settings": {"n_ctx": number}, "total_slots": number, "build_info": "b\x1b[2J" + "1" * 9999}
    whole = chunk("fine", prompt_progress=1) + b"data: " + json.dumps(
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": number, "completion_tokens": number},
         "timings": {"prompt_ms": number, "cache_n": number}, "prompt_progress": {"processed": number, "total": number}}
    ).encode() + b"\n\n"  # fmt: skip
    listing = {"data": [{"owned_by": "llamacpp", "id": "m", "aliases": number, "meta": {"n_ctx_train": number}}]}
    async with RawServer(whole, about={"/props": props, "/v1/models": listing}) as server:
        outcome = await complete(ask(server))
        facts = servers.known(ask(server).endpoint).facts
    assert outcome.text == "fine" and 0 <= outcome.usage.prompt_tokens < 10**6
    assert (facts.window, facts.slots, facts.largest_window) == (None, None, None)
    assert len(facts.version) < 100 and facts.version.isprintable()


def test_progress_with_thousands_of_digits_is_none():
    assert MLXLM().progress_of_comment(b" keepalive %s/9" % (b"9" * 5000)) is None
    assert LlamaCpp().progress({"prompt_progress": {"processed": HUGE}}) is None
    assert LlamaCpp().timings({"timings": {"prompt_ms": HUGE, "cache_n": HUGE}}).prefill is None
