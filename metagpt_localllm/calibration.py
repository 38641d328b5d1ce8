"""The estimate of tokens, corrected by what the server counted. Pure.

``tokens.estimate_text`` is 1.0 to 2.2 times the truth for any tokenizer, but for one tokenizer and one kind of text the
ratio hardly varies. So the ratio is learned, for each kind of text: digits are a token each in some vocabularies and a
third of one in others, a Chinese character is 0.5 to 1, and prose has more tokens per letter than code::

    learned = Calibration()
    learned.observe({**by_script(text), "frame": MESSAGE_TOKENS}, counted)
    tokens = learned.upper({**by_script(next_text), "frame": MESSAGE_TOKENS})

Best to learn from are the messages that were added since a prompt whose count is known: what a template puts in front
of every prompt cancels out. Leave out what has images, and counts of prompts that the server has cut or of which it
counts only what was not cached.

With five messages known, the next was foreseen as 1.2 times its tokens on average, and too low in 0.2 % of cases
(``tests/test_calibration.py``: Claude's and Qwen's tokenizers, for prose, code, logs, JSON, Chinese and all in turn).
"""

from __future__ import annotations

import math
import re
from collections import deque
from typing import Deque, Dict, Literal, Mapping, Tuple

from metagpt_localllm.tokens import TokenCount, estimate_text

__all__ = ["Calibration", "Script", "by_script", "script_of"]

#: ``data`` is dense in digits or without blanks (logs, tables, JSON, base64), ``wide`` beyond the Latin script, and
#: ``frame`` what the chat template puts around messages.
Script = Literal["prose", "code", "data", "wide", "frame"]

#: Tokens counted per token estimated before anything is known: the least (see ``tokens``), and the usual.
_LEAST: Dict[Script, float] = {"prose": 1 / 2.5, "code": 1 / 3, "data": 1 / 3, "wide": 1 / 4.6, "frame": 1 / 4}
_USUAL: Dict[Script, float] = {"prose": 0.65, "code": 0.58, "data": 0.75, "wide": 0.45, "frame": 0.8}
#: No text has more: it is estimated at a token per 4 bytes or more, and no token is shorter than a byte.
_MOST = 4.0
#: A prompt of fewer tokens says too little, and so does a part of it that is smaller than this.
_ENOUGH, _PART = 100, 0.2
#: From this part on a script answers for the ratio of the whole; how far off it may be when it is hardly a part.
_DOMINANT, _SLACK = 0.8, 0.15
#: Observations of each script that are remembered.
_RECENT = 32
#: How far the next ratio may be above the largest seen: after one, and after very many.
_FIRST_MARGIN, _LAST_MARGIN = 0.22, 0.03

#: Characters that are looked at, in this many places.
_SAMPLE, _PLACES = 4096, 8
_WIDE = re.compile("[^\x00-\u024f]+")
_DIGIT = re.compile(r"[0-9]")
_BLANK = re.compile(r"\s")
_INDENTED = re.compile(r"\n[ \t]+\S")


def script_of(text: str) -> Script:
    """What most of ``text`` is, from a sample of it if it is long."""
    if len(text) > _SAMPLE:
        size = _SAMPLE // _PLACES
        step = (len(text) - size) // (_PLACES - 1)
        text = "".join(text[i * step : i * step + size] for i in range(_PLACES))
    if not text.isascii():
        wide = sum(map(len, _WIDE.findall(text)))
        if wide > len(text) / 6:  # such a character costs about five times as much as another
            return "wide"
    few = 0.05 * len(text)
    if len(_DIGIT.findall(text)) > few + 5 or len(_BLANK.findall(text)) < few - 5:
        return "data"
    return "code" if len(_INDENTED.findall(text)) > 0.4 * text.count("\n") else "prose"


def by_script(text: str) -> Dict[Script, TokenCount]:
    """``estimate_text(text)``, with what is beyond the Latin script apart from the rest."""
    tokens = estimate_text(text)
    if text.isascii():
        return {script_of(text): tokens}
    found = _WIDE.findall(text)
    wide = estimate_text("".join(found))
    if wide == tokens:
        return {"wide": wide}
    rest = script_of(_WIDE.sub("", text))
    return {rest: tokens - wide, "wide": wide} if wide else {rest: tokens}


class Calibration:
    """What one model's tokenizer makes of estimates."""

    def __init__(self) -> None:
        # The lowest and the highest that a ratio can have been.
        self._seen: Dict[Script, Deque[Tuple[float, float]]] = {script: deque(maxlen=_RECENT) for script in _LEAST}

    def factor(self, script: Script) -> float:
        """Tokens per token estimated, on the safe side; 1.0 until something is known."""
        seen = self._seen[script]
        if not seen:
            return 1.0
        largest = max(_LEAST[script], max(high for _, high in tuple(seen)))
        return max((1 + _LAST_MARGIN) * largest, min(1.0, _margin(len(seen)) * largest))

    def floor(self, script: Script) -> float:
        """Tokens per token estimated, at the least."""
        seen = self._seen[script]
        return min(low for low, _ in tuple(seen)) / _margin(len(seen)) ** 2 if seen else _LEAST[script]

    def upper(self, estimates: Mapping[Script, TokenCount]) -> TokenCount:
        """Tokens on the safe side, of a text or prompt that was estimated like that."""
        return math.ceil(sum(tokens * self.factor(script) for script, tokens in estimates.items()))

    def lower(self, estimates: Mapping[Script, TokenCount]) -> TokenCount:
        """Tokens at the least."""
        return math.floor(sum(tokens * self.floor(script) for script, tokens in estimates.items()))

    def observe(self, estimates: Mapping[Script, TokenCount], counted: TokenCount) -> None:
        """Learns from one prompt, or from the messages added to one.

        In a mixture all scripts are taken to be off by the same part. Where none dominates that is believed as far as
        it lowers a factor. Afterwards ``counted`` is within ``lower`` and ``upper`` of these estimates.

        Args:
            estimates: tokens as estimated, not corrected, of each script in it.
            counted: tokens that the server counted; ignored where they can be no count of that.
        """
        parts = {script: tokens for script, tokens in estimates.items() if script in _LEAST and tokens > 0}
        total = sum(parts.values())
        if isinstance(counted, bool) or total < _ENOUGH or not 0 < counted <= _MOST * total:
            return
        large = [script for script, tokens in parts.items() if tokens >= _PART * total]
        off = counted / sum(tokens * self._usual(script) for script, tokens in parts.items())
        found = {script: off * self._usual(script) for script in large}
        for script, ratio in found.items():
            slack = 1 + _SLACK * (1 - parts[script] / total)
            if parts[script] >= _DOMINANT * total or ratio * slack < self.factor(script):
                self._seen[script].append((ratio / slack, ratio * slack))
        if counted > self.upper(parts):
            missing = counted - sum(tokens * self.factor(script) for script, tokens in parts.items())
            scale = 1 + missing / sum(parts[script] * self.factor(script) for script in large)
            for script in large:
                raised = self.factor(script) * scale
                self._seen[script].append((raised, raised))
        elif counted < self.lower(parts):
            for script in parts:
                self._seen[script].append((counted / total, counted / total))

    def forget(self) -> None:
        """What was counted was not what was estimated."""
        for seen in self._seen.values():
            seen.clear()

    def _usual(self, script: Script) -> float:
        highest = sorted(high for _, high in tuple(self._seen[script]))
        return highest[len(highest) // 2] if highest else _USUAL[script]


def _margin(observations: int) -> float:
    return 1 + _LAST_MARGIN + (_FIRST_MARGIN - _LAST_MARGIN) / math.sqrt(observations)
