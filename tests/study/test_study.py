"""Comparisons: the grid, resuming, growing, what is refused, the report."""

import json
import math
import platform
import shutil

import pytest
import transformers
from safetensors.torch import load_file, save_file
from support_study import METHODS, refused, scores, write_study

from fusion_adapters.cli import main
from fusion_adapters.states.storage import manifest_text
from fusion_adapters.study import load_study
from fusion_adapters.study.statistics import summarise


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

    real, calls, resumed = runner.run_trial, [], []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 9 and not resumed:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "run_trial", killed)
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


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_a_backbone_that_changed_under_its_name_is_refused(tmp_path, capsys):
    live = {n: {"adapter": {"fusion": "last", "r": r, "target_modules": ["query"]}} for n, r in (("a", 1), ("b", 2))}
    few = {"methods": live, "baseline": "a", "reference": None, "sizes": [4], "seeds": [1], "rates": [1e-3]}
    path, out = write_study(tmp_path, **few), tmp_path / "out"
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    weights = tmp_path / "model" / "model.safetensors"
    before, tensors = weights.read_bytes(), load_file(weights)
    name = next(n for n in tensors if "query.weight" in n)
    save_file({**tensors, name: tensors[name] + 1}, weights, {"format": "pt"})  # retrained in place
    assert "the backbone's weights, the backbone's all weights differ" in refused([path, "--output", out], capsys)
    one = tensors[name].clone()
    one.view(-1)[7] += 1e-3  # a value that no sample holds
    save_file({**tensors, name: one}, weights, {"format": "pt"})
    assert "comparison: the backbone's all weights differ" in refused([path, "--output", out], capsys)
    weights.write_bytes(before)
    config = tmp_path / "model" / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps({**json.loads(kept), "layer_norm_eps": 1e-3}))
    assert "comparison: the backbone's settings differ" in refused([path, "--output", out], capsys)
    config.write_text(kept)
    tokenizer = tmp_path / "model" / "tokenizer.json"
    kept = tokenizer.read_text()
    tokenizer.write_text(kept.replace('"lowercase": true', '"lowercase": false'))
    assert tokenizer.read_text() != kept
    assert "the backbone's tokenizer differ" in refused([path, "--output", out], capsys)
    tokenizer.write_text(kept)
    # a folder begun before backbones were noted takes today's
    (out / "backbone.json").unlink()
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert set(json.loads((out / "backbone.json").read_text())) == {"tokenizer", "weights", "all weights", "settings"}


@pytest.mark.usefixtures("undrawn")
def test_what_a_killed_start_leaves_is_gone_on_with(tmp_path, capsys):
    path, out = write_study(tmp_path, sizes=[4], seeds=[1], rates=[1e-3]), tmp_path / "out"
    out.mkdir()
    (out / ".study.yaml.123").write_text("task: tok")
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("mine")
    assert "holds no comparison" in refused([path, "--output", tmp_path / "else"], capsys)


@pytest.mark.usefixtures("undrawn")
def test_versions_that_changed_between_runs_are_told(tmp_path):
    path, out = write_study(tmp_path, sizes=[4], rates=[1e-3]), tmp_path / "out"
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert f"Made with python {platform.python_version()}, fusion_adapters" in (out / "summary.md").read_text()
    older = next((out / "runs").rglob("*.json"))
    run = json.loads(older.read_text())
    older.write_text(json.dumps({**run, "versions": {**run["versions"], "torch": "1.0"}}))
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    said = (out / "summary.md").read_text()
    assert "**Runs were made with 2 sets of versions:**" in said and "torch 1.0" in said


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_goes_on_with_other_versions(tmp_path):
    path, out = write_study(tmp_path, sizes=[4], rates=[1e-3]), tmp_path / "out"
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    before = scores(out)
    manifest = out / "states" / "toy" / "manifest.json"
    kept = json.loads(manifest.read_text())
    kept["key"]["transformers"] = "5.0.0"
    kept.pop("checksum")
    manifest.write_text(manifest_text(kept))
    # nothing is left to do: the states are not even looked at
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert json.loads(manifest.read_text())["key"]["transformers"] == "5.0.0" and scores(out) == before
    shutil.rmtree(out / "states")
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert not (out / "states").exists() and scores(out) == before
    # a seed more: states of the versions that are here now
    path = write_study(tmp_path, sizes=[4], rates=[1e-3], seeds=[1, 2, 3])
    manifest.parent.mkdir(parents=True)
    manifest.write_text(manifest_text(kept))
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert json.loads(manifest.read_text())["key"]["transformers"] == transformers.__version__
    assert {r["seed"] for r in scores(out)} == {"1", "2", "3"}


def test_settings_of_the_quick_form(tmp_path):
    path = write_study(tmp_path)
    assert load_study(path, ["quick.seeds=[7]"], quick=True).seeds == [7]
    assert load_study(path, ["quick.seeds=[7]"]).seeds == [1, 2]
    assert load_study(path, ["quick.seeds=[7]", "seeds=[8]"], quick=True).seeds == [8]


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"lora_alpha": 64}, "lora_alpha is 64 here and 8 there"),
        ({"use_rslora": True}, "use_rslora is True here and False there"),
        ({"fusion_heads": 2}, "fusion_heads is 2 here and 8 there"),
        ({"fusion_scale": False}, "fusion_scale is False here and True there"),
        ({"fusion_alpha": 2}, "fusion_alpha is 2 here and 8.0 there"),
        ({"fusion_norm": "rms"}, "fusion_norm is rms here and none there"),
    ],
)
def test_a_start_from_weights_that_would_mean_something_else(here, message, tmp_path, capsys):
    both = {"fusion": "dwatt", "fusion_bottleneck": 8, "r": 4, "target_modules": ["query"]}
    methods = {"deeper": METHODS["deeper"], "concat": METHODS["concat"], "both": {"adapter": both}}
    methods["again"] = {"adapter": {**both, **here}, "start_from": "both"}
    told = refused([write_study(tmp_path, methods=methods), "--output", tmp_path / "out"], capsys)
    assert f"Method 'again' starts from 'both', but {message}" in told
    assert not (tmp_path / "out").exists()


def test_a_loss_that_diverged_leaves_a_table(tmp_path):
    path, out = write_study(tmp_path, sizes=[4], rates=[1e-3]), tmp_path / "out"
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    for seed, loss in ((1, math.nan), (2, 3.5)):
        file = next(out.rglob(f"deeper/*seed{seed}-*.json"))
        run = json.loads(file.read_text())
        run["loss_curve"] = [[step, loss] for step, _ in run["loss_curve"]]
        file.write_text(json.dumps({**run, "dev_loss": loss, "test_loss": loss}))
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    assert "diverged (1 of 2)" in (out / "summary.md").read_text()

    def no_number(name):
        raise AssertionError(name)  # JSON knows no NaN

    summary = json.loads((out / "summary.json").read_text(), parse_constant=no_number)
    (row,) = [row for row in summary["rows"] if row["method"] == "deeper"]
    assert row["test_loss"] == {"mean": None, "sd": None, "interval": None, "values": [None, 3.5]}


@pytest.mark.usefixtures("undrawn")
def test_figures_of_methods_that_were_left_out_go(tmp_path):
    out = tmp_path / "out"
    main(["compare", str(write_study(tmp_path, sizes=[4], rates=[1e-3])), "--output", str(out), "--workers", "1"])
    assert (out / "depth.png").is_file()
    few = write_study(tmp_path, sizes=[4], rates=[1e-3], methods={n: METHODS[n] for n in ("deeper", "concat")})
    main(["compare", str(few), "--output", str(out), "--workers", "1"])
    assert not (out / "depth.png").exists() and (out / "loss.png").is_file()


@pytest.mark.usefixtures("undrawn")
def test_processes_give_the_table_of_one(tmp_path):
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods, seeds=[1], rate_sizes=[4, "all"])
    for workers in ("1", "2"):
        main(["compare", str(path), "--output", str(tmp_path / workers), "--workers", workers])
    assert scores(tmp_path / "1") == scores(tmp_path / "2")


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
        ({"rates": [0.0]}, r"'rates' holds a rate that is not a finite number above 0"),
        ({"rates": [math.nan]}, r"'rates' holds a rate that is not a finite number above 0 \(nan\)"),
        ({"quick": None}, "'quick' is None"),
        ({"training": {"per_device_train_batch_size": 0}}, "sets training.per_device_train_batch_size to 0"),
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
