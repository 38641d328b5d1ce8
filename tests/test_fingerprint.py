"""The same question in two runs. The examples are from prompts of MetaGPT 0.8.2 and 1.0.0 that were run twice."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metagpt_localllm.fingerprint import fingerprint, part_of, still_holds


def body(*contents, **more):
    return {"model": "m", "temperature": 0.0, "messages": [{"role": "user", "content": text} for text in contents], **more}


# What was seen in two runs with the same answers: the text then, the text now, what was replaced in each.
SEEN = {
    "RoleZero": (
        "You are a Engineer, named Alex.  The current time is 2026-11-25 01:05:53.",
        "You are a Engineer, named Alex.  The current time is 2026-11-25 01:06:05.",
        ["2026-11-25 01:05:53"],
        ["2026-11-25 01:06:05"],
    ),
    "CollectLinks": (
        "Notice that the current time is 2026-11-25 01:05:53.\nThen, sort",
        "Notice that the current time is 2026-11-26 00:00:01.\nThen, sort",
        ["2026-11-25 01:05:53"],
        ["2026-11-26 00:00:01"],
    ),
    "Engineer2": (
        '25.1. Use cmd " mkdir -p {project_name}_1795568752 " or cp to {workspace}/{project_name}_1795568752/ && pwd',
        '25.1. Use cmd " mkdir -p {project_name}_1795568765 " or cp to {workspace}/{project_name}_1795568765/ && pwd',
        ["1795568752"] * 2,
        ["1795568765"] * 2,
    ),
    "a repr": (
        "ZeroDivisionError: division by zero\n<function f at 0x7fa3260e8400> <code object f at 0x7fa3589770f0, file",
        "ZeroDivisionError: division by zero\n<function f at 0x7f3d47804040> <code object f at 0x7f3d7e0af1c0, file",
        ["7fa3260e8400", "7fa3589770f0"],
        ["7f3d47804040", "7f3d7e0af1c0"],
    ),
    "a cell's file": (
        'file "/tmp/ipykernel_26572/3599682290.py", line 1>',
        'file "/tmp/ipykernel_26845/3599682290.py", line 1>',
        ["26572"],
        ["26845"],
    ),
    "tempfile": ("saved to\n/tmp/tmp7kdk464m/out.csv", "saved to\n/tmp/tmpzo1_2aj1/out.csv", ["7kdk464m"], ["zo1_2aj1"]),
    "unittest": (
        "----\nRan 1 test in 0.000s\n\nOK",
        "----\nRan 1 test in 0.001s\n\nOK",
        ["0.000s"],
        ["0.001s"],
    ),
    "pytest": (
        "=== 1 failed, 2 passed in 0.12s ===",
        "=== 1 failed, 2 passed in 0.31s ===",
        ["0.12s"],
        ["0.31s"],
    ),
    "a folder without a project name": (
        "(Current directory: /home/u/workspace/20261125010553)\ndocs/prd/20261125010554.json",
        "(Current directory: /home/u/workspace/20261125020553)\ndocs/prd/20261125020554.json",
        ["20261125010553", "20261125010554"],
        ["20261125020553", "20261125020554"],
    ),
    "workspace.use_uid": (
        "cd /w/20261125010553-1a2b3c4d/src",
        "cd /w/20261126010553-5e6f7a8b/src",
        ["20261125010553-1a2b3c4d"],
        ["20261126010553-5e6f7a8b"],
    ),
}


@pytest.mark.parametrize("then, now, old, new", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("extra", [{}, {"name": "x"}], ids=["plain", "odd"])
def test_what_every_run_makes_anew_changes_the_exact_digest_only(then, now, old, new, extra):
    def request(text):
        return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": text, **extra}]}

    first, second = fingerprint(request(then)), fingerprint(request(now))
    assert first.exact != second.exact and first.loose == second.loose
    assert (list(first.volatile), list(second.volatile)) == (old, new)
    assert still_holds("```python\nprint('hello')\n```", first.volatile, second.volatile)
    assert not still_holds(f"as I said: {first.volatile[-1]}", first.volatile, second.volatile)


@pytest.mark.parametrize(
    "one, other",
    [
        ("Analyse the sales of 2026-11-25 01:05:53", "Analyse the sales of 2026-11-25 01:06:05"),
        ("user 550e8400-e29b-41d4-a716-446655440000", "user 650e8400-e29b-41d4-a716-446655440000"),
        ("order 20261125010553", "order 20261125010554"),
        ("the colour 0xff8800", "the colour 0x00ff00"),
        ("answer in 5.00s", "answer in 6.00s"),
        ("write to /tmp/tmp_folders", "write to /tmp/tmp_results"),
        ("call snake_game_1795568752", "call snake_game_1795568753"),
        ("{'a', 'b'}", "{'b', 'a'}"),
        ("line 1", "line 2"),
    ],
)
def test_what_may_be_meant_is_not_volatile(one, other):
    first, second = fingerprint(body(one)), fingerprint(body(other))
    assert first.loose != second.loose and first.volatile == second.volatile == ()
    assert first.exact == first.loose


def test_how_the_answer_is_fetched_is_no_part_of_it_and_all_else_is():
    plain = fingerprint(body("hello"))
    assert plain == fingerprint(body("hello", max_tokens=5, stream=True, timeout=3, stream_options={"a": 1}))
    others = [
        body("hello", tools=[{"type": "function"}]), body("hello", temperature=0.1), body("hello", model="n"), body("hello", seed=1),
        body("hello", "hello"), body("hell", "o"), body("hello "), {}, body(), {**body("hello"), "messages": "hello"},
        {**body("hello"), "messages": [{"role": "system", "content": "hello"}]},
        {**body("hello"), "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
    ]  # fmt: skip
    assert len({fingerprint(other).loose for other in [*others, body("hello")]}) == len(others) + 1


def test_nothing_in_a_request_looks_like_another_structure_or_a_placeholder():
    time_ = "The current time is 2026-11-25 01:05:53."
    requests = [
        body("a\x1eb"), body("a", "b"), body("a\x1eb", "c"), body("a", "b\x1ec"), body("a\x1d", "b"), body("a", "\x1db"),
        body(time_), body("The current time is \x00time\x00."), body("The current time is ."), body("The current time is <time>."),
        body(time_, 'x"},{"role":"user","content":"y'), body(time_, "x", "y"),
        {"messages": 1}, {"messages": [{"role": "a\x1db", "content": "c"}]}, {"messages": [{"role": "a", "content": "b\x1dc"}]},
        {"messages": [{"role": "a\x1eb", "content": "c"}, {"role": "d", "content": "e"}]},
        {"messages": [{"role": "a", "content": "c"}, {"role": "b\x1ed", "content": "e"}]},
    ]  # fmt: skip
    assert len({fingerprint(request).loose for request in requests}) == len(requests)


class Odd:
    pass


class Broken:
    def __repr__(self):
        raise RuntimeError("no repr")


def test_odd_content_has_a_fingerprint():
    circle = {"role": "user"}
    circle["content"] = [circle, circle]
    deep = []
    for _ in range(100_000):
        deep = [deep]
    first, second = Odd(), Odd()
    same = [body("x", extra=first), body("x", extra=second)]
    assert fingerprint(same[0]) == fingerprint(same[1])
    odd = [
        body("\ud800"), body("\udfff"), body("\x00"), body(b"bytes"), body(b"other"), body(None), body({1, 2}), body({1, 3}),
        body(Broken()), {1: 2, "a": 3}, {None: 1, "a": 3}, body(10**5000), body(10**5000 + 1), body(float("nan")), body(circle),
        body(deep), {"messages": [circle]}, {"messages": ["text"]}, {"messages": [[1, 2]]}, {"messages": [{}]}, {(1, 2): 3},
    ]  # fmt: skip
    assert len({fingerprint(request).exact for request in odd}) == len(odd)


FRESH = """
from metagpt_localllm.fingerprint import fingerprint
class Thing: pass
body = {"model": "m", "messages": [{"role": "user", "content": "\\ud800 The current time is 2026-11-25 01:05:53."}]}
for more in ({}, {"x": {"c", "a", "b"}, "y": Thing(), 1: 2}):
    print(*fingerprint({**body, **more}).__dict__.values())
"""


def test_another_process_has_the_same_digests():
    said = {
        subprocess.run(
            [sys.executable, "-c", FRESH], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(said) == 1 and len(said.pop().splitlines()) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()})
    | st.dictionaries(st.text(), JSON, max_size=3),
    max_size=4,
)
BODIES = st.builds(lambda messages, rest: {**rest, "messages": messages}, MESSAGES, st.dictionaries(st.text(), JSON, max_size=3))
FREE = st.text(st.characters(codec="utf-8", categories=["L", "Zs", "P", "Cc"]), max_size=30)


def turned(value):
    """The same with the keys of all dictionaries the other way round."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(item) for item in value] if isinstance(value, list) else value


@given(BODIES)
def test_the_same_request_has_the_same_fingerprint(request):
    assert fingerprint(request) == fingerprint(turned(json.loads(json.dumps(request))))


@given(BODIES, BODIES)
def test_another_request_has_other_digests(one, other):
    relevant = [{k: v for k, v in r.items() if k not in ("max_tokens", "stream", "timeout")} for r in (one, other)]
    assume(json.dumps(relevant[0], sort_keys=True) != json.dumps(relevant[1], sort_keys=True))
    assert fingerprint(one).exact != fingerprint(other).exact and fingerprint(one).loose != fingerprint(other).loose


@given(FREE, FREE, FREE, FREE, st.sampled_from(sorted(SEEN)), st.booleans())
def test_around_a_volatile_value_every_change_shows(before, after, other_before, other_after, name, plain):
    then, now, _, _ = SEEN[name]
    more = {} if plain else {"tool_calls": None}

    def prints(before, text, after):
        return fingerprint({"messages": [{"role": "user", "content": f"{before} {text} {after}", **more}]})

    assert prints(before, then, after).loose == prints(before, now, after).loose
    changed = (before, after) != (other_before, other_after) and f"{before} {then} {after}" != f"{other_before} {then} {other_after}"
    assert (prints(before, then, after).loose != prints(other_before, now, other_after).loose) is changed


@given(st.text(), st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_true_only_where_nothing_old_is_in_the_answer(answer, pairs):
    then, now = [old for old, _ in pairs], [new for _, new in pairs]
    assert still_holds(answer, then, then)
    if still_holds(answer, then, now):
        assert all(old == new or old not in answer for old, new in pairs)
    for old, new in pairs:
        if old != new:
            assert not still_holds(f"{answer}{old}{answer}", then, now)


MORNING, LATER, NEXT_DAY = "2026-11-25 01:05:53", "2026-11-25 13:47:05", "2026-11-26 01:05:53"


@pytest.mark.parametrize(
    "answer, then, now",
    [
        ("", ["1"], ["2"]),
        ("nothing", ["12"], ["13"]),
        ("nothing", [""], ["x"]),
        ("process 26572", ["26572"], ["26845"]),
        ("…8400 is its address", ["7fa3260e8400"], ["7f3d47804040"]),
        ("0X7FA3260E8400", ["7fa3260e8400"], ["7f3d47804040"]),
        ("they are one object", ["7fa3260e8400"] * 2, ["7f3d47804040", "7f3d7e0af1c0"]),
        ("they are two objects", ["7fa3260e8400", "7fa3589770f0"], ["7f3d47804040"] * 2),
        ("x", [MORNING], []),
        ("mkdir snake_game_1795568752", ["1795568752"], ["1795568765"]),
        ("It is Wednesday.", [MORNING], [NEXT_DAY]),
        ("Date: November 25, 2026", [MORNING], [NEXT_DAY]),
        ("Stand: 25.11.26", [MORNING], [NEXT_DAY]),
        ("le 25 novembre", [MORNING], [NEXT_DAY]),
        ("11月25日", [MORNING], [NEXT_DAY]),
        ("２５ of the month", [MORNING], [NEXT_DAY]),
        ("Copyright 2026", [MORNING], [NEXT_DAY]),
        ("at five past: 1.05", [MORNING], [LATER]),
        ("13h47", [LATER], [MORNING]),
        ("1:47 pm", [LATER], [MORNING]),
        ("Good morning!", [MORNING], [LATER]),
        ("The latest of today", ["1795568752"], ["1795568765"]),
        ("It took no second.", ["0.000s"], ["0.001s"]),
        ("1 ms", ["0.001s"], ["0.000s"]),
        ("The tests are fast.", ["0.001s"], ["0.000s"]),
        ("in the folder 20261125", ["20261125010553"], ["20261126010553"]),
        ("host-b is down", ["host-b is 7"], ["host-c is 7"]),
        ("b is down", ["host-b"], ["host-c"]),
    ],
)  # fmt: skip
def test_in_doubt_it_does_not_hold(answer, then, now):
    assert not still_holds(answer, then, now)



CODE = '[{"command_name": "Editor.write", "args": {"path": "game.py", "content": "delay = 0.05\\nsize = [24, 12]\\n"}}]'


@pytest.mark.parametrize(
    "answer, then, now",
    [
        ("It is 2026-11-25 01:05:53.", [MORNING], [MORNING]),
        ("1", ["1"], ["1"]),
        (CODE, [MORNING], [LATER]),
        (CODE, [MORNING, *["1795568752"] * 5], [NEXT_DAY, *["1795568765"] * 5]),
        (CODE, ["7fa3260e8400", "26572", "7kdk464m"], ["7f3d47804040", "26845", "zo1_2aj1"]),
        ("## Status:\nPASS\n## Send To:\nNoOne", ["0.000s"], ["0.001s"]),
    ],
)
def test_what_does_not_depend_on_them_holds(answer, then, now):
    assert still_holds(answer, then, now)


def test_of_a_long_conversation_only_what_is_new_is_looked_at():
    request = body(*["a word of code at " * 10] * 3000)
    parts = [part_of(message) for message in request["messages"]]

    def cost(known):
        took = []
        for _ in range(5):
            start = time.perf_counter()
            found = fingerprint(request, known)
            took.append(time.perf_counter() - start)
        return min(took), found

    (whole, one), (step, other) = cost(None), cost(parts)
    assert one == other and step < whole / 4
