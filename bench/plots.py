"""Draws the pictures of our benchmarks: ``python bench/plots.py FOLDER`` with a list of bench.results.Plot as JSON on stdin.

Run by ``python -m bench`` with matplotlib in an environment of its own (bench/environments.py). One SVG for each plot; the
same data give the same bytes. The background is transparent and the colours are seen on white and on black alike.

Kinds: "lines" (``x_label, y_label, x_log, y_log, series: {name: [[x, y], …]}``) and "grid" (``rows, columns,
cells: [[{text, level}]], legend: {level: text}``; levels are good, late, bad and none).
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "metagpt-localllm", "svg.fonttype": "path", "font.size": 9})

from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

#: Seen on white and on black.
_INK = "#7d8590"
_COLORS = ("#2f81f7", "#d29922", "#2da44e", "#e5534b", "#986ee2", "#39a0a0", "#c96198", "#8a8a2a")
_LEVELS = {"good": "#2da44e", "late": "#bf8700", "bad": "#cf222e", "none": "#00000000"}
_MARKERS = "os^Dv<>p"


def lines(figure, data):
    axes = figure.subplots()
    for number, (name, points) in enumerate(data["series"].items()):
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        marker = _MARKERS[number % len(_MARKERS)] if len(points) <= 40 else None
        axes.plot(xs, ys, label=name, color=_COLORS[number % len(_COLORS)], marker=marker, markersize=4, linewidth=1.5)
    axes.set_xlabel(data["x_label"], color=_INK)
    axes.set_ylabel(data["y_label"], color=_INK)
    if data.get("x_log"):
        axes.set_xscale("log", base=2)
        ticks = sorted({point[0] for points in data["series"].values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if data.get("y_log"):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.tick_params(colors=_INK, which="both")
    axes.grid(color=_INK, alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    if len(data["series"]) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    return axes


def grid(figure, data):
    rows, columns = data["rows"], data["columns"]
    figure.set_size_inches(2.2 + 1.0 * len(columns), max(1.4 + 0.3 * len(rows), 3.0))
    axes = figure.subplots()
    for y, line in enumerate(data["cells"]):
        for x, cell in enumerate(line):
            axes.add_patch(pyplot.Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, color=_LEVELS[cell["level"]], linewidth=0))
            ink = _INK if cell["level"] == "none" else "white"
            axes.text(x + 0.5, y + 0.5, cell["text"].replace("✗ ", ""), ha="center", va="center", color=ink, fontsize=7)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [name.replace(", ", "\n") for name in columns], color=_INK, fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, color=_INK)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [Patch(color=_LEVELS[level], label=text) for level, text in data["legend"].items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles), frameon=False, labelcolor=_INK)
    return axes


_KINDS = {"lines": lines, "grid": grid}


def draw(plot, folder):
    """One picture, as ``folder``/its name.svg."""
    figure = pyplot.figure(figsize=(7, 4), layout="constrained")
    _KINDS[plot["kind"]](figure, plot["data"])
    figure.suptitle(plot["title"], color=_INK, fontsize=10)
    figure.savefig(folder / f"{plot['name']}.svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for plot in json.load(sys.stdin):
        draw(plot, folder)


if __name__ == "__main__":
    main()
