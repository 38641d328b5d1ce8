"""A process whose clock stands still while anything works, and jumps to the next timer when all of it waits.

Every time-out, back-off and deadline of every library in it then has its real, documented length, the simulated server in
the same event loop too; hours pass in seconds, and neither the speed nor the load of this machine shows in any result.
What CPU time costs is therefore not measured here (bench/overhead.py does).

``install`` must come before the libraries that are measured are imported, since some take ``time.time`` by its name. Before
a jump the threads of the process are waited for until none is at work (Linux tells: /proc; elsewhere there is a pause).
What waits in C code or on a lock with a time-out goes by the real clock. ``datetime`` does, too.
"""

import asyncio
import os
import selectors
import threading
import time

__all__ = ["install"]

_real_sleep, _real_clock = time.sleep, time.perf_counter
#: Real seconds: for which the interpreter is left to other threads; what that takes at the most when none wants it.
_YIELD, _YIELDED = 2e-5, 1e-3
#: From how many seconds on a jump is a far one, which no thread may miss; looks in a row that must find nobody at work.
_FAR, _LOOKS = 1.0, 10


class _Clock:
    def __init__(self):
        self.passed = 0.0

    def of(self, clock):
        begun = clock()
        return lambda: begun + self.passed

    def sleep(self, seconds):
        if threading.current_thread() is threading.main_thread():
            self.passed += max(seconds, 0.0)
            return
        until = self.passed + seconds
        while self.passed < until:
            _real_sleep(1e-3)


def _wanted(pause):
    """Whether another thread wants the interpreter, which is left to it for a ``pause``."""
    begun = _real_clock()
    _real_sleep(pause)
    return _real_clock() - begun > pause + _YIELDED


def _others_work(pause):
    """Whether another thread is at work, or would be if it got the interpreter."""
    if _wanted(pause):
        return True
    own = str(threading.get_native_id())
    try:
        for thread in os.listdir("/proc/self/task"):
            if thread != own:
                with open(f"/proc/self/task/{thread}/stat", "rb") as stat:
                    if stat.read().rpartition(b")")[2].split()[0] in (b"R", b"D"):
                        return True
    except FileNotFoundError:  # it has ended meanwhile, or this is no Linux
        _real_sleep(_YIELDED)
    return False


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            return super().select(None)
        idle, looks, pause = 0, *((1, _YIELD) if timeout < _FAR else (_LOOKS, _YIELDED))
        while threading.active_count() > 1 and idle < looks:
            idle = 0 if _others_work(pause) else idle + 1
            ready = super().select(0)
            if ready:
                return ready
        self._clock.passed += timeout
        return []


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Makes loops with the clock of the process, also for ``asyncio.run``."""

    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def new_event_loop(self):
        # BaseEventLoop.time() calls time.monotonic(), which install() has replaced.
        return asyncio.SelectorEventLoop(_Selector(self._clock))


def install():
    """Replaces ``time.time``, ``monotonic``, ``perf_counter`` and ``sleep``, and how asyncio's loops wait."""
    clock = _Clock()
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, clock.of(getattr(time, name)))
    time.sleep = clock.sleep
    asyncio.set_event_loop_policy(_Policy(clock))
