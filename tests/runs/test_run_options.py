"""What a recipe may ask for beside its method: a backbone in few bits, a test set cut off; and the demonstration as it stands."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from support_study import METHODS, scores, write_study
from support_text import SENTENCES, conll, save_model, write_recipe

from fusion_adapters.cli import main
from fusion_adapters.runs.predicting import load_run
from fusion_adapters.runs.pretrained import PACKAGED_MODELS, package_folder
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.py"


def run(*arguments):
    main([str(a) for a in arguments])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_recipe_with_a_backbone_in_few_bits(tmp_path, capsys, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    recipe = write_recipe(tmp_path, training={"num_train_epochs": 2, "learning_rate": 1e-2})
    # 4-bit weights come in blocks of 64; the head's dropout is drawn for packed positions from a cache
    save_model(tmp_path / "model", width=64, dropout=0.0)
    asks = ("--set", f"backbone.bits={bits}")
    run("train", recipe, "--output", tmp_path / "live", *asks)
    run("cache", recipe, "--output", tmp_path / "states", *asks, "--dtype", "float32")
    run("train", recipe, "--output", tmp_path / "cached", *asks, "--cache", tmp_path / "states")
    live, cached = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("live", "cached"))
    # while nothing trains, 4-bit weights are packed for inference on the CPU, with scales rounded to bfloat16
    assert max(live["reload_difference"], cached["reload_difference"]) <= (0 if bits == 8 else 1e-3)
    losses = [[epoch["loss"] for epoch in metrics["dev_by_epoch"]] for metrics in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    loaded = load_run(tmp_path / "live").model
    packed = [p for p in loaded.parameters() if not p.is_floating_point()]
    assert {p.dtype for p in packed} == {torch.int8 if bits == 8 else torch.uint8}
    assert len(packed) == 6 * 4, "the six linear maps of the four blocks, and no more"
    capsys.readouterr()
    run("predict", tmp_path / "live", "--json", "--text", "Anna lives in Oslo.")
    assert json.loads(capsys.readouterr().out)["text"] == "Anna lives in Oslo."


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_with_a_method_in_8_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    methods["concat8"] = {**METHODS["concat"], "bits": 8}
    path = write_study(tmp_path, methods=methods, sizes=["all"], rates=[1.25e-3])
    run("compare", path, "--output", tmp_path / "out", "--workers", 1)
    assert {r["method"]: r["regime"] for r in scores(tmp_path / "out")} == {
        "deeper": "frozen",
        "concat": "frozen",
        "concat8": "frozen, 8-bit",
    }
    full, rounded = (
        [json.loads(p.read_text())["loss_curve"] for p in sorted((tmp_path / "out" / "runs" / "toy" / name).glob("*.json"))]
        for name in ("concat", "concat8")
    )
    assert len(full) == len(rounded) == 2
    for exact, near in zip(full, rounded, strict=True):
        assert exact != near and [loss for _, loss in near] == pytest.approx([loss for _, loss in exact], rel=0.1)


def test_a_test_set_that_is_cut_off(tmp_path):
    (tmp_path / "train.conll").write_text(conll([[(f"word{i}", "B-PER"), ("x", "O")] for i in range(40)]), encoding="utf-8")

    def parts(seed):
        recipe = DataRecipe(path=str(tmp_path), train="train.conll", dev_fraction=0.2, test_fraction=0.25)
        splits = load_splits(recipe, TASKS["token_classification"], seed)
        return [{e.words[0] for e in part} for part in (splits.train, splits.dev, splits.test)]

    train, dev, test = parts(seed=1)
    assert (len(train), len(dev), len(test)) == (24, 6, 10)
    assert not train & dev and not train & test and not dev & test
    assert parts(seed=1) == [train, dev, test]
    assert parts(seed=2)[2] == test, "another seed tests on sentences that the first one trained on"

    recipe = write_recipe(tmp_path, data={"test": None, "test_fraction": 0.25})
    (tmp_path / "train.conll").write_text(conll(SENTENCES * 8), encoding="utf-8")
    run("train", recipe, "--output", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["examples"]["test"] == 6 and set(metrics["scores"]) == {"dev", "test"}


def test_the_demonstration(tmp_path, monkeypatch, capsys):
    model = "sentence-transformers/all-MiniLM-L6-v2"
    if package_folder(PACKAGED_MODELS[model]) is None:
        pytest.skip("the package with the MiniLM weights is not installed (extra: demo)")
    monkeypatch.setattr(sys, "argv", [str(QUICKSTART), "--output", str(tmp_path)])
    runpy.run_path(str(QUICKSTART), run_name="__main__")
    told = capsys.readouterr().out
    last, dwatt = (
        json.loads((tmp_path / name / "metrics.json").read_text())["scores"]["test"]["f1"] for name in ("last", "dwatt")
    )
    assert dwatt > last + 0.1, "README says what the layers are worth here"
    assert f"{100 * dwatt:.1f}" in told and f"{100 * last:.1f}" in told
    assert os.stat(tmp_path / "dwatt" / "adapter" / "adapter_model.safetensors").st_size < 5_000_000
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
