"""LiteLLM's proxy in front of other servers (1.108.7, run for real, and its source).

It shows nothing of what is behind it, and changes what comes from there: errors get its own words, prefill progress and
timings are lost, and a stream that ends without a finish_reason gets an invented ``stop`` (streaming_handler.py,
finish_reason_handler), so that an answer that was cut so cannot be told from a whole one. A connection that breaks in
mid-stream is an error in the stream, as it should be.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm import errors
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.servers.base import Ask, Facts, Health, Server, Unanswered, entries, positive

__all__ = ["LiteLLM"]

#: ``created`` of every model in its list (constants.py, DEFAULT_MODEL_CREATED_AT_TIME); OpenAI has it for one of its own.
_CREATED = 1677610602
#: Its answer that costs nothing; ``/health`` sends a chat to every model instead (both measured).
_LIVELINESS, _ALIVE = "/health/liveliness", "I'm alive!"
#: Seconds within which a refused connection behind it comes back as an error (0.1 to 0.3 s, measured); one that was lost
#: after the server had begun to work mostly takes longer.
_REFUSED_WITHIN = 2.0
#: Providers whose models it knows by a table of its own and not by what is loaded (model_prices_and_context_window.json).
_BY_TABLE = ("ollama/", "ollama_chat/", "lm_studio/")
_NOT_THERE = re.compile(r"OpenAIException - Connection error|Cannot connect to host|All connection attempts failed", re.I)
_NONE_LEFT = re.compile(r"No deployments available for selected model", re.IGNORECASE)
_TIMED_OUT = re.compile(r"litellm\.Timeout: (?!Timeout Error)|Request timed out", re.IGNORECASE)
_WRONG_KEY = re.compile(r"no_db_connection|No connected db|token_not_found_in_db|LiteLLM Virtual Key expected", re.IGNORECASE)


class LiteLLM(Server):
    """Facts are what its configuration says, and its retries are switched off: they would multiply with ours."""

    name: ClassVar[str] = "litellm"
    lists: ClassVar[bool] = False  # without a key the list is a 401, or a 500 where its database's client is not installed
    locked: ClassVar[bool] = True
    sums: ClassVar[bool] = True  # vLLM may be behind it

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        listed = entries(models, "data")
        return any(entry.get("created") == _CREATED and entry.get("owned_by") == "openai" for entry in listed)

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        """By a word that it says to anybody; what it says of its models costs no request behind it but for their lists."""
        models = None
        with contextlib.suppress(Unanswered):  # the key is missing or wrong
            models = await ask.models()
        # It names no software; a proxy in front of it does.
        likely = ask.software in ("", "uvicorn") or (models is not None and cls.recognizes(models))
        if not likely or await ask.text(_LIVELINESS) != _ALIVE:
            return None
        told = None
        with contextlib.suppress(Unanswered):
            told = await ask.json("/model/info") if models is not None else None
        listed = [entry for entry in entries(models, "data") if entry.get("id") == model]
        deployments = [entry for entry in entries(told, "data") if entry.get("model_name") == model]
        return cls(_facts(listed, deployments), model)

    def extras(self) -> Mapping[str, Any]:
        """``num_retries`` overrules its configuration, and is not sent on (measured; its default is 2, so 3 requests)."""
        return {**super().extras(), **self.needed()}

    def needed(self) -> Mapping[str, Any]:
        return {"num_retries": 0}

    async def health(self, ask: Ask) -> Health:
        """Of the proxy alone: it has no free question about what is behind it."""
        return Health.LOADING if await ask.status(_LIVELINESS) == 503 else Health.UP

    def reread(self, failure: Failure, text: str, seconds: float, keyed: bool) -> Failure:
        """Its words for what is behind it, and for itself (all measured but the one for no deployments, which is its source)."""
        status = failure.response.status_code if failure.response is not None else None
        if failure.kind is Kind.OVERFLOW:
            return failure
        if _WRONG_KEY.search(text) or (status == 500 and not keyed and text.strip() == "Internal Server Error"):
            what = "LiteLLM's proxy does not know the API key" if keyed else "LiteLLM's proxy wants an API key"
            remedy = "Set the proxy's master_key, or one of the keys that it made."
            return replace(failure, kind=Kind.FATAL, error=errors.AccessDenied, what=what, remedy=remedy, setting="llm.api_key")
        if failure.kind is not Kind.TRANSIENT:
            return failure
        if _NONE_LEFT.search(text) or (_NOT_THERE.search(text) and seconds < _REFUSED_WITHIN):
            return replace(
                failure, kind=Kind.NOT_UP, error=errors.ServerUnavailable,
                what=f"LiteLLM's proxy reaches no server for the model {self._model} ({failure.what})",
                remedy="Start the server behind it, or correct its api_base in the proxy's config.yaml.",
                setting="llm.local.retry.wait_for_server",
            )  # fmt: skip
        if _TIMED_OUT.search(text):
            return replace(
                failure,
                remedy="That limit is the proxy's own: raise `timeout` and `stream_timeout` of the model below litellm_params, and "
                "`timeout` below router_settings, in its config.yaml (seconds; 6000 where none is set).",
                setting=None,
            )  # fmt: skip
        return failure

    def remedy_for_cache(self) -> str:
        """(Its routing is a random choice among the servers of one model name, docs.litellm.ai/docs/routing.)"""
        return (
            "LiteLLM spreads the calls over all servers of a model, and each has a cache of its own: give each server its own "
            "model_name, and roles of their own to each; and switch the cache on in the servers."
        )

    def remedy_for_slots(self) -> str:
        return "Let each server behind LiteLLM work on one request at a time."

    def _enlarge(self, window: int) -> str:
        """(docs.litellm.ai/docs/proxy/configs, model_info.)"""
        return (
            f"Give the server behind LiteLLM a context of at least {window} tokens, and write `max_input_tokens: {window}` below "
            "the model_info of the model in the proxy's config.yaml"
        )


def _facts(listed: list[Mapping[str, Any]], deployments: list[Mapping[str, Any]]) -> Facts:
    """The window of the smallest server, and a place for each one.

    ``max_input_tokens`` is what the configuration says, or else vLLM's own max_model_len, which LiteLLM asks for. For a
    name that a cloud's model has, too, it is that one's, which has a price: it says nothing of a server here.
    """
    windows: list[Optional[int]] = []
    for entry in deployments:
        info = _part(entry, "model_info")
        if info.get("input_cost_per_token") or str(_part(entry, "litellm_params").get("model")).startswith(_BY_TABLE):
            return Facts(slots=_places(deployments))
        windows.append(positive(info.get("max_input_tokens")))
    windows += [positive(entry.get("max_input_tokens")) for entry in listed]
    return Facts(window=min(filter(None, windows), default=None), slots=_places(deployments))


def _places(deployments: list[Mapping[str, Any]]) -> Optional[int]:
    """How many servers it has for the model; None where it does not tell."""
    return len({str(_part(entry, "litellm_params").get("api_base")) for entry in deployments}) or None


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = entry.get(key)
    return part if isinstance(part, Mapping) else {}
