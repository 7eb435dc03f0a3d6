"""What a recipe trains beside a run: scored on the same data, from one pass over the backbone, and not kept."""

import json

import pytest
from support_text import write_recipe

from fusion_adapters.cli import app
from fusion_adapters.runs import training
from fusion_adapters.runs.predicting import load_run
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import cache_recipe, run_recipe

LAST = {"last layer": {"adapter": {"fusion": "last"}, "training": {"learning_rate": 3e-2}}}


@pytest.fixture
def extractions(monkeypatch):
    """How often layer states were extracted."""
    found, extract = [], training.cache_layer_states

    def counted(*args, **kwargs):
        found.append(args)
        return extract(*args, **kwargs)

    monkeypatch.setattr(training, "cache_layer_states", counted)
    return found


def test_it_is_scored_beside_the_run_from_the_same_states(tmp_path, extractions, capsys):
    path = write_recipe(tmp_path, adapter={"fusion": "concat", "fusion_bottleneck": 4}, beside=LAST)
    app(["train", str(path), "--output", str(tmp_path / "run")], standalone_mode=False)
    assert len(extractions) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (name,) = metrics["beside"]
    other = metrics["beside"][name]
    assert name == "last layer" and other["parameters"]["fusion"] == 0 < metrics["parameters"]["fusion"]
    assert other["scores"].keys() == metrics["scores"].keys()
    told = capsys.readouterr().out
    assert "last layer" in told and "this run (concat)" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "recipe.yaml", "run", "test.conll", "train.conll"]
    assert load_run(tmp_path / "run").model.active_peft_config.fusion == "concat"


def test_it_comes_out_as_a_run_of_its_own(tmp_path):
    path = write_recipe(tmp_path, adapter={"fusion": "concat", "fusion_bottleneck": 4}, beside=LAST)
    beside = run_recipe(load_recipe(path), tmp_path / "run")["beside"]["last layer"]
    settings = ["adapter={fusion: last}", "training.learning_rate=3e-2", "beside={}"]
    cache_recipe(load_recipe(path, settings), tmp_path / "states")
    alone = run_recipe(load_recipe(path, settings), tmp_path / "alone", cache=tmp_path / "states")
    assert beside["dev_by_epoch"][-1]["loss"] == pytest.approx(alone["dev_by_epoch"][-1]["loss"], rel=1e-6)


def test_with_lora_everything_is_trained_live(tmp_path, extractions):
    lora = {"adapter": {"fusion": "last", "r": 2, "target_modules": ["query"]}}
    path = write_recipe(tmp_path, adapter={"fusion": "concat", "fusion_bottleneck": 4}, beside={**LAST, "lora": lora})
    metrics = run_recipe(load_recipe(path), tmp_path / "run")
    assert not extractions
    assert metrics["beside"]["lora"]["parameters"]["lora"] > 0


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"x": {"adapter": {"fusoin": "last"}}}, r"beside\.x.*'adapter\.fusoin' is not a key"),
        ({"x": {"training": {"seed": 3}}}, r"beside\.x.*sets training\.seed"),
        ({"x": {"adaptor": {}}}, r"beside\.x\.adaptor"),
    ],
)
def test_a_wrong_key_is_told_before_anything_is_trained(beside, said, tmp_path):
    path = write_recipe(tmp_path, beside=beside)
    with pytest.raises(ValueError, match=said):
        load_recipe(path)


@pytest.mark.parametrize(
    ("adapter", "beside"),
    [
        ({"fusion": "last", "fusion_bottleneck": None}, {"fusion": "concat", "fusion_bottleneck": 4}),
        (
            {"fusion": "concat", "fusion_bottleneck": 4, "fusion_layers": [-1]},
            {"fusion": "concat", "fusion_layers": [0, -1]},
        ),
    ],
)
def test_it_may_read_other_layers(adapter, beside, tmp_path, extractions):
    path = write_recipe(tmp_path, adapter=adapter, beside={"other": {"adapter": beside}})
    metrics = run_recipe(load_recipe(path), tmp_path / "run")
    assert len(extractions) == 1
    assert metrics["beside"]["other"]["parameters"]["fusion"] > 0


def test_what_fails_beside_a_run_is_told_and_the_run_stays(tmp_path, capsys):
    wrong = {"wrong": {"adapter": {"fusion": "concat", "fusion_stack": "encoder"}}}
    path = write_recipe(tmp_path, adapter={"fusion": "concat", "fusion_bottleneck": 4}, beside={**wrong, **LAST})
    app(["train", str(path), "--output", str(tmp_path / "run")], standalone_mode=False)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["beside"]["wrong"]) == ["failed"] and metrics["beside"]["last layer"]["scores"]
    assert "wrong failed: " in capsys.readouterr().out
    assert load_run(tmp_path / "run").model.active_peft_config.fusion == "concat"
