"""Heads whose values stand in a checkpoint, on a shared backbone: they come along, or what needs them is refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import batch, disturb, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fusion_adapters import FusionConfig, ManyAdapters, share_backbone
from fusion_adapters.backbone.share import stand_on, twin

CALL = {k: v for k, v in batch().items() if k != "labels"}


def says(model):
    with torch.no_grad():
        return model(**CALL).logits


def with_bias(model):
    """Moves the biases of a head off zero, at which fresh ones stand."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "predictions" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("family", "head", "kind"), [("bert", "mlm", AutoModelForMaskedLM), ("llama", "lm", AutoModelForCausalLM)]
)
def test_a_head_over_the_vocabulary_comes_along(family, head, kind):
    model = with_bias(tiny(family, head))  # Llama's is not tied
    other = share_backbone(model, kind)
    assert torch.equal(says(other), says(model))
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    assert other.config is not model.config


def saved(folder, model, **fields):
    disturb(get_peft_model(twin(model), FusionConfig(fusion="dwatt", **fields))).save_pretrained(folder)
    return folder


def test_an_adapter_is_loaded_onto_the_head_that_it_was_trained_with(tmp_path):
    model = with_bias(tiny("bert", "mlm"))
    folder = saved(tmp_path / "words", model)
    heads = {"words": AutoModelForMaskedLM}
    expected = says(PeftModel.from_pretrained(twin(model), folder).eval())
    many = ManyAdapters.from_pretrained(model, {"words": folder}, heads)
    assert torch.equal(many(**CALL)["words"].logits, expected)
    for fields, tensor in (({}, "cls.predictions.bias"), ({"modules_to_save": ["transform"]}, "cls.predictions.bias")):
        with pytest.raises(
            ValueError, match=rf"leaves \d tensors of the head of BertForMaskedLM to the checkpoint \('{tensor}'"
        ):
            ManyAdapters.from_pretrained(tiny("bert", "sequence"), {"words": saved(folder, model, **fields)}, heads)


def test_a_loaded_model_on_the_backbone_of_another():
    plain, words = tiny("bert", "sequence"), with_bias(tiny("bert", "mlm"))
    plain.base_model.load_state_dict(words.base_model.state_dict(), strict=False)
    expected, before = says(words), {id(p) for p in words.base_model.parameters()}
    stood = stand_on(words, plain)
    assert torch.equal(says(stood), expected)
    own = {id(p) for p in stood.parameters()}
    assert {id(p) for p in stood.base_model.parameters()} <= {id(p) for p in plain.parameters()}
    assert not own & before, "the embeddings of the output, too, are the other's"
    untied = tiny("llama", "lm")
    head = untied.lm_head.weight
    assert stand_on(untied, tiny("llama", "token")).lm_head.weight is head
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM is built on BertModel, and the other model's backbone is LlamaModel"
    ):
        stand_on(tiny("bert", "mlm"), tiny("llama", "token"))
    with pytest.raises(ValueError, match="needs the backbone's 'pooler'"):
        stand_on(tiny("bert", "sequence"), tiny("bert", "token"))


def test_a_head_over_labels_is_fresh():
    model = tiny("bert", "sequence")
    assert share_backbone(model, AutoModelForSequenceClassification).classifier is not model.classifier
