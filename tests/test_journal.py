"""The journal: what it is told is there after a kill, and whatever is wrong with the file, the call path goes on."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from metagpt_localllm.journal import CallRecord, Journal, RunRecord, _crc, new_id
from metagpt_localllm.state import State

ANY_TEXT = some.text(some.characters(exclude_categories=()))  # with lone surrogates
ANY_JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | ANY_TEXT,
    lambda inner: some.lists(inner) | some.dictionaries(ANY_TEXT, inner),
    max_leaves=6,
)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def state(tmp_path, warnings):
    state = State(tmp_path / "deep" / "state.db", warnings.append)
    yield state
    state.close()


@pytest.fixture
def journal(state):
    return Journal(state)


@pytest.fixture
def mounted(tmp_path):
    """A disk of 1 MB that ``remount`` makes read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if not sys.platform.startswith("linux") or subprocess.run([*mount, "size=1m", "none", disk]).returncode:
        pytest.skip("needs to be root to mount a small disk")

    def remount(options):
        subprocess.run([*mount, f"remount,{options}", "none", disk], check=True)

    yield disk, remount
    subprocess.run(["umount", "-l", disk], check=True)


def a_run(id="r1", key="k", started=1000.0, **more):
    return RunRecord(id, key, ("metagpt", "write a game"), "/home/me", started, started, owner="me", **more)


def a_call(number=1, digest=None, **more):
    named = {"action": "WritePRD", "role": "Alice", "tier": "default", "model": "m", "server": "http://a", "started": 1000.0,
             "volatile": ["12:00"]}  # fmt: skip
    return CallRecord(number, digest or f"d{number}", **named, **more)


def record(journal, run, number, text):
    journal.begin_call(run, a_call(number))
    journal.end_call(run, number, "done", answer={"content": text}, usage={"completion_tokens": 10})


def contents(journal, run="r1"):
    return [call.answer["content"] for call in journal.calls(run) if call.outcome == "done"]


# ---------------------------------------------------------------------------------------------- what it keeps


def test_a_run_and_its_calls_come_back_as_they_were_told(journal, state):
    run = a_run()
    call = a_call(
        finish_reason="stop", wanted_tokens=700, answer={"content": "hello", "tool_calls": [{"id": "1"}]},
        usage={"completion_tokens": 70}, timings={"ttft": 1.5}, deadlines={"stall": 3.0}, attempts=[{"n": 1}],
        trims=[["cut", 3]], saved_tokens=5, outcome="done", ended=1009.0,
    )  # fmt: skip
    journal.begin_run(run)
    journal.begin_call("r1", replace(call, outcome="running", ended=None, answer=None, usage=None))
    journal.end_call("r1", 1, "done", ended=1009.0, answer=call.answer, usage=call.usage)
    assert state.flush(10)
    again = Journal(State(state.path))
    assert again.calls("r1") == [call]
    found = again.latest("k")[0]
    assert found.touched > time.time() - 60
    assert replace(found, touched=run.touched) == replace(run, calls=1, tokens=70)
    journal.end_run("r1", "done")
    assert state.flush(10) and again.run("r1").outcome == "done"


def test_runs_are_found_by_key_and_by_the_beginning_of_their_id(journal, state):
    for id, key, started in (("20260101-a1", "k", 3.0), ("20260102-a2", "k", 5.0), ("20260102-b1", "other", 4.0)):
        journal.begin_run(a_run(id, key, started))
    assert state.flush(10)
    assert journal.latest("k")[0].id == "20260102-a2" and journal.latest("nothing") == []
    assert [run.id[-2:] for run in journal.runs()] == ["a2", "b1", "a1"] and len(journal.runs(2)) == 2
    assert journal.run("20260101").id == "20260101-a1" and journal.run("20260102-b").key == "other"
    assert journal.run("20260102") is None and journal.run("2027") is None, "one of two, one of none"


def test_ids_sort_by_age():
    ids = [new_id(second) for second in range(1_700_000_000, 1_800_000_000, 1_000_003)]
    assert ids == sorted(ids) and len(new_id(0.0)) == 20


def test_superseded_calls_are_left_out_and_no_longer_counted(journal, state):
    journal.begin_run(a_run())
    for number in (1, 2, 3):
        record(journal, "r1", number, f"{number}")
    for _ in range(2):
        journal.supersede("r1", 2)
    journal.supersede("r1", 99)
    assert state.flush(10)
    assert contents(journal) == ["1", "3"]
    assert (journal.latest("k")[0].calls, journal.latest("k")[0].tokens) == (2, 20)
    assert [call.number for call in journal.calls("r1", digest="d3")] == [3] and journal.calls("r1", "d2") == []


def test_a_digest_is_looked_up_among_all_and_not_among_those_of_its_run(journal, state):
    journal.begin_run(a_run())
    assert state.flush(10)

    def plan(database):
        asked = []
        database.set_trace_callback(asked.append)
        journal_of = Journal(state)
        journal_of._state = type("Same", (), {"read": lambda self, query, default: query(database)})()
        journal_of.calls("r1", "d1")
        database.set_trace_callback(None)
        return database.execute("EXPLAIN QUERY PLAN " + asked[0]).fetchall()

    ((*_, how),) = state.read(plan, None)
    assert how == "SEARCH calls USING INDEX calls_for (run=? AND digest=?)"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=some.dictionaries(ANY_TEXT, ANY_JSON), text=ANY_TEXT)
def test_any_answer_round_trips_exactly(journal, state, answer, text):
    id = new_id(time.time()) + os.urandom(4).hex()
    journal.begin_run(replace(a_run(id), folder=text, command=(text,)))
    journal.begin_call(id, replace(a_call(), role=text))
    journal.checkpoint(id, 1, answer, text.encode("utf-8", "surrogatepass"))
    journal.end_call(id, 1, "failed", answer=answer)
    assert state.flush(10)
    (call,) = journal.calls(id)
    assert (call.answer, call.partial, call.role) == (answer, answer, text)
    assert call.request == text.encode("utf-8", "surrogatepass")
    assert (journal.run(id).folder, journal.run(id).command) == (text, (text,))


def test_halves_of_a_character_stay_apart_and_answers_may_be_megabytes(journal, state):
    journal.begin_run(a_run())
    for number, text in enumerate(("\ud83d", "\ud83d\ude00", "\U0001f600", "\x00", "é" * 4_000_000), 1):
        record(journal, "r1", number, text)
        assert state.flush(10) and contents(journal)[-1] == text


def test_a_request_is_kept_until_there_is_an_answer(journal, state):
    body = b'{"messages": []}' * 1000
    journal.begin_run(a_run())
    journal.begin_call("r1", a_call(request=body))
    journal.checkpoint("r1", 1, {"content": "hal"})
    assert state.flush(10)
    (call,) = journal.calls("r1")
    assert (call.request, call.partial, call.outcome) == (body, {"content": "hal"}, "running")
    assert state.path.with_name("state.db-wal").stat().st_size < 10 * len(body)
    journal.end_call("r1", 1, "done", answer={"content": "half"})
    assert state.flush(10)
    (call,) = journal.calls("r1")
    assert (call.request, call.partial, call.answer) == (None, None, {"content": "half"})


def test_what_a_failed_call_had_received_is_kept_and_it_can_begin_anew(journal, state):
    journal.begin_run(a_run())
    journal.begin_call("r1", a_call())
    journal.checkpoint("r1", 1, {"content": "hal"}, b"body")
    journal.end_call("r1", 1, "failed", attempts=["timeout"])
    journal.begin_call("r1", a_call(wanted_tokens=9))
    assert state.flush(10)
    (call,) = journal.calls("r1")
    assert (call.outcome, call.partial, call.request, call.wanted_tokens) == ("running", {"content": "hal"}, b"body", 9)


def test_the_calls_of_a_run_that_was_killed_are_ended_by_the_one_that_adopts_it(journal, state):
    journal.begin_run(a_run())
    journal.begin_call("r1", a_call())
    journal.checkpoint("r1", 1, {"content": "hal"})
    assert state.flush(10)
    next_one = Journal(State(state.path))
    assert next_one.adopt("r1", "me, later", resumed=0)
    next_one.end_call("r1", 1, "cancelled")
    next_one.end_run("r1", "failed")
    assert next_one._state.flush(10)
    run = next_one.run("r1")
    assert (run.owner, run.resumed, run.outcome) == ("me, later", 1, "failed")
    (call,) = next_one.calls("r1")
    assert (call.outcome, call.partial) == ("cancelled", {"content": "hal"})


def test_of_two_that_adopt_a_run_one_does(journal, state):
    journal.begin_run(a_run())
    assert state.flush(10)
    assert [Journal(State(state.path)).adopt("r1", name, resumed=0) for name in "ab"] == [True, False]
    assert journal.run("r1").owner == "a" and not journal.adopt("r9", "c")


def test_nothing_that_comes_late_changes_a_call_that_is_done(journal, state):
    journal.begin_run(a_run())
    record(journal, "r1", 1, "whole")
    journal.checkpoint("r1", 1, {"content": "who"}, b"body")
    journal.end_call("r1", 1, "cancelled")
    journal.begin_call("r1", a_call())
    journal.checkpoint("r1", 1, {"content": "who"}, b"body")
    journal.end_call("r1", 1, "failed")
    assert state.flush(10)
    (call,) = journal.calls("r1")
    assert (call.outcome, call.answer, call.partial, call.request) == ("done", {"content": "whole"}, None, None)
    assert journal.run("r1").calls == 1


def test_a_call_ends_with_what_a_call_has(journal):
    with pytest.raises(TypeError, match="colour"):
        journal.end_call("r1", 1, "done", colour="red")


def test_what_is_no_json_costs_a_warning_and_no_more(journal, state, warnings):
    journal.begin_run(a_run())
    journal.begin_call("r1", a_call())
    journal.checkpoint("r1", 1, {"content": object()})
    record(journal, "r1", 2, "fine")
    assert state.flush(10)
    assert contents(journal) == ["fine"] and len(warnings) == 1


# ---------------------------------------------------------------------------------------------- slow disks


def test_checkpoints_that_pile_up_are_one(journal, state):
    journal.begin_run(a_run())
    journal.begin_call("r1", a_call())
    assert state.flush(10)
    hold = threading.Event()
    state.write(lambda database: hold.wait(20) and None)
    started = time.perf_counter()
    for n in range(3000):
        journal.checkpoint("r1", 1, {"content": "x" * n}, b"body" if n == 100 else None)
    assert time.perf_counter() - started < 1
    assert len(state._waiting) <= 3, "so that memory is bounded"
    hold.set()
    assert state.flush(10)
    (call,) = journal.calls("r1")
    assert (call.partial, call.request) == ({"content": "x" * 2999}, b"body")


def test_others_that_hold_the_file_hold_up_no_caller(journal, state):
    journal.begin_run(a_run())
    assert state.flush(10)
    holder = sqlite3.connect(state.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    started = time.perf_counter()
    record(journal, "r1", 1, "late")
    assert time.perf_counter() - started < 0.5 and not state.flush(0.05)
    assert journal.run("r1").id == "r1" and contents(journal) == [], "who reads need not wait"
    holder.execute("COMMIT")
    holder.close()
    assert state.flush(10) and contents(journal) == ["late"]


# ---------------------------------------------------------------------------------------------- pruning


def filled(journal, state, runs=6, size=300_000):
    now = time.time()
    for n in range(runs):
        journal.begin_run(a_run(f"r{n}", started=now))
        record(journal, f"r{n}", 1, "x" * size)
        if n != 2:
            journal.end_run(f"r{n}", "done")
        assert state.flush(10)
        state.write(lambda database, n=n: database.execute("UPDATE runs SET touched = touched - ?", (100,)) and None)
    assert state.flush(10)
    state.close()


def test_old_runs_go_and_the_file_shrinks_but_none_that_runs(journal, state):
    filled(journal, state)
    before = state.path.stat().st_size
    assert journal.prune(days=350 / 86400, megabytes=100) == 2
    assert sorted(run.id for run in journal.runs()) == ["r2", "r3", "r4", "r5"]
    assert journal.prune(days=1, megabytes=0.8) == 2
    assert sorted(run.id for run in journal.runs()) == ["r2", "r5"]
    assert contents(journal, "r2") and contents(journal, "r5") and not journal.calls("r0")
    assert journal.prune(days=1, megabytes=0, running=lambda run: run.id == "r5") == 1
    assert state.flush(10)
    state.close()
    assert state.path.stat().st_size < before / 3


def test_a_run_that_is_adopted_meanwhile_stays(journal, state):
    filled(journal, state, 2)
    other = Journal(State(state.path))

    def running(run):
        return run.id == "r1" and not other.adopt("r1", "quick")

    assert journal.prune(0, 0, running) == 1
    assert [run.owner for run in journal.runs()] == ["quick"] and contents(journal, "r1")


def test_a_run_is_forgotten(journal, state):
    filled(journal, state, 3)
    assert journal.forget("r1") and not journal.forget("r1")
    assert journal.run("r1") is None and journal.calls("r1") == [] and len(journal.runs()) == 2
    other = Journal(State(state.path))
    assert other.forget("r0")
    journal.begin_call("r0", a_call(7))  # its process goes on
    assert state.flush(10) and journal.calls("r0") == [], "what was forgotten stays so"


def test_a_file_shrinks_while_others_write(journal, state):
    filled(journal, state, 3, size=9_000_000)
    assert journal.prune(0, 0, running=lambda run: run.id == "r2") == 2
    other = Journal(State(state.path))
    other.begin_run(a_run("r9"))
    record(other, "r9", 1, "meanwhile")
    assert other._state.flush(10) and state.flush(20)
    state.close()
    assert contents(other, "r9") == ["meanwhile"]
    other._state.close()
    assert state.path.stat().st_size < 11_000_000


# ---------------------------------------------------------------------------------------------- processes


def test_files_are_for_the_owner_alone(journal, state):
    journal.begin_run(a_run())
    assert state.flush(10)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in state.path.parent.iterdir()}
    assert {"state.db", "state.db-wal", "state.db-shm"} <= modes.keys() and set(modes.values()) == {0o600}
    assert stat.S_IMODE(state.path.parent.stat().st_mode) == 0o700


def write_a_run(path, id, calls):
    journal = Journal(State(path))
    journal.begin_run(a_run(id))
    for number in range(1, calls + 1):
        journal.begin_call(id, a_call(number))
        journal.checkpoint(id, number, {"content": "x"}, b"body")
        journal.end_call(id, number, "done", answer={"content": f"{id} {number}"})
        if number % 10 == 0:
            assert len(contents(journal, id)) <= number  # opens the file beside the thread
    assert journal._state.flush(60)


def at_once(*processes):
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_many_processes_write_and_read_at_once(journal, state):
    context = multiprocessing.get_context("spawn")
    at_once(*(context.Process(target=write_a_run, args=(state.path, f"p{n}", 40)) for n in range(6)))
    for n in range(6):
        assert contents(journal, f"p{n}") == [f"p{n} {number}" for number in range(1, 41)]


@forks
def test_a_fork_writes_what_it_is_told_and_not_what_its_parent_is(journal, state, warnings):
    context = multiprocessing.get_context("fork")
    journal.begin_run(a_run())
    assert state.flush(10)

    def child(number, warned):
        record(journal, "r1", number, "of the child")
        assert state.flush(10) and len(warnings) == warned

    record(journal, "r1", 1, "of the parent")  # in the queue, or just being written
    at_once(context.Process(target=child, args=(2, 1)))
    state.close()
    at_once(context.Process(target=child, args=(3, 0)))
    assert contents(journal) == ["of the parent", "of the child"] and journal.run("r1").calls == 2


def text_of(kill, number):
    """What the call of this number of this child answers: from nothing to 200 kB, with any characters."""
    source = random.Random(f"{kill} {number}")
    piece = "".join(map(chr, source.choices(range(1, 0x11000), k=50)))
    return piece * int(source.choice([0, 1, 20, 1500]) * source.random())


def write_until_killed(path, kill, pipe):
    journal = Journal(State(path))
    id = f"kill{kill}"
    journal.begin_run(a_run(id))
    number = 0
    while True:
        number += 1
        text = text_of(kill, number)
        journal.begin_call(id, a_call(number, request=b"body"))
        for part in (1, 2):
            journal.checkpoint(id, number, {"content": text[: len(text) * part // 3]}, b"body" * 100)
        journal.end_call(id, number, "done", answer={"content": text}, usage={"completion_tokens": 1})
        if not journal._state.flush(20) or journal._state._said:
            os.write(pipe, b"failed\n")
        os.write(pipe, b"%d\n" % number)


@forks
def test_no_answer_is_lost_or_half_whenever_the_process_is_killed(tmp_path):
    moments = random.Random(5)
    kept = 0
    for kill in range(220):
        path = tmp_path / f"{kill // 20}" / "state.db"  # a new one now and then: it may die as it makes it
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                write_until_killed(path, kill, writing)
            os._exit(1)
        os.close(writing)
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            told = pipe.read().split(b"\n")[:-1]
        assert b"failed" not in told
        warnings = []
        journal = Journal(State(path, warnings.append))
        calls = journal.calls(f"kill{kill}")
        done = {call.number: call for call in calls if call.outcome == "done"}
        assert warnings == [] and done.keys() >= set(map(int, told))
        for call in calls:
            text = text_of(kill, call.number)
            if call.outcome == "done":
                assert call.answer == {"content": text} and call.partial is None and call.request is None
            elif call.partial is not None:
                assert call.partial["content"] in (text[: len(text) // 3], text[: len(text) * 2 // 3])
        if calls:
            assert journal.run(f"kill{kill}").calls == len(done)
        kept += len(done)
    assert kept > 220
    for folder in tmp_path.iterdir():
        with contextlib.closing(sqlite3.connect(folder / "state.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not list(folder.glob("*.corrupt-*"))


# ---------------------------------------------------------------------------------------------- bad places


def goes_on(journal, state, warnings, word):
    """Everything can be called; there is one warning, which says what is lost."""
    journal.begin_run(a_run("lost"))
    record(journal, "lost", 1, "x" * 100_000)
    journal.checkpoint("lost", 1, {"content": "x"}, b"body")
    journal.supersede("lost", 1)
    journal.end_run("lost", "done")
    assert state.flush(10)
    for found in (journal.latest("none"), journal.run("none"), journal.forget("none"), journal.prune(1e6, 1e6)):
        assert not found
    assert len(warnings) == 1 and word in warnings[0], warnings
    assert "learned about the server" in warnings[0] and "resumed" in warnings[0]


def test_a_full_disk_costs_one_warning_and_what_was_written_is_there(mounted, warnings):
    disk, _ = mounted
    state = State(disk / "state.db", warnings.append)
    journal = Journal(state)
    journal.begin_run(a_run())
    record(journal, "r1", 1, "before")
    assert state.flush(10)
    with open(disk / "fill", "wb", 0) as fill, contextlib.suppress(OSError):
        while True:
            fill.write(b"x" * 4096)
    for _ in range(2):
        goes_on(journal, state, warnings, "full")
    assert contents(journal) == ["before"] and contents(Journal(State(state.path))) == ["before"]
    state.close()
    with open(disk / "fill2", "wb", 0) as fill, contextlib.suppress(OSError):
        while True:
            fill.write(b"x" * 4096)
    assert contents(Journal(State(state.path, warnings.append))) == ["before"] and len(warnings) == 1
    (disk / "fill").unlink()
    record(journal, "r1", 2, "after")
    assert state.flush(10) and contents(journal) == ["before", "after"], "and there may be room again"
    state.close()


def test_a_home_that_is_read_only_can_be_read(mounted, warnings):
    disk, remount = mounted
    state = State(disk / "state.db", warnings.append)
    journal = Journal(state)
    journal.begin_run(a_run())
    record(journal, "r1", 1, "before")
    assert state.flush(10)
    state.close()
    remount("ro")
    assert contents(journal) == ["before"] and warnings == []
    goes_on(journal, state, warnings, "open database file")
    assert contents(journal) == ["before"]


def test_a_file_of_a_newer_release_is_left_alone(journal, state, warnings):
    state.path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(state.path)) as database:
        database.execute("PRAGMA user_version = 99")
    before = state.path.read_bytes()
    goes_on(journal, state, warnings, "newer metagpt-localllm (version 99")
    assert state.path.read_bytes() == before


@pytest.fixture(scope="module")
def a_file(tmp_path_factory):
    """The bytes of a state file with 500 calls."""
    state = State(tmp_path_factory.mktemp("whole") / "state.db")
    journal = Journal(state)
    journal.begin_run(a_run("old"))
    for number in range(1, 501):
        record(journal, "old", number, old_text(number))
    assert state.flush(60)
    state.close()
    return state.path.read_bytes()


def old_text(number):
    return f"old {number} " * (1 + number % 7 * 50)


def damaged(whole, how):
    bad, source = bytearray(whole), random.Random(how)
    if how == "noise":
        bad[:] = source.randbytes(60_000)
    elif how == "noise behind a header":
        bad[100:] = source.randbytes(60_000)
    elif how == "text":
        bad[:] = b"this is no database" * 100
    elif how == "holes":
        for start in range(4096, len(bad), 8192):
            bad[start : start + 4096] = source.randbytes(4096)
    elif how.startswith("cut to"):
        del bad[int(len(bad) * float(how[6:])) :]
    elif how.startswith("bits"):
        for _ in range(20):
            bad[source.randrange(100, len(bad))] ^= 1 << source.randrange(8)
    elif how.startswith("pages"):  # in each other's place, as after a disk lost some writes
        for _ in range(4):
            one, other = (4096 * source.randrange(1, len(bad) // 4096) for _ in range(2))
            bad[one : one + 4096] = bad[other : other + 4096]
    return bytes(bad)


@pytest.mark.parametrize("how", ["noise", "noise behind a header", "text", "holes", "cut to 0.1", "cut to 0.99"])
@pytest.mark.parametrize("first", ["read", "write"])
def test_a_damaged_file_is_set_aside_with_a_warning(journal, state, warnings, a_file, how, first):
    state.path.parent.mkdir()
    state.path.write_bytes(damaged(a_file, how))
    if first == "read":
        assert isinstance(journal.calls("old"), list)
    journal.begin_run(a_run())
    record(journal, "r1", 1, "new")
    assert state.flush(10) and contents(journal) == ["new"]
    (aside,) = state.path.parent.glob("state.db.corrupt-*[0-9]")
    assert aside.read_bytes()[100:] == damaged(a_file, how)[100:], "nothing of it was lost"
    assert len(warnings) == 1 and aside.name in warnings[0] and "resumed" in warnings[0]


@pytest.mark.parametrize("how", [f"{kind} {seed}" for kind in ("bits", "pages") for seed in range(15)])
def test_no_answer_of_a_damaged_file_is_a_wrong_one(journal, state, warnings, a_file, how):
    state.path.parent.mkdir()
    state.path.write_bytes(damaged(a_file, how))
    journal.begin_run(a_run())
    record(journal, "r1", 1, "new")
    assert state.flush(10)
    for number in range(1, 501, 17):
        for call in journal.calls("old", f"d{number}"):
            assert (call.number, call.answer) == (number, {"content": old_text(number)})
    for call in journal.calls("old"):
        assert call.answer == {"content": old_text(call.number)}
    assert set(contents(journal)) <= {"new"}


def test_a_file_cut_to_nothing_is_a_new_one(journal, state, warnings):
    state.path.parent.mkdir()
    state.path.touch()
    goes_on_new = a_run()
    journal.begin_run(goes_on_new)
    assert state.flush(10) and journal.run("r1") and warnings == []


@forks
@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_wal_costs_at_most_what_is_in_it(journal, state, warnings, seed):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            write_until_killed(state.path, 0, writing)
        os._exit(1)
    time.sleep(0.15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading), os.close(writing)
    wal, source = state.path.with_name("state.db-wal"), random.Random(seed)
    bad = bytearray(wal.read_bytes())
    if seed % 3 == 0:
        del bad[source.randrange(len(bad)) :]
    elif seed % 3 == 1:
        bad[: 1 << 20] = source.randbytes(len(bad[: 1 << 20]))
    for _ in range(5 if bad else 0):
        bad[source.randrange(len(bad))] ^= 0xFF
    wal.write_bytes(bad)
    for call in journal.calls("kill0"):
        assert call.outcome != "done" or call.answer == {"content": text_of(0, call.number)}
    journal.begin_run(a_run())
    record(journal, "r1", 1, "new")
    assert state.flush(10) and contents(journal) == ["new"]
    assert len(warnings) <= 1


def test_nobody_opens_the_file_while_another_sets_it_aside(journal, state):
    state.path.parent.mkdir()
    with State(state.path)._locked("alone"):
        journal.begin_run(a_run())
        assert not state.flush(0.3) and not state.path.exists()
    assert state.flush(10) and state.path.exists()


@forks
def test_processes_that_meet_a_damaged_file_at_once_set_it_aside_once(journal, state, a_file):
    state.path.parent.mkdir()
    state.path.write_bytes(damaged(a_file, "holes"))
    context = multiprocessing.get_context("fork")
    at_once(*(context.Process(target=write_a_run, args=(state.path, f"p{n}", 20)) for n in range(8)))
    assert len(list(state.path.parent.glob("*.corrupt-*[0-9x]"))) == 1
    for n in range(8):
        assert len(contents(journal, f"p{n}")) == 20


def test_a_file_that_is_set_aside_under_a_run_is_left_for_the_new_one(journal, state, warnings):
    def elsewhere(code):  # here it would release our locks
        head = "import sqlite3, sys; from pathlib import Path; path = Path(sys.argv[1])\n"
        head += "from metagpt_localllm.journal import Journal; from metagpt_localllm.state import State\n"
        subprocess.run([sys.executable, "-c", head + code, state.path], check=True, timeout=30)

    journal.begin_run(a_run())
    record(journal, "r1", 1, "old")
    assert state.flush(10)
    elsewhere("sqlite3.connect(path).execute('PRAGMA wal_checkpoint(TRUNCATE)'); path.open('r+b').write(b'x' * 20000)")
    elsewhere("assert Journal(State(path)).calls('r1') == []")
    assert len(list(state.path.parent.glob("*.corrupt-*"))) == 3
    record(journal, "r1", 2, "new")
    assert state.flush(10)
    elsewhere("journal = Journal(State(path)); assert journal.run('r1') and len(journal.calls('r1')) == 1")
    record(journal, "r1", 3, "newer")
    assert state.flush(10) and contents(journal) == ["new", "newer"]
    assert len(warnings) == 1 and "removed or set aside" in warnings[0] and "resumed" in warnings[0]


def test_of_a_run_with_a_damaged_answer_the_others_are_there(journal, state, warnings):
    journal.begin_run(a_run())
    for number in (1, 2, 3):
        record(journal, "r1", number, f"{number}")
    bad = (b'{"con\xff',)
    state.write(lambda database: database.execute("UPDATE calls SET answer = ? WHERE number = 2", bad) and None)
    assert state.flush(10)
    assert contents(journal) == ["1", "3"] and len(warnings) == 1 and "call 2" in warnings[0]


def test_what_statistics_need_is_read_without_the_answers(journal, state):
    for run in ("r1", "r2"):
        journal.begin_run(a_run(run))
        record(journal, run, 1, "one")
    journal.begin_call("r1", replace(a_call(2), started=2000.0))
    journal.end_call("r1", 2, "failed", attempts=[{"error": "TotalTimeout"}], queued=3.0)
    journal.supersede("r1", 1)
    assert journal.flush()
    assert [(run, call.number, call.superseded) for run, call in journal.recorded()] == [
        ("r1", 1, True), ("r1", 2, False), ("r2", 1, False),
    ]  # fmt: skip
    (found,) = journal.recorded("r1", since=1500.0)
    assert found[1].outcome == "failed" and found[1].attempts == [{"error": "TotalTimeout"}] and found[1].queued == 3.0
    assert all(call.answer is None for _, call in journal.recorded())


def test_answers_that_were_given_again_are_counted_and_go_with_their_run(journal):
    for run in ("r1", "r2"):
        journal.begin_run(a_run(run))
    journal.replayed("r1", 1, 40)
    journal.replayed("r2", 7, 2)
    assert journal.flush()
    assert [(replay.run, replay.number, replay.tokens) for replay in journal.replays()] == [("r1", 1, 40), ("r2", 7, 2)]
    assert journal.replays("r1")[0].at == pytest.approx(time.time(), abs=60)
    assert journal.replays(since=time.time() + 60) == []
    journal.forget("r1")
    assert [replay.run for replay in journal.replays()] == ["r2"]


@pytest.mark.parametrize(
    "column, value",
    [("started", "soon"), ("touched", "x"), ("touched", 1e300), ("resumed", "x"), ("calls", 1.5), ("tokens", b"x"), ("owner", b"\xff"),
     ("about", "{}"), ("about", b"{}"), ("about", b'{"command": "x", "folder": 7}'), ("about", b'{"command": [7], "folder": "/"}'),
     ("about", b"[" * 5000), ("outcome", b"x")],
)  # fmt: skip
def test_a_run_whose_values_have_other_types_is_left_out_with_a_warning(journal, state, warnings, column, value):
    for id in ("r1", "r2"):
        journal.begin_run(a_run(id))
    assert state.flush(10)
    with closing(sqlite3.connect(state.path)) as database:
        database.execute(f"UPDATE runs SET {column} = ? WHERE id = 'r1'", (value,))
        database.commit()
    assert [run.id for run in journal.runs()] == ["r2"] and [run.id for run in journal.latest("k")] == ["r2"]
    assert journal.run("r1") is None and journal.prune(1e4, 1e4) == 0
    assert len(warnings) == 1 and "cannot be read" in warnings[0]


@pytest.mark.parametrize(
    "changed",
    [{"started": "x"}, {"ended": []}, {"volatile": "x"}, {"attempts": {}}, {"usage": 7}, {"timings": None}, {"wanted_tokens": 1.5},
     {"saved_tokens": 10**30}, {"started": float("nan")}, {"cached_tokens": True}, {"queued": float("inf")}, {"model": None}],
)  # fmt: skip
def test_a_call_whose_values_have_other_types_is_left_out_though_its_checksum_is_right(journal, state, warnings, changed):
    journal.begin_run(a_run())
    record(journal, "r1", 1, "one")
    record(journal, "r1", 2, "two")
    assert state.flush(10)
    with closing(sqlite3.connect(state.path)) as database:
        row = list(database.execute("SELECT run, number, digest, outcome, about, answer FROM calls WHERE number = 1").fetchone())
        row[4] = json.dumps({**json.loads(row[4]), **changed}).encode()
        database.execute("UPDATE calls SET about = ?, crc = ? WHERE number = 1", (row[4], _crc(*row)))
        database.commit()
    assert contents(journal) == ["two"] and [call.number for _, call in journal.recorded()] == [2]
    assert len(warnings) == 1 and "cannot be read" in warnings[0]


def test_a_request_that_is_a_bomb_is_not_unpacked_to_its_end(journal, state):
    journal.begin_run(a_run())
    journal.begin_call("r1", a_call(request=b"x"))
    journal.checkpoint("r1", 1, {"content": "hal"})
    assert state.flush(10)
    bomb = zlib.compress(bytes((1 << 28) + 1), 1)
    with closing(sqlite3.connect(state.path)) as database:
        row = ("r1", 1, "request", bomb)
        database.execute("UPDATE drafts SET body = ?, crc = ? WHERE kind = 'request'", (bomb, _crc(*row)))
        database.commit()
    assert journal.calls("r1") == []
