"""The command ``metagpt-localllm``. ``demo``, ``simulate`` and ``check`` are here, each other command in the module of its name.

It must work where MetaGPT is missing or broken, to say so. Hence click rather than typer, whose old
version pinned by MetaGPT breaks on new releases of click, and hence the imports inside of functions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Optional

import click

from metagpt_localllm.doctor import doctor
from metagpt_localllm.init import init
from metagpt_localllm.installation import installed_version, metagpt_problems
from metagpt_localllm.report import report
from metagpt_localllm.runs import runs
from metagpt_localllm.stats import stats

__all__ = ["main"]


def _show_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"metagpt-localllm {installed_version('metagpt-localllm') or '(not installed)'}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
def main() -> None:
    """MetaGPT on slow local model servers."""


main.add_command(runs)
main.add_command(report)
main.add_command(stats)
main.add_command(doctor)
main.add_command(init)

# ------------------------------------------------------------------------------------------------ demo


@main.command()
@click.option("--provider", type=click.Choice(["local_llm", "openai"]), default="local_llm", show_default=True,
              help="Which provider MetaGPT uses: this package's, or its own for comparison.")  # fmt: skip
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-project"),
              show_default=True, help="Where the project is left.")  # fmt: skip
@click.option("--scale", type=click.FloatRange(min=1), default=None,
              help="How many times faster than a real desktop. [default: as much as makes it last a minute]")  # fmt: skip
@click.option("--idea", default="Write a command line snake game", show_default=True,
              help="What MetaGPT is asked for; the simulated model writes a snake game whatever it is.")  # fmt: skip
@click.option("--limit", type=click.FloatRange(min=1), default=120.0, show_default=True,
              help="Seconds after which the run is ended.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="Show all that MetaGPT prints.")
def demo(provider: str, output: Path, scale: Optional[float], idea: str, limit: float, verbose: bool) -> None:
    """Run MetaGPT's software company on a simulated 34B model on a desktop, with faults.

    Needs MetaGPT, but neither a model nor a network: the server is simulated, on a real socket.
    """
    problems = metagpt_problems()
    if problems:
        raise click.ClickException("\n".join(problems))
    from metagpt_localllm.demo import DemoOptions, run_demo

    options = DemoOptions(provider, output, scale, idea, limit, verbose)
    try:
        sys.exit(run_demo(options))
    except FileExistsError as error:
        raise click.BadParameter(str(error), param_hint="--output") from None


# -------------------------------------------------------------------------------------------- simulate


class _FaultKindsInHelp(click.Command):
    """Puts the kinds of faults and the ways of long prompts below the options, read from where they are defined."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from metagpt_localllm.simulator import KINDS, TOO_LONG

        with formatter.section("A prompt over the context"):
            formatter.write_dl([(way, what) for way, what in TOO_LONG.items() if way])
        with formatter.section("Faults"):
            formatter.write_dl(sorted(KINDS.items()))
        super().format_epilog(ctx, formatter)


@main.command(cls=_FaultKindsInHelp)
@click.option("--dialect", default="llama.cpp", show_default=True, help="Which server it answers like.")
@click.option("--model", default="codebooga-34b", show_default=True, help="Name of the model.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--scale", type=click.FloatRange(min=0.001), default=1.0, show_default=True,
              help="How many times faster than real time.")  # fmt: skip
@click.option(
    "--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Context window in tokens."
)
@click.option("--prefill-speed", type=click.FloatRange(min=0.001), default=40.0, show_default=True,
              help="Prompt tokens per second.")  # fmt: skip
@click.option("--decode-speed", type=click.FloatRange(min=0.001), default=3.0, show_default=True,
              help="Answer tokens per second.")  # fmt: skip
@click.option("--load-time", default="0s", show_default=True, help="Until the model is loaded, e.g. 90s or 2m.")
@click.option("--slots", type=click.IntRange(min=1), default=1, show_default=True, help="Requests served at once.")
@click.option("--too-long", metavar="WAY",
              help="What becomes of a prompt over the context, see below. [default: as the dialect does]")  # fmt: skip
@click.option("--tells-window/--hides-window", default=True, show_default=True,
              help="Whether it says how large its context is.")  # fmt: skip
@click.option("--fault", "faults", multiple=True, metavar="TEXT", help="A fault, see below; may be repeated.")
def simulate(**options: Any) -> None:
    """Serve a simulated slow model on an OpenAI-compatible address until Ctrl-C."""
    from metagpt_localllm.settings import parse_duration
    from metagpt_localllm.simulator import serve

    try:
        options["load_time"] = parse_duration(options["load_time"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--load-time") from None
    try:
        serve(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise click.ClickException(
            f"port {options['port']}: {reason}. Choose another with --port (0 takes a free one)."
        ) from None


# ------------------------------------------------------------------------------------------------ check


@main.command()
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="The file to check. [default: ~/.metagpt/config2.yaml]")  # fmt: skip
@click.option("--offline", is_flag=True, help="Do not ask the servers.")
def check(config: Optional[Path], offline: bool) -> None:
    """Check config2.yaml, the installation and the server, without starting MetaGPT."""
    from metagpt_localllm.checking import check_config
    from metagpt_localllm.config_file import user_config
    from metagpt_localllm.installation import check_hook, check_metagpt

    path = config or user_config()
    checks = [*check_config(path, offline), *check_metagpt(), *check_hook()]
    for one in checks:
        mark = click.style("ok   ", fg="green") if one.fine else click.style("wrong", fg="red")
        first, *rest = one.text.splitlines()
        click.echo("\n".join([f"{mark}  {first}", *(f"       {line}" for line in rest)]))
    if not all(one.fine for one in checks):
        sys.exit(1)
