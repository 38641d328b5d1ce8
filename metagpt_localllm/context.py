"""The prompt, fitted to what the server has loaded, and the request made of it."""

from __future__ import annotations

import json
import math
from typing import Any, Mapping, NoReturn, Optional

from metagpt_localllm import errors, events, servers
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.run import Call, Prompt, Run
from metagpt_localllm.servers import Server
from metagpt_localllm.tokens import MESSAGE_TOKENS, estimate_message, estimate_prompt
from metagpt_localllm.trimming import Fitted, fit

__all__ = ["DEFAULT_WINDOW", "learn", "prepare", "window_is_a_guess"]

#: Tokens assumed where neither the server nor the configuration names the context window.
DEFAULT_WINDOW = 4096


def _window(call: Call, server: Server) -> Optional[int]:
    """Tokens; None where the server did not even answer the question, so that nothing is cut on a guess."""
    configured = call.settings.context.window
    window: Optional[int]
    if configured != "auto":
        window = configured
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


async def prepare(run: Run) -> Prompt:
    """Fits the messages into the window less the reserve, and ``max_tokens`` into what remains."""
    call, server, body = run.call, run.server, dict(run.call.body)
    window, scale = _window(call, server), servers.learned(call.endpoint).scale
    wanted = int(body.pop("max_tokens", None) or (window or DEFAULT_WINDOW) // 4)
    estimate, tokens = run.estimate, math.ceil(run.estimate * scale)
    # No token is shorter than a byte, so most prompts need no counting.
    if window is not None and (scale != 1.0 or _bytes_bound(body) + wanted > window):
        configured = call.settings.context.reserve
        reserve = min(wanted, window // 4) if configured == "auto" else configured
        budget = window - reserve
        counted = await _count(run, body)
        tokens = counted if counted is not None else tokens
        if tokens > budget:
            fitted, tokens = await _trim(run, body, budget, tokens / estimate)
            body["messages"] = fitted.messages
            estimate = estimate_prompt(fitted.messages, body.get("tools"))
            events.publish(
                events.Trimmed(run.info, fitted.dropped, fitted.shortened, fitted.removed_tokens, tokens, window)
            )
            if tokens > budget:
                if not window_is_a_guess(call):
                    _refuse(run, tokens, budget, window, reserve)
                window = None  # let the server decide
    body["max_tokens"] = wanted if window is None else max(1, min(wanted, window - tokens))
    body["stream"] = True
    if not servers.is_strict(call.endpoint):
        body.update(server.extras())
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")
    return Prompt(content, body["messages"], tokens, body["max_tokens"], estimate)


async def _count(run: Run, body: Mapping[str, Any]) -> Optional[int]:
    """The server's own count; None where it does not count, or has just failed to."""
    if not run.counts:
        return None
    counted = await servers.count_tokens(run.server, run.call.endpoint, body)
    run.counts = counted is not None
    return counted


async def _trim(
    run: Run, body: Mapping[str, Any], budget: int, scale: float
) -> tuple[Fitted, int]:
    """Trims by the scaled estimate, and checks by the server's count where there is one."""
    frame = estimate_prompt([], body.get("tools"))
    for _ in range(4):

        def count(message: Mapping[str, Any], scale: float = scale) -> int:
            return math.ceil(estimate_message(message) * scale)

        fitted = fit(body["messages"], budget - math.ceil(frame * scale), count)
        estimated = fitted.tokens + math.ceil(frame * scale)
        counted = await _count(run, {**body, "messages": fitted.messages})
        tokens = counted if counted is not None else estimated
        if tokens <= budget or not fitted.fits:
            break
        # What remains is denser than the whole was: estimate it by its own measure.
        scale *= 1.01 * tokens / estimated
    return fitted, tokens


def _bytes_bound(body: Mapping[str, Any]) -> int:
    """Tokens that the prompt has at the most: one per byte, and the template's around each message."""
    total = MESSAGE_TOKENS
    for message in body["messages"]:
        content = message.get("content")
        if not isinstance(content, str) or len(message) > 2:
            return 1 << 60
        total += len(content.encode("utf-8", "replace")) + 2 * MESSAGE_TOKENS
    return total if not body.get("tools") else 1 << 60


def learn(call: Call, failure: Failure, prompt: Prompt) -> None:
    """What an overflow teaches: the server's window and its count, or at least that ours was too low."""
    taught = servers.learned(call.endpoint)
    news = failure.window is not None and failure.window != taught.window
    if failure.window is not None:
        taught.window = failure.window
    if failure.prompt_tokens is not None and prompt.estimate > 0:
        taught.scale = max(taught.scale, failure.prompt_tokens / prompt.estimate)
    elif not news:
        taught.scale *= 1.5
    if taught.scale == 1.0:
        taught.scale = 1.0001  # so that the prompt is counted from now on


def _refuse(run: Run, tokens: int, budget: int, window: int, reserve: int) -> NoReturn:
    what = (
        f"the prompt has {tokens:,} tokens even when trimmed, and the context window of {window:,} "
        f"leaves {budget:,} beside {reserve:,} reserved for the answer"
    )
    remedy = "Load the model with a larger context, or ask for shorter answers (llm.max_token)."
    run.give_up(Failure(Kind.FATAL, errors.ContextOverflow, what, remedy, "llm.local.context.window"))
