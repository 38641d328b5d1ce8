"""``transformers serve`` (5.23 and its source)."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Ask, Facts, Server

__all__ = ["TransformersServe"]


class TransformersServe(Server):
    """It refuses fields it does not know (422), checks no context, and ends its streams without ``[DONE]``."""

    name: ClassVar[str] = "transformers"
    # The list is a 500 where there is no cache of Hugging Face, and empty where the model is a folder.
    lists: ClassVar[bool] = False

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        if ask.software not in ("", "uvicorn"):
            return None
        described = await ask.json("/openapi.json")
        paths = described.get("paths") if described is not None else None
        if not isinstance(paths, Mapping) or "/load_model" not in paths:
            return None
        # It loads the model at the first request; whether it has, it does not tell.
        return cls(Facts())

    def extras(self) -> Mapping[str, Any]:
        # Usage comes without being asked for.
        return {}

    def remedy(self, window: int) -> str:
        """(transformers/cli/serving: no option for it.)"""
        return "The server sets no limit to the context: the model itself and the memory do."
