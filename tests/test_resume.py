"""A run that was stopped goes on where it was when the same command is started again."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from metagpt_localllm.cli import main
from metagpt_localllm.journal import Journal
from metagpt_localllm.simulator import Answer, Machine, SimulatorThread
from metagpt_localllm.simulator.machine import tokenize
from metagpt_localllm.state import State

#: Asks three questions one after the other, the second one twice, and prints the answers.
WORK = """
import asyncio, json, os, sys
from metagpt_localllm.call import Call, complete
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

async def work(base_url, questions, settings):
    answers = []
    for number, question in enumerate(questions):
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": 4000, "temperature": 0}
        call = Call(Endpoint(base_url, "m", "the-secret-key"), LocalSettings(**settings), body, Caller("Act%d" % number, "Doer"),
                    show=lambda text: print(text, end="", flush=True))
        answers.append((await complete(call)).text)
    print("\\nANSWERS", json.dumps(answers), flush=True)
    if os.environ.get("FAIL"):
        raise RuntimeError("MetaGPT could make nothing of it")

asyncio.run(work(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])))
"""
QUESTIONS = ["first question", "second question", "second question", "third question"]
FAST = {"timeouts": {"first_token": 20, "stall": 20, "total": 60}, "retry": {"backoff": {"initial": 0, "max": 0}}}


class Home:
    """A folder to work in, with a home of its own, and a server that counts what it is asked."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.state = folder / "home" / ".metagpt" / "localllm" / "state.db"
        self.script = folder / "work.py"
        self.script.write_text(WORK)

    def start(self, settings=None, questions=QUESTIONS, **environment):
        command = [sys.executable, str(self.script), self.server.base_url, json.dumps(questions),
                   json.dumps({**FAST, **(settings or {})})]  # fmt: skip
        here = {**os.environ, "HOME": str(self.folder / "home"), "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
        return subprocess.Popen(
            command, cwd=self.folder, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    def run(self, settings=None, questions=QUESTIONS, **environment):
        process = self.start(settings, questions, **environment)
        out, err = process.communicate(timeout=60)
        answers = [line for line in out.splitlines() if line.startswith("ANSWERS")]
        return (json.loads(answers[-1][8:]) if answers else None), out, err

    def kill_after(self, tokens, how=signal.SIGKILL, settings=None, questions=QUESTIONS):
        """Starts the work and kills it once the server has decoded so many tokens in all."""
        process = self.start(settings, questions)
        until = time.monotonic() + 60
        while self.server.stats.decode_tokens < tokens and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(how)
        process.communicate(timeout=30)
        return process.returncode

    @property
    def journal(self):
        return Journal(State(self.state))


def answer(messages, _tools):
    """Words that depend on the question and, as with sampling, on how often the second one was asked."""
    question = messages[-1]["content"].split()[0]
    answer.times[question] = answer.times.get(question, 0) + 1
    time = answer.times[question] if question == "second" or answer.sampled else 1
    return Answer(text=" ".join(f"{question}{n}x{time}" for n in range(60)))


@pytest.fixture
def home(tmp_path, request):
    answer.times, answer.sampled = {}, False
    (tmp_path / "home").mkdir()
    machine = Machine(prefill_speed=1e6, decode_speed=getattr(request, "param", 500))
    with SimulatorThread(machine, answer=answer, scale=1, dialect="llama.cpp") as server:
        yield Home(tmp_path, server)


#: For what needs no answer that is under way for more than a moment.
fast = pytest.mark.parametrize("home", [3000], indirect=True)


@pytest.fixture
def whole(home):
    """The answers of a run that nothing stopped, and the tokens it took."""
    answers, _, _ = home.run({"journal": {"enabled": False}})
    tokens = home.server.stats.decode_tokens
    home.server.stats.decode_tokens = 0
    answer.times = {}
    return answers, tokens


@pytest.mark.parametrize("part", [0.6, 0.9])
def test_a_killed_run_goes_on_in_the_middle_of_an_answer(home, whole, part):
    answers, tokens = whole
    assert home.kill_after(int(tokens * part)) == -signal.SIGKILL
    done = home.server.stats.decode_tokens
    requests = home.server.stats.requests
    again, out, err = home.run()
    assert again[0] == answers[0] and again[3] == answers[3]
    assert part == 0.6 or again == answers
    assert "goes on" in err
    if part == 0.9:
        assert home.server.stats.requests - requests <= 1
    # What the last second of the stream had brought is decoded again, at the most.
    assert home.server.stats.decode_tokens <= tokens + 500 * 1.5, (done, tokens)
    (run,) = home.journal.runs()
    assert (run.outcome, run.resumed) == ("done", 1)


@pytest.mark.parametrize("home", [100], indirect=True)
def test_it_goes_on_there_where_the_server_is_still_loading(home):
    assert home.kill_after(150, questions=["first question"]) == -signal.SIGKILL  # about a second of it is kept
    before = home.server.stats.decode_tokens
    home.server._loaded_at = time.monotonic() + 3
    answers, _, err = home.run(questions=["first question"])
    assert "goes on" in err and len(answers[0].split()) == 60
    assert home.server.stats.decode_tokens - before < len(tokenize(answers[0])) - 50


@fast
def test_a_run_that_ended_well_is_never_replayed(home):
    answer.sampled = True
    first, _, _ = home.run()
    again, out, err = home.run()
    assert again != first and "goes on" not in err
    assert home.server.stats.requests == 8
    assert [run.outcome for run in home.journal.runs()] == ["done", "done"]



def test_ctrl_c_is_no_good_end(home, whole):
    home.kill_after(300, signal.SIGINT)
    assert home.journal.runs()[0].outcome == "interrupted"
    _, _, err = home.run()
    assert "goes on" in err


@fast
def test_what_metagpt_could_make_nothing_of_is_asked_again(home):
    answer.sampled = True
    first, _, _ = home.run(FAIL="1")
    assert home.journal.runs()[0].outcome == "failed"
    again, _, err = home.run()
    assert again[:3] == first[:3] and again[3] != first[3]
    assert home.server.stats.requests == 5







@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_is_read_only_costs_a_warning(home):
    (home.folder / "home").chmod(0o500)
    answers, _, err = home.run()
    assert len(answers) == 4 and "state.db" in err


@fast
def test_a_home_that_cannot_be_written_costs_a_warning(home):
    (home.folder / "home" / ".metagpt").write_text("a file where the folder should be")
    answers, _, err = home.run()
    assert len(answers) == 4 and "cannot be resumed" in err


@fast
def test_a_damaged_file_costs_a_warning(home):
    home.kill_after(300)
    for path in home.state.parent.glob("state.db-*"):
        path.unlink()
    home.state.write_bytes(os.urandom(20_000))
    answers, _, err = home.run()
    assert len(answers) == 4 and "no earlier run can be resumed" in err


def test_runs_are_listed_shown_resumed_and_forgotten(home, whole, monkeypatch):
    home.kill_after(400)
    files = [path for path in home.state.parent.rglob("*") if path.is_file()]
    assert home.state in files
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "no other user can read it"
        assert b"the-secret-key" not in path.read_bytes()
    assert stat.S_IMODE(home.state.parent.stat().st_mode) == 0o700
    runs = CliRunner()
    path = ["runs", "--path", str(home.state)]
    listed = runs.invoke(main, path).output
    assert "killed" in listed and "work.py" in listed
    run = home.journal.runs()[0]
    shown = runs.invoke(main, [*path, "show", run.id[:20], "--answers"]).output
    assert "Doer/Act0" in shown and "first0x1 first1x1" in shown
    resumed = subprocess.run(
        [sys.executable, "-m", "metagpt_localllm", *path, "resume", run.id], cwd="/", capture_output=True, text=True,
        env={**os.environ, "HOME": str(home.folder / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert "ANSWERS" in resumed.stdout, resumed.stderr
    assert home.journal.run(run.id).outcome == "done"
    assert "is forgotten" in runs.invoke(main, [*path, "forget", run.id]).output
    assert "there is no run" in runs.invoke(main, [*path, "show", run.id]).output
