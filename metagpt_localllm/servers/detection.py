"""Finding out what kind of server answers, once per address, and what is asked of it beside the chat.

Nothing here ever fails a call or delays it by more than a second (counting tokens, and proving a continuation: five).
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional
from weakref import WeakKeyDictionary

import anyio
import httpx

from metagpt_localllm.servers.base import Ask, Health, Loading, Server, Unanswered
from metagpt_localllm.servers.litellm import LiteLLM
from metagpt_localllm.servers.llama_cpp import LlamaCpp
from metagpt_localllm.servers.llama_cpp_python import LlamaCppPython
from metagpt_localllm.servers.llama_swap import LlamaSwap
from metagpt_localllm.servers.lm_studio import LMStudio
from metagpt_localllm.servers.mlx_lm import MLXLM
from metagpt_localllm.servers.ollama import Ollama
from metagpt_localllm.servers.transformers_serve import TransformersServe
from metagpt_localllm.servers.vllm import VLLM, RayServe, SGLang, TabbyAPI
from metagpt_localllm.transport import Endpoint

__all__ = [
    "KINDS", "UNKNOWN", "Identified", "Learned", "continuation", "count_tokens", "forget", "identify", "is_strict",
    "kind_named", "known", "learned", "load", "mark_strict", "wait_until_up",
]  # fmt: skip

#: The kinds of servers, in the order in which they are tried where the list of models gives none of them away: LiteLLM before
#: any that is asked for ``/health``.
KINDS: tuple[type[Server], ...] = (
    LlamaCpp, LlamaSwap, Ollama, LMStudio, VLLM, RayServe, SGLang, TabbyAPI, LlamaCppPython, LiteLLM, MLXLM, TransformersServe,
)  # fmt: skip
#: A server that did not even say that it is none of these.
UNKNOWN = Server()
#: Seconds for finding out what the server is: it answers such questions at once, or is busy or broken.
_PROBE_LIMIT = 1.0
#: Seconds for counting the tokens of a prompt.
_COUNT_LIMIT = 5.0
#: Seconds for the proof that a continuation goes on where the answer broke off.
_PROOF_LIMIT = 5.0
#: Seconds for one look whether the server is up.
_POLL_LIMIT = 5.0
#: Seconds between two such looks, at the most.
_LONGEST_PAUSE = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identified:
    """The outcome of asking.

    Attributes:
        server: what it is; the plain one where that did not come out.
        hung: a connection stood, and no answer came.
        refused: it wants another API key than the endpoint has, or any.
    """

    server: Server
    hung: bool = False
    refused: bool = False


@dataclass
class Learned:
    """What the overflow errors of a server have taught.

    Attributes:
        window: context window in tokens as such an error named it, or None.
        scale: by how much more we estimate than usual, since the server refused a prompt and did not say how long it was.
        counts_all: whether its count of a prompt's tokens can be compared with ours.
        continues: whether it goes on with answers that broke off, as far as is known.
        failed_counts: times in a row that it did not count when it was asked to.
        asked: when it was last asked whether the window has grown, by the event loop's clock.
    """

    window: Optional[int] = None
    scale: float = 1.0
    counts_all: bool = True
    continues: bool = True
    failed_counts: int = 0
    asked: float = -math.inf


_Key = tuple[str, str]
_servers: dict[_Key, Server] = {}
_learned: dict[_Key, Learned] = {}
_strict: set[str] = set()
_probes: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, asyncio.Task[Identified]]] = WeakKeyDictionary()


def kind_named(name: str) -> type[Server]:
    """The kind that ``llm.local.server`` names.

    Raises:
        ValueError: there is none of that name.
    """
    every: tuple[type[Server], ...] = (*KINDS, Server)
    kinds = {kind.name: kind for kind in every}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are: auto, {', '.join(kinds)}"
        raise ValueError(f"there is no server '{name}'; {hint}")
    return kinds[name]


def _key(endpoint: Endpoint) -> _Key:
    return endpoint.base_url, endpoint.model


def known(endpoint: Endpoint) -> Optional[Server]:
    """What an earlier call has found out, or None."""
    found = _servers.get(_key(endpoint))
    if found is None:
        # The question for another model would harm this one's answer.
        quiet = (server for (url, _), server in _servers.items() if server.quiet and url == endpoint.base_url)
        found = next(quiet, None)
    return found


def learned(endpoint: Endpoint) -> Learned:
    """What earlier calls have learned; to be changed in place."""
    return _learned.setdefault(_key(endpoint), Learned())


def forget(endpoint: Endpoint, *, restarted: bool = False) -> None:
    """The server may have changed, so it is asked again; one that was ``restarted`` may also hold another window.

    A quiet one is asked again only when it was restarted, since then no answer runs.
    """
    if restarted:
        _learned.pop(_key(endpoint), None)
        for key in [key for key, server in _servers.items() if server.quiet and key[0] == endpoint.base_url]:
            del _servers[key]
    found = _servers.get(_key(endpoint))
    if found is not None and not found.quiet:
        del _servers[_key(endpoint)]


async def identify(endpoint: Endpoint, named: str = "auto") -> Identified:
    """Asks the server what it is, for at most a second, unless an earlier call has. Never raises.

    Calls that begin at the same time share one probe: on llama-cpp-python any request cuts a running stream.

    Args:
        endpoint: where it is.
        named: ``llm.local.server``: "auto", or the name of the kind that it is taken for.
    """
    found = known(endpoint)
    if found is not None and not await _has_left(found, endpoint):
        return Identified(found)
    probes = _probes.setdefault(asyncio.get_running_loop(), {})
    probe = probes.get(_key(endpoint))
    if probe is None:
        probe = probes[_key(endpoint)] = asyncio.ensure_future(_identify(endpoint, named))
        probe.add_done_callback(lambda _: probes.pop(_key(endpoint), None))
    return await asyncio.shield(probe)


async def _has_left(server: Server, endpoint: Endpoint) -> bool:
    """Whether the model is known to have left the memory, for another one perhaps; then what is known of it is forgotten."""
    if server.shares:
        with anyio.move_on_after(_PROBE_LIMIT):
            try:
                if await server.is_loaded(Ask(endpoint)) is False:
                    forget(endpoint)
                    return True
            except Exception as error:  # the call itself will tell
                _log.debug("%s does not tell what is loaded: %s", endpoint.address, type(error).__name__)
    return False


async def _identify(endpoint: Endpoint, named: str) -> Identified:
    ask = Ask(endpoint)
    kind = None if named == "auto" else kind_named(named)
    if kind is not None and kind.quiet:
        return Identified(_servers.setdefault(_key(endpoint), kind()))
    server: Optional[Server] = None
    hung = True
    with anyio.move_on_after(_PROBE_LIMIT):
        try:
            server = await (_detect(ask) if kind is None else kind.identify(ask, endpoint.model))
        except Exception as error:  # whatever odd thing answers there, the call itself will tell
            _log.debug("%s was not identified: %s", endpoint.address, type(error).__name__)
        hung = False
    if server is None:
        unknown = kind() if kind is not None else UNKNOWN
        return Identified(unknown, hung=hung and ask.connected, refused=ask.refused)
    if server.settled:
        _servers[_key(endpoint)] = server
    return Identified(server)


class _Unlisted(Server):
    """A plain server that does not even list its models, which may be a proxy in front of one that starts."""

    settled = False


async def _detect(ask: Ask) -> Server:
    """The list of models, which all servers have, gives most of them away; the others are tried one by one."""
    model = ask.endpoint.model
    try:
        models = await ask.models()
    except Unanswered:
        for kind in KINDS:
            server = None if kind.lists else await kind.identify(ask, model)
            if server is not None:
                return server
        raise
    likely = [kind for kind in KINDS if models is not None and kind.recognizes(models)]
    for kind in likely:
        server = await kind.identify(ask, model)
        if server is not None:
            return server
    for kind in KINDS:
        # What another server or a proxy says to a question for this kind means nothing.
        with contextlib.suppress(Unanswered):
            server = None if kind in likely else await kind.identify(ask, model)
            if server is not None:
                return server
    return Server() if models is not None else _Unlisted()


async def load(server: Server, endpoint: Endpoint, limit: float) -> None:
    """Lets the server load its model before anything is asked of it, for at most ``limit`` seconds. Never raises."""
    with anyio.move_on_after(limit):
        try:
            await server.load(Ask(endpoint), endpoint.model)
        except Exception as error:  # the call itself will tell
            _log.debug("%s did not load %s: %s", endpoint.address, endpoint.model, type(error).__name__)


async def count_tokens(server: Server, endpoint: Endpoint, body: Mapping[str, Any]) -> Optional[int]:
    """Tokens of the prompt in ``body`` as the server's own tokenizer and template make them, or None. Never raises."""
    if not server.counts:
        return None
    prompt = {key: body[key] for key in ("model", "messages", "tools") if body.get(key)}
    with anyio.move_on_after(_COUNT_LIMIT):
        try:
            return await server.count_tokens(Ask(endpoint), prompt)
        except Exception as error:  # the estimate serves instead
            _log.debug("%s did not count: %s", endpoint.address, type(error).__name__)
    return None


async def continuation(
    server: Server, endpoint: Endpoint, body: Mapping[str, Any], partial: str, tokens: int
) -> Optional[Mapping[str, Any]]:
    """The request that goes on with ``partial`` (of so many tokens) as the one of ``body`` would have.

    None where it cannot be proved that it will; a server that does not answer the question proves nothing.

    Raises:
        httpx.TransportError: it is not there, so that there is nobody to prove it.
        Loading: it is, but not yet.
    """
    request = server.continuation(body, partial, tokens)
    if request is not None:
        with anyio.move_on_after(_PROOF_LIMIT):
            try:
                return request if await server.proves(Ask(endpoint), body, partial) else None
            except (httpx.TransportError, Loading):
                raise
            except Exception as error:  # then it begins afresh
                _log.debug("%s proved no continuation: %s", endpoint.address, type(error).__name__)
    return None


async def _is_up(endpoint: Endpoint, limit: float) -> bool:
    """Whether anything answers at the server's address that is not loading. Never raises."""
    with anyio.move_on_after(limit):
        try:
            ask, server = Ask(endpoint), known(endpoint)
            if server is None and await ask.text("/health/liveliness") is not None:
                server = LiteLLM()  # its /health would cost a chat with each of its models
            return await (server or UNKNOWN).health(ask) is Health.UP
        except Loading:
            return False
        except Unanswered:  # by whatever else is there
            return True
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
