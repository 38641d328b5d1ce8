"""Ollama's own chat (``/api/chat``), made of the OpenAI chat that the simulator speaks: what MetaGPT's ``ollama`` provider asks.

One JSON object a line; there are no comments and there is no ``[DONE]``. Tools are left out.
(https://github.com/ollama/ollama/blob/main/docs/api.md#generate-a-chat-completion)
"""

from __future__ import annotations

import json
import time
from typing import Any, Mapping, Optional

__all__ = ["Lines", "asked", "whole"]


def asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """The OpenAI request for one of ``/api/chat``, which streams unless told otherwise."""
    limit = (body.get("options") or {}).get("num_predict")
    made: dict[str, Any] = {
        "model": body.get("model"), "messages": body.get("messages") or [], "stream": body.get("stream", True),
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if isinstance(limit, int) and limit > 0:
        made["max_tokens"] = limit
    return made


class Lines:
    """The lines of one answer."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._reason: Optional[str] = None
        self._usage: Mapping[str, Any] = {}

    def of(self, payload: Any) -> bytes:
        """What one event of the OpenAI stream is here; nothing for those that have no line of their own."""
        if not isinstance(payload, Mapping):
            return b""
        if "error" in payload:
            return _line({"error": payload["error"]["message"]})
        self._usage = payload.get("usage") or self._usage
        for choice in payload.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            delta = choice.get("delta") or {}
            if delta:
                message = {"role": "assistant", "content": delta.get("content") or ""}
                if delta.get("reasoning_content"):
                    message["thinking"] = delta["reasoning_content"]
                return _line({**self._head(), "message": message, "done": False})
        return b""

    def last(self) -> bytes:
        """The line that ends an answer; nothing where it has not come to its end."""
        if self._reason is None:
            return b""
        message = {"role": "assistant", "content": ""}
        return _line({**self._head(), "message": message, **_end(self._reason, self._usage)})

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": _now()}


def whole(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object for an OpenAI answer or error that is not streamed."""
    if "error" in answer:
        return {"error": answer["error"]["message"]}
    choice = answer["choices"][0]
    message = {"role": "assistant", "content": choice["message"].get("content") or ""}
    end = _end(choice["finish_reason"], answer.get("usage") or {})
    return {"model": answer["model"], "created_at": _now(), "message": message, **end}


def _end(reason: str, usage: Mapping[str, Any]) -> dict[str, Any]:
    counts = {"prompt_eval_count": usage.get("prompt_tokens"), "eval_count": usage.get("completion_tokens")}
    return {"done": True, "done_reason": reason, **{name: count for name, count in counts.items() if count is not None}}


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
