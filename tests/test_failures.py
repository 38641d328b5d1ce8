"""The table of failures: what servers really answer, and what may follow."""

import json
import socket
import ssl

import httpx
import pytest

from metagpt_localllm import errors
from metagpt_localllm.failures import Kind, from_error_body, from_exception, from_response

WAITED = "llm.base_url, and llm.local.retry.wait_for_server"
REQUEST = httpx.Request("POST", "http://localhost:8080/v1/chat/completions")
LLAMA_OVERFLOW = {"code": 400, "message": "request (3286 tokens) exceeds the available context size (2048 tokens), try "
                  "increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": 3286, "n_ctx": 2048}  # fmt: skip
OLLAMA_OVERFLOW = {"message": json.dumps({"error": LLAMA_OVERFLOW}), "type": "invalid_request_error"}

#: status, body, kind, error, (window, prompt tokens)
TABLE = [
    # llama.cpp
    (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, Kind.LOADING,
     errors.ServerUnavailable, (None, None)),
    (400, {"error": LLAMA_OVERFLOW}, Kind.OVERFLOW, errors.ContextOverflow, (2048, 3286)),
    (500, {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}, Kind.TRANSIENT,
     errors.ServerFailed, (None, None)),
    (500, {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}, Kind.TRANSIENT,
     errors.ServerFailed, (None, None)),
    (401, {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}, Kind.FATAL,
     errors.AccessDenied, (None, None)),
    (404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}, Kind.FATAL,
     errors.WrongAddress, (None, None)),
    (400, {"error": {"code": 400, "message": "model 'x' not found", "type": "invalid_request_error"}}, Kind.FATAL,
     errors.ModelNotFound, (None, None)),
    (400, {"error": {"code": 400, "message": "'messages' is required", "type": "invalid_request_error"}}, Kind.FATAL,
     errors.RequestRejected, (None, None)),
    # ik_llama.cpp
    (500, {"error": {"message": "Input prompt is too big compared to KV size. Please try increasing KV size."}},
     Kind.OVERFLOW, errors.ContextOverflow, (None, None)),
    # Ollama
    (503, {"error": {"message": "server busy, please try again.  maximum pending requests exceeded", "type": "api_error"}},
     Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (404, {"error": {"message": 'model "llama9" not found, try pulling it first', "type": "api_error"}}, Kind.FATAL,
     errors.ModelNotFound, (None, None)),
    (500, {"error": {"message": "model runner has unexpectedly stopped, this may be due to resource limitations"}},
     Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (400, {"error": OLLAMA_OVERFLOW}, Kind.OVERFLOW, errors.ContextOverflow, (2048, 3286)),
    # LM Studio
    (400, {"error": "The number of tokens to keep from the initial prompt is greater than the context length "
                    "(n_keep: 13055>= n_ctx: 4096)."}, Kind.OVERFLOW, errors.ContextOverflow, (4096, 13055)),
    (400, {"error": {"message": "Trying to keep the first 9000 tokens when context the overflows. However, the model is "
                                "loaded with context length of only 4096 tokens"}}, Kind.OVERFLOW,
     errors.ContextOverflow, (4096, 9000)),
    (400, {"error": {"message": "Input does not fit in context length. The input has 31430 tokens, but the context "
                                "length only supports 30000 tokens."}}, Kind.OVERFLOW, errors.ContextOverflow,
     (30000, 31430)),
    (400, {"error": "Context size has been exceeded."}, Kind.OVERFLOW, errors.ContextOverflow, (None, None)),
    (400, {"error": "Model is unloaded."}, Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (400, {"error": "The model has crashed without additional information. (Exit code: 6)"}, Kind.TRANSIENT,
     errors.ServerFailed, (None, None)),
    (404, {"error": {"message": "No models loaded. Please load a model in the developer page"}}, Kind.FATAL,
     errors.ModelNotFound, (None, None)),
    (400, {"error": {"message": "No models loaded. Please load a model", "type": "invalid_request_error"}}, Kind.FATAL,
     errors.ModelNotFound, (None, None)),
    # vLLM
    (400, {"error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 4000 output "
                                "tokens and your prompt contains 3279 input tokens, for a total of 7279 tokens.",
                     "type": "BadRequestError", "param": "input_tokens", "code": 400}}, Kind.OVERFLOW,
     errors.ContextOverflow, (4096, 3279)),
    (404, {"error": {"message": "The model `none` does not exist. Valid aliases: m.", "type": "NotFoundError"}},
     Kind.FATAL, errors.ModelNotFound, (None, None)),
    # llama-cpp-python
    (400, {"error": {"message": "This model's maximum context length is 2048 tokens. However, you requested 4517 tokens "
                                "(3334 in the messages, 1183 in the completion).",
                     "code": "context_length_exceeded"}}, Kind.OVERFLOW, errors.ContextOverflow, (2048, 3334)),
    # transformers
    (422, {"detail": "Unexpected fields in the request: {'return_progress'}"}, Kind.STRICT, errors.RequestRejected,
     (None, None)),
    # anything
    (429, {"error": "slow down"}, Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (408, {}, Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (425, {}, Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (499, {}, Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (501, {"error": {"message": "not supported", "type": "not_supported_error"}}, Kind.FATAL, errors.RequestRejected,
     (None, None)),
    (502, {}, Kind.TRANSIENT, errors.ServerFailed, (None, None)),
    (403, {}, Kind.FATAL, errors.AccessDenied, (None, None)),
    (422, {"detail": "bad"}, Kind.FATAL, errors.RequestRejected, (None, None)),
]


@pytest.mark.parametrize("status, body, kind, error, sizes", TABLE)
def test_each_answer_has_its_class(status, body, kind, error, sizes):
    text = json.dumps(body)
    failure = from_response(httpx.Response(status, request=REQUEST, text=text), text)
    assert (failure.kind, failure.error) == (kind, error)
    assert (failure.window, failure.prompt_tokens) == sizes
    assert failure.remedy or failure.kind in (Kind.TRANSIENT, Kind.STRICT)
    assert failure.setting or failure.remedy or failure.kind is Kind.STRICT


def test_a_page_of_html_is_a_proxys():
    page = "<html><title>504 Gateway Time-out</title></html>"
    response = httpx.Response(504, request=REQUEST, text=page, headers={"content-type": "text/html"})
    failure = from_response(response, page)
    assert failure.kind is Kind.TRANSIENT and "proxy" in failure.what and "title" not in failure.what


@pytest.mark.parametrize("header, seconds", [("3", 3.0), ("0.5", 0.5), ("soon", None), ("-1", None), ("inf", None)])
def test_retry_after_counts_when_it_is_a_number_of_seconds(header, seconds):
    response = httpx.Response(429, request=REQUEST, headers={"retry-after": header})
    assert from_response(response, "").retry_after == seconds


def test_a_date_in_retry_after_counts_from_the_servers_own_clock():
    headers = {"retry-after": "Tue, 24 Nov 2026 21:00:30 GMT", "date": "Tue, 24 Nov 2026 21:00:00 GMT"}
    assert from_response(httpx.Response(503, request=REQUEST, headers=headers), "").retry_after == 30
    del headers["date"]
    assert from_response(httpx.Response(503, request=REQUEST, headers=headers), "").retry_after is None


def test_a_proxys_login_page_is_about_the_key():
    response = httpx.Response(401, request=REQUEST, headers={"content-type": "text/html"})
    failure = from_response(response, "<html>log in</html>")
    assert (failure.error, failure.setting) == (errors.AccessDenied, "llm.api_key")


def test_a_redirect_is_about_the_address():
    failure = from_response(httpx.Response(307, request=REQUEST, headers={"location": "https://x/"}), "")
    assert failure.kind is Kind.FATAL and failure.setting == "llm.base_url" and "https://x/" in failure.what


def test_a_complaint_about_the_body_does_not_quote_the_prompt():
    body = json.dumps({"detail": [{"loc": ["body", "messages"], "msg": "wrong type", "input": "my secret prompt"}]})
    failure = from_response(httpx.Response(422, request=REQUEST), body)
    assert "wrong type" in failure.what and "secret" not in failure.what


@pytest.mark.parametrize(
    "said, error",
    [
        ("No models loaded. Please load a model", errors.ModelNotFound),
        ("invalid_api_key", errors.AccessDenied),
        ("EngineCore died", errors.ServerFailed),
    ],
)
def test_an_error_in_a_200_without_a_code_is_classified_by_its_words(said, error):
    assert from_error_body({"error": {"message": said}}, REQUEST).error is error


def test_an_error_inside_a_stream_is_classified_by_its_code():
    assert from_error_body({"error": LLAMA_OVERFLOW}, REQUEST).kind is Kind.OVERFLOW
    failure = from_error_body({"error": {"message": "EngineCore died", "type": "InternalServerError"}}, REQUEST)
    assert failure.kind is Kind.TRANSIENT and "EngineCore died" in failure.what
    assert from_error_body({"error": "text"}, REQUEST).kind is Kind.TRANSIENT


def refused():
    error = httpx.ConnectError("All connection attempts failed")
    error.__cause__ = ConnectionRefusedError(111, "refused")
    return error


def unknown_host():
    error = httpx.ConnectError("[Errno -2] Name or service not known")
    error.__cause__ = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return error


def not_tls():
    error = httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER]")
    error.__cause__ = ssl.SSLError("wrong version number")
    return error


@pytest.mark.parametrize(
    "raised, began, kind, error, setting",
    [
        (refused(), False, Kind.NOT_UP, errors.ServerUnavailable, WAITED),
        (httpx.ConnectTimeout(""), False, Kind.NOT_UP, errors.ServerUnavailable, WAITED),
        (unknown_host(), False, Kind.FATAL, errors.ServerUnavailable, "llm.base_url"),
        (not_tls(), False, Kind.FATAL, errors.ServerUnavailable, "llm.base_url"),
        (httpx.UnsupportedProtocol("no protocol"), False, Kind.FATAL, errors.ServerUnavailable, "llm.base_url"),
        (httpx.LocalProtocolError("Illegal header value b'Bearer sk-secret'"), False, Kind.FATAL, errors.RequestRejected,
         "llm.api_key"),
        (httpx.RemoteProtocolError("Server disconnected"), False, Kind.TRANSIENT, errors.ConnectionLost,
         "llm.local.retry.attempts"),
        (httpx.RemoteProtocolError("peer closed connection"), True, Kind.TRANSIENT, errors.IncompleteStream,
         "llm.local.retry.attempts"),
        (httpx.ReadError(""), True, Kind.TRANSIENT, errors.IncompleteStream, "llm.local.retry.attempts"),
    ],
)  # fmt: skip
def test_each_exception_of_httpx_has_its_class(raised, began, kind, error, setting):
    failure = from_exception(raised, "http://localhost:1/v1", began)
    assert (failure.kind, failure.error, failure.setting) == (kind, error, setting)
    assert "secret" not in failure.what
    assert failure.cause is raised or "sk-secret" in str(raised)


KEY = "sk-Zq7/\"wXy9"
#: Bodies of errors of every shape, with the key in them, and line ends, NULs, escapes and half characters.
ODD = {
    "text": f"no\r\nnow: {KEY}\x00\x1b[2J\u2028\ud800",
    "long text": "x" * 290 + KEY + "y" * 1_000_000,
    "one long word": KEY * 10_000,
    "message": json.dumps({"error": {"message": f"bad\n{KEY}\x1b]0;owned\x07"}}),
    "message that is an object": json.dumps({"error": {"message": {"deep": [KEY, 1.5, None]}}}),
    "long message": json.dumps({"error": {"message": "x" * 296 + KEY}}),
    "escaped in JSON that is none": json.dumps({"error": KEY})[:-1],
    "list": json.dumps([KEY, {"loc": [KEY], "msg": {"k": KEY}}, 17]),
    "detail": json.dumps({"detail": [{"loc": ["body", KEY], "msg": KEY * 1000}] * 1000}),
    "number": "17",
    "huge number": "9" * 5000,
    "null": "null",
    "nested": "[" * 100_000,
    "nested to the limit": '{"error":' * 900 + "1" + "}" * 900,
    "code": json.dumps({"error": {"code": "NaN", "message": KEY}}),
    "NaN": '{"error": NaN}',
    "half a character": '{"error": "\\ud83d\\ud83d"}',
}


@pytest.mark.parametrize("status", [100, 204, 302, 400, 401, 404, 418, 422, 429, 500, 501, 503, 599, 999])
@pytest.mark.parametrize("shape", ODD)
def test_an_error_of_any_shape_is_one_short_line_without_the_key(status, shape):
    text = ODD[shape]
    response = httpx.Response(status, request=REQUEST, headers={"location": f"http://other/?{KEY}" + "z" * 5000})
    lines = [from_response(response, text, KEY).what]
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        lines.append(from_error_body(payload, REQUEST, KEY).what)
    for line in lines:
        assert len(line) < 500 and line.isprintable(), line
        assert KEY[:6] not in line and "wXy9" not in line, line


@pytest.mark.parametrize("digits", [13, 5000])
def test_numbers_that_no_server_can_mean_teach_nothing(digits):
    text = f"exceed_context_size_error n_ctx: {'9' * digits}, n_prompt_tokens: {'9' * digits}, n_keep: 0"
    failure = from_response(httpx.Response(400, request=REQUEST), text)
    assert (failure.kind, failure.window, failure.prompt_tokens) == (Kind.OVERFLOW, None, None)
    assert from_response(httpx.Response(400, request=REQUEST), "n_ctx: 0, context_length_exceeded").window is None


@pytest.mark.parametrize(
    "value", ["", " ", "nan", "-1", "inf", "1e400", "soon", "\x00", "Mon", "Mon, 01 Jan 2026 00:00:00 +99999999999999",
              "Mon, 01 Jan 99999 00:00:00 GMT", "Mon, 99 Jan 2026 99:99:99 GMT", ",,,,", "9" * 5000, ":", "1 Jan 0"],
)  # fmt: skip
def test_an_absurd_retry_after_asks_for_nothing(value):
    headers = [(b"retry-after", value.encode()), (b"date", b"Mon, 01 Jan 2026 00:00:00 GMT")]
    assert from_response(httpx.Response(503, headers=headers, request=REQUEST), "busy").retry_after is None


@pytest.mark.parametrize("error", [httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError, httpx.ProxyError])
@pytest.mark.parametrize("began", [False, True])
def test_what_httpx_quotes_is_one_short_line_without_the_key(error, began):
    what = from_exception(error("x" * 296 + KEY + "\x1b[2J\n" * 10_000), "http://h/v1", began, KEY).what
    assert len(what) < 500 and what.isprintable() and KEY[:5] not in what
