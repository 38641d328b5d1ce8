"""Runs one target by coverage: ``python fuzz/run.py TARGET --seconds 600``. It needs atheris, in an environment of its own; see README.md."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fuzz  # noqa: E402

TARGETS = fuzz.TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--minimize", action="store_true", help="keep only those inputs of the corpus that add coverage")
    parser.add_argument("--largest", type=int, default=4096, help="bytes of an input")
    options = parser.parse_args()

    import atheris

    with atheris.instrument_imports(include=["metagpt_localllm"]):
        target = importlib.import_module(f"fuzz.{options.target}")
    corpus, crashes = HERE / "corpus" / options.target, HERE / "crashes" / options.target
    crashes.mkdir(parents=True, exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()[:16]).write_bytes(seed)
    flags = [f"-max_len={options.largest}", "-timeout=20", "-rss_limit_mb=2000", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    if options.minimize:
        small = tempfile.mkdtemp(dir=HERE, prefix=f"small-{options.target}-")
        flags += ["-merge=1", small, str(corpus)]
    else:
        flags += [f"-max_total_time={options.seconds}", str(corpus)]
    os.environ.setdefault("PYTHONHASHSEED", "0")
    atheris.Setup([sys.argv[0], *flags], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
