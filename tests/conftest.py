import os
import subprocess
import sys
import tempfile
from pathlib import Path

# MetaGPT reads its configuration and writes logs while it is imported: not from and to the user's folders.
_home = Path(tempfile.mkdtemp(prefix="metagpt-home-"))
(_home / ".metagpt").mkdir()
(_home / ".metagpt" / "config2.yaml").write_text(
    "llm: {api_type: local_llm, base_url: 'http://127.0.0.1:9/v1', model: none}\n"
)
os.environ.update(HOME=str(_home), METAGPT_PROJECT_ROOT=str(_home))

import pytest  # noqa: E402

from metagpt_localllm import servers  # noqa: E402
from metagpt_localllm.call import Call  # noqa: E402
from metagpt_localllm.settings import LocalSettings  # noqa: E402
from metagpt_localllm.simulator import Answer, Machine, Simulator  # noqa: E402
from metagpt_localllm.tiers import Caller  # noqa: E402
from metagpt_localllm.transport import Endpoint  # noqa: E402

TESTS = Path(__file__).parent
WORDS = " ".join(f"word{n}" for n in range(12))
FAST = {"timeouts": {"first_token": 1.5, "stall": 1.0, "total": 20}, "retry": {"backoff": {"initial": 0, "max": 0}}}


def words(_messages, _tools):
    return Answer(text=WORDS)


@pytest.fixture(autouse=True)
def _no_memory_of_servers():
    servers.forget()


@pytest.fixture
def simulator():
    """Makes simulators with an answer of a few words; a thousand times faster than real unless said otherwise."""

    def make(*faults, machine=None, answer=words, scale=1000, **options):
        machine = machine or Machine(prefill_speed=1e6, decode_speed=1e6)
        return Simulator(machine, faults=faults, answer=answer, scale=scale, **options)

    return make


@pytest.fixture
def ask():
    """Makes a Call to a simulator."""

    def make(simulator, text="hello", settings=None, show=None, **options):
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        body = {"model": simulator.model, "messages": messages, "max_tokens": options.pop("max_tokens", 512)}
        body.update(options.pop("extra", {}))
        return Call(
            endpoint=Endpoint(simulator.base_url, simulator.model, options.pop("api_key", "")),
            settings=LocalSettings.model_validate({**FAST, **(settings or {})}),
            body=body,
            caller=Caller("WriteCode", "Engineer", "Engineer"),
            show=show or (lambda text: None),
            **options,
        )

    return make


@pytest.fixture(scope="session")
def llama_cpp():
    """The address of a real llama.cpp server with a tiny random model and a context of 2,048 tokens."""
    pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this Python")
    model = _home / "tiny.gguf"
    subprocess.run([sys.executable, str(TESTS / "make_tiny_gguf.py"), str(model)], check=True)
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "serve_llama_cpp.py"), str(model), "2048"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield process.stdout.readline().strip() + "/v1"
    finally:
        process.kill()
        process.wait()


def pytest_terminal_summary(terminalreporter):
    if not os.environ.get("METAGPT_1_0_PYTHON"):
        terminalreporter.write_line(
            "MetaGPT 1.0.0 was not tested: set METAGPT_1_0_PYTHON to the python of an environment that has it."
        )
