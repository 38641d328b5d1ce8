"""How an attempt goes on with what the one before it has brought, instead of asking for all of it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Mapping, Union

import httpx

from metagpt_localllm import errors, failures, servers
from metagpt_localllm.answer import Answer, may_continue
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.run import Run, encoded

__all__ = ["Begun", "begin", "has_gained", "with_limit"]

#: New tokens with which an attempt has brought the answer forward.
_GAIN = 16


@dataclass(frozen=True)
class Begun:
    """A request that goes on with the beginning of an answer."""

    content: bytes
    answer: Answer


def _can_go_on(run: Run) -> bool:
    """Whether what has come of the answer can be gone on with, as far as is known without asking the server."""
    answer = run.answer
    if not answer.continuable or not servers.learned(run.call.endpoint).continues:
        return False
    return run.server.continuation(_body(run), answer.partial, answer.partial_tokens) is not None


def has_gained(run: Run) -> bool:
    """Whether the attempt that failed has brought the answer forward."""
    return run.answer.partial_tokens - run.answer.begun_tokens >= _GAIN and _can_go_on(run)


async def begin(run: Run) -> Union[Begun, Failure, None]:
    """The request that goes on with ``run.answer``; None where the server cannot be shown to do so faithfully.

    A failure where it is not there, or not yet: then it is waited for, with what there is of the answer.
    """
    answer, server = run.answer, run.server
    text, tokens = answer.partial, answer.partial_tokens
    if not answer.tokens or not _can_go_on(run) or not may_continue(text, server.repeats):
        return None
    endpoint = run.call.endpoint
    try:
        request = await servers.continuation(server, endpoint, _body(run), text, tokens)
    except httpx.TransportError as error:
        return failures.from_exception(error, endpoint.address, False, endpoint.api_key)
    except servers.Loading:
        return Failure(
            Kind.LOADING, errors.ServerUnavailable, "the server is loading the model", "Give it more time to load.",
            "llm.local.retry.wait_for_server",
        )  # fmt: skip
    if request is None:
        return None
    return Begun(encoded(request), Answer.begun(text, tokens, server.repeats, shown=answer.content))


def with_limit(request: bytes, max_tokens: int) -> bytes:
    """The request for an answer of so many tokens."""
    try:
        body = json.loads(request)
    except ValueError:
        return request
    return encoded({**body, "max_tokens": max_tokens})


def _body(run: Run) -> Mapping[str, Any]:
    body: Mapping[str, Any] = json.loads(run.request)
    return body
