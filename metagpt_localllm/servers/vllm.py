"""vLLM (0.32 and its source), and the servers that share its API as far as they do: SGLang, TabbyAPI, Ray Serve LLM (their sources)."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Ask, Facts, Server, Timings, amount, entries, positive

__all__ = ["VLLM", "RayServe", "SGLang", "TabbyAPI"]

#: Fields of a chat that make its prompt (vLLM, TokenizeChatRequest).
_OF_THE_PROMPT = (
    "model", "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
)  # fmt: skip


class VLLM(Server):
    """Prompt and answer together must fit its context, and a prompt that fits is refused for a large ``max_tokens``."""

    name: ClassVar[str] = "vllm"
    # It tells nothing of its work, but its health, whatever its engine is doing.
    watchable: ClassVar[bool] = True
    counts: ClassVar[bool] = True
    sums: ClassVar[bool] = True
    #: ``owned_by`` in its list of models.
    owner: ClassVar[str] = "vllm"

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == cls.owner for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        models = await ask.models()
        if models is None or not cls.recognizes(models):
            return None
        served = entries(models, "data")
        same = [entry for entry in served if entry.get("id") == model] or served
        return cls(cls._facts(same[0]))

    @classmethod
    def _facts(cls, entry: Mapping[str, Any]) -> Facts:
        return Facts(window=positive(entry.get("max_model_len")), loaded=True)

    def timings(self, totals: Mapping[str, Any]) -> Timings:
        """``metrics`` comes with ``--enable-per-request-metrics`` only, cached tokens with ``--enable-prompt-tokens-details``."""
        cached = super().timings(totals).cached_tokens
        told = totals.get("metrics")
        if not isinstance(told, Mapping):
            return Timings(cached)

        def milliseconds(key: str) -> Optional[float]:
            value = amount(told.get(key))
            return float(value) if value is not None else None

        first, queue, decode = (
            milliseconds(f"{key}_ms") for key in ("time_to_first_token", "queue_time", "generation_time")
        )
        return Timings(
            cached,
            prefill=max(first - (queue or 0.0), 0.0) / 1000 if first is not None else None,
            decode=decode / 1000 if decode is not None else None,
        )

    @property
    def repeats(self) -> Optional[bool]:
        return False  # but for ``echo``

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        """Without both flags it begins a new turn (measured); with them the answer has the new text only.

        Its penalties count what this request has answered, without the beginning.
        """
        if any(body.get(field) for field in ("frequency_penalty", "presence_penalty", "min_tokens", "echo")):
            return None
        messages = [*body["messages"], {"role": "assistant", "content": partial}]
        return {**body, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}

    async def proves(self, ask: Ask, body: Mapping[str, Any], partial: str) -> bool:
        """By its tokens: many templates trim the text, or drop it up to "</think>"."""
        request = self.continuation(body, partial)
        before = await self._tokens(ask, body) if request is not None else None
        tokens = await self._tokens(ask, request or {}) if before else None
        if not before or not tokens or tokens[: len(before)] != before:
            return False
        question = {"model": body.get("model"), "tokens": tokens[len(before) :]}
        text = (await ask.json("/detokenize", question) or {}).get("prompt")
        return text == partial or (partial[:1] == " " and text == partial[1:])  # SentencePiece drops a first space

    async def _tokens(self, ask: Ask, body: Mapping[str, Any]) -> Optional[list[Any]]:
        question = {key: body[key] for key in _OF_THE_PROMPT if body.get(key) is not None}
        tokens = (await ask.json("/tokenize", question) or {}).get("tokens")
        return tokens if isinstance(tokens, list) else None

    def remedy_for_cache(self) -> str:
        """(docs.vllm.ai, Engine Arguments.)"""
        return "Start the server with `--enable-prefix-caching`."

    def _enlarge(self, window: int) -> str:
        """(docs.vllm.ai, Engine Arguments.)"""
        return f"Start the server with `--max-model-len {window}`"

    @property
    def places(self) -> int:
        return 256  # its default of --max-num-seqs: it batches what it gets

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        return positive((await ask.json("/tokenize", prompt) or {}).get("count"))


class RayServe(VLLM):
    """Ray Serve LLM (2.60, its source): vLLM on one or several machines, with ``/tokenize`` and ``/detokenize`` of its own.

    Its ingress has no ``/health``, so that nothing is asked of it while a request runs.
    """

    name: ClassVar[str] = "ray-serve"
    watchable: ClassVar[bool] = False
    owner: ClassVar[str] = "organization-owner"

    @classmethod
    def _facts(cls, entry: Mapping[str, Any]) -> Facts:
        """The window is known only where ``engine_kwargs`` names it (openai_api_models.py, to_model_metadata)."""
        told = entry.get("metadata")
        return Facts(window=positive(told.get("max_request_context_length")) if isinstance(told, Mapping) else None)

    def remedy_for_cache(self) -> str:
        return "Write `enable_prefix_caching: true` below the model's engine_kwargs."

    def _enlarge(self, window: int) -> str:
        """(docs.ray.io, LLMConfig.)"""
        return f"Write `max_model_len: {window}` below the model's engine_kwargs"


class SGLang(VLLM):
    """Its ``/tokenize`` takes plain text only, without the chat template: no count."""

    name: ClassVar[str] = "sglang"
    counts: ClassVar[bool] = False
    owner: ClassVar[str] = "sglang"

    def remedy_for_cache(self) -> str:
        """(docs.sglang.io, Server Arguments.)"""
        return "Start the server without `--disable-radix-cache`."

    def _enlarge(self, window: int) -> str:
        """(docs.sglang.io, Server Arguments.)"""
        return f"Start the server with `--context-length {window}`"

    async def proves(self, ask: Ask, body: Mapping[str, Any], partial: str) -> bool:
        """Yes by its source: the text goes behind the template's prompt, which never sees it (serving_chat.py)."""
        return self.continuation(body, partial) is not None

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        return None


class TabbyAPI(VLLM):
    """ExLlama's server. Its ``/v1/token/encode`` leaves out what the template adds for the answer: no count."""

    name: ClassVar[str] = "tabbyapi"
    counts: ClassVar[bool] = False
    owner: ClassVar[str] = "tabbyAPI"

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        models = await ask.models()
        if models is None or not cls.recognizes(models):
            return None
        # The list holds every model on the disk; this is the loaded one, whatever name a request gives.
        return cls(cls._facts(await ask.json("./model") or {}))

    @classmethod
    def _facts(cls, entry: Mapping[str, Any]) -> Facts:
        given, meta = entry.get("parameters"), entry.get("meta")
        parameters: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        trained: Mapping[str, Any] = meta if isinstance(meta, Mapping) else {}
        vision = parameters.get("use_vision")
        return Facts(
            window=positive(parameters.get("max_seq_len")),
            largest_window=positive(trained.get("n_ctx_train")),
            slots=positive(parameters.get("max_batch_size")),
            images=vision if isinstance(vision, bool) else None,
            loaded=bool(entry),
        )

    @property
    def settled(self) -> bool:
        return bool(self.facts.loaded)

    @property
    def repeats(self) -> Optional[bool]:
        return None

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        """It appends ``response_prefix`` to the prompt after the template."""
        return {**body, "response_prefix": partial} if super()._continued(body, partial) is not None else None

    async def proves(self, ask: Ask, body: Mapping[str, Any], partial: str) -> bool:
        """Yes by its source: the text goes behind the template's prompt (chat_completion.py)."""
        return self.continuation(body, partial) is not None

    def remedy_for_cache(self) -> str:
        return Server.remedy_for_cache(self)

    def _enlarge(self, window: int) -> str:
        """``cache_size`` (4,096 by default, a multiple of 256) bounds ``max_seq_len`` (config_sample.yml)."""
        cache = -(-window // 256) * 256
        return f"Write `max_seq_len: {window}` and `cache_size: {cache}` below `model:` in TabbyAPI's config.yml"

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        return None
