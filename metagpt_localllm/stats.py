"""The command ``metagpt-localllm stats``: what the recorded calls took, as a table, as CSV or as JSON."""

from __future__ import annotations

import csv
import json
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import click

from metagpt_localllm.journal import Journal
from metagpt_localllm.runs import JOURNAL_PATH, journal_file, run_named
from metagpt_localllm.settings import parse_duration
from metagpt_localllm.state import State
from metagpt_localllm.statistics import DIMENSIONS, CallFigures, Group, figures_of, summarize

__all__ = ["moment", "row_of", "stats"]

#: What calls are grouped by unless the user says otherwise.
_BY = ("action", "role", "model", "tier")
#: Columns that no table has.
_ANY_WIDTH = 100_000
#: Decimals of what is written for machines: microseconds.
_DECIMALS = 6


class _Words(click.ParamType):
    """Some of DIMENSIONS, separated by commas."""

    name = "words"

    def get_metavar(self, param: click.Parameter, ctx: Optional[click.Context] = None) -> str:
        return "WORDS"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip().lower() for word in str(value).split(",") if word.strip())
        for word in words:
            if word not in DIMENSIONS:
                self.fail(f"'{word}' is not one of {', '.join(DIMENSIONS)}", param, ctx)
        if not words:
            self.fail(f"name one or more of {', '.join(DIMENSIONS)}", param, ctx)
        return words


@click.command()
@click.option("--since", metavar="WHEN", help="Only calls that began since then: 24h or 7d ago, 2026-01-31, '2026-01-31 14:00'.")
@click.option("--run", "which", metavar="RUN", help="Only this run: the beginning of its name, or last.")
@click.option("--by", type=_Words(), multiple=True,
              help=f"What to group by: one or more of {', '.join(DIMENSIONS)}, with commas. [default: {','.join(_BY)}]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Write JSON: all figures, the groups and their total.")
@click.option("--csv", "as_csv", is_flag=True, help="Write CSV: all figures, the groups without their total.")
@click.option("--path", default=JOURNAL_PATH, show_default=True, help="The state file (llm.local.journal.path).")
def stats(
    since: Optional[str], which: Optional[str], by: Sequence[tuple[str, ...]], as_json: bool, as_csv: bool, path: str
) -> None:
    """How long the recorded calls took, how fast the model was, and what went wrong.

    Groups come in the order of the time that they took. Times (ttft: time to first token) are of answered calls. Percentiles are
    values that occurred: of fewer than 20 calls p95 is the slowest one, of fewer than 100 p99 is.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    try:
        start = moment(since, time.time()) if since is not None else 0.0
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    file = journal_file(path, "stats")
    problems: list[str] = []

    def warn(problem: str) -> None:
        problems.append(problem)
        click.echo(f"Warning: {problem}", err=True)

    journal = Journal(State(file, warn))
    run = run_named(journal, which).id if which is not None else None
    figures = figures_of(journal.recorded(run), journal.replays(run, start), start)
    if problems and not figures:
        raise click.exceptions.Exit(1)
    dimensions = tuple(dict.fromkeys(word for words in by for word in words)) or _BY
    groups, (total,) = summarize(figures, dimensions), summarize(figures, ())
    if as_json:
        asked = {"since": start or None, "run": run, "by": dimensions}
        told = {**asked, "groups": [_with_errors(group) for group in groups], "total": _with_errors(total)}
        click.echo(json.dumps(told, indent=2))
        return
    if as_csv:
        _write_csv(groups, dimensions)
    if not figures:
        click.echo(_nothing(file, since, run), err=as_csv)
    elif not as_csv:
        _show(groups, total, figures, explicit=bool(by), dimensions=dimensions)


def moment(text: str, now: float) -> float:
    """A point in time in seconds since 1970: so long before ``now``, or a date, which is local unless it says otherwise.

    Raises:
        ValueError: neither.
    """
    text = text.strip()
    wrong = f"'{text}' is neither a length of time (24h, 7d) nor a date (2026-01-31, '2026-01-31 14:00')"
    if text.isdigit():  # seconds to parse_duration, a date to newer versions of Python: nobody means both
        raise ValueError(wrong)
    try:
        return max(now - parse_duration(text), 0.0)
    except ValueError:
        pass
    try:
        # Before 3.11 Python does not know Z.
        return max(datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text).timestamp(), 0.0)
    except (ValueError, OverflowError, OSError):
        raise ValueError(wrong) from None


def row_of(group: Group) -> dict[str, Any]:
    """All figures of a group by the names that CSV and JSON give them; times in seconds, None where not known."""
    row: dict[str, Any] = {**dict(group.keys)}
    for name in ("calls", "answered", "failed", "cancelled", "unfinished", "superseded", "replayed"):
        row[name] = getattr(group, name)
    row.update(seconds=group.seconds, queued_seconds=group.queued)
    for name, found in (("ttft", group.ttft), ("total", group.total), ("prompt", group.prompt)):
        known: Mapping[str, Any] = asdict(found) if found is not None else {}
        row.update({f"{name}_{key}": known.get(key) for key in ("p50", "p95", "p99")})
        row[f"{name}_max"] = known.get("most")
    for name in ("prompt_tokens", "answer_tokens", "cached_share"):
        row[name] = getattr(group, name)
    row.update(decode_tokens_per_second=group.decode_rate, prefill_tokens_per_second=group.prefill_rate)
    for name in ("retries", "timeouts", "trims", "trimmed_tokens", "saved_tokens"):
        row[name] = getattr(group, name)
    return {key: round(value, _DECIMALS) if isinstance(value, float) else value for key, value in row.items()}


def _with_errors(group: Group) -> dict[str, Any]:
    return {**row_of(group), "errors": dict(group.errors)}


def _write_csv(groups: Sequence[Group], dimensions: Sequence[str]) -> None:
    names = list(row_of(Group(keys=tuple((name, "") for name in dimensions))))
    out = click.get_text_stream("stdout", errors="replace")
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row_of(group) for group in groups)


def _show(
    groups: Sequence[Group], total: Group, figures: Sequence[CallFigures], *, explicit: bool, dimensions: Sequence[str]
) -> None:
    from rich.console import Console

    from metagpt_localllm.stats_table import render

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    width = console.width if console.is_terminal else None
    if width is None:  # a file or a pipe has none to keep to
        console = Console(highlight=False, width=_ANY_WIDTH)
    render(console, groups, total, figures, dimensions, width=width, explicit=explicit)


def _nothing(file: Path, since: Optional[str], run: Optional[str]) -> str:
    where = f"in run {run}" if run is not None else f"in {file}"
    if since is not None:
        return f"No calls are recorded {where} since {since}. Without --since all are shown; metagpt-localllm runs lists the runs."
    return f"No calls are recorded {where} yet. Run MetaGPT with api_type: local_llm, and look again."
