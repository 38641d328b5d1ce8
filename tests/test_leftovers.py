"""What an unfinished run has left goes to the requests that it was given to, and to no other."""

from hypothesis import given
from hypothesis import strategies as st

from metagpt_localllm.fingerprint import fingerprint
from metagpt_localllm.journal import CallRecord
from metagpt_localllm.leftovers import Leftovers, without_what_broke_it


def body(text):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def call(number, text, outcome="done", said="yes", **more):
    asked = fingerprint(body(text))
    whole = {"answer": {"content": said, "id": "17:03", "tool_calls": []}} if outcome == "done" else {}
    begun = {} if outcome == "done" else {"partial": {"content": said}, "request": b"{}"}
    return CallRecord(
        number, asked.exact, asked.loose, asked.volatile, outcome=outcome, wanted_tokens=100,
        **{"finish_reason": "stop", **whole, **begun, **more},
    )  # fmt: skip


def numbers(left, *texts, wanted=100):
    return [(taken.number, usable) if taken is not None else None for taken, usable in
            (left.take(fingerprint(body(text)), wanted) for text in texts)]  # fmt: skip


def test_the_nth_gets_the_nth():
    left = Leftovers([call(1, "a"), call(2, "b"), call(3, "a")])
    assert numbers(left, "a", "a", "b", "a", "c") == [(1, True), (3, True), (2, True), None, None]


def test_what_broke_off_is_left_out_where_it_was_asked_again_with_success():
    left = Leftovers([call(1, "a", "cancelled"), call(2, "a"), call(3, "b", "running")])
    assert left.count == 2 and numbers(left, "a", "b", "a") == [(2, True), (3, True), None]


def test_the_beginning_of_an_answer_without_its_request_is_of_no_use():
    assert Leftovers([call(1, "a", "running", request=None)]).count == 0


def test_one_that_was_cut_is_asked_again_where_it_may_be_longer():
    def left(tokens):
        return Leftovers([call(1, "a", finish_reason="length", usage={"completion_tokens": tokens})])

    assert numbers(left(100), "a") == [(1, True)]
    assert numbers(left(100), "a", wanted=200) == [(1, False)], "max_token was raised"
    assert numbers(left(40), "a") == [(1, False)], "the context ended it, which may be larger now"


def test_only_the_time_of_a_prompt_may_differ_and_not_show_in_the_answer():
    times = [f"The current time is 2026-11-25 01:05:{second}. Go on." for second in (10, 20, 30)]
    left = Leftovers([call(1, times[0]), call(2, times[1], said="at 01:05:20 it is late")])
    assert numbers(left, times[2], times[2]) == [(1, True), (2, False)]


def test_what_metagpt_could_make_nothing_of_is_asked_again_and_nothing_else():
    calls = [call(1, "a"), call(2, "b"), call(3, "b")]
    assert [c.number for c in without_what_broke_it(calls, "failed")] == [1]
    assert list(without_what_broke_it(calls, "interrupted")) == calls
    failed = [*calls, call(4, "c", "failed")]
    assert list(without_what_broke_it(failed, "failed")) == failed, "the server failed, not MetaGPT"


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=20))
def test_no_answer_is_given_twice_or_to_another_question(recorded, asked):
    calls = [call(number, text) for number, text in enumerate(recorded, 1)]
    taken = numbers(Leftovers(calls), *asked)
    given_out = [one[0] for one in taken if one is not None]
    assert len(given_out) == len(set(given_out))
    for text in "abc":
        have = [c.number for c in calls if c.digest == fingerprint(body(text)).exact]
        want = asked.count(text)
        assert [one for one, t in zip(taken, asked) if t == text][: len(have)] == [(n, True) for n in have[:want]]
