"""Events as lines of MetaGPT's log, whatever else shows them."""

from __future__ import annotations

from typing import Any, Callable

from metagpt_localllm import events
from metagpt_localllm.events import Event
from metagpt_localllm.tiers import Caller
from metagpt_localllm.wording import counted

__all__ = ["log_to", "name_of"]


def name_of(number: int, caller: Caller) -> str:
    """What the log's lines about a call begin with."""
    return f"call {number} ({caller})"


def log_to(logger: Any) -> Callable[[Event], None]:
    """A subscriber that writes to ``logger``, which is MetaGPT's (loguru's)."""

    def log(event: Event) -> None:
        who = name_of(event.call.number, event.call.caller)
        if isinstance(event, events.Sent):
            for why in event.why.values():
                logger.debug(f"{who}: {why}")
        elif isinstance(event, events.Queued):
            logger.info(f"{who}: waits for its turn behind {event.ahead} at this server.")
        elif isinstance(event, events.Continued):
            logger.info(f"{who}: goes on with what there is of the answer: {counted(event.tokens, 'token')}.")
        elif isinstance(event, events.Replayed):
            logger.info(f"{who}: answered from the journal (call {event.number} there, {counted(event.tokens, 'token')}); nothing is sent.")
        elif isinstance(event, events.Retry):
            logger.warning(f"{who}: attempt {event.attempt} failed: {event.detail}. Next in {event.delay:.1f} s.")
        elif isinstance(event, events.Loading):
            usual = f", usually {event.usual:.0f} s" if event.usual else ""
            logger.info(f"{who}: {event.cause}. Waiting for it{usual}, {event.limit:.0f} s at the most.")
        elif isinstance(event, events.Waiting):
            logger.warning(f"{who}: {event.cause}. Waiting for it, {event.limit:.0f} s at the most.")
        elif isinstance(event, events.Trimmed):
            logger.warning(
                f"{who}: the prompt of {event.prompt_tokens + event.removed_tokens:,} tokens was over the {event.budget:,} that "
                f"the context window of {event.window:,} leaves beside the answer: {_lost(event)}; {event.prompt_tokens:,} remain."
            )
        elif isinstance(event, events.Done):
            _done(logger, who, event)

    return log


def _done(logger: Any, who: str, event: events.Done) -> None:
    first = f", first token after {event.ttft:.1f} s" if event.ttft is not None else ""
    omitted = f", {counted(event.changed_messages, 'message')} left out or shortened" if event.changed_messages else ""
    logger.info(
        f"{who}: {event.prompt_tokens:,} tokens in, {event.completion_tokens:,} out in {event.elapsed:.1f} s"
        f"{first} (tier {event.call.tier}, {event.finish_reason}{omitted})"
    )
    if event.cut_by == "max_tokens":
        logger.warning(f"{who}: the answer was cut at its largest length; raise llm.max_token.")
    elif event.cut_by == "server":
        logger.warning(f"{who}: the answer was cut by a limit that the server has of its own, short of llm.max_token.")
    elif event.cut_by == "window":
        logger.warning(
            f"{who}: the answer was cut where the context window ended; load the model with a larger one, or keep more of "
            "it free (llm.local.context.reserve)."
        )


def _lost(trim: events.Trimmed) -> str:
    counts = {"left out": trim.dropped_messages, "shortened": trim.shortened_messages, "made one line": trim.replaced_messages}
    return ", ".join(f"{counted(count, 'message')} {how}" for how, count in counts.items() if count)
