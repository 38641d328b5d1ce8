"""Rows below a program's output: when they are gone, the terminal is as if they had never been there."""

import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte", reason="pyte is not installed")
pytest.importorskip("pty", reason="there are no pseudo-terminals here")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from terminals import Terminal, Tmux, needs_tmux  # noqa: E402

from metagpt_localllm.cursor import Cursor  # noqa: E402
from metagpt_localllm.live import Rows  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture
def terminal():
    made = []

    def make(*size):
        made.append(Terminal(*size))
        return made[-1]

    yield make
    for each in made:
        each.close()


# ---------------------------------------------------------------------- in the emulator

_pieces = st.one_of(
    st.text("abcdefgh ", min_size=1, max_size=25),
    st.text("写代码的人éß", min_size=1, max_size=12),
    st.sampled_from(["\n", "\n", "\n\n", "\t", "\r", "x\rab", "\x1b[32mgreen\x1b[0m", "\x1b[1mbo", "ld\x1b[0m", "a" * 90 + "\n", "\x1b[K"]),
)
_steps = st.lists(st.tuples(st.sampled_from(["out", "out", "err", "rows", "flush", "wait"]), _pieces), max_size=40)


def played(steps, columns, lines, *, with_rows, cut=0):
    """Text and cursor at the end of ``steps``; sequences and lines are cut in pieces of ``cut`` characters."""
    terminal = Terminal(columns, lines)
    try:
        rows = Rows([terminal.err, terminal.out]) if with_rows else None
        for number, (what, text) in enumerate(steps):
            if what in ("out", "err"):
                stream = terminal.out if what == "out" else terminal.err
                for begin in range(0, len(text), cut or len(text)):
                    stream.write(text[begin : begin + (cut or len(text))])
                    if what == "err":
                        stream.flush()
                    if rows is not None and number % 3 == 0:
                        rows.show([f"row {n} {number}"[: columns - 1] for n in range(1 + number % 4)])
            elif what == "flush":
                terminal.out.flush()
            elif rows is not None and what == "rows":
                rows.show([f"\x1b[31mrow {n}\x1b[0m {'=' * columns}"[:columns] for n in range(len(text) % 5)])
            elif rows is not None:
                rows._drawn_at = 0.0  # time has passed
            terminal.drain()
        if rows is not None:
            rows.close()
        terminal.out.flush()
        return terminal.text(), terminal.cursor()
    finally:
        terminal.close()


@settings(max_examples=150, deadline=None)
@given(_steps, st.integers(12, 60), st.integers(3, 14), st.integers(0, 4))
def test_the_screen_and_the_scrollback_are_what_they_would_be_without_rows(steps, columns, lines, cut):
    without = played(steps, columns, lines, with_rows=False, cut=cut)
    assert played(steps, columns, lines, with_rows=True, cut=cut) == without


def test_rows_are_below_a_partial_line_and_stay_there_as_it_grows(terminal):
    screen = terminal(40, 6)
    rows = Rows([screen.err, screen.out])
    for n in range(9):
        screen.err.write(f"line {n}\n")
    screen.err.write("tokens")
    screen.err.flush()
    rows.show(["\x1b[1mfirst\x1b[0m", "second"])
    assert screen.text()[-3:] == ["tokens", "first", "second"] and screen.cursor()[0] == 6
    screen.err.write(" come")
    screen.err.flush()
    assert screen.text()[-3:] == ["tokens come", "first", "second"]
    rows._drawn_at = 0.0
    screen.out.write("\n")
    assert screen.text()[-4:] == ["tokens come", "", "first", "second"]
    rows.show(["only"])
    assert screen.text()[-3:] == ["tokens come", "", "only"]
    rows.close()
    assert screen.text() == [*(f"line {n}" for n in range(9)), "tokens come"]


def test_what_stdout_holds_back_is_not_shown_before_its_time(terminal):
    screen = terminal()
    rows = Rows([screen.err, screen.out])
    screen.out.write("held back")
    rows.show(["row"])
    screen.err.write("a line of the log\n")
    assert screen.text()[0] == "a line of the log"
    screen.out.write(", and now shown\n")
    rows.close()
    assert screen.text() == ["a line of the log", "held back, and now shown"]


def test_the_colours_of_a_partial_line_are_kept(terminal):
    screen = terminal()
    rows = Rows([screen.err])
    screen.err.write("\x1b[31mred ")
    screen.err.flush()
    rows.show(["\x1b[32mrow\x1b[0m"])
    screen.err.write("still red\x1b[0m")
    screen.err.flush()
    rows.close()
    screen.drain()
    assert {screen.screen.buffer[0][x].fg for x in (0, 4, 12)} == {"red"}


def test_bars_that_a_program_draws_below_its_cursor_are_left_alone(terminal):
    screen = terminal()
    rows = Rows([screen.err])
    screen.err.write("first bar\n\rsecond bar\x1b[A")  # as tqdm does
    screen.err.flush()
    rows.show(["row"])
    assert screen.text() == ["first bar", "second bar"]
    screen.err.write("\n\n")
    rows.show(["row"])
    assert screen.text() == ["first bar", "second bar", "", "row"]
    rows.close()


def test_a_line_that_was_returned_to_its_beginning_is_not_erased(terminal):
    screen = terminal()
    rows = Rows([screen.err])
    screen.err.write("progress 50 %\r")
    rows.show(["row"])
    rows.show(["another", "row"])
    assert screen.text() == ["progress 50 %", "another", "row"]
    rows.close()
    assert screen.text() == ["progress 50 %"]


def test_what_a_child_process_writes_past_us_costs_a_row_and_no_text(terminal):
    screen = terminal()
    rows = Rows([screen.err])
    screen.err.write("before\n")
    rows.show(["a row that is long", "another"])
    os.write(screen.slave, b"one\ntwo\n")
    rows.show(["a row that is long", "another"])
    screen.err.write("after\n")
    rows.close()
    assert [line[:6].strip() for line in screen.text()] == ["before", "one", "twoow", "after"]


def test_the_streams_are_given_back_as_they_were(terminal):
    screen = terminal()
    screen.err.write = screen.err.write  # somebody else's
    theirs = screen.err.write
    rows = Rows([screen.err, screen.out])
    assert screen.err.write is not theirs
    rows.close()
    rows.close()
    assert screen.err.write is theirs and "write" not in vars(screen.out) and "flush" not in vars(screen.out)


def test_a_narrower_terminal_leaves_the_text_whole(terminal):
    screen = terminal(60, 10)
    rows = Rows([screen.err])
    screen.err.write("short\n")
    rows.show(["=" * 59])
    screen.resize(30, 10)
    assert rows.size.columns == 60
    rows.show(["=" * 29])
    assert rows.size.columns == 30 and screen.text() == ["short", "", "=" * 29]
    screen.err.write("more\n")
    rows.close()
    assert screen.text() == ["short", "more"]


def test_a_terminal_of_two_lines_shows_no_rows(terminal):
    screen = terminal(40, 2)
    rows = Rows([screen.err])
    rows.show(["row"])
    screen.err.write("text\n")
    rows.close()
    assert screen.text() == ["text"]


def test_a_terminal_that_is_gone_ends_the_rows_and_not_the_program(terminal):
    screen = terminal()
    rows = Rows([screen.out])
    fd = os.dup(screen.slave)
    rows._fd = -1
    rows.show(["row"])
    assert "write" not in vars(screen.out)
    os.close(fd)


@given(st.text("ab写\t\r\x1b[31mK;\b", max_size=60), st.integers(4, 30))
def test_a_cursor_ends_where_a_terminal_has_it_however_its_text_is_cut(text, width):
    whole, pieces = Cursor(width), Cursor(width)
    whole.feed(text)
    for character in text:
        pieces.feed(character)
    assert (whole.column, whole.drawable) == (pieces.column, pieces.drawable)
    assert 0 <= whole.column <= width


# ---------------------------------------------------------------------- MetaGPT's own logger and tokens, in tmux

SCRIPT = """
import random, sys, time
import metagpt_localllm
from metagpt.logs import log_llm_stream, logger
from metagpt_localllm import events, progress
from metagpt_localllm.settings import ProgressSettings
from metagpt_localllm.tiers import Caller
mode, pause, loud = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
progress.show(ProgressSettings(mode=mode), logger)
calls = [events.CallInfo(n, "m", Caller(f"WriteCode{n}", "Engineer", "工程师"), "default") for n in range(1, 4)]
for call in calls:
    events.publish(events.Sent(call, 1, 4, 3110, 40.0, 600.0, 60.0, 7200.0, {}))
chance = random.Random(7)
words = ["token ", "写代码", "的", "a_long_name_of_something ", "é", "\\n", "\\n\\n", "    ", "x" * 130, "."]
for n in range(300):
    call = chance.choice(calls)
    text = chance.choice(words)
    events.publish(events.Token(call, n, text))
    log_llm_stream(text)
    if chance.random() < 0.08:
        logger.info(f"{call.action} has written {n} 个 of its tokens, which is a line that is long enough to wrap on most terminals")
    time.sleep(pause)
if "die" in loud:
    raise SystemExit(3)
if "interrupt" in loud:
    print("\\nready", flush=True)
    time.sleep(60)
for call in calls:
    events.publish(events.Done(call, 1, 3110, 250, "stop", 1.0, 0.1, 2.0))
print("\\nthe end")
"""


def in_tmux(tmp_path, mode, *arguments, pause=0.004, columns=80, lines=16):
    script = tmp_path / f"{uuid.uuid4().hex}.py"  # one each: writing it anew, another one might read it empty
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {name: os.environ[name] for name in ("HOME", "METAGPT_PROJECT_ROOT")}
    environment.update(PYTHONPATH=str(ROOT), LANG="C.UTF-8", CI="")
    return Tmux([sys.executable, "-W", "ignore", str(script), mode, str(pause), *arguments], columns, lines, **environment)


def without_times(text):
    return re.sub(r"\d{4}-\d\d-\d\d [\d:.]+", "(time)", text)


def finished(tmux):
    """All that a program has said, once it has ended."""
    until = time.monotonic() + 60
    while not tmux.ended():
        assert time.monotonic() < until, f"it never ended; the screen is\n{tmux.screen()}"
        time.sleep(0.05)
    text = without_times(tmux.everything())
    said = re.sub(r"\n*Pane is dead.*", "", text).rstrip()
    assert said, f"it ended without a word: {text.strip()!r} {tmux.how_it_ended()}"
    return said


@needs_tmux
def test_in_tmux_metagpts_tokens_and_log_lines_are_the_same_with_rows_and_while_it_is_resized(tmp_path):
    with in_tmux(tmp_path, "off", pause=0) as off, in_tmux(tmp_path, "live") as live, in_tmux(tmp_path, "live", pause=0.012) as resized:
        shown = live.wait_for(lambda screen: screen.count("tok/s") == 3)
        rows = [line for line in shown.splitlines() if "elapsed" in line or "tok/s" in line]
        assert any("WriteCode1  " in row for row in rows) and shown.rstrip().splitlines()[-1] in rows
        resized.wait_for(lambda screen: "tok/s" in screen)
        for columns, lines in ((100, 20), (60, 12), (90, 30), (80, 16)):
            resized.resize(columns, lines)
            time.sleep(0.4)
        expected = finished(off)
        assert "the end" in expected and expected.count("has written") > 10
        assert finished(live) == expected
        assert finished(resized) == expected


@needs_tmux
@pytest.mark.parametrize("how", ["die", "interrupt"])
def test_whatever_ends_the_program_the_rows_are_gone(tmp_path, how):
    with in_tmux(tmp_path, "live", how, pause=0) as tmux:
        if how == "interrupt":
            tmux.wait_for(lambda screen: "ready" in screen and "WriteCode3" in screen.split("ready")[1])
            tmux.keys("C-c")
        text = finished(tmux)
        assert "elapsed" not in text and "has written" in text
        assert ("KeyboardInterrupt" in text) == (how == "interrupt")


@needs_tmux
def test_the_demo_shows_the_calls_while_they_run(tmp_path):
    environment = {"HOME": os.environ["HOME"], "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    command = [sys.executable, "-m", "metagpt_localllm", "demo", "--output", str(tmp_path / "out"), "--scale", "120"]
    with Tmux(command, 100, 30, **environment) as tmux:
        seen = tmux.wait_for(lambda screen: "tok/s" in screen, 90)
        row = next(line for line in seen.splitlines() if "tok/s" in line)
        assert re.search(r"(Product Manager WritePRD|Team Leader)  generating \d+ tokens at [\d.]+ tok/s · [\d:]+( s)? elapsed · total in 1:5\d:\d\d", row)
        assert "on the simulated machine" in seen
        tmux.keys("C-c")
        tmux.wait_for(lambda screen: "elapsed" not in screen)


# ---------------------------------------------------------------------- where nothing is drawn

def run(tmp_path, mode, **environment):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "ignore", str(script), mode, "0.002"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_without_a_terminal_the_log_says_the_same_facts(tmp_path):
    done = run(tmp_path, "auto")
    assert "\x1b" not in done.stdout + done.stderr
    assert re.search(r"INFO .* - call 1 \(工程师/WriteCode1\): prefill of 3,110 tokens, about 40 s left \(0 s elapsed, first_token in 10:00\)", done.stderr)
    assert re.search(r"call 2 \(工程师/WriteCode2\): generating \d+ tokens? \(", done.stderr)
    assert done.stderr.count("generating") == 3
    assert "generating" not in run(tmp_path, "off").stderr


def test_a_process_that_is_forked_has_no_rows(terminal, monkeypatch):
    from metagpt_localllm import progress

    screen = terminal(60, 10)
    monkeypatch.setattr(progress, "terminal_streams", lambda: [screen.err])
    made = progress.Progress(progress.LiveRows)
    rows = made._choose()
    made._shower = rows
    assert "write" in vars(screen.err)
    context = multiprocessing.get_context("fork")

    def child(queue):
        made.forget()
        queue.put("write" in vars(screen.err))

    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get() is False
    process.join()
    rows.end()


@pytest.mark.parametrize(
    "environment, forced, drawn",
    [({}, False, True), ({"TERM": "dumb"}, True, False), ({"CI": "true"}, False, False), ({"CI": "true"}, True, True),
     ({"CI": "false"}, False, True), ({"NO_COLOR": "1"}, False, True)],
)  # fmt: skip
def test_where_rows_are_drawn(terminal, monkeypatch, environment, forced, drawn):
    from metagpt_localllm import progress

    screen = terminal()
    monkeypatch.setattr(sys, "stderr", screen.err)
    for name in (*progress._CI, "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    assert progress.can_draw(forced=forced) is drawn
