"""Proof of work and proof of death: weighed without a clock, and seen on real sockets."""

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time

import openai
import pytest
from conftest import WORDS, RawServer

from metagpt_localllm import errors, events
from metagpt_localllm.call import complete
from metagpt_localllm.history import History
from metagpt_localllm.servers.base import Work
from metagpt_localllm.servers.vllm import VLLM
from metagpt_localllm.simulator import Answer, Fault, Machine
from metagpt_localllm.state import State
from metagpt_localllm.tokens import estimate_message
from metagpt_localllm.transport import Endpoint
from metagpt_localllm.watch import Evidence, Seen, watch

LLAMA = {"default_generation_settings": {"n_ctx": 4096}}
#: Twenty times faster than real: a look every 0.075 s, ``auto`` is 30 s, 3 s and 6 min.
SCALE = "20"


def verdicts(*looks):
    evidence = Evidence()
    return [(evidence.weigh(seen, 1.0), evidence.alive) for seen in looks]


def at(marker):
    return Work(True, marker)


IDLE = Work(False, ())


@pytest.mark.parametrize(
    "looks, error",
    [
        ((Seen.REFUSED, Seen.REFUSED), errors.ServerGone),
        ((Seen.MUTE, Seen.MUTE, Seen.MUTE), errors.ServerUnresponsive),
        ((IDLE, IDLE), errors.RequestLost),
        ((at(1), IDLE, IDLE), errors.RequestLost),
        ((Seen.REFUSED, Seen.UP, Seen.REFUSED), None),
        ((Seen.MUTE, Seen.MUTE, Seen.UP, Seen.MUTE), None),
        ((IDLE, at(1), IDLE), None),
        ((Seen.UP,) * 9, None),
        ((at(1),) * 9, None),
    ],
)
def test_only_looks_that_agree_prove_death(looks, error):
    last = verdicts(*looks)[-1][0]
    assert (last and last.error) == error
    assert all(failure is None for failure, _ in verdicts(*looks)[:-1])


def test_only_what_moves_proves_work():
    assert [alive for _, alive in verdicts(at(1), at(1), at(2), at(2), at(3), Seen.UP, Seen.LOADING)] == [
        False, False, True, False, True, False, True,
    ]  # fmt: skip


def test_life_between_two_looks_makes_the_evidence_worthless():
    evidence = Evidence()
    for seen in (Seen.MUTE, Seen.MUTE):
        assert evidence.weigh(seen, 1.0) is None and evidence.mute
    evidence.forget()
    assert not evidence.mute and evidence.weigh(Seen.MUTE, 1.0) is None


# ------------------------------------------------------------------------------------------- on sockets


@pytest.fixture
def fast_time(monkeypatch):
    monkeypatch.setenv("METAGPT_LOCALLLM_TIME_SCALE", SCALE)


AUTO = {"timeouts": {"first_token": "auto", "stall": "auto", "total": "auto"}, "retry": {"attempts": 1}}


async def ended(call):
    started = time.monotonic()
    with pytest.raises(errors.LocalLLMError) as caught:
        await complete(call)
    return caught.value, time.monotonic() - started


async def test_slots_that_move_keep_a_request_alive_beyond_its_deadline(ask, fast_time):
    ticks = []

    async def slots():
        ticks.append(1)
        return [{"id": 0, "is_processing": True, "id_task": 1, "n_prompt_tokens_processed": 512 * len(ticks)}]

    class Slow(RawServer):
        async def _chat(self, writer, answer):
            await asyncio.sleep(2.5)
            await super()._chat(writer, answer)

    whole = b'data: {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]}\n\n'
    settings = {**AUTO, "timeouts": {"first_token": 0.6, "stall": 1, "total": 60}}
    async with Slow(whole, about={"/props": LLAMA, "/slots": slots}) as server:
        assert (await complete(ask(server, settings=settings))).text == "fine"
    assert len(server.requests) == 1 and len(ticks) > 5


async def test_slots_that_stand_still_do_not(ask, fast_time):
    slots = [{"id": 0, "is_processing": True, "id_task": 1, "n_prompt_tokens_processed": 512}]
    settings = {**AUTO, "timeouts": {"first_token": 0.6, "stall": 1, "total": 60}}
    async with RawServer(b"", about={"/props": LLAMA, "/slots": slots}, hold=True) as server:
        error, _ = await ended(ask(server, settings=settings))
    assert isinstance(error, errors.FirstTokenTimeout)


async def test_slots_that_are_idle_prove_that_the_request_is_lost(ask, fast_time):
    slots = [{"id": 0, "is_processing": False}]
    async with RawServer(b"", about={"/props": LLAMA, "/slots": slots}, hold=True) as server:
        error, seconds = await ended(ask(server, settings=AUTO))
    assert isinstance(error, errors.RequestLost) and isinstance(error, openai.APIConnectionError)
    assert seconds < 10, "long before the 30 s of the deadline"


@pytest.mark.parametrize("slots", [[], [{"id": 0, "state": 0}, {"id": 1, "state": 1}]], ids=["none", "of an old build"])
async def test_slots_that_do_not_say_whether_they_work_prove_nothing(ask, fast_time, slots):
    async with RawServer(b"", about={"/props": LLAMA, "/slots": slots, "/health": {}}, hold=True) as server:
        error, _ = await ended(ask(server, settings={**AUTO, "timeouts": {"first_token": 1.5}}))
    assert isinstance(error, errors.FirstTokenTimeout)


async def test_a_port_that_is_closed_while_the_connection_stands_is_noticed(ask, fast_time):
    async with RawServer(b"", hold=True) as server:
        call = asyncio.create_task(ended(ask(server, settings=AUTO)))
        while not server.requests:
            await asyncio.sleep(0.02)
        server._server.close()
        error, seconds = await call
    assert isinstance(error, errors.ServerGone) and seconds < 10


PROCESS = """
import asyncio, sys
from metagpt_localllm.simulator import Answer, Machine, Simulator
async def main():
    machine = Machine(prefill_speed=1e6, decode_speed=20)
    async with Simulator(machine, host=sys.argv[1], answer=lambda m, t: Answer(text="word " * 400)) as server:
        print(server.base_url, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


@contextlib.contextmanager
def served(host, *prefix):
    child = subprocess.Popen([*prefix, sys.executable, "-c", PROCESS, host], stdout=subprocess.PIPE, text=True)
    child.base_url, child.model = child.stdout.readline().strip(), "codebooga-34b"
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def process():
    with served("127.0.0.1") as child:
        yield child


@pytest.fixture
def far_host():
    """The name of a network namespace whose end of a cable can be pulled, and its address."""
    name = f"llm{os.getpid()}"
    # Another run may do the same at the same time.
    net = f"10.98.{os.getpid() % 256}"
    ip = functools.partial(subprocess.run, check=True, capture_output=True)
    try:
        ip(["ip", "netns", "add", name])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        try:
            ip(["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", "far", "netns", name])
        except subprocess.CalledProcessError:
            pytest.skip("this kernel gives no veth")
        ip(["ip", "addr", "add", f"{net}.1/30", "dev", f"{name}a"])
        ip(["ip", "link", "set", f"{name}a", "up"])
        ip(["ip", "-n", name, "addr", "add", f"{net}.2/30", "dev", "far"])
        ip(["ip", "-n", name, "link", "set", "far", "up"])
        yield name, f"{net}.2"
    finally:
        ip(["ip", "netns", "del", name])


async def ended_by(process, ask, pull):
    tokens = []
    settings = {**AUTO, "timeouts": {"first_token": 30, "stall": 30, "total": 60}}
    call = asyncio.create_task(ended(ask(process, settings=settings, show=tokens.append)))
    while len(tokens) < 3 and not call.done():
        await asyncio.sleep(0.02)
    pull()
    started = time.monotonic()
    error, _ = await call
    return error, time.monotonic() - started


async def test_a_process_that_is_stopped_is_noticed_and_named(process, ask, fast_time):
    error, seconds = await ended_by(process, ask, lambda: os.kill(process.pid, signal.SIGSTOP))
    assert isinstance(error, errors.ServerUnresponsive) and seconds < 15
    assert error.partial.startswith("word word")


async def test_a_process_that_is_killed_is_noticed_at_once_and_named(process, ask, fast_time):
    error, seconds = await ended_by(process, ask, lambda: os.kill(process.pid, signal.SIGKILL))
    assert isinstance(error, errors.IncompleteStream) and seconds < 5


async def test_a_cable_that_is_pulled_is_noticed_and_named(far_host, ask, fast_time):
    name, address = far_host
    with served(address, "ip", "netns", "exec", name) as child:
        down = ["ip", "-n", name, "link", "set", "far", "down"]
        error, seconds = await ended_by(child, ask, lambda: subprocess.run(down, check=True))
    assert isinstance(error, errors.ServerUnresponsive) and seconds < 20


@pytest.mark.parametrize("dialect", ["llama-cpp-python", "plain"])
async def test_a_server_that_must_not_be_asked_is_not(simulator, ask, fast_time, dialect):
    machine = Machine(prefill_speed=1e6, decode_speed=1.5)
    answer = Answer(text="a b c d")
    async with simulator(dialect=dialect, machine=machine, scale=1, answer=lambda m, t: answer) as server:
        await complete(ask(server, settings={"timeouts": {"stall": 10}}))
        asked = [path for path in server.paths if "chat" not in path]
    first_chat = server.paths.index("/v1/chat/completions")
    assert not [path for path in server.paths[first_chat + 1 :] if "chat" not in path], asked


# ------------------------------------------------------------------------------------------- learned


async def test_deadlines_come_down_to_what_the_server_has_shown_and_say_why(simulator, ask, fast_time):
    seen = []
    unsubscribe = events.subscribe(seen.append)
    machine = Machine(prefill_speed=40, decode_speed=10)
    try:
        async with simulator(Fault("keepalive_only", on=9), dialect="plain", machine=machine, scale=20) as server:
            for number in range(8):
                await complete(ask(server, f"{number} " + "lorem ipsum " * 30, settings={"timeouts": {}}))
            error, seconds = await ended(ask(server, "9 " + "lorem ipsum " * 30, settings=AUTO))
    finally:
        unsubscribe()
    sent = [event for event in seen if isinstance(event, events.Sent)]
    assert sent[0].first_token == 30 and "nothing learned yet" in sent[0].why["first_token"]
    assert sent[-1].first_token < 15
    assert isinstance(error, errors.FirstTokenTimeout) and "tok/s (q99 of 8 calls)" in str(error) and seconds < 20


async def test_what_was_learned_is_there_in_the_next_run(simulator, ask, fast_time):
    from metagpt_localllm import history

    seen = []
    unsubscribe = events.subscribe(seen.append)
    async with simulator(machine=Machine(prefill_speed=40, decode_speed=10), scale=20) as server:
        call = ask(server, "lorem ipsum " * 30, settings={"timeouts": {}})
        await complete(call)
        assert history.state_at("~").flush(10)
        history._histories.clear()  # as a new process has none
        await complete(call)
    unsubscribe()
    assert "of 1 call" in [event for event in seen if isinstance(event, events.Sent)][-1].why["first_token"]


def test_a_list_that_grows_after_it_was_sent_shares_only_what_was_sent(tmp_path):
    known = History(Endpoint("http://a/v1", "m"), State(tmp_path / "x.db"))
    messages = [{"role": "user", "content": "one two three"}]
    first = estimate_message(messages[0])
    known.sent(messages, [first])
    messages.append({"role": "assistant", "content": "four five six"})
    assert known.shared_tokens(messages) == first


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 1000])
def test_what_is_shared_is_the_longest_beginning_of_any_earlier_prompt(tmp_path, size):
    known = History(Endpoint("http://a/v1", "m"), State(tmp_path / "x.db"))
    system, task = {"role": "system", "content": "be brief"}, "lorem " * 200
    assert known.shared_tokens([system]) == 0
    other = {"role": "user", "content": task[:size] + "|" * 200}
    for messages in ([system, other], [system], [{"role": "user", "content": task}]):
        known.sent(messages, [100.0, size + 200.0][: len(messages)])  # a token for each character of the other
    asked = [system, {"role": "user", "content": task}]
    assert known.shared_tokens(asked) == 100 + size


async def test_ten_roles_at_one_slot_wait_on_our_side_and_none_times_out(simulator, ask):
    seen = []
    unsubscribe = events.subscribe(seen.append)
    machine = Machine(prefill_speed=1e6, decode_speed=60)
    settings = {"timeouts": {"first_token": 0.8, "stall": 0.8, "total": 1.2}, "retry": {"attempts": 1}}
    try:
        async with simulator(machine=machine, scale=1) as server:  # 36 tokens: 0.6 s for each call
            outcomes = await asyncio.gather(*(complete(ask(server, f"q{n}", settings, call_timeout=3)) for n in range(10)))
    finally:
        unsubscribe()
    assert [outcome.text for outcome in outcomes] == [WORDS] * 10
    kinds = [type(event).__name__ for event in seen]
    assert kinds.count("Queued") == 9 and kinds.count("Done") == 10 and "Retry" not in kinds


async def test_requests_that_exceeded_the_shared_context_together_go_alone(simulator, ask):
    body = b'{"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}'
    refusal = b"HTTP/1.1 500 x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    whole = b'data: {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]}\n\n'
    running, most = [], []

    class Counting(RawServer):
        async def _chat(self, writer, answer):
            running.append(1)
            await asyncio.sleep(0.1)
            most.append(len(running))
            running.pop()
            await super()._chat(writer, answer)

    async with Counting(refusal + body, refusal + body, whole) as server:
        settings = {"concurrency": 2}
        outcomes = await asyncio.gather(*(complete(ask(server, f"q{n}", settings)) for n in range(2)))
    assert [outcome.text for outcome in outcomes] == ["fine", "fine"]
    assert most[:2] == [2, 2] or max(most[:2]) == 2
    assert most[2:] == [1, 1]


async def test_calls_that_wait_for_the_same_server_share_a_look():
    async def health():
        await asyncio.sleep(0.05)
        return {}

    def waiting(server, calls):
        endpoint = Endpoint(server.base_url, "m")
        return [asyncio.ensure_future(watch(VLLM(), endpoint, lambda: 10.0, lambda loading: None)) for _ in range(calls)]

    async with RawServer(about={"/health": health}) as server:
        tasks = waiting(server, 20)
        await asyncio.sleep(0.2)
        tasks += waiting(server, 20)  # what was seen just now is still of use
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert server.others == ["/health"]


async def test_a_look_ends_with_the_last_call_that_waits_for_it():
    asked = asyncio.Event()

    async def health():
        asked.set()
        await asyncio.sleep(60)

    def looks():
        return [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "_look"]

    async with RawServer(about={"/health": health}) as server:
        endpoint = Endpoint(server.base_url, "m")
        tasks = [asyncio.ensure_future(watch(VLLM(), endpoint, lambda: 10.0, lambda loading: None)) for _ in range(2)]
        await asyncio.wait_for(asked.wait(), 5)
        for task in tasks:
            assert len(looks()) == 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not looks()
