"""``on_event``: the events of all calls for a user interface, a log of one's own, or whatever a user builds."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from typing import Any, Awaitable, Callable, Deque, Optional, Union
from weakref import WeakKeyDictionary

from metagpt_localllm import events
from metagpt_localllm.events import Event

__all__ = ["Subscription", "on_event"]

_log = logging.getLogger(__name__)
#: Events that may wait for an async callback. What is too slow for more misses tokens, and nothing else.
_MOST_WAITING = 10_000


def on_event(callback: Callable[[Any], Union[None, Awaitable[None]]], *kinds: type[Event]) -> Subscription:
    """Calls ``callback`` with what happens to each call from now on; see :mod:`metagpt_localllm.events`.

    A plain function runs on the event loop of the call and must not block. What an async one returns is awaited in a task
    beside the call, one event after the other. An exception in either is logged (at debug level) and harms no call.

    Args:
        callback: gets one event.
        kinds: classes of events; none for all of them, tokens included.

    Returns:
        Call it to end this; ``await`` its :meth:`~Subscription.drained` before the event loop ends, where ``callback`` is
        async and the last events matter.
    """
    return Subscription(callback, kinds)


class Subscription:
    """What :func:`on_event` gives."""

    def __init__(self, callback: Callable[[Any], Union[None, Awaitable[None]]], kinds: tuple[type[Event], ...]) -> None:
        self._callback = callback
        self._waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, _InOrder] = WeakKeyDictionary()
        self._unsubscribe = events.subscribe(self._take, *(kinds or events.KINDS))

    def __call__(self) -> None:
        """No more events; those that wait for an async callback still come."""
        self._unsubscribe()

    async def drained(self) -> None:
        """Waits until the async callback has taken all events that there are on this loop."""
        queue = self._waiting.get(asyncio.get_running_loop())
        while queue is not None and queue.task is not None and not queue.task.done():
            await asyncio.wait([queue.task])

    def _take(self, event: Event) -> None:
        result = self._callback(event)
        if inspect.isawaitable(result):
            loop = asyncio.get_running_loop()
            queue = self._waiting.get(loop)
            if queue is None:
                queue = self._waiting[loop] = _InOrder()
            queue.put(result, droppable=isinstance(event, (*events.FREQUENT, events.Prefill)))


class _InOrder:
    """Awaits one thing after the other, in a task of its own."""

    def __init__(self) -> None:
        self.task: Optional[asyncio.Task[None]] = None
        self._queue: Deque[Awaitable[None]] = deque()
        self._complained = False

    def put(self, one: Awaitable[None], *, droppable: bool) -> None:
        if droppable and len(self._queue) >= _MOST_WAITING:
            _close(one)
            if not self._complained:
                self._complained = True
                _log.warning("a callback of on_event is too slow: it misses tokens, and nothing else")
            return
        self._queue.append(one)
        if self.task is None or self.task.done():
            self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            while self._queue:
                try:
                    await self._queue.popleft()
                except Exception:
                    _log.debug("a callback of on_event failed", exc_info=True)
        finally:  # the loop ends
            while self._queue:
                _close(self._queue.popleft())


def _close(one: Awaitable[None]) -> None:
    """A coroutine that is never awaited would complain of that."""
    if inspect.iscoroutine(one):
        one.close()
