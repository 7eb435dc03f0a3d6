"""The part of a configuration that changes answers, and that no weight shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .blocks import Backbone
from .families import COUNTS_OF_BLOCKS, is_per_block

LONGEST = 60  # characters of a value that is kept as it is; longer ones (a list of layer types) are hashed
# Everything in a configuration counts except for these: what a checkpoint and its sizes are called, training, heads, output
# and speed. Token ids are none of them inside the backbone: a padding id that embeddings use stands in the module.
HARMLESS = frozenset(
    {
        *("architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype", "transformers_version"),
        *(
            "finetuning_task",
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "task_specific_params",
            "tokenizer_class",
        ),
        *("quantization_config", "return_dict", "torchscript", "use_bfloat16", "use_cache", "vocab_size", "pretraining_tp"),
        *("apply_spec_augment", "chunk_size_feed_forward", "gradient_checkpointing", "reference_compile", "use_kernels"),
        *("decoder_bias", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "pruned_heads"),
        *("attn_implementation", "experts_implementation", "suppress_tokens", "begin_suppress_tokens", "prefix"),
    }
)
HARMLESS_BEGINNINGS = (
    *("_", "classifier_", "ctc_", "init_", "initializer_", "mask_feature_", "mask_time_", "output_"),
    *("summary_", "tie_"),
)
HARMLESS_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_loss_coef", "_loss_weight", "loss_type")
HARMLESS_INSIDE = ("drop",)  # dropout, layerdrop, drop_path_rate: off in evaluation
LENGTH = "max_position_embeddings"  # of a table, whose shape shows it; some kinds of rotary positions compute with it
PLAIN_ROPE = json.dumps("default")


def settings(backbone: Backbone) -> dict[str, str]:
    """The values of a backbone's configuration that can change its layer states, as JSON, by dotted keys.

    Of the lower blocks alone (`Backbone.lower`), they are those of a model that was cut to these: without the numbers of blocks,
    and of lists with a value a block the part that runs.
    """
    config: Any = getattr(backbone.base, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    flat = _flat(values, "")
    if backbone.depth is not None:
        flat = _of_lower(flat, len(backbone.blocks) + len(backbone.above), backbone.depth)
    found = {key: _text(value) for key, value in flat}
    ropes = {value for key, value in found.items() if key.endswith("rope_type")}
    return {k: v for k, v in found.items() if k.rpartition(".")[2] != LENGTH or ropes - {PLAIN_ROPE}}


def settings_differ(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Key and both values of what differs; a key that one side does not have came with another version of transformers."""
    return [(key, first[key], second[key]) for key in first if key in second and first[key] != second[key]]


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if _is_harmless(str(key)):
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _of_lower(flat: Iterator[tuple[str, Any]], blocks: int, depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in flat:
        name = key.rpartition(".")[2]
        if name not in COUNTS_OF_BLOCKS:
            yield key, value[:depth] if is_per_block(name, value, blocks) else value


def _is_harmless(key: str) -> bool:
    return (
        key in HARMLESS
        or key.startswith(HARMLESS_BEGINNINGS)
        or key.endswith(HARMLESS_ENDINGS)
        or any(part in key for part in HARMLESS_INSIDE)
    )


def _text(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= LONGEST else f"{hashlib.sha256(text.encode()).hexdigest()[:12]} (hash)"
