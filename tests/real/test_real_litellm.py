"""Calls through LiteLLM's real proxy, in front of simulators and of real llama.cpp: ``pytest -m real --server litellm``.

What was seen is in docs/servers.md; tests/test_litellm.py holds the shapes of its answers.
"""

import asyncio

import httpx
import pytest
from conftest import kinds, words
from contract import CHECKS, Promise, body_for, identified
from proxies import KEY, deployment, litellm

from metagpt_localllm import errors
from metagpt_localllm.call import complete
from metagpt_localllm.simulator import Answer, Machine, SimulatorThread, parse_fault
from metagpt_localllm.transport import Endpoint

pytestmark = pytest.mark.real

FAST = Machine(prefill_speed=1e6, decode_speed=1e6)
#: A prompt of 4,000 tokens takes 4 real seconds until its first token, an answer of 300 tokens 3.
SLOW = Machine(prefill_speed=1000, decode_speed=100, context=16384)
PROMISES = {
    "llama": Promise("litellm", {"window": None, "slots": 1}, cached=True),
    "vllm": Promise("litellm", {"window": 4096, "slots": 1}),
    "ollama": Promise("litellm", {"window": None, "slots": 1}),
    "real": Promise("litellm", {"window": 2048, "slots": 1}, cached=True),
}


def pytest_generate_tests(metafunc):
    """Nothing of this is installed for another server's sake."""
    if metafunc.config.getoption("--server") not in ("litellm", "all"):
        pytest.skip("--server names another server", allow_module_level=True)


def many(_messages, _tools):
    return Answer(text=" ".join(f"word{n}" for n in range(150)))


@pytest.fixture(scope="module")
def behind():
    """The simulators, by the name of their model in the proxy."""
    with SimulatorThread(FAST, answer=words, scale=1000, dialect="llama.cpp") as llama:
        with SimulatorThread(FAST, answer=words, scale=1000, dialect="vllm") as vllm:
            with SimulatorThread(FAST, answer=words, scale=1000, dialect="ollama") as ollama:
                with SimulatorThread(SLOW, answer=many, dialect="ollama") as slow:
                    yield {"llama": llama, "vllm": vllm, "ollama": ollama, "slow": slow}


@pytest.fixture(scope="module")
def proxy(behind, llama_cpp):
    models = [deployment(name, server.base_url, server.model) for name, server in behind.items()]
    models += [
        deployment("real", llama_cpp, "tiny", info={"max_input_tokens": 2048}),
        deployment("limited", behind["slow"].base_url, behind["slow"].model, timeout=2),
        deployment("two", behind["llama"].base_url, "a"), deployment("two", behind["vllm"].base_url, "b"),
    ]  # fmt: skip
    with litellm(*models) as base_url:
        yield base_url


@pytest.fixture
def through(proxy, ask):
    """Makes a call through the proxy; at its other end there are no faults left from other tests."""

    def make(model, text="hello", key=KEY, **options):
        class There:
            base_url = proxy

        There.model = model
        return ask(There, text, api_key=key, **options)

    return make


@pytest.fixture(autouse=True)
def _no_faults(behind):
    yield
    for server in behind.values():
        server.faults = []


def count(server):
    return len(server.requests)


def faults(server, *texts):
    """Faults whose ``on`` counts from now."""
    numbered = [parse_fault(text) for text in texts]
    server.faults = [type(fault)(**{**vars(fault), "on": fault.on + server.stats.requests}) for fault in numbered]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", PROMISES)
async def test_it_keeps_the_contract(proxy, monkeypatch, check, model):
    # The contract's own requests have no key.
    for module in ("httpx",):
        plain = httpx.AsyncClient

        def keyed(*args, plain=plain, **options):
            return plain(*args, headers={"authorization": f"Bearer {KEY}"}, **options)

        monkeypatch.setattr(f"{module}.AsyncClient", keyed)
    await check(Endpoint(proxy, model), PROMISES[model])


async def test_nothing_that_is_asked_beside_the_chat_costs_a_chat(behind, proxy):
    before = {name: count(server) for name, server in behind.items()}
    for model in [*behind, "two", "unheard-of"]:
        assert (await identified(Endpoint(proxy, model, KEY))).name == "litellm"
    assert {name: count(server) for name, server in behind.items()} == before
    assert (await identified(Endpoint(proxy, "two", KEY))).places == 2


async def test_its_own_retries_do_not_multiply_ours(behind, through):
    server = behind["vllm"]
    faults(server, "error:times=3")
    before = count(server)
    assert (await complete(through("vllm"))).text
    assert count(server) - before == 4, "with LiteLLM's own there would be up to 3 for each"


async def test_its_retries_are_there_without_us(behind, proxy):
    """If this fails, num_retries is not needed any more."""
    server = behind["vllm"]
    faults(server, "error:times=9")
    before = count(server)
    async with httpx.AsyncClient(timeout=60, headers={"authorization": f"Bearer {KEY}"}) as client:
        await client.post(f"{proxy}/chat/completions", json=body_for(Endpoint(proxy, "vllm")))
    assert count(server) - before == 3


@pytest.mark.parametrize("model", ["llama", "vllm", "ollama", "real"])
async def test_a_prompt_over_the_context_is_trimmed(through, model, seen):
    long = [{"role": "user", "content": f"part {n}: " + "the cat is on the mat " * 150} for n in range(12)]
    outcome = await complete(through(model, [*long, {"role": "user", "content": "and now?"}], max_tokens=64))
    assert outcome.text and outcome.trims


async def test_an_overflow_teaches_what_the_list_does_not(through, behind, seen):
    settings = {"context": {"window": 100_000}}
    long = [{"role": "user", "content": f"part {n}: " + "the cat is on the mat " * 150} for n in range(12)]
    outcome = await complete(through("llama", [*long, {"role": "user", "content": "now?"}], settings=settings))
    assert outcome.trims[-1].window == 4096 and "Retry" in kinds(seen)


@pytest.mark.parametrize("fault", ["drop:after=5", "stream_error:after=5", "reset", "busy:retry_after=0", "html"])
async def test_a_fault_behind_it_is_outlived(behind, through, seen, fault):
    server = behind["llama"]
    faults(server, fault)
    before = count(server)
    assert (await complete(through("llama"))).text == words(None, None).text
    assert count(server) - before == 2 and "Continued" not in kinds(seen)


async def test_a_server_that_restarts_behind_it_is_waited_for(behind, through, seen):
    server = behind["llama"]
    faults(server, "refuse:duration=3000s")
    settings = {"retry": {"attempts": 2, "backoff": {"initial": 0.2, "max": 0.5}}}
    assert (await complete(through("llama", settings=settings))).text == words(None, None).text
    assert "Waiting" in kinds(seen)


async def test_a_slow_prompt_goes_through_and_its_speed_is_learned(through, seen):
    settings = {"timeouts": {"first_token": 30}, "context": {"window": 16384}}
    outcome = await complete(through("slow", "word " * 4000, settings=settings))
    assert outcome.usage.prompt_tokens > 4000 and len(outcome.text.split()) == 150
    assert "Retry" not in kinds(seen)


async def test_its_own_time_limit_is_named_with_the_setting_that_lifts_it(through, behind):
    settings = {"timeouts": {"first_token": 30}, "retry": {"attempts": 1}, "context": {"window": 16384}}
    with pytest.raises(errors.ServerFailed, match="stream_timeout"):
        await complete(through("limited", "other " * 4000, settings=settings))


async def test_a_request_that_we_gave_up_goes_on_behind_it_until_its_first_token(behind, through):
    """Why first_token has to be generous here. If this fails, LiteLLM has learned to cancel, and docs/servers.md can say so."""
    server = behind["slow"]
    for _ in range(100):
        if not server._jobs:
            break
        await asyncio.sleep(0.2)
    with pytest.raises(errors.FirstTokenTimeout):
        settings = {"timeouts": {"first_token": 1}, "retry": {"attempts": 1}, "context": {"window": 16384}}
        await complete(through("slow", "third " * 4000, settings=settings))
    await asyncio.sleep(1)
    assert server._jobs


async def test_a_stalled_answer_frees_its_server(behind, through):
    server = behind["llama"]
    faults(server, "stall:after=3,times=1")
    assert (await complete(through("llama"))).text == words(None, None).text


@pytest.mark.parametrize("fault", ["close:after=5", "done_without_finish:after=5"])
async def test_a_stream_that_ends_without_a_finish_reason_gets_an_invented_one(behind, proxy, fault):
    """The one fault that cannot be seen from here. If this fails, it can, and docs/servers.md can say so."""
    faults(behind["llama"], fault)
    async with httpx.AsyncClient(timeout=60, headers={"authorization": f"Bearer {KEY}"}) as client:
        body = {**body_for(Endpoint(proxy, "llama")), "stream": True}
        text = (await client.post(f"{proxy}/chat/completions", json=body)).text
    assert '"finish_reason":"stop"' in text and "data: [DONE]" in text


@pytest.mark.parametrize("key", ["sk-wrong-wrong-wrong", ""])
async def test_a_key_that_is_wrong_or_missing_is_named(through, key):
    with pytest.raises(errors.AccessDenied, match="master_key"):
        await complete(through("llama", key=key))


async def test_a_model_that_it_does_not_have_is_named(through):
    with pytest.raises(errors.ModelNotFound):
        await complete(through("unheard-of"))


async def test_calls_at_once_go_to_both_servers_of_a_model(behind, through):
    before = count(behind["llama"]), count(behind["vllm"])
    outcomes = await asyncio.gather(*(complete(through("two", f"question {n}")) for n in range(12)))
    assert all(outcome.text for outcome in outcomes)
    after = count(behind["llama"]), count(behind["vllm"])
    assert sum(after) - sum(before) == 12 and after[0] > before[0] and after[1] > before[1]
    assert not any("num_retries" in request for request in behind["vllm"].requests), "it is for LiteLLM alone"
