"""What tells the servers that people run apart: what each answers beside the chat, and how each chats.

As observed or read in the servers' code: llama.cpp b11549, Ollama 0.33, vLLM 0.32, llama-cpp-python 0.3.36, mlx-lm
0.32, transformers 5.23, LiteLLM 1.108, and SGLang, TabbyAPI, Ray Serve LLM and llama-swap (source only); LM Studio from its documentation and issues.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence
from urllib.parse import parse_qs, unquote

from metagpt_localllm.simulator.machine import Machine, render, tokenize

__all__ = [
    "DIALECTS", "DIALECTS_BY_NAME", "TOO_LONG", "Dialect", "Job", "State", "about", "clip", "left_by_ollama",
    "overflow", "prompt_of", "refusal",
]  # fmt: skip

#: What a server may do with a prompt over the context.
TOO_LONG = {
    "refused": "a 400",
    "sum": "a 400, also when it is only too long together with max_tokens",
    "cut": "its middle is left out without a word, and half the context remains (Ollama 0.33)",
    "clipped": "likewise, and the whole context remains (Ollama before 0.30)",
    "blank": "a 200 with its finish_reason and usage, and no token (LM Studio, llama.cpp's engine)",
    "broken": "a 400, and a 200 without a word in a stream (llama-cpp-python)",
    "reported": "a 200 with the error in it (LM Studio 0.4.21)",
    "": "nothing: no context is checked",
}
#: Tokens in front that Ollama keeps (num_keep).
_KEPT = 4
#: CodeLlama 34B, of which codebooga-34b is a mixture: its parameters, bytes as Q4_K_M, and metadata.
_PARAMETERS, _WEIGHTS = 33_743_970_304, 20_219_900_000
_SHAPE = {
    "general.parameter_count": _PARAMETERS, "llama.block_count": 48, "llama.embedding_length": 8192,
    "llama.attention.head_count": 64, "llama.attention.head_count_kv": 8,
}  # fmt: skip
#: Bytes of keys and values per token of context: 2 of 48 layers, 8 heads and 128 numbers of 2 bytes.
_KEYS_AND_VALUES = 2 * 48 * 8 * 128 * 2
#: The numbers of the tokens that vLLM was asked for.
_vocabulary: dict[str, int] = {}


@dataclass(frozen=True)
class Dialect:
    """One kind of server.

    Attributes:
        name: of it.
        owner: ``owned_by`` in the list of models.
        software: the ``server`` header.
        early: whether the headers of a stream come before its first token.
        done: whether a stream ends with ``[DONE]``.
        usage: in a stream: "asked" for with stream_options, "always" (with the finish_reason), or "never".
        cached: whether usage tells the tokens that came from the prefix cache.
        progress: how the prefill shows: "events", "comments", or "".
        continues: an assistant's message at the end: "always" continued, only when "asked", by a "prefix" beside the
            messages, or never ("").
        repeats: whether a continued answer has the beginning in front again where it is not streamed.
        too_long: what becomes of a prompt over the context, one of TOO_LONG.
        strict: fields that it refuses with 422.
        interrupted: whether a second request for the model ends the stream that runs.
        stops: whether a client that leaves stops the work: "both", or only a "stream".
        loads_on_demand: whether the first request for the model loads it.
        aborts_load: whether the load ends when that client leaves.
        bare: whether it answers at the same paths without ``/v1``, too.
        answers_while_loading: whether a chat during the load waits; else it is refused with 503.
    """

    name: str
    owner: Optional[str] = None
    software: str = ""
    early: bool = True
    done: bool = True
    usage: str = "asked"
    cached: bool = True
    progress: str = ""
    continues: str = ""
    repeats: bool = False
    too_long: str = "refused"
    strict: frozenset[str] = frozenset()
    interrupted: bool = False
    stops: str = "both"
    loads_on_demand: bool = False
    aborts_load: bool = False
    bare: bool = False
    answers_while_loading: bool = True


_LLAMA_CPP: dict[str, Any] = {
    "software": "llama.cpp", "progress": "events", "continues": "always", "repeats": True,
}  # fmt: skip
_VLLM: dict[str, Any] = {"software": "uvicorn", "too_long": "sum", "continues": "asked", "cached": False}

DIALECTS_BY_NAME: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("llama.cpp", "llamacpp", bare=True, answers_while_loading=False, **_LLAMA_CPP),
        Dialect("llama.cpp-router", "llamacpp", bare=True, loads_on_demand=True, **_LLAMA_CPP),
        Dialect("llama-swap", "llama-swap", loads_on_demand=True, **_LLAMA_CPP),
        Dialect("ollama", "library", early=False, cached=False, too_long="cut", loads_on_demand=True, aborts_load=True),
        Dialect("lmstudio", "organization_owner", too_long="blank", loads_on_demand=True),
        Dialect("vllm", "vllm", **_VLLM),
        Dialect("ray-serve", "organization-owner", **_VLLM),
        Dialect("sglang", "sglang", **_VLLM),
        Dialect("tabbyapi", "tabbyAPI", **{**_VLLM, "continues": "prefix"}),
        Dialect(
            "llama-cpp-python", "me", "uvicorn", usage="never", cached=False, too_long="broken", interrupted=True,
            stops="stream",
        ),  # fmt: skip
        # vLLM behind it; what LiteLLM makes of faults is in tests/test_litellm.py.
        Dialect("litellm", "openai"),
        Dialect("mlx-lm", None, "BaseHTTP/0.6 Python/3.11.7", progress="comments", too_long="", stops="stream"),
        Dialect(
            "transformers", None, "uvicorn", done=False, usage="always", cached=False, too_long="", stops="stream",
            strict=frozenset({"return_progress", "continue_final_message", "add_generation_prompt", "cache_prompt",
                              "timings_per_token", "num_ctx", "keep_alive", "options", "response_prefix"}),
        ),  # fmt: skip
        Dialect("plain", "someone", bare=True),
    )
}
#: The names of the dialects.
DIALECTS = tuple(DIALECTS_BY_NAME)


@dataclass
class Job:
    """One chat request, counted from 1: the tokens of its prompt, and how many of them were processed, those from the cache
    included; and those of its answer until now."""

    number: int
    prompt: int
    cached: int = 0
    processed: int = 0
    decoded: int = 0

    @property
    def spent(self) -> int:
        """Tokens that the machine has worked for."""
        return self.processed - self.cached + self.decoded


@dataclass(frozen=True)
class State:
    """What the server knows of itself when it is asked.

    Attributes:
        machine: that it runs on.
        model: its model.
        loaded: "no", "loading" or "yes".
        jobs: in its slots.
        tells_window: whether it says how large its context is.
    """

    machine: Machine
    model: str
    loaded: str
    jobs: Sequence[Job]
    tells_window: bool = True

    def window(self, key: str) -> dict[str, int]:
        """The field that tells the context in tokens, where it does."""
        return {key: self.machine.context} if self.tells_window else {}


def about(dialect: Dialect, target: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    """The answer to a question beside the chat; None where there is none of that path."""
    path, _, query = target.partition("?")
    if path == "/v1/models" or (path == "/models" and dialect.bare):
        return _models(dialect, state)
    if dialect.name == "llama.cpp":
        return _llama_cpp(path, body, state)
    if dialect.name == "llama.cpp-router":
        return _router(path, parse_qs(query), body, state)
    if dialect.name == "llama-swap":
        return _llama_swap(unquote(path), body, state)
    answer = {
        "ollama": _ollama,
        "lmstudio": _lm_studio,
        "vllm": _vllm,
        "ray-serve": _vllm,
        "sglang": _vllm,
        "tabbyapi": _tabby,
        "litellm": _litellm,
        "mlx-lm": _health,
        "transformers": _transformers,
    }.get(dialect.name)
    return answer(path, body, state) if answer is not None else None


def _models(dialect: Dialect, state: State) -> Any:
    entry: dict[str, Any] = {"id": state.model, "object": "model", "created": 0}
    if dialect.owner is not None:
        entry["owned_by"] = dialect.owner
    name = dialect.name
    if name == "llama.cpp":
        entry.update(meta={**state.window("n_ctx"), "n_ctx_train": 16384, "ftype": "Q4_K - Medium",
                           "n_params": _PARAMETERS, "size": _WEIGHTS})
    elif name in ("llama.cpp-router", "llama-swap"):
        entry.update(status={"value": {"yes": "loaded", "no": "unloaded"}.get(state.loaded, "loading")})
        if name == "llama.cpp-router" and state.loaded == "yes":
            entry.update(meta={**state.window("n_ctx"), "n_ctx_train": 16384})
    elif name in ("vllm", "sglang"):
        entry.update(**state.window("max_model_len"), root=state.model)
    elif name == "ray-serve":
        entry.update(metadata={"model_id": state.model, **state.window("max_request_context_length")})
    elif name == "llama-cpp-python":
        entry.update(permissions=[])
    elif name == "litellm":
        entry.update(created=1677610602, **state.window("max_input_tokens"))
    if name == "transformers":
        return {"object": "list", "data": []}
    return {"object": "list", "data": [entry]}


def _health(path: str, _body: Mapping[str, Any], _state: State) -> Optional[Any]:
    return {"status": "ok"} if path in ("/health", "/v1/health") else None


def _llama_cpp(path: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    machine = state.machine
    if path == "/props":
        return {
            "default_generation_settings": {"params": {}, **state.window("n_ctx")},
            "total_slots": machine.slots,
            "model_alias": state.model,
            "model_ftype": "Q4_K - Medium",
            "modalities": {"vision": False, "audio": False},
            "build_info": "simulated",
            "is_sleeping": False,
        }
    if path == "/slots":
        slots: list[dict[str, Any]] = []
        for number in range(machine.slots):
            slot: dict[str, Any] = {"id": number, **state.window("n_ctx"), "is_processing": number < len(state.jobs)}
            if number < len(state.jobs):
                job = state.jobs[number]
                slot.update(
                    id_task=job.number, n_prompt_tokens=job.prompt, n_prompt_tokens_processed=job.processed,
                    next_token=[{"has_next_token": True, "n_remain": -1, "n_decoded": job.decoded}],
                )  # fmt: skip
            slots.append(slot)
        return slots
    if path == "/apply-template":
        return {"prompt": "".join(prompt_of(DIALECTS_BY_NAME["llama.cpp"], body)[0])}
    if path == "/v1/chat/completions/input_tokens":
        return {"input_tokens": len(_rendered(body)), "object": "response.input_tokens"}
    if path == "/tokenize":
        return {"tokens": list(range(len(tokenize(str(body.get("content", ""))))))}
    return _health(path, body, state)


def _router(path: str, query: Mapping[str, list[str]], body: Mapping[str, Any], state: State) -> Optional[Any]:
    named = body.get("model") or "".join(query.get("model", ()))
    if path == "/props" and not named:
        return {"role": "router", "model_path": "none", "default_generation_settings": {"params": None, "n_ctx": 0}}
    if path == "/health":
        return {"status": "ok"}
    return _llama_cpp(path, body, state) if named == state.model and state.loaded == "yes" else None


def _llama_swap(path: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    if path == "/running":
        running = {"model": state.model, "state": "ready" if state.loaded == "yes" else "starting"}
        return {"running": [running] if state.loaded != "no" else []}
    below = f"/upstream/{state.model}"
    return _llama_cpp(path[len(below) :], body, state) if path.startswith(below) and state.loaded == "yes" else None


def _ollama(path: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    details = {"format": "gguf", "family": "llama", "parameter_size": "34B", "quantization_level": "Q4_K_M"}
    if path == "/api/version":
        return {"version": "0.33.0" if state.tells_window else "0.9.6"}
    if path == "/api/show" and body.get("model") == state.model:
        info = {"general.architecture": "llama", "llama.context_length": 16384, **_SHAPE}
        return {"details": details, "model_info": info, "capabilities": ["completion"]}
    if path == "/api/tags":
        return {"models": [{"name": state.model, "model": state.model, "details": details, "size": _WEIGHTS}]}
    if path == "/api/ps":
        size = _WEIGHTS + _KEYS_AND_VALUES * state.machine.context
        entry: dict[str, Any] = {"name": state.model, "model": state.model, "details": details, "size": size}
        if state.loaded == "loading":
            none_yet = dict.fromkeys(state.window("context_length"), 0)
            entry.update(size_vram=0, expires_at=f"{time.time() + 300:.6f}", **none_yet)
        elif state.loaded == "yes":
            entry.update(size_vram=int(size * state.machine.gpu_share), expires_at="2026-01-01T00:00:00Z", **state.window("context_length"))
        return {"models": [entry] if state.loaded != "no" else []}
    return None


def _lm_studio(path: str, _body: Mapping[str, Any], state: State) -> Optional[Any]:
    if path != "/api/v1/models" or not state.tells_window:
        return None
    config = {"context_length": state.machine.context, "parallel": state.machine.slots}
    instances = [{"id": state.model, "config": config}] if state.loaded == "yes" else []
    entry = {"type": "llm", "key": state.model, "loaded_instances": instances, "max_context_length": 16384,
             "quantization": {"name": "Q4_K_M", "bits_per_weight": 4}, "size_bytes": _WEIGHTS, "capabilities": {"vision": False}}  # fmt: skip
    return {"models": [entry]}


def _vllm(path: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    if path == "/tokenize":
        tokens, _ = prompt_of(DIALECTS_BY_NAME["vllm"], body)
        numbers = [_vocabulary.setdefault(token, len(_vocabulary)) for token in tokens]
        return {"count": len(tokens), **state.window("max_model_len"), "tokens": numbers}
    if path == "/detokenize":
        pieces = {number: token for token, number in _vocabulary.items()}
        return {"prompt": "".join(pieces.get(number, "") for number in body.get("tokens") or ())}
    if path == "/version":
        return {"version": "0.32.0"}
    return _health(path, body, state)


def _tabby(path: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    if path == "/v1/model":
        parameters = {**state.window("max_seq_len"), "max_batch_size": state.machine.slots, "use_vision": False}
        return {"id": state.model, "owned_by": "tabbyAPI", "parameters": parameters, "meta": {"n_ctx_train": 16384}}
    return _health(path, body, state)


def _litellm(path: str, _body: Mapping[str, Any], state: State) -> Optional[Any]:
    if path == "/model/info":
        behind = {"api_base": "http://127.0.0.1:9/v1", "model": f"openai/{state.model}"}
        info = {"id": "64b2", "key": f"openai/{state.model}", "litellm_provider": "openai", "max_input_tokens": None}
        return {"data": [{"model_name": state.model, "litellm_params": behind, "model_info": info}]}
    if path == "/health":  # the real one sends a chat to every model for this
        return {"healthy_endpoints": [{"model": state.model}], "unhealthy_endpoints": [], "healthy_count": 1}
    return "I'm alive!" if path == "/health/liveliness" else None


def _transformers(path: str, body: Mapping[str, Any], state: State) -> Optional[Any]:
    if path == "/openapi.json":
        paths = ("/v1/chat/completions", "/load_model", "/reset", "/v1/models", "/health")
        return {"openapi": "3.1.0", "info": {"title": "FastAPI", "version": "0.1.0"}, "paths": {p: {} for p in paths}}
    return _health(path, body, state)


def _rendered(body: Mapping[str, Any]) -> list[str]:
    return render(body.get("messages") or (), body.get("tools"))


def prompt_of(dialect: Dialect, body: Mapping[str, Any]) -> tuple[list[str], Optional[str]]:
    """The tokens of the prompt, and the beginning of the answer that is to be continued."""
    messages: list[Mapping[str, Any]] = body.get("messages") or []
    partial: Optional[str] = None
    if dialect.continues == "prefix":
        given = body.get("response_prefix")
        partial = str(given) if given else None
    elif dialect.continues and messages and messages[-1].get("role") == "assistant":
        if dialect.continues == "always" or body.get("continue_final_message"):
            partial, messages = str(messages[-1].get("content") or ""), messages[:-1]
    return render(messages, body.get("tools")) + (tokenize(partial) if partial else []), partial


def refusal(dialect: Dialect, body: Mapping[str, Any]) -> Optional[tuple[int, dict[str, Any]]]:
    """Status and body for a request whose fields it does not take."""
    unknown = dialect.strict & set(body)
    if unknown:
        return 422, {"detail": f"Unexpected fields in the request: {unknown}"}
    both = body.get("continue_final_message") and body.get("add_generation_prompt", True)
    if both and dialect.continues in ("always", "asked"):
        message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
    return None


def left_by_ollama(body: Mapping[str, Any], context: int) -> Mapping[str, Any]:
    """The request without the oldest messages, as many as it takes to fit; the system's and the last one always stay.

    (server/prompt.go, chatPrompt; the tools stay too.)
    """
    messages: list[Mapping[str, Any]] = list(body.get("messages") or [])
    for first in range(len(messages)):
        kept = [message for message in messages[:first] if message.get("role") == "system"] + messages[first:]
        if first == len(messages) - 1 or len(render(kept, body.get("tools"))) <= context:
            return {**body, "messages": kept}
    return body


def clip(tokens: list[str], context: int, *, halved: bool) -> list[str]:
    """A prompt that fills the context without its middle: its first four tokens and its end.

    ``halved``: half the context remains (of 4,096 tokens 2,050), which leaves room for an answer: Ollama 0.33
    (llm/llama_server.go, completionPromptForRequest). Before 0.30 the whole context remained (runner.go, NewSequence).
    """
    if len(tokens) < context or (len(tokens) == context and not halved):
        return tokens
    keep = min(_KEPT, context - 1)
    size = context - (context - keep) // 2 if halved else context
    return tokens[:keep] + tokens[len(tokens) - (size - keep) :]


def overflow(dialect: Dialect, prompt: int, wanted: int, context: int) -> Optional[dict[str, Any]]:
    """The error body for a prompt that does not fit, in the words of each server."""
    if not dialect.too_long or prompt + (wanted if dialect.too_long == "sum" else 1) <= context:
        return None
    if dialect.name in ("vllm", "ray-serve", "sglang", "tabbyapi"):
        message = (
            f"This model's maximum context length is {context} tokens. However, you requested {wanted} output tokens and "
            f"your prompt contains {prompt} input tokens, for a total of {prompt + wanted} tokens."
        )
        return {"error": {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}}
    if dialect.name == "llama-cpp-python":
        message = (
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + wanted} tokens "
            f"({prompt} in the messages, {wanted} in the completion)."
        )
        return {"error": {"message": message, "type": "invalid_request_error", "param": "messages",
                          "code": "context_length_exceeded"}}  # fmt: skip
    if dialect.name == "lmstudio" and dialect.too_long == "reported":
        message = (
            f"Input does not fit in context length. The input has {prompt} tokens, but the context length only "
            f"supports {context} tokens."
        )
        return {"error": {"message": message}, "message": message}
    if dialect.name == "lmstudio":
        return {"error": "The number of tokens to keep from the initial prompt is greater than the context length "
                         f"(n_keep: {prompt}>= n_ctx: {context})."}  # fmt: skip
    message = f"request ({prompt} tokens) exceeds the available context size ({context} tokens), try increasing it"
    if dialect.name == "litellm":
        message = (
            f"litellm.ContextWindowExceededError: litellm.BadRequestError: ContextWindowExceededError: OpenAIException - {message}"
            "\nmodel=m. context_window_fallbacks=None. fallbacks=None."
        )
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "400"}}
    error = {"error": {"code": 400, "message": message, "type": "exceed_context_size_error",
                       "n_prompt_tokens": prompt, "n_ctx": context}}  # fmt: skip
    if dialect.name == "ollama":  # where the model has llama.cpp's own template
        return {"error": {"message": json.dumps(error), "type": "invalid_request_error", "param": None, "code": None}}
    return error
