"""Models without their upper blocks: loaded so, and cut in memory."""

import logging

import pytest
import torch
import transformers
from families import DEPTH, FAMILIES, GRID, answer, inputs
from peft import AutoPeftModelForTokenClassification, PeftModel, get_peft_model
from support import attached, disturb, logits, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fusion_adapters import FusionConfig, cut_model, load_cut, quantization_config
from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.tuner import fusion_layers

TOKEN = [family for family, head in GRID if head == "token" and family not in ("albert", "t5")]


def of_blocks(messages, number):
    return [m for m in messages if f".{number}." in m]


@pytest.mark.parametrize("family", TOKEN)
def test_a_loaded_part_is_that_of_the_whole_model(family, tmp_path, caplog):
    whole = FAMILIES[family].build("token")
    whole.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        part, info = load_cut(AutoModelForTokenClassification, str(tmp_path), 2, output_loading_info=True)
    assert not info["missing_keys"] and not caplog.records
    (backbone,) = find_backbones(part)
    assert backbone.num_layers == 2
    state, expected = part.state_dict(), whole.state_dict()
    assert state.keys() < expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    data = inputs(family, "token")
    assert torch.equal(answer(part, data), answer(cut_model(whole, 0.5), data))
    part.save_pretrained(tmp_path / "part")  # a model like others
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "part")
    assert torch.equal(answer(again, data), answer(part, data))


def test_options_reach_the_model(tmp_path):
    tiny("llama", "sequence").save_pretrained(tmp_path)
    names = ["no", "yes"]
    with torch.random.fork_rng():
        model = load_cut(
            AutoModelForSequenceClassification,
            str(tmp_path),
            3,
            dtype=torch.bfloat16,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            ignore_mismatched_sizes=True,
            attn_implementation="eager",
        )
    assert model.dtype == torch.bfloat16 and model.config.id2label == {0: "no", 1: "yes"}
    assert model.score.out_features == 2 and model.config._attn_implementation == "eager"
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    named = load_cut(transformers.LlamaForSequenceClassification, str(tmp_path), 1)  # a class of one family
    assert len(named.model.layers) == 1 and named.name_or_path == str(tmp_path)


def test_a_new_head_is_told(tmp_path, caplog):
    tiny("llama", "lm").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_cut(AutoModelForTokenClassification, str(tmp_path), 2)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "score.weight" in told and "layers" not in told
    assert model.score.out_features == 5


def test_what_cannot_be_cut_is_refused(tmp_path):
    tiny("llama", "lm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="output layer over the vocabulary was made for the last block"):
        load_cut(AutoModelForCausalLM, str(tmp_path), 2)
    with pytest.raises(ValueError, match="output layer over the vocabulary was made for the last block"):
        cut_model(tiny("llama", "lm"), 2)
    with pytest.raises(ValueError, match=r"the model has 4 blocks\. Choose from 1 to 4"):
        load_cut(AutoModelForTokenClassification, str(tmp_path), 5)
    with pytest.raises(ValueError, match="Cut the model first"):
        cut_model(attached("bert").base_model.model, 2)
    groups = FAMILIES["albert"].build("token", num_hidden_groups=2)
    with pytest.raises(ValueError, match="num_hidden_groups=2"):
        cut_model(groups, 2)
    for head in ("sequence", "qa"):
        with pytest.raises(ValueError, match="more than one stack"):
            cut_model(FAMILIES["bart"].build(head), 2)


@pytest.mark.parametrize(
    ("family", "auto"),
    [("bert", "MaskedLM"), ("bert", "PreTraining"), ("bert", "CausalLM"), ("bert", "NextSentencePrediction"), ("bert", "MultipleChoice"),
     ("albert", "MaskedLM"), ("distilbert", "MaskedLM"), ("modernbert", "MaskedLM"), ("electra", "PreTraining"), ("llama", "CausalLM"),
     ("mamba", "CausalLM"), ("llama", "QuestionAnswering"), ("vit", "MaskedImageModeling"), ("wav2vec2", "CTC"),
     ("wav2vec2", "AudioFrameClassification")],
)  # fmt: skip
def test_all_blocks_are_the_whole_model(family, auto, tmp_path, caplog):
    auto_class = getattr(transformers, f"AutoModelFor{auto}")
    settings = FAMILIES[family].settings
    whole = auto_class.from_config(getattr(transformers, FAMILIES[family].config)(**settings))
    whole.save_pretrained(tmp_path)
    expected = whole.state_dict()
    for depth in (DEPTH, 0.9):
        with caplog.at_level(logging.WARNING):
            loaded = load_cut(auto_class, str(tmp_path), depth)
        for model in (loaded, cut_model(auto_class.from_pretrained(tmp_path), depth)):
            state = model.state_dict()
            assert type(model) is type(whole) and state.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert not [record for record in caplog.records if record.name == "fusion_adapters"]
    heads = transformers.AutoModelForMaskedLM, transformers.AutoModelForPreTraining, AutoModelForCausalLM
    if auto_class in heads and family != "electra":  # which of Electra's tokens were replaced is no vocabulary
        with pytest.raises(ValueError, match=r"made for the last block \(4\): it cannot read the state after block 3"):
            load_cut(auto_class, str(tmp_path), 3)


def test_a_refused_cut_changes_nothing():
    model = FAMILIES["albert"].build("token", num_hidden_groups=2)
    with pytest.raises(ValueError, match="num_hidden_groups"):
        cut_model(model, 2)
    assert model.config.num_hidden_layers == DEPTH and len(model.albert.encoder.albert_layer_groups) == 2


def test_groups_that_share_weights_are_skipped_where_they_are_not_cut():
    model = FAMILIES["albert"].build("token", num_hidden_groups=2)
    model = disturb(get_peft_model(model, FusionConfig(task_type="TOKEN_CLS", fusion_depth=2)))
    (layer,) = fusion_layers(model)
    calls = []
    for group in (0, 1):
        inner = layer.backbone.base.encoder.albert_layer_groups[group].albert_layers[0]
        inner.register_forward_pre_hook(lambda m, args, group=group: calls.append(group))
    answer(model, inputs("albert", "token"))
    assert calls == [0, 0]  # its blocks are 0 0 1 1


def test_a_checkpoint_that_lacks_weights_of_a_block_is_refused(tmp_path):
    model = tiny("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    load_cut(AutoModelForTokenClassification, str(tmp_path), 1)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the first 2 blocks .*layers\.1\.mlp\.up_proj"):
        load_cut(AutoModelForTokenClassification, str(tmp_path), 2)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the first 4 blocks .* Load a checkpoint that is whole"):
        load_cut(AutoModelForTokenClassification, str(tmp_path), 4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_eight_bits(family, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    tiny(family).save_pretrained(tmp_path / "base")
    options = {"quantization_config": quantization_config(8), "dtype": torch.float32, "device_map": {"": "cpu"}}
    whole = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", **options)
    model = disturb(attached(family, model=whole, fusion_depth=2))
    assert any(p.dtype == torch.int8 for p in model.parameters())
    found = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    part = load_cut(AutoModelForTokenClassification, str(tmp_path / "base"), 2, **options)
    assert any(p.dtype == torch.int8 for p in part.parameters())
    torch.testing.assert_close(logits(PeftModel.from_pretrained(part, tmp_path / "adapter")), found, rtol=0, atol=1e-6)


def test_auto_classes_load_the_whole_model_and_skip(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    model = disturb(attached("llama", model=base, fusion_depth=2))
    model.save_pretrained(tmp_path / "adapter")
    for load in (AutoPeftModelForTokenClassification, AutoModelForTokenClassification):
        again = load.from_pretrained(tmp_path / "adapter")
        (layer,) = fusion_layers(again)
        assert (layer.backbone.num_layers, layer.running.num_layers) == (4, 2)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
