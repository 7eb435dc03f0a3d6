"""What a saved adapter says of itself: a digest of its options and one of its weights, compared when it is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

MODEL_PREFIX = "base_model.model."  # of names in a file that peft wrote
OPTIONS = "options"  # the entry of the digest that is not of weights
CASTS = (torch.float32, torch.bfloat16, torch.float16)  # in which a file may be written anew
# Fields that change no answer, or are compared elsewhere.
ASIDE = frozenset(
    {
        *(
            "fusion_digest",
            "fusion_fingerprint",
            "fusion_gguf",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "peft_version",
        ),
        *("auto_mapping", "task_type", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
        *("runtime_config", "ephemeral_gpu_offload"),
    }
)
UNORDERED = ("target_modules", "target_parameters", "exclude_modules")

_ASIDE = threading.local()


@contextlib.contextmanager
def no_digest() -> Iterator[None]:
    """In the body, a state dict that is put together in this thread is none that is saved."""
    _ASIDE.on = True
    try:
        yield
    finally:
        _ASIDE.on = False


def is_wanted() -> bool:
    """Whether a state dict that is put together now may be saved."""
    return not getattr(_ASIDE, "on", False)


def weights_digests(tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Digests of tensors as they are, and as a cast of all of them to each of `CASTS` would be.

    None where the values are not at hand: on the meta device, or sharded over processes.
    """
    if any(t.is_meta or type(t) not in (Tensor, nn.Parameter) for t in tensors.values()):
        return None
    found = {"saved": _digest(tensors)}
    for dtype in CASTS:
        cast = any(t.is_floating_point() and t.dtype != dtype for t in tensors.values())
        found[str(dtype).removeprefix("torch.")] = _digest(tensors, dtype) if cast else found["saved"]
    return found


def options_digest(config: Any) -> str:
    """A digest of all options of a `FusionConfig` that differ from the defaults, but for those that change no answer."""
    values = config.to_dict()
    chosen = {}
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value, usual = (_plain(v, field.name in UNORDERED) for v in (values.get(field.name), default))
        counts = field.name not in ASIDE or (field.name == "task_type" and config.alpha != 1)  # whether a head is scaled
        if counts and value != usual:
            chosen[field.name] = value
    text = json.dumps(chosen, sort_keys=True, default=str)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _plain(value: Any, unordered: bool) -> Any:
    """A value as JSON holds it, in one order where the order does not count."""
    if value in (set(), (), [], {}):
        return None
    if isinstance(value, (set, frozenset)) or (unordered and isinstance(value, (list, tuple))):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def check_options(config: Any, source: tuple[str, Any] | None) -> None:
    """Compares the options of a config with those that were saved.

    Args:
        config: The config as it was read.
        source: The folder that it was read from, first; None for one that was not.

    Raises:
        ValueError: If they differ: an option was changed, or left out, which would then take its default.
    """
    if source is None:
        return
    if config.fusion_digest is None:
        if config.bound:
            warnings.warn(
                f"The adapter in {source[0]!r} holds no digest of its weights and options, as none did before version 0.2, so "
                "damage to them goes unnoticed. Save it again to add one.",
                stacklevel=2,
            )
        return
    if config.fusion_digest.get(OPTIONS) != options_digest(config):
        raise ValueError(
            f"The options in adapter_config.json of {source[0]!r} are not those that the adapter was saved with: one was changed, "
            "or is missing and would take its default, and the answers would be others. Restore the file. If you changed an option on "
            'purpose, remove "fusion_digest" from it.'
        )


def weights_differ(config: Any, weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors of a file are other than those that its config was saved with, a cast of all of them left aside."""
    known = {digest for name, digest in (config.fusion_digest or {}).items() if name != OPTIONS}
    if not known or _digest(weights) in known:
        return False
    wide = all(t.dtype == torch.float64 for t in weights.values())  # holds every value of the others
    return not (wide and _digest(weights, torch.float32) in known)


def holds_digest(config: Any) -> bool:
    """Whether a config says what the weights were that it was saved with."""
    return any(name != OPTIONS for name in config.fusion_digest or {})


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    digest = xxhash.xxh3_128()
    named = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in tensors.items()}
    for name in sorted(named):
        tensor = named[name].detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
