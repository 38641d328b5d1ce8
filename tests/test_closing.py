"""A run that fails has last words, below its traceback: what failed, what was tried, what to change, how to go on."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from metagpt_localllm import events
from metagpt_localllm.closing import Ending, panel
from metagpt_localllm.simulator import Answer, Machine, SimulatorThread, parse_fault
from metagpt_localllm.tiers import Caller

CALL = events.CallInfo(7, "m", Caller("WriteCode", "Engineer", "Engineer"), "coding")
FAILED = events.Failed(
    CALL, 3, "FirstTokenTimeout", "the whole message", 5000.0, "no token within 900.0 s (first_token)", "Raise it if the model is slow.",
    "llm.local.tiers[coding].first_token", 0,
)  # fmt: skip

#: Asks some questions as MetaGPT would, with what the provider sets up before.
WORK = """
import asyncio, json, sys
from metagpt_localllm import closing
from metagpt_localllm.call import Call, complete
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

closing.watch_for_failures()
base_url, settings, after = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]

async def ask(question):
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": 400}
    await complete(Call(Endpoint(base_url, "m", "the-secret-key"), LocalSettings(**settings), body, Caller("WriteCode", "Engineer")))

async def work():
    await ask("one")
    try:
        await ask("two")
    except Exception as error:
        if after == "raise":
            raise
        if after == "wrapped":
            raise RuntimeError("the action failed") from error
        if after == "swallow":  # as Team.run does
            closing.broke_off(error)
            return
    if after == "go on":
        await ask("three")
    elif after == "unusable":
        raise ValueError("the answer is no JSON")
    elif after == "interrupt":
        raise KeyboardInterrupt

asyncio.run(work())
"""


def shown(ending, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(panel(ending))
    return out.getvalue()


def words(text):
    """The text without its frame and its line breaks."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def run(tmp_path):
    def run(after, *faults, journal=True, attempts=2):
        script = tmp_path / "work.py"
        script.write_text(WORK)
        settings = {"timeouts": {"first_token": 0.4, "stall": 5, "total": 20}, "journal": {"enabled": journal},
                    "retry": {"attempts": attempts, "backoff": {"initial": 0, "max": 0}}}  # fmt: skip
        machine = Machine(prefill_speed=1e6, decode_speed=1e6)
        environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
        with SimulatorThread(machine, answer=lambda *_: Answer(text="an answer"), scale=1, faults=map(parse_fault, faults)) as server:
            command = [sys.executable, str(script), server.base_url, json.dumps(settings), after]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.stderr

    return run


@pytest.mark.parametrize("after", ["raise", "wrapped", "swallow"])
def test_a_call_that_ends_the_run_is_explained_below_the_traceback(run, after):
    said = run(after, "hang:on=2,times=2")
    assert after == "swallow" or said.index("Traceback") < said.index("What failed")
    told = words(said[said.index("╭") :])
    assert "Engineer/WriteCode got no answer" in told
    assert "No token within 0.4 s" in told and "FirstTokenTimeout" in told
    assert "Attempt 1: No token within 0.4 s" in told and "2 attempts" in told
    assert "llm.local.timeouts.first_token" in told and "metagpt-localllm doctor" in told
    assert "metagpt-localllm runs resume 20" in told and "1 answer of this run is kept" in told


def test_a_failure_that_metagpt_gets_over_is_not_the_last_word(run):
    assert "What failed" not in run("go on", "hang:on=2,times=2")


def test_a_run_that_ends_well_has_no_last_words(run):
    assert "╭" not in run("nothing")


def test_an_answer_of_which_metagpt_can_make_nothing_is_told_apart_from_a_server_that_fails(run):
    told = words(run("unusable"))
    assert "MetaGPT ended the run" in told and "ValueError: the answer is no JSON" in told
    assert "got no answer" not in told and "2 answers of this run are kept" in told


def test_ctrl_c_says_how_to_go_on_and_nothing_else(run):
    told = words(run("interrupt"))
    assert "Interrupted" in told and "runs resume" in told and "What failed" not in told


def test_without_a_journal_it_says_that_nothing_is_kept(run):
    told = words(run("raise", "hang:on=2,times=2", journal=False))
    assert "Nothing was kept of this run (llm.local.journal)" in told and "runs resume" not in told


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_it_fits_the_terminal(width):
    lines = shown(Ending(FAILED, run="20260101-000000-abcd", kept=12), width).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= width


def test_a_long_list_of_attempts_is_shortened_in_its_middle():
    tried = [events.Retry(CALL, number, 30, "ServerGone", f"cause {number}", 1.0) for number in range(1, 30)]
    told = words(shown(Ending(FAILED, tried)))
    assert "Attempt 1: Cause 1." in told and "Attempt 29: Cause 29." in told and "… 22 more …" in told
    assert "Attempt 15" not in told


def test_text_from_outside_is_not_taken_for_markup():
    told = shown(Ending(error=ValueError("[red]not[/red] [/nothing] markup")))
    assert "[red]not[/red] [/nothing] markup" in told
