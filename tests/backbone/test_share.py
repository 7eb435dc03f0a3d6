"""Models with heads of their own on one backbone, whose weights are in memory once."""

import pytest
import torch
from families import FAMILIES, answer, inputs
from support import HEADS, attached, batch, disturb, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Model,
    LlamaForTokenClassification,
)

from fusion_adapters import quantization_config, share_backbone
from fusion_adapters.backbone.share import twin

CALL = {k: v for k, v in batch().items() if k != "labels"}
AUTO = {"token": AutoModelForTokenClassification, "sequence": AutoModelForSequenceClassification}


def weights(model):
    return {id(p) for p in model.parameters()}


@pytest.mark.parametrize("head", ["token", "sequence"])
def test_one_backbone_in_memory(family, head):
    plain = tiny(family, "sequence")
    model = share_backbone(plain, AUTO[head], num_labels=7)
    assert type(model) is HEADS[family, head]
    assert weights(model.base_model) <= weights(plain.base_model)
    assert model.config.num_labels == model.base_model.config.num_labels == 7
    assert plain.config.num_labels == 5
    assert not weights(model) <= weights(plain), "the head is its own"
    with torch.no_grad():
        assert torch.equal(model.base_model(**CALL)[0], plain.base_model(**CALL)[0])
        assert model(**CALL).logits.shape[-1] == 7
        next(iter(plain.base_model.parameters())).add_(1.0)  # in place: both see it
        assert torch.equal(model.base_model(**CALL)[0], plain.base_model(**CALL)[0])
    assert not model.training


def test_as_a_model_that_was_loaded_with_that_head(family, tmp_path):
    plain = tiny(family, "sequence")
    plain.save_pretrained(tmp_path)
    loaded = HEADS[family, "token"].from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True).eval()
    shared = share_backbone(plain, HEADS[family, "token"], num_labels=3)
    assert {n: tuple(p.shape) for n, p in shared.named_parameters()} == {
        n: tuple(p.shape) for n, p in loaded.named_parameters()
    }
    shared.load_state_dict(
        {k: v for k, v in loaded.state_dict().items() if k.startswith(("classifier", "score"))}, strict=False
    )
    with torch.no_grad():
        assert torch.equal(shared(**CALL).logits, loaded(**CALL).logits)


def test_saved_as_any_model(family, tmp_path):
    shared = share_backbone(tiny(family, "sequence"), AUTO["token"], num_labels=3)
    shared.save_pretrained(tmp_path)
    again = AUTO["token"].from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**CALL).logits, shared(**CALL).logits)


FAMILIES_WITH_TWO = [
    n for n, f in FAMILIES.items() if {"token", "sequence"} <= f.classes.keys() and n != "t5"
]  # whose tags are of its encoder


@pytest.mark.parametrize("name", FAMILIES_WITH_TWO)
def test_over_the_families(name):
    spec = FAMILIES[name]
    plain = spec.build("sequence")
    call = {k: v for k, v in inputs(name, "token").items() if k != "labels"}
    model = share_backbone(plain, AUTO["token"], num_labels=4)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        expected = plain.base_model(**call)[0]
        assert torch.equal(model.base_model(**call)[0], expected)
        assert answer(model, call).shape[:2] == expected.shape[:2]


def test_tied_heads_come_along():
    plain = tiny("llama", "lm", tie_word_embeddings=True)
    writer = share_backbone(tiny("llama", "token", tie_word_embeddings=True), AutoModelForCausalLM)
    assert writer.lm_head.weight is writer.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(writer(**CALL).logits, plain(**CALL).logits)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM over the vocabulary is not tied"):
        share_backbone(tiny("llama", "token", tie_word_embeddings=False), AutoModelForCausalLM)


def test_what_is_refused(family):
    plain = tiny(family, "sequence")
    with pytest.raises(ValueError, match="carries adapters"):
        share_backbone(attached(family, "sequence").get_base_model(), AUTO["token"])
    other = LlamaForTokenClassification if family == "bert" else HEADS["bert", "token"]
    for kind in (other, GPT2Model):
        with pytest.raises(ValueError, match="no backbone in common"):
            share_backbone(plain, kind)
    with pytest.raises(ValueError, match="no backbone in common"):
        share_backbone(plain, type(plain.base_model))


def test_a_part_that_is_not_there():
    with pytest.raises(ValueError, match=r"BertForSequenceClassification needs the backbone's 'pooler'.*AutoModel"):
        share_backbone(tiny("bert", "token"), AUTO["sequence"])
    assert share_backbone(tiny("bert", "sequence"), AutoModelForMaskedLM).bert.pooler is None


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_backbones(family, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    tiny(family, "sequence", width=64).save_pretrained(tmp_path)
    plain = (
        AUTO["sequence"]
        .from_pretrained(
            tmp_path, quantization_config=quantization_config(bits), device_map={"": "cpu"}, dtype=torch.float32
        )
        .eval()
    )
    models = [share_backbone(plain, AUTO["token"], num_labels=3) for _ in range(2)]
    with torch.no_grad():
        first, second = (model.base_model(**CALL)[0] for model in models)  # a shared one is called first
        assert torch.equal(first, second)
        assert torch.equal(plain.base_model(**CALL)[0], first)
    assert all(model.is_quantized for model in models)
    packed = {id(p) for n, p in plain.named_parameters() if "layer" in n and not p.is_floating_point()}
    assert packed
    assert packed <= weights(models[0])


def test_a_twin_answers_and_changes_alone(family):
    model = disturb(attached(family, fusion="dwatt")).eval()
    with torch.no_grad():
        expected = model(**CALL).logits
        copied = twin(model)
        assert weights(copied) == weights(model)
        assert torch.equal(copied(**CALL).logits, expected)
        with copied.disable_adapter():
            assert not torch.equal(copied(**CALL).logits, expected)
            assert torch.equal(model(**CALL).logits, expected)
