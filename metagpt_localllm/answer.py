"""One answer put together from the chunks of a stream, or of two where the second goes on with the first. Pure."""

from __future__ import annotations

import io
import itertools
import json
import re
import time
import unicodedata
from array import array
from bisect import bisect_right
from typing import Any, Mapping, Optional

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion

__all__ = ["MAX_CHARACTERS", "Answer", "AnswerTooLarge", "OddChunk", "chunk_of", "may_continue", "seam"]

#: Characters that an answer may have, with its thoughts and tool calls; no model writes so many.
MAX_CHARACTERS = 1 << 26
#: Tool calls that it may have; and the index that one may be given.
_MOST_CALLS, _LARGEST_INDEX = 1024, 10**6
#: Fields of usage and timings that are kept, and the largest number in one.
_FIELDS, _LARGEST = 50, 10**12
#: Characters of an id, a model's name, a finish_reason.
_NAME = 200


#: vLLM aborts, Ollama loads or unloads, gateways report errors: words of failure where others say "stop".
_FAILED = frozenset({"error", "abort", "aborted", "cancelled", "load", "unload"})
#: Characters of a beginning at the least, where the server may repeat it: what goes on may begin like a shorter one.
_LEAST = 80
#: Templates cut, move or close what they take for thinking or for markers of their own.
_MARKERS = re.compile(
    r"<\s*/?\s*(?:\w+:)?(?:think|thinking|thought|reasoning|tool_calls?)\b|\[/?THINK\]|<\|", re.IGNORECASE
)


def seam(partial: str) -> str:
    """The part of an answer that broke off that it is safe to go on from, at the end of a token.

    Where it ends in white space it is cut back to its last letter or digit: templates trim an assistant's text (Llama
    3's; Transformers' ``continue_final_message`` then trims the prompt), and a tokenizer that has ".\\n\\n" as one token
    would go on otherwise after ".". With Qwen's, of 128 cuts at white space in code, Markdown, Chinese and Hindi, all
    were then between two tokens of the text, 1.8 tokens back; with the white space alone cut off most were not.
    Anywhere else a stream is cut between two tokens (621 of 621). Half a character at the end goes as well.
    """
    kept = partial
    while kept and (kept[-1] == "\ufffd" or "\ud800" <= kept[-1] <= "\udbff"):
        kept = kept[:-1]
    if not kept or not kept[-1].isspace():
        return kept
    end = len(kept)
    while end and unicodedata.category(kept[end - 1])[0] not in "LNM":
        end -= 1
    return kept[:end]


def may_continue(partial: str, repeats: Optional[bool] = None) -> bool:
    """Whether an answer may be begun with ``partial``; else it is asked for afresh.

    A server that may repeat it (``repeats`` None) needs one that what goes on will not begin with: 80 characters, and
    not the same thing again and again.
    """
    text = partial.strip()
    return bool(text) and (repeats is not None or (len(text) >= _LEAST and not _is_periodic(text)))


def _is_periodic(text: str) -> bool:
    """Whether it is one thing, of up to half of it, again and again."""
    half = len(text) // 2
    period = text.find(text[: len(text) - half], 1)
    while 0 < period <= half:
        if text.startswith(text[period:]):
            return True
        period = text.find(text[: len(text) - half], period + 1)
    return False


#: What reading something of an odd shape raises.
_ODD = (ValueError, TypeError, AttributeError, LookupError, RecursionError)


class OddChunk(ValueError):
    """An event that is no JSON, or no chunk of a chat; its text says so in a line."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"the stream holds something that is no chat chunk ({type(error).__name__}: {str(error)[:100]})")


class AnswerTooLarge(OddChunk):
    """The answer is over MAX_CHARACTERS."""

    def __init__(self) -> None:
        ValueError.__init__(self, f"the answer is over {MAX_CHARACTERS:,} characters")


def chunk_of(data: bytes) -> Optional[dict[str, Any]]:
    """The JSON object in the data of an event; None where it is other JSON.

    Raises:
        OddChunk: it is no JSON, or is nested too deep.
    """
    try:
        chunk = json.loads(data.decode("utf-8", "replace"))
    except _ODD as error:
        raise OddChunk(error) from None
    return chunk if isinstance(chunk, dict) else None


class _Text:
    """Text that comes in small parts. Kept as one: a string for each of millions of tokens takes twenty times as much."""

    def __init__(self) -> None:
        self._text = io.StringIO(newline="")
        self._length = 0
        self._ends = array("Q")

    def add(self, part: str) -> None:
        self._text.write(part)
        self._length += len(part)
        self._ends.append(self._length)

    def parts_within(self, length: int) -> int:
        """How many whole parts its first ``length`` characters hold."""
        return bisect_right(self._ends, length)

    def __str__(self) -> str:
        return self._text.getvalue()

    def __bool__(self) -> bool:
        return self._length > 0


class Answer:
    """Collects ``chat.completion.chunk`` objects (or one whole ``chat.completion``) of choice 0.

    Attributes:
        finish_reason: None until the model has said why it ended; only then is the answer whole.
        usage: token counts as the server sent them, or None; of a begun answer those of the whole.
        timings: llama.cpp's ``timings``, or None; of a begun answer those of its latest stream.
        tokens: chunks that carried text, reasoning or a part of a tool call; about one token each. What a begun answer
            began with counts, and what is repeated of it does not.
        begun_tokens: those that it began with.
        restarted: whether the server began a new turn, with thoughts, where it should have gone on: it is of no use.
    """

    def __init__(self) -> None:
        self.finish_reason: Optional[str] = None
        self.usage: Optional[dict[str, Any]] = None
        self.timings: Optional[dict[str, Any]] = None
        self.tokens = self.begun_tokens = 0
        self.restarted = False
        self._id = ""
        self._model = ""
        self._content, self._reasoning = _Text(), _Text()
        self._size = 0  # characters that have come
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._moved: dict[int, int] = {}
        self._repeated: tuple[str, ...] = ()  # what the stream may begin with that is no new text
        self._held = ""  # what of it has come
        self._held_tokens = 0
        self._seen = ""  # what has been shown already of what is to come
        self._matched = ""

    @classmethod
    def begun(cls, content: str, tokens: int, repeats: Optional[bool] = None, shown: str = "") -> Answer:
        """An answer whose beginning is there, to which the next stream adds the rest.

        A copy of the beginning in front of that stream is dropped, however it is split into chunks. What may yet be
        such a copy is held back, and is text if the answer ends before it is whole.

        Args:
            content: the beginning (:attr:`partial` of the answer that broke off).
            tokens: in it (:attr:`partial_tokens`).
            repeats: whether the server repeats it (``Server.repeats``); False lets all that comes be text.
            shown: all that was shown, where that is longer: it is not shown again if it comes again.
        """
        made = cls()
        made._content.add(content)
        made.tokens = made.begun_tokens = tokens
        if repeats is not False and content.strip():
            made._repeated = tuple({content, content.lstrip()})
        if shown.startswith(content):
            made._seen = shown[len(content) :]
        return made

    def as_record(self) -> dict[str, Any]:
        """All that it is, as JSON, from which :meth:`of_record` makes it again."""
        return {
            "id": self._id,
            "model": self._model,
            "content": self.content,
            "reasoning": self.reasoning,
            "tool_calls": [
                [index, call["id"], call["name"], "".join(call["arguments"])]
                for index, call in sorted(self._tool_calls.items())
            ],
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
            "usage": self.usage,
            "timings": self.timings,
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Answer:
        """The answer that :meth:`as_record` was called of; where it has no end, that is the beginning of one.

        What has another type than that would have, or is missing, is empty.
        """
        made = cls()

        def text(value: Any) -> str:
            return value if isinstance(value, str) else ""

        made._id, made._model = text(record.get("id")), text(record.get("model"))
        made._content.add(text(record.get("content")))
        if text(record.get("reasoning")):
            made._reasoning.add(text(record.get("reasoning")))
        calls = record.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, (list, tuple)) and len(call) == 4 and isinstance(call[0], int):
                index, identity, name, arguments = call[0], *map(text, call[1:])
                made._tool_calls[index] = {"id": identity, "type": "function", "name": name, "arguments": [arguments]}
        made.finish_reason = text(record.get("finish_reason")) or None
        usage, timings, tokens = (record.get(name) for name in ("usage", "timings", "tokens"))
        made.usage = _numbers(usage) if isinstance(usage, Mapping) else None
        made.timings = _numbers(timings) if isinstance(timings, Mapping) else None
        made.tokens = tokens if isinstance(tokens, int) and 0 <= tokens <= _LARGEST else 0
        if made.finish_reason is None or made.failed:
            made.begun_tokens = made.tokens
        return made

    @property
    def partial(self) -> str:
        """What of an answer that broke off the next one can begin with."""
        return seam(self.content)

    @property
    def partial_tokens(self) -> int:
        """Tokens of :attr:`partial`, about."""
        parts = self._content.parts_within(len(self.partial))
        if self.begun_tokens:  # the first part is what it began with
            parts = self.begun_tokens + max(parts - 1, 0)
        return min(parts, self.tokens)

    @property
    def continuable(self) -> bool:
        """Whether it broke off where it can be gone on with, as far as the answer itself tells.

        Not in a tool call, which no template leaves open, nor after thoughts, which templates drop or close.
        """
        return not (
            (self.finish_reason is not None and not self.failed)
            or self.restarted
            or self._tool_calls
            or self._reasoning
            or not self.partial.strip()
            or _MARKERS.search(self.content)
        )

    @property
    def failed(self) -> bool:
        """Whether the finish_reason says that the server gave up rather than that the model was done."""
        return self.finish_reason in _FAILED

    @property
    def content(self) -> str:
        return str(self._content)

    @property
    def reasoning(self) -> str:
        return str(self._reasoning)

    def add(self, chunk: Mapping[str, Any]) -> tuple[bool, str]:
        """Takes one chunk; says whether it carried any token, and the text to show (may be empty).

        A role, an empty text or an empty delta is no token.

        Raises:
            OddChunk: it has another shape than a chunk has.
        """
        try:
            return self._add(chunk)
        except OddChunk:
            raise
        except _ODD as error:
            raise OddChunk(error) from None

    def _add(self, chunk: Mapping[str, Any]) -> tuple[bool, str]:
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
            token = True
        elif isinstance(text, list):  # some gateways send parts
            parts = (part.get("text") for part in text if isinstance(part, Mapping))
            text = "".join(part for part in parts if isinstance(part, str))
            token = bool(text)
        else:
            text = ""
        if len(delta) > 1 or not text:
            token = self._take_rest(delta) or token
        reason = choice.get("finish_reason")
        if reason:
            self.finish_reason = str(reason)[:_NAME]
        if token:
            self.tokens += 1
        self._grow(len(text))
        if self._repeated:
            text = self._without_repetition(text)
        if text:
            self._content.add(text)
        return token, self._unseen(text) if self._seen or self._matched else text

    def _grow(self, characters: int) -> None:
        self._size += characters
        if self._size > MAX_CHARACTERS:
            raise AnswerTooLarge

    def _without_repetition(self, text: str) -> str:
        """The new text in what has come; empty as long as it may all be a repetition of the beginning."""
        if text:
            self._held += text
            self._held_tokens += 1
        held = self._held
        copy = next((beginning for beginning in self._repeated if held.startswith(beginning)), None)
        if copy is not None:
            new = held[len(copy) :]
            self.tokens -= self._held_tokens - bool(new)
        elif self.finish_reason is None and any(beginning.startswith(held) for beginning in self._repeated):
            return ""
        elif self.failed:
            new = ""
            self.tokens -= self._held_tokens
        else:
            new = held
        self._repeated, self._held, self._held_tokens = (), "", 0
        return new

    def _unseen(self, text: str) -> str:
        """What is to be shown of new text, some of which may have been shown before it was cut off at the seam."""
        self._matched += text
        matched, seen = self._matched, self._seen
        if seen.startswith(matched):
            return ""
        self._seen = self._matched = ""
        return matched[len(seen) :] if matched.startswith(seen) else matched

    def _take_rest(self, delta: Mapping[str, Any]) -> bool:
        token = False
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            self._grow(len(reasoning))
            self._reasoning.add(reasoning)
            token = True
            self.restarted = self.restarted or (self.begun_tokens > 0 and bool(reasoning.strip()))
        for position, part in enumerate(delta.get("tool_calls") or ()):
            token = self._take_tool_call(position, part) or token
        return token

    def _take_tool_call(self, position: int, part: Mapping[str, Any]) -> bool:
        index = part.get("index")
        index = index if isinstance(index, int) and 0 <= index <= _LARGEST_INDEX else position
        identity = str(part.get("id") or "")[:_NAME]
        given, index = index, self._moved.get(index, index)
        known = self._tool_calls.get(index)
        if known is not None and known["id"] and identity and identity != known["id"]:
            # A server that gives all its calls the same index.
            index = self._moved[given] = max(self._tool_calls) + 1
        if len(self._tool_calls) >= _MOST_CALLS and index not in self._tool_calls:
            raise ValueError(f"over {_MOST_CALLS:,} tool calls")
        call = self._tool_calls.setdefault(index, {"id": "", "type": "function", "name": "", "arguments": []})
        function = part.get("function") or {}
        call["id"] = call["id"] or identity
        name, arguments = str(function.get("name") or ""), function.get("arguments") or ""
        if not isinstance(arguments, str):  # an object instead of its JSON
            arguments = json.dumps(arguments, ensure_ascii=False)
        self._grow(len(name) + len(arguments))
        # Some servers repeat the whole name in every chunk, others split it.
        if name and name != call["name"]:
            call["name"] += name
        if arguments:
            call["arguments"].append(arguments)
        return bool(name or arguments)

    def _take_totals(self, chunk: Mapping[str, Any]) -> None:
        self._id = self._id or str(chunk.get("id") or "")[:_NAME]
        self._model = str(chunk.get("model") or self._model)[:_NAME]
        usage, timings = chunk.get("usage"), chunk.get("timings")
        if isinstance(usage, Mapping):
            self.usage = self._usage_of_all(_numbers(usage))
        if isinstance(timings, Mapping):
            self.timings = _numbers(timings)

    def _usage_of_all(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The usage of a continued request as that of one that was never cut: its prompt held what was begun."""
        told, begun = dict(usage), self.begun_tokens
        if not begun:
            return told
        prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens")
        if isinstance(prompt, int):
            told["prompt_tokens"] = prompt = max(prompt - begun, 0)
            details = told.get("prompt_tokens_details")
            if isinstance(details, Mapping) and isinstance(cached := details.get("cached_tokens"), int):
                told["prompt_tokens_details"] = {**details, "cached_tokens": min(cached, prompt)}
        if isinstance(completion, int):
            told["completion_tokens"] = completion = completion + begun
        if isinstance(prompt, int) and isinstance(completion, int):
            told["total_tokens"] = prompt + completion
        return told

    def completion_usage(self, estimated_prompt: int, estimated_answer: int) -> CompletionUsage:
        """Token counts, each estimated where the server sent none or nonsense."""
        usage = self.usage or {}

        def count(key: str, estimate: int) -> int:
            value = usage.get(key)
            return value if isinstance(value, int) and 0 <= value <= _LARGEST else estimate

        prompt = count("prompt_tokens", estimated_prompt)
        completion = count("completion_tokens", estimated_answer)
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            # openai 1.39, which 0.8.2 pins, does not know the field, and keeps it all the same.
            **({"prompt_tokens_details": {"cached_tokens": cached}} if isinstance(cached, int) and cached >= 0 else {}),
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


def _numbers(told: Mapping[str, Any], deeper: int = 1) -> dict[str, Any]:
    """The numbers in it, and in what it holds; what no server can have counted or measured is left out."""
    kept: dict[str, Any] = {}
    for name, value in itertools.islice(told.items(), _FIELDS):
        if isinstance(value, Mapping) and deeper:
            kept[name[:_NAME]] = _numbers(value, deeper - 1)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST:
            kept[name[:_NAME]] = value
    return kept


def _known_reason(reason: Optional[str]) -> str:
    """openai's type takes only its own words; servers have more (``eos``, ``eos_token``, ``end_turn``)."""
    return reason if reason in ("stop", "length", "tool_calls", "content_filter", "function_call") else "stop"
