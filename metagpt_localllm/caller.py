"""Who is calling: read off the stack, since MetaGPT's actions and roles run unchanged.

A coroutine that awaits another one stands below it on the stack, so the frames above the provider's
are those of the action and the role. Touches of MetaGPT's and tenacity's internals: the classes
Action and Role, ``action.prefix``, and the local ``retry_state`` of ``AsyncRetrying.__call__``.
"""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any, Iterator, Optional

from metagpt_localllm.tiers import Caller

__all__ = ["find_caller", "find_retry_loop"]

_PREFIX = re.compile(r"You are an? ([^,\n]+), named ")


def _frames() -> Iterator[FrameType]:
    frame: Optional[FrameType] = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def find_caller() -> Caller:
    """The nearest action and role above the caller of this function; empty names where there is none."""
    action_class = getattr(sys.modules.get("metagpt.actions.action"), "Action", None)
    role_class = getattr(sys.modules.get("metagpt.roles.role"), "Role", None)
    if action_class is None and role_class is None:
        return Caller()
    action: Any = None
    role: Any = None
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if owner is None:
            continue
        if action is None and action_class is not None and isinstance(owner, action_class):
            action = owner
        elif role_class is not None and isinstance(owner, role_class):
            role = owner
            break
    profile = str(getattr(role, "profile", "") or "")
    if not profile and action is not None:
        found = _PREFIX.search(str(getattr(action, "prefix", "") or ""))
        profile = found.group(1) if found else ""
    return Caller(
        action=type(action).__name__ if action is not None else "",
        role=type(role).__name__ if role is not None else "",
        profile=profile,
    )


def find_retry_loop() -> Optional[object]:
    """The state of the outermost of MetaGPT's own retry loops that we run in, or None.

    ActionNode and the code-writing actions repeat a failed call up to six times with tenacity; the
    state object is the same for all repetitions of one loop.
    """
    loop: Optional[object] = None
    for frame in _frames():
        if frame.f_code.co_name == "__call__" and str(frame.f_globals.get("__name__", "")).startswith("tenacity"):
            state = frame.f_locals.get("retry_state")
            fn = getattr(state, "fn", None)
            if state is not None and str(getattr(fn, "__module__", "")).startswith("metagpt."):
                loop = state
    return loop
