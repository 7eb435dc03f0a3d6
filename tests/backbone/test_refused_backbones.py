"""Backbones to which no fusion attaches: each is refused at attaching, with its reason."""

import pytest
import torch
import transformers
from families import FAMILIES
from peft import get_peft_model
from support import attached, logits, tiny

from fusion_adapters import FusionConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
EMB = {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "n_words": 50}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4}
REFUSED = {
    "SqueezeBert": ({**SMALL, "embedding_size": 32, "vocab_size": 50}, {}, "its states are .B, d, T."),
    "XLM": (EMB, {}, r"parts in several lists \(attentions, layer_norm1, ffns, layer_norm2\)"),
    "Flaubert": (EMB, {"fusion_blocks": "attentions"}, "no module is a whole one"),
    "Segformer": (STAGES, {}, r"stages differ in width \(8, 16, 16, 16\)"),
    "Swin": (SWIN, {}, r"no norm of block 1 of 2 \(SwinStage\) has the width 16"),
    "VitDet": ({**SMALL, "image_size": 32, "patch_size": 8}, {}, "its states are maps of an image"),
    "SamVision": ({**SMALL, "image_size": 32, "patch_size": 8}, {}, "its states are maps of an image"),
    "DeepseekV4": ({}, {}, r"between its blocks run 4 streams, \(B, T, 4, d\)"),
    "HYV4": ({}, {}, "between its blocks run 4 streams"),
    "Gemma3nText": ({}, {}, "between its blocks run 4 streams"),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_it_is_refused_with_its_reason(family):
    settings, fields, reason = REFUSED[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(ValueError, match=reason) as caught:
        get_peft_model(model, FusionConfig(**fields))
    assert "No fusion attaches to" in str(caught.value) and "\n" not in str(caught.value)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_blocks_with_norm_in_the_name_of_their_class_are_blocks():
    config = transformers.RobertaPreLayerNormConfig(**SMALL, vocab_size=50)
    get_peft_model(transformers.RobertaPreLayerNormModel(config), FusionConfig())


def test_a_state_of_another_shape_is_told_in_the_call():
    model = attached("bert")
    model.base_model.model.bert.encoder.layer[1].register_forward_hook(lambda m, a, out: out[..., None], prepend=True)
    with pytest.raises(ValueError, match=r"a state of shape \[2, 9, 32, 1\], and a fusion needs \(batch, positions, 32\)"):
        logits(model)


def test_a_stack_that_runs_twice_in_a_call_is_told():
    model = tiny("bert")
    encoder = model.bert.encoder
    once = encoder.forward
    encoder.forward = lambda states, *args, **kwargs: once(once(states, *args, **kwargs)[0], *args, **kwargs)
    with pytest.raises(RuntimeError, match="ran blocks 8 times in one call, and has 4"):
        logits(attached(model=model))


def test_positions_first_is_no_place_for_a_fusion_over_positions():
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=3, n_head=4, d_inner=64)
    with pytest.raises(ValueError, match=r"'deeper' attends over positions.*'xlnet'"):
        get_peft_model(transformers.XLNetModel(config), FusionConfig(fusion="deeper"))
    with pytest.raises(ValueError, match=r"'mean' takes means over positions.*'xlnet'"):
        get_peft_model(transformers.XLNetModel(config), FusionConfig(fusion_pool="mean"))
    get_peft_model(transformers.XLNetModel(config), FusionConfig())


def test_a_config_that_trains_nothing_says_so(recwarn):
    with pytest.warns(UserWarning, match="Nothing trains: fusion='last' has no parameters here"):
        get_peft_model(FAMILIES["llama"].build("causal"), FusionConfig(fusion="last", task_type="CAUSAL_LM"))
    recwarn.clear()
    attached("bert", "token", fusion="last")  # the head trains
    attached("llama", "lm", fusion="last", r=2, target_modules=["q_proj"])
    attached("llama", "lm", fusion="last", inference_mode=True)
    assert not [w for w in recwarn if "Nothing trains" in str(w.message)]
