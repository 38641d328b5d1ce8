"""What the doctor finds. Pure."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any, Iterable, Union

from metagpt_localllm.config_text import key_path
from metagpt_localllm.transport import without_login

__all__ = ["Finding", "SettingChange", "Severity", "exit_code", "gigabytes", "shown"]


class Severity(enum.IntEnum):
    """How bad it is; the worst first."""

    BROKEN = 0
    WARNING = 1
    NOTE = 2

    @property
    def word(self) -> str:
        """For people."""
        return {"BROKEN": "broken", "WARNING": "held back", "NOTE": "note"}[self.name]


@dataclass(frozen=True)
class SettingChange:
    """A setting of config2.yaml that mends a finding.

    Attributes:
        steps: the keys from the top of the file, such as ``("llm", "base_url")``; numbers are places in lists. Names of
            models may have dots in them.
        value: plain, as YAML has it.
    """

    steps: tuple[Union[str, int], ...]
    value: Any

    @property
    def path(self) -> str:
        """The same for people."""
        return ".".join(map(str, self.steps))

    @classmethod
    def at(cls, about: str, setting: str, value: Any) -> SettingChange:
        """The change of a setting (such as ``local.context.window``) of the block ``about`` (as checking.llm_blocks has it)."""
        kind, _, name = about.partition(".")
        block: tuple[Union[str, int], ...] = (kind, name) if kind == "models" else key_path(about)
        return cls((*block, *key_path(setting)), value)


@dataclass(frozen=True)
class Finding:
    """One thing that holds a run back, or keeps it from running at all.

    Attributes:
        name: short and stable, for programs.
        title: one sentence for people.
        evidence: where that is known from.
        remedy: the command or setting that mends it.
        changes: the same as settings, where it is one that can be written.
        about: the block of the configuration that it is about, such as ``llm``; "" for the machine and the installation.
    """

    severity: Severity
    name: str
    title: str
    evidence: str = ""
    remedy: str = ""
    changes: tuple[SettingChange, ...] = ()
    about: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "severity": self.severity.name.lower(),
            "changes": [{"path": c.path, "value": shown(c.value)} for c in self.changes],
        }


def exit_code(findings: Iterable[Finding]) -> int:
    """0: fine. 1: it works, but is held back. 2: it cannot run."""
    worst = min((finding.severity for finding in findings), default=Severity.NOTE)
    return {Severity.BROKEN: 2, Severity.WARNING: 1, Severity.NOTE: 0}[worst]


def shown(value: Any) -> Any:
    """A setting's value as it may be printed: an address without the user name and password in it."""
    return without_login(value) if isinstance(value, str) and "://" in value else value


def gigabytes(size: float) -> str:
    """Bytes for people, in units of 10⁹."""
    return (
        f"{size / 1e9:,.0f} GB" if size >= 20e9 else f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
    )
