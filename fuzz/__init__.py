"""Bad input of every kind: the targets that atheris drives by coverage, and that tests/test_fuzz.py replays. See README.md.

Each target is a module with ``check(data)``, which raises where something does not hold, and ``seeds()``, where to begin.
"""

TARGETS = ("stream", "answers", "settings", "state", "sockets")
