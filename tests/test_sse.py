"""Server-sent events, in whatever portions they come."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_localllm.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder

STREAM = b': ping\n\ndata: {"a":1}\r\n\r\ndata:two\ndata: lines\n\nevent: x\ndata: [DONE]\n\n'


@given(st.lists(st.integers(min_value=0, max_value=len(STREAM)), max_size=12))
def test_the_cuts_between_portions_do_not_matter(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    decoder = SSEDecoder()
    events = [event for start, end in zip(edges, edges[1:]) for event in decoder.feed(STREAM[start:end])]
    assert events == [b'{"a":1}', b"two\nlines", b"[DONE]"]
    assert decoder.comments == 1


def test_an_event_left_open_at_the_end_still_counts():
    decoder = SSEDecoder()
    assert decoder.feed(b"data: last") == []
    assert decoder.close() == [b"last"]


def test_a_byte_order_mark_hides_no_event():
    assert SSEDecoder().feed(b"\xef\xbb\xbfdata: one\n\n") == [b"one"]


@pytest.mark.parametrize("line", [b"data: x", b": x", b"x", b"event: x"], ids=["data", "comment", "no field", "another field"])
def test_a_line_that_does_not_end_is_given_up(line):
    decoder, fed = SSEDecoder(), len(line)
    decoder.feed(line)
    with pytest.raises(EventTooLarge, match="16,777,216 bytes"):
        while fed < 2 * MAX_EVENT_BYTES:
            decoder.feed(b"x" * 65536)
            fed += 65536
    assert fed <= MAX_EVENT_BYTES + 2 * 65536


def test_an_event_of_many_lines_that_does_not_end_is_given_up():
    decoder = SSEDecoder()
    with pytest.raises(EventTooLarge):
        for _ in range(MAX_EVENT_BYTES // 32768 + 1):
            decoder.feed(b"data: " + b"x" * 32768 + b"\n")


def test_a_long_line_in_small_portions_takes_time_by_its_length_and_not_by_its_square():
    """Joined anew with every portion, 4 MB in portions of 256 bytes are 34 GB to be copied."""

    def seconds(size):
        decoder, started = SSEDecoder(), time.process_time()
        for _ in range(size // 256):
            decoder.feed(b"x" * 256)
        return time.process_time() - started

    def lines(size):
        decoder, started = SSEDecoder(), time.process_time()
        for _ in range(size // 16):
            decoder.feed(b"data: 4567890123\n")
        return time.process_time() - started

    for took in (seconds, lines):
        few, many = min(took(1 << 18) for _ in range(3)), took(1 << 22)
        assert many < 80 * few + 0.2, (took.__name__, few, many)
