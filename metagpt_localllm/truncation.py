"""What a server does without a word when a prompt is too long for it, and what its answers and errors teach about the context.

Ollama leaves messages out and counts the rest; LM Studio and llama-cpp-python may answer with no token at all. A good answer
must never be taken for such a one: a server that tells its window, and holds the prompt in it, has not cut anything.
"""

from __future__ import annotations

import enum
import math
from typing import Optional

import anyio

from metagpt_localllm import errors, servers
from metagpt_localllm.context import window_is_a_guess
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.run import Prompt, Run
from metagpt_localllm.servers.base import positive

__all__ = ["learn", "learn_count", "unmask"]

#: Share of the tokens that a prompt surely has; a server that counts fewer has not read all of it.
_SURELY = 0.9
#: Tokens that fit any context that anybody loads: no prompt of so few is cut for want of room.
_SURELY_FITS = 512
#: Times that one call is sent again, smaller.
_AGAIN = 2
#: Times more tokens than usual that are estimated, at the most, for a server that refused a prompt and did not say why.
_MOST_DOUBT = 4.0


async def unmask(run: Run, prompt: Prompt, failure: Optional[Failure]) -> Optional[Failure]:
    """The failure that an answer is which the server gave to a part of the prompt only; else ``failure`` as it is."""
    suspicion = _suspicion(run, prompt, failure)
    if suspicion is None:
        return failure
    how, truncated = suspicion
    endpoint, taught = run.call.endpoint, servers.learned(run.call.endpoint)
    if run.server.facts.window is not None:  # it may have loaded the model anew since it was asked
        servers.forget(endpoint)
        await run.identify()
    loaded = run.server.facts.window
    if loaded is not None and loaded >= (prompt.window or prompt.tokens):
        taught.counts_all = taught.counts_all and failure is not None
        return failure
    if run.truncated == 0:
        run.first_answer, run.first_window = run.answer, taught.window
        return truncated
    if how is _Way.FULL or (how is _Way.BLANK and failure is not None and run.truncated < _AGAIN):
        return truncated
    # The smaller prompt changed nothing: it counts otherwise than we do, or is silent for another reason.
    taught.window = run.first_window
    run.chat.uncut()
    if how is _Way.CUT and run.first_answer is not None:
        taught.counts_all = False
        run.answer = run.first_answer  # it was a whole one
    return failure


class _Way(enum.Enum):
    CUT = "read a part"
    BLANK = "answered nothing"
    FULL = "broke off"


def _suspicion(run: Run, prompt: Prompt, failure: Optional[Failure]) -> Optional[tuple[_Way, Failure]]:
    server, answer, taught = run.server, run.answer, servers.learned(run.call.endpoint)
    told, least = _prompt_tokens(run), math.floor(run.chat.least * _SURELY)
    if failure is None and server.truncates and taught.counts_all and told is not None and _SURELY_FITS // 2 < told < least:
        return _Way.CUT, _truncated(
            run, prompt, told,
            f"the server read only {told:,} tokens of a prompt that has at least {least:,}: it has cut it without a word, and "
            "the answer is discarded",
        )  # fmt: skip
    blank = server.blank and not answer.tokens and (failure is None or failure.error is errors.IncompleteStream)
    # A window that it tells is asked for again, which shows whether it has become too small.
    tells = run.server.facts.window is not None
    long = tells or prompt.window is None or prompt.tokens > prompt.window // 2 or window_is_a_guess(run.call)
    if blank and long and prompt.tokens > _SURELY_FITS:
        return _Way.BLANK, _truncated(
            run, prompt, (told or prompt.tokens) // 2,
            f"the server answered nothing at all to a prompt of {told or prompt.tokens:,} tokens, as it does where its "
            "context is too small for it",
        )  # fmt: skip
    written = (answer.usage or {}).get("completion_tokens")
    full = failure is None and answer.finish_reason == "length" and run.truncated == 1 and told is not None
    if full and isinstance(written, int) and 0 < written < prompt.max_tokens // 2 and run.server.facts.window is None:
        # The window that was learned from the first time is still too large.
        return _Way.FULL, _truncated(
            run, prompt, (told or 0) + written,
            f"the answer ended after {written:,} of {prompt.max_tokens:,} tokens, where the server's context was full",
        )  # fmt: skip
    return None


def _truncated(run: Run, prompt: Prompt, window: int, what: str) -> Failure:
    needed = 1024 * math.ceil((prompt.tokens + min(prompt.wanted, prompt.tokens)) / 1024)
    return Failure(
        Kind.TRUNCATED, errors.ContextOverflow, what, run.server.remedy(needed), "llm.local.context.window", window=window
    )


def _prompt_tokens(run: Run) -> Optional[int]:
    return positive((run.answer.usage or {}).get("prompt_tokens"))


def learn_count(run: Run, prompt: Prompt) -> None:
    """What a whole answer teaches: what its prompt counts, where that can be."""
    told, chat, taught = _prompt_tokens(run), run.chat, servers.learned(run.call.endpoint)
    if told is None or (run.server.truncates and not (taught.counts_all and run.server.facts.window)):
        return
    if chat.least * _SURELY <= told <= min(chat.most, prompt.window or math.inf):
        chat.counted(told)
        taught.scale = 1.0


def learn(run: Run, failure: Failure, prompt: Prompt) -> None:
    """What an overflow teaches: the server's window and its count, or at least that ours was too low."""
    taught, chat = servers.learned(run.call.endpoint), run.chat
    taught.asked = anyio.current_time()
    if failure.kind is Kind.TRUNCATED:
        run.truncated += 1
        run.history.calibration.forget()
        run.history.conversations.forget()
        chat.recount()
        loaded, before = run.server.facts.window, prompt.window
        # What it says of itself now, where that is news; else it is larger than what it read, but by how much nobody knows.
        taught.window = loaded if loaded is not None and (before is None or loaded < before) else failure.window
        return
    news = failure.window is not None and failure.window != taught.window
    if failure.window is not None:
        taught.window = failure.window
    if failure.prompt_tokens is not None:
        chat.counted(failure.prompt_tokens)
    elif not news and taught.scale < _MOST_DOUBT:
        taught.scale *= 1.5
        chat.doubt(1.5)
