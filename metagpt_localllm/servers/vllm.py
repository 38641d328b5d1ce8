"""vLLM (0.32 and its source)."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Ask, Facts, Server, entries, positive

__all__ = ["VLLM"]


class VLLM(Server):
    """Prompt and answer together must fit its context, and a prompt that fits is refused for a large ``max_tokens``."""

    name: ClassVar[str] = "vllm"
    counts: ClassVar[bool] = True

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "vllm" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        models = await ask.json("./models")
        if models is None or not cls.recognizes(models):
            return None
        served = entries(models, "data")
        same = [entry for entry in served if entry.get("id") == model] or served
        return cls(Facts(window=positive(same[0].get("max_model_len")), loaded=True))

    @property
    def places(self) -> int:
        return 256  # its default of --max-num-seqs: it batches what it gets

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        return positive((await ask.json("/tokenize", prompt) or {}).get("count"))
