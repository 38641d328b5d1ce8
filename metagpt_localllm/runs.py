"""The command ``metagpt-localllm runs``: what is in the journal, and going on with it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import click

from metagpt_localllm.journal import Journal, RunRecord
from metagpt_localllm.session import VARIABLE, is_alive, locks_of
from metagpt_localllm.settings import JournalSettings
from metagpt_localllm.state import state_at
from metagpt_localllm.statistics import mappings
from metagpt_localllm.wording import counted

__all__ = ["JOURNAL_PATH", "journal_file", "run_named", "runs", "standing"]

#: The default of ``llm.local.journal.path``.
JOURNAL_PATH: str = JournalSettings.model_fields["path"].default


@click.group(invoke_without_command=True)
@click.option("--path", default=JOURNAL_PATH, show_default=True, help="The state file (llm.local.journal.path).")
@click.pass_context
def runs(context: click.Context, path: str) -> None:
    """List, show, resume and forget the runs of MetaGPT that were recorded."""
    context.obj = path
    if context.invoked_subcommand is None:
        context.invoke(list_runs)


def _journal(context: click.Context) -> Journal:
    return Journal(state_at(context.obj))


def _idle(context: click.Context, run: str) -> RunRecord:
    """The run, on which no process works."""
    found = run_named(_journal(context), run)
    if _how(context, found) == "running":
        raise click.ClickException(f"a process still works on {found.id}")
    return found


def journal_file(path: str, command: str) -> Path:
    """The state file that ``--path`` of a command names.

    Raises:
        click.ClickException: it is not there; says what to do.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise click.ClickException(
            f"there is no journal at {file}: calls are recorded once MetaGPT has run with api_type: local_llm and "
            "llm.local.journal.enabled (which is on unless you turned it off). If llm.local.journal.path in config2.yaml names "
            f"another file, give it here: metagpt-localllm {command} --path FILE"
        )
    return file


def run_named(journal: Journal, which: str) -> RunRecord:
    """The run that ``--run`` or RUN names: the only one whose id begins so, or the newest where that is "last".

    Raises:
        click.ClickException: there is none.
    """
    if which == "last":
        for run in journal.runs(1):
            return run
        raise click.ClickException("no run is recorded yet: run MetaGPT with api_type: local_llm, and look again")
    found = journal.run(which)
    if found is None:
        raise click.ClickException(f"there is no run '{which}', or more than one begins so; metagpt-localllm runs lists them")
    return found


def standing(folder: Path, run: RunRecord) -> str:
    """How a run stands: running, done, failed, interrupted, or killed, where nobody works on one that has no end.

    Args:
        folder: of the locks.
    """
    if is_alive(folder, run.id):
        return "running"
    return "killed" if run.outcome == "running" else run.outcome


def _how(context: click.Context, run: RunRecord) -> str:
    return standing(locks_of(state_at(context.obj)), run)


@runs.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
@click.pass_context
def list_runs(context: click.Context, limit: int = 20) -> None:
    """The latest runs."""
    found = _journal(context).runs(limit)
    if not found:
        click.echo("No runs are recorded yet.")
    for run in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.touched))
        click.echo(
            f"{run.id}  {when}  {_how(context, run):<11} {counted(run.calls, 'call'):>9} {counted(run.tokens, 'token'):>14}  {_command(run)}"
        )


@runs.command()
@click.argument("run")
@click.option("--answers", is_flag=True, help="With the answers.")
@click.pass_context
def show(context: click.Context, run: str, answers: bool) -> None:
    """The calls of a run; RUN is the beginning of its name, or last."""
    found = run_named(_journal(context), run)
    click.echo(f"{found.id}: {_how(context, found)}, in {found.folder}\n{_command(found)}")
    for call in _journal(context).calls(found.id):
        tokens = (call.usage or {}).get("completion_tokens") or (call.partial or {}).get("tokens") or 0
        seconds = f"{call.ended - call.started:.1f} s" if call.ended else ""
        saved = f", {call.saved_tokens} of them saved" if call.saved_tokens else ""
        failed = [str(attempt["error"]) for attempt in mappings(call.attempts) if "error" in attempt]
        errors = f" after {', '.join(failed)}" if failed else ""
        click.echo(
            f"{call.number:>4} {call.outcome:<9} {call.role}/{call.action} {tokens} tokens{saved} {seconds}{errors}"
        )
        if answers:
            click.echo((call.answer or call.partial or {}).get("content", ""))


@runs.command()
@click.argument("run")
@click.pass_context
def resume(context: click.Context, run: str) -> None:
    """Start the command of a run again, where it was started, and go on with it."""
    found = _idle(context, run)
    if not Path(found.folder).is_dir():
        raise click.ClickException(f"the folder {found.folder} is gone")
    click.echo(f"cd {shlex.quote(found.folder)} && {_command(found)}", err=True)
    os.chdir(found.folder)
    os.environ[VARIABLE] = found.id
    sys.stdout.flush()
    os.execvp(found.command[0], list(found.command))


@runs.command()
@click.argument("run")
@click.pass_context
def forget(context: click.Context, run: str) -> None:
    """Remove a run with all its answers."""
    found = _idle(context, run)
    _journal(context).forget(found.id)
    state_at(context.obj).close()
    click.echo(f"{found.id} is forgotten.")


def _command(run: RunRecord) -> str:
    return shlex.join([*map(os.path.basename, run.command[:1]), *run.command[1:]])
