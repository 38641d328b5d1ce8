"""LiteLLM's real proxy in front of other servers, with an environment of its own (environments.py says where)."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress

from environments import START_LIMIT, _answers, environment, folder, free_port

#: It does not start without one.
KEY = "sk-" + "1a2b3c4d" * 6


def deployment(name, base_url, model, **more):
    """One server behind it; ``more`` goes to litellm_params but ``info``, which is its model_info."""
    info = more.pop("info", {})
    params = {"model": f"openai/{model}", "api_base": base_url, "api_key": "none", **more}
    return {"model_name": name, "litellm_params": params, "model_info": info}


@contextmanager
def litellm(*deployments, **sections):
    """The base_url of the proxy while it runs; ``sections`` are those of its config.yaml beside the list of models.

    Raises:
        RuntimeError: it ended, or did not answer in START_LIMIT seconds.
    """
    python, port = environment("litellm"), free_port()
    config, log_path = folder() / f"litellm-{port}.yaml", folder() / "litellm.log"
    # JSON is YAML.
    config.write_text(json.dumps({"model_list": deployments, "general_settings": {"master_key": KEY}, **sections}))
    # Its table of prices comes from the package instead of the network.
    variables = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=str(folder()),
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + START_LIMIT
        while not _answers(f"http://127.0.0.1:{port}/health/liveliness"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"LiteLLM did not start; its last words:\n{log_path.read_text('utf-8', 'replace')[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        config.unlink()
