"""Looks at a server that has gone silent: is it at work, or is it gone? The verdict is pure, the looking is not.

Nothing is asked of a server that shows life by itself, and of one that must not be asked (llama-cpp-python
cuts its stream for any other request) or is unknown only whether its port is open.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
from typing import Any, Callable, Coroutine, Hashable, Optional, Union
from weakref import WeakKeyDictionary

import anyio
import httpx

from metagpt_localllm import errors
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.servers.base import Ask, Health, Server, Work
from metagpt_localllm.transport import Endpoint

__all__ = ["CLOSED_PORT_SECONDS", "IDLE_SECONDS", "MUTE_SECONDS", "Evidence", "Seen", "watch"]

_log = logging.getLogger(__name__)

#: Seconds of silence before the first look.
_FIRST = 1.0
#: Seconds between two looks. llama.cpp notices a client that left later when it is asked more often (measured, b11549).
_INTERVAL = 1.5
#: Seconds for which what one call has seen serves the others that wait for the same server: less than two looks of one
#: call are apart, and than a call is silent before it looks.
_SHARED = 0.5
#: Seconds before a refused connection is tried once more.
_AGAIN = 0.2
#: Seconds that a question may take; at the least, in scaled time.
_LIMIT, _LEAST_LIMIT = 4.0, 0.5
#: Looks in a row that must agree before a server is held for gone.
_REFUSED_LOOKS, _IDLE_LOOKS, _MUTE_LOOKS = 2, 2, 3
#: Seconds until a server is known to be gone: its port is closed; it idles; it takes connections and does not answer
#: (where not even connections are taken, two limits more).
CLOSED_PORT_SECONDS = _FIRST + _AGAIN
IDLE_SECONDS = _FIRST + _INTERVAL
MUTE_SECONDS = _FIRST + (_MUTE_LOOKS + 1) * _LIMIT + (_MUTE_LOOKS - 1) * _INTERVAL


class Seen(enum.Enum):
    """What one look showed, where it was not a report of work."""

    REFUSED = "refused"  # nothing listens any more
    MUTE = "mute"  # it takes connections and does not answer them
    LOADING = "loading"  # it says that it loads its model
    UP = "up"  # it answers, and does not say what it is doing


class Evidence:
    """Weighs one look after the other. Pure.

    Attributes:
        alive: whether the last look proved that work goes on.
    """

    def __init__(self) -> None:
        self.alive = False
        self._marker: Optional[Hashable] = None
        self._counts = {Seen.REFUSED: 0, Seen.MUTE: 0}
        self._idle = 0

    @property
    def mute(self) -> bool:
        """Whether the last look got no answer."""
        return self._counts[Seen.MUTE] > 0

    def forget(self) -> None:
        """The server has shown life by itself."""
        self._counts = dict.fromkeys(self._counts, 0)
        self._idle = 0

    def weigh(self, seen: Union[Seen, Work], silence: float) -> Optional[Failure]:
        """The proof that the request is lost, or None. ``silence``: seconds since the last sign of life."""
        busy = isinstance(seen, Work) and seen.busy
        self.alive = seen is Seen.LOADING
        if isinstance(seen, Work) and busy:
            self.alive = seen.marker != self._marker and self._marker is not None
            self._marker = seen.marker
        for kind in self._counts:
            self._counts[kind] = self._counts[kind] + 1 if seen is kind else 0
        self._idle = self._idle + 1 if isinstance(seen, Work) and not busy else 0
        if self._counts[Seen.REFUSED] >= _REFUSED_LOOKS:
            return _dead(errors.ServerGone, f"the server has stopped listening while we waited ({silence:.1f} s of silence)")
        if self._counts[Seen.MUTE] >= _MUTE_LOOKS:
            what = f"the server takes connections and answers nothing any more ({silence:.1f} s of silence)"
            return _dead(errors.ServerUnresponsive, what)
        if self._idle >= _IDLE_LOOKS:
            what = f"the server works on nothing while we wait for it ({silence:.1f} s of silence): the request is lost"
            return _dead(errors.RequestLost, what)
        return None


def _dead(error: type[errors.LocalLLMError], what: str) -> Failure:
    remedy = "Look at the server's own log: it may have crashed, been stopped, or swap."
    return Failure(Kind.TRANSIENT, error, what, remedy, "llm.local.retry.attempts")


async def watch(
    server: Server, endpoint: Endpoint, silence: Callable[[], float], proof: Callable[[bool], None], *, scale: float = 1.0
) -> Failure:
    """Looks at the server whenever it has been silent for a second, until it is proven to be gone.

    Args:
        silence: gives the seconds since the last sign of life.
        proof: called when a look proves that the server works, with whether that is loading its model.
        scale: how many times faster than real its time passes.
    """
    evidence = Evidence()
    limit = max(_LIMIT / scale, _LEAST_LIMIT)
    while True:
        left = _FIRST / scale - silence()
        if left > 0:
            evidence.forget()
            await anyio.sleep(left)
            continue
        seen = await _shared_look(server, endpoint, limit, only_health=evidence.mute, keep=_SHARED / scale)
        failure = evidence.weigh(seen, silence())
        if failure is not None:
            return failure
        if evidence.alive:
            proof(seen is Seen.LOADING or (isinstance(seen, Work) and seen.loading))
        await anyio.sleep((_AGAIN if seen is Seen.REFUSED else _INTERVAL) / scale)


class _Look:
    """A look that several calls wait for."""

    def __init__(self, looking: Coroutine[Any, Any, Union[Seen, Work]]) -> None:
        self.waiting = 0
        self.until = math.inf  # it is of use until then
        self.task = asyncio.ensure_future(looking)


_looks: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Endpoint, bool], _Look]] = WeakKeyDictionary()


async def _shared_look(
    server: Server, endpoint: Endpoint, limit: float, *, only_health: bool, keep: float
) -> Union[Seen, Work]:
    """One look for all calls that want one now: hundreds of them would ask a busy server hundreds of times a second."""
    loop = asyncio.get_running_loop()
    looks, key = _looks.setdefault(loop, {}), (endpoint, only_health)
    look = looks.get(key)
    if look is None or loop.time() >= look.until:
        look = looks[key] = _Look(_look(server, endpoint, limit, only_health=only_health))
    look.waiting += 1
    try:
        seen = await asyncio.shield(look.task)
    except BaseException:
        if looks.get(key) is look and (look.task.done() or look.waiting == 1):
            del looks[key]
        raise
    finally:
        look.waiting -= 1
        if not look.waiting:
            look.task.cancel()  # nobody waits for it any more
    if look.until == math.inf:
        # A refusal is tried once more, which is to be another look.
        look.until = loop.time() + (keep if seen is not Seen.REFUSED else 0.0)
    return seen


async def _look(server: Server, endpoint: Endpoint, limit: float, *, only_health: bool) -> Union[Seen, Work]:
    if not await _listens(endpoint, limit):
        return Seen.REFUSED
    if not server.watchable:
        return Seen.UP
    if not only_health:
        with anyio.move_on_after(limit):
            try:
                work = await server.work(Ask(endpoint))
                if work is not None:
                    return work
            except Exception as error:  # it may be busy with a batch, or load: its health tells
                _log.debug("%s does not say what it is doing: %s", endpoint.address, type(error).__name__)
    with anyio.move_on_after(limit):
        try:
            return Seen.LOADING if await server.health(Ask(endpoint)) is Health.LOADING else Seen.UP
        except httpx.HTTPError:
            pass
    return Seen.MUTE


async def _listens(endpoint: Endpoint, limit: float) -> bool:
    """Whether the port takes a connection; a look that says nothing (a proxy, a full backlog) counts as yes."""
    address = httpx.URL(endpoint.base_url)
    if endpoint.proxy is not None or not address.host:
        return True
    with anyio.move_on_after(limit):
        try:
            _, writer = await asyncio.open_connection(address.host, address.port or (443 if address.scheme == "https" else 80))
            writer.close()
        except ConnectionRefusedError:
            return False
        except OSError:
            pass
    return True
