"""MetaGPT on slow local models: ``api_type: local_llm`` in config2.yaml.

Importing this package makes the type known to MetaGPT, before or after MetaGPT was imported; a
normal installation does so without any import (see ``_hook``).
"""

from typing import TYPE_CHECKING, Any

from metagpt_localllm._hook import activate as _activate

if TYPE_CHECKING:
    from metagpt_localllm.listening import on_event

__all__ = ["__version__", "on_event"]
__version__ = "0.1.0"

_activate()


def __getattr__(name: str) -> Any:
    # Not at once: every interpreter that imports MetaGPT would wait for what it imports.
    if name == "on_event":
        from metagpt_localllm.listening import on_event

        return on_event
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
