"""The state file: shared, private, and never in the way."""

import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from metagpt_localllm.state import State


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def state(tmp_path, warnings):
    return State(tmp_path / "deep" / "state.db", warnings.append)


def test_what_is_kept_is_there_for_the_next_run(state):
    for number in range(3):
        state.add_sample("http://a", "m", {"n": number})
    state.add_sample("http://a", "other", {"n": 9})
    assert state.flush()
    again = State(state.path)
    assert [sample["n"] for sample in again.samples("http://a", "m")] == [0, 1, 2]
    assert again.samples("http://b", "m") == []


def test_only_the_owner_can_read_it(state):
    state.add_sample("http://a", "m", {})
    assert state.flush()
    for file in state.path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(state.path.parent.stat().st_mode) == 0o700


def test_the_oldest_go(state):
    for number in range(230):
        state.add_sample("http://a", "m", {"n": number})
    assert state.flush(10)
    kept = [sample["n"] for sample in State(state.path).samples("http://a", "m")]
    assert kept == list(range(30, 230))


def test_reading_makes_no_file(state):
    assert state.samples("http://a", "m") == [] and not state.path.exists()


def write_many(path, name):
    state = State(path)
    for number in range(40):
        state.add_sample("http://a", name, {"n": number})
    assert state.flush(30)


def test_processes_write_at_the_same_time(state):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(state.path, f"m{n}")) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(len(state.samples("http://a", f"m{n}")) == 40 for n in range(4))


def test_a_process_killed_while_it_writes_leaves_a_whole_file(state):
    code = (
        "import sys; from pathlib import Path; from metagpt_localllm.state import State\n"
        "state = State(Path(sys.argv[1])); n = 0\n"
        "while True:\n  state.add_sample('http://a', 'm', {'n': n}); n += 1; state.flush(9)\n"
    )
    for pause in (0.02, 0.1, 0.25, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code, str(state.path)])
        end = time.monotonic() + 20
        while not state.samples("http://a", "m") and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with sqlite3.connect(state.path) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        numbers = [sample["n"] for sample in state.samples("http://a", "m")]
        assert numbers, "what was written before is still there"


def test_a_place_that_cannot_be_written_costs_one_warning(tmp_path, warnings):
    (tmp_path / "file").write_text("not a folder")
    state = State(tmp_path / "file" / "state.db", warnings.append)
    for _ in range(3):
        state.add_sample("http://a", "m", {})
        assert state.flush()
    assert state.samples("http://a", "m") == []
    assert len(warnings) == 1 and "lasts for this run only" in warnings[0]


def test_a_damaged_file_costs_one_warning(state, warnings):
    state.path.parent.mkdir()
    state.path.write_bytes(b"this is no database" * 100)
    assert state.samples("http://a", "m") == []
    state.add_sample("http://a", "m", {"n": 1})
    assert state.flush(10) and state.samples("http://a", "m") == [{"n": 1}], "a new one is begun"
    assert len(warnings) == 1


def test_a_file_of_a_newer_release_is_left_alone(state, warnings):
    state.path.parent.mkdir()
    with sqlite3.connect(state.path) as database:
        database.execute("PRAGMA user_version = 999")
    assert state.samples("http://a", "m") == []
    assert "newer" in warnings[0]
    with sqlite3.connect(state.path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (999,)


def test_a_file_that_is_removed_during_a_run_costs_one_warning(state, warnings):
    state.add_sample("http://a", "m", {"n": 1})
    assert state.flush()
    state.path.rename(state.path.with_suffix(".old"))
    state.path.touch()  # as another process would
    assert state.samples("http://a", "m") == [] and "removed" in warnings[0]
    state.close()


def test_a_read_beside_the_thread_leaves_it_its_locks(state):
    # To close any handle of a file releases all locks of the process: a process that came then took itself for
    # the last one, and removed the -wal file that we went on writing to.
    def elsewhere():
        code = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM samples'))"
        return subprocess.run([sys.executable, "-c", code, state.path], capture_output=True, check=True).stdout

    state.add_sample("http://a", "m", {"n": 1})
    assert state.flush(10) and len(state.samples("http://a", "m")) == 1
    assert elsewhere() == b"(1,)\n"
    state.add_sample("http://a", "m", {"n": 2})
    assert state.flush(10) and elsewhere() == b"(2,)\n"


VERSION_1 = """
    CREATE TABLE samples (
        id INTEGER PRIMARY KEY,
        at REAL NOT NULL,          -- seconds since 1970
        server TEXT NOT NULL,      -- base_url, without a user name and password
        model TEXT NOT NULL,
        sample TEXT NOT NULL       -- JSON of latency.Sample: counts and seconds, no text of any prompt
    );
    CREATE INDEX samples_of ON samples (server, model, id);
    PRAGMA user_version = 1;
    PRAGMA journal_mode = WAL;
"""


@pytest.mark.parametrize("first", ["read", "write"])
def test_a_file_of_version_1_is_brought_forward_with_its_samples(state, warnings, first):
    state.path.parent.mkdir()
    with closing(sqlite3.connect(state.path)) as database:
        database.executescript(VERSION_1)
        database.execute("INSERT INTO samples VALUES (1, 2.0, 'http://a', 'm', '{\"n\": 1}')")
        database.execute("CREATE TABLE large (x)")
        database.execute("INSERT INTO large VALUES (zeroblob(3000000))")
        database.commit()
    if first == "write":
        state.add_sample("http://a", "m", {"n": 2})
        assert state.flush(10)
    assert state.samples("http://a", "m") == [{"n": 1}, {"n": 2}][: 2 if first == "write" else 1]
    state.write(lambda database: database.execute("DELETE FROM large") and None)
    state.write(lambda database: database.execute("INSERT INTO runs VALUES ('r', 'k', 0, 0, '', '', 0, 0, 0, '')") and None)
    state.shrink()
    assert state.flush(10) and warnings == []
    state.close()
    assert state.path.stat().st_size < 200_000
    with closing(sqlite3.connect(state.path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)


def test_a_job_that_fails_is_undone_and_the_next_is_done(state, warnings):
    def job(database):
        database.execute("DELETE FROM samples")
        raise RuntimeError("no")

    state.add_sample("http://a", "m", {"n": 1})
    state.write(job)
    state.add_sample("http://a", "m", {"n": 2})
    assert state.flush(10) and len(state.samples("http://a", "m")) == 2 and len(warnings) == 1


def test_a_job_takes_the_place_of_one_of_its_key(state):
    done, hold = [], threading.Event()
    state.write(lambda database: hold.wait(20) and None)
    time.sleep(0.05)
    for n in range(3):
        state.write(lambda database, n=n: done.append(n), "key")
        state.write(lambda database, n=n: done.append(10 + n))
    hold.set()
    assert state.flush(10) and done == [2, 10, 11, 12]


def test_the_thread_lets_go_of_a_file_that_nobody_writes_to(state, monkeypatch):
    monkeypatch.setattr("metagpt_localllm.state._IDLE", 0.05)
    wal = state.path.with_name("state.db-wal")
    for n in range(2):
        state.add_sample("http://a", "m", {"n": n})
        assert state.flush(10)
        end = time.monotonic() + 10
        while wal.exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert not wal.exists()
    assert len(state.samples("http://a", "m")) == 2


def test_a_closed_file_is_opened_again_when_it_is_needed(state):
    for number in range(2):
        state.add_sample("http://a", "m", {"n": number})
        state.close()
    assert [sample["n"] for sample in state.samples("http://a", "m")] == [0, 1]


def test_a_call_never_waits_for_the_disk(state):
    state.add_sample("http://a", "m", {})
    assert state.flush()
    holder = sqlite3.connect(state.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    started = threading.Event()

    def add():
        state.add_sample("http://a", "m", {"n": 1})
        started.set()

    threading.Thread(target=add).start()
    assert started.wait(2) and not state.flush(0.05)
    holder.execute("COMMIT")
    assert state.flush(10)


# ------------------------------------------------------------------------------------------- odd files


def made_by(path, *statements):
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def test_the_database_of_another_program_is_left_alone(state, warnings):
    made_by(state.path, "CREATE TABLE urls (id)", "INSERT INTO urls VALUES (7)")
    state.add_sample("http://a", "m", {"n": 1})
    assert state.flush(10) and state.samples("http://a", "m") == []
    assert len(warnings) == 1 and "database of another program" in warnings[0]
    with closing(sqlite3.connect(state.path)) as database:
        assert database.execute("SELECT id FROM urls").fetchall() == [(7,)]
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)


@pytest.mark.parametrize("version", [-1, 0, 1, 2])
def test_a_file_whose_tables_are_not_those_of_its_version_is_set_aside(state, warnings, version):
    state.add_sample("http://a", "m", {"n": 1})
    assert state.flush(10)
    state.close()
    made_by(state.path, f"PRAGMA user_version = {version}")
    state.add_sample("http://a", "m", {"n": 2})
    assert state.flush(10) and state.samples("http://a", "m") == [{"n": 2}]
    assert any("damaged" in warning for warning in warnings) and list(state.path.parent.glob("*.corrupt-*"))


@pytest.mark.parametrize("damaged", ["x'ff'", "'{'", "'[]'", "'17'", "'" + "[" * 5000 + "'", "CAST(x'7bff' AS TEXT)", "7", "1.5"])
def test_one_damaged_sample_does_not_cost_the_others(state, warnings, damaged):
    for number in (1, 2):
        state.add_sample("http://a", "m", {"n": number})
    assert state.flush(10)
    made_by(state.path, f"INSERT INTO samples (at, server, model, sample) VALUES (1, 'http://a', 'm', {damaged})")
    assert [sample["n"] for sample in state.samples("http://a", "m")] == [1, 2]
    assert warnings == []


@pytest.mark.parametrize("name", ["x" * 300, "\x00", "\ud800"])
def test_a_path_that_cannot_be_costs_a_warning_and_no_call(tmp_path, warnings, name):
    state = State(tmp_path / name / "state.db", warnings.append)
    state.add_sample("http://a", "m", {})
    assert state.samples("http://a", "m") == [] and state.flush(10) and len(warnings) >= 1


@pytest.mark.parametrize("cut", [0, 1, 16, 100, 4096, 5000, -1])
def test_a_file_that_was_cut_is_used_or_set_aside(state, warnings, cut):
    for number in range(100):
        state.add_sample("http://a", "m", {"n": number})
    assert state.flush(10)
    state.close()
    state.path.write_bytes(state.path.read_bytes()[:cut])
    state.add_sample("http://a", "m", {"n": 1000})
    assert state.flush(10) and {"n": 1000} in state.samples("http://a", "m")


def test_what_sqlite_quotes_of_a_damaged_file_moves_no_cursor(state, warnings):
    state.add_sample("http://a", "m", {"n": 1})
    assert state.flush(10)
    state.close()
    content = state.path.read_bytes()
    state.path.write_bytes(content.replace(b"CREATE TABLE runs", b"CREATE TABLE \x1b[2J"))
    assert state.samples("http://a", "m") == []
    assert warnings and all(warning.isprintable() for warning in warnings)
