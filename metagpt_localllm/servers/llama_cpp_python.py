"""llama-cpp-python's server, ``python -m llama_cpp.server`` (0.3.36 and its source)."""

from __future__ import annotations

from typing import Any, ClassVar, Mapping, Optional

from metagpt_localllm.servers.base import Ask, Facts, Server, entries

__all__ = ["LlamaCppPython"]


class LlamaCppPython(Server):
    """Any second request that needs the model, even for the list of models or a count, ends the stream that runs.

    (``interrupt_requests``, on by default.) So it is asked for its list of models once, and is never polled.
    """

    name: ClassVar[str] = "llama-cpp-python"
    quiet: ClassVar[bool] = True
    usual_window: ClassVar[Optional[int]] = 2048  # --n_ctx
    blank: ClassVar[bool] = True  # where it streams

    def __init__(self, facts: Optional[Facts] = None) -> None:
        super().__init__(facts or Facts(slots=1, loaded=True))

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        return any(entry.get("owned_by") == "me" and "permissions" in entry for entry in entries(models, "data"))

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        models = await ask.models()
        return cls() if models is not None and cls.recognizes(models) else None

    @property
    def any_name(self) -> bool:
        return True

    def extras(self) -> Mapping[str, Any]:
        # It takes stream_options and sends no usage all the same.
        return {}

    def remedy_for_cache(self) -> str:
        """(llama_cpp/server/settings.py: the last prompt's beginning is kept anyway, --cache keeps others, too.)"""
        return "Start the server with `--cache true`."

    def remedy_for_gpu(self) -> str:
        return "Start the server with `--n_gpu_layers -1` (all of them), in a build that knows the GPU."

    def _enlarge(self, window: int) -> str:
        """(llama_cpp/server/settings.py, ModelSettings.)"""
        return f"Start the server with `--n_ctx {window}`"
