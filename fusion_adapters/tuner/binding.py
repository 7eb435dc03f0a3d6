"""Whether an adapter fits the model: the backbone that it was made for, names that peft would confuse, code compiled before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch._dynamo import OptimizedModule

from ..backbone.blocks import LAYER_NAME, Backbone
from ..backbone.decoders import gguf_file_of, settle_gguf
from ..backbone.fingerprint import WHOLE, fingerprints_differ
from ..backbone.walk import modules_of
from ..fusions import Fusion
from .config import FusionConfig

if TYPE_CHECKING:
    from .layer import FusionLayer


def bind(config: FusionConfig, backbones: list[Backbone], signatures: Mapping[str, str]) -> None:
    """Checks a saved config against the backbone; writes the backbone into a new one."""
    model_type = backbones[0].model_type
    widths = [b.hidden_size for b in backbones]
    depths = [b.whole.num_layers for b in backbones]
    if not config.bound:
        config.fusion_model_type = model_type
        config.fusion_hidden_size, config.fusion_num_layers = (
            (widths, depths) if len(backbones) > 1 else (widths[0], depths[0])
        )
        config.fusion_stack = "both" if len(backbones) > 1 else backbones[0].stack
        config.fusion_fingerprint = signatures.get(WHOLE)
        config.fusion_lora = config.has_lora
        file = gguf_file_of(backbones[0].base)
        config.fusion_gguf = None if file is None else str(file)
        config.settle_options(causal=all(b.causal for b in backbones))
        return
    made_for = (config.fusion_model_type, _as_list(config.fusion_hidden_size), _as_list(config.fusion_num_layers))
    # of the lower blocks alone, it fits a model that was cut to these, and one that was not
    counted = slice(2 if config.fusion_depth is not None else None)
    if made_for[counted] != (model_type, widths, depths)[counted]:
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
    difference = fingerprints_differ(
        config.fusion_fingerprint, signatures, replaced=config.modules_to_save or (), rows=_own_tokens(config)
    )
    if difference:
        gguf = f", from the GGUF file {config.fusion_gguf}, whose weights are rounded" if config.fusion_gguf else ""
        raise ValueError(
            f"The adapter was made for a backbone of the same shape but with {difference}. Load the checkpoint that the adapter was "
            f"trained on{f' ({config.base_model_name_or_path})' if config.base_model_name_or_path else ''}{gguf}; if that was changed "
            "before (a LoRA merged into it), the one that was saved after the change, under a name of its own. If the backbone is "
            'right and was changed on purpose, remove "fusion_fingerprint" from adapter_config.json.'
        )


def settle_file(model: nn.Module) -> None:
    """Drops the note on a dequantised model that it is packed (`settle_gguf`), and says so."""
    if settle_gguf(model):
        warnings.warn(
            f"The backbone was loaded from the GGUF file {gguf_file_of(model)} and its weights were unpacked: it is a dense model. The "
            "note that it is quantised, for which Trainer and save_pretrained refuse it, was dropped (hf_quantizer and "
            "config.quantization_config).",
            stacklevel=2,
        )


def _own_tokens(config: FusionConfig) -> list[int]:
    """The word embeddings that the adapter trains and saves."""
    indices = config.trainable_token_indices or ()
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [row for each in lists for row in each]


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


def check_layer_drop(layer: FusionLayer) -> None:
    """Raises ValueError if training would skip whole blocks at random, and with them layer states."""
    rate = layer.backbone.layer_drop
    if rate and layer.trains_states():
        raise ValueError(
            f"The backbone skips each block with probability {rate} in training (layerdrop), and a fusion needs the states of "
            "all of them. Load it with layerdrop=0.0 (from_pretrained(..., layerdrop=0.0); BART and Whisper name it "
            "encoder_layerdrop and decoder_layerdrop), or train the fusion alone, without LoRA."
        )


def warn_if_compiled(model: nn.Module) -> None:
    """Warns if the model was compiled already: code that torch compiled earlier does not see hooks that come later."""
    if isinstance(model, OptimizedModule) or any(m._compiled_call_impl is not None for m in modules_of(model)):
        warnings.warn(
            "The model was compiled before the adapter was attached. Code compiled earlier does not see the fusion's hooks, so "
            "answers may leave the fusion out. Attach first (get_peft_model), then compile (torch.compile); or call "
            "torch.compiler.reset() now.",
            stacklevel=2,
        )
