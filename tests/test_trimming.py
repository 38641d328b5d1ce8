"""What is left out when a prompt is too long."""

from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_localllm.tokens import estimate_message
from metagpt_localllm.trimming import fit

_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=600)}
)


def message(role, words):
    return {"role": role, "content": "word " * words}


def test_the_oldest_go_first_and_the_frame_stays():
    chat = [message("system", 10), message("user", 200), message("assistant", 200), message("user", 50)]
    fitted = fit(chat, 700, estimate_message)
    assert fitted.fits and fitted.dropped == 1
    assert fitted.messages == [chat[0], chat[2], chat[3]]


def test_a_tool_call_goes_with_its_answer():
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    chat = [call, message("tool", 300), message("user", 50)]
    fitted = fit(chat, 150, estimate_message)
    assert fitted.messages == [chat[2]]


def test_one_message_too_large_loses_its_middle_with_a_marker():
    text = "begin " + "x y z " * 2000 + " end"
    fitted = fit([{"role": "user", "content": text}], 500, estimate_message)
    content = fitted.messages[0]["content"]
    assert fitted.fits and fitted.shortened == 1
    assert content.startswith("begin") and content.endswith("end") and "tokens left out here" in content


@settings(max_examples=150, deadline=None)
@given(st.lists(_message, max_size=8), st.integers(min_value=20, max_value=800))
def test_fitting_never_grows_and_twice_is_once(chat, budget):
    fitted = fit(chat, budget, estimate_message)
    assert fitted.tokens <= sum(map(estimate_message, chat))
    assert fitted.tokens == sum(map(estimate_message, fitted.messages))
    if fitted.fits:
        again = fit(fitted.messages, budget, estimate_message)
        assert again.messages == fitted.messages
    if chat:
        assert fitted.messages and fitted.messages[-1]["role"] == chat[-1]["role"]
