"""MetaGPT's config2.yaml: which files it reads, and how one of them is changed without harm.

A change is proposed, can be shown, and is then written as a whole or not at all, beside a copy of what was there.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

from metagpt_localllm.config_text import KeyPath, YamlProblem, parsed, with_values
from metagpt_localllm.whole_file import copy_owner_and_mode, replace_file, write_and_close

__all__ = [
    "ConfigFileError", "FileChange", "apply", "config_files", "content_of", "propose", "propose_values", "read", "set_values",
    "user_config",
]  # fmt: skip

#: Settings whose values are never shown: to the end of the line, or to the next setting in the same braces.
_SECRET = re.compile(
    r"""(?P<name>\b(?:\w*api_key\w*|access_key|secret_key|session_token|\w*api_secret\w*|\w*password
    |\w*subscription_key|redis_key|cookies?)["']?\s*:[ \t]*)
    (?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\n]|'')*'|[^\s](?:(?!,\s*[\w"']+\s*:|\}\s*(?:$|[,}\#])|\s\#)[^\n])*)""",
    re.VERBOSE | re.MULTILINE,
)


class ConfigFileError(Exception):
    """A configuration that cannot be read or must not be written; its text says what to do."""


@dataclass(frozen=True)
class FileChange:
    """What becomes of a file.

    Attributes:
        path: the file, as it was named; where it is a link, what it points to is changed.
        before: its text; None where there is none.
        after: its text to be.
        backup: the copy of what was there; None where nothing was, or nothing is written yet.
    """

    path: Path
    before: Optional[str]
    after: str
    backup: Optional[Path] = None

    @property
    def changes(self) -> bool:
        return self.before != self.after

    @property
    def diff(self) -> str:
        """The changed lines with three around them, for people; no API key is in it."""
        before, after = _hidden(self.before or "").splitlines(), _hidden(self.after).splitlines()
        name = str(self.path)
        old = name if self.before is not None else "(no file)"
        return "\n".join(difflib.unified_diff(before, after, old, name, lineterm=""))


def user_config() -> Path:
    """The file that MetaGPT reads last (metagpt/const.py, CONFIG_ROOT): ``~/.metagpt/config2.yaml``."""
    return Path.home() / ".metagpt" / "config2.yaml"


def config_files() -> list[Path]:
    """All files that MetaGPT reads, the one that wins first, whether they exist or not.

    The user's wins over the project's, key by key of the top level: its whole ``llm`` takes the place of the other
    one's (metagpt/config2.py, Config.default and merge_dict, 0.8.2 and 1.0.0). The project's is in ``config`` in
    METAGPT_PROJECT_ROOT, or else in the folder that holds the installed package where that is a checkout, or else
    in the working directory (metagpt/const.py, get_metagpt_root).
    """
    return [user_config(), _project_root() / "config" / "config2.yaml"]


def _project_root() -> Path:
    named = os.environ.get("METAGPT_PROJECT_ROOT")
    if named:
        return Path(named)
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec("metagpt")
        if found is not None and found.origin:
            root = Path(found.origin).parent.parent
            if any((root / mark).exists() for mark in (".git", ".project_root", ".gitignore")):
                return root
    return Path.cwd()


def read(path: Path) -> Optional[str]:
    """The file's text with its line ends as they are; None where there is no file.

    Raises:
        ConfigFileError: it cannot be read, or is no UTF-8 (MetaGPT reads no other).
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ConfigFileError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigFileError(f"{path} cannot be read: {error.strerror or error}") from None


def content_of(path: Path) -> Optional[dict[Any, Any]]:
    """What is in the file; None where there is no file.

    Raises:
        ConfigFileError: it cannot be read, or does not parse.
    """
    text = read(path)
    if text is None:
        return None
    with _located(path):
        return parsed(text)


def set_values(path: Path, values: Mapping[KeyPath, Any]) -> FileChange:
    """Sets values in a file; :func:`propose_values` and :func:`apply` in one."""
    return apply(propose_values(path, values))


def propose_values(path: Path, values: Mapping[KeyPath, Any]) -> FileChange:
    """The change that sets ``values`` (path of the key → value) and leaves every other byte; nothing is written.

    Paths and values are those of :func:`metagpt_localllm.config_text.with_values`; a file that is not there is begun.

    Raises:
        ConfigFileError: the file does not parse, or the result has a mistake that was not there before.
    """
    before = read(path)
    with _located(path):
        return propose(path, with_values(before or "", values))


def propose(path: Path, text: str) -> FileChange:
    """The change that gives the file this text; nothing is written.

    Raises:
        ConfigFileError: the file cannot be read, or the text has a mistake that was not there before.
    """
    before = read(path)
    with _located(path):
        wrong = _problems(parsed(text))
    with contextlib.suppress(YamlProblem):
        known = _problems(parsed(before)) if before and wrong else []
        wrong = [problem for problem in wrong if problem not in known]
    if wrong:
        raise ConfigFileError("\n".join([f"{path} is left as it is, since it would not be valid:", *wrong]))
    return FileChange(path, before, text)


def apply(change: FileChange) -> FileChange:
    """Writes the change, unless it changes nothing; the file is at no time there by half.

    Its mode stays; a new one, which may hold an API key, is for its owner only (0600). What was there is kept beside
    it as ``config2.yaml.bak-<time>`` with the same mode.

    Returns:
        The change with the path of that copy.

    Raises:
        ConfigFileError: the file has changed since it was read, or cannot be written.
    """
    if not change.changes:
        return change
    if read(change.path) != change.before:
        raise ConfigFileError(f"{change.path} has been changed by something else meanwhile; run the command again")
    target = Path(os.path.realpath(change.path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        like, backup = None, None
        if change.before is not None:
            like = target.stat()
            backup = _copy(change.path, change.before.encode(), like)
        replace_file(target, change.after.encode(), like)
    except OSError as error:
        raise ConfigFileError(f"{change.path} cannot be written: {error.strerror or error}") from None
    return replace(change, backup=backup)


def _copy(path: Path, content: bytes, like: os.stat_result) -> Path:
    name = f"{path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        backup = path.with_name(name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            write_and_close(descriptor, content)
            copy_owner_and_mode(backup, like)
            return backup
    raise FileExistsError(f"there are too many copies named {name}")


def _hidden(text: str) -> str:
    return _SECRET.sub(lambda found: f"{found['name']}***", text)


@contextlib.contextmanager
def _located(path: Path) -> Iterator[None]:
    """What is wrong with the text of a file is told with the file and the line."""
    try:
        yield
    except YamlProblem as problem:
        where = f"{path}, line {problem.line}" if problem.line else str(path)
        raise ConfigFileError(f"{where}: {problem.reason}") from None


def _problems(content: dict[Any, Any]) -> list[str]:
    """What ``metagpt-localllm check`` would say of the content."""
    from metagpt_localllm.checking import config_problems  # pydantic and httpx, which reading needs not wait for

    return config_problems(content) if isinstance(content.get("llm"), dict) else ["there is no block 'llm'"]
