"""Many calls in flight: how much of bare httpx's throughput is left, and how late the event loop gets.

    python -m bench.concurrency [--seed 1] [--quick]

1, 10, 100 and 1,000 calls begin at once, at a server like vLLM (``batch_server``, a process of its own: it says there why
that is not the simulator) that gives each stream 40 tokens a second, at 1,000 it is 20. Throughput is all their tokens over
the time until the last answer is whole, so the rush at the beginning counts. Lag is how late a task is that sleeps 10 ms
again and again. The contenders take turns, in another order in each round; figures are medians of the rounds.

- "bare httpx" is the least that a client must do: one ``httpx.AsyncClient`` without limits, a POST that streams, read line by
  line, ``json.loads`` of each chunk. "a client each" is the same with a client for each request, which is faster with very many
  calls: the pool of a shared one looks at all its connections whenever one begins or ends.
- "local_llm" is ours by MetaGPT's ``aask`` with ``concurrency: 1000``, with the journal as by default, and once without it.
- "MetaGPT's openai" is the provider that MetaGPT has for such servers.

One CPU runs the client and one the server; where the client needs its whole CPU, throughput is bound by that. The last rows
have a server that sends as fast as it can, for information.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, AsyncIterator, Awaitable, Callable, Sequence

from bench.batch_server import MODEL, WORD, prompt_of
from bench.results import Goal, Part, Plot, Table

__all__ = ["measure"]

BARE, EACH, OURS, WITHOUT, STOCK = (
    "bare httpx", "bare httpx, a client each", "local_llm", "local_llm, no journal", "MetaGPT's openai",
)  # fmt: skip
FEW, ALL = (BARE, OURS, STOCK), (BARE, EACH, OURS, WITHOUT, STOCK)
#: Seconds until a first token, and between two looks at the event loop.
FIRST, LOOK = 0.2, 0.01
#: A prompt like those of MetaGPT's roles, some 1,600 tokens; each call's own end follows.
PROMPT = "The importer rejects malformed rows after a restart, and the scheduler repeats late events under load. " * 64
#: Least share of bare httpx's throughput.
SHARE = 0.95

Ask = Callable[[str], Awaitable[str]]


@dataclass(frozen=True)
class Level:
    """``step``: seconds between two tokens of a stream; 0 for as fast as the server can."""

    calls: int
    tokens: int
    step: float
    rounds: int
    contenders: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.calls:,}" + ("" if self.step else ", unpaced")


LEVELS = (
    Level(1, 32, 0.025, 3, FEW), Level(10, 64, 0.025, 3, FEW), Level(100, 128, 0.025, 3, FEW), Level(1000, 64, 0.05, 1, ALL),
    Level(10, 1000, 0.0, 3, ALL),
)  # fmt: skip
QUICK = (Level(1, 8, 0.01, 1, FEW), Level(20, 8, 0.01, 1, ALL), Level(5, 50, 0.0, 1, ALL))


@dataclass(frozen=True)
class Turn:
    """One contender's turn at one level.

    Attributes:
        seconds: until the last answer was whole.
        cpu: seconds of this process.
        lags: seconds by which the looks at the event loop were late: median, 99th of 100.
        behind: seconds that the server was late with a step, at the worst.
        server_cpu: seconds of the server's process.
    """

    level: str
    contender: str
    calls: int
    tokens: int
    seconds: float
    cpu: float
    lags: tuple[float, float]
    behind: float
    server_cpu: float

    @property
    def rate(self) -> float:
        return self.calls * self.tokens / self.seconds


# ------------------------------------------------------------------------------------------- in a process of its own


def _contenders(url: str) -> dict[str, Ask]:
    import httpx
    from metagpt.configs.llm_config import LLMConfig
    from metagpt.logs import define_log_level, set_llm_stream_logfunc
    from metagpt.provider.llm_provider_registry import create_llm_instance

    define_log_level("ERROR", "ERROR")
    set_llm_stream_logfunc(lambda text: None)

    def provider(kind: str, **local: Any) -> Ask:
        config: dict[str, Any] = {"api_type": kind, "base_url": url, "model": MODEL, "api_key": "none"}
        if kind == "local_llm":
            config["local"] = {"concurrency": 1000, "progress": "log", **local}
        ask: Ask = create_llm_instance(LLMConfig(**config)).aask
        return ask

    def client() -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False, verify=context)

    async def post(client: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True, "max_tokens": 4096,
                "stream_options": {"include_usage": True}}  # fmt: skip
        text = []
        async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choices = json.loads(line[len("data: ") :])["choices"]
                    if choices:
                        text.append(choices[0]["delta"].get("content") or "")
        return "".join(text)

    async def each(prompt: str) -> str:
        async with client() as own:
            return await post(own, prompt)

    context = httpx.create_ssl_context()
    shared = client()
    return {
        BARE: lambda prompt: post(shared, prompt),
        EACH: each,
        OURS: provider("local_llm"),
        WITHOUT: provider("local_llm", journal={"enabled": False}),
        STOCK: provider("openai"),
    }


@contextlib.asynccontextmanager
async def _looking(lags: list[float]) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()

    async def look() -> None:
        while True:
            due = loop.time() + LOOK
            await asyncio.sleep(LOOK)
            lags.append(loop.time() - due)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()


async def _turn(level: Level, contender: str, ask: Ask, url: str, number: int) -> Turn:
    import httpx

    async def server() -> dict[str, float]:
        async with httpx.AsyncClient(trust_env=False) as client:
            told: dict[str, float] = (await client.get(url.replace("/v1", "/late"))).json()
            return told

    gc.collect()
    before = await server()
    lags: list[float] = []
    async with _looking(lags):
        began, cpu = time.perf_counter(), time.process_time()
        end = prompt_of(level.tokens, level.step, FIRST)
        answers = await asyncio.gather(*(ask(f"{PROMPT} Turn {number}, call {n}. {end}") for n in range(level.calls)))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    wrong = sum(answer != WORD * level.tokens for answer in answers)
    if wrong:
        raise RuntimeError(f"{contender}, {level.name} in flight: {wrong} answers are not what the server said")
    after = await server()
    late = sorted(lags) or [0.0]
    return Turn(level.name, contender, level.calls, level.tokens, seconds, cpu, (late[len(late) // 2], late[len(late) * 99 // 100]),
                after["behind"], after["cpu"] - before["cpu"])  # fmt: skip


async def _turns(url: str, levels: Sequence[Level], seed: int) -> list[Turn]:
    rng, asks = random.Random(seed), _contenders(url)
    turns: list[Turn] = []
    for ask in asks.values():
        await ask(PROMPT + prompt_of(3, 0.01, 0.0))
    for level in levels:
        for _ in range(level.rounds):
            for contender in rng.sample(level.contenders, len(level.contenders)):
                turns.append(await _turn(level, contender, asks[contender], url, len(turns)))
                print(f"{turns[-1]}", file=sys.stderr)
    return turns


def _child(seed: int, quick: bool) -> None:
    server = subprocess.Popen([sys.executable, "-m", "bench.batch_server"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        turns = asyncio.run(_turns(server.stdout.readline().strip(), QUICK if quick else LEVELS, seed))
        print(json.dumps([asdict(turn) for turn in turns]))
    finally:
        server.kill()
        server.wait()


# ------------------------------------------------------------------------------------------- what came out


def measure(seed: int, quick: bool = False) -> Part:
    """Takes 90 seconds on two quiet cores.

    Raises:
        RuntimeError: a call failed, or an answer was wrong.
    """
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / ".metagpt").mkdir()
        (Path(home) / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: m}\n")
        root = str(Path(__file__).parent.parent)
        environment = {**os.environ, "HOME": home, "METAGPT_PROJECT_ROOT": home, "PYTHONPATH": root}
        command = [sys.executable, "-W", "ignore", "-m", "bench.concurrency", "--seed", str(seed), "--child"]
        ran = subprocess.run([*command, *["--quick"] * quick], env=environment, cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the measurement failed: {ran.stderr[-2000:]}")
    turns = [Turn(**turn) for turn in json.loads(ran.stdout.splitlines()[-1])]
    return _part(turns, QUICK if quick else LEVELS, seed, quick)


def _part(turns: Sequence[Turn], levels: Sequence[Level], seed: int, quick: bool) -> Part:
    def median(level: Level, contender: str, of: Callable[[Turn], float]) -> float:
        return statistics.median(of(turn) for turn in turns if (turn.level, turn.contender) == (level.name, contender))

    rows, goals = [], []
    rates: dict[str, list[list[float]]] = {name: [] for name in ALL}
    lags: dict[str, list[list[float]]] = {name: [] for name in ALL}
    for level in levels:
        bare = median(level, BARE, lambda turn: turn.rate)
        for name in level.contenders:
            rate, late = median(level, name, lambda turn: turn.rate), median(level, name, lambda turn: turn.lags[1])
            cpu = median(level, name, lambda turn: turn.cpu / (turn.calls * turn.tokens))
            busy = median(level, name, lambda turn: turn.cpu / turn.seconds)
            rows.append([level.name, name, f"{rate:,.0f}", f"{rate / bare:.2f}", f"{cpu * 1e6:,.0f} µs", f"{busy:.0%}",
                         f"{median(level, name, lambda turn: turn.lags[0]) * 1e3:,.1f} ms", f"{late * 1e3:,.0f} ms"])  # fmt: skip
            if level.step:
                rates[name].append([level.calls, rate])
                lags[name].append([level.calls, late * 1e3])
        if level.step:
            share = median(level, OURS, lambda turn: turn.rate) / bare
            goals.append(
                Goal(f"throughput over bare httpx, {level.name} in flight", f"≥ {SHARE}", f"{share:.2f}", share >= SHARE,
                     "" if share >= SHARE else "the calls' own cost at their beginning: see the CPU per token")
            )  # fmt: skip
    head = ["in flight", "client", "tokens/s", "of bare httpx", "CPU per token", "CPU in use", "lag p50", "lag p99"]
    table = Table("Throughput and lag of the event loop", head, rows)
    behind = max(turn.behind for turn in turns)
    share = max(turn.server_cpu / turn.seconds for turn in turns if ", unpaced" not in turn.level)
    notes = [
        f"Where it keeps a pace, the server used {share:.0%} of a CPU at the most. It was behind by {behind * 1e3:.0f} ms at "
        "the worst; by more than a step only where other work has this machine's CPUs.",
        "CPU per token is the client process's whole time over the tokens, so with short answers it is mostly the cost of "
        f"a call; answers here have {', '.join(sorted({str(level.tokens) for level in levels}, key=int))} tokens.",
    ]
    for level in levels:
        if level.step and EACH in level.contenders:
            share = median(level, OURS, lambda turn: turn.rate) / median(level, EACH, lambda turn: turn.rate)
            notes.append(f"At {level.name} in flight local_llm has {share:.2f} of the throughput of bare httpx with a client each.")
    plots = [
        Plot("concurrency-throughput", "lines", "Tokens per second by calls in flight",
             {"x_label": "calls in flight", "y_label": "tokens/s", "x_log": True, "y_log": True, "series": rates}),
        Plot("concurrency-lag", "lines", "How late the event loop gets (p99) by calls in flight",
             {"x_label": "calls in flight", "y_label": "lag p99 in ms", "x_log": True, "y_log": True, "series": lags}),
    ]  # fmt: skip
    command = f"python -m bench.concurrency --seed {seed}" + " --quick" * quick
    return Part("Many calls in flight", command, [table], goals, plots, notes, _versions())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("httpx", "openai", "metagpt")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.seed, options.quick)
        return
    part = measure(options.seed, options.quick)
    goals = Table("Goals", ["goal", "wanted", "got", ""], [goal.row() for goal in part.goals])
    print("\n\n".join([f"## {part.title}", *(table.markdown() for table in (*part.tables, goals)), *part.notes]))


if __name__ == "__main__":
    main()
