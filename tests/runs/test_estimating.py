"""`estimate` beside what is really used: memory of a training step, bytes of the adapter, of a cache, tokens of the data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, attach, first_head, inputs
from support_text import SENTENCES, conll, tokenizer, write_recipe
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForTokenClassification

from fusion_adapters.bench.workers import EXACT_MEMORY
from fusion_adapters.cli import main
from fusion_adapters.runs.dry import footprint
from fusion_adapters.runs.estimating import estimate_recipe
from fusion_adapters.runs.recipe import load_recipe

SIZES = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
LORA = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}

REAL = """
import json, sys, torch
from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.dry import _step
from fusion_adapters.runs.dry import footprint
from fusion_adapters.runs.estimating import _batch, _states
from fusion_adapters.runs.memory import PeakMemory
from fusion_adapters.runs.recipe import load_recipe
torch.set_num_threads(1)
recipe, kind, length = load_recipe(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model, _ = load_attached(recipe, adapter_config(recipe), [str(i) for i in range(int(sys.argv[4]))])
model.train()
if "checkpointing" in kind:
    model.gradient_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

def batch(size, length):
    found = _batch(model, recipe, size, length)
    if kind == "cached":
        found["layer_states"] = _states(model, size, length)
        found["layer_states"]["states"].fill_(1)  # memory that nobody has written to takes none
    return found

_step(model, batch(1, 4), None, optimizer)
with PeakMemory() as memory:
    large = batch(recipe.training["per_device_train_batch_size"], length)
    _step(model, large, None, optimizer)
    _step(model, large, None, optimizer)
print(json.dumps(memory.mib * 2**20))
"""


def recipe_of(folder, family="bert", **changes):
    """A recipe on a backbone that is large enough for its steps to be seen among a process's other memory."""
    path = write_recipe(folder, **changes)
    words = tokenizer()
    if family == "bert":
        model = BertForTokenClassification(BertConfig(**SIZES, vocab_size=len(words), max_position_embeddings=256))
    else:
        model = LlamaForTokenClassification(LlamaConfig(**SIZES, vocab_size=len(words), pad_token_id=0))
    model.save_pretrained(folder / "model")
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured by the memory of the process")
@pytest.mark.parametrize(
    ("family", "kind", "adapter"),
    [
        ("bert", "live", {"fusion": "dwatt"}),
        ("llama", "cached", {"fusion": "concat"}),
        ("llama", "live", {"fusion": "concat", "fusion_depth": 3}),
        ("llama", "live", {"fusion": "last", "r": 8}),
        ("bert", "live", {"fusion": "dwconcat", "r": 8}),
        ("bert", "live, gradient checkpointing", {"fusion": "concat", "r": 8}),
    ],
)
def test_memory_of_a_step_is_within_a_tenth_of_what_is_measured(family, kind, adapter, tmp_path):
    if "r" in adapter:
        adapter = {**adapter, "target_modules": LORA[family]}
    path = recipe_of(tmp_path, family, adapter=adapter, training={"per_device_train_batch_size": 16})
    found = estimate_recipe(load_recipe(path), 128)
    step, labels = found["steps"][kind], len({t for s in SENTENCES for _, t in s})
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(path), kind, "128", str(labels)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env={**os.environ, **EXACT_MEMORY},
    )
    moments = step["optimizer"] * 2 / 3
    measured = json.loads(done.stdout.splitlines()[-1]) + step["weights"] + moments
    assert step["peak"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_step_of_every_family_runs_without_values(family):
    dtype = torch.bfloat16 if family == "mixtral" else torch.float32  # torch's product over experts
    model = attach(family, first_head(family), fusion="dwatt").to(dtype).to("meta")
    shapes = inputs(family, first_head(family))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        batch = {n: torch.empty_like(v, dtype=dtype if v.is_floating_point() else v.dtype) for n, v in shapes.items()}
        found = footprint(model, batch)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert found.optimizer == 3 * trained and found.kept > 0
    assert found.peak > found.weights + found.optimizer


def test_sizes_are_those_of_the_run(tmp_path, capsys):
    path = write_recipe(tmp_path)
    found = estimate_recipe(load_recipe(path))
    main(["train", str(path), "--output", str(tmp_path / "run")])
    main(["cache", str(path), "--output", str(tmp_path / "states"), "--dtype", "float8"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    adapter = found["adapter"]
    assert {part: adapter[part] for part in metrics["parameters"]} == metrics["parameters"]
    assert 0 < metrics["bytes"]["adapter_model.safetensors"] - adapter["bytes"] < 4096
    manifest = json.loads((tmp_path / "states" / "manifest.json").read_text())
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    assert found["cache"]["layers"] == len(manifest["layers"]) and stored == tokens * found["cache"]["bytes"]["float8"]
    assert found["assumed"] == []
    # the same text twice is stored once
    assert found["cache"]["count"] >= tokens


def test_tokens_are_those_of_the_data(tmp_path):
    path = write_recipe(tmp_path)
    sentences = [[(f"word{i}", "O"), ("oslo", "B-LOC")] for i in range(2000)]
    for name in ("train.conll", "test.conll"):
        (tmp_path / name).write_text(conll(sentences), encoding="utf-8")
    recipe = load_recipe(path)
    counted = estimate_recipe(recipe)["cache"]["count"]
    rows = [row for part in _encoded(recipe).values() for row in part.rows]
    assert counted == pytest.approx(sum(len(row["input_ids"]) for row in rows), rel=0.05)


def _encoded(recipe):
    from fusion_adapters.runs.tokenizers import load_tokenizer
    from fusion_adapters.tasks.splits import load_splits

    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    recipe.data.label_at = "first"
    return splits.encoded(recipe.task, load_tokenizer(recipe.backbone, recipe.task), recipe.data)


def test_without_data_and_for_pooled_texts(tmp_path):
    path = write_recipe(tmp_path, "sequence", adapter={"fusion": "concat", "fusion_pool": "mean"})
    found = estimate_recipe(load_recipe(path))
    assert found["cache"]["unit"] == "text" and found["cache"]["count"] == 24  # train and development data, and test
    assert found["steps"]["cached"]["peak"] < found["steps"]["live"]["peak"]
    (tmp_path / "train.csv").unlink()
    found = estimate_recipe(load_recipe(path))
    assert "the data cannot be read here" in found["assumed"][0] and found["cache"]["count"] is None


def test_quantised_weights_are_smaller(tmp_path):
    path = write_recipe(tmp_path)
    sizes = {}
    for bits in (None, 8, 4):
        settings = [] if bits is None else [f"backbone.bits={bits}"]
        sizes[bits] = estimate_recipe(load_recipe(path, settings))["steps"]["live"]["weights"]
    blocks = 4 * (4 * 32 * 32 + 2 * 32 * 64)  # matrices in the blocks of the tiny BERT
    assert sizes[None] - sizes[8] == pytest.approx(3 * blocks, rel=0.02)
    assert sizes[None] - sizes[4] == pytest.approx(3.5 * blocks, rel=0.03)


def test_the_shell(tmp_path, capsys):
    path = write_recipe(tmp_path)
    main(["estimate", str(path), "--memory", "24"])
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("fits 24", "yes", "float8", "gradient checkpointing", "adapter ("):
        assert part in shown
    main(["estimate", str(path), "--json", "--length", "7", "--set", "adapter.fusion=last", "--set", "adapter.r=2"])
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == {"rows": 4, "tokens": 7} and "refused" in found["cache"] and "cached" not in found["steps"]
    with pytest.raises(SystemExit):
        main(["estimate", str(path), "--set", "adapter.fusion_depth=auto"])
    assert "is chosen on development data" in " ".join(capsys.readouterr().err.split())
