"""Runs of shortcuts: killed and gone on with, on models that train made, and from Python."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from support_shortcut_runs import write_causal, write_classes
from support_text import save_model
from transformers import BertForSequenceClassification, BertModel

from fusion_adapters.runs.predicting import load_run
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.shortcut_models import load_subject
from fusion_adapters.runs.shortcut_recipe import load_shortcut_recipe
from fusion_adapters.runs.shortcut_runs import evaluate_recipe, fit_recipe
from fusion_adapters.runs.training import run_recipe
from fusion_adapters.shortcuts import SingularError, fitting, load_shortcuts

# saves the sums after every batch, and dies of the third saving
KILLED = """
import os, signal, sys
from fusion_adapters.shortcuts import fitting
fitting.SAVE_EVERY, save, count = 0.0, fitting._save, [0]
def dying(*arguments):
    save(*arguments)
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
fitting._save = dying
from fusion_adapters.cli import main
main(["shortcuts", "fit", sys.argv[1], "--output", sys.argv[2]])
"""


def test_a_fit_that_was_killed_goes_on_and_equals_one_that_was_not(tmp_path, monkeypatch):
    recipe = write_causal(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), str(tmp_path / "fit")], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (tmp_path / "fit").exists()
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".fit."))
    assert ".fit.sums" in left and len(left) == 2  # the sums, and the folder that was being written
    begun, stream = [], fitting.stream
    monkeypatch.setattr(fitting, "stream", lambda *a, **k: begun.append(a[6]) or stream(*a, **k))
    loaded = load_shortcut_recipe(recipe)
    fit_recipe(loaded, tmp_path / "fit")
    assert begun == [3]  # three batches were in the sums
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    fit_recipe(loaded, tmp_path / "whole")
    for name in ("shortcuts.safetensors", "shortcuts.json"):
        assert (tmp_path / "fit" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sums_of_another_recipe_are_not_gone_on_with(tmp_path, monkeypatch):
    recipe = write_causal(tmp_path)
    monkeypatch.setattr(fitting, "SAVE_EVERY", 0.0)
    add, count = fitting.Moments.add, iter(range(3))

    def stopped(self, states):
        if next(count, None) is None:
            raise KeyboardInterrupt
        add(self, states)

    monkeypatch.setattr(fitting.Moments, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit_recipe(load_shortcut_recipe(recipe), tmp_path / "fit")
    monkeypatch.setattr(fitting.Moments, "add", add)
    sums = tmp_path / ".fit.sums" / "moments.safetensors"
    assert sums.is_file()
    changed = load_shortcut_recipe(recipe, ["shortcuts.skip=2"])
    with pytest.raises(ValueError, match=r"moments\.safetensors.*the sums of another fit"):
        fit_recipe(changed, tmp_path / "fit")
    sums.unlink()
    fit_recipe(changed, tmp_path / "fit")
    assert not sums.parent.exists()


def test_a_fit_that_was_singular_goes_on_with_ridge_without_another_pass(tmp_path, monkeypatch):
    recipe = write_causal(tmp_path, data={"limit": 2})
    with pytest.warns(UserWarning, match="Give at least"), pytest.raises(SingularError, match="Give ridge"):
        fit_recipe(load_shortcut_recipe(recipe, ["shortcuts.ridge=0"]), tmp_path / "fit")
    ran, stream = [], fitting.stream
    monkeypatch.setattr(fitting, "stream", lambda *a, **k: (ran.append(chunk) or chunk for chunk in stream(*a, **k)))
    with pytest.warns(UserWarning, match="Give at least"):
        fit_recipe(load_shortcut_recipe(recipe), tmp_path / "fit")
        assert not ran
        fit_recipe(load_shortcut_recipe(recipe), tmp_path / "whole")
    assert ran
    first, second = ((tmp_path / name / "shortcuts.safetensors").read_bytes() for name in ("fit", "whole"))
    assert first == second and not list(tmp_path.glob(".*"))


LORA = {"r": 2, "target_modules": ["query", "value"]}


def train_classifier(place, **adapter):
    """A classifier with a trained head, by train; returns its folder and the recipe of its shortcuts."""
    folder = place / "data"
    folder.mkdir()
    recipe = write_classes(folder, model=False)
    save_model(folder / "model", "sequence")
    values = yaml.safe_load(recipe.read_text())
    training = {"num_train_epochs": 3, "learning_rate": 1e-2, "disable_tqdm": True}
    adapter = {"fusion": "last", "modules_to_save": ["pooler"], **adapter}
    run = {key: value for key, value in values.items() if key != "shortcuts"} | {"adapter": adapter, "training": training}
    (place / "train.yaml").write_text(yaml.safe_dump(run))
    run_recipe(load_recipe(place / "train.yaml"), place / "run")
    del values["backbone"]
    recipe.write_text(yaml.safe_dump({**values, "run": str(place / "run")}))
    return place, recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier with LoRA."""
    return train_classifier(tmp_path_factory.mktemp("trained"), **LORA)


def test_a_classifier_that_reads_the_mean_of_a_text_is_judged_by_the_mean_of_cast_states(tmp_path):
    folder, path = train_classifier(tmp_path, fusion_pool="mean")
    recipe = load_shortcut_recipe(path)
    fit_recipe(recipe, folder / "fit")
    _, scores = evaluate_recipe(recipe, folder / "fit")
    subject, own = load_subject(recipe), load_run(folder / "run").model
    shortcut = load_shortcuts(folder / "fit", subject.model).get(2)
    texts = [line.rpartition(",")[0] for line in (folder / "data" / "test.csv").read_text().splitlines()[1:]]
    right, plain, head = 0, BertModel.from_pretrained(folder / "data" / "model").eval(), subject.model
    for text in texts:
        inputs = subject.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(head(**inputs).logits, own(**inputs).logits)
            states = plain(**inputs, output_hidden_states=True).hidden_states
            cast, whole = (
                head.classifier(head.bert.pooler(z.mean(1, keepdim=True))) for z in (shortcut({2: states[2]}), states[4])
            )
        torch.testing.assert_close(whole, own(**inputs).logits, rtol=1e-4, atol=1e-5)
        right += int(cast.argmax()) == int(whole.argmax())
    (score,) = (s for s in scores if (s.kind, s.source) == ("mat", 2))
    assert score.precision[1] == right / len(texts)


def test_a_mean_beside_lora_is_refused(tmp_path):
    _, path = train_classifier(tmp_path, fusion_pool="mean", **LORA)
    with pytest.raises(ValueError, match="has LoRA beside fusion_pool: mean"):
        load_subject(load_shortcut_recipe(path))


def test_shortcuts_of_a_classifier_that_train_made(trained):
    folder, path = trained
    recipe = load_shortcut_recipe(path)
    fit_recipe(recipe, folder / "fit")
    assert json.loads((folder / "fit" / "shortcuts.json").read_text())["base_model_name_or_path"] == str(
        folder / "data" / "model"
    )
    place, scores = evaluate_recipe(recipe, folder / "fit")
    assert place == (folder / "fit" / "evaluation").resolve()
    mat = {s.source: s for s in scores if s.kind == "mat"}
    assert sorted(mat) == [0, 1, 2, 3] and all(s.predictions == 16 for s in scores)
    # by hand: the class of each test text after the cast, by the trained model itself
    subject = load_subject(recipe)
    shortcut = load_shortcuts(folder / "fit", subject.model).get(2)
    right = 0
    texts = [line.rpartition(",")[0] for line in (folder / "data" / "test.csv").read_text().splitlines()[1:]]
    for text in texts:
        inputs = subject.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = subject.model(**inputs, output_hidden_states=True)
            cast = shortcut({2: states.hidden_states[2]})
            right += int(subject.model.classifier(subject.model.bert.pooler(cast)).argmax()) == int(states.logits.argmax())
    assert mat[2].precision[1] == right / len(texts)
    # it is the trained model: with its head, and with the LoRA in its weights, to which the shortcuts are bound
    own = load_run(folder / "run").model(**inputs).logits
    torch.testing.assert_close(subject.model(**inputs).logits, own, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="other weights"):
        load_shortcuts(folder / "fit", BertForSequenceClassification.from_pretrained(folder / "data" / "model"))


def test_runs_whose_head_reads_other_layers_or_that_are_of_another_task(trained):
    folder, path = trained
    run = json.loads((folder / "run" / "run.json").read_text())
    for adapter, message in (
        ({"fusion": "dwatt"}, "has fusion: dwatt, whose head reads other layers than the last"),
        ({"fusion": "last", "fusion_depth": 2}, "has fusion: last, below block 2"),
    ):
        changed = {**run, "recipe": {**run["recipe"], "adapter": adapter}}
        (folder / "run" / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_subject(load_shortcut_recipe(path))
    (folder / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"asks for task: causal_lm, and the run .* is of task: sequence_classification"):
        load_subject(load_shortcut_recipe(path, ["task=causal_lm"]))
    with pytest.raises(FileNotFoundError, match=r"holds no run"):
        load_subject(load_shortcut_recipe(path, ["run=nowhere"]))


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    recipe = load_shortcut_recipe(write_classes(tmp_path))
    save_model(tmp_path / "model", "token")  # the backbone alone
    with pytest.raises(ValueError, match=r"lacks .* tensors that BertForSequenceClassification needs.*run: FOLDER"):
        fit_recipe(recipe, tmp_path / "fit")
    assert not os.path.exists(tmp_path / "fit")
