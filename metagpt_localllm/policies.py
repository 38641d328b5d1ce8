"""What goes first when a conversation is too long for the context window. Pure.

A policy takes the turns that may go, oldest first, and the tokens that may remain of them, and yields the steps in the
order in which they are to be taken; whoever asked stops when enough has gone. The system messages, the task and the latest
message are not among the turns. ``context.policy`` names one of these, or a function of the user's own as
``package.module:function``.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, Mapping, Optional, Sequence, Union, cast

from metagpt_localllm.messages import Message
from metagpt_localllm.tokens import estimate_message

__all__ = ["NAMES", "Drop", "Policy", "Replace", "Step", "Turn", "named", "of_compress_type"]

#: Tokens that a stub must save to be worth its place.
_WORTH_A_STUB = 60
#: Characters of an observation that its stub quotes.
_QUOTED = 60


@dataclass(frozen=True)
class Turn:
    """Messages that stay or go together: what the model did, and what came of it.

    Attributes:
        indices: their positions in the conversation.
        messages: themselves.
        tokens: of them together.
    """

    indices: Sequence[int]
    messages: Sequence[Message]
    tokens: int


@dataclass(frozen=True)
class Drop:
    """The turn goes. ``keep``: of one that need not go whole, as much of its start or its end remains as has room."""

    turn: Turn
    keep: Literal["", "start", "end"] = ""


@dataclass(frozen=True)
class Replace:
    """The message at ``index`` gives way to another, a shorter one."""

    index: int
    message: Message


Step = Union[Drop, Replace]
Policy = Callable[[Sequence[Turn], int], Iterator[Step]]


def oldest(turns: Sequence[Turn], room: int) -> Iterator[Step]:
    """Whole turns from the front, right behind the task."""
    return map(Drop, turns)


def middle(turns: Sequence[Turn], room: int) -> Iterator[Step]:
    """Turns behind the first third of what may remain; how the conversation began is kept as long as anything else can go."""
    tokens = head = 0
    for turn in turns:
        tokens += turn.tokens
        if tokens > room // 3:
            break
        head += 1
    yield from map(Drop, turns[head:])
    yield from map(Drop, reversed(turns[:head]))


def observations(turns: Sequence[Turn], room: int) -> Iterator[Step]:
    """What tools and executed code have put out gives way to one line each, the oldest first; then as ``oldest``.

    The cheapest way in the histories of agents (Lindenbauer et al., The Complexity Trap, 2025): they are most of the tokens
    and least of the sense. Taken for such are the answers of tools, and what a user says right after the model, which
    in MetaGPT's agents is the log of what was executed.
    """
    for turn in turns:
        acted = False
        for index, message in zip(turn.indices, turn.messages):
            role = message.get("role")
            if role in ("tool", "function") or (role == "user" and acted):
                stub = _stub(message)
                if stub is not None:
                    yield Replace(index, stub)
            acted = acted or role == "assistant"
    yield from map(Drop, turns)


def newest(turns: Sequence[Turn], room: int) -> Iterator[Step]:
    """Whole turns from the back: the earliest are kept (MetaGPT's ``pre_cut_by_msg``)."""
    return map(Drop, reversed(turns))


def oldest_in_part(turns: Sequence[Turn], room: int) -> Iterator[Step]:
    """As ``oldest``, but of the turn at the edge its end remains (MetaGPT's ``post_cut_by_token``)."""
    return (Drop(turn, "end") for turn in turns)


def newest_in_part(turns: Sequence[Turn], room: int) -> Iterator[Step]:
    """As ``newest``, but of the turn at the edge its start remains (MetaGPT's ``pre_cut_by_token``)."""
    return (Drop(turn, "start") for turn in reversed(turns))


NAMES: Mapping[str, Policy] = {"oldest": oldest, "middle": middle, "observations": observations}

_OF_COMPRESS_TYPES: Mapping[str, Policy] = {
    "post_cut_by_msg": oldest,
    "post_cut_by_token": oldest_in_part,
    "pre_cut_by_msg": newest,
    "pre_cut_by_token": newest_in_part,
}


def of_compress_type(compress_type: str) -> Policy:
    """The policy that MetaGPT 1.0.0's ``compress_type`` of that value asks for; ``oldest`` where it is none of its own."""
    return _OF_COMPRESS_TYPES.get(compress_type, oldest)


def named(name: str) -> Policy:
    """The policy that ``context.policy`` names: one of NAMES, or ``package.module:function``.

    Raises:
        ValueError: there is none of that name, or it cannot be imported.
    """
    if name in NAMES:
        return NAMES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"there is no policy '{name}'; known are: {', '.join(NAMES)}, or your own as package.module:function")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise ValueError(f"the module of the policy '{name}' cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise ValueError(f"the module {module} ({getattr(sys.modules[module], '__file__', None)}) has no function '{function}'")
    return cast(Policy, found)


def _stub(message: Message) -> Optional[Message]:
    """``message`` with one line instead of its text; None where that saves too little."""
    content = message.get("content")
    if not isinstance(content, str):
        return None
    lines = content.strip().splitlines()
    size = estimate_message(message)
    first = lines[0][:_QUOTED] if lines else ""
    stub = {**message, "content": f"[output of about {size:,} tokens in {len(lines):,} lines left out; it began: {first}]"}
    return stub if estimate_message(stub) + _WORTH_A_STUB <= size else None
