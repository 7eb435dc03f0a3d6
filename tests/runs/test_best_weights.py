"""A run keeps the weights of its best evaluation, and test data are scored with them."""

import pytest
from safetensors.torch import load_file
from support_masked import TASK, write_files, write_study

from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.evaluation import Evaluation
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.trainers import make_trainer
from fusion_adapters.runs.training import run_recipe
from fusion_adapters.study import load_study
from fusion_adapters.study.states import prepare_states
from fusion_adapters.study.trial import Trial, run_trial
from fusion_adapters.tasks.splits import load_splits


@pytest.fixture(params=["first", "last"])
def best(request, monkeypatch):
    """Which evaluation has the highest score; the losses stay what they are."""
    scored = Evaluation.watched_scores
    seen = []

    def made_up(self, predictions, label_ids):
        seen.append(1)
        score = 1 / len(seen) if request.param == "first" else 1 - 1 / len(seen)
        return {**scored(self, predictions, label_ids), "accuracy": score}

    monkeypatch.setattr(Evaluation, "watched_scores", made_up)
    return 0 if request.param == "first" else -1


def test_of_a_recipe(best, tmp_path):
    recipe = load_recipe(write_files(tmp_path, training={"num_train_epochs": 3, "learning_rate": 1e-2}))
    metrics = run_recipe(recipe, tmp_path / "run")
    losses = [epoch["loss"] for epoch in metrics["dev_by_epoch"]]
    assert len(losses) == 3 and abs(losses[0] - losses[-1]) > 0.01
    assert metrics["scores"]["dev"]["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_of_a_comparison(best, tmp_path):
    study = load_study(write_study(tmp_path, epochs=6))
    run = Trial("toy", "concat", 8, 1, 1e-2, "report")
    prepare_states(study, tmp_path / "states")
    result = run_trial(study, run, tmp_path / "states", keep_weights=tmp_path / "kept.safetensors")
    step, loss = result["loss_curve"][best]
    assert (result["best_step"], result["dev_loss"]) == (step, loss)
    assert abs(result["loss_curve"][0][1] - result["loss_curve"][-1][1]) > 0.01

    recipe = study.recipe_of("toy", "concat", 1)
    model, words = load_attached(recipe, adapter_config(recipe), [])
    kept = load_file(tmp_path / "kept.safetensors")
    assert kept.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(kept, strict=False)
    splits = load_splits(recipe.data, TASK, 1)
    dev, test = (Evaluation(TASK, [], p, TASK.encode(p, words, [], 10), None, "all") for p in (splits.dev, splits.test))
    trainer = make_trainer(model, words, recipe, dev, dev, tmp_path / "out")
    trainer.compute_metrics = None
    found = [part.scores(*trainer.predict(part.dataset)[:2])["loss"] for part in (dev, test)]
    assert found == pytest.approx([result["dev_loss"], result["test_loss"]], rel=1e-3)
