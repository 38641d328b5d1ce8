"""What MetaGPT will read from its config2.yaml, of which there may be two."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional

from metagpt_localllm.config_file import ConfigFileError, config_files, content_of
from metagpt_localllm.doctor.findings import Finding, Severity

__all__ = ["Configuration", "configuration"]


@dataclass(frozen=True)
class Configuration:
    """What MetaGPT will have, and from where.

    Attributes:
        path: the file that the ``llm`` block comes from; where there is none, the one that should have it.
        content: of all files together, as MetaGPT puts them together.
        findings: what is wrong with the files themselves.
    """

    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def configuration(named: Optional[Path]) -> Configuration:
    """Reads the configuration as MetaGPT would, or only the file ``named``. Never raises."""
    own = config_files()[::-1]
    if named is not None:
        return _named(named, own)
    existing = [path for path in own if path.exists()]
    if not existing:
        title = "There is no config2.yaml"
        evidence = "looked for " + " and ".join(map(str, own))
        remedy = "Run `metagpt-localllm init`, which finds running servers and writes it."
        return Configuration(own[-1], findings=(Finding(Severity.BROKEN, "no_config", title, evidence, remedy),))
    content: dict[str, Any] = {}
    origin = existing[-1]
    llm_in: list[Path] = []
    findings: list[Finding] = []
    for path in existing:
        try:
            loaded = content_of(path) or {}
        except ConfigFileError as error:
            findings.append(_unreadable(error))
            continue
        content.update(loaded)
        if isinstance(loaded.get("llm"), dict):
            origin = path
            llm_in.append(path)
    if len(llm_in) > 1:
        findings.append(_two_copies(llm_in[0], llm_in[-1]))
    return Configuration(origin, content, tuple(findings))


def _named(named: Path, own: list[Path]) -> Configuration:
    try:
        content = content_of(named)
    except ConfigFileError as error:
        return Configuration(named, findings=(_unreadable(error),))
    if content is None:
        title, remedy = f"{named} does not exist", "Name another file, or run `metagpt-localllm init`, which writes it."
        return Configuration(named, findings=(Finding(Severity.BROKEN, "no_config", title, remedy=remedy),))
    findings = []
    here = named.resolve()
    if here not in [path.resolve() for path in own]:
        findings.append(
            Finding(
                Severity.NOTE, "other_config", f"MetaGPT does not read {named} by itself",
                "it reads " + " and ".join(map(str, own)), f"Move it to {own[-1]} for MetaGPT to use it.",
            )
        )  # fmt: skip
    elif here == own[0].resolve() and _has_llm(own[-1]):
        findings.append(_two_copies(*own))
    return Configuration(named, content, tuple(findings))


def _has_llm(path: Path) -> bool:
    try:
        return isinstance((content_of(path) or {}).get("llm"), dict)
    except ConfigFileError:
        return False


def _two_copies(loser: Path, winner: Path) -> Finding:
    return Finding(
        Severity.WARNING, "second_config", "There are two copies of config2.yaml, and one of them has no effect",
        f"both have a block llm: MetaGPT takes that of {winner} and drops that of {loser}",
        f"Edit {winner}, and remove llm from {loser} or the file as a whole.",
    )  # fmt: skip


def _unreadable(error: ConfigFileError) -> Finding:
    title, *rest = str(error).splitlines()
    return Finding(Severity.BROKEN, "config", title, remedy="\n".join(rest))
