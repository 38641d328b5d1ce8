"""Which tier a call belongs to, and the deadlines that follow."""

import pytest

from metagpt_localllm.deadlines import plan_deadlines
from metagpt_localllm.settings import LocalSettings, Tier, Timeouts
from metagpt_localllm.tiers import Caller, choose_tier

CALLER = Caller(action="WriteCode", role="Engineer", profile="Chief Engineer")


def chosen(match, caller=CALLER, model="codebooga-34b", prompt_tokens=1000, has_tools=False):
    tier = Tier.model_validate({"name": "it", "match": match})
    return choose_tier([tier], caller, model=model, prompt_tokens=prompt_tokens, has_tools=has_tools) is not None


@pytest.mark.parametrize(
    "match, applies",
    [
        ({}, True),
        ({"action": "WriteCode"}, True),
        ({"action": ["Review", "Write*"]}, True),
        ({"action": "writecode"}, True),
        ({"action": "Write"}, False),
        ({"role": "Engineer"}, True),
        ({"role": "Chief*"}, True),
        ({"role": "Architect"}, False),
        ({"model": "*34b*"}, True),
        ({"model": "*70b*"}, False),
        ({"min_prompt_tokens": 1000}, True),
        ({"min_prompt_tokens": 1001}, False),
        ({"max_prompt_tokens": 1000}, True),
        ({"max_prompt_tokens": 999}, False),
        ({"tools": True}, False),
        ({"tools": False}, True),
        ({"action": "WriteCode", "role": "Engineer*", "model": "*34b", "max_prompt_tokens": 2000}, True),
        ({"action": "WriteCode", "role": "Architect"}, False),
    ],
)
def test_all_conditions_must_hold(match, applies):
    assert chosen(match) is applies


def test_a_call_from_outside_of_any_action_matches_no_name():
    assert not chosen({"action": "*"}, Caller()) and chosen({"max_prompt_tokens": 5000}, Caller())


def test_the_first_that_matches_wins():
    settings = LocalSettings.model_validate({"tiers": [{"name": "a", "match": {"action": "X"}}, {"name": "b"}, {"name": "c"}]})
    tier = choose_tier(settings.tiers, CALLER, model="m", prompt_tokens=1, has_tools=False)
    assert tier is not None and tier.name == "b"


def test_a_tier_overrides_only_what_it_names_and_each_deadline_knows_its_setting():
    tier = Tier.model_validate({"name": "coding", "total": "4h"})
    deadlines = plan_deadlines(Timeouts(), tier, None)
    assert (deadlines.first_token, deadlines.total, deadlines.tier) == (600, 4 * 3600, "coding")
    assert deadlines.settings["total"] == "llm.local.tiers[coding].total"
    assert deadlines.settings["first_token"] == "llm.local.timeouts.first_token"


@pytest.mark.parametrize("cap, total, setting", [(60, 60, "llm.timeout"), (9000, 7200, "llm.local.timeouts.total")])
def test_llm_timeout_lowers_total_and_never_raises_it(cap, total, setting):
    deadlines = plan_deadlines(Timeouts(), None, cap)
    assert (deadlines.total, deadlines.settings["total"]) == (total, setting)
    assert deadlines.first_token <= deadlines.total


def test_a_learned_total_makes_room_for_what_the_user_allows():
    deadlines = plan_deadlines(Timeouts.model_validate({"first_token": "30h"}), None, None)
    assert deadlines.first_token == deadlines.total == 30 * 3600
    assert "total" in deadlines.why and "first_token" not in deadlines.why
