"""What peft asks of every method after it is attached: training, refusals, deleting, unloading, disabling, copies.

The numbers are those of the list of thirty behaviours in CONTRIBUTING.md.
"""

import copy

import pytest
import torch
from families import FAMILIES, answer, attach, first_head, inputs
from peft import (
    prepare_model_for_kbit_training,
)
from support import METHODS, disturb
from support_conformance import config_of, in_turn, parameters, structure

from fusion_adapters.tuner import FusionLayer, fusion_layers


@in_turn
def test_15_26_training_touches_the_adapter_only(make, batch, family, method, lora):
    model = make()
    before = parameters(model)
    model.train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad] or [torch.nn.Parameter(torch.ones(1))], lr=0.1
    )
    loss = model(**batch).loss
    if loss.requires_grad:  # 'last' without LoRA and head trains nothing
        loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "FusionLayer" in repr(model)


@in_turn
def test_12_13_27_what_cannot_be_done_is_said(make, batch, family, method, lora):
    model = make()
    expected = answer(model, batch)
    trained = any(p.numel() for layer in fusion_layers(model) for p in layer.fusions.parameters())
    if trained:
        with pytest.raises(ValueError, match=r"merge_adapter\(\).*drop_fusion=True"):
            model.merge_and_unload()
    with pytest.raises(ValueError, match="no such sum for fusions"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="has 'nobody', and the model has the adapters 'default'"):
        model.eval()(**batch, adapter_names=["nobody", "__base__"])
    torch.testing.assert_close(answer(model, batch), expected, rtol=0, atol=0)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(answer(model, batch), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(answer(model, batch), expected, rtol=1e-4, atol=1e-5)


@in_turn
def test_20_deleting(make, plain, batch, family, method, lora):
    methods = list(METHODS)
    other = methods[(methods.index(method) + 1) % len(methods)], not lora
    model = make("first")
    model.add_adapter("second", config_of(family, *other))
    before = structure(model)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")
    assert structure(model) == before
    expected = answer(model, batch)
    model.delete_adapter("second")  # inactive
    assert list(model.active_adapters) == ["first"]
    torch.testing.assert_close(answer(model, batch), expected, rtol=0, atol=0)
    model.add_adapter("second", config_of(family, *other))
    model.delete_adapter("first")  # active
    assert list(model.active_adapters) == ["second"] and list(model.peft_config) == ["second"]
    assert not any("first" in name for name in model.state_dict())
    assert all(set(layer.fusions) == {"second"} for layer in fusion_layers(model))
    assert torch.isfinite(answer(model, batch)).all()
    model.delete_adapter("second")  # the last
    assert not any(len(layer.fusions) for layer in fusion_layers(model))
    base = model.base_model.model
    torch.testing.assert_close(answer(base, batch), answer(plain(), batch), rtol=0, atol=1e-6)


@in_turn
def test_21_unloading(make, plain, batch, family, method, lora):
    bare = plain()
    model = make(model=bare)
    heads = model.peft_config["default"].modules_to_save or []
    base = model.unload()
    assert base is bare
    assert not any(isinstance(m, FusionLayer) or hasattr(m, "lora_A") for m in base.modules())
    assert not hasattr(base, "peft_config")
    assert base.state_dict().keys() == plain().state_dict().keys()
    kept = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    assert kept == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain().modules())
    assert not any("forward" in m.__dict__ for m in base.modules())
    before, after = plain().state_dict(), base.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(any(head in name for head in heads) for name in changed), "peft leaves trained heads in place, nothing else"
    with torch.no_grad():
        for name in changed:
            after[name].copy_(before[name])
    expected = answer(plain(), batch)
    torch.testing.assert_close(answer(base, batch), expected, rtol=0, atol=1e-6)
    again = attach(family, lora=lora, model=base, **METHODS[method])  # a fresh one
    torch.testing.assert_close(answer(again, batch), expected, rtol=0, atol=1e-6)


@in_turn
def test_22_disabling(make, plain, batch, family, method, lora):
    model = make()
    for layer in fusion_layers(model):  # an irregular state comes back too
        for parameter in list(layer.fusions.parameters())[:1]:
            parameter.requires_grad_(False)
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    expected = answer(model, batch)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model, batch), answer(plain(), batch), rtol=0, atol=1e-6)
        assert not any(layer.taps.held for layer in fusion_layers(model))
    torch.testing.assert_close(answer(model, batch), expected, rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains


@in_turn
def test_23_a_bad_or_double_adapter_changes_nothing(make, batch, family, method, lora):
    model = make()
    expected = answer(model, batch)  # first: transformers hooks its own recorders on at the first call
    before = structure(model)
    with pytest.raises(ValueError, match="out of range"):
        model.add_adapter("bad", config_of(family, "dwatt", lora, fusion_layers=[99]))
    with pytest.raises(ValueError, match=r"No modules were targeted|'no_such_module'"):
        model.add_adapter("bad", config_of(family, method, False, target_modules=["no_such_module"]))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config_of(family, method, lora))
    assert structure(model) == before
    torch.testing.assert_close(answer(model, batch), expected, rtol=0, atol=0)


@in_turn
def test_3_prepared_for_training_in_few_bits(family, method, lora):
    model = FAMILIES[family].build(first_head(family))
    checkpointing = model.supports_gradient_checkpointing
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    assert not any(p.requires_grad for p in model.parameters())
    model = disturb(attach(family, lora=lora, model=model, **METHODS[method])).train()
    # what scripts call besides, in either order
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**inputs(family, first_head(family))).loss
    if method == "last" and not lora and not any(p.requires_grad for p in model.parameters()):
        return
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@in_turn
def test_23_copies(make, batch, family, method, lora):
    model = make()
    clone = copy.deepcopy(model)
    expected = answer(model, batch)
    disturb(model, 0.3)
    torch.testing.assert_close(answer(clone, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "input_ids" in inputs(f, first_head(f))])
def test_24_embeddings_instead_of_ids(family):
    head = first_head(family)
    model = disturb(attach(family))
    batch = {k: v[:1] for k, v in inputs(family, head).items()}  # RoBERTa counts positions by ids, of padding too
    expected = answer(model, batch)
    embedded = {k: v for k, v in batch.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"]).detach()
    if FAMILIES[family].config == "T5Config" or FAMILIES[family].config == "BartConfig":
        embedded["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    torch.testing.assert_close(answer(model, embedded), expected, rtol=1e-5, atol=1e-5)
