"""Bad configs, wrong backbones and damaged files: one paragraph each, and a model that is as it was."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import LORA, TASKS, attached, disturb, logits, tiny
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from fusion_adapters import FusionConfig


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of the tiny BERT, with LoRA."""
    disturb(attached("bert", **LORA["bert"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def state(model):
    names = [n for n, _ in model.named_modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    return names, hooks, trained


def refuses(model, folder, match):
    before, answer = state(model), logits(model)
    with pytest.raises(ValueError, match=match) as caught:
        PeftModel.from_pretrained(model, folder)
    assert "\n" not in str(caught.value)
    assert state(model) == before
    assert torch.equal(logits(model), answer)


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_wrong_type(adapter):
    refuses(tiny("llama"), adapter, r"a 'bert' of hidden size 32 with 4 blocks; this one is a 'llama'")


def test_wrong_width(adapter):
    refuses(tiny("bert", width=64), adapter, "this one is a 'bert' of hidden size 64 with 4 blocks")


def test_wrong_depth(adapter):
    refuses(tiny("bert", depth=3), adapter, "this one is a 'bert' of hidden size 32 with 3 blocks")


def test_same_shape_other_weights(adapter):
    refuses(tiny("bert", seed=5), adapter, r"other weights: \d+ of 69 tensors .* differ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_16_bits_are_the_same_backbone(adapter, dtype):
    PeftModel.from_pretrained(tiny("bert", dtype=dtype), adapter)


def test_weights_near_zero_in_16_bits_are_the_same_backbone(tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.LayerNorm.bias.fill_(3.03e-6)  # float16 has 2.98e-6
    half = copy.deepcopy(model).half()
    attached(model=model).save_pretrained(tmp_path)
    PeftModel.from_pretrained(half, tmp_path)


def test_a_config_saved_alone_starts_a_new_adapter(tmp_path):
    FusionConfig(fusion="concat", fusion_bottleneck=8, task_type="TOKEN_CLS").save_pretrained(tmp_path)
    model = get_peft_model(tiny("bert"), FusionConfig.from_pretrained(tmp_path))
    assert model.active_peft_config.fusion_bottleneck == 8


def test_the_same_weights_with_more_tokens_are_the_same_backbone(adapter):
    model = tiny("bert")
    model.resize_token_embeddings(130)
    PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize(
    "part", ["layer_fusion.value.up_weight", "classifier.weight", "layer.1.attention.self.query.lora_A.weight"]
)
def test_a_missing_tensor(adapter, part):
    edit(adapter, lambda tensors: tensors.pop(next(k for k in tensors if k.endswith(part))))
    model = tiny("bert")
    with pytest.raises(ValueError, match=rf"1 of \d+ tensors are missing \(.*{part}\)"):
        PeftModel.from_pretrained(model, adapter)


def test_a_surplus_tensor(adapter):
    edit(adapter, lambda tensors: tensors.update({"base_model.model.bert.layer_fusion.value.extra": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"1 have no place in the model \(.*value.extra\)"):
        PeftModel.from_pretrained(tiny("bert"), adapter)


def test_another_number_of_labels(adapter):
    with pytest.raises(ValueError, match=r"classifier.weight has \[5, 32\] in the file, \[7, 32\] in the model"):
        PeftModel.from_pretrained(tiny("bert", labels=7), adapter)


def test_missing_and_surplus_when_loading_into_an_existing_adapter(adapter):
    model = attached("bert", **LORA["bert"])
    answer = logits(model)
    edit(adapter, lambda tensors: tensors.pop(next(k for k in tensors if "lora_B" in k)))
    with pytest.raises(ValueError, match="tensors are missing"):
        model.load_adapter(adapter, "default")
    assert torch.equal(logits(model), answer)


@pytest.mark.parametrize("size", [0, 4, 300, -40])
def test_a_truncated_file(adapter, size):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refuses(tiny("bert"), adapter, "damaged or cut short")


def test_a_second_adapter_that_does_not_fit_changes_nothing(adapter):
    model = disturb(attached("bert"))
    before, answer = state(model), logits(model)
    for fields, told in (
        ({"fusion_layers": [9]}, r"\[9\] out of range"),
        ({"r": 4, "target_modules": ["no_such_module"]}, "No modules were targeted"),
        ({"fusion_heads": 7}, "fusion_heads=7 does not divide the hidden size 32"),
    ):
        with pytest.raises(ValueError, match=told):
            model.add_adapter("bad", FusionConfig(task_type="TOKEN_CLS", **fields))
        assert state(model) == before and "bad" not in model.peft_config
    edit(adapter, lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        model.load_adapter(adapter, "bad")
    assert state(model) == before
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", FusionConfig(task_type="TOKEN_CLS"))
    assert torch.equal(logits(model), answer)


def test_a_first_adapter_that_does_not_fit_changes_nothing():
    model = tiny("bert")
    before = state(model)
    with pytest.raises(ValueError, match="No modules were targeted"):
        get_peft_model(model, FusionConfig(task_type="TOKEN_CLS", r=4, target_modules=["no_such_module"]))
    assert state(model) == before


def test_importing_the_plug_in_is_enough_to_load_a_file(adapter, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    code = (
        "import fusion_adapters\nfrom peft import PeftModel\nfrom transformers import AutoModelForTokenClassification as A\n"
        f"PeftModel.from_pretrained(A.from_pretrained({str(tmp_path / 'base')!r}, num_labels=5), {str(adapter)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "dwat"}, "Did you mean 'dwatt'"),
        ({"fusion": "last", "fusion_heads": 2}, "'last' has no option fusion_heads.*Its options are: none"),
        ({"fusion": "concat", "fusion_scale": True}, "'concat' has no option fusion_scale.*fusion_bottleneck"),
        ({"fusion_dropout": 1.5}, "fusion_dropout=1.5"),
        ({"fusion_bottleneck": "half"}, "fusion_bottleneck='half' must be a width"),
        ({"fusion_heads": 8.0}, "fusion_heads=8.0 must be a whole number"),
        ({"fusion_heads": True}, "fusion_heads=True must be a whole number"),
        ({"fusion_scale": 1}, "fusion_scale=1 must be true or false"),
        ({"modules_to_save": "pooler"}, r"modules_to_save='pooler' is a text.*\['pooler'\]"),
        ({"bias": "all", "fusion_lora": False}, "fusion_lora=False asks for a fusion alone"),
        ({"r": 4, "target_modules": ["query"], "layer_replication": [(0, 2)]}, "layer_replication"),
    ],
)
def test_configs_are_checked_where_they_are_written(fields, message):
    with pytest.raises(ValueError, match=message):
        FusionConfig(**fields)


def test_layers_out_of_range_name_the_range():
    with pytest.raises(ValueError, match=r"\[7\] out of range.*0 \(embeddings\) to 4 \(last block\)"):
        attached("bert", fusion_layers=[1, 7])


class Unknown(BertForTokenClassification):
    """A model whose list of blocks has another length than its configuration says."""

    def __init__(self, config):
        super().__init__(copy.deepcopy(config))
        self.config.num_hidden_layers = 9


def test_blocks_that_cannot_be_found_are_listed_and_can_be_named():
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(ValueError, match=r"9 by its configuration.*'encoder.layer' \(3 members\).*fusion_blocks"):
        get_peft_model(Unknown(config), FusionConfig(task_type="TOKEN_CLS"))
    with pytest.raises(ValueError, match=r"fusion_blocks='encoder.laier' does not name.*'encoder.layer'"):
        get_peft_model(Unknown(config), FusionConfig(task_type="TOKEN_CLS", fusion_blocks="encoder.laier"))
    for name in ("encoder.layer", "bert.encoder.layer"):
        model = get_peft_model(Unknown(config), FusionConfig(task_type="TOKEN_CLS", fusion_blocks=name))
        assert model.peft_config["default"].fusion_num_layers == 3


def test_no_transformers_model():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.config = BertConfig(hidden_size=4)

    with pytest.raises(ValueError, match="no list of modules at all"):
        get_peft_model(Plain(), FusionConfig())


def test_a_head_that_would_be_forgotten():
    model = tiny("bert")
    model.extra = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"'extra', which would stay frozen.*modules_to_save"):
        get_peft_model(model, FusionConfig(task_type="TOKEN_CLS"))
    get_peft_model(model, FusionConfig(task_type="TOKEN_CLS", modules_to_save=["extra"]))


def test_a_model_that_carries_an_adapter_of_another_method():
    lora = get_peft_model(tiny("bert"), LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query"]))
    before, answer = state(lora), logits(lora)
    with pytest.raises(ValueError, match="is a PeftModel already"):
        get_peft_model(lora, FusionConfig(task_type="TOKEN_CLS"))
    assert state(lora) == before and torch.equal(logits(lora), answer)


def test_adapter_names_that_peft_would_confuse():
    with pytest.raises(ValueError, match="'value' is also the name of a part of the fusion"):
        get_peft_model(tiny("bert"), FusionConfig(task_type="TOKEN_CLS"), adapter_name="value")


def test_a_config_without_its_weights(adapter):
    shutil.copy(adapter / "adapter_config.json", adapter.parent / "adapter_config.json")
    # peft's own words: without a file it takes the folder for the name of a repository
    with pytest.raises((OSError, ValueError), match=str(adapter.parent)):
        PeftModel.from_pretrained(tiny("bert"), adapter.parent)
    assert json.loads((adapter / "adapter_config.json").read_text())["fusion"] == "dwatt"


def test_a_folder_of_another_method_is_no_fusion(tmp_path):
    get_peft_model(tiny("bert"), LoraConfig(task_type="TOKEN_CLS", target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no fusion, its peft_type is 'LORA'. Load it as what it is, LoraConfig"):
        FusionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("peft_type", [None, "FUSE", "LORA", 7])
def test_a_config_that_names_another_method_or_none(peft_type, adapter):
    values = json.loads((adapter / "adapter_config.json").read_text())
    del values["fusion"]
    (adapter / "adapter_config.json").write_text(json.dumps({**values, "peft_type": peft_type}))
    refuses(tiny("bert"), adapter, rf"peft_type={peft_type!r} in .*whose type is 'FUSION'.*restore it")


@pytest.mark.parametrize("values", [{}, {"peft_type": "FUSE", "r": 8}])
def test_a_config_of_no_known_method_beside_a_fusion(values, adapter):
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    refuses(tiny("bert"), adapter, r"peft_type=.* in .*whose type is 'FUSION'.*restore it")


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_a_head_for_another_task(head, tmp_path):
    other = {"sequence": "token", "token": "sequence"}[head]
    first, model = tiny("bert", head), tiny("bert", other)
    model.bert.load_state_dict(first.bert.state_dict(), strict=False)  # one has a pooler
    attached("bert", head, first).save_pretrained(tmp_path)
    before, answer = state(model), logits(model, other)
    with pytest.raises(
        ValueError, match=rf"task_type='{TASKS[head]}', and Bert.* has a head for '{TASKS[other]}'.*AutoModel"
    ):
        PeftModel.from_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=rf"task_type='{TASKS[head]}'.*Set task_type='{TASKS[other]}', or load"):
        attached("bert", head, model)
    assert state(model) == before and torch.equal(logits(model, other), answer)


def test_two_loads_with_one_config(adapter, tmp_path):
    other = disturb(attached("bert", **LORA["bert"]), 0.3)
    other.save_pretrained(tmp_path / "other")
    config = FusionConfig.from_pretrained(adapter)
    first = PeftModel.from_pretrained(tiny("bert"), adapter, config=config)
    second = PeftModel.from_pretrained(tiny("bert"), adapter, config=config)
    assert torch.equal(logits(first), logits(second))
    third = PeftModel.from_pretrained(tiny("bert"), tmp_path / "other")
    # the config is the first folder's, and its digest with it
    with pytest.raises(ValueError, match=r"not those that it was saved with"):
        PeftModel.from_pretrained(tiny("bert"), tmp_path / "other", config=FusionConfig.from_pretrained(adapter))
    assert torch.equal(logits(third), logits(other)) and not torch.equal(logits(third), logits(first))
