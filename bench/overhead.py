"""What our provider costs beside MetaGPT's own, on a server that answers without delay.

    python bench/overhead.py

CPU time of this process (the server runs in another), both providers in turn, as ratios of medians.
Then the start-up cost of the .pth file: ``python -c pass`` in two environments, with and without it.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS, CALLS, TOKENS, STARTS = 9, 20, 2000, 60
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


def startup():
    with tempfile.TemporaryDirectory() as folder:
        pythons = {}
        for name in ("without", "with"):
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{folder}/{name}"], check=True)
            pythons[name] = f"{folder}/{name}/bin/python"
        site_packages = next(Path(folder, "with").glob("lib/python*/site-packages"))
        pth = (ROOT / "metagpt_localllm.pth").read_text()
        (site_packages / "metagpt_localllm.pth").write_text(pth)
        seconds = {name: [] for name in pythons}
        for _ in range(STARTS):
            for name, python in pythons.items():
                before = os.times()
                subprocess.run([python, "-c", "pass"], check=True)
                after = os.times()
                seconds[name].append(after.children_user + after.children_system - before.children_user
                                     - before.children_system)  # fmt: skip
        mean = {name: statistics.fmean(values) for name, values in seconds.items()}
        # The line itself, where the difference above is lost in the noise.
        code = (
            "import sys, time; line = open(sys.argv[1]).read(); n = 200; t = time.perf_counter()\n"
            "for _ in range(n): exec(line)\n"
            "print((time.perf_counter() - t) / n)"
        )
        line = float(subprocess.check_output([pythons["without"], "-c", code, str(ROOT / "metagpt_localllm.pth")]))
    print(
        f"start of python -c pass, CPU: with .pth {mean['with'] * 1e3:.2f} ms, without {mean['without'] * 1e3:.2f} ms, "
        f"ratio {mean['with'] / mean['without']:.3f}; the line by itself {line * 1e6:.0f} µs, "
        f"{line / mean['without'] * 100:.2f} % of a start"
    )


def main():
    with tempfile.TemporaryDirectory() as home:
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
