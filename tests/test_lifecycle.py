"""The life of one call: every transition, by a clock that is passed in."""

import pytest

from metagpt_localllm import errors
from metagpt_localllm.deadlines import Deadlines
from metagpt_localllm.failures import Failure, Kind
from metagpt_localllm.lifecycle import BackOff, CallLife, GiveUp, Phase, SendAgain, WaitForServer

NAMES = ("connect", "first_token", "stall", "total")
DEADLINES = Deadlines(5, 100, 10, 80, 1000, "default", {name: f"llm.local.timeouts.{name}" for name in NAMES})


def life(**options):
    options = {"attempts": 4, "wait_for_server": 60, "backoff": lambda attempt: float(attempt), "poll": (1, 60),
               **options}  # fmt: skip
    return CallLife(DEADLINES, now=0, **options)


def failure(kind, **details):
    return Failure(kind, errors.ServerFailed, "it failed", **details)


def test_before_the_first_token_the_first_token_deadline_is_due():
    call = life()
    call.send(7)
    assert (call.phase, call.attempt, call.deadline) == (Phase.SENT, 1, 107)
    expired = call.expire(107)
    assert expired.error is errors.FirstTokenTimeout and expired.setting == "llm.local.timeouts.first_token"
    assert "100.0 s" in expired.what


def test_prefill_that_moves_puts_the_deadline_off_and_prefill_that_does_not_move_does_not():
    call = life()
    call.send(0)
    call.progress(0, 50)
    call.progress(512, 60)
    assert (call.phase, call.deadline) == (Phase.PREFILL, 140)
    call.progress(512, 90)
    assert call.deadline == 140
    assert "prompt token 512" in call.expire(140).what


def test_every_token_starts_the_stall_deadline_anew():
    call = life()
    call.send(0)
    call.token(40)
    assert (call.phase, call.ttft, call.deadline) == (Phase.DECODING, 40, 50)
    call.token(45)
    assert call.deadline == 55
    assert call.expire(55).error is errors.StreamStalled


def test_prefill_progress_after_a_token_does_not_lead_back():
    call = life()
    call.send(0)
    call.token(1)
    call.progress(9, 2)
    assert call.phase is Phase.DECODING and call.deadline == 11


def test_total_is_due_however_lively_the_stream_is():
    call = life()
    call.send(0)
    for now in range(1, 1000, 5):
        call.token(now)
    assert call.deadline == 1000
    assert call.expire(1000).error is errors.TotalTimeout


def test_the_callers_limit_is_due_before_all_others_and_is_final():
    call = life(call_timeout=30)
    call.send(0)
    assert call.deadline == 30
    expired = call.expire(30)
    assert expired.kind is Kind.FATAL and expired.error is errors.TotalTimeout and "caller" in expired.what


def test_comments_are_told_in_the_error_and_put_nothing_off():
    call = life()
    call.send(0)
    call.comments = 7
    assert call.deadline == 100
    assert "7 keep-alive comments" in call.expire(100).what


def test_transient_failures_back_off_until_the_attempts_are_used_up():
    call = life()
    for attempt in (1, 2, 3):
        call.send(0)
        assert call.fail(failure(Kind.TRANSIENT), 1) == BackOff(attempt)
        assert call.phase is Phase.BACKING_OFF
    call.send(0)
    assert isinstance(call.fail(failure(Kind.TRANSIENT), 1), GiveUp)
    assert (call.phase, call.attempt) == (Phase.FAILED, 4)


def test_retry_after_is_the_least_pause():
    call = life()
    call.send(0)
    assert call.fail(failure(Kind.TRANSIENT, retry_after=30.0), 1) == BackOff(30)


def test_a_pause_that_outlasts_the_callers_limit_is_not_begun():
    call = life(call_timeout=20)
    call.send(0)
    assert isinstance(call.fail(failure(Kind.TRANSIENT, retry_after=30.0), 1), GiveUp)


@pytest.mark.parametrize("kind", [Kind.NOT_UP, Kind.LOADING])
def test_waiting_for_the_server_spends_patience_and_no_attempt(kind):
    call = life(attempts=1)
    call.send(0)
    assert call.fail(failure(kind), 10) == WaitForServer(60, 1)  # what the attempt took counts, too
    assert call.phase is Phase.WAITING_FOR_SERVER
    call.send(40)
    assert call.attempt == 1
    assert call.fail(failure(kind), 45) == WaitForServer(60, 2)
    call.send(60)
    given_up = call.fail(failure(kind), 61)
    assert isinstance(given_up, GiveUp) and "not even after 60 s of waiting" in given_up.failure.what


def test_a_server_that_claims_to_be_up_and_is_not_is_asked_more_and_more_seldom():
    call = life(wait_for_server=1000)
    pauses = []
    for now in range(9):
        call.send(now)
        pauses.append(call.fail(failure(Kind.LOADING), now).pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_waiting_ends_with_the_callers_limit():
    call = life(call_timeout=30)
    call.send(0)
    assert call.fail(failure(Kind.NOT_UP), 10) == WaitForServer(30, 1)
    given_up = call.waited_in_vain(failure(Kind.NOT_UP), 30)
    assert given_up.failure.error is errors.TotalTimeout


def test_after_the_finish_reason_only_a_short_time_is_left_whatever_comes():
    call = life()
    call.send(0)
    call.token(1)
    call.finish(2)
    assert (call.phase, call.deadline) == (Phase.ENDING, 4)
    call.finish(3)
    assert call.deadline == 4


def test_an_overflow_is_sent_once_more():
    call = life()
    call.send(0)
    assert isinstance(call.fail(failure(Kind.OVERFLOW), 1), SendAgain)
    call.send(2)
    assert isinstance(call.fail(failure(Kind.OVERFLOW), 3), GiveUp)


def test_a_strict_server_costs_no_attempt():
    call = life(attempts=1)
    call.send(0)
    assert isinstance(call.fail(failure(Kind.STRICT), 1), SendAgain)
    call.send(2)
    assert call.attempt == 1
    assert isinstance(call.fail(failure(Kind.STRICT), 3), GiveUp)


def test_what_is_fatal_ends_the_call_at_once():
    call = life()
    call.send(0)
    assert isinstance(call.fail(failure(Kind.FATAL), 1), GiveUp)


def test_a_probe_that_hung_has_spent_an_attempt():
    call = life(attempts=2)
    call.spend_attempt()
    call.send(0)
    assert isinstance(call.fail(failure(Kind.TRANSIENT), 1), GiveUp)


def test_a_new_attempt_knows_nothing_of_the_last():
    call = life()
    call.send(0)
    call.token(5)
    call.fail(failure(Kind.TRANSIENT), 6)
    call.send(20)
    assert (call.phase, call.tokens, call.ttft, call.deadline) == (Phase.SENT, 0, None, 120)


def test_a_turn_that_is_long_in_coming_takes_nothing_of_the_wait_for_the_server():
    call = life()
    call.send(0)
    assert isinstance(call.fail(failure(Kind.NOT_UP), 0), WaitForServer)
    call.queued(1000)  # the server was up again after ten seconds, and others were first
    call.send(1010)
    assert call.fail(failure(Kind.NOT_UP), 1010) == WaitForServer(1060, 2.0)
