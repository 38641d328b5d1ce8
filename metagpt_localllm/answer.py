"""One answer put together from the chunks of a stream. Pure."""

from __future__ import annotations

import json
import time
from typing import Any, Mapping, Optional

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion

__all__ = ["Answer"]


#: vLLM aborts, Ollama loads or unloads, gateways report errors: words of failure where others say "stop".
_FAILED = frozenset({"error", "abort", "aborted", "cancelled", "load", "unload"})


class Answer:
    """Collects ``chat.completion.chunk`` objects (or one whole ``chat.completion``) of choice 0.

    Attributes:
        finish_reason: None until the model has said why it ended; only then is the answer whole.
        usage: token counts as the server sent them, or None.
        timings: llama.cpp's ``timings``, or None.
        tokens: chunks that carried text, reasoning or a part of a tool call; about one token each.
    """

    def __init__(self) -> None:
        self.finish_reason: Optional[str] = None
        self.usage: Optional[dict[str, Any]] = None
        self.timings: Optional[dict[str, Any]] = None
        self.tokens = 0
        self._id = ""
        self._model = ""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._moved: dict[int, int] = {}

    @property
    def failed(self) -> bool:
        """Whether the finish_reason says that the server gave up rather than that the model was done."""
        return self.finish_reason in _FAILED

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def add(self, chunk: Mapping[str, Any]) -> tuple[bool, str]:
        """Takes one chunk; says whether it carried any token, and the text to show (may be empty).

        Chunks of unexpected shape carry nothing. A role, an empty text or an empty delta is no token.
        """
        if not self._id or "usage" in chunk or "timings" in chunk:
            self._take_totals(chunk)
        choices = chunk.get("choices")
        if not choices or self.finish_reason is not None:
            return False, ""
        choice = choices[0]
        delta = choice.get("delta") or choice.get("message") or {}
        text = delta.get("content")
        token = False
        if isinstance(text, str) and text:
            self._content.append(text)
            token = True
        elif isinstance(text, list):  # some gateways send parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
            self._content.append(text)
            token = bool(text)
        else:
            text = ""
        if len(delta) > 1 or not text:
            token = self._take_rest(delta) or token
        reason = choice.get("finish_reason")
        if reason:
            self.finish_reason = str(reason)
        if token:
            self.tokens += 1
        return token, text

    def _take_rest(self, delta: Mapping[str, Any]) -> bool:
        token = False
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            self._reasoning.append(reasoning)
            token = True
        for position, part in enumerate(delta.get("tool_calls") or ()):
            token = self._take_tool_call(position, part) or token
        return token

    def _take_tool_call(self, position: int, part: Mapping[str, Any]) -> bool:
        index = part.get("index")
        index = index if isinstance(index, int) else position
        identity = str(part.get("id") or "")
        given, index = index, self._moved.get(index, index)
        known = self._tool_calls.get(index)
        if known is not None and known["id"] and identity and identity != known["id"]:
            # A server that gives all its calls the same index.
            index = self._moved[given] = max(self._tool_calls) + 1
        call = self._tool_calls.setdefault(index, {"id": "", "type": "function", "name": "", "arguments": []})
        function = part.get("function") or {}
        call["id"] = call["id"] or identity
        name, arguments = str(function.get("name") or ""), function.get("arguments") or ""
        if not isinstance(arguments, str):  # an object instead of its JSON
            arguments = json.dumps(arguments, ensure_ascii=False)
        # Some servers repeat the whole name in every chunk, others split it.
        if name and name != call["name"]:
            call["name"] += name
        if arguments:
            call["arguments"].append(arguments)
        return bool(name or arguments)

    def _take_totals(self, chunk: Mapping[str, Any]) -> None:
        self._id = self._id or str(chunk.get("id") or "")
        self._model = str(chunk.get("model") or self._model)
        usage, timings = chunk.get("usage"), chunk.get("timings")
        if isinstance(usage, Mapping):
            self.usage = dict(usage)
        if isinstance(timings, Mapping):
            self.timings = dict(timings)

    def completion_usage(self, estimated_prompt: int, estimated_answer: int) -> CompletionUsage:
        """Token counts, each estimated where the server sent none or nonsense."""
        usage = self.usage or {}

        def count(key: str, estimate: int) -> int:
            value = usage.get(key)
            return value if isinstance(value, int) and value >= 0 else estimate

        prompt = count("prompt_tokens", estimated_prompt)
        completion = count("completion_tokens", estimated_answer)
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            # openai 1.39, which 0.8.2 pins, does not know the field, and keeps it all the same.
            **({"prompt_tokens_details": {"cached_tokens": cached}} if isinstance(cached, int) else {}),
        )

    def completion(self, model: str, usage: CompletionUsage) -> ChatCompletion:
        """The whole answer as the type that a call without streaming returns."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        if self._reasoning:
            message["reasoning_content"] = self.reasoning
        if self._tool_calls:
            message["tool_calls"] = [
                {
                    "id": call["id"] or f"call_{index}",
                    "type": "function",
                    "function": {"name": call["name"], "arguments": "".join(call["arguments"])},
                }
                for index, call in sorted(self._tool_calls.items())
            ]
        elif message["content"] is None:
            message["content"] = ""
        return ChatCompletion.model_validate(
            {
                "id": self._id or "local",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": self._model or model,
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": _known_reason(self.finish_reason),
                        "logprobs": None,
                        "message": message,
                    }
                ],
                "usage": usage.model_dump(),
                **({"timings": self.timings} if self.timings else {}),
            }
        )


def _known_reason(reason: Optional[str]) -> str:
    """openai's type takes only its own words; servers have more (``eos``, ``eos_token``, ``end_turn``)."""
    return reason if reason in ("stop", "length", "tool_calls", "content_filter", "function_call") else "stop"
