"""Groups of calls on a terminal: a table with as many columns as fit, or a block for each group where too few do."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from metagpt_localllm.statistics import CallFigures, Group, Percentiles
from metagpt_localllm.wording import counted, printable, rate

__all__ = ["render"]

#: Cells that a name of an action, a model or the like may have on a terminal before it goes on in the next line.
_WIDEST_KEY = 26
#: Cells between two columns, and where all of them do not fit so.
_GAP, _NARROW = 2, 1
#: Columns with a lower rank than this must fit; else each group gets a block.
_NEEDED = 6


@dataclass(frozen=True)
class _Column:
    """One column of figures.

    Attributes:
        head: two lines.
        show: a group's figure as text.
        rank: those with the highest go first where there is too little room.
        optional: left out where it is empty or 0 for all groups.
    """

    head: tuple[str, str]
    show: Callable[[Group], str]
    rank: int
    optional: bool = False

    @property
    def name(self) -> str:
        return " ".join(self.head).strip().replace("- ", "")


def _of(found: Optional[Percentiles], name: str, form: Callable[[float], str]) -> str:
    return form(getattr(found, name)) if found is not None else ""


_COLUMNS = (
    _Column(("", "calls"), lambda group: f"{group.calls:,}", 0),
    _Column(("", "failed"), lambda group: f"{group.failed:,}", 6, True),
    _Column(("cancel-", "led"), lambda group: f"{group.cancelled:,}", 19, True),
    _Column(("un-", "finished"), lambda group: f"{group.unfinished:,}", 18, True),
    _Column(("re-", "played"), lambda group: f"{group.replayed:,}", 17, True),
    _Column(("ttft", "p50"), lambda group: _of(group.ttft, "p50", _seconds), 1),
    _Column(("ttft", "p95"), lambda group: _of(group.ttft, "p95", _seconds), 4),
    _Column(("ttft", "p99"), lambda group: _of(group.ttft, "p99", _seconds), 12),
    _Column(("total", "p50"), lambda group: _of(group.total, "p50", _seconds), 2),
    _Column(("total", "p95"), lambda group: _of(group.total, "p95", _seconds), 5),
    _Column(("total", "p99"), lambda group: _of(group.total, "p99", _seconds), 11),
    _Column(("decode", "tok/s"), lambda group: _speed(group.decode_rate), 3),
    _Column(("prefill", "tok/s"), lambda group: _speed(group.prefill_rate), 13, True),
    _Column(("prompt", "p50"), lambda group: _of(group.prompt, "p50", _tokens), 8),
    _Column(("prompt", "max"), lambda group: _of(group.prompt, "most", _tokens), 14),
    _Column(("prompt", "cached"), lambda group: "" if group.cached_share is None else f"{group.cached_share:.0%}", 15, True),
    _Column(("", "retries"), lambda group: f"{group.retries:,}", 9),
    _Column(("time-", "outs"), lambda group: f"{group.timeouts:,}", 7),
    _Column(("trimmed", "tokens"), lambda group: _tokens(group.trimmed_tokens), 16),
    _Column(("saved", "tokens"), lambda group: _tokens(group.saved_tokens), 10),
    _Column(("time", "in all"), lambda group: _seconds(group.seconds), 6),
)


def render(
    console: Console, groups: Sequence[Group], total: Group, figures: Sequence[CallFigures], dimensions: Sequence[str], *,
    width: Optional[int], explicit: bool = True,
) -> None:  # fmt: skip
    """Shows the groups, their total, and what a reader must know of both.

    Args:
        figures: of which they are.
        dimensions: that they are grouped by.
        width: in cells; None: as wide as it gets, which the console must then have room for.
        explicit: all dimensions are shown; else those that are the same for all groups are named once.
    """
    shown, same = list(dimensions), []
    if not explicit:
        same = [name for name in dimensions if len({dict(group.keys)[name] for group in groups}) == 1]
        shown = [name for name in dimensions if name not in same] or [dimensions[0]]
        same = [name for name in same if name not in shown]
    columns = [column for column in _COLUMNS if not column.optional or _says_anything(column, groups)]
    keys = [_key_width(groups, name, width) for name in shown]
    kept, gap = _fitting(columns, groups, total, keys, width)
    lines = [_heading(total, figures)]
    lines += [f"In all rows: {', '.join(f'{name} {_key(groups[0], name)}' for name in same)}"] if same else []
    for line in lines:
        _say(console, line)
    if kept is None:
        _blocks(console, groups, total, shown)
    else:
        console.print(_table(groups, total, shown, kept, keys, gap))
    for line in _remarks(total, [column.name for column in columns if kept is not None and column not in kept], width):
        _say(console, line)


def _say(console: Console, line: str, indent: int = 0) -> None:
    console.print(Padding(Text(line), (0, 0, 0, indent), expand=False))


# ------------------------------------------------------------------------------------------ what fits


def _says_anything(column: _Column, groups: Sequence[Group]) -> bool:
    return any(column.show(group) not in ("", "0") for group in groups)


def _fitting(
    columns: Sequence[_Column], groups: Sequence[Group], total: Group, keys: Sequence[int], width: Optional[int]
) -> tuple[Optional[list[_Column]], int]:
    """The most important columns that fit, None where those that are needed do not; and the cells between them."""
    kept, room = list(columns), math.inf if width is None else width
    widths = {
        column: max(cell_len(text) for text in (*column.head, *map(column.show, (*groups, total)))) for column in columns
    }

    def needed(gap: int) -> int:
        return sum(keys) + sum(widths[column] for column in kept) + gap * (len(keys) + len(kept) - 1)

    if needed(_GAP) <= room:
        return kept, _GAP
    while needed(_NARROW) > room:
        last = max(kept, key=lambda column: column.rank)
        if last.rank < _NEEDED:
            return None, _NARROW
        kept.remove(last)
    return kept, _NARROW


def _key_width(groups: Sequence[Group], name: str, width: Optional[int]) -> int:
    longest = max(cell_len(_key(group, name)) for group in groups)
    return max(len(name), len("all"), longest if width is None else min(longest, _WIDEST_KEY))


# ------------------------------------------------------------------------------------------ table and blocks


def _table(
    groups: Sequence[Group], total: Group, dimensions: Sequence[str], columns: Sequence[_Column], keys: Sequence[int],
    gap: int,
) -> Table:  # fmt: skip
    # The box has one of the cells between two columns.
    table = Table(box=_RULES, show_edge=False, pad_edge=False, padding=(0, 0, 0, gap - 1), header_style="bold")
    for name, size in zip(dimensions, keys):
        table.add_column(Text(f"\n{name}"), overflow="fold", width=size)
    for column in columns:
        table.add_column(Text("\n".join(column.head)), justify="right", no_wrap=True)
    for number, group in enumerate(groups, 1):
        cells = [Text(column.show(group)) for column in columns]
        table.add_row(*(Text(_key(group, name)) for name in dimensions), *cells, end_section=number == len(groups))
    names = ["all", *("" for _ in dimensions[1:])]
    table.add_row(*names, *(Text(column.show(total)) for column in columns), style="bold")
    return table


#: Rules above and below the groups.
_RULES = box.Box("    \n" "    \n" " ── \n" "    \n" " ── \n" " ── \n" "    \n" "    \n")


def _blocks(console: Console, groups: Sequence[Group], total: Group, dimensions: Sequence[str]) -> None:
    for group in (*groups, total):
        name = " / ".join(_key(group, dimension) for dimension in dimensions) if group.keys else "all"
        console.print(Text(f"\n{name}", style="bold"))
        for line in _lines(group):
            _say(console, line, 2)
    console.print()


def _lines(group: Group) -> list[str]:
    """A group in some lines of about 50 characters."""
    counts = [counted(group.calls, "call")]
    for name in ("failed", "cancelled", "unfinished", "replayed"):
        count = getattr(group, name)
        counts += [f"{count:,} {name}"] if count else []
    lines = [", ".join(counts) + f"; {_seconds(group.seconds)} in all"]
    for name, found in (("ttft ", group.ttft), ("total", group.total)):
        if found is not None:
            values = "  ".join(f"{key} {_of(found, key, _seconds):<5}" for key in ("p50", "p95", "p99"))
            lines.append(f"{name}  {values}".rstrip())
    speeds = [("decode", group.decode_rate), ("prefill", group.prefill_rate)]
    told = [f"{name} {_speed(rate)} tok/s" for name, rate in speeds if rate is not None]
    lines += [", ".join(told)] if told else []
    if group.prompt is not None:
        cached = "" if group.cached_share is None else f", {group.cached_share:.0%} cached"
        lines.append(f"prompt p50 {_tokens(group.prompt.p50)}, max {_tokens(group.prompt.most)} tokens{cached}")
    lines.append(f"{counted(group.retries, 'retry', 'retries')}, {counted(group.timeouts, 'timeout')}")
    lines.append(f"{_tokens(group.trimmed_tokens)} tokens trimmed, {_tokens(group.saved_tokens)} saved")
    return lines


# ------------------------------------------------------------------------------------------ words


def _heading(total: Group, figures: Sequence[CallFigures]) -> str:
    runs, moments = len({one.run for one in figures}), [one.started for one in figures]
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) for when in (min(moments), max(moments)))
    period = first if first == last else f"{first} to {last[11:] if first[:10] == last[:10] else last}"
    replayed = f", {counted(total.replayed, 'answer')} given again" if total.replayed else ""
    return f"{counted(total.calls, 'call')}{replayed} in {counted(runs, 'run')}, {period}"


def _remarks(total: Group, dropped: Sequence[str], width: Optional[int]) -> list[str]:
    """What the figures do not say by themselves."""
    lines = []
    if total.errors:
        lines.append(f"Requests that failed: {', '.join(f'{printable(name)} {count:,}' for name, count in total.errors.items())}")
    if total.superseded:
        lines.append(f"{counted(total.superseded, 'call was', 'calls were')} made again by a run that went on; they count, too.")
    if total.queued >= 1:
        lines.append(f"Waiting for a turn on our side took {_seconds(total.queued)} more.")
    lines.append("ttft (time to first token) and total are of answered calls.")
    if dropped:
        lines.append(f"Left out at {width} columns: {', '.join(dropped)}. A wider terminal, --csv and --json have them.")
    return lines


def _key(group: Group, name: str) -> str:
    return printable(dict(group.keys).get(name, "")) or "-"


def _seconds(value: float) -> str:
    """A length of time in at most six characters or so."""
    if value < 9.995:
        return f"{value:.2f}s"
    if value < 59.95:
        return f"{value:.1f}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02}s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours}h{minutes:02}m" if hours < 100 else f"{hours / 24:,.1f}d"


def _tokens(value: float) -> str:
    return f"{value:,.0f}" if value < 999_999.5 else f"{value / 1e6:,.2f}M"


def _speed(value: Optional[float]) -> str:
    return "" if value is None else rate(value)
