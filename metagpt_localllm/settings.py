"""The settings below ``llm.local`` in config2.yaml: what they are called, their units and defaults.

This is the edge: YAML is checked here once, with the key's whole path in every complaint, and only
frozen, typed values go further.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictStr,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Annotated

from metagpt_localllm.quoting import quoted

__all__ = [
    "Backoff",
    "ContextSettings",
    "JournalSettings",
    "KeepSettings",
    "LocalSettings",
    "Match",
    "ProgressSettings",
    "RetrySettings",
    "TelemetrySettings",
    "Tier",
    "Timeouts",
    "format_duration",
    "parse_duration",
    "refuse_misplaced",
    "shown_key",
]

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
#: Characters that a duration, a size or the name of a key may have; of other text so many are quoted.
_LONGEST, _QUOTED = 60, 60
#: Seconds of the longest duration (30,000 years), and the largest number of tokens or requests.
_LONGEST_TIME, _LARGEST = 1e12, 10**9


def _shown(value: object) -> str:
    """A value in a complaint about it: in one short line, however long or deep it is."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a value of the type {type(value).__name__}"
    try:
        text = repr(value[:_QUOTED] if isinstance(value, (str, bytes)) else value)
    except ValueError:  # an int of thousands of digits
        return "a number of thousands of digits"
    return f"{text[:_QUOTED]}…" if len(text) > _QUOTED else text


def parse_duration(value: object) -> float:
    """A length of time in seconds, from a number of seconds or from text such as ``"90s"``, ``"10m"``, ``"1h30m"``.

    Raises:
        ValueError: not a duration, negative, or over 30,000 years.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{_shown(value)} is not a duration; write seconds (90) or text (90s, 10m, 2h)")
    if isinstance(value, str):
        text = value.strip().lower() if len(value) <= _LONGEST else ""
        if re.fullmatch(r"-?\d+(\.\d+)?", text):
            seconds = float(text)
        elif text and not _PART.sub("", text).strip():
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
        elif text.startswith("-") and not _PART.sub("", text[1:]).strip():
            raise ValueError(f"{_shown(value)} is negative; a duration is never below zero")
        else:
            raise ValueError(f"{_shown(value)} is not a duration; write seconds (90) or text (90s, 10m, 2h)")
    else:
        try:
            seconds = float(value)
        except OverflowError:
            raise ValueError("that is not a finite duration") from None
    if seconds != seconds or seconds == float("inf"):
        raise ValueError(f"{_shown(value)} is not a finite duration")
    if seconds < 0:
        raise ValueError(f"{_shown(value)} is negative; a duration is never below zero")
    if seconds > _LONGEST_TIME:
        raise ValueError(f"{_shown(value)} is over 30,000 years; leave the key out for the default")
    return seconds


def format_duration(seconds: float) -> str:
    """``seconds`` as a user would write them: 90s, 10m, 2h."""
    for unit in ("h", "m"):
        if seconds >= _UNITS[unit] and seconds % _UNITS[unit] == 0:
            return f"{seconds / _UNITS[unit]:g}{unit}"
    return f"{seconds:g}s"


def _positive_duration(value: object) -> float:
    seconds = parse_duration(value)
    if seconds == 0:
        raise ValueError("a deadline of zero would end every call at once; leave the key out for the default")
    return seconds


def _auto_or_duration(value: object) -> object:
    return value if value == "auto" else _positive_duration(value)


def _whole_number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{_shown(value)} is not a whole number")
    if abs(value) > _LARGEST:
        raise ValueError(f"{_shown(value)} is over {_LARGEST:,}")
    return value


def _names(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _printable(value: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError(f"{_shown(value)} holds characters that cannot be shown")
    return value


def _glob(value: str) -> str:
    try:
        re.compile(fnmatch.translate(value))
    except re.error as error:  # "[z-a]" before Python 3.10.5
        raise ValueError(f"{_shown(value)} is no pattern ({error})") from None
    return value


def _file(value: str) -> str:
    try:
        os.fsencode(Path(_printable(value)).expanduser())
    except (ValueError, RuntimeError):  # half a character; the home of a user that there is not
        raise ValueError(f"{_shown(value)} is no path of a file") from None
    if not value.strip():
        raise ValueError("that is no path of a file")
    return value


Seconds = Annotated[float, BeforeValidator(parse_duration)]
Deadline = Annotated[float, BeforeValidator(_positive_duration)]
#: Learned from how fast the server has been, or as the user says.
LearnedDeadline = Annotated[Union[Literal["auto"], float], BeforeValidator(_auto_or_duration)]
Count = Annotated[int, BeforeValidator(_whole_number)]
Name = Annotated[StrictStr, Field(max_length=300), AfterValidator(_printable)]
FilePath = Annotated[StrictStr, Field(max_length=4000), AfterValidator(_file)]
Globs = Annotated[List[Annotated[Name, AfterValidator(_glob)]], BeforeValidator(_names), Field(min_length=1)]


def shown_key(key: object) -> str:
    """A key as it may be shown: YAML takes any value for one, of any length, over several lines.

    What follows a colon in it is left out: it may be a value whose blank is missing, as in ``{api_key:sk-…}``.
    """
    text = quoted(key) if isinstance(key, str) else _shown(key)
    text, colon, _ = text.partition(":")
    return f"{text[:_LONGEST]}{colon}…" if colon or len(text) > _LONGEST else text


def _complain(title: str, location: Tuple[Union[int, str], ...], message: str, value: object) -> ValidationError:
    """A ValidationError at ``location``; pydantic puts the outer path in front of it."""
    problem = PydanticCustomError("local_llm_setting", "{message}", {"message": message})
    return ValidationError.from_exception_data(title, [InitErrorDetails(type=problem, loc=location, input=value)])


class _Section(BaseModel):
    """A block of settings that refuses keys it does not know, naming the nearest one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _only_what_was_written(self, handler: SerializerFunctionWrapHandler) -> Dict[str, Any]:
        # A default that is dumped would load again as the user's own word, and could contradict another.
        return {name: value for name, value in handler(self).items() if name in self.__pydantic_fields_set__}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if value is None:  # an empty block in YAML
            return {}
        if isinstance(value, dict):
            for key in value:
                if key not in cls.model_fields:
                    name = shown_key(key)
                    raise _complain(cls.__name__, (name,), _unknown(name, cls), value[key])
        return value


def refuse_misplaced(llm: Dict[str, Any], known: List[str]) -> None:
    """Refuses keys of an ``llm`` block that MetaGPT would ignore although they were meant for it or for us.

    Args:
        llm: the block as written, with ``api_type: local_llm``.
        known: the keys that MetaGPT knows there.

    Raises:
        pydantic.ValidationError: a key that belongs below ``local``, or a misspelling of a known one.
    """
    for written in llm:
        if written in known:
            continue
        key = shown_key(written)
        homes = [path for path in _paths() if path.rsplit(".", 1)[-1] == key]
        near = difflib.get_close_matches(key.partition(":")[0], known, n=1, cutoff=0.8)
        if homes or near:
            hint = f"it belongs to 'llm.{homes[0]}'" if homes else f"did you mean '{near[0]}'?"
            # Without its value: it may be a key that is misspelt, api_kye.
            raise _complain("LLMConfig", (key,), f"there is no setting '{key}' here; {hint}", None)


def _unknown(key: str, section: type[_Section]) -> str:
    here = list(section.model_fields)
    homes = [path for path in _paths() if path.rsplit(".", 1)[-1] == key]
    if homes:
        return f"there is no setting '{key}' here; it belongs to '{homes[0]}'"
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    if near:
        return f"there is no setting '{key}' here; did you mean '{near[0]}'?"
    far = difflib.get_close_matches(key, [path.rsplit(".", 1)[-1] for path in _paths()], n=1, cutoff=0.7)
    if far:
        home = next(path for path in _paths() if path.endswith("." + far[0]))
        return f"there is no setting '{key}' here; did you mean '{home}'?"
    return f"there is no setting '{key}' here; known are: {', '.join(here)}"


class Timeouts(_Section):
    """Deadlines of one attempt, in seconds, for every tier that does not say otherwise."""

    connect: Deadline = Field(5.0, description="until the TCP (and TLS) connection stands")
    first_token: LearnedDeadline = Field("auto", description="until the first token: queue, load and prefill together")
    stall: LearnedDeadline = Field("auto", description="silence between two tokens")
    total: LearnedDeadline = Field("auto", description="one attempt from the request to the end of the answer")


class Match(_Section):
    """When a tier applies: all given conditions must hold. Names are globs, compared without case."""

    action: Optional[Globs] = Field(None, description="class names of actions, e.g. WriteCode")
    role: Optional[Globs] = Field(None, description="profiles or class names of roles, e.g. Engineer*")
    model: Optional[Globs] = Field(None, description="names of models")
    min_prompt_tokens: Optional[Count] = Field(None, ge=0, description="tokens, inclusive")
    max_prompt_tokens: Optional[Count] = Field(None, ge=0, description="tokens, inclusive")
    tools: Optional[StrictBool] = Field(None, description="whether the call offers tools")

    @model_validator(mode="after")
    def _range(self) -> Match:
        low, high = self.min_prompt_tokens, self.max_prompt_tokens
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_prompt_tokens ({low}) is above max_prompt_tokens ({high}): nothing can match")
        return self


class Tier(_Section):
    """A kind of task with deadlines of its own, in seconds; what is left out comes from ``timeouts``."""

    name: Name = Field(min_length=1)
    match: Match = Match()
    connect: Optional[Deadline] = None
    first_token: Optional[LearnedDeadline] = None
    stall: Optional[LearnedDeadline] = None
    total: Optional[LearnedDeadline] = None


class Backoff(_Section):
    """Pause between attempts: a random time up to ``initial`` × 2ⁿ, at most ``max``; both in seconds."""

    initial: Seconds = 1.0
    max: Seconds = 60.0

    @model_validator(mode="after")
    def _order(self) -> Backoff:
        if self.initial > self.max:
            raise ValueError(f"initial ({self.initial:g} s) is above max ({self.max:g} s)")
        return self


class RetrySettings(_Section):
    """How often one call is tried, and how long it waits for a server that is not there."""

    attempts: Count = Field(4, ge=1, description="requests per call, the first included")
    backoff: Backoff = Backoff()
    wait_for_server: Seconds = Field(600.0, description="seconds; refused connections and 503 while loading")


class ContextSettings(_Section):
    """How a prompt is made to fit the context window; ``window`` and ``reserve`` in tokens."""

    window: Union[Literal["auto"], int] = Field("auto", description="auto: what the server has loaded")
    reserve: Union[Literal["auto"], int] = Field("auto", description="kept free for the answer; auto: max_token, a quarter at most")
    policy: Name = Field("oldest", description="oldest, middle, observations, or package.module:function")
    low_water: float = Field(0.6, description="share of the room that is filled after a trim")
    oversized: Literal["cut", "refuse"] = Field("cut", description="what is done with a single message that is too large")
    tokenizer: Optional[FilePath] = Field(None, description="path of a tokenizer.json, for servers that do not count")

    @field_validator("low_water", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(f"{_shown(value)} is not a share above 0 and at most 1, such as 0.6")
        return float(value)

    @field_validator("policy")
    @classmethod
    def _policy(cls, value: str) -> str:
        from metagpt_localllm.policies import NAMES, named

        if value not in NAMES and ":" not in value:
            named(value)
        return value

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer(cls, value: Optional[str]) -> Optional[str]:
        if value is not None:
            from metagpt_localllm.tokenizer_file import load_tokenizer

            load_tokenizer(value)
        return value

    @field_validator("window", "reserve", mode="before")
    @classmethod
    def _tokens(cls, value: object) -> object:
        if value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise ValueError(f"{_shown(value)} is neither 'auto' nor a number of tokens of at least 1")
        return value

    @model_validator(mode="after")
    def _fits(self) -> ContextSettings:
        if isinstance(self.window, int) and isinstance(self.reserve, int) and self.reserve >= self.window:
            raise ValueError(f"reserve ({self.reserve}) leaves nothing of window ({self.window}) for the prompt")
        return self


_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _size(value: object) -> int:
    """Bytes, from a number of them or from text such as ``"500MB"``."""
    text = value.strip().lower() if isinstance(value, str) and len(value) <= _LONGEST else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b)?", text)
    if found is not None and found[2] in (None, *_BYTES):
        size: object = int(float(found[1]) * _BYTES[found[2] or "b"])
    else:
        size = value
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**63:
        raise ValueError(f"{_shown(value)} is not a size; write bytes (1000000) or text (500MB, 2GB)")
    return size


Bytes = Annotated[int, BeforeValidator(_size)]


class KeepSettings(_Section):
    """What the journal keeps; the oldest runs go first."""

    age: Seconds = Field(30 * 86400.0, description="seconds since a run's last call")
    size: Bytes = Field(10**9, description="bytes of all runs together")


class JournalSettings(_Section):
    """The record of all runs and calls, from which a run that was killed goes on."""

    enabled: StrictBool = True
    path: FilePath = Field("~/.metagpt/localllm/state.db", description="the learned speeds are there, too")
    resume: Literal["auto", "ask", "never"] = Field("auto", description="whether a run that was left unfinished goes on")
    keep: KeepSettings = KeepSettings()


class ProgressSettings(_Section):
    """What is shown while a call runs. One process has one way: that of the first provider that is made."""

    mode: Literal["auto", "live", "log", "off"] = Field("auto", description="auto: live on a terminal and in a notebook, else log")
    every: Deadline = Field(30.0, description="seconds between two lines of the log while a phase lasts")

    @field_validator("mode", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        return {True: "auto", False: "off"}[value] if isinstance(value, bool) else value  # YAML 1.1 reads on and off so


class TelemetrySettings(_Section):
    """Spans of OpenTelemetry, one for each call. They need the extra ``otel``."""

    enabled: StrictBool = False
    endpoint: Optional[Name] = Field(None, description="URL of an OTLP/HTTP receiver; none: the application's own TracerProvider")
    content: StrictBool = Field(False, description="whether prompts, answers and the words of errors go along")

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: Optional[str]) -> Optional[str]:
        if value is not None:
            from metagpt_localllm.transport import (
                is_address,  # needs httpx, which most configurations need not wait for
            )

            if not is_address(value, "http", "https"):
                raise ValueError("that is no address of the form http://localhost:4318 (OTLP over HTTP)")
        return value

    @model_validator(mode="after")
    def _installed(self) -> TelemetrySettings:
        if self.enabled:
            try:
                import metagpt_localllm.telemetry  # noqa: F401
            except ImportError as error:
                what = f"telemetry needs OpenTelemetry ({error})"
                raise ValueError(f"{what}: run pip install 'metagpt-localllm[otel]', or set enabled to false") from None
        return self


class LocalSettings(_Section):
    """All of ``llm.local``. Every key may be left out.

    Raises:
        pydantic.ValidationError: unknown keys, wrong types, negative or contradictory values, each
            with the path of its key.
    """

    timeouts: Timeouts = Timeouts()
    tiers: List[Tier] = []
    retry: RetrySettings = RetrySettings()
    context: ContextSettings = ContextSettings()
    journal: JournalSettings = JournalSettings()
    progress: ProgressSettings = ProgressSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    server: Name = Field("auto", description="what the server is; auto asks it")
    concurrency: Union[Literal["auto"], Count] = Field("auto", description="requests that we let it have at once")

    @field_validator("concurrency", mode="before")
    @classmethod
    def _places(cls, value: object) -> object:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST):
            raise ValueError(f"{_shown(value)} is neither 'auto' nor a number of requests of at least 1")
        return value

    @field_validator("progress", mode="before")
    @classmethod
    def _mode_alone(cls, value: object) -> object:
        return {"mode": value} if isinstance(value, (bool, str)) else value

    @field_validator("server")
    @classmethod
    def _kind(cls, value: str) -> str:
        if value != "auto":
            from metagpt_localllm.servers import kind_named  # needs httpx, which most configurations need not wait for

            kind_named(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _empty_lists(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("tiers", ()) is None:
            return {**value, "tiers": []}
        return value

    @model_validator(mode="after")
    def _agree(self) -> LocalSettings:
        _check_order("timeouts", self.timeouts, self.timeouts)
        seen: Dict[str, int] = {}
        for index, tier in enumerate(self.tiers):
            if tier.name in seen:
                message = f"'{tier.name}' is the name of tier {seen[tier.name]} already"
                raise _complain("LocalSettings", ("tiers", index, "name"), message, tier.name)
            seen[tier.name] = index
            _check_order(index, tier, self.timeouts)
        return self


def _check_order(where: Union[int, str], block: Union[Tier, Timeouts], defaults: Timeouts) -> None:
    """Refuses a deadline that the block sets over its total; an inherited one gives way to a shorter total instead."""
    location: Tuple[Union[int, str], ...] = (where,) if isinstance(where, str) else ("tiers", where)
    total = block.total if block.total is not None else defaults.total
    if total == "auto":  # it follows the others
        return
    origin = "" if "total" in block.model_fields_set else " (from timeouts)"
    for name in ("connect", "first_token", "stall"):
        value: Union[None, str, float] = getattr(block, name)
        if name in block.model_fields_set and isinstance(value, float) and value > total:
            told = f"{name} is {format_duration(value)}, over total, which is {format_duration(total)}{origin}"
            message = f"{told}: raise total, too, or lower {name}"
            raise _complain("LocalSettings", (*location, name), message, value)


def _paths() -> List[str]:
    """Dotted paths of all settings, below ``local``."""
    sections: Dict[str, type[_Section]] = {
        "local": LocalSettings,
        "local.timeouts": Timeouts,
        "local.tiers[]": Tier,
        "local.tiers[].match": Match,
        "local.retry": RetrySettings,
        "local.retry.backoff": Backoff,
        "local.context": ContextSettings,
        "local.journal": JournalSettings,
        "local.journal.keep": KeepSettings,
        "local.progress": ProgressSettings,
        "local.telemetry": TelemetrySettings,
    }
    return [f"{prefix}.{name}" for prefix, section in sections.items() for name in section.model_fields]
