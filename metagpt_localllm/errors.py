"""Every way a call to a local model can fail, each still the ``openai`` error that MetaGPT knows.

::

    LocalLLMError                 (openai.APIError)
    ├─ FirstTokenTimeout          (openai.APITimeoutError)     no token within ``first_token``
    ├─ StreamStalled              (openai.APITimeoutError)     silence between tokens over ``stall``
    ├─ TotalTimeout               (openai.APITimeoutError)     one attempt over ``total``, or the caller's timeout
    ├─ ServerUnavailable          (openai.APIConnectionError)  refused, unreachable or loading for too long
    ├─ ConnectionLost             (openai.APIConnectionError)  the connection broke before any answer
    ├─ ServerGone                 (openai.APIConnectionError)  it stopped listening while we waited
    ├─ ServerUnresponsive         (openai.APIConnectionError)  it takes connections and answers nothing, not even how it is
    ├─ RequestLost                (openai.APIConnectionError)  it works on nothing while we wait
    ├─ IncompleteStream           (openai.APIConnectionError)  the stream ended without a finish_reason
    ├─ ServerFailed               (openai.InternalServerError) 408, 409, 425, 429, 5xx, an error inside the stream, or an odd packing
    ├─ ContextOverflow            (openai.BadRequestError)     the prompt cannot be made to fit the context window
    ├─ ModelNotFound              (openai.NotFoundError)       the server does not know the model
    ├─ WrongAddress               (openai.NotFoundError)       there is no chat API at base_url
    ├─ AccessDenied               (openai.AuthenticationError) 401 and 403
    └─ RequestRejected            (openai.BadRequestError)     any other 4xx

The message says what happened, after how long, in which tier and attempt, how much had come, and
which setting in config2.yaml changes it.
"""

from __future__ import annotations

from typing import Any, Optional

import httpx
import openai

__all__ = [
    "AccessDenied",
    "ConnectionLost",
    "ContextOverflow",
    "FirstTokenTimeout",
    "IncompleteStream",
    "LocalLLMError",
    "ModelNotFound",
    "RequestLost",
    "RequestRejected",
    "ServerFailed",
    "ServerGone",
    "ServerUnavailable",
    "ServerUnresponsive",
    "StreamStalled",
    "TotalTimeout",
    "WrongAddress",
]


class LocalLLMError(openai.APIError):
    """Base of all errors of this package.

    Attributes:
        partial: the text received before the failure; empty when there was none.
        attempts: how many requests the call had sent, this one included.
        setting: dotted path of the setting in config2.yaml that changes this outcome, or None.
    """

    partial: str
    attempts: int
    setting: Optional[str]

    def __init__(
        self,
        message: str,
        *,
        request: httpx.Request,
        body: Optional[object] = None,
        partial: str = "",
        attempts: int = 0,
        setting: Optional[str] = None,
        **_: Any,
    ) -> None:
        # openai's own subclasses take different arguments; all end in APIError's.
        openai.APIError.__init__(self, message, request, body=body)
        self.partial = partial
        self.attempts = attempts
        self.setting = setting

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry all but the request and the cause."""
        return _rebuild, (type(self), self.message, str(self.request.url), self._details())

    def _details(self) -> dict[str, Any]:
        return {"partial": self.partial, "attempts": self.attempts, "setting": self.setting}


def _rebuild(kind: type[LocalLLMError], message: str, url: str, details: dict[str, Any]) -> LocalLLMError:
    request = httpx.Request("POST", url)
    if "status" in details:
        details = {**details, "response": httpx.Response(details["status"], request=request)}
    return kind(message, request=request, **details)


class FirstTokenTimeout(LocalLLMError, openai.APITimeoutError):
    """No token arrived within ``first_token`` seconds (queue, model load and prefill together)."""


class StreamStalled(LocalLLMError, openai.APITimeoutError):
    """The stream went silent for ``stall`` seconds after at least one token."""


class TotalTimeout(LocalLLMError, openai.APITimeoutError):
    """One attempt took longer than ``total`` (or ``llm.timeout``), or the call longer than the caller's timeout."""


class ServerUnavailable(LocalLLMError, openai.APIConnectionError):
    """The server was not up, or still loading, for all of ``retry.wait_for_server`` seconds."""


class ConnectionLost(LocalLLMError, openai.APIConnectionError):
    """The connection was reset or closed before any part of an answer came."""


class ServerGone(LocalLLMError, openai.APIConnectionError):
    """The server stopped listening while it owed us an answer: it was closed or has crashed."""


class ServerUnresponsive(LocalLLMError, openai.APIConnectionError):
    """The server takes connections, but answers nothing any more: it is stopped, swaps, or the network drops packets."""


class RequestLost(LocalLLMError, openai.APIConnectionError):
    """The server says that it works on nothing, while we wait for it."""


class IncompleteStream(LocalLLMError, openai.APIConnectionError):
    """The stream ended without a finish_reason: what came is only a part of the answer."""


class _StatusError(LocalLLMError):
    """An error that an HTTP response carried.

    Attributes:
        response: its status and headers, without body and request, which may hold the prompt and the key; a
            synthetic one where the error came inside a 200 stream.
        status_code: its HTTP status.
        request_id: its ``x-request-id`` header, or None.
    """

    default_status = 500

    def __init__(self, message: str, *, request: httpx.Request, response: Optional[httpx.Response] = None,
                 body: Optional[object] = None, **kwargs: Any) -> None:  # fmt: skip
        super().__init__(message, request=request, body=body, **kwargs)
        self.response = response if response is not None else httpx.Response(self.default_status, request=request)
        self.status_code = self.response.status_code
        self.request_id = self.response.headers.get("x-request-id")

    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "status": self.status_code}


class ServerFailed(_StatusError, openai.InternalServerError):
    """The server answered 408, 409, 425, 429 or 5xx, sent an error inside the stream, or packed its answer as br or zstd."""


class ContextOverflow(_StatusError, openai.BadRequestError):  # type: ignore[misc]
    """The prompt does not fit the context window, even trimmed."""

    default_status = 400


class ModelNotFound(_StatusError, openai.NotFoundError):  # type: ignore[misc]
    """The server does not know the model."""

    default_status = 404


class WrongAddress(_StatusError, openai.NotFoundError):  # type: ignore[misc]
    """There is no chat API at base_url: a path that the server does not know, or a web page."""

    default_status = 404


class AccessDenied(_StatusError, openai.AuthenticationError):  # type: ignore[misc]
    """The server refused the API key (401, 403)."""

    default_status = 401


class RequestRejected(_StatusError, openai.BadRequestError):  # type: ignore[misc]
    """The server refused the request itself (400, 413, 422 …)."""

    default_status = 400
