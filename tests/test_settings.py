"""The edge: what users write in config2.yaml."""

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from metagpt_localllm.deadlines import plan_deadlines
from metagpt_localllm.settings import LocalSettings, parse_duration, refuse_misplaced
from metagpt_localllm.state import state_at


def test_everything_is_optional():
    settings = LocalSettings()
    assert settings.timeouts.first_token == settings.timeouts.total == "auto"
    assert plan_deadlines(settings.timeouts, None, None).first_token == 600
    assert settings.retry.attempts == 4
    assert settings.context.window == "auto"


@pytest.mark.parametrize(
    "text, seconds", [(90, 90), ("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("250ms", 0.25)]
)
def test_durations_are_numbers_or_text(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("wrong", ["soon", "", "10 parsecs", True, None, [], "-5s", -1, float("inf"), float("nan")])
def test_what_is_no_duration_is_refused(wrong):
    with pytest.raises(ValueError):
        parse_duration(wrong)


@given(st.floats(min_value=0, max_value=1e9, allow_nan=False))
def test_a_number_of_seconds_stays_what_it_is(seconds):
    assert parse_duration(seconds) == seconds


@pytest.mark.parametrize(
    "settings, path, word",
    [
        ({"timeouts": {"first_tokn": 5}}, ("timeouts", "first_tokn"), "'first_token'"),
        ({"timeout": {}}, ("timeout",), "'timeouts'"),
        ({"first_token": 5}, ("first_token",), "local.timeouts.first_token"),
        ({"retry": {"attempts": 0}}, ("retry", "attempts"), "1"),
        ({"retry": {"attempts": "many"}}, ("retry", "attempts"), "whole number"),
        ({"timeouts": {"stall": -1}}, ("timeouts", "stall"), "negative"),
        ({"timeouts": {"first_token": "2h", "total": "1h"}}, ("timeouts", "first_token"), "over total"),
        ({"timeouts": {"first_token": "10m", "total": "5m"}}, ("timeouts", "first_token"), "over total"),
        ({"concurrency": 0}, ("concurrency",), "at least 1"),
        ({"server": "olama"}, ("server",), "'ollama'"),
        ({"timeouts": {"total": "1h"}, "tiers": [{"name": "a", "first_token": "2h"}]}, ("tiers", 0, "first_token"),
         "from timeouts"),
        ({"timeouts": {"stall": 10**400}}, ("timeouts", "stall"), "finite"),
        ({"tiers": [{"name": "a", "total": 5, "stall": 6}]}, ("tiers", 0, "stall"), "over total"),
        ({"tiers": [{"name": "a"}, {"name": "a"}]}, ("tiers", 1, "name"), "already"),
        ({"context": {"window": "huge"}}, ("context", "window"), "auto"),
        ({"progress": "lvie"}, ("progress", "mode"), "'live'"),
        ({"progress": {"evry": 3}}, ("progress", "evry"), "'every'"),
        ({"progress": {"every": 0}}, ("progress", "every"), "zero"),
        ({"every": 3}, ("every",), "local.progress.every"),
    ],
)
def test_a_mistake_is_refused_with_its_path_and_remedy(settings, path, word):
    with pytest.raises(ValidationError) as caught:
        LocalSettings.model_validate(settings)
    problem = caught.value.errors()[0]
    assert problem["loc"][: len(path)] == path
    assert word in problem["msg"]


@pytest.mark.parametrize(
    "written, mode, every",
    [("auto", "auto", 30), ("progress: live", "live", 30), ("progress: off", "off", 30), ("progress: on", "auto", 30),
     ("progress: {mode: off, every: 2m}", "off", 120), ("progress: {every: 5}", "auto", 5), ("progress:", "auto", 30)],
)  # fmt: skip
def test_progress_is_one_word_or_a_block_and_yaml_may_read_off_as_false(written, mode, every):
    settings = LocalSettings.model_validate(yaml.safe_load(written) if ":" in written else {})
    assert (settings.progress.mode, settings.progress.every) == (mode, every)
    assert LocalSettings.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize(
    "settings", [{"timeouts": {"total": "5m"}, "tiers": [{"name": "quick", "total": 60}]}, {"tiers": None}, {"retry": None}]
)
def test_what_is_inherited_gives_way_to_a_shorter_total_and_empty_blocks_are_none(settings):
    LocalSettings.model_validate(settings)


_duration = st.one_of(st.integers(1, 5000), st.integers(1, 50).map("{}m".format), st.floats(0.1, 9e3).map("{:.3f}s".format))
_deadlines = st.fixed_dictionaries({}, optional={name: _duration for name in ("connect", "first_token", "stall", "total")})
_shown = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=9)
_tiers = st.lists(st.tuples(_shown, _deadlines), max_size=4, unique_by=lambda tier: tier[0])


@given(_deadlines, _tiers)
def test_settings_are_either_refused_or_give_deadlines_in_order_and_load_again_when_dumped(timeouts, tiers):
    written = {"timeouts": timeouts, "tiers": [{"name": name, **deadlines} for name, deadlines in tiers]}
    try:
        settings = LocalSettings.model_validate(written)
    except ValidationError as error:
        assert all("over total" in problem["msg"] for problem in error.errors())
        return
    for tier in [None, *settings.tiers]:
        deadlines = plan_deadlines(settings.timeouts, tier, None)
        assert 0 < max(deadlines.connect, deadlines.first_token, deadlines.stall) <= deadlines.total
    assert LocalSettings.model_validate(settings.model_dump()) == settings


@given(st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.text(max_size=5), min_size=1, max_size=3))
def test_no_unknown_key_is_ever_accepted(block):
    if set(block) - set(LocalSettings.model_fields):
        with pytest.raises(ValidationError):
            LocalSettings.model_validate(block)


# ------------------------------------------------------------------------------------------- odd values

LONG = "9" * 100_000
ODD = [
    None, True, -1, 0, 1e400, float("nan"), 10**400, 10**5000, -(10**400), 1e308, "", " ", "auto", LONG, LONG + "x", "1" * 59 + "x",
    "x" * 1_000_000, LONG + "GB", "1e400", "9" * 50 + "d", "\x00", "\ud800", "\x1b[2J", "~nobody-of-that-name/x", "a\nb", ":", ".x:y", [],
    [[]], {}, {"a": {}}, {None: 1}, {1: 2}, {"": ""}, {"x" * 1_000_000: 1}, {10**5000: 1}, {(1, 2): 3}, b"bytes", b"\xff" * 100_000,
    ["[z-a]"], ["x" * 100_000], object, "٣m",
]  # fmt: skip
PATHS = [
    *(f"timeouts.{name}" for name in ("connect", "first_token", "stall", "total")), "tiers", "tiers.0", "tiers.0.name",
    "tiers.0.match", "tiers.0.match.action", "tiers.0.match.min_prompt_tokens", "tiers.0.match.tools", "tiers.0.total", "retry",
    "retry.attempts", "retry.backoff.initial", "retry.wait_for_server", "context.window", "context.reserve", "context.policy",
    "context.low_water", "context.oversized", "context.tokenizer", "journal.enabled", "journal.path", "journal.resume", "journal.keep.age",
    "journal.keep.size", "progress", "progress.mode", "progress.every", "telemetry.enabled", "telemetry.endpoint", "server", "concurrency",
]  # fmt: skip


def at(path, value):
    """The settings that have ``value`` at ``path``."""
    for step in reversed(path.split(".")):
        value = [value] if step == "0" else {step: value}
    if path.startswith("tiers.0.") and not path.endswith("name"):
        value["tiers"][0]["name"] = "a"
    return value


@pytest.mark.parametrize("path", ["", *PATHS])
def test_a_value_of_any_kind_is_taken_or_refused_in_a_few_short_lines(path):
    for odd in ODD:
        written = at(path, odd) if path else odd
        try:
            settings = LocalSettings.model_validate(written)
        except ValidationError as error:
            complaint = str(error)
            assert len(complaint) < 3000 and all(len(line) < 700 for line in complaint.splitlines())
        else:
            # What was taken can be used: no number of it overflows, and no path is none.
            plan_deadlines(settings.timeouts, next(iter(settings.tiers), None), None)
            state_at(settings.journal.path)
            assert settings.journal.keep.size < 2**63 and settings.journal.keep.age < 1e11
            if settings.context.window != "auto":
                assert settings.context.window * settings.context.low_water < 1e10


def test_a_misspelt_key_is_not_shown_with_its_value():
    with pytest.raises(ValidationError) as caught:
        refuse_misplaced({"api_kye": "sk-secret", 7: 8, None: 9, "x" * 10**6: 1}, ["api_key", "model"])
    assert "api_key" in str(caught.value) and "secret" not in str(caught.value)


@given(st.recursive(
    st.sampled_from(range(30)).map(lambda number: ODD[number]) | st.text(max_size=5),
    lambda inner: st.dictionaries(st.sampled_from(sorted({p for path in PATHS for p in path.split(".")})), inner, max_size=4)
    | st.lists(inner, max_size=2), max_leaves=12))  # fmt: skip
def test_settings_of_any_shape_are_taken_or_refused(written):
    with contextlib.suppress(ValidationError):
        LocalSettings.model_validate(written)
