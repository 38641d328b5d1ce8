"""LiteLLM's proxy, by the shapes of its answers as version 1.108.7 gave them (tests/real/test_litellm_real.py runs it)."""

import json
import time

import httpx
import pytest
from conftest import RawServer, chunk, kinds
from contract import endpoint_of, identified

from metagpt_localllm import errors, failures, servers
from metagpt_localllm.call import complete
from metagpt_localllm.checking import Trouble, see
from metagpt_localllm.failures import Kind
from metagpt_localllm.scanning import look_at
from metagpt_localllm.servers.litellm import LiteLLM

REACHES_NONE = (
    "litellm.InternalServerError: InternalServerError: OpenAIException - Connection error.\n\nLiteLLM: model group 'm' "
    "failed with the error above. No fallback was attempted."
)
TIMED_OUT = (
    "litellm.Timeout: APITimeoutError - Request timed out. Error_str: Request timed out.\n\nDeployment Info: "
    "request_timeout: None\ntimeout: 2.0"
)
TIMED_OUT_BEHIND = "litellm.Timeout: Timeout Error: OpenAIException - the model runner has unexpectedly stopped"
LOADING = "litellm.ServiceUnavailableError: ServiceUnavailableError: OpenAIException - Loading model"
OVERFLOW = (
    "litellm.ContextWindowExceededError: litellm.BadRequestError: ContextWindowExceededError: OpenAIException - request "
    "(6008 tokens) exceeds the available context size (4096 tokens), try increasing it\nmodel=m. "
    "context_window_fallbacks=None. fallbacks=None."
)
NO_MODEL = "/chat/completions: Invalid model name passed in model=nope. Call `/v1/models` to view available models for your key."
WRONG_KEY = {"error": {"message": "No connected db.", "type": "no_db_connection", "param": None, "code": "400"}}
WHOLE = b"".join([chunk(role="assistant"), chunk("ok"), chunk(finish="stop"), b"data: [DONE]\n\n"])


def entry(name, base="http://a/v1", model="openai/x", **info):
    return {"model_name": name, "litellm_params": {"api_base": base, "model": model}, "model_info": info}


def listed(name="m", **more):
    return {"id": name, "object": "model", "created": 1677610602, "owned_by": "openai", **more}


def about(*deployments, **more):
    return {
        "/v1/models": {"object": "list", "data": [listed(**more), listed("other", max_input_tokens=99)]},
        "/health/liveliness": "I'm alive!",
        "/model/info": {"data": [*deployments, entry("other")]},
    }


def error(status, message, code=None):
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": str(code or status)}})
    return _http(status, body, "application/json")


def _http(status, body, kind):
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()


async def test_it_is_found_out_by_questions_that_cost_nothing():
    async with RawServer(WHOLE, about=about(entry("m"), max_input_tokens=8192)) as server:
        found = await identified(endpoint_of(server.base_url, "m"))
        assert (found.name, found.facts.window, found.places) == ("litellm", 8192, 1)
        assert server.requests == [] and "/health" not in server.others
        assert set(server.others) == {"/v1/models", "/health/liveliness", "/model/info"}


async def test_even_a_list_that_hides_it_leads_to_no_question_that_costs():
    shown = {**about(), "/v1/models": {"data": [{"id": "m", "created": 5, "owned_by": "us"}]}}
    async with RawServer(WHOLE, about=shown) as server:
        assert (await identified(endpoint_of(server.base_url, "m"))).name == "litellm"
        assert "/health" not in server.others


async def test_the_date_of_its_models_alone_does_not_make_it_litellm():
    async with RawServer(WHOLE, about={"/v1/models": {"data": [listed()]}}) as server:
        assert (await identified(endpoint_of(server.base_url, "m"))).name == "plain"


@pytest.mark.parametrize("deployments, window, places", [
    ([entry("m", "http://a/v1"), entry("m", "http://b/v1")], 8192, 2),
    ([entry("m", max_input_tokens=4000), entry("m", "http://b/v1", max_input_tokens=6000)], 4000, 2),
    ([entry("m", "http://a/v1"), entry("m", "http://a/v1")], 8192, 1),
    ([entry("m", ["http://a/v1"]), entry("m", {"http": 1})], 8192, 2),
    # A cloud's model of that name, and a table of what Ollama's models could have: neither is what is loaded.
    ([entry("m", model="openai/gpt-4", max_input_tokens=8192, input_cost_per_token=3e-05)], None, 1),
    ([entry("m", model="ollama_chat/llama3", max_input_tokens=8192, input_cost_per_token=0)], None, 1),
    ([], 8192, 1),
])  # fmt: skip
async def test_its_window_is_the_smallest_that_is_known_and_its_places_are_its_servers(deployments, window, places):
    async with RawServer(WHOLE, about=about(*deployments, max_input_tokens=8192)) as server:
        found = await identified(endpoint_of(server.base_url, "m"))
    assert (found.facts.window, found.places) == (window, places)


async def test_its_own_retries_are_switched_off_with_each_request(ask):
    async with RawServer(error(500, "litellm.InternalServerError: x"), WHOLE, about=about(entry("m"))) as server:
        assert (await complete(ask(server))).text == "ok"
    assert [json.loads(body)["num_retries"] for body in server.requests] == [0, 0]


async def test_a_server_behind_it_that_is_not_there_is_waited_for_without_spending_attempts(ask, seen):
    refused = error(500, REACHES_NONE)
    settings = {"retry": {"attempts": 2, "backoff": {"initial": 0.01, "max": 0.02}}}
    async with RawServer(*[refused] * 6, WHOLE, about=about(entry("m"))) as server:
        assert (await complete(ask(server, settings=settings))).text == "ok"
    assert len(server.requests) == 7 and "Retry" not in kinds(seen)
    assert "/health" not in server.others, "that would be a chat with every model, each time"


async def test_a_model_that_loads_behind_it_is_waited_for_at_its_own_health(ask, seen):
    async with RawServer(error(503, LOADING), WHOLE, about=about(entry("m"))) as server:
        settings = {"retry": {"backoff": {"initial": 0.01, "max": 0.02}}}
        assert (await complete(ask(server, settings=settings))).text == "ok"
    assert "Loading" in kinds(seen) and "/health" not in server.others


async def test_a_proxy_that_comes_up_is_waited_for_without_a_question_that_costs():
    async with RawServer(WHOLE, about=about(entry("m"))) as server:
        endpoint = endpoint_of(server.base_url, "m")
        assert await servers.wait_until_up(endpoint, time.monotonic() + 10**9, 0.01)
    assert server.others == ["/health/liveliness"] * 2


async def test_an_answer_that_breaks_off_is_asked_for_again_and_never_gone_on_with(ask, seen):
    broken = chunk("ok, and") + b'data: {"error": {"message": "litellm.APIConnectionError: APIConnectionError: ' + (
        b'OpenAIException - Connection error.", "type": null, "param": null, "code": "500"}}\n\n'
    )
    async with RawServer(broken, WHOLE, about=about(entry("m"))) as server:
        assert (await complete(ask(server))).text == "ok"
    assert server.requests[0] == server.requests[1] and "Continued" not in kinds(seen)


@pytest.mark.parametrize("answer, kind, error_class, words", [
    (error(408, TIMED_OUT), Kind.TRANSIENT, errors.ServerFailed, "stream_timeout"),
    (error(504, TIMED_OUT_BEHIND), Kind.TRANSIENT, errors.ServerFailed, "server's own log"),
    (error(429, "litellm.RateLimitError: RateLimitError: OpenAIException - Too many requests"), Kind.TRANSIENT, errors.ServerFailed, ""),
    (error(429, "No deployments available for selected model, Try again in 5 seconds. Passed model=m."), Kind.NOT_UP,
     errors.ServerUnavailable, "api_base"),
    (error(500, REACHES_NONE), Kind.NOT_UP, errors.ServerUnavailable, "api_base"),
    (error(503, LOADING), Kind.LOADING, errors.ServerUnavailable, ""),
    (error(400, OVERFLOW), Kind.OVERFLOW, errors.ContextOverflow, ""),
    (error(400, NO_MODEL), Kind.FATAL, errors.ModelNotFound, "/v1/models"),
    (_http(400, json.dumps(WRONG_KEY), "application/json"), Kind.FATAL, errors.AccessDenied, "master_key"),
    (_http(500, "Internal Server Error", "text/plain"), Kind.FATAL, errors.AccessDenied, "master_key"),
])  # fmt: skip
def test_what_its_errors_mean(answer, kind, error_class, words):
    head, _, body = answer.decode().partition("\r\n\r\n")
    response = httpx.Response(int(head.split()[1]), request=httpx.Request("POST", "http://x/v1/chat/completions"))
    failure = LiteLLM(model="m").reread(failures.from_response(response, body), body, 0.3, keyed=False)
    assert (failure.kind, failure.error) == (kind, error_class) and words in failure.remedy
    if kind is Kind.OVERFLOW:
        assert (failure.window, failure.prompt_tokens) == (4096, 6008)


def test_a_connection_lost_after_a_while_spends_an_attempt_and_a_500_is_no_question_of_keys_where_there_is_one():
    response = httpx.Response(500, request=httpx.Request("POST", "http://x/v1/chat/completions"))
    late = LiteLLM().reread(failures.from_response(response, REACHES_NONE), REACHES_NONE, 30.0, keyed=True)
    plain = LiteLLM().reread(failures.from_response(response, "Internal Server Error"), "Internal Server Error", 0.1, keyed=True)
    assert late.kind is plain.kind is Kind.TRANSIENT


async def test_without_a_key_it_says_so_at_once(ask):
    shown = {"/health/liveliness": "I'm alive!"}
    async with RawServer(_http(500, "Internal Server Error", "text/plain"), about=shown) as server:
        with pytest.raises(errors.AccessDenied, match="master_key"):
            await complete(ask(server, settings={"server": "litellm"}))
    assert len(server.requests) == 1


def test_the_codes_of_errors_in_its_streams_are_strings():
    said = {"error": {"message": "litellm.Timeout: APITimeoutError - Request timed out.", "type": None, "code": "408"}}
    failure = failures.from_error_body(said, httpx.Request("POST", "http://x"))
    assert failure.response is not None and failure.response.status_code == 408
    assert "stream_timeout" in LiteLLM().reread(failure, json.dumps(said), 30.0, keyed=True).remedy


@pytest.mark.parametrize("answer", [_http(500, "Internal Server Error", "text/plain"),
                                    _http(400, json.dumps(WRONG_KEY), "application/json")], ids=["no key", "wrong key"])  # fmt: skip
async def test_check_and_init_know_that_it_wants_a_key(answer):
    async with RawServer(about={**about(), "/v1/models": answer, "/model/info": answer}) as server:
        endpoint = endpoint_of(server.base_url, "m")
        assert (await see(endpoint, "auto")).trouble is Trouble.NEEDS_KEY
        found = await look_at(endpoint, 5.0)
    assert found.needs_key and found.kind == "litellm"


async def test_a_strict_server_behind_it_does_not_switch_its_retries_on(ask):
    refused = error(400, "litellm.BadRequestError: OpenAIException - stream_options: Extra inputs are not permitted")
    async with RawServer(refused, WHOLE, about=about(entry("m"))) as server:
        assert (await complete(ask(server))).text == "ok"
    fields = [json.loads(request) for request in server.requests]
    assert ["stream_options" in sent for sent in fields] == [True, False]
    assert [sent["num_retries"] for sent in fields] == [0, 0]
