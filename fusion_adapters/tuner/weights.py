"""The tensors in an adapter's file, and whether they are those of the adapter in the model."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from .config import FusionConfig
from .digest import MODEL_PREFIX, check_options, holds_digest, no_digest, weights_differ
from .load import Load


def read_weights(source: tuple[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of the file in a folder or repository, on the CPU.

    Raises:
        ValueError: If the file is damaged.
    """
    folder, where = source
    try:
        return load_peft_weights(folder, device="cpu", **where)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:  # the others of a .bin file
        name = "adapter_model.safetensors" if isinstance(error, SafetensorError) else "adapter_model.bin"
        raise ValueError(
            f"The weights of the adapter in {folder!r} cannot be read: {name} is damaged or cut short "
            f"({' '.join(str(error).split())}). Copy or download the file again, or train the adapter anew."
        ) from error


def saved_config(config: FusionConfig, load: Load | None) -> tuple[FusionConfig | None, Load | None]:
    """The config that was saved with what is loaded, its options compared with its digest, and the load.

    Args:
        config: The config of the adapter that is being added.
        load: The load under way; None where a config that was read from a folder is attached as it is.

    Raises:
        ValueError: If an option is not the one that was saved.
    """
    if load is None and config.source is not None and config.bound:
        load = Load(*config.source)
    if load is None:
        return None, None
    read = config.source is not None  # from a file, whose digest says what it held even if it no longer names a backbone
    saved: FusionConfig | None = config if (config.bound or read) and not config.attached else None
    if saved is None and load.folder is not None:  # a config of one's own, or of another adapter in a model
        saved = FusionConfig.from_pretrained(load.folder, **load.where)
    if saved is not None:
        check_options(saved, load.source or config.source)
        if saved.bound:  # what a config of one's own leaves out is as the weights were saved with
            config.fusion_alpha = saved.alpha if config.fusion_alpha is None else config.fusion_alpha
            config.fusion_norm = config.fusion_norm or saved.fusion_norm or "none"
    return saved, load


def weights_of(load: Load) -> dict[str, Tensor]:
    """The tensors that a load brings in."""
    return load.tensors if load.tensors is not None else read_weights((load.folder or "", load.where))


def tensors_in_file(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter in a model, named as in its file but for peft's prefix.

    Args:
        model: A model with adapters, within peft's wrapping or without, or the tuner that adds them.
        adapter_name: The adapter.
    """
    with no_digest():
        found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    prefix = "model." if isinstance(model, BaseTuner) else MODEL_PREFIX
    return {k.removeprefix(prefix): v for k, v in found.items()}


def wrapped_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key in the file to key in the model, for what peft keeps in wrappers: heads and fusions."""
    return {
        f"{name}.{file_key}": f"{name}.{model_key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for file_key, model_key in module.adapter_state_dict_load_map(adapter_name).items()
    }


def check_weights(
    model: nn.Module, config: FusionConfig | None, load: Load, weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Compares the tensors of a load with the adapter in the model, and with what its config says of them.

    Args:
        model: The model without peft's wrapping.
        config: The config that was saved with the tensors; None if there is none.
        load: The load.
        weights: The tensors, named as in the file.
        expected: The adapter's tensors in the model, named as in its file but for the prefix.

    Raises:
        ValueError: If tensors are missing, surplus, of another shape or dtype, or not those that were saved; where no digest says what was
            saved, if they hold NaN or infinity.
    """
    names = {k: _mapped(k.removeprefix(MODEL_PREFIX), load.key_mapping) for k in weights}
    base = f"{getattr(model, 'base_model_prefix', '')}."
    if load.plain and base != "." and expected.keys().isdisjoint(names.values()):  # of a model with a head, or without one
        names = {k: name.removeprefix(base) if name.startswith(base) else base + name for k, name in names.items()}
    given = without_embeddings(model, {names[k]: v for k, v in weights.items()}, expected)
    # what transformers renames by itself is looked at when it has loaded
    if not (load.plain and get_model_conversion_mapping(model, add_legacy=False)):  # type: ignore[arg-type]
        compare_tensors(expected, given)
        load.compared = True
    own = {k: v for k, v in weights.items() if names[k] in given}
    if config is not None and holds_digest(config):
        check_digest(config, load.folder, own)
    else:
        check_finite(load.folder, own)


def as_held(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the dtypes of the parameters that they are loaded into; with `low_cpu_mem_usage` they take their place.

    Args:
        model: The model that is about to load them.
        tensors: By the names of its parameters.
    """
    held = {name: parameter.dtype for name, parameter in model.named_parameters() if name in tensors}
    return {name: t.to(held.get(name, t.dtype)) if t.is_floating_point() else t for name, t in tensors.items()}


def missing_after(model: nn.Module, adapter_name: str, told: Any) -> None:
    """Raises ValueError if transformers says that it has loaded less than the adapter, or more.

    Args:
        model: The model.
        adapter_name: The adapter.
        told: What `load_adapter` of transformers returns: `missing_keys`, `unexpected_keys`.
    """
    state = {k: v for k, v in model.state_dict().items() if f".{adapter_name}." in f"{k}."}
    found = {k: v for k, v in state.items() if k not in told.missing_keys}
    if get_model_conversion_mapping(model, add_legacy=False):  # type: ignore[arg-type]  # else they were compared before
        found |= without_embeddings(model, {k: torch.empty(0) for k in told.unexpected_keys}, state)
    compare_tensors(state, found)


def _mapped(name: str, key_mapping: Mapping[str, str] | None) -> str:
    for pattern, replacement in (key_mapping or {}).items():
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def without_embeddings(model: nn.Module, given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without those that peft adds of embeddings (`save_embedding_layers`) beside what was trained."""
    layers = []
    for getter in (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")):
        with contextlib.suppress(NotImplementedError, TypeError):  # sound has none, a class of one's own no such method
            layers.append(getter())  # type: ignore[misc]
    names = tuple(
        f"{n}.".removeprefix(MODEL_PREFIX) for n, m in model.named_modules() if any(m is layer for layer in layers)
    )
    return {k: v for k, v in given.items() if k in expected or not k.startswith(names or ("\0",))}


def check_digest(config: FusionConfig, folder: str | None, own: dict[str, Tensor]) -> None:
    """Raises ValueError if tensors are not those that a config was saved with.

    Args:
        config: The config that was saved with them.
        folder: Where they were read; None for tensors that were given.
        own: The adapter's tensors, without embeddings saved beside them.
    """
    if not weights_differ(config, own):
        return
    if folder is None:
        raise ValueError(
            "The tensors are not those that the config was saved with: their digest is not its fusion_digest. Take both from one "
            "save. If you changed the tensors on purpose, set fusion_digest=None in the config."
        )
    raise ValueError(
        f"The weights of the adapter in {folder!r} are not those that it was saved with: their digest is not the one in "
        "adapter_config.json. The file is damaged, or comes from another save than the config (a save that was interrupted leaves such "
        "a pair). Copy both again, or save the adapter anew. If you changed the weights on purpose, remove fusion_digest from "
        "adapter_config.json."
    )


def check_finite(folder: str | None, own: dict[str, Tensor]) -> None:
    """Raises ValueError if tensors hold NaN or infinity; for those whose config holds no digest of them."""
    broken = sorted(k for k, t in own.items() if t.is_floating_point() and not t.isfinite().all())
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(own)} tensors of the adapter{f' in {folder!r}' if folder else ''} hold NaN or infinity "
            f"({_some(broken)}), and every answer would. The file is damaged, or the training diverged (a loss of NaN). Copy the file "
            "again, or take an earlier checkpoint."
        )


def compare_tensors(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raises ValueError, with the names, if tensors are missing, surplus, of another shape, or hold no numbers of training."""
    found = tensor_differences(expected, given)
    if not found:
        return
    shapes = any(k in expected and given[k].shape != expected[k].shape for k in given)
    raise ValueError(
        f"The adapter's file does not fit its config and this model: {'; '.join(found)}. Nothing was loaded. Check that "
        "adapter_config.json and adapter_model.safetensors come from the same save, and that the model has the head "
        "(class and number of labels) that the adapter was trained with."
        + (" ignore_mismatched_sizes does not help here." if shapes else "")
    )


def tensor_differences(expected: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What is wrong with the tensors of a file, a clause a kind, with their names.

    Args:
        expected: Those of the adapter in a model, with or without values.
        given: Those of the file, under the same names.
    """
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    shapes = [
        f"{k} has {list(given[k].shape)} in the file, {list(expected[k].shape)} in the model"
        for k in sorted(expected.keys() & given.keys())
        if given[k].shape != expected[k].shape
    ]
    kinds = [
        f"{k} as {str(given[k].dtype).removeprefix('torch.')}"
        for k in sorted(expected.keys() & given.keys())
        if _trains(expected[k]) and not _trains(given[k])
    ]
    return [
        *([f"{len(missing)} of {len(expected)} tensors are missing ({_some(missing)})"] if missing else []),
        *([f"{len(surplus)} have no place in the model ({_some(surplus)})"] if surplus else []),
        *([f"{len(shapes)} have another shape ({_some(shapes)})"] if shapes else []),
        *(
            [f"{len(kinds)} hold whole numbers or eight bits where float32 or 16 bits belong ({_some(kinds)})"]
            if kinds
            else []
        ),
    ]


def _trains(tensor: Tensor) -> bool:
    """Whether a tensor has a dtype in which weights are trained and saved; those of eight bits are no casts: they need scales."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
