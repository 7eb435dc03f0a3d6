"""`fusion-adapters shortcuts` on tiny models: fits, judges, draws, and says what is wrong."""

import csv
import json
import struct

import pytest
import torch
from support_causal import save_model
from support_shortcut_runs import SENTENCES, write_causal, write_classes, write_masked
from transformers import AutoModelForCausalLM

from fusion_adapters.cli import main
from fusion_adapters.shortcuts import EarlyExit, ExitOptions, load_shortcuts


def run(*arguments):
    main(["shortcuts", *map(str, arguments)])


def fails(capsys, *arguments):
    """Runs, expects exit code 2, and returns the one paragraph on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    error = text[text.index("Error:") :].strip()
    assert "\n" not in error and "Traceback" not in text
    return error


def size_of(picture):
    """Width and height of a PNG, in pixels."""
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A recipe of a causal model, all pairs, with its shortcuts in `fit`."""
    folder = tmp_path_factory.mktemp("causal")
    recipe = write_causal(folder, shortcuts={"pairs": "all"})
    run("fit", recipe, "--output", folder / "fit")
    return folder, recipe


def test_a_fit_leaves_shortcuts_recipe_and_notes(fitted, capsys):
    folder, recipe = fitted
    names = sorted(p.name for p in (folder / "fit").iterdir() if p.is_file())
    assert names == ["recipe.yaml", "run.json", "shortcuts.json", "shortcuts.safetensors"]
    notes = json.loads((folder / "fit" / "run.json").read_text())
    assert notes["kind"] == "shortcuts" and notes["shortcuts"] == 10 + 6 and notes["positions"] > 300
    said = json.loads((folder / "fit" / "shortcuts.json").read_text())
    assert said["base_model_name_or_path"] == str(folder / "model") and said["notes"]["options"]["ridge"] == 1e-3
    assert "is not empty (4 entries)" in fails(capsys, "fit", recipe, "--output", folder / "fit")
    run("fit", recipe, "--output", folder / "again", "--json")
    assert json.loads(capsys.readouterr().out)["positions"] == notes["positions"]
    run("fit", recipe, "--output", folder / "again", "--overwrite", "--set", "shortcuts.fused=null")
    assert json.loads((folder / "again" / "run.json").read_text())["shortcuts"] == 10


def test_an_evaluation_leaves_tables_and_pictures(fitted, capsys):
    folder, recipe = fitted
    run("evaluate", recipe, "--shortcuts", folder / "fit")
    shown = capsys.readouterr().out
    found = folder / "fit" / "evaluation"
    assert (found / "summary.md").read_text().strip() in shown and str(found) in shown
    scores = json.loads((found / "scores.json").read_text())
    assert len(scores) == 10 + 6 + 10  # mat, fused (from 1 to 3), and the identity, of all pairs
    last = [s for s in scores if s["target"] == 4]
    assert all(0 <= s["precision@1"] <= s["precision@5"] <= s["precision@10"] <= 1 for s in last)
    assert all("surprisal" not in s for s in scores if s["target"] < 4)
    with (found / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["r2"]) for row in rows] == [s["r2"] for s in scores]
    assert {row["precision@1"] for row in rows if row["target"] != "4"} == {""}
    pictures = sorted(p.name for p in found.glob("*.png"))
    assert pictures == ["curves.png", "r2-fused.png", "r2-identity.png", "r2-mat.png"]
    for name in pictures:
        width, height = size_of(found / name)
        assert 500 < width < 3000 and 400 < height < 3000
    assert "--overwrite" in fails(capsys, "evaluate", recipe, "--shortcuts", folder / "fit")
    run(
        "evaluate", recipe, "--shortcuts", folder / "fit", "--output", folder / "few", "--set", "evaluation.rows=2", "--json"
    )
    few = json.loads(capsys.readouterr().out)
    assert {s["positions"] for s in few} == {2 * 15}
    run("evaluate", recipe, "--shortcuts", folder / "fit", "--output", folder / "dev", "--set", "evaluation.split=dev")
    assert "of `dev`" in (folder / "dev" / "summary.md").read_text()


def test_training_adds_maps_and_takes_none_away(fitted, tmp_path, capsys):
    folder, recipe = fitted
    ask = ("tune", recipe, "--shortcuts", folder / "fit", "--output", tmp_path / "tuned")
    run(*ask, "--layers", "1,3", "--epochs", "2")
    shown = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    before, after = (load_shortcuts(place, model) for place in (folder / "fit", tmp_path / "tuned"))
    assert (after.sources(kind="kl"), after.sources(kind="kl fused")) == ([1, 3], [1, 3])
    state = {layer: torch.randn(5, before.hidden_size) for layer in range(4)}
    for shortcut in before:
        assert torch.equal(after.get(shortcut.source, shortcut.target, shortcut.kind)(state), shortcut(state))
    told = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert len(told) == 4 and "kl fused from layer 3" in shown
    assert all(len(t["divergence"]) == 3 and t["divergence"][t["kept"]] == min(t["divergence"]) for t in told)
    assert any(t["kept"] > 0 for t in told)
    run("inspect", tmp_path / "tuned", "--text", "anna lives", "--output", tmp_path / "x.png", "--kind", "kl")
    capsys.readouterr()
    run("evaluate", recipe, "--shortcuts", tmp_path / "tuned", "--output", tmp_path / "scores", "--json")
    assert {"kl", "kl fused"} <= {score["kind"] for score in json.loads(capsys.readouterr().out)}
    assert "is not empty" in fails(capsys, *ask)
    ask = (*ask[:-1], tmp_path / "other")
    assert "have none to layer 4 from 9; there are some from: 0, 1, 2, 3" in fails(capsys, *ask, "--layers", "1,9")
    assert "is no list of layers" in fails(capsys, *ask, "--layers", "one")
    assert not (tmp_path / "other").exists()


def test_the_picture_of_what_layers_say(fitted, tmp_path, capsys):
    folder, _ = fitted
    for kind in ((), ("--kind", "identity"), ("--kind", "mat")):
        run("inspect", folder / "fit", "--text", "anna lives in oslo $a_b$", "--output", tmp_path / "new" / "x.png", *kind)
        width, height = size_of(tmp_path / "new" / "x.png")
        assert 900 < width < 3500 and 300 < height < 1000
    ask = ("inspect", folder / "fit", "--output", tmp_path / "y.png")
    assert "The kinds that go there are: mat, fused, identity" in fails(capsys, *ask, "--text", "anna", "--kind", "tuned")
    assert "no word pieces" in fails(capsys, *ask, "--text", "")
    error = fails(capsys, "inspect", folder / "fit", "--text", "anna", "--output", tmp_path / "y.pdf")
    assert "must be a .png file" in error and not (tmp_path / "y.pdf").exists()


def test_a_masked_language_model_is_judged_where_pieces_are_hidden(tmp_path, capsys):
    recipe = write_masked(tmp_path)
    run("fit", recipe, "--output", tmp_path / "fit")
    assert json.loads((tmp_path / "fit" / "shortcuts.json").read_text())["notes"]["options"]["positions"] == "labelled"
    capsys.readouterr()
    run("evaluate", recipe, "--shortcuts", tmp_path / "fit", "--json")
    scores = json.loads(capsys.readouterr().out)
    assert {s["predictions"] for s in scores} == {4 * len(SENTENCES)}  # one hidden piece a row
    run("inspect", tmp_path / "fit", "--text", "anna lives in [MASK]", "--output", tmp_path / "x.png")
    size_of(tmp_path / "x.png")


def test_a_classifier_is_judged_by_its_classes(tmp_path, capsys):
    recipe = write_classes(tmp_path)
    run("fit", recipe, "--output", tmp_path / "fit")
    capsys.readouterr()
    run("evaluate", recipe, "--shortcuts", tmp_path / "fit")
    assert "how often the first class is that of the full model" in capsys.readouterr().out
    scores = json.loads((tmp_path / "fit" / "evaluation" / "scores.json").read_text())
    assert {s["predictions"] for s in scores} == {4 * len(SENTENCES)} and "precision@5" not in scores[0]
    size_of(tmp_path / "fit" / "evaluation" / "curves.png")
    error = fails(capsys, "inspect", tmp_path / "fit", "--text", "anna", "--output", tmp_path / "x.png")
    assert "task: sequence_classification" in error and "causal_lm" in error
    ask = ("tune", recipe, "--shortcuts", tmp_path / "fit", "--output", tmp_path / "tuned")
    assert "says a class of a text" in fails(capsys, *ask)


def test_shortcuts_of_another_backbone_or_none(fitted, tmp_path, capsys):
    folder, recipe = fitted
    save_model(tmp_path / "other", seed=7)
    other = ("--set", f"backbone.model={tmp_path / 'other'}", "--output", tmp_path / "scores")
    error = fails(capsys, "evaluate", recipe, "--shortcuts", folder / "fit", *other)
    assert "same shape but with other weights" in error and str(folder / "model") in error
    assert not (tmp_path / "scores").exists()
    for command in (("evaluate", recipe, "--shortcuts"), ("inspect", "--text", "anna", "--output", tmp_path / "x.png")):
        assert "holds no shortcuts" in fails(capsys, *command, tmp_path)


def test_early_exits_are_calibrated_on_dev_and_judged_on_test(fitted, tmp_path, capsys):
    folder, recipe = fitted
    ask = ("exit", recipe, "--shortcuts", folder / "fit", "--output", tmp_path / "exits")
    run(*ask, "--agreement", "0.8", "--exits", "2")
    assert "80 % on dev" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "exits").iterdir())
    assert names == ["exits.csv", "exits.json", "exits.png", "recipe.yaml", "run.json", "summary.md"]
    size_of(tmp_path / "exits" / "exits.png")
    found = json.loads((tmp_path / "exits" / "exits.json").read_text())
    assert list(found["kinds"]) == ["identity", "mat", "fused"]
    assert found["look_cost"] == 330 * 32 / (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for each in found["kinds"].values():
        assert each["all"]["layers"] == [1, 2, 3] and 1 <= len(each["few"]["layers"]) <= 2
        for exits in each.values():
            assert exits["dev"]["agreement"] >= 0.8 and 0 <= exits["test"]["saved"] < 0.75
            options = ExitOptions(**exits["options"])  # ready for use
            EarlyExit(model, load_shortcuts(folder / "fit", model), options)
    assert "agreement=1.2" in fails(capsys, *ask[:-1], tmp_path / "x", "--agreement", "1.2")
    assert "no test examples" in fails(capsys, *ask[:-1], tmp_path / "x", "--set", "data.test=null")
    assert "--overwrite" in fails(capsys, *ask) and not (tmp_path / "x").exists()


def test_early_exits_of_a_classifier(tmp_path, capsys):
    recipe = write_classes(tmp_path, evaluation={"rows": 8})
    run("fit", recipe, "--output", tmp_path / "fit")
    capsys.readouterr()
    run("exit", recipe, "--shortcuts", tmp_path / "fit", "--output", tmp_path / "exits", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["look_cost"] == 0 and {e["all"]["test"]["positions"] for e in found["kinds"].values()} == {8}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("shortcuts.rigde=1", "Did you mean 'ridge'"),
        ("shortcuts.ridge=-1", "'shortcuts.ridge' is -1"),
        ("shortcuts.pairs=some", "'shortcuts.pairs' is 'some'"),
        ("shortcuts.sources=[9]", "sources=[9]: [9] can be cast from"),
        ("shortcuts.fused=every:x", "fused"),
        ("shortcuts.rank=32", "rank=32"),
        ("task=token_classification", "Choose one of causal_lm, masked_lm, sequence_classification"),
        ("run=somewhere", "names both backbone and run"),
        ("backbone=null", "names neither backbone and run"),
        ("backbone.model=no/such-model", "neither a folder with a transformers model nor to be had from the hub"),
        ("data.train=missing.txt", "There is no file"),
    ],
)
def test_a_recipe_that_cannot_be_leaves_nothing(fitted, tmp_path, capsys, setting, message):
    _, recipe = fitted
    assert message in fails(capsys, "fit", recipe, "--output", tmp_path / "new" / "fit", "--set", setting)
    assert not (tmp_path / "new" / "fit").exists()


def test_too_few_positions_are_told_of(fitted, tmp_path, capsys):
    folder, recipe = fitted
    error = fails(capsys, "fit", recipe, "--output", tmp_path / "fit", "--set", "shortcuts.ridge=0", "--set", "data.limit=1")
    assert "has no one solution" in error and "Give ridge" in error
    assert "data have no such examples" in fails(
        capsys, "evaluate", recipe, "--shortcuts", folder / "fit", "--output", tmp_path / "x", "--set", "data.test=null",
        "--set", "evaluation.split=test",
    )  # fmt: skip
