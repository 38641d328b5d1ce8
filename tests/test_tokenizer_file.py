"""Exact counts come from a local tokenizer.json; whatever else is named is refused with what to do."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_tokens import SAMPLES, claude

from metagpt_localllm.tokenizer_file import load_tokenizer


@pytest.fixture
def tiny(tmp_path):
    """A tokenizer of one token per word, in a folder of its own, that adds a special token and cuts at 4."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "hello": 2, "world": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    file = tmp_path / "model" / "tokenizer.json"
    file.parent.mkdir()
    tokenizer.save(str(file))
    return file


def test_it_counts_as_the_tokenizer_does():
    exact = claude()
    anthropic = pytest.importorskip("anthropic")
    count = load_tokenizer(str(Path(anthropic.__file__).parent))
    assert all(count(text) == exact(text) for text in SAMPLES.values())


def test_neither_special_tokens_nor_what_an_embedding_model_cuts_or_pads(tiny):
    count = load_tokenizer(str(tiny))
    assert count("") == 0
    assert count("hello world") == 2
    assert count("hello world " * 1000) == 2000
    assert count("hello \ud800") == 2


def test_the_folder_or_the_file_also_below_the_home(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny.parent.parent))
    assert load_tokenizer("~/model") is load_tokenizer("~/model/tokenizer.json") is load_tokenizer(str(tiny))


def test_it_is_loaded_again_only_when_the_file_has_changed(tiny):
    before = load_tokenizer(str(tiny))
    assert load_tokenizer(str(tiny)) is before
    content = json.loads(tiny.read_text())
    content["pre_tokenizer"] = None
    tiny.write_text(json.dumps(content))
    os.utime(tiny, (1, 1))
    assert load_tokenizer(str(tiny))("hello world") == 1
    assert before("hello world") == 2


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "GGUF"),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "SentencePiece"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        ("model.zip", b"PK\x03\x04", "archive"),
        ("tokenizer.json", b"", "not JSON"),
        ("tokenizer.json", b'{"version": "1.0", "mod', "not a tokenizer"),
        ("tokenizer_config.json", b'{"model_max_length": 4096}', "not a tokenizer"),
    ],
)
def test_what_is_something_else_is_refused_with_its_name_and_what_to_name_instead(tmp_path, name, content, says):
    pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "name the tokenizer.json that comes with" in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere/tokenizer.json", ".", "~nobody-of-this-name/x", "a\0b", "x" * 5000])
def test_no_such_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name the tokenizer.json"):
        load_tokenizer(path)


def test_without_the_library_it_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers 'click<8.2'"):
        load_tokenizer(str(tiny))
    monkeypatch.undo()
    importlib.import_module("tokenizers")
    assert load_tokenizer(str(tiny))("hello") == 1


def test_long_texts_are_counted_fast():
    anthropic = pytest.importorskip("anthropic")
    claude()  # skips where it is not shipped
    count = load_tokenizer(str(Path(anthropic.__file__).parent))
    text = SAMPLES["markdown"] * 30
    started = time.perf_counter()
    assert count(text) > 50_000
    assert time.perf_counter() - started < 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_nothing_is_printed_and_nothing_asked_of_the_network(tiny, tmp_path):
    shutil.copy(tiny, tmp_path)
    script = """
import os, socket, sys
def refuse(*_): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from metagpt_localllm.tokenizer_file import load_tokenizer
count = load_tokenizer(sys.argv[1])
assert count("hello world " * 5000) == 10000
child = os.fork()
if not child:
    os._exit(count("hello") != 1)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENIZERS_", "HF_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
