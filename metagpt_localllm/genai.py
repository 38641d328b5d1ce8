"""A chat in the words of OpenTelemetry's GenAI semantic conventions. Pure, and without OpenTelemetry.

Source: open-telemetry/semantic-conventions v1.41.0, docs/gen-ai (gen-ai-spans.md, gen-ai-metrics.md, and the JSON schemas of
messages and tools), the last release before they moved to semantic-conventions-genai. All are of the status "development". What
is used here was the same there when this was written, but that counters may take the place of ``gen_ai.client.token.usage``.
"""

from __future__ import annotations

import json
from typing import Any, Mapping, Optional, Sequence, Union
from urllib.parse import urlsplit

__all__ = ["DURATION", "OPERATION", "SCHEMA", "TOKENS", "TTFT", "Attribute", "asked", "identity", "input_messages", "output_messages",
           "provider", "tool_definitions", "usage"]  # fmt: skip

SCHEMA = "https://opentelemetry.io/schemas/1.41.0"
OPERATION = "chat"
#: Metrics: name, unit, description.
DURATION = ("gen_ai.client.operation.duration", "s", "GenAI operation duration.")
TOKENS = ("gen_ai.client.token.usage", "{token}", "Number of input and output tokens used.")
TTFT = ("gen_ai.client.operation.time_to_first_chunk", "s", "Time to receive the first chunk.")

Attribute = Union[str, bool, int, float, Sequence[str]]

_NUMBERS = {
    "temperature": float, "top_p": float, "top_k": float, "frequency_penalty": float, "presence_penalty": float, "seed": int,
}  # fmt: skip
_PORTS = {"http": 80, "https": 443}
#: OpenAI's finish_reason → the one of a message in the conventions.
_REASONS = {"tool_calls": "tool_call", "function_call": "tool_call"}


def provider(server: str) -> str:
    """``gen_ai.provider.name`` for a kind of server (``Server.name``).

    Which names there are is open. One of which no more is known than that it speaks OpenAI's language is ``openai``: the
    attribute tells the dialect, not whose model it is.
    """
    return "openai" if server == "plain" else server


def identity(model: str, address: str, server: str) -> dict[str, Attribute]:
    """What a call is known by, in spans and metrics; ``address``: of the API, a URL."""
    known: dict[str, Attribute] = {
        "gen_ai.operation.name": OPERATION,
        "gen_ai.provider.name": provider(server),
        "gen_ai.request.model": model,
    }
    parts = urlsplit(address)
    if parts.hostname:
        known["server.address"] = parts.hostname
        port = parts.port or _PORTS.get(parts.scheme)
        if port is not None:
            known["server.port"] = port
    return known


def asked(body: Mapping[str, Any]) -> dict[str, Attribute]:
    """The parameters of a request in OpenAI's form."""
    found: dict[str, Attribute] = {"gen_ai.request.stream": True}  # attempts always stream
    for name, kind in _NUMBERS.items():
        value = body.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"gen_ai.request.{name}"] = kind(value)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if isinstance(limit, int):
        found["gen_ai.request.max_tokens"] = limit
    choices = body.get("n")
    if isinstance(choices, int) and choices != 1:
        found["gen_ai.request.choice.count"] = choices
    stop = body.get("stop")
    if stop:
        found["gen_ai.request.stop_sequences"] = [stop] if isinstance(stop, str) else [str(one) for one in stop]
    form = body.get("response_format")
    if isinstance(form, Mapping) and form.get("type"):
        found["gen_ai.output.type"] = "text" if form["type"] == "text" else "json"
    return found


def usage(prompt: Optional[int], answer: Optional[int], cached: Optional[int], reasoning: Optional[int]) -> dict[str, Attribute]:
    """Tokens; ``cached`` are part of ``prompt``, ``reasoning`` of ``answer``. None: not known."""
    counts = {
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": answer,
        "gen_ai.usage.cache_read.input_tokens": cached,
        "gen_ai.usage.reasoning.output_tokens": reasoning,
    }
    return {name: count for name, count in counts.items() if count is not None}


# ---------------------------------------------------------------------- content, as JSON since spans take no structures


def input_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """``gen_ai.input.messages``: all of them, system messages too, since they are part of the history."""
    return _json([{"role": str(message.get("role", "user")), "parts": _parts(message)} for message in messages])


def output_messages(text: str, reasoning: str, tool_calls: Sequence[Sequence[Any]], finish_reason: Optional[str]) -> str:
    """``gen_ai.output.messages`` of one answer.

    Args:
        tool_calls: index, id, name and arguments of each, as ``Answer.as_record`` has them.
        finish_reason: the server's; None for an answer that broke off.
    """
    parts: list[dict[str, Any]] = [{"type": "reasoning", "content": reasoning}] if reasoning else []
    if text:
        parts.append({"type": "text", "content": text})
    parts += [_tool_call(identity, name, arguments) for _, identity, name, arguments in tool_calls]
    reason = "error" if finish_reason is None else _REASONS.get(finish_reason, finish_reason)
    return _json([{"role": "assistant", "parts": parts, "finish_reason": reason}])


def tool_definitions(tools: Sequence[Mapping[str, Any]]) -> str:
    """``gen_ai.tool.definitions``."""
    return _json([{**tool.get("function", {}), "type": str(tool.get("type", "function"))} for tool in tools])


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if message.get("role") == "tool":
        return [{"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}]
    reasoning = message.get("reasoning_content")
    parts: list[dict[str, Any]] = [{"type": "reasoning", "content": reasoning}] if reasoning else []
    if isinstance(content, str):
        parts.append({"type": "text", "content": content})
    elif isinstance(content, Sequence):
        parts += [_part(part) for part in content if isinstance(part, Mapping)]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        parts.append(_tool_call(call.get("id"), function.get("name", ""), function.get("arguments")))
    return parts


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message of OpenAI's. Data that it holds itself is left out: receivers refuse spans of megabytes."""
    kind = str(part.get("type", "text"))
    if kind == "text":
        return {"type": "text", "content": str(part.get("text", ""))}
    image = part.get("image_url")
    url = str(image.get("url", "") if isinstance(image, Mapping) else image or "")
    if url and not url.startswith("data:"):
        return {"type": "uri", "modality": "image", "uri": url}
    return {"type": kind, "left_out": True}


def _tool_call(identity: Any, name: str, arguments: Any) -> dict[str, Any]:
    try:
        arguments = json.loads(arguments)
    except (TypeError, ValueError):
        pass  # as the model wrote them
    return {"type": "tool_call", "id": identity, "name": name, "arguments": arguments}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
