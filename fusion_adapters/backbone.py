"""Finds the blocks, width and depth of a transformers model. The only file that knows model families."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN_SIZE_NAMES = ("hidden_size", "d_model", "n_embd", "dim")
FINGERPRINT_VERSION = "v1"
# Token ids whose embeddings are sampled: small, so that a vocabulary resized for new tokens keeps its fingerprint.
FINGERPRINT_ROWS = (3, 11, 101, 307)
FINGERPRINT_VALUES = 8  # sampled per tensor
# A cast to bf16 moves a weight by up to 2^-9 of its size; twice that is allowed.
FINGERPRINT_TOLERANCE = 2.0**-8


@dataclass
class Backbone:
    """The frozen part of a transformers model, as the fusion needs to see it.

    Attributes:
        root: The backbone, a submodule of the model (or the model itself): what runs before the task head.
        blocks: Its transformer blocks, in order.
        blocks_name: Name of the list of blocks inside `root`.
        hidden_size: Width `d` of the layer states.
        model_type: The `model_type` of the transformers configuration.
        causal: Whether positions see only earlier ones.
    """

    root: nn.Module
    blocks: list[nn.Module]
    blocks_name: str
    hidden_size: int
    model_type: str
    causal: bool

    @property
    def num_layers(self) -> int:
        """The number of blocks `L`."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the last block computes; the fusion belongs there."""
        return next((t.device for t in self.blocks[-1].parameters()), torch.device("cpu"))


def find_backbone(model: nn.Module, blocks_name: str | None = None) -> Backbone:
    """Finds the backbone and its blocks.

    Without a name, the blocks are the one `ModuleList` of the backbone that has as many members as the configuration
    says there are hidden layers.

    Args:
        model: A transformers model, with or without a task head.
        blocks_name: Name of the list of blocks, as in `model.named_modules()`, for models where the search fails.

    Raises:
        ValueError: If no list of blocks, or more than one, is found; the message lists the candidates.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    root = getattr(model, "base_model", model)
    if blocks_name is not None:
        name, blocks = _named_blocks(model, root, blocks_name)
    else:
        name, blocks = _search_blocks(model, root, getattr(text_config, "num_hidden_layers", None))
    hidden_size = next((getattr(text_config, n) for n in HIDDEN_SIZE_NAMES if hasattr(text_config, n)), None)
    if hidden_size is None:
        raise ValueError(
            f"The hidden size of {type(model).__name__} is unknown: its configuration has none of "
            f"{', '.join(HIDDEN_SIZE_NAMES)}. Add config.hidden_size, the width of the blocks' outputs."
        )
    return Backbone(
        root=root,
        blocks=list(blocks),
        blocks_name=name,
        hidden_size=hidden_size,
        model_type=getattr(config, "model_type", None) or type(root).__name__,
        causal=_is_causal(root, blocks),
    )


def _candidates(root: nn.Module) -> dict[str, nn.ModuleList]:
    return {n: m for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}


def _named_blocks(model: nn.Module, root: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    for module in (model, root):
        found = dict(module.named_modules()).get(name)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            inner = next((n for n, m in root.named_modules() if m is found), None)
            if inner is not None:
                return inner, found
    raise ValueError(
        f"fusion_blocks={name!r} does not name a list of blocks of {type(model).__name__}. "
        f"{_describe(_candidates(root))} Set fusion_blocks to one of these."
    )


def _search_blocks(model: nn.Module, root: nn.Module, depth: int | None) -> tuple[str, nn.ModuleList]:
    candidates = _candidates(root)
    # the outermost list wins: a list inside a block can have as many members as there are blocks
    fitting = {
        n: m
        for n, m in candidates.items()
        if len(m) == depth and not any(n.startswith(f"{outer}.") for outer in candidates if outer != n)
    }
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    found = "None was found" if not fitting else f"{len(fitting)} were found"
    expected = "unknown to its configuration" if depth is None else f"{depth} by its configuration"
    raise ValueError(
        f"The blocks of {type(model).__name__} could not be told: one list of blocks is wanted, with as many members as "
        f"there are hidden layers ({expected}). {found}. {_describe(candidates)} Name the right one in the config, "
        "fusion_blocks='...'."
    )


def _describe(candidates: dict[str, nn.ModuleList]) -> str:
    if not candidates:
        return "The model holds no list of modules at all; is it a transformers model?"
    return "Its lists of modules are: " + ", ".join(f"{n!r} ({len(m)} members)" for n, m in candidates.items()) + "."


def _is_causal(root: nn.Module, blocks: nn.ModuleList) -> bool:
    """Decoders mark their attention modules with `is_causal`; encoders mark them false."""
    flags = [m.is_causal for m in blocks[-1].modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else bool(getattr(root.config, "is_decoder", False))


def fingerprint(backbone: Backbone) -> str | None:
    """A short signature of the backbone's weights, the same for every dtype and quantisation of one checkpoint.

    It samples values that quantisers leave alone: rows of the input embeddings, and the norms of the first and the last
    block. Compare two with `fingerprints_differ`.

    Returns:
        `"v1:"` and the values as hexadecimal float32; None if the weights are not in memory (meta device).
    """
    tensors = [t for t in (*_embedding_rows(backbone.root), *_norms(backbone.blocks)) if t.numel() > 0]
    if not tensors or any(t.is_meta for t in tensors):
        return None
    values = [v for t in tensors for v in _sample(t)]
    return f"{FINGERPRINT_VERSION}:{struct.pack(f'<{len(values)}f', *values).hex()}"


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
    far = sum(abs(a - b) > FINGERPRINT_TOLERANCE * max(abs(a), abs(b)) for a, b in zip(values, others, strict=True))
    return f"{far} of {len(values)} sampled weights differ" if far else None


def _parse(text: str) -> tuple[str, tuple[float, ...]]:
    version, _, data = text.partition(":")
    raw = bytes.fromhex(data)
    return version, struct.unpack(f"<{len(raw) // 4}f", raw)


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // FINGERPRINT_VALUES)
    values = flat[::step][:FINGERPRINT_VALUES].float().tolist()
    return [v if math.isfinite(v) else 0.0 for v in values]


def _embedding_rows(root: nn.Module) -> list[Tensor]:
    try:
        embedding = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    embedding = getattr(embedding, "original_module", embedding)
    weight = getattr(getattr(embedding, "base_layer", embedding), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return []
    return [weight[row] for row in FINGERPRINT_ROWS if row < weight.shape[0]]


def _norms(blocks: list[nn.Module]) -> list[Tensor]:
    found: list[Tensor] = []
    for block in (blocks[0], blocks[-1]):
        weights = [
            p
            for module in block.modules()
            if "norm" in type(module).__name__.lower()
            for n, p in module.named_parameters(recurse=False)
            if n in ("weight", "bias") and p.dim() == 1
        ]
        found += weights[:2]
    return found
