"""Conversations are found again, counted once, and stay cut as they were."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_localllm.calibration import Calibration
from metagpt_localllm.conversation import Conversations, size_of
from metagpt_localllm.tokens import estimate_prompt


def message(role, text):
    return {"role": role, "content": text}


CHAT = [message("system", "be brief"), message("user", "the task"), *[message("assistant", f"answer {n}") for n in range(8)]]


def conversations():
    return Conversations(Calibration())


def opened(known, messages, tools=None):
    chat = known.open(messages, tools)
    known.keep(chat)
    return chat


def test_a_new_one_counts_as_it_is_estimated():
    chat = opened(conversations(), CHAT)
    assert chat.sent == CHAT and not chat.changed
    assert chat.tokens == estimate_prompt(CHAT)
    assert chat.least <= chat.tokens <= chat.most


def test_a_cut_is_kept_to_as_it_grows():
    known = conversations()
    first = opened(known, CHAT)
    stub = message("assistant", "short")
    first.cut({2: None, 3: None, 4: stub}, window=4096)
    grown = [*CHAT, message("user", "more")]
    second = opened(known, [dict(one) for one in grown])
    assert second.sent[: len(first.sent)] == first.sent == [*CHAT[:2], stub, *CHAT[5:]]
    assert second.sent[-1] == grown[-1] and second.changed == 3 and second.window == 4096
    third = opened(known, [*grown, message("assistant", "yet more")])
    assert third.sent[: len(second.sent)] == second.sent


def test_another_conversation_is_not_cut_by_it():
    known = conversations()
    opened(known, CHAT).cut({2: None}, window=4096)
    other = [*CHAT[:2], message("assistant", "quite another answer"), *CHAT[3:]]
    assert opened(known, other).sent == other
    assert opened(known, CHAT[:3]).sent == CHAT[:3], "what was left out is the latest message here"


def test_one_that_changed_later_keeps_the_cut_before_the_change():
    known = conversations()
    opened(known, CHAT).cut({2: None, 8: None}, window=4096)
    other = [*CHAT[:6], message("user", "a turn to elsewhere"), *CHAT[7:]]
    assert opened(known, other).sent == [*other[:2], *other[3:]]


def test_a_message_that_was_changed_in_place_is_another():
    known = conversations()
    chat = [dict(one) for one in CHAT]
    opened(known, chat).cut({2: None}, window=4096)
    chat[1]["content"] = "another task"
    assert opened(known, chat).sent == chat


def test_more_room_undoes_the_cut():
    chat = opened(conversations(), CHAT)
    before = chat.tokens
    chat.cut({2: None, 4: message("assistant", "s")}, window=4096)
    assert chat.tokens < before
    chat.uncut()
    assert chat.sent == CHAT and chat.tokens == before and chat.window is None


def test_what_the_server_counted_is_exact_and_what_is_new_is_estimated():
    known = conversations()
    first = opened(known, CHAT)
    first.counted(321)
    assert first.known and first.tokens == 321 and first.most == first.least == 321
    second = opened(known, [*CHAT, message("user", "a word " * 50)])
    assert not second.known and 321 < second.least < second.tokens < second.most
    second.counted(400)
    assert abs(sum(second.counts()) + second.frame - 400) < 1


def test_it_learns_how_the_server_counts():
    known, text = conversations(), "The cat is on the mat, and the dog is not. " * 20
    guessed = opened(known, [message("user", text)]).tokens
    for n in range(6):
        messages = [message("user", f"{n} {text}")]
        opened(known, messages).counted(round(estimate_prompt(messages) * 0.6))
    learned = opened(known, [message("user", text)])
    assert 0.6 * guessed <= learned.tokens < 0.9 * guessed


def test_a_share_of_a_count_goes_with_its_message():
    known = conversations()
    chat = opened(known, CHAT)
    chat.counted(500)
    chat.cut({2: None, 3: None}, window=4096)
    assert not chat.known and 350 < chat.tokens < 450
    assert chat.tokens <= chat.most < 500 * 1.25


def test_doubt_makes_all_larger():
    chat = opened(conversations(), CHAT)
    before = chat.tokens
    chat.doubt(1.5)
    assert chat.tokens > 1.3 * before


def test_other_tools_are_another_prompt():
    known = conversations()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    opened(known, CHAT, tools).counted(999)
    assert opened(known, CHAT).tokens == estimate_prompt(CHAT)
    assert opened(known, CHAT, tools).tokens == 999


def test_nothing_is_fewer_than_it_has_at_the_least():
    image = {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "x"}}]}
    size = size_of(image)
    assert size.most == float("inf") and size.rest > 1000
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    assert size_of(call).rest > size_of(message("assistant", "")).rest


_texts = st.lists(st.text(max_size=40), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(_texts, st.sets(st.integers(0, 11)), st.integers(0, 12), st.integers(1, 10_000))
def test_the_same_history_is_the_same_prompt(texts, gone, common, counted):
    known, chat = conversations(), [message("user", text) for text in texts]
    first = opened(known, chat)
    first.cut({n: None for n in gone if n < len(chat) - 1}, window=100)
    first.counted(counted)
    assert known.open(chat, None).sent == first.sent
    assert known.open(chat, None).tokens == first.tokens
    other = [*chat[:common], message("user", "unheard of")]
    assert known.open(other, None).sent[-1] == other[-1]


def test_a_long_one_that_grows_costs_what_is_new():
    def cost(length):
        known = conversations()
        chat = [message("user", f"message {n} " + "word " * 40) for n in range(length)]
        began = time.process_time()
        opened(known, chat)
        whole = time.process_time() - began
        grown = [dict(one) for one in chat] + [message("user", "one more")]
        began = time.process_time()
        opened(known, grown)
        return whole, time.process_time() - began

    whole, step = min(cost(4000) for _ in range(3))
    assert step < whole / 4


def test_what_was_cut_for_a_long_one_is_whole_in_a_short_one_that_began_alike():
    known = conversations()
    opened(known, CHAT).cut({2: None, 3: None}, window=4096)
    fork = known.open([*CHAT[:5], message("user", "from here on otherwise")], None)
    assert fork.changed and fork.whole > fork.tokens
    fork.uncut()
    assert abs(fork.whole - fork.tokens) < 1 and len(fork.sent) == 6


def test_the_latest_message_is_whole_with_its_tool_call_after_a_step_back():
    known = conversations()
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "forty-two"}
    chat = [*CHAT[:3], call, answer, *CHAT[3:]]
    opened(known, chat).cut({3: None, 4: None, 2: None}, window=4096)
    assert known.open(chat[:5], None).sent == [*CHAT[:2], call, answer]


def test_only_the_last_of_many_that_end_differently_is_kept():
    known = conversations()
    for n in range(30):
        opened(known, [*CHAT, message("user", f"your state is {n}")])
    assert len(known._kept) == 1


def test_tools_that_count_less_than_was_thought_leave_room():
    known = conversations()
    tools = [{"type": "function", "function": {"name": "f", "description": "{}[]() " * 300}}]
    chat = opened(known, CHAT, tools)
    assert chat.tokens > 1000
    chat.counted(300)
    assert chat.tokens == 300 and chat.frame < 300
