"""Runs cells: one client on one simulated server with one script of faults, each in a process of its own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable

from bench import workload
from bench.clients import RUNNERS
from bench.environments import Missing, python_for
from metagpt_localllm.simulator import Fault, Machine
from metagpt_localllm.simulator.answers import FILES

__all__ = ["Cell", "Outcome", "MACHINE", "run"]

#: A 34B model, half of it on the CPU; what it takes to load after a crash.
MACHINE = Machine(prefill_speed=40.0, decode_speed=2.5, load_time=30.0, slots=1, context=4096)
#: MetaGPT's own providers do not trim, and a prompt of the company's is longer than 4,096: that is no matter of faults.
_COMPANY_CONTEXT = 8192
ROOT = Path(__file__).resolve().parent.parent
#: Real seconds: until a runner has imported its libraries; for one cell.
_START, _CELL = 180.0, 120.0


@dataclass(frozen=True)
class Cell:
    """What is run.

    Attributes:
        client: one of those of bench.clients.RUNNERS.
        best: with the best settings that its documentation offers; else its defaults.
        dialect: of the server.
        fault: a name for the faults.
        faults: the script.
        limit: simulated seconds after which it is cut off.
    """

    client: str
    best: bool
    dialect: str
    fault: str
    faults: tuple[Fault, ...]
    limit: float

    @property
    def company(self) -> bool:
        return self.client.startswith("company")


@dataclass
class Outcome:
    """What became of a cell; seconds are simulated.

    Attributes:
        right: calls whose answer was exactly the right text; of the company, whole files of the project.
        answered: calls that gave any answer.
        error: of the call at which it broke off; "" where there was none.
        seconds: from the first call to the end.
        work: tokens that the server prefilled and decoded.
        requests: that it got.
        faults: that it played.
        wanted: what ``right`` is when the run is finished.
    """

    right: int = 0
    answered: int = 0
    error: str = ""
    seconds: float = 0.0
    work: int = 0
    requests: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    wanted: int = workload.CALLS

    @property
    def finished(self) -> bool:
        return self.right == self.wanted


class _Runner:
    """A process that has imported a client's libraries."""

    def __init__(self, name: str) -> None:
        command = [python_for(RUNNERS[name][0]), "-W", "ignore", "-m", "bench.clients", name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("METAGPT_LOCALLLM_TIME_SCALE", None)
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self._ready.set()
            else:
                with self._lock:
                    waiting = self._waiting.get(said["id"])
                if waiting is not None:
                    waiting.put(said)

    def ready(self) -> None:
        """Waits until it is.

        Raises:
            RuntimeError: it did not start.
        """
        for _ in range(int(_START)):
            if self._ready.wait(1):
                return
            if self.process.poll() is not None:
                break
        self._log.seek(0)
        raise RuntimeError(f"a runner did not start: {self._log.read().decode('utf-8', 'replace')[-1000:]}")

    def run(self, number: int, cell: dict[str, Any]) -> dict[str, Any]:
        """What the client says.

        Raises:
            RuntimeError: the benchmark itself is at fault.
        """
        said: queue.Queue[dict[str, Any]] = queue.Queue()
        with self._lock:
            self._waiting[number] = said
            assert self.process.stdin is not None
            self.process.stdin.write((json.dumps({"id": number, **cell}) + "\n").encode())
            self.process.stdin.flush()
        pid = said.get(timeout=60)["pid"]
        try:
            result = said.get(timeout=_CELL)
        except queue.Empty:
            os.kill(pid, 9)
            raise RuntimeError(f"a cell took more than {_CELL:g} s: {cell}") from None
        if "broken" in result:
            raise RuntimeError(f"{cell}: {result['broken']}")
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def run(
    cells: Iterable[Cell], *, seed: int, at_once: int, tell: Callable[[str], None] = lambda text: None
) -> tuple[dict[Cell, Outcome], dict[str, str]]:
    """Runs all cells, ``at_once`` at a time.

    Returns:
        What became of each, and why clients were left out, by name.
    """
    cells = list(cells)
    homes = {client: name for name, (_, _, clients) in RUNNERS.items() for client in clients}
    runners: dict[str, _Runner] = {}
    missing: dict[str, str] = {}
    for client in dict.fromkeys(cell.client for cell in cells):
        name = homes[client]
        try:
            if name not in runners:
                runners[name] = _Runner(name)
        except Missing as why:
            missing[client] = str(why)
    outcomes: dict[Cell, Outcome] = {}

    def one(numbered: tuple[int, Cell]) -> None:
        number, cell = numbered
        runner = runners[homes[cell.client]]
        runner.ready()
        outcomes[cell] = _one(number, cell, runner, seed)
        tell(f"{cell.client} {'best' if cell.best else ''} {cell.dialect} {cell.fault}: {outcomes[cell]}")

    try:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(one, [(number, cell) for number, cell in enumerate(cells) if cell.client not in missing]))
    finally:
        for runner in runners.values():
            runner.close()
    return outcomes, missing


def _one(number: int, cell: Cell, runner: _Runner, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as home:
        machine = replace(MACHINE, context=_COMPANY_CONTEXT) if cell.company else MACHINE
        told = {**asdict(cell), "seed": seed, "home": home, "model": "codebooga-34b", "machine": asdict(machine)}
        said = runner.run(number, told)
    stats = said["stats"]
    return Outcome(
        said["right"], said["answered"], said["error"], said["seconds"], stats["prefill_tokens"] + stats["decode_tokens"],
        stats["requests"], stats["faults"], len(FILES) if cell.company else workload.CALLS,
    )  # fmt: skip
