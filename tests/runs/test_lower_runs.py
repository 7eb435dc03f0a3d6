"""Recipes with `adapter.fusion_depth`: trained, cached and predicted on a model without its upper blocks."""

import json

import pytest
import torch
from families import FAMILIES
from support_study import METHODS, scores, write_study
from support_text import save_model, tokenizer, write_recipe

from fusion_adapters import load_run, predict
from fusion_adapters.cli import main
from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.tuner import fusion_layers


def blocks_of(model):
    (layer,) = fusion_layers(model)
    return layer.backbone.num_layers, layer.running.num_layers


@pytest.mark.parametrize("given", [2, 0.5])
def test_a_run_loads_trains_and_predicts_without_the_upper_blocks(given, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, adapter={"fusion_depth": given}))
    metrics = run_recipe(recipe, tmp_path / "run")
    assert metrics["reload_difference"] == 0
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["fusion_depth"] == 2
    run = load_run(tmp_path / "run")
    assert blocks_of(run.model) == (2, 2)
    predicted = predict(run, ["anna lives in oslo"])
    whole, _ = load_attached(recipe, adapter_config(recipe), run.labels, cut=False)
    assert blocks_of(whole) == (4, 2)
    whole.load_adapter(str(tmp_path / "run" / "adapter"), "trained")
    whole.set_adapter("trained")
    run.model = whole.eval()
    again = predict(run, ["anna lives in oslo"])
    assert [e["text"] for e in again[0]["entities"]] == [e["text"] for e in predicted[0]["entities"]]
    assert "first 2 blocks" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_run_from_a_cache(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, "sequence", adapter={"fusion_depth": 2}))
    cache = cache_recipe(recipe, tmp_path / "states", dtype="float32")
    assert cache.layers == [1, 2]
    live, replayed = (
        run_recipe(recipe, tmp_path / name, cache=c) for name, c in (("live", None), ("cached", tmp_path / "states"))
    )
    assert live["scores"]["test"] == pytest.approx(replayed["scores"]["test"], abs=1e-4)


def test_a_backbone_that_cannot_be_cut_is_loaded_whole(tmp_path):
    path = write_recipe(tmp_path, adapter={"fusion_depth": 0.5})
    FAMILIES["albert"].build("token", num_hidden_groups=2, vocab_size=120).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    recipe = load_recipe(path)
    model, _ = load_attached(recipe, adapter_config(recipe), ["O", "B-LOC"])
    assert blocks_of(model) == (4, 2)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_shares_the_states_of_all_blocks(tmp_path):
    low = {"adapter": {"fusion": "dwatt", "fusion_bottleneck": 4, "fusion_depth": 2, "fusion_layers": [0, 1]}}
    few = {
        "baseline": "dwatt",
        "reference": None,
        "sizes": [4],
        "seeds": [1],
        "rates": [1e-3],
        "epochs": 1,
        "evaluations": 1,
    }
    path = write_study(tmp_path, methods={"dwatt": METHODS["dwatt"], "low": low}, **few)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert {row["method"] for row in scores(tmp_path / "out")} == {"dwatt", "low"}


def test_budgets_of_the_lower_blocks(tmp_path, capsys):
    save_model(tmp_path / "model")
    chosen = {}
    for depth in ("2", "0.5", "4"):
        command = ["budget", "--model", str(tmp_path / "model"), "--parameters", "4000", "--methods", "dwatt", "--json"]
        main([*command, "--depth", depth])
        chosen[depth] = json.loads(capsys.readouterr().out)[0]["choice"]["bottleneck"]
    assert chosen["2"] == chosen["0.5"] > chosen["4"]
    with pytest.raises(SystemExit):
        main([*command, "--depth", "half"])
    assert "'half' is no depth" in " ".join(capsys.readouterr().err.split())
