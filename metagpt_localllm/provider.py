"""``LocalLLM``: the provider that MetaGPT makes for ``api_type: local_llm``.

Every way in (aask, aask_batch, acompletion, acompletion_text, aask_code) comes down to :meth:`LocalLLM._ask`
and from there to :func:`metagpt_localllm.call.complete`. Retries are there and nowhere else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Union
from weakref import WeakKeyDictionary

from metagpt.const import CONFIG_ROOT, METAGPT_ROOT
from metagpt.logs import log_llm_stream, logger
from metagpt.provider.openai_api import OpenAILLM
from openai import AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from metagpt_localllm import call as calls
from metagpt_localllm import events, progress, servers, session
from metagpt_localllm.caller import find_caller, find_retry_loop
from metagpt_localllm.closing import watch_for_failures
from metagpt_localllm.config_text import parsed
from metagpt_localllm.context import DEFAULT_WINDOW, window_is_a_guess, window_is_too_large
from metagpt_localllm.errors import LocalLLMError
from metagpt_localllm.policies import named
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.telling import log_to
from metagpt_localllm.tokens import estimate_prompt, estimate_text
from metagpt_localllm.transport import Endpoint, client_for, is_address

__all__ = ["LocalLLM"]

#: Errors of requests that a retry loop of MetaGPT's own has already sent: it gets the same error again. Copies, since
#: the traceback of what was raised would keep the loop alive.
_spent: WeakKeyDictionary[Any, dict[str, LocalLLMError]] = WeakKeyDictionary()
_warned: set[tuple[str, str]] = set()
_looked_at: set[Path] = set()


class LocalLLM(OpenAILLM):  # type: ignore[misc]
    """MetaGPT's OpenAI provider for servers that may take minutes to answer.

    Attributes:
        trims: what the latest call's prompt lost to fit the context window.

    Raises:
        ValueError: on construction, when ``base_url``, ``model``, ``api_key``, ``proxy`` or ``timeout`` in
            config2.yaml cannot be used.
    """

    def __init__(self, config: Any) -> None:
        _check(config)
        _check_policy(config)
        _warn_of_misplaced()
        super().__init__(config)
        self._settings: LocalSettings = config.local or LocalSettings()
        session.check_variable(self._settings.journal)
        watch_for_failures()
        progress.show(self._settings.progress, logger)
        if self._settings.telemetry.enabled:
            from metagpt_localllm import telemetry  # needs what is installed only where it is wanted

            telemetry.tell_by(logger.warning)
        self.trims: Sequence[events.Trimmed] = ()

    # ------------------------------------------------------------------ what stock sets up eagerly

    def _init_client(self) -> None:
        self.model = self.config.model
        self.pricing_plan = self.config.pricing_plan or self.model

    @property
    def aclient(self) -> AsyncOpenAI:
        """An openai client for what is no chat (moderation, speech, images); made per use, without retries."""
        return AsyncOpenAI(
            api_key=self.config.api_key,
            base_url=self.config.base_url,
            max_retries=0,
            http_client=client_for(self._endpoint()),
        )

    def with_model(self, model: str) -> LocalLLM:
        super().with_model(model)
        self.model = model
        return self

    def get_timeout(self, timeout: int) -> int:
        """Only what a caller asked for: ``llm.timeout`` is a cap of ours, not httpx's single number."""
        return timeout or 0

    # ------------------------------------------------------------------ the ways in

    async def acompletion_text(self, messages: list[dict[str, Any]], stream: bool = False, timeout: int = 0) -> str:
        """The answer's text; printed as it comes when ``stream``. ``timeout``: seconds for the whole call, 0 for none."""
        return (await self._ask(messages, {}, timeout, show=stream)).text

    async def _achat_completion_stream(self, messages: list[dict[str, Any]], timeout: int = 0) -> str:
        return (await self._ask(messages, {}, timeout, show=True)).text

    async def _achat_completion(self, messages: list[dict[str, Any]], timeout: int = 0) -> ChatCompletion:
        return (await self._ask(messages, {}, timeout)).completion

    async def acompletion(self, messages: list[dict[str, Any]], timeout: int = 0) -> ChatCompletion:
        return (await self._ask(messages, {}, timeout)).completion

    async def _achat_completion_function(
        self, messages: list[dict[str, Any]], timeout: int = 0, **chat_configs: Any
    ) -> ChatCompletion:
        return (await self._ask(self.format_msg(messages), chat_configs, timeout)).completion

    async def _ask(
        self, messages: list[dict[str, Any]], extra: dict[str, Any], timeout: float, show: bool = False
    ) -> calls.Outcome:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_token,
            **extra,
        }
        loop = find_retry_loop()
        spent = _spent.setdefault(loop, {}) if loop is not None else {}
        digest = _digest(body) if loop is not None else ""
        if digest in spent:
            logger.info("MetaGPT repeats a call that has already used up its attempts; it is not sent again.")
            raise copy.copy(spent[digest])
        call = calls.Call(
            endpoint=self._endpoint(),
            settings=self._settings,
            body=body,
            caller=find_caller(),
            context_length=self.config.context_length,
            attempt_cap=self.config.timeout if "timeout" in self.config.model_fields_set else None,
            call_timeout=timeout or None,
            compress_type=getattr(getattr(self.config, "compress_type", None), "value", ""),
            show=_print if show else _silent,
        )
        try:
            outcome = await calls.complete(call)
        except LocalLLMError as error:
            spent[digest] = copy.copy(error)
            raise
        finally:
            _warn_of_window(call)
        self.reasoning_content = outcome.reasoning or None
        self.trims = outcome.trims
        if not outcome.replayed:
            self._update_costs(outcome.usage)
        return outcome

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.config.base_url, self.model, self.config.api_key.strip(), self.config.proxy)

    # ------------------------------------------------------------------ tokens instead of dollars

    def _update_costs(
        self, usage: Union[dict[str, Any], BaseModel, None], model: Optional[str] = None, local_calc_usage: bool = True
    ) -> None:
        """Adds up tokens; a local model has no price."""
        if not (self.config.calc_usage and local_calc_usage and self.cost_manager and usage):
            return
        counts = usage.model_dump() if isinstance(usage, BaseModel) else usage
        self.cost_manager.total_prompt_tokens += int(counts.get("prompt_tokens") or 0)
        self.cost_manager.total_completion_tokens += int(counts.get("completion_tokens") or 0)

    def _calc_usage(self, messages: list[dict[str, Any]], rsp: str) -> CompletionUsage:
        prompt, answer = self.count_tokens(messages), estimate_text(rsp)
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)

    def count_tokens(self, messages: list[dict[str, Any]]) -> int:
        """An estimate on the safe side, without tiktoken, which would download its encodings."""
        return estimate_prompt(messages)

    def compress_messages(self, messages: list[dict[str, Any]], *_: Any, **__: Any) -> list[dict[str, Any]]:
        """MetaGPT 1.0.0's trimming by a table of windows: ours is exact, and follows ``compress_type``."""
        return messages

    def _get_max_tokens(self, messages: list[dict[str, Any]]) -> int:
        return int(self.config.max_token)

    # ------------------------------------------------------------------ images

    def support_image_input(self) -> bool:
        """Whether the loaded model sees images: the server's word, else MetaGPT's list of names, else yes."""
        server = servers.known(self._endpoint())
        if server is not None and server.facts.images is not None:
            return server.facts.images
        return True

    def _user_msg(self, msg: str, images: Optional[Union[str, list[str]]] = None) -> dict[str, Any]:
        if images and not self.support_image_input():
            logger.warning(f"{self.model} does not see images: {len([images]) if isinstance(images, str) else len(images)}"
                           " left out of the prompt.")  # fmt: skip
            images = None
        message: dict[str, Any] = self._user_msg_with_imgs(msg, images) if images else {"role": "user", "content": msg}
        return message


def _check(config: Any) -> None:
    """Refuses what could only fail at the first call, or would send prompts to where nobody meant them to go."""
    problem = ""
    if "base_url" not in config.model_fields_set or not config.base_url:
        problem = "base_url is missing: api_type local_llm needs the server's address, such as http://localhost:1234/v1"
    elif not is_address(config.base_url, "http", "https"):
        problem = "base_url is no address of the form http://host:port/v1"
    elif not config.model:
        problem = f"model is missing: it needs the model's name as the server lists it at {config.base_url}/models"
    elif not re.fullmatch(r"[\x21-\x7e]*", config.api_key.strip()):
        problem = "api_key holds characters that no HTTP header can carry, such as blanks or letters with accents"
    elif config.proxy and not is_address(config.proxy, "http", "https", "socks5", "socks5h"):
        problem = "proxy is no address of the form http://host:port"
    elif config.timeout < 0:
        problem = f"timeout is {config.timeout}; seconds cannot be negative"
    if problem:
        raise ValueError(f"config2.yaml: llm.{problem}")


def _check_policy(config: Any) -> None:
    """Not with the other settings: a policy's module may import MetaGPT, which reads them while it is being imported."""
    if config.local is not None:
        try:
            named(config.local.context.policy)
        except ValueError as error:
            raise ValueError(f"config2.yaml: llm.local.context.policy: {error}") from None


def _warn_of_misplaced() -> None:
    """A block ``local`` beside ``llm``, which MetaGPT drops without a word: said once."""
    for path in (METAGPT_ROOT / "config" / "config2.yaml", CONFIG_ROOT / "config2.yaml"):
        if path in _looked_at:
            continue
        _looked_at.add(path)
        try:
            written = parsed(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "local" in written:
            logger.warning(f"{path}: 'local' has no effect there; it belongs under llm (llm.local): indent it.")


def _silent(_text: str) -> None:
    """For callers that do not stream."""


def _print(text: str) -> None:
    """MetaGPT's own way of showing tokens; what the console cannot encode is replaced."""
    try:
        log_llm_stream(text)
    except UnicodeEncodeError as error:
        log_llm_stream(text.encode(error.encoding, "replace").decode(error.encoding))


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


def _warn_of_window(call: calls.Call) -> None:
    """Once, where nobody has said how large the window is, or what the configuration says is not so."""
    key = (call.endpoint.base_url, call.endpoint.model)
    too_large = window_is_too_large(call)
    if key in _warned or not (too_large or window_is_a_guess(call)):
        return
    _warned.add(key)
    logger.warning(
        too_large
        or f"{call.endpoint.address} does not say how large the context of {call.endpoint.model} is; assuming "
        f"{DEFAULT_WINDOW:,} tokens. Set llm.local.context.window in config2.yaml to what is loaded."
    )


session.tell_by(logger.warning)
_unsubscribe: Callable[[], None] = events.subscribe(log_to(logger))
