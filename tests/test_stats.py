"""``metagpt-localllm stats``: the same figures in the table, in CSV and in JSON, at every width."""

import csv
import inspect
import io
import json
import os
import random
import re
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from test_statistics import a_call, an_attempt, failed

from metagpt_localllm import errors
from metagpt_localllm.call import complete
from metagpt_localllm.cli import main
from metagpt_localllm.journal import Journal, RunRecord, _put_call
from metagpt_localllm.simulator import Machine, parse_fault
from metagpt_localllm.state import State, state_at
from metagpt_localllm.stats import moment

ROOT = Path(__file__).parent.parent
#: Before click 8.2 one has to ask for the two streams apart.
APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def write(path, calls, replays=(), runs=("r1", "r2")):
    """A journal with these calls: (run, CallRecord)."""
    state = State(path)
    journal = Journal(state)
    for number, run in enumerate(runs):
        journal.begin_run(RunRecord(run, "k", ("metagpt", "x"), "/w", 1000.0 + number, 1000.0))
    for run, call in calls:
        journal.begin_call(run, call)
        if call.outcome != "running":
            journal.end_call(run, call.number, call.outcome, ended=call.ended, answer={"content": "secret words"})
        if call.superseded:
            journal.supersede(run, call.number)
    for run, number, tokens in replays:
        journal.replayed(run, number, tokens)
    assert state.flush(60)
    state.close()
    return path


def known_calls(now):
    """Two actions of one role, with everything that can happen to them; each begins 100 s after the one before."""

    def call(number, run="r1", **more):
        start = now - 1000 + 100 * number
        more.setdefault("attempts", [an_attempt(start + 10, ended=start + 24, ttft=float(number))])
        return run, a_call(number, **{"started": start, "ended": start + 24.0, "cached_tokens": 250, "queued": 10.0, **more})

    broken = [failed(now - 690), failed(now - 670, "StreamStalled"), failed(now - 650, "IncompleteStream")]
    return [
        call(1),
        call(2, saved_tokens=11, trims=[{"removed_tokens": 1234}], timings={"prompt_n": 750, "prompt_ms": 1500.0}),
        call(3, action="WritePRD", attempts=broken, usage=None, outcome="failed", ended=now - 640),
        call(4, "r2"),
        call(5, "r2", outcome="running", ended=None, attempts=[], usage=None, superseded=True),
    ]


@pytest.fixture
def journal(tmp_path):
    return write(tmp_path / "state.db", known_calls(time.time()), [("r1", 1, 40)])


def run(path, *options, status=0):
    result = CliRunner(**APART).invoke(main, ["stats", "--path", str(path), *options])
    assert result.exit_code == status, (result.output, result.stderr)
    return result


def as_json(path, *options):
    return json.loads(run(path, "--json", *options).stdout)


def on_terminal(columns, path, *options, limit=30):
    """What a terminal of so many columns gets, without colours."""
    fcntl, pty, termios = (pytest.importorskip(name, reason="no such terminals here") for name in ("fcntl", "pty", "termios"))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment.update(TERM="xterm-256color", PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8")
    command = [sys.executable, "-m", "metagpt_localllm", "stats", "--path", str(path), *options]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, stdin=follower, env=environment)
    os.close(follower)
    shown = b""
    try:
        while portion := os.read(leader, 65536):
            shown += portion
    except OSError:  # Linux: the other end is closed
        pass
    assert process.wait(limit) == 0, process.stderr.read()
    process.stderr.close()
    os.close(leader)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")


def rows_of(table, *first):
    """The cells of the lines that begin with one of these words."""
    return {line.split()[0]: line.split() for line in table.splitlines() if line.startswith(first)}


# ------------------------------------------------------------------------------------------ known calls


def test_known_calls_have_known_figures(journal):
    told = as_json(journal)
    code, prd = told["groups"] if told["groups"][0]["action"] == "WriteCode" else told["groups"][::-1]
    assert {key: code[key] for key in ("action", "role", "model", "tier", "calls", "answered", "unfinished", "superseded")} == {
        "action": "WriteCode", "role": "Engineer", "model": "m", "tier": "default",
        "calls": 4, "answered": 3, "unfinished": 1, "superseded": 1,
    }  # fmt: skip
    assert [code[f"ttft_{name}"] for name in ("p50", "p95", "p99", "max")] == [2.0, 4.0, 4.0, 4.0]
    assert code["total_p50"] == pytest.approx(14.0, abs=1e-5) and code["queued_seconds"] == pytest.approx(40.0)
    # 20 of 21 tokens in 13 s and in 10 s; of the one that went on with 11 tokens 9 in 12 s, by its chunks and its usage.
    assert code["decode_tokens_per_second"] == pytest.approx((20 + 9 + 20) / (13 + 12 + 10))
    assert code["prefill_tokens_per_second"] == 500.0 and code["cached_share"] == 0.25
    assert (code["retries"], code["timeouts"], code["trimmed_tokens"], code["saved_tokens"], code["replayed"]) == (0, 0, 1234, 51, 1)
    assert (prd["calls"], prd["failed"], prd["retries"], prd["timeouts"], prd["ttft_p50"]) == (1, 1, 2, 2, None)
    assert prd["errors"] == {"FirstTokenTimeout": 1, "IncompleteStream": 1, "StreamStalled": 1}
    assert told["total"]["calls"] == 5 and told["by"] == ["action", "role", "model", "tier"]


def test_csv_and_json_and_the_table_agree(journal):
    told = as_json(journal, "--by", "action")
    read = list(csv.DictReader(io.StringIO(run(journal, "--csv", "--by", "action").stdout)))
    for group, row in zip(told["groups"], read):
        group.pop("errors")
        assert {key: "" if value is None else str(value) for key, value in group.items()} == row
    table = rows_of(run(journal, "--by", "action").stdout, "WriteCode", "WritePRD", "all")
    assert len(read) == 2 and set(table) == {"WriteCode", "WritePRD", "all"}
    code = next(group for group in told["groups"] if group["action"] == "WriteCode")
    assert table["WriteCode"][1] == str(code["calls"]) and table["all"][1] == str(told["total"]["calls"])
    for shown in (f"{code['ttft_p50']:.2f}s", f"{code['total_p50']:.1f}s", f"{code['decode_tokens_per_second']:.2f}", "1,234", "25%"):
        assert shown in table["WriteCode"]


def test_the_remarks_say_what_the_figures_do_not(journal):
    shown = run(journal).stdout
    assert "5 calls, 1 answer given again in 2 runs" in shown
    assert "In all rows: role Engineer, model m, tier default" in shown
    assert "Requests that failed: FirstTokenTimeout 1, IncompleteStream 1, StreamStalled 1" in shown
    assert "1 call was made again by a run that went on" in shown
    assert "Waiting for a turn on our side took" in shown
    assert "secret words" not in shown


# ------------------------------------------------------------------------------------------ which calls


def test_since_takes_those_that_began_later(journal):
    assert as_json(journal, "--since", "10m")["total"]["calls"] == 1
    assert as_json(journal, "--since", "750s")["total"]["calls"] == 3
    assert as_json(journal, "--since", "7d")["total"]["calls"] == 5
    assert as_json(journal, "--since", "2001-01-01")["total"]["calls"] == 5
    assert as_json(journal, "--since", "750s")["total"]["replayed"] == 1, "lately, of a call that was made before"


def test_a_date_is_local_and_a_length_of_time_is_before_now():
    local = time.mktime((2026, 1, 31, 14, 0, 0, 0, 0, -1))
    assert moment("2026-01-31 14:00", 0) == moment("2026-01-31T14:00:00", 0) == local
    assert moment("2026-01-31T14:00:00Z", 0) == 1769868000.0 == moment("2026-01-31T15:00:00+01:00", 0)
    assert moment(" 1d12h ", 1e6) == 1e6 - 36 * 3600
    assert moment("9999999d", 1e6) == 0.0


@pytest.mark.parametrize("text", ["yesterday", "", "m", "-2d", "2026-13-01", "20260131", "90", "nan"])
def test_another_since_is_refused_with_what_it_may_be(journal, text):
    assert "24h, 7d" in run(journal, f"--since={text}", status=2).stderr


def test_run_takes_the_beginning_of_a_name_or_last(journal):
    assert as_json(journal, "--run", "r1")["total"]["calls"] == 3
    last = as_json(journal, "--run", "last")
    assert (last["run"], last["total"]["calls"], last["total"]["replayed"]) == ("r2", 2, 0)
    for wrong in ("r", "x", ""):
        assert "metagpt-localllm runs lists them" in run(journal, "--run", wrong, status=1).stderr


def test_by_takes_words_with_commas_and_several_times(journal):
    told = as_json(journal, "--by", "run,action", "--by", "role", "--by", "action")
    assert told["by"] == ["run", "action", "role"]
    assert {(group["run"], group["action"], group["calls"]) for group in told["groups"]} == {
        ("r1", "WriteCode", 2), ("r1", "WritePRD", 1), ("r2", "WriteCode", 2),
    }  # fmt: skip
    assert run(journal, "--by", "model").stdout.splitlines()[2].split()[0] == "model"
    wrong = run(journal, "--by", "colour", status=2)
    assert "'colour' is not one of action, role, model" in wrong.stderr
    assert "--json and --csv" in run(journal, "--json", "--csv", status=2).stderr


# ------------------------------------------------------------------------------------------ how it looks


def many_actions(path):
    names = ["WriteCode", "WriteCodePlanAndChangeOfAllFiles", "写代码", "Δ", "", "x\x1b[31m\nred", "[bold]y[/bold]", "z" * 70]
    calls = []
    for number in range(1, 61):
        role = ["Engineer", "Product Manager"][number % 2]
        calls.append(("r1", a_call(number, action=names[number % len(names)], role=role, tier=["a", "b"][number % 3 // 2],
                                   cached_tokens=number, trims=[{"removed_tokens": 10**7}])))  # fmt: skip
    return write(path, calls)


@pytest.mark.parametrize("columns", [30, 60, 80, 100, 120, 250])
def test_no_line_is_wider_than_the_terminal_and_what_is_left_out_is_named(tmp_path, columns):
    shown = on_terminal(columns, many_actions(tmp_path / "state.db"))
    assert max(cell_len(line) for line in shown.splitlines()) <= columns
    assert "…" not in shown and "\x1b" not in shown
    assert "[bold]y[/bold]" in shown.replace("\n", "") and "写代码" in shown
    for needed in ("4.00s", "14.5s", "2.00", "60"):
        assert needed in shown
    if columns <= 80:  # with names as long as these
        assert "tok/s" in shown and "p50 4.00s" in shown and "tokens trimmed" in " ".join(shown.split()), "blocks have all of it"
    elif columns < 200:
        said = " ".join(shown.split())
        assert f"Left out at {columns} columns:" in said and "trimmed tokens" in said and "--json have them" in said
    else:
        assert "Left out" not in shown


def test_metagpts_usual_names_make_a_table_of_80_columns(journal):
    shown = on_terminal(80, journal)
    assert [len(cells) for cells in rows_of(shown, "WriteCode", "all").values()] == [len(rows_of(shown, "WriteCode")["WriteCode"])] * 2
    said = " ".join(shown.split())
    assert "Left out at 80 columns: " in said and "unfinished, replayed, ttft p99, " in said and "decode" in shown.splitlines()[2]
    assert "Left out" not in on_terminal(200, journal)


@pytest.mark.parametrize("more", [{}, {"COLUMNS": "40"}, {"PYTHONIOENCODING": "ascii"}])
def test_what_goes_into_a_pipe_is_whole_and_a_line_for_each_group(tmp_path, more):
    path = many_actions(tmp_path / "state.db")
    command = [sys.executable, "-m", "metagpt_localllm", "stats", "--path", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    shown = subprocess.run(command, capture_output=True, env=environment, check=True).stdout
    assert b"\x1b" not in shown and b"Left out" not in shown
    heading, same, head, names, _, *rest = shown.decode().splitlines()
    groups, total = rest[: len(as_json(path)["groups"])], rest[len(as_json(path)["groups"]) + 1]
    assert all("14.5s" in line for line in groups) and total.startswith("all ") and "600.00M" in total
    assert "trimmed" in head and "in all" in names
    assert len({cell_len(line) for line in [head, *groups, total]}) == 1 or more.get("PYTHONIOENCODING")
    assert any("z" * 70 in line for line in groups)


def test_csv_of_strange_names_parses_back(tmp_path):
    path = many_actions(tmp_path / "state.db")
    read = list(csv.DictReader(io.StringIO(run(path, "--csv", "--by", "action").stdout)))
    assert {row["action"] for row in read} == {group["action"] for group in as_json(path, "--by", "action")["groups"]}
    assert "x\x1b[31m\nred" in {row["action"] for row in read}


# ------------------------------------------------------------------------------------------ the file


def test_a_missing_journal_says_where_it_would_be_and_makes_none(tmp_path):
    path = tmp_path / "no" / "state.db"
    said = run(path, status=1).stderr
    assert f"no journal at {path}" in said and "api_type: local_llm" in said and "--path" in said
    assert not path.parent.exists()


def test_an_empty_journal_says_what_to_do(tmp_path):
    path = write(tmp_path / "state.db", [])
    assert "Run MetaGPT with api_type: local_llm" in run(path).stdout
    assert as_json(path) == {"since": None, "run": None, "by": ["action", "role", "model", "tier"], "groups": [],
                             "total": as_json(path)["total"]}  # fmt: skip
    empty = run(path, "--csv")
    assert empty.stdout.startswith("action,role,model,tier,calls,") and empty.stdout.count("\n") == 1
    assert "No calls" in empty.stderr


def test_where_since_leaves_nothing_that_is_said(journal):
    assert "since 1s. Without --since all are shown" in run(journal, "--since", "1s", "--run", "r2").stdout


def test_a_damaged_call_is_left_out_with_a_warning(journal):
    with sqlite3.connect(journal) as database:
        database.execute("UPDATE calls SET about = x'7B7B' WHERE run = 'r1' AND number = 1")
        database.execute("UPDATE calls SET about = CAST(replace(CAST(about AS TEXT), '\"ttft\": 4.0', '\"ttft\": \"no\"') AS BLOB)")
    database.close()
    found = run(journal, "--json")
    assert "is damaged" in found.stderr and json.loads(found.stdout)["total"]["calls"] == 4
    assert json.loads(found.stdout)["total"]["ttft_max"] == 2.0
    assert json.loads(found.stdout)["total"]["replayed"] == 1


@pytest.mark.parametrize("content", [b"this is no database at all " * 400, None])
def test_a_file_that_cannot_be_read_is_an_error_and_no_empty_table(tmp_path, content):
    path = tmp_path / "state.db"
    path.write_bytes(content) if content else path.mkdir()
    found = run(path, status=1)
    assert not found.stdout and ("damaged" in found.stderr or "cannot be used" in found.stderr)


WRITER = """
import sys, time
from metagpt_localllm.journal import CallRecord, Journal, RunRecord
from metagpt_localllm.state import State
state = State(__import__("pathlib").Path(sys.argv[1]))
journal = Journal(state)
journal.begin_run(RunRecord("live", "k", ("metagpt",), "/w", time.time(), time.time()))
number = 0
while True:
    number += 1
    journal.begin_call("live", CallRecord(number, "d", action="WriteCode", started=time.time()))
    journal.checkpoint("live", number, {"content": "x" * 5000})
    journal.end_call("live", number, "done", answer={"content": "x" * 5000}, usage={"prompt_tokens": 7, "completion_tokens": 3})
    state.flush()
    if number == 5:
        print("ready", flush=True)
"""


def test_a_journal_that_another_process_writes_is_read_meanwhile(tmp_path):
    path = tmp_path / "state.db"
    command = [sys.executable, "-c", WRITER, str(path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert writer.stdout.readline() == b"ready\n"
        seen = [as_json(path)["total"]["calls"] for _ in range(5)]
        assert writer.poll() is None and seen[0] >= 5 and seen == sorted(seen)
        until = time.monotonic() + 30
        while as_json(path)["total"]["calls"] == seen[0] and time.monotonic() < until:
            time.sleep(0.05)
        last = as_json(path)["total"]
        assert last["calls"] > seen[0] and last["answered"] >= last["calls"] - 1, "and it goes on writing"
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def test_ten_thousand_calls(tmp_path):
    chance, calls = random.Random(7), []
    for number in range(1, 10_001):
        ttft, tier = round(chance.expovariate(0.1), 3), chance.choice(["default", "long"])
        calls.append(("r1", a_call(number, "done", action=chance.choice("ABCDE"), tier=tier, answer={"content": "x"},
                                   attempts=[an_attempt(ttft=ttft, ended=100.0 + ttft + 20)])))  # fmt: skip
    path = write(tmp_path / "state.db", [])
    state = State(path)
    state.write(lambda database: [_put_call(database, *call) for call in calls])
    assert state.flush(60)
    state.close()
    told = as_json(path)
    assert (told["total"]["calls"], len(told["groups"])) == (10_000, 10)
    ordered = sorted(call.attempts[0]["ttft"] for _, call in calls)
    assert [told["total"][f"ttft_{name}"] for name in ("p50", "p95", "p99", "max")] == [
        ordered[4999], ordered[9499], ordered[9899], ordered[-1],
    ]  # fmt: skip
    assert told["total"]["decode_tokens_per_second"] == 1.0
    assert "10,000 calls in 1 run" in run(path).stdout


# ------------------------------------------------------------------------------------------ the real thing


async def test_retries_and_timeouts_of_a_real_call_appear(simulator, ask, tmp_path):
    path = tmp_path / "own.db"
    more = {"journal": {"path": str(path)}, "timeouts": {"first_token": 1.0, "stall": 1.0, "total": 20}}
    async with simulator(parse_fault("hang:on=1"), parse_fault("stall:on=2,after=2"), dialect="llama.cpp") as server:
        await complete(ask(server, "hello", settings=more))
        await complete(ask(server, "another question", settings=more))
    assert state_at(str(path)).flush()
    told = as_json(path)
    (group,) = told["groups"]
    assert (group["action"], group["role"], group["model"]) == ("WriteCode", "Engineer", server.model)
    assert (group["calls"], group["answered"], group["retries"], group["timeouts"]) == (2, 2, 2, 2)
    assert group["errors"] == {"FirstTokenTimeout": 1, "StreamStalled": 1}
    assert group["seconds"] >= group["total_max"] > group["ttft_max"] > 0, "the time-outs are in the total"
    assert group["prompt_tokens"] > 0 and group["answer_tokens"] > 0 and group["prefill_tokens_per_second"] > 0
    assert "FirstTokenTimeout 1, StreamStalled 1" in run(path, "--run", "last").stdout


async def test_a_call_that_its_callers_timeout_ends_counts_as_one(simulator, ask, tmp_path):
    path = tmp_path / "own.db"
    more = {"journal": {"path": str(path)}, "timeouts": {"first_token": 30, "stall": 30, "total": 60}}
    async with simulator(parse_fault("hang:on=1")) as server:
        with pytest.raises(errors.TotalTimeout):
            await complete(ask(server, "hello", settings=more, call_timeout=0.3))
    assert state_at(str(path)).flush()
    total = as_json(path)["total"]
    assert (total["calls"], total["failed"], total["timeouts"]) == (1, 1, 1)
    assert total["errors"] == {"TotalTimeout": 1} and total["seconds"] > 0 and total["total_p50"] is None


async def test_what_a_call_trimmed_counts_when_it_fails_all_the_same(simulator, ask, tmp_path):
    path = tmp_path / "own.db"
    more = {"journal": {"path": str(path)}, "retry": {"attempts": 1}, "timeouts": {"first_token": 0.3, "stall": 1, "total": 20}}
    machine = Machine(prefill_speed=1e6, decode_speed=1e6, context=1024)
    async with simulator(parse_fault("hang"), machine=machine, dialect="llama.cpp") as server:
        with pytest.raises(errors.FirstTokenTimeout):
            await complete(ask(server, "many words " * 2000, settings=more))
    assert state_at(str(path)).flush()
    total = as_json(path)["total"]
    assert (total["failed"], total["timeouts"], total["trims"]) == (1, 1, 1) and total["trimmed_tokens"] > 1000
