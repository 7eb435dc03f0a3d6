"""What peft asks of every method: in turn, each family once, or where the method matters, all of them in four families.

The numbers are those of the list of thirty behaviours in CONTRIBUTING.md; behaviours that need more than a pair are tested
in the files that CONTRIBUTING.md names.
"""

import copy
import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, answer, attach, first_head, inputs
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from support import METHODS, disturb

from fusion_adapters import FusionConfig
from fusion_adapters.tuner import FusionLayer, fusion_layers

# each family once, the methods and LoRA in turn: each method twice, with LoRA and without
ROUNDS = [(method, (number + turn) % 2 == 1) for turn in (0, 1) for number, method in enumerate(METHODS)]
TURNS = [(family, *pair) for family, pair in zip(FAMILIES, itertools.cycle(ROUNDS))]
# besides, every method in four families, in two of them with LoRA
EVERY = [
    (family, method, (number + turn) % 2 == 1)
    for turn, family in enumerate(("bert", "gpt2", "llama", "t5-both"))
    for number, method in enumerate(METHODS)
]
REGRESSION = sorted(
    p for p in (Path(__file__).parents[1] / "regression").glob("*/*") if (p / "adapter_config.json").is_file()
)
in_turn = pytest.mark.parametrize(("family", "method", "lora"), TURNS)
every_method = pytest.mark.parametrize(("family", "method", "lora"), list(dict.fromkeys([*TURNS, *EVERY])))


def test_a_turn_has_every_method_with_lora_and_without():
    assert {(method, lora) for _, method, lora in TURNS} == set(itertools.product(METHODS, (False, True)))
    assert {family for family, *_ in TURNS} == set(FAMILIES)


@pytest.fixture
def make(family, method, lora):
    """Builds the pair's model with an adapter of its own, moved off the identity."""

    def build(name="default", model=None, **fields):
        return disturb(attach(family, lora=lora, model=model, name=name, **{**METHODS[method], **fields}))

    return build


@pytest.fixture
def plain(family):
    """Builds the pair's model without adapter."""
    return lambda: FAMILIES[family].build(first_head(family))


@pytest.fixture
def batch(family):
    return inputs(family, first_head(family))


def config_of(family, method, lora, **fields):
    spec = FAMILIES[family]
    if lora:
        fields = {"r": 4, "target_modules": spec.lora, **fields}
    return FusionConfig(**spec.fields(first_head(family), **{**METHODS[method], **fields}))


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def structure(model):
    """All that a failing call could leave changed."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    return list(model.state_dict()), trains, hooks, sorted(model.peft_config), list(model.active_adapters)


@every_method
def test_1_2_names(make, family, method, lora):
    model = make("mine")
    assert all(callable(getattr(model, n)) for n in ("save_pretrained", "from_pretrained", "push_to_hub"))
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains or method == "last"
    assert all(".mine." in n or n.endswith(".mine") for n in trains)


@every_method
def test_5_6_7_what_is_saved(make, plain, batch, family, method, lora, tmp_path):
    base = plain()
    base.config._name_or_path = base.name_or_path = "somebody/backbone"
    model = make(model=base)
    model.save_pretrained(tmp_path)
    written = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {p.name for p in tmp_path.iterdir()} == written
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: somebody/backbone" in card
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/backbone"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = PeftModel.from_pretrained(plain(), tmp_path)
    assert set(get_peft_model_state_dict(again)) == set(get_peft_model_state_dict(model))
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(get_peft_model_state_dict(again)[name], tensor), name
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(answer(again, batch), answer(model, batch), rtol=0, atol=1e-6)  # 16


@pytest.mark.parametrize("family", ["bert", "t5-both"])
def test_5_the_older_format_is_read_too(family, tmp_path):
    model = disturb(attach(family, lora=True))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / "adapter_model.safetensors").exists()
    batch = inputs(family, first_head(family))
    again = PeftModel.from_pretrained(FAMILIES[family].build(first_head(family)), tmp_path)
    torch.testing.assert_close(answer(again, batch), answer(model, batch), rtol=0, atol=1e-6)


@in_turn
def test_8_9_adapters_with_names_inside_names(make, plain, batch, family, method, lora, tmp_path):
    names = ("mine", "mine2", "other_mine", "foomine_bar", "in")
    model = make(names[0])
    for i, name in enumerate(names[1:]):
        model.add_adapter(name, config_of(family, method, lora))
        model.set_adapter(name)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    answers = {}
    for name in names:
        model.set_adapter(name)
        answers[name] = answer(model, batch)
    model.save_pretrained(tmp_path, selected_adapters=list(names[:-1]))
    assert not (tmp_path / names[-1]).exists()
    sizes = {len(load_file(tmp_path / name / "adapter_model.safetensors")) for name in names[:-1]}
    assert len(sizes) == 1, "an adapter's file holds tensors of another"
    for name in names[:-1]:
        again = PeftModel.from_pretrained(plain(), tmp_path / name)
        torch.testing.assert_close(answer(again, batch), answers[name], rtol=0, atol=1e-6)


@in_turn
def test_10_11_loading(make, plain, batch, family, method, lora, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    config = FusionConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain(), tmp_path, config=config)
    assert again.peft_config["default"] is config and config.inference_mode
    expected = answer(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        for name in ("second", "third"):
            again.load_adapter(tmp_path, name)
    for name in ("default", "second", "third"):
        again.set_adapter(name)
        torch.testing.assert_close(answer(again, batch), expected, rtol=0, atol=1e-6)


@every_method
def test_4_low_memory(make, plain, batch, family, method, lora, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain(), tmp_path, low_cpu_mem_usage=True)
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in again.parameters())
    for name in ("default", "second"):
        again.set_adapter(name)
        torch.testing.assert_close(answer(again, batch), answer(model, batch), rtol=0, atol=1e-6)
    empty = inject_adapter_in_model(config_of(family, method, lora), plain(), low_cpu_mem_usage=True)
    fusion = [p for layer in fusion_layers(empty) for p in layer.fusions.parameters()]
    assert all(p.is_meta for p in fusion) or "copy" in method  # the block to copy is in memory


@in_turn
def test_29_low_level(plain, batch, family, method, lora):
    model = disturb(inject_adapter_in_model(config_of(family, method, lora), plain()))
    target = inject_adapter_in_model(config_of(family, method, lora), plain())
    assert not isinstance(target, PeftModel)
    loaded = set_peft_model_state_dict(target, get_peft_model_state_dict(model))
    assert not loaded.unexpected_keys
    torch.testing.assert_close(answer(target, batch), answer(model, batch), rtol=0, atol=1e-6)


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
    with pytest.raises(ValueError, match="one batch per adapter"):
        model.eval()(**batch, adapter_names=["default", "__base__"])
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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_17_layers_to_transform(family):
    def count(**fields):
        model = attach(family, lora=True, **fields)
        return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.requires_grad)

    pattern = {"bert": "layer", "gpt2": "h", "llama": "layers", "t5": "block"}[family]
    assert 0 < count(layers_to_transform=[0], layers_pattern=pattern) < count()


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_25_base_weights_go_out_and_in_under_their_own_names(family):
    plain = FAMILIES[family].build(first_head(family))
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = attach(family, lora=True, model=plain)
    taken = get_base_model_state_dict(model)
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], expected[name]) for name in expected)
    changed = {name: tensor + 1 for name, tensor in expected.items()}
    set_base_model_state_dict(model, changed)
    assert all(torch.equal(t, changed[name]) for name, t in get_base_model_state_dict(model).items())


@pytest.mark.parametrize("folder", REGRESSION, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_30_adapters_of_earlier_versions_still_load(folder):
    family = {"bert": "bert", "llama": "llama", "t5": "t5-both"}[folder.name.rpartition("-")[2]]
    model = PeftModel.from_pretrained(FAMILIES[family].build(first_head(family)), folder)
    expected = load_file(folder / "answer.safetensors")["logits"]
    torch.testing.assert_close(answer(model, inputs(family, first_head(family))), expected, rtol=1e-5, atol=1e-5)


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
