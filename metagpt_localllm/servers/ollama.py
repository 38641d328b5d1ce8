"""Ollama (0.33, its source). It cuts prompts that are too long without a word, and loads models when they are asked for."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Ask, Facts, Server, entries, positive

__all__ = ["Ollama"]


class Ollama(Server):
    """Its OpenAI API is silent until the first token; its own API tells what is loaded."""

    name: ClassVar[str] = "ollama"

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "library" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        version = await ask.json("/api/version")
        if version is None or "version" not in version:
            return None
        names = {model, f"{model}:latest"}
        for entry in entries(await ask.json("/api/ps"), "models"):
            if names & {entry.get("name"), entry.get("model")}:
                details, size = entry.get("details"), positive(entry.get("size"))
                in_vram = entry.get("size_vram")
                return cls(
                    Facts(
                        window=positive(entry.get("context_length")),
                        quantization=str(details.get("quantization_level") or "") if isinstance(details, Mapping) else "",
                        gpu_share=min(in_vram / size, 1.0) if size and isinstance(in_vram, (int, float)) else None,
                        loaded=True,
                        version=str(version["version"]),
                    )
                )
        return cls(Facts(loaded=False, version=str(version["version"])))

    @property
    def settled(self) -> bool:
        return bool(self.facts.loaded)
