"""All that is known of model families: names in their configurations and classes, and how their blocks are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

# Configurations

HIDDEN_SIZE_NAMES = ("hidden_size", "d_model", "n_embd", "dim")
WIDTHS_OF_STAGES = ("hidden_sizes", "embed_dims", "neck_hidden_sizes", "embed_dim")
STREAMS = ("hc_mult", "altup_num_inputs")  # the number of states that run beside one another (DeepSeek-V4, Gemma 3n)
STACKS = ("encoder", "decoder")
# How configurations of encoder-decoders name the depth of each stack, the first that is there.
DEPTH_NAMES = {
    "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers"),
}
# How configurations name numbers of blocks. Their lists of one value a block have one of these words in their names.
COUNTS_OF_BLOCKS = frozenset(
    {
        *(name for names in DEPTH_NAMES.values() for name in names),
        "encoder_layers",
        "n_layer",
        "n_layers",
        "num_encoder_layers",
    }
)
LISTS_OF_BLOCKS = ("layer", "block", "attn_type", "attention_type", "attention_window")
# Numbers of blocks that share states with others, or of parts of one table for all blocks: of fewer blocks, the rest would be others.
ACROSS_BLOCKS = ("num_kv_shared_layers", "hidden_size_per_layer_input")
SCALED_BY_DEPTH = ("esmc",)  # types of models that compute with the number of their blocks
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # the number of experts in a mixture
BOTH_WAYS = ("xlnet",)  # of the families that transformers knows for causal language modelling alone

_MAPS = "its states are maps of an image, (B, height, width, d) or (B, d, height, width)"
# Types of models whose blocks give something else than one state (B, T, d), and what.
UNLIKE = {
    "squeezebert": "its states are (B, d, T), and it calls its blocks past their hooks",
    **dict.fromkeys(("sam_vision_model", "sam_hq_vision_model", "sam3_vit_model", "vitdet"), _MAPS),
}
POSITIONS_FIRST = ("xlnet", "fsmt")  # their states are (T, B, d)

# Classes

CAUSAL_LM_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
# Classes all of whose weights come from pre-training: those without a head, those that predict tokens, those of pre-training itself.
PRETRAINED_CLASSES = CAUSAL_LM_CLASSES.union(
    *(
        [name for value in names.values() for name in ((value,) if isinstance(value, str) else value)]
        for names in (
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            MODEL_FOR_PRETRAINING_MAPPING_NAMES,
            MODEL_MAPPING_NAMES,
        )
    )
)

# Modules

# Output layers of head classes. In a quantisation config they replace transformers' own list, so lm_head must be among them.
HEAD_NAMES = (
    *("classifier", "score", "qa_outputs", "lm_head"),
    *("pre_classifier", "pooler", "projector", "classification_head", "head"),  # DistilBERT, BERT, speech, BART, ModernBERT
    *("cls", "predictions", "generator_predictions", "generator_lm_head", "vocab_transform", "vocab_projector"),  # masked LM
    *("embed_out", "proj_out"),  # GPT-NeoX, Whisper
)
TRAINING_ONLY = ("masked_spec_embed", "mask_token")  # parameters that stand for masked input, in training
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")  # tables of absolute positions
# What encoders register after their blocks and give to each of them: relative positions of DeBERTa and MPNet; DeBERTa-v2's norm
# of these, and the convolution beside its first block.
FEED_BLOCKS = ("rel_embeddings", "relative_attention_bias", "LayerNorm", "conv")

# The parts of a pre-norm block, in the order in which they run, and what families call them.
PARTS = ("attention_norm", "attention", "feed_forward_norm", "feed_forward")
NAMES_OF_PARTS = (
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),  # Llama, Mistral, Qwen, StableLM
    ("ln_1", "attn", "ln_2", "mlp"),  # GPT-2, GPT-BigCode
    ("input_layernorm", "attention", "post_attention_layernorm", "mlp"),  # GPT-NeoX
)

# Arguments of a call

STATE = "hidden_states"  # of a block
# Of attention, also as GPT-NeoX, GPT-J, Falcon and others name it, and of state spaces.
CACHES = ("past_key_values", "layer_past", "cache_params")
ENCODED = "encoder_hidden_states"  # of a decoder beside an encoder


def text_config(model: nn.Module) -> Any:
    """The configuration of a model, of one for several media that of its text part; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def blocks_in_order(config: Any, blocks: Sequence[nn.Module]) -> list[nn.Module] | None:
    """The blocks as they run, one for each hidden layer of the configuration; None if the list does not fit it.

    ALBERT has few groups of weights, each of which runs many times.
    """
    depth, groups = getattr(config, "num_hidden_layers", None), getattr(config, "num_hidden_groups", None)
    if len(blocks) == depth:
        return list(blocks)
    if groups and depth and len(blocks) == groups:
        return [blocks[int(i / (depth / groups))] for i in range(depth)]
    return None


def is_per_block(name: str, value: Any, blocks: int) -> bool:
    """Whether a value of a configuration is a list with a member for each of so many blocks (`layer_types`)."""
    return isinstance(value, (list, tuple)) and len(value) == blocks and any(word in name for word in LISTS_OF_BLOCKS)


def is_causal(root: nn.Module, last_block: nn.Module, model_type: str | None, stack: str | None) -> bool:
    """Whether a position sees only those before it.

    Attention modules that say so are believed (`is_causal`). Without a word of theirs the family decides: one for causal
    language modelling alone (BLOOM, MPT), or, where it has both (BERT), its configuration. State-space models are causal.
    """
    if stack is not None:
        return stack == "decoder"
    modules = list(last_block.modules())
    flags = [m.is_causal for m in modules if isinstance(getattr(m, "is_causal", None), bool)]
    if flags:
        return any(flags)
    if not any("attention" in type(m).__name__.lower() for m in modules):
        return True
    if bool(getattr(getattr(root, "config", None), "is_decoder", False)):
        return True
    both_ways = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or model_type in BOTH_WAYS
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both_ways


def layer_drop(root: nn.Module) -> float:
    """The probability of skipping a whole block in training (OPT, BART, Whisper, wav2vec 2.0)."""
    rates = [getattr(m, "layerdrop", 0.0) for m in root.modules()]
    rates += [getattr(getattr(root, "config", None), "layerdrop", 0.0)]
    return max((float(r) for r in rates if isinstance(r, (int, float))), default=0.0)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model is one for causal language modelling, or of a class derived from one."""
    return any(c.__name__ in CAUSAL_LM_CLASSES for c in type(model).__mro__)


def has_new_head(model: nn.Module) -> bool:
    """Whether a model's class has a head that pre-training does not know."""
    return not any(c.__name__ in PRETRAINED_CLASSES for c in type(model).__mro__)


def reads_last_token(model: nn.Module) -> bool:
    """Whether a causal model is one of transformers' whose head reads the last token that is no padding, and no other.

    Not those of families that also come bidirectional (BERT as a decoder): their heads read the first.
    """
    kind, family = type(model), getattr(text_config(model), "model_type", None)
    own = kind.__module__.startswith("transformers.") and kind.__name__.endswith("ForSequenceClassification")
    return own and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES and family not in BOTH_WAYS


def share_of_experts(model: nn.Module) -> float:
    """The part of the experts' weights that a token meets; 1 for a model without experts."""
    config = text_config(model)
    experts = next((getattr(config, n) for n in EXPERTS if getattr(config, n, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if chosen and experts else 1.0


def input_embeddings(root: nn.Module) -> Any:
    """The module of the word embeddings; None for models of images and sound, and classes without such a method."""
    try:
        return root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def output_embeddings(model: nn.Module) -> Any:
    """The module that predicts tokens; None if there is none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or the like."""
    return "norm" in type(module).__name__.lower()


def parts_of(block: nn.Module) -> dict[str, nn.Module] | None:
    """The parts of a block, by their names in `PARTS`; None if it has others with weights, or some under other names."""
    children = {name for name, child in block.named_children() if any(True for _ in child.parameters())}
    fitting = next((names for names in NAMES_OF_PARTS if children == set(names)), None)
    return None if fitting is None else {part: getattr(block, name) for part, name in zip(PARTS, fitting, strict=True)}


def positions_of(name: str, module: nn.Module) -> int | None:
    """For how many positions a module of that name has an embedding; None if it is no table of absolute positions."""
    kind = name.rpartition(".")[2]
    if kind not in POSITION_TABLES or not isinstance(module, nn.Embedding):
        return None
    # RoBERTa and its like begin to count after the padding, OPT and BART after two
    counted = kind == "position_embeddings" and module.padding_idx is not None
    first: int = getattr(module, "offset", module.padding_idx + 1 if counted else 0)  # type: ignore[operator,assignment]
    return module.num_embeddings - first


def state_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a block's arguments, `(B, T, d)`."""
    return args[0] if args else kwargs[STATE]


def with_state_in(args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another hidden state."""
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, STATE: state})


def state_out(output: Any) -> Tensor:
    """The hidden state in a block's output, `(B, T, d)`: most answer with it alone, others put it first."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_state_out(output: Any, state: Any) -> Any:
    """A block's output with another hidden state, in the form in which the block answers: the first GPT's with lists."""
    if isinstance(output, list):
        return [state, *output[1:]]
    return (state, *output[1:]) if isinstance(output, tuple) else state


def beside_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments without the hidden state and without the KV cache, which belongs to the backbone's own blocks."""
    return (
        tuple(None if hasattr(a, "get_seq_length") else a for a in args[1:]),
        {k: v for k, v in kwargs.items() if k not in (STATE, *CACHES)},
    )


def cached_positions(named: dict[str, Any]) -> int:
    """How many positions the caches among a backbone's arguments hold; 1 for a state-space model's that has seen some."""
    return max(positions_in(named.get(name)) for name in CACHES)


def positions_in(cache: Any) -> int:
    """How many positions a cache holds, see `cached_positions`; 0 for what is none, and for one that does not tell."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None:
        return int(cache.get_seq_length() or 0)
    # each layer: under fusion_depth the first with attention may lie above the blocks that have written
    lengths = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
    states = [any(layer.has_previous_state.values()) for layer in layers if hasattr(layer, "has_previous_state")]
    return max([*lengths, *map(int, states)], default=0)
