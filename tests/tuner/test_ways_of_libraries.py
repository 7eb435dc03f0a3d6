"""Adapters that other libraries load by themselves: transformers' pipeline, sentence-transformers, Trainer's checkpoints."""

import random
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import LORA, attached, disturb, logits, tiny
from support_damage import DAMAGE, WEIGHTS
from support_text import tokenizer
from transformers import AutoModel, AutoModelForTokenClassification, BertModel, Trainer, TrainingArguments, pipeline

from fusion_adapters import FusionConfig

TEXT = "w5 w6 w7"
LACKING = ("lora_", "layer_fusion", "classifier")


def without(folder, part):
    tensors = load_file(folder / WEIGHTS)
    kept = {k: v for k, v in tensors.items() if part not in k}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def damaged(folder, copy, kind):
    shutil.copytree(folder, copy)
    if kind in LACKING:
        without(copy, kind)
    else:
        DAMAGE[kind](copy, random.Random(0))
    return copy


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """The folder of an adapter with LoRA, fusion and head, its tokenizer beside it."""
    root = tmp_path_factory.mktemp("tagger")
    tiny("bert").save_pretrained(root / "base")
    base = AutoModelForTokenClassification.from_pretrained(root / "base")
    model = disturb(attached(model=base, fusion_heads=4, **LORA["bert"]), scale=0.2)
    model.save_pretrained(root / "adapter")
    tokenizer().save_pretrained(root / "adapter")
    return root / "adapter", logits(model)


def test_a_pipeline_answers_as_the_adapter_that_was_saved(tagger):
    folder, right = tagger
    torch.testing.assert_close(logits(pipeline("token-classification", model=str(folder)).model), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [*LACKING, "NaN", "a tensor scaled", "whole numbers", "a file cut short"])
def test_a_pipeline_refuses_a_damaged_adapter(tagger, tmp_path, kind):
    folder = damaged(tagger[0], tmp_path / "damaged", kind)
    with pytest.raises(
        ValueError, match=r"tensors are missing|not those that it was saved with|whole numbers|cannot be read"
    ):
        pipeline("token-classification", model=str(folder))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an adapter without a head, and the embedding of a text by it."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    root = tmp_path_factory.mktemp("encoder")
    BertModel(tiny("bert").config).save_pretrained(root / "base")
    base = AutoModel.from_pretrained(root / "base")
    model = disturb(get_peft_model(base, FusionConfig(**LORA["bert"])).eval(), scale=0.2)
    model.save_pretrained(root / "adapter")
    tokenizer().save_pretrained(root / "adapter")
    with torch.no_grad():
        states = model(**tokenizer()(TEXT, return_tensors="pt")).last_hidden_state
    return library, root / "adapter", states.mean(1)


def test_sentence_transformers_answers_as_the_adapter_that_was_saved(encoder):
    library, folder, right = encoder
    found = torch.as_tensor(library.SentenceTransformer(str(folder), device="cpu").encode([TEXT]))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora_", "layer_fusion", "NaN", "a tensor scaled", "exchanged names"])
def test_sentence_transformers_refuses_a_damaged_adapter(encoder, tmp_path, kind):
    library, folder, _ = encoder
    copy = damaged(folder, tmp_path / "damaged", kind)
    with pytest.raises(ValueError, match=r"tensors are missing|not those that it was saved with"):
        library.SentenceTransformer(str(copy), device="cpu")


@pytest.mark.parametrize("kind", ["layer_fusion", "NaN", "a tensor scaled"])
def test_a_trainer_refuses_to_go_on_from_a_damaged_checkpoint(tmp_path, kind):
    model = attached("bert", **LORA["bert"])
    ids = torch.randint(5, 50, (8, 6))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row % 2} for row in ids]

    def trainer(of):
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
        )
        return Trainer(of, arguments, train_dataset=rows)

    trainer(model).train()
    folder = tmp_path / "run" / "checkpoint-2"
    kept = damaged(folder, tmp_path / "damaged", kind)
    shutil.rmtree(folder)
    kept.rename(folder)
    fresh = attached("bert", **LORA["bert"])
    before = {n: p.detach().clone() for n, p in fresh.named_parameters()}
    with pytest.raises(ValueError, match=r"tensors are missing|not those that it was saved with"):
        trainer(fresh).train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(p, before[n]) for n, p in fresh.named_parameters())
    assert isinstance(fresh, PeftModel) and not logits(fresh.eval()).isnan().any()
