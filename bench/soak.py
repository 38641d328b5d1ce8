"""Eight hours at work in two minutes: whether anything is lost, grows or is left behind when much goes wrong.

    python -m bench.soak [--seed 1] [--quick]

Ten roles ask all the time by MetaGPT's ``aask``, each with a history that grows until it no longer fits the context and is
trimmed, then with a new one. The server is our simulator in a process of its own (it keeps every request, which is its
growth and not ours): a llama.cpp of three slots, 300 times faster than real. About one request in ten meets a fault, of any
kind that can be survived, chosen by the seed; now and then the whole server crashes and loads its model again.

What is asked for is in each question, and the answer can be told from it: so each answer is compared, letter by letter.
A call may fail by design: when all attempts that it has were struck. Then it says so, and the role asks again.
Memory is the resident set of the process with MetaGPT in it, after a garbage collection.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence

import psutil

from bench.results import Goal, Part, Plot, Table
from metagpt_localllm.simulator import KINDS, Answer, Fault, Machine, Simulator

__all__ = ["measure"]

SCALE, HOURS, QUICK_HOURS = 300.0, 8.0, 0.5
ROLES, ATTEMPTS = 10, 4
MACHINE = Machine(prefill_speed=400, decode_speed=5, load_time=30, slots=3, context=2048)
#: Not among them: "truncate" makes the server cut what is too long, and what we send is not.
SURVIVED = tuple(kind for kind in KINDS if kind != "truncate")
#: Requests from one fault to the next, and simulated seconds from one crash to the next.
GAP, CRASHES = (5, 15), (1800, 5400)
#: Turns of a conversation: it is over the context from the 20th or so on.
TURNS = 30
#: Parts of the time: memory is compared between these two.
AFTER_WARM_UP, AT_THE_END = (0.2, 0.3), (0.9, 1.0)
#: How much of what was held after the warm-up may be held at the end.
FLAT = 1.1
#: Real seconds between two samples.
EVERY = 1.0
WORDS = "parser cache importer retry schedule upload report session budget worker ledger signal filter index".split()


def question(role: int, number: int) -> str:
    rng = random.Random(f"question/{role}/{number}")
    return f"{' '.join(rng.choices(WORDS, k=25))}. Write part {number} of role {role}."


def answer_to(asked: str) -> str:
    """What the model answers: nothing else is right."""
    rng = random.Random(f"answer/{asked}")
    return f"{' '.join(rng.choices(WORDS, k=rng.randint(4, 12)))}: that is the answer to {asked.rpartition(' Write ')[2]}"


# ------------------------------------------------------------------------------------------- the server


def faults_of(seed: int, requests: int = 200_000) -> list[Fault]:
    rng, script, number = random.Random(f"faults/{seed}"), [], 0
    while number < requests:
        number += rng.randint(*GAP)
        # The rest of their kinds' settings is as short as the answers are.
        script.append(Fault(rng.choice(SURVIVED), on=number, after=rng.randint(0, 15), duration=rng.uniform(10, 120),
                            status=rng.choice((500, 502, 503)), retry_after=0.05))  # fmt: skip
    return script


class _Script(list[Fault]):
    """A script in which the fault of a request is found without going through all of them."""

    def __init__(self, script: Sequence[Fault], simulated: Simulator) -> None:
        super().__init__()
        self._by_number = {fault.on: fault for fault in script}
        self._simulated = simulated

    def __iter__(self) -> Any:
        found = self._by_number.get(self._simulated.stats.requests)
        return iter(() if found is None else (found,))


async def _serve(seed: int) -> None:
    """Until its standard input ends; then it says what it has done."""

    def answer(messages: Sequence[Any], _tools: Any) -> Answer:
        return Answer(text=answer_to(str(messages[-1]["content"])))

    async def crash() -> None:
        rng = random.Random(f"crashes/{seed}")
        while True:
            await asyncio.sleep(rng.uniform(*CRASHES) / SCALE)
            if server._server is not None:  # else it is down already
                server.crash(rng.uniform(20, 120))
                crashes.append(time.monotonic())

    crashes: list[float] = []
    async with Simulator(MACHINE, dialect="llama.cpp", scale=SCALE, answer=answer) as server:
        server.faults = _Script(faults_of(seed), server)
        crashing = asyncio.create_task(crash())
        print(server.base_url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        crashing.cancel()
    print(json.dumps({**asdict(server.stats), "crashes": len(crashes)}))


# ------------------------------------------------------------------------------------------- the roles


@dataclass
class Sample:
    """``at``: part of the time that is over; ``calls``: answers until then."""

    at: float
    rss: int
    fds: int
    threads: int
    connections: int
    calls: int


@dataclass
class Found:
    """What the roles have seen, and what was left when they were done.

    Attributes:
        wrong: answers that were not those.
        failed: calls that ended in an error, by its name; ``unexplained``: those that had attempts left.
        retries: attempts that were followed by another, by the error that ended them.
        events: calls that ended, by the event that told of it.
        kept: calls in the journal, by their outcome.
        tasks, connections: left at the end, with places at the server's gate among the tasks.
        grown: where what has grown was allocated, where that was asked for.
    """

    asked: int = 0
    right: int = 0
    wrong: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    retries: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    trimmed: int = 0
    continued: int = 0
    samples: list[Sample] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    connections: int = 0
    seconds: float = 0.0
    grown: list[str] = field(default_factory=list)


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


async def _role(llm: Any, role: int, until: float, found: Found) -> None:
    from metagpt_localllm.errors import LocalLLMError

    history: list[dict[str, str]] = []
    number = 0
    while time.monotonic() < until:
        number += 1
        asked = question(role, number)
        if len(history) >= 2 * TURNS:
            history = []
        history.append({"role": "user", "content": asked})
        while True:
            found.asked += 1
            try:
                answer = await llm.aask(list(history), stream=True)
                break
            except LocalLLMError as error:
                _count(found.failed, type(error).__name__)
                if error.attempts < ATTEMPTS:
                    found.unexplained.append(str(error)[:300])
        found.right += answer == answer_to(asked)
        found.wrong += answer != answer_to(asked)
        history.append({"role": "assistant", "content": answer})


async def _sample(found: Found, began: float, seconds: float, trace: bool) -> None:
    """Samples until it is cancelled; ``trace`` finds out where what has grown was allocated."""
    process, before = psutil.Process(), None
    if trace:
        import tracemalloc

        tracemalloc.start(12)
    while True:
        await asyncio.sleep(EVERY)
        gc.collect()
        at = (time.monotonic() - began) / seconds
        with process.oneshot():
            found.samples.append(Sample(at, process.memory_info().rss, process.num_fds(), process.num_threads(),
                                        len(process.net_connections("tcp")), found.right))  # fmt: skip
        if trace and AFTER_WARM_UP[1] < at < AT_THE_END[0] and before is None:
            before = tracemalloc.take_snapshot()
        if trace and at > AT_THE_END[0] and before is not None and not found.grown:
            found.grown = [str(line) for line in tracemalloc.take_snapshot().compare_to(before, "lineno")[:15]]


async def _work(url: str, hours: float, trace: bool) -> Found:
    from metagpt.configs.llm_config import LLMConfig
    from metagpt.logs import define_log_level, set_llm_stream_logfunc
    from metagpt.provider.llm_provider_registry import create_llm_instance

    from metagpt_localllm import events
    from metagpt_localllm.concurrency import gate_for

    define_log_level("CRITICAL", "CRITICAL")
    set_llm_stream_logfunc(lambda text: None)
    local = {"retry": {"attempts": ATTEMPTS, "backoff": {"initial": 1 / SCALE, "max": 60 / SCALE},
                       "wait_for_server": 3600 / SCALE}, "progress": "log"}  # fmt: skip
    config = {"api_type": "local_llm", "base_url": url, "model": "codebooga-34b", "api_key": "none", "max_token": 256}
    llms = [create_llm_instance(LLMConfig(**config, local=local)) for _ in range(ROLES)]
    found, seconds = Found(), hours * 3600 / SCALE

    def heard(event: Any) -> None:
        if isinstance(event, events.Retry):
            _count(found.retries, event.cause)
        found.trimmed += isinstance(event, events.Trimmed)
        found.continued += isinstance(event, events.Continued)
        if isinstance(event, (events.Done, events.Failed, events.Cancelled)):
            _count(found.events, type(event).__name__)

    unsubscribe = events.subscribe(heard)
    gc.collect()
    gc.freeze()  # what MetaGPT has loaded stays: collecting it again and again takes a tenth of a second each time
    began = time.monotonic()
    sampling = asyncio.create_task(_sample(found, began, seconds, trace))
    await asyncio.gather(*(_role(llm, role, began + seconds, found) for role, llm in enumerate(llms)))
    found.seconds = time.monotonic() - began
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    unsubscribe()
    await asyncio.sleep(0.2)  # the kernel's, and callbacks that are due
    gc.collect()
    found.tasks = [str(task.get_coro()) for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    found.connections = len(psutil.Process().net_connections("tcp"))
    gate = gate_for(url)
    if gate.running or gate.waiting:
        found.tasks.append(f"places at the server: {gate.running} taken, {gate.waiting} waited for")
    found.kept = _journal()
    return found


def _journal() -> dict[str, int]:
    """Calls by outcome, as they are on the disk."""
    import sqlite3

    from metagpt_localllm.session import current
    from metagpt_localllm.settings import JournalSettings
    from metagpt_localllm.state import state_at

    current()  # waits for the disk
    with contextlib.closing(sqlite3.connect(state_at(JournalSettings().path).path)) as database:
        return dict(database.execute("SELECT outcome, count(*) FROM calls GROUP BY outcome").fetchall())


def _child(seed: int, hours: float, trace: bool) -> None:
    command = [sys.executable, "-m", "bench.soak", "--server", "--seed", str(seed)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = asyncio.run(_work(server.stdout.readline().strip(), hours, trace))
        told, _ = server.communicate("", timeout=30)
        print(json.dumps([asdict(found), json.loads(told.splitlines()[-1])]))
    finally:
        server.kill()
        server.wait()


# ------------------------------------------------------------------------------------------- what came out


def measure(seed: int, quick: bool = False, *, trace: bool = False) -> Part:
    """Takes two minutes on a quiet machine, or ten seconds when ``quick``, which says little about memory.

    Args:
        trace: says where what has grown was allocated; slow.

    Raises:
        RuntimeError: the roles' process ended with an error.
    """
    hours = QUICK_HOURS if quick else HOURS
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / ".metagpt").mkdir()
        (Path(home) / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: m}\n")
        root = str(Path(__file__).parent.parent)
        environment = {**os.environ, "HOME": home, "METAGPT_PROJECT_ROOT": home, "PYTHONPATH": root,
                       "METAGPT_LOCALLLM_TIME_SCALE": f"{SCALE:g}"}  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-m", "bench.soak", "--child", "--seed", str(seed), "--hours", str(hours)]
        ran = subprocess.run([*command, *["--trace"] * trace], env=environment, cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the roles' process failed: {ran.stderr[-3000:]}")
    told, server = json.loads(ran.stdout.splitlines()[-1])
    found = Found(**{**told, "samples": [Sample(**sample) for sample in told["samples"]]})
    for line in found.grown:
        print(line, file=sys.stderr)
    return _part(found, server, seed, quick, hours)


def _held(samples: Sequence[Sample], when: tuple[float, float], what: str) -> Optional[float]:
    """The median of what was held in that part of the time."""
    held = [getattr(sample, what) for sample in samples if when[0] <= sample.at <= when[1]]
    return statistics.median(held) if held else None


def _part(found: Found, server: dict[str, Any], seed: int, quick: bool, hours: float) -> Part:
    failed = sum(found.failed.values())
    goals = [
        _goal("answers that are not exactly the right ones", found.wrong),
        _goal("calls without an answer or an error", found.asked - found.right - found.wrong - failed),
        _goal("calls whose end no event told, or another one",
              abs(found.right + found.wrong - found.events.get("Done", 0)) + abs(failed - found.events.get("Failed", 0))),
        _goal("calls that the journal has not, or otherwise",
              abs(found.right + found.wrong - found.kept.get("done", 0)) + abs(failed - found.kept.get("failed", 0))),
        _goal("errors with attempts left", len(found.unexplained), "; ".join(found.unexplained[:3])),
        _goal("tasks, places and connections left behind", len(found.tasks) + found.connections, "; ".join(found.tasks[:3])),
    ]  # fmt: skip
    rows = []
    for what, title, unit in (("rss", "resident memory", 1e6), ("fds", "file descriptors", 1), ("threads", "threads", 1)):
        first, last = _held(found.samples, AFTER_WARM_UP, what), _held(found.samples, AT_THE_END, what)
        if first is None or last is None:
            continue
        peak = max(getattr(sample, what) for sample in found.samples)
        shown = [f"{value / unit:,.0f}" + (" MB" if unit > 1 else "") for value in (first, last, peak)]
        rows.append([title, *shown, f"{last / first:.3f}"])
        goals.append(Goal(f"{title} at the end, of that after the warm-up", f"≤ {FLAT}", f"{last / first:.3f}", last <= FLAT * first))
    memory = Table("What the process holds", ["", "after the warm-up", "at the end", "at most", "end / warm-up"], rows)
    counted = Table("Calls", ["", ""], [
        ["simulated time", f"{found.seconds * SCALE / 3600:.1f} h in {found.seconds:.0f} s"],
        ["calls", f"{found.asked:,}"],
        ["answered, exactly right", f"{found.right:,}"],
        ["failed after all attempts, and asked again", f"{failed:,}" + _listed(found.failed)],
        ["requests that the server saw", f"{server['requests']:,}"],
        ["faults played", f"{sum(server['faults'].values()):,}" + _listed(server["faults"])],
        ["crashes besides", f"{server['crashes']:,}"],
        ["attempts that were followed by another", f"{sum(found.retries.values()):,}" + _listed(found.retries)],
        ["answers that were gone on with", f"{found.continued:,}"],
        ["trims", f"{found.trimmed:,}"],
    ])  # fmt: skip
    series = {
        "resident memory (MB)": [[sample.at * hours, sample.rss / 1e6] for sample in found.samples],
        "file descriptors": [[sample.at * hours, sample.fds] for sample in found.samples],
        "calls answered (hundreds)": [[sample.at * hours, sample.calls / 100] for sample in found.samples],
    }
    data = {"x_label": "simulated hours", "y_label": "", "x_log": False, "y_log": False, "series": series}
    plot = Plot("soak", "lines", "Memory, file descriptors and calls over eight simulated hours", data)
    command = f"python -m bench.soak --seed {seed}" + " --quick" * quick
    return Part("Eight hours at work" if not quick else "Half an hour at work", command, [counted, memory], goals, [plot])


def _goal(what: str, number: int, why: str = "") -> Goal:
    return Goal(what, "0", f"{number:,}", number == 0, why if number else "")


def _listed(counts: dict[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return f" ({', '.join(f'{name} {count}' for name, count in most)})" if counts else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trace", action="store_true", help="say where what has grown was allocated (slow)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hours", type=float, default=HOURS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        asyncio.run(_serve(options.seed))
    elif options.child:
        _child(options.seed, options.hours, options.trace)
    else:
        part = measure(options.seed, options.quick, trace=options.trace)
        goals = Table("Goals", ["goal", "wanted", "got", ""], [goal.row() for goal in part.goals])
        print("\n\n".join([f"## {part.title}", *(table.markdown() for table in (*part.tables, goals)), *part.notes]))


if __name__ == "__main__":
    main()
