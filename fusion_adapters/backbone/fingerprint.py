"""Two signatures of a backbone's weights, by which adapters and caches know the backbone that they were made for.

An adapter outlives casts, quantisation and new tokens: its `fingerprint` samples what these leave alone, and is compared up to
rounding. Cached layer states do not: their `weights_signature` samples every tensor, and must be equal.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Container, Iterable, Sequence

from torch import Tensor, nn

from .blocks import Backbone
from .families import input_embeddings, is_norm

FINGERPRINT_VERSION = "v1"
# Token ids whose embeddings are sampled: small, so that a vocabulary resized for new tokens keeps its fingerprint.
FINGERPRINT_ROWS = (3, 11, 101, 307)
FINGERPRINT_VALUES, SIGNATURE_VALUES = 8, 64  # sampled per tensor
# A cast to bf16 moves a weight by up to 2^-9 of its size; twice that is allowed.
FINGERPRINT_TOLERANCE = 2.0**-8
SMALLEST_STEP = 2.0**-24  # between numbers of float16 near zero


def fingerprint(backbone: Backbone) -> str | None:
    """A short signature of the backbone's weights, the same for every dtype and quantisation of one checkpoint.

    It samples values that quantisers leave alone: rows of the input embeddings (of image and sound models: weights of
    the first convolution), and the norms of the first and the last block. Compare two with `fingerprints_differ`.

    Returns:
        `"v1:"` and the values as hexadecimal float32; None if the weights are not in memory (meta device).
    """
    tensors = [t for t in (*_embedding_rows(backbone), *_norms(backbone.blocks)) if t.numel() > 0]
    if not tensors or any(t.is_meta for t in tensors):
        return None
    sampled = [v for t in tensors for v in _sample(t, FINGERPRINT_VALUES).tolist()]
    values = [v if math.isfinite(v) else 0.0 for v in sampled]
    return f"{FINGERPRINT_VERSION}:{struct.pack(f'<{len(values)}f', *values).hex()}"


def join_fingerprints(parts: Sequence[str | None]) -> str | None:
    """The signature of several stacks, from theirs; None if one is unknown."""
    known = [part.partition(":")[2] for part in parts if part is not None]
    return f"{FINGERPRINT_VERSION}:{''.join(known)}" if len(known) == len(parts) else None


def fingerprints_differ(first: str | None, second: str | None) -> str | None:
    """Compares two fingerprints up to the rounding of 16-bit weights.

    Returns:
        None if they agree or one is unknown, else what differs, in words.
    """
    if first is None or second is None:
        return None
    (version, values), (other_version, others) = _parse(first), _parse(second)
    if version != other_version:
        return None
    if len(values) != len(others):
        return f"{len(values)} against {len(others)} sampled weights"
    pairs = list(zip(values, others, strict=True))
    far = sum(abs(a - b) > max(FINGERPRINT_TOLERANCE * max(abs(a), abs(b)), SMALLEST_STEP) for a, b in pairs)
    return f"{far} of {len(values)} sampled weights differ" if far else None


def weights_signature(backbone: Backbone, idle: Container[int] = (), scalings: Iterable[float] = ()) -> str:
    """A hash of values sampled from every tensor that runs before or in the blocks.

    Quantised weights are left out, because libraries move and pack them between calls; the tensors around them (norms,
    embeddings, biases) stand for the checkpoint.

    Args:
        backbone: The backbone.
        idle: The `id` of tensors that take no part in the layer states: those of adapters that are not active.
        scalings: The factors with which active adapters enter the blocks.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    for scaling in scalings:
        digest.update(struct.pack("<d", scaling))
    for module in backbone.upstream:
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_floating_point() or tensor.is_meta or id(tensor) in idle:
                continue
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor, SIGNATURE_VALUES).numpy().tobytes())
    return digest.hexdigest()[:16]


def _parse(text: str) -> tuple[str, tuple[float, ...]]:
    version, _, data = text.partition(":")
    raw = bytes.fromhex(data)
    return version, struct.unpack(f"<{len(raw) // 4}f", raw)


def _sample(tensor: Tensor, count: int) -> Tensor:
    """At most `count` values of a tensor at equal distances, float32 on the CPU."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // count)][:count].float().cpu()


def _embedding_rows(backbone: Backbone) -> list[Tensor]:
    weight = _embedding_weight(backbone)
    if weight is None:
        convolution = next((m for m in backbone.base.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))), None)
        return [] if convolution is None else [convolution.weight]
    return [weight[row] for row in FINGERPRINT_ROWS if row < weight.shape[0]]


def _embedding_weight(backbone: Backbone) -> Tensor | None:
    """The word embeddings; None for models of images and sound."""
    embedding = input_embeddings(backbone.root)
    embedding = getattr(embedding, "original_module", embedding)
    weight = getattr(getattr(embedding, "base_layer", embedding), "weight", None)
    fits = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
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
