"""llama-swap, which starts the server of the model that a request names and stops the others (its source, 0bdb3720)."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Mapping, Optional
from urllib.parse import quote

from metagpt_localllm.servers.base import Anatomy, Ask, Facts, Server, Work, entries
from metagpt_localllm.servers.llama_cpp import LlamaCpp, count, facts_of, work_of

__all__ = ["LlamaSwap"]


class LlamaSwap(LlamaCpp):
    """What is below ``/upstream/MODEL`` is the model's own server, mostly llama.cpp's.

    Asking there starts that server and stops another one, so it is asked only while ``/running`` calls it ready.
    """

    name: ClassVar[str] = "llama-swap"

    def __init__(self, facts: Optional[Facts] = None, upstream: str = "", is_llama_cpp: bool = True) -> None:
        super().__init__(facts)
        self._upstream, self._is_llama_cpp = upstream, is_llama_cpp

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "llama-swap" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        models = await ask.models()
        if models is None or not cls.recognizes(models):
            return None
        name = next((str(e.get("id")) for e in entries(models, "data") if model in _aliases(e)), model)
        if await _state(ask, name) != "ready":
            return cls(Facts(loaded=False), name)
        props = await ask.json(f"{_at(name)}/props")
        if props is None or not isinstance(props.get("default_generation_settings"), Mapping):
            return cls(Facts(loaded=True), name, is_llama_cpp=False)
        return cls(facts_of(props, {}), name)

    @property
    def any_name(self) -> bool:
        return False

    @property
    def shares(self) -> bool:
        return True

    async def is_loaded(self, ask: Ask) -> Optional[bool]:
        return await _state(ask, self._upstream) == "ready"

    async def load(self, ask: Ask, model: str) -> None:
        """Any question to its server starts that, and is held until it is ready or ``healthCheckTimeout`` ends it (120 s).

        Only then can its window be known; a chat that waited for it would be fitted to a guess.
        """
        if self.facts.loaded is False:
            await ask.status(f"{_at(self._upstream or model)}/health")

    @property
    def settled(self) -> bool:
        return bool(self.facts.loaded)

    def extras(self) -> Mapping[str, Any]:
        return super().extras() if self._is_llama_cpp else Server.extras(self)

    async def work(self, ask: Ask) -> Optional[Work]:
        state = await _state(ask, self._upstream)
        if state == "starting":
            return Work(True, time.monotonic(), loading=True)  # it gives up by itself, at its healthCheckTimeout
        slots = await ask.array(f"{_at(self._upstream)}/slots") if state == "ready" and self._is_llama_cpp else None
        return work_of(slots) if slots is not None else None

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        return super()._continued(body, partial) if self._is_llama_cpp else None

    def _path(self, path: str) -> str:
        return f"{_at(self._upstream)}{path}"

    def _enlarge(self, window: int) -> str:
        """(Its docs/configuration.md.)"""
        model = self._upstream or "the model"
        if not self._is_llama_cpp:
            return f"Give {model} a context of at least {window} tokens, in its `cmd` in llama-swap's config.yaml"
        return f"Add `--ctx-size {window}`{self._divided(window)} to the `cmd` of {model} in llama-swap's config.yaml"

    async def anatomy(self, ask: Ask) -> Anatomy:
        """Nothing: the list is llama-swap's own."""
        return Anatomy()

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        if not self._is_llama_cpp or await _state(ask, self._upstream) != "ready":
            return None
        return await count(ask, prompt, _at(self._upstream))


def _at(model: str) -> str:
    return f"/upstream/{quote(model, safe='/')}"


async def _state(ask: Ask, model: str) -> Optional[str]:
    """``starting``, ``ready``, ``stopping`` …; None where it does not run."""
    for entry in entries(await ask.json("/running"), "running"):
        if entry.get("model") == model:
            return str(entry.get("state"))
    return None


def _aliases(entry: Mapping[str, Any]) -> list[Any]:
    meta = entry.get("meta")
    own = meta.get("llamaswap") if isinstance(meta, Mapping) else None
    aliases = own.get("aliases") if isinstance(own, Mapping) else None
    return [entry.get("id"), *(aliases if isinstance(aliases, list) else [])]
