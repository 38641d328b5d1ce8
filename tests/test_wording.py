"""Numbers and names as people read them."""

import pytest

from metagpt_localllm import events
from metagpt_localllm.quoting import quoted
from metagpt_localllm.telling import log_to
from metagpt_localllm.tiers import Caller
from metagpt_localllm.wording import counted, duration, printable, rate


@pytest.mark.parametrize(
    "number, words, said",
    [(0, ("call",), "0 calls"), (1, ("call",), "1 call"), (2000, ("call",), "2,000 calls"), (1, ("retry", "retries"), "1 retry"),
     (2, ("retry", "retries"), "2 retries")],
)  # fmt: skip
def test_one_is_told_in_the_singular(number, words, said):
    assert counted(number, *words) == said


def test_the_log_tells_of_one_message_and_one_token_in_the_singular():
    said = []

    class Logger:
        info = warning = said.append

    call, log = events.CallInfo(1, "m", Caller(), "default"), log_to(Logger())
    log(events.Done(call, 1, 9, 9, "stop", None, 0.0, 1.0, changed_messages=1))
    log(events.Continued(call, 2, 1))
    assert "1 message left out or shortened" in said[0] and said[1].endswith("1 token.")


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (0.0004, "1 ms"), (0.035, "35 ms"), (0.35, "0.35 s"), (4.25, "4.3 s"), (42.4, "42 s"), (59.7, "1 min"), (200, "3 min 20 s"),
     (3599.7, "1 h"), (7500, "2 h 5 min"), (86399, "1 d"), (100_000, "1 d 4 h"), (None, "–")],
)  # fmt: skip
def test_durations_are_written_as_people_say_them(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    "number, said", [(None, "–"), (0.123, "0.12"), (9.94, "9.94"), (9.96, "10.0"), (34.56, "34.6"), (99.96, "100"), (1234.5, "1,235")]
)
def test_rates_have_three_digits(number, said):
    assert rate(number) == said


def test_nothing_in_a_name_moves_the_cursor():
    assert printable("写\x1b[2J\n") == "写 [2J "


@pytest.mark.parametrize("text", ["你好，世界", "👩‍💻 und ❤️", "می‌شود", "क्‍ष हिन्दी", "שלום", "مرحبا", "cafe\u0301"])
def test_texts_of_all_languages_stay_as_they_are(text):
    assert quoted(text) == printable(text) == text


def test_of_a_long_text_the_end_is_told_too():
    said = quoted("Traceback (most recent call last):\n" + '  File "server.py", line 3\n' * 400 + "OutOfMemoryError: CUDA out of memory")
    assert said.startswith("Traceback (most") and said.endswith("OutOfMemoryError: CUDA out of memory") and len(said) == 300


@pytest.mark.parametrize("odd", ["\x1b", "\u202e", "\u2028", "\ud800", "\x9b", "\u200b"])
def test_what_moves_a_cursor_or_turns_a_text_round_is_no_part_of_a_line(odd):
    assert odd not in quoted(f"a{odd}b") + printable(f"a{odd}b")
