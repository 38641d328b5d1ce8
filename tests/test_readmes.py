"""README.md and its Chinese translation say the same: whatever is not prose is the same in both."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(?:^|[ \t]{2,})#.*$", re.MULTILINE)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name):
    return BLOCK.sub("", text(name))


def headings(name):
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(name), re.MULTILINE)]


def blocks(name):
    """With the comments out, which may be translated; a block in no language has none."""
    return [(language, COMMENT.sub("", code) if language else code) for language, code in BLOCK.findall(text(name))]


def targets(kind):
    """In any order: a translated sentence may turn its links around."""
    mark = {"links": r"(?<!!)", "images": "!"}[kind]

    def of(name):
        found = re.findall(mark + r"\[[^\]]*\]\(([^)]+)\)", prose(name))
        # Headings are translated, so the places in the same file are called otherwise.
        return sorted("#" if target.startswith("#") else target for target in found if target not in (ENGLISH, CHINESE))

    return of


def keys(name):
    return re.findall(r"^\| (`[^`|]+`(?:, `[^`|]+`)*) \|", prose(name), re.MULTILINE)


def rows(name):
    return [line.count(" |") for line in prose(name).splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(headings, id="headings"),
        pytest.param(blocks, id="code blocks"),
        pytest.param(targets("links"), id="links"),
        pytest.param(targets("images"), id="images"),
        pytest.param(keys, id="keys of tables"),
        pytest.param(rows, id="rows of tables"),
    ],
)
def test_both_readmes_have_the_same(part):
    assert part(ENGLISH), "nothing was found to compare"
    assert part(CHINESE) == part(ENGLISH)


@pytest.mark.parametrize("command", [".venv/bin/metagpt-localllm demo", ".venv/bin/python -m pytest"])
@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_each_readme_names_the_command_in_one_line_from_a_fresh_machine(name, command):
    lines = [code.rstrip("\n") for language, code in blocks(name) if language == "sh"]
    assert [line for line in lines if line.startswith("python3.11 -m venv ") and line.endswith(f" && {command}")]


@pytest.mark.parametrize(("name", "other"), [(ENGLISH, CHINESE), (CHINESE, ENGLISH)])
def test_each_readme_leads_to_the_other_at_its_top(name, other):
    assert f"]({other})" in text(name).splitlines()[2]


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_places_in_the_same_file_are_there(name):
    there = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", prose(name))) <= there


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_what_was_measured_is_what_the_benchmark_wrote(name):
    results = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in prose(name).splitlines() if re.match(r"\| [\w ]+ \| (\d+ of \d+|\d\.\d\d / \d\.\d\d) \|", line)]
    assert len(shown) > 20 and [line for line in shown if line not in results] == []
