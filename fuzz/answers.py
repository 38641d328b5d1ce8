"""What a server answers: the status, headers and body of an error, and the JSON of every question that servers/ asks."""

from __future__ import annotations

import asyncio
import atexit
import json
from dataclasses import fields
from typing import Any, Mapping, Optional

import httpx

from fuzz.invariants import KEY, REQUEST, fits_a_line, is_a_count
from metagpt_localllm.failures import from_exception, from_response
from metagpt_localllm.servers import KINDS, Server
from metagpt_localllm.servers.base import Ask, Unanswered, json_of
from metagpt_localllm.transport import Endpoint

_LOOP = asyncio.new_event_loop()
atexit.register(_LOOP.close)
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 99}


class _Told(Ask):
    """Gives the answers of the fuzzer, one after the other, as the real one reads them off a socket."""

    def __init__(self, answers: list[bytes], software: str) -> None:
        super().__init__(Endpoint("http://127.0.0.1:1/v1", "m", KEY))
        self._answers, self.software, self._asked = answers, software, 0

    async def _answer(self, path: str, body: Optional[Mapping[str, Any]]) -> Any:
        json.dumps(body, default=str)
        self._asked += 1
        said = self._answers[self._asked % len(self._answers)]
        if said[:1] == b"!":
            raise Unanswered("500")
        return json_of(said)

    async def status(self, path: str) -> int:
        return 503 if self._answers[0][:1] == b"!" else 200


def check(data: bytes) -> None:
    """The first byte chooses a status, the second a kind of server; lines are the answers to its questions."""
    if len(data) < 3:
        return
    _error(data[0], data[2:])
    _LOOP.run_until_complete(_questions(KINDS[data[1] % len(KINDS)], data[2:].split(b"\n"), data[1] >= 128))


def _error(which: int, body: bytes) -> None:
    status = (100, 204, 301, 400, 401, 403, 404, 408, 413, 422, 429, 500, 501, 502, 503, 599)[which % 16]
    headers = [(b"retry-after", body[:40]), (b"date", b"Wed, 25 Nov 2026 10:00:00 GMT"), (b"location", body)]
    headers += [(b"content-type", b"text/html")] if which >= 128 else []
    failure = from_response(httpx.Response(status, headers=headers, request=REQUEST), body.decode("utf-8", "replace"), KEY)
    fits_a_line(failure.what)
    assert failure.retry_after is None or 0 <= failure.retry_after < float("inf")
    for number in (failure.window, failure.prompt_tokens):
        assert number is None or is_a_count(number)
    fits_a_line(from_exception(httpx.RemoteProtocolError(body.decode("latin-1")), "http://h/v1", bool(which & 1), KEY).what)


async def _questions(kind: type[Server], answers: list[bytes], other: bool) -> None:
    ask = _Told(answers, "BaseHTTP/0.6" if other else "")
    try:
        models = await ask.models()
        if models is not None:
            for any_kind in KINDS:
                any_kind.recognizes(models)
        server = await kind.identify(ask, "m") or kind()
    except Unanswered:
        server = kind()
    for field in fields(server.facts):
        value = getattr(server.facts, field.name)
        assert not isinstance(value, str) or (len(value) < 200 and value.isprintable()), field.name
        assert not isinstance(value, int) or is_a_count(value), field.name
    assert server.facts.gpu_share is None or 0 <= server.facts.gpu_share <= 1
    assert is_a_count(server.places)
    for question in (server.work(ask), server.count_tokens(ask, BODY), server.anatomy(ask), server.proves(ask, BODY, "a beginning"),
                     server.health(ask), server.load(ask, "m")):  # fmt: skip
        try:
            await question
        except Unanswered:
            pass
    server.remedy(4096), server.continuation(BODY, "a beginning", 3), server.extras()


def seeds() -> list[bytes]:
    """Where coverage begins: a list of models and the other answers of each kind of server."""
    about: list[list[object]] = [
        [{"data": [{"id": "m", "owned_by": "llamacpp", "aliases": ["a"], "meta": {"n_ctx_train": 9, "size": 5, "n_params": 7}}]},
         {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 2, "build_info": "b11549-x", "modalities": {"vision": True}},
         [{"is_processing": True, "id_task": 1, "next_token": [{}]}], {"input_tokens": 5}, {"prompt": "hello"}, {"tokens": [1, 2]}],
        [{"data": [{"id": "m", "owned_by": "llama-swap"}]}, {"running": [{"model": "m", "state": "ready"}]}],
        [{"version": "0.33", "data": [{"owned_by": "library"}]},
         {"models": [{"name": "m", "size": 9, "size_vram": 5, "context_length": 4096, "details": {"quantization_level": "Q4"}}]},
         {"model_info": {"general.architecture": "x", "x.context_length": 9, "x.block_count": 3, "x.attention.head_count": [1, 2]},
          "capabilities": ["vision"], "details": {"quantization_level": "Q4"}}],
        [{"models": [{"key": "m", "loaded_instances": [{"id": "m", "config": {"context_length": 9, "parallel": 4}}],
                      "quantization": {"name": "Q4"}, "capabilities": {"vision": True}, "max_context_length": 99}]}],
        [{"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]}, {"tokens": [1, 2], "count": 2, "prompt": "a"}],
        [{"data": [{"id": "m", "owned_by": "tabbyAPI"}]}, {"parameters": {"max_seq_len": 9, "use_vision": True}, "meta": {"n_ctx_train": 9}}],
        [{"status": "ok"}, {"paths": {"/load_model": {}}}], [{"role": "router", "default_generation_settings": {}}],
    ]  # fmt: skip
    lines = [b"\n".join(json.dumps(answer).encode() for answer in answers) for answers in about]
    said = [bytes([number, number]) + text for number, text in enumerate(lines)] + [bytes([128 + n, 128 + n]) + t for n, t in enumerate(lines)]
    errors: list[object] = [{"error": {"message": f"no: {KEY}", "code": 400}}, {"detail": [{"loc": ["a"], "msg": "b"}]}, {"error": "Model is unloaded."},
                            {"message": "maximum context length is 4096, n_prompt_tokens: 99"}, [[[]]], "Loading model"]  # fmt: skip
    return said + [bytes([14, 0]) + json.dumps(error).encode() for error in errors] + [b"\x00\x00<html>", b"\x0e\x00Wed, 25 Nov 2026 10:00:00 +0000", b"\x05\x05!\n!"]
