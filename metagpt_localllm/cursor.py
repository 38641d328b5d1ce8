"""Where a program's output leaves the cursor of a terminal, and whether something may be drawn below it now. Pure.

What is said here need not be exact: :mod:`metagpt_localllm.live` never moves to a column by it. A wrong guess costs a moment
in which nothing is drawn, or a needless erasure.
"""

from __future__ import annotations

import re

from rich.cells import cell_len, get_character_cell_size

__all__ = ["Cursor"]

#: CSI, OSC and other string sequences, and the two-character ones (ECMA-48).
_SEQUENCE = re.compile(r"\x1b(?:\[([0-?]*)([ -/]*)([@-~])|[\]PX^_].*?(?:\x07|\x1b\\)|[ -/]+[0-~]|[0-OQ-WYZ\\`-~])", re.DOTALL)
#: What may yet become one.
_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_].*|[ -/]*)\Z", re.DOTALL)
_PLAIN = re.compile(r"[^\x00-\x1f\x7f]+")
_TAB = 8
#: Alternate screens of xterm and its like.
_ALTERNATE = frozenset({"?47", "?1047", "?1049"})
#: Characters that an unfinished sequence may have before it is taken for garbage.
_MOST_CARRIED = 4096


class Cursor:
    """Follows the cursor through what is written.

    Args:
        width: of the terminal in cells.

    Attributes:
        column: cells to its left; ``width`` where the next character wraps.
        extent: the rightmost cell of its row that was written to.
    """

    def __init__(self, width: int) -> None:
        self.width = max(width, 1)
        self.column = self.extent = 0
        self._below = 0  # rows of the program's own below the cursor
        self._strange = False  # it was moved in a way that is not followed
        self._away = False  # on the alternate screen
        self._carried = ""  # the beginning of an escape sequence

    @property
    def drawable(self) -> bool:
        """Whether the rows below are nobody's, and moving there and back loses nothing."""
        return self.column < self.width and not (self._below or self._strange or self._away or self._carried)

    def fits(self, text: str) -> bool:
        """Whether ``text`` stays on the cursor's row: then what is drawn below may remain."""
        if not text.isprintable() or self._carried:
            return False
        return self.column + (len(text) if text.isascii() else cell_len(text)) < self.width

    def resize(self, width: int) -> None:
        """The terminal has another width. Some lay a wrapped line out anew, some cut it: either may be so."""
        if width != self.width:
            self._strange = self._strange or self.column >= min(width, self.width) - 1
            self.column, self.width = min(self.column, max(width - 1, 0)), max(width, 1)
            self.extent = self.column

    def feed(self, text: str) -> None:
        """``text`` has been written."""
        if self._carried:
            text, self._carried = self._carried + text, ""
        position, end = 0, len(text)
        if "\x1b" not in text:  # only the last line counts
            newline = text.rfind("\n")
            if newline >= 0 and self._below <= 1:
                self._newline()
                position = newline + 1
        while position < end:
            plain = _PLAIN.match(text, position)
            if plain is not None:
                self._advance(plain[0])
                position = plain.end()
            elif text[position] == "\x1b":
                sequence = _SEQUENCE.match(text, position)
                if sequence is None:
                    if end - position < _MOST_CARRIED and _BEGUN.match(text, position):
                        self._carried = text[position:]
                        return
                    position += 1
                else:
                    self._obey(sequence[1], sequence[3], sequence[0])
                    position = sequence.end()
            else:
                self._control(text[position])
                position += 1

    def _advance(self, text: str) -> None:
        if text.isascii():
            last = self.column + len(text) - 1
            wrapped = last >= self.width
            self.column = last % self.width + 1
        else:
            wrapped = False
            for character in text:
                cells = get_character_cell_size(character)
                if cells and self.column + cells > self.width:
                    self.column, wrapped = 0, True
                self.column += cells
        self.extent = self.column if wrapped else max(self.extent, self.column)

    def _newline(self) -> None:
        self.column = self.extent = 0
        self._below = max(self._below - 1, 0)
        self._strange = False

    def _control(self, character: str) -> None:
        if character == "\n":
            self._newline()
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(min(self.column, self.width - 1) - 1, 0)
        elif character == "\t":
            self.column = min((self.column // _TAB + 1) * _TAB, self.width - 1) if self.column < self.width else self.column
            self.extent = max(self.extent, self.column)
        elif character in "\v\f":
            self._strange = True

    def _obey(self, parameters: str, final: str, whole: str) -> None:
        """An escape sequence."""
        if final is None:
            if whole[1] not in "]PX^_()*+=>78":
                self._strange = True
            return
        if final in "hl" and _ALTERNATE & set(parameters.split(";")):
            self._away = final == "h"
        if final in "mhlqtn" or parameters[:1] in "?>=<" and parameters:
            return
        count = int(parameters) if parameters.isdigit() else 1
        if final == "K":
            self.extent = self.column if parameters in ("", "0") else self.extent
        elif final == "C":
            self.column = min(self.column + max(count, 1), self.width - 1)
        elif final == "D":
            self.column = max(min(self.column, self.width - 1) - max(count, 1), 0)
        elif final == "G":
            self.column = min(max(count, 1), self.width) - 1
        elif final in "AF":
            self._below += max(count, 1)
            self.extent = self.width  # of that row
            self.column = 0 if final == "F" else self.column
        elif final in "BE":
            self._below = max(self._below - max(count, 1), 0)
            self.extent = self.width
            self.column = 0 if final == "E" else self.column
        else:
            self._strange = True
