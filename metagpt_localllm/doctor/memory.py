"""What a model needs of memory: its weights, and the keys and values of its context. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Mapping, Optional

from metagpt_localllm.servers.base import Anatomy

__all__ = ["BITS_PER_WEIGHT", "Need", "need", "normalized", "parameters_in", "smaller"]

#: As measured for Llama 3.1 8B (llama.cpp, tools/quantize/README.md); Q4_0, Q5_0 and MXFP4 by their block's form.
BITS_PER_WEIGHT: Mapping[str, float] = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5008, "Q6_K": 6.5633, "Q5_K_M": 5.7036, "Q5_K_S": 5.5704,
    "Q5_0": 5.5, "Q4_K_M": 4.8944, "IQ4_NL": 4.6818, "Q4_K_S": 4.6672, "Q4_0": 4.5, "IQ4_XS": 4.4597, "Q3_K_L": 4.2979,
    "MXFP4": 4.25, "IQ3_M": 3.7628, "IQ3_S": 3.6606, "Q3_K_S": 3.6429, "IQ3_XS": 3.4977, "IQ3_XXS": 3.2548,
    "Q2_K": 3.1593, "Q2_K_S": 2.9697, "IQ2_M": 2.9294, "IQ2_S": 2.7403, "IQ2_XS": 2.5882, "IQ2_XXS": 2.3824,
    "IQ1_M": 2.146, "IQ1_S": 2.0042,
}  # fmt: skip
#: Of a model of which no more is known: Q4_K_M is what most people load.
_USUAL_BITS = BITS_PER_WEIGHT["Q4_K_M"]
#: Those that people publish, the largest first. Below them answers get visibly worse.
_COMMON = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_S", "IQ3_XXS")
#: Bytes of keys and values per token of context, for models of so many parameters: Llama 3.2 1B, Qwen 2.5 3B, Llama 3.1
#: 8B, Qwen 2.5 14B and 32B, Llama 3.1 70B, from the config.json of each, at 2 bytes a value.
_USUAL = {1.2e9: 32 << 10, 3.1e9: 36 << 10, 8.0e9: 128 << 10, 14.8e9: 192 << 10, 32.8e9: 256 << 10, 70.6e9: 320 << 10}
#: Bytes of one value, unless the server was told otherwise (llama.cpp's --cache-type-k, f16).
_VALUE = 2


@dataclass(frozen=True)
class Need:
    """What a model takes, in bytes.

    Attributes:
        weights: of the model.
        cache: keys and values of the whole context. Models with a sliding window take less.
        per_token: of these, for one token.
        how: where the numbers come from.
    """

    weights: int
    cache: int
    per_token: int
    how: str

    @property
    def total(self) -> int:
        return self.weights + self.cache


def need(anatomy: Anatomy, quantization: str, window: int, name: str = "") -> Optional[Need]:
    """What the model takes with a context of ``window`` tokens; None where not even its size is known.

    Args:
        quantization: as the server calls it; "" where it does not say.
        name: of the model; many have their number of parameters in it.
    """
    assumed: list[str] = []
    parameters: Optional[float] = anatomy.parameters
    kind = normalized(quantization)
    bits = BITS_PER_WEIGHT[kind] if kind is not None else _USUAL_BITS
    if parameters is None:
        parameters = parameters_in(name)
        if parameters is not None:
            assumed.append(f"{parameters / 1e9:.3g}B parameters, from the name")
    weights = anatomy.weights
    if weights is None:
        if parameters is None:
            return None
        weights = int(parameters * bits / 8)
        assumed.append(f"weights of {bits:.3g} bits each" + ("" if kind is not None else ", as Q4_K_M has"))
    per_token = _per_token(anatomy)
    if per_token is None:
        guess = parameters or weights * 8 / bits
        nearest = min(_USUAL, key=lambda size: abs(size - guess))
        per_token = _USUAL[nearest]
        assumed.append(f"{per_token >> 10} KiB per token of context, as usual for models of that size")
    if anatomy.slides:
        assumed.append("the context counted whole, although a part of the layers keeps less of it")
    how = f"assumed: {'; '.join(assumed)}" if assumed else "from the model's own numbers, at 2 bytes a value"
    return Need(weights, per_token * window, per_token, how)


def _per_token(anatomy: Anatomy) -> Optional[int]:
    if not (anatomy.layers and anatomy.kv_heads and anatomy.key_size):
        return None
    return anatomy.layers * anatomy.kv_heads * (anatomy.key_size + (anatomy.value_size or anatomy.key_size)) * _VALUE


def smaller(now: Need, quantization: str, room: float) -> Optional[tuple[str, int]]:
    """The largest usual quantization with which weights and context fit into ``room`` bytes, and the bytes of its weights.

    None where the present one is not known, or none fits.
    """
    kind = normalized(quantization)
    if kind is None:
        return None
    for name in _COMMON:
        part = BITS_PER_WEIGHT[name] / BITS_PER_WEIGHT[kind]
        if part < 1 and now.weights * part + now.cache <= room:
            return name, int(now.weights * part)
    return None


def normalized(quantization: str) -> Optional[str]:
    """Its name as in BITS_PER_WEIGHT, of "Q4_K - Medium" (llama.cpp) or "(guessed) Q8_0"; None where it has none."""
    text = quantization.upper().replace("(GUESSED)", "").replace("ALL ", "").replace("MOSTLY ", "").strip()
    size = {"SMALL": "_S", "MEDIUM": "_M", "LARGE": "_L"}
    found = re.match(r"((?:B?F|I?Q|MXFP)\d+(?:_[A-Z0-9]+)*)(?:\s*-\s*(SMALL|MEDIUM|LARGE))?", text)
    if found is None:
        return None
    name = found[1] + size.get(found[2] or "", "")
    name = {"Q2_K_M": "Q2_K", "Q3_K_M": "Q3_K_L"}.get(name, name)
    return name if name in BITS_PER_WEIGHT else None


def parameters_in(name: str) -> Optional[float]:
    """Parameters as names have them ("codebooga-34b", "qwen2.5:0.5b"); None where there are none, or experts ("8x7b")."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name.lower())
    return float(found[1]) * 1e9 if found else None
