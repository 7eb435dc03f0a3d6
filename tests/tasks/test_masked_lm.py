"""Masked language modelling: masks, rows, scores, the head at labelled positions alone, runs and comparisons."""

import csv
import json
import math

import pytest
import torch
from peft import AutoPeftModel
from safetensors.torch import load_file
from support import attached, disturb, tiny, without_dropout
from support_masked import TASK, TEXTS, write_files, write_study
from support_text import WORDS, save_model, tokenizer
from torch.nn.functional import cross_entropy, log_softmax

from fusion_adapters.cli import main
from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.evaluation import Evaluation
from fusion_adapters.runs.loading import load_model
from fusion_adapters.runs.recipe import BackboneRecipe, load_recipe
from fusion_adapters.runs.trainers import labelled_logits, make_trainer
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.study import load_study
from fusion_adapters.study.report import write_report
from fusion_adapters.study.statistics import summarise
from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.masking import Masker
from fusion_adapters.tasks.splits import load_splits


def examples(texts=TEXTS):
    return [Example([text], []) for text in texts]


def rows_of(texts, max_length=32):
    return TASK.encode(examples(texts), tokenizer(mask=True), [], max_length).rows


def unmasked(row):
    return [i if label == IGNORED else label for i, label in zip(row["input_ids"], row["labels"], strict=True)]


def test_masks_are_those_of_the_row_whatever_is_around_it():
    whole = rows_of(TEXTS)
    assert rows_of(TEXTS) == whole
    assert rows_of(TEXTS[::-1]) == whole[::-1] and rows_of(TEXTS[2:4]) == whole[2:4]
    for row in whole:
        assert set(row) == {"input_ids", "attention_mask", "labels"}
        pieces = sum(i not in tokenizer(mask=True).all_special_ids for i in unmasked(row))
        assert sum(label != IGNORED for label in row["labels"]) == max(1, round(0.15 * pieces))


def test_the_shares_are_berts_and_special_tokens_stay():
    words = tokenizer(mask=True)
    special = set(words.all_special_ids)
    masker = Masker(words)
    fates = {"hidden": 0, "kept": 0, "other": 0}
    places = torch.zeros(40)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        row = [2, *torch.randint(4, len(words) - 1, (38,), generator=generator).tolist(), 3]
        row[5] = words.unk_token_id
        hidden, chosen = masker(row)
        assert len(chosen) == round(0.15 * 37) and not {0, 5, 39} & set(chosen)
        assert all(hidden[i] == row[i] for i in range(40) if i not in chosen)
        places[chosen] += 1
        for i in chosen:
            fate = "hidden" if hidden[i] == words.mask_token_id else "kept" if hidden[i] == row[i] else "other"
            assert fate != "other" or hidden[i] not in special
            fates[fate] += 1
    total = sum(fates.values())
    assert [round(fates[f] / total, 1) for f in ("hidden", "kept", "other")] == [0.8, 0.1, 0.1]
    assert places[1:5].min() > 20 and places[34:39].min() > 20, "some positions are hardly ever chosen"


@pytest.mark.parametrize("max_length", [4, 7, 64])
def test_a_long_text_becomes_rows_without_loss(max_length):
    words = tokenizer(mask=True)
    long = " ".join([*WORDS, "zebra", "unusual"] * 3)
    encoded = TASK.encode(examples([long, "anna"]), words, [], max_length)
    assert all(len(row["input_ids"]) <= max_length for row in encoded.rows)
    pieces = [i for row in encoded.rows[:-1] for i in unmasked(row)[1:-1]]
    assert pieces == words(long, add_special_tokens=False)["input_ids"]
    assert encoded.notes == {"split_texts": 1, "rows_without_pieces": 0}
    assert [index for index, _ in encoded.words] == [0] * (len(encoded.rows) - 1) + [1]


def test_a_text_without_pieces_is_counted():
    encoded = TASK.encode(examples(["\ufe0f", "é€ € €", "anna"]), tokenizer(mask=True), [], 32)
    assert len(encoded.rows) + encoded.notes["rows_without_pieces"] == 3
    assert encoded.notes["rows_without_pieces"] >= 1


def test_text_files_hold_a_text_on_each_line(tmp_path):
    (tmp_path / "a.txt").write_text(" \n = Title = \n \n" + "a text , \n" * 9, encoding="utf-8")
    data = load_splits(DataRecipe(path=str(tmp_path), train="a.txt"), TASK, 1)
    assert sorted({e.words[0] for e in data.train + data.dev}) == ["= Title =", "a text ,"]
    assert (len(data.train), len(data.dev), data.labels) == (9, 1, [])
    (tmp_path / "a.csv").write_text("sentence,label\none,x\ntwo,y\nthree,y\n", encoding="utf-8")
    data = load_splits(DataRecipe(path=str(tmp_path), train="a.csv"), TASK, 1)
    assert len(data.train) == 2 and not data.train[0].labels


def test_scores_against_values_worked_out_by_hand():
    predicted = [(7, 0.5), (8, 1.5), (9, 0.25), (4, 3.75)]
    scores = TASK.score([7, 8, 1, 2], predicted)
    assert scores == pytest.approx({"accuracy": 0.5, "loss": 1.5, "perplexity": math.exp(1.5)})
    assert TASK.score([1], [(1, 1e6)])["perplexity"] < math.inf


def trainer_of(recipe, folder):
    """The recipe's trainer, its development set, model and data."""
    data = load_splits(recipe.data, TASK, recipe.seed)
    model, words = load_attached(recipe, adapter_config(recipe), [])
    train, dev = (
        Evaluation(TASK, [], part, TASK.encode(part, words, [], recipe.data.max_length)) for part in (data.train, data.dev)
    )
    return make_trainer(model, words, recipe, train, dev, folder), dev, model, data


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in rows]) for k, v in fill.items()}


@pytest.mark.parametrize("fusion", ["dwatt", "deeper"])
def test_the_head_at_labelled_positions_answers_as_the_whole_model(fusion):
    model = disturb(attached(head="mlm", fusion=fusion, modules_to_save=["transform"])).eval()
    batch = padded(rows_of(TEXTS))
    labels = batch["labels"]
    whole = model(**batch)
    at = labelled_logits(model, batch)
    torch.testing.assert_close(at, whole.logits[labels != IGNORED])
    loss = cross_entropy(at, labels[labels != IGNORED])
    torch.testing.assert_close(loss, whole.loss)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole.loss, [p for _, p in named], allow_unused=True)
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, _), a, b in zip(named, expected, found, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not any("embedding" in n or "decoder" in n for n, _ in named)
    assert model(**batch).logits.shape[:2] == labels.shape, "the hook is still there"


def test_an_evaluation_is_exact_over_pieces(tmp_path):
    recipe = load_recipe(write_files(tmp_path, training={"per_device_eval_batch_size": 4}))
    trainer, dev, model, data = trainer_of(recipe, tmp_path / "out")
    result = trainer.evaluate()
    right, nlls = [], []
    model.eval()
    for row in TASK.encode(data.dev, tokenizer(mask=True), [], 10).rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position, piece in enumerate(row["labels"]):
            if piece != IGNORED:
                right.append(int(logits[position].argmax()) == piece)
                nlls.append(-float(log_softmax(logits[position], -1)[piece]))
    assert result["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert result["eval_loss"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    predicted = trainer.predict(dev.dataset)
    assert [p.ndim for p in predicted.predictions] == [2, 2], "logits of the vocabulary were kept"
    with pytest.raises(RuntimeError, match="another order"):
        dev.scores(predicted.predictions, predicted.label_ids[::-1])


def test_gradient_accumulation_weighs_pieces_alike(tmp_path):
    weights = []
    quiet = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    for size, steps in ((4, 1), (2, 2)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        recipe = load_recipe(write_files(tmp_path, training={**changes, "optim": "sgd", "learning_rate": 0.1, **quiet}))
        trainer, _, model, _ = trainer_of(recipe, tmp_path / f"out{size}")
        without_dropout(model)
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", ["dwatt", "deeper", "last"])
def test_cached_training_gives_the_numbers_of_live_training(tmp_path, fusion):
    path = write_files(tmp_path, adapter={"fusion": fusion})
    recipe = load_recipe(path)
    live = run_recipe(recipe, tmp_path / "live")
    cache_recipe(recipe, tmp_path / "states", "float32")
    cached = run_recipe(recipe, tmp_path / "cached", cache=tmp_path / "states")
    for split in ("dev", "test"):
        assert set(live["scores"][split]) == {"accuracy", "loss", "perplexity"}
        assert cached["scores"][split] == pytest.approx(live["scores"][split], rel=1e-4)
    losses = [[epoch["loss"] for epoch in m["dev_by_epoch"]] for m in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]


def test_a_run_saves_the_fresh_head_without_embeddings_and_predicts(tmp_path, capsys):
    main(["train", str(write_files(tmp_path)), "--output", str(tmp_path / "run")])
    told = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["reload_difference"] == 0
    assert f"{metrics['scores']['test']['perplexity']:.3f}" in told
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    parts = metrics["parameters"]
    assert sum(t.numel() for t in tensors.values()) == parts["total"] and parts["head"] == 32 * 32 + 3 * 32
    assert not any("embeddings" in name or "decoder" in name for name in tensors)
    again = AutoPeftModel.from_pretrained(tmp_path / "run" / "adapter").eval()
    assert type(again.get_base_model()).__name__ == "BertForMaskedLM"

    main(["predict", str(tmp_path / "run"), "--json", "--text", "anna [MASK] in [MASK] ."])
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    ids = tokenizer(mask=True)("anna [MASK] in [MASK] .", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = again(input_ids=ids).logits[0, [2, 4]].argmax(-1)
    pieces = tokenizer(mask=True).convert_ids_to_tokens(best.tolist())
    assert [mask["piece"] for mask in answer["masks"]] == pieces
    assert "[MASK]" not in answer["filled"] and answer["filled"].startswith("anna ")
    main(["predict", str(tmp_path / "run"), "--text", "anna [MASK]"])
    assert "anna" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "run"), "--text", "anna lives"])
    assert "holds no [MASK]" in " ".join(capsys.readouterr().err.split())


def test_a_study_reports_the_loss(tmp_path, capsys):
    path, out = write_study(tmp_path), tmp_path / "out"
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    told = capsys.readouterr().out
    assert "Loss on the same data" in told and "Loss on the development data" in told
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(p.read_text()) for p in out.glob("runs/toy/*/*.json")]
    for run in runs:
        assert [step for step, _ in run["loss_curve"]] == [step for step, _ in run["curve"]]
        assert run["dev_loss"] == dict(map(tuple, run["loss_curve"]))[run["best_step"]]
        assert ("test_loss" in run) == (run["stage"] == "report")
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["dev_loss"] for row in rows) and {bool(row["test_loss"]) for row in rows} == {True, False}
    (summary,) = [r for r in json.loads((out / "summary.json").read_text())["rows"] if r["method"] == "dwatt"]
    expected = [r["test_loss"] for r in runs if r["method"] == "dwatt" and r["stage"] == "report"]
    assert sorted(summary["test_loss"]["values"]) == pytest.approx(sorted(expected))
    assert f"{summary['test_loss']['mean']:.3f}" in told
    (depth,) = [r["depth"] for r in runs if r.get("depth")]
    (weights,) = depth.values()
    assert list(depth) == ["predicted pieces"] and sum(weights) == pytest.approx(1, abs=1e-3)

    # runs that were stored before there was a loss are reported as ever
    for run in runs:
        for key in ("loss_curve", "dev_loss", "test_loss"):
            run.pop(key, None)
    study = load_study(path)
    (tmp_path / "old").mkdir()
    write_report(study, runs, summarise(study, runs), tmp_path / "old")
    assert "Loss" not in (tmp_path / "old" / "summary.md").read_text()
    assert (tmp_path / "old" / "steps.png").is_file() and not (tmp_path / "old" / "loss.png").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_backbone_trains_the_head_in_float32(tmp_path, dtype):
    metrics = run_recipe(load_recipe(write_files(tmp_path, backbone={"dtype": dtype})), tmp_path / "out")
    assert metrics["reload_difference"] == 0 and math.isfinite(metrics["scores"]["test"]["loss"])
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"modules_to_save": None}}, r"lacks 4 tensors that BertForMaskedLM needs.*transform"),
        ({"adapter": {"modules_to_save": ["cls"]}}, r"'cls', which covers the 3,840 embeddings that BertForMaskedLM shares"),
        ({"adapter": {"modules_to_save": ["transform", "decoder"]}}, "'decoder', which covers the 3,840 embeddings"),
        ({"data": {"labels": ["a"]}}, "predicts pieces of the texts themselves"),
        ({"task": "token_classification"}, "plain text holds no labels"),
        ({"data": {"format": "conll"}}, "CoNLL files hold tagged words"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_recipe(load_recipe(write_files(tmp_path, **changes)), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_backbones_without_mask_or_head_are_refused(tmp_path):
    path = write_files(tmp_path)
    save_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no mask token, which task: masked_lm needs"):
        run_recipe(load_recipe(path), tmp_path / "out")
    tiny("llama", "lm").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="has no head for masked language modelling") as caught:
        load_model(BackboneRecipe(model=str(tmp_path / "llama")), TASK, [])
    assert "\n" not in str(caught.value)


def test_a_head_in_the_checkpoint_is_used_and_its_bias_kept(tmp_path):
    model = tiny("bert", "mlm")
    model.cls.predictions.bias.data.fill_(0.5)
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(BackboneRecipe(model=str(tmp_path / "model")), TASK, [])
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_predictions_come_back_to_their_rows():
    evaluation = Evaluation(TASK, [], examples(), TASK.encode(examples(), tokenizer(mask=True), [], 32))
    labels = [row["labels"] for row in evaluation.dataset]
    width = max(map(len, labels))
    gold = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]).numpy()
    scores = evaluation.scores((gold, (gold != IGNORED) * 0.5), gold)
    assert scores == pytest.approx({"accuracy": 1.0, "loss": 0.5, "perplexity": math.exp(0.5)})
