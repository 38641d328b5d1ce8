"""Trims as a peer does, in the peer's own environment: a JSON object a line in and out. Imports nothing of ours.

    python bench/peers.py metagpt|langchain

In: ``messages``, ``limit`` in tokens, ``how``, and ``url`` of the server. Out: the version first, then ``messages``.
"""

import json
import os
import sys
import urllib.request
from importlib.metadata import version


def metagpt():
    """``compress_messages`` of MetaGPT's provider for local models; ``how`` is its compress_type.

    It counts half a token for each character, as MetaGPT's OpenAI provider does for a model that it doesn't know.
    """
    from metagpt.configs.compress_msg_config import CompressType
    from metagpt.configs.llm_config import LLMConfig
    from metagpt.provider.llm_provider_registry import create_llm_instance

    llm = create_llm_instance(
        LLMConfig(api_type="ollama", base_url="http://127.0.0.1:9", model="bench", api_key="none")
    )

    def trim(messages, limit, how, url):
        return llm.compress_messages(messages, compress_type=CompressType(how), max_token=limit)

    return trim, version("metagpt")


def langchain():
    """``trim_messages`` as its documentation recommends for chats; ``how`` is the counter: approximate or exact."""
    from langchain_core.messages import convert_to_openai_messages, trim_messages
    from langchain_core.messages.utils import count_tokens_approximately

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def trim(messages, limit, how, url):
        def exact(counted):
            body = json.dumps({"messages": convert_to_openai_messages(counted)}).encode()
            request = urllib.request.Request(
                url + "/v1/chat/completions/input_tokens", body, {"Content-Type": "application/json"}
            )
            return json.load(direct.open(request))["input_tokens"]

        kept = trim_messages(
            messages, strategy="last", max_tokens=limit, include_system=True, start_on="human",
            token_counter=exact if how == "exact" else count_tokens_approximately,
        )  # fmt: skip
        return convert_to_openai_messages(kept)

    return trim, version("langchain-core")


def main():
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    trim, release = {"metagpt": metagpt, "langchain": langchain}[sys.argv[1]]()
    print(json.dumps({"version": release}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"messages": trim(**json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
