"""Connections: none outlives its request, however that ends."""

import asyncio

import anyio
import pytest

from metagpt_localllm.servers.base import Ask
from metagpt_localllm.transport import Endpoint


class Mute:
    """Takes connections and says nothing. ``open``: those that nobody has closed."""

    async def __aenter__(self):
        self.open = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self.open:
            writer.close()

    async def _serve(self, reader, writer):
        self.open.add(writer)
        try:
            while await reader.read(1024):
                pass
        except ConnectionError:
            pass
        self.open.discard(writer)
        writer.close()


@pytest.mark.parametrize(
    "base_url, proxy",
    [
        ("http://{}/v1", None), ("https://{}/v1", None),
        ("http://model.test/v1", "http://{}"), ("https://model.test/v1", "http://{}"), ("http://model.test/v1", "socks5://{}"),
    ],
    ids=["http", "https", "http proxy", "tunnel", "socks"],
)  # fmt: skip
async def test_a_request_that_is_given_up_leaves_no_connection(base_url, proxy):
    """Not even in the TLS handshake, which a server that takes no more requests never ends."""
    if proxy and proxy.startswith("socks"):
        pytest.importorskip("socksio")
    async with Mute() as server:
        ask = Ask(Endpoint(base_url.format(server.address), "m", "", proxy and proxy.format(server.address)))
        for _ in range(3):
            with anyio.move_on_after(0.1) as scope:
                await ask.models()
            assert scope.cancelled_caught
        with anyio.move_on_after(2):
            while server.open:
                await asyncio.sleep(0.01)
        assert not server.open
