"""What the journal costs: a call that is recorded, and what is looked up among 1,000,000 calls.

    python -m bench.journal [calls]

Times are medians, and the 99th of 100. A lookup opens the file, as the first of a process does. The goal of 100 ms is one
per cent of a call of ten seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial as bound
from pathlib import Path
from typing import Callable, Optional

from metagpt_localllm import journal as rows
from metagpt_localllm.journal import CallRecord, Journal, RunRecord, new_id
from metagpt_localllm.state import State

OF_A_RUN = 500
TEXT = "def main():\n    return 'an answer of some hundred tokens'\n" * 8
LONG = TEXT * 60
CALL = CallRecord(
    number=1, digest="", action="WriteCode", role="Engineer", tier="default", model="qwen2.5-coder:7b",
    server="http://127.0.0.1:8080/v1", started=1.7e9, ended=1.7e9 + 90, outcome="done", finish_reason="stop",
    wanted_tokens=2048, answer={"content": TEXT}, usage={"prompt_tokens": 3000, "completion_tokens": 130},
    timings={"ttft": 31.5, "decode": 58.2}, deadlines={"first_token": 120.0, "stall": 30.0, "total": 900.0},
    attempts=[{"outcome": "done", "seconds": 89.7}],
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.journal", description=__doc__.splitlines()[0])
    parser.add_argument("calls", type=int, nargs="?", default=1_000_000)
    calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as folder:
        state = State(Path(folder) / "state.db")
        journal = Journal(state)
        fill(state, calls)
        size = state.path.stat().st_size
        print(f"{calls:,} calls in {calls // OF_A_RUN:,} runs, {size / 1e6:,.0f} MB\n")
        record(state, journal)
        look_up(journal, calls // OF_A_RUN)
        state.close()


def fill(state: State, calls: int) -> None:
    for n in range(calls // OF_A_RUN):
        run = a_run(n)

        def job(database, run=run, n=n):
            rows._put_run(database, run)
            for number in range(1, OF_A_RUN + 1):
                rows._put_call(database, run.id, replace(CALL, number=number, digest=a_digest(n, number)))

        state.write(job)
        if n % 50 == 0:
            assert state.flush(600)
    assert state.flush(600)
    state.close()


def a_run(n: int) -> RunRecord:
    return RunRecord(f"20260101-{n:06}-abcd", f"key{n}", ("metagpt", "a game"), "/home/me/game", 1.7e9 + n, 1.7e9 + n)


def a_digest(n: int, number: int) -> str:
    return f"{n * 7919 + number:064x}"


def record(state: State, journal: Journal) -> None:
    """A call with its request, ten checkpoints and an answer of 480 characters or 29 kB."""
    for name, text in (("480 characters", TEXT), (f"{len(LONG):,} characters", LONG)):
        run = new_id(time.time())
        journal.begin_run(RunRecord(run, "new", ("metagpt",), "/", time.time(), time.time()))
        assert state.flush(60)
        costs = [record_one(state, journal, run, number, text) for number in range(1, 101)]
        show(f"caller: a call of {name}", [cost[0] for cost in costs], 1.0)
        show(f"until all is on the disk: a call of {name} (13 writes)", [cost[1] for cost in costs], 100.0)
    state.close()


def record_one(state: State, journal: Journal, run: str, number: int, text: str) -> tuple[float, float]:
    """Seconds in the caller, and until the thread has done it all."""
    call = replace(CALL, number=number, outcome="running", answer=None, digest=a_digest(10**6, number))
    steps: list[Callable[[], None]] = [lambda: journal.begin_call(run, call)]
    for part in range(10):
        partial, request = {"content": text[: len(text) * part // 10]}, LONG.encode() if part == 0 else None
        steps.append(bound(journal.checkpoint, run, number, partial, request))
    steps.append(lambda: journal.end_call(run, number, "done", answer={"content": text}, usage=CALL.usage))
    caller = whole = 0.0
    for step in steps:
        started = time.perf_counter()
        step()
        caller += time.perf_counter() - started
        assert state.flush(60)
        whole += time.perf_counter() - started
    return caller, whole


def look_up(journal: Journal, runs: int) -> None:
    picked = [n * 7919 % runs for n in range(200)]
    show("a run of a key", [timed(lambda n=n: journal.latest(f"key{n}")) for n in picked], 1.0)
    show("a digest", [timed(lambda n=n: journal.calls(a_run(n).id, a_digest(n, 77))) for n in picked], 1.0)
    show(f"all {OF_A_RUN} calls of a run", [timed(lambda n=n: journal.calls(a_run(n).id)) for n in picked], 1.0)
    show("the newest 50 runs", [timed(journal.runs) for _ in range(50)])
    with_open(journal, picked)


def with_open(journal: Journal, picked: list[int]) -> None:
    """The same without the file being opened each time."""

    def query(database):
        def one(n, sql, *values):
            return timed(lambda: database.execute(sql, (a_run(n).id, *values)).fetchall())

        digest = f"SELECT {rows._IN_CALL} FROM calls WHERE run = ? AND digest = ? AND NOT superseded"
        run = f"SELECT {rows._IN_CALL} FROM calls WHERE run = ? AND NOT superseded ORDER BY number"
        return [one(n, digest, a_digest(n, 78)) for n in picked], [one(n, run) for n in picked]

    found = journal._state.read(query, None)
    assert found
    show("a digest, the query alone", found[0])
    show(f"all {OF_A_RUN} calls of a run, the query alone", found[1])


def timed(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    found = what()
    seconds = time.perf_counter() - started
    assert found
    return seconds


def show(what: str, seconds: list[float], goal: Optional[float] = None) -> None:
    median, worst = statistics.median(seconds) * 1e3, sorted(seconds)[len(seconds) * 99 // 100] * 1e3
    verdict = "" if goal is None else f"   goal {goal:g} ms: {'met' if median <= goal else 'MISSED'}"
    print(f"{what:70} {median:8.3f} ms {worst:8.3f} ms{verdict}")


if __name__ == "__main__":
    main()
