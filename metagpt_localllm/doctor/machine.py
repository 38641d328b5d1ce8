"""What this machine has, and what it is doing."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import psutil

__all__ = ["Gpu", "Machine", "Process", "Run", "own_addresses", "run", "survey"]

#: Runs a command and gives what it says; None where it is not there or fails.
Run = Callable[[Sequence[str]], Optional[str]]
#: Seconds for which the processor is watched, and for a tool of a GPU's maker.
_WATCHED, _TOOL_LIMIT = 0.6, 5.0


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, bytes of its memory, and how busy it is, 0 to 1 (None where its tool does not say)."""

    name: str
    total: int
    used: int
    busy: Optional[float] = None


@dataclass(frozen=True)
class Process:
    """All processes of a name; ``share`` of all processors, 0 to 1; ``memory`` in bytes."""

    name: str
    share: float
    memory: int


@dataclass(frozen=True)
class Machine:
    """This machine; sizes in bytes.

    Attributes:
        cores: logical ones.
        available: memory that programs could still have.
        busy: share of the processors that works, 0 to 1, before anything was measured.
        busiest: the programs that take most of it, the first most.
        unified: whether the GPU uses the same memory (Apple's own processors).
    """

    cores: int
    memory: int
    available: int
    swap: int
    swap_used: int
    busy: float = 0.0
    busiest: tuple[Process, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    unified: bool = False

    @property
    def vram(self) -> int:
        """Bytes of all GPUs together."""
        return sum(gpu.total for gpu in self.gpus)


def run(command: Sequence[str]) -> Optional[str]:
    """What a command says; None where it is not there, fails, or takes longer than 5 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_LIMIT)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def survey(run: Run = run) -> Machine:
    """Looks at this machine for about a second. Blocks."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    busy, busiest = _load()
    return Machine(
        cores=psutil.cpu_count() or 1, memory=memory.total, available=memory.available, swap=swap.total,
        swap_used=swap.used, busy=busy, busiest=busiest, gpus=_gpus(run),
        unified=platform.system() == "Darwin" and platform.machine() == "arm64",
    )  # fmt: skip


def own_addresses() -> frozenset[str]:
    """The name of this machine and its addresses, in lower case."""
    found = {address.address.split("%")[0].lower() for listed in psutil.net_if_addrs().values() for address in listed}
    return frozenset({*found, socket.gethostname().lower()})


def _load() -> tuple[float, tuple[Process, ...]]:
    watched = [process for process in psutil.process_iter() if process.pid not in (0, os.getpid())]
    _shares(watched)
    psutil.cpu_percent(None)
    time.sleep(_WATCHED)
    busy, shares = psutil.cpu_percent(None) / 100, _shares(watched)
    by_name: dict[str, Process] = {}
    for process, share in zip(watched, shares):
        found = _process(process, share) if share > 0.01 else None
        if found is not None:
            same = by_name.get(found.name, Process(found.name, 0.0, 0))
            by_name[found.name] = Process(found.name, same.share + found.share, same.memory + found.memory)
    busiest = sorted(by_name.values(), key=lambda process: -process.share)
    return busy, tuple(busiest[:3])


def _shares(processes: Sequence[psutil.Process]) -> list[float]:
    """What each takes of all processors since the last look."""
    cores = psutil.cpu_count() or 1
    shares = []
    for process in processes:
        try:
            shares.append(process.cpu_percent(None) / 100 / cores)
        except psutil.Error:
            shares.append(0.0)
    return shares


def _process(process: psutil.Process, share: float) -> Optional[Process]:
    try:
        return Process(process.name(), share, process.memory_info().rss)
    except psutil.Error:
        return None


def _gpus(run: Run) -> tuple[Gpu, ...]:
    return _nvidia(run) or _amd(run)


def _nvidia(run: Run) -> tuple[Gpu, ...]:
    """(nvidia-smi --help-query-gpu; memory in MiB, "[N/A]" where it does not know.)"""
    asked = "--query-gpu=name,memory.total,memory.used,utilization.gpu"
    told = run(["nvidia-smi", asked, "--format=csv,noheader,nounits"]) or ""
    gpus = []
    for line in told.splitlines():
        name, *numbers = (part.strip() for part in line.rsplit(",", 3))
        values = [_number(text) for text in numbers]
        if len(values) == 3 and values[0]:
            busy = None if values[2] is None else values[2] / 100
            gpus.append(Gpu(name, int(values[0] * 2**20), int((values[1] or 0) * 2**20), busy))
    return tuple(gpus)


def _amd(run: Run) -> tuple[Gpu, ...]:
    """(rocm-smi of ROCm 5 and 6: an object for each card, with numbers as text.)"""
    told = run(["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showuse", "--json"]) or ""
    try:
        cards = json.loads(told)
    except ValueError:
        return ()
    gpus = []
    for key, card in cards.items() if isinstance(cards, dict) else ():
        total = _number(card.get("VRAM Total Memory (B)")) if isinstance(card, dict) else None
        if total:
            used, busy = _number(card.get("VRAM Total Used Memory (B)")), _number(card.get("GPU use (%)"))
            # Newer versions write "Card Series".
            name = str(card.get("Card series") or card.get("Card Series") or key)
            gpus.append(Gpu(name, int(total), int(used or 0), None if busy is None else busy / 100))
    return tuple(gpus)


def _number(value: Any) -> Optional[float]:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
