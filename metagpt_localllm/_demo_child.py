"""Runs MetaGPT's software company in a process of its own, and writes our events down as lines of JSON.

Started by ``demo.py`` with HOME and METAGPT_PROJECT_ROOT in the demo's folder: MetaGPT reads its
configuration while it is imported, and must not read the user's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from typing import IO

from metagpt_localllm import events

#: Seconds between two tokens of a call that are written down.
_TOKENS = 0.05


def _record(file: IO[str]) -> None:
    latest: dict[int, tuple[type, float]] = {}  # kind and time of what was written last, by call

    def write(event: events.Event) -> None:
        now, kind, number = time.monotonic(), type(event), event.call.number
        if isinstance(event, events.Token):
            before, at = latest.get(number, (kind, 0.0))
            if before is kind and now - at < _TOKENS:
                return
            event = dataclasses.replace(event, text="")
        latest[number] = kind, now
        line = {"event": kind.__name__, "at": now, **dataclasses.asdict(event)}
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()

    events.subscribe(write, *events.KINDS)


def _end_with_the_demo() -> None:
    """The server ends with the demo, whatever ends it; then nobody would wait for this run."""
    while os.read(0, 1):  # not sys.stdin, which a thread must not hold when the interpreter ends
        pass
    os._exit(137)


def main() -> None:
    """Arguments: the idea, the rounds, the file for the events. Ends when standard input does."""
    threading.Thread(target=_end_with_the_demo, daemon=True).start()
    idea, rounds, path = sys.argv[1:]
    with open(path, "w", encoding="utf-8") as file:
        _record(file)
        from metagpt.software_company import generate_repo

        generate_repo(
            idea, investment=3.0, n_round=int(rounds), code_review=True, run_tests=False, implement=True,
            project_name="snake_game",
        )  # fmt: skip


if __name__ == "__main__":
    main()
