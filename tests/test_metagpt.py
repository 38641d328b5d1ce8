"""MetaGPT itself, unchanged, on our provider."""

import asyncio
import contextlib
import gc
from importlib import metadata

import pytest
from conftest import FAST, WORDS
from metagpt import config2
from metagpt.actions import Action
from metagpt.actions.action_node import ActionNode
from metagpt.configs.llm_config import LLMConfig, LLMType
from metagpt.context import Context
from metagpt.provider.llm_provider_registry import create_llm_instance
from metagpt.roles import Role
from metagpt.schema import Message
from metagpt.team import Team
from pydantic import ValidationError
from tenacity import RetryError

from metagpt_localllm import errors, events, provider
from metagpt_localllm.installation import METAGPT_KEYS
from metagpt_localllm.provider import LocalLLM
from metagpt_localllm.simulator import Answer, Fault, Machine, SimulatorThread, answers


def make(server, **options):
    local = {**FAST, **options.pop("local", {})}
    return create_llm_instance(
        LLMConfig(api_type="local_llm", base_url=server.base_url, model=server.model, local=local, **options)
    )


@contextlib.contextmanager
def configured(server):
    """MetaGPT's own configuration names the server."""
    default = Context.model_fields["config"].default  # of 0.8.2; 1.0.0 has a factory, which keeps what it made
    used = default if isinstance(default, config2.Config) else config2.Config.default()
    before = used.llm
    used.llm = LLMConfig(api_type="local_llm", base_url=server.base_url, model=server.model, local=FAST)
    try:
        yield
    finally:
        used.llm = before


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


async def test_stream_false_and_no_system_prompt_are_kept_to(simulator, capsys):
    async with simulator() as server:
        llm = make(server, stream=False)
        llm.use_system_prompt = False
        await llm.aask("hello")
        assert WORDS not in capsys.readouterr().out
        assert server.requests[-1]["messages"] == [{"role": "user", "content": "hello"}]
        llm.use_system_prompt = True
        await llm.aask("hello", system_msgs=["be brief"])
        assert server.requests[-1]["messages"][0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize("sees", [True, False])
async def test_images_go_to_a_model_that_sees_them_and_only_there(simulator, sees):
    # The simulated llama.cpp says that it sees nothing; a plain server does not say, and is believed to see.
    async with simulator(dialect="plain" if sees else "llama.cpp", machine=Machine(1e6, 1e6, context=8192)) as server:
        llm = make(server, context_length=8192)
        await llm.aask("who are you?")
        await llm.aask("what is it?", images=["aGVsbG8="])
        content = server.requests[-1]["messages"][-1]["content"]
    if sees:
        assert [part["type"] for part in content] == ["text", "image_url"]
    else:
        assert content == "what is it?"


async def test_a_proxy_is_used_when_it_is_set(simulator):
    passed = []

    async def proxy(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        passed.append(head.split(b"\r\n")[0].decode())
        writer.write(b"HTTP/1.1 418 I'm a teapot\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    llm = create_llm_instance(
        LLMConfig(api_type="local_llm", base_url="http://far.example/v1", model="m", local=FAST,
                  proxy=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    )  # fmt: skip
    with pytest.raises(errors.RequestRejected, match="418"):
        await llm.aask("hello")
    server.close()
    assert "POST http://far.example/v1/chat/completions HTTP/1.1" in passed


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


async def test_a_team_runs_to_its_end(simulator):
    async with simulator() as server:
        role = Engineer()
        role.llm = make(server)
        role.actions[0].llm = role.llm
        team = Team(context=Context(), use_mgx=False) if "use_mgx" in Team.model_fields else Team(context=Context())
        team.hire([role])
        team.invest(1)
        team.run_project("go")
        await team.run(n_round=2)
        assert server.stats.completed == 1
        assert any(WORDS in message.content for message in role.rc.memory.get())


async def test_the_data_interpreters_growing_list_of_messages(simulator):
    """Plan, code, run, code again: the messages of a task grow with each turn, and the notebook really runs."""
    from metagpt.roles.di.data_interpreter import DataInterpreter

    def answer(messages, tools):
        if "the first try" in str(messages):
            return Answer(text="```python\nprint('mean:', sum([3, 1, 2]) / 3)\n```")
        usual = answers.answer(messages, tools)
        return Answer(text="```python\nraise ValueError('the first try')\n```") if "mean:" in usual.text else usual

    seen = []
    unsubscribe = events.subscribe(seen.append)
    async with simulator(Fault("stall", on=2), answer=answer, machine=Machine(1e6, 1e6, context=16384)) as server:
        with configured(server):  # WritePlan takes the configured provider, not the role's
            role = DataInterpreter()
            await role.run("Compute the mean of 3, 1 and 2")
    unsubscribe()
    actions = {event.call.action for event in seen if isinstance(event, events.Done)}
    assert {"WritePlan", "WriteAnalysisCode"} <= actions
    assert any(isinstance(event, events.Retry) for event in seen)
    after_the_failure = [r["messages"] for r in server.requests if "the first try" in str(r["messages"])]
    assert [m["role"] for m in after_the_failure[0]] == ["system", "user", "assistant", "user"]
    assert all(task.is_success and "mean" in task.result for task in role.planner.plan.tasks)


NODE = ActionNode(key="Answer", expected_type=str, instruction="Answer.", example="yes")


async def fill(llm):
    # 1.0.0 has renamed the parameter, and hides it from inspect.
    question = "context" if metadata.version("metagpt").startswith("0.") else "req"
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


async def test_a_failed_retry_loop_leaves_nothing_behind(simulator, monkeypatch):
    async def at_once(_seconds):
        pass

    monkeypatch.setattr(ActionNode._aask_v1.retry, "sleep", at_once)
    async with simulator(Fault("error", times=None)) as server:
        for _ in range(3):
            with pytest.raises(RetryError):
                await fill(make(server, local={"retry": {"attempts": 1}}))
        assert server.stats.requests == 3
    gc.collect()
    assert len(provider._spent) == 0


async def test_a_server_where_even_the_probe_hangs_gets_no_more_connections_than_attempts():
    connections = []

    async def swallow(reader, _writer):
        connections.append(1)
        await reader.read(-1)

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    llm = create_llm_instance(
        LLMConfig(api_type="local_llm", base_url=url, model="m", local={**FAST, "timeouts": {"first_token": 1.5}})
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


@pytest.mark.parametrize("key, hint", [("first_token", "local.timeouts.first_token"), ("locl", "'local'"), ("modle", "'model'")])
def test_a_key_of_llm_that_metagpt_would_ignore_is_refused_when_it_was_meant_for_us(key, hint):
    with pytest.raises(ValidationError, match=hint) as caught:
        config2.Config(llm={"api_type": "local_llm", "model": "m", key: "3"})
    assert f"llm.{key}" in str(caught.value)
    config2.Config(llm={"api_type": "openai", "api_key": "k", key: "3"})


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"base_url": "http://localhost:1/v1"}, "llm.model"),
        ({"model": "m"}, "llm.base_url is missing"),
        ({"model": "m", "base_url": "localhost:1234/v1"}, "llm.base_url"),
        ({"model": "m", "base_url": "http://localhost:99999/v1"}, "llm.base_url"),
        ({"model": "m", "base_url": "http://[::1/v1"}, "llm.base_url"),
        ({"model": "m", "base_url": "http://h/v1", "proxy": "127.0.0.1:1"}, "llm.proxy"),
        ({"model": "m", "base_url": "http://h/v1", "api_key": "sécret"}, "llm.api_key"),
        ({"model": "m", "base_url": "http://h/v1", "timeout": -5}, "llm.timeout"),
    ],
)
def test_what_could_only_fail_later_is_refused_at_once_and_named(wrong, named):
    with pytest.raises(ValueError) as caught:
        create_llm_instance(LLMConfig(api_type="local_llm", **wrong))
    assert named in str(caught.value) and "sécret" not in str(caught.value)


def test_the_models_section_takes_it_too():
    from metagpt.configs.models_config import ModelsConfig

    models = ModelsConfig(models={"mine": {"api_type": "local_llm", "local": {"retry": {"attempts": 2}}}})
    assert models.models["mine"].local.retry.attempts == 2
    assert models.models["mine"].api_type is LLMType.LOCAL_LLM


@pytest.mark.skipif("roles" not in config2.Config.model_fields, reason="MetaGPT 0.8.2 has no roles section")
def test_the_roles_section_of_1_0_0_takes_it_too():
    config = config2.Config(
        llm={"api_type": "openai", "api_key": "k"},
        roles=[{"role": "Engineer", "llm": {"api_type": "local_llm", "model": "m", "local": {"retry": {"attempts": 3}}}}],
    )
    assert config.roles[0].llm.local.retry.attempts == 3


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
    assert set(LLMConfig.model_fields) <= {*METAGPT_KEYS, "local"}, "the check would take a key of MetaGPT's for a mistake"


async def test_a_team_that_breaks_off_is_noticed_though_it_swallows_the_error(monkeypatch):
    from metagpt.environment import base_env
    from metagpt.team import Team

    from metagpt_localllm import closing
    from metagpt_localllm._register import watch_environment

    noticed = []
    monkeypatch.setattr(closing, "broke_off", lambda error: noticed.append(type(error).__name__))
    assert base_env.Environment.run.metagpt_localllm, "the hook has done it while MetaGPT was imported"
    watch_environment(base_env)  # once more is not twice
    team = Team(context=Context(), use_mgx=False)
    monkeypatch.setattr(type(team.env), "is_idle", False)
    monkeypatch.setattr(Team, "serialize", lambda self: None)

    class Broken:
        is_idle = False

        async def run(self):
            raise RuntimeError("the role could make nothing of it")

    team.env.roles = {"r": Broken()}
    await team.run(n_round=1)
    assert noticed == ["RuntimeError"]
