"""The .pth file and the import hook, in fresh interpreters."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REGISTERED = "from metagpt.configs.llm_config import LLMType; print(LLMType('local_llm').name)"


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_metagpt_knows_the_type_without_a_line_of_code():
    done = python(REGISTERED)
    assert "LOCAL_LLM" in done.stdout, done.stderr


def test_it_is_switched_off_by_the_environment():
    done = python(REGISTERED, METAGPT_LOCALLLM_DISABLE="1")
    assert "'local_llm' is not a valid LLMType" in done.stderr


def test_importing_the_package_after_metagpt_does_the_same():
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if getattr(f, '__name__', '') != 'MetaGPTLocalLLMFinder']\n"
        "import metagpt.provider\nfrom metagpt.configs.models_config import ModelsConfig\nimport metagpt_localllm\n"
        "from metagpt.provider.llm_provider_registry import LLM_REGISTRY\n"
        "from metagpt.configs.llm_config import LLMType\n"
        "print(LLM_REGISTRY.get_provider(LLMType.LOCAL_LLM).__name__)"
    )
    # The conftest's configuration has api_type local_llm, which stock refuses before we come: give it another.
    home = Path(os.environ["HOME"]) / "stock"
    (home / ".metagpt").mkdir(parents=True, exist_ok=True)
    (home / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: m}\n")
    done = python(code, HOME=str(home), METAGPT_PROJECT_ROOT=str(home))
    assert "LocalLLM" in done.stdout, done.stderr


def test_it_costs_other_programs_no_import():
    done = python("import sys; print([m for m in sys.modules if 'localllm' in m])")
    assert done.stdout.strip() == "[]"


def test_a_broken_plugin_leaves_metagpt_as_it_was(tmp_path):
    broken = tmp_path / "metagpt_localllm"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('broken')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from metagpt.configs.llm_config import LLMType; print(LLMType.OPENAI)"
    home = tmp_path / "home"
    (home / ".metagpt").mkdir(parents=True)
    (home / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: m}\n")
    done = python(code, HOME=str(home), METAGPT_PROJECT_ROOT=str(home))
    assert "LLMType.OPENAI" in done.stdout and "not active" in done.stderr


def test_spawned_processes_know_it_too(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "def work():\n    from metagpt.configs.llm_config import LLMType\n    print(LLMType.LOCAL_LLM.value, flush=True)\n"
        "if __name__ == '__main__':\n    p = multiprocessing.get_context('spawn').Process(target=work); p.start(); p.join()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert "local_llm" in done.stdout, done.stderr


def test_the_wheel_carries_the_pth_file_and_the_types(tmp_path):
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    if build.returncode and "No module named pip" in build.stderr:
        pytest.skip("there is no pip in this environment")
    assert build.returncode == 0, build.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "metagpt_localllm.pth" in names and "metagpt_localllm/py.typed" in names
    assert len(list(tmp_path.glob("*.whl"))) == 1
