"""Server-sent events, in whatever portions they come."""

from hypothesis import given
from hypothesis import strategies as st

from metagpt_localllm.sse import SSEDecoder

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
