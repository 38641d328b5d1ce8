"""What is left of one text that is too long."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_localllm.shortening import shorten
from metagpt_localllm.tokens import estimate_text

_MARKER = re.compile(r"^\[… about ([\d,]+) tokens left out here to fit the context window …\]$", re.MULTILINE)
_LINE = "the quick brown fox jumps over the lazy dog and runs\n"
_keep = st.sampled_from(["both", "start", "end"])


def count(text):
    return estimate_text(text)


class Counting:
    """Counts, and knows how many characters it was given. Like a scale that was learned from a server."""

    def __init__(self, factor=1.1):
        self.factor, self.characters = factor, 0

    def __call__(self, text):
        self.characters += len(text)
        return int(count(text) * self.factor)


def parts(shortened):
    """What is before the marker, and behind its line."""
    (marker,) = _MARKER.finditer(shortened)
    return shortened[: marker.start()], shortened[marker.end() + 1 :]


def numbered(lines, text="a line of prose with some words in it"):
    return "".join(f"{number} {text}\n" for number in range(lines))


def fence_open(text):
    """The fence that is open at the end of ``text``, by the rules of CommonMark."""
    opened = ""
    for line in text.splitlines():
        fence = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence and opened:
            opened = "" if fence[1].startswith(opened) and not fence[2].strip() else opened
        elif fence and not ("`" in fence[1] and "`" in fence[2]):
            opened = fence[1]
    return opened


def test_a_text_that_fits_is_the_same():
    assert shorten(_LINE, count(_LINE), count) == _LINE
    assert shorten("", 0, count) == ""


def test_the_middle_goes_at_line_ends_and_the_marker_says_how_much():
    text = numbered(500)
    shortened = shorten(text, 1000, count)
    head, tail = parts(shortened)
    assert text.startswith(head) and head.endswith("\n") and text.endswith("\n" + tail)
    assert abs(count(head) - count(tail)) < 40
    said = int(_MARKER.search(shortened)[1].replace(",", ""))
    assert said == count(text) - count(head + tail)


def test_the_end_goes_or_the_beginning():
    text = numbered(500)
    head, tail = parts(shorten(text, 1000, count, "start"))
    assert text.startswith(head) and count(head) > 900 and tail == ""
    head, tail = parts(shorten(text, 1000, count, "end"))
    assert text.endswith(tail) and count(tail) > 900 and head == ""


@pytest.mark.parametrize("target", [0, -5, 10, 35])
def test_where_not_even_the_marker_fits_it_is_all_there_is(target):
    text = numbered(50)
    shortened = shorten(text, target, count)
    assert _MARKER.fullmatch(shortened)
    assert shorten(shortened, target, count) == shortened


def test_a_text_shorter_than_the_marker_stays():
    assert shorten("only a few words", 2, count) == "only a few words"


def test_what_was_shortened_before_has_one_marker_after_it_is_again():
    text = numbered(500)
    for keep in ("both", "start", "end"):
        again = shorten(shorten(text, 2000, count, keep), 700, count, keep)
        assert len(_MARKER.findall(again)) == 1


@pytest.mark.parametrize("keep", ["both", "start"])
def test_the_head_is_the_same_when_the_text_has_grown(keep):
    text = numbered(100) + "```py\n" + numbered(300, "= code()") + "```\n" + json.dumps(list(range(300)), indent=1)
    heads = {parts(shorten(text + numbered(more), 1500, count, keep))[0] for more in (0, 1, 7, 400, 20_000)}
    assert len(heads) == 1


def test_a_head_in_a_json_document_is_the_same_when_the_document_is_finished_later():
    whole = json.dumps([{"number": number} for number in range(500)], indent=1) + "\n" + numbered(10)
    heads = {parts(shorten(whole[:size], 1200, count))[0] for size in (6000, 9000, 12_000, len(whole))}
    assert len(heads) == 1


def test_a_small_fenced_block_goes_as_a_whole():
    block = "```python\n" + "some_code(argument)\n" * 8 + "```\n"
    text = numbered(40) + block + numbered(300) + block + numbered(40)
    for target in range(300, 1600, 45):
        head, tail = parts(shorten(text, target, count))
        assert not fence_open(head)
        assert head.count("some_code") in (0, 8) and tail.count("some_code") in (0, 8)


def test_a_block_that_is_all_there_is_is_cut_with_its_fence_closed_and_opened_again():
    text = "Look:\n  ~~~~python title\n" + "".join(f"code({line})\n" for line in range(1000)) + "  ~~~~\nThanks.\n"
    shortened = shorten(text, 1000, count)
    head, tail = parts(shortened)
    assert 850 < count(shortened) <= 1000
    assert head.startswith("Look:\n  ~~~~python title\ncode(0)\n") and head.endswith(")\n  ~~~~\n")
    assert tail.startswith("  ~~~~python title\ncode(") and tail.endswith("code(999)\n  ~~~~\nThanks.\n")


def test_a_shorter_fence_within_a_fence_does_not_close_it():
    inner = "```py\ncode(1)\n```\n~~~\n"
    text = numbered(10) + "````markdown\n" + inner * 200 + "````\n" + numbered(10)
    for keep in ("both", "start", "end"):
        shortened = shorten(text, 900, count, keep)
        head, tail = parts(shortened)
        assert count(shortened) > 800
        assert head.endswith("````\n") or not head
        assert tail.startswith("````markdown\n") or not tail
        assert not fence_open(head) and not fence_open(tail)


def test_a_fence_that_nobody_closes_lasts_to_the_end():
    text = numbered(10) + "```log\n" + numbered(500)
    head, tail = parts(shorten(text, 900, count))
    assert head.endswith("\n```\n") and tail.startswith("```log\n") and fence_open(tail)


def test_a_fence_in_a_list_keeps_its_indent():
    text = "Steps\n1. ```sh\n" + "   make test\n" * 500 + "   ```\n2. done\n"
    head, tail = parts(shorten(text, 500, count))
    assert head.endswith("   make test\n   ```\n") and tail.startswith("1. ```sh\n   make test\n")


def test_a_small_json_document_is_whole_or_absent():
    document = json.dumps({"name": "x", "values": [1, 2, {"a": "[}"}], "text": "```\n"}, indent=2) + "\n"
    text = numbered(30) + document + numbered(300) + document + numbered(30)
    for target in range(400, 1400, 45):
        shortened = shorten(text, target, count)
        assert shortened.count('"name"') == shortened.count('"values"') == shortened.count(document)


def test_a_large_json_document_is_cut_at_line_ends():
    text = "Result:\n" + json.dumps([{"number": number} for number in range(2000)], indent=1) + "\nEnd\n"
    shortened = shorten(text, 1000, count)
    head, tail = parts(shortened)
    assert 900 < count(shortened) <= 1000 and head.endswith("\n")
    assert tail in text and text[text.index(tail) - 1] == "\n"


@pytest.mark.parametrize("target", [120, 1000, 20_000])
@pytest.mark.parametrize("part", ["word and ", "x7", "今天天气很好，", "今天天气很好"])
def test_one_giant_line_is_broken(part, target):
    text = part * (150_000 // len(part))
    shortened = shorten(text, target, count)
    head, tail = parts(shortened)
    assert text.startswith(head[:-1]) and text.endswith(tail)
    assert target * (0.5 if target < 500 else 0.85) < count(shortened) <= target
    if "word" in text:
        assert head.endswith(" \n") and tail[:4] in ("word", "and ")


def test_a_letter_keeps_its_accent():
    text = "e\u0301\u0323" * 20_000
    for target in range(500, 530):
        head, tail = parts(shorten(text, target, count))
        assert head.endswith("\u0323\n") and tail.startswith("e")


def test_chinese_lines():
    text = "".join(f"第{number}行：今天天气很好，我们去公园。\n" for number in range(1000))
    shortened = shorten(text, 1500, count)
    head, tail = parts(shortened)
    assert 0.9 * 1500 < count(shortened) <= 1500
    assert head.endswith("。\n") and tail.startswith("第")


def test_lines_that_end_as_in_windows():
    code = "```c\r\n" + "call();\r\n" * 400 + "```\r\n"
    head, tail = parts(shorten("Intro\r\n\r\n" + code + "Outro\r\n", 500, count))
    assert head.startswith("Intro\r\n\r\n```c\r\ncall();\r\n") and head.endswith("\r\n```\n")
    assert tail.startswith("```c\ncall();\r\n") and tail.endswith("```\r\nOutro\r\n")


_LINES = st.lists(st.integers(1, 12), min_size=300, max_size=500)


@settings(max_examples=25, deadline=None)
@given(_LINES, st.integers(500, 1500), _keep)
def test_of_prose_nearly_all_that_fits_is_kept(lengths, target, keep):
    text = "".join("word " * length + "end.\n" + "\n" * (length == 7) for length in lengths)
    fit = min(target, count(text))
    assert 0.85 * fit <= count(shorten(text, target, count, keep)) <= target


_words = st.lists(st.sampled_from(["word", "今天。", "e\u0301", "{", "[", "```", "~~~", "`x`", "1"]), max_size=9)
_line = st.builds(lambda words, times: " ".join(words) * times + "\n", _words, st.sampled_from([1, 1, 30]))
_fenced = st.builds(
    lambda fence, info, lines: f"{fence}{info}\n" + "> ".join(["", *lines]) + f"{fence}\n",
    st.sampled_from(["```", "````", "~~~"]),
    st.sampled_from(["", "py", " json x"]),
    st.lists(_line, max_size=30),
)
_json = st.builds(
    lambda size, indent: json.dumps([{"a": "```"}] * size, indent=indent) + "\n",
    st.integers(0, 30),
    st.sampled_from([None, 2]),
)
_prose = st.builds(lambda line: "- x " + line, _line)
_text = st.lists(st.one_of(_prose, _prose, _fenced, _json), min_size=1, max_size=15).map("".join)


@settings(max_examples=150, deadline=None)
@given(_text, st.integers(60, 1500), _keep, st.sampled_from([0.4, 1.0, 1.3]))
def test_it_fits_and_twice_is_once_and_fences_stay_balanced(text, target, keep, factor):
    scaled = Counting(factor)
    shortened = shorten(text, target, scaled, keep)
    assert scaled(shortened) <= target
    assert shorten(shortened, target, scaled, keep) == shortened
    if scaled(text) <= target:
        assert shortened == text
        return
    head, tail = parts(shortened)
    assert (keep != "start" or not tail) and (keep != "end" or not head)
    without = re.sub(r"\n?[^\n]*\n\Z", "", head)
    assert text.startswith((head, head[:-1], without)) or text.startswith(without + "\n")
    assert text.endswith((tail, tail.partition("\n")[2]))
    if not fence_open(text):
        assert not fence_open(head) and not fence_open(tail)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='ab \n\r`~[{]}",1今\u0301\ud83d\udc00', max_size=1500), st.integers(0, 300), _keep)
def test_it_fits_whatever_the_text_is(text, target, keep):
    shortened = shorten(text, target, count, keep)
    assert count(shortened) <= max(target, 40) or shortened == text and count(text) < 40
    assert shorten(shortened, target, count, keep) == shortened


@settings(max_examples=60, deadline=None)
@given(_text, _text, st.integers(60, 800), st.sampled_from(["both", "start"]))
def test_the_head_does_not_depend_on_what_follows(text, more, target, keep):
    if count(text) > target:
        heads = [parts(shorten(whole, target, count, keep))[0] for whole in (text, text + more)]
        assert heads[0] == heads[1]


_HOSTILE = {
    "prose": _LINE,
    "one line": "word and ",
    "no blank": "x7",
    "empty lines": "\n",
    "blanks": " ",
    "short lines": "a\n",
    "fences": "```\n",
    "fences in a line": "``` ",
    "backticks": "`",
    "brackets": "[\n",
    "brackets in a line": "[",
    "log": "[2024-01-01 12:00] all is well\n",
    "JSON lines": '{"a": [1]}\n',
    "JSON that fails": "[1,\n",
    "JSON that fails late": "[1,\n" * 100 + "x\n",
    "open strings": '["aaa\n',
    "digits": "[1" + "0" * 5000,
}


@pytest.mark.parametrize("text", _HOSTILE.values(), ids=_HOSTILE)
def test_what_is_counted_grows_as_the_text_does(text):
    characters = []
    for size in (50_000, 100_000):
        counting = Counting()
        shorten(text * (size // len(text)), 5000, counting)
        characters.append(counting.characters / size)
    assert characters[1] < 4
    assert characters[1] < characters[0] * 1.2


@pytest.mark.parametrize("text", _HOSTILE.values(), ids=_HOSTILE)
def test_work_grows_as_the_text_does(text, monkeypatch):
    # Not by a clock: by how much of the text the parser of JSON is given, the one part that could look twice.
    from metagpt_localllm import shortening

    given = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, part, idx=0):
            given.append(len(part))
            return super().raw_decode(part, idx)

    monkeypatch.setattr(shortening, "_JSON", Decoder(parse_int=str, parse_float=str))
    totals = []
    for size in (50_000, 100_000):
        given.clear()
        shorten(text * (size // len(text)), 2000, Counting())
        totals.append(sum(given))
    assert totals[1] <= totals[0] * 2.5 + 10_000
