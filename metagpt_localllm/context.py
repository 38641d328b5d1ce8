"""The prompt, fitted to what the server has loaded, and the request made of it."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn, Optional, Sequence

import anyio

from metagpt_localllm import errors, events, servers
from metagpt_localllm.conversation import Conversation
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.messages import Message, largest_text, with_text
from metagpt_localllm.policies import Policy, named, of_compress_type
from metagpt_localllm.run import Call, Prompt, Run, encoded
from metagpt_localllm.servers import Server
from metagpt_localllm.shortening import shorten
from metagpt_localllm.trimming import Trimmed, trim

__all__ = ["DEFAULT_WINDOW", "prepare", "window_is_a_guess", "window_is_too_large"]

#: Tokens assumed where neither the server nor the configuration names the context window.
DEFAULT_WINDOW = 4096
#: Characters below which a message is not worth cutting: little would be left beside the marker.
_SHORTEST_CUT = 200
#: Times that a cut is made anew because the server counted otherwise than was estimated.
_ROUNDS = 4
#: Share of the tokens aimed at below which too much has gone.
_USED = 0.9
#: Seconds between two questions whether a window that was learned has grown.
_ASK_AGAIN = 30.0
#: Counts that may fail in a row before a server is not asked for one any more.
_COUNTS = 2


def _window(call: Call, server: Server) -> Optional[int]:
    """Tokens; None where the server did not even answer the question, so that nothing is cut on a guess."""
    configured = call.settings.context.window
    window: Optional[int]
    if configured != "auto":
        window = min(configured, server.facts.window or configured)
    else:
        usual = None if server is servers.UNKNOWN else server.usual_window or DEFAULT_WINDOW
        window = server.facts.window or call.context_length or usual
    taught = servers.learned(call.endpoint).window
    return window if taught is None else min(taught, window or taught)


def window_is_a_guess(call: Call) -> bool:
    """Whether nobody has said how large the context window is."""
    server = servers.known(call.endpoint)
    return (
        call.settings.context.window == "auto" and server is not None and not server.facts.window
        and not call.context_length and servers.learned(call.endpoint).window is None
    )  # fmt: skip


def window_is_too_large(call: Call) -> str:
    """What helps where the configured window is larger than the one that is loaded; "" where it is not."""
    server, configured = servers.known(call.endpoint), call.settings.context.window
    loaded = server.facts.window if server is not None else None
    if server is None or configured == "auto" or loaded is None or configured <= loaded:
        return ""
    return f"The server has loaded a context of {loaded:,} tokens, not the {configured:,} of llm.local.context.window. " + server.remedy(configured)


async def prepare(run: Run) -> Prompt:
    """Fits the messages into the window less the reserve, and ``max_tokens`` into what remains."""
    call, server, chat, body = run.call, run.server, run.chat, dict(run.call.body)
    window = _window(call, server)
    wanted = int(body.pop("max_tokens", None) or (window or DEFAULT_WINDOW) // 4)
    room = window
    if window is not None:
        configured = call.settings.context.reserve
        reserve = min(wanted, window // 4) if configured == "auto" else configured
        budget = window - reserve
        roomy = chat.window is not None and chat.whole <= call.settings.context.low_water * budget
        if roomy or window > (chat.window or window):
            chat.uncut()
        # Only a prompt that may be too long is sent to be counted, and none that surely is.
        if chat.most + (wanted if server.sums else reserve) > window and chat.least <= budget:
            await _count(run)
        if chat.whole > budget and await _has_grown(run, window):
            return await prepare(run)
        if chat.tokens > budget:
            await _trim(run, budget, window)
            if chat.tokens > budget:
                if not window_is_a_guess(call):
                    _refuse(run, budget, window, reserve)
                room = None  # let the server decide
    run.history.conversations.keep(chat)
    body["messages"] = chat.sent
    body["max_tokens"] = wanted if room is None else max(1, min(wanted, room - chat.tokens))
    body["stream"] = True
    body.update(server.needed() if servers.is_strict(call.endpoint) else server.extras())
    return Prompt(encoded(body), chat.sent, chat.counts(), chat.tokens, body["max_tokens"], wanted, window, chat.changed)


async def _has_grown(run: Run, window: int) -> bool:
    """Whether the server has loaded more since an error told of this window, as that error advised."""
    endpoint, taught = run.call.endpoint, servers.learned(run.call.endpoint)
    if taught.window is None or window > taught.window or anyio.current_time() - taught.asked < _ASK_AGAIN:
        return False
    taught.asked = anyio.current_time()
    servers.forget(endpoint)
    await run.identify()
    if (run.server.facts.window or 0) <= taught.window:
        return False
    taught.window = None
    return True


async def _count(run: Run, messages: Optional[Sequence[Message]] = None) -> Optional[int]:
    """The server's own count of the prompt; None where it does not count, or has just failed to."""
    taught = servers.learned(run.call.endpoint)
    if taught.failed_counts >= _COUNTS or (messages is None and run.chat.known):
        return None
    body = {**run.call.body, "messages": run.chat.sent if messages is None else messages}
    counted = await servers.count_tokens(run.server, run.call.endpoint, body)
    taught.failed_counts = 0 if counted is not None or not run.server.counts else taught.failed_counts + 1
    if counted is not None and messages is None:
        run.chat.counted(counted)
    return counted


async def _trim(run: Run, budget: int, window: int) -> None:
    """Cuts the conversation; by the server's count where there is one, and else by the estimate."""
    chat, settings = run.chat, run.call.settings.context
    before, sent, scale = chat.tokens, chat.positions(), 1.0
    best: Optional[tuple[Trimmed, Optional[int]]] = None
    for _ in range(_ROUNDS):

        def count(position: int, message: Message, scale: float = scale) -> float:
            return chat.count(position, message) * scale

        trimmed = trim(
            sent,
            budget - chat.frame * scale,
            low_water=settings.low_water,
            policy=_policy(run.call),
            cut_fixed=settings.oversized == "cut",
            count=count,
            shorten=_shortener(chat, scale),
        )
        if not trimmed.changes:
            break
        remain = [trimmed.changes.get(position, message) for position, message in sent]
        counted = await _count(run, [message for message in remain if message is not None])
        fits = counted is None or counted <= budget
        if best is None or best[1] is None or counted is None or best[1] > budget or best[1] < counted <= budget:
            best = trimmed, counted
        estimated = trimmed.tokens + chat.frame * scale
        if counted is None or (fits and counted >= _USED * estimated):
            break
        # What remains is denser than the whole was, or less dense: estimate it by its own measure.
        scale *= (1.01 if not fits else 1.0) * counted / estimated
    if best is None:
        return
    trimmed, counted = best
    chat.cut(trimmed.changes, window)
    if counted is not None:
        chat.counted(counted)
    run.trims.append(
        events.Trimmed(
            run.info, trimmed.dropped, trimmed.shortened, trimmed.replaced, max(before - chat.tokens, 0), chat.tokens,
            budget, window,
        )
    )  # fmt: skip
    events.publish(run.trims[-1])


def _shortener(chat: Conversation, scale: float) -> Any:
    def shortened(
        position: int, message: Message, target: float, keep: Literal["both", "start", "end"]
    ) -> Optional[Message]:
        text = largest_text(message)
        if text is None or len(text) < _SHORTEST_CUT:
            return None

        def count(part: str) -> int:
            return math.ceil(chat.count_text_at(position, part) * scale)

        rest = chat.count(position, message) * scale - chat.count_text_at(position, text) * scale
        shorter = shorten(text, max(int(target - rest), 0), count, keep)
        return with_text(message, shorter) if shorter != text else None

    return shortened


def _policy(call: Call) -> Policy:
    settings = call.settings.context
    if call.compress_type and "policy" not in settings.model_fields_set:
        return of_compress_type(call.compress_type)
    return named(settings.policy)


def _refuse(run: Run, budget: int, window: int, reserve: int) -> NoReturn:
    tokens = run.chat.tokens
    cut = run.call.settings.context.oversized == "cut"
    which = "the prompt has {:,} tokens even when trimmed" if cut else "the system message, the task and the latest message have {:,} tokens"
    what = (
        f"{which.format(tokens)}, and the context window of {window:,} leaves {budget:,} beside {reserve:,} reserved for "
        "the answer"
    )
    remedy = f"{run.server.remedy(1024 * math.ceil((tokens + reserve) / 1024))} Or ask for shorter answers (llm.max_token)"
    remedy += "." if cut else ", or let them be cut (llm.local.context.oversized: cut)."
    run.give_up(Failure(Kind.FATAL, errors.ContextOverflow, what, remedy, "llm.local.context.window"))
