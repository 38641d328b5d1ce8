"""``metagpt-localllm init``: from an empty home to a configuration with which MetaGPT runs."""

import asyncio
import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import pexpect
import pytest
import yaml
from click.testing import CliRunner

from metagpt_localllm import scanning
from metagpt_localllm.cli import main
from metagpt_localllm.simulator import Machine, SimulatorThread
from metagpt_localllm.simulator.answers import FILES

QUICK = Machine(prefill_speed=1e6, decode_speed=1e6, context=32768)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.delenv("METAGPT_LOCALLLM_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def config(home):
    return home / ".metagpt" / "config2.yaml"


@pytest.fixture
def server(monkeypatch):
    """A simulated server that init finds, and the only one."""
    with SimulatorThread(QUICK, dialect="ollama", model="qwen") as simulator:
        usual(monkeypatch, simulator)
        yield simulator


def usual(monkeypatch, *simulators):
    ports = {urlsplit(simulator.base_url).port: "/v1" for simulator in simulators}
    monkeypatch.setattr(scanning, "USUAL_PORTS", ports)


def init(*arguments, typed=None):
    return CliRunner().invoke(main, ["init", *arguments], input=typed)


def written(config):
    return yaml.safe_load(config.read_text())


def test_from_an_empty_home_four_times_enter_and_the_software_company_runs(home, config):
    others = asyncio.run(scanning.scan())
    if others:
        pytest.skip(f"a model server runs on this machine already, at {others[0].base_url}")
    try:
        thread = SimulatorThread(QUICK, dialect="ollama", model="qwen2.5-coder", port=11434, scale=1e4)
        simulator = thread.__enter__()
    except OSError as error:
        pytest.skip(f"Ollama's usual port is taken: {error}")
    environment = {**os.environ, "METAGPT_PROJECT_ROOT": str(home)}
    try:
        child = pexpect.spawn(
            sys.executable, ["-m", "metagpt_localllm", "init"], env=environment, cwd=str(home), encoding="utf-8",
            timeout=60, dimensions=(50, 200),
        )  # fmt: skip
        for question in ("Which server?", "Which model?", "longest answer", "longest time"):
            child.expect(question)
            child.expect("]: ")
            child.sendline("")
        child.expect("Next:")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0 and written(config)["llm"]["base_url"] == simulator.base_url
        command = [str(Path(sys.executable).parent / "metagpt"), "write a cli snake game"]
        rounds = [] if metadata.version("metagpt").startswith("0.") else ["--n-round", "20"]
        done = subprocess.run(command + rounds, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
    finally:
        thread.__exit__()
    assert set(FILES) <= {path.name for path in home.rglob("*.py")}, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_file_is_for_its_owner_says_what_each_line_is_and_passes_the_check(server, config):
    result = init("--yes")
    assert result.exit_code == 0, result.output
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    lines = config.read_text().splitlines()
    assert all("#" in line for line in lines if not line.rstrip().endswith(":"))
    assert written(config)["llm"] == {
        "api_type": "local_llm", "base_url": server.base_url, "model": "qwen", "max_token": 4096,
        "local": {"timeouts": {"total": "auto"}},
    }  # fmt: skip
    assert f"ollama, model {server.model}" in CliRunner().invoke(main, ["check"]).output


def test_the_answers_are_what_is_written(monkeypatch, server, config):
    with SimulatorThread(QUICK, model="llama") as second:
        usual(monkeypatch, server, second)
        result = init(typed="2\nllama\n2000\n90m\n")
    assert result.exit_code == 0, result.output
    llm = written(config)["llm"]
    assert (llm["base_url"], llm["model"], llm["max_token"]) == (second.base_url, "llama", 2000)
    assert llm["local"]["timeouts"]["total"] == "90m"


def test_options_are_not_asked_for(server, config):
    result = init("--base-url", server.base_url, "--model", "qwen", "--max-token", "99", "--longest", "3h")
    assert result.exit_code == 0 and "?" not in result.output, result.output
    assert written(config)["llm"]["max_token"] == 99


def test_wrong_answers_are_asked_again(server, config):
    result = init(typed="7\n1\nqwne\n1\nmany\n\nsoon\n\n")
    assert result.exit_code == 0, result.output
    assert "none of these" in result.output and "'soon' is not a duration" in result.output
    assert written(config)["llm"]["model"] == "qwen"


@pytest.mark.parametrize("form", ["{0}", "{0}/v1", "http://{0}", "http://{0}/v1/chat/completions", "http://{0}/"])
def test_an_address_by_hand_may_lack_what_goes_without_saying(server, config, form):
    result = init("--yes", "--base-url", form.format(urlsplit(server.base_url).netloc))
    assert result.exit_code == 0, result.output
    assert written(config)["llm"]["base_url"] == server.base_url


def test_where_no_server_is_found_it_says_how_to_start_one_and_takes_an_address(monkeypatch, config):
    monkeypatch.setattr(scanning, "USUAL_PORTS", {})
    with SimulatorThread(QUICK) as elsewhere:
        result = init(typed=f"\n{elsewhere.base_url}\n\n\n\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("ollama serve") == 2 and "llama-server -m" in result.output
    assert written(config)["llm"]["base_url"] == elsewhere.base_url


def test_without_a_server_and_without_questions_it_fails_and_writes_nothing(monkeypatch, config):
    monkeypatch.setattr(scanning, "USUAL_PORTS", {})
    result = init("--yes")
    assert result.exit_code == 1 and "--base-url" in result.output and not config.exists()


def test_a_server_that_is_off_is_written_down_when_that_is_wanted(home, config):
    result = init("--yes", "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    assert result.exit_code == 0 and "No model server answers" in result.output
    assert written(config)["llm"]["model"] == "m"


def test_a_model_that_the_server_has_not_is_refused_with_the_nearest(server, config):
    result = init("--yes", "--model", "qwem")
    assert result.exit_code == 1 and "'qwem', but qwen" in result.output and not config.exists()


def test_other_blocks_stay_and_the_change_is_shown_and_asked_for(server, config):
    before = "# mine\nllm:\n  api_type: openai # old\n  api_key: sk-secret\n  model: gpt-4\n  timeout: 600\nsearch: {engine: ddg}\n"
    config.parent.mkdir()
    config.write_text(before)
    declined = init(typed="\n\n\n\nn\n")
    assert declined.exit_code == 1 and config.read_text() == before
    result = init(typed="\n\n\n\ny\n")
    assert result.exit_code == 0, result.output
    assert "-  model: gpt-4\n+  model: qwen" in result.output and "sk-secret" not in result.output
    content = written(config)
    assert content["search"] == {"engine": "ddg"} and content["llm"]["api_type"] == "local_llm"
    # The key was meant for somebody else, and the limit for faster models.
    assert content["llm"]["api_key"] == "not-needed" and "llm.timeout: 600" in result.output
    (backup,) = config.parent.glob("config2.yaml.bak-*")
    assert backup.read_text() == before and str(backup) in result.output.replace("\n", "")


def test_without_questions_a_file_is_changed_by_force_only(server, config):
    config.parent.mkdir()
    config.write_text("llm: {api_type: openai, model: gpt-4}\n")
    refused = init("--yes")
    assert refused.exit_code == 1 and "--force" in refused.output and "gpt-4" in config.read_text()
    assert init("--yes", "--force").exit_code == 0 and written(config)["llm"]["model"] == "qwen"


def test_a_second_time_the_answers_of_the_first_are_the_defaults_and_nothing_is_written(server, config):
    init("--yes", "--max-token", "777", "--longest", "3h")
    config.write_text(config.read_text().replace("127.0.0.1", "localhost"))
    before = config.read_text()
    result = init(typed="\n\n\n\n")
    assert result.exit_code == 0 and "left as it is" in result.output, result.output
    assert config.read_text() == before and not list(config.parent.glob("*.bak-*"))


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "llm:\n", "llm: null\nlanguage: German\n", "language: German\n"])
def test_a_file_without_a_model_gets_one(server, config, content):
    config.parent.mkdir()
    config.write_text(content)
    assert init("--yes", "--force").exit_code == 0
    assert written(config)["llm"]["model"] == "qwen" and ("German" in content) == ("language" in written(config))


def test_a_file_that_does_not_parse_is_refused_before_anything_is_asked(server, config):
    config.parent.mkdir()
    config.write_text("llm:\n\tmodel: m\n")
    result = init(typed="")
    assert result.exit_code == 1 and "line 2" in result.output and "Which server" not in result.output


def test_the_key_is_asked_for_where_the_server_wants_it_and_never_shown(monkeypatch, config, home):
    with SimulatorThread(QUICK, dialect="vllm", model="qwen", api_key="s3cret") as locked:
        usual(monkeypatch, locked)
        result = init(typed="\nwrong\ns3cret\n\n\n\n")
        refused = init("--yes", "--config", str(home / "other.yaml"))
        monkeypatch.setenv("METAGPT_LOCALLLM_API_KEY", "s3cret")
        told = init("--yes", "--config", str(home / "third.yaml"))
    assert result.exit_code == 0, result.output
    assert written(config)["llm"]["api_key"] == "s3cret" and "s3cret" not in result.output
    assert "does not take this API key" in result.output
    assert refused.exit_code == 1 and "METAGPT_LOCALLLM_API_KEY" in refused.output
    assert told.exit_code == 0 and written(home / "third.yaml")["llm"]["api_key"] == "s3cret"


def test_no_key_is_asked_for_or_written_where_the_server_wants_none(server, config):
    result = init(typed="\n\n\n\n")
    assert "API key" not in result.output and "api_key" not in config.read_text()


def test_a_context_that_is_too_small_comes_with_its_remedy(monkeypatch, config):
    with SimulatorThread(Machine(context=2048), model="qwen") as small:
        usual(monkeypatch, small)
        result = init("--yes")
    assert "context of 2,048 tokens" in result.output and "llama-server --ctx-size" in result.output


def test_a_file_that_metagpt_does_not_read_is_said_to_be_one(server, home):
    result = init("--yes", "--config", str(home / "elsewhere.yaml"))
    assert f"MetaGPT reads {home / '.metagpt' / 'config2.yaml'}, not this file" in result.output


def test_a_server_that_loads_its_model_is_told_last_and_not_taken(monkeypatch, server, config):
    machine = Machine(prefill_speed=1e6, decode_speed=1e6, load_time=3600)
    with SimulatorThread(machine, model="llama") as loading:
        usual(monkeypatch, loading)
        alone = init("--yes")
        assert alone.exit_code == 1 and "when it is done" in alone.output and not config.exists()
        usual(monkeypatch, loading, server)
        result = init(typed="2\n1\n\n\n\n")
    assert "It is loading its model" in result.output and result.output.count("Which server?") == 2
    assert written(config)["llm"]["base_url"] == server.base_url
