"""Several processes on the CPU (gloo) against one with the same global batch; backbones spread over devices."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, answer, attach, inputs
from packaging.version import Version
from safetensors.torch import load_file
from support import disturb, without_dropout
from support_cache import pad, rows_of
from support_text import write_recipe

from fusion_adapters.states import cache_layer_states
from fusion_adapters.tuner import fusion_layers

HERE = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCH = [
    *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def run(*command):
    process = subprocess.Popen(
        [str(c) for c in command],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
    assert process.returncode == 0, said[-3000:]


def compare(one, two):
    first, second = (json.loads((folder / "history.json").read_text()) for folder in (one, two))
    for kind in ("losses", "scores"):
        torch.testing.assert_close(torch.tensor(second.get(kind, [])), torch.tensor(first.get(kind, [])), rtol=0, atol=1e-4)
    assert len(first["losses"]) == len(second["losses"]) > 10
    return second


def test_data_parallel_training_equals_one_process(tmp_path):
    cases = ("bert-alone", "llama-lora-checkpointing", "bart-lora")  # in one start: it takes longer than the training
    run(sys.executable, "distributed_run.py", tmp_path / "one", 4, *cases)
    run(*LAUNCH, "distributed_run.py", tmp_path / "two", 2, *cases)
    for case in cases:
        one, two = tmp_path / "one" / case, tmp_path / "two" / case
        history = compare(one, two)
        assert history["processes"] == 2, "the run was not distributed, so the test shows nothing"
        assert [p.name for p in two.glob("weights-written-by-*")] == ["weights-written-by-0"]
        tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=1e-4)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="older versions of torch sum FSDP's gradients over gloo (seen with 2.8)",
)
def test_sharded_training_equals_one_process(tmp_path):
    cases = ("bert-lora", "llama-alone")
    run(sys.executable, "fsdp_run.py", tmp_path / "one", *cases)
    run(BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "fsdp_run.py", tmp_path / "two", *cases)
    for case in cases:
        one, two = tmp_path / "one" / case, tmp_path / "two" / case
        assert compare(one, two)["shards"] == 2
        tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
        assert tensors[0].keys() == tensors[1].keys()
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=1e-4)


def test_extraction_by_several_processes_writes_the_bytes_of_one(tmp_path):
    (tmp_path / "two").mkdir()
    run(sys.executable, "extract_run.py", tmp_path / "one")
    run(*LAUNCH, "extract_run.py", tmp_path / "two" / "states")
    assert {p.name for p in (tmp_path / "two").glob("process-*")} == {"process-0-of-2", "process-1-of-2"}
    one, two = (
        {p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "one", tmp_path / "two" / "states")
    )
    assert one == two and len(one) > 4


@pytest.mark.parametrize("far", ["first", "last", "all"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_backbone_spread_over_devices(family, far, tmp_path):
    """Blocks on the disk are on the meta device between calls, as they would be on another card."""
    head = "token"
    batch = inputs(family, head)
    plain = FAMILIES[family].build(head)
    plain.save_pretrained(tmp_path / "base")
    expected = disturb(attach(family, head, model=plain))
    expected.save_pretrained(tmp_path / "adapter")
    blocks = {"bert": "bert.encoder.layer", "llama": "model.layers"}[family]
    names = {n.rpartition(".")[0] for n in FAMILIES[family].build(head).state_dict()}
    chosen = {"first": [0], "last": [3], "all": [0, 1, 2, 3]}[far]
    wanted = {f"{blocks}.{i}": "disk" if i in chosen else "cpu" for i in range(4)}
    others = {
        n: "cpu" for n in names if not n.startswith((blocks, f"base_model.model.{blocks}")) and "layer_fusion" not in n
    }
    others = {n.removeprefix("base_model.model."): where for n, where in others.items()}
    spread = type(FAMILIES[family].build(head)).from_pretrained(
        tmp_path / "base", device_map={**others, **wanted}, offload_folder=tmp_path / "far"
    )
    assert any(p.is_meta for p in spread.parameters()), "nothing is far away, so the test shows nothing"
    model = attach(family, head, model=spread)
    fusion = [p for layer in fusion_layers(model) for p in layer.fusions.parameters()]
    assert {p.device.type for p in fusion} == {"cpu"}
    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    torch.testing.assert_close(answer(model, batch), answer(expected, batch), rtol=0, atol=1e-5)
    model.set_adapter("default")
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # from cached states its blocks need not come at all
    rows = rows_of(batch)
    cache = cache_layer_states(model, rows, tmp_path / "states", pad, dtype="float32", progress=False)
    dataset = cache.dataset(rows)
    states = cache.collator(pad)([dataset[i] for i in range(len(rows))])
    without_dropout(model)
    loss = model(**batch).loss
    torch.testing.assert_close(model(**states).loss, loss)
    torch.testing.assert_close(model(**batch).loss, loss)


def test_a_recipe_is_not_trained_by_several_processes(tmp_path):
    command = [*LAUNCH, "--module", "fusion_adapters.cli", "train", write_recipe(tmp_path), "--output", tmp_path / "run"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode != 0
    assert "A recipe is trained in one process, and this is one of 2" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()
