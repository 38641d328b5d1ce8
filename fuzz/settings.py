"""The text of a config2.yaml: as ``check`` reads it, as it is changed, and ``llm.local`` as MetaGPT's reading gives it to us."""

from __future__ import annotations

import logging

from pydantic import ValidationError

from fuzz.invariants import fits_a_line
from metagpt_localllm.checking import config_problems
from metagpt_localllm.config_text import YamlProblem, parsed, with_values
from metagpt_localllm.deadlines import plan_deadlines
from metagpt_localllm.settings import LocalSettings, refuse_misplaced
from metagpt_localllm.tiers import Caller, choose_tier

logging.getLogger("asyncio").setLevel(logging.ERROR)
KNOWN = ["api_key", "api_type", "base_url", "model", "proxy", "timeout", "max_token", "temperature", "local"]


def check(data: bytes) -> None:
    """The whole is the file."""
    try:
        text = data.decode("utf-8")
        content = parsed(text)
    except UnicodeDecodeError:
        return
    except YamlProblem as problem:
        fits_a_line(problem.reason)
        return
    if isinstance(content.get("llm"), dict):
        for problem in config_problems(content):
            fits_a_line(problem)
        _settings(content["llm"].get("local"))
        try:
            refuse_misplaced(content["llm"], KNOWN)
        except ValidationError as error:
            _complaints(error)
    else:
        _settings(content)
    try:
        changed = with_values(text, {"llm.local.timeouts.total": "2h", "llm.local.server": "ollama"})
        assert parsed(changed)["llm"]["local"]["timeouts"]["total"] == "2h"
    except YamlProblem as problem:
        fits_a_line(problem.reason)


def _complaints(error: ValidationError) -> None:
    for problem in error.errors():
        fits_a_line(problem["msg"])
        assert len(str(problem["loc"])) < 1500


def _settings(local: object) -> None:
    try:
        settings = LocalSettings.model_validate(local)
    except ValidationError as error:
        _complaints(error)
        return
    tier = choose_tier(settings.tiers, Caller("WriteCode", "Engineer", "Engineer"), model="m", prompt_tokens=9, has_tools=False)
    deadlines = plan_deadlines(settings.timeouts, tier, None)
    assert 0 < deadlines.connect < 1e11 and 0 < deadlines.total < 1e11
    assert LocalSettings.model_validate(settings.model_dump()) == settings
    window = settings.context.window
    assert window == "auto" or 0 < window * settings.context.low_water < 1e11


def seeds() -> list[bytes]:
    """Where coverage begins."""
    llm = "llm: {api_type: local_llm, base_url: 'http://127.0.0.1:9/v1', model: m, api_key: sk-0123456789abcdef"
    local = """llm:
  api_type: local_llm
  base_url: http://127.0.0.1:1234/v1
  model: m  # a comment
  local:
    timeouts: {connect: 5s, first_token: auto, stall: 1m30s, total: 2h}
    tiers:
    - name: code
      match: {action: [Write*, '[z-a]'], min_prompt_tokens: 1, max_prompt_tokens: 9, tools: true}
      total: 90
    retry: {attempts: 4, backoff: {initial: 1, max: 60}, wait_for_server: 10m}
    context: {window: 4096, reserve: 512, policy: oldest, low_water: 0.6, oversized: cut}
    journal: {enabled: true, path: ~/x, resume: never, keep: {age: 30d, size: 1GB}}
    progress: off
    telemetry: {enabled: false, endpoint: 'http://localhost:4318', content: false}
    server: llama.cpp
    concurrency: 2
"""
    others = ["", "a: &a [*a]", "a: &a [b]\nc: [*a, *a]", "? [a]\n: b", "a: 2024-99-99", "a: !!int x", "- a", "a:\n\tb", 'a: "\\ud800"',
              f"{llm}, local: {{retry: {{attempts: {'9' * 30}}}}}}}", f"{llm}, api_kye: sk-0123456789abcdef}}",
              "timeouts: {total: 9e9}\njournal: {keep: {size: 99999999999GB}, path: ~nobody/x}", llm + "}\nmodels: {a: {}}\nroles: [a]"]  # fmt: skip
    return [text.encode() for text in (local, llm + "}", *others)]
