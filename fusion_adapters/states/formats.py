"""How layer states are stored: the formats, and those of 8 bits, which have a scale for each token and layer."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8": "F8_E4M3", "int8": "I8"}
# The largest number of each format with scales; a token's largest value becomes that.
LARGEST = {"float8": 448.0, "int8": 127.0}
SCALE_BYTES = torch.float32.itemsize


def has_scales(dtype: str) -> bool:
    """Whether a state is what is stored times a scale."""
    return dtype in LARGEST


def state_bytes(dtype: str, hidden_size: int) -> int:
    """The bytes of one state of one token."""
    return hidden_size * DTYPES[dtype].itemsize + (SCALE_BYTES if has_scales(dtype) else 0)


def narrowed(states: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """States `(tokens, d)` in a format with scales, and the scales `(tokens,)`, float32.

    `int8` keeps steps of one size, a 254th of a token's range; `float8` (E4M3) keeps four binary digits of each value, so that a
    few channels a thousand times as large as the others, as decoders have them, do not round those to nothing.
    """
    wide = states.float()
    scales = wide.abs().amax(-1).clamp_min(1e-12) / LARGEST[dtype]
    scaled = wide / scales[:, None]
    return (scaled.round() if dtype == "int8" else scaled).to(DTYPES[dtype]), scales


def widened(stored: Tensor, scales: Tensor) -> Tensor:
    """States `(tokens, layers, d)`, float32, from what `narrowed` made of them and the scales `(tokens, layers)`."""
    return stored.float() * scales.unsqueeze(-1)
