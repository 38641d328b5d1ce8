"""A journal of made-up calls, for tests and pictures of the report: as many as one likes, the same every time."""

from __future__ import annotations

import random
from dataclasses import replace

from metagpt_localllm.journal import CallRecord, Journal, Replay, RunRecord
from metagpt_localllm.state import State

#: Markup in names and errors, a Chinese name, one that is very long, none, and one that turns the line around.
ROLES = ("Engineer", "Product Manager", "项目经理（负责需求与排期）", "<img src=x onerror=alert(1)>",
         "A role whose name somebody has written out at a length that no page of a phone's width has ever had room for", "",
         "\u202eEvil\u0000</script><script>alert(2)</script>")  # fmt: skip
ACTIONS = ("WriteCode", "WritePRD", "WriteDesign", "WriteCodeReview", "编写测试", "RunCode")
ERRORS = (
    ("FirstTokenTimeout", "no token within 212.0 s (first_token; first_token 212s = 3,110 uncached tokens / 18.4 tok/s (q99 of 41 calls) × 3)"),
    ("IncompleteStream", "the stream ended without a finish_reason: the answer is cut"),
    ("ServerFailed", 'the server says: 500 <b>"boom"</b> </script><script>alert(3)</script>\u2028 {{data}}'),
)  # fmt: skip
MODEL = "codebooga-34b-v0.1"


def made_up(calls, runs=1, begin=1_760_000_000.0, seed=1, idle=0.0, replayed=0.05):
    """Runs, their calls with the run's id, and replays. ``idle``: seconds between two runs and in the middle of each; ``replayed``: share of answers that are given again."""
    dice = random.Random(seed)
    now, told, made, replays = begin, [], [], []
    for index in range(runs):
        id, started = f"20260101-1200{index:02}-{index:04x}", now
        for number in range(1, calls // runs + 1):
            call, now = _call(number, now, dice)
            made.append((id, call))
            if dice.random() < replayed:
                replays.append(Replay(id, number, now, 200))
            if number == calls // runs // 2:
                now += idle
        outcome = "failed" if index % 3 == 2 else "done"
        told.append(RunRecord(id, "k", ("metagpt", "a secret idea"), "/home/me", started, now + 300, outcome, resumed=index % 2))
        now += idle
    return told, made, replays


def fill(path, *args, **options):
    """Writes them into a journal at ``path``; the ids of the runs."""
    runs, calls, replays = made_up(*args, **options)
    state = State(path)
    journal = Journal(state)
    for run in runs:
        journal.begin_run(run)
    for id, call in calls:
        journal.begin_call(id, replace(call, outcome="running", ended=None))
        if call.outcome != "running":
            journal.end_call(id, call.number, call.outcome, **{name: getattr(call, name) for name in (
                "ended", "answer", "usage", "attempts", "trims", "saved_tokens", "cached_tokens", "queued", "finish_reason")})  # fmt: skip
    for replay in replays:
        journal.replayed(replay.run, replay.number, replay.tokens)
    for run in runs:
        journal.end_run(run.id, run.outcome)
    assert journal.flush()
    state.close()
    return [run.id for run in runs]


def _call(number, now, dice):
    role = dice.choices(range(len(ROLES)), (30, 10, 8, 6, 5, 2, 3))[0]
    prompt = int(min(max(dice.lognormvariate(7.3, 0.9), 60), 30_000))
    cached = int(prompt * dice.choice((0, 0, 0.3, 0.8, 0.9)))
    started = now + dice.random() * 2
    queued = dice.choice((0.0, 0.0, dice.random() * 20))
    at, attempts, failing = started + queued + 0.05, [], dice.random() < 0.12
    gives_up = failing and dice.random() < 0.1
    for again in range((4 if gives_up else dice.randint(1, 2)) if failing else 0):
        error, detail = ERRORS[dice.randrange(len(ERRORS))]
        took = dice.uniform(30, 212)
        ttft = None if error == "FirstTokenTimeout" else took / 2
        attempts.append({"at": at, "prompt_tokens": prompt, "deadlines": {"first_token": 212.0 + prompt / 20, "stall": 60.0, "total": 900.0},
                         "ended": at + took, "tokens": 40 * again, "ttft": ttft, "longest_gap": 1.0, "error": error, "detail": detail})  # fmt: skip
        at += took + dice.random() * 4
    answer = int(dice.lognormvariate(5.5, 0.7)) + 1
    ttft, decode = (prompt - cached) / dice.uniform(30, 50) + dice.random(), answer / dice.uniform(2.4, 3.4)
    outcome = "failed" if gives_up else dice.choices(("done", "cancelled", "running"), (200, 1, 1))[0]
    if outcome != "failed":
        attempts.append({"at": at, "prompt_tokens": prompt, "deadlines": {"first_token": 3 * ttft + 30 + dice.random() * 90}})
    if outcome == "done":
        attempts[-1].update(ended=at + ttft + decode, tokens=answer, ttft=ttft, longest_gap=0.5)
    ended = {"done": at + ttft + decode, "failed": at, "cancelled": at + ttft / 2, "running": None}[outcome]
    trims = [{"dropped_messages": 2, "shortened_messages": 1, "replaced_messages": 0, "removed_tokens": 900, "prompt_tokens": prompt,
              "budget": 3072, "window": 4096}] if dice.random() < 0.04 else []  # fmt: skip
    done = outcome == "done"
    call = CallRecord(
        number=number, digest=f"d{number}", action=dice.choice(ACTIONS), role=ROLES[role], tier=dice.choice(("default", "slow")),
        model=MODEL, server="http://localhost:8080/v1", started=started, ended=ended, outcome=outcome, attempts=attempts, trims=trims,
        answer={"content": "a secret answer"} if done else None, queued=queued, finish_reason="stop" if done else None,
        usage={"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer} if done else None,
        superseded=outcome == "running",
        saved_tokens=answer // 3 if done and len(attempts) > 1 else 0, cached_tokens=cached if done else None,
    )  # fmt: skip
    # Half of the calls overlap with the next one.
    return call, (started + (0.5 if dice.random() < 0.5 else 1) * ((ended or at) - started))
