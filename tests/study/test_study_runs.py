"""One run of a comparison: its examples, length, evaluations, learning rates and start."""

import json
import re

import pytest
import torch
import yaml
from support import disturb
from support_study import METHODS, refused, scores, write_study
from support_text import save_model

from fusion_adapters import depth_weights
from fusion_adapters.cli import main
from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.evaluation import Evaluation, positions_for
from fusion_adapters.runs.label_depths import depth_by_label
from fusion_adapters.runs.trainers import make_trainer
from fusion_adapters.states import LayerStateCache
from fusion_adapters.study import load_study
from fusion_adapters.study.examples import subset, training_sizes
from fusion_adapters.study.states import prepare_states
from fusion_adapters.study.trial import Trial, scale_lora_rate
from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.splits import load_splits


def test_one_method_of_an_alias_can_be_set(tmp_path):
    path = write_study(tmp_path)
    text = path.read_text()
    methods = yaml.safe_dump({"methods": METHODS}, sort_keys=False)
    aliased = "methods:\n  deeper: {adapter: &a {fusion: deeper}}\n  concat: {adapter: *a}\n"
    path.write_text(text.replace(methods, aliased))
    study = load_study(path, ["methods.concat.adapter.fusion=concat"])
    assert [m.adapter["fusion"] for m in study.methods.values()] == ["deeper", "concat"]


def test_a_recipe_is_what_it_was_after_its_runs(tmp_path):
    """peft extends a config's lists when it attaches."""
    study = load_study(write_study(tmp_path))
    recipe = study.recipe_of("toy", "dwatt")
    recipe.adapter["modules_to_save"] = ["pooler"]
    for _ in range(2):
        load_attached(recipe, adapter_config(recipe), ["a", "b"])
    assert recipe.adapter["modules_to_save"] == ["pooler"]


def test_the_length_of_a_run_is_counted_in_passes(tmp_path):
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    study = load_study(write_study(tmp_path, methods={**METHODS, "small": {"training": training}}, epochs=3))
    assert [Trial("toy", m, 13, 1, 1e-3, "rate").steps(study) for m in ("dwatt", "small")] == [12, 12]
    del training["gradient_accumulation_steps"]
    study = load_study(write_study(tmp_path, methods={**METHODS, "small": {"training": training}}, epochs=3))
    assert Trial("toy", "small", 13, 1, 1e-3, "rate").steps(study) == 21


@pytest.mark.usefixtures("undrawn")
def test_development_data_are_scored_evenly_and_at_the_end(tmp_path):
    methods = {n: METHODS[n] for n in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods, sizes=[13], seeds=[1], rates=[1e-3], epochs=5, evaluations=3)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    for run in (tmp_path / "out" / "runs").rglob("*.json"):
        assert [step for step, _ in json.loads(run.read_text())["curve"]] == [7, 13, 20]


def test_lora_has_its_own_learning_rate(tmp_path):
    study = load_study(write_study(tmp_path))
    both = {**METHODS["dwatt"]["adapter"], "r": 2, "target_modules": ["query"]}
    study.methods["dwatt"].adapter = both
    recipe = study.recipe_of("toy", "dwatt")
    recipe.training["learning_rate"] = 1e-3
    labels = ["O", "B-PER"]
    model, tokenizer = load_attached(recipe, adapter_config(recipe), labels)
    examples = [Example(["anna"], ["B-PER"])]
    data = Evaluation(recipe.task, labels, examples, recipe.task.encode(examples, tokenizer, labels, 16), None, "all")
    trainer = make_trainer(model, tokenizer, recipe, data, data, tmp_path / "checkpoints")
    scale_lora_rate(trainer, 0.5)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    rates = {names.pop(id(p)): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not names and {rate for name, rate in rates.items() if ".lora_" in name} == {5e-4}
    assert {rate for name, rate in rates.items() if ".lora_" not in name} == {1e-3}


@pytest.mark.usefixtures("undrawn")
def test_weights_over_depth_of_a_run_in_bfloat16(tmp_path):
    both = {**METHODS["dwatt"]["adapter"], "r": 2, "target_modules": ["query"]}
    few = {"baseline": "dwatt", "reference": None, "sizes": [4], "seeds": [1], "rates": [1e-3]}
    path = write_study(tmp_path, methods={"dwatt": {"adapter": both}}, **few, training={"bf16": True})
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    (run,) = (json.loads(p.read_text()) for p in (tmp_path / "out" / "runs").rglob("*.json"))
    assert all(sum(weights) == pytest.approx(1, abs=0.02) for weights in run["depth"].values())


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_weights_over_depth_are_means_over_the_tokens_of_a_label(cached, tmp_path):
    path = write_study(
        tmp_path, methods={"dwatt": {"adapter": {"fusion": "dwatt", "fusion_heads": 4}}}, baseline="dwatt", reference=None
    )
    study = load_study(path)
    recipe = study.recipe_of("toy", "dwatt", 1)
    splits = load_splits(recipe.data, recipe.task, 1)
    model, words = load_attached(recipe, adapter_config(recipe), splits.labels)
    disturb(model, scale=0.5)
    encoded = recipe.task.encode(splits.train, words, splits.labels, 64)
    expected = {label: [] for label in splits.labels}
    for row in encoded.rows:  # one by one: nothing is padded
        ids = torch.tensor([row["input_ids"]])
        weights = depth_weights(model, input_ids=ids)[0].mean(1)  # (T, heads, N) -> (T, N)
        for label, weight in zip(row["labels"], weights, strict=True):
            if label != IGNORED:
                expected[splits.labels[label]].append(weight)

    states = None
    if cached:
        prepare_states(study, tmp_path / "states")
        states = LayerStateCache(tmp_path / "states" / "toy", model)
    positions = positions_for(model, recipe.task, training=False) if cached else "all"
    data = Evaluation(recipe.task, splits.labels, splits.train, encoded, states, positions)
    trainer = make_trainer(model, words, recipe, data, data, tmp_path / "out")
    found, layers = depth_by_label(model, trainer, data)
    assert layers == [1, 2, 3, 4]
    assert found.keys() == {label for label, weights in expected.items() if weights}
    for label, weights in found.items():
        assert weights == pytest.approx(torch.stack(expected[label]).mean(0).tolist(), abs=1e-3)
        assert max(weights) - min(weights) > 0.01, "the weights are all alike, so the test shows nothing"


def test_subsets_are_the_same_for_all_and_grow():
    assert subset(None, 100, 5, 1) == subset(None, 100, 20, 1)[:5] != subset(None, 100, 5, 2)
    assert len(set(subset(None, 100, 100, 3))) == 100
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 2
    chosen = subset(labels, 82, 8, 1)  # three of each class, where there are three
    assert sorted(labels[i] for i in chosen) == list("aaabbbcc")
    assert sorted(subset(labels, 82, 82, 1)) == list(range(82))


@pytest.mark.usefixtures("undrawn")
def test_sizes_per_class(tmp_path):
    save_model(tmp_path / "model", "sequence")
    rows = [("anna lives in oslo", "place")] * 8 + [("the old man", "person")] * 6 + [("acme corp", "firm")] * 3
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *(",".join(r) for r in rows)]) + "\n", encoding="utf-8")
    study = {
        "task": "sequence_classification",
        "backbone": {"model": str(tmp_path / "model")},
        "data": {"toy": {"path": str(tmp_path), "train": "train.csv", "dev_fraction": 0.2}},
        "methods": {"last": {"adapter": {"fusion": "last", "modules_to_save": ["pooler"]}}},
        "baseline": "last",
        "reference": None,
        "sizes": [1, 3, "all"],
        "per_class": True,
        "seeds": [1],
        "rates": [1e-3],
        "epochs": 1,
        "evaluations": 1,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    sizes = training_sizes(load_study(path))["toy"]
    assert sizes[0] == 3 and sizes[2] == 14 and 3 < sizes[1] <= 9
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    rows = scores(tmp_path / "out")
    assert {r["size"] for r in rows} == {str(s) for s in sizes} and {r["test"] for r in rows} == {""}
    with pytest.raises(ValueError, match=r"sets per_class, which counts texts of each class; its task is token"):
        load_study(write_study(tmp_path, per_class=True))


@pytest.mark.usefixtures("undrawn")
def test_a_method_starts_from_the_weights_of_another(tmp_path, capsys):
    lora = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}
    warm = {
        "from fusion": {"adapter": {**METHODS["dwatt"]["adapter"], **lora}, "start_from": "dwatt"},
        "from lora": {"adapter": {**METHODS["dwatt"]["adapter"], **lora}, "start_from": "lora"},
    }
    # rates at which nothing moves: what it began with is then what it scores with
    still = {name: {**method, "rates": [1e-12, 1e-13]} for name, method in warm.items()}
    learns = {"adapter": {"fusion": "last", **lora}, "rates": [3e-2]}
    methods = {**{n: METHODS[n] for n in ("deeper", "concat", "dwatt")}, "lora": learns, **still}
    path = write_study(tmp_path, methods=methods, sizes=["all"], rates=[1e-2], epochs=6)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    found = {(r["method"], r["seed"], r["stage"]): (r["dev"], r["test"]) for r in scores(tmp_path / "out")}
    for source, name in (("dwatt", "from fusion"), ("lora", "from lora")):
        for seed in "12":
            assert found[name, seed, "report"] == found[source, seed, "report"]
            assert float(found[source, seed, "report"][0]) > 0, "the source has learnt nothing to hand on"
        (first,) = (tmp_path / "out" / "runs" / "toy" / source).glob("*-seed0-*.json")
        assert float(found[name, "0", "rate"][0]) == json.loads(first.read_text())["dev"]

    # where only its scores are left, a source trains again for those who start from it, and its scores stay
    kept_scores = {
        p: p.read_bytes() for n in ("dwatt", "lora") for p in (tmp_path / "out" / "runs" / "toy" / n).glob("*.json")
    }
    for kept in (tmp_path / "out" / "runs").rglob("*.safetensors"):
        kept.unlink()
    for done in (tmp_path / "out" / "runs" / "toy" / "from lora").glob("*.json"):
        done.unlink()
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    again = {(r["method"], r["seed"], r["stage"]): (r["dev"], r["test"]) for r in scores(tmp_path / "out")}
    assert again == found
    assert kept_scores == {path: path.read_bytes() for path in kept_scores}

    unlike = {"adapter": {"fusion": "concat", **lora, "r": 3}, "start_from": "dwatt"}
    path = write_study(tmp_path, methods={**{n: METHODS[n] for n in ("deeper", "concat", "dwatt")}, "x": unlike})
    told = refused([path, "--output", tmp_path / "unlike", "--quick"], capsys)
    assert re.search(r"do not fit the method that should start from them \((\d+) of \1 tensors, for example", told)
    partly = {"adapter": {"fusion": "dwatt", "fusion_bottleneck": 8, **lora}, "start_from": "dwatt"}
    path = write_study(tmp_path, methods={**{n: METHODS[n] for n in ("deeper", "concat", "dwatt")}, "x": partly})
    told = refused([path, "--output", tmp_path / "partly", "--quick"], capsys)
    wrong, shared = re.search(r"start from them \((\d+) of (\d+) tensors", told).groups()
    assert int(wrong) < int(shared), "biases fit at any width"
    with pytest.raises(ValueError, match="lets 'x' start from 'dwat', which is not a method of the recipe"):
        load_study(write_study(tmp_path, methods={**METHODS, "x": {**unlike, "start_from": "dwat"}}))
