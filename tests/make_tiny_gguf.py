"""Writes a llama-architecture GGUF with seeded random weights, about 250 KB: real llama.cpp loads it at once.

It says English words in random order and never ends by itself, so an answer is max_tokens long. With "slow" as the
second argument it is one of 32 MB, which takes seconds for a prompt of some thousand tokens. With "qwen" it is one of
47 MB that has Qwen's tokenizer (its 151,643 pieces, as dashscope ships them), so that sizes in tokens are real ones.
"""

import base64
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

TINY, SLOW, QWEN = (64, 2, 4, 128), (768, 4, 12, 2048), (128, 1, 2, 512)
CONTEXT = 16384
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


def byte_letters():
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(other)}}


def qwen_vocabulary():
    """Qwen's pieces and the specials of its chat, their kinds, and the merges that the pieces' ranks mean."""
    ranks_file = Path(find_spec("dashscope").origin).parent / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in ranks_file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in pairs}
    letters = byte_letters()

    def written(piece):
        return "".join(letters[byte] for byte in piece)

    merges = []
    for piece, rank in ranks.items():
        parts = [piece[at : at + 1] for at in range(len(piece))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(written, parts)))
    tokens = [written(piece) for piece in sorted(ranks, key=ranks.get)]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds = [int(gguf.TokenType.NORMAL)] * len(tokens) + [int(gguf.TokenType.CONTROL)] * len(specials)
    return tokens + specials, kinds, merges


def write(path, size=TINY):
    embedding, layers, heads, feed_forward = size
    merges = None
    if size == QWEN:
        tokens, kinds, merges = qwen_vocabulary()
    else:
        tokens, kinds = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random-tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(embedding)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(embedding // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) if k == gguf.TokenType.NORMAL else 0.0 for i, k in enumerate(kinds)])
        writer.add_bos_token_id(1)
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    random = np.random.default_rng(0)
    quantized = gguf.GGMLQuantizationType.Q8_0

    def matrix(name, rows, columns, scale=None, silent=()):
        weights = (random.random((rows, columns), dtype=np.float32) * 2 - 1) * (scale or (3.0 / columns) ** 0.5)
        weights[list(silent)] = 0
        writer.add_tensor(name, gguf.quants.quantize(weights, quantized), raw_dtype=quantized)

    def norm(name):
        writer.add_tensor(name, np.ones(embedding, dtype=np.float32))

    said = {blank + word for word in WORDS for blank in "\u2581\u0120"}
    matrix("token_embd.weight", len(tokens), embedding, 1.0)
    silent = [index for index, token in enumerate(tokens) if token not in said]
    matrix("output.weight", len(tokens), embedding, 4 * (3.0 / embedding) ** 0.5, silent)
    norm("output_norm.weight")
    for layer in range(layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        norm(block + "ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}{name}.weight", embedding, embedding)
        matrix(block + "ffn_gate.weight", feed_forward, embedding)
        matrix(block + "ffn_up.weight", feed_forward, embedding)
        matrix(block + "ffn_down.weight", embedding, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(sys.argv[1], {"slow": SLOW, "qwen": QWEN}[sys.argv[2]] if sys.argv[2:] else TINY)
