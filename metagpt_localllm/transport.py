"""HTTP to the model server: an httpx client for each request, without connections that outlive it."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Awaitable, Callable, Mapping, Optional
from urllib.parse import urlsplit, urlunsplit

import anyio
import httpx

from metagpt_localllm.quoting import SECRET

__all__ = ["Endpoint", "client_for", "is_address", "is_local", "without_login"]

#: MetaGPT's own default of ``llm.api_key``: no key at all.
_NO_KEY = "sk-"


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served.

    Attributes:
        base_url: of the OpenAI API, such as ``http://localhost:1234/v1``.
        model: its name there.
        api_key: sent as a bearer token; never logged, not even in this object's repr.
        proxy: URL of a proxy, or None.
    """

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    proxy: Optional[str] = field(default=None, repr=False)

    @property
    def root(self) -> str:
        """The server's address without the API's ``/v1``."""
        trimmed = self.base_url.rstrip("/")
        return trimmed[: -len("/v1")] if trimmed.endswith("/v1") else trimmed

    @property
    def address(self) -> str:
        """``base_url`` as it may be shown: without a user name and password."""
        return without_login(self.base_url)

    @property
    def chat_url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self.api_key and self.api_key != _NO_KEY:
            headers["authorization"] = f"Bearer {self.api_key}"
        return headers

    def without_key(self, text: str, least: int = SECRET) -> str:
        """``text`` with … for the key, which a server may quote, where that has at least so many characters."""
        return text.replace(self.api_key, "…") if len(self.api_key) >= least else text


def is_address(text: str, *schemes: str) -> bool:
    """Whether it is a URL with one of these schemes, a host, and no port that cannot be."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def without_login(url: str) -> str:
    """``url`` as it may be shown: without a user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def is_local(url: str) -> bool:
    """Whether its host is this machine by a loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def client_for(endpoint: Endpoint) -> httpx.AsyncClient:
    """A client for one request; it need not be closed.

    It keeps no idle connection, so that nothing outlives its request, and so that a request never meets a connection
    that the server has just dropped. A shared client would gain nothing from that, and its pool walks through all its
    connections whenever one begins or ends: with a thousand of them that is most of the CPU time. The environment's
    proxies are not for servers on this machine.
    """
    return _Client(
        proxy=endpoint.proxy,
        trust_env=endpoint.proxy is None and not is_local(endpoint.base_url),
        verify=_ssl_context(),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        timeout=None,
    )


class _Client(httpx.AsyncClient):
    """Closes a connection whose TLS or SOCKS handshake was cancelled.

    httpcore (1.0.9) forgets it then, and the event loop holds it open for as long as the server does.
    """

    def build_request(self, *arguments: Any, **options: Any) -> httpx.Request:
        request = super().build_request(*arguments, **options)
        request.extensions["trace"] = _Closing(request.extensions.get("trace"))
        return request


class _Closing:
    """Closes the connection that a failed step of a request leaves, as httpcore's "trace" extension.

    Args:
        also: another such extension.
    """

    def __init__(self, also: Optional[Callable[[str, Mapping[str, Any]], Awaitable[None]]]) -> None:
        self._also = also
        self._stream: Any = None

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(".connect_tcp.complete"):
            self._stream = info["return_value"]
        elif event.endswith(".failed") and self._stream is not None:
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()
        if self._also is not None:
            await self._also(event, info)


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()
