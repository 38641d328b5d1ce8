"""The .pth file and the import hook: a wheel in a fresh environment, and the editable install that runs the tests."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from metagpt_localllm.simulator import Machine, SimulatorThread
from metagpt_localllm.simulator.answers import FILES

ROOT = Path(__file__).parent.parent
REGISTERED = "from metagpt.configs.llm_config import LLMType; print(LLMType('local_llm').name)"


def python(code, executable=sys.executable, **environment):
    command = [executable, "-W", "ignore", "-c", code]
    # Not in the checkout: it would be found before the installed package.
    return subprocess.run(
        command, cwd=os.environ["HOME"], env={**os.environ, **environment}, capture_output=True, text=True
    )


def home(folder, llm):
    (folder / ".metagpt").mkdir(parents=True, exist_ok=True)
    (folder / ".metagpt" / "config2.yaml").write_text(f"llm: {llm}\n")
    return {"HOME": str(folder), "METAGPT_PROJECT_ROOT": str(folder)}


STOCK = "{api_type: openai, api_key: none, model: m}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(ROOT)]
    build = subprocess.run(command, capture_output=True, text=True)
    if build.returncode and "No module named pip" in build.stderr:
        pytest.skip("there is no pip in this environment")
    assert build.returncode == 0, build.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The python of an environment with the wheel in it, and MetaGPT from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site_packages)
    # Its .pth files are not read, so our editable install is not seen.
    (site_packages / "metagpt.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(folder / "bin" / "python")


def test_the_wheel_carries_the_pth_file_and_the_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "metagpt_localllm.pth" in names and "metagpt_localllm/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "bench"))]


def test_in_a_script_from_a_wheel(installed):
    done = python(REGISTERED + "; import metagpt_localllm; print(metagpt_localllm.__file__)", installed)
    assert "LOCAL_LLM" in done.stdout and str(ROOT) not in done.stdout, done.stderr


def test_in_a_script_from_an_editable_install():
    done = python(REGISTERED)
    assert "LOCAL_LLM" in done.stdout, done.stderr


def test_in_a_subprocess_and_in_a_spawned_process(installed, tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, subprocess, sys\n"
        f"def work():\n    {REGISTERED.replace('; ', chr(10) + '    ')}\n"
        "if __name__ == '__main__':\n"
        f"    subprocess.run([sys.executable, '-c', {REGISTERED!r}], check=True)\n"
        "    p = multiprocessing.get_context('spawn').Process(target=work); p.start(); p.join()\n"
    )
    done = subprocess.run([installed, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split().count("LOCAL_LLM") == 2, done.stderr


def test_in_pytest(installed, tmp_path):
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {REGISTERED}\n")
    done = subprocess.run(
        [installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "1 passed" in done.stdout, done.stdout


def test_in_a_notebook_kernel(installed):
    manager_module = pytest.importorskip("jupyter_client.manager")
    kernelspec = pytest.importorskip("jupyter_client.kernelspec")
    manager = manager_module.KernelManager()
    manager._kernel_spec = kernelspec.KernelSpec(argv=[installed, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
    manager.start_kernel(cwd=os.environ["HOME"])
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        said = []
        client.execute_interactive(REGISTERED, timeout=60, output_hook=lambda message: said.append(str(message["content"])))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "LOCAL_LLM" in " ".join(said)


def test_the_metagpt_command_writes_its_project_and_nothing_else_is_changed(installed, tmp_path):
    command = [installed, "-W", "ignore", str(Path(sys.executable).parent / "metagpt"), "write a cli snake game"]
    with SimulatorThread(Machine(1e6, 1e6, context=32768), scale=1e4) as server:
        settings = f"{{api_type: local_llm, base_url: '{server.base_url}', model: {server.model}}}"
        environment = {**os.environ, **home(tmp_path, settings)}
        rounds = [] if metadata.version("metagpt").startswith("0.") else ["--n-round", "20"]
        done = subprocess.run(command + rounds, env=environment, cwd=tmp_path, capture_output=True, text=True)
        off = {**environment, "METAGPT_LOCALLLM_DISABLE": "1"}
        refused = subprocess.run(command, env=off, cwd=tmp_path, capture_output=True, text=True)
    written = {path.name for path in tmp_path.rglob("*.py")}
    assert set(FILES) <= written, done.stdout[-2000:] + done.stderr[-2000:]
    assert "llm.api_type" in refused.stderr and "local_llm" in refused.stderr


def test_it_is_switched_off_by_the_environment():
    done = python(REGISTERED, METAGPT_LOCALLLM_DISABLE="1")
    assert "'local_llm' is not a valid LLMType" in done.stderr


def test_importing_the_package_after_metagpt_does_the_same(tmp_path):
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if getattr(f, '__name__', '') != 'metagpt_localllm.pth']\n"
        "import metagpt.provider\nfrom metagpt.configs.models_config import ModelsConfig\nimport metagpt_localllm\n"
        "from metagpt.provider.llm_provider_registry import LLM_REGISTRY\n"
        "from metagpt.configs.llm_config import LLMType\n"
        "print(LLM_REGISTRY.get_provider(LLMType.LOCAL_LLM).__name__)\n"
        "print(ModelsConfig(models={'m': {'api_type': 'local_llm', 'local': {'retry': {'attempts': 2}}}})"
        ".models['m'].local.retry.attempts)"
    )
    # The conftest's configuration has api_type local_llm, which stock refuses before we come: give it another.
    done = python(code, **home(tmp_path, STOCK))
    assert "LocalLLM\n2" in done.stdout, done.stderr


def test_it_costs_other_programs_no_import():
    done = python("import sys, json, asyncio; print([m for m in sys.modules if 'localllm' in m])")
    assert done.stdout.strip() == "[]"


def test_a_broken_plugin_leaves_metagpt_as_it_was(tmp_path):
    broken = tmp_path / "metagpt_localllm"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('broken')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from metagpt.configs.llm_config import LLMType; print(LLMType.OPENAI)"
    done = python(code, **home(tmp_path / "home", STOCK))
    assert "LLMType.OPENAI" in done.stdout and "not active: broken" in done.stderr


def test_a_typo_ends_metagpt_at_its_start_with_the_path_and_the_nearest_name(tmp_path):
    settings = "{api_type: local_llm, model: m, local: {timeouts: {first_tokn: 3}}}"
    done = python("import metagpt.config2", **home(tmp_path, settings))
    assert done.returncode and "llm.local.timeouts.first_tokn" in done.stderr and "did you mean 'first_token'" in done.stderr


def test_a_module_that_a_shared_loader_loads_besides_is_left_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "fake.zip", "w") as archive:
        archive.writestr("metagpt/__init__.py", "")
        archive.writestr("metagpt/configs/__init__.py", "")
        archive.writestr("metagpt/configs/llm_config.py", "import metagpt.other")
        archive.writestr("metagpt/other.py", "x = 1")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'fake.zip')!r}); import metagpt.configs.llm_config, metagpt.other"
    done = python(code)
    assert done.returncode == 0 and "metagpt.other" not in done.stderr, done.stderr
