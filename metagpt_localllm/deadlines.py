"""The four deadlines of one attempt, and the sentence that explains each. Pure: time is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional

from metagpt_localllm.latency import DEFAULTS, Learned, deadline
from metagpt_localllm.settings import Tier, Timeouts
from metagpt_localllm.tiers import DEFAULT_TIER

__all__ = ["COLD", "Deadlines", "plan_deadlines"]

#: What ``auto`` means before anything is learned.
COLD: Mapping[str, Learned] = {name: deadline(name, None, limits) for name, limits in DEFAULTS.items()}


@dataclass(frozen=True)
class Deadlines:
    """How long one attempt may take in each of its phases, all in seconds.

    Attributes:
        connect: until the connection stands.
        first_token: from the request to the first token, or to the next sign that the server works.
        stall: silence between two tokens.
        progress: from one sign of prefill's progress to the next, or to the first token.
        total: the attempt as a whole.
        tier: name of the tier they come from.
        settings: path in config2.yaml of each, to be named in errors; ``total`` may be ``llm.timeout``.
        why: how each that was learned came about; those that the user wrote have none.
    """

    connect: float
    first_token: float
    stall: float
    progress: float
    total: float
    tier: str
    settings: dict[str, str]
    why: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: getattr(self, name) for name in ("connect", "first_token", "stall", "progress", "total")}


def plan_deadlines(
    timeouts: Timeouts,
    tier: Optional[Tier],
    attempt_cap: Optional[float],
    learned: Mapping[str, Learned] = COLD,
) -> Deadlines:
    """The deadlines of a call in ``tier`` (None: the defaults).

    Args:
        timeouts: the defaults, ``llm.local.timeouts``.
        tier: the tier that matched; what it sets goes before the defaults.
        attempt_cap: ``llm.timeout`` in seconds where the user set it; lowers ``total`` and never raises it.
        learned: what ``auto`` stands for, by name.
    """
    values: dict[str, float] = {}
    settings: dict[str, str] = {}
    why: dict[str, str] = {}
    for name in ("connect", "first_token", "stall", "total"):
        own = getattr(tier, name) if tier is not None else None
        value = own if own is not None else getattr(timeouts, name)
        section = "llm.local.timeouts" if own is None or tier is None else f"llm.local.tiers[{tier.name}]"
        settings[name] = f"{section}.{name}"
        if value == "auto":
            values[name], why[name] = learned[name].seconds, learned[name].why
        else:
            values[name] = value
    if "total" in why:  # a learned total makes room for what the user allows the others
        values["total"] = max(values["total"], values["first_token"], values["stall"])
    if attempt_cap is not None and attempt_cap < values["total"]:
        values["total"], settings["total"] = attempt_cap, "llm.timeout"
        why.pop("total", None)
    # Where the user allows a time for the first token, that is also what he allows between two signs of progress.
    values["progress"] = learned["progress"].seconds if "first_token" in why else values["first_token"]
    # What is inherited or learned gives way to a shorter total (settings.py refuses two of the same block).
    for name in ("connect", "first_token", "stall", "progress"):
        values[name] = min(values[name], values["total"])
    return Deadlines(**values, tier=tier.name if tier is not None else DEFAULT_TIER, settings=settings, why=why)
