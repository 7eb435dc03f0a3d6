"""What an adapter must fit before it is attached or loaded: its backbone, its name, its file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ..backbone.blocks import LAYER_NAME, Backbone
from ..backbone.fingerprint import fingerprints_differ
from ..fusions import Fusion
from .config import FusionConfig
from .layer import FusionLayer

MODEL_PREFIX = "base_model.model."
LARGE = 50_000_000  # parameters of a fusion that should be somebody's choice


def bind(config: FusionConfig, backbones: list[Backbone], signature: str | None) -> None:
    """Checks a saved config against the backbone; writes the backbone into a new one."""
    model_type = backbones[0].model_type
    widths = [b.hidden_size for b in backbones]
    depths = [b.num_layers for b in backbones]
    if not config.bound:
        config.fusion_model_type = model_type
        config.fusion_hidden_size, config.fusion_num_layers = (
            (widths, depths) if len(backbones) > 1 else (widths[0], depths[0])
        )
        config.fusion_stack = "both" if len(backbones) > 1 else backbones[0].stack
        config.fusion_fingerprint = signature
        config.settle_options()
        return
    made_for = (config.fusion_model_type, _as_list(config.fusion_hidden_size), _as_list(config.fusion_num_layers))
    if made_for != (model_type, widths, depths):
        raise ValueError(
            "The adapter was made for another backbone: a {!r} of hidden size {} with {} blocks; this one is a {!r} of "
            "hidden size {} with {} blocks. Load the backbone that the adapter was trained on{}.".format(
                config.fusion_model_type,
                config.fusion_hidden_size,
                config.fusion_num_layers,
                model_type,
                *((widths, depths) if len(backbones) > 1 else (widths[0], depths[0])),
                f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else "",
            )
        )
    difference = fingerprints_differ(config.fusion_fingerprint, signature)
    if difference:
        raise ValueError(
            f"The adapter was made for a backbone of the same shape but with other weights: {difference} by more than "
            "16-bit rounding. Load the checkpoint that the adapter was trained on"
            f"{f' ({config.base_model_name_or_path})' if config.base_model_name_or_path else ''}. If the backbone is right "
            'and was changed on purpose, remove "fusion_fingerprint" from adapter_config.json.'
        )


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list) else [value]


def check_adapter_name(name: str, fusion: Fusion) -> None:
    """Raises ValueError if peft, which takes the adapter's name out of a key, would take a part of the fusion's."""
    taken = {part for key in fusion.state_dict() for part in key.split(".")} | {"fusions", LAYER_NAME}
    if name in taken:
        raise ValueError(
            f"The adapter name {name!r} is also the name of a part of the fusion ({', '.join(sorted(taken))}), and peft "
            "would confuse the two in the saved file. Choose another name."
        )


def check_saved_names(names: Sequence[str] | None, fusions: Sequence[nn.Module]) -> None:
    """Raises ValueError if a name in `modules_to_save`, which peft looks for at the end of names, finds a part of a fusion."""
    for name in names or ():
        for fusion in fusions:
            part = next((n for n, _ in fusion.named_modules() if n.endswith(name)), None)
            if part is not None:
                raise ValueError(
                    f"modules_to_save={name!r} is also the end of the name of a part of the fusion ({part}), which peft would wrap "
                    "and save in its place. Write the module that is meant with the name of what holds it before its own, as in "
                    "'self.query'."
                )


def without_embeddings(model: nn.Module, given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without those that peft adds of embeddings (`save_embedding_layers`) beside what was trained."""
    layers = []
    for getter in (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")):
        with contextlib.suppress(NotImplementedError, TypeError):  # sound has none, a class of one's own no such method
            layers.append(getter())  # type: ignore[misc]
    names = tuple(f"{n}." for n, m in model.named_modules() if any(m is layer for layer in layers))
    return {k: v for k, v in given.items() if k in expected or not k.startswith(names or ("\0",))}


def warn_if_compiled(model: nn.Module) -> None:
    """Warns if the model was compiled already: code that torch compiled earlier does not see hooks that come later."""
    compiled = [n for n, m in model.named_modules() if m._compiled_call_impl is not None]
    if isinstance(model, OptimizedModule) or compiled:
        warnings.warn(
            "The model was compiled before the adapter was attached. Code compiled earlier does not see the fusion's hooks, so "
            "answers may leave the fusion out. Attach first (get_peft_model), then compile (torch.compile); or call "
            "torch.compiler.reset() now.",
            stacklevel=2,
        )


def check_layer_drop(layer: FusionLayer) -> None:
    """Raises ValueError if training would skip whole blocks at random, and with them layer states."""
    rate = layer.backbone.layer_drop
    if rate and layer.trains_states():
        raise ValueError(
            f"The backbone skips each block with probability {rate} in training (layerdrop), and a fusion needs the states of "
            "all of them. Load it with layerdrop=0.0 (from_pretrained(..., layerdrop=0.0); BART and Whisper name it "
            "encoder_layerdrop and decoder_layerdrop), or train the fusion alone, without LoRA."
        )


def has_own_width(config: FusionConfig) -> bool:
    """Whether the size of the fusion was chosen: by a budget, a width, or when the adapter was made."""
    names = ("fusion_budget", "fusion_bottleneck", "fusion_num_blocks", "fusion_feedforward", "fusion_copy_last")
    return config.bound or any(getattr(config, name) is not None for name in names)


def warn_if_large(config: FusionConfig, fusions: Sequence[nn.Module]) -> None:
    """Warns of a default width that makes much of a large backbone."""
    count = sum(p.numel() for fusion in fusions for p in fusion.parameters())
    if count > LARGE and not any(p.is_meta for fusion in fusions for p in fusion.parameters()):
        warnings.warn(
            f"fusion={config.fusion!r} at its default width trains {count:,} parameters on this backbone: {count / 2**28:.1f} GiB in "
            "float32, four times that with gradients and Adam. Set fusion_budget, for example '10M', or the width itself "
            "(fusion_bottleneck), which also says that it is meant.",
            stacklevel=2,
        )


def read_weights(config: FusionConfig) -> dict[str, Tensor] | None:
    """The tensors of the file that the config was loaded with, on the CPU; None for a new one, and one saved without an adapter."""
    if config.source is None or not config.bound:
        return None
    folder, where = config.source
    try:
        return load_peft_weights(folder, device="cpu", **where)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of the adapter in {folder!r} cannot be read: adapter_model.safetensors is damaged or cut short "
            f"({error}). Copy or download the file again, or train the adapter anew."
        ) from error


def wrapped_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key in the file to key in the model, for what peft keeps in wrappers: heads and fusions."""
    return {
        f"{name}.{file_key}": f"{name}.{model_key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for file_key, model_key in module.adapter_state_dict_load_map(adapter_name).items()
    }


def check_wrapped_tensors(model: nn.Module, adapter_name: str, weights: dict[str, Tensor]) -> None:
    """Raises ValueError if the file lacks tensors of a head or a fusion, which peft would look up with a bare KeyError.

    All tensors are compared when they are loaded, after peft has renamed those of older architectures.
    """
    state = model.state_dict()
    expected = {file_key: state[model_key] for file_key, model_key in wrapped_keys(model, adapter_name).items()}
    given = {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items()}
    compare_tensors(expected, {k: v for k, v in given.items() if k in expected})


def compare_tensors(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raises ValueError, with the names, if tensors are missing, surplus, or of another shape."""
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    shapes = [
        f"{k} has {list(given[k].shape)} in the file, {list(expected[k].shape)} in the model"
        for k in sorted(expected.keys() & given.keys())
        if given[k].shape != expected[k].shape
    ]
    if not (missing or surplus or shapes):
        return
    found = [
        *([f"{len(missing)} of {len(expected)} tensors are missing ({_some(missing)})"] if missing else []),
        *([f"{len(surplus)} have no place in the model ({_some(surplus)})"] if surplus else []),
        *([f"{len(shapes)} have another shape ({_some(shapes)})"] if shapes else []),
    ]
    raise ValueError(
        f"The adapter's file does not fit its config and this model: {'; '.join(found)}. Nothing was loaded. Check that "
        "adapter_config.json and adapter_model.safetensors come from the same save, and that the model has the head "
        "(class and number of labels) that the adapter was trained with."
        + (" ignore_mismatched_sizes does not help here." if shapes else "")
    )


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
