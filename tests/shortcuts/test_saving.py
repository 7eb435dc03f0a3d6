"""Shortcuts as files: they come back whole, and onto the backbone that they were fitted on alone."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import LORA, attached, disturb, tiny
from support_shortcuts import fitted, rows_of_tokens, states_of

from fusion_adapters import quantization_config
from fusion_adapters.shortcuts import FUSED, MAT, Shortcut, load_shortcuts, save_shortcuts
from fusion_adapters.shortcuts.saving import CONFIG, WEIGHTS


@pytest.fixture(scope="module")
def model():
    return tiny("llama", "lm")


@pytest.fixture(scope="module")
def shortcuts(model):
    return fitted(model, sources=[1, 3], fused=[0], ridge=1e-3)


@pytest.fixture
def folder(tmp_path, model, shortcuts):
    save_shortcuts(shortcuts, model, tmp_path / "s", {"positions": 7})
    return tmp_path / "s"


def change(folder, **values):
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**said, **values}))


@pytest.mark.parametrize("options", [{}, {"rank": 5}, {"bias": False}, {"pairs": "all"}], ids=str)
def test_they_come_back_as_they_were(tmp_path, model, options):
    saved = fitted(model, sources=[0, 2], fused=[0], ridge=1e-3, **options)
    save_shortcuts(saved, model, tmp_path)
    again = load_shortcuts(tmp_path, tiny("llama", "lm"))
    assert [(s.kind, s.sources, s.target, s.rank) for s in again] == [(s.kind, s.sources, s.target, s.rank) for s in saved]
    states = states_of(model, rows_of_tokens(3))
    for a, b in zip(again, saved, strict=True):
        assert torch.equal(a(states), b(states))
        assert not any(p.requires_grad for p in a.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_the_configuration_can_be_read_by_people(folder):
    said = json.loads((folder / CONFIG).read_text())
    assert (said["model_type"], said["hidden_size"], said["num_layers"]) == ("llama", 32, 4)
    assert said["notes"] == {"positions": 7} and said["adapters"] == ["none", "none"]
    assert said["maps"][1] == {"kind": MAT, "sources": [3], "target": 4, "rank": None, "bias": True}
    assert said["maps"][2] == {"kind": FUSED, "sources": [0, 1], "target": 4, "rank": None, "bias": True}


def test_another_head_another_dtype_and_8_bits_are_the_same_backbone(folder, shortcuts, tmp_path):
    base = tiny("llama", "lm", width=64)
    saved = fitted(base, sources=[2], fused=None, ridge=1e-3)
    save_shortcuts(saved, base, tmp_path / "wide")
    base.save_pretrained(tmp_path / "base")
    assert len(load_shortcuts(folder, tiny("llama", "lm").bfloat16())) == len(shortcuts)
    assert len(load_shortcuts(folder, tiny("llama", "lm").model)) == len(shortcuts)
    pytest.importorskip("bitsandbytes")
    eight = type(base).from_pretrained(
        tmp_path / "base", quantization_config=quantization_config(8), dtype=torch.float32, device_map={"": "cpu"}
    )
    assert any(not p.is_floating_point() for p in eight.parameters()), "nothing was quantised"
    assert len(load_shortcuts(tmp_path / "wide", eight)) == 1
    own = fitted(eight, sources=[2], fused=None, ridge=1e-3).get(2)
    assert (own.weight - saved.get(2).weight).norm() < 0.1 * own.weight.norm()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny("bert", "mlm"), "fitted on a 'llama', and this is a 'bert'"),
        (lambda: tiny("llama", "lm", width=64), "of hidden size 32 with 4 blocks; this one has hidden size 64"),
        (lambda: tiny("llama", "lm", depth=3), r"hidden size 32 with 4 blocks; this one has hidden size 32 and 3 blocks"),
        (lambda: tiny("llama", "lm", seed=1), r"same shape but with other weights: .* tensors .*or fit them anew"),
        (lambda: tiny("llama", "lm", rope_parameters={"rope_theta": 7.0, "rope_type": "default"}), "another configuration"),
    ],
    ids=["type", "width", "depth", "weights", "configuration"],
)
def test_another_backbone_is_refused_and_the_right_one_asked_for(folder, other, message):
    with pytest.raises(ValueError, match=message) as error:
        load_shortcuts(folder, other())
    assert "they were fitted on" in str(error.value)


def test_shortcuts_are_not_saved_with_a_backbone_that_is_not_theirs(tmp_path, shortcuts):
    with pytest.raises(ValueError, match="hidden size 32 with 4 blocks; this one has hidden size 64"):
        save_shortcuts(shortcuts, tiny("llama", "lm", width=64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_and_half_a_pair_are_told(tmp_path, folder, model):
    with pytest.raises(FileNotFoundError, match=r"holds no shortcuts.*shortcuts fit RECIPE.yaml"):
        load_shortcuts(tmp_path, model)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="holds no shortcuts"):
        load_shortcuts(folder, model)


def test_a_file_of_a_later_version_asks_for_that(folder, model):
    change(folder, format=2)
    with pytest.raises(ValueError, match=r"format 2, and this version .* reads format 1.*pip install -U"):
        load_shortcuts(folder, model)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_any_byte_of_the_weights_that_changes_is_noticed(folder, model, at):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[at] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"is not the file that shortcuts.json was written for.*Copy both again"):
        load_shortcuts(folder, model)


def test_weights_of_another_save_are_noticed(folder, model, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 2 * t for name, t in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="damaged, or was replaced"):
        load_shortcuts(folder, model)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 1}', '{"format": 1, "maps": []}'])
def test_a_damaged_configuration_is_named(folder, model, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"shortcuts.json' is damaged.*fit the shortcuts anew"):
        load_shortcuts(folder, model)


@pytest.mark.parametrize(
    "maps",
    [
        [{"kind": "mat"}],
        [{"kind": "mat", "sources": [4], "target": 1, "rank": None, "bias": True}],
        [{"kind": "mat", "sources": [1], "target": 9, "rank": None, "bias": True}],
        [{"kind": "mat", "sources": "x", "target": 4, "rank": None, "bias": True}],
        ["x"],
    ],
    ids=["keys", "order", "range", "words", "kind"],
)
def test_maps_that_cannot_be_are_named(folder, model, maps):
    change(folder, maps=maps)
    with pytest.raises(ValueError, match=r"shortcuts\.json' is damaged"):
        load_shortcuts(folder, model)


def test_maps_that_the_weights_do_not_hold_are_named(folder, model):
    change(folder, maps=json.loads((folder / CONFIG).read_text())["maps"][:1])
    with pytest.raises(ValueError, match=r"does not hold what shortcuts.json says.*Copy both again"):
        load_shortcuts(folder, model)


def test_a_fusion_that_is_attached_changes_nothing(folder, tmp_path, shortcuts):
    model = disturb(attached("llama", "lm", fusion="dwatt"))
    assert len(load_shortcuts(folder, model)) == len(shortcuts)
    save_shortcuts(shortcuts, model, tmp_path / "again")
    assert len(load_shortcuts(tmp_path / "again", tiny("llama", "lm"))) == len(shortcuts)


def test_lora_in_the_blocks_is_what_shortcuts_were_fitted_with_or_they_are_refused(folder, tmp_path):
    lora = disturb(get_peft_model(tiny("llama", "lm"), LoraConfig(**LORA["llama"])))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"then active: none; now: default.*disable_adapter"):
        load_shortcuts(folder, lora)
    with lora.disable_adapter():
        load_shortcuts(folder, lora)
    save_shortcuts(fitted(lora, sources=[2], fused=None, ridge=1e-3), lora, tmp_path / "own")
    with pytest.raises(ValueError, match=r"then active: default; now: none.*Load and activate the adapter"):
        load_shortcuts(tmp_path / "own", tiny("llama", "lm"))
    again = PeftModel.from_pretrained(tiny("llama", "lm"), tmp_path / "lora", adapter_name="other")
    load_shortcuts(tmp_path / "own", again)
    load_shortcuts(
        tmp_path / "own",
        PeftModel.from_pretrained(tiny("llama", "lm").bfloat16(), tmp_path / "lora", autocast_adapter_dtype=False),
    )
    disturb(lora)
    with pytest.raises(ValueError, match=r"other weights of adapters.*fit them anew"):
        load_shortcuts(tmp_path / "own", lora)


def test_lora_beside_a_fusion_counts_as_lora(folder, tmp_path):
    model = disturb(attached("llama", "lm", fusion="dwatt", **LORA["llama"]))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="LoRA in the blocks is part of the states"):
        load_shortcuts(folder, model)
    save_shortcuts(fitted(model, sources=[2], fused=None, ridge=1e-3), model, tmp_path / "own")
    load_shortcuts(tmp_path / "own", model)


@pytest.mark.parametrize("kind", ["kl.2", " "])
def test_a_kind_that_could_not_be_a_name_in_the_file_is_refused(kind):
    with pytest.raises(ValueError, match="without a dot"):
        Shortcut(8, [1], 2, kind=kind)
