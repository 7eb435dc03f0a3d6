"""How large a fusion is where nobody chose its size."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from fusion_adapters import FUSIONS, FusionConfig
from fusion_adapters.tuner import fusion_layers
from fusion_adapters.tuner.costs import count_config
from fusion_adapters.tuner.counts import count_trainable, skeleton

WIDE = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 64, "num_attention_heads": 4}
DECODER = LlamaConfig(**WIDE, num_key_value_heads=2, vocab_size=50)
LIMIT = 64 * 256 * 6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Llama 3.1 8B and 70B, Llama 3.2 1B, Qwen 2.5 0.5B, SmolLM2 135M: hidden size, blocks, heads, key and value heads
SHAPES = [(4096, 32, 32, 8), (8192, 80, 64, 8), (2048, 16, 32, 8), (896, 24, 14, 2), (576, 30, 9, 3)]


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "deeper"])
def test_the_default_is_no_larger_than_lora_on_the_attention_of_the_same_backbone(fusion):
    count = count_config(FusionConfig(fusion=fusion), LlamaModel(DECODER))["fusion"]
    lora = count_trainable(get_peft_model(LlamaModel(DECODER), LoraConfig(r=16, target_modules=ATTENTION)))["lora"]
    assert count <= LIMIT < lora
    if FUSIONS[fusion].widths:
        assert count > 0.9 * LIMIT  # and no smaller than it has to be


@pytest.mark.parametrize(("width", "blocks", "heads", "shared"), SHAPES)
@pytest.mark.parametrize("fusion", ["dwatt", "concat", "dwconcat"])
def test_sizes_of_real_decoders(fusion, width, blocks, heads, shared):
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": shared}
    model = skeleton(LlamaConfig(**sizes, intermediate_size=64, vocab_size=50))
    count = count_config(FusionConfig(fusion=fusion), model)["fusion"]
    lora = count_config(FusionConfig(fusion="last", r=16, target_modules=ATTENTION), model)["lora"]
    assert 0.9 * 64 * width * blocks < count <= 64 * width * blocks < lora
    if width == 4096:
        assert 4 * count < 40e6  # bytes of the file, of an 8B model


def test_what_is_smaller_by_itself_stays():
    """The methods' own widths, on a backbone as small as those of tests."""
    small = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=16, vocab_size=50)
    )
    config = get_peft_model(small, FusionConfig(fusion="dwatt")).active_peft_config
    assert config.fusion_bottleneck == 0.5


def test_a_width_that_was_chosen_is_not_touched():
    own = 6 * 256 * 256 + 256
    for config in (
        FusionConfig(fusion="concat", fusion_budget="none"),
        FusionConfig.paper("concat"),
        FusionConfig(fusion="concat", fusion_init="paper"),
    ):
        model = get_peft_model(LlamaModel(DECODER), config)
        assert count_trainable(model)["fusion"] == own
        assert model.active_peft_config.fusion_budget is None
    chosen = FusionConfig(fusion="dwatt", fusion_bottleneck=0.5)
    assert count_config(chosen, LlamaModel(DECODER))["fusion"] > 4 * LIMIT


def test_fewer_blocks_have_a_smaller_fusion_and_lora_comes_on_top():
    half = count_config(FusionConfig(fusion="concat", fusion_depth=3), LlamaModel(DECODER))["fusion"]
    assert 0.9 < half / (LIMIT / 2) <= 1
    with_lora = count_config(FusionConfig(fusion="concat", r=4, target_modules=ATTENTION), LlamaModel(DECODER))
    assert 0.9 * LIMIT < with_lora["fusion"] <= LIMIT and with_lora["lora"] > 0


def test_a_method_that_cannot_be_so_small_keeps_its_own_width():
    model = get_peft_model(LlamaModel(DECODER), FusionConfig(fusion="deeper"))
    assert count_trainable(model)["fusion"] > LIMIT


def test_the_width_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(LlamaModel(DECODER).eval(), FusionConfig(fusion="concat", fusion_alpha=1))
    width = model.active_peft_config.fusion_bottleneck
    assert isinstance(width, int) and width == LIMIT // (7 * 256)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    ids = torch.arange(6)[None]
    wanted = model(input_ids=ids).last_hidden_state
    model.save_pretrained(str(tmp_path))
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert loaded.active_peft_config.fusion_bottleneck == width
    torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, wanted)


def test_rules_for_layers_count_from_where_the_backbone_ends(tmp_path):
    torch.manual_seed(0)
    for fields, layers in (({}, (2, 4, 6)), ({"fusion_depth": 4}, (2, 4)), ({"fusion_depth": 0.5}, (1, 3))):
        model = get_peft_model(LlamaModel(DECODER), FusionConfig(fusion_layers="every:2", fusion_bottleneck=4, **fields))
        (layer,) = fusion_layers(model)
        assert layer.active_fusion.layers == layers
        model.save_pretrained(str(tmp_path / str(layers)))
        loaded = PeftModel.from_pretrained(model.unload(), str(tmp_path / str(layers)))
        assert loaded.active_peft_config.fusion_layers == "every:2"
        assert fusion_layers(loaded)[0].active_fusion.layers == layers
        loaded.unload()
    with pytest.raises(ValueError, match=r"fusion_layers='last:8', and there are 6 blocks"):
        get_peft_model(LlamaModel(DECODER), FusionConfig(fusion_layers="last:8"))


def test_a_checkpoint_of_another_size_is_told(tmp_path):
    """As one of 0.1.0, whose default was the method's own width."""
    model = get_peft_model(LlamaModel(DECODER), FusionConfig(fusion="concat", fusion_budget="none"))
    model.save_pretrained(str(tmp_path))
    model = get_peft_model(model.unload(), FusionConfig(fusion="concat"))
    with pytest.raises(
        ValueError, match=r"another shape .* fusion_bottleneck is None there and 54 here\. .* fusion_budget='none'"
    ):
        model.load_adapter(str(tmp_path), "default")
