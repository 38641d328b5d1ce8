"""Serves a GGUF with the real llama.cpp server of the xllamacpp wheel, until its standard input closes.

Arguments: the model, the context in tokens, and perhaps the port and a grammar (GBNF) for every answer.
"""

import os
import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[3]) if len(sys.argv) > 3 else 0
parameters.n_ctx, parameters.n_parallel = int(sys.argv[2]), 1
# More would wait for each other by spinning, which takes minutes on a machine that is busy.
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.endpoint_metrics = parameters.endpoint_props = True
parameters.warmup = False
parameters.n_batch = 256  # it looks once a batch whether the client is still there, and tells its progress
if len(sys.argv) > 4:
    # Such answers are for long runs: at 4,000 tokens of context the tiny model says its next five times faster without.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.sampling.grammar = xllamacpp.CommonGrammar(
        xllamacpp.common_grammar_type.COMMON_GRAMMAR_TYPE_USER, sys.argv[4]
    )
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.buffer.read()
os._exit(0)  # llama.cpp's own shutdown waits for requests in flight
