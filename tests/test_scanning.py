"""Which model servers run: by what answers at the usual ports and at some more."""

import asyncio
import contextlib
import json
from urllib.parse import urlsplit

import pytest
from conftest import RawServer

from metagpt_localllm import scanning
from metagpt_localllm.scanning import Found, ollama_host, scan
from metagpt_localllm.simulator import DIALECTS, Machine


@pytest.fixture(autouse=True)
def _no_other_servers(monkeypatch):
    # What runs on the machine of the tests is no business of theirs.
    monkeypatch.setattr(scanning, "USUAL_PORTS", {})
    monkeypatch.delenv("OLLAMA_HOST", raising=False)


def port_of(server):
    return urlsplit(server.base_url).port


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_kind_of_server_is_found_with_its_models(simulator, dialect):
    async with simulator(dialect=dialect, model="qwen") as server:
        (found,) = await scan(extra_ports=[port_of(server)])
    assert (found.base_url, found.kind) == (server.base_url, dialect.replace("-router", ""))
    assert found.models == ("qwen",) or dialect in ("mlx-lm", "transformers")


async def test_the_window_is_told_where_the_server_tells_it(simulator):
    async with simulator(machine=Machine(context=6144)) as server:
        (found,) = await scan(extra_ports=[port_of(server)])
    assert found.window == 6144


async def test_a_server_on_the_other_loopback_address_only_is_found(simulator):
    async with simulator() as server, RawServer() as other:
        port = port_of(server)
        try:
            relay = await asyncio.start_server(_relay(port), "::1", port_of(other))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
        async with relay:
            found = await scan(extra_ports=[port_of(other)])
    assert [what.base_url for what in found] == [f"http://[::1]:{port_of(other)}/v1"]


async def test_a_server_at_both_addresses_is_listed_once(simulator):
    async with simulator() as server:
        try:
            relay = await asyncio.start_server(_relay(port_of(server)), "::1", port_of(server))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
        async with relay:
            found = await scan(extra_ports=[port_of(server)])
    assert [what.base_url for what in found] == [server.base_url]


def _relay(port):
    async def serve(reader, writer):
        there, to = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source, sink):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, to), pump(there, writer))

    return serve


async def test_what_accepts_and_never_answers_takes_no_longer_than_the_limit_and_hides_nobody(simulator):
    async def silent(reader, writer):
        await asyncio.sleep(3600)

    mute = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with simulator() as server:
        ports = [mute.sockets[0].getsockname()[1], port_of(server)]
        found = await asyncio.wait_for(scan(extra_ports=ports, limit=0.5), 60)
    mute.close()
    assert [what.base_url for what in found] == [server.base_url]


async def test_a_server_that_stops_answering_in_the_middle_is_listed_with_what_it_has_said(monkeypatch):
    async def never():
        await asyncio.sleep(3600)

    listing = {"object": "list", "data": [{"id": "m", "owned_by": "llamacpp"}]}
    async with RawServer(about={"/v1/models": listing, "/props": never}) as server:
        found = await scan(extra_ports=[port_of(server)], limit=0.5)
    assert found == [Found(server.base_url, "llama.cpp", ("m",))]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<html>Jenkins</html>",
        b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"data": [{"brand": "Citroen"}]}',
        b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"status": "ok"}',
        b"HTTP/1.1 403 Forbidden\r\nserver: AirTunes/775.3.1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n<html>Who are you?</html>",
        b"HTTP/1.1 503 Unavailable\r\nserver: nginx\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/login\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
)
async def test_what_is_no_model_server_is_not_listed(answer):
    async with _saying(answer) as (port, _):
        assert await scan(extra_ports=[port]) == []


async def test_one_that_wants_a_key_is_listed_as_such_and_last(simulator):
    async with simulator(dialect="vllm", api_key="secret") as locked, simulator() as open_one:
        found = await scan(extra_ports=[port_of(locked), port_of(open_one)])
    assert [(what.base_url, what.needs_key) for what in found] == [(open_one.base_url, False), (locked.base_url, True)]


async def test_one_that_lists_its_models_without_the_key_but_nothing_else_is_known_to_want_it():
    listing = json.dumps({"object": "list", "data": [{"id": "m", "owned_by": "llamacpp"}]}).encode()
    refusal = b'HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n{"error": {"message": "Invalid API Key"}}'
    public = b"HTTP/1.1 200 OK\r\nserver: llama.cpp\r\nconnection: close\r\n\r\n" + listing
    async with _saying(refusal, {b"/v1/models": public}) as (port, _):
        (found,) = await scan(extra_ports=[port])
    assert (found.kind, found.models, found.needs_key) == ("llama.cpp", ("m",), True)


async def test_llama_cpp_is_found_while_it_loads():
    answer = b'HTTP/1.1 503 Unavailable\r\nserver: llama.cpp\r\nconnection: close\r\n\r\n{"error": {"code": 503}}'
    async with _saying(answer) as (port, _):
        (found,) = await scan(extra_ports=[port])
    assert (found.kind, found.loading) == ("llama.cpp", True)


async def test_ollama_without_a_model_is_found():
    about = {"/v1/models": {"object": "list", "data": None}, "/api/version": {"version": "0.33"}}
    async with RawServer(about=about) as server:
        assert await scan(extra_ports=[port_of(server)]) == [Found(server.base_url, "ollama")]


async def test_models_that_answer_no_chat_come_last():
    models = [{"id": name, "object": "model"} for name in ("nomic-embed-text", "qwen", "bge-m3", "llama")]
    async with RawServer(about={"/v1/models": {"object": "list", "data": models}}) as server:
        (found,) = await scan(extra_ports=[port_of(server)])
    assert found.models == ("qwen", "llama", "nomic-embed-text", "bge-m3")


async def test_what_is_no_model_server_is_asked_for_its_models_and_for_nothing_else():
    page = b"HTTP/1.1 404 Not Found\r\nserver: nginx\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    async with _saying(page) as (port, requests):
        await scan(extra_ports=[port])
    assert [request.split(b"\r\n")[0] for request in requests] == [b"GET /v1/models HTTP/1.1"]
    assert not any(b"authorization" in request.lower() for request in requests)


async def test_only_loopback_is_asked(monkeypatch):
    looked = []

    async def look(endpoint, tell):
        looked.append(urlsplit(endpoint.base_url).hostname)

    monkeypatch.setattr(scanning, "_look", look)
    await scan(extra_ports=[1, 2])
    assert set(looked) == {"127.0.0.1", "::1"}


async def test_the_address_in_ollama_host_is_looked_at_first(simulator, monkeypatch):
    async with simulator(dialect="ollama") as server, simulator() as other:
        monkeypatch.setenv("OLLAMA_HOST", f"0.0.0.0:{port_of(server)}")
        found = await scan(extra_ports=[port_of(other)])
    assert [(what.base_url, what.kind) for what in found] == [(server.base_url, "ollama"), (other.base_url, "llama.cpp")]


@pytest.mark.parametrize(
    "value, url",
    [
        ("127.0.0.1", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),
        (":8000", "http://127.0.0.1:8000/v1"),
        ("localhost:1", "http://127.0.0.1:1/v1"),
        ("::", "http://[::1]:11434/v1"),
        ("[::]:9", "http://[::1]:9/v1"),
        ("[fe80::1]:9", "http://[fe80::1]:9/v1"),
        ("http://box.lan", "http://box.lan:80/v1"),
        ("https://box.lan/ollama/", "https://box.lan:443/ollama/v1"),
        (" 'box.lan:77' ", "http://box.lan:77/v1"),
        ("box:port", None),
        ("ftp://box", None),
        ("[", None),
    ],
)
def test_ollama_host_is_read_as_ollama_does(value, url):
    assert ollama_host(value) == url


@contextlib.asynccontextmanager
async def _saying(answer, by_path=()):
    """A server that says ``answer`` to all, or what ``by_path`` has; its port, and the requests that came."""
    requests = []

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            requests.append(head)
            writer.write(dict(by_path).get(head.split()[1], answer))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], requests
    finally:
        server.close()
