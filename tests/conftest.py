import asyncio
import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("REAL_HOME", os.environ.get("HOME", ""))  # tests/real: pip's configuration may be there
# MetaGPT reads its configuration and writes logs while it is imported: not from and to the user's folders.
_home = Path(tempfile.mkdtemp(prefix="metagpt-home-"))
(_home / ".metagpt").mkdir()
(_home / ".metagpt" / "config2.yaml").write_text(
    "llm: {api_type: local_llm, base_url: 'http://127.0.0.1:9/v1', model: none}\n"
)
os.environ.update(HOME=str(_home), METAGPT_PROJECT_ROOT=str(_home))

import pytest  # noqa: E402

from metagpt_localllm import events, history, progress, session  # noqa: E402
from metagpt_localllm.call import Call  # noqa: E402
from metagpt_localllm.servers import detection  # noqa: E402
from metagpt_localllm.settings import LocalSettings  # noqa: E402
from metagpt_localllm.simulator import Answer, Machine, Simulator  # noqa: E402
from metagpt_localllm.state import State, state_at  # noqa: E402
from metagpt_localllm.tiers import Caller  # noqa: E402
from metagpt_localllm.transport import Endpoint  # noqa: E402

TESTS = Path(__file__).parent
sys.path += [str(TESTS), str(TESTS / "real")]
WORDS = " ".join(f"word{n}" for n in range(12))
FAST = {"timeouts": {"first_token": 1.5, "stall": 1.0, "total": 20}, "retry": {"backoff": {"initial": 0, "max": 0}}}


def words(_messages, _tools):
    return Answer(text=WORDS)


@pytest.fixture(autouse=True)
def _no_memory_of_servers(tmp_path, monkeypatch):
    # Many simulators may get the same port one after the other.
    detection._servers.clear()
    detection._learned.clear()
    detection._strict.clear()
    history._histories.clear()
    # The state file of the last test stays where its writer has it open.
    session._sessions.clear()
    kept = State(tmp_path / "state.db")
    for module in (history, session):
        monkeypatch.setattr(module, "state_at", lambda path: kept if path.startswith("~") else state_at(path))
    yield
    progress.hide()
    for opened in session._sessions.values():
        atexit.unregister(opened.end)
        opened._release()
    kept.close()


@pytest.fixture
def seen():
    """All events of the test, in order."""
    recorded = []
    unsubscribe = events.subscribe(recorded.append)
    yield recorded
    unsubscribe()


def kinds(recorded):
    """What happened, without how far the prefill was each time."""
    return [type(event).__name__ for event in recorded if not isinstance(event, events.Prefill)]


@pytest.fixture
def simulator():
    """Makes simulators with an answer of a few words; a thousand times faster than real unless said otherwise."""

    def make(*faults, machine=None, answer=words, scale=1000, **options):
        machine = machine or Machine(prefill_speed=1e6, decode_speed=1e6)
        return Simulator(machine, faults=faults, answer=answer, scale=scale, **options)

    return make


class RawServer:
    """Says literally what a test gives it: to the n-th chat request the n-th answer, the last one again and again.

    An answer is bytes of a stream, or a whole HTTP response when it begins with HTTP. ``about`` answers GETs and
    counts (path → JSON, a whole HTTP response as bytes, or an awaitable that gives one); what it does not name is 404.
    """

    def __init__(self, *answers, about=None, hold=False):
        self.answers, self.about, self.hold = answers, about or {}, hold
        self.requests, self.others = [], []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        self.model = "m"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
            path = head.split()[1].decode()
            if path.endswith("/chat/completions"):
                self.requests.append(body)
                await self._chat(writer, self.answers[min(len(self.requests), len(self.answers)) - 1])
            else:
                self.others.append(path)
                await self._about(writer, path)
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass

    async def _chat(self, writer, answer):
        if not answer.startswith(b"HTTP"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if self.hold:
            await asyncio.sleep(60)

    async def _about(self, writer, path):
        found = self.about.get(path)
        found = await found() if callable(found) else found
        if isinstance(found, bytes):
            writer.write(found)
            return await writer.drain()
        status = "404 Not Found" if found is None else "200 OK"
        body = json.dumps(found if found is not None else {}).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


def chunk(text=None, finish=None, **delta):
    """One event of a stream, as bytes."""
    delta = {**delta, **({} if text is None else {"content": text})}
    body = {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@pytest.fixture
def ask():
    """Makes a Call to a simulator."""

    def make(simulator, text="hello", settings=None, show=None, **options):
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        body = {"model": simulator.model, "messages": messages, "max_tokens": options.pop("max_tokens", 512)}
        body.update(options.pop("extra", {}))
        return Call(
            endpoint=Endpoint(simulator.base_url, simulator.model, options.pop("api_key", "")),
            settings=LocalSettings.model_validate({**FAST, **(settings or {})}),
            body=body,
            caller=Caller("WriteCode", "Engineer", "Engineer"),
            show=show or (lambda text: None),
            **options,
        )

    return make


@contextlib.contextmanager
def serve(*arguments, log=subprocess.DEVNULL):
    """The address of a real llama.cpp server with these arguments; ``log`` gets what it writes about itself."""
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "serve_llama_cpp.py"), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    try:
        yield process.stdout.readline().strip() + "/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def tiny_gguf():
    """A tiny model with random weights for real llama.cpp."""
    pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this Python")
    model = _home / "tiny.gguf"
    subprocess.run([sys.executable, str(TESTS / "make_tiny_gguf.py"), str(model)], check=True)
    return model


@pytest.fixture(scope="session")
def llama_cpp(tiny_gguf):
    """The address of a real llama.cpp server with a tiny random model and a context of 2,048 tokens."""
    with serve(tiny_gguf, 2048) as base_url:
        yield base_url


def pytest_addoption(parser):
    names = ["llama-cpp-python", "mlx-lm", "transformers", "vllm", "litellm", "all"]
    parser.addoption("--server", choices=names, help="with -m real: the server to install, to start and to test")


def pytest_configure(config):
    config.addinivalue_line("markers", "real: against a real server that is installed for it (--server NAME)")
    if config.getoption("markexpr") == "real" and config.getoption("--server") is None:
        raise pytest.UsageError("-m real needs --server NAME")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--server") is None:
        left_out = [item for item in items if item.get_closest_marker("real")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter):
    version = metadata.version("metagpt")
    terminalreporter.write_line(f"Tested with MetaGPT {version}.")
    if not version.startswith("1.") and not os.environ.get("METAGPT_1_0"):
        terminalreporter.write_line("MetaGPT 1.0.0 was not tested: set METAGPT_1_0 to the folder of a checkout of its main branch.")
