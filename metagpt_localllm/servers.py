"""What kind of server answers, how large its context is, and how it counts tokens.

Asked once per address; a server that does not say is treated as a plain OpenAI-compatible one.
Sources: the servers' own code and answers, llama.cpp b11549, Ollama 0.33, vLLM 0.32, LM Studio's documentation.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any, Mapping, Optional
from weakref import WeakKeyDictionary

import anyio
import httpx

from metagpt_localllm.transport import Endpoint, client_for

__all__ = ["PLAIN", "UNKNOWN", "Identified", "Learned", "Server", "count_tokens", "forget", "identify", "known", "learned"]

#: Seconds for finding out what the server is: it answers such questions at once, or is busy or broken.
_PROBE_LIMIT = 1.0
#: Seconds for counting the tokens of a prompt.
_COUNT_LIMIT = 5.0
#: Seconds for one look whether the server is up.
_POLL_LIMIT = 5.0
#: Seconds between two such looks, at the most.
_LONGEST_PAUSE = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """What is known about a server.

    Attributes:
        kind: "llama.cpp", "Ollama", "LM Studio", "vLLM", "plain" (none of these), or "unknown" (it did not answer).
        window: context window of the loaded model in tokens, or None where it does not say.
        images: whether the model sees images, or None where it does not say.
    """

    kind: str
    window: Optional[int] = None
    images: Optional[bool] = None

    @property
    def extras(self) -> dict[str, Any]:
        """Fields for a request beyond OpenAI's, which make its work visible."""
        return {"return_progress": True} if self.kind == "llama.cpp" else {}


    @property
    def counts(self) -> bool:
        """Whether it counts the tokens of a prompt."""
        return self.kind in ("llama.cpp", "vLLM")


PLAIN = Server("plain")
UNKNOWN = Server("unknown")


@dataclass(frozen=True)
class Identified:
    """The outcome of asking. ``hung``: a connection stood, and no answer came."""

    server: Server
    hung: bool = False


@dataclass
class Learned:
    """What the overflow errors of a server have taught.

    Attributes:
        window: context window in tokens as such an error named it, or None.
        scale: tokens as the server counts them over those that we estimate; 1 until an error says otherwise.
    """

    window: Optional[int] = None
    scale: float = 1.0


_Key = tuple[str, str]
_servers: dict[_Key, Server] = {}
_learned: dict[_Key, Learned] = {}
_strict: set[str] = set()
_probes: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, asyncio.Task[Identified]]] = WeakKeyDictionary()


def _key(endpoint: Endpoint) -> _Key:
    return endpoint.base_url, endpoint.model


def known(endpoint: Endpoint) -> Optional[Server]:
    """What an earlier call has found out, or None."""
    return _servers.get(_key(endpoint))


def learned(endpoint: Endpoint) -> Learned:
    """What earlier calls have learned; to be changed in place."""
    return _learned.setdefault(_key(endpoint), Learned())


def forget(endpoint: Endpoint, *, restarted: bool = False) -> None:
    """The server may have changed, so it is asked again; one that was ``restarted`` may also hold another window."""
    _servers.pop(_key(endpoint), None)
    if restarted:
        _learned.pop(_key(endpoint), None)


async def identify(endpoint: Endpoint) -> Identified:
    """Asks the server what it is, for at most a second, unless an earlier call has. Never raises.

    Calls that begin at the same time share one probe: on llama-cpp-python any request cuts a running stream.
    """
    found = known(endpoint)
    if found is not None:
        return Identified(found)
    probes = _probes.setdefault(asyncio.get_running_loop(), {})
    probe = probes.get(_key(endpoint))
    if probe is None:
        probe = probes[_key(endpoint)] = asyncio.ensure_future(_identify(endpoint))
        probe.add_done_callback(lambda _: probes.pop(_key(endpoint), None))
    return await asyncio.shield(probe)


async def _identify(endpoint: Endpoint) -> Identified:
    probe = _Probe(endpoint)
    server: Optional[Server] = None
    hung = True
    with anyio.move_on_after(_PROBE_LIMIT):
        try:
            server = await probe.run()
        except Exception as error:  # whatever odd thing answers there, the call itself will tell
            _log.debug("%s was not identified: %s", endpoint.address, type(error).__name__)
        hung = False
    if server is None:
        return Identified(UNKNOWN, hung=hung and probe.connected)
    # A model that is loaded on demand has no window yet, and what lists no models may be a proxy: ask again next time.
    if server.window is not None or (server.kind == "plain" and probe.listed):
        _servers[_key(endpoint)] = server
    return Identified(server)


class _Probe:
    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.connected = False
        self.listed = False

    async def _trace(self, event: str, _info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self.connected = True

    async def _ask(self, url: str, body: Optional[Mapping[str, Any]] = None) -> Optional[Mapping[str, Any]]:
        """The JSON object at ``url``; None where there is none."""
        response = await client_for(self.endpoint).request(
            "GET" if body is None else "POST", url, json=body, headers=self.endpoint.headers,
            extensions={"trace": self._trace},
        )  # fmt: skip
        if response.status_code >= 500 or response.status_code in (401, 403):
            raise httpx.HTTPError("loading, behind a proxy, or without the right key")
        if response.status_code != 200:
            return None
        try:
            answer = response.json()
        except ValueError:
            return None
        return answer if isinstance(answer, Mapping) else None

    async def run(self) -> Server:
        root, model = self.endpoint.root, self.endpoint.model
        props = await self._ask(f"{root}/props")
        if props is not None and isinstance(props.get("default_generation_settings"), Mapping):
            modalities = props.get("modalities")
            images = bool(modalities.get("vision")) if isinstance(modalities, Mapping) else None
            return Server("llama.cpp", _positive(props["default_generation_settings"].get("n_ctx")), images)
        version = await self._ask(f"{root}/api/version")
        if version is not None and "version" in version:
            return await self._ollama(root, model)
        for path in ("/api/v1/models", "/api/v0/models"):
            listing = await self._ask(root + path)
            if listing is not None:
                return _lm_studio(listing, model)
        models = await self._ask(self.endpoint.base_url.rstrip("/") + "/models")
        self.listed = models is not None
        for entry in _list(models, "data"):
            if entry.get("owned_by") == "vllm":
                same = [e for e in _list(models, "data") if e.get("id") == model] or [entry]
                return Server("vLLM", _positive(same[0].get("max_model_len")))
            if entry.get("owned_by") == "llamacpp" and isinstance(entry.get("meta"), Mapping):
                return Server("llama.cpp", _positive(entry["meta"].get("n_ctx")))
        return PLAIN

    async def _ollama(self, root: str, model: str) -> Server:
        loaded = await self._ask(f"{root}/api/ps")
        names = {model, f"{model}:latest"}
        for entry in _list(loaded, "models"):
            if names & {entry.get("name"), entry.get("model")}:
                return Server("Ollama", _positive(entry.get("context_length")))
        return Server("Ollama")


def _lm_studio(listing: Mapping[str, Any], model: str) -> Server:
    for entry in [*_list(listing, "models"), *_list(listing, "data")]:
        instances = _list(entry, "loaded_instances")
        if model not in {entry.get("key"), entry.get("id"), *(i.get("id") for i in instances)}:
            continue
        capabilities = entry.get("capabilities")
        images = bool(capabilities.get("vision")) if isinstance(capabilities, Mapping) else None
        windows = [(i.get("config") or {}).get("context_length") for i in instances] + [entry.get("loaded_context_length")]
        return Server("LM Studio", next(filter(None, map(_positive, windows)), None), images)
    return Server("LM Studio")


def _list(holder: Optional[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    entries = holder.get(key) if holder is not None else None
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def _positive(value: Any) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


async def count_tokens(server: Server, endpoint: Endpoint, body: Mapping[str, Any]) -> Optional[int]:
    """Tokens of the prompt in ``body`` as the server's own tokenizer and template make them, or None. Never raises."""
    if not server.counts:
        return None
    prompt = {key: body[key] for key in ("model", "messages", "tools") if body.get(key)}
    client = client_for(endpoint)

    async def ask(path: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
        content = json.dumps(question, default=str).encode("utf-8", "replace")
        response = await client.post(endpoint.root + path, content=content, headers=endpoint.headers)
        answer = response.json() if response.status_code == 200 else {}
        return answer if isinstance(answer, Mapping) else {}

    with anyio.move_on_after(_COUNT_LIMIT):
        try:
            if server.kind == "vLLM":
                return _positive((await ask("/tokenize", prompt)).get("count"))
            counted = _positive((await ask("/v1/chat/completions/input_tokens", prompt)).get("input_tokens"))
            if counted is not None:
                return counted
            text = (await ask("/apply-template", prompt)).get("prompt")  # builds before b9540
            if isinstance(text, str):
                tokens = (await ask("/tokenize", {"content": text, "add_special": True})).get("tokens")
                return len(tokens) if isinstance(tokens, list) else None
        except Exception as error:  # the estimate serves instead
            _log.debug("%s did not count: %s", endpoint.address, type(error).__name__)
    return None


async def _is_up(endpoint: Endpoint, limit: float) -> bool:
    """Whether anything answers at the server's address that is not loading. Never raises."""
    with anyio.move_on_after(limit):
        try:
            response = await client_for(endpoint).get(f"{endpoint.root}/health", headers=endpoint.headers)
            return response.status_code != 503
        except Exception as error:
            _log.debug("%s is not up: %s", endpoint.address, type(error).__name__)
    return False


async def wait_until_up(endpoint: Endpoint, until: float, first_pause: float) -> bool:
    """Polls until the server is up or the event loop's clock shows ``until``; pauses grow to 5 seconds."""
    pause = first_pause
    while True:
        left = until - anyio.current_time()
        if left <= 0:
            return False
        await anyio.sleep(min(pause, left))
        left = until - anyio.current_time()
        if left > 0 and await _is_up(endpoint, min(_POLL_LIMIT, left)):
            return True
        pause = min(pause * 2, max(_LONGEST_PAUSE, first_pause))


def mark_strict(endpoint: Endpoint) -> None:
    """Remembers that the server refuses fields it does not know."""
    _strict.add(endpoint.base_url)


def is_strict(endpoint: Endpoint) -> bool:
    return endpoint.base_url in _strict
