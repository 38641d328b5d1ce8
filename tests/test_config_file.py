"""config2.yaml is changed where it was asked for, and nowhere else; it is never there by half."""

import os
import re
import stat
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metagpt_localllm import config_file
from metagpt_localllm.checking import check_config
from metagpt_localllm.config_file import ConfigFileError, apply, config_files, propose, propose_values, set_values
from metagpt_localllm.config_text import YamlProblem, with_values
from metagpt_localllm.settings import LocalSettings

EXAMPLE = (Path(__file__).parent.parent / "config2.example.yaml").read_text()
GOOD = "# mine\nllm:\n  api_type: local_llm   # ours\n  base_url: 'http://h/v1'\n  model: m\nworkspace: {path: /x}\n"

# ------------------------------------------------------------------------------------------------ texts


def lines_that_differ(before, after):
    """The lines of both that are not in a common beginning or end."""
    before, after = before.splitlines(), after.splitlines()
    while before and after and before[0] == after[0]:
        del before[0], after[0]
    while before and after and before[-1] == after[-1]:
        del before[-1], after[-1]
    return before, after


def test_a_value_of_the_example_is_changed_in_its_line_only_and_the_comment_keeps_its_column():
    after = with_values(EXAMPLE, {"llm.local.timeouts.first_token": "3m"})
    (old,), (new,) = lines_that_differ(EXAMPLE, after)
    assert new.split("#")[0].strip() == "first_token: 3m" and new.index("#") == old.index("#")


def test_tiers_take_the_place_of_tiers():
    tiers = [{"name": "slow", "match": {"action": ["WriteCode"]}, "total": "4h"}, {"name": "rest", "stall": "2m"}]
    used = re.sub(r"^    #(  [- ] .*)$", r"    \1", EXAMPLE.replace("tiers: []", "tiers:   "), flags=re.MULTILINE)
    assert len(yaml.safe_load(used)["llm"]["local"]["tiers"]) == 2
    after = with_values(used, {"llm.local.tiers": tiers})
    assert yaml.safe_load(after)["llm"]["local"]["tiers"] == tiers
    LocalSettings.model_validate(yaml.safe_load(after)["llm"]["local"])
    old, _ = lines_that_differ(used, after)
    assert all(line.startswith("      ") for line in old) and "#  match also takes" in after


@pytest.mark.parametrize(
    "before, values, after",
    [
        ("", {"a.b": 1}, "a:\n  b: 1\n"),
        ("# c", {"a.b": 1}, "# c\na:\n  b: 1\n"),
        ("a:   # x\n  # y\nb: 1\n", {"a.c": 1}, "a:   # x\n  c: 1\n  # y\nb: 1\n"),
        ("a: null # x\n", {"a.b": 1}, "a: # x\n  b: 1\n"),
        ("a: ~\n", {"a": "v"}, "a: v\n"),
        ("a:\n  b: 1\n\n\n# end\n", {"a.c": [1]}, "a:\n  b: 1\n  c: [1]\n\n\n# end\n"),
        ("a: {b: 1,  c: 2}   # z\n", {"a.b": "x, y", "a.d": None}, "a: {b: 'x, y',  c: 2, d: null}   # z\n"),
        ("a: |\n  t\n\nb: 2\n", {"a": "x"}, "a: x\n\nb: 2\n"),
        ("b: 2\na: |+\n  t\n\n", {"c": 1}, "b: 2\na: |+\n  t\n\nc: 1\n"),
        ("l:\n- a\n- b: 1\n", {"l.1.c": {"d": 1}}, "l:\n- a\n- b: 1\n  c:\n    d: 1\n"),
        ("l:\n-  - a\n   - b\n", {"l.0": {"c": 1, "d": 2}}, "l:\n-  c: 1\n   d: 2\n"),
        ("l: []\nk: 1\n", {"l": [{"m": 1}]}, "l:\n  - m: 1\nk: 1\n"),
        ("a: 1\r\nb: 2\r\n", {"c.d": 1}, "a: 1\r\nb: 2\r\nc:\r\n  d: 1\r\n"),
        ("---\na: 1\n...\n", {"b": 2}, "---\na: 1\nb: 2\n...\n"),
        ("{a: 1}\n", {"b.c": 2}, "{a: 1, b: {c: 2}}\n"),
        ("a: \"x\"\nb: 'x'\n", {"a": "it's", "b": "it's"}, "a: \"it's\"\nb: 'it''s'\n"),
        ("\ufeffa: 1 # é\n", {"a": "ü"}, "\ufeffa: ü # é\n"),
        ("a: 1", {"b": "yes"}, "a: 1\nb: 'yes'\n"),
        ("a: 1", {("b.c", "d"): 2}, "a: 1\nb.c:\n  d: 2\n"),
        ("a: 1\n", {"²": 2}, "a: 1\n²: 2\n"),
        ("x: &s {p: 1}\ny: *s\n", {"z": 1}, "x: &s {p: 1}\ny: *s\nz: 1\n"),
    ],
)
def test_a_text_and_what_becomes_of_it(before, values, after):
    assert with_values(before, values) == after


@pytest.mark.parametrize(
    "before, values, said",
    [
        ("a: 'x'\n", {"a.b": 1}, "no place for 'b' in a value that is text"),
        ("x: &s {p: 1}\ny: *s\n", {"y.p": 2}, "line 2: 'y' is an alias"),
        ("x: &s {p: 1}\ny: *s\n", {"x.p": 2}, "cannot be set without changing something else"),
        ("a:\n\tb: 1\n", {"c": 1}, "line 2: .*no tabs"),
        ("a: 1\nb: [1\n", {"c": 1}, "line 3: "),
        ("- a\n", {"c": 1}, "no list of settings"),
        ("a: !!python/name:os.system x\n", {"c": 1}, "line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 1\n", {"c": 1}, "line 2"),
    ],
)
def test_what_cannot_be_changed_safely_is_refused_with_its_line(before, values, said):
    with pytest.raises(YamlProblem, match=said):
        with_values(before, values)


NAMES = st.sampled_from(["llm", "local", "timeouts", "a b", "é", "roles", "x-1", "null", "12"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12),
    st.sampled_from(["3m", "yes", "1:30", "012", "# no", "a: b", "http://h:1/v1", "*x", "- a", " s ", "a\nb", "'", '"']),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
CONTENTS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=4)


@st.composite
def documents(draw):
    """A configuration in some style, with comments."""
    content = draw(CONTENTS)
    options = {"default_flow_style": draw(st.sampled_from([True, False, None])), "indent": draw(st.integers(2, 5)),
               "width": draw(st.sampled_from([20, 80, 10**6])), "allow_unicode": draw(st.booleans()),
               "default_style": draw(st.sampled_from([None, '"']))}  # fmt: skip
    lines = yaml.safe_dump(content, sort_keys=False, **options).splitlines(keepends=True)
    text = "".join(f"# comment {n}\n{line}" if draw(st.booleans()) and not line[0].isspace() else line
                   for n, line in enumerate(lines))  # fmt: skip
    try:
        assume(yaml.safe_load(text) == content)  # a comment may have come into text of several lines
    except yaml.YAMLError:
        assume(False)
    return content, text


def paths(content):
    """Paths to all that is there, and to what is missing in each mapping."""
    if isinstance(content, dict):
        yield ("missing",)
        yield ("missing", "inner")
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in paths(inner))


@settings(deadline=None)
@given(documents(), VALUES, st.data())
def test_values_set_are_values_read_back_and_all_others_stay(document, value, data):
    content, text = document
    path = data.draw(st.sampled_from(sorted(paths(content), key=repr)))
    after = with_values(text, {path: value})
    holder = content
    for step in path[:-1]:
        holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
    there = isinstance(holder, list) or path[-1] in holder
    old = holder[path[-1]] if there else None
    holder[path[-1]] = value
    assert yaml.safe_load(after) == content
    if not there:
        assert remains(text, after)
    elif not isinstance(old, (dict, list)) and not isinstance(value, (dict, list)) and "\n" not in str(old):
        assert after.count("# comment") >= text.count("# comment")


def remains(before, after):
    """Whether ``after`` is ``before`` with one piece put in (and an end to its last line, where that had none)."""
    before = before.rstrip("\n")
    common = os.path.commonprefix([before, after])
    return any(after.rstrip("\n").endswith(before[cut:]) for cut in range(len(common) + 1))


@settings(deadline=None)
@given(st.sampled_from([path for path in paths(yaml.safe_load(EXAMPLE)) if "inner" not in path]), SCALARS)
def test_of_the_example_no_other_line_changes(path, value):
    content = yaml.safe_load(EXAMPLE)
    for step in path[:-1]:
        content = content[step]
    assume(not isinstance(content, (dict,)) or not isinstance(content.get(path[-1]), (dict, list)))
    assume(not isinstance(content, list) or not isinstance(content[path[-1]], dict))
    after = with_values(EXAMPLE, {path: value})
    old, new = lines_that_differ(EXAMPLE, after)
    assert len(old) <= 1 and len(new) <= 1


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config2.yaml"
    path.write_text(GOOD)
    return path


def copies(path):
    return sorted(path.parent.glob("config2.yaml.bak-*"))


def test_a_change_is_written_with_a_copy_of_what_was_there_and_the_mode_stays(config):
    config.chmod(0o640)
    change = set_values(config, {"llm.model": "other"})
    assert config.read_text() == GOOD.replace("model: m", "model: other")
    assert change.backup.read_text() == GOOD and copies(config) == [change.backup]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (config, change.backup)] == [0o640, 0o640]
    assert "-  model: m\n+  model: other" in change.diff


def test_two_changes_in_one_second_leave_two_copies(config):
    backups = [set_values(config, {"llm.model": name}).backup for name in ("a", "b", "c")]
    assert len(set(backups)) == 3 and backups[0].read_text() == GOOD


def test_a_new_file_is_for_its_owner_only(tmp_path):
    path = tmp_path / "new" / "config2.yaml"
    change = set_values(path, {"llm": {"api_type": "local_llm", "base_url": "http://h/v1", "model": "m"}})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and change.backup is None


def test_no_change_means_no_write_and_no_copy(config):
    config.chmod(0o400)
    before = config.stat()
    change = set_values(config, {"llm.model": "m"})
    assert not change.changes and change.diff == "" and not copies(config)
    assert (config.stat().st_mtime_ns, config.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_what_a_link_points_to_is_changed_and_the_link_stays(config, tmp_path):
    link = tmp_path / "home" / "config2.yaml"
    link.parent.mkdir()
    link.symlink_to(config)
    set_values(link, {"llm.model": "other"})
    assert link.is_symlink() and "model: other" in config.read_text() and len(copies(link)) == 1


def test_the_file_is_whole_when_the_write_breaks_off(config, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigFileError, match="No space left on device"):
        set_values(config, {"llm.model": "other"})
    assert config.read_text() == GOOD
    assert not [path for path in config.parent.iterdir() if path.name.startswith(".")]


def test_what_somebody_else_changed_meanwhile_is_not_overwritten(config):
    change = propose_values(config, {"llm.model": "other"})
    config.write_text(GOOD + "# new\n")
    with pytest.raises(ConfigFileError, match="run the command again"):
        apply(change)
    assert config.read_text() == GOOD + "# new\n"


@pytest.mark.parametrize(
    "content, said",
    [(b"llm:\n\tmodel: m\n", "line 2: .*no tabs"), (b"llm: \xff\n", "not UTF-8"), (b"[1]\n", "no list of settings")],
)
def test_a_file_that_does_not_parse_is_refused_and_left_alone(config, content, said):
    config.write_bytes(content)
    with pytest.raises(ConfigFileError, match=said):
        set_values(config, {"llm.model": "other"})
    assert config.read_bytes() == content and not copies(config)


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("llm.local.timeouts.first_tokn", "3m", "did you mean 'first_token'"),
        ("llm.local.timeouts.first_token", "soon", "not a duration"),
        ("llm.base_url", "h:1/v1", "no address of the form"),
        ("llm.api_type", "locl_llm", "did you mean 'local_llm'"),
    ],
)
def test_what_check_would_complain_of_is_not_written(config, path, value, said):
    with pytest.raises(ConfigFileError, match=said):
        set_values(config, {path: value})
    assert config.read_text() == GOOD


def test_a_mistake_that_was_there_before_does_not_keep_another_from_being_mended(config):
    config.write_text(GOOD + "models: {x: {api_type: local_llm, model: m}}\n")
    set_values(config, {"llm.model": "other"})
    assert "model: other" in config.read_text()
    with pytest.raises(ConfigFileError, match="not a duration"):
        set_values(config, {"llm.local.timeouts.stall": "soon"})


def test_no_key_is_in_a_diff(config):
    config.write_text(GOOD + "search: {api_key: sk-old, engine: x}\n")
    change = propose_values(config, {"llm.api_key": "sk-new", "search.engine": "y", "llm.max_token": 77})
    assert "sk-" not in change.diff and "api_key: ***" in change.diff
    assert "max_token: 77" in change.diff and "engine: y" in change.diff


@pytest.mark.parametrize(
    "line",
    [
        "api_key: sk-1#2,3}4", 'api_key: "sk-1, \\" sk-2: 3"', "api_key: 'sk-1'' sk-2'   # mine", '"api_key": sk-1 2',
        "{openai_api_key: sk-1, x: 1}", "iflytek_api_secret: sk-1", "redis: {password: sk-1}",
    ],
)  # fmt: skip
def test_however_a_key_is_written_it_is_not_shown(line):
    hidden = config_file._hidden(f"a: 1\n{line}\nb: 2\n")
    assert not any(part in hidden for part in ("sk-", "2,3", "}4")) and hidden.endswith("b: 2\n")


def test_a_whole_text_is_held_to_the_same(config):
    with pytest.raises(ConfigFileError, match="llm.model is missing"):
        propose(config, "llm: {api_type: local_llm, base_url: 'http://h/v1'}\n")


def test_the_files_are_those_that_metagpt_reads_and_the_users_wins(monkeypatch, tmp_path):
    from metagpt.config2 import Config

    user, project = config_files()
    assert user == Path.home() / ".metagpt" / "config2.yaml"
    assert project == Path(os.environ["METAGPT_PROJECT_ROOT"]) / "config" / "config2.yaml"
    project.parent.mkdir(exist_ok=True)
    project.write_text("llm: {api_type: openai, api_key: k, model: project}\nlanguage: French\n")
    try:
        try:
            found = Config.default(reload=True)
        except TypeError:  # 0.8.2
            found = Config.default()
    finally:
        project.unlink()
    assert (found.llm.model, found.language) == ("none", "French")


def test_without_a_project_root_it_is_the_checkout_or_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("METAGPT_PROJECT_ROOT")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site" / "metagpt").mkdir(parents=True)
    (tmp_path / "site" / "metagpt" / "__init__.py").touch()
    spec = config_file.importlib.util.spec_from_file_location("metagpt", tmp_path / "site" / "metagpt" / "__init__.py")
    monkeypatch.setattr(config_file.importlib.util, "find_spec", lambda name: spec)
    assert config_files()[1] == tmp_path / "config" / "config2.yaml"
    (tmp_path / "site" / ".gitignore").touch()
    assert config_files()[1] == tmp_path / "site" / "config" / "config2.yaml"


# ------------------------------------------------------------------------------------------- odd files

LOL = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]\n" for before, one in zip("abcdefgh", "bcdefghi")
)
LLM = "llm: {api_type: local_llm, base_url: 'http://127.0.0.1:9/v1', model: m"
ODD_FILES = {
    "laughs": LOL + LLM + "}", "a loop": "a: &a [*a]\n", "a loop of keys": "&a {a: *a}", "deep": "[" * 5000, "deep blocks": "{a: " * 200,
    "no date": "a: 2024-99-99", "no number": "a: !!int x", "no int": "a: !!int ''", "no truth": "a: !!bool x", "no time": "a: !!timestamp x",
    "long number": "a: " + "9" * 5000, "a list as key": "? [a]\n: b", "NUL": "a: \x00", "tab": "a:\n\tb: c", "a list": "- a", "python": "!!python/object/apply:os.getcwd []",
    "half a character": 'a: "\\ud800"', "models": LLM + "}\nmodels: 17\nroles: {a: b}", "roles": LLM + "}\nmodels: [a]\nroles: [17, {llm: 5}]",
    "address": "llm: {api_type: local_llm, base_url: 'http://[::1', model: m}", "port": "llm: {api_type: local_llm, base_url: 'http://h:x/', model: m}",
    "types": "llm: {api_type: [a], base_url: {a: b}, model: [m]}", "local": LLM + ", local: [a]}", "keys": LLM + ", local: {1: 2, null: 3}}",
    "a long key": LLM + ", local: {" + "k" * 100_000 + ": 1}}", "an escape": 'llm: {api_type: "local_ll\\e[2J", base_url: "\\e[2J"}',
    "a key": LLM + ", api_kye: sk-secret}",
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_file_of_any_content_is_read_or_refused_in_short_lines(tmp_path, kind):
    path = tmp_path / "config2.yaml"
    path.write_text(ODD_FILES[kind], encoding="utf-8")
    said = [check.text for check in check_config(path, offline=True)]
    try:
        propose_values(path, {"llm.local.timeouts.total": "2h"})
    except ConfigFileError as error:
        said += str(error).splitlines()
    for line in said:
        assert len(line) < 900 and "secret" not in line and "\x1b" not in line, line
