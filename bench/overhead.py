"""What our provider costs beside MetaGPT's own, on a server that answers without delay.

    python bench/overhead.py

CPU time of this process (the server runs in another), both providers in turn, as ratios of medians.
Then the start-up cost of the .pth file: ``python -c pass`` in environments without one, with one that only
imports sys, and with ours; in CPU time, and in instructions where there is valgrind.
"""

import argparse
import asyncio
import atexit
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS, CALLS, TOKENS, STARTS = 9, 20, 2000, 200
ROOT = Path(__file__).parent.parent
SERVER = """
import asyncio, math
from metagpt_localllm.simulator import Answer, Machine, Simulator
def answer(messages, tools):
    return Answer(text="token " * int(messages[-1]["content"]))
async def main():
    machine = Machine(math.inf, math.inf, slots=8, context=1 << 20)
    async with Simulator(machine, dialect="plain", answer=answer) as server:
        print(server.base_url, flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""


async def cpu_seconds(llm, tokens, calls):
    started = time.process_time()
    for _ in range(calls):
        await llm.acompletion_text([{"role": "user", "content": str(tokens)}], stream=True)
    return (time.process_time() - started) / calls


async def compare(base_url):
    from metagpt.configs.llm_config import LLMConfig
    from metagpt.logs import define_log_level, set_llm_stream_logfunc
    from metagpt.provider.llm_provider_registry import create_llm_instance

    define_log_level("ERROR", "ERROR")
    set_llm_stream_logfunc(lambda text: None)
    providers = {
        name: create_llm_instance(LLMConfig(api_type=name, base_url=base_url, model="m", api_key="none"))
        for name in ("openai", "local_llm")
    }
    short = {name: [] for name in providers}
    long = {name: [] for name in providers}
    for llm in providers.values():
        await cpu_seconds(llm, 1, 3)
    for _ in range(ROUNDS):
        for name, llm in providers.items():
            short[name].append(await cpu_seconds(llm, 1, CALLS))
            long[name].append(await cpu_seconds(llm, TOKENS, 1))
    call = {name: statistics.median(values) for name, values in short.items()}
    token = {name: (statistics.median(values) - call[name]) / TOKENS for name, values in long.items()}
    for what, figures, unit in (("call", call, 1e3), ("streamed token", token, 1e6)):
        ratio = figures["local_llm"] / figures["openai"]
        suffix = "ms" if unit == 1e3 else "µs"
        print(
            f"CPU per {what}: local_llm {figures['local_llm'] * unit:.2f} {suffix}, "
            f"openai {figures['openai'] * unit:.2f} {suffix}, ratio {ratio:.2f}"
        )


def cpu_of(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def instructions_of(command):
    """Instructions by valgrind's count, which is the same every time; None where there is no valgrind."""
    if shutil.which("valgrind") is None:
        return None
    counter = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command]
    said = subprocess.run(counter, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True).stderr
    return int(re.search(r"Collected : (\d+)", said).group(1))


def startup():
    lines = {"no .pth file": None, "a .pth file that imports sys": "import sys\n",
             "ours": (ROOT / "metagpt_localllm.pth").read_text()}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for number, (name, line) in enumerate(lines.items()):
            venv = Path(folder, str(number))
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
            if line is not None:
                (next(venv.glob("lib/python*/site-packages")) / "it.pth").write_text(line)
            commands[name] = [str(venv / "bin" / "python"), "-c", "pass"]
            cpu_of(commands[name])
        seconds = {name: [] for name in commands}
        for _ in range(STARTS):
            for name, command in commands.items():
                seconds[name].append(cpu_of(command))
        instructions = {name: instructions_of(command) for name, command in commands.items()}
    first = next(iter(commands))
    for name, values in seconds.items():
        told = f"python -c pass with {name}: {statistics.median(values) * 1e3:.2f} ms of CPU (median)"
        told += f", ratio {statistics.median(values) / statistics.median(seconds[first]):.3f}"
        if instructions[name] is not None:
            told += f"; {instructions[name] / 1e6:.2f} million instructions, ratio {instructions[name] / instructions[first]:.3f}"
        print(told)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home)  # runs after what the package does at exit, which writes there
    (Path(home) / ".metagpt").mkdir()
    (Path(home) / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: m}\n")
    os.environ.update(HOME=home, METAGPT_PROJECT_ROOT=home)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        asyncio.run(compare(server.stdout.readline().strip()))
    finally:
        server.kill()
    startup()


if __name__ == "__main__":
    main()
