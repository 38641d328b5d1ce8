"""All benchmarks that compare and prove: ``python -m bench [--seed N] [--quick]``, with this package's test environment.

Runs bench.faults, bench.soak, bench.concurrency and bench.overhead, draws their plots into bench/results/ and writes
bench/RESULTS.md. The peers and matplotlib are installed by uv into ``.bench/`` at the first time (bench/environments.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional, Sequence

import psutil

from bench.environments import Missing, python_for
from bench.results import Goal, Part, Plot, Table, goals

HERE = Path(__file__).resolve().parent
PARTS = ("faults", "soak", "concurrency", "overhead")
#: bench.overhead's goals, for the ratio to MetaGPT's own provider.
_OVERHEAD = {"call": 1.1, "streamed token": 1.0}


def _measured(name: str, seed: int, quick: bool) -> Part:
    return _overhead() if name == "overhead" else importlib.import_module(f"bench.{name}").measure(seed, quick)


def _overhead() -> Part:
    """What bench/overhead.py prints, as a part."""
    done = subprocess.run([sys.executable, str(HERE / "overhead.py")], capture_output=True, text=True, check=True, cwd=HERE.parent)
    rows, met = [], []
    for what, ours, theirs, ratio in re.findall(
        r"CPU per ([\w ]+): local_llm ([\d.]+ \S+), openai ([\d.]+ \S+), ratio ([\d.]+)", done.stdout
    ):
        rows.append([f"CPU of a {what}", ours, theirs, ratio])
        most = _OVERHEAD[what]
        met.append(Goal(f"CPU of a {what}, of MetaGPT's own provider's", f"≤ {most:g}", ratio, float(ratio) <= most))
    for name, spent, ratio in re.findall(r"python -c pass with ([^:]+): ([\d.]+ ms) of CPU \(median\), ratio ([\d.]+)", done.stdout):
        rows.append([f"python -c pass with {name}", spent, "", ratio])
    table = Table("CPU time", ["what", "ours", "MetaGPT's own, or none", "ratio"], rows)
    return Part("What the plugin costs", "python bench/overhead.py", [table], met)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    except OSError:
        pass
    memory = psutil.virtual_memory().total / 1024**3
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.release().split('-')[0]}"


def _draw(plots: Sequence[Plot], folder: Path) -> str:
    """Why there are no pictures; "" where they were drawn."""
    if not plots:
        return ""
    told = json.dumps([dataclasses.asdict(plot) for plot in plots])
    try:
        command = [python_for("plots"), str(HERE / "plots.py"), str(folder)]
    except Missing as why:
        return str(why)
    subprocess.run(command, input=told, text=True, check=True)
    return ""


def _written(parts: Sequence[Part], failed: dict[str, str], seed: int, quick: bool, seconds: float, undrawn: str) -> str:
    python = platform.python_version()
    versions = {"Python": python, **{name: version for part in parts for name, version in part.versions.items()}}
    head = [
        "# Results",
        "Written by `python -m bench`; what is measured, and how, stands in the docstring of each benchmark's module.",
        f"{datetime.date.today().isoformat()}, {_machine()}; {seconds / 60:.0f} minutes, seed {seed}"
        f"{', quick: not the real figures' if quick else ''}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"To repeat it: `python -m bench --seed {seed}{' --quick' if quick else ''}` in the environment that README's test command makes.",
        goals(parts).markdown().replace("### ", "## "),
    ]
    for part in parts:
        head += [f"## {part.title}", f"`{part.command}`"]
        if not undrawn:
            head += [f"![{plot.title}](results/{plot.name}.svg)" for plot in part.plots]
        head += [*(table.markdown() for table in part.tables), *part.notes]
    head += [f"{name} was not measured: {why}" for name, why in failed.items()]
    head += [f"There are no pictures: {undrawn}"] if undrawn else []
    return "\n\n".join(head) + "\n"


def main(arguments: Optional[list[str]] = None) -> int:
    """Exit status: 0 when everything was measured, whether the goals were met or not; else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="to see that it works; not the real figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md", help="the pictures go to results/ beside it")
    options = parser.parse_args(arguments)
    started, parts, failed = time.monotonic(), [], {}
    for name in options.parts:
        begun = time.monotonic()
        try:
            parts.append(_measured(name, options.seed, options.quick))
        except Exception as error:  # one that fails does not cost the others
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{name}: {failed.get(name, 'measured')}, {time.monotonic() - begun:.0f} s", flush=True)
    undrawn = _draw([plot for part in parts for plot in part.plots], options.output.resolve().parent / "results")
    text = _written(parts, failed, options.seed, options.quick, time.monotonic() - started, undrawn)
    options.output.write_text(text, encoding="utf-8")
    print(goals(parts).markdown())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
