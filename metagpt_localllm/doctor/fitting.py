"""Whether the prompts fit into the context, and the model into the machine. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, Optional

from metagpt_localllm.doctor.findings import Finding, Severity, gigabytes
from metagpt_localllm.doctor.machine import Machine
from metagpt_localllm.doctor.memory import Need, smaller
from metagpt_localllm.doctor.subject import Subject
from metagpt_localllm.journal import CallRecord
from metagpt_localllm.statistics import known_number, mappings, percentile

__all__ = ["Wanted", "judge_context", "judge_load", "judge_memory", "wanted_window"]

#: Context windows in tokens, by MetaGPT's main version: with less this package has nothing left to trim, and what is
#: comfortable. 0.8.2's software company sends prompts of 1,000 to 5,000 tokens, the roles of 1.0.0 20,000 and more (measured).
_LEAST, _GOOD = {0: 3500, 1: 7500}, {0: 8192, 1: 32768}
#: Calls in the journal from which on their sizes say more than these numbers, and how many per cent of them are to fit.
_ENOUGH_CALLS, _PER_CENT = 20, 95
#: Of memory that programs can have, the part that a model may take.
_USABLE = 0.9
#: Bytes per second at which two channels of DDR5 memory are read, at the most: a model that is read more slowly by a GPU
#: is not in its memory (GPUs read theirs at 200 GB/s and more).
_MAIN_MEMORY = 90e9
#: Models of fewer bytes are held up by other things than memory.
_SMALL = 1e9
#: Share of the processors, or of a GPU, that other programs may take without being worth a word.
_BUSY = 0.5
#: Bytes of swap in use, and the part of memory, that are worth a word.
_SWAPPED, _SWAPPED_PART = 1e9, 0.05


@dataclass(frozen=True)
class Wanted:
    """What MetaGPT wants, in tokens: the ``least`` context window with which a run has a chance, a ``good`` one, ``why``, and the
    size of a large ``prompt``."""

    least: int
    good: int
    why: str
    prompt: int


def wanted_window(metagpt: Optional[str], calls: Iterable[CallRecord] = ()) -> Wanted:
    """The window that MetaGPT should have.

    Args:
        metagpt: its version, or None.
        calls: what the journal has.
    """
    main = 1 if (metagpt or "").startswith("1.") else 0
    least, good = _LEAST[main], _GOOD[main]
    sizes = sorted(size for size in map(_prompt, calls) if size)
    if len(sizes) < _ENOUGH_CALLS:
        why = f"MetaGPT {metagpt or '0.8.2'} works best with {good:,} or more (measured with its own roles)"
        return Wanted(least, good, why, good * 3 // 4)
    typical, largest = int(percentile(sizes, _PER_CENT)), sizes[-1]
    # A quarter is kept for the answer.
    good = max(1024 * math.ceil(typical * 4 / 3 / 1024), 4096)
    why = f"your own {len(sizes)} calls had prompts of up to {largest:,} tokens, 19 of 20 had at most {typical:,}"
    return Wanted(min(least, good), good, why, typical)


def _prompt(call: CallRecord) -> int:
    """Tokens of a call's prompt before it was trimmed."""
    sizes = [known_number(attempt.get("prompt_tokens")) or 0 for attempt in mappings(call.attempts)]
    removed = [known_number(trim.get("removed_tokens")) or 0 for trim in mappings(call.trims)]
    return int(max(sizes, default=0) + sum(removed))


def judge_context(subject: Subject, wanted: Wanted) -> list[Finding]:
    """Whether MetaGPT's prompts fit, and whether they would be cut without a word."""
    server, about, claimed = subject.server, subject.about, subject.settings.context.window
    loaded, setting = server.facts.window, f"{about}.local.context.window"
    quietly = " It cuts what is over that without a word." if server.truncates else ""
    findings = []
    if isinstance(claimed, int) and loaded is not None and claimed > loaded:
        findings.append(
            Finding(
                Severity.WARNING, "silent_truncation" if server.truncates else "window_setting",
                f"config2.yaml claims a context of {claimed:,} tokens, but the server has loaded {loaded:,}",
                f"{setting} is {claimed}; {server.name} says {loaded:,}.{quietly}",
                f"Set {setting}: auto, or give the server what you meant: {server.remedy(claimed)}",
                subject.change("local.context.window", "auto"), about,
            )
        )  # fmt: skip
    window = loaded or subject.window
    if window is None and server.facts.loaded is False:
        title = "The model is not loaded yet, so its context is not known"
        remedy = "Run doctor without --quick, which has the server load it."
        findings.append(Finding(Severity.NOTE, "not_loaded", title, f"{server.name} says so", remedy, about=about))
    elif window is None:
        usual = server.usual_window or (4096 if server.truncates else None)
        remedy = f"Set {setting} to what the server was started with" + (
            f" ({usual} unless told otherwise)." if usual else "."
        )
        findings.append(
            Finding(
                Severity.WARNING, "silent_truncation" if server.truncates else "window_unknown",
                "The server does not say how large its context is", f"{server.name} at {subject.endpoint.address} was asked.{quietly}",
                remedy, subject.change("local.context.window", usual) if usual else (), about,
            )
        )  # fmt: skip
    elif window < wanted.good:
        hopeless = window < wanted.least
        quiet = server.truncates and isinstance(claimed, str)
        guarded = (
            f" {server.name} cuts longer prompts without a word (4,096 tokens are its default); this package shortens them "
            "itself before that, but other programs are not told." if quiet else ""
        )  # fmt: skip
        findings.append(
            Finding(
                Severity.BROKEN if hopeless else Severity.WARNING,
                "silent_truncation" if quiet else "context_small",
                f"The context is too small for MetaGPT: {window:,} tokens" if hopeless
                else f"The context is small: {window:,} tokens, so prompts have to be shortened",
                f"{wanted.why}.{guarded}", server.remedy(wanted.good), about=about,
            )
        )  # fmt: skip
    return findings


def judge_memory(subject: Subject, machine: Machine) -> list[Finding]:
    """Whether the model is where it should be, and fits. Only for a server on this machine."""
    needs, about, kind = subject.need, subject.about, subject.server.facts.quantization
    findings: list[Finding] = []
    vram = 0 if machine.unified else machine.vram
    hint = ""
    if needs is not None:
        parts = (
            f"weights {gigabytes(needs.weights)}" + (f" ({kind})" if kind else "")
            + f" + context {gigabytes(needs.cache)} = {gigabytes(needs.total)} ({needs.how})"
        )  # fmt: skip
        room = machine.memory * _USABLE + vram
        if needs.total > room:
            have = f"{gigabytes(machine.memory)} of memory" + (f" and {gigabytes(vram)} on the GPU" if vram else "")
            findings.append(
                Finding(
                    Severity.WARNING, "memory", "The model is too large for this machine's memory",
                    f"{parts}; there are {have}. What does not fit is read from the disk again and again",
                    _smaller(needs, subject, room), about=about,
                )
            )  # fmt: skip
        elif vram and needs.total > vram:
            hint = _smaller(needs, subject, vram * _USABLE)
            if not subject.anatomy.resident:
                findings.append(
                    Finding(
                        Severity.WARNING, "vram", "The model does not fit into the GPU's memory, so a part of it runs on the CPU",
                        f"{parts}; {_names(machine)}", hint, about=about,
                    )
                )  # fmt: skip
    findings += _on_cpu(subject, machine, hint)
    findings += _swap(subject, machine)
    return findings


def _smaller(needs: Need, subject: Subject, room: float) -> str:
    fitting = smaller(needs, subject.server.facts.quantization, room)
    if fitting is None:
        return "Take a model with fewer parameters, or load it with less context."
    name, weights = fitting
    return (
        f"Take the same model as {name}: weights {gigabytes(weights)} + context {gigabytes(needs.cache)} = "
        f"{gigabytes(weights + needs.cache)}. (Reckoned from the bits per weight of each quantization.)"
    )  # fmt: skip


def _on_cpu(subject: Subject, machine: Machine, hint: str) -> list[Finding]:
    anatomy, about, measured = subject.anatomy, subject.about, subject.measured
    remedy = f"{subject.server.remedy_for_gpu()} {hint}".strip()
    if anatomy.resident and anatomy.in_vram is not None:
        left = anatomy.resident - anatomy.in_vram
        if left <= anatomy.resident * 0.01:
            return []
        if not machine.gpus and not machine.unified and anatomy.in_vram == 0:
            return []  # there is nothing to be done about it, and the speed is told anyway
        return [
            Finding(
                Severity.WARNING, "cpu", f"{left / anatomy.resident:.0%} of the model runs on the CPU",
                f"{subject.server.name} says that {gigabytes(anatomy.in_vram)} of {gigabytes(anatomy.resident)} are on the GPU",
                remedy, about=about,
            )
        ]  # fmt: skip
    weights, decode = anatomy.weights, measured.decode if measured is not None else None
    if not machine.gpus or weights is None or weights < _SMALL or machine.unified:
        return []
    used = sum(gpu.used for gpu in machine.gpus)
    if used < weights / 2:
        evidence = (
            f"inferred: the model has {gigabytes(weights)}, and only {gigabytes(used)} of the GPU's memory are in use"
        )
    elif decode is not None and weights * decode < _MAIN_MEMORY:
        evidence = (
            f"inferred from its speed: {decode:.3g} tokens/s, each of which reads up to {gigabytes(weights)}, are "
            f"{weights * decode / 1e9:.0f} GB/s at the most, no more than main memory gives; a GPU's own memory gives 200 and more"
        )
    else:
        return []
    title = "The model seems to run on the CPU, wholly or in part"
    return [Finding(Severity.WARNING, "cpu", title, evidence, remedy, about=about)]


def _swap(subject: Subject, machine: Machine) -> list[Finding]:
    needs = subject.need
    if machine.swap_used >= _SWAPPED and machine.swap_used >= _SWAPPED_PART * machine.memory:
        hint = _smaller(needs, subject, machine.available) if needs is not None else ""
        return [
            Finding(
                Severity.WARNING, "swap", f"This machine has moved {gigabytes(machine.swap_used)} of its memory to the disk (swap)",
                f"{gigabytes(machine.swap_used)} of {gigabytes(machine.swap)} swap are in use, {gigabytes(machine.available)} of "
                f"{gigabytes(machine.memory)} memory are free. If any of that is the model, each token waits for the disk",
                f"Close what is not needed, and start the server anew. {hint}".strip(),
            )
        ]  # fmt: skip
    on_cpu = needs is not None and needs.total > (0 if machine.unified else machine.vram)
    if machine.swap == 0 and needs is not None and on_cpu and needs.total > 0.7 * machine.memory:
        return [
            Finding(
                Severity.WARNING, "no_swap", "There is no swap, and the model takes most of the memory",
                f"it needs {gigabytes(needs.total)} of {gigabytes(machine.memory)}: when memory runs out, the system ends the "
                "server in the middle of an answer",
                "Make some swap (Linux: `sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
                "sudo swapon /swapfile`), or take a smaller quantization.",
            )
        ]  # fmt: skip
    return []


def judge_load(subject: Subject, machine: Machine) -> list[Finding]:
    """What else the machine was doing before anything was measured."""
    if subject.work is not None and subject.work.busy:
        return [
            Finding(
                Severity.WARNING, "server_busy", "The server works on something else at the moment",
                f"it says that it {'loads its model' if subject.work.loading else 'is busy'}. So it is measured as slower than it is",
                "Run doctor again when nothing else uses it.", about=subject.about,
            )
        ]  # fmt: skip
    findings = []
    if machine.busy >= _BUSY:
        who = ", ".join(f"{process.name} ({process.share:.0%})" for process in machine.busiest) or "none stands out"
        findings.append(
            Finding(
                Severity.WARNING, "load", f"Other programs use {machine.busy:.0%} of this machine's processors",
                f"before anything was asked of the server; most of it: {who}", "Close them, or wait until they are done.",
            )
        )  # fmt: skip
    for gpu in machine.gpus:
        if (gpu.busy or 0.0) >= _BUSY:
            findings.append(
                Finding(
                    Severity.WARNING, "gpu_load", f"Other programs use {gpu.busy:.0%} of the GPU",
                    f"{gpu.name}, before anything was asked of the server",
                    "Close what else uses it (games, video, another model).",
                )
            )  # fmt: skip
    return findings


def _names(machine: Machine) -> str:
    return ", ".join(f"{gpu.name} has {gigabytes(gpu.total)}" for gpu in machine.gpus)
