"""How many tokens a prompt has, estimated without a tokenizer and on the safe side. Pure.

The rule must hold for tokenizers of very different vocabularies (32k of Llama 2 to 200k), for prose,
code and Chinese. It counts, per run of characters: letters of one case by 3 (a capital may lead), digits
and punctuation one by one, blanks by 4, and beyond ASCII by the bytes of their UTF-8 form (2 bytes: 1
token, 3 bytes, which is CJK: 2, 4 bytes: 4). ``tests/test_tokens.py`` checks it against real tokenizers;
against Mistral's 32k, Claude's 65k, Tekken's 131k and Qwen's 150k it was 1.0 to 2.2 times the truth for
prose, code and logs, up to 4 times for scripts that a large vocabulary knows well, and 0.75 for base64.
"""

from __future__ import annotations

import json
import re
from typing import Any, Mapping, Optional, Sequence

__all__ = ["IMAGE_TOKENS", "MESSAGE_TOKENS", "TokenCount", "estimate_message", "estimate_prompt", "estimate_text"]

TokenCount = int

#: What a chat template puts around one message: role and delimiters (ChatML: 4 to 5).
MESSAGE_TOKENS = 6
#: One image. Servers take 256 (Gemma 3) to about 1,500 (Qwen2-VL at full size, LLaVA 1.6).
IMAGE_TOKENS = 1500

#: Characters from which on samples are counted, how many, and of what length.
_LONG, _SAMPLES, _SAMPLE = 1 << 22, 64, 1 << 14

# A single blank belongs to what follows it, but for a digit.
_RUNS = re.compile(
    r" ?[A-Z]?[a-z]+| ?[A-Z]+|[0-9]| ?[!-/:-@\[-`{-~]| ?[^\x00-\x7f]+| +|\t|[\n\r]+|[\x00-\x1f\x7f]"
)


def estimate_text(text: str) -> TokenCount:
    """Tokens of ``text``; an over-estimate for ordinary prose, code, CJK, and what looks like noise.

    Of more than 4 million characters, which no context holds, only samples are counted: all of 50 million took 5 seconds.
    """
    if len(text) > _LONG:
        samples = [text[start : start + _SAMPLE] for start in range(0, len(text), len(text) // _SAMPLES)]
        return sum(map(estimate_text, samples)) * len(text) // sum(map(len, samples))
    tokens = 0
    for run in _RUNS.findall(text):
        first, size = run[0], len(run)
        if first == " ":
            if run.isspace():
                tokens += (size + 3) // 4
                continue
            run = run[1:]
            first, size = run[0], size - 1
        if "a" <= first <= "z" or "A" <= first <= "Z":
            tokens += (size + 2) // 3
        elif first in "\n\r":
            tokens += (size + 1) // 2
        elif first > "\x7f":
            tokens += (sum(map(_quarters, run)) + 3) // 4
        else:
            tokens += 1
    return tokens


def _quarters(character: str) -> int:
    """Quarters of a token: by the length in UTF-8, and a little more for Hebrew and Arabic."""
    if character < "\u0590":
        return 4
    return 5 if character < "\u0800" else 8 if character < "\U00010000" else 16


def estimate_message(message: Mapping[str, Any]) -> TokenCount:
    """Tokens of one chat message with its role, text, images and tool calls."""
    tokens = MESSAGE_TOKENS
    content = message.get("content")
    if isinstance(content, str):
        tokens += estimate_text(content)
    elif isinstance(content, Sequence):
        for part in content:
            if not isinstance(part, Mapping):
                tokens += estimate_text(str(part))
            elif part.get("type") == "text":
                tokens += estimate_text(str(part.get("text", "")))
            else:
                tokens += IMAGE_TOKENS
    for key in ("tool_calls", "name", "tool_call_id", "reasoning_content"):
        if message.get(key):
            tokens += estimate_text(json.dumps(message[key], ensure_ascii=False, default=str))
    return tokens


def estimate_prompt(messages: Sequence[Mapping[str, Any]], tools: Optional[Sequence[Any]] = None) -> TokenCount:
    """Tokens of a whole prompt: all messages, the tools offered, and the opening of the answer."""
    tokens = MESSAGE_TOKENS + sum(estimate_message(message) for message in messages)
    if tools:
        tokens += estimate_text(json.dumps(tools, ensure_ascii=False, default=str))
    return tokens
