"""Comparisons: the grid, what is the same for all methods, resuming, the report."""

import csv
import json
import re

import pytest
import yaml
from support_text import SENTENCES, conll, save_model

from fusion_adapters.alignment import encode
from fusion_adapters.cli import main
from fusion_adapters.data import Example
from fusion_adapters.study import load_study
from fusion_adapters.study.examples import subset, training_sizes
from fusion_adapters.study.runner import Cell, rate_size
from fusion_adapters.study.single import Run, scale_lora_rate
from fusion_adapters.study.statistics import interval, steps_to_share, summarise
from fusion_adapters.training import Evaluation, adapter_config, load_attached, make_trainer

METHODS = {
    "deeper": {"adapter": {"fusion": "deeper", "fusion_budget": 6000}},
    "concat": {"adapter": {"fusion": "concat", "fusion_budget": 6000}},
    "dwatt": {"adapter": {"fusion": "dwatt", "fusion_bottleneck": 4}},
    "lora": {"adapter": {"fusion": "last", "r": 2, "target_modules": ["query"]}, "lora_rate_scale": 0.5},
}


def write_study(folder, **changes):
    save_model(folder / "model")
    (folder / "train.conll").write_text(conll(SENTENCES * 6), encoding="utf-8")
    (folder / "test.conll").write_text(conll(SENTENCES), encoding="utf-8")
    study = {
        "task": "token_classification",
        "backbone": {"model": str(folder / "model")},
        "data": {"toy": {"path": str(folder), "train": "train.conll", "test": "test.conll", "dev_fraction": 0.3}},
        "methods": METHODS,
        "sizes": [4, "all"],
        "seeds": [1, 2],
        "rates": [1e-3, 1e-2],
        "epochs": 2,
        "evaluations": 2,
        "training": {"per_device_train_batch_size": 4},
        "quick": {"sizes": [4], "seeds": [1]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False), encoding="utf-8")
    return path


def scores(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in csv.DictReader(file)]


def test_a_study_is_run_reported_and_gone_on_with(tmp_path, capsys, monkeypatch):
    path = write_study(tmp_path)
    main(["compare", str(path), "--output", str(tmp_path / "whole"), "--workers", "1"])
    told = capsys.readouterr().out
    assert (
        "| method | parameters | 4 | 13 |" in told and "Difference to `deeper`" in told and "Difference to `concat`" in told
    )
    rows = scores(tmp_path / "whole")
    assert len(rows) == len(METHODS) * 2 * (2 + 2)  # sizes, rates + seeds
    assert {r["test"] != "" for r in rows if r["stage"] == "report"} == {True}
    assert {r["test"] for r in rows if r["stage"] == "rate"} == {""}, "test data were scored to choose a rate"
    assert {r["regime"] for r in rows} == {"frozen", "lora"}
    for figure in ("samples", "steps", "budget", "depth"):
        assert (tmp_path / "whole" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    one = next(r for r in summary["rows"] if r["method"] == "dwatt" and r["size"] == 4)
    by = {(r["method"], r["seed"]): float(r["test"]) for r in rows if r["stage"] == "report" and r["size"] == "4"}
    assert one["test"]["values"] == pytest.approx([100 * by["dwatt", "1"], 100 * by["dwatt", "2"]])
    expected = [100 * (by["dwatt", s] - by["deeper", s]) for s in "12"]
    assert one["to_baseline"]["values"] == pytest.approx(expected)

    # the same study, killed in the middle and gone on with
    from fusion_adapters.study import runner

    real, calls, resumed = runner.run_single, [], []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 9 and not resumed:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "run_single", killed)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--output", str(tmp_path / "cut"), "--workers", "1"])
    assert stop.value.code == 130
    assert not (tmp_path / "cut" / "results.csv").exists()
    resumed.append(True)
    main(["compare", str(path), "--output", str(tmp_path / "cut"), "--workers", "1"])
    assert len(calls) == 1 + len(rows)  # the killed one again, no other twice
    assert scores(tmp_path / "cut") == rows
    calls.clear()
    main(["compare", str(path), "--output", str(tmp_path / "cut"), "--workers", "1"])
    assert calls == []

    # growing is allowed, changing is not
    grown = write_study(tmp_path, seeds=[1, 2, 3], methods={**METHODS, "last": {"adapter": {"fusion": "last"}}})
    main(["compare", str(grown), "--output", str(tmp_path / "cut"), "--workers", "1"])
    assert len(calls) == 2 * len(METHODS) + 2 * (2 + 3)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["compare", str(path), "--output", str(tmp_path / "cut"), "--set", "epochs=3"])
    assert "holds another comparison: epochs differ" in " ".join(capsys.readouterr().err.split())


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, arguments), "--workers", "1"])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_folder_is_never_gone_on_with_by_another_comparison(tmp_path, capsys):
    small = {n: METHODS[n] for n in ("deeper", "concat")}
    few = {"sizes": [4], "seeds": [1], "rates": [1e-3], "reference": None}
    both = {**small, "dwatt": METHODS["dwatt"]}
    out = tmp_path / "out"
    # nothing has run yet: a mended recipe takes the folder over
    path = write_study(tmp_path, methods=both, **few)
    refused([path, "--output", out, "--set", "data.toy.train=none.conll"], capsys)
    refused([path, "--output", out, "--set", "backbone.model=none"], capsys)
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    before = scores(out)
    # a method may be left out; it comes back as it was, or not at all
    main(["compare", str(write_study(tmp_path, methods=small, **few)), "--output", str(out), "--workers", "1"])
    changed = write_study(
        tmp_path, methods={**small, "dwatt": {"adapter": {"fusion": "dwatt", "fusion_bottleneck": 8}}}, **few
    )
    assert "methods.dwatt differ" in refused([changed, "--output", out], capsys)
    path = write_study(tmp_path, methods=both, **few)
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert scores(out) == before
    # a method that reads other layers joins in
    more = {**both, "low": {"adapter": {"fusion": "concat", "fusion_layers": [0, 1], "fusion_bottleneck": 4}}}
    main(["compare", str(write_study(tmp_path, methods=more, **few)), "--output", str(out), "--workers", "1"])
    assert [r for r in scores(out) if r["method"] != "low"] == before
    path = write_study(tmp_path, methods=both, **few)
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert scores(out) == before
    # the same data elsewhere are the same data; a label that changed makes others of them
    (tmp_path / "moved").mkdir()
    for name in ("train.conll", "test.conll"):
        (tmp_path / "moved" / name).write_text((tmp_path / name).read_text())
    moved = ["--set", f"data.toy.path={tmp_path / 'moved'}"]
    main(["compare", str(path), "--output", str(out), "--workers", "1", *moved])
    train = tmp_path / "moved" / "train.conll"
    train.write_text(train.read_text().replace("B-PER", "B-LOC", 1))
    assert "the examples of 'toy' differ" in refused([path, "--output", out, *moved], capsys)


def test_rates_may_be_added(tmp_path):
    methods = {n: METHODS[n] for n in ("deeper", "concat")}
    few = {"methods": methods, "sizes": [4], "seeds": [1]}
    path = write_study(tmp_path, rates=[1e-5], **few)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    path = write_study(tmp_path, rates=[1e-5, 3e-2], **few)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    rows = scores(tmp_path / "out")
    for method in methods:
        tried = {float(r["rate"]): float(r["dev"]) for r in rows if r["method"] == method and r["stage"] == "rate"}
        assert set(tried) == {1e-5, 3e-2}
        (chosen,) = [float(r["rate"]) for r in rows if r["method"] == method and r["stage"] == "report"]
        assert tried[chosen] == max(tried.values())
    told = (tmp_path / "out" / "summary.md").read_text()
    assert "0.03*" in told  # the highest of the grid


def test_a_grid_of_one_rate_needs_no_choice(tmp_path):
    methods = {n: METHODS[n] for n in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods, sizes=[4], seeds=[1], rates=[1e-3])
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert [r["stage"] for r in scores(tmp_path / "out")] == ["report", "report"]


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
    assert [Run("toy", m, 13, 1, 1e-3, "rate").steps(study) for m in ("dwatt", "small")] == [12, 12]
    del training["gradient_accumulation_steps"]
    study = load_study(write_study(tmp_path, methods={**METHODS, "small": {"training": training}}, epochs=3))
    assert Run("toy", "small", 13, 1, 1e-3, "rate").steps(study) == 21


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
    data = Evaluation(recipe.task, labels, examples, encode(examples, tokenizer, labels, recipe.task, 16), None, "all")
    trainer = make_trainer(model, tokenizer, recipe, data, data, tmp_path / "checkpoints")
    scale_lora_rate(trainer, 0.5)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    rates = {names.pop(id(p)): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not names and {rate for name, rate in rates.items() if ".lora_" in name} == {5e-4}
    assert {rate for name, rate in rates.items() if ".lora_" not in name} == {1e-3}


def test_weights_over_depth_of_a_run_in_bfloat16(tmp_path):
    both = {**METHODS["dwatt"]["adapter"], "r": 2, "target_modules": ["query"]}
    few = {"baseline": "dwatt", "reference": None, "sizes": [4], "seeds": [1], "rates": [1e-3]}
    path = write_study(tmp_path, methods={"dwatt": {"adapter": both}}, **few, training={"bf16": True})
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    (run,) = (json.loads(p.read_text()) for p in (tmp_path / "out" / "runs").rglob("*.json"))
    assert all(sum(weights) == pytest.approx(1, abs=0.02) for weights in run["depth"].values())


def test_processes_give_the_table_of_one(tmp_path):
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods)
    main(["compare", str(path), "--output", str(tmp_path / "one"), "--workers", "1", "--quick"])
    main(["compare", str(path), "--output", str(tmp_path / "two"), "--workers", "2", "--quick"])
    assert scores(tmp_path / "one") == scores(tmp_path / "two")


def test_subsets_are_the_same_for_all_and_grow():
    assert subset(None, 100, 5, 1) == subset(None, 100, 20, 1)[:5] != subset(None, 100, 5, 2)
    assert len(set(subset(None, 100, 100, 3))) == 100
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 2
    chosen = subset(labels, 82, 8, 1)  # three of each class, where there are three
    assert sorted(labels[i] for i in chosen) == list("aaabbbcc")
    assert sorted(subset(labels, 82, 82, 1)) == list(range(82))


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


def test_rates_may_be_chosen_at_a_few_sizes(tmp_path):
    study = load_study(write_study(tmp_path, sizes=[2, 4, 8, "all"], rate_sizes=[4, "all"]))
    assert [rate_size(study, Cell("toy", "dwatt", size)) for size in (2, 4, 8, 13)] == [4, 4, 4, 13]


def test_a_comparison_grows_its_rate_sizes(tmp_path):
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods, rate_sizes=["all"], seeds=[1])
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    before = scores(tmp_path / "out")
    grown = write_study(tmp_path, methods=methods, rate_sizes=[4, "all"], seeds=[1])
    main(["compare", str(grown), "--output", str(tmp_path / "out"), "--workers", "2"])
    after = scores(tmp_path / "out")
    assert {r["size"] for r in before if r["stage"] == "rate"} == {"13"}
    assert {r["size"] for r in after if r["stage"] == "rate"} == {"4", "13"}
    assert [r for r in after if r["size"] == "13"] == [r for r in before if r["size"] == "13"]


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


def test_statistics():
    assert interval([1.0]) is None
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1 <= low < 3 < high <= 5
    assert interval([2.0, 2.0]) == [2.0, 2.0]
    assert steps_to_share([(10, 0.1), (20, 0.46), (30, 0.5), (40, 0.48)]) == 20
    assert steps_to_share([(10, 0.45), (20, 0.46), (30, 0.5)]) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "deper"}, "compares with 'deper', which is none of its methods"),
        ({"rate_seeds": [1]}, r"chooses learning rates with seeds that it also reports \(\[1\]\)"),
        ({"size": [3]}, "'size' is not a key of a recipe. Did you mean 'sizes'"),
        (
            {"methods": {**METHODS, "x": {"adaptr": {}}}},
            "'methods.x.adaptr' is not a key of a recipe. Did you mean 'adapter'",
        ),
        ({"methods": {**METHODS, "x": {"adapter": {"fusio": 1}}}}, "Did you mean 'fusion'"),
        ({"rate_sizes": [5]}, r"chooses rates at the sizes \[5\]"),
        ({"seeds": [1, 1]}, r"'seeds' holds the same twice \(1, 1\)"),
        ({"seeds": []}, "'seeds' is empty"),
        ({"sizes": [0, 4]}, r"'sizes' holds a number below 1 \(0, 4\)"),
        ({"rates": [1e-3, 1.0000001e-3]}, r"'rates' holds the same twice \(0.001, 0.001\)"),
        ({"rates": [0.0]}, r"'rates' holds a rate that is not above 0"),
        ({"training": {"learning_rate": 1e-3}}, "sets training.learning_rate, which a comparison sets itself"),
        (
            {"methods": {**METHODS, "x": {"training": {"max_steps": 3}}}},
            "sets methods.x.training.max_steps, which a comparison sets itself",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_says_why(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_a_budget_that_is_too_small_is_told_before_anything_is_computed(tmp_path, capsys):
    methods = {**METHODS, "dwatt": {"adapter": {"fusion": "dwatt", "fusion_budget": 100}}}
    path = write_study(tmp_path, methods=methods)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "2"])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "The budget of 100 parameters is too small: 'dwatt' with a bottleneck" in " ".join(
        capsys.readouterr().err.split()
    )


def test_sizes_beyond_the_data_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(write_study(tmp_path, sizes=[4, 99])), "--output", str(tmp_path / "out")])
    assert "sizes: 99 is more than the 13 training examples of 'toy'" in " ".join(capsys.readouterr().err.split())


def test_the_summary_compares_by_seed(tmp_path):
    study = load_study(write_study(tmp_path))
    base = {
        "data": "toy",
        "size": 4,
        "stage": "report",
        "regime": "frozen",
        "parameters": {"fusion": 1, "lora": 0, "head": 1},
    }
    base |= {
        "rate": 1e-3,
        "dev": 0.5,
        "seconds": 2.0,
        "evaluation_seconds": 1.0,
        "peak_memory_mib": 1.0,
        "curve": [[1, 0.5]],
    }
    values = {"deeper": (0.1, 0.3), "concat": (0.2, 0.5), "dwatt": (0.4, 0.5)}
    runs = [{**base, "method": m, "seed": s, "test": v[s - 1]} for m, v in values.items() for s in (2, 1)]
    rows = {row["method"]: row for row in summarise(study, runs)["rows"]}
    assert rows["dwatt"]["to_baseline"]["values"] == pytest.approx([20, 30])
    assert rows["dwatt"]["to_reference"]["mean"] == pytest.approx(10)
    assert rows["deeper"]["to_baseline"] is None and rows["deeper"]["to_reference"]["mean"] == pytest.approx(-15)
    assert rows["concat"]["training_seconds"] == pytest.approx(1)
