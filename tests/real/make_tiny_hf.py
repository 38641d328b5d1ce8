"""Writes a Hugging Face folder: a Llama of seeded random weights and a byte-level BPE tokenizer, under 2 MB.

It needs transformers, safetensors and numpy but no torch, so that mlx-lm's environment has all of it. It says
English words in random order. Heads of 64 dimensions: vLLM's CPU kernels refuse smaller ones.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EMBEDDING, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 128, 2, 2, 256, 4096
WORDS = "the of and to a in is that for it as was with be by on not he this are or his from at which but have an had".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator([" " + " ".join(WORDS * 2)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=CONTEXT
    )
    fast.chat_template = CHATML
    return fast


def write(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    words = tokenizer()
    words.save_pretrained(str(folder))
    size = len(words)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": EMBEDDING,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "head_dim": EMBEDDING // HEADS, "intermediate_size": FEED_FORWARD, "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    random = np.random.default_rng(0)

    def matrix(rows, columns, scale=0.3):
        return (random.standard_normal((rows, columns)) * scale).astype(np.float32)

    said = [number for number in range(size) if words.decode([number]).strip() in WORDS]
    head = matrix(size, EMBEDDING)
    head[[number for number in range(size) if number not in set(said)]] = 0
    tensors = {"model.embed_tokens.weight": matrix(size, EMBEDDING), "lm_head.weight": head}
    tensors["model.norm.weight"] = np.ones(EMBEDDING, dtype=np.float32)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = np.ones(EMBEDDING, dtype=np.float32)
        for name in ("q", "k", "v", "o"):
            tensors[f"{block}self_attn.{name}_proj.weight"] = matrix(EMBEDDING, EMBEDDING)
        tensors[f"{block}mlp.gate_proj.weight"] = matrix(FEED_FORWARD, EMBEDDING)
        tensors[f"{block}mlp.up_proj.weight"] = matrix(FEED_FORWARD, EMBEDDING)
        tensors[f"{block}mlp.down_proj.weight"] = matrix(EMBEDDING, FEED_FORWARD)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    write(sys.argv[1])
