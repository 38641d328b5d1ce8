"""What a good model would answer to MetaGPT's own prompts, for one project: a snake game in the terminal.

:func:`answer` depends on nothing but its arguments: it reads the kind of question off the latest
message and the state of the work off MetaGPT's own plan in it, so that a prompt that has lost its
oldest messages or its middle still gets its answer. The markers are sentences of the prompts of
MetaGPT 0.8.2 and 1.0.0 (``metagpt/actions``, ``metagpt/prompts``, ``metagpt/roles/di``).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence

__all__ = ["FILES", "Answer", "answer"]


@dataclass(frozen=True)
class Answer:
    """What the model says: text, or a call of a tool, after some reasoning perhaps."""

    text: str = ""
    tool_name: Optional[str] = None
    tool_arguments: str = ""
    reasoning: str = ""


# --------------------------------------------------------------------------------------- the project

_PROJECT = "snake_game"

_SNAKE_PY = '''"""The snake: where its body lies and which way it is heading."""

from collections import deque
from typing import Deque, Tuple

Point = Tuple[int, int]

UP, DOWN, LEFT, RIGHT = (0, -1), (0, 1), (-1, 0), (1, 0)
DIRECTIONS = (UP, DOWN, LEFT, RIGHT)


class Snake:
    """A body of points, the head first."""

    def __init__(self, head: Point = (5, 5), length: int = 3) -> None:
        self.direction: Point = RIGHT
        self.body: Deque[Point] = deque((head[0] - i, head[1]) for i in range(length))

    @property
    def head(self) -> Point:
        return self.body[0]

    def turn(self, direction: Point) -> None:
        """Change the heading; turning straight back is ignored."""
        if (direction[0] + self.direction[0], direction[1] + self.direction[1]) != (0, 0):
            self.direction = direction

    def next_head(self) -> Point:
        return self.head[0] + self.direction[0], self.head[1] + self.direction[1]

    def advance(self, grow: bool = False) -> None:
        """Move one step; a growing snake keeps its tail."""
        self.body.appendleft(self.next_head())
        if not grow:
            self.body.pop()
'''

_GAME_HEAD = '''"""The rules: a board, a snake, food and a score."""

import random
from typing import Optional

from snake import Point, Snake


class Game:
    """One game from its start until the snake is dead or has won."""

    def __init__(self, width: int = 24, height: int = 12, seed: Optional[int] = None) -> None:
        self.width = width
        self.height = height
        self.random = random.Random(seed)
        self.snake = Snake((width // 2, height // 2))
        self.score = 0
        self.alive = True
        self.food: Optional[Point] = self._place_food()

    def blocked(self, point: Point) -> bool:
        """Whether the snake would die on ``point``."""
        x, y = point
        # The tail's end moves away in the same step.
        tail = self.snake.body[-1]
        hit = point in self.snake.body and point != tail
        return hit or not (0 <= x < self.width and 0 <= y < self.height)

    def step(self) -> None:
        """Move the snake once and apply the rules."""
        target = self.snake.next_head()
        if self.blocked(target):
            self.alive = False
            return
        eats = target == self.food
        self.snake.advance(grow=eats)
        if eats:
            self.score += 1
            self.food = self._place_food()
            self.alive = self.food is not None

'''

# The first draft has a real flaw, which the review finds and the rewrite mends.
_GAME_DRAFT = (
    _GAME_HEAD
    + '''    def _place_food(self) -> Optional[Point]:
        while True:
            point = (self.random.randrange(self.width), self.random.randrange(self.height))
            if point not in self.snake.body:
                return point
'''
)

_GAME_PY = (
    _GAME_HEAD
    + '''    def _place_food(self) -> Optional[Point]:
        """A free point for the next bite; None when the snake fills the board, and the game is won."""
        taken = set(self.snake.body)
        free = [(x, y) for y in range(self.height) for x in range(self.width) if (x, y) not in taken]
        return self.random.choice(free) if free else None
'''
)

_AUTOPILOT_PY = '''"""A player made of code: the shortest safe way to the food."""

from collections import deque
from typing import Deque, Dict, Optional

from game import Game
from snake import DIRECTIONS, Point


def choose(game: Game) -> Point:
    """The direction for the next step."""
    step = _first_step(game)
    if step is not None:
        return step
    x, y = game.snake.head
    for dx, dy in DIRECTIONS:
        if not game.blocked((x + dx, y + dy)):
            return dx, dy
    return game.snake.direction


def _first_step(game: Game) -> Optional[Point]:
    """The first step of the shortest way to the food, found breadth first; None without a way."""
    start = game.snake.head
    first: Dict[Point, Optional[Point]] = {start: None}
    queue: Deque[Point] = deque([start])
    while queue:
        here = queue.popleft()
        if here == game.food:
            return first[here]
        for direction in DIRECTIONS:
            there = (here[0] + direction[0], here[1] + direction[1])
            if there not in first and not game.blocked(there):
                first[there] = first[here] or direction
                queue.append(there)
    return None
'''

_SCREEN_PY = '''"""Drawing a game as text."""

import sys
from typing import TextIO

from game import Game

HOME, CLEAR, HIDE, SHOW = "\\033[H", "\\033[2J", "\\033[?25l", "\\033[?25h"


def draw(game: Game) -> str:
    """The board with its frame and the score, as lines of text."""
    cells = {point: "o" for point in game.snake.body}
    cells[game.snake.head] = "@"
    if game.food is not None:
        cells[game.food] = "*"
    frame = "+" + "-" * game.width + "+"
    rows = ["|" + "".join(cells.get((x, y), " ") for x in range(game.width)) + "|" for y in range(game.height)]
    return "\\n".join([frame, *rows, frame, f"score {game.score}"])


class Screen:
    """A terminal that shows one frame after the other in the same place."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self.out = out
        self.animated = out.isatty()

    def __enter__(self) -> "Screen":
        if self.animated:
            self.out.write(CLEAR + HIDE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.animated:
            self.out.write(SHOW)
            self.out.flush()

    def show(self, game: Game) -> None:
        if self.animated:
            self.out.write(HOME + draw(game) + "\\n")
            self.out.flush()
'''

_MAIN_PY = '''"""Snake in the terminal. It plays itself; run ``python main.py --help`` for the options."""

import argparse
import time

from autopilot import choose
from game import Game
from screen import Screen, draw


def play(game: Game, delay: float, steps: int) -> None:
    """Play until the end of the game, or for ``steps`` steps."""
    with Screen() as screen:
        screen.show(game)
        for _ in range(steps):
            if not game.alive:
                break
            game.snake.turn(choose(game))
            game.step()
            screen.show(game)
            time.sleep(delay)


def main() -> None:
    parser = argparse.ArgumentParser(description="A snake that plays itself.")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--height", type=int, default=12)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds between two steps")
    parser.add_argument("--steps", type=int, default=2000, help="at most so many steps")
    parser.add_argument("--seed", type=int, default=None, help="the same seed plays the same game")
    options = parser.parse_args()
    game = Game(options.width, options.height, options.seed)
    try:
        play(game, options.delay, options.steps)
    except KeyboardInterrupt:
        pass
    print(draw(game))
    print("The snake is still going." if game.alive else "Game over.")


if __name__ == "__main__":
    main()
'''

#: The finished project, in the order in which it is written.
FILES: Mapping[str, str] = {
    "snake.py": _SNAKE_PY,
    "game.py": _GAME_PY,
    "autopilot.py": _AUTOPILOT_PY,
    "screen.py": _SCREEN_PY,
    "main.py": _MAIN_PY,
}

_PURPOSE = {
    "snake.py": "The Snake class: body, heading, turn(), next_head() and advance(); the four directions",
    "game.py": "The Game class: board, food, score, blocked() and step(); from snake import Point, Snake",
    "autopilot.py": "choose(game): breadth-first search to the food; from game import Game",
    "screen.py": "draw(game) and the Screen class, which animates on a terminal; from game import Game",
    "main.py": "main(): command line options and the loop; imports Game, Screen, draw and choose",
}

_TEST_PY = '''"""The rules of the game."""

import unittest

from game import Game


class TestGame(unittest.TestCase):
    def test_the_snake_dies_at_the_wall(self) -> None:
        game = Game(width=8, height=4, seed=1)
        for _ in range(8):
            game.step()
        self.assertFalse(game.alive)


if __name__ == "__main__":
    unittest.main()
'''

_QUADRANT = """quadrantChart
    title "Terminal snake games"
    x-axis "Hard to run" --> "Runs anywhere"
    y-axis "Plain" --> "Fun to watch"
    quadrant-1 "Leaders"
    quadrant-2 "Show pieces"
    quadrant-3 "Avoid"
    quadrant-4 "Tools"
    "nsnake": [0.45, 0.6]
    "term-snake": [0.6, 0.4]
    "snake-rs": [0.3, 0.7]
    "bash snake": [0.7, 0.2]
    "Our Target Product": [0.85, 0.75]"""

_CLASSES = """classDiagram
    class Snake {
        +deque body
        +Point direction
        +head() Point
        +turn(direction: Point) None
        +next_head() Point
        +advance(grow: bool) None
    }
    class Game {
        +int width
        +int height
        +int score
        +bool alive
        +Point food
        +blocked(point: Point) bool
        +step() None
    }
    class Screen {
        +bool animated
        +show(game: Game) None
    }
    class Autopilot {
        +choose(game: Game) Point
    }
    class Main {
        +play(game: Game, delay: float, steps: int) None
        +main() None
    }
    Main --> Game
    Main --> Screen
    Main --> Autopilot
    Game --> Snake
    Screen --> Game
    Autopilot --> Game"""

_FLOW = """sequenceDiagram
    participant M as Main
    participant A as Autopilot
    participant G as Game
    participant S as Snake
    participant T as Screen
    M->>G: Game(width, height, seed)
    G->>S: Snake(head)
    loop until the game is over
        M->>A: choose(game)
        A->>G: blocked(point)
        A-->>M: direction
        M->>S: turn(direction)
        M->>G: step()
        G->>S: advance(grow)
        M->>T: show(game)
    end
    M->>T: draw(game)"""

_REQUIREMENT = "Write a command line snake game"
_GOALS = [
    "A snake game that starts with one command and needs nothing but Python",
    "A game that is fun to watch: it plays itself",
    "Code that a newcomer reads in ten minutes",
]
_STORIES = [
    "As a player, I want to start the game with python main.py so that I need no installation",
    "As a player, I want to see my score below the board so that I know how well it goes",
    "As a viewer, I want the snake to play itself so that I can watch it",
    "As a developer, I want a seed option so that I can replay the same game",
]
_ANALYSIS = (
    "The game runs in any terminal with ANSI escapes and falls back to a still picture where there is none. The rules "
    "know nothing of the screen, so that they can be tested alone. The autopilot finds the shortest way breadth first."
)
_POOL = [
    ["P0", "The snake moves, grows when it eats, and dies at walls and at itself"],
    ["P0", "The board, the food and the score are drawn in the terminal"],
    ["P1", "An autopilot plays the game"],
    ["P1", "Width, height, delay, steps and seed are options of the command line"],
    ["P2", "The game ends well when the snake fills the board"],
]
_LOGIC = [[name, purpose] for name, purpose in _PURPOSE.items()]
_APPROACH = (
    "We will write five small modules on the standard library alone. snake.py and game.py hold the rules, autopilot.py "
    "chooses the moves, screen.py draws with ANSI escapes, and main.py ties them together with argparse."
)
_SHARED = "A point is a tuple (x, y); (0, 0) is the upper left corner. `snake.py` defines the directions for all files."

#: What is answered for each key that an ActionNode can ask for.
_VALUES: dict[str, Any] = {
    "Language": "en_us",
    "Programming Language": "Python",
    "Original Requirements": _REQUIREMENT,
    "Refined Requirements": _REQUIREMENT,
    "Project Name": _PROJECT,
    "Project name": _PROJECT,
    "Product Goals": _GOALS,
    "Refined Product Goals": _GOALS,
    "User Stories": _STORIES,
    "Refined User Stories": _STORIES,
    "Competitive Analysis": [
        "nsnake: polished, but needs ncurses and a compiler",
        "term-snake: small and easy, no autopilot",
        "snake-rs: fast, needs a Rust toolchain",
        "bash snake: runs everywhere, flickers",
        "snake in a browser: nice to look at, not in the terminal",
    ],
    "Competitive Quadrant Chart": _QUADRANT,
    "Requirement Analysis": _ANALYSIS,
    "Refined Requirement Analysis": ["Keep the rules apart from the screen", "Add an autopilot"],
    "Requirement Pool": _POOL,
    "Refined Requirement Pool": _POOL,
    "UI Design draft": "A frame of +, - and |, the snake as @ and o, the food as *, and the score below the board.",
    "Anything UNCLEAR": "Everything is clear.",
    "Implementation approach": _APPROACH,
    "Refined Implementation Approach": _APPROACH,
    "File list": list(FILES),
    "Refined File list": list(FILES),
    "Data structures and interfaces": _CLASSES,
    "Refined Data structures and interfaces": _CLASSES,
    "Program call flow": _FLOW,
    "Refined Program call flow": _FLOW,
    "Required packages": ["No third-party dependencies required"],
    "Required Other language third-party packages": ["No third-party dependencies required"],
    "Logic Analysis": _LOGIC,
    "Refined Logic Analysis": _LOGIC,
    "Task list": list(FILES),
    "Refined Task list": list(FILES),
    "Full API spec": "",
    "Shared Knowledge": _SHARED,
    "Refined Shared Knowledge": _SHARED,
    "Development Plan": ["Write the rules", "Add the autopilot", "Draw the board"],
    "Incremental Change": ["```diff\n+++ New/autopilot.py\n+def choose(game: Game) -> Point:\n```"],
    "issue_type": "REQUIREMENT",
    "is_relative": "NO",
    "reason": "It asks for something new.",
    "LGTM": "LGTM. The code does what the design asks for.",
}

#: Which keys are asked for together; a prompt that lost some of them in trimming gets the whole set.
_TOGETHER: tuple[tuple[str, ...], ...] = (
    ("Language", "Programming Language", "Original Requirements", "Project Name", "Product Goals", "User Stories",
     "Competitive Analysis", "Competitive Quadrant Chart", "Requirement Analysis", "Requirement Pool",
     "UI Design draft", "Anything UNCLEAR"),
    ("Implementation approach", "File list", "Data structures and interfaces", "Program call flow",
     "Anything UNCLEAR"),
    ("Required packages", "Required Other language third-party packages", "Logic Analysis", "Task list",
     "Full API spec", "Shared Knowledge", "Anything UNCLEAR"),
)  # fmt: skip

# ------------------------------------------------------------------------------------------ the reading


@dataclass(frozen=True)
class _Prompt:
    """What is asked: the latest message, the system messages, and everything together."""

    ask: str
    system: str
    everything: str


def answer(messages: Sequence[Mapping[str, Any]], tools: Optional[Sequence[Mapping[str, Any]]] = None) -> Answer:
    """The answer of a capable model to one of MetaGPT's prompts; the same prompt always gets the same one.

    Args:
        messages: the chat, in OpenAI's form.
        tools: the tools offered; where there are any, the answer calls the first one with code.
    """
    texts = [(str(message.get("role", "user")), _text(message.get("content"))) for message in messages]
    prompt = _Prompt(
        ask=texts[-1][1] if texts else "",
        system="\n".join(text for role, text in texts if role in ("system", "developer")),
        everything="\n".join(text for _, text in texts),
    )
    if tools:
        name = str(tools[0].get("function", {}).get("name", "execute"))
        arguments = json.dumps({"language": "python", "code": _analysis_code(prompt)})
        return Answer(tool_name=name, tool_arguments=arguments)
    for rule in _RULES:
        text = rule(prompt)
        if text is not None:
            return Answer(text=text)
    return Answer(text=_SMALL_TALK)


_SMALL_TALK = "I am a simulated model. I know the prompts of MetaGPT and one project, a snake game in the terminal."


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""


def _fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code.rstrip()}\n```"


# ---------------------------------------------------------------------------- structured prompts (ActionNode)


def _structured(prompt: _Prompt) -> Optional[str]:
    asks = "[CONTENT]" in prompt.ask or "Follow instructions of nodes" in prompt.ask or "## nodes:" in prompt.ask
    if not asks:
        return None
    if "key1" in prompt.ask and "keyn" in prompt.ask:  # ActionNode's own review: no complaints
        return "[CONTENT]\n{}\n[/CONTENT]"
    example = re.search(r"\[CONTENT\]\s*(.*?)\s*\[/CONTENT\]", prompt.ask, re.DOTALL)
    body = example.group(1) if example else ""
    values = _values(prompt, body)
    if not values:
        return None
    if body.startswith("##"):
        lines = [f"## {key}\n{value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        return "[CONTENT]\n" + "\n\n".join(lines) + "\n[/CONTENT]"
    return f"[CONTENT]\n{json.dumps(values, indent=4)}\n[/CONTENT]"


def _values(prompt: _Prompt, example: str) -> dict[str, Any]:
    """A value for each key the prompt asks for."""
    examples: dict[str, Any] = {}
    try:
        loaded = json.loads(example, strict=False)
        examples = loaded if isinstance(loaded, dict) else {}
    except ValueError:
        pass
    keys = list(examples) or re.findall(r"^##? ([A-Z][^\n#:]{2,50})$", example, re.MULTILINE)
    if not keys:
        keys = re.findall(r"^- ([^\n:]{2,60}): [^\n]*# ", prompt.ask, re.MULTILINE)
    if not keys:
        keys = [key for key in _VALUES if f'"{key}":' in prompt.ask or f"- {key}:" in prompt.ask]
    if not example and keys:  # it was cut
        best = max(_TOGETHER, key=lambda together: len(set(together) & set(keys)))
        if len(set(best) & set(keys)) * 2 >= len(keys):
            keys = [*keys, *(key for key in best if key not in keys)]
    values = {key: _VALUES.get(key, examples.get(key, "")) for key in keys}
    idea = re.search(r"### Original Requirements\n(.+?)\n+###", prompt.ask, re.DOTALL)
    if idea and "Original Requirements" in values and len(idea.group(1)) < 400:
        values["Original Requirements"] = idea.group(1).strip()
    return values


def _xml(prompt: _Prompt) -> Optional[str]:
    if "All content must be enclosed in the given XML tags" not in prompt.ask:
        return None
    names = re.findall(r"<(\w+)>content</\1>", prompt.ask)
    return "\n".join(f"<{name}>{_VALUES.get(name, 'Done.')}</{name}>" for name in names) or None


# ------------------------------------------------------------------------- the engineer of the fixed procedure


def _named_file(pattern: str, prompt: _Prompt) -> Optional[str]:
    found = re.search(pattern, prompt.ask)
    return found.group(1).rsplit("/", 1)[-1] if found else None


def _code_of(name: str, *, draft: bool) -> str:
    if name == "game.py" and draft:
        return _GAME_DRAFT
    if name in FILES:
        return FILES[name]
    if name.startswith("test_") or name.endswith("_test.py"):
        return _TEST_PY
    stem = re.sub(r"\W", "_", name.rsplit(".", 1)[0]) or "module"
    return f'"""{stem}: a part of the snake game."""\n\nNAME = "{stem}"\n'


def _write_code(prompt: _Prompt) -> Optional[str]:
    name = _named_file(r"## Code: ([^\s{}]+?)\. Write code", prompt)
    if name is None and "Write code with triple quot" in prompt.ask:
        name = "main.py"
    return None if name is None else f"## Code: {name}\n{_fenced(_code_of(name, draft=True))}"


def _rewrite_code(prompt: _Prompt) -> Optional[str]:
    name = _named_file(r"# Instruction: rewrite the `([^`]+)` based on the Code Review", prompt)
    return None if name is None else f"## Rewrite Code\n{_fenced(_code_of(name, draft=False))}"


def _review_code(prompt: _Prompt) -> Optional[str]:
    if "ONLY ANSWER LGTM/LBTM" not in prompt.ask:
        return None
    name = _named_file(r"code filename should be `([^`]+)`", prompt) or "the file"
    reviewed = prompt.ask.partition("## Code to be Reviewed")[2].partition("# Code Review Format example")[0]
    if name == "game.py" and "while True:" in reviewed:
        return (
            f"## Code Review: {name}\n1. Yes.\n"
            "2. No. `_place_food` draws points until one is free, which never ends once the snake fills the board. "
            "Collect the free points and choose among them; return None when there is none.\n"
            "3. Yes.\n4. Yes.\n5. Yes.\n6. Yes.\n\n"
            "## Actions\n1. Choose the food among the free points in `_place_food`.\n\n## Code Review Result\nLBTM"
        )
    points = "\n".join(f"{number}. Yes." for number in range(1, 7))
    return f"## Code Review: {name}\n{points}\n\n## Actions\npass\n\n## Code Review Result\nLGTM"


def _summarize_code(prompt: _Prompt) -> Optional[str]:
    if "## Code Review All" not in prompt.ask or "## TODOs" not in prompt.ask:
        return None
    reviews = "\n\n".join(f"### {name}\n- It does what the design asks for." for name in FILES)
    calls = "flowchart TB\n    main.py-->autopilot.py\n    main.py-->game.py\n    main.py-->screen.py\n    game.py-->snake.py"
    summary = "\n".join(f"- {name}: {purpose}" for name, purpose in _PURPOSE.items())
    return (
        f"## Code Review All\n\n{reviews}\n\n## Call flow\n{_fenced(calls, 'mermaid')}\n\n"
        f"## Summary\n{summary}\n\n## TODOs\n{{}}"
    )


def _is_pass(prompt: _Prompt) -> Optional[str]:
    if "Does the above log indicate anything that needs to be done?" not in prompt.ask:
        return None
    return '{"answer": "YES", "todo": []}'


def _write_test(prompt: _Prompt) -> Optional[str]:
    name = _named_file(r"\b(test_\w+\.py)\b", prompt)
    asks = "Write test code" in prompt.ask or "test case" in prompt.ask.lower()
    return _fenced(_TEST_PY) if name and asks else None


# ------------------------------------------------------------------------------------- the data interpreter


def _analysis_code(prompt: _Prompt) -> str:
    if "debug" in prompt.ask.lower() or "hello" in prompt.ask.lower():
        return "print('hello, world')"
    return "values = [3, 1, 2]\nprint('sorted:', sorted(values))\nprint('mean:', sum(values) / len(values))"


def _write_plan(prompt: _Prompt) -> Optional[str]:
    if "A plan consists of one to" not in prompt.ask or '"task_id": str' not in prompt.ask:
        return None
    steps = ["Collect the numbers", "Compute and print their mean"]
    plan = [
        {
            "task_id": str(number),
            "dependent_task_ids": [str(number - 1)] if number > 1 else [],
            "instruction": step,
            "task_type": "other",
        }
        for number, step in enumerate(steps, 1)
    ]
    return _fenced(json.dumps(plan, indent=4), "json")


def _think_again(prompt: _Prompt) -> Optional[str]:
    if '"state": bool' not in prompt.ask:
        return None
    working = "assistant:" in prompt.ask or "sorted:" in prompt.ask
    thoughts = "The code has run and the numbers are there." if working else "Nothing is done yet; write the code."
    return _fenced(json.dumps({"thoughts": thoughts, "state": not working}, indent=4), "json")


def _write_analysis(prompt: _Prompt) -> Optional[str]:
    markers = (
        "output one and only one code block",
        "[improved impl]:",
        "Check code in finished tasks",
        "Output code following the format",
    )
    if not any(marker in prompt.ask or marker in prompt.system for marker in markers):
        return None
    lead = "[reflection on previous impl]\nA name was missing.\n[improved impl]:\n" if markers[1] in prompt.ask else ""
    return lead + _fenced(_analysis_code(prompt))


# -------------------------------------------------------------------------- RoleZero: 1.0.0's free-acting roles

_TASK_LINE = re.compile(
    r"^\[TASK_ID (?P<id>[^\]]+)\] \((?P<state>[^)]*)\)(?P<what>.*?) This task depends on tasks.*?"
    r"\[Assign to (?P<who>[^\]]*)\]",
    re.MULTILINE,
)
_PRD_PATH = f"{_PROJECT}/docs/prd.md"
_DESIGN_PATH = f"{_PROJECT}/docs/system_design.md"

_PRD_MD = "\n\n".join(
    [
        "# Snake in the terminal",
        "## Requirements\n" + _REQUIREMENT + ", in Python, with the standard library alone.",
        "## Goals\n" + "\n".join(f"- {goal}" for goal in _GOALS),
        "## User stories\n" + "\n".join(f"- {story}" for story in _STORIES),
        "## Analysis\n" + _ANALYSIS,
        "## Requirement pool\n" + "\n".join(f"- {priority}: {text}" for priority, text in _POOL),
    ]
)
_DESIGN_MD = "\n\n".join(
    [
        "# System design",
        "## Approach\n" + _APPROACH,
        "## Files\n" + "\n".join(f"- {name}: {purpose}" for name, purpose in _PURPOSE.items()),
        "## Classes\n" + _CLASSES,
        "## Flow\n" + _FLOW,
        "## Shared knowledge\n" + _SHARED,
    ]
)

_Command = dict[str, Any]


def _command(name: str, **arguments: Any) -> _Command:
    return {"command_name": name, "args": arguments}


_FINISH = _command("Plan.finish_current_task")
_END = _command("end")


def _commands(thought: str, *commands: _Command) -> str:
    return f"{thought}\n{_fenced(json.dumps(list(commands), indent=4), 'json')}"


@dataclass(frozen=True)
class _Step:
    """One task of a role's plan and the command that does it."""

    task: str
    command: _Command


#: What each role does, in order; the team leader hands out work instead. Files are read with cat, since
#: Editor.read counts tokens with tiktoken, which downloads its encodings: nothing for a machine without network.
_WORK: Mapping[str, Sequence[_Step]] = {
    "Product Manager": [
        _Step("Write the product requirement document", _command("Editor.write", path=_PRD_PATH, content=_PRD_MD)),
    ],
    "Architect": [
        _Step("Read the product requirement document", _command("Terminal.run_command", cmd=f"cat {_PRD_PATH}")),
        _Step("Write the system design", _command("Editor.write", path=_DESIGN_PATH, content=_DESIGN_MD)),
    ],
    "Engineer": [
        _Step("Read the system design", _command("Terminal.run_command", cmd=f"cat {_DESIGN_PATH}")),
        *(
            _Step(
                f"Write {name}",
                _command("Engineer2.write_new_code", path=f"{_PROJECT}/{name}", file_description=_PURPOSE[name]),
            )
            for name in FILES
        ),
        _Step(
            "Let the game run once",
            _command("Terminal.run_command", cmd=f"python3 {_PROJECT}/main.py --seed 7 --delay 0 --steps 60"),
        ),
    ],
}

_TEAM_PLAN: Sequence[tuple[str, str]] = (
    ("Alice", f"Write a product requirement document to {_PRD_PATH} for: {_REQUIREMENT} in Python."),
    ("Bob", f"Read {_PRD_PATH} and write the system design of the snake game in Python to {_DESIGN_PATH}."),
    ("Alex", f"Read {_DESIGN_PATH} and write the snake game in Python into {_PROJECT}: {', '.join(FILES)}."),
)


def _role_zero(prompt: _Prompt) -> Optional[str]:
    if "Review and reflect on the history carefully, provide a different response" in prompt.ask:
        return _commands("Everything that was asked for is done.", _END)
    if "Your commands in a json array" not in prompt.ask:
        return None
    role = re.search(r"You are an? ([^,\n]+), named (\w+)", prompt.system)
    profile = role.group(1).strip() if role else ""
    tasks = [match.groupdict() for match in _TASK_LINE.finditer(prompt.ask)]
    if profile == "Team Leader":
        return _lead(prompt, tasks)
    return _work(prompt, profile, tasks)


def _append_tasks(tasks: Sequence[tuple[str, str]]) -> list[_Command]:
    """Commands that make a plan of (assignee, instruction), each task after the one before it."""
    return [
        _command(
            "Plan.append_task",
            task_id=str(number),
            dependent_task_ids=[str(number - 1)] if number > 1 else [],
            instruction=instruction,
            assignee=assignee,
        )
        for number, (assignee, instruction) in enumerate(tasks, 1)
    ]


def _lead(prompt: _Prompt, tasks: list[dict[str, Any]]) -> str:
    def hand_out(index: int) -> _Command:
        who, what = _TEAM_PLAN[index]
        return _command("TeamLeader.publish_team_message", content=what, send_to=who)

    if not tasks:
        return _commands(
            "This is software. The product manager, the architect and the engineer take one task each.",
            *_append_tasks(_TEAM_PLAN),
            _command("RoleZero.reply_to_human", content="The team starts on the snake game."),
            hand_out(0),
        )
    unfinished = [index for index, task in enumerate(tasks) if task["state"].strip() != "finished"]
    if not unfinished:
        return _commands("All tasks are finished.", _END)
    current = unfinished[0]
    who = str(tasks[current]["who"])
    # A leader is woken by what somebody says. When that message was trimmed away, the work is done as well.
    asked = prompt.everything.rfind(f" to {who}: ")
    if asked >= 0 and prompt.everything.rfind(f"[Message] from {who}") < asked:
        return _commands(f"{who} is still at work; I wait.", _END)
    if current + 1 < min(len(tasks), len(_TEAM_PLAN)):
        return _commands(f"{who} has finished task {current + 1}.", _FINISH, hand_out(current + 1))
    done = f"The snake game is done. Start it with python {_PROJECT}/main.py."
    return _commands(
        f"{who} has finished the last task.", _FINISH, _command("RoleZero.reply_to_human", content=done), _END
    )


def _work(prompt: _Prompt, profile: str, tasks: list[dict[str, Any]]) -> str:
    steps = _WORK.get(profile)
    if steps is None:
        return _commands("There is nothing to do for me here.", _END)
    if not tasks:
        plan = _append_tasks([(profile, step.task) for step in steps])
        return _commands(f"I plan {len(steps)} tasks and begin: {steps[0].task}.", *plan, steps[0].command)
    unfinished = [index for index, task in enumerate(tasks) if task["state"].strip() != "finished"]
    if not unfinished or unfinished[0] >= len(steps):
        return _commands("All of my tasks are finished.", _END)
    current = unfinished[0]
    if _last_output_failed(prompt):
        return _commands(f"That failed; once more: {steps[current].task}.", steps[current].command)
    if current + 1 < len(steps):
        thought = f"Task {current + 1} is done: {steps[current].task}. Next: {steps[current + 1].task}."
        return _commands(thought, _FINISH, steps[current + 1].command)
    report = f"{steps[current].task}: done. My work is in {_PROJECT}."
    return _commands(report, _FINISH, _command("RoleZero.reply_to_human", content=report), _END)


def _last_output_failed(prompt: _Prompt) -> bool:
    outputs = prompt.everything.rpartition("# Tool State")[0] or prompt.everything
    last = outputs.rpartition("Command ")[2]
    return "Traceback (most recent call last)" in last


def _write_new_code(prompt: _Prompt) -> Optional[str]:
    name = _named_file(r"Your task is to write the (\S+) according to the User Requirement", prompt)
    return None if name is None else f"{_PURPOSE.get(name, name)}.\n{_fenced(_code_of(name, draft=False))}"


def _classify(prompt: _Prompt) -> Optional[str]:
    if "Response Category: [QUICK/SEARCH/TASK/AMBIGUOUS]" not in prompt.ask:
        return None
    return "Thought: This is software to be written, in several steps.\nResponse Category: TASK"


def _language(prompt: _Prompt) -> Optional[str]:
    return "English" if "Which Natural Language must you respond in?" in prompt.ask else None


def _report(prompt: _Prompt) -> Optional[str]:
    if "Directly output your reply content" in prompt.ask:
        return f"The work on the snake game is done; all files are in {_PROJECT}."
    if "Summarize what you have accomplished lately" in prompt.ask:
        return f"My part of the snake game is done; its files are in {_PROJECT}."
    return None


def _repair_json(prompt: _Prompt) -> Optional[str]:
    if "## json decode error" not in prompt.ask:
        return None
    data = prompt.ask.partition("## json data")[2].partition("## json decode error")[0].strip()
    found = re.search(r"[\[{].*[\]}]", data, re.DOTALL)
    return _fenced(found.group(0) if found else json.dumps([_END]), "json")


#: From the most telling marker to the vaguest; the first that knows the prompt answers.
_RULES: tuple[Callable[[_Prompt], Optional[str]], ...] = (
    _repair_json, _role_zero, _classify, _language, _report, _write_new_code, _rewrite_code, _review_code, _write_code,
    _is_pass, _summarize_code, _structured, _xml, _write_plan, _think_again, _write_test, _write_analysis,
)  # fmt: skip
