"""The benchmark: every case runs, cases take turns in processes, bars say what was measured."""

import json
import time
from types import SimpleNamespace

import dying_run
import pytest
import torch
from support_text import SENTENCES, conll, save_decoder, save_model

from fusion_adapters.bench import large, load_bench, workers
from fusion_adapters.bench.cases import CASES, EPOCHS, EXTRACTIONS, FORWARDS, epoch_cases
from fusion_adapters.bench.large import measure_large
from fusion_adapters.bench.report import write_bench_report
from fusion_adapters.bench.rounds import Setting, begin
from fusion_adapters.bench.runner import compare_with_bars, measure_checkpoints, ratio
from fusion_adapters.bench.scaling import exponents, measure_scaling
from fusion_adapters.bench.workers import alternate, deep_inference_memory, peak_memory
from fusion_adapters.cli import main

LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50}


def recipe_in(folder, **changes):
    save_model(folder / "model", width=64)
    (folder / "train.conll").write_text(conll(SENTENCES * 4), encoding="utf-8")
    values = {
        "backbone": {"model": str(folder / "model")},
        "data": {"path": str(folder), "train": "train.conll"},
        "lora": {"r": 2, "target_modules": ["query"]},
        "examples": 8,
        "batch_size": 4,
        "repeats": 2,
        "depths": [2, 4],
        "widths": [16, 32],
        "lengths": [8, 16],
        "tokens": [64, 128],
        "large": LLAMA,
        "large_length": 16,
        **changes,
    }
    path = folder / "bench.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_bench(path)


@pytest.fixture
def recipe(tmp_path):
    return recipe_in(tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if case not in EPOCHS])
def test_every_case_does_a_round_of_work(case, recipe, tmp_path):
    run = begin(Setting(recipe, tmp_path), CASES[case])
    assert run() > 0 and run() > 0


@pytest.mark.parametrize("case", EPOCHS)
def test_a_round_trains_what_its_name_says(case, recipe, tmp_path):
    setting = Setting(recipe, tmp_path)
    if "compiled" in case and case not in epoch_cases(setting.bare()):
        pytest.skip("torch.compile does not work on this machine")
    kept = {}
    original = setting.attached
    setting.attached = lambda case: kept.setdefault("model", original(case))
    run = begin(setting, CASES[case])
    before = {n: p.detach().clone() for n, p in kept["model"].named_parameters()}
    assert run() > 0
    moved = {n for n, p in kept["model"].named_parameters() if not torch.equal(p, before[n])}
    assert any("classifier" in n for n in moved)
    assert any(".lora_" in n for n in moved) == case.startswith("LoRA")
    assert any(".layer_fusion." in n for n in moved) == any(name in case for name in ("DWAtt", "dwconcat", "Concat"))
    assert all(any(part in n for part in (".lora_", ".layer_fusion.", "classifier")) for n in moved)
    assert run() > 0, "a second round"


def test_cases_take_turns_in_processes_of_their_own(recipe, tmp_path):
    told = []
    seconds = alternate(recipe, ["bare model", "last, live"], tmp_path, told.append)
    assert told == ["bare model", "last, live"] * 3
    assert {case: len(s) for case, s in seconds.items()} == {"bare model": 2, "last, live": 2}
    assert all(s > 0 for values in seconds.values() for s in values)
    wrong = recipe.model_copy(update={"lora": {"r": 2, "target_modules": ["nowhere"]}})
    with pytest.raises(ChildProcessError, match=r"'LoRA' failed: \w+Error: .*nowhere"):
        alternate(wrong, ["LoRA"], tmp_path, told.append)


@pytest.mark.parametrize(
    "dies", [dying_run.at_once, dying_run.when_asked, dying_run.between_turns], ids=lambda f: f.__name__
)
def test_a_process_that_dies_is_reported(dies, tmp_path, monkeypatch):
    told = r"The process of 'some case' ended without an answer \(killed, or out of memory\?\)"
    monkeypatch.setattr(workers, "_work", dies)
    with pytest.raises(ChildProcessError, match=told):
        alternate(SimpleNamespace(repeats=1), ["some case"], tmp_path, lambda what: time.sleep(0.5))
    if dies is dying_run.at_once:
        with pytest.raises(ChildProcessError, match=told):
            workers._in_a_process(dies, "some case")


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(recipe, tmp_path):
    memory = peak_memory(recipe, tmp_path, lambda what: None)
    assert set(memory) == {"LoRA", "LoRA + DWAtt", "last, live", "DWAtt, live"}
    assert all(set(kinds) == {"training", "inference"} for kinds in memory.values())
    deep = deep_inference_memory(recipe, lambda what: None)
    assert set(deep) == {"bare model", "DWAtt, all states kept", "DWAtt"}


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """What a benchmark found; times and memory are made up, the rest is measured."""
    tmp_path = tmp_path_factory.mktemp("summary")
    recipe = recipe_in(tmp_path)
    setting = Setting(recipe, tmp_path)
    rounds = {case: {"median": 2.0, "rounds": [1.0, 2.0, 3.0]} for case in CASES}
    rounds["LoRA"] = {"median": 50.0, "rounds": [30.0, 50.0, 60.0]}
    scaling = measure_scaling(recipe, lambda what: None)
    return {
        "machine": {"cores": 2, "gpu": None, "torch": "2", "transformers": "5", "peft": "0"},
        "recipe": recipe.model_dump(),
        "examples": setting.examples,
        "tokens_per_epoch": setting.tokens,
        "seconds": rounds,
        "memory_mib": {c: {"training": 30.0, "inference": 20.0} for c in ("LoRA", "DWAtt, live")},
        "deep_inference_mib": {"bare model": 10.0, "DWAtt, all states kept": 40.0, "DWAtt": 20.0},
        "scaling": scaling,
        "exponents": exponents(scaling),
        "checkpoints": measure_checkpoints(setting, tmp_path),
        "flop_share": 0.1,
        "large": measure_large(recipe, lambda what: None, device="cpu"),
    }


def test_bars_and_report(summary, tmp_path):
    assert summary["exponents"].keys() == {"depth", "width", "sequence length", "tokens"}
    # the ratio of each round, then the median: 30, 25, 20
    assert ratio(summary["seconds"], "LoRA", "DWAtt, cached") == 25
    assert ratio({"a": {"rounds": [50, 30, 60]}, "b": {"rounds": [1, 2, 3]}}, "a", "b") == 20, "that of the medians is 25"
    bars = {b["bar"]: b for b in compare_with_bars(summary)}
    assert bars["LoRA epoch / cached DWAtt epoch"]["holds"]
    assert not bars["LoRA epoch / cached DWAtt epoch at 20 % of the budget"]["holds"]
    assert bars["first epoch with extraction / LoRA epoch"]["value"] == pytest.approx(4 / 50)
    assert not bars["memory of a live DWAtt training step / inference"]["holds"]
    assert bars["checkpoint bytes beyond 4 a parameter"]["holds"]
    for values in summary["checkpoints"].values():
        assert values["bytes"] > 4 * values["parameters"]
    tried = {(r["method"], r["precision"]): r["parameters"] for r in summary["large"]}
    assert ("LoRA", "bf16") in tried and tried["DWAtt", "bf16"] <= tried["LoRA", "bf16"]
    write_bench_report({**summary, "bars": list(bars.values())}, tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| LoRA epoch / cached DWAtt epoch | 25 | at least 20 | yes |" in text
    for name in ("epochs", "memory", "scaling"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.csv").read_text().count("seconds,") > len(CASES)


@pytest.mark.slow
def test_the_whole_benchmark_from_the_command_line(recipe, tmp_path, capsys):
    main(["bench", str(tmp_path / "bench.yaml"), "--output", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["seconds"]) >= {*epoch_cases(Setting(recipe, tmp_path).bare()), *FORWARDS, *EXTRACTIONS}
    assert all(len(s["rounds"]) == recipe.repeats for s in summary["seconds"].values())
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == ["epochs.png", "memory.png", "results.csv", "run.json", "scaling.png", "summary.json", "summary.md"]
    assert "LoRA epoch / cached DWAtt epoch" in capsys.readouterr().out


def test_a_large_model_that_does_not_fit_costs_no_other_result(summary, recipe, tmp_path, monkeypatch):
    real = large._model

    def full(recipe, precision, device):
        if precision == "bf16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(recipe, precision, device)

    monkeypatch.setattr(large, "_model", full)
    rows = measure_large(recipe, lambda what: None, device="cpu")
    assert [r["tokens_per_second"] is None for r in rows if r["precision"] == "bf16"] == [True, True]
    write_bench_report({**summary, "large": rows, "bars": compare_with_bars(summary)}, tmp_path)
    assert "| DWAtt, bf16 | does not fit into memory | - | - | - |" in (tmp_path / "summary.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="denormal numbers are a CPU's matter")
def test_denormal_numbers_are_as_before_after_a_round(recipe, tmp_path):
    tiny = torch.full((1,), 1e-40)
    begin(Setting(recipe, tmp_path), CASES[next(case for case in CASES if case not in EPOCHS)])()
    assert bool(tiny * 1 == tiny)


@pytest.mark.parametrize("case", ["LoRA", "Concat 20 %, cached", "Concat 20 % on 40 % of the blocks", "extraction"])
def test_a_decoder_runs_all_but_the_bare_loop(case, recipe, tmp_path):
    save_decoder(tmp_path / "model")
    recipe = recipe.model_copy(update={"lora": {"r": 2, "target_modules": ["q_proj"]}})
    setting = Setting(recipe, tmp_path)
    cases = epoch_cases(setting.bare())
    assert "LoRA" in cases and not any("loop" in name for name in cases)
    assert begin(setting, CASES[case])() > 0


def test_bars_without_the_bare_loop(summary):
    seconds = {name: s for name, s in summary["seconds"].items() if "loop" not in name}
    bars = {b["bar"] for b in compare_with_bars({**summary, "seconds": seconds})}
    assert "LoRA epoch / cached Concat epoch at 20 % of the budget" in bars
    assert not any("loop" in name for name in bars)


def test_exponents_are_those_of_the_fit():
    rows = [{"axis": "depth", "value": v, "seconds": 0.01 * v**1.5} for v in (2, 4, 8)]
    assert exponents(rows) == {"depth": pytest.approx(1.5)}


def test_a_recipe_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'repeat' is not a key of a recipe. Did you mean 'repeats'"):
        recipe_in(tmp_path, repeat=3)
    assert load_bench(quick=True).examples < load_bench().examples
