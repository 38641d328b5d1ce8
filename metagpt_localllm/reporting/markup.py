"""Text made safe for HTML: nothing that comes from a server, a role or an error is markup."""

from __future__ import annotations

import html
import json
import re
from typing import Any, Iterable, Optional, Sequence

__all__ = ["Column", "as_json", "clean", "name", "table", "text"]

#: What HTML cannot hold, and what turns text around: controls, lone surrogates, overrides of the direction.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: A column: its heading, and whether it holds numbers.
Column = tuple[str, bool]


def clean(value: object) -> str:
    """Text without what no page should hold."""
    return _UNFIT.sub("\ufffd", str(value))


def text(value: object) -> str:
    """For an element or an attribute in double quotes."""
    return html.escape(clean(value))


def name(value: object) -> str:
    """A name that somebody chose, in its own direction; "(none)" where it is empty."""
    return f"<bdi>{text(value)}</bdi>" if str(value).strip() else '<span class="muted">(none)</span>'


def as_json(value: Any) -> str:
    """JSON that may stand in a script element: no ``<`` ends it, nor is a comment begun. Names in it must be clean."""
    dumped = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for unsafe in "<>&\u2028\u2029":
        dumped = dumped.replace(unsafe, f"\\u{ord(unsafe):04x}")
    return dumped


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]], note: str = "", *, id: Optional[str] = None) -> str:
    """A table in a box of its own that scrolls. Cells are HTML already."""
    classes = [' class="n"' if numeric else "" for _, numeric in columns]
    head = "".join(f'<th scope="col"{of}>{text(title)}</th>' for (title, _), of in zip(columns, classes))
    body = "".join("<tr>" + "".join(f"<td{of}>{cell}</td>" for of, cell in zip(classes, row)) + "</tr>" for row in rows)
    named = f' id="{id}"' if id else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table{named}>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<p class="note">{text(note)}</p>' if note else "")
    )
