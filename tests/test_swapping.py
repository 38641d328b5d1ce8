"""Several models behind one address, of which one is loaded at a time: llama-swap's way, in front of two simulators.

``Swap`` does what llama-swap does by its source (proxy/processgroup.go, process.go): a request for a model that does not run
waits until what runs has answered its requests, stops it, starts the other, and is held until that is ready.
"""

import asyncio
import contextlib
import json

import pytest
from conftest import FAST, kinds

from metagpt_localllm import errors, events, servers
from metagpt_localllm.call import Call, complete
from metagpt_localllm.servers import Facts
from metagpt_localllm.servers.llama_swap import LlamaSwap
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.simulator import Answer, Machine, Simulator
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint


class Swap:
    """Attributes:
    started: the models, in the order in which they were started.
    chats: the models of the chats, in order.
    """

    def __init__(self, servers):
        self.servers = {server.model: server for server in servers}
        self.running, self.state = None, "stopped"
        self.started, self.chats = [], []
        self._busy, self._turn, self._tasks = 0, asyncio.Lock(), set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self.running:
            await self.servers[self.running].go_down()

    async def _ready(self, model):
        """Starts it where it does not run; what asks for another meanwhile waits."""
        async with self._turn:
            if self.running != model:
                await self._idle.wait()
                if self.running:
                    await self.servers[self.running].go_down()
                self.running, self.state = model, "starting"
                self.started.append(model)
                await self.servers[model].come_up()
                while self.servers[model]._loading():
                    await asyncio.sleep(0.01)
                self.state = "ready"
            self._busy += 1
            self._idle.clear()

    async def _serve(self, reader, writer):
        counted = False
        self._tasks.add(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
            method, path = head.split()[:2]
            told = self._told(path.decode())
            if told is not None:
                data = json.dumps(told).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(data) + data)
                await writer.drain()
                return
            parts = path.decode().split("/", 3)
            model = parts[2] if parts[1] == "upstream" else json.loads(body)["model"]
            below = f"/{parts[3]}" if parts[1] == "upstream" else path.decode()
            if below.endswith("/chat/completions"):
                self.chats.append(model)
            await self._ready(model)
            counted = True
            await self._pass(reader, writer, model, method.decode(), below, body)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._busy -= counted
            if not self._busy:
                self._idle.set()
            writer.close()

    def _told(self, path):
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": m, "object": "model", "owned_by": "llama-swap"} for m in self.servers]}
        if path == "/running":
            return {"running": [{"model": self.running, "state": self.state}] if self.running else []}
        return None if path.startswith("/upstream/") or path.endswith("/chat/completions") else {}

    async def _pass(self, reader, writer, model, method, path, body):
        port = int(self.servers[model].base_url.split(":")[2].split("/")[0])
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        to_server.write(head.encode() + body)
        left = asyncio.ensure_future(reader.read(1))
        try:
            while True:
                read = asyncio.ensure_future(from_server.read(65536))
                await asyncio.wait({read, left}, return_when=asyncio.FIRST_COMPLETED)
                if not read.done():
                    read.cancel()
                    return
                if not read.result():
                    return
                writer.write(read.result())
                await writer.drain()
        finally:
            left.cancel()
            to_server.close()


def says(text):
    return lambda _messages, _tools: Answer(text=text)


@contextlib.asynccontextmanager
async def two(load_time=0.0, **options):
    """A large and a small model behind one address; the large one has a context of 4,096 tokens, the small one of 8,192."""
    speeds = {"prefill_speed": 1e5, "decode_speed": 1e4, "load_time": load_time}
    large = Simulator(Machine(context=4096, **speeds), model="large", answer=says("I am large"), **options)
    small = Simulator(Machine(context=8192, **speeds), model="small", answer=says("I am small"), **options)
    async with Swap([large, small]) as swap:
        yield swap


def asks(swap, model, text="hello", role="Engineer", settings=None, **options):
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return complete(
        Call(
            Endpoint(swap.base_url, model),
            LocalSettings.model_validate({**FAST, **(settings or {})}),
            {"model": model, "messages": messages, "max_tokens": 64},
            Caller("WriteCode", role, role),
            **options,
        )
    )


async def test_roles_with_models_of_their_own_take_turns():
    async with two(load_time=0.1) as swap:
        for model in ("large", "small", "large", "small"):
            assert (await asks(swap, model, role=model)).text == f"I am {model}"
        assert swap.started == swap.chats == ["large", "small", "large", "small"]


async def test_metagpts_actions_with_models_of_their_own_take_turns(monkeypatch, seen):
    """By the ``models:`` of config2.yaml, and an action's ``llm_name_or_type``."""
    from metagpt.actions import Action
    from metagpt.configs.models_config import ModelsConfig

    async with two(load_time=0.1) as swap:
        shared = {"api_type": "local_llm", "base_url": swap.base_url}
        models = ModelsConfig(models={name: {**shared, "model": name} for name in ("large", "small")})
        monkeypatch.setattr(ModelsConfig, "default", classmethod(lambda cls: models))
        actions = [Action(name=name, llm_name_or_type=name) for name in ("large", "small")]
        for _ in range(2):
            for action in actions:
                assert await action.llm.aask("hello", stream=False) == f"I am {action.name}"
        assert swap.started == ["large", "small", "large", "small"]
    assert "Retry" not in kinds(seen) and kinds(seen).count("Loading") == 4


async def test_a_model_that_was_unloaded_for_another_may_take_its_time_to_load_again(seen, monkeypatch):
    """The deadlines that were learned while it was loaded are of a fraction of that."""
    monkeypatch.setenv("METAGPT_LOCALLLM_TIME_SCALE", "100")
    settings = {"timeouts": {}}
    async with two(load_time=1.5) as swap:
        for n in range(6):
            await asks(swap, "large", f"question {n}", settings=settings)
        await asks(swap, "small", settings=settings)
        del seen[:]
        assert (await asks(swap, "large", "again", settings=settings)).text == "I am large"
        sent = next(event for event in seen if isinstance(event, events.Sent))
        assert "Retry" not in kinds(seen), f"first_token was {sent.first_token:.2f} s"
        assert len(swap.chats) == 8


async def test_nothing_is_counted_by_a_model_that_another_has_taken_the_place_of():
    long = "the cat is on the mat " * 500  # it may be too long, so that it would be counted
    async with two() as swap:
        for model in ("large", "large", "small", "small"):
            await asks(swap, model, long)
        started = list(swap.started)
        endpoint = Endpoint(swap.base_url, "large")
        server = LlamaSwap(Facts(window=4096, loaded=True), "large")  # as it was known
        body = {"model": "large", "messages": [{"role": "user", "content": long}]}
        assert await servers.count_tokens(server, endpoint, body) is None
        assert swap.started == started, "the question loaded the model"


async def test_the_window_is_each_models_own():
    long = [{"role": "user", "content": f"part {n}: " + "the cat is on the mat " * 100} for n in range(8)]
    async with two() as swap:
        for _ in range(2):
            large, small = await asks(swap, "large", long), await asks(swap, "small", long)
            assert large.trims or large.usage.prompt_tokens < 4096
            assert not small.trims and small.usage.prompt_tokens > 4096


async def test_what_was_learned_is_kept_for_each_model():
    async with two() as swap:
        await asks(swap, "large")
        endpoint = Endpoint(swap.base_url, "large")
        servers.learned(endpoint).window = 777
        await asks(swap, "small")
        assert servers.learned(endpoint).window == 777
        assert servers.learned(Endpoint(swap.base_url, "small")).window is None


async def test_calls_at_once_for_two_models_are_all_answered():
    async with two(load_time=0.05) as swap:
        calls = [asks(swap, model, f"{model} {n}", role=model) for n in range(4) for model in ("large", "small")]
        outcomes = await asyncio.gather(*calls)
        assert [outcome.text for outcome in outcomes] == ["I am large", "I am small"] * 4
        assert len(swap.chats) == 8, "nothing was sent twice"
        assert len(swap.started) <= 8, "no model was loaded but for a call that it then answered"


async def test_a_model_that_never_gets_ready_is_told_as_what_it_is(seen):
    async with two(load_time=600) as swap:
        with pytest.raises(errors.LocalLLMError):
            await asks(swap, "large", settings={"timeouts": {"first_token": 0.5, "total": 1}, "retry": {"attempts": 1}})
    assert "Loading" in kinds(seen) or "Failed" in kinds(seen)
