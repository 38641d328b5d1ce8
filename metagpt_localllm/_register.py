"""Puts ``local_llm`` into MetaGPT: a member of LLMType, the field ``local`` of LLMConfig, the provider.

Every touch on MetaGPT's internals outside ``provider.py`` and ``caller.py`` is here;
``tests/test_metagpt_internals.py`` fails when one of them moves.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Optional

from aenum import extend_enum
from pydantic import ValidatorFunctionWrapHandler, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import core_schema
from typing_extensions import Annotated

from metagpt_localllm.settings import LocalSettings

__all__ = ["extend_config", "register_provider"]

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


def extend_config(module: ModuleType) -> None:
    """Extends ``metagpt.configs.llm_config``. Idempotent."""
    kinds, config = module.LLMType, module.LLMConfig
    if "LOCAL_LLM" not in kinds.__members__:
        extend_enum(kinds, "LOCAL_LLM", "local_llm")
    if "local" not in config.model_fields:
        annotation = Annotated[Optional[LocalSettings], WrapValidator(_only_for_local_llm)]
        config.__annotations__["local"] = annotation
        config.model_fields["local"] = FieldInfo.from_annotated_attribute(annotation, None)  # type: ignore[arg-type]
    config.model_rebuild(force=True)
    for name, holder in _HOLDERS:
        late = getattr(sys.modules.get(name), holder, None)
        if late is not None:
            late.model_rebuild(force=True)


def register_provider(module: ModuleType) -> None:
    """Registers our provider once ``metagpt.provider.openai_api``, which it extends, is there. Idempotent."""
    from metagpt_localllm.provider import LocalLLM

    kinds = sys.modules["metagpt.configs.llm_config"].LLMType
    sys.modules["metagpt.provider.llm_provider_registry"].LLM_REGISTRY.register(kinds.LOCAL_LLM, LocalLLM)
