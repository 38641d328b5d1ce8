"""What a call is said to be doing, by its events and the time alone, and the line that says it in any width."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from metagpt_localllm import events
from metagpt_localllm.lines import line, sentence
from metagpt_localllm.phases import Board, Phase, clock
from metagpt_localllm.rows import texts
from metagpt_localllm.tiers import Caller

CALL = events.CallInfo(1, "m", Caller("WriteCode", "Engineer", "Engineer"), "default")


def sent(call=CALL, attempt=1, expected=None, remaining=None):
    return events.Sent(call, attempt, 4, 3110, expected, 600.0, 60.0, 7200.0, {}, 300.0, remaining)


def failed(call=CALL):
    return events.Failed(call, 4, "X", "", 1.0, "", "", "", 0)


def board(*happened):
    """A board that has taken these (time, event)."""
    made = Board()
    for now, event in happened:
        made.take(event, now)
    return made


def text(view, width=200):
    return "".join(span.text for span in line(view, width))


def tokens(begin, end, every, first=1):
    """Tokens from ``begin`` to ``end`` seconds."""
    count = round((end - begin) / every) + 1
    return [(begin + n * every, events.Token(CALL, first + n, "x")) for n in range(count)]


READ = [(0, sent()), (10, events.Prefill(CALL, 1000, 3000)), (20, events.Prefill(CALL, 1500, 3000))]
PHASES = [
    ([(0, events.Queued(CALL, 3))], 70, "waiting for its turn behind 3 · 1:10 elapsed"),
    ([(0, events.Loading(CALL, "", 600, 100))], 40, "server loading, about 40 %, 1:00 left · 40 s elapsed · limit in 9:20"),
    ([(0, events.Loading(CALL, "", 600, None))], 40, "server loading · 40 s elapsed · limit in 9:20"),
    ([(0, events.Loading(CALL, "", 600, 100))], 140, "server loading, about 99 % · 2:20 elapsed · limit in 7:40"),
    ([(0, sent())], 30, "prefill of 3,110 tokens · 30 s elapsed · first_token in 9:30"),
    ([(0, sent(expected=100.0))], 62, "prefill about 62 %, 38 s left · 1:02 elapsed · first_token in 8:58"),
    ([(0, sent(expected=200.0))], 1, "prefill of 3,110 tokens, about 3:19 left · 1 s elapsed · first_token in 9:59"),
    ([(0, sent(expected=10.0))], 62, "prefill about 99 % · 1:02 elapsed · first_token in 8:58"),
    (READ, 20, "prefill 50 %, 30 s left · 20 s elapsed · total in 1:59:40"),
    (READ, 22, "prefill 50 %, 28 s left · 22 s elapsed · total in 1:59:38"),
    (READ, 30, "prefill 50 %, 20 s left · 30 s elapsed · first_token in 4:50"),
    ([(0, sent(expected=100.0)), (10, events.Prefill(CALL, 6, 3000))], 12, "prefill 0 %, about 1:28 left · 12 s elapsed · total in 1:59:48"),
    ([(0, sent()), (100, events.Working(CALL))], 101, "prefill of 3,110 tokens · 1:41 elapsed · total in 1:58:19"),
    ([(0, sent()), (100, events.Working(CALL))], 130, "prefill of 3,110 tokens · 2:10 elapsed · first_token in 9:30"),
    ([(0, sent(remaining=90.0))], 30, "prefill of 3,110 tokens · 30 s elapsed · timeout in 1:00"),
    ([(0, sent()), *tokens(50, 50, 1)], 50, "generating 1 token · 50 s elapsed · total in 1:59:10"),
    ([(0, sent()), *tokens(10, 50, 0.5)], 50, "generating 81 tokens at 2.0 tok/s · 50 s elapsed · total in 1:59:10"),
    ([(0, sent()), *tokens(10, 50, 0.5), *tokens(50.1, 90, 0.1, 82)], 90,
     "generating 481 tokens at 10.0 tok/s · 1:30 elapsed · total in 1:58:30"),
    ([(0, sent()), *tokens(10, 50, 0.5)], 58, "generating 81 tokens at 2.0 tok/s · 58 s elapsed · stall in 52 s"),
    ([(0, sent()), *tokens(10, 50, 0.5), (70, events.Stalled(CALL, 20.0, 60.0))], 72, "stalled 22 s of 1:00 · 1:12 elapsed · stall in 38 s"),
    ([(0, sent()), *tokens(10, 50, 0.5), (70, events.Stalled(CALL, 20.0, 60.0)), (71, events.Working(CALL))], 72,
     "no token for 22 s, but the server works · 1:12 elapsed · stall in 59 s"),
    ([(0, sent()), (90, events.Retry(CALL, 1, 4, "X", "", 10.0))], 92, "retry 2 of 4 in 8 s · 1:32 elapsed"),
    ([(0, sent()), (90, events.Retry(CALL, 4, 4, "X", "", 0.0))], 90, "retry 5 · 1:30 elapsed"),
    ([(0, sent()), (10, events.Waiting(CALL, "", 600.0))], 200, "server down: waiting 3:10 of 10:00 · 3:20 elapsed"),
    ([(0, sent()), (90, events.Retry(CALL, 1, 4, "X", "", 0.0)), (91, sent(attempt=2))], 92,
     "prefill of 3,110 tokens · attempt 2 of 4 · 1:32 elapsed · first_token in 9:59"),
]  # fmt: skip


@pytest.mark.parametrize("happened, now, words", PHASES)
def test_each_phase_has_its_words_its_figures_and_the_deadline_that_comes_next(happened, now, words):
    assert text(board(*happened).views(now)[0]) == f"Engineer WriteCode  {words}"


def test_the_log_says_the_same_facts():
    assert sentence(board(*READ).views(20)[0]) == "prefill 50 %, 30 s left (20 s elapsed, total in 1:59:40)"


@pytest.mark.parametrize("seconds, said", [(-3, "0 s"), (7.6, "8 s"), (59.4, "59 s"), (59.6, "1:00"), (190, "3:10"), (3723, "1:02:03")])
def test_times_are_written_as_on_a_clock(seconds, said):
    assert clock(seconds) == said


WIDTHS = [
    (80, "Engineer WriteCode  generating 81 tokens at 2.0 tok/s · 50 s · total in 1:59:10"),
    (70, "WriteCode  generating 81 tokens at 2.0 tok/s · 50 s · total in 1:59:10"),
    (60, "WriteCode  generating 81 tokens at 2.0 tok/s · 50 s"),
    (40, "WriteCode  81 tok, 2.0/s · 50 s"),
    (28, "WriteCode  81 tok, 2.0/s"),
    (20, "Writ…  81 tok, 2.0/s"),
    (10, "81 tok, 2…"),
    (1, "…"),
    (0, ""),
]


@pytest.mark.parametrize("width, expected", WIDTHS)
def test_a_narrow_line_loses_the_least_important_first(width, expected):
    view = board((0, sent()), *tokens(10, 50, 0.5)).views(50)[0]
    assert text(view, width) == expected


@pytest.mark.parametrize("happened, now, words", PHASES)
def test_forty_columns_say_who_and_what(happened, now, words):
    view = board(*happened).views(now)[0]
    said = text(view, 40)
    assert "WriteCode" in said and (view.short in said or view.words in said) and cell_len(said) <= 40


def test_names_are_cells_and_cannot_move_the_cursor():
    call = events.CallInfo(2, "m", Caller("写代码", "Engineer", "工程\x1b[2J师\n"), "default")
    view = board((0, sent(call))).views(1)[0]
    assert text(view).startswith("工程 [2J师  写代码  prefill")
    assert text(view, 16) == "写代码  prefill"
    assert text(view, 14) == "写代…  prefill"


def test_a_call_without_a_caller_goes_by_its_number():
    call = events.CallInfo(7, "m", Caller(), "default")
    assert text(board((0, sent(call))).views(1)[0], 30).startswith("call 7  prefill")


def test_a_change_of_phase_is_told_once():
    made = Board()
    happened = [(0, events.Queued(CALL, 1)), *((now + 1, event) for now, event in READ), *tokens(30, 32, 0.5),
                (50, events.Stalled(CALL, 15.0, 60.0)), (60, events.Stalled(CALL, 25.0, 60.0)), *tokens(61, 62, 0.5, 9)]  # fmt: skip
    changed = [type(event).__name__ for now, event in happened if made.take(event, now)]
    assert changed == ["Queued", "Sent", "Token", "Stalled", "Token"]
    assert made.take(failed(), 70) and len(made) == 0 and not made.take(events.Cancelled(CALL), 71)


@pytest.mark.parametrize(
    "end", [failed(), events.Cancelled(CALL), events.Done(CALL, 1, 1, 1, "stop", 1.0, 0.1, 2.0), events.Replayed(CALL, 1, 5)]
)
def test_every_end_of_a_call_takes_it_away(end):
    made = board((0, sent()), (1, end))
    assert len(made) == 0 and not made.views(2)


def test_those_ahead_become_fewer_as_they_end():
    other = events.CallInfo(2, "m", Caller(), "default")
    made = board((0, sent()), (0, events.Queued(other, 3)), (5, failed()))
    assert made.views(6)[0].words == "waiting for its turn behind 2"


def test_what_has_no_room_is_counted():
    calls = [events.CallInfo(n, "m", Caller(f"Action{n}"), "default") for n in range(100)]
    views = board(*((0, sent(call)) for call in calls)).views(1)
    rows = [row.plain for row in texts(views, 60, 7)]
    assert len(rows) == 7 and rows[0].startswith("Action0 ") and rows[-1] == "and 94 more"


_calls = st.builds(
    events.CallInfo, st.integers(1, 4), st.just("m"), st.builds(Caller, st.text(max_size=30), st.text(max_size=5), st.text(max_size=9)),
    st.just("default"),
)  # fmt: skip
_seconds = st.floats(0, 1e6)
_count = st.integers(0, 10**7)
_events = st.one_of(
    st.builds(events.Queued, _calls, _count),
    st.builds(events.Loading, _calls, st.just(""), _seconds, st.none() | _seconds),
    st.builds(events.Sent, _calls, st.integers(1, 9), st.integers(1, 9), _count, st.none() | _seconds, _seconds, _seconds, _seconds,
              st.just({}), st.none() | _seconds, st.none() | _seconds),
    st.builds(events.Prefill, _calls, _count, _count),
    st.builds(events.Working, _calls),
    st.builds(events.Token, _calls, _count, st.just("x")),
    st.builds(events.Stalled, _calls, _seconds, _seconds),
    st.builds(events.Continued, _calls, st.integers(1, 9), _count),
    st.builds(events.Retry, _calls, st.integers(0, 9), st.integers(1, 9), st.just(""), st.just(""), _seconds),
    st.builds(events.Waiting, _calls, st.just(""), _seconds),
    st.builds(failed, _calls),
    st.builds(events.Cancelled, _calls),
)  # fmt: skip


@given(st.lists(st.tuples(st.floats(0, 1e4), _events), max_size=25), st.integers(0, 130))
def test_whatever_comes_in_whatever_order_a_line_is_never_too_wide(happened, width):
    made, now = Board(), 0.0
    for later, event in happened:
        now += later
        made.take(event, now)
        for view in made.views(now + 1):
            said = text(view, width)
            assert cell_len(said) <= width and said.isprintable()
            assert view.left is None or view.left >= 0
            assert isinstance(view.phase, Phase) and sentence(view)
