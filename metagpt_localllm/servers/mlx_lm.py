"""mlx-lm's server, ``mlx_lm.server`` (0.32 and its source)."""

from __future__ import annotations

import re
from typing import ClassVar, Optional

from metagpt_localllm.servers.base import Ask, Facts, Progress, Server, positive

__all__ = ["MLXLM"]

_KEEPALIVE = re.compile(rb"\s*keepalive (\d{1,12})/(\d{1,12})\s*")


class MLXLM(Server):
    """It shows its prefill in comments, checks no context, and goes on to the end when nobody reads a whole answer."""

    name: ClassVar[str] = "mlx-lm"
    # It scans the cache of Hugging Face for its list, and gives an empty body where there is none.
    lists: ClassVar[bool] = False

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        # Nothing names it: it is the one that runs on Python's http.server.
        if ask.software and not ask.software.startswith("BaseHTTP/"):
            return None
        health = await ask.json("/health")
        if health is None or health.get("status") != "ok" or not ask.software.startswith("BaseHTTP/"):
            return None
        return cls(Facts(loaded=True))

    def remedy(self, window: int) -> str:
        """(mlx_lm/server.py: no option for it.)"""
        return "The server sets no limit to the context: the model itself and the memory do."

    def progress_of_comment(self, comment: bytes) -> Optional[Progress]:
        """``keepalive 9/10``: of the tokens that were not in its prefix cache."""
        found = _KEEPALIVE.fullmatch(comment)
        return Progress(int(found.group(1)), positive(int(found.group(2)))) if found else None
