"""Quantised backbones: which tensors are packed, and the bitsandbytes config that leaves task heads alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .families import HEAD_NAMES

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def quantization_config(bits: int = 8, extra_skip: tuple[str, ...] = (), **kwargs: Any) -> BitsAndBytesConfig:
    """A `BitsAndBytesConfig` for a backbone that gets a fusion adapter and a trainable head.

    transformers would quantise a head that has a bias, and a quantised head cannot be trained.

    Args:
        bits: 8 (LLM.int8) or 4 (NF4 with double quantisation, products in bfloat16).
        extra_skip: Names of further modules to leave in floating point.
        **kwargs: Further fields of `BitsAndBytesConfig`; they win over these defaults.

    Raises:
        ValueError: If `bits` is neither 8 nor 4.
    """
    from transformers import BitsAndBytesConfig

    skip = [*HEAD_NAMES, *extra_skip]
    if bits == 8:
        return BitsAndBytesConfig(**{"load_in_8bit": True, "llm_int8_skip_modules": skip, **kwargs})
    if bits == 4:
        defaults = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "llm_int8_skip_modules": skip,
        }
        return BitsAndBytesConfig(**{**defaults, **kwargs})
    raise ValueError(f"bits={bits}: bitsandbytes quantises to 8 or 4 bits. Use one of these.")


def is_quantised(tensor: Tensor, layer: nn.Module | None = None) -> bool:
    """Whether a tensor holds packed or scaled values, which mean nothing without the scales beside them.

    The dtype alone does not tell: 4-bit values can lie in bfloat16 or float32 (`bnb_4bit_quant_storage`, HQQ's
    `view_as_float`).

    Args:
        tensor: A parameter or buffer.
        layer: The module that holds it. It tells where the tensor has lost its class, as a shard has.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    if type(tensor).__module__.partition(".")[0] != "torch" or getattr(tensor, "quant_state", None) is not None:
        return True  # a class of a quantisation library's own
    if layer is None:
        return False
    weight, state = layer._parameters.get("weight"), getattr(layer, "quant_state", None)
    return (state is not None and tensor is weight) or tensor is layer._parameters.get("W_q")


def is_readable(tensor: Tensor, layer: nn.Module | None = None) -> bool:
    """Whether a tensor's values are weights that this process can read: neither packed nor spread over processes."""
    return type(tensor) in (Tensor, nn.Parameter) and not is_quantised(tensor, layer)


def quantised_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module that are quantised, by name."""
    for prefix, layer in module.named_modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and is_quantised(parameter, layer):
                yield f"{prefix}.{name}" if prefix else name, parameter


def keep_unpacked(modules: Iterable[nn.Module]) -> None:
    """Makes 4-bit layers on the CPU pass gradients, now and after every evaluation.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) packs NF4 weights for inference in the first evaluation without
    gradients, and goes on with that kernel in training, where it raises ("a view of a leaf Variable") or, for layers
    without bias, silently passes no gradient on. Packing also rounds the scales to bfloat16, so weights would drift with
    every evaluation. Layers given here are unpacked, and are not packed again.
    """
    for module in modules:
        if "support_avx512bf16_for_cpu" not in module.__dict__:
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # unpacks the weight
            if not state.nested:  # bitsandbytes leaves these scales as they were packed: transposed, 16-bit
                state.absmax = state.absmax.T.reshape(-1).float()


def only_infers(model: nn.Module) -> bool:
    """Whether a model is quantised in a format of which transformers says that it cannot be trained through (packed GGUF, fp8, HIGGS)."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and not quantizer.is_trainable
