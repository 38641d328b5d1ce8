"""MetaGPT's software company from the command line to the project on disk."""

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from metagpt_localllm.cli import main


def test_the_demo_leaves_a_project_and_a_table(tmp_path):
    command = str(Path(sys.executable).parent / "metagpt-localllm")
    done = subprocess.run(
        [command, "demo", "--output", str(tmp_path / "out"), "--scale", "300", "--limit", "150"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retries" in done.stdout and "tokens trimmed" in done.stdout
    names = {path.name for path in (tmp_path / "out" / "workspace").rglob("*.py")}
    assert {"main.py", "game.py"} <= names


def test_check_finds_a_typo(tmp_path):
    config = tmp_path / "config2.yaml"
    config.write_text("llm: {api_type: local_llm, base_url: x, model: m, local: {timeouts: {first_tokn: 1}}}")
    result = CliRunner().invoke(main, ["check", "--config", str(config)])
    assert result.exit_code == 1 and "did you mean 'first_token'" in result.output


def test_a_full_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "not empty" in result.output
