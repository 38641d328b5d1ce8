"""Real llama.cpp while it is slow, cut off, killed, and started again."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import kinds

from metagpt_localllm.call import Call, complete
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this Python")
TESTS = Path(__file__).parent


class Server:
    """The real server in a process of its own, at a port that stays the same."""

    def __init__(self, model):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.process = str(model), None
        self.root = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, str(TESTS / "serve_llama_cpp.py"), self.model, "8192", str(self.port)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    async def busy(self):
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"{self.root}/slots", timeout=30)).json()[0]["is_processing"]

    def call(self, words, max_tokens=8, show=lambda text: None, **timeouts):
        settings = LocalSettings.model_validate(
            {"timeouts": timeouts, "retry": {"attempts": 2, "backoff": {"initial": 0.1, "max": 1}}}
        )
        messages = [{"role": "user", "content": "the cat is on the mat " * (words // 6)}]
        body = {"model": "slow", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return Call(Endpoint(self.root + "/v1", "slow"), settings, body, Caller(), show=show)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    subprocess.run([sys.executable, str(TESTS / "make_tiny_gguf.py"), str(path), "slow"], check=True)
    return path


@pytest.fixture
def server(model):
    made = Server(model)
    made.start()
    made.process.stdout.readline()
    yield made
    made.kill()


async def test_progress_keeps_a_prefill_alive_that_takes_longer_than_its_deadline(server, seen):
    await complete(server.call(1000, total=120))  # eight batches of 256 tokens
    deadline = 0.7 * seen[-1].ttft
    await complete(server.call(3000, first_token=deadline, stall=30, total=120))
    assert kinds(seen)[2:] == ["Sent", "Done"]
    assert seen[-1].ttft > deadline


async def test_a_call_that_is_cancelled_in_prefill_frees_its_slot(server):
    call = asyncio.create_task(complete(server.call(6000, total=120)))
    while not await server.busy():
        await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # Asked more often, llama.cpp would notice it later (b11549).
    for _ in range(10):
        await asyncio.sleep(1.6)
        if not await server.busy():
            break
    assert not await server.busy()


@pytest.mark.parametrize("when", ["prefill", "decode"])
async def test_a_server_that_is_killed_and_started_again_finishes_the_call(server, seen, when):
    shown = []
    words, tokens = (1500, 4) if when == "prefill" else (60, 60)
    call = asyncio.create_task(complete(server.call(words, tokens, shown.append, first_token=60, stall=30, total=120)))
    if when == "prefill":
        while not await server.busy():
            await asyncio.sleep(0.1)
    else:
        while len(shown) < 3:
            await asyncio.sleep(0.01)
    server.kill()
    await asyncio.sleep(0.5)
    server.start()
    outcome = await call
    assert outcome.usage.completion_tokens == tokens
    assert kinds(seen)[:2] == ["Sent", "Retry"] and kinds(seen)[-1] == "Done"


async def test_a_server_that_is_started_after_the_call_is_waited_for(model, seen):
    server = Server(model)
    call = asyncio.create_task(complete(server.call(60)))
    await asyncio.sleep(0.7)
    server.start()
    try:
        assert (await call).usage.completion_tokens == 8
    finally:
        server.kill()
    assert "Waiting" in kinds(seen) and "Retry" not in kinds(seen)


async def test_an_answer_is_gone_on_with_by_a_server_that_was_killed_and_started_again(server, seen):
    # That it is the same at temperature 0 as in one piece shows the contract; here ties of random weights may fall otherwise
    # in another batch.
    shown, tokens = [], 200
    call = asyncio.create_task(complete(server.call(60, tokens, shown.append, first_token=60, stall=30, total=120)))
    while len(shown) < 150:
        await asyncio.sleep(0.005)
    server.kill()
    await asyncio.sleep(0.3)
    before = "".join(shown)
    server.start()
    outcome = await call
    assert outcome.text.startswith(before) and "".join(shown) == outcome.text + "\n"
    assert next(event.tokens for event in seen if type(event).__name__ == "Continued") >= 0.95 * len(before.split())
    assert outcome.usage.completion_tokens == tokens == len(outcome.text.split())
