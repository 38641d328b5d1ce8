"""Waits for MetaGPT's own modules to be imported, and then adds this package's provider to them.

``metagpt_localllm.pth`` imports this package when ``metagpt`` itself is looked for, and not before;
``import metagpt_localllm`` does the same by hand. MetaGPT validates config2.yaml while it is being
imported, so nothing later than the execution of ``metagpt.configs.llm_config`` is early enough.

Standard library only at import. ``METAGPT_LOCALLLM_DISABLE=1`` turns all of it off.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Optional, Sequence

__all__ = ["TARGETS", "Finder", "activate", "disabled"]

#: Module of MetaGPT: name of the function in ``_register`` that extends it.
TARGETS = {
    "metagpt.configs.llm_config": "extend_config",
    "metagpt.provider.openai_api": "register_provider",
    "metagpt.environment.base_env": "watch_environment",
}


def disabled() -> bool:
    """Whether METAGPT_LOCALLLM_DISABLE is set to anything but nothing and 0."""
    return os.environ.get("METAGPT_LOCALLLM_DISABLE", "") not in ("", "0")


class Finder:
    """Finds these modules as the other finders do, with a loader that extends them once they have been executed."""

    @classmethod
    def find_spec(cls, name: str, path: Optional[Sequence[str]] = None, target: Any = None) -> Optional[ModuleSpec]:
        if name not in TARGETS or disabled():
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is cls or find is None:
                continue
            spec: Optional[ModuleSpec] = find(name, path, target)
            if spec is not None:
                _extend_after_execution(spec)
                return spec
        return None


def _extend_after_execution(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == spec.name:  # a zipimporter loads other modules too
            _extend(module)

    # On this one instance, so that it stays the loader that inspect and pickle know.
    loader.exec_module = exec_module


def _extend(module: ModuleType) -> None:
    try:
        from metagpt_localllm import _register

        getattr(_register, TARGETS[module.__name__])(module)
    except Exception as error:  # a broken plugin must leave MetaGPT as it was
        print(
            f"metagpt-localllm is not active: {type(error).__name__}: {error}. "
            "METAGPT_LOCALLLM_DISABLE=1 silences this.",
            file=sys.stderr,
        )


def activate() -> None:
    """Makes ``api_type: local_llm`` known to MetaGPT, whether it was imported already or will be. Idempotent."""
    if disabled():
        return
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
    for name in TARGETS:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is not None and not getattr(spec, "_initializing", False):
            _extend(module)
