"""Adapters stored in bfloat16: half the bytes, scores of what is stored, float32 when they are loaded."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support_text import write_recipe
from transformers import AutoModelForTokenClassification

from fusion_adapters.runs.predicting import load_run
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import run_recipe
from fusion_adapters.runs.verifying import verify


@pytest.fixture
def run(tmp_path):
    """A run with LoRA whose adapter is stored in bfloat16, and its metrics."""
    path = write_recipe(tmp_path, save_dtype="bfloat16", adapter={"r": 2, "target_modules": ["query"]})
    return tmp_path / "run", run_recipe(load_recipe(path), tmp_path / "run")


def test_what_is_stored_is_what_was_scored(run, tmp_path):
    folder, metrics = run
    assert metrics["reload_difference"] == 0
    assert metrics["stored"]["dtype"] == "bfloat16" and metrics["stored"]["dev_before"] == metrics["dev_by_epoch"][-1]["f1"]
    file = folder / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    values = sum(t.numel() for t in stored.values())
    assert 2 * values < file.stat().st_size < 2 * values + 8000 and metrics["parameters"]["total"] == values
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| stored in | bfloat16; the scores are of what is stored (development f1" in card
    assert f"| file | {file.stat().st_size:,} bytes |" in card
    verdict = verify(folder, str(tmp_path / "model"))
    assert not verdict.problems and verdict.inside["parameters"]["dtypes"] == ["BF16"]


@pytest.mark.parametrize("low", [False, True])
def test_it_is_float32_when_it_is_loaded(run, low, tmp_path):
    folder, _ = run
    labels = json.loads((folder / "run.json").read_text())["labels"]
    base = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "model", num_labels=len(labels), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True, low_cpu_mem_usage=low).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_run(folder).model(ids).logits)
    model.save_pretrained(tmp_path / "again")  # float32 again, with the same values
    again, stored = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", folder / "adapter"))
    assert all(torch.equal(again[name], stored[name].float()) for name in stored)
