"""What a benchmark has found: tables, plots and goals, as Markdown.

Each benchmark of ``python -m bench`` gives a Part; what a part is about stands in its module's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

__all__ = ["Goal", "Part", "Plot", "Table", "goals"]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; ``title`` stands above it, with ``about`` as a paragraph. One that is ``folded`` opens on a click."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""
    folded: bool = False

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""] if self.title and not self.folded else []
        if self.about:
            lines += [self.about, ""]
        for row in (self.head, ["---"] * len(self.head), *self.rows):
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |")
        table = "\n".join(lines)
        return f"<details><summary>{self.title}</summary>\n\n{table}\n\n</details>" if self.folded else table


@dataclass(frozen=True)
class Goal:
    """What was wanted, what came out, and whether that is enough; ``why`` says it where it is missed."""

    what: str
    wanted: str
    got: str
    met: bool
    why: str = ""

    def row(self) -> list[str]:
        return [self.what, self.wanted, self.got, "met" if self.met else f"**missed**{': ' + self.why if self.why else ''}"]


@dataclass(frozen=True)
class Plot:
    """A picture, drawn by ``bench/plots.py`` in an environment of its own.

    Attributes:
        name: of its file, without ending.
        kind: of picture, one of those that ``bench/plots.py`` draws.
        title: what it shows, also for those who cannot see it.
        data: what is drawn, as JSON.
    """

    name: str
    kind: str
    title: str
    data: Any


@dataclass(frozen=True)
class Part:
    """One benchmark's outcome."""

    title: str
    command: str
    tables: Sequence[Table]
    goals: Sequence[Goal]
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The part by itself, for the command line."""
        sections = [f"## {self.title}", *(table.markdown() for table in self.tables), goals([self]).markdown(), *self.notes]
        told = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n\n".join([*sections, *([f"Versions: {told}."] if told else [])])


def goals(parts: Sequence[Part]) -> Table:
    """All goals of all parts."""
    rows = [[part.title, *goal.row()] for part in parts for goal in part.goals]
    return Table("Goals", ["benchmark", "what", "goal", "measured", ""], rows)
