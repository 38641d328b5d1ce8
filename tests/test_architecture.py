"""docs/architecture.md and its picture name every module, and none that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "metagpt_localllm"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
MODULES = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"} - {"__init__.py", "__main__.py"}
FOLDERS = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


def test_every_module_is_named():
    assert {name for name in MODULES | FOLDERS if f"`{name}`" not in PAGE} == set()


@pytest.mark.parametrize("text", [PAGE, PICTURE], ids=["page", "picture"])
def test_every_module_that_is_named_is_there(text):
    named = set(re.findall(r"\b\w+\.py\b|\b(?:servers|doctor|simulator|reporting)/", text)) - {"metagpt.py"}
    assert len(named) > 20 and named - {path.name for path in PACKAGE.rglob("*.py")} - FOLDERS == set()


def test_it_is_one_page():
    assert len(PAGE.splitlines()) <= 80
