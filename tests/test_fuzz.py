"""The corpus of fuzz/ and every input that ever failed there, through the same targets; and a few made up on the spot."""

import importlib
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fuzz  # noqa: E402

#: Inputs that are replayed of targets that take long for one; the failed ones are all among them.
MOST = {"state": 40, "sockets": 12}


def target_of(name):
    return importlib.import_module(f"fuzz.{name}")


def inputs(name):
    found = sorted((ROOT / "fuzz" / "failed" / name).glob("*"))
    corpus = sorted((ROOT / "fuzz" / "corpus" / name).glob("*"))
    every = max(len(corpus) // MOST.get(name, len(corpus) or 1), 1)
    return found + corpus[::every]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_the_corpus_holds_breaks_nothing(name):
    files = inputs(name)
    assert len(files) >= 10
    for file in files:
        try:
            target_of(name).check(file.read_bytes())
        except BaseException as error:
            raise AssertionError(f"{file} fails: {error!r}") from error


@pytest.mark.parametrize("name, times", [("stream", 60), ("answers", 60), ("settings", 40), ("state", 8)])
def test_bytes_between_two_known_inputs_break_nothing(name, times):
    target = target_of(name)
    seeds = target.seeds()

    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds), st.sampled_from(seeds), st.integers(0, 400), st.integers(0, 400), st.binary(max_size=8))
    def check(first, second, cut, start, between):
        target.check(first[:cut] + between + second[start:])

    check()


def test_the_corpus_is_small():
    files = [file for folder in ("corpus", "failed") for file in (ROOT / "fuzz" / folder).rglob("*") if file.is_file()]
    assert len(files) < 500 and sum(file.stat().st_size for file in files) < 500_000
