"""The adapter as peft knows it: saving, loading, several adapters, switching off, taking off."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from support import DEPTH, LORA, attached, batch, disturb, layer_of, logits, tiny

from fusion_adapters import FusionConfig

WITH_AND_WITHOUT_LORA = pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])


def base_weights(model):
    """Copies of the backbone's own linear weights, by name."""
    parts = (".lora_", "layer_fusion", "modules_to_save", "original_module")
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if n.endswith(".weight") and not any(part in n for part in parts)
    }


def second_config(**fields):
    return FusionConfig(task_type="TOKEN_CLS", **fields)


def test_the_file_holds_fusion_lora_and_head_only(family, tmp_path):
    model = attached(family, **LORA[family])
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = "classifier" if family == "bert" else "score"
    for name in tensors:
        assert ".layer_fusion." in name or ".lora_" in name or name.startswith(f"base_model.model.{head}."), name
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_config_comes_back_whole_with_the_backbone_in_it(family, tmp_path):
    attached(family, fusion_layers=[1, -1], fusion_dropout=0.1).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "FUSION"
    assert saved["target_modules"] is None
    assert (saved["fusion_model_type"], saved["fusion_hidden_size"], saved["fusion_num_layers"]) == (family, 32, DEPTH)
    assert saved["fusion_heads"] == 8, "the defaults of today are written down"
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, FusionConfig)
    assert config.fusion_layers == [1, -1]


@WITH_AND_WITHOUT_LORA
def test_transformers_own_load_adapter(family, lora, tmp_path):
    model = disturb(attached(family, **(LORA[family] if lora else {})))
    model.save_pretrained(tmp_path)
    plain = tiny(family)
    before = logits(plain)
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(model))
    plain.disable_adapters()
    assert torch.equal(logits(plain), before)


def test_transformers_own_switch_turns_a_fusion_on_again(tmp_path):
    # without a head in modules_to_save: transformers' enable_adapters leaves those off
    model = disturb(attached("llama", "lm"))
    model.save_pretrained(tmp_path)
    plain = tiny("llama", "lm")
    plain.load_adapter(str(tmp_path))
    plain.disable_adapters()
    plain.enable_adapters()
    torch.testing.assert_close(logits(plain, "lm"), logits(model, "lm"))


@WITH_AND_WITHOUT_LORA
def test_two_adapters_and_switching(family, lora, tmp_path):
    lora_fields = LORA[family] if lora else {}
    model = disturb(attached(family, fusion="dwatt", **lora_fields))
    first = logits(model)
    model.add_adapter("other", second_config(fusion="concat"))
    assert torch.equal(logits(model), first), "adding an adapter changed the active one"
    model.set_adapter("other")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".other." in n for n in trained)
    disturb(model)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert all(".default." in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(family), tmp_path)
    assert torch.equal(logits(again), first)
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other")
    assert torch.equal(logits(again), second)
    assert not any(".default" in k or ".other" in k for k in load_file(tmp_path / "other" / "adapter_model.safetensors"))


def test_a_loaded_second_adapter_is_not_trainable_unless_asked(family, tmp_path):
    disturb(attached(family)).save_pretrained(tmp_path)
    model = attached(family)
    model.load_adapter(tmp_path, "frozen")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".frozen." in n)
    assert any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
    model.load_adapter(tmp_path, "asked", is_trainable=True)
    model.set_adapter("asked")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if ".asked." in n}
    model.train()
    model(**batch()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trains)


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_an_adapter_chosen_while_adapters_are_disabled_trains_afterwards(family, way):
    model = tiny(family)
    if way == "peft":
        model = get_peft_model(model, FusionConfig(), adapter_name="a")
        model.add_adapter("b", FusionConfig(fusion="concat"))
        with model.disable_adapter():
            model.set_adapter("b")
    else:
        model.add_adapter(FusionConfig(), adapter_name="a")
        model.add_adapter(FusionConfig(fusion="concat"), adapter_name="b")
        model.set_adapter("a")
        model.disable_adapters()
        model.set_adapter("b")
        model.enable_adapters()
    fusions = layer_of(model).fusions
    assert all(p.requires_grad for p in fusions["b"].parameters())
    assert not any(p.requires_grad for p in fusions["a"].parameters())


def test_unload_of_a_16_bit_model_leaves_a_16_bit_head(family):
    restored = attached(family, model=tiny(family, dtype=torch.bfloat16)).unload()
    assert {p.dtype for p in restored.parameters()} == {torch.bfloat16}
    assert logits(restored).isfinite().all()


def test_merging_folds_lora_in_and_refuses_to_lose_a_fusion(family):
    model = disturb(attached(family, **LORA[family]))
    adapted, before = logits(model), base_weights(model)
    model.merge_adapter()
    changed = {name for name, weight in base_weights(model).items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-3] for name in changed} == set(LORA[family]["target_modules"])
    assert len(changed) == 2 * DEPTH
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(base_weights(model), before)
    with pytest.raises(ValueError, match=r"parameters cannot be folded.*drop_fusion=True"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    without_fusion = attached(family, fusion="last", **LORA[family])
    without_fusion.load_state_dict({n: w for n, w in model.state_dict().items() if "layer_fusion" not in n})
    assert (logits(without_fusion) - adapted).abs().max() > 1e-3
    merged = model.merge_and_unload(drop_fusion=True)
    assert not any("layer_fusion" in n or "lora_" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), logits(without_fusion), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be active together"):
        two = attached(family)
        two.add_adapter("other", second_config())
        two.base_model.set_adapter(["default", "other"])


def test_merging_is_free_where_there_is_no_fusion_to_lose(family):
    model = disturb(attached(family, fusion="last", **LORA[family]))
    adapted = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), adapted, rtol=1e-4, atol=1e-5)


def test_status_reports_the_method(family):
    model = attached(family, **LORA[family])
    status = model.get_model_status()
    assert status.peft_types == {"default": "FUSION"}
    assert status.enabled is True and status.active_adapters == ["default"]
    assert any(layer.name.endswith("layer_fusion") for layer in model.get_layer_status())


def test_a_config_may_be_used_for_several_backbones():
    config = FusionConfig(task_type="TOKEN_CLS")
    get_peft_model(tiny("bert"), config)
    model = get_peft_model(tiny("bert", depth=2), config)
    assert model.peft_config["default"].fusion_num_layers == 2 and config.fusion_num_layers is None


def test_the_task_may_be_given_as_peft_writes_it(tmp_path):
    model = get_peft_model(tiny(dtype=torch.bfloat16), FusionConfig(task_type=TaskType.TOKEN_CLS))
    assert {p.dtype for n, p in model.named_parameters() if ".modules_to_save." in n} == {torch.float32}
    disturb(model).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(dtype=torch.bfloat16), tmp_path)), logits(model))


def test_a_second_adapter_beside_a_stack_of_new_blocks_as_deep_as_the_backbone(family):
    model = attached(family, fusion="deeper", fusion_num_blocks=DEPTH)
    model.add_adapter("second", FusionConfig(task_type="TOKEN_CLS"))
    model.set_adapter("second")
    assert torch.isfinite(logits(model)).all()


def test_what_an_adapter_trains_in_the_backbone_does_not_make_it_another(family, tmp_path):
    attached(family).save_pretrained(tmp_path)
    model = attached(family, bias="all", **LORA[family])
    disturb(model, scale=0.5)  # biases of norms, which the fingerprint samples
    model.load_adapter(tmp_path, "second")
    model.add_adapter("third", FusionConfig(task_type="TOKEN_CLS"))
    assert model.peft_config["third"].fusion_fingerprint == model.peft_config["default"].fusion_fingerprint
