"""The servers that people run: one module for each, a plain one, and the detection that finds out which it is."""

from metagpt_localllm.servers.base import Ask, Facts, Loading, Server
from metagpt_localllm.servers.detection import (
    KINDS,
    UNKNOWN,
    Identified,
    Learned,
    continuation,
    count_tokens,
    forget,
    identify,
    is_strict,
    kind_named,
    known,
    learned,
    load,
    mark_strict,
    wait_until_up,
)

__all__ = [
    "KINDS",
    "UNKNOWN",
    "Ask",
    "Facts",
    "Identified",
    "Learned",
    "Loading",
    "Server",
    "continuation",
    "count_tokens",
    "forget",
    "identify",
    "is_strict",
    "kind_named",
    "known",
    "learned",
    "load",
    "mark_strict",
    "wait_until_up",
]
