"""The calls that run, in one output of a notebook, which is emptied when they have ended."""

from __future__ import annotations

import html
import sys
from typing import Any, Sequence

from metagpt_localllm.phases import View
from metagpt_localllm.rows import texts

__all__ = ["Output", "in_notebook"]

_WIDTH = 100
#: Seconds between two updates while nothing but the time goes on.
_TICK = 1.0


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel (IPython on a terminal is a terminal)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class Output:
    """One display, which is updated."""

    tick = _TICK

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = ""

    def changed(self, view: View) -> None:
        """The next update shows it."""

    def update(self, views: Sequence[View]) -> None:
        self._put("\n".join(text.plain for text in texts(views, _WIDTH)))

    def end(self) -> None:
        if self._handle is not None:
            self._put("")

    def _put(self, plain: str) -> None:
        if plain == self._last:
            return
        self._last = plain
        page = f'<pre style="margin: 0">{html.escape(plain)}</pre>' if plain else ""
        data = {"text/plain": plain, "text/html": page}
        if self._handle is None:
            import IPython.display

            display: Any = IPython.display.display
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
