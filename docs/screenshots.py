"""Makes the pictures in docs/images from the real thing: the demo on a terminal, and the report of its run in a browser.

    python docs/screenshots.py

Needs tmux, chromium, MetaGPT and the ``test`` extra; takes two minutes.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

from playwright.sync_api import sync_playwright
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS, LINES = 110, 14
COMMAND = [sys.executable, "-m", "metagpt_localllm"]
#: Without the web font, which would be fetched from somewhere.
SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", "-L", "screenshots", *words], capture_output=True, text=True, check=True).stdout


def draw(name: str, ansi: str, title: str) -> None:
    """A terminal's screen as an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.from_ansi(ansi.rstrip()))
    (IMAGES / f"{name}.svg").write_text(console.export_svg(title=title, code_format=SVG), encoding="utf-8")


def telling(screen: str) -> int:
    """How much of the life of a call a screen shows."""
    _, _, calls = screen.rpartition("on the simulated machine")
    return 2 * ("stalled" in calls) + ("retry" in calls) + ("prefill" in calls) + ("Engineer" in calls)


def demo(folder: Path) -> None:
    """Runs the demo on a terminal, and keeps the screen that shows most."""
    command = f"cd {folder} && clear && {' '.join(COMMAND)} demo; echo; echo ENDED"
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "sh")
    best: Optional[str] = None
    try:
        tmux("send-keys", command, "Enter")
        until = time.monotonic() + 180
        while time.monotonic() < until:
            screen = tmux("capture-pane", "-e", "-p")
            if "ENDED" in tmux("capture-pane", "-p").splitlines():
                break
            if "/" in screen and (best is None or telling(screen) > telling(best)):
                best = screen
            time.sleep(0.1)
    finally:
        tmux("kill-server")
    assert best is not None, "the demo has shown nothing"
    draw("live", best, "metagpt-localllm demo")


def stats(state: Path) -> None:
    told = subprocess.run(
        [*COMMAND, "stats", "--run", "last", "--by", "action,role", "--path", str(state)],
        env={"PATH": "/usr/bin", "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    draw("stats", told, "metagpt-localllm stats --run last --by action,role")


def report(state: Path, folder: Path) -> None:
    page = folder / "report.html"
    subprocess.run([*COMMAND, "report", "--output", str(page), "--path", str(state)], check=True, capture_output=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, scheme in (("report", "light"), ("report-dark", "dark")):
            tab = chromium.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 1250})
            tab.goto(page.as_uri())
            tab.screenshot(path=IMAGES / f"{name}.png")
        chromium.close()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo(folder)
        state = folder / "demo-project" / "home" / ".metagpt" / "localllm" / "state.db"
        stats(state)
        report(state, folder)


if __name__ == "__main__":
    main()
