"""LoRA's options mean in FusionConfig what they mean in LoraConfig, and a config is the caller's."""

import copy
import dataclasses
import json
import warnings

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from support import LORA, attached, tiny
from transformers import BertConfig, BertForTokenClassification, T5Config, T5ForConditionalGeneration

from fusion_adapters import FusionConfig
from fusion_adapters.tuner.counts import count_trainable

TASK = {"task_type": "TOKEN_CLS"}


def lora_shapes(model):
    return {n: p.shape for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}


@pytest.mark.parametrize(
    "options",
    [{"r": 32, "lora_alpha": 16}, {"r": 8}, {"lora_dropout": 0.1}, {"use_dora": True}, {"bias": "all"}],
    ids=str,
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_without_targets_takes_the_modules_of_peft(family, options):
    theirs = get_peft_model(tiny(family), LoraConfig(**TASK, **options))
    modules = ", ".join(sorted(theirs.peft_config["default"].target_modules))
    with pytest.warns(UserWarning, match=f"in peft's default modules for a '{family}': {modules}"):
        ours = get_peft_model(tiny(family), FusionConfig(**TASK, **options))
    assert lora_shapes(ours) == lora_shapes(theirs) != {}
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["pooler"]}, {"trainable_token_indices": [3]}, {"r": 32, "fusion_lora": False}],
    ids=str,
)
def test_without_an_option_of_lora_the_fusion_trains_alone(options):
    config = FusionConfig(**TASK, **options)
    assert not config.has_lora and not dataclasses.replace(config).has_lora
    if "modules_to_save" not in options:
        with warnings.catch_warnings(action="error", category=UserWarning):
            model = get_peft_model(tiny("bert"), config)
        assert not lora_shapes(model) and model.peft_config["default"].fusion_lora is False


def test_copies_and_files_keep_whether_there_is_lora(tmp_path):
    config = FusionConfig(**TASK, r=8)  # the default, but said
    config.save_pretrained(tmp_path)
    for same in (copy.deepcopy(config), dataclasses.replace(config), FusionConfig.from_pretrained(tmp_path)):
        assert same.has_lora
    FusionConfig(**TASK).save_pretrained(tmp_path)
    assert not FusionConfig.from_pretrained(tmp_path).has_lora
    later = FusionConfig(**TASK)
    later.r = 32
    assert later.has_lora


def test_a_saved_adapter_says_whether_it_has_lora(tmp_path):
    with pytest.warns(UserWarning, match="peft's default modules"):
        attached("bert", r=4).save_pretrained(tmp_path / "lora")
    attached("bert").save_pretrained(tmp_path / "alone")
    for name, lora in (("lora", True), ("alone", False)):
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert saved["fusion_lora"] is lora and bool(saved["target_modules"]) is lora
        with warnings.catch_warnings(action="error", category=UserWarning):
            model = PeftModel.from_pretrained(tiny("bert"), tmp_path / name, is_trainable=True)
        assert bool(lora_shapes(model)) is lora


def test_lora_is_refused_where_peft_knows_no_modules():
    model = tiny("bert")
    model.config.model_type = "unheard"
    with pytest.raises(ValueError, match=r"r=32.*without target_modules.*no default modules for a 'unheard'.*Name them"):
        get_peft_model(model, FusionConfig(**TASK, r=32))


def test_no_lora_and_modules_for_it_contradict_each_other():
    with pytest.raises(ValueError, match="fusion_lora=False asks for a fusion alone, but target_modules"):
        FusionConfig(fusion_lora=False, **LORA["bert"])


def bert(width, depth):
    shape = {"num_attention_heads": 4, "intermediate_size": 2 * width, "vocab_size": 120}
    return BertForTokenClassification(BertConfig(hidden_size=width, num_hidden_layers=depth, **shape))


@pytest.mark.parametrize(
    "fields", [{"fusion_budget": "20k"}, {"fusion": "last", "r": 4, "fusion_budget": "lora:r=2"}], ids=str
)
def test_one_config_serves_several_backbones(fields):
    one = FusionConfig(**TASK, **fields)
    before = {k: v for k, v in one.to_dict().items() if k != "modules_to_save"}  # to which peft adds the heads
    sizes = ((32, 4), (64, 8), (128, 12))
    reused = [count_trainable(get_peft_model(bert(*size), one)) for size in sizes]
    assert reused == [count_trainable(get_peft_model(bert(*size), FusionConfig(**TASK, **fields))) for size in sizes]
    assert {k: v for k, v in one.to_dict().items() if k != "modules_to_save"} == before


def test_a_config_goes_from_one_type_of_backbone_to_another():
    config = FusionConfig()
    get_peft_model(
        T5ForConditionalGeneration(T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)), config
    )
    assert get_peft_model(tiny("llama", "lm"), config).peft_config["default"].fusion_model_type == "llama"
