"""The measurement of faults: its clock, its judgement, and our own client in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))
from bench import faults, workload
from bench.__main__ import _written
from bench.cells import Cell, Outcome, run
from bench.results import Goal, Part, Plot, Table
from metagpt_localllm.simulator import Fault, Simulator

ROOT = Path(__file__).parent.parent
CLOCK = """
import asyncio, time
from bench import virtual_clock
real = time.perf_counter
virtual_clock.install()

def work(seconds):
    until = real() + seconds
    while real() < until:
        sum(range(1000))
    return time.monotonic()

async def main():
    begun, began, wall = real(), time.monotonic(), time.time()
    await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(7200))
    assert abs(time.monotonic() - began - 7200) < 1e-3 and abs(time.time() - wall - 7200) < 1e-3
    timer = asyncio.ensure_future(asyncio.sleep(100))
    ended = await asyncio.get_running_loop().run_in_executor(None, work, 0.3)
    assert abs(ended - began - 7200) < 1e-3 and not timer.done(), "the clock jumped while a thread worked"
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 600)
    except asyncio.TimeoutError:
        assert abs(time.monotonic() - began - 7800) < 1e-3
    assert real() - begun < 20
asyncio.run(main())
"""


def test_hours_pass_at_once_and_never_while_a_thread_works():
    done = subprocess.run([sys.executable, "-c", CLOCK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_mix_is_the_seeds_and_each_of_its_faults_strikes_once():
    assert faults.mix(3) == faults.mix(3) != faults.mix(4)
    script = faults.mix(3)
    assert [fault.on for fault in script.faults] == [2, 4, 6, 8, 10, 12]
    assert {fault.times for fault in script.faults} == {1}


def test_the_prompts_grow_and_each_has_its_answer():
    made = workload.answers(1)
    asked = [workload.messages(made[:number]) for number in range(workload.CALLS)]
    assert [workload.answer_to(messages, made) for messages in asked] == made
    assert len({*made}) == workload.CALLS and workload.answers(2) != made
    bare = asked[4][1]["content"].rpartition("\n\n")[0]
    assert asked[5][1]["content"].startswith(bare)


def cell(client, fault="close", best=True):
    return Cell(client, best and client != faults.OURS, faults.CONTINUES, fault, (), 1000.0)


def found(ours, peer, fault="close"):
    bare = Outcome(10, 10, "", 700.0, 3500, 10)
    outcomes = {cell("bare", "none", best=False): bare, cell(faults.OURS, fault): ours, cell("openai", fault): peer}
    return faults.Found({"none": faults.Script(), fault: faults.FAULTS[fault]}, outcomes, seed=1)


@pytest.mark.parametrize("ours, peer, beaten", [
    ((10, 3500, 700.0), (10, 3500, 700.0), False),
    ((10, 3560, 700.0), (10, 3500, 700.0), False),  # within the tolerance
    ((10, 3600, 700.0), (10, 3500, 900.0), True),  # waste goes before the wall time
    ((10, 3500, 720.0), (10, 3500, 700.0), True),
    ((10, 3500, 720.0), (10, 3600, 700.0), False),
    ((10, 4500, 999.0), (9, 3500, 700.0), False),  # who has not finished is no rival
    ((9, 3500, 700.0), (10, 4500, 999.0), True),
    ((9, 3500, 700.0), (9, 3500, 600.0), False),
])  # fmt: skip
def test_who_is_better_is_who_finished_then_who_wasted_less_then_who_was_faster(ours, peer, beaten):
    here = found(*(Outcome(right, 10, "", seconds, work, 11) for right, work, seconds in (ours, peer)))
    assert bool(here.beaten_by(cell(faults.OURS))) is beaten


def test_the_prefix_cache_that_a_crash_takes_is_no_waste():
    lost = faults.cached_tokens(1, 4)
    again = Outcome(10, 10, "", 700.0, 3500 + lost, 11)
    assert lost > 100
    assert found(again, again, "refuse").waste(cell(faults.OURS, "refuse")) == 1
    assert found(again, again, "close").waste(cell(faults.OURS, "close")) > 1.1


async def test_a_model_that_loads_remembers_no_prompt(simulator):
    import httpx

    async def ask(server):
        async with httpx.AsyncClient(trust_env=False) as client:
            asked = {"model": "m", "messages": [{"role": "user", "content": "the same words " * 50}]}
            return await client.post(server.base_url + "/chat/completions", json=asked)

    async with simulator(Fault("loading", on=2, duration=1.0)) as server:
        assert isinstance(server, Simulator)
        assert [(await ask(server)).status_code for _ in range(2)] == [200, 503]
        once = server.stats.prefill_tokens
        while (await ask(server)).status_code != 200:
            pass
        assert server.stats.prefill_tokens == 2 * once and server.stats.cached_tokens == 0


def test_ours_survives_a_cut_answer_without_waste_in_the_same_time_each_time():
    scripts = {"none": faults.FAULTS["none"], "close": faults.FAULTS["close"]}
    cells = [Cell("bare", False, faults.CONTINUES, "none", (), 9e3),
             Cell(faults.OURS, False, faults.CONTINUES, "close", faults.FAULTS["close"].faults, 9e3)]  # fmt: skip
    os.environ.pop("METAGPT_LOCALLLM_TIME_SCALE", None)
    outcomes, missing = run(cells, seed=1, at_once=2)
    here = faults.Found(scripts, outcomes, seed=1)
    assert not missing and all(outcome.finished for outcome in outcomes.values())
    assert outcomes[cells[0]].seconds == pytest.approx(faults._bare_seconds(1), abs=1)
    assert outcomes[cells[1]].faults == {"close": 1} and outcomes[cells[1]].requests == 11
    assert here.waste(cells[1]) < 1.05 and here.wall(cells[1]) < 1.05


def test_the_results_have_every_goal_first_with_why_it_was_missed_and_name_what_was_not_measured():
    part = Part("A part", "python -m bench.a", [Table("T", ["a"], [["x|y"]])], [Goal("g", "1", "2", False, "it was slow")],
                [Plot("p", "lines", "A picture", {})], versions={"a": "1.2"})  # fmt: skip
    text = _written([part], {"soak": "it broke"}, 7, False, 60.0, "")
    assert text.index("**missed**: it was slow") < text.index("## A part") < text.index("![A picture](results/p.svg)")
    assert r"x\|y" in text and "a 1.2" in text and "--seed 7" in text and "soak was not measured: it broke" in text
    assert "A picture" not in _written([part], {}, 7, False, 60.0, "no matplotlib")
