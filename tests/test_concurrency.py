"""Turns at a server."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagpt_localllm.concurrency import Gate


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


class Crowd:
    """Requests that run until they are told to end, and the order in which they were let in."""

    def __init__(self, gate):
        self.gate, self.began, self.tasks, self.ends = gate, [], {}, {}

    async def come(self, name, role="", alone=False):
        self.ends[name] = asyncio.Event()

        async def request():
            async with self.gate.turn(role or name, alone=alone):
                self.began.append(name)
                await self.ends[name].wait()

        self.tasks[name] = asyncio.create_task(request())
        await settle()

    async def end(self, name):
        self.ends[name].set()
        await settle()


async def test_no_more_run_than_there_are_places():
    crowd = Crowd(Gate(2))
    for name in "abc":
        await crowd.come(name)
    assert crowd.began == ["a", "b"] and (crowd.gate.running, crowd.gate.waiting) == (2, 1)
    await crowd.end("b")
    assert crowd.began == ["a", "b", "c"]


async def test_roles_take_turns_however_many_requests_one_of_them_has():
    crowd = Crowd(Gate(1))
    for name in ("a1", "a2", "a3", "b1", "c1"):
        await crowd.come(name, role=name[0])
    for _ in range(5):
        await crowd.end(crowd.began[-1])
    assert crowd.began == ["a1", "a2", "b1", "c1", "a3"]


async def test_a_request_that_must_be_alone_waits_for_the_others_and_keeps_them_out():
    crowd = Crowd(Gate(2))
    await crowd.come("a")
    await crowd.come("alone", alone=True)
    await crowd.come("b")
    assert crowd.began == ["a"]
    await crowd.end("a")
    assert crowd.began == ["a", "alone"]
    await crowd.end("alone")
    assert crowd.began == ["a", "alone", "b"]


async def test_more_places_let_more_in_at_the_next_occasion():
    crowd = Crowd(Gate(1))
    for name in "abc":
        await crowd.come(name)
    crowd.gate.places = 3
    await crowd.come("d")
    assert crowd.began == ["a", "b", "c"]


async def test_one_that_gives_up_waiting_takes_no_place():
    crowd = Crowd(Gate(1))
    for name in "abc":
        await crowd.come(name)
    crowd.tasks["b"].cancel()
    await settle()
    await crowd.end("a")
    assert crowd.began == ["a", "c"]
    await crowd.end("c")
    assert (crowd.gate.running, crowd.gate.waiting) == (0, 0)


async def test_one_that_is_cancelled_in_the_moment_of_its_turn_passes_it_on():
    crowd = Crowd(Gate(1))
    for name in "abc":
        await crowd.come(name)
    crowd.ends["a"].set()
    await asyncio.sleep(0)
    crowd.tasks["b"].cancel()
    await settle()
    assert "c" in crowd.began or crowd.began[-1] == "b"
    for name in "bc":
        await crowd.end(name)
    assert (crowd.gate.running, crowd.gate.waiting) == (0, 0)


async def test_an_error_inside_frees_the_place():
    gate = Gate(1)
    with pytest.raises(RuntimeError):
        async with gate.turn("a"):
            raise RuntimeError
    assert gate.running == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from(["end", "cancel"])), max_size=15), st.integers(1, 4))
def test_in_the_end_nothing_runs_and_nothing_waits(requests, places):
    async def play():
        crowd = Crowd(Gate(places))
        for number, (role, alone, _) in enumerate(requests):
            await crowd.come(number, role, alone)
            assert crowd.gate.running <= places
        for number, (_, _, how) in enumerate(requests):
            if how == "end":
                crowd.ends[number].set()
            else:
                crowd.tasks[number].cancel()
            await settle()
            assert crowd.gate.running <= places
        await asyncio.wait_for(asyncio.gather(*crowd.tasks.values(), return_exceptions=True), 5)
        assert (crowd.gate.running, crowd.gate.waiting) == (0, 0)

    asyncio.run(play())
