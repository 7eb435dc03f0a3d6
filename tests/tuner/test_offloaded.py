"""Backbones whose weights come for each call (accelerate's offload) train, answer, save and load as in memory, or are refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from support import HEADS, LORA, batch, disturb, logits, tiny, without_dropout
from support_cache import pad, rows_of

from fusion_adapters import FusionConfig, depth_weights
from fusion_adapters.states import cache_layer_states

BLOCKS = {"bert": "bert.encoder.layer", "llama": "model.layers"}
PLACES = ("memory", "disk", "map", "map with head", "map of all")
ALL = pytest.mark.parametrize("place", PLACES)
BOTH = pytest.mark.parametrize("family", ["bert", "llama"])
WITH_AND_WITHOUT_LORA = pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])


def load(family, tmp_path, place=None):
    """The tiny model from a checkpoint; with a place, its weights or some of them are elsewhere."""
    if not (tmp_path / "base").exists():
        tiny(family).save_pretrained(tmp_path / "base")
    cls, far = HEADS[family, "token"], tmp_path / "far"
    if place is None or not place.startswith("map"):
        model = cls.from_pretrained(tmp_path / "base")
        if place == "memory":
            cpu_offload(model, torch.device("cpu"))
        elif place == "disk":
            disk_offload(model, str(far), torch.device("cpu"))
        return model
    blocks = BLOCKS[family]
    names = {n.rpartition(".")[0] for n in tiny(family).state_dict() if not n.startswith(blocks)}
    where = {**dict.fromkeys(names, "cpu"), **{f"{blocks}.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}}
    for name in where:
        if place == "map of all" or (place == "map with head" and name.split(".")[0] in ("classifier", "score")):
            where[name] = "disk"
    return cls.from_pretrained(tmp_path / "base", device_map=where, offload_folder=far)


def attach(family, model, lora=False, **options):
    torch.manual_seed(3)
    config = FusionConfig(task_type="TOKEN_CLS", **(LORA[family] if lora else {}), **options)
    return without_dropout(disturb(get_peft_model(model, config)))


def trained(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return logits(model)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@BOTH
@WITH_AND_WITHOUT_LORA
@ALL
def test_it_answers_trains_and_saves_as_in_memory(family, lora, place, tmp_path):
    expected, model = attach(family, load(family, tmp_path), lora), attach(family, load(family, tmp_path, place), lora)
    assert any(p.is_meta for p in model.parameters()), "nothing is far away, so the test shows nothing"
    close(logits(model), logits(expected))
    given = {k: v for k, v in batch().items() if k != "labels"}
    close(depth_weights(model, **given), depth_weights(expected, **given))
    close(trained(model), trained(expected))
    model.save_pretrained(tmp_path / "adapter")
    close(logits(PeftModel.from_pretrained(load(family, tmp_path), tmp_path / "adapter")), logits(expected))


@BOTH
@WITH_AND_WITHOUT_LORA
@ALL
def test_every_way_in_leads_to_the_answers_in_memory(family, lora, place, tmp_path):
    expected = attach(family, load(family, tmp_path), lora)
    expected.save_pretrained(tmp_path / "adapter")
    answers = logits(expected)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        model = PeftModel.from_pretrained(load(family, tmp_path, place), tmp_path / "adapter", **options)
        close(logits(model), answers)
    before = getattr(model, "hf_device_map", None)
    model.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    close(logits(model), answers)
    assert getattr(model, "hf_device_map", None) == before and (before is not None) == place.startswith("map")
    plain = load(family, tmp_path, place)
    plain.load_adapter(str(tmp_path / "adapter"))
    close(logits(plain), answers)


@BOTH
@ALL
def test_other_weights_that_are_elsewhere_are_refused(family, place, tmp_path):
    attach(family, load(family, tmp_path)).save_pretrained(tmp_path / "adapter")
    other = load(family, tmp_path)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.startswith(f"{BLOCKS[family]}.3") and p.dim() == 2).add_(0.3)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="other weights: 1 of"):
        PeftModel.from_pretrained(load(family, tmp_path, place), tmp_path / "adapter")


@ALL
def test_states_are_cached_as_in_memory(place, tmp_path):
    rows = rows_of(batch())
    for name, model in (("one", load("bert", tmp_path)), ("two", load("bert", tmp_path, place))):
        cache_layer_states(attach("bert", model), rows, tmp_path / name, pad, dtype="float32", progress=False)
    model = attach("bert", load("bert", tmp_path, place))  # each opens the other's: their keys are equal
    cache = cache_layer_states(model, rows, tmp_path / "one", pad, dtype="float32", progress=False)
    close(
        cache.read([0, 1])[0],
        cache_layer_states(model, rows, tmp_path / "two", pad, dtype="float32", progress=False).read([0, 1])[0],
    )


@ALL
def test_the_copy_of_a_head_is_its_own(place, tmp_path):
    model = attach("bert", load("bert", tmp_path, place))
    trained(model)
    with model.disable_adapter():
        close(logits(model), logits(load("bert", tmp_path)))


def test_what_cannot_be_trained_is_refused_and_the_model_is_left_as_it_was(tmp_path):
    model = load("bert", tmp_path, "disk")
    answers = logits(model)
    for options, said in (
        ({"fusion": "deeper", "fusion_copy_last": True}, "fusion_copy_last=True: .*offloaded"),
        (
            {**LORA["bert"], "init_lora_weights": "pissa"},
            "init_lora_weights changes the weight of a Linear that is offloaded",
        ),
        ({**LORA["bert"], "bias": "all"}, r"\d+ tensors that the adapter trains or saves are offloaded"),
    ):
        with pytest.raises(ValueError, match=said):
            get_peft_model(model, FusionConfig(task_type="TOKEN_CLS", **options))
        close(logits(model), answers)
