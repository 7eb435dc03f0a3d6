"""What `verify` sees of damage, with and without the backbone: every problem, none of a sound adapter."""

import json
import random
import shutil
from pathlib import Path

import pytest
from families import FAMILIES, first_head
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import LORA, attached, disturb, tiny
from support_damage import (
    CONFIG,
    DAMAGE,
    HARMLESS,
    SEEN_WITHOUT,
    WEIGHTS,
    add_a_tensor,
    edit_config,
    put,
    rewrite,
    without_digest,
)

from fusion_adapters.cli import main
from fusion_adapters.runs.verifying import verify

REGRESSION = Path(__file__).parents[1] / "regression" / "0.1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model's folder, two adapters of it, a and b, and another base model of the same shape."""
    root = tmp_path_factory.mktemp("verify")
    tiny("bert").save_pretrained(root / "base")
    tiny("bert", seed=5).save_pretrained(root / "other")
    tiny("bert", width=64).save_pretrained(root / "wide")
    model_class = type(tiny("bert"))
    for name, heads in (("a", 4), ("b", 2)):
        model = attached(model=model_class.from_pretrained(root / "base"), fusion_heads=heads, **LORA["bert"])
        disturb(model, 0.1 * heads).save_pretrained(root / name)
    return root


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of the first adapter to damage; the second lies beside it."""
    for name in ("a", "b"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path / "a"


def test_a_sound_adapter_with_its_backbone(adapter, saved):
    verdict = verify(adapter, str(saved / "base"))
    assert not verdict.problems and not verdict.unchecked and not verdict.notes
    assert "loading: PeftModel.from_pretrained takes it" in verdict.checked
    inside = verdict.inside
    tensors = load_file(adapter / WEIGHTS)
    assert (
        inside["method"] == "dwatt"
        and inside["options"]["heads"] == 4
        and inside["lora"]["target_modules"] == ["query", "value"]
    )
    assert inside["parameters"]["total"] == sum(t.numel() for t in tensors.values()) and inside["parameters"]["lora"] > 0
    assert inside["parameters"]["dtypes"] == ["F32"] and inside["bytes"] == (adapter / WEIGHTS).stat().st_size
    assert inside["backbone"]["type"] == "bert" and inside["backbone"]["fingerprint"].startswith("v2:")
    json.dumps(verdict.as_json())


def test_without_the_backbone_its_configuration_is_enough_for_every_tensor(adapter, saved):
    verdict = verify(adapter)
    assert not verdict.problems and any(text.startswith("backbone: type, width and depth") for text in verdict.checked)
    assert any(f"{len(load_file(adapter / WEIGHTS))} tensors: names" in text for text in verdict.checked)
    (left,) = verdict.unchecked
    assert "fingerprint" in left and f"--backbone {saved / 'base'}" in left


@pytest.mark.parametrize("left", [{"base_model_name_or_path": "no/such-model"}, {"base_model_name_or_path": None}])
def test_without_a_configuration_the_fusion_alone_is_compared(adapter, left):
    edit_config(adapter, lambda values: values.update(left))
    verdict = verify(adapter)
    assert not verdict.problems and any(text.startswith("tensors of the fusion") for text in verdict.checked)
    assert len(verdict.unchecked) == 2 and verdict.unchecked[0].startswith(
        "head, LoRA" if None in left.values() else "head and LoRA"
    )
    rewrite(adapter / WEIGHTS, lambda tensors: tensors.pop("base_model.model.bert.layer_fusion.position"))
    without_digest(adapter)
    (problem,) = verify(adapter).problems
    assert "tensors are missing (position)" in problem


@pytest.mark.parametrize(
    ("name", "told"), [("other", "same shape but with other weights"), ("wide", "'bert' of hidden size 64 with 4 blocks")]
)
def test_another_backbone(adapter, saved, name, told):
    verdict = verify(adapter, str(saved / name))
    assert len(verdict.problems) == 1 and told in verdict.problems[0]


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if "option" not in kind])
def test_damage_is_seen_without_the_backbone(adapter, kind):
    DAMAGE[kind](adapter, random.Random(3))
    assert verify(adapter).problems


def test_an_option_that_was_changed_is_seen(adapter):
    edit_config(adapter, lambda values: values.update(lora_alpha=99))
    (problem,) = verify(adapter).problems
    assert "options in adapter_config.json" in problem


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_changes_no_answer_is_no_problem(adapter, saved, kind):
    HARMLESS[kind](adapter, random.Random(0))
    assert not verify(adapter, str(saved / "base")).problems


@pytest.mark.parametrize("kind", SEEN_WITHOUT)
def test_an_adapter_of_an_earlier_version_says_so_and_is_compared_as_far_as_it_goes(adapter, kind):
    without_digest(adapter)
    verdict = verify(adapter)
    assert not verdict.problems and any("as none did before version 0.2" in note for note in verdict.notes)
    assert any("digest" in text for text in verdict.unchecked) and "weights: finite" in verdict.checked
    SEEN_WITHOUT[kind](adapter, random.Random(0))
    assert verify(adapter).problems


def test_every_problem_is_told(adapter, saved):
    draw = random.Random(0)
    rewrite(adapter / WEIGHTS, lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    add_a_tensor(adapter, draw)
    put(float("nan"))(adapter, draw)
    edit_config(adapter, lambda values: values.update(fusion_heads=8))
    problems = verify(adapter, str(saved / "other")).problems
    wanted = [
        "options in adapter_config.json",
        "tensors are missing (classifier.bias)",
        "1 have no place",
        "weights of the adapter",
    ]
    assert len(problems) == 5 and all(
        any(text in problem for problem in problems) for text in [*wanted, "with other weights"]
    )
    edit_config(adapter, lambda values: values.update(r="4", fusion_scale=3))
    assert sorted(problem.partition("=")[0] for problem in verify(adapter).problems) == ["fusion_scale", "r"]


def test_what_is_no_adapter(adapter, tmp_path):
    assert "There is no adapter" in verify(tmp_path / "nowhere").problems[0]
    assert "(found: nothing)" in verify_empty(tmp_path / "empty").problems[0]
    (adapter / WEIGHTS).unlink()
    assert "There are no weights" in verify(adapter).problems[0]
    get_peft_model(tiny("bert"), LoraConfig(task_type="TOKEN_CLS", target_modules=["query"])).save_pretrained(
        tmp_path / "lora"
    )
    assert "is no fusion, its peft_type is 'LORA'" in verify(tmp_path / "lora").problems[0]
    (adapter / CONFIG).write_text("{")
    assert "cannot be read" in verify(adapter).problems[0]


def verify_empty(folder):
    folder.mkdir()
    return verify(folder)


@pytest.mark.parametrize("head", ["sequence", "lm"])
def test_heads_of_other_kinds_and_numbers(head, tmp_path):
    family = "llama"
    tiny(family, head, labels=3).save_pretrained(tmp_path / "base")
    model = attached(model=type(tiny(family, head)).from_pretrained(tmp_path / "base"), head=head, fusion="concat")
    model.save_pretrained(tmp_path / "adapter")
    verdict = verify(tmp_path / "adapter", str(tmp_path / "base"))
    assert not verdict.problems and not verdict.unchecked


@pytest.mark.parametrize(
    ("case", "family"), [("dwatt-bert", "bert"), ("dwatt-lora-llama", "llama"), ("concat-both-t5", "t5-both")]
)
def test_the_adapters_of_the_first_version(case, family, tmp_path):
    FAMILIES[family].build(first_head(family)).save_pretrained(tmp_path / "base")
    for backbone in (None, str(tmp_path / "base")):
        verdict = verify(REGRESSION / case, backbone)
        assert not verdict.problems and any("as none did before version 0.2" in note for note in verdict.notes)
        assert ("loading: PeftModel.from_pretrained takes it" in verdict.checked) is (backbone is not None)


def test_embeddings_that_peft_saved_beside_an_adapter_are_no_problem(tmp_path):
    tiny("llama", "lm").save_pretrained(tmp_path / "base")
    model = attached(model=type(tiny("llama", "lm")).from_pretrained(tmp_path / "base"), head="lm", **LORA["llama"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter" / WEIGHTS))
    assert not verify(tmp_path / "adapter", str(tmp_path / "base")).problems
    shutil.rmtree(tmp_path / "base")
    assert not verify(tmp_path / "adapter").problems


def test_from_the_shell(adapter, saved, capsys):
    main(["verify", str(adapter), "--backbone", str(saved / "base"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and not told["problems"] and told["inside"]["method"] == "dwatt"
    put(1.0)(adapter, random.Random(0))
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(adapter)])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "wrong: The weights of the adapter" in shown and "right: options" in shown and "not checked: " in shown
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(adapter), "--backbone", "no/such-model"])
    assert stop.value.code == 2 and "neither a folder" in capsys.readouterr().err
