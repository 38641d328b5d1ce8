"""Words of others in a line of ours: a server's, a library's, of a damaged file. Pure."""

from __future__ import annotations

import json

from metagpt_localllm.wording import is_printable

__all__ = ["SECRET", "quoted"]

#: Characters of a key from which on it is struck out of texts: shorter ones are parts of words.
SECRET = 4
#: Characters that are quoted, of them at the end of a longer text, and those that are looked at for them.
_QUOTED, _END, _READ = 300, 120, 1 << 18


def quoted(text: str, key: str = "") -> str:
    """``text`` as one short line that can be shown anywhere.

    Of a long one its beginning and its end, where a traceback has what happened. What moves a cursor, and half a character, is
    U+FFFD in it.

    Args:
        key: the API key, for which … stands.
    """
    if len(key) >= SECRET:  # before it is cut: a part of a key is one, too
        text = text.replace(key, "…").replace(json.dumps(key)[1:-1], "…")
    line = " ".join(text[:_READ].split())
    if len(line) > _QUOTED:
        line = f"{line[: _QUOTED - _END - 3]} … {line[-_END:]}"
    return "".join(character if is_printable(character) else "\ufffd" for character in line)
