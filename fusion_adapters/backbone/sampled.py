"""Signatures of 0.1.0, which sampled few weights: what it wrote is compared in its own way."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable

from torch import Tensor, nn

from .base_tensors import base_tensors
from .blocks import Backbone
from .families import input_embeddings, is_norm
from .quantization import is_quantised, quantised_parameters

# Token ids whose embeddings are sampled: small, so that a vocabulary resized for new tokens keeps its fingerprint.
FINGERPRINT_ROWS = (3, 11, 101, 307)
FINGERPRINT_VALUES, SIGNATURE_VALUES = 8, 64  # sampled per tensor


def sampled_fingerprint(backbone: Backbone) -> str | None:
    """The fingerprint of 0.1.0: rows of the input embeddings, or weights of the first convolution, and the norms of two blocks.

    Returns:
        The values as hexadecimal float32; None if the weights are not in memory (meta device).
    """
    kept = {id(t.tensor): t for t in base_tensors(backbone)}

    def value(tensor: Tensor) -> Tensor | None:
        known = kept.get(id(tensor))
        return (None if tensor.is_meta else tensor) if known is None else known.value()

    tensors = [*_embedding_rows(backbone, value), *(value(t) for t in _norms(backbone.blocks))]
    there = [t for t in tensors if t is not None and t.numel() > 0]
    if not there or any(t is None for t in tensors):
        return None
    sampled = [v for t in there for v in _sample(t, FINGERPRINT_VALUES).tolist()]
    values = [v if math.isfinite(v) else 0.0 for v in sampled]
    return struct.pack(f"<{len(values)}f", *values).hex()


def sampled_signature(backbone: Backbone) -> str:
    """A hash of values sampled from every tensor that runs before or in the blocks; comparisons keep it in their folder."""
    digest = hashlib.sha256()
    for module in backbone.upstream[: len(backbone.upstream) - len(backbone.beside)]:
        packed = {id(p) for _, p in quantised_parameters(module)}
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and not tensor.is_meta and id(tensor) not in packed:
                digest.update(f"{tuple(tensor.shape)}".encode())
                digest.update(_sample(tensor, SIGNATURE_VALUES).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(tensor: Tensor, count: int) -> Tensor:
    """At most `count` values of a tensor at equal distances, float32 on the CPU."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // count)][:count].float().cpu()


def _embedding_rows(backbone: Backbone, value: Callable[[Tensor], Tensor | None]) -> list[Tensor | None]:
    weight = _embedding_weight(backbone)
    if weight is None:
        convolution = next((m for m in backbone.base.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))), None)
        return [] if convolution is None else [value(convolution.weight)]
    there = value(weight)
    return [None] if there is None else [there[row] for row in FINGERPRINT_ROWS if row < there.shape[0]]


def _embedding_weight(backbone: Backbone) -> Tensor | None:
    """The word embeddings; None for models of images and sound."""
    embedding = input_embeddings(backbone.root)
    embedding = getattr(embedding, "original_module", embedding)
    weight = getattr(getattr(embedding, "base_layer", embedding), "weight", None)
    fits = isinstance(weight, Tensor) and weight.dim() == 2 and not is_quantised(weight)
    return weight if fits else None


def _norms(blocks: list[nn.Module]) -> list[Tensor]:
    found: list[Tensor] = []
    for block in (blocks[0], blocks[-1]):
        weights = [
            p
            for module in block.modules()
            if is_norm(module)
            for n, p in module.named_parameters(recurse=False)
            if n in ("weight", "bias") and p.dim() == 1
        ]
        found += weights[:2]
    return found
