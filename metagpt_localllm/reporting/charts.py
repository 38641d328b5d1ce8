"""The figures: SVG that stretches to any width, with labels as HTML on top that does not."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Callable, Iterable, Optional, Sequence

from metagpt_localllm.reporting.markup import table, text
from metagpt_localllm.reporting.scales import (
    LogScale,
    apart,
    bins,
    count,
    count_ticks,
    duration_short,
    share,
)
from metagpt_localllm.statistics import percentile, percentiles
from metagpt_localllm.wording import duration, rate

__all__ = ["POINT_KINDS", "Point", "Ratio", "columns_over_time", "histogram", "legend", "ratios", "scatter", "stacked"]

#: Of this many attempts each one's deadline is drawn; of more, the middle and the range by size of the prompt.
_SINGLE_DEADLINES = 300
#: Parts of an axis between two labels, at the least: of a small figure, and of one as wide as the page.
_NARROW, _WIDE = 0.17, 0.08
#: Kinds of points in the scatter plot: most of the prompt was read anew, or the server does not say; most came from its cache;
#: no token came.
POINT_KINDS = ("new", "cached", "none")
#: Columns of a chart over time.
_COLUMNS = 40


@dataclass(frozen=True)
class Point:
    """One attempt in the scatter plot.

    Attributes:
        call: index of its call.
        kind: one of POINT_KINDS.
        tokens: of the prompt.
        seconds: to the first token, or those that were waited in vain.
        deadline: for the first token, in seconds; None: not known.
    """

    call: int
    kind: str
    tokens: int
    seconds: float
    deadline: Optional[float]


@dataclass(frozen=True)
class Ratio:
    """A part of a whole under a label, which is HTML."""

    label: str
    part: float
    whole: float


def legend(items: Iterable[tuple[str, str]]) -> str:
    """What each (class of colour, words) means."""
    return '<ul class="legend">' + "".join(f'<li><i class="key {kind}"></i>{text(what)}</li>' for kind, what in items) + "</ul>"


def stacked(parts: Sequence[tuple[str, str, float]], what: str) -> str:
    """One bar of all (class of colour, words, seconds), with its parts in words below."""
    whole = sum(seconds for _, _, seconds in parts) or 1.0
    told = [(kind, f"{words}: {duration(seconds)} ({share(seconds / whole)})", seconds) for kind, words, seconds in parts if seconds]
    bars = "".join(
        f'<i class="fill {kind}" style="width:{100 * seconds / whole:.2f}%" title="{text(words)}"></i>' for kind, words, seconds in told
    )
    return f'<div class="stacked" role="img" aria-label="{text(what)}">{bars}</div>' + legend((kind, words) for kind, words, _ in told)


def _plot(label: str, area: str, x: tuple[str, Sequence[tuple[float, str]]], y: tuple[str, Sequence[tuple[float, str]]], more: str = "") -> str:
    """A frame with axes: titles, and ticks as (0 to 1, words)."""
    lines = "".join(f'<i class="line" style="bottom:{100 * at:.2f}%"></i>' for at, _ in y[1])
    lines += "".join(f'<i class="line up" style="left:{100 * at:.2f}%"></i>' for at, _ in x[1])
    left = "".join(f'<span style="bottom:{100 * at:.2f}%">{text(words)}</span>' for at, words in y[1])
    below = "".join(
        f'<span{" class=last" * (at > 0.94)} style="left:{100 * at:.2f}%">{text(words)}</span>' for at, words in x[1]
    )
    return (
        f'<div class="plot" tabindex="0" role="group" aria-label="{text(label)}"{more}><p class="y-title">{text(y[0])}</p>'
        f'<div class="y" aria-hidden="true">{left}</div><div class="area">{lines}{area}</div>'
        f'<div class="x" aria-hidden="true">{below}</div><p class="x-title">{text(x[0])}</p></div>'
    )


# ------------------------------------------------------------------------------------------ scatter


def scatter(points: Sequence[Point]) -> str:
    """Time to first token against the size of the prompt, both logarithmic, with the deadlines."""
    deadlines = [(point.tokens, point.deadline) for point in points if point.deadline]
    x = LogScale([point.tokens for point in points], of_time=False)
    y = LogScale([point.seconds for point in points] + [seconds for _, seconds in deadlines], of_time=True)

    def at(tokens: float, seconds: float) -> str:
        return f"{1000 * x.place(tokens):.1f} {1000 * (1 - y.place(seconds)):.1f}"

    drawn = []
    if len(deadlines) <= _SINGLE_DEADLINES:
        drawn.append(("deadline", "".join(f"M{at(*one)}m-8 0h16" for one in deadlines)))
    else:
        classes = _by_size(deadlines, x)
        upper = [at(tokens, most) for tokens, _, _, most in classes]
        lower = [at(tokens, least) for tokens, least, _, _ in reversed(classes)]
        drawn.append(("band", f"M{'L'.join(upper + lower)}z"))
        drawn.append(("deadline", "M" + "L".join(at(tokens, middle) for tokens, _, middle, _ in classes)))
    for kind in POINT_KINDS:
        dots = "".join(f"M{at(point.tokens, point.seconds)}h.01" for point in points if point.kind == kind)
        if dots:
            drawn.append((f"dots {kind}", dots))
            if kind == "cached":
                drawn.append(("dots hole", dots))
    svg = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in drawn)
    many = " many" if len(points) > 1000 else ""
    area = f'<svg class="{many.strip()}" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{svg}</svg>'
    scales = f' id="scatter" data-x="{x.low},{x.high}" data-y="{y.low},{y.high}"'
    return _plot(
        f"Time to first token against prompt size, {count(len(points))} attempts. The arrow keys go from one to the next.", area,
        ("prompt tokens (log scale)", apart([(x.place(one), words) for one, words in x.ticks()], _WIDE)),
        ("time to first token (log scale)", apart([(y.place(one), words) for one, words in y.ticks()], _WIDE)), scales,
    )  # fmt: skip


def _by_size(deadlines: Iterable[tuple[int, float]], x: LogScale) -> list[tuple[float, float, float, float]]:
    """Tokens in the middle, and the least, the middle and the largest deadline, of each size of prompts that occurred."""
    classes: dict[int, list[tuple[int, float]]] = {}
    for tokens, seconds in deadlines:
        classes.setdefault(int(x.place(tokens) * 24), []).append((tokens, seconds))
    found = []
    for _, members in sorted(classes.items()):
        sizes, limits = sorted(tokens for tokens, _ in members), sorted(seconds for _, seconds in members)
        found.append((percentile(sizes, 50), limits[0], percentile(limits, 50), limits[-1]))
    return found


# ---------------------------------------------------------------------------------------- histograms


def histogram(title: str, unit: str, values: Iterable[Optional[float]]) -> str:
    """How often which value occurred. ``unit``: s, or that which is written behind a number."""
    known = sorted(value for value in values if value is not None)
    told = percentiles(known)
    if told is None:
        return f'<figure><figcaption><h3>{text(title)}</h3></figcaption><p class="note">No call has this figure.</p></figure>'
    of_time = unit == "s"
    write = duration if of_time else rate
    edges, by_factor = bins([max(value, 1e-3) for value in known], of_time=of_time)
    counts = [0] * (len(edges) - 1)
    for value in known:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    rows = [(f"{write(low)} to {write(high)}", number) for low, high, number in zip(edges, edges[1:], counts)]
    where, ticks = _axis(edges, by_factor, of_time)
    heights = count_ticks(max(counts))
    top = heights[-1]
    bars = "".join(
        f'<i class="bar" data-tip="{text(f"{between}: {count(number)} of {count(len(known))}")}" style="left:{100 * where(low):.2f}%;'
        f'width:{100 * (where(high) - where(low)):.2f}%;height:{100 * number / top:.2f}%"></i>'
        for (between, number), low, high in zip(rows, edges, edges[1:])
    )  # fmt: skip
    marks = "".join(
        f'<i class="quantile {name}{" late" * (where(value) > 0.75)}" style="left:{100 * where(max(value, edges[0])):.2f}%"><b>{name}</b></i>'
        for name, value in (("p50", told.p50), ("p95", told.p95))
    )
    of = f"{title}, {count(told.count)} answered calls"
    words = f"p50 {write(told.p50)}, p95 {write(told.p95)}, p99 {write(told.p99)}, most {write(told.most)}"
    words += "" if of_time else f" {unit}"
    places = apart([(where(one), label) for one, label in ticks], _NARROW)
    plot = _plot(
        f"{of}. {words}. The arrow keys go from bar to bar.", bars + marks,
        (f"{'seconds' if of_time else unit}{' (log scale)' if by_factor else ''}", places),
        ("calls", [(number / top, count(number)) for number in heights]),
    )  # fmt: skip
    data = table(of, (("from, to", False), ("calls", True)), [(text(between), count(number)) for between, number in rows])
    return (
        f"<figure><figcaption><h3>{text(title)}</h3><p>{text(words)}</p></figcaption>{plot}"
        f"<details><summary>As a table</summary>{data}</details></figure>"
    )


def _axis(edges: Sequence[float], by_factor: bool, of_time: bool) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Where a value lies between the edges of the bins, 0 to 1; and round values with their labels."""
    if by_factor:
        scale = LogScale(edges, of_time=of_time)
        scale.low, scale.high = edges[0], edges[-1]
        return scale.place, scale.ticks()
    ticks = [(edge, duration_short(edge) if of_time else f"{edge:g}") for edge in edges]
    return lambda value: (value - edges[0]) / (edges[-1] - edges[0]), ticks


# --------------------------------------------------------------------------------------------- shares


def ratios(rows: Sequence[Ratio]) -> str:
    """A bar for each part of a whole."""
    return '<ul class="ratios">' + "".join(
        f'<li><span class="of">{row.label}</span><span class="track"><i class="fill cached" style="width:{100 * row.part / row.whole:.2f}%">'
        f"</i></span><span>{share(row.part / row.whole)} of {count(row.whole)}</span></li>"
        for row in rows
    ) + "</ul>"  # fmt: skip


def columns_over_time(label: str, pairs: Sequence[tuple[float, float]]) -> str:
    """The share of (part, whole) in up to 40 columns, in the order given."""
    size = -(-len(pairs) // _COLUMNS)
    groups = [pairs[first : first + size] for first in range(0, len(pairs), size)]
    bars = ""
    for index, group in enumerate(groups):
        whole = sum(one for _, one in group)
        part = sum(one for one, _ in group) / whole if whole else 0.0
        first, last = index * size + 1, index * size + len(group)
        which = f"call {count(first)}" if first == last else f"calls {count(first)} to {count(last)}"
        bars += (
            f'<i class="bar cached" data-tip="{text(f"{which}: {share(part)} of {count(whole)} prompt tokens")}" '
            f'style="left:{100 * index / len(groups):.2f}%;width:{100 / len(groups):.2f}%;height:{100 * part:.2f}%"></i>'
        )
    steps = sorted({0, len(pairs) // 2, len(pairs) - 1})
    ticks = apart([((index // size + 0.5) / len(groups), count(index + 1)) for index in steps], _NARROW)
    return _plot(f"{label}. The arrow keys go from bar to bar.", bars, ("answered calls, in their order", ticks),
                 ("from the cache", [(part / 2, share(part / 2)) for part in range(3)]))  # fmt: skip
