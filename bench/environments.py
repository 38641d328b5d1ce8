"""Environments of what our benchmarks need and the package does not: the peers, and matplotlib. uv makes them.

They are kept in ``.bench/`` of the checkout, or where ``LOCALLLM_BENCH_DIR`` says. Packages come from uv's configured
index. The versions are pinned here and nowhere else; what they need in turn is not.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["PACKAGES", "Missing", "python_for", "versions"]

#: Packages by environment; the first is what it is about.
PACKAGES = {
    "openai": ("openai==3.57.0",),
    "langchain": ("langchain-openai==1.7.4", "langchain-core==1.8.3", "openai==3.57.0"),
    "litellm": ("litellm[proxy]==1.108.7", "openai==3.57.0"),
    "plots": ("matplotlib==3.11.2",),
}


class Missing(Exception):
    """Why an environment cannot be had."""


def folder():
    return Path(os.environ.get("LOCALLLM_BENCH_DIR") or Path(__file__).resolve().parent.parent / ".bench")


def _uv():
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise Missing("uv is needed to install it: pip install uv")
    return found


@functools.lru_cache(None)
def python_for(name):
    """The Python of an environment, made where it is not there yet; for "own" the one that runs.

    Raises:
        Missing: it cannot be installed, and why.
    """
    if name == "own":
        return sys.executable
    place, packages = folder() / name, PACKAGES[name]
    python, made = place / "bin" / "python", place / "made-of"
    wanted = "\n".join([sys.version.split()[0], *packages])
    if not (made.exists() and made.read_text() == wanted):
        place.parent.mkdir(parents=True, exist_ok=True)
        for command in (
            ["venv", "-q", "--clear", "--python", sys.executable, str(place)],
            ["pip", "install", "-q", "--python", str(python), *packages],
        ):
            done = subprocess.run([_uv(), *command], capture_output=True, text=True)
            if done.returncode:
                raise Missing(f"{name} could not be installed: {(done.stderr.strip() or 'no reason given')[-500:]}")
        made.write_text(wanted)
    return str(python)


@functools.lru_cache(None)
def versions(name):
    """Versions of what an environment is about, by package."""
    packages = [package.split("==")[0].split("[")[0] for package in PACKAGES.get(name, ("metagpt", "openai", "httpx"))]
    ask = "import sys\nfrom importlib.metadata import version\nprint(*map(version, sys.argv[1:]))"
    done = subprocess.run([python_for(name), "-c", ask, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, done.stdout.split()))
