"""What is left out when a prompt is too long."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_localllm.messages import text_of, with_text
from metagpt_localllm.policies import NAMES, Drop, Replace, named, of_compress_type
from metagpt_localllm.tokens import estimate_message
from metagpt_localllm.trimming import trim

COMPRESS_TYPES = ("post_cut_by_msg", "post_cut_by_token", "pre_cut_by_msg", "pre_cut_by_token")


def message(role, words, **more):
    return {"role": role, "content": "word " * words, **more}


def shorten(position, given, target, keep):
    """A word-wise stand-in: the boundaries are test_shortening's."""
    words = text_of(given).split()
    size = max(int((target - 20) // 2), 0)
    if len(words) < 30 or size >= len(words):
        return None
    half = size // 2
    parts = {"both": words[:half] + ["[…]"] + words[len(words) - half :], "start": [*words[:size], "[…]"]}
    return with_text(given, " ".join(parts.get(keep, ["[…]", *words[len(words) - size :]])))


def cut(chat, budget, policy="oldest", low_water=0.6, cut_fixed=True):
    rule = named(policy) if isinstance(policy, str) else policy
    trimmed = trim(
        list(enumerate(chat)), budget, low_water=low_water, policy=rule, cut_fixed=cut_fixed,
        count=lambda _, one: estimate_message(one), shorten=shorten,
    )  # fmt: skip
    return trimmed, apply(chat, trimmed)


def apply(chat, trimmed):
    return [now for now in (trimmed.changes.get(i, one) for i, one in enumerate(chat)) if now is not None]


def history(turns, words=40):
    chat = [message("system", 10), message("user", 20)]
    for n in range(turns):
        chat += [{"role": "assistant", "content": f"answer {n} " + "word " * words},
                 {"role": "user", "content": f"result {n} " + "word " * words}]  # fmt: skip
    return chat


def test_the_oldest_turns_go_down_to_the_low_water_mark():
    chat = history(10)
    whole = sum(map(estimate_message, chat))
    trimmed, rest = cut(chat, whole - 1)
    assert 0.5 * whole < trimmed.tokens <= 0.62 * whole
    assert rest[:2] == chat[:2] and rest[2:] == chat[-len(rest) + 2 :]
    assert [one["role"] for one in rest[1:]] == ["user", "assistant"] * ((len(rest) - 1) // 2) + ["user"]
    assert trimmed.dropped == len(chat) - len(rest) and not trimmed.shortened and not trimmed.replaced


def test_what_fits_stays_as_it_is():
    chat = history(3)
    trimmed, rest = cut(chat, sum(map(estimate_message, chat)))
    assert rest == chat and not trimmed.changes


def test_a_tool_call_goes_and_stays_with_its_answers():
    def call(n):
        return {"role": "assistant", "content": "", "tool_calls": [{"id": str(n), "function": {"name": "f"}}]}

    chat = [message("user", 10)]
    for n in range(6):
        chat += [call(n), message("tool", 60, tool_call_id=str(n)), message("tool", 60, tool_call_id=str(n))]
    trimmed, rest = cut(chat, 900)
    assert trimmed.dropped and trimmed.dropped % 3 == 0
    assert [one["role"] for one in rest[1:]] == ["assistant", "tool", "tool"] * ((len(rest) - 1) // 3)
    assert rest[-3:] == chat[-3:], "the latest answer keeps its call"


def test_middle_keeps_how_it_began():
    chat = history(12)
    trimmed, rest = cut(chat, 1500, "middle")
    assert rest[2:4] == chat[2:4] and rest[-1] == chat[-1]
    assert trimmed.tokens <= 1500


def test_observations_become_one_line_before_anything_is_left_out():
    chat = history(8, words=120)
    whole = sum(map(estimate_message, chat))
    trimmed, rest = cut(chat, whole - 1, "observations", low_water=0.7)
    assert trimmed.replaced and not trimmed.dropped
    assert len(rest) == len(chat)
    stub = rest[3]["content"]
    assert stub.startswith("[output of about") and "result 0" in stub and "\n" not in stub
    assert rest[2] == chat[2], "what the model said stays"
    assert rest[-1] == chat[-1]
    further, last = cut(rest, 400, "observations")
    assert further.dropped and last[-1] == chat[-1], "when that is not enough, turns go"


def test_a_huge_log_is_shortened_before_the_others_are_lost_for_it():
    chat = [*history(3), message("assistant", 10), message("user", 2000), message("assistant", 20), message("user", 10)]
    trimmed, rest = cut(chat, 1200)
    assert trimmed.shortened == 1 and trimmed.tokens <= 1200
    assert len(rest) == len(chat) - trimmed.dropped and any("[…]" in one["content"] for one in rest)
    assert rest[-2:] == chat[-2:]


@pytest.mark.parametrize("role", ["user", "system"])
def test_what_always_stays_loses_its_middle_only_when_it_is_too_large_alone(role):
    chat = [message("system", 20), message("user", 40), message("assistant", 50), message("user", 30)]
    chat[role == "user"] = message(role, 1500)
    trimmed, rest = cut(chat, 600)
    assert trimmed.tokens <= 600 and trimmed.shortened == 1
    assert [one["role"] for one in rest if one["role"] != "assistant"] == ["system", "user", "user"]


def test_nothing_that_stays_is_cut_where_that_is_refused():
    chat = [message("system", 20), message("user", 1500)]
    trimmed, rest = cut(chat, 600, cut_fixed=False)
    assert rest == chat and trimmed.tokens > 600


def test_the_compress_types_of_metagpt_keep_their_meaning():
    chat = history(10)
    whole = sum(map(estimate_message, chat))
    rests = {kind: cut(chat, whole // 2, of_compress_type(kind), low_water=1.0)[1] for kind in COMPRESS_TYPES}
    assert rests["post_cut_by_msg"][-4:] == chat[-4:]
    assert rests["pre_cut_by_msg"][:6] == chat[:6] and rests["pre_cut_by_msg"][-1] == chat[-1]
    late = next(one for one in rests["post_cut_by_token"] if "[…]" in one["content"])
    early = next(one for one in rests["pre_cut_by_token"] if "[…]" in one["content"])
    assert late["content"].startswith("[…]") and early["content"].endswith("[…]")
    assert of_compress_type("") is NAMES["oldest"]


def test_a_policy_of_the_users_own_cannot_touch_what_stays_and_may_fail():
    def greedy(turns, room):
        yield Replace(0, {"role": "system", "content": "gone"})
        yield Drop(type(turns[0])([0, 1, len(chat) - 1], [], 0))
        yield Drop(turns[2])
        raise RuntimeError("bug")

    chat = history(10)
    trimmed, rest = cut(chat, 1000, greedy)
    assert rest[:2] == chat[:2] and rest[-1] == chat[-1]
    assert chat[6] not in rest and trimmed.tokens <= 1000, "after its failure the oldest go"


@pytest.mark.parametrize("name, words", [("oldst", "known are: oldest"), ("nowhere:f", "cannot be imported"), ("json:nothing", "no function")])
def test_a_policy_that_there_is_not_is_named(name, words):
    with pytest.raises(ValueError, match=words):
        named(name)


_roles = st.sampled_from(["system", "user", "assistant", "tool"])
_chat = st.lists(st.builds(message, _roles, st.integers(0, 300)), max_size=12)
_policies = st.sampled_from([*NAMES.values(), *map(of_compress_type, COMPRESS_TYPES)])


@settings(max_examples=200, deadline=None)
@given(_chat, st.integers(min_value=50, max_value=2000), _policies, st.floats(0.1, 1.0))
def test_whatever_the_policy(chat, budget, policy, low_water):
    trimmed, rest = cut(chat, budget, policy, low_water)
    sizes = list(map(estimate_message, rest))
    assert abs(trimmed.tokens - sum(sizes)) < 1e-6 and trimmed.tokens <= sum(map(estimate_message, chat))
    again, same = cut(rest, budget, policy, low_water)
    if trimmed.tokens <= budget:
        assert same == rest and not again.changes, "twice is once"
    kept = [i for i in range(len(chat)) if trimmed.changes.get(i, 1) is not None]
    assert [chat[i]["role"] for i in kept] == [one["role"] for one in rest], "the order stays"
    systems = [i for i, one in enumerate(chat) if one["role"] == "system"]
    assert set(systems) <= set(kept)
    bodies = [i for i in range(len(chat)) if i not in systems]
    if bodies:
        assert bodies[-1] in kept
        assert chat[bodies[0]]["role"] == "assistant" or bodies[0] in kept
    if all(estimate_message(one) <= budget // 8 for one in chat) and len(chat) <= 8:
        assert trimmed.tokens <= budget


@settings(max_examples=50, deadline=None)
@given(_policies, st.integers(0, 10**6))
def test_it_takes_no_more_steps_than_there_are_messages(policy, seed):
    counted = [0]

    def count(_, one):
        counted[0] += 1
        return estimate_message(one)

    def steps(turns):
        counted[0] = 0
        chat = history(turns, words=20 + seed % 20)
        trim(list(enumerate(chat)), 2000, low_water=0.6, policy=policy, cut_fixed=True, count=count, shorten=shorten)
        return counted[0]

    assert steps(200) <= 3 * steps(100)


@pytest.mark.parametrize("policy", [*NAMES, *COMPRESS_TYPES])
@pytest.mark.parametrize("low_water", [0.3, 0.6, 1.0])
def test_roles_go_on_alternating(policy, low_water):
    rule = NAMES[policy] if policy in NAMES else of_compress_type(policy)
    for turns in range(1, 9):
        chat = history(turns, words=45)
        whole = sum(map(estimate_message, chat))
        for budget in range(whole // 4, whole, whole // 9):
            _, rest = cut(chat, budget, rule, low_water)
            roles = [one["role"] for one in rest[1:]]
            assert all(one != other for one, other in zip(roles, roles[1:])), (roles, turns, budget)


def test_a_policy_that_yields_nonsense_or_never_ends_is_left():
    def nonsense(turns, room):
        yield 17

    def endless(turns, room):
        while True:
            yield Replace(3, message("user", 0))

    chat = history(10)
    for policy in (nonsense, endless, lambda turns, room: None):
        trimmed, rest = cut(chat, 1000, policy)
        assert trimmed.tokens <= 1000 and rest[-1] == chat[-1]
