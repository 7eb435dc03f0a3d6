"""Comparisons: the grid, what is the same for all methods, resuming, the report."""

import csv
import json

import pytest
import yaml
from support_text import SENTENCES, conll, save_model

from fusion_adapters.cli import main
from fusion_adapters.study import load_study
from fusion_adapters.study.runner import Cell, rate_size
from fusion_adapters.study.single import RunFailedError, subset, training_sizes
from fusion_adapters.study.statistics import interval, steps_to_share, summarise

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


def test_a_method_starts_from_the_weights_of_another(tmp_path):
    lora = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}
    warm = {
        "from fusion": {"adapter": {**METHODS["dwatt"]["adapter"], **lora}, "start_from": "dwatt"},
        "from lora": {"adapter": {**METHODS["dwatt"]["adapter"], **lora}, "start_from": "lora"},
    }
    # rates at which nothing moves: what it began with is then what it scores with
    still = {name: {**method, "rates": [1e-12]} for name, method in warm.items()}
    learns = {"adapter": {"fusion": "last", **lora}, "rates": [3e-2]}
    methods = {**{n: METHODS[n] for n in ("deeper", "concat", "dwatt")}, "lora": learns, **still}
    path = write_study(tmp_path, methods=methods, sizes=["all"], rates=[1e-2], epochs=6)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    found = {(r["method"], r["seed"], r["stage"]): (r["dev"], r["test"]) for r in scores(tmp_path / "out")}
    for source, name in (("dwatt", "from fusion"), ("lora", "from lora")):
        for seed in "12":
            assert found[name, seed, "report"] == found[source, seed, "report"]
            assert float(found[source, seed, "report"][0]) > 0, "the source has learnt nothing to hand on"
        assert found[name, "0", "rate"] == found[source, "0", "rate"]

    # without its weights a finished run is no start
    for kept in (tmp_path / "out" / "runs").rglob("*.safetensors"):
        kept.unlink()
    for done in (tmp_path / "out" / "runs" / "toy" / "from lora").glob("*.json"):
        done.unlink()
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    again = {(r["method"], r["seed"], r["stage"]): (r["dev"], r["test"]) for r in scores(tmp_path / "out")}
    assert again == found

    unlike = {"adapter": {"fusion": "concat", **lora, "r": 3}, "start_from": "dwatt"}
    path = write_study(tmp_path, methods={**{n: METHODS[n] for n in ("deeper", "concat", "dwatt")}, "x": unlike})
    with pytest.raises(RunFailedError, match=r"None of the adapter weights in .* fits"):
        main(["compare", str(path), "--output", str(tmp_path / "unlike"), "--workers", "1", "--quick"])
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
    ],
)
def test_a_recipe_that_does_not_fit_says_why(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_study(write_study(tmp_path, **changes))


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
