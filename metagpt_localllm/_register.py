"""Puts ``local_llm`` into MetaGPT: a member of LLMType, the field ``local`` of LLMConfig, the provider.

Every touch on MetaGPT's internals outside ``provider.py`` and ``caller.py`` is here;
``tests/test_metagpt.py`` fails when one of them moves.
"""

from __future__ import annotations

import functools
import sys
import warnings
from importlib import metadata
from types import ModuleType
from typing import Any, Optional

from aenum import extend_enum
from pydantic import ValidatorFunctionWrapHandler, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import core_schema
from typing_extensions import Annotated

from metagpt_localllm.settings import LocalSettings, refuse_misplaced

__all__ = ["SUPPORTED", "extend_config", "register_provider", "watch_environment"]

#: The versions of MetaGPT that the tests run with.
SUPPORTED = ("0.8.2", "1.0.0")

#: Models of MetaGPT that hold an LLMConfig and may have compiled their validators before us.
_HOLDERS = (
    ("metagpt.configs.models_config", "ModelsConfig"),
    ("metagpt.configs.role_custom_config", "RoleCustomConfig"),
    ("metagpt.config2", "Config"),
)


def _only_for_local_llm(
    value: Any, handler: ValidatorFunctionWrapHandler, info: core_schema.ValidationInfo
) -> Optional[LocalSettings]:
    """Other api_types ignore keys they do not know, as MetaGPT always did."""
    api_type = (info.data or {}).get("api_type")
    if getattr(api_type, "value", api_type) != "local_llm":
        return None
    settings: LocalSettings = handler(LocalSettings() if value is None else value)
    return settings


def _with_checked_keys(config: Any, source: Any, handler: Any) -> core_schema.CoreSchema:
    """LLMConfig's schema, which drops unknown keys without a word, behind a look at those that were meant for us."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and getattr(value.get("api_type"), "value", value.get("api_type")) == "local_llm":
            refuse_misplaced(value, list(config.model_fields))
        return value

    return core_schema.no_info_before_validator_function(check, handler(source))


def extend_config(module: ModuleType) -> None:
    """Extends ``metagpt.configs.llm_config``. Idempotent."""
    _warn_of_other_versions()
    kinds, config = module.LLMType, module.LLMConfig
    if "LOCAL_LLM" not in kinds.__members__:
        extend_enum(kinds, "LOCAL_LLM", "local_llm")
    if "local" not in config.model_fields:
        annotation = Annotated[Optional[LocalSettings], WrapValidator(_only_for_local_llm)]
        config.__annotations__["local"] = annotation
        config.model_fields["local"] = FieldInfo.from_annotated_attribute(annotation, None)  # type: ignore[arg-type]
        config.__get_pydantic_core_schema__ = classmethod(_with_checked_keys)
        config.model_rebuild(force=True)
    for name, holder in _HOLDERS:
        late = getattr(sys.modules.get(name), holder, None)
        if late is not None:
            late.model_rebuild(force=True)


def _warn_of_other_versions() -> None:
    try:
        version = metadata.version("metagpt")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return
    if version not in SUPPORTED:
        warnings.warn(
            f"metagpt-localllm is tested with MetaGPT {' and '.join(SUPPORTED)}; this is {version}, which may differ.",
            stacklevel=2,
        )


def register_provider(module: ModuleType) -> None:
    """Registers our provider once ``metagpt.provider.openai_api``, which it extends, is there. Idempotent."""
    from metagpt_localllm.provider import LocalLLM

    kinds = sys.modules["metagpt.configs.llm_config"].LLMType
    sys.modules["metagpt.provider.llm_provider_registry"].LLM_REGISTRY.register(kinds.LOCAL_LLM, LocalLLM)


def watch_environment(module: ModuleType) -> None:
    """Notices that a team's run ends by an exception, which Team.run swallows. Idempotent."""
    environment = module.Environment
    if hasattr(environment.run, "metagpt_localllm"):
        return
    original = environment.run

    @functools.wraps(original)
    async def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, *args, **kwargs)
        except BaseException as error:
            from metagpt_localllm import closing  # not while MetaGPT is imported, which need not wait for it

            closing.broke_off(error)
            raise

    run.metagpt_localllm = True  # type: ignore[attr-defined]
    environment.run = run
