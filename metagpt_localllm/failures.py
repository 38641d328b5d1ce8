"""What went wrong in one attempt, and what may follow from it: the table of all failures. Pure.

Sources: the servers' code and answers as observed (llama.cpp b11549, Ollama 0.33, vLLM 0.32, LM Studio's
documentation and issues, llama-cpp-python 0.3.36, transformers 5.23, mlx-lm 0.32).
"""

from __future__ import annotations

import enum
import itertools
import json
import re
import socket
import ssl
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, Mapping, Optional

import httpx

from metagpt_localllm import errors
from metagpt_localllm.quoting import quoted
from metagpt_localllm.unpacking import UnknownPacking

__all__ = ["Failure", "Kind", "from_error_body", "from_exception", "from_response"]


class Kind(enum.Enum):
    """What may follow a failure."""

    TRANSIENT = "transient"  # try again after a backoff; spends an attempt
    NOT_UP = "not up"  # wait until it is there; spends nothing
    LOADING = "loading"  # likewise
    OVERFLOW = "overflow"  # trim again and send once more
    TRUNCATED = "truncated"  # the server has cut the prompt without a word: likewise, twice at the most
    STRICT = "strict"  # the server refuses fields that OpenAI does not have: send without them
    CONTINUATION = "continuation"  # it does not go on with an answer: ask for all of it
    FATAL = "fatal"  # no repetition helps


@dataclass(frozen=True)
class Failure:
    """One failed attempt.

    Attributes:
        kind: what may follow.
        error: the class to raise when nothing follows.
        what: what happened, as the beginning of a sentence.
        remedy: what the user can do, as a sentence; "" where there is nothing to say.
        setting: the setting in config2.yaml that changes it.
        retry_after: seconds the server asked to wait.
        window: context window in tokens, where the server named it.
        prompt_tokens: size of the prompt in tokens, where the server named it.
        response: what the server answered.
        cause: the exception underneath.
        alone: the request is to be sent again with no other beside it.
    """

    kind: Kind
    error: type[errors.LocalLLMError]
    what: str
    remedy: str = ""
    setting: Optional[str] = None
    retry_after: Optional[float] = None
    window: Optional[int] = None
    prompt_tokens: Optional[int] = None
    response: Optional[httpx.Response] = None
    cause: Optional[BaseException] = None
    alone: bool = False


_OVERFLOW = re.compile(
    r"exceed_context_size_error|context_length_exceeded|exceeds the available context size|maximum context length"
    r"|longer than the context length|tokens to keep from the initial prompt|Trying to keep the first"
    r"|too big compared to KV size|exceed context window|reached context length|does not fit in context length"
    r"|context size has been exceeded|ContextWindowExceededError",
    re.IGNORECASE,
)
_WINDOW = re.compile(
    r"n_ctx\W{1,6}(\d+)|available context size \((\d+)|maximum context length (?:is|of) (\d+)"
    r"|context length of only (\d+)|context length only supports (\d+)",
    re.IGNORECASE,
)
_PROMPT = re.compile(
    r"n_prompt_tokens\W{1,6}(\d+)|n_keep\W{1,6}(\d+)|prompt contains (?:at least )?(\d+) input|request \((\d+) tokens"
    r"|\((\d+) in the messages|Trying to keep the first (\d+) tokens|The input has (\d+) tokens",
    re.IGNORECASE,
)
_UNKNOWN_FIELD = re.compile(
    r"unexpected field|extra (?:inputs|fields) (?:are )?not permitted|unknown field"
    r"|(?:stream_options|return_progress)\W.{0,40}(?:not|un)\w* ?(?:support|allow|permit|known|recogni)",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"model\b.{0,80}(?:not found|does not exist|not loaded|no models? loaded)|no models loaded|invalid model name", re.I)
_LOADING = re.compile(r"loading model|model is loading|unavailable_error|still loading", re.IGNORECASE)
#: LM Studio says these with a 400.
_GONE = re.compile(r"model is unloaded|model (?:has )?crashed", re.IGNORECASE)
_NO_ACCESS = re.compile(r"authentication_error|invalid_api_key|invalid api key", re.IGNORECASE)
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 499})
#: Characters of a server's body that are looked at.
_READ = 1 << 18
#: Complaints of a list that are quoted.
_COMPLAINTS = 10
#: Nothing that a server counts is larger; a number with thousands of digits cannot even be read.
_DIGITS = 12


def from_response(response: httpx.Response, text: str, key: str = "") -> Failure:
    """Classifies an answer whose status is not 200.

    Args:
        text: its body, of any shape; one short line of it is quoted.
        key: the API key, which is struck out of that before it is cut.
    """
    status, text = response.status_code, text[:_READ]
    said = _said(text, key)
    what = f"the server answered {status}" + (f": {said}" if said else "")
    if 300 <= status < 400:
        return Failure(
            Kind.FATAL, errors.RequestRejected,
            f"the address redirects to {quoted(response.headers.get('location', ''), key) or 'nowhere'}",
            "Write the address where it ends.", "llm.base_url", response=response,
        )  # fmt: skip
    if "html" in response.headers.get("content-type", "") or text.lstrip()[:1] == "<":
        what = f"a proxy in front of the server answered {status} with a page of HTML"
        if status < 500 and status not in (401, 403, *_TRANSIENT_STATUS):
            return Failure(
                Kind.FATAL, errors.RequestRejected, what, "Check base_url: no model server answers there.",
                "llm.base_url", response=response,
            )  # fmt: skip
        if status not in (401, 403):
            remedy = "Its own time limit is shorter than the model needs: raise it there or use the server's direct URL."
            return Failure(
                Kind.TRANSIENT, errors.ServerFailed, what, remedy, "llm.base_url",
                retry_after=_retry_after(response.headers), response=response,
            )  # fmt: skip
    if status == 503 and _LOADING.search(text):
        return Failure(
            Kind.LOADING, errors.ServerUnavailable, "the server is loading the model",
            "Give it more time to load.", "llm.local.retry.wait_for_server", response=response,
        )  # fmt: skip
    shared_kv_full = status >= 500 and "Context size has been exceeded" in text
    if _OVERFLOW.search(text) and not shared_kv_full:
        return Failure(
            Kind.OVERFLOW, errors.ContextOverflow, what, "Load the model with a larger context.",
            "llm.local.context.window", window=_number(_WINDOW, text), prompt_tokens=_number(_PROMPT, text),
            response=response,
        )  # fmt: skip
    if status in (400, 422) and _UNKNOWN_FIELD.search(text):
        return Failure(Kind.STRICT, errors.RequestRejected, what, response=response)
    if status in _TRANSIENT_STATUS or (status >= 500 and status != 501) or _GONE.search(text):
        remedy = "Look at the server's own log." if status >= 500 else ""
        return Failure(
            Kind.TRANSIENT, errors.ServerFailed, what, remedy, "llm.local.retry.attempts",
            retry_after=_retry_after(response.headers), response=response, alone=shared_kv_full,
        )  # fmt: skip
    litellm = "no_db_connection" in text  # its word for a key that is not its master_key
    if status in (401, 403) or litellm:
        remedy = "Set LiteLLM's master_key." if litellm else "Set the key that the server expects."
        return Failure(Kind.FATAL, errors.AccessDenied, what, remedy, "llm.api_key", response=response)
    if status == 404 and not _NO_MODEL.search(text) and "model" not in said.lower():
        path = str(response.request.url)
        remedy = "There is no chat API at this address; most servers want base_url to end in /v1."
        if path.count("/chat/completions") > 1:
            remedy = "base_url ends in /chat/completions: leave that off."
        return Failure(
            Kind.FATAL, errors.WrongAddress, f"{what} (at {path})", remedy, "llm.base_url", response=response
        )
    if status == 404 or _NO_MODEL.search(text):
        remedy = "Load the model, or write its name as the server's own list (/v1/models) gives it."
        return Failure(Kind.FATAL, errors.ModelNotFound, what, remedy, "llm.model", response=response)
    return Failure(Kind.FATAL, errors.RequestRejected, what, "The request itself is at fault.", response=response)


def from_error_body(payload: Any, request: httpx.Request, key: str = "") -> Failure:
    """Classifies ``{"error": …}`` that came in a 200, inside the stream or as its whole body. ``key``: the API key."""
    error = payload.get("error") if isinstance(payload, Mapping) else payload
    code = error.get("code") if isinstance(error, Mapping) else None
    text = _as_text(payload)[:_READ]
    code = int(code) if isinstance(code, str) and re.fullmatch(r"[45]\d\d", code) else code  # LiteLLM
    if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
        status = code
    elif _NO_ACCESS.search(text):
        status = 401
    else:
        status = 404 if _NO_MODEL.search(text) else 500
    failure = from_response(httpx.Response(status, request=request), text, key)
    return replace(failure, what=f"the server reported an error inside the stream: {_message(payload, key)}")


def from_exception(error: BaseException, base_url: str, answer_began: bool, key: str = "") -> Failure:
    """Classifies what httpx raised.

    Args:
        answer_began: whether any part of an answer had come.
        key: the API key, which a server may have sent back in what httpx quotes.
    """
    why = quoted(str(error), key) or type(error).__name__
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return _not_connected(error, base_url, why)
    if isinstance(error, (httpx.LocalProtocolError, UnicodeError)):
        # Not its text: it quotes the header, which holds the key.
        return Failure(
            Kind.FATAL, errors.RequestRejected, "the request cannot be written as HTTP",
            "Look for odd characters in the address and the key.", "llm.api_key",
        )  # fmt: skip
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return Failure(
            Kind.FATAL, errors.ServerUnavailable, f"{base_url} is not a usable address: {why}",
            "It has the form http://host:port/v1.", "llm.base_url", cause=error,
        )  # fmt: skip
    if isinstance(error, UnknownPacking):
        return Failure(
            Kind.FATAL, errors.ServerFailed, str(error), "Switch compression off in the proxy in front of the server.",
            "llm.base_url", cause=error,
        )  # fmt: skip
    if answer_began:
        return Failure(
            Kind.TRANSIENT, errors.IncompleteStream, f"the connection broke in the middle of the answer ({why})",
            "If it recurs, look whether the server crashes (memory) in its own log.", "llm.local.retry.attempts",
            cause=error,
        )  # fmt: skip
    return Failure(
        Kind.TRANSIENT, errors.ConnectionLost, f"the connection broke before any answer ({why})",
        "If it recurs, look whether the server crashes (memory) in its own log.", "llm.local.retry.attempts",
        cause=error,
    )  # fmt: skip


def _not_connected(error: httpx.TransportError, base_url: str, why: str) -> Failure:
    chain: list[BaseException] = []
    link: Optional[BaseException] = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(e) for e in chain)
    if any(isinstance(e, ssl.SSLError) for e in chain) or "SSL" in text:
        return Failure(
            Kind.FATAL, errors.ServerUnavailable, f"no TLS connection to {base_url}" + (f" ({why})" if str(error) else ""),
            "A local server usually speaks plain http://.", "llm.base_url", cause=error,
        )  # fmt: skip
    unknown_host = any(isinstance(e, socket.gaierror) and e.errno == socket.EAI_NONAME for e in chain)
    if unknown_host:
        return Failure(
            Kind.FATAL, errors.ServerUnavailable, f"the host of {base_url} is unknown ({why})",
            "Correct the host name.", "llm.base_url", cause=error,
        )  # fmt: skip
    if isinstance(error, httpx.ConnectTimeout):
        how = "no connection within the connect deadline"
    else:
        how = "connection refused" if any(isinstance(e, ConnectionRefusedError) for e in chain) else why
    return Failure(
        Kind.NOT_UP, errors.ServerUnavailable, f"no server at {base_url} ({how}; is it started, and llm.base_url right?)",
        "Start the server or correct its address.", "llm.base_url, and llm.local.retry.wait_for_server", cause=error,
    )  # fmt: skip


def _said(text: str, key: str) -> str:
    """The server's own message out of any of the shapes in use."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return quoted(text, key)
    return _message(body, key)


def _message(body: Any, key: str) -> str:
    for name in ("error", "detail", "message"):
        if isinstance(body, Mapping) and body.get(name):
            body = body[name]
    if isinstance(body, list):  # FastAPI's complaints, which quote the input: the user's prompt
        complaints = itertools.islice((e for e in body if isinstance(e, Mapping)), _COMPLAINTS)
        body = "; ".join(f"{_as_text(e.get('loc'))}: {_as_text(e.get('msg'))}" for e in complaints)
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("type") or body
    return quoted(_as_text(body), key)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in a list in a list …
        return f"({type(value).__name__})"


def _number(pattern: re.Pattern[str], text: str) -> Optional[int]:
    found = pattern.search(text)
    digits = next(group for group in found.groups() if group) if found else ""
    return int(digits) or None if 0 < len(digits) <= _DIGITS else None


def _retry_after(headers: Mapping[str, str]) -> Optional[float]:
    """Seconds from now; a date counts from the response's own Date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            then, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            return None
        if (then.tzinfo is None) != (now.tzinfo is None):
            return None
        seconds = (then - now).total_seconds()
    return seconds if 0 <= seconds < float("inf") else None
