"""What each figure of a call and of a group means."""

import statistics as stdlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from metagpt_localllm.journal import CallRecord, Replay
from metagpt_localllm.statistics import CallFigures, figures_of, per_call, percentile, percentiles, summarize

try:
    import numpy
except ImportError:
    numpy = None

SECONDS = some.floats(0, 1e6)
ANY_JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.sampled_from(["at", "ttft", "tokens", "error", "prompt_n"]), inner),
    max_leaves=6,
)


def an_attempt(at=100.0, ttft=4.0, ended=114.0, tokens=21, **more):
    return {"at": at, "prompt_tokens": 900, "deadlines": {"total": 7200.0}, "ttft": ttft, "longest_gap": 0.7, "tokens": tokens,
            "ended": ended, **more}  # fmt: skip


def failed(at, error="FirstTokenTimeout", ended=None, **more):
    return an_attempt(at, None, ended or at + 10, 0, error=error, detail="…", **more)


def a_call(number=1, outcome="done", **more):
    known = {"action": "WriteCode", "role": "Engineer", "tier": "default", "model": "m", "started": 90.0, "ended": 114.5,
             "attempts": [an_attempt()], "usage": {"prompt_tokens": 1000, "completion_tokens": 21}}  # fmt: skip
    return CallRecord(number, f"d{number}", outcome=outcome, **{**known, **more})


def figures(**more):
    return per_call("r1", a_call(**more))


# ------------------------------------------------------------------------------------------ one call


def test_a_call_that_went_well():
    call = figures(queued=10.0, cached_tokens=600)
    assert (call.run, call.action, call.outcome, call.sent) == ("r1", "WriteCode", "done", 100.0)
    assert (call.ttft, call.total, call.queued, call.longest_gap) == (4.0, 14.5, 10.0, 0.7)
    assert (call.prompt_tokens, call.cached_tokens, call.answer_tokens) == (1000, 600, 21)
    assert (call.decode_tokens, call.decode_seconds, call.decode_rate) == (20, 10.0, 2.0)
    assert (call.retries, call.timeouts, call.errors, call.trimmed_tokens, call.saved_tokens) == (0, 0, (), 0, 0)
    assert call.deadlines == {"total": 7200.0}


def test_the_first_token_is_that_of_the_attempt_that_answered_and_the_total_begins_with_the_first():
    call = figures(started=99.0, ended=160.0, attempts=[failed(100), failed(115, "IncompleteStream"), an_attempt(130, ended=160.0)])
    assert (call.ttft, call.total) == (4.0, 60.0)
    assert (call.retries, call.timeouts, call.errors) == (2, 1, ("FirstTokenTimeout", "IncompleteStream"))


def test_only_what_was_waited_for_a_turn_after_the_first_request_is_taken_off_the_total():
    attempts = [failed(100), an_attempt(130, ended=160.0)]
    assert figures(started=90.0, queued=10.0, ended=160.0, attempts=attempts).total == 60.0
    assert figures(started=90.0, queued=25.0, ended=160.0, attempts=attempts).total == 45.0


def test_what_an_answer_went_on_with_was_not_decoded_by_it():
    call = figures(saved_tokens=11, attempts=[an_attempt(tokens=32)], usage={"prompt_tokens": 1000, "completion_tokens": 32})
    assert (call.answer_tokens, call.decode_tokens, call.decode_rate, call.saved_tokens) == (32, 20, 2.0, 11)


def test_chunks_of_several_tokens_are_counted_as_the_server_counts_them():
    assert figures(attempts=[an_attempt(tokens=11)], usage={"completion_tokens": 41}).decode_tokens == 40


@pytest.mark.parametrize("attempt", [an_attempt(tokens=1), an_attempt(ttft=None), an_attempt(ttft=14.0), an_attempt(ttft=20.0)])
def test_the_speed_of_an_answer_in_one_piece_is_not_known(attempt):
    assert figures(attempts=[attempt], usage={"completion_tokens": 500}).decode_rate is None


def test_the_prefill_is_what_the_server_says_of_the_tokens_that_were_not_cached():
    assert figures(timings={"cache_n": 600, "prompt_n": 400, "prompt_ms": 2000.0}).prefill_rate == 200.0
    assert figures(timings={"prompt_n": 0, "prompt_ms": 0}).prefill_rate is None
    assert figures().prefill_rate is None


def test_the_clock_of_a_simulated_server_that_runs_faster_does_not_make_its_prefill_slow():
    assert figures(timings={"prompt_n": 400, "prompt_ms": 200_000.0}).prefill_rate == 100.0, "it took 4 s on our clock"


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_a_call_without_an_answer_has_its_time_and_its_errors_but_no_speed(outcome):
    call = figures(outcome=outcome, usage=None, attempts=[failed(100), failed(112, "StreamStalled")], ended=130.0)
    assert (call.total, call.timeouts, call.retries) == (30.0, 2, 1)
    assert (call.ttft, call.decode_rate, call.answer_tokens) == (None, None, None)
    assert call.prompt_tokens == 900, "as it was estimated"


def test_of_a_call_that_was_killed_nothing_is_known_but_that_it_began():
    call = figures(outcome="running", usage=None, attempts=[], ended=None)
    assert (call.total, call.ttft, call.prompt_tokens, call.retries, call.sent) == (None, None, None, 0, None)


def test_trims_of_a_call_add_up():
    call = figures(trims=[{"removed_tokens": 300, "window": 4096}, {"removed_tokens": 40}])
    assert (call.trims, call.trimmed_tokens) == (2, 340)


@settings(deadline=None)  # two cores, shared
@given(ANY_JSON, ANY_JSON, ANY_JSON, ANY_JSON, ANY_JSON)
def test_whatever_a_damaged_disk_makes_of_a_record_it_raises_nothing(one, two, three, four, five):
    call = a_call(attempts=one, usage=two, timings=three, trims=four, ended=five, queued=five, saved_tokens=one, started=five,
                  cached_tokens=three)  # fmt: skip
    made = per_call("r", call)
    (group,) = summarize([made], ["action"])
    assert group.calls == 1 and (made.total is None or made.total >= 0) and (made.decode_rate is None or made.decode_rate > 0)


# ------------------------------------------------------------------------------------------ answers given again


def test_an_answer_that_was_given_again_counts_for_whom_it_was_but_is_no_call():
    made = figures_of([("r1", a_call()), ("r2", a_call())], [Replay("r1", 1, 500.0, 21)])
    (group,) = summarize(made, ["action", "role"])
    assert (group.calls, group.replayed, group.saved_tokens, group.seconds) == (2, 1, 21, 29.0)


def test_an_old_call_that_was_replayed_lately_is_named_in_the_replay_only():
    (made,) = figures_of([("r1", a_call())], [Replay("r1", 1, 500.0, 21), Replay("r1", 1, 50.0, 21)], since=400.0)
    assert (made.outcome, made.action, made.saved_tokens) == ("replayed", "WriteCode", 21)


def test_a_replay_of_a_call_that_cannot_be_read_is_counted_without_a_name():
    (group,) = summarize(figures_of([], [Replay("r1", 1, 500.0, 21)]), ["action"])
    assert (group.keys, group.calls, group.replayed) == ((("action", ""),), 0, 1)


# ------------------------------------------------------------------------------------------ percentiles


@given(some.lists(SECONDS, min_size=1), some.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_so_many_per_cent_do_not_exceed(values, per_cent):
    found = percentile(sorted(values), per_cent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= per_cent * len(values)
    assert sum(value < found for value in values) * 100 < per_cent * len(values)


@given(some.lists(SECONDS, min_size=1))
def test_the_median_is_that_of_the_standard_library(values):
    assert percentiles(values).p50 == stdlib.median_low(values)


@pytest.mark.skipif(numpy is None, reason="MetaGPT brings numpy, this package does not need it")
@given(some.lists(SECONDS, min_size=1, max_size=300), some.integers(0, 100))
def test_percentiles_are_those_of_numpy(values, per_cent):
    # It reckons with floats: where the rank is a whole number it may take the next one.
    ordered = sorted(values)
    if (len(values) * per_cent) % 100:
        assert percentile(ordered, per_cent) == numpy.percentile(ordered, per_cent, method="inverted_cdf")


def test_of_few_values_the_upper_percentiles_are_the_largest():
    found = percentiles([3.0, None, 1.0, 2.0])
    assert (found.count, found.p50, found.p95, found.p99, found.most) == (3, 2.0, 3.0, 3.0, 3.0)
    assert percentiles([None]) is None
    assert percentiles(range(1, 101)).p95 == 95 and percentiles(range(1, 101)).p99 == 99


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="some values"):
        percentile([], 50)


# ------------------------------------------------------------------------------------------ groups


def test_groups_come_in_the_order_of_the_time_that_they_took():
    made = [figures(action="A"), figures(action="B", ended=200.0), figures(action="A")]
    groups = summarize(made, ["action"])
    assert [(dict(group.keys)["action"], group.calls, group.seconds) for group in groups] == [("B", 1, 100.0), ("A", 2, 29.0)]


def test_times_are_of_answered_calls_and_counts_of_all():
    made = [
        figures(), figures(superseded=True),
        figures(outcome="failed", attempts=[failed(100), failed(500)], ended=1100.0, usage=None, trims=[{"removed_tokens": 7}]),
        figures(outcome="running", attempts=[], ended=None, usage=None), figures(outcome="cancelled", attempts=[], usage=None),
    ]  # fmt: skip
    (group,) = summarize(made, [])
    assert (group.calls, group.answered, group.failed, group.cancelled, group.unfinished, group.superseded) == (5, 2, 1, 1, 1, 1)
    assert (group.total.count, group.total.most, group.ttft.count) == (2, 14.5, 2)
    assert (group.retries, group.timeouts, group.errors, group.trimmed_tokens) == (1, 2, {"FirstTokenTimeout": 2}, 7)
    assert group.seconds == 14.5 * 2 + 1000.0
    assert (group.prompt.count, group.prompt_tokens, group.answer_tokens) == (3, 2900, 42)


def test_the_speed_of_a_group_weighs_each_token_alike():
    short = figures(attempts=[an_attempt(tokens=3, ended=105.0)], usage={"completion_tokens": 3})
    (group,) = summarize([figures(), short], [])
    assert group.decode_rate == 22 / 11.0


def test_the_share_of_cached_tokens_is_of_those_calls_whose_server_tells():
    (group,) = summarize([figures(cached_tokens=500), figures(cached_tokens=0), figures()], [])
    assert group.cached_share == 0.25
    assert summarize([figures()], [])[0].cached_share is None


def test_without_calls_there_is_a_total_of_nothing_and_no_group():
    assert [group.calls for group in summarize([], [])] == [0]
    assert summarize([], ["action"]) == []


def test_what_calls_cannot_be_grouped_by_is_refused():
    with pytest.raises(ValueError, match="by colour, but by action, role, model"):
        summarize([], ["action", "colour"])


@settings(deadline=None)
@given(some.lists(some.builds(
    CallFigures, run=some.sampled_from("ab"), number=some.integers(1, 9), action=some.sampled_from("xy"), role=some.sampled_from("pq"),
    model=some.just("m"), tier=some.just("t"), outcome=some.sampled_from(["done", "failed", "cancelled", "running", "replayed"]),
    retries=some.integers(0, 5), timeouts=some.integers(0, 5), trimmed_tokens=some.integers(0, 99), total=some.none() | SECONDS,
)))  # fmt: skip
def test_groups_add_up_to_the_total(made):
    (total,), groups = summarize(made, []), summarize(made, ["action", "role", "run"])
    for name in ("calls", "answered", "failed", "cancelled", "unfinished", "replayed", "retries", "timeouts", "trimmed_tokens"):
        assert sum(getattr(group, name) for group in groups) == getattr(total, name)
    assert sum(group.seconds for group in groups) == pytest.approx(total.seconds)
    assert total.calls == total.answered + total.failed + total.cancelled + total.unfinished
