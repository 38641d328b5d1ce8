"""The last words of a run that failed: what failed, what was tried, what to change, how to go on.

Written to stderr when the process ends, below whatever traceback there is, since nobody finds the cause above it.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass, field
from typing import Iterator, Optional, Sequence, Union, get_args

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from metagpt_localllm import events, session
from metagpt_localllm.errors import LocalLLMError
from metagpt_localllm.wording import counted, duration

__all__ = ["Ending", "broke_off", "panel", "watch_for_failures"]

#: Columns of the panel at the most, and where there is no terminal.
_WIDTH = 100
#: Lines of what was tried, at the most.
_MOST = 8

Tried = Union[events.Retry, events.Waiting, events.Loading, events.Continued]
_TRIED = get_args(Tried)


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        failed: the call that failed last; None where it was not a call that failed.
        tried: in that call, in the order of time.
        error: the exception that ended the run, where it is known.
        run: its name in the journal; "" where there is none.
        kept: its answers in the journal.
        interrupted: whether a person stopped it.
    """

    failed: Optional[events.Failed] = None
    tried: Sequence[Tried] = ()
    error: Optional[BaseException] = None
    run: str = ""
    kept: int = 0
    interrupted: bool = False


@dataclass
class _Seen:
    """What there is to tell, until the process ends."""

    tried: dict[int, list[Tried]] = field(default_factory=dict)
    failed: Optional[events.Failed] = None
    recovered: bool = True  # MetaGPT went on after it
    error: Optional[BaseException] = None

    def take(self, event: events.Event) -> None:
        if isinstance(event, _TRIED):
            self.tried.setdefault(event.call.number, []).append(event)
        elif isinstance(event, (events.Done, events.Replayed)):
            self.tried.pop(event.call.number, None)
            self.recovered, self.error = True, None
        elif isinstance(event, events.Failed):
            self.failed, self.recovered = event, False


_seen = _Seen()
_watching = False


def watch_for_failures() -> None:
    """From now on a run that fails has last words. Idempotent; not in notebooks, interactive interpreters and pytest."""
    global _watching
    if _watching or not session.command_line().repeatable:
        return
    _watching = True
    events.subscribe(_seen.take, *_TRIED, events.Done, events.Replayed, events.Failed)
    atexit.register(_at_the_end, os.getpid())


def broke_off(error: BaseException) -> None:
    """MetaGPT's team ended by an exception that nobody else hears of."""
    session.broke_off()
    _seen.error = error


def _at_the_end(process: int) -> None:
    if os.getpid() != process:  # a fork
        return
    ending = _ending()
    if ending is not None:
        console = Console(stderr=True)
        if not console.is_terminal or console.width > _WIDTH:
            console.width = _WIDTH
        console.print(panel(ending))


def _ending() -> Optional[Ending]:
    """How this process's run ended; None where it did not fail."""
    error = _seen.error or getattr(sys, "last_value", None)
    if error is None and _seen.recovered:
        return None
    # A failure that MetaGPT got over is not what ended the run, unless it is what ended it after all.
    is_ours = not _seen.recovered or any(isinstance(one, LocalLLMError) for one in _chain(error))
    failed = _seen.failed if is_ours else None
    tried = _seen.tried.get(failed.call.number, []) if failed is not None else []
    run, kept = session.current()
    return Ending(failed, tried, error, run, kept, isinstance(error, KeyboardInterrupt))


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """The exception and those that it came of; tenacity's RetryError has its own in ``last_attempt``."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        last = getattr(error, "last_attempt", None)
        error = (last.exception() if last is not None else None) or error.__cause__ or error.__context__


def panel(ending: Ending) -> Panel:
    """What a person needs to know of it."""
    failed = ending.failed
    lines: list[RenderableType] = []
    if failed is not None and not ending.interrupted:
        title = f"{failed.call.caller} got no answer"
        lines += _part("What failed", [f"{_sentence(failed.what)} ({failed.cause}, tier '{failed.call.tier}')"])
        lines += _part("What was tried", [*_tried(ending.tried), f"In all {duration(failed.elapsed)}, "
                                          f"{counted(failed.attempts, 'attempt')}."])  # fmt: skip
        change = [f"{failed.setting} in config2.yaml. {failed.remedy}".strip()] if failed.setting else [failed.remedy]
        lines += _part("What to change", [*filter(None, change), "metagpt-localllm doctor looks for what holds this machine back."])
    elif ending.interrupted:
        title = "Interrupted"
    else:
        title = "MetaGPT ended the run"
        last = list(_chain(ending.error))[-1]
        lines += _part("What failed", [
            f"{type(last).__name__}: {' '.join(str(last).split())[:300]}",
            "The server had answered: it is what MetaGPT made of it that failed. Often the answer has not the form that was "
            "asked for, as it happens with small or strongly quantized models.",
        ])  # fmt: skip
        lines += _part("What to change", ["Try a larger or less quantized model, or a lower llm.temperature; the traceback above "
                                          "has the rest."])  # fmt: skip
    lines += _part("How to go on", _how_to_go_on(ending))
    return Panel(Group(*lines), title=title, title_align="left", border_style="yellow" if ending.interrupted else "red")


def _how_to_go_on(ending: Ending) -> list[str]:
    if not ending.run:
        return ["Nothing was kept of this run (llm.local.journal): it begins afresh."]
    if not ending.kept:
        return ["Start the same command again."]
    return [
        "Start the same command again in the same folder, or run",
        f"metagpt-localllm runs resume {ending.run}",
        f"{counted(ending.kept, 'answer of this run is', 'answers of this run are')} kept and will not be computed again.",
    ]


def _tried(tried: Sequence[Tried]) -> list[str]:
    lines = []
    for event in tried:
        if isinstance(event, events.Retry):
            lines.append(f"Attempt {event.attempt}: {_sentence(event.detail)}")
        elif isinstance(event, events.Continued):
            lines.append(f"Attempt {event.attempt} went on with what there was: {counted(event.tokens, 'token')}.")
        else:
            lines.append(f"{_sentence(event.cause)} It was waited for.")
    if len(lines) > _MOST:
        left = len(lines) - _MOST + 1
        lines[_MOST // 2 : -(_MOST // 2 - 1)] = [f"… {left} more …"]
    return lines


def _part(title: str, lines: Sequence[str]) -> list[RenderableType]:
    return [Text(title, style="bold"), *(Padding(Text(line), (0, 0, 0, 2)) for line in lines)]


def _sentence(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
