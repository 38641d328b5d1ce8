"""What the doctor says, for people and for programs. No API key is in it. Pure."""

from __future__ import annotations

import re
import textwrap
from dataclasses import asdict
from typing import Any, Iterator, Optional

import click

from metagpt_localllm.doctor.diagnosis import Diagnosis
from metagpt_localllm.doctor.findings import Finding, Severity, exit_code, gigabytes, shown
from metagpt_localllm.doctor.machine import Machine
from metagpt_localllm.doctor.subject import Subject
from metagpt_localllm.doctor.timing import TierOf
from metagpt_localllm.settings import format_duration
from metagpt_localllm.wording import counted

__all__ = ["as_json", "as_text"]

_COMMAND = re.compile(r"`[^`]+`")
#: Stands for a blank that no line ends at.
_GLUE = "\x00"
_COLORS = {Severity.BROKEN: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def as_json(diagnosis: Diagnosis, written: Optional[dict[str, Any]]) -> dict[str, Any]:
    """Everything, in plain values: sizes in bytes, times in seconds, speeds in tokens per second.

    Args:
        written: what ``--write`` did; None without it.
    """
    return {
        "exit_code": exit_code(diagnosis.findings),
        "config": str(diagnosis.config),
        "offline": diagnosis.offline,
        "findings": [finding.as_dict() for finding in diagnosis.findings],
        "changes": {change.path: shown(change.value) for change in diagnosis.changes},
        "servers": [_server(subject, diagnosis.tiers.get(subject.about, [])) for subject in diagnosis.subjects],
        "machine": asdict(diagnosis.machine),
        "written": written,
    }


def _server(subject: Subject, tiers: list[TierOf]) -> dict[str, Any]:
    measured, facts, needs = subject.measured, subject.server.facts, subject.need
    return {
        "about": subject.about,
        "base_url": subject.endpoint.address,
        "model": subject.endpoint.model,
        "kind": subject.server.name if subject.seen.trouble is None else None,
        "trouble": subject.seen.trouble.name.lower() if subject.seen.trouble is not None else None,
        "models": list(subject.seen.names),
        "on_this_machine": subject.here,
        "facts": asdict(facts),
        "anatomy": asdict(subject.anatomy),
        "memory": {**asdict(needs), "total": needs.total} if needs is not None else None,
        "measured": asdict(measured) if measured is not None else None,
        "deadlines": [asdict(tier) for tier in tiers],
    }


def as_text(diagnosis: Diagnosis, width: int, written: Optional[dict[str, Any]]) -> str:
    """The same for people, the most important first."""
    lines = [*_head(diagnosis), ""]
    for number, finding in enumerate(diagnosis.findings, 1):
        lines += [*_finding(number, finding, width), ""]
    for subject in diagnosis.subjects:
        lines += _deadlines(subject, diagnosis.tiers.get(subject.about, []), width)
    lines += _end(diagnosis)
    lines += _would_write(diagnosis) if written is None else _written(written)
    return "\n".join(lines)


def _head(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"Configuration  {diagnosis.config}"
    for subject in diagnosis.subjects:
        yield f"Server         {_about_server(subject)}"
        speed = _speed(subject)
        if speed:
            yield f"Speed          {speed}"
        needs = subject.need
        if needs is not None and subject.seen.trouble is None:
            yield f"Model          {gigabytes(needs.weights)} of weights + {gigabytes(needs.cache)} for its context ({needs.how})"
    yield f"This machine   {_about_machine(diagnosis.machine)}"


def _about_server(subject: Subject) -> str:
    where = f"{subject.endpoint.address}, model {subject.endpoint.model}"
    if subject.seen.trouble is not None:
        return f"{where}: {subject.seen.trouble.value}"
    facts = subject.server.facts
    window = f"context of {facts.window:,} tokens" if facts.window else "context unknown"
    kind = (
        f"{subject.server.name} {facts.version}".strip()
        if subject.server.name != "plain"
        else "a server of unknown kind"
    )
    extras = [facts.quantization.replace("(guessed) ", ""), window, f"{facts.slots} slots" if (facts.slots or 1) > 1 else ""]
    return f"{kind} at {where} ({', '.join(filter(None, extras))})"


def _speed(subject: Subject) -> str:
    measured = subject.measured
    if measured is None or measured.prefill is None:
        return ""
    decode = f", writes {_rate(measured.decode)}" if measured.decode is not None else ""
    short = "; the time was up before all was measured" if measured.limited else ""
    return (
        f"reads {_rate(measured.prefill)} tokens a second{decode}, measured in {measured.seconds:.1f} s "
        f"with a prompt of {measured.prompt_tokens:,} tokens{short}"
    )


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.2g}"


def _about_machine(machine: Machine) -> str:
    swap = f"{gigabytes(machine.swap)} of swap" if machine.swap else "no swap"
    gpus = ", ".join(f"{gpu.name} with {gigabytes(gpu.total)}" for gpu in machine.gpus)
    gpus = gpus or ("a GPU that shares the memory" if machine.unified else "no GPU that nvidia-smi or rocm-smi knows")
    return f"{machine.cores} processor cores, {gigabytes(machine.memory)} of memory ({gigabytes(machine.available)} free), {swap}, {gpus}"


def _finding(number: int, finding: Finding, width: int) -> Iterator[str]:
    color = _COLORS[finding.severity]
    mark = click.style(f"{number}. {finding.severity.word}", fg=color, bold=True)
    yield from _wrapped(f"{mark}: ", finding.title, width, plain=f"{number}. {finding.severity.word}: ")
    if finding.evidence:
        yield from _wrapped("   Why:  ", finding.evidence, width)
    if finding.remedy:
        yield from _wrapped("   Mend: ", finding.remedy, width)


def _wrapped(label: str, text: str, width: int, plain: Optional[str] = None) -> Iterator[str]:
    """``text`` behind ``label``, in lines of ``width``; commands (in backquotes) stay whole, so that they can be copied.

    Args:
        plain: the label without its colors; its further lines are indented by 3.
    """
    indent = " " * (len(label) if plain is None else 3)
    first = label if plain is None else plain
    for line in text.splitlines() or [""]:
        whole = _COMMAND.sub(lambda found: found[0].replace(" ", _GLUE), line)
        for part in textwrap.wrap(
            whole, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ):  # fmt: skip
            told = part.replace(_GLUE, " ")
            yield told if first == indent else label + told[len(first) :]
            first = indent


def _deadlines(subject: Subject, tiers: list[TierOf], width: int) -> Iterator[str]:
    if not tiers:
        return
    yield "Deadlines that fit this speed (timeouts: auto learns them by itself, and goes on learning with each call;"
    yield "--write gives it this measurement to begin with, --write --tiers writes them down as fixed tiers):"
    for tier in tiers:
        yield (
            f"   {tier.name:7} prompts of up to {tier.prompt_tokens:>7,} tokens: first token within "
            f"{format_duration(tier.first_token)}, no pause over {format_duration(tier.stall)}, all within "
            f"{format_duration(tier.total)}"
        )
    yield ""


def _end(diagnosis: Diagnosis) -> Iterator[str]:
    broken = sum(finding.severity is Severity.BROKEN for finding in diagnosis.findings)
    held = sum(finding.severity is Severity.WARNING for finding in diagnosis.findings)
    if broken:
        yield click.style(
            f"MetaGPT cannot run like this: {counted(broken, 'thing')} must be mended first.", fg="red", bold=True
        )
    elif held:
        yield click.style(
            f"It works, but {counted(held, 'thing')} hold{'s' if held == 1 else ''} it back.", fg="yellow", bold=True
        )
    else:
        yield click.style("Nothing holds this machine back.", fg="green", bold=True)


def _would_write(diagnosis: Diagnosis) -> Iterator[str]:
    if diagnosis.changes:
        yield "`metagpt-localllm doctor --write` sets this, keeps all comments, and leaves a copy of the file as it was:"
        for change in diagnosis.changes:
            yield f"   {change.path}: {shown(change.value)}"


def _written(written: dict[str, Any]) -> Iterator[str]:
    if written["settings"]:
        yield f"Written to {written['file']}:"
        for path, value in written["settings"].items():
            shown = f"{len(value)} tiers" if isinstance(value, list) else value
            yield f"   {path}: {shown}"
        if written["backup"]:
            yield f"The file as it was: {written['backup']}"
    else:
        yield "There was no setting to write."
    if written["samples"]:
        yield "The measured speed is kept for timeouts: auto."
    if written["settings"]:
        yield "Run `metagpt-localllm doctor` again to see whether that was all."
