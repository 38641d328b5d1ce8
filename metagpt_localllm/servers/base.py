"""What a server can do, and the plain one that promises nothing.

Each kind of server is a subclass in a module of its own: what it says, in which words, and its traps
are there and nowhere else. The methods that do I/O raise whatever httpx raises and may return at any
time; :mod:`metagpt_localllm.servers.detection` bounds and guards them for the rest of the package.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Hashable, Mapping, Optional

from metagpt_localllm.failures import Failure
from metagpt_localllm.transport import Endpoint, client_for
from metagpt_localllm.unpacking import BodyTooLarge, read_body

__all__ = [
    "Anatomy", "Ask", "Facts", "Health", "Loading", "Progress", "Server", "Timings", "Unanswered", "Work", "amount",
    "entries", "json_of", "positive",
]  # fmt: skip


#: Bytes of an answer to a question that are read: of a long prompt's tokens there may be some millions.
_MAX_BYTES = 16 << 20
#: Nothing that a server counts or measures is larger.
_LARGEST = 10**15
#: Characters of a version or a quantization.
_NAME = 80
#: Fields that give an answer its form, or tell of each of its tokens (llama.cpp, vLLM, SGLang, TabbyAPI).
_FORMS = (
    "grammar", "json_schema", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "regex", "ebnf", "structural_tag", "grammar_string", "regex_pattern", "logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a server says of itself and of the model; None and "" where it does not say.

    Attributes:
        window: context window in tokens that one request has: of the loaded model, and of one slot.
        largest_window: what the model was trained for, in tokens.
        quantization: such as "Q4_K_M".
        gpu_share: part of the model in the GPU's memory, 0 to 1.
        slots: requests that are worked on at once.
        images: whether the model sees images.
        loaded: whether the model is in memory.
        version: of the server.
    """

    window: Optional[int] = None
    largest_window: Optional[int] = None
    quantization: str = ""
    gpu_share: Optional[float] = None
    slots: Optional[int] = None
    images: Optional[bool] = None
    loaded: Optional[bool] = None
    version: str = ""

    def __post_init__(self) -> None:
        for name in ("quantization", "version"):  # they are shown
            object.__setattr__(self, name, "".join(filter(str.isprintable, getattr(self, name)[:_NAME])))


@dataclass(frozen=True)
class Anatomy:
    """What a server says of a model's size, and of where it keeps it; None and "" where it does not say.

    Attributes:
        weights: bytes of the model's file.
        parameters: how many it has.
        layers: that have keys and values.
        kv_heads: heads of these, per layer.
        key_size: values in one key; ``value_size`` likewise.
        resident: bytes that the loaded model takes in all memories, its context included.
        in_vram: bytes of these that are in the memory of GPUs.
        slides: whether some layers keep only the last part of the context, so that it takes less.
        path: of the model's file, on the server's machine.
    """

    weights: Optional[int] = None
    parameters: Optional[int] = None
    layers: Optional[int] = None
    kv_heads: Optional[int] = None
    key_size: Optional[int] = None
    value_size: Optional[int] = None
    resident: Optional[int] = None
    in_vram: Optional[int] = None
    slides: bool = False
    path: str = ""

    @classmethod
    def of_metadata(cls, info: Mapping[str, Any]) -> Anatomy:
        """From the metadata of a GGUF, whose names Ollama uses, too (ggml/docs/gguf.md)."""
        prefix = f"{info.get('general.architecture')}."

        def number(name: str) -> Optional[int]:
            value = info.get(prefix + name)
            # Some models have other numbers of heads in each layer.
            return max(filter(None, map(positive, value)), default=None) if isinstance(value, list) else positive(value)

        heads, width = number("attention.head_count"), number("embedding_length")
        usual = width // heads if width and heads else None
        return cls(
            parameters=positive(info.get("general.parameter_count")),
            layers=number("block_count"),
            kv_heads=number("attention.head_count_kv") or heads,
            key_size=number("attention.key_length") or usual,
            value_size=number("attention.value_length") or usual,
            slides=number("attention.sliding_window") is not None,
        )


class Health(enum.Enum):
    """What a server says of itself."""

    UP = "up"
    LOADING = "loading"


@dataclass(frozen=True)
class Work:
    """What a server says that it is doing.

    Attributes:
        busy: whether it works on any request at all.
        marker: any value; that it is another than at the last look proves that the work goes on.
        loading: whether it is the loading of the model.
    """

    busy: bool
    marker: Hashable
    loading: bool = False


@dataclass(frozen=True)
class Timings:
    """How long an answer took by the server's own clock, in seconds; None where it does not say.

    Attributes:
        cached_tokens: prompt tokens that came from its prefix cache.
        prefill: the rest of the prompt.
        decode: the answer.
        load: loading the model.
    """

    cached_tokens: Optional[int] = None
    prefill: Optional[float] = None
    decode: Optional[float] = None
    load: Optional[float] = None


@dataclass(frozen=True)
class Progress:
    """How far the prefill is.

    Attributes:
        processed: prompt tokens that it has read.
        total: that it reads; None where it does not say.
    """

    processed: int
    total: Optional[int] = None


class Unanswered(Exception):
    """A question got no usable answer: the server loads, a proxy answers for it, the key is wrong, or it has no end."""


class Loading(Unanswered):
    """It answers that it loads its model (503)."""


class Ask:
    """Questions to one server beside the chat.

    Attributes:
        connected: whether any connection stood.
        software: the ``server`` header of the latest answer, or "".
        refused: whether any answer was a 401 with a JSON object, as model servers ask for their key.
        code: HTTP status of the latest answer; 0 where there was none.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.connected = False
        self.software = ""
        self.refused = False
        self.code = 0
        self._models: Optional[Mapping[str, Any]] = None
        self._listed = False

    async def models(self) -> Optional[Mapping[str, Any]]:
        """The list of models (``/v1/models``), asked for once only; raises as :meth:`json` does."""
        if not self._listed:
            self._models = await self.json("./models")
            self._listed = True
        return self._models

    async def json(self, path: str, body: Optional[Mapping[str, Any]] = None) -> Optional[Mapping[str, Any]]:
        """The JSON object at ``path``, which is below the API when it begins with ``./`` and else at the server's root.

        None where there is none. GET, or POST when there is a body.

        Raises:
            Unanswered: 401, 403 or 5xx, or an answer of over 16 MiB.
            httpx.HTTPError: no answer.
        """
        answer = await self._answer(path, body)
        return answer if isinstance(answer, Mapping) else None

    async def array(self, path: str) -> Optional[list[Mapping[str, Any]]]:
        """The objects in the JSON array at ``path``; raises as :meth:`json` does."""
        answer = await self._answer(path, None)
        return [entry for entry in answer if isinstance(entry, Mapping)] if isinstance(answer, list) else None

    async def text(self, path: str) -> Optional[str]:
        """The JSON string at ``path``; raises as :meth:`json` does."""
        answer = await self._answer(path, None)
        return answer if isinstance(answer, str) else None

    async def _answer(self, path: str, body: Optional[Mapping[str, Any]]) -> Any:
        content = None if body is None else json.dumps(body, default=str).encode("utf-8", "replace")
        endpoint = self.endpoint
        url = endpoint.base_url.rstrip("/") + path[1:] if path.startswith("./") else endpoint.root + path
        async with client_for(endpoint).stream(
            "GET" if body is None else "POST", url, content=content, headers=endpoint.headers,
            extensions={"trace": self._trace},
        ) as response:  # fmt: skip
            self.software, self.code = response.headers.get("server", ""), response.status_code
            status = self.code
            if status == 503:
                raise Loading("503")
            try:
                said = await read_body(response, _MAX_BYTES) if status in (200, 401) else b""
            except BodyTooLarge as error:
                raise Unanswered(str(error)) from None
        if status == 401:
            self.refused = self.refused or said.lstrip().startswith(b"{")
        if status >= 500 or status in (401, 403):
            raise Unanswered(f"{status}")
        if status != 200:
            return None
        return json_of(said)

    async def status(self, path: str) -> int:
        """The HTTP status of a GET at the server's root; raises httpx.HTTPError where no answer comes."""
        url, headers = self.endpoint.root + path, self.endpoint.headers
        async with client_for(self.endpoint).stream("GET", url, headers=headers) as response:
            return response.status_code

    async def _trace(self, event: str, _info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self.connected = True


class Server:
    """The plain OpenAI-compatible server, and the base of all others.

    Attributes:
        name: what users call it, and what ``llm.local.server`` takes.
        counts: whether :meth:`count_tokens` may give a number.
        watchable: whether :meth:`work` and ``/health`` may be asked while a request runs, no more often than every 1.5
            seconds, and answer whatever the server is doing: that they do not then proves that it is gone.
        quiet: whether every question beside the chat harms the answer that runs; it is asked once and never again.
        lists: whether ``/v1/models`` always answers.
        locked: whether it does so but for those without the right key, whatever status they get.
        usual_window: context window in tokens that it takes unless told otherwise, where it never says which it has.
        truncates: whether it cuts a prompt that is too long without a word; ``usage.prompt_tokens`` tells what is left.
        sums: whether it refuses a prompt that fits its context, but not together with ``max_tokens``.
        divides: whether its slots may divide the context that it was started with; it does not tell.
        blank: whether it answers a prompt that is too long with a 200 that holds no token.
        facts: what it said.
    """

    name: ClassVar[str] = "plain"
    counts: ClassVar[bool] = False
    watchable: ClassVar[bool] = False
    quiet: ClassVar[bool] = False
    lists: ClassVar[bool] = True
    locked: ClassVar[bool] = False
    usual_window: ClassVar[Optional[int]] = None
    truncates: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    blank: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    def __init__(self, facts: Optional[Facts] = None, model: str = "") -> None:
        self.facts = facts or Facts()
        self._model = model

    @property
    def places(self) -> int:
        """Requests that it is let have at once: as many as it works on at once, and one where it does not say."""
        return self.facts.slots or 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.facts})"

    @classmethod
    def recognizes(cls, models: Mapping[str, Any]) -> bool:
        """Whether its list of models (``/v1/models``) gives it away."""
        return False

    @classmethod
    async def identify(cls, ask: Ask, model: str) -> Optional[Server]:
        """Asks the endpoint that only this kind of server has; None where it is another."""
        return None

    @property
    def settled(self) -> bool:
        """Whether the facts will stay as they are as long as the server runs; else they are asked for again."""
        return True

    @property
    def shares(self) -> bool:
        """Whether another model may take this one's place in memory at any time."""
        return False

    async def is_loaded(self, ask: Ask) -> Optional[bool]:
        """Whether the model is in memory now, by a question that loads nothing; None where it does not tell."""
        return None

    @property
    def any_name(self) -> bool:
        """Whether it answers to any name of a model with the one that it has."""
        return False

    @property
    def shows_progress(self) -> bool:
        """Whether its streams may show how far the prefill is."""
        kind = type(self)
        return kind.progress is not Server.progress or kind.progress_of_comment is not Server.progress_of_comment

    def extras(self) -> Mapping[str, Any]:
        """Fields of a chat request beyond OpenAI's that make its work visible."""
        return {"stream_options": {"include_usage": True}}

    def needed(self) -> Mapping[str, Any]:
        """Those that are its own, and stay where what is behind it refuses all that OpenAI does not have."""
        return {}

    def progress(self, chunk: Mapping[str, Any]) -> Optional[Progress]:
        """How far the prefill is, where this chunk of a stream tells."""
        return None

    def progress_of_comment(self, comment: bytes) -> Optional[Progress]:
        """The same, where this comment of a stream tells (it comes without its colon)."""
        return None

    def timings(self, totals: Mapping[str, Any]) -> Timings:
        """What the last chunk of a stream, or ``usage`` in it, tells."""
        usage = totals.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        return Timings(cached if isinstance(cached, int) and not isinstance(cached, bool) and cached >= 0 else None)

    async def health(self, ask: Ask) -> Health:
        """Whether it can take a request; whatever answers can, unless it says that it cannot yet.

        Raises:
            httpx.HTTPError: nothing answers.
        """
        return Health.LOADING if await ask.status("/health") == 503 else Health.UP

    def reread(self, failure: Failure, text: str, seconds: float, keyed: bool) -> Failure:
        """The failure, where this server's words mean something else than they mostly do.

        Args:
            text: the body of its answer, or the event of its stream that is the error.
            seconds: since the request.
            keyed: whether that had an API key.
        """
        return failure

    async def work(self, ask: Ask) -> Optional[Work]:
        """What it is doing; None where it does not tell."""
        return None

    async def load(self, ask: Ask, model: str) -> None:
        """Loads the model, for as long as that takes, where a request would lose it by giving up too early."""

    @property
    def repeats(self) -> Optional[bool]:
        """Whether a continued answer that is streamed has its beginning in front again; None where that is not known."""
        return None

    def continuation(self, body: Mapping[str, Any], partial: str, tokens: int = 0) -> Optional[Mapping[str, Any]]:
        """The request that goes on with the answer ``partial`` of so many tokens; None where it cannot.

        An answer that has all its tokens cannot, nor one that must have a form: a grammar begins anew with each request
        ("abc d" became "abc dabc def ghi", llama.cpp b11549, measured). Only where :meth:`proves` says so is the whole
        what it would have been.
        """
        request = None if _has_form(body) else self._continued(body, partial)
        limits = {key: positive(body.get(key)) for key in ("max_tokens", "max_completion_tokens")}
        left = {key: limit - tokens for key, limit in limits.items() if limit is not None}
        return {**request, **left} if request is not None and all(number > 0 for number in left.values()) else None

    def _continued(self, body: Mapping[str, Any], partial: str) -> Optional[Mapping[str, Any]]:
        """The same, with no look at its form or its limit."""
        return None

    async def proves(self, ask: Ask, body: Mapping[str, Any], partial: str) -> bool:
        """Whether the prompt of :meth:`continuation` is that of ``body`` with ``partial`` behind it, and nothing else.

        Templates differ: they trim the text, or put an empty thought before it.
        """
        return False

    def remedy(self, window: int) -> str:
        """How its user gives the model a context of at least ``window`` tokens, as a sentence.

        Of as many tokens as the model was made for, where those are fewer.
        """
        largest = self.facts.largest_window
        if largest is None or largest >= window:
            return f"{self._enlarge(window)}."
        limit = f"model was made for {largest:,} tokens at the most"
        if (self.facts.window or 0) >= largest:
            return f"The {limit}, and has them: a longer prompt needs another model."
        return f"{self._enlarge(largest)}; the {limit}."

    async def anatomy(self, ask: Ask) -> Anatomy:
        """How large the model is, and where it is kept; raises as :meth:`Ask.json` does."""
        return Anatomy()

    def remedy_for_cache(self) -> str:
        """How its user has it keep the beginning of a prompt that comes again, as a sentence."""
        return "Look in the server's documentation for its prefix cache or prompt cache, and switch it on."

    def remedy_for_gpu(self) -> str:
        """How its user has it keep more of the model in the GPU's memory, as a sentence."""
        return "Load the model with as many layers on the GPU as its memory holds."

    def remedy_for_slots(self) -> str:
        """How its user lets one request have the whole context, as a sentence."""
        return "Let the server work on one request at a time."

    def _enlarge(self, window: int) -> str:
        """The setting for a context of ``window`` tokens, as a sentence without its full stop."""
        return f"Load the model with a context of at least {window} tokens"

    async def count_tokens(self, ask: Ask, prompt: Mapping[str, Any]) -> Optional[int]:
        """Tokens of a prompt (``model``, ``messages``, ``tools``) by its own tokenizer and chat template."""
        return None


def _has_form(body: Mapping[str, Any]) -> bool:
    """Whether more than the model decides how the answer goes on, so that its beginning would be missed."""
    form = body.get("response_format")
    if isinstance(form, Mapping) and form.get("type", "text") != "text":
        return True
    return (
        any(body.get(field) for field in _FORMS)
        or body.get("tool_choice") not in (None, "auto", "none")
        or (positive(body.get("n")) or 1) > 1
    )


def json_of(body: bytes) -> Any:
    """The JSON in a body; None where there is none, or one that is nested too deep."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def entries(holder: Any, key: str) -> list[Mapping[str, Any]]:
    """The objects in the list ``holder[key]``; none where the shape is another."""
    found = holder.get(key) if isinstance(holder, Mapping) else None
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def positive(value: Any) -> Optional[int]:
    """``value`` where it is a whole number above zero, of a size that tokens or bytes can have."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST else None


def amount(value: Any) -> Optional[float]:
    """``value`` where it is a number from zero on, of a size that something counted or measured can have."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST else None
