"""The command ``metagpt-localllm``: a demonstration, the simulated server, and a check of the installation.

It must work where MetaGPT is missing or broken, to say so. Hence click rather than typer, whose old
version pinned by MetaGPT breaks on new releases of click, and hence the imports inside of functions.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Optional, Sequence

import click

from metagpt_localllm.runs import runs
from metagpt_localllm.stats import stats

__all__ = ["INSTALL_METAGPT", "METAGPT_KEYS", "OVERRIDES", "main", "metagpt_problems"]

#: What MetaGPT's own pins get wrong today: lancedb 0.4.0 is gone from PyPI, its typer breaks on click 8.2, and
#: lancedb's newest pyarrow wants NumPy 2 where MetaGPT pins 1.26.
OVERRIDES: tuple[str, ...] = ("lancedb>=0.14", "click<8.2", "pyarrow<21")
#: The command that installs a MetaGPT that works; the README has the same words.
INSTALL_METAGPT = "pip install uv && uv pip install --override metagpt-overrides.txt 'metagpt==0.8.2'"

#: The keys of an ``llm`` block that MetaGPT 0.8.2 and 1.0.0 know: importing it to ask takes 8 seconds.
METAGPT_KEYS = (
    "api_key", "api_type", "base_url", "api_version", "model", "pricing_plan", "access_key", "secret_key",
    "session_token", "endpoint", "app_id", "api_secret", "domain", "max_token", "temperature", "top_p", "top_k",
    "repetition_penalty", "stop", "presence_penalty", "frequency_penalty", "best_of", "n", "stream", "seed", "logprobs",
    "top_logprobs", "timeout", "context_length", "region_name", "proxy", "calc_usage", "compress_type",
    "use_system_prompt", "reasoning", "reasoning_max_token", "extra_fields",
)  # fmt: skip

_HOW_TO_INSTALL = (
    f"    printf '%s\\n' {' '.join(repr(line) for line in OVERRIDES)} > metagpt-overrides.txt\n    {INSTALL_METAGPT}"
)


def _version(name: str) -> Optional[str]:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _show_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"metagpt-localllm {_version('metagpt-localllm') or '(not installed)'}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
def main() -> None:
    """MetaGPT on slow local model servers."""


main.add_command(runs)
main.add_command(stats)

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
def demo(
    provider: str, output: Path, scale: Optional[float], idea: str, limit: float, verbose: bool
) -> None:
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
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Context window in tokens.")
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
        raise click.ClickException(f"port {options['port']}: {reason}. Choose another with --port (0 takes a free one).") from None


# ------------------------------------------------------------------------------------------------ check


@main.command()
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="The file to check. [default: ~/.metagpt/config2.yaml]")  # fmt: skip
@click.option("--offline", is_flag=True, help="Do not ask the servers.")
def check(config: Optional[Path], offline: bool) -> None:
    """Check config2.yaml, the installation and the server, without starting MetaGPT."""
    path = config or Path.home() / ".metagpt" / "config2.yaml"
    findings = [*_check_config(path, offline), *_check_metagpt(), *_check_hook()]
    for finding in findings:
        mark = click.style("ok   ", fg="green") if finding.fine else click.style("wrong", fg="red")
        first, *rest = finding.text.splitlines()
        click.echo("\n".join([f"{mark}  {first}", *(f"       {line}" for line in rest)]))
    if not all(finding.fine for finding in findings):
        sys.exit(1)


@dataclass(frozen=True)
class _Finding:
    fine: bool
    text: str


def _check_config(path: Path, offline: bool) -> list[_Finding]:
    import yaml
    from pydantic import ValidationError

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [_Finding(False, f"{path} does not exist: create it; the README has the four lines that it needs")]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        hint = "\nYAML takes no tabs: indent with blanks" if "\\t" in str(error) else ""
        return [_Finding(False, f"{path} cannot be read: {error}{hint}")]
    if not isinstance(loaded, dict) or not isinstance(loaded.get("llm"), dict):
        return [_Finding(False, f"{path}: there is no block 'llm'")]
    findings: list[_Finding] = []
    if "local" in loaded:
        findings.append(_Finding(False, "local: MetaGPT drops it there; it belongs under llm (llm.local): indent it"))
    try:
        _shape().model_validate(loaded)
    except ValidationError as error:
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            findings.append(_Finding(False, f"{'.'.join(map(str, problem['loc']))}: {message}"))
    blocks = _llm_blocks(loaded)
    for where, block in blocks:
        findings.extend(_Finding(False, f"{where}.{problem}") for problem in _block_problems(block))
    ours = {(str(block["base_url"]), str(block["model"])): block for _, block in blocks
            if block.get("api_type") == "local_llm" and block.get("base_url") and block.get("model")}  # fmt: skip
    if not findings and not ours:
        findings.append(_Finding(False, "nothing in it has api_type: local_llm, so MetaGPT uses its own providers"))
    if findings:
        return [_Finding(False, f"{path}:"), *findings]
    if not offline:
        findings = [_check_server(block) for block in ours.values()]
    return [_Finding(True, str(path)), *findings]


def _check_server(block: dict[str, Any]) -> _Finding:
    """Whether the server answers, what it is, and whether it has the model."""
    import asyncio

    from metagpt_localllm.servers import Ask, identify
    from metagpt_localllm.servers.base import entries
    from metagpt_localllm.transport import Endpoint

    endpoint = Endpoint(
        str(block["base_url"]), str(block["model"]), str(block.get("api_key") or ""), block.get("proxy") or None
    )

    async def look() -> tuple[Ask, list[str], Any]:
        ask, names = Ask(endpoint), []
        try:
            names = [str(entry.get("id")) for entry in entries(await asyncio.wait_for(ask.models(), 5), "data")]
        except Exception as error:  # said below, in words
            return ask, [], error
        return ask, names, (await identify(endpoint, (block.get("local") or {}).get("server", "auto"))).server

    ask, names, server = asyncio.run(look())
    where = f"llm.base_url {endpoint.address}"
    if isinstance(server, Exception):
        reason = str(server) or type(server).__name__
        if ask.connected:
            return _Finding(False, f"{where}: something answers there, but not as a model server does ({reason})")
        return _Finding(False, f"{where}: no server there ({reason}). Is it started, and is the address right?")
    if names and endpoint.model not in names and f"{endpoint.model}:latest" not in names:
        near = difflib.get_close_matches(endpoint.model, names, n=3, cutoff=0.0)
        return _Finding(False, f"{where}: it lists no model '{endpoint.model}', but {', '.join(near)} (llm.model)")
    window = f", context {server.facts.window:,} tokens" if server.facts.window else ", context unknown"
    hint = "" if server.facts.window else ": set llm.local.context.window to what is loaded"
    return _Finding(True, f"{where}: {server.name}, model {endpoint.model}{window}{hint}")


def _shape() -> Any:
    """A model like MetaGPT's ``Config`` as far as it concerns us, so that complaints have the same paths."""
    from pydantic import create_model, model_validator

    from metagpt_localllm.settings import LocalSettings, refuse_misplaced

    def check(value: Any) -> Any:
        if isinstance(value, dict) and value.get("api_type") == "local_llm":
            refuse_misplaced(value, [*METAGPT_KEYS, "local"])
        return value

    llm = create_model(
        "LLMConfig",
        __validators__={"check": model_validator(mode="before")(check)},  # type: ignore[dict-item]
        local=(Optional[LocalSettings], None),
    )
    role = create_model("RoleCustomConfig", llm=(Optional[llm], None))
    return create_model(
        "Config",
        llm=(llm, ...),
        models=(Optional[dict[str, llm]], None),  # type: ignore[valid-type]
        roles=(Optional[list[role]], None),  # type: ignore[valid-type]
    )


def _llm_blocks(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every block that sets up a model, with its path."""
    blocks: list[tuple[str, Any]] = [("llm", config.get("llm"))]
    blocks += [(f"models.{name}", block) for name, block in (config.get("models") or {}).items()]
    blocks += [
        (f"roles.{index}.llm", role.get("llm"))
        for index, role in enumerate(config.get("roles") or [])
        if isinstance(role, dict)
    ]
    return [(where, block) for where, block in blocks if isinstance(block, dict)]


def _block_problems(block: dict[str, Any]) -> list[str]:
    kind = str(block.get("api_type", ""))
    if kind != "local_llm":
        if difflib.get_close_matches(kind, ["local_llm"], cutoff=0.7):
            return [f"api_type: there is no '{kind}'; did you mean 'local_llm'?"]
        return ["local has no effect: api_type is not local_llm"] if "local" in block else []
    problems = []
    if not block.get("base_url"):
        problems.append("base_url is missing: it is the server's address, such as http://localhost:1234/v1")
    elif not str(block["base_url"]).startswith(("http://", "https://")):
        problems.append(f"base_url: {block['base_url']} is no address of the form http://host:port/v1")
    elif str(block["base_url"]).rstrip("/").endswith("/chat/completions"):
        problems.append("base_url ends in /chat/completions: leave that off")
    if not block.get("model"):
        problems.append("model is missing: it is the model's name as the server lists it at <base_url>/models")
    return problems


def metagpt_problems() -> list[str]:
    """What keeps MetaGPT from running here, in sentences with their remedy; empty where nothing does."""
    version = _version("metagpt")
    if version is None:
        return [f"MetaGPT is not installed in {sys.executable}. Install it with\n{_HOW_TO_INSTALL}"]
    problems = []
    if not (3, 9) <= sys.version_info[:2] < (3, 12):
        problems.append(f"MetaGPT needs Python 3.9 to 3.11; this is {sys.version.split()[0]}.")
    if _version("lancedb") is None:
        problems.append(f"lancedb, which MetaGPT imports, is missing. Install MetaGPT with\n{_HOW_TO_INSTALL}")
    if _at_least("click", (8, 2)) and not _at_least("typer", (0, 10)):
        problems.append(
            f"click {_version('click')} breaks typer {_version('typer')}, and with it every metagpt command "
            "(Secondary flag is not valid for non-boolean flag). Run\n    uv pip install 'click<8.2'"
        )
    return problems


def _at_least(package: str, wanted: Sequence[int]) -> bool:
    version = _version(package)
    if version is None:
        return False
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return tuple(numbers) >= tuple(wanted)


def _check_metagpt() -> list[_Finding]:
    problems = metagpt_problems()
    if problems:
        return [_Finding(False, problem) for problem in problems]
    from metagpt_localllm._register import SUPPORTED

    version = _version("metagpt")
    if version not in SUPPORTED:
        return [_Finding(False, f"MetaGPT {version} is not one of those this was tested with: {', '.join(SUPPORTED)}")]
    return [_Finding(True, f"MetaGPT {version}")]


def _check_hook() -> list[_Finding]:
    """Whether api_type: local_llm is known to every interpreter of this environment."""
    if os.environ.get("METAGPT_LOCALLLM_DISABLE"):
        return [_Finding(False, "METAGPT_LOCALLLM_DISABLE is set: MetaGPT will refuse api_type: local_llm")]
    probe = "import sys; sys.exit('metagpt_localllm.pth' not in [getattr(f, '__name__', '') for f in sys.meta_path])"
    active = subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0
    if active:
        return [_Finding(True, "api_type: local_llm is registered when Python starts")]
    return [
        _Finding(
            False,
            f"the hook does not run when {sys.executable} starts (its .pth file is not in site-packages);\n"
            "install this package with pip into the same environment as MetaGPT",
        )
    ]
