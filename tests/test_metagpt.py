"""MetaGPT itself, unchanged, on our provider."""

import asyncio
import inspect

import pytest
from conftest import FAST, WORDS
from metagpt.actions import Action
from metagpt.actions.action_node import ActionNode
from metagpt.configs.llm_config import LLMConfig, LLMType
from metagpt.context import Context
from metagpt.provider.llm_provider_registry import create_llm_instance
from metagpt.roles import Role
from metagpt.schema import Message
from pydantic import ValidationError
from tenacity import RetryError

from metagpt_localllm import errors, events
from metagpt_localllm.provider import LocalLLM
from metagpt_localllm.simulator import Answer, Fault, SimulatorThread


def make(server, **options):
    local = {**FAST, **options.pop("local", {})}
    return create_llm_instance(
        LLMConfig(api_type="local_llm", base_url=server.base_url, model=server.model, local=local, **options)
    )


async def test_every_way_in_takes_the_same_path(simulator):
    def answer(_messages, tools):
        if tools:
            return Answer(tool_name="execute", tool_arguments='{"language": "python", "code": "print(1)"}')
        return Answer(text=WORDS, reasoning="hm")

    async with simulator(answer=answer) as server:
        llm = make(server)
        assert isinstance(llm, LocalLLM)
        assert await llm.aask("hello", stream=False) == WORDS
        assert await llm.aask("hello", stream=True) == WORDS
        assert llm.reasoning_content == "hm"
        assert await llm.aask([{"role": "user", "content": "a list"}]) == WORDS
        assert WORDS in await llm.aask_batch(["one", "two"])
        completion = await llm.acompletion([{"role": "user", "content": "hello"}])
        assert completion.choices[0].message.content == WORDS and completion.usage.total_tokens > 0
        assert await llm.acompletion_text([{"role": "user", "content": "hello"}]) == WORDS
        assert await llm.aask_code([{"role": "user", "content": "code"}]) == {"language": "python", "code": "print(1)"}
    assert all(request["stream"] for request in server.requests)


async def test_tokens_are_printed_when_the_caller_streams_and_only_then(simulator, capsys):
    async with simulator() as server:
        await make(server).aask("hello", stream=False)
        assert WORDS not in capsys.readouterr().out
        await make(server).aask("hello", stream=True)
        assert WORDS + "\n" in capsys.readouterr().out


async def test_costs_are_token_counts(simulator):
    async with simulator() as server:
        llm = make(server)
        llm.cost_manager = Context().cost_manager
        before = llm.get_costs().total_completion_tokens
        await llm.aask("hello")
        assert llm.get_costs().total_completion_tokens > before
        assert llm.get_costs().total_cost == 0


async def test_with_model_takes_effect(simulator):
    async with simulator() as server:
        await make(server).with_model("other").aask("hello")
        assert server.requests[-1]["model"] == "other"


def test_a_provider_outlives_the_event_loop_it_was_first_used_on(simulator):
    with SimulatorThread(answer=lambda m, t: Answer(text=WORDS), scale=1e6) as server:
        llm = make(server)
        for _ in range(3):
            assert asyncio.run(llm.aask("hello")) == WORDS


class WriteCode(Action):
    name: str = "WriteCode"

    async def run(self, *_args):
        return await self._aask("write it")


class Engineer(Role):
    name: str = "Ada"
    profile: str = "Chief Engineer"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.set_actions([WriteCode])


async def test_the_calling_action_and_role_are_found_out(simulator):
    seen = []
    unsubscribe = events.subscribe(seen.append)
    try:
        async with simulator() as server:
            role = Engineer()
            role.llm = make(server)
            role.actions[0].llm = role.llm
            answer = await role.run(Message(content="go"))
    finally:
        unsubscribe()
    assert WORDS in answer.content
    sent = next(event for event in seen if isinstance(event, events.Sent))
    assert (sent.call.action, sent.call.role) == ("WriteCode", "Chief Engineer")


NODE = ActionNode(key="Answer", expected_type=str, instruction="Answer.", example="yes")


async def fill(llm):
    # 1.0.0 has renamed the parameter.
    question = "req" if "req" in inspect.signature(NODE.fill).parameters else "context"
    return await NODE.fill(**{question: "what?"}, llm=llm)


async def test_a_hanging_server_gets_no_more_requests_than_attempts_from_one_action_node(simulator, monkeypatch):
    async def at_once(_seconds):
        pass

    monkeypatch.setattr(ActionNode._aask_v1.retry, "sleep", at_once)
    filled = Answer(text='[CONTENT]\n{"Answer": "42"}\n[/CONTENT]')
    async with simulator(Fault("hang", times=4), answer=lambda m, t: filled) as server:
        llm = make(server, local={"timeouts": {"first_token": 0.5}})
        with pytest.raises(RetryError) as caught:
            await fill(llm)
        assert server.stats.requests == 4
        cause = caught.value
        while cause is not None and not isinstance(cause, errors.FirstTokenTimeout):
            last = getattr(cause, "last_attempt", None)
            cause = cause.__cause__ or (last.exception() if last is not None else None)
        assert isinstance(cause, errors.FirstTokenTimeout)
        node = await fill(llm)
        assert node.instruct_content.Answer == "42"
        assert server.stats.requests == 5


async def test_a_server_where_even_the_probe_hangs_gets_no_more_connections_than_attempts():
    connections = []

    async def swallow(reader, _writer):
        connections.append(1)
        await reader.read(-1)

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    llm = create_llm_instance(
        LLMConfig(api_type="local_llm", base_url=url, model="m", local={**FAST, "timeouts": {"first_token": 0.3}})
    )
    with pytest.raises(errors.FirstTokenTimeout):
        await llm.aask("hello")
    server.close()
    assert len(connections) == 4


# ------------------------------------------------------------------------------------------- configuration


def test_a_typo_is_refused_with_its_path_and_the_nearest_name():
    with pytest.raises(ValidationError, match="first_tokn") as caught:
        LLMConfig(api_type="local_llm", model="m", local={"timeouts": {"first_tokn": 3}})
    assert "local.timeouts.first_tokn" in str(caught.value) and "'first_token'" in str(caught.value)


def test_other_types_behave_as_before():
    config = LLMConfig(api_type="openai", api_key="k", model="m", local={"whatever": 1})
    assert config.local is None
    with pytest.raises(ValidationError):
        LLMConfig(api_type="no_such_type")


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match=r"llm\.model"):
        create_llm_instance(LLMConfig(api_type="local_llm"))


def test_the_models_section_takes_it_too():
    from metagpt.configs.models_config import ModelsConfig

    models = ModelsConfig(models={"mine": {"api_type": "local_llm", "local": {"retry": {"attempts": 2}}}})
    assert models.models["mine"].local.retry.attempts == 2
    assert models.models["mine"].api_type is LLMType.LOCAL_LLM


# ------------------------------------------------------------------------------------------- its internals


def test_the_parts_of_metagpt_that_we_touch_are_where_we_expect_them():
    from metagpt.logs import log_llm_stream, logger
    from metagpt.provider.llm_provider_registry import LLM_REGISTRY
    from metagpt.provider.openai_api import OpenAILLM

    assert callable(log_llm_stream) and hasattr(logger, "warning")
    assert LLM_REGISTRY.get_provider(LLMType.LOCAL_LLM) is LocalLLM
    for name in ("acompletion_text", "_achat_completion_stream", "_achat_completion", "acompletion", "aask",
                 "_achat_completion_function", "_update_costs", "_calc_usage", "get_timeout", "_init_client",
                 "_get_max_tokens", "with_model", "_user_msg", "_user_msg_with_imgs", "format_msg"):  # fmt: skip
        assert callable(getattr(OpenAILLM, name)), name
    for name in ("api_key", "base_url", "model", "max_token", "temperature", "timeout", "context_length", "proxy",
                 "calc_usage", "stream", "local"):  # fmt: skip
        assert name in LLMConfig.model_fields, name
    assert hasattr(ActionNode._aask_v1, "retry"), "ActionNode no longer retries with tenacity"
