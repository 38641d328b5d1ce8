"""Which tier a call belongs to: the first whose conditions all hold. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional, Sequence

from metagpt_localllm.settings import Match, Tier

__all__ = ["DEFAULT_TIER", "Caller", "choose_tier"]

#: The name shown for calls that no tier matches; they have the deadlines of ``llm.local.timeouts``.
DEFAULT_TIER = "default"


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        action: class name of the MetaGPT action, or "".
        role: class name of the role, or "".
        profile: the role's profile, such as "Product Manager", or "".
    """

    action: str = ""
    role: str = ""
    profile: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.profile or self.role, self.action) if part) or "direct call"


def choose_tier(
    tiers: Sequence[Tier], caller: Caller, *, model: str, prompt_tokens: int, has_tools: bool
) -> Optional[Tier]:
    """The first tier that matches, or None where the defaults apply. ``prompt_tokens`` is before trimming."""
    for tier in tiers:
        if _matches(tier.match, caller, model, prompt_tokens, has_tools):
            return tier
    return None


def _matches(match: Match, caller: Caller, model: str, prompt_tokens: int, has_tools: bool) -> bool:
    return (
        _any_glob(match.action, caller.action)
        and _any_glob(match.role, caller.profile, caller.role)
        and _any_glob(match.model, model)
        and (match.min_prompt_tokens is None or prompt_tokens >= match.min_prompt_tokens)
        and (match.max_prompt_tokens is None or prompt_tokens <= match.max_prompt_tokens)
        and (match.tools is None or match.tools == has_tools)
    )


def _any_glob(globs: Optional[Sequence[str]], *names: str) -> bool:
    if globs is None:
        return True
    return any(fnmatchcase(name.lower(), glob.lower()) for glob in globs for name in names if name)
