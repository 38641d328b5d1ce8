"""Fits a conversation into a number of tokens. Pure: counts, the policy and the way to shorten a text are passed in.

Kept are the system messages, the task (the first message after them) and the latest message with the tool call that it
answers. Of the others a policy says what goes first; they go down to a low-water mark, so that many calls can follow whose
prompt only grows at its end, and a server's prefix cache holds. A single message that is too large loses its middle.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Callable, Iterator, Mapping, Optional, Sequence

from metagpt_localllm.messages import Message
from metagpt_localllm.policies import Drop, Policy, Replace, Step, Turn, oldest
from metagpt_localllm.shortening import Keep

__all__ = ["Change", "Shorten", "Trimmed", "trim"]

#: What becomes of a message: None where it is left out, else what is sent in its place.
Change = Optional[Message]
#: ``(position, message, target, keep)``: the message with so much less text that it has at most ``target`` tokens, or as few
#: as it can be given; None where nothing can be taken.
Shorten = Callable[[int, Message, float, Keep], Optional[Message]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trimmed:
    """What was done.

    Attributes:
        changes: by position, of this trim alone.
        dropped: messages left out whole.
        shortened: messages that lost a part of their text.
        replaced: messages that gave way to a stub.
        tokens: of what remains, by the counts passed in.
    """

    changes: Mapping[int, Change]
    dropped: int
    shortened: int
    replaced: int
    tokens: float


def trim(
    messages: Sequence[tuple[int, Message]],
    budget: float,
    *,
    low_water: float,
    policy: Policy,
    cut_fixed: bool,
    count: Callable[[int, Message], float],
    shorten: Shorten,
) -> Trimmed:
    """Fits ``messages`` into ``budget`` tokens; what has fitted already stays as it is.

    Args:
        messages: each with its position in the conversation, which ``count`` gets, too.
        budget: tokens for all of them.
        low_water: share of the room for what may go that is filled afterwards, above 0 and at most 1.
        policy: what goes first.
        cut_fixed: whether what always stays may lose its middle when it is too large.
        count: tokens of a message.
        shorten: see :data:`Shorten`.
    """
    return _Trim(messages, budget, low_water, policy, cut_fixed, count, shorten).run()


class _Trim:
    def __init__(
        self, messages: Sequence[tuple[int, Message]], budget: float, low_water: float, policy: Policy, cut_fixed: bool,
        count: Callable[[int, Message], float], shorten: Shorten,
    ) -> None:  # fmt: skip
        self.kept = dict(messages)
        self.sizes = {index: count(index, message) for index, message in messages}
        self.tokens = sum(self.sizes.values())
        self.budget, self.low_water, self.policy, self.cut_fixed = budget, low_water, policy, cut_fixed
        self.count, self._shorten = count, shorten
        self.changes: dict[int, Change] = {}
        self.shortened: set[int] = set()
        self.replaced: set[int] = set()

    def run(self) -> Trimmed:
        if self.tokens > self.budget:
            self._fit()
        gone = [index for index, change in self.changes.items() if change is None]
        return Trimmed(
            self.changes, len(gone), len(self.shortened.difference(gone)), len(self.replaced.difference(gone)), self.tokens
        )

    def _fit(self) -> None:
        fixed, last_word, turns = _fixed_and_turns(list(self.kept.items()))
        free = [index for turn in turns for index in turn]
        others = sum(self.sizes[index] for index in free)
        core = self.tokens - others
        # Where the fixed ones alone are too large, a quarter is still left to what is not fixed.
        limit = self.budget - min(others, self.budget / 4)
        if 0 < core - self.budget < sum(self.sizes[index] for index in last_word) or not self.cut_fixed:
            core -= self._cut_largest(last_word, max(core - limit, 0.0))
        if core > self.budget and self.cut_fixed:
            core -= self._cut_largest([*fixed, *last_word], core - limit)
        room = max(self.budget - core, 0.0)
        mark = min(core, self.budget) + room * self.low_water
        for index in free:  # a huge log is better shortened than all else lost for it, or all of it
            if self.sizes[index] > max(room / 2, self.budget / 4) and self.tokens > mark:
                self._cut(index, max(room / 4, self.sizes[index] - (self.tokens - mark)))
        chosen = [self._turn(turn) for turn in turns]
        self._drop(self._steps(chosen, int(room * self.low_water)), mark, set(free))
        if self.tokens > self.budget and self.cut_fixed:
            self._cut_largest([*fixed, *last_word], self.tokens - self.budget)

    def _steps(self, turns: Sequence[Turn], room: int) -> Iterator[Step]:
        most = 4 * len(self.kept) + 4
        try:
            for step in itertools.islice(self.policy(turns, room), most):
                if isinstance(step, Drop):
                    hash(tuple(step.turn.indices))
                elif not (isinstance(step, Replace) and isinstance(step.message, Mapping)):
                    raise TypeError(f"a policy yields Drop and Replace, not {type(step).__name__}")
                yield step
        except Exception:
            _log.warning("the policy of llm.local.context.policy failed; the oldest turns go instead", exc_info=True)
        yield from oldest(turns, room)  # whatever a policy leaves over

    def _turn(self, indices: Sequence[int]) -> Turn:
        return Turn(indices, [self.kept[index] for index in indices], round(sum(self.sizes[index] for index in indices)))

    def _drop(self, steps: Iterator[Step], mark: float, free: set[int]) -> None:
        """Takes steps until the mark is reached; those that touch what is fixed are not taken."""
        for step in steps:
            if self.tokens <= mark:
                break
            if isinstance(step, Replace):
                if step.index in free and step.index in self.kept:
                    self._change(step.index, step.message, self.replaced)
                continue
            present = [index for index in step.turn.indices if index in free and index in self.kept]
            if step.keep and self.tokens - mark < sum(self.sizes[index] for index in present):
                for index in sorted(present, key=lambda i: -self.sizes[i]):  # both of a pair stay, so that roles alternate
                    if self.tokens > mark:
                        self._cut(index, self.sizes[index] - (self.tokens - mark), step.keep)
                if self.tokens <= mark:
                    break
            for index in present:
                self.tokens -= self.sizes.pop(index)
                del self.kept[index]
                self.changes[index] = None

    def _cut_largest(self, indices: Sequence[int], excess: float) -> float:
        """Takes ``excess`` tokens out of the largest messages, out of the system's and the small ones last; says how many."""
        before = self.tokens
        systems = [index for index in indices if _is_system(self.kept[index])]
        others = [index for index in indices if index not in systems]
        for group, least in ((others, self.budget / 4), (systems, self.budget / 4), (indices, 0.0)):
            missing = excess - (before - self.tokens)
            level = max(_level([self.sizes[index] for index in group], missing), least)
            for index in group if missing > 0 else ():
                if self.sizes[index] > level:
                    self._cut(index, level)
        return before - self.tokens

    def _cut(self, index: int, target: float, keep: Keep = "both") -> None:
        shorter = self._shorten(index, self.kept[index], max(target, 0), keep)
        if shorter is not None:
            self._change(index, shorter, self.shortened)

    def _change(self, index: int, message: Message, kind: set[int]) -> None:
        size = self.count(index, message)
        if size < self.sizes[index]:
            self.tokens += size - self.sizes[index]
            self.sizes[index] = size
            self.kept[index] = self.changes[index] = message
            kind.add(index)


def _is_system(message: Message) -> bool:
    return message.get("role") in ("system", "developer")


def _level(sizes: Sequence[float], excess: float) -> float:
    """To which all larger sizes must come down so that ``excess`` goes."""
    descending = sorted(sizes, reverse=True)
    total = 0.0
    for number, size in enumerate(descending, 1):
        total += size
        level = (total - excess) / number
        if number == len(descending) or level >= descending[number]:
            return max(level, 0.0)
    return 0.0


def _fixed_and_turns(messages: Sequence[tuple[int, Message]]) -> tuple[list[int], list[int], list[list[int]]]:
    """What always stays; the model's word before the latest message; and what may go, in turns.

    A turn lasts from the model's word to the next, and its last word stays, so that roles go on alternating, without which
    some templates (Mistral's, Gemma's) refuse a chat.
    """
    units = _units(messages)
    bodies = [unit for unit in units if not _is_system(unit[0][1])]
    latest = max(bodies, key=lambda unit: unit[-1][0], default=None)
    task = bodies[0] if bodies and bodies[0][0][1].get("role") != "assistant" else None
    fixed = [index for unit in units for index, message in unit if _is_system(message) or unit is latest or unit is task]
    before = bodies[bodies.index(latest) - 1] if latest is not None and bodies.index(latest) > 0 else None
    said = before is not None and before is not task and len(before) == 1 and before[0][1].get("role") == "assistant"
    word = before if said and task is not None and latest is not None and latest[0][1].get("role") == "user" else None
    turns: list[list[int]] = []
    answered = True  # whether the last turn is closed
    for unit in bodies:
        indices = [index for index, _ in unit]
        if unit is latest or unit is task or unit is word:
            answered = True
        elif unit[0][1].get("role") == "assistant" or answered:
            turns.append(indices)
            answered = unit[0][1].get("role") != "assistant"
        else:
            turns[-1] += indices
            answered = True
    return fixed, [index for index, _ in word or ()], turns


def _units(messages: Sequence[tuple[int, Message]]) -> list[list[tuple[int, Message]]]:
    """Messages that no server takes apart: a tool call with its answers, any other message alone."""
    units: list[list[tuple[int, Message]]] = []
    callers: dict[str, list[tuple[int, Message]]] = {}
    latest: Optional[list[tuple[int, Message]]] = None
    for index, message in messages:
        # An answer that names no call, or one unknown, belongs to what came right before it.
        caller = callers.get(str(message.get("tool_call_id")), latest) if message.get("role") == "tool" else None
        if caller is not None:
            caller.append((index, message))
            continue
        unit = [(index, message)]
        units.append(unit)
        if not _is_system(message):
            latest = unit
        called = message.get("tool_calls")
        for call in called if isinstance(called, (list, tuple)) else ():
            if isinstance(call, Mapping):
                callers[str(call.get("id"))] = unit
    return units
