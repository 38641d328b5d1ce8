"""MetaGPT's software company from the command line to the project on disk."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from metagpt_localllm import demo
from metagpt_localllm.cli import main
from metagpt_localllm.simulator import Machine, SimulatorThread


def test_the_demo_is_killed_and_goes_on_and_leaves_a_project_and_a_table(tmp_path):
    command = str(Path(sys.executable).parent / "metagpt-localllm")
    demo = [command, "demo", "--output", str(tmp_path / "out"), "--scale", "600", "--limit", "150"]
    events = tmp_path / "out" / "events.jsonl"
    first = subprocess.Popen(demo, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 90
    while time.monotonic() < until and not (events.exists() and events.read_text().count('"Done"') >= 5):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()

    done = subprocess.run(demo, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retries" in done.stdout and "prompts trimmed" in done.stdout
    replayed = re.search(r"of these by an earlier run +│ +(\d+): [\d,]+ tokens saved", done.stdout)
    assert replayed and int(replayed[1]) >= 5, done.stdout
    names = {path.name for path in (tmp_path / "out" / "workspace").rglob("*.py")}
    assert {"main.py", "game.py"} <= names


def test_a_folder_with_brackets_in_its_name_is_told_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_run_metagpt", lambda *_: 1)
    assert demo.run_demo(demo.DemoOptions("local_llm", tmp_path / "[red]", None, "", 1.0, False)) == 1
    assert "/[red]/metagpt.log" in capsys.readouterr().out.replace("\n", "")


def checked(tmp_path, text):
    config = tmp_path / "config2.yaml"
    config.write_text(text)
    return CliRunner().invoke(main, ["check", "--config", str(config)])


LLM = "llm: {api_type: local_llm, base_url: 'http://127.0.0.1:9/v1', model: m%s}"


@pytest.mark.parametrize(
    "text, said",
    [
        (LLM % ", local: {timeouts: {first_tokn: 1}}", "llm.local.timeouts.first_tokn: there is no setting"),
        (LLM % "" + "\nlocal: {}", "it belongs under llm"),
        (LLM % ", local: {context: {policy: 'nowhere:f'}}", "llm.local.context.policy: the module of the policy"),
        (LLM % ", api_key:sk-secret-of-mine", "llm.api_key:…: there is no setting 'api_key:…' here; did you mean 'api_key'?"),
        (LLM % ", first_token: 3", "it belongs to 'llm.local.timeouts.first_token'"),
        (LLM % "", "no server there"),
        (LLM % "" + "\nmodels: [a]", "models: Input should be a valid dictionary"),
        (LLM % "" + "\nroles: 5", "roles: Input should be a valid list"),
        ("llm: {api_type: localllm}", "did you mean 'local_llm'"),
        ("llm: {api_type: openai}", "uses its own providers"),
        ("llm: {api_type: local_llm, base_url: 'localhost:1/v1', model: m}", "of the form http://host:port/v1"),
        ("llm: {api_type: local_llm, base_url: 'http://h/v1/chat/completions', model: m}", "leave that off"),
        ("llm: {api_type: local_llm}", "llm.model is missing"),
        ("llm:\n\tapi_type: local_llm", "no tabs"),
        ("x: 1", "no block 'llm'"),
    ],
)
def test_check_names_each_mistake_and_nothing_of_pydantics(tmp_path, text, said):
    result = checked(tmp_path, text)
    assert result.exit_code == 1 and said in result.output
    assert "pydantic" not in result.output and "input_value" not in result.output


def test_check_tells_what_the_server_is(tmp_path):
    with SimulatorThread(Machine(context=8192)) as server:
        good = checked(tmp_path, f"llm: {{api_type: local_llm, base_url: '{server.base_url}', model: {server.model}}}")
        other = checked(tmp_path, f"llm: {{api_type: local_llm, base_url: '{server.base_url}', model: other}}")
    assert f"llama.cpp, model {server.model}, context 8,192 tokens" in good.output
    assert "it lists no model 'other'" in other.output and other.exit_code == 1


def test_check_names_the_block_whose_server_has_not_the_model(tmp_path):
    with SimulatorThread(Machine(context=8192)) as server:
        block = f"{{api_type: local_llm, base_url: '{server.base_url}', model: %s}}"
        result = checked(tmp_path, f"llm: {block % server.model}\nmodels: {{big: {block % 'other'}}}")
    assert "(models.big.model)" in result.output and "(llm.model)" not in result.output


def test_a_port_in_use_is_said_in_a_line():
    with SimulatorThread(Machine()) as server:
        port = server.base_url.split(":")[2].split("/")[0]
        result = CliRunner().invoke(main, ["simulate", "--port", port])
    assert result.exit_code == 1 and "Choose another with --port" in result.output


def test_a_full_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "not empty" in result.output
