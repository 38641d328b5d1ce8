"""Writes a llama-architecture GGUF with seeded random weights, about 250 KB: real llama.cpp loads it at once.

It says English words in random order and never ends by itself, so an answer is max_tokens long.
"""

import sys

import gguf
import numpy as np

EMBEDDING, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 64, 2, 4, 128, 16384
WORDS = "the of and to a in is that for it as was with be by on not he this are or his from at which but have an had".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary():
    """SentencePiece style: specials, 256 bytes, printable characters, every beginning of ' word'."""
    kind = gguf.TokenType
    entries = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    entries += [("<|im_start|>", kind.CONTROL), ("<|im_end|>", kind.CONTROL)]
    entries += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    pieces = ["\u2581", *(chr(code) for code in range(33, 127))]
    pieces += ["\u2581" + word[:length] for word in WORDS for length in range(1, len(word) + 1)]
    entries += [(piece, kind.NORMAL) for piece in dict.fromkeys(pieces)]
    return [text for text, _ in entries], [int(kind) for _, kind in entries]


def write(path):
    tokens, kinds = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random-tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) if k == gguf.TokenType.NORMAL else 0.0 for i, k in enumerate(kinds)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHATML)
    random = np.random.default_rng(0)
    quantized = gguf.GGMLQuantizationType.Q8_0

    def matrix(name, rows, columns, scale=None, silent=()):
        weights = (random.random((rows, columns), dtype=np.float32) * 2 - 1) * (scale or (3.0 / columns) ** 0.5)
        weights[list(silent)] = 0
        writer.add_tensor(name, gguf.quants.quantize(weights, quantized), raw_dtype=quantized)

    def norm(name):
        writer.add_tensor(name, np.ones(EMBEDDING, dtype=np.float32))

    said = {"\u2581" + word for word in WORDS}
    matrix("token_embd.weight", len(tokens), EMBEDDING, 1.0)
    silent = [index for index, token in enumerate(tokens) if token not in said]
    matrix("output.weight", len(tokens), EMBEDDING, 4 * (3.0 / EMBEDDING) ** 0.5, silent)
    norm("output_norm.weight")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        norm(block + "ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}{name}.weight", EMBEDDING, EMBEDDING)
        matrix(block + "ffn_gate.weight", FEED_FORWARD, EMBEDDING)
        matrix(block + "ffn_up.weight", FEED_FORWARD, EMBEDDING)
        matrix(block + "ffn_down.weight", EMBEDDING, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(sys.argv[1])
