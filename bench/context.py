"""What trimming costs, in prompt tokens that real llama.cpp computes anew: ours beside MetaGPT 1.0.0's and LangChain's.

    METAGPT_1_0=/path/to/a/checkout python -m bench.context [--kinds ...] [--arms ...] [--turns 60] [--seed 1] [--quick]

A history of an agent grows by an answer and an observation at each call (bench/histories.py), to more than four
windows of 4,096 tokens. Each arm trims the whole of it at each call; what it keeps goes to llama.cpp with its prefix
cache on. The history does not depend on the answers, so it is the same for every arm. The model has Qwen's tokenizer
and random weights (tests/make_tiny_gguf.py). Each arm and kind has a server of its own. All are told to leave 512
tokens for the answer, but for MetaGPT's, which is told the window: its threshold of 0.8 of it is its own. Whether they
do, "window used" shows: it is the prompt's part of what is left.

A trim is a call that llama.cpp cannot go on with from the prompt before. An overflow is a call that it refuses, for
which it computes nothing. "tuned" is MetaGPT with the largest max_token that leaves those 512 tokens free all through
this very history: the best that one number can do, in hindsight.

MetaGPT 1.0.0 is not on PyPI: METAGPT_1_0_PYTHON names a Python that has it, or METAGPT_1_0 a checkout, of which an
environment is made. LangChain gets one, too. They are kept in ``--environments``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Awaitable, Callable, Iterator, Optional

import httpx

from bench.histories import KINDS, Message, history
from metagpt_localllm import errors, events
from metagpt_localllm.call import Call, complete
from metagpt_localllm.context import prepare
from metagpt_localllm.run import Run
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.tiers import Caller
from metagpt_localllm.transport import Endpoint

ROOT = Path(__file__).parent.parent
WINDOW, RESERVE, ANSWER = 4096, 512, 8
BUDGET = WINDOW - RESERVE
#: Tokens at the seam of two prompts that may be cut up otherwise.
SEAM = 8
LANGCHAIN = "langchain-core==1.8.3"
#: Arms by name: the peer's name in bench/peers.py, its ``how``, and its limit in tokens (None: to be tuned).
PEERS: dict[str, tuple[str, str, Optional[int]]] = {
    "MetaGPT 1.0.0 post_cut_by_msg": ("metagpt", "post_cut_by_msg", WINDOW),
    "MetaGPT 1.0.0 post_cut_by_token": ("metagpt", "post_cut_by_token", WINDOW),
    "MetaGPT 1.0.0 post_cut_by_msg, tuned": ("metagpt", "post_cut_by_msg", None),
    "LangChain, approximate count": ("langchain", "approximate", BUDGET),
    "LangChain, exact count": ("langchain", "exact", BUDGET),
}
OURS = "ours"


@dataclass(frozen=True)
class Answered:
    """One call that the server took, in tokens: computed, from its cache, and what it calls the prompt's."""

    computed: int
    cached: int
    prompt: int


@dataclass
class Played:
    """What one arm did with one history."""

    calls: int = 0
    overflows: int = 0
    seconds: float = 0.0
    answered: list[Answered] = field(default_factory=list)

    @property
    def prefill(self) -> int:
        return sum(call.computed for call in self.answered)

    @property
    def before_trims(self) -> list[int]:
        """Tokens of the prompts after which a trim came."""
        pairs = zip(self.answered, self.answered[1:])
        return [before.prompt for before, after in pairs if after.cached < before.prompt - SEAM]


class NotRun(Exception):
    """Why a peer is left out."""


class Worker:
    """A peer in a process of its own."""

    def __init__(self, python: Path, peer: str, home: Path) -> None:
        self._log = home / f"{peer}.log"
        environment = {**os.environ, "METAGPT_PROJECT_ROOT": str(home), "METAGPT_LOCALLLM_DISABLE": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(ROOT / "bench" / "peers.py"), peer], cwd=home, env=environment, text=True,
                encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        self.version = self._answer()["version"]

    def trim(self, messages: list[Message], limit: int, how: str, url: str) -> list[Message]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"messages": messages, "limit": limit, "how": how, "url": url}) + "\n")
        self._process.stdin.flush()
        return self._answer()["messages"]  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer is gone: {self._log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def python_for(peer: str, environments: Path) -> Path:
    """A Python that has the peer; made where there is none yet.

    Raises:
        NotRun: there is none, and what to do about it.
    """
    packages: list[str]
    if peer == "langchain":
        packages, installer = [LANGCHAIN], "pip"
    else:
        given, checkout = os.environ.get("METAGPT_1_0_PYTHON"), os.environ.get("METAGPT_1_0")
        if given:
            return Path(given)
        if not checkout:
            raise NotRun("set METAGPT_1_0")
        packages, installer = ["--override", str(ROOT / "metagpt-overrides.txt"), checkout], "uv"
    folder = environments / peer
    python, made = folder / "bin" / "python", folder / "made-of"
    if not (made.exists() and made.read_text() == " ".join(packages)):
        here = Path(sys.executable).with_name("uv")
        uv = str(here) if here.exists() else shutil.which("uv")
        if installer == "uv" and uv is None:
            raise NotRun("uv is needed to install it: pip install uv")
        commands: list[list[Any]] = [[sys.executable, "-m", "venv", "--clear", folder]]
        if installer == "uv":
            commands.append([uv, "pip", "install", "-q", "--python", python, *packages])
        else:
            commands.append([python, "-m", "pip", "install", "-q", *packages])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise NotRun(
                    f"it could not be installed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
                )
        made.write_text(" ".join(packages))
    return python


@contextmanager
def llama_cpp(model: Path) -> Iterator[str]:
    """The address of a new server."""
    command = [sys.executable, str(ROOT / "tests" / "serve_llama_cpp.py"), str(model), str(WINDOW)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()


def taken(told: dict[str, Any], prompt: int) -> Answered:
    return Answered(told["prompt_n"], told["cache_n"], prompt)


async def ours(url: str) -> Callable[[list[Message], Played], Awaitable[Optional[Answered]]]:
    settings = LocalSettings.model_validate({"context": {"reserve": RESERVE}})
    endpoint = Endpoint(url + "/v1", "bench")

    async def ask(messages: list[Message], played: Played) -> Optional[Answered]:
        def see(event: events.Event) -> None:
            played.overflows += isinstance(event, (events.Retry, events.Failed)) and event.cause == "ContextOverflow"

        unsubscribe = events.subscribe(see)
        body = {"model": "bench", "messages": messages, "max_tokens": ANSWER, "temperature": 0}
        try:
            outcome = await complete(Call(endpoint, settings, body, Caller()))
        except errors.ContextOverflow:
            return None
        finally:
            unsubscribe()
        told = (outcome.completion.model_extra or {})["timings"]
        return taken(told, outcome.usage.prompt_tokens)

    return ask


async def theirs(
    url: str, client: httpx.AsyncClient, trim: Callable[[list[Message]], list[Message]]
) -> Callable[[list[Message], Played], Awaitable[Optional[Answered]]]:
    async def ask(messages: list[Message], played: Played) -> Optional[Answered]:
        body = {"messages": trim(messages), "max_tokens": ANSWER, "temperature": 0}
        answer = await client.post(url + "/v1/chat/completions", json=body)
        told = answer.json()
        if answer.status_code == 400 and told["error"].get("type") == "exceed_context_size_error":
            played.overflows += 1
            return None
        answer.raise_for_status()
        return taken(told["timings"], told["usage"]["prompt_tokens"])

    return ask


def steps(messages: list[Message]) -> Iterator[list[Message]]:
    """The history at each call, in new lists of new messages, as MetaGPT makes them of its memory."""
    for end in range(2, len(messages) + 1, 2):
        yield [dict(message) for message in messages[:end]]


async def tokens_of(url: str, client: httpx.AsyncClient, messages: list[Message]) -> int:
    answer = await client.post(url + "/v1/chat/completions/input_tokens", json={"messages": messages})
    return int(answer.raise_for_status().json()["input_tokens"])


async def tuned(
    url: str, client: httpx.AsyncClient, messages: list[Message], trim: Callable[[list[Message], int], list[Message]]
) -> int:
    """The largest limit, in tenths of the window, with which every prompt leaves the reserve free."""
    for tenths in range(30, 0, -1):
        limit = WINDOW * tenths // 10
        for whole in steps(messages):
            if await tokens_of(url, client, trim(whole, limit)) > BUDGET:
                break
        else:
            return limit
    raise RuntimeError("no limit is low enough")


async def play(arm: str, model: Path, messages: list[Message], workers: dict[str, Worker]) -> tuple[Played, str]:
    """One arm through one history; and what was found for it."""
    note = ""
    with llama_cpp(model) as url:
        async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
            if arm == OURS:
                ask = await ours(url)
            else:
                peer, how, limit = PEERS[arm]
                worker = workers[peer]
                if limit is None:
                    limit = await tuned(url, client, messages, lambda whole, limit: worker.trim(whole, limit, how, url))
                    note = f"max_token {limit:,}"
                ask = await theirs(url, client, lambda whole, limit=limit: worker.trim(whole, limit, how, url))
            played = Played()
            for whole in steps(messages):
                started = time.monotonic()
                answered = await ask(whole, played)
                played.seconds += time.monotonic() - started
                played.calls += 1
                if answered is not None:
                    played.answered.append(answered)
    return played, note


async def own_time(messages: int, calls: int) -> tuple[float, float]:
    """Seconds that our code takes before a request goes out, the first call's and the median of those that follow.

    The window is 32,768 tokens; the server counts no tokens, so nothing but our own work is in it.
    """
    settings = LocalSettings.model_validate({"context": {"window": 32768, "reserve": RESERVE}})
    endpoint = Endpoint("http://127.0.0.1:9/v1", "bench")
    texts = [f"{message['content'][:160]} {number}" for number, message in
             enumerate(history("English", 200, 1)[2:] * math.ceil((messages + 2 * calls) / 400))]  # fmt: skip
    system = {"role": "system", "content": KINDS["English"][3]}
    seconds = []
    for call in range(calls + 1):
        turns = [
            {"role": ("user", "assistant")[at % 2], "content": text}
            for at, text in enumerate(texts[: messages - 1 + 2 * call])
        ]
        body = {"model": "bench", "messages": [system, *turns], "max_tokens": ANSWER, "temperature": 0}
        started = time.perf_counter()
        run = Run(Call(endpoint, settings, body, Caller()))
        prompt = await prepare(run)
        run.plan(prompt)
        run.history.sent(prompt.messages, prompt.counts)
        seconds.append(time.perf_counter() - started)
    return seconds[0], statistics.median(seconds[1:])


HEAD = (
    "| {} | calls | trims | overflows | prefill tokens | × ours | window used before a trim | on average | seconds |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def share(prompts: list[int]) -> str:
    """Mean of the prompts' sizes, of what the window leaves beside the reserve."""
    return f"{100 * statistics.mean(prompts) / BUDGET:.0f} %" if prompts else "-"


def row(arm: str, played: Played, base: Optional[Played]) -> str:
    ratio = f"{played.prefill / base.prefill:.2f}" if base is not None else "-"
    return (
        f"| {arm} | {played.calls} | {len(played.before_trims)} | {played.overflows} | {played.prefill:,} | {ratio} "
        f"| {share(played.before_trims)} | {share([call.prompt for call in played.answered])} | {played.seconds:.1f} |"
    )


def goals(scores: dict[tuple[str, str], Played], own: float, messages: int) -> list[str]:
    """Each goal, met or missed."""
    lines = []

    def goal(what: str, value: str, met: bool) -> None:
        lines.append(f"- {what}: {value}: {'met' if met else '**missed**'}")

    kinds = list(dict.fromkeys(kind for kind, _ in scores))
    if (kinds[0], OURS) in scores:
        mine = [scores[kind, OURS] for kind in kinds]
        for arm in PEERS:
            them = [scores[kind, arm] for kind in kinds if (kind, arm) in scores]
            if len(them) < len(kinds) or not sum(played.prefill for played in them):
                continue
            part = sum(played.prefill for played in mine) / sum(played.prefill for played in them)
            refused, calls = sum(played.overflows for played in them), sum(played.calls for played in them)
            note = f" ({refused} of its {calls} calls were refused, and cost it nothing)" if refused else ""
            goal(f"prefill tokens beside {arm}{note}, goal ≤ 1/3", f"{part:.2f}", part <= 1 / 3)
        overflows = sum(played.overflows for played in mine)
        goal("overflows of ours, goal 0", str(overflows), overflows == 0)
        before = [prompt for played in mine for prompt in played.before_trims]
        if before:
            used = statistics.mean(before) / BUDGET
            goal("window used before ours trims, goal ≥ 90 %", f"{100 * used:.0f} %", used >= 0.9)
    goal(f"our own time per call at {messages:,} messages, goal < 5 ms", f"{own * 1e3:.1f} ms", own < 0.005)
    return lines


async def measure(
    options: argparse.Namespace, model: Path, workers: dict[str, Worker], missing: dict[str, str]
) -> dict[tuple[str, str], Played]:
    """Plays every arm and prints a table for each kind; ``missing`` says why a peer is not run."""
    scores: dict[tuple[str, str], Played] = {}
    for kind in options.kinds:
        messages = history(kind, options.turns, options.seed)
        with llama_cpp(model) as url:
            async with httpx.AsyncClient(trust_env=False) as client:
                whole = await tokens_of(url, client, messages)
        print("\n" + HEAD.format(f"{kind}: {whole:,} tokens in {len(messages):,} messages"))
        for arm in options.arms:
            if arm != OURS and PEERS[arm][0] in missing:
                print(f"| {arm} | not run: {missing[PEERS[arm][0]]} | | | | | | | |")
                continue
            played, note = await play(arm, model, messages, workers)
            scores[kind, arm] = played
            label = f"{arm} ({note})" if note else arm
            print(row(label, played, scores.get((kind, OURS))), flush=True)
    return scores


def parsed(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--arms", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS])
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--messages", type=int, default=10_000, help="of the history that our own time is measured with"
    )
    parser.add_argument("--environments", type=Path, default=cache / "metagpt-localllm-bench", help="folder")
    parser.add_argument("--quick", action="store_true", help="one kind, few turns, ours only: to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kinds, options.arms, options.turns, options.messages = options.kinds[:1], [OURS], 24, 200
    return options


def main(arguments: Optional[list[str]] = None) -> dict[tuple[str, str], Played]:
    """Prints the tables; the scores by kind and arm."""
    options = parsed(arguments)
    versions, workers = [f"xllamacpp {version('xllamacpp')}"], {}
    home_before = os.environ.get("HOME", "")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / ".metagpt").mkdir()
        (home / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: m}\n")
        peers, missing = {}, {}
        for peer in dict.fromkeys(PEERS[arm][0] for arm in options.arms if arm != OURS):
            try:
                peers[peer] = python_for(peer, options.environments)
            except NotRun as reason:
                missing[peer] = str(reason)
        os.environ["HOME"] = folder  # what is learned and logged here must not reach the user's
        try:
            for peer, python in peers.items():
                workers[peer] = Worker(python, peer, home)
                versions.append(f"{peer} {workers[peer].version}")
            print(f"{', '.join(versions)}; seed {options.seed}; window {WINDOW:,} tokens, {RESERVE} of them reserved")
            model = home / "qwen.gguf"
            subprocess.run([sys.executable, ROOT / "tests" / "make_tiny_gguf.py", model, "qwen"], check=True)
            scores = asyncio.run(measure(options, model, workers, missing))
            first, own = asyncio.run(own_time(options.messages, 50))
        finally:
            for worker in workers.values():
                worker.close()
            os.environ["HOME"] = home_before
    print(f"\nOur own time before a request, {options.messages:,} messages in a window of 32,768 tokens: ", end="")
    print(f"first call {first * 1e3:.1f} ms, median of 50 more, two messages longer each: {own * 1e3:.1f} ms\n")
    print("\n".join(goals(scores, own, options.messages)))
    return scores


if __name__ == "__main__":
    main()
