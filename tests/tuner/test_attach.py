"""What attaching does to a model: identity, who trains, which mode, which graph, which numbers."""

import copy
import io
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import (
    ALTERNATING,
    DEPTH,
    LORA,
    METHODS,
    WIDTH,
    attached,
    batch,
    disturb,
    layer_of,
    logits,
    tiny,
    without_dropout,
)

from fusion_adapters import FUSIONS, FusionConfig, depth_weights
from fusion_adapters.tuner.counts import count_trainable

each_method = pytest.mark.parametrize(("family", "method", "lora"), ALTERNATING)


def fields(method, family, lora):
    return METHODS[method] | (LORA[family] if lora else {})


@each_method
def test_a_fresh_adapter_leaves_the_answers_as_they_were(family, method, lora):
    before = logits(tiny(family))
    after = logits(attached(family, **fields(method, family, lora)))
    assert (after - before).abs().max() <= 1e-6


@each_method
def test_gradients_reach_fusion_lora_and_head_and_nothing_else(family, method, lora):
    model = disturb(attached(family, **fields(method, family, lora))).train()
    model(**batch()).loss.backward()
    parts = {"layer_fusion": 0, "lora_": 0, "modules_to_save": 0}
    for name, parameter in model.named_parameters():
        part = next((part for part in parts if part in name), None)
        moved = parameter.grad is not None and parameter.grad.abs().sum() > 0
        # the bias of a head's keys cancels in the softmax over positions: no gradient in exact arithmetic
        idle = "qkv_bias" in name
        assert moved == (part is not None) or idle, name
        assert parameter.requires_grad == (part is not None), name
        if part is not None:
            parts[part] += parameter.numel()
    counts = count_trainable(model)
    assert counts == {
        "fusion": parts["layer_fusion"],
        "lora": parts["lora_"],
        "head": parts["modules_to_save"],
        "other": 0,
        "total": sum(parts.values()),
    }
    assert (parts["lora_"] > 0) == lora
    assert (parts["layer_fusion"] > 0) == (method != "last")


def test_only_what_trains_changes_in_a_step(family):
    model = attached(family, **LORA[family]).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


class Saved:
    """Counts what autograd keeps, by the size of the tensors."""

    def __init__(self):
        self.shapes = []

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def _pack(self, tensor):
        self.shapes.append(tuple(tensor.shape))
        return tensor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fusion_alone_builds_no_graph_in_the_backbone(family, checkpointing):
    model = attached(family, fusion="last")
    if checkpointing:
        model.enable_input_require_grads()  # what Trainer does for gradient checkpointing with peft
        model.base_model.model.gradient_checkpointing_enable()
    model.train()
    backbone = layer_of(model).backbone
    states = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    with Saved() as saved:
        model(**batch()).loss.backward()
    assert len(states) == DEPTH and not any(s.requires_grad for s in states)
    width = backbone.blocks[0].get_submodule("intermediate.dense" if family == "bert" else "mlp.gate_proj").out_features
    assert width == 2 * WIDTH
    assert not any(shape[-1:] == (width,) for shape in saved.shapes), "activations of a block's MLP were kept"


def test_with_lora_the_graph_goes_through_the_blocks(family):
    model = attached(family, **LORA[family]).train()
    with Saved() as saved:
        model(**batch()).loss.backward()
    assert any(shape[-1:] == (2 * WIDTH,) for shape in saved.shapes)


@pytest.mark.parametrize("method", ["dwatt", "scalar_mix", "deeper"])
def test_stop_gradient_leaves_lora_the_gradient_of_the_last_state(family, method):
    def gradients(**fields):
        model = disturb(attached(family, fusion=method, **LORA[family], **fields))
        seen = []

        def look(_, args, fused):
            for state in (args[1], fused):
                state.retain_grad()
                seen.append(state)

        layer_of(model).register_forward_hook(look)
        output = model(**batch())
        output.loss.backward()
        return output.logits, seen, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, (last, fused), every = gradients()
    assert not torch.allclose(last.grad, fused.grad)
    stopped, (last, fused), own = gradients(fusion_stop_gradient=True)
    assert torch.equal(plain, stopped)
    assert torch.equal(last.grad, fused.grad)
    assert own.keys() == every.keys()
    for name, gradient in own.items():
        if ".fusions." in name:
            assert torch.allclose(gradient, every[name], atol=1e-6), "the fusion itself learns as before"
    assert any(not torch.allclose(g, every[n]) for n, g in own.items() if "lora_" in n)


def test_stop_gradient_needs_lora():
    with pytest.raises(ValueError, match="fusion_stop_gradient=True keeps the fusion's gradients from LoRA"):
        FusionConfig(fusion_stop_gradient=True)


@pytest.mark.parametrize("head", ["token", "sequence"])
def test_a_frozen_backbone_stays_in_evaluation_mode(family, head):
    model = attached(family, head, model=tiny(family, head, dropout=0.5), fusion_dropout=0.1).train()
    backbone, layer = layer_of(model).backbone, layer_of(model)
    inside = [m for m in backbone.root.modules() if m is not layer and not any(m is f for f in layer.modules())]
    assert not any(m.training for m in inside)
    assert layer.training and all(m.training for m in layer.fusions.modules())
    heads = [m for n, m in model.named_modules() if n.endswith("modules_to_save.default")]
    assert heads and all(m.training for m in heads)
    model.eval()
    assert not any(m.training for m in model.modules())


def test_with_lora_the_backbone_follows_train(family):
    model = attached(family, **LORA[family]).train()
    assert all(block.training for block in layer_of(model).backbone.blocks)


def test_layer_states_of_a_frozen_backbone_do_not_depend_on_the_mode(family):
    model = attached(family, model=tiny(family, dropout=0.5))
    seen = []
    layer_of(model).register_forward_pre_hook(lambda m, args: seen.append([s for s in args[0] if s is not None]))
    for mode in (True, False):
        model.train(mode)
        model(**batch())
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_taps_read_what_transformers_reports_as_hidden_states(family):
    model = tiny(family)
    reported = model(**batch(), output_hidden_states=True).hidden_states
    model = attached(family, model=model, fusion_layers=list(range(DEPTH + 1)))
    seen = []
    layer_of(model).register_forward_pre_hook(lambda m, args: seen.extend(args[0]))
    logits(model)
    assert len(seen) == len(reported) == DEPTH + 1
    for i, (ours, theirs) in enumerate(zip(seen, reported, strict=True)):
        if i == DEPTH and family == "llama":  # theirs is after the final norm
            theirs_before = model.base_model.model.model.norm(ours)
            torch.testing.assert_close(theirs_before, theirs)
        else:
            torch.testing.assert_close(ours, theirs)


def test_embeddings_given_by_the_caller(family):
    model = without_dropout(disturb(attached(family)))
    expected, gradients = logits(model), []
    for mode in (False, True):
        model.train(mode)
        given = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        answer = model(inputs_embeds=given, attention_mask=batch()["attention_mask"]).logits
        assert torch.equal(answer, expected)
        answer.square().sum().backward()
        assert given.grad.abs().sum() > 0, "a gradient that the caller asked for was cut off"
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
def test_a_model_without_a_head(family, lora, tmp_path):
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    base = tiny(family).base_model
    before = base(**inputs).last_hidden_state
    model = get_peft_model(base, FusionConfig(**(LORA[family] if lora else {}))).eval()
    torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=0, atol=1e-6)
    expected = disturb(model)(**inputs).last_hidden_state
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(family).base_model, tmp_path)
    assert torch.equal(again(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("fields", ["tokens", "whole", "lora"])
def test_trained_embeddings_count_as_training_inside_the_backbone(family, fields):
    name = {"bert": "word_embeddings", "llama": "embed_tokens"}[family]
    options = {
        "tokens": {"trainable_token_indices": {name: [1, 2]}},
        "whole": {"modules_to_save": [name]},
        "lora": {"r": 4, "target_modules": [name]},
    }
    model = disturb(attached(family, **options[fields])).train()
    assert layer_of(model).backbone.blocks[0].training
    inputs = batch()
    inputs["input_ids"][0, :2] = torch.tensor([1, 2])
    model(**inputs).loss.backward()
    kinds = {"tokens": "trainable_tokens_delta", "whole": f"{name}.modules_to_save", "lora": "lora_embedding"}
    trained = [p for n, p in model.named_parameters() if kinds[fields] in n and p.requires_grad]
    assert trained and all(p.grad.abs().sum() > 0 for p in trained)


def test_only_the_wanted_layers_are_kept_and_none_after_the_pass(family):
    model = attached(family, fusion_layers=[1, -1])
    seen = []
    layer_of(model).register_forward_pre_hook(lambda m, args: seen.extend(i for i, s in enumerate(args[0]) if s is not None))
    logits(model)
    assert seen == [1, DEPTH]
    assert layer_of(model).taps.held == 0


ABSORBING = [name for name, fields in METHODS.items() if FUSIONS[fields["fusion"]].absorbs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_answers_without_a_graph_are_those_with_one(family, method, dtype):
    model = disturb(attached(family, model=tiny(family, dtype=dtype), **METHODS[method])).eval()
    with_graph = model(**batch()).logits
    assert torch.equal(logits(model), with_graph)


@pytest.mark.parametrize("method", METHODS)
def test_inference_keeps_what_the_fusion_needs_of_a_state_and_not_the_state(family, method):
    model = attached(family, **METHODS[method])
    blocks, alive, counted = layer_of(model).backbone.blocks, [], []

    def look(block, args, output):
        alive.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    for block in blocks[:-2]:
        block.register_forward_hook(look)
    blocks[-1].register_forward_pre_hook(lambda *_: counted.append(sum(state() is not None for state in alive)))
    logits(model)
    layers = set(layer_of(model).active_fusion.layers)
    assert counted == [0 if method in ABSORBING else len(layers & set(range(1, DEPTH - 1)))]
    alive.clear()
    # whoever waits for the fusion's call is served, from whole states
    calls = []
    layer_of(model).active_fusion.register_forward_hook(lambda m, args, output: calls.append(args[0]))
    expected = logits(model)
    assert len(calls) == 1 and torch.equal(expected, logits(model))


def test_depth_weights_come_on_request(family):
    model = disturb(attached(family, fusion_heads=2))
    weights = depth_weights(model, **batch())
    assert weights.shape == (2, 9, 2, DEPTH)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9, 2))
    assert depth_weights(attached(family, fusion_heads=1), **batch()).shape == (2, 9, DEPTH)
    assert layer_of(model).calls.here.recording is None
    with pytest.raises(ValueError, match="Methods that do: dwatt, dwconcat, scalar_mix, attnres, laya"):
        depth_weights(attached(family, fusion="concat"), **batch())
    with pytest.raises(ValueError, match="no active fusion"):
        depth_weights(tiny(family), **batch())


def test_a_hooked_model_can_be_copied_and_pickled(family):
    model = disturb(attached(family, **LORA[family]))
    expected = logits(model)
    clone = copy.deepcopy(model)
    disturb(model, scale=0.5)
    assert torch.equal(logits(clone), expected), "the copy's hooks point at the old model"
    assert not torch.equal(logits(model), expected)
    buffer = io.BytesIO()
    torch.save(clone, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), expected)


@pytest.mark.parametrize("copied", [False, True])
def test_deeper_refuses_a_cache_that_hides_positions_and_generates_without(copied):
    model = disturb(attached("llama", "lm", fusion="deeper", fusion_copy_last=copied))
    prompt = {"input_ids": torch.randint(1, 100, (1, 5)), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**prompt, use_cache=True)
    assert model.generate(**prompt, use_cache=False).shape == (1, 8)


def test_deeper_copy_starts_as_the_last_block_twice():
    model = tiny("bert")
    blocks = model.bert.encoder.layer
    preset = FusionConfig.paper("deeper", fusion_copy_last=True)
    ours = logits(
        attached(
            "bert",
            model=copy.deepcopy(model),
            **{k: v for k, v in vars(preset).items() if k.startswith("fusion") and v is not None},
        )
    )
    blocks.append(copy.deepcopy(blocks[-1]))
    torch.testing.assert_close(ours, logits(model))


def test_paper_preset_has_the_published_count():
    config = FusionConfig.paper("dwatt", task_type="TOKEN_CLS")
    assert (config.fusion_heads, config.fusion_scale, config.fusion_bottleneck, config.fusion_init) == (
        1,
        False,
        0.5,
        "paper",
    )
    assert FusionConfig.paper("dwatt", fusion_heads=4).fusion_heads == 4
    assert {FusionConfig.paper(name).fusion for name in FUSIONS} == set(FUSIONS)
