"""What each fault of a server costs: our provider beside MetaGPT's own, LiteLLM, LangChain and the openai client.

    python -m bench.faults [--seed N] [--quick] [--only hang,stall,…]

One agent makes ten calls, each with all earlier answers in its prompt, to the simulated 34B model of bench/cells.py; the
answers are streamed. At the fourth request one fault strikes, once, so that every one of them can be survived; "mix" is six
of them, drawn by the seed. A call is right when its answer is exactly the text that the model would have given: a cut answer
that passes for a whole one is wrong. The run breaks off at the first call that raises, as an agent's does. Beside that the
software company of MetaGPT 0.8 runs through its own providers and ours.

How time passes: client and simulated server share one event loop, whose clock is virtual (bench/virtual_clock.py). So every
client waits for as long as its documented defaults say, whatever the speed and load of this machine, and a time-out of ten
minutes takes none. ``METAGPT_LOCALLLM_TIME_SCALE`` is not used: ours, too, has its real constants. CPU time is not in it.
Back-offs are random: every cell draws from the same seed. Each cell has a new HOME, so that nothing was learned before.

- **waste** is (tokens prefilled + decoded by the server) / (those needed: those of a run without faults by a bare socket,
  and where the fault takes the server's prefix cache, as refuse and loading do, those of that call's prompt once more).
- **wall** is the time of the run / (that of the bare socket).
- **a fault's own length** is how long the server cannot be used: ``duration`` of loading, that of refuse and the load that
  follows, the Retry-After of busy. A silence (hang, hang_after_headers, keepalive_only, stall) has no length of its own, and
  nobody can tell it at once from work: it is given 60 s, what bench/deadlines.py asks of a learned deadline. The others have
  none. The goal for the wall time is 1.1 × the bare run + that length.
- A run is **cut off** after the longest of 10 × the bare run and (the bare run + the length + 3 hours).
- **best or equal**: finished if anybody is; of those who finish, waste within 2 % of the least; of those, wall within 2 %.

``truncate`` is left out: it is a matter of the prompt's size (bench/context.py). Stock ``ollama`` speaks
Ollama's own API, so it has rows only where the server is Ollama; it sends no system prompt, and is compared with itself.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Iterable, Optional, Sequence

from bench import workload
from bench.cells import MACHINE, Cell, Outcome, run
from bench.clients import RUNNERS, SETTINGS
from bench.environments import versions
from bench.results import Goal, Part, Plot, Table
from metagpt_localllm.simulator import Fault
from metagpt_localllm.simulator.machine import PrefixCache, render, tokenize

__all__ = ["FAULTS", "measure"]

OURS = "local_llm"
PEERS = ("openai", "langchain", "litellm", "proxy", "open_llm")
LABELS = {
    OURS: "ours", "openai": "openai", "langchain": "LangChain", "litellm": "LiteLLM", "proxy": "LiteLLM proxy",
    "open_llm": "MetaGPT open_llm", "ollama": "MetaGPT ollama",
}  # fmt: skip
#: Dialects of servers that can go on with an answer, and that cannot; and Ollama's own API.
CONTINUES, BEGINS_ANEW, NATIVE = "llama.cpp", "lmstudio", "ollama"
SILENCE, TOLERANCE = 60.0, 0.02
#: Goal for the waste, by dialect.
WASTE = {CONTINUES: 1.05, BEGINS_ANEW: 1.3}
COMPANY_FAULTS = ("none", "hang", "stall", "close", "refuse", "mix")
_ON, _AFTER = 4, 60
_FORGETS = ("refuse", "loading")
_SILENT = (
    "A request to LM Studio that stays silent: that server tells nothing of its work, nor what of the prompt it had in its cache, so "
    "ours has only the deadline that it has learned, which after a few calls is long: the 99th percentile for a prompt that must be "
    "read whole, times 3. LangChain's 60 s (stream_chunk_timeout) were chosen by hand to fit this machine; on one half as fast they "
    "would cut off prompts of 2,000 tokens."
)
#: Faults that need no further request.
_HARMLESS = ("no_done", "no_usage")


@dataclass(frozen=True)
class Script:
    """Faults.

    Attributes:
        faults: them.
        length: seconds that the server cannot be used.
        forgets: numbers of the calls at which the server loses its prefix cache.
    """

    faults: tuple[Fault, ...] = ()
    length: float = 0.0
    forgets: tuple[int, ...] = ()


def _one(kind: str, length: float = 0.0, **more: float) -> Script:
    forgets = (_ON,) if kind in _FORGETS else ()
    return Script((Fault(kind, on=_ON, after=_AFTER, **more),), length, forgets)  # type: ignore[arg-type]


FAULTS = {
    "none": Script(),
    "hang": _one("hang", SILENCE),
    "hang_after_headers": _one("hang_after_headers", SILENCE),
    "keepalive_only": _one("keepalive_only", SILENCE),
    "stall": _one("stall", SILENCE),
    "drop": _one("drop"),
    "close": _one("close"),
    "done_without_finish": _one("done_without_finish"),
    "no_done": _one("no_done"),
    "no_usage": _one("no_usage"),
    "stream_error": _one("stream_error"),
    "empty": _one("empty"),
    "loading": _one("loading", 120.0, duration=120.0),
    "busy": _one("busy", 20.0, retry_after=20.0),
    "error": _one("error", status=500),
    "html": _one("html"),
    "reset": _one("reset"),
    "refuse": _one("refuse", 60.0 + MACHINE.load_time, duration=60.0),
}


def mix(seed: int) -> Script:
    """Six faults, one at every second request from the second on."""
    kinds = random.Random(seed).sample([name for name in FAULTS if name != "none"], 6)
    faults, forgets, again = [], [], 0
    for place, kind in enumerate(kinds):
        fault = Fault(**{**vars(FAULTS[kind].faults[0]), "on": 2 + 2 * place})
        faults.append(fault)
        if kind in _FORGETS:
            forgets.append(fault.on - again)
        again += kind not in _HARMLESS
    return Script(tuple(faults), sum(FAULTS[kind].length for kind in kinds), tuple(forgets))


@dataclass
class Found:
    """All outcomes, and what they are measured by."""

    scripts: dict[str, Script]
    outcomes: dict[Cell, Outcome]
    seed: int

    def __post_init__(self) -> None:
        self._cells = {(cell.client, cell.best, cell.dialect, cell.fault): cell for cell in self.outcomes}

    def of(self, client: str, best: bool, dialect: str, fault: str) -> Optional[Outcome]:
        cell = self._cells.get((client, best, dialect, fault))
        return self.outcomes[cell] if cell is not None else None

    def ideal(self, cell: Cell) -> Outcome:
        """The run without faults that a cell is measured by: the bare socket's; of others than the ten calls over
        OpenAI's API, its own."""
        itself = cell.company or cell.dialect == NATIVE
        ideal = self.of(cell.client, cell.best, cell.dialect, "none") if itself else self.of("bare", False, cell.dialect, "none")
        assert ideal is not None
        return ideal

    def waste(self, cell: Cell) -> float:
        lost = 0 if cell.company else sum(cached_tokens(self.seed, call) for call in self.scripts[cell.fault].forgets)
        return self.outcomes[cell].work / max(self.ideal(cell).work + lost, 1)

    def wall(self, cell: Cell) -> float:
        return self.outcomes[cell].seconds / max(self.ideal(cell).seconds, 1e-9)

    def in_time(self, cell: Cell) -> bool:
        ideal = self.ideal(cell).seconds
        return self.outcomes[cell].seconds <= 1.1 * ideal + self.scripts[cell.fault].length

    def good(self, cell: Cell) -> bool:
        return self.outcomes[cell].finished and self.in_time(cell) and self.waste(cell) <= WASTE.get(cell.dialect, 1.3)

    def short(self, client: str, best: bool, dialect: str, fault: str) -> str:
        cell = self._cells.get((client, best, dialect, fault))
        if cell is None:
            return "n/a"
        outcome = self.outcomes[cell]
        if not outcome.finished:
            return f"✗ {outcome.right} of {outcome.wanted}"
        return f"{self.waste(cell):.2f} / {self.wall(cell):.2f}"

    def cells(self, **wanted: object) -> list[Cell]:
        return [cell for cell in self.outcomes if all(getattr(cell, name) == value for name, value in wanted.items())]

    def beaten_by(self, cell: Cell) -> list[Cell]:
        """The peers that did better than ours in ``cell``."""
        rivals = [other for other in self.cells(dialect=cell.dialect, fault=cell.fault, company=cell.company)
                  if other.client not in (cell.client, "bare") and self.outcomes[other].finished]  # fmt: skip
        if not self.outcomes[cell].finished:
            return rivals
        more = 1 + TOLERANCE
        lean = [other for other in rivals if self.waste(other) * more < self.waste(cell)]
        if lean:
            return lean
        alike = [other for other in rivals if self.waste(other) <= self.waste(cell) * more]
        return [other for other in alike if self.wall(other) * more < self.wall(cell)]


def _name(client: str, best: bool) -> str:
    plain = LABELS[client.split()[-1]]
    return plain if client.split()[-1] == OURS else f"{plain}, {'best' if best else 'default'}"


def _cells(scripts: dict[str, Script], ideal: float, quick: bool) -> list[Cell]:
    made = []

    def add(client: str, best: bool, dialect: str, fault: str) -> None:
        script = scripts[fault]
        company = client.startswith("company")
        whole = 3300.0 if company else ideal
        limit = max(10 * whole, whole + script.length + 3 * 3600)
        made.append(Cell(client, best, dialect, fault, script.faults, limit))

    for dialect in (CONTINUES, BEGINS_ANEW):
        add("bare", False, dialect, "none")
    if not quick and version("metagpt").startswith("0."):  # the longest first
        for fault in (name for name in COMPANY_FAULTS if name in scripts):
            for client, dialect in ((OURS, CONTINUES), ("open_llm", CONTINUES), ("ollama", NATIVE)):
                add(f"company {client}", False, dialect, fault)
    for fault in scripts:
        for dialect in (CONTINUES, BEGINS_ANEW):
            add(OURS, False, dialect, fault)
        for client in ("openai",) if quick else PEERS:
            add(client, True, CONTINUES, fault)
            if not quick:
                add(client, False, CONTINUES, fault)
                add(client, True, BEGINS_ANEW, fault)
        if not quick and fault != "keepalive_only":  # Ollama's own API has no comments
            add("ollama", False, NATIVE, fault)
            add("ollama", True, NATIVE, fault)
    return made


def measure(seed: int, quick: bool = False, only: Sequence[str] = (), *, loud: bool = False) -> Part:
    """Runs it all.

    Args:
        seed: of the texts, of the back-offs and of the mix.
        quick: ours and the openai client alone, three faults: to see that it works.
        only: faults; all where there is none.
        loud: tells each outcome on standard error as it comes.
    """
    scripts = {**FAULTS, "mix": mix(seed)}
    chosen = only or (("hang", "close") if quick else tuple(scripts))
    scripts = {name: script for name, script in scripts.items() if name in chosen or name == "none"}
    cells = _cells(scripts, _bare_seconds(seed), quick)

    def tell(text: str) -> None:
        if loud:
            print(text, file=sys.stderr, flush=True)

    outcomes, missing = run(cells, seed=seed, at_once=2 * (os.cpu_count() or 2), tell=tell)
    found = Found(scripts, outcomes, seed)
    return Part(
        "Faults of the server", f"python -m bench.faults --seed {seed}" + " --quick" * quick, _tables(found, seed), list(_goals(found)), _plots(found),
        [_SILENT, *(f"{LABELS[client.split()[-1]]} is left out: {why}" for client, why in missing.items())], _versions(missing),
    )  # fmt: skip


def _shared(seed: int) -> list[tuple[int, int]]:
    """Of each call's prompt, all its tokens and those that the server knows from the prompt before."""
    cache, made, shares = PrefixCache(1), workload.answers(seed), []
    for number in range(workload.CALLS):
        prompt = render(workload.messages(made[:number]))
        shares.append((len(prompt), cache.shared(prompt)))
        cache.hold(prompt)
    return shares


def cached_tokens(seed: int, call: int) -> int:
    """Tokens of the prompt of this call, from 1, that come from the server's prefix cache."""
    return _shared(seed)[call - 1][1] if 0 < call <= workload.CALLS else 0


def _bare_seconds(seed: int) -> float:
    """What the machine needs for all prompts, without what each shares with the one before, and for all answers."""
    prompts = sum(whole - shared for whole, shared in _shared(seed))
    decoded = sum(len(tokenize(text)) for text in workload.answers(seed))
    return prompts / MACHINE.prefill_speed + decoded / MACHINE.decode_speed


def _versions(missing: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for environment in dict.fromkeys(name for name, _, clients in RUNNERS.values() if not set(clients) & set(missing)):
        for package, number in versions(environment).items():
            label = package if environment != "own" or package == "metagpt" else f"{package} (MetaGPT's)"
            found[label] = number
    return found


def _tables(found: Found, seed: int) -> list[Table]:
    how = "Each cell: waste / wall (1.00 / 1.00 is a run without any fault), or ✗ and how many of the ten answers were right."
    sides = [
        ("A server that can go on with an answer (llama.cpp), best settings", CONTINUES, True, PEERS, how),
        ("The same, default settings", CONTINUES, False, PEERS, "Ours has no other settings than its defaults."),
        ("A server that cannot (LM Studio), best settings", BEGINS_ANEW, True, PEERS, ""),
    ]
    tables = []
    for title, dialect, best, peers, about in sides:
        there = [peer for peer in peers if found.cells(client=peer, dialect=dialect, best=best)]
        if there:
            rows = [
                [fault, found.short(OURS, False, dialect, fault), *(found.short(peer, best, dialect, fault) for peer in there)]
                for fault in found.scripts
            ]
            tables.append(Table(title, ["fault", "ours", *(LABELS[peer] for peer in there)], rows, about))
    if found.cells(client="ollama"):
        rows = [[fault, *(found.short("ollama", best, NATIVE, fault) for best in (False, True))] for fault in found.scripts]
        tables.append(
            Table("MetaGPT's ollama provider on Ollama's own API", ["fault", "default", "best"], rows, "Measured by its own run.")
        )
    if found.cells(company=True):
        clients = (OURS, "open_llm", "ollama")
        dialects = {OURS: CONTINUES, "open_llm": CONTINUES, "ollama": NATIVE}
        rows = [[fault, *(found.short(f"company {client}", False, dialects[client], fault) for client in clients)]
                for fault in COMPANY_FAULTS if fault in found.scripts]  # fmt: skip
        about = "Each measured by its own run without faults; ✗ with the files of the project that are there and whole, of five."
        tables.append(Table("MetaGPT's software company", ["fault", *(LABELS[client] for client in clients)], rows, about))
    return [_summary(found), *tables, _settings(), _faults(found, seed), _details(found)]


def _summary(found: Found) -> Table:
    """What each client survives of the whole list, on the server that can go on with an answer."""
    rows = []
    for client in (OURS, *PEERS):
        told, finished = [], []
        for best in (False, True):
            cells = found.cells(client=client, dialect=CONTINUES, best=best and client != OURS)
            finished = [cell for cell in cells if found.outcomes[cell].finished]
            told.append(f"{len(finished)} of {len(cells)}" if cells else "n/a")
        most = [f"{max(map(measure, finished)):.2f}" if finished else "n/a" for measure in (found.waste, found.wall)]
        rows.append([LABELS[client], *told, *most, str(_lines(client))])
    head = ["client", "finished, default settings", "finished, best settings", "waste, the most", "wall, the most", "lines of settings"]
    about = "Ten calls of one agent under each script of faults; waste and wall are those of the runs that finished with the best settings."
    return Table("What each client survives", head, rows, about)


def _lines(client: str) -> int:
    return sum(bool(line.strip()) for line in SETTINGS.get((client, "best"), "").splitlines())


def _settings() -> Table:
    rows = []
    for client in (OURS, *PEERS, "ollama"):
        text = SETTINGS.get((client, "best"), "")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        rows.append([LABELS[client], str(_lines(client)), "; ".join(f"`{line}`" for line in lines) or "none"])
    return Table("Settings beyond address and model", ["client", "lines for the best", "they are"], rows)


def _faults(found: Found, seed: int) -> Table:
    rows = []
    for name, script in found.scripts.items():
        told = ", ".join(
            f"{fault.kind} at request {fault.on}" if name == "mix" else f"at request {fault.on}" for fault in script.faults
        )
        rows.append([name, told or "-", f"{script.length:g} s"])
    return Table("The faults", ["fault", "strikes", "its own length"], rows, f"The mix is that of seed {seed}.")


def _details(found: Found) -> Table:
    rows = []
    order = list(found.scripts)
    for cell in sorted(found.outcomes, key=lambda cell: (order.index(cell.fault), cell.dialect, cell.company, cell.client, cell.best)):
        outcome = found.outcomes[cell]
        if cell.client == "bare":
            continue
        ended = outcome.error.splitlines()[0][:90] if outcome.error else "wrong answer" if not outcome.finished else ""
        rows.append([
            cell.fault, cell.dialect, ("company: " if cell.company else "") + _name(cell.client, cell.best),
            "yes" if outcome.finished else f"no, {outcome.right} of {outcome.wanted}", str(outcome.requests),
            f"{found.waste(cell):.3f}", f"{found.wall(cell):.3f}", "yes" if found.in_time(cell) and outcome.finished else "no",
            ended,
        ])  # fmt: skip
    head = ["fault", "server", "client", "finished", "requests", "waste", "wall", "in time", "how it ended otherwise"]
    return Table("All runs", head, rows, folded=True)


def _goals(found: Found) -> Iterable[Goal]:
    for dialect, manner in ((CONTINUES, "that can go on with an answer"), (BEGINS_ANEW, "that cannot")):
        cells = found.cells(client=OURS, dialect=dialect)
        if not cells:
            continue
        where = f"ours, a server {manner}"
        finished = [cell for cell in cells if found.outcomes[cell].finished]
        yield _all(f"{where}: finished", finished, cells)
        most = max(cells, key=found.waste)
        fits = found.waste(most) <= WASTE[dialect]
        yield Goal(f"{where}: waste, the most", f"≤ {WASTE[dialect]}", f"{found.waste(most):.3f} ({most.fault})", fits)
        yield _all(f"{where}: wall ≤ 1.1 × bare + the fault's own length", [cell for cell in cells if found.in_time(cell)], cells,
                   {cell: f"{cell.fault} {found.outcomes[cell].seconds:.0f} s, allowed "
                          f"{1.1 * found.ideal(cell).seconds + found.scripts[cell.fault].length:.0f} s" for cell in cells})  # fmt: skip
        better = {cell: found.beaten_by(cell) for cell in cells}
        why = {cell: f"{cell.fault}: {', '.join(_name(other.client, other.best) for other in rivals)}" for cell, rivals in better.items()}
        yield _all(f"{where}: best or equal", [cell for cell in cells if not better[cell]], cells, why)
    cells = found.cells(client=f"company {OURS}")
    if cells:
        yield _all("ours, MetaGPT's software company: finished", [cell for cell in cells if found.outcomes[cell].finished], cells)


def _all(what: str, met: Sequence[Cell], of: Sequence[Cell], why: Optional[dict[Cell, str]] = None) -> Goal:
    rest = [cell for cell in of if cell not in met]
    told = "; ".join(why[cell] if why else cell.fault for cell in rest)
    return Goal(what, f"all {len(of)}", str(len(met)), not rest, told)


def _plots(found: Found) -> list[Plot]:
    plots = []
    for dialect, manner in ((CONTINUES, "can go on with an answer"), (BEGINS_ANEW, "cannot go on with an answer")):
        arms = [(OURS, False)]
        arms += [(peer, best) for peer in PEERS for best in (True, False) if found.cells(client=peer, dialect=dialect, best=best)]
        grid = []
        for fault in found.scripts:
            line = []
            for client, best in arms:
                cell = found._cells.get((client, best, dialect, fault))
                level = "none" if cell is None else "good" if found.good(cell) else "late" if found.outcomes[cell].finished else "bad"
                line.append({"text": found.short(client, best, dialect, fault), "level": level})
            grid.append(line)
        data = {"rows": list(found.scripts), "columns": [_name(*arm) for arm in arms], "cells": grid,
                "legend": {"good": "finished, within the goals", "late": "finished, late or wasteful", "bad": "not finished"}}  # fmt: skip
        plots.append(Plot(f"faults-{dialect}", "grid", f"Ten calls under each fault, on a server that {manner}: waste / wall", data))
    return plots


def main(arguments: Optional[list[str]] = None) -> Part:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="ours and the openai client alone, two faults")
    parser.add_argument("--only", default="", help="faults, with commas between them")
    parser.add_argument("--loud", action="store_true", help="tell each outcome as it comes")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    unknown = set(only) - {*FAULTS, "mix"}
    if unknown:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; known are {', '.join(FAULTS)}, mix")
    part = measure(options.seed, options.quick, only, loud=options.loud)
    print(part.markdown())
    return part


if __name__ == "__main__":
    main()
