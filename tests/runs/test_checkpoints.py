"""A checkpoint that is read once: its models are those that are loaded by themselves, and share its tensors."""

import pytest
import torch
from families import FAMILIES
from support import tiny
from support_gguf import write_gguf
from support_text import save_decoder, save_model

from fusion_adapters.runs.checkpoints import SharedClass, class_of, read_once
from fusion_adapters.runs.loading import load_lower, load_model
from fusion_adapters.runs.recipe import BackboneRecipe
from fusion_adapters.states import cache_key
from fusion_adapters.tasks.registry import TASKS

LABELS, POOLER = ["a", "b", "c"], ("pooler",)
NAMES = {"token": "token_classification", "sequence": "sequence_classification", "lm": "causal_lm"}


def loaded(recipe, task):
    """A model, and the first number that is drawn after it, as an adapter's weights are."""
    torch.manual_seed(3)
    return load_model(recipe, TASKS[task], LABELS, POOLER), torch.rand(1)


def assert_alike(recipe, tasks):
    alone = [loaded(recipe, task) for task in tasks]
    with read_once(recipe):
        assert isinstance(class_of(recipe, TASKS[tasks[0]].auto_model), SharedClass)
        shared = [loaded(recipe, task) for task in tasks]
    for (own, drawn), (taken, drawn_too) in zip(alone, shared, strict=True):
        expected, found = own.state_dict(), taken.state_dict()
        assert expected.keys() == found.keys() and torch.equal(drawn, drawn_too)
        for key, value in expected.items():
            assert torch.equal(value, found[key]) and value.dtype == found[key].dtype, key
        assert all(torch.equal(a, b) for a, b in zip(own.buffers(), taken.buffers(), strict=True))
        assert own.config.to_dict() == taken.config.to_dict() and own.name_or_path == taken.name_or_path
        assert cache_key(own) == cache_key(taken)
    return [model for model, _ in shared]


def addresses(model):
    return {value.data_ptr() for value in model.state_dict().values()}


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_several_tasks(family, dtype, tmp_path):
    FAMILIES[family].build("token").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    models = assert_alike(BackboneRecipe(model=str(tmp_path), dtype=dtype), [NAMES["token"], NAMES["sequence"]])
    assert len(addresses(models[0]) & addresses(models[1])) > 10


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_of_another_dtype_than_the_checkpoint(stored, dtype, tmp_path):
    tiny("llama", "lm").to(getattr(torch, stored)).save_pretrained(tmp_path)
    models = assert_alike(BackboneRecipe(model=str(tmp_path), dtype=dtype), [NAMES["lm"], NAMES["sequence"]])
    assert bool(addresses(models[0]) & addresses(models[1])) == (dtype == "float32")


def test_a_checkpoint_of_several_files(tmp_path):
    tiny("llama", "lm").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_alike(BackboneRecipe(model=str(tmp_path)), [NAMES["token"], NAMES["lm"]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_gguf_file(architecture, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", architecture)
    models = assert_alike(BackboneRecipe(model=str(tmp_path), gguf_file="tiny.gguf"), list(NAMES.values()))
    assert len(addresses(models[0]) & addresses(models[1])) > 10


def test_a_model_without_its_upper_blocks(tmp_path):
    recipe = BackboneRecipe(model=str(save_decoder(tmp_path)))
    with read_once(recipe):
        model, blocks = load_lower(recipe, TASKS[NAMES["token"]], LABELS, (), 2)
        whole = load_model(recipe, TASKS[NAMES["token"]], LABELS)
    assert blocks == 2 and len(model.model.layers) == 2 and len(whole.model.layers) == 4
    assert model.model.layers[1].mlp.up_proj.weight.data_ptr() == whole.model.layers[1].mlp.up_proj.weight.data_ptr()


def test_what_is_loaded_by_itself(tmp_path):
    recipe = BackboneRecipe(model=str(save_model(tmp_path / "model")))
    auto_model = TASKS[NAMES["token"]].auto_model
    with read_once(recipe):
        assert class_of(BackboneRecipe(model="another"), auto_model) is auto_model
    assert class_of(recipe, auto_model) is auto_model
    quantised = recipe.model_copy(update={"bits": 8})
    with read_once(quantised):
        assert class_of(quantised, auto_model) is auto_model
    (tmp_path / "model" / "model.safetensors").unlink()  # of another form
    with read_once(recipe):
        assert class_of(recipe, auto_model) is auto_model
