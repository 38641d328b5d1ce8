"""From the events of real calls to what is shown: by the clock, in threads, in a notebook, and gone when they end."""

import asyncio
import logging
import threading
import time

import pytest

from metagpt_localllm import events, progress
from metagpt_localllm.call import complete
from metagpt_localllm.phases import Phase
from metagpt_localllm.progress import LogLines, Progress
from metagpt_localllm.settings import ProgressSettings
from metagpt_localllm.simulator import Fault, Machine
from metagpt_localllm.tiers import Caller


class Shown:
    """Notes what it is to show."""

    tick = 0.02

    def __init__(self):
        self.phases, self.updates, self.ends = [], [], 0

    def changed(self, view):
        self.phases.append(view.phase)

    def update(self, views):
        self.updates.append([view.number for view in views])

    def end(self):
        self.ends += 1


@pytest.fixture
def follow():
    """Follows all calls with a way of showing."""
    ends = []

    def make(shower):
        ends.append(events.subscribe(Progress(lambda: shower).take, *events.KINDS))
        return shower

    yield make
    for end in ends:
        end()


async def test_a_call_goes_through_its_phases_and_then_nothing_is_shown(simulator, ask, follow):
    shown = follow(Shown())
    retry = {"timeouts": {"stall": 0.4}, "retry": {"backoff": {"initial": 0.05, "max": 0.05}}}
    async with simulator(Fault("drop", on=1, after=5)) as server:
        await complete(ask(server, settings=retry))
    assert [phase for phase in shown.phases] == [Phase.PREFILL, Phase.GENERATING, Phase.RETRY, Phase.PREFILL, Phase.GENERATING]
    assert shown.ends == 1
    count = len(shown.updates)
    await asyncio.sleep(0.1)
    assert len(shown.updates) == count


async def test_calls_that_wait_for_their_turn_are_shown_with_the_one_that_runs(simulator, ask, follow):
    shown = follow(Shown())
    async with simulator(machine=Machine(prefill_speed=1e6, decode_speed=200.0), scale=1) as server:
        await asyncio.gather(*(complete(ask(server)) for _ in range(3)))
    assert shown.phases.count(Phase.QUEUED) == 2
    assert max(len(numbers) for numbers in shown.updates) == 3 and shown.ends == 1


async def test_a_call_that_is_cancelled_is_shown_no_longer(simulator, ask, follow):
    shown = follow(Shown())
    async with simulator(Fault("hang", on=1), scale=1) as server:
        task = asyncio.ensure_future(complete(ask(server)))
        while not shown.updates:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert shown.ends == 1


async def test_a_server_that_proves_that_it_works_is_told_of(simulator, ask, monkeypatch):
    monkeypatch.setenv("METAGPT_LOCALLLM_TIME_SCALE", "20")
    working = []
    end = events.subscribe(working.append, events.Working)
    try:
        async with simulator(machine=Machine(prefill_speed=40.0, decode_speed=10.0), scale=20) as server:
            await complete(ask(server, "word " * 900, settings={"timeouts": {"first_token": 30}}))
    finally:
        end()
    assert working


def test_calls_in_several_threads_end_in_nothing(follow):
    shown = follow(Shown())

    def calls(thread):
        for n in range(200):
            call = events.CallInfo(thread * 1000 + n, "m", Caller("A"), "default")
            events.publish(events.Sent(call, 1, 4, 10, None, 1.0, 1.0, 1.0, {}))
            events.publish(events.Token(call, 1, "x"))
            events.publish(events.Cancelled(call))

    threads = [threading.Thread(target=calls, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    count = len(shown.updates)
    time.sleep(0.1)
    assert shown.phases.count(Phase.PREFILL) == 800 and len(shown.updates) <= count + 1


async def test_the_log_has_a_line_for_a_phase_and_one_every_so_often_while_it_lasts(simulator, ask, follow):
    said = []
    follow(LogLines(lambda view, text: said.append(text), every=0.25))
    async with simulator(machine=Machine(prefill_speed=1e6, decode_speed=36.0), scale=1) as server:
        await complete(ask(server))
    phases = [text.split(" ")[0] for text in said]
    assert phases[0] == "prefill" and phases.count("prefill") == 1
    assert 3 <= phases.count("generating") <= 6
    assert "generating 1 token (" in said[1] and "tok/s" in said[-1]


def test_the_first_setting_of_a_process_wins():
    logger = logging.getLogger("metagpt_localllm.test")
    for first, others in (("off", "log"), ("log", "off")):
        progress.hide()
        for mode in (first, others):
            progress.show(ProgressSettings(mode=mode), logger)
        assert events.wanted(events.Token) == (first == "log")


def test_in_a_notebook_one_output_is_updated_and_emptied():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = """
import time, logging
from metagpt_localllm import events, progress
from metagpt_localllm.settings import ProgressSettings
from metagpt_localllm.tiers import Caller
progress.show(ProgressSettings(), logging.getLogger())
for number in (1, 2):
    call = events.CallInfo(number, "m", Caller("WriteCode", "", "<b>Engineer"), "default")
    events.publish(events.Sent(call, 1, 4, 10, None, 600.0, 60.0, 7200.0, {}))
    for n in range(2000):
        events.publish(events.Token(call, n, "x"))
        print("x", end="")
        time.sleep(0.0005)
    events.publish(events.Cancelled(call))
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = nbclient.NotebookClient(book, timeout=60, kernel_name="python3")
    heard, process = [], client.process_message

    def listen(message, *rest):
        heard.append(message)
        return process(message, *rest)

    client.process_message = listen
    client.execute()
    displays = [message for message in heard if message["msg_type"] == "display_data"]
    updates = [message["content"]["data"] for message in heard if message["msg_type"] == "update_display_data"]
    assert len(displays) == 2 and 3 <= len(updates) <= 20
    assert any("<b>Engineer WriteCode  generating" in data["text/plain"] for data in updates)
    assert any("&lt;b&gt;Engineer WriteCode" in data["text/html"] for data in updates)
    left = [output for output in book.cells[0].outputs if output["output_type"] == "display_data"]
    assert [output["data"]["text/plain"] for output in left] == ["", ""]
    streams = "".join(output["text"] for output in book.cells[0].outputs if output["output_type"] == "stream")
    assert streams == "x" * 4000
