"""Recipes with `fusion_pool: mean` on a decoder: cached, trained, and asked."""

import json

import pytest
from support_text import save_decoder, write_recipe

from fusion_adapters.cli import main
from fusion_adapters.runs.predicting import depth_map, load_run
from fusion_adapters.states import LayerStateCache


@pytest.mark.parametrize("fusion", ["concat", "deeper"])
def test_a_run_with_means_from_a_cache_is_the_run_without(fusion, tmp_path, capsys):
    recipe = write_recipe(
        tmp_path,
        head="sequence",
        backbone={"model": str(save_decoder(tmp_path / "llama"))},
        adapter={"fusion": fusion, "fusion_pool": "mean"},
        training={"num_train_epochs": 3},
    )
    states = tmp_path / "states"
    main(["cache", str(recipe), "--output", str(states), "--dtype", "float32"])
    assert LayerStateCache(states).manifest["means"] is (fusion != "deeper")
    found = []
    for name, options in (("live", ()), ("cached", ("--cache", str(states)))):
        run = tmp_path / name
        main(["train", str(recipe), "--output", str(run), *options])
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert config["fusion_pool"] == "mean"
        assert json.loads((run / "metrics.json").read_text())["reload_difference"] == 0
        capsys.readouterr()
        main(["predict", str(run), "--json", "--text", "anna lives in oslo", "--text", "bob"])
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    live, cached = found
    assert [a["label"] for a in live] == [a["label"] for a in cached]
    assert [a["probability"] for a in live] == pytest.approx([a["probability"] for a in cached], abs=2e-3)


@pytest.mark.parametrize("pooled", [True, False])
def test_what_stands_beside_a_run_with_means_reads_what_it_needs(pooled, tmp_path):
    control = {"fusion": "last", **({"fusion_pool": "mean"} if pooled else {})}
    changes = {
        "backbone": {"model": str(save_decoder(tmp_path / "llama"))},
        "adapter": {"fusion": "dwatt", "fusion_pool": "mean"},
    }
    recipe = write_recipe(tmp_path, head="sequence", **changes)
    recipe.write_text(recipe.read_text() + f"beside: {{control: {{adapter: {json.dumps(control)}}}}}\n")
    main(["cache", str(recipe), "--output", str(tmp_path / "states")])
    assert LayerStateCache(tmp_path / "states").manifest["means"] is pooled
    main(["train", str(recipe), "--output", str(tmp_path / "run")])
    assert "control" in json.loads((tmp_path / "run" / "metrics.json").read_text())["beside"]
    pieces, layers, weights = depth_map(load_run(tmp_path / "run"), "anna lives")
    assert pieces == ["anna", " lives"]  # no letters that stand for bytes
    assert layers == [1, 2, 3, 4] and weights.shape[0] == 2


def test_words_with_tags_are_refused(tmp_path, capsys):
    recipe = write_recipe(tmp_path, adapter={"fusion": "dwatt", "fusion_pool": "mean"})
    with pytest.raises(SystemExit):
        main(["train", str(recipe), "--output", str(tmp_path / "run")])
    assert "BertForTokenClassification answers at every position" in " ".join(capsys.readouterr().err.split())
