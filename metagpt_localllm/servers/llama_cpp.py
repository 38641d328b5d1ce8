"""llama.cpp's own server, ``llama-server`` (b11549 and its source; builds from b6399 on)."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Ask, Facts, Server, Timings, Work, entries, positive

__all__ = ["LlamaCpp"]


class LlamaCpp(Server):
    """It shows all it does: prefill progress in the stream, slots, timings, its own token counts."""

    name: ClassVar[str] = "llama.cpp"
    counts: ClassVar[bool] = True
    # More often than once in 1.5 s would delay its own look whether a client is still there (measured, b11549).
    watchable: ClassVar[bool] = True

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "llamacpp" for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        props = await ask.json("/props")
        defaults = props.get("default_generation_settings") if props is not None else None
        if props is None or not isinstance(defaults, Mapping):
            return None
        modalities = props.get("modalities")
        return cls(
            Facts(
                window=positive(defaults.get("n_ctx")),  # of one slot
                quantization=str(props.get("model_ftype") or ""),
                slots=positive(props.get("total_slots")),
                images=bool(modalities.get("vision")) if isinstance(modalities, Mapping) else None,
                loaded=not props.get("is_sleeping", False),
                version=str(props.get("build_info") or ""),
            )
        )

    def extras(self) -> Mapping[str, Any]:
        return {**super().extras(), "return_progress": True}

    def progress(self, chunk: Mapping[str, Any]) -> Optional[int]:
        progress = chunk.get("prompt_progress")
        processed = progress.get("processed") if isinstance(progress, Mapping) else None
        return processed if isinstance(processed, int) else None

    def timings(self, totals: Mapping[str, Any]) -> Timings:
        told = totals.get("timings")
        if not isinstance(told, Mapping):
            return super().timings(totals)

        def seconds(key: str) -> Optional[float]:
            value = told.get(key)
            return value / 1000 if isinstance(value, (int, float)) and value >= 0 else None

        cached = told.get("cache_n")
        return Timings(cached if isinstance(cached, int) else None, seconds("prompt_ms"), seconds("predicted_ms"))

    async def work(self, ask: Ask) -> Optional[Work]:
        slots = await ask.array("/slots")
        if slots is None:
            return None
        busy = [slot for slot in slots if slot.get("is_processing")]
        # The counts are in builds from b9276 on; next_token is an object in some builds and a list in others.
        marker = tuple(
            f"{slot.get('id_task')} {slot.get('n_prompt_tokens_processed')} {slot.get('next_token')}" for slot in busy
        )
        return Work(bool(busy), marker, "prefill or decode")

    def continuation(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        messages = [*body["messages"], {"role": "assistant", "content": partial}]
        return {**body, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        answer = await ask.json("/v1/chat/completions/input_tokens", prompt)
        if answer is not None:
            return positive(answer.get("input_tokens"))
        # Builds before b9540.
        text = (await ask.json("/apply-template", prompt) or {}).get("prompt")
        if not isinstance(text, str):
            return None
        tokens = (await ask.json("/tokenize", {"content": text, "add_special": True}) or {}).get("tokens")
        return len(tokens) if isinstance(tokens, list) else None
