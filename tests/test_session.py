"""Which run a process goes on with."""

import os
import time

import pytest

from metagpt_localllm import session
from metagpt_localllm.fingerprint import fingerprint
from metagpt_localllm.journal import CallRecord, Journal
from metagpt_localllm.session import VARIABLE, Session, Start, is_alive, session_for
from metagpt_localllm.settings import JournalSettings, LocalSettings
from metagpt_localllm.state import State

COMMAND = Start(("python", "company.py", "a snake game"), "/work", True)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run: a Session that may be left in the lurch as by kill -9."""
    monkeypatch.delenv(VARIABLE, raising=False)
    made, said = [], []

    def begin(command=COMMAND, ask=None, **settings):
        journal = Journal(State(tmp_path / "state.db"))
        opened = Session(journal, tmp_path / "runs", JournalSettings.model_validate(settings), command, said.append, ask)
        made.append(opened)
        return opened

    begin.said = said
    yield begin
    for opened in made:
        session.atexit.unregister(opened.end)
        opened._release()
        opened._journal._state.close()


def asked(text):
    return fingerprint({"model": "m", "messages": [{"role": "user", "content": text}]})


def do(run, *texts, outcome="done"):
    for text in texts:
        number = run.begin(CallRecord(0, asked(text).exact, asked(text).loose, started=time.time()), None)
        run.finish(number, outcome, answer={"content": "yes"} if outcome == "done" else None)
    assert run._journal.flush()


def kill(run):
    run._release()
    session.atexit.unregister(run.end)
    run._journal._state.close()


def left(run, *texts):
    return [call is not None for call, _ in (run.recall(asked(text), 100) for text in texts)]


def test_one_that_was_killed_goes_on(start):
    first = start()
    do(first, "a", "b")
    kill(first)
    again = start()
    assert again.id == first.id and left(again, "a", "b", "c") == [True, True, False]
    assert "goes on" in start.said[0] and VARIABLE in start.said[0]
    do(again, "c")
    assert [call.number for call in again._journal.calls(again.id)] == [1, 2, 3]


@pytest.mark.parametrize(
    "command",
    [Start(("python", "company.py", "a chess game"), "/work", True), Start(COMMAND.command, "/elsewhere", True),
     Start(COMMAND.command, COMMAND.folder, False)],
)  # fmt: skip
def test_another_command_folder_or_a_notebook_is_another_run(start, command):
    first = start()
    do(first, "a")
    kill(first)
    assert start(command).id != first.id


def test_one_that_ended_well_is_over_and_so_are_those_before_it(start):
    killed = start()
    do(killed, "a", "b")
    kill(killed)
    well = start(resume="never")
    do(well, "a")
    well.end()
    assert start().id not in (killed.id, well.id)


def test_one_that_another_process_works_on_is_left_alone(start, tmp_path):
    first = start()
    do(first, "a")
    assert is_alive(tmp_path / "runs", first.id)
    assert start().id != first.id


def test_a_short_one_that_was_begun_by_mistake_does_not_hide_it(start):
    long = start()
    do(long, "a", "b", "c")
    short = start()  # while the long one works
    do(short, "a")
    kill(short)
    kill(long)
    assert start().id == long.id


@pytest.mark.parametrize("yes", [True, False])
def test_a_person_may_be_asked(start, yes):
    first = start()
    do(first, "a")
    kill(first)
    questions = []
    again = start(ask=lambda question: questions.append(question) or yes, resume="ask")
    assert (again.id == first.id) is yes and "Continue it?" in questions[0]


def test_where_nobody_can_be_asked_it_says_so(start):
    first = start()
    do(first, "a")
    kill(first)
    assert start(resume="ask").id != first.id
    assert f"{VARIABLE}=auto continues it" in start.said[0]


def test_the_environment_overrules_the_settings(start, monkeypatch):
    first = start()
    do(first, "a")
    kill(first)
    monkeypatch.setenv(VARIABLE, "never")
    other = start()
    assert other.id != first.id
    do(other, "a", "b", "c")
    kill(other)
    monkeypatch.setenv(VARIABLE, first.id)
    assert start(resume="never").id == first.id
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="there is no such run"):
        start()


def test_what_the_last_call_got_is_asked_again_where_metagpt_could_make_nothing_of_it(start, monkeypatch):
    first = start()
    do(first, "a", "b", "b")
    first.broken_off = True
    first.end()
    again = start()
    assert again.id == first.id and left(again, "a", "b") == [True, False]
    assert "its last 2" in start.said[0]


def test_a_fork_has_no_part_in_it(start, monkeypatch):
    run = start()
    do(run, "a")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    run.end()
    monkeypatch.undo()
    assert run._journal.run(run.id).outcome == "running"


def test_without_a_journal_there_is_none():
    assert session_for(LocalSettings.model_validate({"journal": {"enabled": False}}).journal) is None
