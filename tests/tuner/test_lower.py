"""`fusion_depth`: the fusion of the lower blocks, its answers, what trains, what is saved and where it loads."""

import copy
import threading

import pytest
import torch
from families import DEPTH, FAMILIES, answer, attach, inputs
from peft import PeftModel, get_peft_model
from support import attached, batch, disturb, layer_of, logits, tiny, without_dropout
from support_depth import PLACES, VOCABULARY, by_hand, places, running_parts, stacked

from fusion_adapters import FusionConfig, cut_model, use_adapter
from fusion_adapters.tuner import fusion_layers
from fusion_adapters.tuner.costs import count_config


@places
def test_skipping_is_what_a_shorter_list_of_blocks_does(family, head, depth):
    data = inputs(family, head)
    model = attach(family, head, fusion_depth=depth)
    (layer,) = fusion_layers(model)
    fresh = answer(model, data)
    disturb(model)
    with running_parts(model, layer.backbone) as calls:
        found = answer(model, data)
    shared = len(set(layer.backbone.blocks)) == 1  # ALBERT's one block
    assert [*calls.values()] == [depth if shared else int(number <= depth) for number in calls]
    assert not torch.equal(found, fresh)
    if stacked(family, head):
        return
    fusion = copy.deepcopy(layer.active_fusion)
    with model.disable_adapter():  # peft's copy of the head is not that of the model by hand
        assert (answer(model, data) - answer(FAMILIES[family].build(head), data)).abs().max() < 1e-6
    start = attach(family, head, fusion_depth=depth)
    (of_start,) = fusion_layers(start)
    of_start.fusions["default"].load_state_dict(fusion.state_dict())
    # relative, too: by hand DWAtt gets all states at once, and sums them in another order than as they come; T5's answers are large
    torch.testing.assert_close(answer(start, data), by_hand(family, head, fusion, depth, data), rtol=1e-6, atol=1e-6)


@places
def test_skipped_cut_and_reloaded_answer_alike(family, head, depth, tmp_path):
    if stacked(family, head):
        with pytest.raises(ValueError, match="more than one stack"):
            cut_model(FAMILIES[family].build(head), depth)
        return
    data, lora = inputs(family, head), depth % 2 == 1
    bare = answer(cut_model(FAMILIES[family].build(head), depth), data)
    fresh = attach(family, head, lora, fusion_depth=depth)
    assert (answer(fresh, data) - bare).abs().max() < 1e-6  # the identity
    model = disturb(fresh)
    expected = answer(model, data)
    model.save_pretrained(tmp_path / "whole")
    cut = PeftModel.from_pretrained(cut_model(FAMILIES[family].build(head), depth), tmp_path / "whole")
    torch.testing.assert_close(answer(cut, data), expected, rtol=0, atol=1e-6)

    trained = disturb(attach(family, head, lora, model=cut_model(FAMILIES[family].build(head), depth), fusion_depth=depth))
    trained.save_pretrained(tmp_path / "cut")
    again = PeftModel.from_pretrained(FAMILIES[family].build(head), tmp_path / "cut")
    torch.testing.assert_close(answer(again, data), answer(trained, data), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "head"), VOCABULARY)
def test_a_head_over_the_vocabulary_is_refused(family, head):
    with pytest.raises(ValueError, match="output layer over the vocabulary was made for the last block"):
        attach(family, head, fusion_depth=2)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "modernbert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    head = "sequence" if family == "t5" else "token"
    data = inputs(family, head)

    def gradients(checkpointing):
        model = without_dropout(disturb(attach(family, head, lora=True, fusion_depth=2))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**data).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, found = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "albert", "t5"])
def test_a_compiled_model_answers_alike(family):
    head = "sequence" if family == "t5" else "token"
    data = {k: v for k, v in inputs(family, head).items() if k != "labels"}
    model = disturb(attach(family, head, fusion_depth=2))
    torch._dynamo.reset()
    whole = family not in ("t5", "gpt2")
    found = answer(torch.compile(model, backend="eager", fullgraph=whole), data)
    torch.testing.assert_close(found, answer(model, data), rtol=1e-4, atol=1e-5)


def test_depths_and_adapters_of_one_model():
    model = attached("bert", fusion_depth=2)
    for name, depth in (("one", 1), ("all", None), ("most", 3)):
        model.add_adapter(name, FusionConfig(task_type="TOKEN_CLS", fusion_depth=depth, fusion_heads=1))
    expected = {}
    for name in ("default", "one", "all", "most"):
        model.set_adapter(name)
        expected[name] = logits(disturb(model))
        config = model.peft_config[name]
        assert config.fusion_num_layers == DEPTH and config.fusion_depth == {"default": 2, "one": 1, "most": 3}.get(name)
    bare = logits(tiny("bert"))
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    found, errors = {}, []

    def ask(name):
        try:
            with use_adapter(model, name):
                for _ in range(8):
                    found.setdefault(name, []).append(logits(model))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for name, answers in found.items():
        assert all(torch.equal(each, expected[name]) for each in answers), name
    model.delete_adapter("one")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected["default"])
    plain = model.unload()
    assert all("forward" not in block.__dict__ for block in plain.bert.encoder.layer)


def test_a_deeper_fusion_copies_the_last_block_that_runs():
    model = attached("llama", fusion_depth=3)  # skips the blocks that the next one copies
    config = FusionConfig(fusion="deeper", task_type="TOKEN_CLS", fusion_copy_last=True, fusion_num_blocks=1)
    model.add_adapter("other", config)
    copied = layer_of(model).fusions["other"]
    assert not any("forward" in module.__dict__ for module in copied.modules())
    lower = attached("llama", fusion="deeper", fusion_copy_last=True, fusion_num_blocks=1, fusion_depth=2)
    for copies, number in ((copied, 3), (layer_of(lower).fusions["default"], 1)):
        own = dict(tiny("llama").model.layers[number].named_parameters())
        name = "mlp.up_proj.weight"
        assert any(n.endswith(name) and torch.equal(p, own[name]) for n, p in copies.named_parameters())
    assert logits(lower).isfinite().all()


def test_lora_is_in_the_blocks_that_run_alone(tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}
    model = attached("llama", fusion_depth=2, **lora)
    inside = {
        n.split(".layers.")[1].split(".lora")[0] for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad
    }
    assert inside == {"0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"}
    without_dropout(disturb(model)).train()(**batch()).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].exclude_modules == {"0.self_attn.q_proj"} or list(
        model.peft_config["default"].exclude_modules
    ) == ["0.self_attn.q_proj"]
    again = PeftModel.from_pretrained(cut_model(tiny("llama"), 2), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{"r": 4, "target_modules": ["query", "dense"]}, {"r": 2, "target_modules": r".*\.(query|value)"}, {}]
)
def test_counts_know_the_depth(fields):
    for budget in ({}, {"fusion_budget": 20_000}, {"fusion_budget": "lora:r=16"}, {"fusion_budget": "dwatt-paper"}):
        if fields and isinstance(budget.get("fusion_budget"), str):
            continue
        config = FusionConfig(task_type="TOKEN_CLS", fusion_depth=0.5, **fields, **budget)
        whole = get_peft_model(tiny(), copy.deepcopy(config))
        cut = get_peft_model(cut_model(tiny(), 2), FusionConfig(task_type="TOKEN_CLS", fusion_depth=2, **fields, **budget))
        count = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        assert count == sum(p.numel() for p in cut.parameters() if p.requires_grad)
        assert count_config(config, tiny())["total"] == count


def test_a_fraction_becomes_a_number_and_layers_count_from_there():
    for given, depth in ((0.5, 2), (0.01, 1), (0.7, 3), (4, 4), (2.0, 2)):
        model = attached(fusion_depth=given)
        config = model.peft_config["default"]
        assert config.fusion_depth == depth and isinstance(config.fusion_depth, int)
        assert layer_of(model).active_fusion.layers == tuple(range(1, depth + 1))
    model = attached(fusion_depth=3, fusion_layers=[0, -1])
    assert layer_of(model).active_fusion.layers == (0, 3)
    assert layer_of(model).running.num_layers == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion_depth": 0}, "no depth"),
        ({"fusion_depth": 1.0}, "no depth"),
        ({"fusion_depth": 1.5}, "no depth"),
        ({"fusion_depth": True}, "no depth"),
        ({"fusion_depth": "half"}, "no depth"),
        ({"fusion_depth": 9}, "first 9 blocks of the backbone, and this one has 4"),
        ({"fusion_depth": 2, "fusion_layers": [1, 3]}, r"\[3\] lie above fusion_depth=2"),
        ({"fusion_depth": 2, "fusion_layers": [-4]}, "out of range"),
        ({"fusion_depth": 2, "r": 4, "target_modules": ["query"], "bias": "all"}, "bias='all'"),
        ({"fusion_depth": 2, "modules_to_save": ["layer.3.output.dense"]}, "blocks 3 to 4 do not run"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        attached(model=model, **fields)
    assert torch.equal(logits(model), logits(tiny())) and not fusion_layers(model)


def test_both_stacks_at_one_depth_are_refused():
    with pytest.raises(ValueError, match="the stacks have 4 and 3 blocks"):
        attach("bart", "sequence", fusion_depth=2, fusion_stack="both")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_blocks_that_run_are_those_that_are_compared(family, tmp_path):
    model = disturb(attached(family, fusion_depth=2, fusion_bottleneck=4))
    model.save_pretrained(tmp_path)

    def changed(number):
        other = tiny(family)
        blocks = other.bert.encoder.layer if family == "bert" else other.model.layers
        with torch.no_grad():
            for parameter in blocks[number].parameters():
                parameter.mul_(1.5)
        return other

    for above in (2, 3):
        again = PeftModel.from_pretrained(changed(above), tmp_path)
        assert torch.equal(logits(again), logits(model))
    for other in (changed(1), cut_model(changed(0), 2)):
        with pytest.raises(ValueError, match="of the same shape but with other weights"):
            PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match=r"reads the first 2 blocks .* and this one has 1"):
        PeftModel.from_pretrained(cut_model(tiny(family), 1), tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(cut_model(tiny(family), 3), tmp_path)), logits(model))
    other = attached(family, fusion_depth=3, fusion_layers=[1, 2], fusion_bottleneck=4)
    with pytest.raises(ValueError, match="fusion_depth is 2 there and 3 here"):
        other.load_adapter(tmp_path, "default")


def test_a_configuration_that_names_other_kinds_of_blocks_is_another(tmp_path):
    disturb(attach("gemma2", "token", fusion_depth=2)).save_pretrained(tmp_path)
    kinds = FAMILIES["gemma2"].build("token").config.layer_types
    above = FAMILIES["gemma2"].build("token", layer_types=[*kinds[:3], kinds[2]])
    PeftModel.from_pretrained(above, tmp_path)
    below = FAMILIES["gemma2"].build("token", layer_types=[kinds[1], *kinds[1:]])
    with pytest.raises(ValueError, match="layer_types"):
        PeftModel.from_pretrained(below, tmp_path)


def test_a_model_that_changes_states_between_blocks_is_refused():
    model = attached("bert", fusion_depth=2)
    blocks = model.base_model.model.bert.encoder.layer
    blocks[3].register_forward_pre_hook(lambda block, args: (args[0] + 1, *args[1:]))
    with pytest.raises(RuntimeError, match="changes the state between blocks 3 and 4"):
        logits(model)
    with model.disable_adapter():
        logits(model)
    assert layer_of(model).taps.open_calls == 0


def test_a_copy_skips_on_its_own():
    model = disturb(attached("bert", fusion_depth=2))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    blocks = twin.base_model.model.bert.encoder.layer
    assert blocks[3].forward.module is blocks[3] and blocks[3].forward.opener is layer_of(twin).taps


def test_families_are_covered():
    assert {family for family, *_ in PLACES} >= set(FAMILIES) - {
        "mamba",
        "t5-encoder",
        "bart-encoder",
        "t5-both",
        "bart-both",
    }
