"""What the doctor names, fault by fault: over real sockets, against the simulator's dialects and real llama.cpp."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from metagpt_localllm import installation, scanning
from metagpt_localllm.cli import main
from metagpt_localllm.doctor import machine as machines
from metagpt_localllm.doctor import measuring
from metagpt_localllm.doctor.fitting import wanted_window
from metagpt_localllm.doctor.gguf import metadata as gguf_metadata
from metagpt_localllm.doctor.machine import Gpu, Machine, Process
from metagpt_localllm.doctor.memory import need, normalized, smaller
from metagpt_localllm.journal import CallRecord, Journal, RunRecord
from metagpt_localllm.servers.base import Anatomy
from metagpt_localllm.simulator import Answer, Fault, SimulatorThread
from metagpt_localllm.simulator import Machine as Simulated
from metagpt_localllm.simulator.dialects import DIALECTS_BY_NAME
from metagpt_localllm.state import State, state_at

GB = 10**9
#: Idle, and large enough for the simulated 34B model.
HEALTHY = Machine(cores=8, memory=64 * GB, available=60 * GB, swap=8 * GB, swap_used=0)
COUNTED = " ".join(f"word{n}" for n in range(60))


def counting(_messages, _tools):
    return Answer(text=COUNTED)


def serving(dialect="llama.cpp", scale=100, faults=(), options=None, **machine):
    """A simulated server that is fast enough for a test and slow enough to be measured."""
    machine = Simulated(**{"prefill_speed": 40.0, "decode_speed": 5.0, "context": 16384, **machine})
    return SimulatorThread(machine, dialect=dialect, scale=scale, answer=counting, faults=faults, **(options or {}))


class Report:
    def __init__(self, result):
        self.result = result
        self.said = json.loads(result.stdout)
        self.code = result.exit_code
        self.names = [finding["name"] for finding in self.said["findings"]]

    def __getitem__(self, name):
        assert name in self.names, self.said["findings"]
        return next(finding for finding in self.said["findings"] if finding["name"] == name)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home with nothing in it, on a machine of which nothing is wrong, with MetaGPT as it should be."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("METAGPT_PROJECT_ROOT", str(tmp_path / "project"))
    monkeypatch.setattr(machines, "survey", lambda run=None: HEALTHY)
    monkeypatch.setattr(scanning, "USUAL_PORTS", {})
    monkeypatch.setattr("metagpt_localllm.doctor.diagnosis.check_hook", lambda: [])
    # The tests need no exact speeds.
    for name, value in {"_PREFILL": 1.0, "_DECODE": 0.5, "_LEAST_ANSWER": 5, "_FIRST_ANSWER": 3}.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setattr("metagpt_localllm.doctor.diagnosis.installed_version", lambda name: "0.8.2")
    (tmp_path / "home" / ".metagpt").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def diagnosed(home):
    """Has the doctor look at a server, or at an address; what else is in the ``llm`` block as keywords."""

    def run(server, *options, local=None, **block):
        base_url, model = (server, "m") if isinstance(server, str) else (server.base_url, server.model)
        block = {"api_type": "local_llm", "base_url": base_url, "model": model, **block}
        if local:
            block["local"] = local
        path = home / ".metagpt" / "config2.yaml"
        path.write_text(yaml.safe_dump({"llm": block}))
        return Report(CliRunner().invoke(main, ["doctor", "--json", *options], catch_exceptions=False))

    return run


# -------------------------------------------------------------------------------------------- all is well


@pytest.mark.parametrize("dialect", ["llama.cpp", "ollama", "lmstudio", "vllm"])
def test_a_healthy_server_has_nothing_to_mend(diagnosed, dialect):
    with serving(dialect, gpu_share=1.0) as server:
        report = diagnosed(server)
    assert (report.code, report.names) == (0, []), report.said["findings"]
    measured = report.said["servers"][0]["measured"]
    # 100 times faster than the 40 and 5 tokens a second that are simulated, less what the way costs.
    assert 1000 < measured["prefill"] < 4400 and 100 < measured["decode"] < 550
    assert measured["cached"] > 0.5 and measured["buffered"] is False
    assert [tier["name"] for tier in report.said["servers"][0]["deadlines"]] == ["short", "medium", "long"]


def test_a_real_llama_cpp_is_measured_and_its_file_read(diagnosed, tiny_gguf):
    from conftest import serve

    with serve(tiny_gguf, 8192) as base_url:
        report = diagnosed(base_url, model="any")
    assert (report.code, report.names) == (0, ["model_name"]), report.said["findings"]
    (server,) = report.said["servers"]
    assert server["kind"] == "llama.cpp" and server["facts"]["window"] == 8192
    assert server["measured"]["prefill"] > 0 and server["measured"]["decode"] > 0 and server["measured"]["cached"] > 0.5
    anatomy, memory = server["anatomy"], server["memory"]
    assert anatomy["layers"] and anatomy["kv_heads"] and anatomy["parameters"] and "the model's own" in memory["how"]
    per_token = 2 * anatomy["layers"] * anatomy["kv_heads"] * anatomy["key_size"] * 2
    assert memory["cache"] == per_token * 8192


def test_a_real_llama_cpp_with_too_little_context_is_told_its_own_option(diagnosed, llama_cpp):
    report = diagnosed(llama_cpp, "--quick")
    assert report.code == 2 and "`llama-server --ctx-size 8192`" in report["context_small"]["remedy"]
    assert "2,048 tokens" in report["context_small"]["title"]


# -------------------------------------------------------------------------------------------- the address


def test_a_server_that_is_not_there_is_said(diagnosed):
    report = diagnosed("http://127.0.0.1:9/v1")
    assert report.code == 2 and report["server"]["severity"] == "broken"
    assert "127.0.0.1:9" in report["server"]["evidence"] and "Start the server" in report["server"]["remedy"]


@pytest.mark.parametrize(
    "wrong", [("/v1", ""), ("http:", "https:"), ("/v1", "/api"), ("http:", "https:", "/v1", "")], ids=str
)
def test_a_mistake_in_the_address_is_mended(diagnosed, wrong):
    with serving("vllm") as server:
        address = server.base_url
        for old, new in zip(wrong[::2], wrong[1::2]):
            address = address.replace(old, new)
        report = diagnosed(address, model=server.model)
    assert report.code == 2 and report.said["changes"] == {"llm.base_url": server.base_url}


LISTING = [name for name, dialect in DIALECTS_BY_NAME.items() if not dialect.bare and name != "transformers"]


@pytest.mark.parametrize("dialect", LISTING)
def test_the_missing_v1_is_mended_whatever_the_server_is(diagnosed, dialect):
    with serving(dialect) as server:
        report = diagnosed(server.base_url.replace("/v1", ""), "--quick", model=server.model)
    assert report.code == 2 and report.said["changes"] == {"llm.base_url": server.base_url}


def test_the_missing_v1_of_a_server_that_lists_no_model_is_told_by_the_chat(diagnosed):
    with serving("transformers") as server:
        report = diagnosed(server.base_url.replace("/v1", ""), model=server.model)
    assert report.code == 2 and "base_url to end in /v1" in report["chat"]["remedy"]


def test_http_for_https_is_mended(diagnosed, tmp_path, monkeypatch):
    certificate = tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(certificate), "-out", str(tmp_path / "c"),
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("there is no openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", certificate)
    monkeypatch.setattr(
        "metagpt_localllm.transport._ssl_context", lambda: ssl.create_default_context(cafile=tmp_path / "c")
    )
    with serving() as server, Proxy(server.base_url, tls=context) as proxy:
        report = diagnosed(proxy.base_url, model=server.model)
    assert report.said["changes"] == {"llm.base_url": proxy.base_url.replace("http:", "https:")}


def test_a_server_at_another_port_is_found(diagnosed, monkeypatch):
    with serving("ollama") as server:
        port = int(server.base_url.split(":")[2].split("/")[0])
        monkeypatch.setattr(scanning, "USUAL_PORTS", {port: "/v1"})
        report = diagnosed("http://127.0.0.1:9/v1", model=server.model)
        other = diagnosed("http://127.0.0.1:9/v1", model="something-else")
    assert "ollama" in report["server"]["evidence"] and report.said["changes"] == {"llm.base_url": server.base_url}
    assert other.said["changes"] == {"llm.base_url": server.base_url, "llm.model": server.model}


def test_a_key_that_is_refused_is_said_and_never_shown(diagnosed):
    with serving(options={"api_key": "right-key-5577"}) as server:
        report = diagnosed(server, api_key="wrong-key-7755")
        fine = diagnosed(server, api_key="right-key-5577")
    assert report.code == 2 and "llm.api_key" in report["key"]["remedy"]
    assert fine.code == 0
    for result in (report.result, fine.result):
        assert "wrong-key" not in result.output and "right-key" not in result.output


def test_a_key_that_cannot_be_sent_is_not_shown_either(diagnosed):
    with serving() as server:
        report = diagnosed(server, api_key="secret\n7755")
    assert report.code == 2 and "7755" not in report.result.output


def test_a_misspelt_model_is_named_with_the_nearest_ones(diagnosed):
    with serving("ollama") as server:
        report = diagnosed(server, model="codebouga-34b")
    assert report.code == 2 and "codebooga-34b" in report["model"]["evidence"]
    assert report.said["changes"] == {"llm.model": "codebooga-34b"} and "ollama pull" in report["model"]["remedy"]


def test_a_server_that_answers_to_any_name_is_not_broken_by_one(diagnosed):
    with serving("llama.cpp") as server:
        report = diagnosed(server, model="gpt-4")
    assert report.code == 0 and report["model_name"]["severity"] == "note" and report.said["changes"] == {}


def test_a_server_that_still_loads_is_waited_for_by_a_run(diagnosed):
    with serving("llama.cpp", scale=1, load_time=60) as server:
        report = diagnosed(server)
    assert report.code == 1 and "loading" in report.names


def test_a_model_that_is_loaded_on_demand_is_loaded_before_it_is_judged(diagnosed):
    with serving("ollama", load_time=50, gpu_share=1.0) as server:
        quick = diagnosed(server, "--quick")
        report = diagnosed(server)
    assert quick.code == 0 and "without --quick" in quick["not_loaded"]["remedy"]
    assert (report.code, report.names) == (0, []) and report.said["servers"][0]["facts"]["window"] == 16384


def test_a_chat_that_fails_is_told_in_the_servers_words(diagnosed):
    with serving(faults=[Fault("error", times=None)]) as server:
        report = diagnosed(server)
    assert report.code == 2 and "the model runner has unexpectedly stopped" in report["chat"]["evidence"]


# ---------------------------------------------------------------------------------- context and truncation


def test_ollamas_small_default_is_said_to_cut_without_a_word(diagnosed):
    with serving("ollama", context=4096, gpu_share=1.0) as server:
        report = diagnosed(server, "--quick")
    assert report.code == 1 and "without a word" in report["silent_truncation"]["evidence"]
    assert "OLLAMA_CONTEXT_LENGTH=8192 ollama serve" in report["silent_truncation"]["remedy"]


def test_a_window_that_the_configuration_claims_and_the_server_has_not_is_taken_back(diagnosed):
    with serving("ollama", context=8192, gpu_share=1.0) as server:
        report = diagnosed(server, "--quick", local={"context": {"window": 32768}})
    assert "claims a context of 32,768" in report["silent_truncation"]["title"]
    assert report.said["changes"] == {"llm.local.context.window": "auto"}


def test_a_window_that_nobody_tells_is_to_be_set(diagnosed):
    with serving("ollama", options={"tells_window": False}) as server:
        report = diagnosed(server, "--quick")
    assert report.said["changes"] == {"llm.local.context.window": 4096} and report.code == 1


def test_what_is_needed_follows_from_the_users_own_calls(diagnosed, home, monkeypatch):
    path = home / "state.db"
    state = State(path)
    monkeypatch.setattr("metagpt_localllm.doctor.diagnosis.state_at", lambda _path: state)
    journal = Journal(state)
    journal.begin_run(RunRecord("r", "k", (), "", time.time(), time.time()))
    for number in range(1, 31):
        journal.begin_call("r", CallRecord(
            number, f"d{number}", started=time.time(), attempts=[{"prompt_tokens": 9000}], trims=[{"removed_tokens": 3000}],
        ))  # fmt: skip
    journal.flush()
    with serving(context=8192) as server:
        report = diagnosed(server, "--quick", local={"journal": {"path": str(path)}})
    state.close()
    assert "your own 30 calls had prompts of up to 12,000 tokens" in report["context_small"]["evidence"]
    assert "--ctx-size 16384" in report["context_small"]["remedy"]


def test_calls_that_a_disk_has_damaged_say_nothing_of_what_is_needed():
    damaged = [replace(CallRecord(1, "d"), **{name: value}) for name in ("attempts", "trims")
               for value in (None, 7, [7], [{"prompt_tokens": "x", "removed_tokens": []}])]  # fmt: skip
    whole = [CallRecord(number, "d", attempts=[{"prompt_tokens": 9000}]) for number in range(20)]
    assert wanted_window("0.8.2", [*damaged, *whole]) == wanted_window("0.8.2", whole)


def test_metagpt_1_0_needs_more(diagnosed, monkeypatch):
    monkeypatch.setattr("metagpt_localllm.doctor.diagnosis.installed_version", lambda name: "1.0.0")
    with serving(context=16384) as server:
        report = diagnosed(server, "--quick")
    assert (
        "--ctx-size 16384; the model was made for 16,384" in report["context_small"]["remedy"]
        or "has them" in (report["context_small"]["remedy"])
    )


# ------------------------------------------------------------------------------------------- the machine


def on(monkeypatch, **changes):
    monkeypatch.setattr(machines, "survey", lambda run=None: replace(HEALTHY, **changes))


CARD = (Gpu("RTX 3090", 24 * GB, 22 * GB, 0.0),)


def test_what_ollama_has_on_the_cpu_is_told(diagnosed, monkeypatch):
    on(monkeypatch, gpus=CARD)
    with serving("ollama", gpu_share=0.25) as server:
        report = diagnosed(server, "--quick")
    assert report.code == 1 and report["cpu"]["title"] == "75% of the model runs on the CPU"
    assert "on the GPU" in report["cpu"]["evidence"]


def test_that_llama_cpp_runs_on_the_cpu_is_inferred_and_said_to_be(diagnosed, monkeypatch):
    on(monkeypatch, gpus=CARD)
    with serving("llama.cpp", scale=1, prefill_speed=4000, decode_speed=4.0) as server:
        report = diagnosed(server)
    assert "inferred from its speed" in report["cpu"]["evidence"] and "--n-gpu-layers 99" in report["cpu"]["remedy"]
    on(monkeypatch, gpus=(Gpu("RTX 3090", 24 * GB, 1 * GB),))
    with serving("llama.cpp") as server:
        report = diagnosed(server, "--quick")
    assert "inferred" in report["cpu"]["evidence"] and "1.0 GB of the GPU's memory" in report["cpu"]["evidence"]


def test_a_model_that_is_too_large_for_memory_gets_a_smaller_quantization_reckoned(diagnosed, monkeypatch):
    on(monkeypatch, memory=22 * GB, available=2 * GB)
    with serving("ollama", context=8192, gpu_share=1.0) as server:
        report = diagnosed(server, "--quick")
    evidence, remedy = report["memory"]["evidence"], report["memory"]["remedy"]
    assert "weights 20 GB (Q4_K_M) + context 1.6 GB" in evidence and "the model's own numbers" in evidence
    # 4.4597 / 4.8944 of 20.2 GB, and what the context takes anyway; IQ4_XS would still be too large for 90 % of 22 GB.
    assert "IQ4_XS" in remedy or "Q3_K_L" in remedy
    assert "bits per weight" in remedy


def test_a_model_that_is_too_large_for_the_gpu_is_told_beside_a_smaller_one(diagnosed, monkeypatch):
    on(monkeypatch, gpus=(Gpu("RTX 3080", 20 * GB, 19 * GB, 0.0),))
    with serving("llama.cpp", context=8192) as server:
        report = diagnosed(server, "--quick")
    assert "RTX 3080 has 20 GB" in report["vram"]["evidence"] and "assumed" in report["vram"]["evidence"]
    assert "Take the same model as" in report["vram"]["remedy"]


def test_swap_in_use_is_told(diagnosed, monkeypatch):
    on(monkeypatch, swap_used=6 * GB)
    with serving(context=8192) as server:
        report = diagnosed(server, "--quick")
    assert report.code == 1 and "6.0 GB of 8.0 GB swap" in report["swap"]["evidence"]


def test_missing_swap_is_told_where_memory_is_short(diagnosed, monkeypatch):
    on(monkeypatch, swap=0, memory=26 * GB)
    with serving("ollama", context=8192, gpu_share=1.0) as server:
        short = diagnosed(server, "--quick")
        on(monkeypatch, swap=0)
        plenty = diagnosed(server, "--quick")
    assert "swapon" in short["no_swap"]["remedy"] and "no_swap" not in plenty.names


def test_other_load_is_told_with_the_programs_that_make_it(diagnosed, monkeypatch):
    on(monkeypatch, busy=0.9, busiest=(Process("ffmpeg", 0.8, GB),), gpus=(Gpu("RTX 3090", 48 * GB, 40 * GB, 0.95),))
    with serving() as server:
        report = diagnosed(server, "--quick")
    assert "ffmpeg (80%)" in report["load"]["evidence"] and "95%" in report["gpu_load"]["title"]


def test_a_server_that_works_on_something_else_is_told(diagnosed):
    with serving(scale=1, prefill_speed=20, slots=2) as server:
        import httpx

        body = {"model": server.model, "messages": [{"role": "user", "content": "word " * 2000}], "stream": True}

        def ask():
            with pytest.raises(httpx.HTTPError):
                httpx.post(server.base_url + "/chat/completions", json=body, timeout=1.5)

        other = threading.Thread(target=ask)
        other.start()
        while not server.requests:
            time.sleep(0.01)
        report = diagnosed(server, "--quick")
        other.join()
    assert "server_busy" in report.names


def test_nothing_is_claimed_of_the_machine_of_a_server_elsewhere(diagnosed, monkeypatch):
    on(monkeypatch, swap_used=6 * GB, busy=1.0, memory=2 * GB)
    monkeypatch.setattr("metagpt_localllm.doctor.subject.Subject.here", False)
    with serving() as server:
        report = diagnosed(server, "--quick")
    assert (report.code, report.names) == (0, ["remote"])


def test_this_machine_is_surveyed():
    here = machines.survey(lambda command: None)
    assert here.cores >= 1 and 0 < here.available <= here.memory and 0 <= here.busy <= 1 and here.gpus == ()


@pytest.mark.parametrize(
    "tool, says, gpu",
    [
        ("nvidia-smi", "NVIDIA GeForce RTX 3090, 24576, 1024, 87\n", Gpu("NVIDIA GeForce RTX 3090", 24576 << 20, 1 << 30, 0.87)),
        ("nvidia-smi", "GPU, with comma, 1024, 0, [N/A]\n", Gpu("GPU, with comma", 1 << 30, 0, None)),
        ("rocm-smi", json.dumps({"card0": {
            "Card series": "Radeon RX 7900", "VRAM Total Memory (B)": "25753026560", "VRAM Total Used Memory (B)": "1000000",
            "GPU use (%)": "50"}}), Gpu("Radeon RX 7900", 25753026560, 1000000, 0.5)),
    ],
)  # fmt: skip
def test_gpus_are_asked_of_the_tool_on_the_path(tmp_path, monkeypatch, tool, says, gpu):
    fake = tmp_path / tool
    fake.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machines.survey().gpus == (gpu,)


# --------------------------------------------------------------------------------------- requests and answers


def test_more_requests_than_slots_are_told(diagnosed):
    with serving(slots=2, context=16384) as server:
        report = diagnosed(server, "--quick", local={"concurrency": 6})
    assert report.said["changes"] == {"llm.local.concurrency": "auto"} and "(6)" in report["concurrency"]["title"]


def test_slots_that_divide_the_context_are_told(diagnosed):
    with serving(slots=4, context=4096) as server:
        report = diagnosed(server, "--quick")
    assert "--parallel 1" in report["slots"]["remedy"] and "16,384" in report["slots"]["evidence"]


class Proxy:
    """A proxy that reads an answer to its end before it passes anything on, over ``tls`` if given; it may not ask for a ``stream``."""

    def __init__(self, base_url, tls=None, stream=True):
        self._stream = stream
        self._to, self._tls = int(base_url.split(":")[2].split("/")[0]), tls

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(5)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _serve(self, reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
            if not self._stream:  # of the same length
                body = body.replace(b'"stream": true', b'"stream":false')
            upstream, there = await asyncio.open_connection("127.0.0.1", self._to)
            first, _, rest = head.partition(b"\r\n")
            there.write(first + b"\r\nconnection: close\r\n" + rest + body)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n") and not self._whole(answer):
                portion = await upstream.read(65536)
                if not portion:
                    break
                answer += portion
            there.close()
            writer.write(answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @staticmethod
    def _whole(answer):
        head, found, body = answer.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        return bool(found and lengths) and len(body) >= int(lengths[0].split(b":")[1])


def test_a_proxy_that_buffers_is_found(diagnosed):
    with serving(scale=10, decode_speed=5.0, prefill_speed=400) as server, Proxy(server.base_url) as proxy:
        report = diagnosed(proxy.base_url, model=server.model)
    assert "proxy_buffering off" in report["buffered"]["remedy"]
    # Its speed is right all the same: 5 tokens a second, 10 times faster.
    assert 20 < report.said["servers"][0]["measured"]["decode"] < 60


def test_a_server_that_is_merely_fast_is_not_taken_for_a_proxy(diagnosed):
    with serving(scale=1, prefill_speed=1e6, decode_speed=1e6) as server:
        assert "buffered" not in diagnosed(server).names


@pytest.mark.parametrize("dialect, says", [("llama.cpp", "the server says"), ("vllm", "--enable-prefix-caching")])
def test_a_cache_that_does_nothing_is_found(diagnosed, dialect, says):
    with serving(dialect, scale=5, prefix_cache=False, prefill_speed=80.0, decode_speed=20.0) as server:
        report = diagnosed(server)
    assert report.code == 1 and says in report["cache"]["evidence"] + report["cache"]["remedy"]


def test_a_server_that_is_silent_is_left_after_the_limit(diagnosed, monkeypatch):
    monkeypatch.setattr("metagpt_localllm.doctor.measuring.LIMIT", 0.5)
    with serving(faults=[Fault("hang", times=None)]) as server:
        report = diagnosed(server)
    assert report.code == 1 and "silent" in report.names and report.said["servers"][0]["measured"]["limited"]


def test_ctrl_c_ends_the_measurement_and_changes_nothing(home, tmp_path):
    with serving(scale=1, faults=[Fault("hang", times=None)]) as server:
        config = home / ".metagpt" / "config2.yaml"
        config.write_text(f"llm: {{api_type: local_llm, base_url: '{server.base_url}', model: {server.model}}}\n")
        before = config.read_text()
        command = [sys.executable, "-m", "metagpt_localllm", "doctor", "--write"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        until = time.monotonic() + 30
        while not server.requests and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Stopped. Nothing was changed." in said and "Traceback" not in said
    assert config.read_text() == before and list(config.parent.iterdir()) == [config]


# ------------------------------------------------------------------------------------------------ deadlines


def test_deadlines_that_this_machine_cannot_keep_are_taken_back(diagnosed):
    local = {"timeouts": {"first_token": 5, "stall": "2m", "total": "20m"}, "tiers": [
        {"name": "code", "match": {"max_prompt_tokens": 100}, "first_token": 2},
    ]}  # fmt: skip
    with serving("ollama", scale=5, gpu_share=1.0, decode_speed=20, prefill_speed=100) as server:
        report = diagnosed(server, local=local, timeout=20)
    paths = {path: value for path, value in report.said["changes"].items()}
    assert paths["llm.local.timeouts.first_token"] == "auto" and paths["llm.timeout"] > 20
    assert "llm.local.timeouts.stall" not in paths and "llm.local.tiers.0.first_token" not in paths


# ------------------------------------------------------------------------------- configuration, installation


@pytest.mark.parametrize(
    "versions, says",
    [({"lancedb": None}, "lancedb, which MetaGPT imports, is missing"), ({"click": "8.3.0", "typer": "0.9.0"}, "click<8.2"),
     ({"metagpt": None}, "MetaGPT is not installed")],
)  # fmt: skip
def test_a_metagpt_that_its_own_pins_break_is_named(diagnosed, monkeypatch, versions, says):
    known = {"metagpt": "0.8.2", "lancedb": "0.20", "click": "8.1.7", "typer": "0.9.0", **versions}
    monkeypatch.setattr(installation, "installed_version", known.get)
    report = diagnosed("http://127.0.0.1:9/v1", "--offline")
    assert report.code == 2 and says in report["metagpt"]["title"] + report["metagpt"]["remedy"]


def test_a_second_copy_of_the_configuration_is_told_with_the_one_that_wins(diagnosed, home):
    other = home.parent / "project" / "config" / "config2.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("llm: {api_type: local_llm, base_url: 'http://127.0.0.1:7/v1', model: edited-in-vain}\n")
    with serving() as server:
        report = diagnosed(server, "--quick")
    winner = str(home / ".metagpt" / "config2.yaml")
    assert f"takes that of {winner} and drops that of {other}" in report["second_config"]["evidence"]
    assert report.said["config"] == winner and report.said["servers"][0]["model"] == "codebooga-34b"


def test_no_configuration_at_all_leads_to_init(home):
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 2 and "metagpt-localllm init" in result.output


def test_a_mistake_in_the_configuration_is_named_and_the_server_examined_all_the_same(diagnosed):
    with serving() as server:
        report = diagnosed(server, "--quick", local={"timeouts": {"first_tokn": 3}})
    assert report.code == 2 and "did you mean 'first_token'?" in report["config"]["title"]
    assert report.said["servers"][0]["kind"] == "llama.cpp"


def test_metagpts_own_provider_at_a_local_server_can_be_changed_for_ours(diagnosed):
    with serving() as server:
        report = diagnosed(server, "--quick", api_type="openai")
    assert report.code == 1 and report.said["changes"] == {"llm.api_type": "local_llm"}
    assert report.said["servers"][0]["facts"]["window"] == 16384


def test_offline_asks_nobody(diagnosed):
    with serving() as server:
        report = diagnosed(server, "--offline")
        assert server.paths == [] and report.said["servers"] == [] and report.code == 0


# ---------------------------------------------------------------------------------------------------- --write

WRITTEN = """\
# My notes: do not lose them.
llm:
  api_type: local_llm      # ours
  base_url: {base_url}   # the big machine
  model: codebouga-34b
  api_key: sk-very-secret
  local:
    context:
      window: 32768   # as I thought
"""


@pytest.fixture(scope="session")
def config2():
    """MetaGPT's own; it takes the home for good that is there when it is imported, so that is not to be one test's."""
    from metagpt import config2

    return config2


async def answered_by_metagpt(config2, monkeypatch, home):
    """What MetaGPT gets that finds this home and this project."""
    from metagpt.provider.llm_provider_registry import create_llm_instance

    monkeypatch.setattr(config2, "CONFIG_ROOT", home / ".metagpt")
    monkeypatch.setattr(config2, "METAGPT_ROOT", home.parent / "project")
    return await create_llm_instance(config2.Config.default().llm).aask("hi")


def test_write_leaves_a_configuration_that_a_run_uses(config2, home, monkeypatch):
    config, loser = home / ".metagpt" / "config2.yaml", home.parent / "project" / "config" / "config2.yaml"
    with serving("ollama", gpu_share=1.0) as server:
        loser.parent.mkdir(parents=True)
        loser.write_text("llm: {api_type: local_llm, base_url: 'http://127.0.0.1:9/v1', model: edited-in-vain}\n")
        config.write_text(WRITTEN.format(base_url=server.base_url))
        first = CliRunner().invoke(main, ["doctor", "--write"], catch_exceptions=False)
        second = CliRunner().invoke(main, ["doctor", "--write"], catch_exceptions=False)
        asked = len(server.requests)
        assert asyncio.run(answered_by_metagpt(config2, monkeypatch, home)) == COUNTED
        assert len(server.requests) == asked + 1 and server.requests[-1]["model"] == "codebooga-34b"
    assert first.exit_code == 2 and "llm.model: codebooga-34b" in first.output
    assert second.exit_code == 1 and "llm.local.context.window: auto" in second.output
    text = config.read_text()
    for comment in ("# My notes: do not lose them.", "# ours", "# the big machine", "# as I thought"):
        assert comment in text
    assert [line.split(":")[0] for line in text.splitlines()] == [line.split(":")[0] for line in WRITTEN.splitlines()]
    backups = sorted(config.parent.glob("config2.yaml.bak-*"))
    assert len(backups) == 2 and "codebouga-34b" in backups[0].read_text()
    assert "sk-very-secret" not in first.output + second.output


def test_write_with_tiers_writes_them_down_and_keeps_the_measurement(home):
    config, path = home / ".metagpt" / "config2.yaml", home / "state.db"
    with serving() as server:
        llm = f"api_type: local_llm\n  base_url: {server.base_url}\n  model: {server.model}"
        config.write_text(f"llm:\n  {llm}\n  local:\n    journal:\n      path: {path}\n")
        result = CliRunner().invoke(main, ["doctor", "--write", "--tiers"], catch_exceptions=False)
        rows = state_at(str(path)).samples(server.base_url, server.model)
        tiers = yaml.safe_load(config.read_text())["llm"]["local"]["tiers"]
        again = CliRunner().invoke(main, ["doctor", "--quick", "--json"], catch_exceptions=False)
    assert result.exit_code == 0 and [tier["name"] for tier in tiers] == ["short", "medium", "long"]
    assert "match" not in tiers[-1] and len(rows) >= 2
    assert again.exit_code == 0, again.output


def test_the_text_begins_with_the_worst_and_keeps_commands_whole(diagnosed, home):
    with serving("ollama", context=4096, gpu_share=0.5) as server:
        diagnosed(server, "--quick", model="codebouga-34b")
        broken = CliRunner().invoke(main, ["doctor", "--quick"], env={"COLUMNS": "80"})
        diagnosed(server, "--quick")
        held = CliRunner().invoke(main, ["doctor", "--quick"], env={"COLUMNS": "80"})
    assert "1. broken" in broken.output and "MetaGPT cannot run like this" in broken.output
    assert "`OLLAMA_CONTEXT_LENGTH=8192 ollama serve`" in held.output and "It works, but" in held.output


def test_the_doctor_needs_no_metagpt_to_be_imported():
    probe = "import sys; import metagpt_localllm.doctor.diagnosis; assert 'metagpt' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_a_password_in_the_address_is_written_and_not_printed(diagnosed, home):
    with serving("vllm") as server:
        address = server.base_url.replace("//", "//me:hunter2@")
        report = diagnosed(address.replace("/v1", ""), "--write", model=server.model)
    assert report["base_url"] and "hunter2" not in report.result.output
    assert yaml.safe_load((home / ".metagpt" / "config2.yaml").read_text())["llm"]["base_url"] == address


def test_a_server_that_does_not_stream_at_all_is_found_like_a_proxy(diagnosed):
    with (
        serving(scale=10, decode_speed=5.0, prefill_speed=400) as server,
        Proxy(server.base_url, stream=False) as proxy,
    ):
        report = diagnosed(proxy.base_url, model=server.model)
    assert "buffered" in report.names and "chat" not in report.names


@pytest.mark.parametrize("quantization, name", [
    ("Q4_K - Medium", "Q4_K_M"), ("(guessed) Q8_0", "Q8_0"), ("Q2_K - Medium", "Q2_K"), ("IQ4_XS - 4.25 bpw", "IQ4_XS"),
    ("F16", "F16"), ("all F32", "F32"), ("Q5_K_S", "Q5_K_S"), ("4bit", None), ("", None),
])  # fmt: skip
def test_quantizations_are_known_by_the_names_that_servers_give_them(quantization, name):
    assert normalized(quantization) == name


def test_weights_and_context_are_reckoned_from_what_is_known():
    llama = Anatomy(parameters=8_030_000_000, layers=32, kv_heads=8, key_size=128, value_size=128)
    # Llama 3.1 8B as Q4_K_M is a file of 4.92 GB, and 8,192 tokens of its context take 1 GiB.
    known = need(llama, "Q4_K_M", 8192)
    assert known.weights == pytest.approx(4.92e9, rel=0.01) and known.cache == 1 << 30
    by_name = need(Anatomy(), "", 8192, "llama-3.1-8b-instruct")
    assert by_name.total == pytest.approx(known.total, rel=0.02) and "from the name" in by_name.how
    assert need(Anatomy(), "", 8192, "mixtral-8x7b") is None
    name, weights = smaller(known, "Q4_K_M", known.cache + 4.4e9)
    assert name == "Q3_K_L" and weights + known.cache <= known.cache + 4.4e9
    assert smaller(known, "Q4_K_M", 1e9) is None and smaller(known, "", 1e12) is None


def test_the_metadata_of_a_gguf_is_that_which_its_own_library_reads(tiny_gguf):
    from gguf import GGUFReader

    fields = GGUFReader(tiny_gguf).fields
    read = gguf_metadata(tiny_gguf)
    short = {name: field for name, field in fields.items() if not name.startswith("GGUF.") and name in read}
    assert len(short) >= 5 and all(read[name] == field.contents() for name, field in short.items())
    assert {name for name in fields if not name.startswith("GGUF.")} - set(read) <= {
        "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    }  # fmt: skip


def test_what_is_no_gguf_is_refused(tmp_path):
    for content in (b"", b"PK\3\4", b"GGUF\3\0\0\0" + b"\xff" * 40, b"GGUF\1\0\0\0"):
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(ValueError):
            gguf_metadata(tmp_path / "m")
