"""llama.cpp's own server, ``llama-server`` (b11549 and its source; builds from b6399 on), and its router.

The router (``--models-dir``, ``--models-preset``) loads the model that a request names, and evicts another one for
it; a question about a model would do so too, if it didn't forbid it (``autoload=false``).
"""

from __future__ import annotations

import re
import time
from typing import Any, ClassVar, Mapping, Optional
from urllib.parse import quote

from metagpt_localllm.servers.base import (
    Anatomy,
    Ask,
    Facts,
    Progress,
    Server,
    Timings,
    Work,
    amount,
    entries,
    positive,
)

__all__ = ["LlamaCpp", "count", "facts_of", "work_of"]

#: The router's words for a model that is in memory, or comes back without a word.
_LOADED = ("loaded", "sleeping")
#: The build from which on it knows ``continue_final_message``.
_CONTINUES_EXPLICITLY = 9141


class LlamaCpp(Server):
    """It shows all it does: prefill progress in the stream, slots, timings, its own token counts."""

    name: ClassVar[str] = "llama.cpp"
    counts: ClassVar[bool] = True
    # More often than once in 1.5 s would delay its own look whether a client is still there (measured, b11549).
    watchable: ClassVar[bool] = True
    divides: ClassVar[bool] = True

    def __init__(self, facts: Optional[Facts] = None, routed: str = "") -> None:
        """``routed``: the model whose server the router asks; "" where there is no router."""
        super().__init__(facts)
        self._routed = routed

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "llamacpp" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        props = await ask.json("/props")
        if props is None or not isinstance(props.get("default_generation_settings"), Mapping):
            return None
        entry = _entry(await ask.models(), model)
        if props.get("role") != "router":
            return cls(facts_of(props, entry))
        loaded = _status(entry) in _LOADED
        props = await ask.json(_routed("/props", model)) if loaded else None
        return cls(facts_of(props, entry) if props is not None else Facts(loaded=False), model)

    @property
    def any_name(self) -> bool:
        return not self._routed

    @property
    def shares(self) -> bool:
        return bool(self._routed)

    async def is_loaded(self, ask: Ask) -> Optional[bool]:
        status = _status(_entry(await ask.json("./models"), self._routed)) if self._routed else None
        return None if status is None else status in _LOADED

    @property
    def settled(self) -> bool:
        # What the router has not loaded yet has no window yet.
        return not self._routed or bool(self.facts.window)

    def extras(self) -> Mapping[str, Any]:
        return {**super().extras(), "return_progress": True}

    def progress(self, chunk: Mapping[str, Any]) -> Optional[Progress]:
        told = chunk.get("prompt_progress")
        if not isinstance(told, Mapping):
            return None
        processed = amount(told.get("processed"))
        return Progress(int(processed), positive(told.get("total"))) if processed is not None else None

    def timings(self, totals: Mapping[str, Any]) -> Timings:
        told = totals.get("timings")
        if not isinstance(told, Mapping):
            return super().timings(totals)

        def seconds(key: str) -> Optional[float]:
            value = amount(told.get(key))
            return value / 1000 if value is not None else None

        cached = amount(told.get("cache_n"))
        return Timings(int(cached) if cached is not None else None, seconds("prompt_ms"), seconds("predicted_ms"))

    async def work(self, ask: Ask) -> Optional[Work]:
        slots = await ask.array(_routed("/slots", self._routed) if self._routed else "/slots")
        if slots is not None:
            return work_of(slots)
        if self._routed and _status(_entry(await ask.json("./models"), self._routed)) == "loading":
            return Work(True, time.monotonic(), loading=True)  # that it says so is proof enough, as a 503 is
        return None

    @property
    def _build(self) -> Optional[int]:
        """Of ``b11549-0123456``; builds made elsewhere have none (``b0-unknown``)."""
        found = re.match(r"b(\d+)", self.facts.version)
        return (int(found[1]) or None) if found else None

    def _path(self, path: str) -> str:
        return path

    @property
    def repeats(self) -> Optional[bool]:
        """Streamed it has the new text only, whole all of it (b11549, measured); builds before b9141 differ."""
        return False if (self._build or 0) >= _CONTINUES_EXPLICITLY else None

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        messages = [*body["messages"], {"role": "assistant", "content": partial}]
        return {**body, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}

    async def proves(self, ask: Ask, body: Mapping[str, Any], partial: str) -> bool:
        """It puts the text behind the template's prompt, white space and all, but an empty thought may come between."""
        request = self.continuation(body, partial)
        before = await self._rendered(ask, body) if request is not None else None
        return before is not None and await self._rendered(ask, request or {}) == before + partial

    async def _rendered(self, ask: Ask, body: Mapping[str, Any]) -> Optional[str]:
        prompt = (await ask.json(self._path("/apply-template"), body) or {}).get("prompt")
        return prompt if isinstance(prompt, str) else None

    def _enlarge(self, window: int) -> str:
        """``--ctx-size`` is divided by ``--parallel``, unless ``--kv-unified`` has the slots share it.

        They share it by default only where ``--parallel`` is not given, which it does not tell (tools/server/README.md;
        src/llama-context.cpp, n_ctx_seq). The router's preset has the same names, and its models inherit its arguments.
        """
        if self._routed:
            return (
                f"Write `ctx-size = {window}`{self._divided(window)} below [{self._routed}] in the file of the "
                "router's --models-preset, or start the router with it as --ctx-size"
            )
        return f"Start the server as `llama-server --ctx-size {window}`{self._divided(window)}"

    async def anatomy(self, ask: Ask) -> Anatomy:
        """It does not tell its layers, nor where they are."""
        meta = _entry(await ask.models(), self._routed or ask.endpoint.model).get("meta")
        if not isinstance(meta, Mapping):
            meta = {}
        props = {} if self._routed else await ask.json(self._path("/props")) or {}
        return Anatomy(
            weights=positive(meta.get("size")),
            parameters=positive(meta.get("n_params")),
            path=str(props.get("model_path") or ""),
        )

    def remedy_for_cache(self) -> str:
        """(tools/server/README.md: --cache-prompt is on by default, --swa-full for models with a sliding window.)"""
        return (
            "Start the server without `--no-cache-prompt`; a model with a sliding window (Gemma, gpt-oss) also needs "
            "`--swa-full`."
        )

    def remedy_for_gpu(self) -> str:
        return (
            "Start the server with `--n-gpu-layers 99` (all layers; fewer if the GPU's memory does not hold them), in a "
            "build that knows the GPU: its log names the GPU when it starts."
        )

    def remedy_for_slots(self) -> str:
        return "Start the server with `--parallel 1`."

    def _divided(self, window: int) -> str:
        slots = self.facts.slots or 1
        return f" ({window * slots} where `--parallel {slots}` divides it)" if slots > 1 else ""

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        # The router would load the model for it, and evict another.
        return None if self._routed and not self.facts.loaded else await count(ask, prompt)


def facts_of(props: Mapping[str, Any], entry: Mapping[str, Any]) -> Facts:
    """What ``/props`` and the model's entry in the list tell."""
    defaults, modalities, meta = props.get("default_generation_settings"), props.get("modalities"), entry.get("meta")
    return Facts(
        window=positive(defaults.get("n_ctx")) if isinstance(defaults, Mapping) else None,  # of one slot
        largest_window=positive(meta.get("n_ctx_train")) if isinstance(meta, Mapping) else None,
        quantization=str(props.get("model_ftype") or (meta.get("ftype") if isinstance(meta, Mapping) else "") or ""),
        slots=positive(props.get("total_slots")),
        images=bool(modalities.get("vision")) if isinstance(modalities, Mapping) else None,
        loaded=not props.get("is_sleeping", False),
        version=str(props.get("build_info") or ""),
    )


def work_of(slots: list[Mapping[str, Any]]) -> Optional[Work]:
    """What ``/slots`` tells; None where that is not whether they work.

    Builds from before November 2024, and forks of them, have ``state`` instead (#10162), which may be 0 in prefill (#9283).
    """
    if not slots or not all("is_processing" in slot for slot in slots):
        return None
    busy = [slot for slot in slots if slot.get("is_processing")]
    # The counts are in builds from b9276 on; next_token is an object in some builds and a list in others.
    marker = tuple(
        f"{slot.get('id_task')} {slot.get('n_prompt_tokens_processed')} {slot.get('next_token')}" for slot in busy
    )
    return Work(bool(busy), marker)


async def count(ask: Ask, prompt: Mapping[str, Any], at: str = "") -> Optional[int]:
    """Tokens of a chat; ``at`` is the path of the server below the one that is asked."""
    answer = await ask.json(f"{at}/v1/chat/completions/input_tokens", prompt)
    if answer is not None:
        return positive(answer.get("input_tokens"))
    # Builds before b9540.
    text = (await ask.json(f"{at}/apply-template", prompt) or {}).get("prompt")
    if not isinstance(text, str):
        return None
    question = {"model": prompt.get("model"), "content": text, "add_special": True}
    tokens = (await ask.json(f"{at}/tokenize", question) or {}).get("tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _routed(path: str, model: str) -> str:
    return f"{path}?model={quote(model, safe='')}&autoload=false"


def _entry(models: Any, model: str) -> Mapping[str, Any]:
    """The model's entry in the list; the only one where the server takes any name."""
    listed = entries(models, "data")
    named = [entry for entry in listed if model == entry.get("id") or model in _list(entry.get("aliases"))]
    return next(iter(named or (listed if len(listed) == 1 else [])), {})


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _status(entry: Mapping[str, Any]) -> Any:
    status = entry.get("status")
    return status.get("value") if isinstance(status, Mapping) else None
