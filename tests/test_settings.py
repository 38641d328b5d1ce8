"""The edge: what users write in config2.yaml."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from metagpt_localllm.settings import LocalSettings, parse_duration


def test_everything_is_optional():
    settings = LocalSettings()
    assert settings.timeouts.first_token == 600
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
        ({"tiers": [{"name": "a", "total": 5, "stall": 6}]}, ("tiers", 0, "stall"), "over total"),
        ({"tiers": [{"name": "a"}, {"name": "a"}]}, ("tiers", 1, "name"), "already"),
        ({"context": {"window": "huge"}}, ("context", "window"), "auto"),
    ],
)
def test_a_mistake_is_refused_with_its_path_and_remedy(settings, path, word):
    with pytest.raises(ValidationError) as caught:
        LocalSettings.model_validate(settings)
    problem = caught.value.errors()[0]
    assert problem["loc"][: len(path)] == path
    assert word in problem["msg"]


def test_a_dumped_configuration_loads_again():
    settings = LocalSettings.model_validate({"timeouts": {"total": "5m"}, "tiers": [{"name": "quick", "total": 60}]})
    assert LocalSettings.model_validate(settings.model_dump()) == settings
