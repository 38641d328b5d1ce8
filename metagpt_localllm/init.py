"""The command ``metagpt-localllm init``: four questions, and a config2.yaml with which MetaGPT runs."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Optional

import click

from metagpt_localllm.checking import is_listed, nearest
from metagpt_localllm.config_file import (
    ConfigFileError,
    FileChange,
    apply,
    config_files,
    content_of,
    propose,
    propose_values,
    read,
    user_config,
)
from metagpt_localllm.config_text import parsed, with_values
from metagpt_localllm.installation import installed_version, metagpt_problems
from metagpt_localllm.scanning import Found, completed, facts_of_models, is_chat_model, look_at, same_server, scan
from metagpt_localllm.servers import Facts, Server, identify
from metagpt_localllm.servers.base import positive
from metagpt_localllm.settings import parse_duration
from metagpt_localllm.transport import Endpoint, without_login

__all__ = ["init"]

#: How the common servers are started, with a context that MetaGPT can use.
HOW_TO_START = """\
No model server answers on this machine at the usual ports. Start one of these, and press Enter:

  Ollama       ollama pull qwen2.5-coder:7b
               OLLAMA_CONTEXT_LENGTH=16384 ollama serve
  LM Studio    lms server start
               lms load MODEL --context-length 16384
  llama.cpp    llama-server -m model.gguf -c 16384 -np 1
  vLLM         vllm serve MODEL --max-model-len 16384
"""
#: MetaGPT's own default of ``llm.max_token``; room for the thoughts of a model that thinks.
_ANSWER, _ANSWER_OF_THINKERS = 4096, 8192
_THINKERS = ("qwq", "-r1", "think", "reason", "magistral", "gpt-oss")
#: Not an option: everybody on the machine can read those.
_KEY_VARIABLE = "METAGPT_LOCALLLM_API_KEY"

_TEMPLATE = """\
# MetaGPT's settings for a model on your own machine, written by: metagpt-localllm init
# Check them with: metagpt-localllm check
llm:
  api_type: local_llm                      # MetaGPT asks through metagpt-localllm
  base_url: x                              # where the server is
  model: x                                 # the model, as the server calls it
{key}  max_token: x                             # the longest answer that is asked for, in tokens
  local:
    timeouts:
      total: x                             # the longest time for one answer; auto: learned from how fast the server is
"""
_KEY_LINE = "  api_key: x                               # the server wants it; keep this file to yourself\n"


@dataclass(frozen=True)
class _Answers:
    """What was answered, or said on the command line; None: not yet."""

    base_url: Optional[str] = None
    model: Optional[str] = None
    max_token: Optional[int] = None
    longest: Optional[str] = None


class _Length(click.ParamType):
    """A duration as config2.yaml takes it, or ``auto``."""

    name = "duration"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> str:
        text = str(value).strip()
        if text != "auto":
            try:
                if parse_duration(text) == 0:
                    raise ValueError("it must be above zero; auto learns it")
            except ValueError as error:
                self.fail(str(error), param, ctx)
        return text


@click.command()
@click.option("--base-url", metavar="URL", help="The server's address, such as http://localhost:1234/v1.")
@click.option("--model", metavar="NAME", help="The model, as the server lists it.")
@click.option("--max-token", type=click.IntRange(min=1), help="The longest answer, in tokens.")
@click.option("--longest", type=_Length(), help="The longest time for one answer, such as 2h; auto learns it.")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="The file to write. [default: ~/.metagpt/config2.yaml]")  # fmt: skip
@click.option("--yes", "-y", is_flag=True, help="Ask nothing: take what is found and the defaults.")
@click.option("--force", is_flag=True, help="Change a file that exists without asking; a copy is kept.")
def init(
    base_url: Optional[str], model: Optional[str], max_token: Optional[int], longest: Optional[str],
    config: Optional[Path], yes: bool, force: bool,
) -> None:  # fmt: skip
    """Find the model server on this machine and write MetaGPT's config2.yaml.

    Asks four questions; pressing Enter takes the answer in brackets. What is given as an option is not asked. Where
    the server wants an API key, it is asked for too, or taken from METAGPT_LOCALLLM_API_KEY.
    """
    path = config or user_config()
    given = _Answers(base_url, model, max_token, longest)
    try:
        old = _llm_of(path)
        _Setup(path, given, os.environ.get(_KEY_VARIABLE, ""), old, ask=not yes, force=force).run()
    except ConfigFileError as error:
        raise click.ClickException(str(error)) from None


def _llm_of(path: Path) -> Mapping[str, Any]:
    """The ``llm`` block that is there already.

    Raises:
        ConfigFileError: the file cannot be read, or does not parse.
    """
    try:
        block = (content_of(path) or {}).get("llm")
    except ConfigFileError as error:
        raise ConfigFileError(f"{error}\nMend it, or move it away, and run this again") from None
    return block if isinstance(block, dict) else {}


class _Setup:
    """One run of the command: the questions in their order, then the file."""

    def __init__(
        self, path: Path, given: _Answers, key: str, old: Mapping[str, Any], *, ask: bool, force: bool
    ) -> None:
        self._path, self._given, self._old, self._ask, self._force = path, given, old, ask, force
        self._key = key

    def run(self) -> None:
        found = self._unlocked(self._server())
        if same_server(found.base_url, self._old.get("base_url")):
            found = replace(found, base_url=str(self._old["base_url"]))
        model = self._model(found)
        max_token = self._given.max_token or self._max_token(model)
        longest = self._given.longest or self._longest()
        change = self._change(_Answers(found.base_url, model, max_token, longest))
        self._write(change)
        self._advise(found, model)

    # -------------------------------------------------------------------------------------------- questions

    def _server(self) -> Found:
        """The first question: which server."""
        if self._given.base_url:
            named = self._by_hand(self._given.base_url)
            if named is None:
                raise click.Abort()
            return named
        while True:
            click.echo("Looking for model servers on this machine ...")
            found = asyncio.run(scan())
            chosen = self._chosen(found) if found else self._none_found()
            if chosen is not None:
                return chosen

    def _none_found(self) -> Optional[Found]:
        click.echo(HOW_TO_START)
        if not self._ask:
            raise click.ClickException("no model server was found; start one, or say where it is with --base-url")
        address = click.prompt("Its address, if it is elsewhere (Enter looks again)", default="", show_default=False)
        return self._by_hand(address) if address.strip() else None

    def _chosen(self, found: list[Found]) -> Optional[Found]:
        """One of those that were found, or one at an address by hand; None: look again."""
        known = [number for number, what in enumerate(found) if same_server(what.base_url, self._old.get("base_url"))]
        default = known[0] if known else 0
        if not self._ask:
            click.echo(f"Server: {_described(found[default])}")
            return self._ready(found[default])
        for number, what in enumerate(found, 1):
            click.echo(f"  {number}  {_described(what)}")
        click.echo("  or the address of another one, such as http://192.168.1.5:1234/v1")
        answer = click.prompt("1/4  Which server?", default=str(default + 1)).strip()
        if not answer.isdecimal():
            return self._by_hand(answer)
        return self._ready(found[int(answer) - 1]) if 1 <= int(answer) <= len(found) else None

    def _ready(self, found: Found) -> Optional[Found]:
        """None while it loads its model."""
        if not found.loading:
            return found
        if not self._ask:
            raise click.ClickException("it is loading its model; run this again when it is done")
        click.echo("It is loading its model, which may take minutes. Choose it again when it is done.")
        return None

    def _by_hand(self, address: str) -> Optional[Found]:
        """What is at an address that somebody gave, which may be off; None where it is not wanted then."""
        try:
            address = completed(address)
        except ValueError as error:
            if not self._ask:
                raise click.BadParameter(str(error), param_hint="--base-url") from None
            click.echo(error)
            return None
        tried = [address] if address.endswith("/v1") else [f"{address}/v1", address]
        for base_url in tried:
            found = asyncio.run(look_at(Endpoint(base_url, self._given.model or "", self._key_for(base_url)), 5.0))
            if found is not None:
                return found
        click.echo(f"No model server answers at {without_login(tried[0])} now.")
        if not self._ask and not self._given.model:
            raise click.ClickException("start it first, or give its --model, too: then the file is written as you say")
        if self._ask and not click.confirm("Write it down all the same?", default=False):
            return None
        return Found(tried[0], "plain")

    def _key_for(self, base_url: str) -> str:
        """The key to ask with: the one given, or that of the file where it is this server's."""
        same = self._old.get("api_type") == "local_llm" and same_server(base_url, self._old.get("base_url"))
        return self._key or (str(self._old.get("api_key") or "") if same else "")

    def _unlocked(self, found: Found) -> Found:
        """The server with its models, where it wants a key for them; the key is asked for then only."""
        if not found.needs_key:
            return found
        key = self._key_for(found.base_url)
        for _ in range(3):
            if key:
                self._key = key
                seen = asyncio.run(look_at(Endpoint(found.base_url, "", key), 5.0))
                if seen is not None and not seen.needs_key:
                    return seen
                click.echo("The server does not take this API key.")
            if not self._ask:
                break
            key = click.prompt("The server wants an API key (it is not shown)", hide_input=True).strip()
        raise click.ClickException("the server wants an API key: set METAGPT_LOCALLLM_API_KEY to it and run this again")

    def _model(self, found: Found) -> str:
        """The second question: which model."""
        models = list(found.models)
        facts = asyncio.run(facts_of_models(found, self._key))
        loaded = [name for name in models if name in facts and facts[name].loaded and is_chat_model(name)]
        before = [name for name in models if name == self._old.get("model")]
        default = next(iter(before or loaded or models), None)
        if self._given.model:
            if models and not is_listed(self._given.model, models):
                near = ", ".join(nearest(self._given.model, models))
                raise click.ClickException(f"the server lists no model '{self._given.model}', but {near}")
            return self._given.model
        if not self._ask:
            if default is None:
                raise click.ClickException("the server lists no model; say which it is with --model")
            click.echo(f"Model: {default}")
            return default
        if not models:
            click.echo("The server lists no model" + (": get one with `ollama pull NAME`." if found.kind == "ollama" else "."))
        for number, name in enumerate(models, 1):
            click.echo(f"  {number}  {name}{_loaded(facts.get(name))}")
        usual = str(models.index(default) + 1) if default is not None else None
        while True:
            answer = str(click.prompt("2/4  Which model?", default=usual)).strip()
            if answer.isdecimal() and 1 <= int(answer) <= len(models):
                return models[int(answer) - 1]
            if answer and (not models or is_listed(answer, models)):
                return answer
            click.echo("It is none of these; answer with a number or a name from the list.")

    def _max_token(self, model: str) -> int:
        """The third question: how long answers may be."""
        default = _ANSWER_OF_THINKERS if any(part in model.lower() for part in _THINKERS) else _ANSWER
        default = positive(self._old.get("max_token")) or default
        if not self._ask:
            return default
        click.echo("A file of code takes up to 4000 tokens; a model that thinks before it answers needs 8000 or more.")
        return int(click.prompt("3/4  The longest answer, in tokens?", default=default, type=click.IntRange(min=1)))

    def _longest(self) -> str:
        """The fourth question: how long to wait."""
        default = str(_at(self._old, "local", "timeouts", "total") or "auto")
        if not self._ask:
            return default
        click.echo("How long to wait is learned from how fast your server is. Say a time, such as 2h, to set a limit.")
        return str(click.prompt("4/4  The longest time for one answer?", default=default, type=_Length()))

    # -------------------------------------------------------------------------------------------- the file

    def _change(self, answers: _Answers) -> FileChange:
        values: dict[Any, Any] = {
            "llm.api_type": "local_llm", "llm.base_url": answers.base_url, "llm.model": answers.model,
            "llm.max_token": answers.max_token, "llm.local.timeouts.total": answers.longest,
        }  # fmt: skip
        text = read(self._path) or ""
        if not text.strip():
            if self._key:
                values["llm.api_key"] = self._key
            return propose(self._path, with_values(_TEMPLATE.format(key=_KEY_LINE if self._key else ""), values))
        old = self._old
        if answers.longest == "auto" and _at(old, "local", "timeouts", "total") is None:
            del values["llm.local.timeouts.total"]
        elif answers.longest == str(_at(old, "local", "timeouts", "total")):
            del values["llm.local.timeouts.total"]  # it may be a number
        moved = old.get("api_type") != "local_llm" or old.get("base_url") != answers.base_url
        if self._key:
            values["llm.api_key"] = self._key
        elif moved and old.get("api_key"):
            values["llm.api_key"] = "not-needed"  # another server's key is not for this one
        if not old and "llm" in parsed(text):
            values = {"llm": _nested(values)}
        return propose_values(self._path, values)

    def _write(self, change: FileChange) -> None:
        if not change.changes:
            click.echo(f"\n{self._path} says all this already; it is left as it is.")
            return
        if change.before is not None and change.before.strip():
            click.echo(f"\n{self._path} is there already. This would change:\n\n{change.diff}\n")
            if not self._force:
                if not self._ask:
                    raise click.ClickException("nothing was written; --force writes it, and keeps a copy")
                if not click.confirm("Change it? A copy of it is kept.", default=True):
                    raise click.Abort()
        done = apply(change)
        click.echo(f"\nWritten: {self._path}" + (f" (as it was: {done.backup})" if done.backup else ""))

    def _advise(self, found: Found, model: str) -> None:
        """What to do next, and what will trouble."""
        from metagpt_localllm.doctor.fitting import wanted_window  # psutil, which the questions need not wait for

        version = installed_version("metagpt")
        server = asyncio.run(_server_of(found, model, self._key)) if found.models or found.kind != "plain" else None
        wanted = wanted_window(version).good
        window = server.facts.window if server is not None else None
        if server is not None and window is not None and window < wanted:
            click.echo(
                f"\nThe model has a context of {window:,} tokens, and MetaGPT's prompts are often longer: they are "
                f"shortened then. Better are {wanted:,}. {server.remedy(wanted)}"
            )
        if self._old.get("timeout") and self._old.get("api_type") != "local_llm":
            click.echo(
                f"\nllm.timeout: {self._old['timeout']} in the file ends each answer after so many seconds, which is "
                "early for a slow model; delete that line to have it learned."
            )
        read_by_metagpt = [path.absolute() for path in config_files()]
        if self._path.absolute() not in read_by_metagpt:
            click.echo(f"\nMetaGPT reads {read_by_metagpt[0]}, not this file: copy it there to use it.")
        elif self._path.absolute() != read_by_metagpt[0] and read_by_metagpt[0].exists():
            click.echo(f"\nMetaGPT reads {read_by_metagpt[0]} as well, and that one wins.")
        for problem in metagpt_problems():
            click.echo(f"\n{problem}")
        rounds = " --n-round 20" if (version or "").startswith("1.") else ""
        click.echo(
            "\nNext:\n  metagpt-localllm doctor" + (f" --config {self._path}" if self._path != user_config() else "")
            + f'\n  metagpt{rounds} "Write a command line snake game"'
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ about servers


async def _server_of(found: Found, model: str, key: str) -> Server:
    return (await identify(Endpoint(found.base_url, model, key))).server


def _described(found: Found) -> str:
    name = {"plain": "a server with the OpenAI API"}.get(found.kind, found.kind)
    if found.needs_key:
        return f"{name} at {found.base_url}, wants an API key"
    if found.loading:
        return f"{name} at {found.base_url}, is loading its model"
    first, more = next(iter(found.models), "no model"), len(found.models) - 1
    return f"{name} at {found.base_url}: {first}{f' and {more} more' if more > 0 else ''}"


def _loaded(facts: Optional[Facts]) -> str:
    parts = ["loaded"] if facts and facts.loaded else []
    parts += [f"context {facts.window:,} tokens"] if facts and facts.window else []
    return f"  ({', '.join(parts)})" if parts else ""


def _at(block: Any, *keys: str) -> Any:
    for key in keys:
        block = block.get(key) if isinstance(block, Mapping) else None
    return block


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"llm.local.x": 1}`` as ``{"local": {"x": 1}}``."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *way, last = path.split(".")[1:]
        inner = nested
        for step in way:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return nested
