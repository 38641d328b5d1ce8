"""Ten calls of one agent whose context grows: each prompt holds all earlier answers. For clients and server alike.

Only the standard library, since it is imported in the environments of the peers, too.
"""

import random
import re

__all__ = ["CALLS", "SYSTEM", "answer_to", "answers", "messages"]

CALLS = 10
_WORDS = (
    "the agent reads a file and writes down what it has found about players boards moves scores rules tests errors tables "
    "screens events queues so that its next step follows from this one while every module keeps to what was agreed before "
    "Keep names short plain honest Check inputs early Return values rather than print them Measure first"
).split()
SYSTEM = (
    "You are an engineer who works in small steps. Each step is a short report in plain English of what was done and why. "
    "Never repeat an earlier step. Do not ask questions, do not add headings, and do not say what you will do later. "
    "Name files and functions where it helps the reader. Stop when the step is told."
)
_TASK = "We write a game of snake for the terminal, with a board, a snake, food, a score and a player made of code."


def answers(seed):
    """What is answered at each of the calls: some 100 to 250 tokens of the simulator's kind."""
    drawn = random.Random(seed)
    made = []
    for number in range(1, CALLS + 1):
        words = [drawn.choice(_WORDS) for _ in range(drawn.randint(70, 150))]
        made.append(f"Step {number}: {' '.join(words)}.")
    return made


def messages(done):
    """The prompt after these answers."""
    steps = "\n\n".join([_TASK, *done])
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{steps}\n\nNow tell step {len(done) + 1} of {CALLS}."},
    ]


def answer_to(asked, made):
    """The answer of ``made`` to a conversation as the server gets it; a plain sentence where it is none of ours."""
    text = str(asked[-1].get("content")) if asked else ""
    found = re.search(r"Now tell step (\d+) of \d+\.\s*$", text)
    return made[int(found.group(1)) - 1] if found else "I do not know what is asked."
