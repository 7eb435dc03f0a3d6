"""The same damage through every way in: refused in one paragraph, with a model that is as it was, or the answers that were saved."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import LORA, attached, disturb, logits, tiny
from support_damage import CONFIG, CONFIG_DAMAGE, DAMAGE, HARMLESS, SEEN_WITHOUT, WEIGHTS, edit_config, without_digest
from transformers import AutoModel, AutoModelForTokenClassification

from fusion_adapters import FusionConfig


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base model's folder, two of its adapters, and the first one's answers."""
    root = tmp_path_factory.mktemp("ways")
    tiny("bert").save_pretrained(root / "base")
    answers = {}
    for name, seed, heads in (("a", 0, 4), ("b", 7, 2)):
        model = disturb(attached(model=load_base(root), fusion_heads=heads, **LORA["bert"]), scale=0.1 + 0.01 * seed)
        model.save_pretrained(root / name)
        answers[name] = logits(model)
    return root, answers["a"]


def load_base(root):
    return AutoModelForTokenClassification.from_pretrained(root / "base")


def plain(root):
    return load_base(root)


def with_adapter(root):
    return disturb(attached(model=load_base(root), fusion_heads=4, **LORA["bert"]), scale=0.2)


def nothing(root):
    return None


def second(model, folder):
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def again(model, folder):
    model.load_adapter(folder, "default")
    return model


def into_plain(model, folder):
    model.load_adapter(str(folder))
    return model


def by_hand(model, folder):
    config = FusionConfig.from_pretrained(folder)
    model.load_adapter(peft_config=config, adapter_state_dict=load_file(folder / WEIGHTS))
    return model


WAYS = {
    "PeftModel.from_pretrained": (plain, PeftModel.from_pretrained),
    "AutoPeftModel": (nothing, lambda _, folder: AutoPeftModelForTokenClassification.from_pretrained(folder)),
    "AutoModel": (nothing, lambda _, folder: AutoModelForTokenClassification.from_pretrained(folder)),
    "PeftModel.load_adapter": (with_adapter, second),
    "the same adapter again": (with_adapter, again),
    "model.load_adapter": (plain, into_plain),
    "model.load_adapter, tensors given": (plain, by_hand),
}
# transformers reads the config by itself, and the tensors are read by who gives them
RAW = {"AutoModel": CONFIG_DAMAGE, "model.load_adapter, tensors given": ("a file cut short", "a bit of the header")}


def state(model):
    if model is None:
        return None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in base.modules()]
    active = [getattr(m, "_active_adapter", None) for m in base.modules()]
    known = {name: id(config) for name, config in getattr(base, "peft_config", {}).items()}
    own = {n: (p.requires_grad, p.detach().clone()) for n, p in base.named_parameters()}
    return [n for n, _ in base.named_modules()], hooks, active, known, base.__dict__.get("_hf_peft_config_loaded"), own


def as_before(model, before):
    now = state(model)
    if model is None:
        return True
    values, then = now[-1], before[-1]
    same = values.keys() == then.keys() and all(
        r == then[n][0] and torch.equal(p, then[n][1]) for n, (r, p) in values.items()
    )
    return same and now[:-1] == before[:-1]


def outcome(adapters, way, change, seed, limit):
    root, answer = adapters
    build, load = WAYS[way]
    folder = root / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "a", folder)
    change(folder, random.Random(seed))
    model = build(root)
    before = state(model)
    try:
        found = logits(load(model, folder))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"BARE {type(error).__name__}"
    except (ValueError, OSError) as error:
        if "\n" in str(error) or len(str(error)) < 40:
            return f"BARE {error}"
        return "refused" if as_before(model, before) else "CHANGED"
    except Exception as error:
        return f"BARE {type(error).__name__}: {error}"
    return "same" if bool((found - answer).abs().max() < limit) else "SILENT"


def number_of_trials(number):
    return pytest.mark.parametrize("number", [pytest.param(1), pytest.param(number, marks=pytest.mark.slow)])


@number_of_trials(10)
@pytest.mark.parametrize("way", WAYS)
def test_damage_through_every_way_in(adapters, way, number):
    found = Counter()
    kinds = {k: v for k, v in (DAMAGE | CONFIG_DAMAGE).items() if k not in RAW.get(way, ())}
    for kind, change in kinds.items():
        found.update(outcome(adapters, way, change, f"{kind} {i}", 1e-3) for i in range(number))
    print(f"| {way} | {number * len(kinds)} | {found['refused']} | {found['same']} |")
    assert set(found) <= {"refused", "same"}, found


@number_of_trials(10)
@pytest.mark.parametrize("way", WAYS)
def test_files_without_a_digest(adapters, way, number):
    found = Counter()
    for kind, change in SEEN_WITHOUT.items():

        def bare(folder, draw, change=change):
            change(folder, draw)
            without_digest(folder)

        found.update(outcome(adapters, way, bare, f"{kind} {i}", 1e-3) for i in range(number))
    print(f"| {way}, no digest | {number * len(SEEN_WITHOUT)} | {found['refused']} | {found['same']} |")
    assert set(found) == {"refused"}, found


@pytest.mark.parametrize("way", ["PeftModel.load_adapter", "model.load_adapter, tensors given"])
def test_every_field_of_a_config_left_out_or_null(adapters, way):
    root, _ = adapters
    for name in json.loads((root / "a" / CONFIG).read_text()):
        for change in (lambda values, name=name: values.pop(name), lambda values, name=name: values.update({name: None})):
            told = outcome(adapters, way, lambda folder, draw, change=change: edit_config(folder, change), 0, 1e-3)
            assert told in ("refused", "same"), (name, told)


@pytest.mark.parametrize("way", WAYS)
def test_harmless_changes_load_through_every_way_in(adapters, way):
    for kind, change in HARMLESS.items():
        assert outcome(adapters, way, change, kind, 5e-2) == "same", kind


def test_a_model_without_the_head_is_refused(adapters):
    root, _ = adapters
    with pytest.raises(ValueError, match=r"have no place in the model \(.*classifier"):
        AutoModel.from_pretrained(root / "a")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FusionConfig(task_type="TOKEN_CLS", fusion_heads=2, **LORA["bert"]), "fusion_heads is 4 there and 2 here"),
        (
            FusionConfig(task_type="TOKEN_CLS", fusion_heads=4, **{**LORA["bert"], "lora_alpha": 99}),
            "lora_alpha is .* and 99 here",
        ),
        (
            LoraConfig(task_type="TOKEN_CLS", target_modules=["query"]),
            "is a fusion adapter, and the config that was given is a LoraConfig",
        ),
    ],
    ids=["other heads", "other alpha", "another method"],
)
def test_a_config_that_does_not_belong_to_the_folder_is_refused(adapters, config, said):
    root, _ = adapters
    model = load_base(root)
    before = state(model)
    with pytest.raises(ValueError, match=said):
        PeftModel.from_pretrained(model, root / "a", config=config)
    assert as_before(model, before)


def test_a_config_with_the_options_of_the_folder_loads(adapters):
    root, right = adapters
    config = FusionConfig(task_type="TOKEN_CLS", fusion_heads=4, **LORA["bert"])
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load_base(root), root / "a", config=config)), right, rtol=0, atol=1e-6
    )


def test_whole_numbers_by_hand_are_refused(adapters):
    root, _ = adapters
    model = with_adapter(root)
    tensors = load_file(root / "a" / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].to(torch.int8)
    with pytest.raises(ValueError, match="as int8"):
        set_peft_model_state_dict(model, tensors)


def test_a_checkpoint_with_other_options_is_told(adapters):
    root, _ = adapters
    model = with_adapter(root)
    with pytest.raises(ValueError, match="fusion_heads is 2 there and 4 here"):
        model.load_adapter(root / "b", "default")
    assert json.loads((root / "b" / CONFIG).read_text())["fusion_heads"] == 2


def test_a_file_in_float64_holds_the_same_values(adapters):
    def widen(folder, draw):
        save_file({k: v.double() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})

    assert outcome(adapters, "PeftModel.from_pretrained", widen, "wide", 1e-6) == "same"


def by_peft(model, config):
    return get_peft_model(model, config)


def by_another_adapter(model, config):
    model = attached(model=model, fusion_heads=4, **LORA["bert"])
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


def by_transformers(model, config):
    model.add_adapter(config)
    return model


@pytest.mark.parametrize("attach", [by_peft, by_another_adapter, by_transformers])
def test_a_saved_config_that_is_attached_by_itself_starts_as_a_fresh_one(adapters, attach):
    root, _ = adapters
    model = attach(load_base(root), FusionConfig.from_pretrained(root / "a"))
    torch.testing.assert_close(logits(model), logits(load_base(root)), rtol=0, atol=1e-6)
