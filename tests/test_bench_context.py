"""The measurement of what trimming costs, small: real llama.cpp, ours only; and its texts and its goals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this Python")
pytest.importorskip("dashscope", reason="its Qwen tokenizer comes with MetaGPT")

sys.path.append(str(Path(__file__).parent.parent))
from bench import context
from bench.context import ANSWER, BUDGET, OURS, PEERS, SEAM, WINDOW, Answered, Played
from bench.histories import KINDS, history


@pytest.fixture(scope="module")
def quick():
    """The scores of the quick mode, and what it printed."""
    code = (
        "import json; from bench.context import main; scores = main(['--quick']);"
        "print(json.dumps([[kind, arm, vars(one) | {'answered': [vars(call) for call in one.answered]}]"
        " for (kind, arm), one in scores.items()]))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, scores = done.stdout.splitlines()
    return json.loads(scores), printed


def test_every_call_is_answered_and_its_tokens_add_up(quick):
    [[kind, arm, played]], _ = quick
    assert (kind, arm) == ("English", OURS)
    assert played["calls"] == len(played["answered"]) == 25 and played["overflows"] == 0
    for call in played["answered"]:
        assert call["computed"] + call["cached"] == call["prompt"] <= BUDGET < WINDOW - ANSWER
    first, second, *_ = played["answered"]
    assert first["cached"] <= SEAM and second["cached"] >= first["prompt"] - SEAM


def test_the_table_has_the_row_and_the_goals(quick):
    [[_, _, played]], printed = quick
    told = Played(played["calls"], played["overflows"], 0.0, [Answered(**call) for call in played["answered"]])
    assert told.before_trims, "the history never came to the window's end"
    assert printed[0].startswith("xllamacpp ") and "seed 1" in printed[0]
    head, rule, row = printed[2:5]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert head.count("|") == rule.count("|") == row.count("|")
    assert cells[:6] == [OURS, "25", str(len(told.before_trims)), "0", f"{told.prefill:,}", "1.00"]
    assert "- overflows of ours, goal 0: 0: met" in printed
    assert sum(line.startswith("- ") for line in printed) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_is_the_same_every_time_and_grows_at_its_end(kind):
    messages = history(kind, 5, 7)
    assert messages == history(kind, 5, 7) != history(kind, 5, 8)
    assert [message["role"] for message in messages] == ["system", "user", *["assistant", "user"] * 5]
    assert history(kind, 9, 7)[: len(messages)] == messages
    assert [len(step) for step in context.steps(messages)] == [2, 4, 6, 8, 10, 12]


def test_goals_say_what_is_missed_and_which_calls_cost_a_peer_nothing():
    mine = Played(3, 0, 1.0, [Answered(3300, 0, 3300), Answered(100, 3300, 3400), Answered(2000, 0, 2000)])
    first, second, *_ = PEERS
    scores = {
        ("English", OURS): mine,
        ("English", first): Played(3, 2, 1.0, [Answered(5400, 0, 5400)]),
        ("English", second): Played(3, 0, 1.0, [Answered(20000, 0, 20000)]),
    }
    assert context.goals(scores, 0.006, 10_000) == [
        f"- prefill tokens beside {first} (2 of its 3 calls were refused, and cost it nothing), goal ≤ 1/3: 1.00: **missed**",
        f"- prefill tokens beside {second}, goal ≤ 1/3: 0.27: met",
        "- overflows of ours, goal 0: 0: met",
        "- window used before ours trims, goal ≥ 90 %: 95 %: met",
        "- our own time per call at 10,000 messages, goal < 5 ms: 6.0 ms: **missed**",
    ]


def test_a_peer_that_nothing_names_is_left_out_and_says_why(monkeypatch, tmp_path):
    monkeypatch.delenv("METAGPT_1_0", raising=False)
    monkeypatch.delenv("METAGPT_1_0_PYTHON", raising=False)
    with pytest.raises(context.NotRun, match="set METAGPT_1_0"):
        context.python_for("metagpt", tmp_path)
