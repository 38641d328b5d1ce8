"""Whether the deadlines fit the speed that was measured, and which ones would. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterable, Optional, Union

from metagpt_localllm.doctor.findings import Finding, SettingChange, Severity
from metagpt_localllm.doctor.subject import Subject
from metagpt_localllm.latency import DEFAULTS, Estimator, Sample, deadline
from metagpt_localllm.settings import Tier, Timeouts, format_duration
from metagpt_localllm.wording import duration

__all__ = ["TierOf", "estimator_of", "judge_deadlines", "proposed_tiers", "tiers_as_change"]

#: Tokens of an answer that a deadline of the total must have room for: most of MetaGPT's are shorter.
_ANSWER = 1024
#: Prompts in tokens for which tiers are proposed; the last one is whatever fits.
_SIZES = (("short", 1024), ("medium", 4096))


@dataclass(frozen=True)
class TierOf:
    """Deadlines for prompts of up to so many tokens, in seconds."""

    name: str
    prompt_tokens: int
    first_token: float
    stall: float
    total: float


def estimator_of(subject: Subject, earlier: Iterable[Sample]) -> Estimator:
    """What earlier calls and this measurement have taught."""
    return Estimator([*earlier, *(subject.measured.samples if subject.measured is not None else ())])


def proposed_tiers(subject: Subject, estimator: Estimator, window: int) -> list[TierOf]:
    """The deadlines that ``auto`` takes from the speed, for prompts of some sizes; none where nothing is known."""
    sizes = [(name, size) for name, size in _SIZES if size < window * 3 // 4]
    tiers = []
    for name, size in [*sizes, ("long", window * 3 // 4)]:
        learned = {
            "first_token": estimator.first_token(size, may_queue=False),
            "stall": estimator.stall(),
            "total": estimator.total(size, min(subject.answer_tokens, max(window // 4, 1))),
        }
        if any(estimate is None for estimate in learned.values()):
            return []
        first, stall, total = (
            deadline(key, learned[key], DEFAULTS[key]).seconds for key in ("first_token", "stall", "total")
        )
        tiers.append(TierOf(name, size, _round(first), _round(stall), _round(max(total, first, stall))))
    return tiers


def tiers_as_change(subject: Subject, tiers: Iterable[TierOf]) -> tuple[SettingChange, ...]:
    """The same as fixed tiers in config2.yaml; the last one has no upper limit, so that every prompt has one."""
    listed = list(tiers)
    value: list[dict[str, Any]] = []
    for tier in listed:
        entry: dict[str, Any] = {"name": tier.name}
        if tier is not listed[-1]:
            entry["match"] = {"max_prompt_tokens": tier.prompt_tokens}
        entry.update({key: format_duration(getattr(tier, key)) for key in ("first_token", "stall", "total")})
        value.append(entry)
    return subject.change("local.tiers", value) if value else ()


def _round(seconds: float) -> float:
    """Up to two digits, in seconds or whole minutes."""
    if seconds > 600:
        return 60.0 * math.ceil(seconds / 60)
    return float(10 * math.ceil(seconds / 10))


def judge_deadlines(subject: Subject, estimator: Estimator, prompt: int) -> list[Finding]:
    """The user's own deadlines that are shorter than what this machine needs.

    Args:
        prompt: tokens of a large prompt of MetaGPT, as it would be sent.
    """
    findings = []
    settings = subject.settings
    blocks: list[tuple[str, Union[Tier, Timeouts], int]] = [("local.timeouts", settings.timeouts, prompt)]
    for index, tier in enumerate(settings.tiers):
        blocks.append((f"local.tiers.{index}", tier, min(tier.match.max_prompt_tokens or prompt, prompt)))
    for where, block, size in blocks:
        for name in ("first_token", "stall", "total"):
            given = getattr(block, name)
            if isinstance(given, float) and name in block.model_fields_set:
                needed = _needed(subject, estimator, name, size)
                if needed is not None and given < needed:
                    findings.append(_too_short(subject, f"{where}.{name}", given, needed, name, size, "auto"))
    cap = subject.block.get("timeout")
    if isinstance(cap, (int, float)) and not isinstance(cap, bool) and cap > 0:
        needed = _needed(subject, estimator, "total", prompt)
        if needed is not None and cap < needed:
            room = int(_round(2 * needed))
            findings.append(_too_short(subject, "timeout", float(cap), needed, "total", prompt, room))
    return findings


def _needed(subject: Subject, estimator: Estimator, name: str, prompt: int) -> Optional[float]:
    """Seconds that it will take, with what a bad day adds; without the margin of ``auto``."""
    if name == "first_token":
        # Where progress shows, the deadline begins anew with each sign of it.
        estimate = None if subject.server.shows_progress else estimator.first_token(prompt, may_queue=False)
    elif name == "stall":
        estimate = estimator.stall()
    else:
        estimate = estimator.total(prompt, min(subject.answer_tokens, _ANSWER))
    return None if estimate is None else estimate.seconds


def _too_short(
    subject: Subject, setting: str, given: float, needed: float, name: str, prompt: int, value: Union[str, int]
) -> Finding:
    what = {
        "first_token": f"reading a prompt of {prompt:,} tokens",
        "stall": "the pause between two tokens",
        "total": f"a prompt of {prompt:,} tokens with an answer of {min(subject.answer_tokens, _ANSWER):,}",
    }[name]
    path = f"{subject.about}.{setting}"
    return Finding(
        Severity.WARNING, "deadline", f"{path} is too short for this machine: {format_duration(given)}",
        f"at the measured speed, {what} takes up to {duration(needed)}; the call would be given up and begun again",
        f"Set {path}: {value}" + (", which learns from each call." if value == "auto" else ", or leave it out."),
        subject.change(setting, value), subject.about,
    )  # fmt: skip
