"""MetaGPT 1.0.0, which is not on PyPI: tested where METAGPT_1_0 names a checkout of its main branch.

An environment of its own is made for it, our tests run there, and so do MetaGPT's own tests of its configuration.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKOUT = os.environ.get("METAGPT_1_0", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="METAGPT_1_0 names no checkout")


def run(*command, folder=ROOT, **environment):
    environment = {**os.environ, "METAGPT_1_0": "", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metagpt-1.0")
    here = Path(sys.executable).parent / "uv"
    uv = str(here) if here.exists() else shutil.which("uv")
    if uv is None:
        pytest.fail("uv is needed to install MetaGPT 1.0.0: pip install uv")
    run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    overrides = str(ROOT / "metagpt-overrides.txt")
    run(uv, "pip", "install", "-q", "--python", python, "--override", overrides, CHECKOUT, "-e", f"{ROOT}[test]", "pytest-mock")
    return python


def test_our_own_tests_pass_with_it(python):
    said = run(python, "-m", "pytest", "-p", "no:cacheprovider", "--deselect", "tests/test_metagpt_1_0.py")
    assert "failed" not in said


@pytest.mark.parametrize("switched_off", ["", "1"])
def test_its_own_tests_of_its_configuration_pass_with_the_plugin_installed(python, tmp_path, switched_off):
    (tmp_path / ".metagpt").mkdir()
    (tmp_path / ".metagpt" / "config2.yaml").write_text("llm: {api_type: openai, api_key: none, model: gpt-4-turbo}\n")
    tests = [f"{CHECKOUT}/tests/metagpt/{name}" for name in ("test_config.py", "configs", "provider/test_base_llm.py")]
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={CHECKOUT}", "-o", "asyncio_mode=strict"]
    # They look for their data in the checkout.
    where = {"HOME": str(tmp_path), "METAGPT_PROJECT_ROOT": CHECKOUT, "METAGPT_LOCALLLM_DISABLE": switched_off}
    run(python, "-m", "pytest", *options, *tests, folder=CHECKOUT, **where)
