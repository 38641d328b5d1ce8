"""Learned deadlines beside fixed ones and an oracle, on simulated servers. No sockets, no clock: a few seconds.

    python -m bench.deadlines [--seed 1]

Seven workloads on three machines, 700 calls each: 14,700 calls, the same for every policy. One policy is a pair of
deadlines per attempt (first_token, stall); what it kills is sent again, up to four times, as the provider does. A call's
truth (queue, load, prefill, gaps, death) is drawn before any policy sees it.

Servers die silently here (hung process, black-holed packets, hung GPU): who closes the connection is noticed by all at once.
"with proof" is a server that reports prefill progress, its queue, its cache and its health (llama.cpp); 70 % of the deaths
are a server that answers nothing any more, which watch.py takes for gone after MUTE_SECONDS of silence (a closed port or idle
slots would prove more, and sooner), the rest hang below a health endpoint that still answers.
"without" is a server that says nothing but the tokens, not even whether they were cached; "health only" is the same with
that probe (LM Studio and Ollama's /v1, whose GET endpoints answer while a model works).
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass, field
from typing import Callable, Iterator, Optional

from metagpt_localllm.latency import DEFAULTS, Estimator, Sample, deadline
from metagpt_localllm.watch import CLOSED_PORT_SECONDS, IDLE_SECONDS, MUTE_SECONDS

CALLS, ATTEMPTS, PAUSE, BATCH, DEATHS = 700, 4, 1.0, 512, 0.02


@dataclass(frozen=True)
class Box:
    """A machine: tokens per second of prefill (in an empty context) and decode, seconds of a load, slope of attention."""

    prefill: float
    decode: float
    load: float
    slope: float


BOXES = {
    "34B, half on the GPU": Box(40, 2.5, 60, 1 / 12000),
    "13B on the GPU": Box(180, 10, 30, 1 / 20000),
    "7B on the GPU": Box(900, 45, 10, 1 / 6000),
}


@dataclass
class Truth:
    """One call as it is. ``speed`` and ``noise`` hold for all of its attempts; ``death`` is a part of the first one's time."""

    box: Box
    prompt: int
    shared: int
    cached: int
    answer: int
    wait: float = 0.0
    load: float = 0.0
    may_load: bool = False
    speed: float = 1.0
    noise: float = 1.0
    pause: float = 0.0  # seconds in prefill in which nothing moves
    gap: float = 1.0
    gap_at: float = 0.5
    death: Optional[float] = None
    provable: bool = False
    probe: float = MUTE_SECONDS  # seconds until the watch takes it for gone

    def prefill(self, begin: float, end: float) -> float:
        """Seconds for the prompt's tokens from ``begin`` to ``end``."""
        work = (end - begin) * (1 + self.box.slope * (begin + end) / 2)
        return work / (self.box.prefill * self.speed) * self.noise

    def decode(self) -> float:
        return self.answer / (self.box.decode * self.speed) + self.gap


def world(name: str, box: Box, rng: random.Random) -> Iterator[Truth]:
    """The calls of one workload."""
    slow_left = gone = 0
    ramp, speed, decay, context, loaded = 1.0, 1.0, 1.0, 1000, box
    busy = False
    for number in range(CALLS):
        prompt = int(min(max(rng.lognormvariate(math.log(2000), 0.7), 200), 8000))
        shared = int(prompt * (rng.uniform(0.5, 0.95) if rng.random() < 0.3 else rng.uniform(0, 0.15)))
        wait = load = 0.0
        may_load = number == 0
        pauses = 0.005
        if name == "noisy neighbour":
            busy = rng.random() < (0.85 if busy else 0.06)
            speed = rng.uniform(0.35, 0.7) if busy else 1.0
            pauses = 0.04 if busy else pauses
        elif name == "throttling to a third":
            # In the course of three calls, and back.
            if slow_left == 0 and rng.random() < 0.01:
                slow_left = rng.randint(15, 60)
            slow_left = max(slow_left - 1, 0)
            ramp = max(ramp * 3 ** (-1 / 3), 1 / 3) if slow_left else min(ramp * 3 ** (1 / 3), 1.0)
            speed = ramp
        elif name == "context to 16k":
            context = context + rng.randint(200, 1500)
            if context > 16000:
                context = rng.randint(800, 1500)
            prompt, shared = context, max(context - rng.randint(200, 1500), 100)
            if gone == 0 and rng.random() < 0.1:
                gone = 1
        elif name == "model swap" and rng.random() < 0.015:
            # Another quantization or size under the same name, after a restart.
            decay = rng.choice((0.4, 0.6, 1.0, 1.6))
            load, may_load = box.load * rng.lognormvariate(0, 0.4), True
        elif name == "load after idle" and rng.random() < 0.15:
            load, may_load = box.load * rng.lognormvariate(0, 0.4) * rng.choice((0.3, 1, 1)), True
        elif name == "behind another client" and rng.random() < 0.3:
            wait = rng.expovariate(1 / (2000 / box.prefill + 200 / box.decode))
        if number == 0:
            load = box.load
        cached = 0 if load or gone or rng.random() < 0.05 else shared
        gone = 0
        # Three kinds of bad luck: a slow call, a pause in prefill and one in decode (swapping, another job on the GPU).
        noise = rng.lognormvariate(0, 0.08)
        if rng.random() < 0.01:
            noise *= 1.3 * rng.paretovariate(2.5)
        pause = min(2 * rng.paretovariate(1.5), 120) if rng.random() < pauses else 0.0
        answer = int(min(max(rng.lognormvariate(math.log(300), 0.8), 10), 2000))
        now = speed * decay
        gap = (1.5 + rng.expovariate(2)) / (loaded.decode * now)
        if rng.random() < pauses:
            gap = max(gap, min(2 * rng.paretovariate(1.5), 120))
        dies = rng.random() < DEATHS
        yield Truth(loaded, prompt, shared, cached, answer, wait, load, may_load, now, noise, pause, gap, rng.random(),
                    rng.random() if dies else None, rng.random() < 0.7, MUTE_SECONDS + rng.random())  # fmt: skip


WORKLOADS = ("steady", "noisy neighbour", "throttling to a third", "context to 16k", "model swap", "load after idle",
             "behind another client")  # fmt: skip


@dataclass
class Score:
    calls: int = 0
    false: int = 0
    failed: int = 0
    wall: float = 0.0
    notice: list[float] = field(default_factory=list)
    proven: list[float] = field(default_factory=list)
    silences: list[float] = field(default_factory=list)  # that false time-outs ended

    def add(self, other: Score) -> None:
        self.calls += other.calls
        self.false += other.false
        self.failed += other.failed
        self.wall += other.wall
        self.notice += other.notice
        self.proven += other.proven
        self.silences += other.silences


class Fixed:
    """One silence for all."""

    proof = probe = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def first(self, truth: Truth, shared: int, may_load: bool, ttft: float) -> float:
        return self.seconds

    def stall(self, truth: Truth) -> float:
        return self.seconds

    def observe(self, sample: Sample) -> None:
        pass


class Oracle(Fixed):
    """Knows the moment at which the next token is due."""

    def first(self, truth: Truth, shared: int, may_load: bool, ttft: float) -> float:
        return ttft

    def stall(self, truth: Truth) -> float:
        return truth.gap


class Ours(Fixed):
    def __init__(self, proof: bool, probe: bool) -> None:
        self.proof, self.probe = proof, probe
        self.known = Estimator()

    def first(self, truth: Truth, shared: int, may_load: bool, ttft: float) -> float:
        cached = self.known.cached_tokens(truth.prompt, shared)
        estimate = self.known.first_token(truth.prompt - cached, cached_tokens=cached, may_load=may_load)
        return deadline("first_token", estimate, DEFAULTS["first_token"], backoff=self.known.backoff("first_token")).seconds

    def mark(self, processed: float, end: float) -> float:
        """Until the next sign of progress."""
        estimate = self.known.first_token(int(end - processed), cached_tokens=int(processed), may_queue=False)
        return deadline("progress", estimate, DEFAULTS["progress"], backoff=self.known.backoff("first_token")).seconds

    def stall(self, truth: Truth) -> float:
        name = "progress" if self.proof else "stall"
        return deadline(name, self.known.stall(), DEFAULTS[name], backoff=self.known.backoff("stall")).seconds

    def observe(self, sample: Sample) -> None:
        self.known.observe(sample)


def run(policy: Fixed, truths: list[Truth], score: Score) -> None:
    for truth in truths:
        score.calls += 1
        call(policy, truth, score)


def call(policy: Fixed, truth: Truth, score: Score) -> None:
    cached, shared, wait, load, death = truth.cached, truth.shared, truth.wait, truth.load, truth.death
    may_load, false = truth.may_load, 0
    for attempt in range(1, ATTEMPTS + 1):
        begin = min(cached, truth.prompt - 1)
        prefill = truth.prefill(begin, truth.prompt) + (truth.pause if attempt == 1 else 0.0)
        ttft = wait + load + prefill
        dies = None if death is None else death * (ttft + truth.decode())
        death = None
        told = {"cached_tokens": begin, "waited": wait + load, "load": load > 0} if policy.proof else {"load": may_load}
        base = {"prompt_tokens": truth.prompt, "shared_tokens": shared, "attempt": attempt, **told}
        silence, since = first_silence(policy, truth, shared, may_load, begin, wait, load, ttft, dies)
        if since is not None and (dies is None or since + silence < dies or dies >= ttft):
            # A false time-out before the first token.
            spent = since + silence
            score.wall += spent + PAUSE
            false += 1
            score.silences.append(silence)
            policy.observe(Sample(**{**base, "waited": 0.0}, censored="first_token", elapsed=silence))
            done = max(spent - wait - load, 0) / max(prefill, 1e-9) * (truth.prompt - begin)
            cached = int(begin + done // BATCH * BATCH)
            # Ollama gives a load up when its client goes: it starts over. A queue moves on meanwhile.
            wait, load = max(wait - spent, 0.0), load if spent < wait + load else 0.0
            shared = truth.prompt
            continue
        if dies is not None and dies < ttft:
            assert since is not None
            end = since + silence
            proven = policy.probe and truth.provable
            noticed = min(end - dies, truth.probe) if proven else end - dies
            (score.proven if proven else score.notice).append(noticed)
            score.wall += dies + noticed + PAUSE
            if not proven:
                policy.observe(Sample(**{**base, "waited": 0.0}, censored="first_token", elapsed=silence))
            cached, wait, load, shared = 0, 0.0, 0.0, truth.prompt
            continue
        seconds = {"prefill_seconds": prefill} if policy.proof else {}
        decode, stall = truth.decode(), policy.stall(truth)
        gap_begins = ttft + truth.gap_at * (decode - truth.gap)
        part = min(max(int(truth.answer * truth.gap_at), 1), truth.answer)
        if dies is not None and (truth.gap <= stall or dies < gap_begins):
            proven = policy.probe and truth.provable
            noticed = min(stall, truth.probe) if proven else stall
            (score.proven if proven else score.notice).append(noticed)
            score.wall += dies + noticed + PAUSE
            if not proven:
                policy.observe(Sample(**base, **seconds, ttft=ttft, answer_tokens=part, censored="stall", elapsed=stall))
            cached, wait, load, shared = 0, 0.0, 0.0, truth.prompt
            continue
        if truth.gap > stall:
            false += 1
            score.silences.append(stall)
            score.wall += gap_begins + stall + PAUSE
            policy.observe(Sample(**base, **seconds, ttft=ttft, answer_tokens=part, censored="stall", elapsed=stall))
            cached, wait, load, shared = truth.prompt - 1, 0.0, 0.0, truth.prompt
            continue
        score.wall += ttft + decode
        policy.observe(Sample(**base, **seconds, ttft=ttft, answer_tokens=truth.answer, decode_seconds=decode,
                              longest_gap=truth.gap))  # fmt: skip
        break
    else:
        # MetaGPT's run ends here: the work is still to be done.
        score.failed += 1
        score.wall += truth.load + truth.prefill(truth.cached, truth.prompt) + truth.pause + truth.decode()
    score.false += false


def first_silence(
    policy: Fixed, truth: Truth, shared: int, may_load: bool, begin: int, wait: float, load: float, ttft: float,
    dies: Optional[float],
) -> tuple[float, Optional[float]]:  # fmt: skip
    """The deadline that would fire before the first token and when it began; None where none does."""
    if not isinstance(policy, Ours) or not policy.proof:
        silence = policy.first(truth, shared, may_load, ttft)
        fires = silence < ttft or (dies is not None and dies < ttft)
        return silence, 0.0 if fires else None
    now = wait + load  # the server shows both, and that the other client's request moves
    if dies is not None and dies < wait:
        return policy.mark(0, BATCH), dies
    if dies is not None and dies < now:
        return policy.first(truth, shared, may_load, ttft), dies
    lost = ttft - now - truth.prefill(begin, truth.prompt)
    processed = begin
    while processed < truth.prompt:
        end = min(processed + BATCH, truth.prompt)
        silence = policy.mark(processed, end)
        takes = truth.prefill(processed, end) + lost
        lost = 0.0
        if silence < takes or (dies is not None and dies < now + takes and dies < ttft):
            return silence, now
        now += takes
        processed = end
    return 0.0, None


POLICIES: dict[str, Callable[[], Fixed]] = {
    "fixed 60 s": lambda: Fixed(60),
    "fixed 300 s": lambda: Fixed(300),
    "fixed 600 s": lambda: Fixed(600),
    "learned, without proof": lambda: Ours(False, False),
    "learned, health only": lambda: Ours(False, True),
    "learned, with proof": lambda: Ours(True, True),
    "oracle": lambda: Oracle(0),
}


LEARNED = tuple(name for name in POLICIES if name.startswith("learned"))


def simulate(seed: int) -> dict[tuple[str, str, str], Score]:
    """Scores by policy, workload and machine."""
    scores = {}
    for workload in WORKLOADS:
        for machine, box in BOXES.items():
            truths = list(world(workload, box, random.Random(f"{seed}/{workload}/{machine}")))
            for name, make in POLICIES.items():
                score = scores[name, workload, machine] = Score()
                run(make(), truths, score)
    return scores


def merged(scores: dict[tuple[str, str, str], Score], *wanted: str) -> Score:
    whole = Score()
    for key, score in scores.items():
        if all(part in key for part in wanted):
            whole.add(score)
    return whole


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else math.nan


def row(label: str, score: Score, oracle: Score) -> str:
    every = score.notice + score.proven
    return (
        f"| {label} | {score.false} ({100 * score.false / score.calls:.2f} %) | {score.failed} "
        f"| {quantile(every, 0.5):.1f} s | {quantile(every, 0.95):.0f} s | {score.wall / oracle.wall:.3f} |"
    )


HEAD = "| {} | false time-outs | calls given up | dead server noticed, median | p95 | wall time / oracle's |\n| --- | --- | --- | --- | --- | --- |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    scores = simulate(parser.parse_args().seed)
    oracle = merged(scores, "oracle")
    print(f"{oracle.calls:,} calls for each policy, {len(oracle.notice)} silent deaths\n")
    print(HEAD.format("all workloads"))
    for name in POLICIES:
        print(row(name, merged(scores, name), oracle))
    for name in LEARNED:
        print("\n" + HEAD.format(name))
        for part in (*WORKLOADS, *BOXES):
            print(row(part, merged(scores, name, part), merged(scores, "oracle", part)))
    print("\n" + goals(scores))


def goals(scores: dict[tuple[str, str, str], Score]) -> str:
    """Each goal, met or missed."""
    oracle = merged(scores, "oracle")
    lines = []

    def goal(what: str, value: float, limit: float, unit: str) -> None:
        lines.append(f"- {what}: {value:.3g}{unit}, goal ≤ {limit:g}{unit}: {'met' if value <= limit else '**missed**'}")

    for name in LEARNED:
        score = merged(scores, name)
        every = score.notice + score.proven
        goal(f"{name}: false time-outs", 100 * score.false / score.calls, 0.0 if name == "learned, with proof" else 0.1, " %")
        goal(f"{name}: a dead server noticed, median", quantile(every, 0.5), 60, " s")
        goal(f"{name}: a dead server noticed, p95", quantile(every, 0.95), 60, " s")
        goal(f"{name}: wall time over the oracle's", score.wall / oracle.wall, 1.05, "")
    goal("a closed port noticed (watch.py)", CLOSED_PORT_SECONDS, 2, " s")
    goal("slots that idle while we wait noticed (watch.py)", IDLE_SECONDS, 2, " s")
    lines.append(f"- a server that answers nothing any more is held for gone after {MUTE_SECONDS:.0f} s: strong, but no proof")
    silences = merged(scores, "learned, with proof").silences
    if silences:
        lines.append(f"\nWith proof each false time-out followed {min(silences):.0f} s or more without any sign of work.")
    late = quantile(oracle.notice, 0.95)
    lines.append(f"The oracle, which knows when the next token is due, notices a dead server at p95 after {late:.0f} s.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
