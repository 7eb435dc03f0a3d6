"""`fusion="shortcut"`: the maps come from a folder once, never train, and ship with the adapter; folders that do not fit are refused."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import LORA, attached, batch, disturb, layer_of, logits, tiny
from support_shortcuts import fitted, rows_of_tokens, states_of

from fusion_adapters import FusionConfig, count_trainable, depth_weights, quantization_config
from fusion_adapters.shortcuts import Shortcut, ShortcutSet, save_shortcuts
from fusion_adapters.tuner.budget import fit_budget

PAIRS = [("bert", "none"), ("llama", "rms")]


def folder_of(tmp_path, family="llama", head="token", name="shortcuts", model=None, **options):
    """Shortcuts of a tiny model, saved; returns the folder and them."""
    model = tiny(family, head) if model is None else model
    shortcuts = fitted(model, **{"fused": None, "ridge": 1e-3, **options})
    save_shortcuts(shortcuts, model, tmp_path / name)
    return str(tmp_path / name), shortcuts


def fusion_of(model):
    return layer_of(model).fusions["default"]


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize(("family", "norm"), PAIRS)
def test_a_fresh_adapter_is_the_identity_and_its_casts_are_the_shortcuts(tmp_path, family, norm, rank):
    folder, shortcuts = folder_of(tmp_path, family, rank=rank)
    model = attached(family, fusion="shortcut", fusion_shortcuts=folder)
    torch.testing.assert_close(logits(model), logits(tiny(family)), rtol=0, atol=1e-6)
    fusion = fusion_of(model)
    assert fusion.norm == norm and fusion.map_rank == model.peft_config["default"].fusion_map_rank == (rank or 32)
    states = states_of(tiny(family), rows_of_tokens(3))
    for index, layer in enumerate((1, 2, 3)):
        torch.testing.assert_close(fusion.cast(index, states[layer]), shortcuts.get(layer)(states), rtol=1e-5, atol=1e-5)
    assert fusion.cast(3, states[4]) is states[4]


@pytest.mark.parametrize(("family", "norm"), PAIRS)
def test_the_fused_state_is_the_equation_over_the_shortcuts(tmp_path, family, norm):
    folder, shortcuts = folder_of(tmp_path, family)
    model = disturb(attached(family, fusion="shortcut", fusion_shortcuts=folder))
    fusion, alpha = fusion_of(model), model.peft_config["default"].alpha
    states = states_of(tiny(family), rows_of_tokens(3))

    def seen(state):
        return state / (state.square().mean(-1, keepdim=True) + 1e-8).sqrt() if norm == "rms" else state

    last, share = states[4], (alpha * fusion.logits).softmax(0)
    mixed = sum(w * seen(shortcuts.get(i)(states) if i < 4 else last) for w, i in zip(share, (1, 2, 3, 4), strict=True))
    update = alpha * fusion.gain * (mixed - seen(last))
    expected = last + (update * (last.square().mean(-1, keepdim=True) + 1e-8).sqrt() if norm == "rms" else update)
    torch.testing.assert_close(fusion([states[i] for i in (1, 2, 3, 4)], last), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_maps_do_not_train_and_do_not_count(tmp_path, family, lora):
    folder, _ = folder_of(tmp_path, family, rank=6)
    model = attached(family, fusion="shortcut", fusion_shortcuts=folder, **(LORA[family] if lora else {}))
    assert count_trainable(model)["fusion"] == 4 + 32
    before = {n: b.clone() for n, b in fusion_of(model).named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sorted(before) == ["map_bias", "map_down", "map_up"]
    assert all(torch.equal(b, before[n]) for n, b in fusion_of(model).named_buffers())
    assert fusion_of(model).gain.abs().max() > 0 and fusion_of(model).logits.abs().max() > 0


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_loads_without_the_folder(tmp_path, family, rank):
    folder, _ = folder_of(tmp_path, family, rank=rank)
    model = disturb(attached(family, fusion="shortcut", fusion_shortcuts=folder, **LORA[family]))
    expected = logits(model)
    plain = disturb(attached(family, fusion="shortcut", **LORA[family]))
    assert (logits(plain) - expected).abs().max() > 1e-3, "the maps take no part"
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(folder)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["fusion_shortcuts"] is None and said["fusion_map_rank"] == (rank or 32)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    maps = {name.rpartition(".")[2]: t.shape for name, t in tensors.items() if ".map_" in name}
    assert maps["map_bias"] == (3, 32) and maps.get("map_weight", (3, 32, 32)) == (3, 32, 32)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter", **options)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny(family), tmp_path / "again")), expected, rtol=0, atol=1e-6
    )
    bare = tiny(family)
    bare.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(bare), expected, rtol=0, atol=1e-6)
    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def test_damage_to_a_map_is_noticed_at_load(tmp_path):
    from safetensors.torch import save_file

    folder, _ = folder_of(tmp_path)
    attached("llama", fusion="shortcut", fusion_shortcuts=folder).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("map_weight"))
    save_file({**tensors, name: tensors[name] + 1}, file)
    with pytest.raises(ValueError, match="not those that it was saved with"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing \(\S*map_weight\)"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")


def test_a_config_goes_to_several_models_and_says_afterwards_what_it_said_before(tmp_path):
    folder, _ = folder_of(tmp_path)
    config = FusionConfig(fusion="shortcut", fusion_shortcuts=folder, task_type="TOKEN_CLS")
    first, second = (get_peft_model(tiny("llama"), config) for _ in range(2))
    assert (config.fusion_shortcuts, config.fusion_map_rank) == (folder, None)
    assert torch.equal(fusion_of(first).map_weight, fusion_of(second).map_weight)
    assert fusion_of(first).map_weight.abs().max() > 0


def test_layers_and_the_depth_of_a_fusion_choose_the_maps(tmp_path):
    folder, shortcuts = folder_of(tmp_path, pairs="all")
    model = attached("llama", fusion="shortcut", fusion_shortcuts=folder, fusion_layers=[0, 2, -1])
    fusion = fusion_of(model)
    assert (fusion.layers, fusion.mapped, len(fusion.map_weight)) == ((0, 2, 4), (0, 2), 2)
    assert torch.equal(fusion.map_weight[1], shortcuts.get(2, 4).weight)
    lower = attached("llama", fusion="shortcut", fusion_shortcuts=folder, fusion_depth=3)
    fusion = fusion_of(lower)
    assert (fusion.layers, fusion.mapped) == ((1, 2, 3), (1, 2))
    assert torch.equal(fusion.map_weight[0], shortcuts.get(1, 3).weight)
    disturb(lower).save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(lower), rtol=0, atol=1e-6)


def test_weights_over_depth_can_be_looked_at(tmp_path):
    folder, _ = folder_of(tmp_path)
    model = disturb(attached("llama", fusion="shortcut", fusion_shortcuts=folder))
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    weights = depth_weights(model, **inputs)
    assert weights.shape == (2, 9, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))


def test_a_budget_counts_what_trains(tmp_path):
    folder, _ = folder_of(tmp_path)
    config = FusionConfig(fusion="shortcut", fusion_shortcuts=folder)
    assert fit_budget(config, tiny("llama"), 36).fusion == "shortcut"
    with pytest.raises(ValueError, match="'shortcut', which has no width to choose, trains 36"):
        fit_budget(config, tiny("llama"), 35)


def test_half_precision_and_8_bits(tmp_path):
    base = tiny("llama", width=64)
    base.save_pretrained(tmp_path / "base")
    folder, _ = folder_of(tmp_path, model=base)
    half = attached("llama", model=tiny("llama", width=64, dtype=torch.bfloat16), fusion="shortcut", fusion_shortcuts=folder)
    assert fusion_of(half).map_weight.dtype == torch.float32 and logits(disturb(half)).isfinite().all()
    pytest.importorskip("bitsandbytes")
    load = {
        "num_labels": 5,
        "quantization_config": quantization_config(8),
        "dtype": torch.float32,
        "device_map": {"": "cpu"},
    }
    eight = type(base).from_pretrained(tmp_path / "base", **load)
    model = disturb(attached("llama", model=eight, fusion="shortcut", fusion_shortcuts=folder))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base", **load), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_the_card_tells_maps_from_parameters(tmp_path):
    folder, _ = folder_of(tmp_path)
    attached("llama", fusion="shortcut", fusion_shortcuts=folder).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| fusion | 36 |" in card and f"| fixed maps | {3 * 33 * 32:,} |" in card


def refused(tmp_path, message, error=ValueError, model=None, **fields):
    model = tiny("llama") if model is None else model
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        attached("llama", model=model, **{"fusion": "shortcut", **fields})
    assert [name for name, _ in model.named_modules()] == names, "a refused adapter left something behind"


def test_folders_that_do_not_fit_are_refused_with_the_remedy(tmp_path):
    folder, _ = folder_of(tmp_path)
    refused(tmp_path, r"holds no shortcuts.*shortcuts fit RECIPE", FileNotFoundError, fusion_shortcuts=str(tmp_path / "no"))
    refused(
        tmp_path,
        "fitted on a backbone of the same shape but with other weights",
        model=tiny("llama", seed=1),
        fusion_shortcuts=folder,
    )
    refused(tmp_path, "hidden size 32 with 4 blocks", model=tiny("llama", depth=3), fusion_shortcuts=folder)
    refused(tmp_path, "fitted on a 'llama', and this is a 'bert'", model=tiny("bert"), fusion_shortcuts=folder)
    few, _ = folder_of(tmp_path, name="few", sources=[1, 3])
    refused(
        tmp_path,
        r"no 'mat' to layer 4 from layer 2,.*some from: 1, 3.*fusion_layers.*sources=\[1, 2, 3\]",
        fusion_shortcuts=few,
    )
    attached("llama", fusion="shortcut", fusion_shortcuts=few, fusion_layers=[1, 3, 4])
    refused(tmp_path, r"no 'mat' to layer 3 from layer 1, 2.*pairs='all'", fusion_shortcuts=folder, fusion_depth=3)
    refused(
        tmp_path, "fusion_map_rank=8, and the shortcuts in .* are of rank 32", fusion_shortcuts=folder, fusion_map_rank=8
    )
    refused(tmp_path, r"fusion_map_rank=8 asks for maps.*fusion_shortcuts='FOLDER'.*from_pretrained", fusion_map_rank=8)
    lora = disturb(get_peft_model(tiny("llama"), LoraConfig(**LORA["llama"])))
    shortcuts = fitted(lora, fused=None, ridge=1e-3)
    save_shortcuts(shortcuts, lora, tmp_path / "lora")
    refused(tmp_path, r"fitted with adapters in the backbone \(default\)", fusion_shortcuts=str(tmp_path / "lora"))
    mixed = ShortcutSet([Shortcut(32, [i], 4, rank=r) for i, r in ((1, None), (2, 3), (3, 3))], 32, 4)
    save_shortcuts(mixed, tiny("llama"), tmp_path / "mixed")
    refused(tmp_path, "differ in rank or bias", fusion_shortcuts=str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="names maps for fusion='shortcut', and this is 'dwatt'"):
        FusionConfig(fusion="dwatt", fusion_shortcuts=folder)


@pytest.mark.parametrize("damage", ["weights", "names", "maps"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder, _ = folder_of(tmp_path)
    config, weights = (tmp_path / "shortcuts" / name for name in ("shortcuts.json", "shortcuts.safetensors"))
    said = json.loads(config.read_text())
    if damage == "weights":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "names":
        del said["digest"]
    else:
        said["maps"] = [{"kind": "mat"}]
    config.write_text(json.dumps(said))
    message = {"weights": "damaged, or was replaced", "names": "does not say 'digest'", "maps": "is damaged"}[damage]
    refused(tmp_path, message, fusion_shortcuts=folder)


def test_a_saved_config_alone_brings_no_maps(tmp_path):
    folder, _ = folder_of(tmp_path)
    attached("llama", fusion="shortcut", fusion_shortcuts=folder).save_pretrained(tmp_path / "adapter")
    config = FusionConfig.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"asks for maps.*PeftModel.from_pretrained"):
        get_peft_model(tiny("llama"), copy.deepcopy(config))


def test_an_encoder_decoder_takes_the_method_without_maps(tmp_path):
    from families import FAMILIES, attach

    folder, _ = folder_of(tmp_path)
    attach("t5", "seq2seq", fusion="shortcut")
    with pytest.raises(ValueError, match="for models of one stack"):
        attach("t5", "seq2seq", model=FAMILIES["t5"].build("seq2seq"), fusion="shortcut", fusion_shortcuts=folder)
