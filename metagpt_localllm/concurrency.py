"""Turns at a server: what it would only queue waits on our side, where it costs no deadline.

A server that is given more requests than it runs at once lets them wait without a sign of life, and roles
that run side by side evict each other's prompts from its cache. So each address has a gate with as many
places as the server has slots. Roles take turns: the one served last comes last.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from typing import AsyncIterator, Deque
from weakref import WeakKeyDictionary

__all__ = ["Gate", "gate_for"]


class Gate:
    """A number of places, taken in turn by roles.

    Not safe for several threads: there is one gate per address and event loop.

    Attributes:
        places: requests that may run at once; may change at any time.
        running: places that are taken.
    """

    def __init__(self, places: int = 1) -> None:
        self.places = places
        self.running = 0
        self._waiting: OrderedDict[str, Deque[_Waiter]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def turn(self, role: str, *, alone: bool = False) -> AsyncIterator[None]:
        """Waits for a place and holds it.

        Args:
            role: who asks; each role gets its turn, however many requests another has waiting.
            alone: waits until nothing else runs, and lets nothing else in (llama.cpp aborts every running request
                when those that share its context exceed it together).
        """
        waiter = _Waiter(alone)
        await self._enter(role, waiter)
        try:
            yield
        finally:
            self._leave(waiter)

    async def _enter(self, role: str, waiter: _Waiter) -> None:
        self._waiting.setdefault(role, deque()).append(waiter)
        self._admit()
        if waiter.taken:
            return
        waiter.turn = asyncio.get_running_loop().create_future()
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.taken:  # its turn had come in the same moment
                self._leave(waiter)
            else:
                self._waiting[role].remove(waiter)
                if not self._waiting[role]:
                    del self._waiting[role]
                self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            role = next(iter(self._waiting))
            waiter = self._waiting[role][0]
            places = max(self.places, 1) if waiter.alone else 1
            # Whoever is next is not overtaken by one that would fit: else a request that must be alone never comes.
            if self.running + places > max(self.places, 1) and self.running:
                return
            self._waiting[role].popleft()
            self._waiting.move_to_end(role)
            if not self._waiting[role]:
                del self._waiting[role]
            waiter.taken = places
            self.running += places
            if waiter.turn is not None:
                waiter.turn.set_result(None)

    def _leave(self, waiter: _Waiter) -> None:
        self.running -= waiter.taken
        waiter.taken = 0
        self._admit()


class _Waiter:
    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.taken = 0
        self.turn: asyncio.Future[None] | None = None


_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Gate]] = WeakKeyDictionary()


def gate_for(address: str) -> Gate:
    """The gate of a server on the running event loop."""
    return _gates.setdefault(asyncio.get_running_loop(), {}).setdefault(address, Gate())
