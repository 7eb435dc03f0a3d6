"""What peft asks of every method: names, saving, loading.

In turn, each family once; or where the method matters, all of them in four families.

The numbers are those of the list of thirty behaviours in CONTRIBUTING.md; behaviours that need more than a pair are tested
in the files that CONTRIBUTING.md names.
"""

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
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from support import METHODS, disturb
from support_conformance import TURNS, config_of, every_method, in_turn

from fusion_adapters import FusionConfig
from fusion_adapters.tuner import fusion_layers

REGRESSION = sorted(
    p for p in (Path(__file__).parents[1] / "regression").glob("*/*") if (p / "adapter_config.json").is_file()
)


def test_a_turn_has_every_method_with_lora_and_without():
    assert {(method, lora) for _, method, lora in TURNS} == set(itertools.product(METHODS, (False, True)))
    assert {family for family, *_ in TURNS} == set(FAMILIES)


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


@pytest.mark.parametrize("by_transformers", [False, True], ids=["peft", "transformers"])
@pytest.mark.parametrize("folder", REGRESSION, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_30_adapters_of_earlier_versions_still_load(folder, by_transformers):
    family = {"bert": "bert", "llama": "llama", "t5": "t5-both"}[folder.name.rpartition("-")[2]]
    model = FAMILIES[family].build(first_head(family))
    with pytest.warns(UserWarning, match="holds no digest of its weights and options"):
        if by_transformers:
            model.load_adapter(str(folder))
        else:
            model = PeftModel.from_pretrained(model, folder)
    expected = load_file(folder / "answer.safetensors")["logits"]
    torch.testing.assert_close(answer(model, inputs(family, first_head(family))), expected, rtol=1e-5, atol=1e-5)
