"""The tables: what failed, what was trimmed, saved and given again, the figures of stats, and the calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Optional, Sequence

from metagpt_localllm.reporting.markup import Column, name, table, text
from metagpt_localllm.reporting.recorded import Call, Recorded
from metagpt_localllm.reporting.scales import count, share, short
from metagpt_localllm.statistics import TIMEOUTS, Percentiles, known_number, summarize
from metagpt_localllm.wording import duration, rate

__all__ = ["PAGE", "calls", "failures", "groups", "runs", "savings"]

#: Rows of a list that is cut, and calls on a page.
_MOST, PAGE = 200, 50


def runs(recorded: Recorded) -> str:
    """The runs that the report is about."""
    columns: list[Column] = [("run", False), ("began", False), ("how it stands", False), ("times resumed", True), ("model", False), ("server", False)]
    models, servers = defaultdict(set), defaultdict(set)
    for call in recorded.calls:
        models[call.figures.run].add(call.figures.model)
        servers[call.figures.run].add(call.figures.server)
    rows = [
        [text(run.id), recorded.clock(run.started), text(recorded.standing.get(run.id, run.outcome)), count(run.resumed),
         ", ".join(map(name, sorted(models[run.id]))), ", ".join(map(name, sorted(servers[run.id])))]
        for run in recorded.runs
    ]  # fmt: skip
    return table("Runs", columns, rows[-_MOST:], _cut(len(rows), "runs"))


def groups(recorded: Recorded) -> str:
    """The table of ``metagpt-localllm stats``."""
    columns: list[Column] = [
        ("action", False), ("role", False), ("tier", False), ("calls", True), ("answered", True), ("first token p50", True), ("p95", True),
        ("p99", True), ("total p50", True), ("p95", True), ("p99", True), ("prompt tokens p50", True), ("cached", True), ("tok/s", True),
        ("retries", True), ("timeouts", True), ("trimmed", True), ("saved", True), ("given again", True),
    ]  # fmt: skip
    found = summarize(recorded.figures, ("action", "role", "tier"))
    rows = [
        [*(name(value) for _, value in group.keys), count(group.calls), count(group.answered), *_three(group.ttft), *_three(group.total),
         count(group.prompt.p50 if group.prompt else None), share(group.cached_share), rate(group.decode_rate), count(group.retries),
         count(group.timeouts), count(group.trimmed_tokens), count(group.saved_tokens), count(group.replayed)]
        for group in found[:_MOST]
    ]  # fmt: skip
    return table("By action, role and tier", columns, rows, _cut(len(found), "groups", "that took the most time"))


def _three(found: Optional[Percentiles]) -> list[str]:
    return [duration(found.p50), duration(found.p95), duration(found.p99)] if found else ["–"] * 3


def failures(recorded: Recorded) -> str:
    """Each kind of error, and each attempt that failed with its sentence."""
    failed = [
        (call, index, attempt) for call in recorded.calls for index, attempt in enumerate(call.attempts) if attempt.error
    ]
    if not failed:
        return "<p>No attempt failed.</p>"
    kinds: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    lost: dict[str, float] = defaultdict(float)
    for call, _, attempt in failed:
        kinds[attempt.error] += 1
        lost[attempt.error] += attempt.seconds
        answered[attempt.error] += call.record.outcome == "done"
    columns: list[Column] = [("error", False), ("attempts", True), ("a deadline of ours", False), ("time in them", True), ("answered later", True)]
    summed = [
        [text(error), count(number), "yes" if error in TIMEOUTS else "no", duration(lost[error]), count(answered[error])]
        for error, number in kinds.most_common()
    ]
    each_columns: list[Column] = [
        ("when", False), ("what happened", False), *_where(recorded), ("attempt", True), ("after", True), ("tokens", True), ("the call", False),
    ]  # fmt: skip
    each = [
        [recorded.clock(attempt.at), f'<span class="sentence"><b>{text(attempt.error)}</b>: {text(attempt.detail)}</span>',
         *_of(recorded, call), f"{index + 1} of {len(call.attempts)}", duration(attempt.seconds),
         count(attempt.tokens), text(call.outcome)]
        for call, index, attempt in failed[-_MOST:]
    ]  # fmt: skip
    return table("Failed attempts by error", columns, summed) + table(
        "Failed attempts, one by one", each_columns, each, _cut(len(failed), "failed attempts", "that were last")
    )


def savings(recorded: Recorded) -> str:
    """What was taken out of prompts, gone on with, and given again."""
    parts = []
    trims = [(call, trim) for call in recorded.calls for trim in call.trims]
    if trims:
        columns: list[Column] = [*_where(recorded), ("tokens taken out", True), ("messages left out", True), ("shortened", True), ("made one line", True),
                                 ("tokens left", True), ("room", True), ("context window", True)]  # fmt: skip
        fields = ("removed_tokens", "dropped_messages", "shortened_messages", "replaced_messages", "prompt_tokens", "budget", "window")
        rows = [[*_of(recorded, call), *(_count_of(trim.get(field)) for field in fields)] for call, trim in trims[-_MOST:]]
        parts.append(table("Trimmed: prompts that were made to fit", columns, rows, _cut(len(trims), "trims", "that were last")))
    else:
        parts.append("<p>No prompt was trimmed.</p>")
    again = [one for one in recorded.figures if one.outcome == "replayed"]
    if again:
        columns = [("when", False), ("run", False), ("call", True), ("role", False), ("action", False), ("tokens saved", True)]
        rows = [[recorded.clock(one.started), text(one.run), count(one.number), name(one.role), name(one.action), count(one.saved_tokens)]
                for one in again[-_MOST:]]  # fmt: skip
        parts.append(table("Replayed: answers of an earlier start, given again", columns, rows, _cut(len(again), "replays", "that were last")))
    else:
        parts.append("<p>No answer was given again: each was computed in this run.</p>")
    saved = [call for call in recorded.calls if call.figures.saved_tokens]
    if saved:
        columns = [*_where(recorded), ("tokens of the answer", True), ("of them saved", True)]
        rows = [[*_of(recorded, call), count(call.figures.answer_tokens), count(call.figures.saved_tokens)] for call in saved[-_MOST:]]
        parts.append(table("Saved: answers that broke off and were gone on with", columns, rows, _cut(len(saved), "calls", "that were last")))
    else:
        parts.append("<p>No answer that broke off was gone on with.</p>")
    return "".join(parts)


def calls(recorded: Recorded) -> str:
    """The first page of the calls; page.js turns it."""
    run: list[Column] = [("run", False)] if len(recorded.runs) > 1 else []
    columns: list[Column] = [
        *run, ("call", True), ("began", False), ("role", False), ("action", False), ("outcome", False), ("attempts", True), ("waited", True),
        ("first token", True), ("total", True), ("prompt", True), ("cached", True), ("answer", True), ("tok/s", True),
    ]  # fmt: skip
    rows = [_row(recorded, call) for call in recorded.calls[:PAGE]]
    more = len(recorded.calls) > PAGE
    note = f"The first {PAGE} of {count(len(recorded.calls))}; the others need JavaScript, or metagpt-localllm stats." if more else ""
    return table("Calls", columns, rows, id="calls") + (f'<p class="note" id="calls-note">{note}</p>' if more else "")


def _row(recorded: Recorded, call: Call) -> list[str]:
    one = call.figures
    cached = None if one.cached_tokens is None or not one.prompt_tokens else one.cached_tokens / one.prompt_tokens
    run = [text(one.run)] if len(recorded.runs) > 1 else []
    return [
        *run, count(one.number), recorded.clock(call.begin), name(one.role), name(one.action), text(call.outcome), count(len(call.attempts)),
        duration(short(one.queued)), duration(short(one.ttft)), duration(short(one.total)), count(one.prompt_tokens), share(cached),
        count(one.answer_tokens), rate(short(one.decode_rate)),
    ]  # fmt: skip


def _where(recorded: Recorded) -> Sequence[Column]:
    run: Sequence[Column] = [("run", False)] if len(recorded.runs) > 1 else []
    return [*run, ("call", True), ("role", False), ("action", False)]


def _of(recorded: Recorded, call: Call) -> list[str]:
    run = [text(call.figures.run)] if len(recorded.runs) > 1 else []
    return [*run, count(call.figures.number), name(call.figures.role), name(call.figures.action)]


def _count_of(value: object) -> str:
    return count(known_number(value))


def _cut(number: int, what: str, which: str = "that are newest") -> str:
    return f"The {_MOST} {which}, of {count(number)} {what}." if number > _MOST else ""
