"""How fast the server reads and writes, measured by a few short chats over the real connection.

The first chat is tiny, and the size of each further one follows from the speed seen so far: together they take some
seconds, and never longer than LIMIT. Every prompt begins with other words, so that no cache has it, but for the last
one, which asks whether the cache works.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Sequence

import anyio
import httpx

from metagpt_localllm import failures
from metagpt_localllm.answer import Answer, OddChunk, chunk_of
from metagpt_localllm.attempt import broken
from metagpt_localllm.failures import Failure
from metagpt_localllm.latency import Sample
from metagpt_localllm.servers import Server
from metagpt_localllm.servers.base import Timings, positive
from metagpt_localllm.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder
from metagpt_localllm.tokens import estimate_prompt
from metagpt_localllm.transport import Endpoint, client_for
from metagpt_localllm.unpacking import BodyTooLarge, error_text, pieces, read_body

__all__ = ["LIMIT", "Measured", "measure"]

#: Seconds for all of it.
LIMIT = 30.0
#: Seconds of prefill and of decoding that the main chat aims at.
_PREFILL, _DECODE = 4.0, 3.0
#: Tokens of the main chat's prompt, and of its answer; and of the first chat's answer.
_LEAST, _MOST = 150, 2000
_LEAST_ANSWER, _MOST_ANSWER, _FIRST_ANSWER = 12, 48, 6
#: What the estimate is of the true number of tokens, for prose, until the server has counted (see calibration).
_USUAL = 0.65
#: Tokens that come closer together than this on average, in seconds, may have been held back on their way.
_TOGETHER = 0.002
#: A prompt of which less than this part of the least that it can have was read has been cut.
_SURELY, _LEAST_RATIO = 0.9, 1 / 2.5
_SENTENCE = "Part {} of the house has a door, a window, and a garden with old trees behind it. "


@dataclass(frozen=True)
class _Timed:
    """One chat. Times in seconds from the request on."""

    estimated: int
    prompt_tokens: int
    counted: bool
    first: float
    last: float
    longest_gap: float
    tokens: int
    timings: Timings

    @property
    def prefill(self) -> float:
        """As the server says, where that can be (latency.py judges likewise); else until the first token."""
        told = self.timings.prefill
        return told if told is not None and 0 < told <= 1.05 * self.first else self.first

    @property
    def prefill_speed(self) -> Optional[float]:
        fresh, seconds = self.prompt_tokens - (self.timings.cached_tokens or 0), self.prefill
        return fresh / seconds if fresh > 0 and seconds > 0 else None

    @property
    def decode_speed(self) -> Optional[float]:
        span = self.last - self.first
        return (self.tokens - 1) / span if self.tokens > 1 and span > 0 else None

    def sample(self) -> Sample:
        """As the estimator of deadlines takes it."""
        return Sample(
            prompt_tokens=self.prompt_tokens, cached_tokens=self.timings.cached_tokens, ttft=self.first,
            waited=self.timings.load or 0.0, prefill_seconds=self.timings.prefill, answer_tokens=self.tokens,
            decode_seconds=self.last - self.first, longest_gap=self.longest_gap or None,
        )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What was measured; None where it could not be.

    Attributes:
        prefill: tokens of a prompt that are read in a second.
        decode: tokens of an answer that are written in a second.
        prompt_tokens: of the largest prompt that was read.
        seconds: that all of it took.
        samples: for the estimator of deadlines.
        buffered: whether something on the way holds the answer back until it is whole.
        held_back: seconds that it held back a short answer, if so.
        cached: part of a prompt's repeated beginning that did not have to be read again.
        cache_told: whether the server says so itself; else it was judged by time.
        again: seconds to the first token where the beginning was new, and where it came again.
        cut: tokens that the server read of a prompt that surely has more, and how many at the least.
        failure: what ended it early, in words; "" where nothing did.
        remedy: what helps against that.
        limited: the time was up before all was measured.
    """

    prefill: Optional[float] = None
    decode: Optional[float] = None
    prompt_tokens: int = 0
    seconds: float = 0.0
    samples: tuple[Sample, ...] = ()
    buffered: Optional[bool] = None
    held_back: float = 0.0
    cached: Optional[float] = None
    cache_told: bool = False
    again: Optional[tuple[float, float]] = None
    cut: Optional[tuple[int, int]] = None
    failure: str = ""
    remedy: str = ""
    limited: bool = False


async def measure(endpoint: Endpoint, server: Server) -> Measured:
    """Measures for at most LIMIT seconds; what is known by then is told. Never raises."""
    course = _Course(endpoint, server)
    begun = anyio.current_time()
    with anyio.move_on_after(LIMIT) as scope:
        try:
            await course.run(begun + LIMIT)
        except _Failed as failed:
            said = endpoint.without_key(failed.failure.what)
            course.found = replace(course.found, failure=said, remedy=failed.failure.remedy)
    limited = scope.cancelled_caught
    return replace(course.found, seconds=anyio.current_time() - begun, limited=limited or course.short_of_time)


class _Failed(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what)
        self.failure = failure


class _Course:
    """The chats in their order. ``found`` has at every moment what is known."""

    def __init__(self, endpoint: Endpoint, server: Server) -> None:
        self._endpoint, self._server = endpoint, server
        self._ratio = _USUAL
        self.found = Measured()
        self.short_of_time = False

    async def run(self, until: float) -> None:
        first = await self._chat(_prompt(60, self._ratio), _FIRST_ANSWER)
        self._take(first)
        if first.counted:
            self._ratio = first.prompt_tokens / max(first.estimated, 1)
        # What came all at once tells at least this of how fast it was written.
        read, wrote = first.prefill_speed or 1.0, first.decode_speed or first.tokens / max(first.last, 1e-3)
        left = until - anyio.current_time()
        size = int(min(read * _PREFILL, (self._server.facts.window or 2 * _MOST) // 2, _MOST))
        size = max(size, _LEAST)
        answer = max(min(int(wrote * _DECODE), _MOST_ANSWER), _LEAST_ANSWER)
        if size / read + answer / wrote > left:
            self.short_of_time = True
            return
        prompt = _prompt(size, self._ratio)
        main = await self._chat(prompt, answer)
        self._take(main)
        await self._look_for_buffer(main)
        if not self.found.buffered:
            await self._look_for_cache(prompt, main)

    def _take(self, timed: _Timed) -> None:
        """A larger prompt tells more of the speed."""
        least = int(timed.estimated * _LEAST_RATIO * _SURELY)
        cut = (timed.prompt_tokens, least) if timed.counted and 256 < timed.prompt_tokens < least else None
        self.found = replace(
            self.found, prefill=timed.prefill_speed, decode=timed.decode_speed or self.found.decode,
            prompt_tokens=timed.prompt_tokens, samples=(*self.found.samples, timed.sample()), cut=cut or self.found.cut,
        )  # fmt: skip

    async def _look_for_buffer(self, main: _Timed) -> None:
        """Tokens that come all at once are either fast or were held back: then a longer answer begins later."""
        if main.tokens < _LEAST_ANSWER // 2:
            return
        self.found = replace(self.found, buffered=False)
        if (main.last - main.first) / main.tokens > _TOGETHER:
            return
        prompt = _prompt(60, self._ratio)
        await self._chat(prompt, 1)  # from now on its beginning is cached, where there is a cache
        short = await self._chat(prompt, 2)
        long = await self._chat(prompt, main.tokens)
        later = long.first - short.first
        if later > 0.2 and later > 3 * (long.last - long.first):
            speed = (long.tokens - short.tokens) / later
            self.found = replace(self.found, buffered=True, held_back=later, decode=speed, samples=())

    async def _look_for_cache(self, prompt: Sequence[Mapping[str, Any]], main: _Timed) -> None:
        """The same beginning once more, with another end."""
        again = await self._chat([*prompt[:-1], {"role": "user", "content": "Now count down from ten, in words."}], 4)
        times = main.prefill, again.prefill
        told = again.timings.cached_tokens
        if told:
            share: Optional[float] = min(told / max(again.prompt_tokens, 1), 1.0)
        elif times[0] >= 0.4 and main.prompt_tokens >= _LEAST // 2:
            share = max(1 - times[1] / times[0], 0.0)
        elif told == 0 and main.prompt_tokens >= _LEAST // 2:
            share = 0.0
        else:
            share = None
        self.found = replace(self.found, cached=share, cache_told=told is not None, again=times)

    async def _chat(self, messages: Sequence[Mapping[str, Any]], answer_tokens: int) -> _Timed:
        body = {
            "model": self._endpoint.model, "messages": messages, "max_tokens": answer_tokens, "temperature": 0,
            "stream": True, **self._server.extras(),
        }  # fmt: skip
        begun, answer, arrivals = anyio.current_time(), Answer(), []
        endpoint, decoder = self._endpoint, SSEDecoder()
        try:
            async with client_for(endpoint).stream(
                "POST", endpoint.chat_url, content=json.dumps(body).encode(), headers=endpoint.headers
            ) as response:
                bare = httpx.Response(
                    response.status_code, headers=response.headers, request=httpx.Request("POST", endpoint.address)
                )
                if response.status_code != 200:
                    raise _Failed(failures.from_response(bare, await error_text(response), endpoint.api_key))
                if "json" in response.headers.get("content-type", ""):  # it does not stream at all
                    _has_token(answer, await read_body(response, MAX_EVENT_BYTES), bare, endpoint.api_key)
                    arrivals.append(anyio.current_time())
                else:
                    async for portion in pieces(response):
                        for data in decoder.feed(portion):
                            arrivals += [anyio.current_time()] if _has_token(answer, data, bare, endpoint.api_key) else []
                for data in decoder.close():
                    arrivals += [anyio.current_time()] if _has_token(answer, data, bare, endpoint.api_key) else []
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
            raise _Failed(failures.from_exception(error, endpoint.address, bool(arrivals), endpoint.api_key)) from None
        except (OddChunk, EventTooLarge, BodyTooLarge) as error:
            raise _Failed(broken(str(error))) from None
        if not arrivals:
            raise _Failed(broken("the answer ended without a token"))
        usage, estimated = answer.usage or {}, estimate_prompt(messages)
        counted = positive(usage.get("prompt_tokens"))
        gaps = [later - earlier for earlier, later in zip(arrivals, arrivals[1:])]
        return _Timed(
            estimated=estimated, prompt_tokens=counted or max(int(estimated * self._ratio), 1), counted=counted is not None,
            first=arrivals[0] - begun, last=arrivals[-1] - begun, longest_gap=max(gaps, default=0.0),
            tokens=max(positive(usage.get("completion_tokens")) or 0, len(arrivals)),
            timings=self._server.timings({"usage": answer.usage, "timings": answer.timings}),
        )  # fmt: skip


def _has_token(answer: Answer, data: bytes, bare: httpx.Response, key: str) -> bool:
    """Whether there is a token in this event, which is added to the answer."""
    if data == b"[DONE]":
        return False
    chunk = chunk_of(data)
    if chunk is None:
        return False
    if chunk.get("error"):
        raise _Failed(failures.from_error_body(chunk, bare.request, key))
    return answer.add(chunk)[0]


def _prompt(tokens: int, ratio: float) -> list[Mapping[str, Any]]:
    """A prompt of about so many tokens, which no other begins like."""
    text, number = f"Note {secrets.token_hex(8)}. ", 0
    each = estimate_prompt([{"role": "system", "content": _SENTENCE.format(100) * 10}]) / 10 * ratio
    while number * each < tokens - 30:
        text += _SENTENCE.format(100 + number)
        number += 1
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": "Count from one to fifty, in words, with nothing else."},
    ]
