"""One model on one server, as it is configured and as it was found: what the judgements are about. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional
from urllib.parse import urlsplit

from metagpt_localllm.checking import Seen, endpoint_of
from metagpt_localllm.doctor.findings import SettingChange
from metagpt_localllm.doctor.measuring import Measured
from metagpt_localllm.doctor.memory import Need, need
from metagpt_localllm.servers import Server
from metagpt_localllm.servers.base import Anatomy, Work, positive
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.transport import Endpoint, is_local

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """One model on one server.

    Attributes:
        about: path of its block in the configuration, such as ``llm``.
        block: that block as it is written.
        settings: its ``local`` block.
        seen: the server as it was found.
        anatomy: the model's size.
        work: what the server was doing before anything was asked of it.
        measured: its speed; None where nothing was measured.
        own: names and addresses of this machine.
    """

    about: str
    block: Mapping[str, Any]
    settings: LocalSettings
    seen: Seen
    anatomy: Anatomy = Anatomy()
    work: Optional[Work] = None
    measured: Optional[Measured] = None
    own: frozenset[str] = frozenset()

    @property
    def endpoint(self) -> Endpoint:
        return endpoint_of(self.block)

    @property
    def server(self) -> Server:
        return self.seen.server

    @property
    def window(self) -> Optional[int]:
        """Context window in tokens that this package will go by; None where it has to guess."""
        claimed = self.settings.context.window
        return claimed if isinstance(claimed, int) else self.server.facts.window

    @property
    def need(self) -> Optional[Need]:
        """What the model takes of memory at the least, with the context of one slot: slots may share it."""
        window = self.server.facts.window or self.window or 4096
        return need(self.anatomy, self.server.facts.quantization, window, self.endpoint.model)

    @property
    def here(self) -> bool:
        """Whether its address is on this machine."""
        url = self.endpoint.base_url
        return is_local(url) or (urlsplit(url).hostname or "") in self.own

    @property
    def answer_tokens(self) -> int:
        """Tokens that an answer may have (``llm.max_token``; MetaGPT's own default is 4,096)."""
        return positive(self.block.get("max_token")) or 4096

    def change(self, setting: str, value: Any) -> tuple[SettingChange, ...]:
        """The change of a setting of its block, such as ``base_url`` or ``local.context.window``."""
        return (SettingChange.at(self.about, setting, value),)
