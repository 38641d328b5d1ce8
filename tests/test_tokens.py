"""The estimate is on the safe side of real tokenizers; two come with packages that MetaGPT depends on."""

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_localllm.tokens import IMAGE_TOKENS, MESSAGE_TOKENS, estimate_message, estimate_prompt, estimate_text

SAMPLES = {
    "prose": "The quick brown fox jumps over the lazy dog, and nobody, not even the rain, has such small hands. " * 20,
    "code": Path(__file__).read_text(),
    "markdown": (Path(__file__).parent.parent / "docs" / "resume.md").read_text(),
    "Chinese": "大型语言模型在个人电脑上运行缓慢，因此需要明确的超时与重试。" * 20,
    "Japanese": "大規模言語モデルはデスクトップでは遅いので、待ち時間が必要です。" * 20,
    "Russian": "Большая языковая модель на домашнем компьютере работает медленно. " * 20,
    "JSON": '[{"id": 17, "name": "item_17", "value": 23.29, "tags": ["a", "b"]}]\n' * 40,
    "log": "2026-11-24 21:40:20.434 | INFO     | metagpt.const:get:21 - Package root set to /srv/project_7\n" * 40,
    "table": "\n".join(f"| {i} | {i * i} |" for i in range(200)),
    "emoji": "😀🎉🚀 " * 100,
}


def qwen():
    """Qwen's 150k vocabulary, as dashscope ships it."""
    dashscope, tiktoken = pytest.importorskip("dashscope"), pytest.importorskip("tiktoken")
    lines = (Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    encoding = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: len(encoding.encode(text))


def claude():
    """A 65k vocabulary, in the release of anthropic that MetaGPT 0.8.2 pins."""
    anthropic, tokenizers = pytest.importorskip("anthropic"), pytest.importorskip("tokenizers")
    file = Path(anthropic.__file__).parent / "tokenizer.json"
    if not file.exists():
        pytest.skip("this release of anthropic ships no tokenizer")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("tokenizer", [qwen, claude])
def test_it_is_never_below_the_truth_and_not_absurdly_above(tokenizer):
    count = tokenizer()
    for name, text in SAMPLES.items():
        ratio = estimate_text(text) / count(text)
        assert 1.0 <= ratio <= (2.2 if name in ("prose", "code", "markdown", "JSON", "log", "table") else 4.5), (name, ratio)


@given(st.text(max_size=300), st.text(max_size=300))
def test_more_text_is_never_fewer_tokens(one, other):
    assert 0 <= estimate_text(one) <= estimate_text(one + other) + 1
    assert estimate_text(one) <= 4 * max(len(one), 1)


def test_a_message_counts_its_frame_its_images_and_its_tool_calls():
    bare = estimate_message({"role": "user", "content": ""})
    assert bare == MESSAGE_TOKENS
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}]
    assert estimate_message({"role": "user", "content": parts}) > IMAGE_TOKENS
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert estimate_message(call) > bare


def test_tools_count_as_a_part_of_the_prompt():
    messages = [{"role": "user", "content": "hello"}]
    assert estimate_prompt(messages, [{"type": "function", "function": {"name": "execute"}}]) > estimate_prompt(messages)


def test_a_text_of_many_megabytes_is_counted_by_samples():
    part = "Some words, and some(code): 12 = x\n汉字 "
    text = part * (6_000_000 // len(part))
    assert abs(estimate_text(text) / len(text) * len(part) / estimate_text(part) - 1) < 0.05
