"""docs/troubleshooting.md explains messages that there are, and every error."""

import ast
import re
from pathlib import Path

import pytest

from metagpt_localllm import errors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
#: Of MetaGPT and of installers.
OF_OTHERS = {"Input should be 'openai', 'anthropic' …", "No solution found … lancedb==0.4.0"}


def texts(tree):
    """All texts in a module, with "…" for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def messages():
    sources = (ROOT / "metagpt_localllm").rglob("*.py")
    return [" ".join(text.split()) for path in sources for text in texts(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("heading", [line[4:] for line in PAGE.splitlines() if line.startswith("### ")])
def test_each_heading_is_a_message_that_there_is(messages, heading):
    parts = [re.escape(part.strip()) for part in heading.split("…") if part.strip()]
    found = any(re.search(".{0,60}".join(parts), text, re.IGNORECASE) for text in messages)
    assert found or heading in OF_OTHERS


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "LocalLLMError"])
def test_each_error_is_explained(name):
    assert f"`{name}`" in PAGE
