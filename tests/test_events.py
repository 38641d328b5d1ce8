"""Events: what happens to a call, in its order, for whoever listens; nobody who listens can harm it."""

import asyncio
import logging
import threading

import pytest

import metagpt_localllm
from metagpt_localllm import events
from metagpt_localllm.call import complete
from metagpt_localllm.listening import on_event
from metagpt_localllm.simulator import Fault, Machine

WORDS = 36  # tokens of the simulator's answer


def names(seen):
    return [type(event).__name__ for event in seen]


@pytest.fixture
def listen():
    """Listens, and stops when the test ends."""
    subscriptions = []

    def listen(callback, *kinds):
        subscriptions.append(on_event(callback, *kinds))
        return subscriptions[-1]

    yield listen
    for unsubscribe in subscriptions:
        unsubscribe()


async def test_a_call_tells_of_its_prefill_and_of_every_token(simulator, ask, listen):
    seen = []
    listen(seen.append)
    async with simulator() as server:
        outcome = await complete(ask(server))
    kinds = list(dict.fromkeys(names(seen)))
    assert kinds == ["Sent", "Prefill", "Token", "Done"]
    tokens = [event for event in seen if isinstance(event, events.Token)]
    assert "".join(event.text for event in tokens) == outcome.text
    assert [event.tokens for event in tokens] == list(range(1, outcome.usage.completion_tokens + 1))
    prefill = [event for event in seen if isinstance(event, events.Prefill)]
    assert prefill[-1].processed == prefill[-1].total >= prefill[0].processed
    assert seen[0].attempt == 1 and seen[0].attempts == 4 and seen[0].expected is None


async def test_tokens_come_only_to_whoever_asks_for_them(simulator, ask):
    all_but_tokens, only_done = [], []
    ends = [events.subscribe(all_but_tokens.append), events.subscribe(only_done.append, events.Done)]
    try:
        assert not events.wanted(events.Token)
        async with simulator() as server:
            await complete(ask(server))
    finally:
        for end in ends:
            end()
    assert "Token" not in names(all_but_tokens) and "Done" in names(all_but_tokens)
    assert names(only_done) == ["Done"]


async def test_a_stall_is_told_of_before_it_ends_the_attempt(simulator, ask, listen, monkeypatch):
    monkeypatch.setattr("metagpt_localllm.attempt._STALLED", 0.2)
    seen = []
    listen(seen.append, events.Stalled, events.Retry)
    async with simulator(Fault("stall", on=1, after=5)) as server:
        await complete(ask(server, settings={"timeouts": {"stall": 1.0}, "retry": {"backoff": {"initial": 0.01, "max": 0.01}}}))
    assert names(seen)[:2] == ["Stalled", "Stalled"] and names(seen)[-1] == "Retry"
    silences = [event.silence for event in seen if isinstance(event, events.Stalled)]
    assert silences == sorted(silences) and all(0.2 <= silence <= 1.5 for silence in silences)
    assert {event.limit for event in seen if isinstance(event, events.Stalled)} == {1.0}


async def test_a_model_that_loads_is_told_of_with_what_it_took_before(simulator, ask, listen):
    seen = []
    listen(seen.append, events.Loading, events.Done)
    async with simulator(machine=Machine(load_time=300), scale=1000) as server:
        await complete(ask(server, settings={"retry": {"backoff": {"initial": 0.05, "max": 0.1}}}))
    assert names(seen) == ["Loading", "Done"]
    assert seen[0].usual is None and seen[0].limit > 0


async def test_an_async_callback_gets_the_events_in_their_order(simulator, ask, listen):
    seen = []

    async def slow(event):
        await asyncio.sleep(0.001 * (len(seen) % 3))
        seen.append(event)

    subscription = listen(slow)
    async with simulator() as server:
        outcome = await complete(ask(server))
        await subscription.drained()
    assert "".join(event.text for event in seen if isinstance(event, events.Token)) == outcome.text
    assert names(seen)[0] == "Sent" and names(seen)[-1] == "Done"


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_an_exception_in_a_callback_harms_no_call(simulator, ask, listen, how):
    called = []

    def broken(event):
        called.append(event)
        raise RuntimeError("broken")

    async def broken_later(event):
        broken(event)

    subscription = listen(broken if how == "sync" else broken_later)
    async with simulator() as server:
        outcome = await complete(ask(server))
        await subscription.drained()
    assert outcome.text and "Done" in names(called)


async def test_a_callback_that_is_too_slow_misses_tokens_and_nothing_else(monkeypatch, listen, caplog):
    monkeypatch.setattr("metagpt_localllm.listening._MOST_WAITING", 5)
    go, seen = asyncio.Event(), []

    async def slow(event):
        await go.wait()
        seen.append(event)

    subscription = listen(slow)
    call = events.CallInfo(1, "m", None, "default")
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            events.publish(events.Token(call, number, "x"))
        events.publish(events.Replayed(call, 1, 20))
    go.set()
    await subscription.drained()
    assert names(seen) == ["Token"] * 5 + ["Replayed"]
    assert sum("too slow" in record.message for record in caplog.records) == 1


def test_what_still_waits_when_the_loop_ends_makes_no_noise(listen, recwarn):
    async def never(event):
        await asyncio.sleep(60)

    listen(never)

    async def main():
        for number in range(3):
            events.publish(events.Replayed(events.CallInfo(1, "m", None, "default"), number, 1))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_after_it_was_ended_no_more_events_come():
    seen = []
    end = on_event(seen.append)
    event = events.Replayed(events.CallInfo(1, "m", None, "default"), 1, 1)
    events.publish(event)
    end()
    end()
    events.publish(event)
    assert seen == [event]


def test_a_callback_serves_calls_on_several_loops(listen):
    seen = []

    async def take(event):
        seen.append((threading.current_thread().name, event.number))

    subscription = listen(take)

    async def main(number):
        events.publish(events.Replayed(events.CallInfo(1, "m", None, "default"), number, 1))
        await subscription.drained()

    threads = [threading.Thread(target=lambda n=n: asyncio.run(main(n)), name=f"t{n}") for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [("t0", 0), ("t1", 1), ("t2", 2)]


def test_on_event_is_the_packages_own_name():
    assert metagpt_localllm.on_event is on_event
