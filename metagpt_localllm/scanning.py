"""Which model servers run on this machine: whoever answers at the ports that they use unless told otherwise.

Every address gets ``GET /v1/models`` first. Only what then looks like a model server is asked further, with the
questions of :mod:`metagpt_localllm.servers`. llama-cpp-python ends a stream that runs at any request: a scan in the
middle of another program's run costs that run an attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence
from urllib.parse import urlsplit

import anyio
import httpx

from metagpt_localllm.servers import KINDS, Ask, Facts, Loading, forget, identify, kind_named
from metagpt_localllm.servers.base import Unanswered, entries
from metagpt_localllm.servers.llama_cpp import LlamaCpp
from metagpt_localllm.transport import Endpoint, is_address

__all__ = [
    "USUAL_PORTS", "Found", "completed", "facts_of_models", "is_chat_model", "look_at", "ollama_host", "same_server",
    "scan",
]  # fmt: skip

#: Port and path of the API, in the order in which they are told. From the servers' sources and documentation.
USUAL_PORTS: Mapping[int, str] = {
    1234: "/v1",  # LM Studio
    11434: "/v1",  # Ollama
    8080: "/v1",  # llama.cpp, llama-swap, mlx_lm, LocalAI
    9931: "/v1",  # llama.cpp, as its log announces
    8000: "/v1",  # vLLM, llama-cpp-python, transformers serve
    30000: "/v1",  # SGLang
    5001: "/v1",  # KoboldCpp
    5000: "/v1",  # TabbyAPI, text-generation-webui
    1337: "/v1",  # Jan
    9997: "/v1",  # Xinference
    23333: "/v1",  # LMDeploy
    4891: "/v1",  # GPT4All
    12434: "/engines/v1",  # Docker Model Runner
    4000: "/v1",  # LiteLLM's proxy
}
_OLLAMAS_PORT = 11434
_MOST_MODELS = 12
#: Parts of the names of models that answer no chat.
_OTHER_TASKS = ("embed", "rerank", "whisper", "-tts", "bge-", "all-minilm", "clip-")


@dataclass(frozen=True)
class Found:
    """A model server that answers.

    Attributes:
        base_url: its OpenAI-compatible address.
        kind: its name, such as ``ollama``; ``plain`` where it is none that we know.
        models: the names that it lists, those that answer chats first; none where it does not tell.
        window: context window in tokens of the first of them, as loaded; None where it does not tell or is not loaded.
        loading: it reads its model and answers nothing yet; only llama.cpp can be told then.
        needs_key: it tells nothing without an API key.
    """

    base_url: str
    kind: str
    models: tuple[str, ...] = ()
    window: Optional[int] = None
    loading: bool = False
    needs_key: bool = False


async def scan(extra_ports: Iterable[int] = (), limit: float = 2.0) -> list[Found]:
    """The model servers on this machine's usual ports, by IPv4 and by IPv6, those that are ready first. Never raises.

    Nothing else is asked but what OLLAMA_HOST names, which may be another machine.

    Args:
        extra_ports: ports that are looked at besides, before the usual ones.
        limit: seconds for all of it, whatever the ports do.
    """
    addresses = _addresses(extra_ports, os.environ.get("OLLAMA_HOST", ""))
    found: dict[str, Found] = {}

    async def note(base_url: str) -> None:
        what = await look_at(Endpoint(base_url, ""), limit)
        if what is not None:
            found[base_url] = what

    async with anyio.create_task_group() as group:
        for base_url in addresses:
            group.start_soon(note, base_url)
    listed = [found[base_url] for base_url in addresses if base_url in found]
    return sorted(_without_twins(listed), key=lambda what: (what.needs_key, what.loading))


async def look_at(endpoint: Endpoint, limit: float) -> Optional[Found]:
    """The model server at one address, asked with its key where it has one; None where none answers. Never raises.

    Args:
        limit: seconds.
    """
    latest: list[Found] = []
    with anyio.move_on_after(limit):
        await _look(endpoint, latest.append)
    return latest[-1] if latest else None


def _addresses(extra_ports: Iterable[int], ollama: str) -> list[str]:
    """Base URLs in the order in which they are told, each once."""
    ports = {**dict.fromkeys(extra_ports, "/v1"), **USUAL_PORTS}
    urls = [f"http://{_netloc(host, port)}{path}" for port, path in ports.items() for host in ("127.0.0.1", "::1")]
    named = ollama_host(ollama) if ollama.strip() else None
    return list(dict.fromkeys([named, *urls] if named else urls))


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ollama_host(value: str) -> Optional[str]:
    """The base URL that OLLAMA_HOST means; None where it is no address.

    As Ollama reads it (envconfig/config.go, Host): a scheme, a port and a path may be there; an address to listen at
    everywhere (0.0.0.0) is reached at loopback.
    """
    text = value.strip().strip("\"'")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    if rest.count(":") > 1 and not rest.startswith("["):
        rest = f"[{rest}]"
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port or ({"http": 80, "https": 443}.get(scheme, _OLLAMAS_PORT) if separator else _OLLAMAS_PORT)
    except ValueError:
        return None
    if scheme not in ("http", "https"):
        return None
    host = {"": "127.0.0.1", "localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(
        parts.hostname or "", parts.hostname or ""
    )
    return f"{scheme}://{_netloc(host, port)}{parts.path.rstrip('/')}/v1"


async def _look(endpoint: Endpoint, tell: Callable[[Found], Any]) -> None:
    """Tells what is there as soon as it is known to be a model server, and again when more is known."""
    base_url, ask = endpoint.base_url, Ask(endpoint)
    try:
        listing = await ask.models()
    except Loading:
        if ask.software == "llama.cpp":
            tell(Found(base_url, LlamaCpp.name, loading=True))
        return
    except Unanswered:
        listing = None
        if ask.refused:
            tell(Found(base_url, "plain", needs_key=True))
            return
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError):
        return
    if listing is not None and _is_list_of_models(listing):
        models = _names(listing)
        likely = next((kind.name for kind in KINDS if kind.recognizes(listing)), "plain")
        tell(Found(base_url, likely, models))
        endpoint = replace(endpoint, model=next(iter(models), endpoint.model))
        forget(endpoint)
        seen = await identify(endpoint)
        kind = likely if seen.refused else seen.server.name
        tell(Found(base_url, kind, models, seen.server.facts.window, needs_key=seen.refused))
        return
    for shy in KINDS:
        if not shy.lists:
            with contextlib.suppress(Unanswered, httpx.HTTPError, ValueError, OSError):
                server = await shy.identify(ask, "")
                if server is not None:
                    tell(Found(base_url, server.name, needs_key=server.locked))
                    return


async def facts_of_models(found: Found, key: str) -> dict[str, Facts]:
    """What a server says of each of its models, of a dozen at the most; loads none of them. Never raises.

    Of a server that every question harms nothing is asked.
    """
    if kind_named(found.kind).quiet:
        return {}
    names = found.models[:_MOST_MODELS]
    seen = await asyncio.gather(*(identify(Endpoint(found.base_url, name, key)) for name in names))
    return {name: one.server.facts for name, one in zip(names, seen)}


def completed(address: str) -> str:
    """A base URL as somebody meant it: with a scheme, without a slash or ``/chat/completions`` at its end.

    Raises:
        ValueError: it is no address.
    """
    text = address.strip().rstrip("/")
    text = text[: -len("/chat/completions")] if text.endswith("/chat/completions") else text
    text = text if "://" in text else f"http://{text}"
    if not is_address(text, "http", "https"):
        raise ValueError(f"{address} is no address of the form http://host:port/v1")
    return text


def same_server(one: object, other: object) -> bool:
    """Whether two base URLs are one server: ``localhost`` is an address of this machine."""
    texts = [str(url).rstrip("/").replace("://localhost", "://127.0.0.1") for url in (one, other)]
    return texts[0] == texts[1]


def _is_list_of_models(listing: Mapping[str, Any]) -> bool:
    """OpenAI's form of it. Ollama without any model has ``"data": null``."""
    data = listing.get("data", False)
    if listing.get("object") == "list" and (data is None or isinstance(data, list)):
        return True
    return isinstance(data, list) and any(isinstance(entry.get("id"), str) for entry in entries(listing, "data"))


def is_chat_model(name: str) -> bool:
    """Whether a model of this name may answer chats: the lists have embeddings and voices, too."""
    return not any(part in name.lower() for part in _OTHER_TASKS)


def _names(listing: Mapping[str, Any]) -> tuple[str, ...]:
    listed = [entry["id"] for entry in entries(listing, "data") if isinstance(entry.get("id"), str)]
    names = dict.fromkeys(name for name in listed if name and name.isprintable())  # they go to a terminal
    return tuple(sorted(names, key=lambda name: not is_chat_model(name)))


def _without_twins(listed: Sequence[Found]) -> list[Found]:
    """Without the second address of a server that listens at both loopback addresses."""
    kept: list[Found] = []
    for what in listed:
        port = urlsplit(what.base_url).port
        twins = [other for other in kept if urlsplit(other.base_url).port == port]
        if not any((other.kind, other.models) == (what.kind, what.models) for other in twins):
            kept.append(what)
    return kept
