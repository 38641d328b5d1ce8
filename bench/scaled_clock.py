"""A process whose clock runs faster: every time-out, back-off and deadline of every library in it, alike.

``install`` must come before the libraries that are measured are imported, since some take ``time.time`` by its name.
What takes CPU is not faster: at too high a scale, CPU time shows as waiting. C code that waits by itself (a lock with a
time-out, SQLite) goes by the real clock, too.
"""

import asyncio
import selectors
import time

__all__ = ["install"]


class _ScaledSelector(selectors.DefaultSelector):
    def __init__(self, scale):
        super().__init__()
        self._scale = scale

    def select(self, timeout=None):
        return super().select(timeout / self._scale if timeout is not None and timeout > 0 else timeout)


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Makes loops whose ``time`` is that of the process, also for ``asyncio.run``."""

    def __init__(self, scale):
        super().__init__()
        self._scale = scale

    def new_event_loop(self):
        # BaseEventLoop.time() calls time.monotonic(), which install() has replaced.
        return asyncio.SelectorEventLoop(_ScaledSelector(self._scale))


def _faster(clock, scale):
    begun = clock()

    def scaled():
        return begun + (clock() - begun) * scale

    return scaled


def install(scale):
    """Makes ``time.time``, ``monotonic``, ``perf_counter``, ``sleep`` and asyncio's loops ``scale`` times faster."""
    sleep = time.sleep
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, _faster(getattr(time, name), scale))
    time.sleep = lambda seconds: sleep(seconds / scale)
    asyncio.set_event_loop_policy(_Policy(scale))
