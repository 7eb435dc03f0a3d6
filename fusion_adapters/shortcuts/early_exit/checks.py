"""Which models and calls early exit refuses, and what to do then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from ...backbone.blocks import Backbone
from ...backbone.families import ACROSS_BLOCKS, is_causal_lm, text_config
from ...states import source_of
from ..maps import ShortcutSet
from ..saving import check_fits

_ALONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def check_exits(model: nn.Module, backbone: Backbone, shortcuts: ShortcutSet, layers: Sequence[int]) -> None:
    """Raises ValueError if a model's passes cannot end at these layers."""
    check_fits(shortcuts, backbone)
    if source_of(model).fusions:
        raise ValueError(
            "A fusion is attached to this model, which reads all layers and replaces the last one's state, so no pass can end before it. "
            "Exit early from the model without it (model.unload()), or choose a fusion_depth for the fusion, which skips the blocks above."
        )
    wrong = [layer for layer in layers if not 1 <= layer < backbone.num_layers]
    if wrong:
        raise ValueError(
            f"layers={list(layers)}: a backbone of {backbone.num_layers} blocks can be left after block 1 to "
            f"{backbone.num_layers - 1}, not at {wrong}."
        )


def check_writer(host: Any, backbone: Backbone) -> None:
    """Raises ValueError if a model writes no text, or keeps no keys and values by block."""
    config, name = text_config(host), type(host).__name__
    if not (hasattr(host, "generate") and host.can_generate() and backbone.causal):
        raise ValueError(
            f"{name} writes no text, token by token. Early exit in generate is for causal language models (AutoModelForCausalLM); for "
            "classifiers take EarlyExitClassifier."
        )
    shared = [field for field in ACROSS_BLOCKS if getattr(config, field, None)]
    try:
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_no_cache(name, f"its configuration describes none ({error})")) from error
    if shared:
        raise ValueError(_no_cache(name, f"blocks share parts with others ({', '.join(shared)})"))
    if not kinds.issubset(_LAYERS):
        raise ValueError(_no_cache(name, f"it keeps {', '.join(sorted(kind.__name__ for kind in kinds - {*_LAYERS}))}"))


def check_classifier(host: Any) -> None:
    """Raises ValueError if a model is no classifier of whole texts into one of several classes."""
    config, name = text_config(host), type(host).__name__
    if is_causal_lm(host):
        raise ValueError(f"{name} writes texts. Take EarlyExit, whose generate exits early.")
    labels, problem = getattr(config, "num_labels", 0), getattr(config, "problem_type", None)
    if labels < 2 or problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"{name} has {labels} output{'s' * (labels != 1)}{f' and problem_type={problem!r}' if problem else ''}: whether it is sure is "
            "told by the margin between the two likeliest of several classes, one of which holds. Choose a classifier of that kind."
        )


def _no_cache(name: str, why: str) -> str:
    return (
        f"{name} has no KV cache with keys and values of each block by themselves: {why}. Blocks that a token skips could not be made up "
        "for. Choose a decoder with attention in each block (Llama, Qwen, Gemma 2, Mistral, GPT-2, ...)."
    )


def check_given(given: Mapping[str, Any]) -> None:
    """Raises ValueError if what `generate` is given calls for another loop than early exit's."""
    found = [name for name in ("custom_generate", "assistant_model") if given.get(name) is not None]
    if given.get("cache_implementation") == "paged":
        found.append("cache_implementation")
    if found:
        raise ValueError(
            f"{found[0]} has texts written by a loop of its own, and so has early exit. Leave {found[0]} out, or write without early exit."
        )


def check_call(config: GenerationConfig, given: Mapping[str, Any]) -> None:
    """Raises ValueError unless a call of `generate` is one that early exit can follow.

    Args:
        config: Its settings.
        given: What else the loop gets, the cache among it.
    """
    mode = config.get_generation_mode()
    if mode not in _ALONE:
        raise ValueError(
            f"Early exit writes one token after the other, by greedy search or sampling, and this call asks for "
            f"{mode.value.replace('_', ' ')}. Leave out what asks for it (num_beams, prompt_lookup_num_tokens, assistants), or write "
            "without early exit."
        )
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={config.guidance_scale} runs the model on a second text beside each, which early exit does not follow. Leave "
            "it out, or write without early exit."
        )
    asked = [name for name in ("output_hidden_states", "output_attentions") if getattr(config, name, False)]
    if asked:
        raise ValueError(
            f"{asked[0]} asks for something of each block, and early exit leaves blocks out. Leave {asked[0]} out."
        )
    cache = given.get("past_key_values")
    if cache is None and not config.use_cache:
        raise ValueError(
            "Early exit writes with a KV cache, and use_cache is off, in this call or in the model's own settings. Set use_cache=True."
        )
    if type(cache) is not DynamicCache or cache.offloading or not {type(c) for c in cache.layers}.issubset(_LAYERS):
        raise ValueError(
            f"Early exit writes with a KV cache that grows (a DynamicCache), and this call has "
            f"{'none' if cache is None else f'a {type(cache).__name__}'}. Leave cache_implementation and past_key_values out; if the model "
            "keeps no such cache, choose another."
        )
