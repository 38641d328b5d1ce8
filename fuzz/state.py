"""The state file: damaged bytes, other tables, and rows whose values have other types, with the right checksum."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from fuzz.invariants import fits_a_line
from metagpt_localllm.answer import Answer
from metagpt_localllm.fingerprint import Fingerprint
from metagpt_localllm.journal import CallRecord, Journal, RunRecord, _crc
from metagpt_localllm.latency import Estimator, Sample
from metagpt_localllm.leftovers import Leftovers, without_what_broke_it
from metagpt_localllm.state import State
from metagpt_localllm.statistics import per_call, summarize

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-state-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_numbers = itertools.count()
_ANSWER = {"id": "a", "model": "m", "content": "hello", "reasoning": "", "tool_calls": [[0, "a", "f", "{}"]], "finish_reason": "stop",
           "tokens": 3, "usage": {"completion_tokens": 3}, "timings": None}  # fmt: skip


def _fill(path: Path) -> None:
    state = State(path, _fail)
    journal = Journal(state)
    state.add_sample("http://a", "m", Sample(prompt_tokens=100, ttft=1.0).as_row())
    journal.begin_run(RunRecord("20261125-100000-abcd", "k", ("python", "x.py"), "/x", 1.0e9, 1.0e9))
    for number, outcome in ((1, "done"), (2, "running"), (3, "failed")):
        call = CallRecord(number, f"d{number}", "loose", ["12:00"], "WriteCode", "Engineer", "default", "m", "http://a", 1.0e9)
        journal.begin_call("20261125-100000-abcd", call)
        journal.checkpoint("20261125-100000-abcd", number, {**_ANSWER, "finish_reason": None}, b'{"messages": []}')
        if outcome == "done":
            journal.end_call("20261125-100000-abcd", 1, outcome, answer=_ANSWER, usage={"completion_tokens": 3})
    journal.replayed("20261125-100000-abcd", 1, 3)
    assert state.flush(30)
    state.close()
    atexit.unregister(state.flush)


def _fail(text: str) -> None:
    raise AssertionError(text)


def _template() -> bytes:
    path = _FOLDER / "template.db"
    _fill(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    return path.read_bytes()


_TEMPLATE = _template()


def check(data: bytes) -> None:
    """The first byte says what the rest is: a file, changes of a sound file (offset, byte) and its length, or rows."""
    path = _FOLDER / f"{next(_numbers)}.db"
    how, rest = data[:1], data[1:]
    try:
        if how == b"f":
            path.write_bytes(rest)
        elif how == b"r":
            _rows(path, rest)
        else:
            changed = bytearray(_TEMPLATE)
            for start in range(0, len(rest) - 2, 3):
                changed[int.from_bytes(rest[start : start + 2], "big") * 2 % len(changed)] ^= rest[start + 2]
            path.write_bytes(bytes(changed) if how != b"t" else bytes(changed[: int.from_bytes(rest[:2], "big") * 2]))
        _use(path)
    finally:
        for left in _FOLDER.glob(f"{path.stem}.db*"):
            left.unlink()


def _rows(path: Path, data: bytes) -> None:
    """Lines of JSON, each the values of a row: of a sample, a run, a call, a draft or a replay."""
    path.write_bytes(_TEMPLATE)
    with contextlib.closing(sqlite3.connect(path)) as database:
        for line in data.split(b"\n"):
            try:
                table, *values = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue
            values = [json.dumps(value).encode() if isinstance(value, (dict, list)) else value for value in values]
            with contextlib.suppress(sqlite3.Error, OverflowError, ValueError, TypeError, LookupError):
                if table == "calls":
                    run, number, digest, outcome, superseded, tokens, about, answer = values
                    crc = _crc(run, number, digest, outcome, about, answer)
                    row = (run, number, digest, outcome, superseded, tokens, about, answer, crc)
                    columns = "run, number, digest, outcome, superseded, tokens, about, answer, crc"
                    database.execute(f"REPLACE INTO calls ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                elif table == "drafts":
                    row = (*values, _crc(*values))
                    database.execute("REPLACE INTO drafts VALUES (?, ?, ?, ?, ?)", row)
                elif table in ("samples", "runs", "replays"):
                    marks = ", ".join("?" * len(values))
                    database.execute(f"REPLACE INTO {table} VALUES ({marks})", values)
                elif table == "version":
                    database.execute(f"PRAGMA user_version = {int(values[0]) % 2**31}")
        database.commit()


def _use(path: Path) -> None:
    said: list[str] = []
    state = State(path, said.append)
    journal = Journal(state)
    try:
        estimator = Estimator(Sample.from_row(row) for row in state.samples("http://a", "m"))
        estimator.first_token(100), estimator.stall(), estimator.total(100, 100)
        runs = journal.runs()
        for run in [*journal.latest("k"), *runs][:20]:
            assert 0 <= run.touched + run.calls + run.tokens < 1e12 or run.touched < 0 or run.calls < 0 or run.tokens < 0
            calls = journal.calls(run.id)
            _recall(calls, run)
            journal.last_number(run.id)
            figures = [per_call(*one) for one in journal.recorded(run.id)]
            summarize(figures, ("action", "run"))
            journal.replays(run.id)
        journal.run("2026")
        journal.adopt("20261125-100000-abcd", "me")
        journal.begin_run(RunRecord("r", "k", ("x",), "/", 1.0e9, 1.0e9))
        journal.begin_call("r", CallRecord(1, "d"))
        journal.end_call("r", 1, "done", answer=_ANSWER)
        state.add_sample("http://a", "m", {})
        assert state.flush(20), "a write hangs"
        kept = journal.calls("r")
        assert [call.answer for call in kept] == [_ANSWER] or said, "a write was lost without a word"
        journal.prune(1.0, 1000.0)
        state.shrink()
        assert state.flush(20), "to shrink hangs"
    finally:
        state.close()
        atexit.unregister(state.flush)
    for text in said:
        fits_a_line(text.replace("\n", " "))


def _recall(calls: list[CallRecord], run: RunRecord) -> None:
    left = Leftovers(without_what_broke_it(calls, run.outcome))
    for call in calls:
        for asked in (Fingerprint(call.digest, "loose", ["13:00"]), Fingerprint("other", call.loose, ["13:00"])):
            found, _ = left.take(asked, 500)
            held: Any = (found.answer if found.outcome == "done" else found.partial) if found is not None else None
            if held is not None:
                answer = Answer.of_record(held)
                answer.completion("m", answer.completion_usage(1, 1))
                json.dumps(answer.as_record())
                assert answer.partial_tokens >= 0


def seeds() -> list[bytes]:
    """Where coverage begins."""
    about = {"action": "a", "role": "r", "tier": "t", "model": "m", "server": "s", "started": 1.0e9, "attempts": [{"at": 1.0e9, "error": "x"}],
             "trims": [], "volatile": [], "loose": "l", "ended": None, "usage": {"completion_tokens": 3}, "timings": {}, "deadlines": {}}  # fmt: skip
    run = "20261125-100000-abcd"
    rows: list[list[object]] = [
        ["samples", 7, 1.0, "http://a", "m", '{"prompt_tokens": 9, "ttft": 1.5, "censored": "stall"}'], ["samples", 8, "x", "http://a", "m", "[]"],
        ["runs", "z", "k", 1.0e9, 1.0e9, "failed", "me", 0, 1, 2, {"command": ["a"], "folder": "/"}], ["runs", "y", "k", "x", "y", 1, 2, "z", 1.5, None, {}],
        ["calls", run, 9, "d9", "done", 0, 3, about, _ANSWER], ["calls", run, 10, "d10", "done", 0, 3, {**about, "started": "x"}, {"content": 1}],
        ["calls", run, "x", "d", "running", 0, 3, {}, None], ["drafts", run, 2, "partial", _ANSWER], ["drafts", run, 2, "request", "x"],
        ["replays", run, 1, 1.0e9, 3], ["replays", run, "x", "y", "z"], ["version", 2],
    ]  # fmt: skip
    lines = [b"r" + json.dumps(row).encode() for row in rows]
    return [*lines, b"r" + b"\n".join(line[1:] for line in lines[:-1]), b"f", b"fSQLite format 3\x00", b"fnot a database", b"c", b"c\x00\x1e\x07",
            b"c\x08\x00\xff", b"t\x08\x00", b"t\x00\x32"]  # fmt: skip
