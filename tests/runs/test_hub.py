"""Through huggingface_hub's own code to a stand-in of the hub and back: what arrives, and that it loads from there."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, load_file
from support import attached, disturb
from support_hub import stand_in
from support_text import save_model
from transformers import AutoModelForTokenClassification

PUSH = """
import sys
import fusion_adapters
from peft import PeftModel
from transformers import AutoModelForTokenClassification
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(base, num_labels=5), adapter)
model.push_to_hub("me/mine", tags=["ours"])
model.push_to_hub("me/mine", tags=["again"])
"""
LOAD = """
import sys, torch
import fusion_adapters
from peft import AutoPeftModelForTokenClassification, PeftModel
from transformers import AutoModelForTokenClassification
base, ids = sys.argv[1], torch.tensor([[1, 2, 3]])
model = AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
with torch.no_grad():
    there = PeftModel.from_pretrained(model, "me/mine").eval()(ids).logits
    auto = AutoPeftModelForTokenClassification.from_pretrained("me/mine", num_labels=5).eval()(ids).logits
assert torch.equal(there, auto)
torch.save(there, sys.argv[2])
"""


def python(code, hub, tmp_path, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr


@pytest.fixture
def saved(tmp_path):
    """A base model's folder, and an adapter of it with its answers."""
    save_model(tmp_path / "base")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = disturb(attached(model=model, r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_an_adapter_goes_to_the_hub_and_loads_from_there(saved, tmp_path):
    with stand_in() as hub:
        python(PUSH, hub, tmp_path, tmp_path / "base", tmp_path / "adapter")
        files = hub.files["me/mine"]
        assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        sent = load(files["adapter_model.safetensors"])
        own = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert sent.keys() == own.keys() and all(torch.equal(sent[name], own[name]) for name in own)
        config = json.loads(files["adapter_config.json"])
        assert config["peft_type"] == "FUSION" and config["fusion_digest"]
        card = files["README.md"].decode()
        # transformers' own card names neither peft nor the import
        assert card.count("import fusion_adapters") == 1 and "library_name: peft" in card
        assert f"| file | {len(files['adapter_model.safetensors']):,} bytes |" in card
        assert f"base_model: {tmp_path / 'base'}" in card and "- ours" in card and "- again" in card
        assert hub.cards[-1] == card
        python(LOAD, hub, tmp_path, tmp_path / "base", tmp_path / "answer.pt")
    with torch.no_grad():
        expected = saved.eval()(torch.tensor([[1, 2, 3]])).logits
    assert torch.equal(torch.load(tmp_path / "answer.pt"), expected)
