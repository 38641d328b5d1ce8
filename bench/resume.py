"""What a killed run costs when the same command is started again: the demo's software company, without its faults.

    python -m bench.resume [--kills N] [--seed S] [--quick]

MetaGPT is killed (SIGKILL) at 10, 50 and 90 % of the tokens that an unbroken run decodes and at points drawn at random,
while the simulated server stays up, and is then started again in the same folder. Beside it, at the three fixed points:
MetaGPT's own provider, with ``--recover-path`` and started anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Optional

from metagpt_localllm.demo import MACHINE, _Company, _Project, _write_config
from metagpt_localllm.simulator import Simulator, SimulatorThread

OURS, STOCK = "local_llm", "openai"
LABELS = {OURS: "ours", STOCK: "MetaGPT's own: --recover-path, then anew"}
IDEA = "Create a snake game for the terminal"
FIXED = (0.1, 0.5, 0.9)
LIMIT = 300.0
#: The server was up before: how long its model takes to load is another matter.
SERVER = replace(MACHINE, load_time=0.0)
#: In ours' window MetaGPT's own provider never ends: a prompt is too long for it, and nothing trims it.
SERVERS = {OURS: SERVER, STOCK: replace(SERVER, context=2 * SERVER.context)}
#: Goal: tokens decoded twice, of those of an unbroken run.
TWICE = 0.02
#: What MetaGPT makes anew in each run: file names (new_filename), ids of messages and documents, times.
STAMPS = re.compile(
    r"20\d{12}(?:-[0-9a-f]{8})?|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|\b[0-9a-f]{32}\b"
    r"|20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d+)?"
)


@dataclass
class Part:
    """One process: its exit status, what the server did for it, and seconds from its first event (request) on."""

    status: int
    decoded: int
    prefilled: int
    requests: int
    start: float
    work: float
    words: str = ""


@dataclass
class Killed:
    """A run that was killed and started again."""

    point: float
    parts: list[Part]
    same: str
    recovered: str = ""

    @property
    def decoded(self) -> int:
        return sum(part.decoded for part in self.parts)

    @property
    def prefilled(self) -> int:
        return sum(part.prefilled for part in self.parts)


class Company:
    """A folder with a home of its own, and the command that is started there."""

    def __init__(self, folder: Path, provider: str, simulator: Simulator) -> None:
        self.folder, self.provider, self.simulator = folder, provider, simulator
        self.events = folder / "events.jsonl"
        (folder / "workspace").mkdir(parents=True)
        _write_config(folder / "home" / ".metagpt" / "config2.yaml", provider, simulator, simulator.scale)

    def command(self, recover: bool) -> list[str]:
        company = _Company.installed()
        python = [sys.executable, "-W", "ignore", "-m"]
        if recover:
            storage = self.folder / "workspace" / "storage" / "team"
            return [*python, "metagpt.software_company", IDEA, "--recover-path", str(storage)]
        return [*python, "metagpt_localllm._demo_child", IDEA, str(company.rounds), str(self.events)]

    def run(self, kill_at: Optional[int] = None, *, recover: bool = False) -> Part:
        """Until its end, or until the server has decoded ``kill_at`` tokens in all."""
        root = str(Path(__file__).parent.parent)
        here = {**os.environ, "HOME": str(self.folder / "home"), "METAGPT_PROJECT_ROOT": str(self.folder),
                "USERPROFILE": str(self.folder / "home"), "PYTHONUSERBASE": site.getuserbase(),
                "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
                "METAGPT_LOCALLLM_TIME_SCALE": f"{self.simulator.scale:g}"}  # fmt: skip
        here.pop("METAGPT_LOCALLLM_DISABLE", None)
        here.pop("METAGPT_LOCALLLM_RESUME", None)
        if self.provider == STOCK:
            here["METAGPT_LOCALLLM_DISABLE"] = "1"
        self.events.unlink(missing_ok=True)
        stats = self.simulator.stats
        decoded, prefilled, requests = stats.decode_tokens, stats.prefill_tokens, stats.requests
        started, begun = time.monotonic(), 0.0
        log_file = self.folder / "metagpt.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                self.command(recover), cwd=self.folder, env=here, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
            try:
                while process.poll() is None and time.monotonic() - started < LIMIT:
                    if not begun and (stats.requests > requests or self._said()):
                        begun = time.monotonic()
                    if kill_at is not None and stats.decode_tokens >= kill_at:
                        process.send_signal(signal.SIGKILL)
                        break
                    time.sleep(0.002)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        ended = time.monotonic()
        time.sleep(0.3)  # the server notices that its client has left
        words = log_file.read_text(encoding="utf-8", errors="replace").strip()
        return Part(
            process.returncode, stats.decode_tokens - decoded, stats.prefill_tokens - prefilled,
            stats.requests - requests, (begun or ended) - started, ended - (begun or ended), words,
        )  # fmt: skip

    def _said(self) -> bool:
        return self.events.exists() and self.events.stat().st_size > 0

    def project(self, raw: bool = False) -> dict[str, str]:
        """Name and digest of each file of the workspace but git's; without what each run makes anew, unless ``raw``."""
        found = {}
        for path in sorted((self.folder / "workspace").rglob("*")):
            name = path.relative_to(self.folder / "workspace")
            if path.is_file() and ".git" not in name.parts:
                text = path.read_bytes().decode("utf-8", "replace")
                if not raw:
                    text = STAMPS.sub("STAMP", text.replace(str(self.folder), "FOLDER"))
                    if name.name == ".dependencies.json":  # MetaGPT writes sets, whose order each process chooses
                        text = json.dumps({key: sorted(value) for key, value in json.loads(text).items()})
                found[str(name) if raw else STAMPS.sub("STAMP", str(name))] = text
        return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that are not the same in both."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


class Bench:
    """Runs it all in one folder."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.folder, self.scale = folder, scale
        self.made = 0

    def whole(self, provider: str) -> tuple[Part, Company]:
        """A run that nothing stops."""
        with SimulatorThread(SERVERS[provider], scale=self.scale) as simulator:
            company = self._company(provider, simulator)
            part = company.run()
        if part.status or not _Project.read(company.folder / "workspace").finished:
            raise RuntimeError(f"an unbroken run failed: {part.words[-1000:]}")
        return part, company

    def killed(self, provider: str, point: float, whole: Part, project: dict[str, str]) -> Killed:
        """A run that is killed when this part of an unbroken run's tokens is decoded, and started again; prints its row."""
        with SimulatorThread(SERVERS[provider], scale=self.scale) as simulator:
            company = self._company(provider, simulator)
            parts, recovered = [company.run(max(round(whole.decoded * point), 1))], ""
            if provider == STOCK:
                parts.append(company.run(recover=True))
                error = [line for line in parts[-1].words.splitlines() if re.match(r"\w+Error\b", line)]
                recovered = (error or ["it ran"])[-1].replace(str(company.folder), "…")
            parts.append(company.run())
            differ = differing(project, company.project())
            wrong = ", ".join(differ) or (parts[-1].words[-200:] if parts[-1].status else "")
            same = f"no: {wrong}" if wrong else "yes"
        done = Killed(point, parts, same, recovered)
        print(row(LABELS[provider], done, whole), flush=True)
        return done

    def _company(self, provider: str, simulator: Simulator) -> Company:
        self.made += 1
        return Company(self.folder / f"{self.made:03}", provider, simulator)


HEAD = (
    "| | killed at | decoded twice | prefill / an unbroken run's | requests | wall of the rest / its share | same project |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def twice(run: Killed, whole: Part) -> float:
    return (run.decoded - whole.decoded) / whole.decoded


def rest(run: Killed, whole: Part) -> float:
    """Time that the resumed part took, over the part of an unbroken run's that was left; from its first event on."""
    left = 1 - run.parts[0].decoded / whole.decoded
    return run.parts[-1].work / (whole.work * left)


def row(name: str, run: Killed, whole: Part) -> str:
    requests = " + ".join(str(part.requests) for part in run.parts)
    return (
        f"| {name} | {100 * run.parts[0].decoded / whole.decoded:.1f} % | {100 * twice(run, whole):.2f} % "
        f"| {run.prefilled / whole.prefilled:.3f} | {requests} | {rest(run, whole):.2f} | {run.same} |"
    )


def spread(values: list[float], form: str = "{:.2f}") -> str:
    return f"{form.format(statistics.median(values))} (to {form.format(max(values))})"


def unbroken(bench: Bench, provider: str) -> tuple[Part, dict[str, str]]:
    """Two runs that nothing stops, and in what they differ; the first, and its project."""
    whole, company = bench.whole(provider)
    project, raw = company.project(), company.project(raw=True)
    again, company = bench.whole(provider)
    alike = len({*raw} - {*differing(raw, company.project(raw=True))})
    print(
        f"\n{provider}, unbroken, in a window of {SERVERS[provider].context:,}: {whole.decoded:,} tokens decoded, "
        f"{whole.prefilled:,} prefilled, {whole.requests} requests, {whole.work:.1f} s and {whole.start:.1f} s to start; "
        f"a second run: {again.decoded:,}, {again.prefilled:,}, {again.requests}, {again.work:.1f} s.\n"
        f"Of the {len(raw)} files of its project {alike} are byte for byte the same in the second run; without stamps and "
        f"the order of .dependencies.json differ: {', '.join(differing(project, company.project())) or 'none'}.\n"
    )
    print(HEAD, flush=True)
    return whole, project


def ours(bench: Bench, points: list[float]) -> list[Killed]:
    whole, project = unbroken(bench, OURS)
    runs = [bench.killed(OURS, point, whole, project) for point in points]
    print(
        f"\nMedian (and the most) of {len(runs)} kills: decoded twice "
        f"{spread([100 * twice(run, whole) for run in runs])} %, prefill "
        f"{spread([run.prefilled / whole.prefilled for run in runs], '{:.3f}')} of an unbroken run's, wall of the rest "
        f"{spread([rest(run, whole) for run in runs])} of its share.\n"
    )
    most, same = max(twice(run, whole) for run in runs), sum(run.same == "yes" for run in runs)
    print(f"- decoded twice, the most, goal ≤ {100 * TWICE:g} %: {100 * most:.2f} %: {verdict(most <= TWICE)}")
    print(f"- the same project, goal all {len(runs)}: {same}: {verdict(same == len(runs))}")
    return runs


def stock(bench: Bench) -> list[Killed]:
    whole, project = unbroken(bench, STOCK)
    runs = [bench.killed(STOCK, point, whole, project) for point in FIXED]
    said = Counter(run.recovered for run in runs)
    print("\n" + "\n".join(f"--recover-path, {times} of {len(runs)} times: {text}" for text, times in said.items()))
    return runs


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def parsed(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="at random points, beside the fixed ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=400.0, help="times faster than real")
    parser.add_argument("--providers", nargs="+", choices=[OURS, STOCK], default=[OURS, STOCK])
    parser.add_argument("--quick", action="store_true", help="three kills, ours only: to see that it works")
    parser.add_argument("--keep", type=Path, help="a new folder to run in, which stays; default: a temporary one")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kills, options.providers = 0, [OURS]
    return options


def main(arguments: Optional[list[str]] = None) -> list[Killed]:
    """Prints the tables; the runs that were killed."""
    options = parsed(arguments)
    drawn = random.Random(options.seed)
    points = sorted(drawn.uniform(0.01, 0.99) for _ in range(options.kills))
    python = ".".join(map(str, sys.version_info[:3]))
    print(
        f"Python {python}, MetaGPT {version('metagpt')}; seed {options.seed}; {options.scale:g} times faster than real"
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.keep or Path(folder), options.scale)
        runs = ours(bench, [*FIXED, *points]) if OURS in options.providers else []
        if STOCK in options.providers:
            runs += stock(bench)
    return runs


if __name__ == "__main__":
    main()
