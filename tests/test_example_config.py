"""config2.example.yaml is the documentation of the settings: it must load, be complete and say the truth."""

import re
from pathlib import Path

import pytest
import yaml
from metagpt.configs.llm_config import LLMConfig

from metagpt_localllm.settings import LocalSettings, Timeouts

TEXT = (Path(__file__).parent.parent / "config2.example.yaml").read_text()
EXAMPLE = yaml.safe_load(TEXT)["llm"]


def test_it_loads():
    assert LLMConfig(**EXAMPLE).local.tiers == []


def test_its_example_of_tiers_loads():
    shown = re.findall(r"^    #( {2}[- ].*)$", TEXT.split("tiers: []")[1].split("match also takes")[0], re.MULTILINE)
    local = LocalSettings.model_validate({"tiers": yaml.safe_load("\n".join(shown))})
    assert [tier.name for tier in local.tiers] == ["quick", "coding"]


@pytest.mark.parametrize("section", ["timeouts", "retry", "context", "journal", "progress", "telemetry"])
def test_what_it_calls_defaults_are_the_defaults(section):
    shown = LocalSettings.model_validate({section: EXAMPLE["local"][section]})
    assert getattr(shown, section) == getattr(LocalSettings(), section)
    assert set(EXAMPLE["local"][section]) == set(type(getattr(shown, section)).model_fields)


def test_every_timeout_has_its_comment():
    for name in Timeouts.model_fields:
        assert re.search(rf"^ +{name}: \S+ +# ", TEXT, re.MULTILINE), name


def test_the_ready_blocks_load():
    blocks = re.findall(r"^# (llm: \{.*\})$", TEXT, re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        LLMConfig(**yaml.safe_load(block)["llm"])
