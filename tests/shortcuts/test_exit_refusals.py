"""What early exit refuses, and what it says then."""

import pytest
from families import FAMILIES
from support_exits import ALWAYS, WRITING, build, options, prompts, some_shortcuts
from transformers import GenerationConfig

from fusion_adapters.shortcuts import EarlyExit


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"use_cache": False}, "Set use_cache=True"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"cache_implementation": "paged"}, "Leave cache_implementation out"),
        ({"cache_implementation": "offloaded"}, "DynamicCache"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"custom_generate": lambda *_, **__: None}, "Leave custom_generate out"),
    ],
)
def test_calls_that_cannot_exit_early(given, says):
    model, batch = build("llama"), prompts("llama", rows=1)
    with pytest.raises(ValueError, match=says):
        EarlyExit(model, some_shortcuts(), options(ALWAYS)).generate(**batch, **{**WRITING, **given})
    assert not any("forward" in vars(m) for m in model.modules())


def test_an_assistant():
    model, batch = build("llama"), prompts("llama", rows=1)
    with pytest.raises(ValueError, match="Leave assistant_model out"):
        EarlyExit(model, some_shortcuts(), options(ALWAYS)).generate(**batch, assistant_model=build("llama", seed=1))


def test_settings_of_the_model_count_too():
    model, batch = build("llama"), prompts("llama", rows=1)
    model.generation_config = GenerationConfig(num_beams=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="num_beams"):
        EarlyExit(model, some_shortcuts(), options(ALWAYS)).generate(**batch)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: FAMILIES["mamba"].build("causal"), "LinearAttentionLayer.*Choose a decoder"),
        (lambda: FAMILIES["t5"].build("seq2seq"), "encoder-decoder"),
        (lambda: FAMILIES["bert"].build("masked"), "EarlyExitClassifier"),
        (lambda: FAMILIES["llama"].build("sequence"), "no head over a vocabulary"),
        (lambda: FAMILIES["llama"].build("causal", num_hidden_layers=5), "with 4 blocks"),
    ],
)
def test_models_that_cannot_exit_early(model, says):
    with pytest.raises(ValueError, match=says):
        EarlyExit(model(), some_shortcuts(), options(ALWAYS))


def test_a_fusion_reads_all_layers():
    from families import attach

    with pytest.raises(ValueError, match="fusion_depth"):
        EarlyExit(attach("llama", "causal"), some_shortcuts(), options(ALWAYS))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": [4]}, r"not at \[4\]"),
        ({"layers": [2, 1]}, "ascending"),
        ({"layers": [0, 1]}, "from 1"),
        ({"layers": []}, "from 1"),
        ({"threshold": float("nan")}, "calibrate"),
        ({"mean_length": 0.0}, "mean length above 0"),
        ({"kv": "never"}, "'later'"),
        ({"kind": "tuned"}, "no 'tuned' shortcut"),
        ({"short_list": [3]}, "at least two"),
        ({"short_list": [3, 500]}, "0 to 119"),
    ],
)
def test_options_that_cannot_be(given, says):
    with pytest.raises(ValueError, match=says):
        EarlyExit(build("llama"), some_shortcuts(), options(**{"threshold": 0.5, **given}))


def test_a_head_without_a_short_list():
    with pytest.raises(ValueError, match="Use the whole vocabulary"):
        EarlyExit(build("gemma2"), some_shortcuts(), options(0.5, short_list=[3, 4]))
