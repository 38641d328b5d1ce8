"""Whether MetaGPT can run here, and whether it knows this package. Works where MetaGPT is missing or broken.

Nothing of MetaGPT is imported: that takes 8 seconds, and fails where it is broken.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Optional, Sequence

__all__ = [
    "INSTALL_METAGPT", "METAGPT_KEYS", "OVERRIDES", "Check", "check_hook", "check_metagpt", "installed_version",
    "metagpt_problems",
]  # fmt: skip

#: What MetaGPT's own pins get wrong today: lancedb 0.4.0 is gone from PyPI, its typer breaks on click 8.2, and
#: lancedb's newest pyarrow wants NumPy 2 where MetaGPT pins 1.26.
OVERRIDES: tuple[str, ...] = ("lancedb>=0.14", "click<8.2", "pyarrow<21")
#: The command that installs a MetaGPT that works; the README has the same words.
INSTALL_METAGPT = "pip install uv && uv pip install --override metagpt-overrides.txt 'metagpt==0.8.2'"

#: The keys of an ``llm`` block that MetaGPT 0.8.2 and 1.0.0 know: importing it to ask takes 8 seconds.
METAGPT_KEYS = (
    "api_key", "api_type", "base_url", "api_version", "model", "pricing_plan", "access_key", "secret_key",
    "session_token", "endpoint", "app_id", "api_secret", "domain", "max_token", "temperature", "top_p", "top_k",
    "repetition_penalty", "stop", "presence_penalty", "frequency_penalty", "best_of", "n", "stream", "seed", "logprobs",
    "top_logprobs", "timeout", "context_length", "region_name", "proxy", "calc_usage", "compress_type",
    "use_system_prompt", "reasoning", "reasoning_max_token", "extra_fields",
)  # fmt: skip

_HOW_TO_INSTALL = (
    f"    printf '%s\\n' {' '.join(repr(line) for line in OVERRIDES)} > metagpt-overrides.txt\n    {INSTALL_METAGPT}"
)


def installed_version(name: str) -> Optional[str]:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``text``: what it is, in the first line; what mends it, in further ones."""

    fine: bool
    text: str


def metagpt_problems() -> list[str]:
    """What keeps MetaGPT from running here, in sentences with their remedy; empty where nothing does."""
    version = installed_version("metagpt")
    if version is None:
        return [f"MetaGPT is not installed in {sys.executable}. Install it with\n{_HOW_TO_INSTALL}"]
    problems = []
    if not (3, 9) <= sys.version_info[:2] < (3, 12):
        problems.append(f"MetaGPT needs Python 3.9 to 3.11; this is {sys.version.split()[0]}.")
    if installed_version("lancedb") is None:
        problems.append(f"lancedb, which MetaGPT imports, is missing. Install MetaGPT with\n{_HOW_TO_INSTALL}")
    if _at_least("click", (8, 2)) and not _at_least("typer", (0, 10)):
        problems.append(
            f"click {installed_version('click')} breaks typer {installed_version('typer')}, and with it every metagpt command "
            "(Secondary flag is not valid for non-boolean flag). Run\n    uv pip install 'click<8.2'"
        )
    return problems


def _at_least(package: str, wanted: Sequence[int]) -> bool:
    version = installed_version(package)
    if version is None:
        return False
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return tuple(numbers) >= tuple(wanted)


def check_metagpt() -> list[Check]:
    """Whether MetaGPT is there, whole, and of a version that this package was tested with."""
    problems = metagpt_problems()
    if problems:
        return [Check(False, problem) for problem in problems]
    from metagpt_localllm._register import SUPPORTED

    version = installed_version("metagpt")
    if version not in SUPPORTED:
        return [Check(False, f"MetaGPT {version} is not one of those this was tested with: {', '.join(SUPPORTED)}")]
    return [Check(True, f"MetaGPT {version}")]


def check_hook() -> list[Check]:
    """Whether api_type: local_llm is known to every interpreter of this environment."""
    if os.environ.get("METAGPT_LOCALLLM_DISABLE"):
        return [Check(False, "METAGPT_LOCALLLM_DISABLE is set: MetaGPT will refuse api_type: local_llm")]
    probe = "import sys; sys.exit('metagpt_localllm.pth' not in [getattr(f, '__name__', '') for f in sys.meta_path])"
    active = subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0
    if active:
        return [Check(True, "api_type: local_llm is registered when Python starts")]
    return [
        Check(
            False,
            f"the hook does not run when {sys.executable} starts (its .pth file is not in site-packages);\n"
            "install this package with pip into the same environment as MetaGPT",
        )
    ]
