"""The command line end to end on a tiny model: runs, reloads, draws, and says what is wrong."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support_text import SENTENCES, conll, save_model, write_recipe
from transformers import AutoTokenizer

from fusion_adapters.cli import main


def run(*arguments):
    main([str(a) for a in arguments])


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


@pytest.fixture
def trained(tmp_path):
    """A finished run with LoRA on tagged words."""
    recipe = write_recipe(tmp_path, adapter={"r": 2, "target_modules": ["query", "value"]})
    run("train", recipe, "--output", tmp_path / "run")
    return tmp_path / "run"


def predictions(capsys, folder, *texts):
    capsys.readouterr()
    run("predict", folder, "--json", *(part for text in texts for part in ("--text", text)))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_on_words(trained, capsys):
    assert sorted(p.name for p in trained.iterdir()) == ["adapter", "metrics.json", "recipe.yaml", "run.json"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics["scores"]) == {"dev", "test"} and 0 <= metrics["scores"]["test"]["f1"] <= 1
    parts = metrics["parameters"]
    assert parts["lora"] == 2 * 4 * 2 * 2 * 32 and parts["fusion"] > 0 and parts["head"] == 33 * 7 and parts["other"] == 0
    assert metrics["reload_difference"] == 0
    assert (
        metrics["bytes"]["adapter_model.safetensors"] == (trained / "adapter" / "adapter_model.safetensors").stat().st_size
    )
    assert metrics["seconds"]["train"] > 0 and metrics["peak_memory_mib"] > 0 and "peft" in metrics["versions"]
    labels = json.loads((trained / "run.json").read_text())["labels"]
    assert json.loads((trained / "adapter" / "adapter_config.json").read_text())["fusion_labels"] == labels
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == parts["total"]
    card = (trained / "adapter" / "README.md").read_text()
    assert "import fusion_adapters" in card and "| test | f1 |" in card

    first = predictions(capsys, trained, "Anna lives in Oslo.", "Bob's  man")
    assert first == predictions(capsys, trained, "Anna lives in Oslo.", "Bob's  man")
    for prediction in first:
        for entity in prediction["entities"]:
            assert prediction["text"][entity["start"] : entity["end"]] == entity["text"]
            assert entity["type"] in ("PER", "LOC", "ORG")


def test_a_run_on_texts_and_standard_input(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path, head="sequence")
    run("train", recipe, "--output", tmp_path / "run", "--set", "training.num_train_epochs=2")
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]["test"]) == {"accuracy", "macro_f1"}
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("anna lives\n\nbob\n"))
    run("predict", tmp_path / "run", "--json")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["text"] for a in answers] == ["anna lives", "bob"]
    assert all(a["label"] in ("place", "person", "none") and 0 < a["probability"] <= 1 for a in answers)
    run("predict", tmp_path / "run", "--text", "anna [lives] in oslo")
    assert "anna [lives] in oslo" in capsys.readouterr().out
    hostile = "anna \x1b[31mred\x1b]0;title\x07 \x9b2J \x7f \r bob"
    run("predict", tmp_path / "run", "--text", hostile)
    said = capsys.readouterr().out
    assert "anna \u241b[31mred" in said and not set(said) & set("\x1b\x07\x9b\x7f\r")
    run("predict", tmp_path / "run", "--json", "--text", hostile)
    said = capsys.readouterr().out
    assert json.loads(said)["text"] == hostile and not set(said) & set("\x1b\x07\x9b\x7f\r")
    for command in (("predict",), ("inspect", "--output", tmp_path / "x.png")):  # latin-1, as a shell hands it on
        error = fails(capsys, command[0], tmp_path / "run", "--text", "caf\udce9", *command[1:])
        assert "The text 'caf\\udce9' is not UTF-8 (character 3)" in error
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"anna\ncaf\xe9\n"), encoding="utf-8"))
    assert "Standard input is not UTF-8 text" in fails(capsys, "predict", tmp_path / "run")


def test_a_run_without_test_data_and_the_same_seed_twice(tmp_path):
    recipe = write_recipe(tmp_path)
    for name in ("a", "b"):
        run("train", recipe, "--output", tmp_path / name, "--set", "data.test=null")
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("a", "b"))
    assert all((first[k] == second[k]).all() for k in first)
    assert set(json.loads((tmp_path / "a" / "metrics.json").read_text())["scores"]) == {"dev"}


def test_the_heatmap_is_a_picture(trained, tmp_path, capsys):
    run("inspect", trained, "--text", "Anna lives in Oslo.", "--output", tmp_path / "new" / "depth.png")
    assert (tmp_path / "new" / "depth.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ".png" in fails(capsys, "inspect", trained, "--text", "Anna", "--output", tmp_path / "depth.pdf")
    assert "text is empty" in fails(capsys, "inspect", trained, "--text", " ", "--output", tmp_path / "depth.png")


def test_a_method_without_weights_has_no_heatmap(tmp_path, capsys):
    run("train", write_recipe(tmp_path, adapter={"fusion": "concat"}), "--output", tmp_path / "run")
    error = fails(capsys, "inspect", tmp_path / "run", "--text", "Anna", "--output", tmp_path / "depth.png")
    assert "Methods that do: dwatt, dwconcat, scalar_mix, attnres, laya" in error
    assert not (tmp_path / "depth.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"fusion": "dwat"}}, "Did you mean 'dwatt'"),
        ({"adapter": {"fusion_layers": [1, 9]}}, "[9] out of range"),
        ({"adapter": {"r": 2, "target_modules": ["nothing"]}}, "No modules were targeted"),
        ({"data": {"train": "missing.conll"}}, "There is no file"),
        ({"backbone": {"model": "no/such-model"}}, "neither a folder with a transformers model nor to be had from the hub"),
        ({"training": {"eval_strategy": "sometimes"}}, "section 'training' does not fit"),
        ({"training": {"learning_rate": "fast"}}, "'training.learning_rate' is 'fast'; it must be a number"),
        ({"data": {"labels": ["O"]}}, "outside the label set"),
    ],
)
def test_a_run_that_cannot_be_leaves_nothing(tmp_path, capsys, changes, message):
    recipe = write_recipe(tmp_path, **changes)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert message in fails(capsys, "train", recipe, "--output", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_existing_run_is_replaced_only_on_demand(trained, capsys):
    recipe = trained.parent / "recipe.yaml"
    assert "is not empty (4 entries)" in fails(capsys, "train", recipe, "--output", trained)
    run("train", recipe, "--output", trained, "--overwrite", "--set", "seed=9")
    assert json.loads((trained / "metrics.json").read_text())["seed"] == 9
    (trained.parent / "other").mkdir()
    (trained.parent / "other" / "precious.txt").write_text("x")
    assert "holds no earlier run" in fails(capsys, "train", recipe, "--output", trained.parent / "other", "--overwrite")
    assert (trained.parent / "other" / "precious.txt").exists()


def test_damaged_and_foreign_runs(trained, tmp_path, capsys):
    assert "holds no run" in fails(capsys, "predict", tmp_path, "--text", "Anna")
    weights = trained / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in fails(capsys, "predict", trained, "--text", "Anna")
    weights.write_bytes(whole)
    save_model(tmp_path / "model", width=64)
    error = fails(capsys, "predict", trained, "--text", "Anna")
    assert "hidden size 32 with 4 blocks; this one is a 'bert' of hidden size 64" in error
    content = json.loads((trained / "run.json").read_text())
    for damaged in ("{", "[]", "3", "{}", '{"recipe": 3}', "\ud800", {**content, "labels": 3}, {**content, "labels": [3]}):
        text = json.dumps(damaged) if isinstance(damaged, dict) else damaged
        (trained / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert "run.json is damaged" in fails(capsys, "predict", trained, "--text", "Anna")
    for recipe in (3, {}, {**content["recipe"], "adapter": {"fusion": "none"}}):
        (trained / "run.json").write_text(json.dumps({**content, "recipe": recipe}))
        assert "run.json" in fails(capsys, "predict", trained, "--text", "Anna") or "none" in str(recipe)
    save_model(tmp_path / "model")
    (trained / "run.json").write_text(json.dumps({**content, "labels": content["labels"][::-1]}))
    assert "outputs are 'O', 'B-LOC'" in fails(capsys, "predict", trained, "--text", "Anna")


def test_a_checkpoint_that_lacks_weights_of_the_backbone(tmp_path, capsys):
    recipe = write_recipe(tmp_path, head="sequence")
    save_model(tmp_path / "model", head="token")  # without a pooler
    error = fails(capsys, "train", recipe, "--output", tmp_path / "run")
    assert "lacks 2 tensors" in error and "pooler" in error and "modules_to_save" in error
    run("train", recipe, "--output", tmp_path / "run", "--set", "adapter.modules_to_save=[pooler]")
    run("predict", tmp_path / "run", "--text", "anna")


@pytest.mark.parametrize("limit", [12_000, 25_000])
def test_a_full_disk_is_told_and_leaves_nothing(limit, tmp_path):
    # a limit on the size of files stands for the disk; the adapter's is the first file above it, or that of the optimizer's state
    recipe = write_recipe(tmp_path, adapter={"fusion": "concat"})
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); from fusion_adapters.cli import main; main()"
    command = [sys.executable, "-c", limited.format(limit), "train", str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Error: A checkpoint of the training could not be written to" in done.stderr and "MiB left" in done.stderr
    assert ("File too large" in done.stderr) == (limit == 12_000)
    assert not [p.name for p in tmp_path.iterdir() if "run" in p.name]


def test_labels_follow_their_pieces_whichever_side_the_tokenizer_pads(tmp_path):
    recipe = write_recipe(tmp_path, training={"num_train_epochs": 3, "learning_rate": 1e-2})
    run("train", recipe, "--output", tmp_path / "right")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.padding_side = "left"  # as those of Llama and Gemma do
    tokenizer.save_pretrained(tmp_path / "model")
    run("train", recipe, "--output", tmp_path / "left")
    right, left = (json.loads((tmp_path / side / "metrics.json").read_text())["scores"] for side in ("right", "left"))
    assert left == right


def test_rows_longer_than_the_backbone_has_positions(tmp_path, capsys):
    recipe = write_recipe(tmp_path, data={"max_length": 1024})
    with (tmp_path / "train.conll").open("a") as file:
        file.write("\n" + "oslo\tB-LOC\n" * 600)
    for command in ("train", "cache"):
        error = fails(capsys, command, recipe, "--output", tmp_path / "run")
        assert "has 602 pieces, but the backbone has 512 positions. Set data.max_length to 512" in error
        assert not (tmp_path / "run").exists()
    run("train", recipe, "--output", tmp_path / "run", "--set", "data.max_length=512")


def test_a_token_is_in_no_file_of_a_run(tmp_path):
    recipe = write_recipe(tmp_path)
    run("train", recipe, "--output", tmp_path / "run", "--set", "training.hub_token=hf_secret")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_strategies_and_casts_as_recipes_write_them(tmp_path):
    recipe = write_recipe(tmp_path)
    arguments = ["eval_strategy=no", "save_strategy=no", "load_best_model_at_end=false", "bf16_full_eval=true"]
    run("train", recipe, "--output", tmp_path / "run", *(part for a in arguments for part in ("--set", f"training.{a}")))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]["dev"]


def test_a_training_that_diverges_is_no_run(tmp_path, capsys):
    recipe = write_recipe(tmp_path, training={"learning_rate": 1e30, "num_train_epochs": 3})
    error = fails(capsys, "train", recipe, "--output", tmp_path / "run")
    assert "The training diverged" in error and "training.learning_rate (1e+30)" in error
    assert not (tmp_path / "run").exists()


def test_all_rows_are_scored_whatever_training_drops(tmp_path):
    recipe = write_recipe(tmp_path, training={"per_device_eval_batch_size": 2})
    scores = []
    for drops in ("false", "true"):
        out = tmp_path / drops
        run("train", recipe, "--output", out, "--set", f"training.dataloader_drop_last={drops}")
        scores.append(json.loads((out / "metrics.json").read_text()))
    assert scores[0]["examples"]["test"] == scores[1]["examples"]["test"] == 3
    assert scores[1]["scores"]["test"].keys() == scores[0]["scores"]["test"].keys()


@pytest.mark.parametrize("head", ["token", "sequence"])
def test_accumulated_batches_weigh_as_one(tmp_path, head):
    # rows of one length and, with the dropout off, the same batch in one piece or four
    recipe = write_recipe(tmp_path, head=head)
    save_model(tmp_path / "model", head, dropout=0.0)
    if head == "token":
        (tmp_path / "train.conll").write_text(conll(SENTENCES[:1] * 9), encoding="utf-8")
    weights = []
    for size, steps, rate in ((8, 1, 0.1), (2, 4, 0.1), (8, 1, 0.2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        settings |= {"optim": "sgd", "learning_rate": rate, "warmup_steps": 0, "max_grad_norm": 0}
        asks = [part for key, value in settings.items() for part in ("--set", f"training.{key}={value}")]
        out = tmp_path / f"run{size}-{rate}"
        run("train", recipe, "--output", out, *asks, "--set", "data.test=null")
        weights.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    once, accumulated, further = weights
    assert max(float((further[name] - once[name]).abs().max()) for name in once) > 1e-3, "nothing moved"
    torch.testing.assert_close(accumulated, once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["prediction_loss_only=true", "eval_do_concat_batches=false"])
def test_arguments_without_which_nothing_is_scored_are_not_to_be_set(tmp_path, capsys, setting):
    error = fails(capsys, "train", write_recipe(tmp_path), "--output", tmp_path / "run", "--set", f"training.{setting}")
    assert setting.split("=")[0] in error


def test_positions_are_checked_wherever_a_text_goes_in(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    few = tiny("bert", max_position_embeddings=20)
    few.save_pretrained(tmp_path / "model")
    long = "oslo " * 40
    (tmp_path / "test.conll").write_text(conll([[("oslo", "B-LOC")] * 40, *SENTENCES * 6]), encoding="utf-8")
    (tmp_path / "train.conll").write_text((tmp_path / "test.conll").read_text(), encoding="utf-8")
    run("train", recipe, "--output", tmp_path / "run", "--set", "data.max_length=20")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    kept["recipe"]["data"]["max_length"] = 256
    (tmp_path / "run" / "run.json").write_text(json.dumps(kept))
    error = fails(capsys, "inspect", tmp_path / "run", "--text", long, "--output", tmp_path / "depth.png")
    assert "has 42 pieces, but the backbone has 20 positions" in error


def test_a_benchmark_does_not_replace_a_run(trained, capsys):
    error = fails(capsys, "bench", "--quick", "--output", trained, "--overwrite")
    assert "holds another thing (a run of fusion-adapters train)" in error
    assert (trained / "adapter").is_dir()


def test_pipes_are_utf_8_whatever_the_system_says(trained):
    command = [sys.executable, "-c", "from fusion_adapters.cli import main; main()", "predict", str(trained), "--json"]
    said = "Zo\u00eb lives in \u00d6slo.\n"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, input=said.encode(), capture_output=True, check=True, env=environment)
    assert json.loads(done.stdout.decode("utf-8").splitlines()[-1])["text"] == said.strip()
