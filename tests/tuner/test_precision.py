"""Backbones of 16 bits and autocast: what trains is float32, and finite."""

import pytest
import torch
from families import FAMILIES, attach, first_head, inputs
from support import (
    ALTERNATING,
    LORA,
    METHODS,
    attached,
    batch,
    disturb,
    layer_of,
    logits,
    tiny,
)

from fusion_adapters import FusionConfig

each_method = pytest.mark.parametrize(("family", "method", "lora"), ALTERNATING)


def fields(method, family, lora):
    return METHODS[method] | (LORA[family] if lora else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_16_bit_backbones_train_float32_adapters_and_heads(family, dtype, method, lora):
    model = attached(family, model=tiny(family, dtype=dtype), **fields(method, family, lora)).train()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    answer = model(**batch())
    answer.loss.backward()
    assert answer.logits.isfinite().all()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    backbone = layer_of(model).backbone
    assert {p.dtype for b in backbone.blocks for n, p in b.named_parameters() if "lora_" not in n} == {dtype}


def test_a_16_bit_output_head_that_trains_answers_in_float32():
    model = attached("llama", "lm", tiny("llama", "lm", dtype=torch.bfloat16), modules_to_save=["lm_head"])
    model.add_adapter("second", FusionConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    for name in ("default", "second"):
        model.set_adapter(name)
        assert logits(model, "lm").dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_autocast_works_on_float32_and_bfloat16_backbones(family, method):
    for dtype in (torch.float32, torch.bfloat16):
        model = disturb(attached(family, model=tiny(family, dtype=dtype), **METHODS[method])).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_26_sixteen_bits(family, dtype):
    head = first_head(family)
    autocast = (list(FAMILIES).index(family) + (dtype == torch.float16)) % 2 == 1
    model = disturb(attach(family, lora=True, model=FAMILIES[family].build(head).to(dtype))).train()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(family, head).items()}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
