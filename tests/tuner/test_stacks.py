"""Encoder-decoders with fusions in one stack or in both: switching, what trains, weights over depth, unfit choices."""

import pytest
import torch
from families import FAMILIES, answer, attach, inputs
from peft import PeftModel
from support import disturb, without_dropout

from fusion_adapters import FusionConfig, depth_weights
from fusion_adapters.tuner import fusion_layers

STACKED = pytest.mark.parametrize("family", ["t5", "bart", "whisper"])


def config(family, stack, **fields):
    return FusionConfig(**{**FAMILIES[family].fields("seq2seq"), "fusion_stack": stack, **fields})


def make(family, stack, name="default", **fields):
    return attach(family, "seq2seq", name=name, fusion_stack=stack, **fields)


@STACKED
def test_unset_is_the_stack_that_the_head_reads(family):
    model = attach(family, "seq2seq")
    assert [layer.backbone.stack for layer in fusion_layers(model)] == ["decoder"]
    assert model.peft_config["default"].fusion_stack == "decoder"
    assert model.peft_config["default"].fusion_num_layers == 3


@STACKED
def test_adapters_in_different_stacks_take_turns(family, tmp_path):
    batch = inputs(family, "seq2seq")
    model = disturb(make(family, "encoder", "first"))
    expected = {"first": answer(model, batch)}
    for name, stack in (("second", "decoder"), ("third", "both")):
        model.add_adapter(name, config(family, stack))
        model.set_adapter(name)
        expected[name] = answer(disturb(model), batch)
    for name in ("first", "third", "second", "first"):
        model.set_adapter(name)
        torch.testing.assert_close(answer(model, batch), expected[name], rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    for name, answered in expected.items():
        again = PeftModel.from_pretrained(FAMILIES[family].build("seq2seq"), tmp_path / name)
        torch.testing.assert_close(answer(again, batch), answered, rtol=0, atol=1e-6)
    model.delete_adapter("third")
    model.delete_adapter("first")
    model.set_adapter("second")
    torch.testing.assert_close(answer(model, batch), expected["second"], rtol=0, atol=0)
    base = model.unload()
    torch.testing.assert_close(answer(base, batch), answer(FAMILIES[family].build("seq2seq"), batch), rtol=0, atol=1e-6)


@STACKED
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fusion_in_the_decoder_leaves_the_encoder_without_graph_and_dropout(family, checkpointing):
    model = make(family, "decoder").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    base = model.get_base_model()
    assert not base.get_encoder().training and not base.get_decoder().training
    seen = []
    blocks = fusion_layers(model)[0].backbone.blocks
    handle = blocks[0].register_forward_hook(lambda block, args, output: seen.append(output))
    model(**inputs(family, "seq2seq")).loss.backward()
    handle.remove()
    state = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert not state.requires_grad


@STACKED
def test_a_fusion_in_the_encoder_gets_its_gradient_through_the_decoder(family):
    for stack in ("encoder", "both"):
        model = disturb(make(family, stack)).train()
        assert not model.get_base_model().get_encoder().training
        model(**inputs(family, "seq2seq")).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name


def test_weights_over_depth_of_either_stack():
    model = disturb(make("t5", "both"))
    batch = inputs("t5", "seq2seq")
    assert depth_weights(model, **batch).shape == (2, 9, 8, 3)
    assert depth_weights(model, stack="decoder", **batch).shape == (2, 9, 8, 3)
    assert depth_weights(model, stack="encoder", **batch).shape == (2, 9, 8, 4)
    with pytest.raises(ValueError, match=r"no active fusion in its encoder"):
        depth_weights(make("t5", "decoder"), stack="encoder", **batch)


def test_choices_that_do_not_fit():
    with pytest.raises(ValueError, match=r"fusion_stack='middle' is unknown"):
        FusionConfig(fusion_stack="middle")
    with pytest.raises(ValueError, match=r"has no decoder, it has: encoder.*fusion_stack='encoder'"):
        attach("whisper", "audio", fusion_stack="decoder")
    with pytest.raises(ValueError, match=r"\[4\] out of range. A backbone of 3 blocks"):
        make("t5", "both", fusion_layers=[0, 4])


def test_an_adapter_for_both_stacks_does_not_load_into_another_depth(tmp_path):
    make("t5", "both").save_pretrained(tmp_path)
    other = FAMILIES["t5"].build("seq2seq", num_decoder_layers=2)
    with pytest.raises(ValueError, match=r"hidden size \[32, 32\] with \[4, 3\] blocks; this one .* with \[4, 2\] blocks"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("stack", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_gradient_of_the_callers_embeddings_is_not_cut(family, stack):
    model = without_dropout(disturb(make(family, stack)))
    batch, gradients = inputs(family, "seq2seq"), []
    ids = batch.pop("input_ids")
    for mode in (False, True):
        model.train(mode)
        given = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=given, **batch).loss.backward()
        assert given.grad.abs().sum() > 0
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
