"""What a person sees first: how it went, in a sentence and a few numbers."""

from __future__ import annotations

from typing import Sequence

from metagpt_localllm.reporting.charts import stacked
from metagpt_localllm.reporting.markup import text
from metagpt_localllm.reporting.phases import KINDS
from metagpt_localllm.reporting.recorded import Recorded
from metagpt_localllm.reporting.scales import count, share
from metagpt_localllm.wording import counted, duration, rate

__all__ = ["headline", "tiles", "where_time_went"]

#: A part of the time that is worth a word.
_MUCH = 0.3
_SPENT = {
    "queued": "waiting for a turn at the server: more slots, or fewer roles at once, would help",
    "pause": "pauses between attempts",
    "prefill": "waiting for first tokens, while the server read the prompts",
    "decode": "writing the answers",
    "open": "calls that were broken off",
    "failed": "attempts that failed",
}


def headline(recorded: Recorded) -> str:
    """How it went, as HTML."""
    total = recorded.total
    lost = total.failed + total.cancelled + total.unfinished
    failed = sum(total.errors.values())
    if not total.calls:
        return f"Nothing was asked of the server: {counted(total.replayed, 'answer was', 'answers were')} given again."
    if lost == 0:
        words = [f"All {count(total.calls)} calls were answered." if total.calls > 1 else "The one call was answered."]
    else:
        how = [(total.failed, "failed"), (total.cancelled, "cancelled"), (total.unfinished, "without an end")]
        told = ", ".join(f"{count(number)} {what}" for number, what in how if number)
        words = [f"{count(total.answered)} of {counted(total.calls, 'call')} were answered ({told})."]
    if failed:
        again = sum(1 for call in recorded.calls if call.figures.errors and call.record.outcome == "done")
        nevertheless = f"{counted(again, 'call')} needed more than one, and got {'its' if again == 1 else 'their'} answer."
        words.append(f"{counted(failed, 'attempt')} failed; {nevertheless}" if again else f"{counted(failed, 'attempt')} failed.")
    else:
        words.append("No attempt failed.")
    spent = _spent(recorded)
    whole = sum(seconds for _, _, seconds in spent)
    kind, _, most = max(spent, key=lambda part: part[2])
    if whole and most / whole >= _MUCH:
        words.append(f"The largest part of the time, {share(most / whole)}, went into {_SPENT[kind]}.")
    return text(" ".join(words))


def tiles(recorded: Recorded) -> str:
    """The numbers, as HTML."""
    total, calls = recorded.total, recorded.calls
    failed = [phase.seconds for call in calls for phase in call.phases if phase.kind in ("failed", "pause")]
    begin, end = min((call.begin for call in calls), default=recorded.now), max((call.end for call in calls), default=recorded.now)
    same_day = recorded.clock(begin, "%Y-%m-%d") == recorded.clock(end, "%Y-%m-%d")
    told = [
        ("calls answered", f"{count(total.answered)} of {count(total.calls)}",
         f"{counted(total.replayed, 'answer')} given again, at no cost" if total.replayed else f"{count(total.answer_tokens)} tokens in all"),
        ("from first to last", duration(end - begin),
         f"{recorded.clock(begin, '%Y-%m-%d %H:%M')} to {recorded.clock(end, '%H:%M' if same_day else '%Y-%m-%d %H:%M')}"
         + ("" if _worked(recorded) > 0.95 * (end - begin) else f"; worked {duration(_worked(recorded))}")),
        ("to the first token (median)", duration(total.ttft.p50 if total.ttft else None),
         f"95 % within {duration(total.ttft.p95)}" if total.ttft else "no call was answered"),
        ("tokens per second", rate(total.decode_rate),
         f"prompts: {rate(total.prefill_rate)} per second" if total.prefill_rate else "while answers were written"),
        ("attempts failed", count(sum(total.errors.values())),
         f"{count(total.timeouts)} of them timed out; with pauses {duration(sum(failed))}" if total.errors else "none was repeated"),
        ("of prompts from the cache", share(total.cached_share),
         f"of {count(total.prompt_tokens)} prompt tokens" if total.cached_share is not None else "the server does not say"),
        ("tokens saved", count(total.saved_tokens), "of answers, not written a second time"),
        ("tokens trimmed", count(total.trimmed_tokens),
         f"so that {counted(total.trims, 'prompt')} fitted" if total.trims else "every prompt fitted"),
    ]  # fmt: skip
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{text(what)}</dt><dd>{text(number)}</dd><dd class=\"sub\">{text(more)}</dd></div>" for what, number, more in told
    ) + "</dl>"  # fmt: skip


def where_time_went(recorded: Recorded) -> str:
    """One bar, as HTML: the time of all calls by kind of phase."""
    spent = _spent(recorded)
    return stacked(spent, "Where the time of all calls went") if any(seconds for _, _, seconds in spent) else ""


def _spent(recorded: Recorded) -> Sequence[tuple[str, str, float]]:
    sums = dict.fromkeys(KINDS, 0.0)
    for call in recorded.calls:
        for phase in call.phases:
            sums[phase.kind] += phase.seconds
    return [(kind, KINDS[kind], sums[kind]) for kind in ("queued", "pause", "prefill", "decode", "failed", "open")]


def _worked(recorded: Recorded) -> float:
    """Seconds in which calls ran, with the short pauses between them."""
    return recorded.axis.length - sum(fold.width for fold in recorded.axis.folds)
