"""What can be said of a config2.yaml and of the server that it names, without MetaGPT and without a chat.

``metagpt-localllm check`` prints it, and ``metagpt-localllm doctor`` begins with it.
"""

from __future__ import annotations

import asyncio
import difflib
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import httpx
from pydantic import ValidationError, create_model, model_validator

from metagpt_localllm.config_file import ConfigFileError, content_of
from metagpt_localllm.installation import METAGPT_KEYS, Check
from metagpt_localllm.policies import named
from metagpt_localllm.quoting import quoted
from metagpt_localllm.servers import UNKNOWN, Ask, Loading, Server, identify
from metagpt_localllm.servers.base import Unanswered, entries
from metagpt_localllm.settings import LocalSettings, refuse_misplaced, shown_key
from metagpt_localllm.transport import Endpoint, is_address

__all__ = [
    "NOT_OURS", "NO_LIST", "Seen", "Trouble", "check_config", "config_problems", "endpoint_of", "is_listed", "llm_blocks",
    "nearest", "our_blocks", "see",
]  # fmt: skip

#: The problem of a configuration that does not use this package at all.
NOT_OURS = "nothing in it has api_type: local_llm, so MetaGPT uses its own providers"
#: Why an address is not that of the API.
NO_LIST = "there is no list of models at <base_url>/models; if that is meant to be so, set llm.local.server: plain"
#: Seconds for the list of models.
_LIMIT = 5.0
#: Models of a list that are looked at, and characters of a name.
_NAMES, _NAME = 1000, 200


def check_config(path: Path, offline: bool) -> list[Check]:
    """The file, and the servers that it names unless ``offline``."""
    try:
        loaded = content_of(path)
    except ConfigFileError as error:
        return [Check(False, str(error))]
    if loaded is None:
        return [Check(False, f"{path} does not exist: create it; the README has the four lines that it needs")]
    if not isinstance(loaded.get("llm"), dict):
        return [Check(False, f"{path}: there is no block 'llm'")]
    problems = config_problems(loaded)
    if problems:
        return [Check(False, f"{path}:"), *(Check(False, problem) for problem in problems)]
    checks = [Check(True, str(path))]
    if not offline:
        for where, block in our_blocks(loaded):
            server = (block.get("local") or {}).get("server", "auto")
            seen = asyncio.run(see(endpoint_of(block), server))
            checks.append(Check(seen.trouble is None, seen.sentence(where)))
    return checks


def config_problems(loaded: Mapping[str, Any]) -> list[str]:
    """What is wrong with a configuration whose ``llm`` is a mapping, each with its path; no value of a key is in it."""
    problems: list[str] = []
    if "local" in loaded:
        problems.append("local: MetaGPT drops it there; it belongs under llm (llm.local): indent it")
    try:
        _shape().model_validate(loaded)
    except ValidationError as error:
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{_short('.'.join(map(shown_key, problem['loc'])))}: {message}")
    for where, block in llm_blocks(loaded):
        problems.extend(f"{_short(where)}.{problem}" for problem in _block_problems(block))
    if not problems and not our_blocks(loaded):
        problems.append(NOT_OURS)
    return problems


def our_blocks(loaded: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The blocks that set up a model for this package, with their paths; the first of each server and model."""
    ours: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
    for where, block in llm_blocks(loaded):
        if block.get("api_type") == "local_llm" and block.get("base_url") and block.get("model"):
            ours.setdefault((str(block["base_url"]), str(block["model"])), (where, block))
    return list(ours.values())


def endpoint_of(block: Mapping[str, Any]) -> Endpoint:
    """Where the model of such a block is served."""
    key, proxy = str(block.get("api_key") or ""), block.get("proxy") or None
    return Endpoint(str(block["base_url"]), str(block["model"]), key, proxy)


class Trouble(enum.Enum):
    """Why a server cannot be used as it is configured."""

    NO_SERVER = "no server there"
    NO_MODEL_SERVER = "something answers there, but no model server"
    NEEDS_KEY = "wants a key"
    LOADING = "still loads its model"
    NO_SUCH_MODEL = "no such model"


@dataclass(frozen=True)
class Seen:
    """A server as it was found.

    Attributes:
        server: what it is; UNKNOWN where there is trouble with it.
        names: of the models that it lists.
        trouble: what is wrong, or None.
        reason: as the library has it, for NO_SERVER and NO_MODEL_SERVER.
    """

    endpoint: Endpoint
    server: Server = UNKNOWN
    names: tuple[str, ...] = ()
    trouble: Optional[Trouble] = None
    reason: str = ""

    @property
    def near(self) -> list[str]:
        """The models that it has whose names are most like the one that was asked for."""
        return nearest(self.endpoint.model, self.names)

    def sentence(self, about: str) -> str:
        """For people; ``about``: path of the block that names the server, such as ``llm``."""
        where, model, facts = f"{about}.base_url {self.endpoint.address}", self.endpoint.model, self.server.facts
        if self.trouble is Trouble.NO_SERVER:
            return f"{where}: no server there ({self.reason}). Is it started, and is the address right?"
        if self.trouble is Trouble.NO_MODEL_SERVER:
            return f"{where}: something answers there, but not as a model server does ({self.reason})"
        if self.trouble is Trouble.NEEDS_KEY:
            return f"{where}: it refuses the API key, or wants one ({about}.api_key)"
        if self.trouble is Trouble.LOADING:
            return f"{where}: it is loading its model; try again when it is done"
        if self.trouble is Trouble.NO_SUCH_MODEL:
            near = ", ".join(quoted(name, self.endpoint.api_key) for name in self.near)
            return f"{where}: it lists no model '{model}', but {near} ({about}.model)"
        window = f", context {facts.window:,} tokens" if facts.window else ", context unknown"
        hint = "" if facts.window else f": set {about}.local.context.window to what is loaded"
        return f"{where}: {self.server.name}, model {model}{window}{hint}"


async def see(endpoint: Endpoint, named: str = "auto", limit: float = _LIMIT) -> Seen:
    """Looks whether the server answers, what it is, and whether it has the model. Never raises.

    Args:
        named: ``llm.local.server``.
        limit: seconds for its list of models.
    """
    ask = Ask(endpoint)
    try:
        listing = await asyncio.wait_for(ask.models(), limit)
    except Loading:
        return Seen(endpoint, trouble=Trouble.LOADING)
    except Unanswered as error:
        locked = str(error) in ("401", "403") or (await identify(endpoint, named)).server.locked
        trouble = Trouble.NEEDS_KEY if locked else Trouble.NO_MODEL_SERVER
        return Seen(endpoint, trouble=trouble, reason=f"status {error}" if str(error).isdigit() else str(error))
    except asyncio.TimeoutError:
        reason = f"no answer within {limit:g} s"
        return Seen(endpoint, trouble=Trouble.NO_MODEL_SERVER if ask.connected else Trouble.NO_SERVER, reason=reason)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        # Not the text of what httpx says of a header: it quotes the key.
        odd = isinstance(error, (httpx.LocalProtocolError, UnicodeError))
        reason = "odd characters in llm.api_key or the address" if odd else quoted(str(error), endpoint.api_key) or type(error).__name__
        return Seen(endpoint, trouble=Trouble.NO_MODEL_SERVER if ask.connected else Trouble.NO_SERVER, reason=reason)
    server = (await identify(endpoint, named)).server
    if listing is None and server.locked and ask.code != 404:
        return Seen(endpoint, server, trouble=Trouble.NEEDS_KEY, reason="without a list of models")
    # Some kinds are known by what they answer beside the API: that does not show that the API is at this address.
    if listing is None and server.lists and named != Server.name:
        return Seen(endpoint, trouble=Trouble.NO_MODEL_SERVER, reason=NO_LIST)
    # That many, and of that length, are shown and compared.
    names = tuple(str(entry.get("id"))[:_NAME] for entry in entries(listing, "data")[:_NAMES])
    missing = names and not is_listed(endpoint.model, names)
    return Seen(endpoint, server, names, Trouble.NO_SUCH_MODEL if missing else None)


def is_listed(model: str, names: Sequence[str]) -> bool:
    """Whether a server that lists these has the model. Ollama takes a name without its tag for ``:latest``."""
    return model in names or f"{model}:latest" in names


def nearest(model: str, names: Sequence[str]) -> list[str]:
    """Up to three of the names, those first that are most like the model's."""
    return difflib.get_close_matches(model, names, n=3, cutoff=0.0)


def _shape() -> Any:
    """A model like MetaGPT's ``Config`` as far as it concerns us, so that complaints have the same paths."""

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


def llm_blocks(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every block that sets up a model, with its path; what has not the form of one is left out."""
    models, roles = config.get("models"), config.get("roles")
    blocks: list[tuple[str, Any]] = [("llm", config.get("llm"))]
    if isinstance(models, dict):
        blocks += [(f"models.{name}", block) for name, block in models.items()]
    if isinstance(roles, list):
        blocks += [(f"roles.{index}.llm", role.get("llm")) for index, role in enumerate(roles) if isinstance(role, dict)]
    return [(where, block) for where, block in blocks if isinstance(block, dict)]


def _short(value: Any) -> str:
    """In one short line."""
    return quoted(str(value)[:_NAME])


def _block_problems(block: dict[str, Any]) -> list[str]:
    kind = _short(block.get("api_type", ""))
    if kind != "local_llm":
        if difflib.get_close_matches(kind, ["local_llm"], cutoff=0.7):
            return [f"api_type: there is no '{kind}'; did you mean 'local_llm'?"]
        return ["local has no effect: api_type is not local_llm"] if "local" in block else []
    problems = []
    if not block.get("base_url"):
        problems.append("base_url is missing: it is the server's address, such as http://localhost:1234/v1")
    elif not is_address(str(block["base_url"]), "http", "https"):
        problems.append(f"base_url: {_short(block['base_url'])} is no address of the form http://host:port/v1")
    elif str(block["base_url"]).rstrip("/").endswith("/chat/completions"):
        problems.append("base_url ends in /chat/completions: leave that off")
    if not block.get("model"):
        problems.append("model is missing: it is the model's name as the server lists it at <base_url>/models")
    return problems + _policy_problems(block.get("local"))


def _policy_problems(local: Any) -> list[str]:
    """A policy of the user's own is imported when a provider is made, and not with the other settings."""
    context = local.get("context") if isinstance(local, dict) else None
    policy = context.get("policy") if isinstance(context, dict) else None
    if isinstance(policy, str) and ":" in policy:
        try:
            named(policy)
        except ValueError as error:
            return [f"local.context.policy: {quoted(str(error))}"]
    return []
