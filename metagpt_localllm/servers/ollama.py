"""Ollama (0.33, its source). It cuts prompts that are too long without a word, and loads models when they are asked for."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Mapping, Optional

import anyio

from metagpt_localllm.servers.base import Anatomy, Ask, Facts, Server, Work, amount, entries, positive

__all__ = ["Ollama"]

#: Seconds for ``/api/show``, which reads the model's file.
_SHOW_LIMIT = 0.4
#: How long the model stays loaded until the chat comes.
_KEEP = "10m"


class Ollama(Server):
    """Its OpenAI API is silent until the first token; its own API tells what is loaded."""

    name: ClassVar[str] = "ollama"
    watchable: ClassVar[bool] = True
    truncates: ClassVar[bool] = True

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "library" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        version = await ask.json("/api/version")
        if version is None or "version" not in version:
            # A proxy that knows only /v1.
            models = await ask.models()
            return cls(Facts(), model) if models is not None and cls.recognizes(models) else None
        entry = await _running(ask, model)
        shown: Mapping[str, Any] = {}
        with anyio.move_on_after(_SHOW_LIMIT):
            shown = await ask.json("/api/show", {"model": model}) or {}
        window = positive(entry.get("context_length"))
        details, size, in_vram = entry.get("details"), positive(entry.get("size")), amount(entry.get("size_vram"))
        if not isinstance(details, Mapping):
            details = shown.get("details")
        info, capabilities = shown.get("model_info"), shown.get("capabilities")
        trained = info.get(f"{info.get('general.architecture')}.context_length") if isinstance(info, Mapping) else None
        return cls(
            Facts(
                window=window,
                largest_window=positive(trained),
                quantization=str(details.get("quantization_level") or "") if isinstance(details, Mapping) else "",
                gpu_share=min(in_vram / size, 1.0) if window and size and in_vram is not None else None,
                images="vision" in capabilities if isinstance(capabilities, list) else None,
                # A model that is being loaded is in the list too, with a window of 0; before 0.10 none had a window.
                loaded=window is not None or bool(entry and "context_length" not in entry),
                version=str(version["version"]),
            ),
            model,
        )

    @property
    def settled(self) -> bool:
        return self.facts.loaded is not False

    async def work(self, ask: Ask) -> Optional[Work]:
        """While a model loads, its ``expires_at`` is reckoned from the moment of each look, so it moves; later it stands.

        (server/routes.go, PsHandler.) It never tells whether a model that is loaded works.
        """
        entry = await _running(ask, self._model)
        return (
            Work(True, str(entry.get("expires_at")), loading=True) if entry and not self.facts.loaded else None
        )

    async def load(self, ask: Ask, model: str) -> None:
        """A client that leaves during the load aborts it, so this waits without a limit of its own."""
        if self.facts.loaded is False:
            # Nothing else: another num_ctx or any other option would load the model once more. The chat that
            # follows sets keep_alive to the server's own default again.
            await ask.json("/api/generate", {"model": model, "keep_alive": _KEEP})

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        """None: it goes on or begins anew as the model's template, renderer and parser have it, and shows no prompt.

        A new turn that does not begin as the old one did would be taken for what comes next.
        """
        return None

    async def anatomy(self, ask: Ask) -> Anatomy:
        """(docs/api.md: /api/show with its model_info, /api/tags, /api/ps.)"""
        shown = (await ask.json("/api/show", {"model": self._model}) or {}).get("model_info")
        known = Anatomy.of_metadata(shown) if isinstance(shown, Mapping) else Anatomy()
        running, in_vram = await _running(ask, self._model), None
        if positive(running.get("context_length")):
            in_vram = amount(running.get("size_vram"))
        return dataclasses.replace(
            known,
            weights=positive(_named(await ask.json("/api/tags"), self._model).get("size")),
            resident=positive(running.get("size")) if in_vram is not None else None,
            in_vram=int(in_vram) if in_vram is not None else None,
        )

    def remedy_for_cache(self) -> str:
        """It keeps the last prompt of each slot by itself (llama.cpp's cache)."""
        return (
            "Ollama keeps the beginning of the last prompt by itself, as long as nothing else uses the model: let nothing "
            "else use it meanwhile, and start the server with `OLLAMA_NUM_PARALLEL=1 ollama serve`."
        )

    def remedy_for_gpu(self) -> str:
        """(docs/faq.md, OLLAMA_FLASH_ATTENTION and OLLAMA_KV_CACHE_TYPE.)"""
        return (
            "Ollama puts on the GPU what fits. Make it smaller: another quantization (`ollama pull` one with a smaller tag), "
            "less context, or a smaller cache (`OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q8_0 ollama serve`)."
        )

    def remedy_for_slots(self) -> str:
        return "Start the server as `OLLAMA_NUM_PARALLEL=1 ollama serve`."

    def _enlarge(self, window: int) -> str:
        """Nothing in a request to ``/v1`` can (openai/openai.go, ChatCompletionRequest; docs/context-length.mdx).

        A ``num_ctx`` in the Modelfile goes before the environment.
        """
        model = self._model or "MODEL"
        return (
            f"Start the server as `OLLAMA_CONTEXT_LENGTH={window} ollama serve`, or use a model of its own, made of a "
            f"Modelfile with `FROM {model}` and `PARAMETER num_ctx {window}` "
            f"(`ollama create {model}-{window} -f Modelfile`)"
        )


async def _running(ask: Ask, model: str) -> Mapping[str, Any]:
    """The model's entry in ``/api/ps``; empty where it is not there."""
    return _named(await ask.json("/api/ps"), model)


def _named(listing: Any, model: str) -> Mapping[str, Any]:
    names, listed = {model, f"{model}:latest"}, entries(listing, "models")
    return next((entry for entry in listed if names & {entry.get("name"), entry.get("model")}), {})
