"""Runs one target by coverage: ``python fuzz/run.py TARGET --seconds 600``. It needs atheris, in an environment of its own; see README.md."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fuzz  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=fuzz.TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--minimize", type=int, metavar="FILES", help="instead: take what was found into the corpus, and keep so many of its inputs, those that reach most")
    parser.add_argument("--largest", type=int, default=4096, help="bytes of an input")
    options = parser.parse_args()
    corpus, found, crashes = (HERE / folder / options.target for folder in ("corpus", "found", "crashes"))
    for folder in (corpus, found, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    if options.minimize:
        for file in found.iterdir():
            file.replace(corpus / file.name)
        minimize(importlib.import_module(f"fuzz.{options.target}"), corpus, options.minimize)
        return

    import atheris

    with atheris.instrument_imports(include=["metagpt_localllm"]):
        target = importlib.import_module(f"fuzz.{options.target}")
    for seed in target.seeds():
        (found / hashlib.sha1(seed).hexdigest()[:16]).write_bytes(seed)
    flags = [f"-max_len={options.largest}", "-timeout=20", "-rss_limit_mb=2000", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, f"-max_total_time={options.seconds}", str(found), str(corpus)], target.check)
    atheris.Fuzz()


def minimize(target: ModuleType, corpus: Path, most: int) -> None:
    """Keeps the smallest inputs that go each step from line to line of the package which any of them goes.

    libFuzzer's own ``-merge`` starts the program anew for each part of the corpus, which a Python script cannot be.
    """
    kept: set[Path] = set()
    known: set[tuple[str, int, int]] = set()
    files = sorted((file for file in corpus.iterdir() if file.is_file()), key=lambda file: (file.stat().st_size, file.name))
    for file in files:
        steps = _steps(target, file.read_bytes())
        if not steps <= known and len(kept) < most:
            kept.add(file)
            known |= steps
    for file in set(files) - kept:
        file.unlink()
    print(f"{len(kept)} of {len(files)} inputs kept, {sum(file.stat().st_size for file in kept):,} bytes")


def _steps(target: ModuleType, data: bytes) -> set[tuple[str, int, int]]:
    steps: set[tuple[str, int, int]] = set()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "metagpt_localllm" not in name:
            return None
        steps.add((name, last.get(id(frame), 0), frame.f_lineno))
        last[id(frame)] = frame.f_lineno
        if event == "return":
            last.pop(id(frame), None)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        target.check(data)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return steps


if __name__ == "__main__":
    main()
