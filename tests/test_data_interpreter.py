"""MetaGPT's DataInterpreter on real llama.cpp, with a history that grows far over the window.

The model says random words; a grammar that the server applies to every answer makes them what the role can read, both as
its thoughts (JSON) and as its code (a Python dict, which Jupyter echoes). The requests are as always.
"""

import asyncio

import httpx
import pytest
from conftest import kinds, serve
from metagpt.configs.llm_config import LLMConfig
from metagpt.context import Context
from metagpt.roles.di.data_interpreter import DataInterpreter

from metagpt_localllm import events

WORDS = pytest.importorskip("make_tiny_gguf", reason="gguf is for newer Pythons").WORDS
WINDOW, LOOPS = 4096, 13
GRAMMAR = r"""
root ::= "```python\n{\"thoughts\": \"The" word{330} "\", \"state\": 1}\n```"
word ::= """ + " | ".join(f'" {word}"' for word in WORDS)
OVERFLOW = "exceeds the available context size"


async def test_a_history_of_three_windows_is_worked_through_without_an_overflow(tiny_gguf, tmp_path, seen):
    log = tmp_path / "server.log"
    with log.open("w") as written, serve(tiny_gguf, WINDOW, 0, GRAMMAR, log=written) as base_url:
        context = Context()
        llm = LLMConfig(api_type="local_llm", base_url=base_url, model="tiny", max_token=512)
        context.config = context.config.model_copy(update={"llm": llm})
        role = DataInterpreter(context=context, react_mode="react", max_react_loop=LOOPS)
        try:
            await role.run("Find out which of the words is said most often.")
        finally:
            await role.execute_code.terminate()

        memory = [{"role": message.role, "content": message.content} for message in role.working_memory.get()]
        async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=60) as client:
            counted = await client.post("/chat/completions/input_tokens", json={"messages": memory})
            assert counted.json()["input_tokens"] > 3 * WINDOW
            # The server's log has every overflow in order: once it has this one, it has all there were before.
            refused = await client.post("/chat/completions", json={"messages": memory})
        assert refused.status_code == 400
        for _ in range(200):
            if OVERFLOW in log.read_text():
                break
            await asyncio.sleep(0.05)
        assert log.read_text().count(OVERFLOW) == 1

    done = [event for event in seen if isinstance(event, events.Done)]
    assert len(done) == 2 * LOOPS - 1  # the first loop starts without thoughts
    assert {event.finish_reason for event in done} == {"stop"}
    assert "Trimmed" in kinds(seen)
    assert not {"Retry", "Failed"} & set(kinds(seen))
