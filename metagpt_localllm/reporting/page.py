"""The report: one HTML file that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from metagpt_localllm.reporting import lanes, lists, summary
from metagpt_localllm.reporting.charts import (
    POINT_KINDS,
    Point,
    Ratio,
    columns_over_time,
    histogram,
    legend,
    ratios,
    scatter,
)
from metagpt_localllm.reporting.markup import as_json, name, text
from metagpt_localllm.reporting.recorded import Recorded
from metagpt_localllm.reporting.scales import count
from metagpt_localllm.statistics import summarize
from metagpt_localllm.wording import counted

__all__ = ["MARK", "render"]

#: By this line a file is known as a report of ours.
MARK = '<meta name="generator" content="metagpt-localllm report">'
#: Actions in the figure of the cache.
_MOST_ACTIONS = 15


def render(recorded: Recorded) -> str:
    """The whole file."""
    script, style = _template("page.js"), _template("page.css")
    points = _points(recorded)
    data: dict[str, Any] = {
        **lanes.as_data(recorded),
        "page": lists.PAGE,
        "manyRuns": len(recorded.runs) > 1,
        "pointKinds": POINT_KINDS,
        "points": [[p.call, POINT_KINDS.index(p.kind), p.tokens, round(p.seconds, 3), p.deadline and round(p.deadline, 1)] for p in points],
    }
    only = recorded.runs[0].id if len(recorded.runs) == 1 else ""
    parts = {
        "mark": MARK,
        "script-hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": style,
        "script": script,
        "title": text(f"MetaGPT run {only}" if only else f"{count(len(recorded.runs))} runs of MetaGPT"),
        "made": text(recorded.clock(recorded.now, "%Y-%m-%d %H:%M %Z")),
        "headline": summary.headline(recorded),
        "tiles": summary.tiles(recorded),
        "spent": summary.where_time_went(recorded),
        "runs": lists.runs(recorded),
        "timeline": lanes.timeline(recorded) if recorded.calls else "<p>No call was made.</p>",
        "scatter": _scatter(points),
        "histograms": _histograms(recorded),
        "cache": _cache(recorded),
        "groups": lists.groups(recorded),
        "failures": lists.failures(recorded),
        "savings": lists.savings(recorded),
        "calls": lists.calls(recorded),
        "data": as_json(data),
    }
    # At once, so that nothing that was put in is taken for a place to put something.
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda found: parts[found[1]], _template("page.html"))


def _template(file: str) -> str:
    return (resources.files(__package__) / file).read_text(encoding="utf-8")


def _points(recorded: Recorded) -> list[Point]:
    """The attempts by the size of their prompts."""
    found = []
    for index, call in enumerate(recorded.calls):
        for number, attempt in enumerate(call.attempts):
            is_answer = number == len(call.attempts) - 1 and call.record.outcome == "done"
            tokens = (call.figures.prompt_tokens if is_answer else None) or attempt.prompt_tokens
            waited = None if attempt.ended is None or not attempt.error else attempt.ended - attempt.at
            seconds = attempt.ttft if attempt.ttft is not None else waited
            if not tokens or seconds is None:
                continue
            cached = is_answer and 2 * (call.figures.cached_tokens or 0) > tokens
            kind = "none" if attempt.ttft is None else "cached" if cached else "new"
            found.append(Point(index, kind, tokens, max(seconds, 1e-3), attempt.deadline or None))
    return sorted(found, key=lambda point: (point.tokens, point.seconds))


def _scatter(points: list[Point]) -> str:
    if not points:
        return "<p>No attempt has these figures.</p>"
    words = {
        "new": "first token, prompt read anew", "cached": "first token, more than half of the prompt cached",
        "none": "no token came: how long was waited",
    }  # fmt: skip
    shown = [(f"dot {kind}", said) for kind, said in words.items() if any(point.kind == kind for point in points)]
    if any(point.deadline for point in points):
        shown.append(("line deadline", "deadline for the first token, learned from the calls before or set"))
    return legend(shown) + scatter(points)


def _histograms(recorded: Recorded) -> str:
    done = [one for one in recorded.figures if one.outcome == "done"]
    return (
        histogram("Time to first token", "s", (one.ttft for one in done))
        + histogram("Total time of a call", "s", (one.total for one in done))
        + histogram("Decode speed", "tokens per second", (one.decode_rate for one in done))
    )


def _cache(recorded: Recorded) -> str:
    done = sorted(
        (one for one in recorded.figures if one.outcome == "done" and one.prompt_tokens and one.cached_tokens is not None),
        key=lambda one: one.started,
    )
    if not done:
        return "<p>The server does not say what it takes from its prefix cache.</p>"
    rows = []
    for group in summarize(done, ("action",)):
        rows.append(Ratio(name(group.keys[0][1]), (group.cached_share or 0.0) * group.prompt_tokens, group.prompt_tokens))
    rows.sort(key=lambda row: -row.whole)
    whole = Ratio("<b>all</b>", sum(row.part for row in rows), sum(row.whole for row in rows))
    silent = sum(1 for one in recorded.figures if one.outcome == "done") - len(done)
    note = [f"{counted(silent, 'answered call is', 'answered calls are')} left out: the server did not say."] if silent else []
    if len(rows) > _MOST_ACTIONS:
        note.append(f"The {_MOST_ACTIONS} actions with the most prompt tokens, of {count(len(rows))}.")
    pairs = [(float(one.cached_tokens or 0), float(one.prompt_tokens or 0)) for one in done]
    return (
        '<div class="two"><figure><figcaption><h3>By action</h3><p>of prompt tokens</p></figcaption>'
        + ratios([whole, *rows[:_MOST_ACTIONS]])
        + "</figure><figure><figcaption><h3>Over time</h3><p>a cache that stops working shows here</p></figcaption>"
        + columns_over_time("Share of prompt tokens from the prefix cache over time", pairs)
        + "</figure></div>"
        + (f'<p class="note">{text(" ".join(note))}</p>' if note else "")
    )
