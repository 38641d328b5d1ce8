"""LM Studio (its documentation of 0.4 and its bug tracker; the server itself is closed)."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Anatomy, Ask, Facts, Server, Work, entries, positive

__all__ = ["LMStudio"]


class LMStudio(Server):
    """Its OpenAI API tells little; ``/api/v1`` (from 0.4.0) and ``/api/v0`` tell what is loaded."""

    name: ClassVar[str] = "lmstudio"
    watchable: ClassVar[bool] = True
    blank: ClassVar[bool] = True  # with llama.cpp's engine (lmstudio-bug-tracker #2339); others report an error
    _tells = True  # whether it has an API of its own

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "organization_owner" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        listing = await _listing(ask)
        if listing is not None:
            return cls(_facts(listing, model), model)
        # An old version, or a proxy that knows only /v1.
        models = await ask.models()
        if models is None or not cls.recognizes(models):
            return None
        silent = cls(Facts(), model)
        silent._tells = False
        return silent

    @property
    def places(self) -> int:
        # It takes four at once by default, and lets them evict each other's cache and exceed the context together.
        return 1

    @property
    def settled(self) -> bool:
        # A model that is loaded on demand has no window yet.
        return self.facts.window is not None or not self._tells

    async def work(self, ask: Ask) -> Optional[Work]:
        """Only that the model is loaded now, once; of a request it tells nothing."""
        listing = None if self.facts.loaded else await _listing(ask)
        if listing is None:
            return None
        loaded = bool(_facts(listing, self._model).loaded)
        return Work(True, loaded, loading=not loaded)

    async def load(self, ask: Ask, model: str) -> None:
        """The shortest chat, which loads the model on demand.

        Not ``/api/v1/models/load``: what that loads is neither unloaded when idle nor evicted for another model.
        """
        if self.facts.loaded is False:
            messages = [{"role": "user", "content": "."}]
            await ask.json("./chat/completions", {"model": model, "messages": messages, "max_tokens": 1})

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        """None: what it makes of an assistant's message at the end is not documented, and it shows no prompt."""
        return None

    async def anatomy(self, ask: Ask) -> Anatomy:
        """(Its REST API v1, "List your models": size_bytes, params_string.)"""
        listing = await _listing(ask)
        for entry in [*entries(listing, "models"), *entries(listing, "data")]:
            if self._model in [entry.get("key"), entry.get("id"), *(i.get("id") for i in entries(entry, "loaded_instances"))]:
                return Anatomy(weights=positive(entry.get("size_bytes")))
        return Anatomy()

    def remedy_for_gpu(self) -> str:
        model = self._model or "MODEL"
        return (
            f"Load the model with all of it on the GPU (`lms unload {model}`, `lms load {model} --gpu max`), or set GPU "
            "Offload to the right end in its load settings."
        )

    def remedy_for_slots(self) -> str:
        return "Set Max Concurrent Predictions to 1 in the model's load settings."

    def _enlarge(self, window: int) -> str:
        """What is loaded must go first: ``lms load`` would load it once more (lms, load.ts; bug tracker, #1582)."""
        model = self._model or "MODEL"
        return (
            f"Load the model anew (`lms unload {model}`, `lms load {model} --context-length {window}`), or set Context "
            f"Length to {window} in its load settings"
        )


async def _listing(ask: Ask) -> Optional[Mapping[str, Any]]:
    for path in ("/api/v1/models", "/api/v0/models"):
        listing = await ask.json(path)
        if listing is not None:
            return listing
    return None


def _facts(listing: Mapping[str, Any], model: str) -> Facts:
    for entry in [*entries(listing, "models"), *entries(listing, "data")]:
        instances = entries(entry, "loaded_instances")
        if model not in [entry.get("key"), entry.get("id"), *(i.get("id") for i in instances)]:
            continue
        configs = [i["config"] for i in instances if isinstance(i.get("config"), Mapping)]
        windows = [config.get("context_length") for config in configs] + [entry.get("loaded_context_length")]
        capabilities, quantization = entry.get("capabilities"), entry.get("quantization")
        return Facts(
            window=next(filter(None, map(positive, windows)), None),
            largest_window=positive(entry.get("max_context_length")),
            quantization=str(quantization.get("name") if isinstance(quantization, Mapping) else quantization or ""),
            slots=next(filter(None, (positive(config.get("parallel")) for config in configs)), None),
            images=bool(capabilities.get("vision")) if isinstance(capabilities, Mapping) else None,
            loaded=bool(instances) or entry.get("state") == "loaded",
        )
    return Facts()
