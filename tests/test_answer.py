"""An answer that goes on where another broke off."""

import json
import tracemalloc

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from metagpt_localllm.answer import Answer, AnswerTooLarge, OddChunk, chunk_of, may_continue, seam

STORY = "Once upon a time there was a snake, 12 tiles long.\n\nIt lived in a terminal, and it ate (mostly) apples."


def chunk(text=None, finish=None, **delta):
    if text is not None:
        delta["content"] = text
    return {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def fed(answer, *texts, finish="stop"):
    """What is shown of these chunks."""
    shown = [answer.add(chunk(text))[1] for text in texts]
    if finish is not None:
        shown.append(answer.add(chunk(finish=finish))[1])
    return "".join(shown)


def split(text, cuts):
    """The text in pieces that end at these parts of it."""
    edges = sorted({0, len(text), *(int(cut * len(text)) for cut in cuts)})
    return [text[start:end] for start, end in zip(edges, edges[1:])]


CUTS = st.lists(st.floats(0, 1), max_size=30)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab \n."), max_size=60)


# ------------------------------------------------------------------------------------------ repetition


@given(TEXT.map(lambda text: text + STORY) | TEXT.map(lambda text: STORY + text), TEXT, CUTS)
@pytest.mark.parametrize("repeats", [None, True])
@pytest.mark.parametrize("repeated", ["", "all", "all but its first white space"])
def test_the_joined_answer_is_the_beginning_and_the_new_text_however_they_come(repeats, repeated, partial, new, cuts):
    assume(may_continue(partial, repeats) and not new.startswith(partial.lstrip()))
    front = {"": "", "all": partial}.get(repeated, partial.lstrip())
    answer = Answer.begun(partial, 7, repeats)
    shown = fed(answer, *split(front + new, cuts))
    assert answer.content == partial + new and shown == new
    assert 7 <= answer.tokens <= 7 + len(new) and answer.begun_tokens == 7


@given(TEXT, TEXT, CUTS)
@example("a ", "a a a ", [0.5])
@example("\n", "\n\n", [])
def test_all_is_new_from_a_server_that_never_repeats(partial, new, cuts):
    answer = Answer.begun(partial, 7, repeats=False)
    assert fed(answer, *split(new, cuts)) == new
    assert answer.content == partial + new


@given(TEXT.map(lambda text: STORY + text), CUTS)
def test_a_repetition_that_breaks_off_adds_nothing(partial, cuts):
    answer = Answer.begun(partial, 7)
    assert fed(answer, *split(partial[:-1], cuts), finish=None) == ""
    assert answer.content == partial and (answer.partial, answer.partial_tokens) == (seam(partial), 7)


def test_a_repetition_counts_no_token():
    answer = Answer.begun(STORY, 20)
    fed(answer, STORY[:50], STORY[50:] + " And", " then", " it", finish=None)
    assert answer.tokens == 23
    assert answer.partial_tokens == 23


def test_new_text_that_begins_like_the_beginning_and_ends_there_is_text():
    answer = Answer.begun(STORY, 20)
    assert fed(answer, "Once", " upon") == "Once upon"
    assert (answer.content, answer.tokens) == (STORY + "Once upon", 22)


@pytest.mark.parametrize("text", ["", "\n", "a a a", "a " * 100, "| - | - |\n" * 30, STORY[:79]])
def test_a_beginning_that_may_come_again_is_not_gone_on_with_unless_the_server_is_known(text):
    assert not may_continue(text)
    assert may_continue(text, repeats=False) == may_continue(text, repeats=True) == bool(text.strip())


def test_a_long_beginning_may_be_gone_on_with():
    assert may_continue(STORY) and may_continue("begin: " + "a " * 100)


# ------------------------------------------------------------------------------------------ seam


@pytest.mark.parametrize("partial, safe", [
    ("", ""), ("the cat", "the cat"), ("the cat.", "the cat."), (" the", " the"), ("the cat ", "the cat"),
    ("the cat.\n\n", "the cat"), ("x = [] \n", "x"), ("def f(x):\n    ", "def f(x"), ("\n\n", ""), ("...\n", ""),
    ("\u4f60\u597d\u3002\n", "\u4f60\u597d"), ("\u092e\u0947\u0902\u0964\n", "\u092e\u0947\u0902"),
    ("smile \ud83d", "smile"), ("smile\ufffd", "smile"), ("smile \U0001f600", "smile \U0001f600"),
])  # fmt: skip
def test_the_seam(partial, safe):
    assert seam(partial) == safe


@given(st.text())
def test_a_seam_is_a_beginning_that_no_template_trims_and_its_own_seam(partial):
    safe = seam(partial)
    assert partial.startswith(safe) and seam(safe) == safe and safe.rstrip() == safe


def test_what_was_shown_and_comes_again_behind_the_seam_is_not_shown_again():
    answer = Answer.begun("the cat", 2, repeats=False, shown="the cat.\n\n")
    assert fed(answer, ".", "\n", "\nIt", " sat") == "It sat"
    assert answer.content == "the cat.\n\nIt sat"


def test_what_comes_otherwise_behind_the_seam_is_shown():
    answer = Answer.begun("the cat", 2, repeats=False, shown="the cat.\n\n")
    assert fed(answer, ".", " It", " sat") == ". It sat"


# ------------------------------------------------------------------------------------------ continuable


def broken_off(*deltas, finish=None):
    answer = Answer()
    for delta in deltas:
        answer.add(chunk(**delta))
    answer.add(chunk(finish=finish))
    return answer


TEXT_DELTA, CALL = {"text": "some text"}, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]}


@pytest.mark.parametrize("deltas, finish, continuable", [
    ([TEXT_DELTA], None, True), ([TEXT_DELTA], "abort", True), ([TEXT_DELTA], "stop", False), ([], None, False),
    ([{"text": "...\n"}], None, False), ([TEXT_DELTA, CALL], None, False),
    ([{"reasoning_content": "hm"}], None, False), ([{"reasoning_content": "hm"}, TEXT_DELTA], None, False),
    ([{"text": "<think>\nhm"}], None, False), ([{"text": "hm</think>\n\nyes"}], None, False),
    ([{"text": "[THINK]hm"}], None, False), ([{"text": "a <|channel|> b"}], None, False),
    ([{"text": "I think so"}], None, True),
])  # fmt: skip
def test_what_can_be_gone_on_with(deltas, finish, continuable):
    assert broken_off(*deltas, finish=finish).continuable is continuable


def test_thoughts_where_the_text_should_go_on_are_a_new_turn():
    answer = Answer.begun(STORY, 20, repeats=False)
    answer.add(chunk(reasoning_content="The user wants"))
    assert answer.restarted and not answer.continuable


def test_the_tokens_of_what_is_kept():
    answer = broken_off({"text": "the"}, {"text": " cat"}, {"text": ".\n\n"})
    assert (answer.tokens, answer.partial, answer.partial_tokens) == (3, "the cat", 2)
    again = Answer.begun(answer.partial, answer.partial_tokens, repeats=False)
    fed(again, ".", " It", " ", finish=None)
    assert (again.tokens, again.partial, again.partial_tokens) == (5, "the cat. It", 4)


# ------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize("told, whole", [
    ({"prompt_tokens": 54, "completion_tokens": 30, "total_tokens": 84}, (24, 60, 84)),
    ({"prompt_tokens": 10, "completion_tokens": 30, "total_tokens": 40}, (0, 60, 60)),
    ({"completion_tokens": 30}, (9, 60, 69)), ({}, (9, 99, 108)),
    ({"prompt_tokens": None, "completion_tokens": "x"}, (9, 99, 108)),
])  # fmt: skip
def test_the_usage_of_a_begun_answer_is_that_of_the_whole(told, whole):
    answer = Answer.begun(STORY, 30)
    answer.add({**chunk(finish="stop"), "usage": told})
    usage = answer.completion_usage(9, 99)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == whole


def test_no_more_of_the_prompt_came_from_the_cache_than_it_has():
    answer = Answer.begun(STORY, 30)
    details = {"prompt_tokens_details": {"cached_tokens": 53}}
    answer.add({**chunk(finish="stop"), "usage": {"prompt_tokens": 54, "completion_tokens": 30, **details}})
    assert answer.usage["prompt_tokens_details"] == {"cached_tokens": 24}


# ------------------------------------------------------------------------------------------- odd chunks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def _or_anything(strategy):
    return st.one_of(strategy, strategy, JSON)


_CALL = st.fixed_dictionaries(
    {}, optional={"index": _or_anything(st.integers(-2, 3)), "id": JSON,
                  "function": _or_anything(st.fixed_dictionaries({}, optional={"name": JSON, "arguments": JSON}))}
)  # fmt: skip
_DELTA = st.fixed_dictionaries(
    {}, optional={"role": JSON, "content": _or_anything(st.text(max_size=5)), "reasoning_content": JSON, "reasoning": JSON,
                  "tool_calls": _or_anything(st.lists(_or_anything(_CALL), max_size=3))}
)  # fmt: skip
_CHOICE = st.fixed_dictionaries(
    {}, optional={"delta": _or_anything(_DELTA), "message": _or_anything(_DELTA), "finish_reason": JSON, "index": JSON}
)
CHUNK = st.fixed_dictionaries(
    {}, optional={"id": JSON, "model": JSON, "choices": _or_anything(st.lists(_or_anything(_CHOICE), max_size=2)),
                  "usage": _or_anything(st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens",
                                                                         "prompt_tokens_details"]), JSON)),
                  "timings": JSON}
)  # fmt: skip


@given(st.lists(CHUNK, max_size=6), st.booleans())
def test_chunks_of_any_shape_are_taken_or_refused_and_what_was_taken_is_an_answer(chunks, begun):
    answer = Answer.begun("a beginning", 3, None) if begun else Answer()
    for number, chunk in enumerate(chunks):
        try:
            answer.add(chunk)
        except OddChunk as error:
            assert str(error).isprintable() and len(str(error)) < 250
        usage = answer.completion_usage(number, number)
        assert 0 <= usage.prompt_tokens <= 10**12 and 0 <= usage.completion_tokens <= 10**12 + 3
        completion = answer.completion("m", usage)
        assert completion.choices[0].message.content in (None, answer.content)
        assert answer.partial_tokens <= answer.tokens and isinstance(answer.continuable, bool)
        record = json.loads(json.dumps(answer.as_record(), allow_nan=False))
        assert Answer.of_record(record).content == answer.content


def test_a_part_of_a_text_without_text_adds_nothing_to_it():
    answer = Answer()
    answer.add({"choices": [{"delta": {"content": [{"text": "a"}, {"text": None}, {"text": 7}, {}, 7]}}]})
    assert answer.content == "a"


def test_an_answer_without_an_end_is_given_up():
    answer, part = Answer(), "x" * (1 << 20)
    with pytest.raises(AnswerTooLarge, match="over 67,108,864 characters"):
        for _ in range(65):
            answer.add({"choices": [{"delta": {"reasoning": part}}]})


def test_tool_calls_without_an_end_are_given_up():
    answer = Answer()
    with pytest.raises(OddChunk, match="over 1,024 tool calls"):
        for number in range(2000):
            answer.add({"choices": [{"delta": {"tool_calls": [{"index": number}]}}]})


def test_an_answer_of_millions_of_tokens_takes_hardly_more_than_its_text():
    answer = Answer()
    tracemalloc.start()
    try:
        for number in range(100_000):
            answer.add({"choices": [{"delta": {"content": f"{number:5}"}}]})
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert answer.partial_tokens == answer.tokens == 100_000 and len(answer.content) == 500_000
    assert held < 4_000_000  # as 100,000 strings, 6.2 MB


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"nul", b"\x00"])
def test_data_that_is_no_json_is_odd(data):
    with pytest.raises(OddChunk):
        chunk_of(data)


@pytest.mark.parametrize("data", [b"17", b"null", b'"text"', b"[]", b"NaN"])
def test_other_json_than_an_object_is_no_chunk(data):
    assert chunk_of(data) is None
