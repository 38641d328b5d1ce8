"""The timeline as HTML, and the same figures for its tooltips."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, Sequence

from metagpt_localllm.reporting.charts import legend
from metagpt_localllm.reporting.markup import clean, name, text
from metagpt_localllm.reporting.phases import KINDS
from metagpt_localllm.reporting.recorded import Call, Recorded
from metagpt_localllm.reporting.scales import short, tick_label, time_step
from metagpt_localllm.reporting.timeline import LANE_HEIGHT, WIDTH, Axis, paths, rows_of
from metagpt_localllm.wording import counted, duration

__all__ = ["as_data", "timeline"]

#: What page.js gets of each call, in this order.
_FIELDS = (
    "number", "run", "role", "action", "tier", "model", "outcome", "begin", "queued", "ttft", "total", "prompt", "cached",
    "answer", "rate", "attempts", "failed", "trimmed", "saved", "row", "phases",
)  # fmt: skip


def timeline(recorded: Recorded) -> str:
    """A lane for each role, those first that were called first."""
    calls, axis = recorded.calls, recorded.axis
    lanes = _lanes(calls)
    shown = [kind for kind in KINDS if any(phase.kind == kind for call in calls for phase in call.phases)]
    drawn = []
    for number, (role, members) in enumerate(lanes.items()):
        rows = rows_of([(calls[index].begin, calls[index].end) for index in members])
        height = (max(rows) + 1) * LANE_HEIGHT
        found = paths(((row, calls[index].phases) for row, index in zip(rows, members)), axis)
        svg = "".join(f'<path class="phase {kind}" d="{path}"/>' for kind, path in found.items())
        spent = sum(calls[index].end - calls[index].begin for index in members)
        drawn.append(
            f'<div class="lane"><p><b>{name(role)}</b> <span class="muted">{counted(len(members), "call")}, '
            f'{duration(spent)}</span></p>'
            f'<div class="rows" data-lane="{number}" style="height:{height}px"><svg viewBox="0 0 {WIDTH} {height}" '
            f'preserveAspectRatio="none" aria-hidden="true">{svg}</svg></div></div>'
        )
    idle = sum(fold.end - fold.begin for fold in axis.folds)
    folded = (
        f"<p class=\"note\">{counted(len(axis.folds), 'idle stretch', 'idle stretches')} of {duration(idle)} in all "
        "are folded (hatched).</p>" if axis.folds else ""
    )  # fmt: skip
    return (
        legend((kind, KINDS[kind]) for kind in ("queued", "pause", "prefill", "decode", "failed", "open") if kind in shown)
        + '<div id="timeline" tabindex="0" role="group" aria-label="Timeline of the calls by role. The arrow keys go from call to call, '
        f'plus and minus zoom, 0 shows the whole run."><div class="overlay" aria-hidden="true">{_overlay(axis)}</div>{"".join(drawn)}</div>'
        '<p class="x-title">time since the first call</p>' + folded
    )


def as_data(recorded: Recorded) -> dict[str, Any]:
    """What page.js needs for the timeline, the tooltips and the table of calls. Times in seconds, from the axis' beginning."""
    calls, axis = recorded.calls, recorded.axis
    names: dict[str, dict[str, int]] = {kind: {} for kind in ("run", "role", "action", "tier", "model", "outcome")}
    rows = {
        index: row
        for members in _lanes(calls).values()
        for index, row in zip(members, rows_of([(calls[index].begin, calls[index].end) for index in members]))
    }
    kinds = list(KINDS)

    def known(kind: str, value: str) -> int:
        return names[kind].setdefault(clean(value), len(names[kind]))

    table = []
    for index, call in enumerate(calls):
        figures = call.figures
        phases = [value for phase in call.phases if phase.seconds >= 0.0005 for value in (kinds.index(phase.kind), short(phase.seconds))]
        table.append([
            call.record.number, known("run", figures.run), known("role", figures.role), known("action", figures.action),
            known("tier", figures.tier), known("model", figures.model), known("outcome", call.outcome),
            round(call.begin - axis.begin, 3), short(figures.queued), short(figures.ttft),
            short(figures.total), figures.prompt_tokens, figures.cached_tokens, figures.answer_tokens, short(figures.decode_rate),
            len(call.attempts), len(figures.errors), figures.trimmed_tokens, figures.saved_tokens, rows[index], phases,
        ])  # fmt: skip
    return {
        "begin": axis.begin, "length": axis.length, "zone": recorded.offset(axis.begin), "width": WIDTH, "rowHeight": LANE_HEIGHT,
        "folds": [[fold.begin - axis.begin, fold.end - axis.begin, fold.width] for fold in axis.folds],
        "kinds": list(KINDS.values()), "names": {kind: list(found) for kind, found in names.items()},
        "fields": _FIELDS, "calls": table,
    }  # fmt: skip


def _lanes(calls: Sequence[Call]) -> dict[str, list[int]]:
    """The indices of the calls of each role."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        found[call.figures.role].append(index)
    return found


def _overlay(axis: Axis) -> str:
    """Ticks and folds of the whole run, as page.js draws them for a part of it."""
    step, last = time_step(axis.length), -math.inf
    marks = []
    for fold in axis.folds:
        left, title = 100 * axis.place(fold.begin) / axis.length, text(f"{duration(fold.end - fold.begin)} without calls")
        marks.append(f'<i class="fold" style="left:{left:.2f}%;width:{100 * fold.width / axis.length:.2f}%" title="{title}"></i>')
    edges = [axis.begin, *(edge for fold in axis.folds for edge in (fold.begin, fold.end))]
    ends = [*edges[1:], axis.begin + _real_length(axis)]
    for begin, end in list(zip(edges, ends))[::2]:
        first, final = math.ceil((begin - axis.begin) / step - 1e-9), math.floor((end - axis.begin) / step + 1e-9)
        for moment in (index * step for index in range(first, final + 1)):
            at = axis.place(axis.begin + moment)
            if at - last >= 0.6 * step:
                marks.append(f'<i class="tick" style="left:{100 * at / axis.length:.2f}%"><span>{tick_label(moment, step)}</span></i>')
                last = at
    return "".join(marks)


def _real_length(axis: Axis) -> float:
    return axis.length + sum(fold.end - fold.begin - fold.width for fold in axis.folds)

