"""The demonstration: MetaGPT's own software company against the simulated server, with faults on."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metagpt_localllm._demo_view import DemoView
from metagpt_localllm.phases import clock
from metagpt_localllm.simulator import Machine, Simulator, SimulatorThread, parse_fault
from metagpt_localllm.simulator.answers import FILES
from metagpt_localllm.statistics import TIMEOUTS

__all__ = ["DemoOptions", "run_demo"]

#: What goes wrong, by number of the chat request.
FAULTS = (
    "hang:on=2",
    "stall:on=5,after=40",
    "drop:on=8,after=60",
    "error:on=11,status=500",
    "close:on=14,after=80",
    "refuse:on=17,duration=60s",
    "html:on=18",
)
#: Seconds between two looks at what MetaGPT does.
_LOOK = 0.1
#: A 34B model, half of it on the CPU.
MACHINE = Machine(prefill_speed=40.0, decode_speed=2.5, load_time=90.0, slots=1, context=4096)


@dataclass(frozen=True)
class _Company:
    """What the software company of one MetaGPT needs.

    Attributes:
        context: window in tokens; the roles of 1.0.0 have prompts of up to 20,000.
        rounds: until the engineer is done.
        scale: how many times faster than real, for a run of about a minute.
    """

    context: int
    rounds: int
    scale: float

    @classmethod
    def installed(cls) -> _Company:
        return cls(4096, 5, 120.0) if metadata.version("metagpt").startswith("0.") else cls(32768, 20, 300.0)


@dataclass(frozen=True)
class DemoOptions:
    """What the command line says; ``limit`` in seconds."""

    provider: str
    output: Path
    scale: Optional[float]
    idea: str
    limit: float
    verbose: bool


def run_demo(options: DemoOptions) -> int:
    """Runs it and shows the table.

    Returns:
        The exit status: 0 when the project was finished.

    Raises:
        FileExistsError: the output folder holds something already that is no earlier demo.
    """
    console = Console()
    company = _Company.installed()
    machine, scale = replace(MACHINE, context=company.context), options.scale or company.scale
    folder = options.output.resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / ".metagpt-localllm-demo").exists():
        raise FileExistsError(f"{folder} is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metagpt-localllm-demo").touch()
    events_file = folder / "events.jsonl"
    log_file = folder / "metagpt.log"
    console.print(
        f"MetaGPT with [bold]{options.provider}[/] on a simulated 34B model "
        f"({machine.prefill_speed:g} tokens/s prefill, {machine.decode_speed:g} decode, {machine.context} context), "
        f"{scale:g} times faster than real; all times below but the wall time are that machine's. Faults: {', '.join(FAULTS)}."
    )
    started = time.monotonic()
    with SimulatorThread(machine, scale=scale, faults=[parse_fault(text) for text in FAULTS]) as simulator:
        _write_config(folder / "home" / ".metagpt" / "config2.yaml", options.provider, simulator, scale)
        status = _run_metagpt(options, company, folder, events_file, log_file, simulator, console)
        elapsed = time.monotonic() - started
        events = _read(events_file)
        project = _Project.read(folder / "workspace")
        finished = status == 0 and project.finished
        console.print(_table(options.provider, simulator, events, elapsed, scale, project, finished))
    log = escape(str(log_file))
    if finished:
        console.print(f"The project ({project.files} files) is in {escape(str(project.folder))}; MetaGPT's output in {log}.")
        run_it = escape(f"{sys.executable} {project.main} --delay 0.02")
        console.print(f"Run it: [bold]{run_it}[/]", soft_wrap=True)
        return 0
    if status is None:
        how = f"was ended after {options.limit:g} s"
    elif status:
        how = f"failed (exit status {status})"
    else:
        how = "broke off (MetaGPT swallows the error and exits with 0)"
    console.print(f"[red]The run {how}; no finished project.[/] Its last words, from {log}:")
    for line in _last_words(log_file):
        console.print(f"  {line}", markup=False, highlight=False)
    return 1


def _write_config(path: Path, provider: str, simulator: Simulator, scale: float) -> None:
    llm: dict[str, Any] = {"api_type": provider, "base_url": simulator.base_url, "model": simulator.model,
                           "api_key": "not-needed"}  # fmt: skip
    if provider == "openai":
        llm["timeout"] = max(round(600 / scale), 1)
    else:
        # No timeouts: they are learned.
        llm["local"] = {"retry": {"backoff": {"initial": 1 / scale, "max": 60 / scale}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"llm": llm}), encoding="utf-8")


def _run_metagpt(
    options: DemoOptions, company: _Company, folder: Path, events_file: Path, log_file: Path, simulator: Simulator,
    console: Console,
) -> Optional[int]:
    """Exit status of MetaGPT; None when it was ended for taking too long."""
    environment = {**os.environ, "HOME": str(folder / "home"), "USERPROFILE": str(folder / "home"),
                   "METAGPT_PROJECT_ROOT": str(folder), "PYTHONUNBUFFERED": "1",
                   "PYTHONUSERBASE": site.getuserbase()}  # fmt: skip
    environment.pop("METAGPT_LOCALLLM_DISABLE", None)
    environment["METAGPT_LOCALLLM_TIME_SCALE"] = f"{simulator.scale:g}"
    if options.provider == "openai":
        environment["METAGPT_LOCALLLM_DISABLE"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", "metagpt_localllm._demo_child", options.idea, str(company.rounds),
               str(events_file)]  # fmt: skip
    end = time.monotonic() + options.limit

    began: Optional[float] = None

    def head() -> str:
        nonlocal began
        stats = simulator.stats
        if not stats.requests:
            return "MetaGPT is starting (it takes some 10 s to import) …"
        began = began or time.monotonic()
        passed = clock((time.monotonic() - began) * simulator.scale)
        tokens = stats.prefill_tokens + stats.decode_tokens
        return f"{passed} on the simulated machine: {stats.completed} answers, {stats.requests} requests, {tokens:,} tokens"

    events_file.unlink(missing_ok=True)
    with log_file.open("wb") as log:
        output = None if options.verbose else log
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, stdin=subprocess.PIPE)
        # With --verbose it has the terminal for itself, and draws its own rows there.
        view = None if options.verbose else DemoView(console, events_file, simulator.scale, head)
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    return None
                if view is not None:
                    view.update()
                time.sleep(_LOOK)
            if view is not None:
                view.update()
        finally:
            if view is not None:
                view.end()
            if process.poll() is None:
                process.kill()
            process.wait()
    return process.returncode


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


@dataclass(frozen=True)
class _Project:
    """What lies in the workspace, and what is missing of the files that the simulated architect planned."""

    folder: Path
    files: int
    missing: tuple[str, ...]
    broken: tuple[str, ...]
    main: Optional[Path]

    @property
    def finished(self) -> bool:
        return not self.missing and not self.broken

    @classmethod
    def read(cls, workspace: Path) -> _Project:
        files = [p for p in workspace.rglob("*") if p.is_file() and not {".git", "storage"} & set(p.parts)]
        sources = {path.name: path for path in files if path.suffix == ".py"}
        missing = [name for name in FILES if name not in sources]
        broken = [name for name, path in sources.items() if not _compiles(path)]
        return cls(workspace, len(files), tuple(missing), tuple(broken), sources.get("main.py"))


def _compiles(path: Path) -> bool:
    try:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _table(
    provider: str, simulator: Simulator, events: list[dict[str, Any]], elapsed: float, scale: float,
    project: _Project, finished: bool,
) -> Table:  # fmt: skip
    stats = simulator.stats
    of_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        of_kind[event["event"]].append(event)
    retries, sent, done, trimmed = (of_kind[kind] for kind in ("Retry", "Sent", "Done", "Trimmed"))
    replayed, continued = of_kind["Replayed"], of_kind["Continued"]
    answered = len(done) + len(replayed)
    table = Table(title=f"What happened with {provider}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows: list[tuple[str, str]] = [
        ("project finished", "yes" if finished else "no"),
        ("source files, of those planned", f"{len(FILES) - len(project.missing)} of {len(FILES)}"),
    ]
    if project.missing:
        rows.append(("  missing", ", ".join(project.missing)))
    if project.broken:
        rows.append(("  no valid Python", ", ".join(project.broken)))
    if provider != "openai":
        rows += [
            ("calls answered", f"{answered} of {answered + len(of_kind['Failed'])}"),
            ("  of these by an earlier run", f"{len(replayed)}: {sum(event['tokens'] for event in replayed):,} tokens saved"),
            ("answers gone on with", f"{len(continued)}: {sum(event['tokens'] for event in continued):,} tokens saved"),
            ("retries", f"{len(retries)}"),
            ("  of these after a timeout", f"{sum(event['cause'] in TIMEOUTS for event in retries)}"),
            ("waits for the server", f"{len(of_kind['Waiting']) + len(of_kind['Loading'])}"),
            *_against("first token", "ttft", "first_token", done, sent, scale),
            *_against("gap between tokens", "longest_gap", "stall", done, sent, scale),
            *_against("whole answer", "elapsed", "total", done, sent, scale),
            ("prompts trimmed", f"{len(trimmed)}, by {sum(event['removed_tokens'] for event in trimmed):,} tokens"),
        ]
    rows += [
        ("requests the server got", f"{stats.requests:,}"),
        ("prompt tokens processed", f"{stats.prefill_tokens:,}, and {stats.cached_tokens:,} cached"),
        ("answer tokens", f"{stats.decode_tokens:,}"),
        ("tokens of work thrown away", f"{stats.wasted_tokens:,}"),
        ("faults played", ", ".join(stats.faults) or "none"),
        ("wall time", f"{elapsed:.0f} s"),
        ("  on the real machine", f"about {elapsed * scale / 60:.0f} min"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _against(
    what: str, needed: str, deadline: str, done: list[dict[str, Any]], sent: list[dict[str, Any]], scale: float
) -> list[tuple[str, str]]:
    """The longest that was needed beside the first and the last deadline, in seconds of the real machine."""
    if not sent:
        return []
    most = max((event[needed] or 0.0 for event in done), default=0.0) * scale
    first, last = sent[0][deadline] * scale, sent[-1][deadline] * scale
    return [(f"{what}, the longest", f"{most:,.0f} s"), ("  its deadline, first and last", f"{first:,.0f} s, {last:,.0f} s")]


def _last_words(log_file: Path) -> list[str]:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines() if log_file.exists() else []
    telling = [line.strip() for line in lines if re.match(r"[\w.]*(Error|Timeout|Exception)\b", line)]
    return [line[:300] for line in telling[-6:]]
