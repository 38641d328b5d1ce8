"""The clients, each in the environment that has it: ``python -m bench.clients NAME``, started by bench/cells.py.

NAME is one of RUNNERS. A runner imports its libraries once and then forks for each cell that comes as a line of JSON on
its standard input. In the fork the simulated server and the client share an event loop whose clock is virtual
(bench/virtual_clock.py), and HOME is new. What became of the cell goes out as a line of JSON.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import json
import os
import random
import secrets
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench import virtual_clock, workload

__all__ = ["RUNNERS", "SETTINGS"]

_KEY = "not-needed"

#: What a user writes for the best that each documentation offers, as that documentation writes it; its lines are counted.
#: Their numbers suit this machine: 120 s is twice what its longest prompt takes to the first token without a cache.
SETTINGS = {
    ("openai", "best"): """
        max_retries=5
        timeout=openai.Timeout(600, connect=5, read=120)""",
    ("langchain", "best"): """
        max_retries=5
        timeout=openai.Timeout(600, connect=5, read=120)
        stream_chunk_timeout=60
        llm = llm.with_retry(retry_if_exception_type=(Exception,), stop_after_attempt=6)""",
    ("litellm", "best"): """
        num_retries=5
        timeout=600
        stream_timeout=120
        retry_after=1
        allowed_fails=100
        fallbacks=[{"m": ["again"]}]
        model_list += [{"model_name": "again", "litellm_params": ...}]""",
    ("proxy", "best"): """
        router_settings:
          num_retries: 5
          timeout: 600
          stream_timeout: 120
          retry_after: 1
          allowed_fails: 100
          fallbacks: [{m: [again]}]
        model_list: [..., {model_name: again, litellm_params: ...}]
        max_retries=5
        timeout=openai.Timeout(600, connect=5, read=120)""",
    ("open_llm", "best"): """
        timeout: 120""",
    ("ollama", "best"): """
        timeout: 300""",
}


# ------------------------------------------------------------------------------------------------ the peers


async def _joined(stream):
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


@contextlib.asynccontextmanager
async def _openai(cell):
    import openai

    options = {"max_retries": 5, "timeout": openai.Timeout(600, connect=5, read=120)} if cell["best"] else {}
    client = openai.AsyncOpenAI(base_url=cell["base_url"], api_key=cell.get("key", _KEY), **options)

    async def ask(messages):
        return await _joined(await client.chat.completions.create(model=cell["model"], messages=messages, stream=True))

    yield ask


@contextlib.asynccontextmanager
async def _langchain(cell):
    import openai
    from langchain_openai import ChatOpenAI

    common = {"base_url": cell["base_url"], "api_key": _KEY, "model": cell["model"], "streaming": True}
    if cell["best"]:
        timeout = openai.Timeout(600, connect=5, read=120)
        llm = ChatOpenAI(max_retries=5, timeout=timeout, stream_chunk_timeout=60, **common)
        llm = llm.with_retry(retry_if_exception_type=(Exception,), stop_after_attempt=6)
    else:
        llm = ChatOpenAI(**common)

    async def ask(messages):
        return (await llm.ainvoke(messages)).content

    yield ask


def _deployments(cell, names):
    params = {"model": f"openai/{cell['model']}", "api_base": cell["base_url"], "api_key": _KEY}
    return [{"model_name": name, "litellm_params": params} for name in names]


_ROUTER = {"num_retries": 5, "timeout": 600, "stream_timeout": 120, "retry_after": 1, "allowed_fails": 100,
           "fallbacks": [{"m": ["again"]}]}  # fmt: skip


@contextlib.asynccontextmanager
async def _litellm(cell):
    import litellm

    if cell["best"]:
        router = litellm.Router(model_list=_deployments(cell, ["m", "again"]), **_ROUTER)

        async def ask(messages):
            return await _joined(await router.acompletion(model="m", messages=messages, stream=True))
    else:
        model, where = f"openai/{cell['model']}", {"api_base": cell["base_url"], "api_key": _KEY}

        async def ask(messages):
            return await _joined(await litellm.acompletion(model=model, messages=messages, stream=True, **where))

    yield ask


@contextlib.asynccontextmanager
async def _proxy(cell):
    """LiteLLM's proxy in this process's loop, on a socket of its own, and an openai client before it."""
    import uvicorn
    import yaml

    key = "sk-" + secrets.token_hex(32)  # it starts with none but a strong one
    names = ["m", "again"] if cell["best"] else ["m"]
    config = {"model_list": _deployments(cell, names), "general_settings": {"master_key": key}}
    if cell["best"]:
        config["router_settings"] = _ROUTER
    path = Path(cell["home"], "litellm.yaml")
    path.write_text(yaml.safe_dump(config))
    os.environ["CONFIG_FILE_PATH"] = str(path)
    from litellm.proxy.proxy_server import app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
        await asyncio.sleep(0.1)
    async with _openai({**cell, "base_url": f"http://127.0.0.1:{listener.getsockname()[1]}", "model": "m", "key": key}) as ask:
        yield ask
    serving.cancel()


# ------------------------------------------------------------------------------------------------ MetaGPT, and ours


def _llm_config(cell):
    provider = cell["client"].split()[-1]
    timeout = {"open_llm": 120, "ollama": 300}.get(provider) if cell["best"] else None
    base_url = cell["base_url"].replace("/v1", "/api") if provider == "ollama" else cell["base_url"]
    config = {"api_type": provider, "base_url": base_url, "model": cell["model"], "api_key": _KEY}
    return {**config, **({"timeout": timeout} if timeout else {})}


@contextlib.asynccontextmanager
async def _metagpt(cell):
    from metagpt.configs.llm_config import LLMConfig
    from metagpt.provider.llm_provider_registry import create_llm_instance

    llm = create_llm_instance(LLMConfig(**_llm_config(cell)))

    async def ask(messages):
        # "ollama" has no system prompt, and sends nothing but the first message.
        return await llm.aask(messages[1]["content"], system_msgs=[messages[0]["content"]])

    yield ask


@contextlib.asynccontextmanager
async def _company(cell):
    """MetaGPT's software company, as metagpt.software_company.generate_repo hires and runs it; no questions of our own."""
    import metagpt.team
    from metagpt.config2 import config
    from metagpt.configs.llm_config import LLMConfig
    from metagpt.context import Context
    from metagpt.roles import Architect, Engineer, ProductManager, ProjectManager

    home = Path(cell["home"])
    metagpt.team.SERDESER_PATH = home / "storage"
    # Each role begins with a copy of what was read when MetaGPT was imported.
    for one in (config, Context.model_fields["config"].default):
        one.llm, one.workspace.path = LLMConfig(**_llm_config(cell)), home / "workspace"
    config.update_via_cli("", "snake_game", False, "", 0)
    team = metagpt.team.Team(context=Context(config=config))
    team.hire([ProductManager(), Architect(), ProjectManager(), Engineer(n_borg=5, use_code_review=True)])
    team.invest(3.0)
    team.run_project("Create a snake game for the terminal")

    async def ask(_messages):
        await team.run(n_round=5)

    yield ask


@contextlib.asynccontextmanager
async def _bare(cell):
    """Nothing but a socket: how long the server takes when nobody loses any time."""
    host, port = cell["base_url"].split("/")[2].split(":")

    async def ask(messages):
        body = json.dumps({"model": cell["model"], "messages": messages, "stream": True})
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write((head + body).encode())
        events = [line[6:] for line in (await reader.read()).split(b"\n") if line.startswith(b"data: {")]
        writer.close()
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)

    yield ask


#: By runner: its environment, what it imports before it forks, and its clients.
RUNNERS = {
    "openai": ("openai", ["openai"], {"openai": _openai}),
    "langchain": ("langchain", ["langchain_openai", "openai"], {"langchain": _langchain}),
    "litellm": ("litellm", ["litellm", "openai"], {"litellm": _litellm}),
    "proxy": ("litellm", ["litellm.proxy.proxy_server", "openai", "uvicorn"], {"proxy": _proxy}),
    "metagpt": (
        "own",
        ["metagpt.provider.llm_provider_registry", "metagpt.provider.ollama_api", "metagpt.provider.openai_api"],
        {name: _metagpt for name in ("local_llm", "open_llm", "ollama")},
    ),
    "company": (
        "own",
        ["metagpt.software_company", "metagpt.roles", "metagpt.team", "metagpt_localllm.demo"],
        {f"company {name}": _company for name in ("local_llm", "open_llm", "ollama")},
    ),
    "bare": ("own", [], {"bare": _bare}),
}
_METAGPT = ("metagpt", "company")


def _files_of(home):
    """How many of the project's files are there and whole."""
    from metagpt_localllm.demo import _Project
    from metagpt_localllm.simulator.answers import FILES

    project = _Project.read(Path(home, "workspace"))
    return len(FILES) - len(set(project.missing) | set(project.broken))


async def _play(client, cell):
    """The ten calls; the run breaks off at the first that fails, as an agent's does."""
    from metagpt_localllm.simulator import Answer, Fault, Machine, Simulator, answers

    wanted, done, said = workload.answers(cell["seed"]), [], {"right": 0, "error": ""}

    async def calls(ask):
        if company:
            await ask([])
            return
        for number in range(workload.CALLS):
            done.append(await ask(workload.messages(done)))
            said["right"] += done[-1] == wanted[number]

    def answer(messages, _tools):
        return Answer(workload.answer_to(messages, wanted))

    company = cell["client"].startswith("company")
    simulator = Simulator(
        Machine(**cell["machine"]), dialect=cell["dialect"], model=cell["model"], answer=answers.answer if company else answer,
        faults=[Fault(**fault) for fault in cell["faults"]],
    )  # fmt: skip
    async with simulator:
        simulator.demand()
        await asyncio.sleep(simulator.machine.load_time + 1)
        async with client({**cell, "base_url": simulator.base_url}) as ask:
            started = time.monotonic()
            try:
                await asyncio.wait_for(calls(ask), cell["limit"])
            except asyncio.TimeoutError:
                said["error"] = "cut off" if time.monotonic() - started >= cell["limit"] else "TimeoutError"
            except Exception as failed:
                said["error"] = f"{type(failed).__name__}: {failed}"[:300]
            seconds = time.monotonic() - started
            if company:
                said["right"] = _files_of(cell["home"])
            await asyncio.sleep(1)  # the server notices that its client has left
            # What closes a client is not awaited: it may take long.
            return {**said, "answered": len(done), "seconds": seconds, "stats": dataclasses.asdict(simulator.stats)}


async def _serve_warm(reader, writer):
    """A server that answers each chat with two tokens."""
    while line := await reader.readline():
        if line.lower().startswith(b"content-length:"):
            await reader.readexactly(int(line.split(b":")[1]) + 2)
            break
    events = [{"delta": {"role": "assistant", "content": "warm"}, "finish_reason": None}, {"delta": {}, "finish_reason": "stop"}]
    body = b"".join(
        b"data: " + json.dumps({"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "warm",
                                "choices": [{"index": 0, **event}]}).encode() + b"\n\n"
        for event in events
    ) + b"data: [DONE]\n\n"  # fmt: skip
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body)
    await writer.drain()
    writer.close()


async def _warm(client, home, best):
    """What a library imports, compiles and caches at its first call is not to be paid in simulated seconds."""
    server = await asyncio.start_server(_serve_warm, "127.0.0.1", 0)
    base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with client({"base_url": base_url, "model": "codebooga-34b", "best": best, "home": home}) as ask:
        for _ in range(2):
            await ask(workload.messages([]))
    server.close()


def _say(out, line):
    os.write(out, (json.dumps(line) + "\n").encode())


def _child(cell, clients, out):
    random.seed(cell["seed"])  # back-offs are drawn alike for everybody
    quiet = os.open(os.path.join(cell["home"], "output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["HOME"] = os.environ["USERPROFILE"] = cell["home"]
    os.chdir(cell["home"])
    try:
        asyncio.run(_main(clients[cell["client"]], cell, out))
    except BaseException:
        _say(out, {"id": cell["id"], "broken": traceback.format_exc()[-1500:]})


async def _main(client, cell, out):
    result = await _play(client, cell)
    _say(out, {"id": cell["id"], **result})
    os._exit(0)  # nothing of the libraries' own ends late


def main():
    (name,) = sys.argv[1:]
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print
    virtual_clock.install()
    _, modules, clients = RUNNERS[name]
    with tempfile.TemporaryDirectory() as home:
        # MetaGPT reads its configuration while it is imported.
        Path(home, ".metagpt").mkdir()
        Path(home, ".metagpt", "config2.yaml").write_text("llm: {api_type: openai, base_url: 'http://127.0.0.1:9/v1', api_key: none, model: m}\n")
        os.environ.update(HOME=home, METAGPT_PROJECT_ROOT=home, LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_TELEMETRY="False")
        if name in _METAGPT:
            import metagpt_localllm  # noqa: F401  (from a checkout there is no .pth file)
        for module in modules:
            importlib.import_module(module)
        if name in _METAGPT:
            from metagpt.logs import define_log_level, set_llm_stream_logfunc

            define_log_level("ERROR", "ERROR")
            set_llm_stream_logfunc(lambda text: None)
        else:
            for client in clients.values():
                for best in (False, True):
                    asyncio.run(_warm(client, home, best))
        _say(out, {"ready": True})
        for line in sys.stdin:
            cell = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _child(cell, clients, out)
                os._exit(0)
            _say(out, {"id": cell["id"], "pid": pid})
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


if __name__ == "__main__":
    main()
