"""The command ``metagpt-localllm doctor``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import click

if TYPE_CHECKING:
    from metagpt_localllm.config_text import KeyPath
    from metagpt_localllm.doctor.diagnosis import Diagnosis

__all__ = ["doctor"]


@click.command()
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="The config2.yaml to look at. [default: those that MetaGPT reads]")  # fmt: skip
@click.option(
    "--offline", is_flag=True, help="Ask no server: the configuration, the installation and this machine only."
)
@click.option("--quick", is_flag=True, help="Ask the server, but measure nothing.")
@click.option("--write", is_flag=True, help="Write the settings that mend what was found, and keep a copy of the file.")
@click.option(
    "--tiers", is_flag=True, help="With --write: also the deadlines that fit the measured speed, as fixed tiers."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(config: Optional[Path], offline: bool, quick: bool, write: bool, tiers: bool, as_json: bool) -> None:
    """Find out what holds this machine back, and what mends it.

    Looks at config2.yaml, at MetaGPT's installation, at this machine and at the model server, and measures how fast the
    model reads and writes: that takes some seconds, and 30 at the most. The exit code is 0 where all is well, 1 where it
    works but is held back, and 2 where it cannot run.
    """
    if tiers and not write:
        raise click.UsageError("--tiers says what is written: it goes with --write")
    from metagpt_localllm.doctor import telling
    from metagpt_localllm.doctor.diagnosis import diagnose
    from metagpt_localllm.doctor.findings import exit_code

    def say(text: str) -> None:
        if not as_json:
            click.echo(click.style(f"… {text}", dim=True), err=True)

    try:
        found = diagnose(config, offline=offline, quick=quick, say=say)
    except KeyboardInterrupt:
        click.echo("\nStopped. Nothing was changed.", err=True)
        sys.exit(130)
    written = _write(found, tiers) if write else None
    if as_json:
        click.echo(json.dumps(telling.as_json(found, written), indent=2, ensure_ascii=False, default=str))
    else:
        click.echo(telling.as_text(found, min(shutil.get_terminal_size().columns, 110), written=written))
    sys.exit(exit_code(found.findings))


def _write(found: Diagnosis, tiers: bool) -> dict[str, Any]:
    """Writes the settings, and gives the measurement to ``auto``; what was done, in plain values."""
    from metagpt_localllm.config_file import ConfigFileError, set_values
    from metagpt_localllm.doctor.findings import shown
    from metagpt_localllm.doctor.timing import tiers_as_change
    from metagpt_localllm.state import state_at

    changes = [*found.changes]
    for subject in found.subjects if tiers else ():
        if not subject.settings.tiers:
            changes += tiers_as_change(subject, found.tiers.get(subject.about, []))
    values: dict[KeyPath, Any] = {change.steps: change.value for change in changes}
    settings = {change.path: shown(change.value) for change in changes}
    done: dict[str, Any] = {"settings": settings, "file": str(found.config), "backup": None, "samples": 0}
    if values:
        try:
            written = set_values(found.config, values)
        except ConfigFileError as error:
            raise click.ClickException(str(error)) from None
        done["backup"] = str(written.backup) if written.backup is not None else None
    for subject in found.subjects:
        samples = subject.measured.samples if subject.measured is not None else ()
        if samples:
            state = state_at(subject.settings.journal.path)
            for sample in samples:
                state.add_sample(subject.endpoint.address, subject.endpoint.model, sample.as_row())
            state.flush()
            done["samples"] += len(samples)
    return done
