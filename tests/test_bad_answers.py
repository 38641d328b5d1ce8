"""Answers over real sockets that are endless, slow, huge or unprintable: each ends in time, in a clear error or an answer."""

import asyncio
import json
import tracemalloc

import pytest
from conftest import RawServer, chunk

from metagpt_localllm import errors
from metagpt_localllm.call import complete
from metagpt_localllm.journal import Journal
from metagpt_localllm.session import session_for
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.state import state_at

END = chunk(finish="stop")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
ONCE = {"timeouts": {"first_token": 1, "stall": 1, "total": 3}, "retry": {"attempts": 1, "backoff": {"initial": 0, "max": 0}}}


class Forever(RawServer):
    """Sends to a chat what comes first, then one portion again and again, with a pause between two."""

    def __init__(self, first, portion, pause=0.0):
        super().__init__(b"")
        self.first, self.portion, self.pause = first, portion, pause

    async def _chat(self, writer, answer):
        writer.write(self.first)
        while True:
            writer.write(self.portion)
            await writer.drain()
            await asyncio.sleep(self.pause)


def delta(**fields):
    return chunk(**fields) * 500


@pytest.mark.parametrize(
    "first, portion, error, says",
    [
        (HEAD + b"\r\n", b": ping\n\n" * 2000, errors.FirstTokenTimeout, "keep-alive comments"),
        (HEAD + b"\r\n", delta(), errors.FirstTokenTimeout, "no token within"),
        (HEAD + b"\r\n", delta(role="assistant"), errors.FirstTokenTimeout, "no token within"),
        (HEAD + b"\r\n", delta(content=""), errors.FirstTokenTimeout, "no token within"),
        (HEAD + b"\r\n", delta(tool_calls=[{"index": 0}]), errors.FirstTokenTimeout, "no token within"),
        (HEAD + b"\r\n", b"data: 17\n\n" * 2000, errors.FirstTokenTimeout, "no token within"),
        (HEAD + b"\r\n" + chunk("a"), b": ping\n\n" * 2000, errors.StreamStalled, "went silent"),
        (HEAD + b"\r\n", chunk(reasoning_content="hm"), errors.TotalTimeout, "no whole answer"),
        (HEAD + b"\r\n", b"x" * 65536, errors.IncompleteStream, "over 16,777,216 bytes"),
        (HEAD + b"\r\ndata: ", b"x" * 65536, errors.IncompleteStream, "over 16,777,216 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n", b" " * 65536, errors.IncompleteStream, "over 16,777,216 bytes"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500, errors.FirstTokenTimeout, "no token within"),
        (HEAD, b"x-flood: y\r\n" * 1000, errors.ConnectionLost, "before any answer"),
        (HEAD + b"x: ", b"y" * 65536, errors.ConnectionLost, "before any answer"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"f" * 99, errors.ConnectionLost, "before any answer"),
    ],
    ids=["comments", "empty deltas", "roles", "empty text", "empty tool calls", "numbers", "comments after a token", "thoughts", "a line",
         "an event", "a body", "100 Continue", "headers", "one header", "a chunk's size"],
)  # fmt: skip
async def test_what_has_no_end_ends_by_its_deadline_or_its_bound(ask, first, portion, error, says):
    pause = 0.01 if error is errors.TotalTimeout else 0.0
    settings = {**ONCE, "timeouts": {"first_token": 30, "total": 60}} if "bytes" in says else ONCE
    async with Forever(first, portion, pause) as server:
        tracemalloc.start()
        try:
            with pytest.raises(error, match=f"(?i){says}") as caught:
                await asyncio.wait_for(complete(ask(server, settings=settings)), 25)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 120 << 20 and len(str(caught.value)) < 1500


@pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"\r\n", b"HTTP/1.1 500 X\r\n\r\n", HEAD + b"content-encoding: gzip\r\n\r\n"],
                         ids=["nothing", "headers", "a stream", "an error", "packed"])  # fmt: skip
async def test_a_server_that_sends_a_byte_a_minute_is_not_waited_for(ask, first):
    async with Forever(first, b"d", 60) as server:
        with pytest.raises(errors.FirstTokenTimeout):
            await asyncio.wait_for(complete(ask(server, settings=ONCE)), 15)


async def test_a_server_that_answers_its_questions_a_byte_a_minute_delays_a_call_by_its_probe(ask):
    class Slow(RawServer):
        async def _about(self, writer, path):
            await Forever._chat(self, writer, b"")

    async with Slow(chunk("fine") + END) as server:
        server.first, server.portion, server.pause = b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n", b"{", 60
        assert (await asyncio.wait_for(complete(ask(server)), 15)).text == "fine"


@pytest.mark.parametrize("seconds", ["99999999999", "1e308", "-5", "nan", "soon", "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_an_absurd_retry_after_is_not_waited_for_longer_than_an_attempt(ask, seconds):
    busy = f"HTTP/1.1 429 X\r\nretry-after: {seconds}\r\ndate: Wed, 25 Nov 2026 10:00:00 GMT\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    settings = {"timeouts": {"connect": 0.3, "first_token": 0.3, "stall": 0.3, "total": 0.4}, "retry": {"attempts": 2}}
    async with RawServer(busy.encode(), chunk("fine") + END) as server:
        assert (await asyncio.wait_for(complete(ask(server, settings=settings)), 20)).text == "fine"


async def test_an_answer_of_fifty_megabytes_is_whole(ask):
    text = "tokens and more tokens, " * 2000
    async with RawServer(chunk(text) * 1050 + END) as server:
        settings = {"timeouts": {"first_token": 30, "stall": 30, "total": 300}}
        outcome = await complete(ask(server, settings=settings))
    assert len(outcome.text) == 1050 * len(text) > 50_000_000


async def test_nuls_and_halves_of_characters_get_through_to_the_journal_and_back(ask, tmp_path):
    odd = "a\x00b\ud83dc\x1b[2Jd\ufffe"
    stream = b"data: " + json.dumps({"choices": [{"delta": {"content": odd}}]}).encode() + b"\n\n" + END
    settings = {"journal": {"path": str(tmp_path / "odd.db"), "resume": "never"}}
    async with RawServer(stream) as server:
        outcome = await complete(ask(server, settings=settings))
    session = session_for(LocalSettings.model_validate(settings).journal)
    journal = Journal(state_at(str(tmp_path / "odd.db")))
    assert journal.flush()
    assert outcome.text == odd and [call.answer["content"] for call in journal.calls(session.id)] == [odd]


@pytest.mark.parametrize(
    "answer, error",
    [(HEAD + b"content-length: 9999\r\n\r\n" + chunk("half"), errors.IncompleteStream),
     (HEAD + b"content-length: 3\r\n\r\n" + chunk("half"), errors.IncompleteStream),
     (HEAD + b"content-length: x\r\n\r\n" + chunk("half"), errors.ConnectionLost),
     (HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\n" + chunk("half"), errors.ConnectionLost),
     (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", errors.ConnectionLost),
     (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\ndata:", errors.ConnectionLost),
     (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", errors.ConnectionLost),
     (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", errors.LocalLLMError), (b"HTTP/1.1 99999 X\r\n\r\n", errors.ConnectionLost),
     (b"HTTP/1.1 204 No\r\n\r\n", errors.RequestRejected), (b"SSH-2.0-OpenSSH\r\n", errors.ConnectionLost), (b"\x00" * 999, errors.LocalLLMError)],
)  # fmt: skip
async def test_broken_http_is_an_error_of_ours(ask, answer, error):
    raw = answer if answer.startswith(b"HTTP") else b"HTTP" + answer
    async with RawServer(raw) as server:
        with pytest.raises(error) as caught:
            await asyncio.wait_for(complete(ask(server, settings=ONCE)), 15)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1200
