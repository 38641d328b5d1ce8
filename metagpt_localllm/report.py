"""The command ``metagpt-localllm report``: what a run did, as one HTML file."""

from __future__ import annotations

import stat
import time
import webbrowser
from datetime import datetime
from pathlib import Path
from typing import Optional, Sequence

import click

from metagpt_localllm.journal import Journal, RunRecord
from metagpt_localllm.runs import JOURNAL_PATH, journal_file, run_named, standing
from metagpt_localllm.session import locks_of
from metagpt_localllm.state import State
from metagpt_localllm.stats import moment
from metagpt_localllm.whole_file import replace_file
from metagpt_localllm.wording import counted

__all__ = ["report"]

#: More runs than any journal has.
_EVERY = 1_000_000
#: Bytes at the beginning of a file in which the mark of a report is looked for.
_HEAD = 1024


@click.command()
@click.option("--run", "which", metavar="RUN", help="The beginning of a run's name, or last. [default: last]")
@click.option("--since", metavar="WHEN",
              help="Calls that began since then, of all runs unless --run is given: 24h or 7d ago, 2026-01-31, '2026-01-31 14:00'.")  # fmt: skip
@click.option("--all", "every", is_flag=True, help="All runs.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("metagpt-report.html"), show_default=True,
              help="The file to write; an earlier report gives way.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite a file that is no report, too.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@click.option("--path", default=JOURNAL_PATH, show_default=True, help="The state file (llm.local.journal.path).")
def report(
    which: Optional[str], since: Optional[str], every: bool, output: Path, force: bool, show: bool, path: str
) -> None:
    """Write an HTML file that shows what a run did.

    A timeline by role, times against prompt sizes, what failed and why, what was cached, trimmed and saved. It is one file that
    needs no network, and has no prompts and no answers in it.
    """
    if every and which is not None:
        raise click.UsageError("--all and --run exclude each other")
    now = time.time()
    try:
        start = moment(since, now) if since is not None else 0.0
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    file = journal_file(path, "report")
    refusal = _refusal(output, force)
    if refusal:
        raise click.BadParameter(refusal, param_hint="--output")
    page, calls = _made(State(file, lambda problem: click.echo(f"Warning: {problem}", err=True)), which, every, since, start, now)
    try:
        replace_file(output.resolve(), page.encode())  # where it is a link, what it leads to
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}. Choose another place with --output.") from None
    click.echo(f"{output}: {counted(calls, 'call')}, {len(page.encode()) / 1e6:.1f} MB")
    if show and not webbrowser.open(output.resolve().as_uri()):
        click.echo(f"No browser was found: open {output.resolve().as_uri()} yourself.", err=True)


def _made(
    state: State, which: Optional[str], every: bool, since: Optional[str], start: float, now: float
) -> tuple[str, int]:
    """The page, and how many calls it is about."""
    from metagpt_localllm.reporting.page import render
    from metagpt_localllm.reporting.recorded import Recorded

    journal, folder = Journal(state), locks_of(state)
    runs = _chosen(journal, which, every or since is not None)
    only = runs[0].id if len(runs) == 1 else None
    everything, replays = journal.recorded(only), journal.replays(only, start)
    told = {run for run, call in everything if call.started >= start} | {replay.run for replay in replays}
    runs = [run for run in runs if run.id in told]
    if not runs:
        where = f"in run {only}" if only is not None else f"in {state.path}"
        when = f" since {since}" if since is not None else " yet"
        raise click.ClickException(f"no calls are recorded {where}{when}; metagpt-localllm runs lists the runs")
    recorded = Recorded(
        runs=sorted(runs, key=lambda run: (run.started, run.id)),
        standing={run.id: standing(folder, run) for run in runs},
        everything=everything, replays=replays, since=start, now=now, zone=datetime.now().astimezone().tzinfo,
    )  # fmt: skip
    return render(recorded), len(recorded.calls)


def _chosen(journal: Journal, which: Optional[str], every: bool) -> Sequence[RunRecord]:
    return journal.runs(_EVERY) if which is None and every else [run_named(journal, which or "last")]


def _refusal(output: Path, force: bool) -> str:
    """Why the file must not be written; empty where it may."""
    from metagpt_localllm.reporting.page import MARK

    try:
        mode = output.stat().st_mode
    except FileNotFoundError:
        return "" if output.parent.is_dir() else f"there is no folder {output.parent}"
    except OSError as error:
        return f"{output}: {error.strerror}"
    if stat.S_ISDIR(mode):
        return f"{output} is a folder: name a file in it"
    if not stat.S_ISREG(mode):
        return f"{output} is no plain file"
    if force:
        return ""
    try:
        with output.open("rb") as file:
            if MARK.encode() in file.read(_HEAD):
                return ""
    except OSError as error:
        return f"{output} cannot be looked into: {error.strerror}"
    return f"{output} exists and is no report of metagpt-localllm: name another file, or overwrite it with --force"
