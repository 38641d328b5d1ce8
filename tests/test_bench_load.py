"""The benchmarks of load: the server that they measure with, and that they see what would be wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from bench import concurrency, soak
from bench.batch_server import WORD, prompt_of


@pytest.fixture
def batch_server():
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.batch_server"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    yield server.stdout.readline().strip()
    server.kill()
    server.wait()


@pytest.mark.parametrize("step", [0.01, 0.0])
def test_the_batch_server_says_all_of_an_answer_at_its_pace(batch_server, step):
    body = {"messages": [{"role": "user", "content": prompt_of(200 if not step else 20, step, 0.1)}], "stream": True}
    began, text, last = time.monotonic(), "", None
    with httpx.stream("POST", f"{batch_server}/chat/completions", json=body, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line[len("data: ") :])
                text += "".join(choice["delta"].get("content", "") for choice in last["choices"])
    assert text == WORD * (20 if step else 200)
    assert last["usage"]["completion_tokens"] == (20 if step else 200)
    assert time.monotonic() - began >= 0.1 + 19 * step


def found(**changes):
    whole = {"asked": 10, "right": 10, "events": {"Done": 10}, "kept": {"done": 10}}
    samples = [soak.Sample(at / 100, 100_000_000, 10, 5, 1, at) for at in range(100)]
    return soak.Found(**{**whole, "samples": samples, **changes})


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, 0),
        ({"right": 9, "wrong": 1}, 1),
        ({"asked": 11}, 1),
        ({"events": {"Done": 9}}, 1),
        ({"kept": {"done": 9, "running": 1}}, 1),
        ({"asked": 11, "failed": {"ServerFailed": 1}, "events": {"Done": 10, "Failed": 1}, "kept": {"done": 10, "failed": 1}}, 0),
        ({"unexplained": ["why"]}, 1),
        ({"tasks": ["one"]}, 1),
        ({"connections": 1}, 1),
        ({"samples": [soak.Sample(at / 100, 100_000_000 + at * 200_000, 10, 5, 1, at) for at in range(100)]}, 1),
        ({"samples": [soak.Sample(at / 100, 100_000_000, 10 + at // 50, 5, 1, at) for at in range(100)]}, 0),
        ({"samples": [soak.Sample(at / 100, 100_000_000, 10 + at // 30, 5, 1, at) for at in range(100)]}, 1),
    ],
)  # fmt: skip
def test_a_soak_misses_a_goal_for_each_thing_that_is_wrong(changes, missed):
    server = {"requests": 12, "faults": {"drop": 2}, "crashes": 1}
    part = soak._part(found(**changes), server, 1, False, 8.0)
    assert [goal.met for goal in part.goals].count(False) == missed, part.goals


def test_the_faults_of_a_soak_are_the_seeds_and_of_every_kind_that_can_be_survived():
    script = soak.faults_of(1, 5000)
    assert script == soak.faults_of(1, 5000) != soak.faults_of(2, 5000)
    assert {fault.kind for fault in script} == set(soak.SURVIVED)


def test_throughput_is_compared_with_bare_httpx_at_each_number_of_calls():
    levels = [concurrency.Level(calls, 10, 0.01, 1, concurrency.ALL) for calls in (1, 100)]
    seconds = {concurrency.BARE: 1.0, concurrency.EACH: 1.0, concurrency.OURS: 1.04, concurrency.WITHOUT: 1.0, concurrency.STOCK: 2.0}
    turns = [
        concurrency.Turn(level.name, name, level.calls, 10, took * (1.05 if level.calls == 100 and name == concurrency.OURS else 1), 0.1,
                         (0.001, 0.01), 0.0, 0.1)
        for level in levels
        for name, took in seconds.items()
    ]  # fmt: skip
    part = concurrency._part(turns, levels, 1, False)
    assert [goal.got for goal in part.goals] == ["0.96", "0.92"]
    assert [goal.met for goal in part.goals] == [True, False]
