"""Causal language modelling in runs: the loss is transformers' own, cached as live, the head stays, predictions, comparisons."""

import json
import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from support import attached, disturb
from support_causal import PAIRS, TASK, TEXTS, model, save_model, tokenizer, write_files, write_study
from support_text import save_model as save_bert
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from fusion_adapters.cli import main
from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.evaluation import Evaluation
from fusion_adapters.runs.loading import load_model
from fusion_adapters.runs.predicting import TrainedRun, load_run, predict
from fusion_adapters.runs.recipe import BackboneRecipe, load_recipe, parse_recipe
from fusion_adapters.runs.trainers import LabelledTrainer, labelled_logits, make_trainer
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.study import load_study
from fusion_adapters.study.report import summary_text
from fusion_adapters.study.statistics import steps_to_share
from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.splits import load_splits

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def batch_of(texts=TEXTS, prompts=False):
    words = tokenizer()
    examples = [Example([*(["who lives\n"] if prompts else []), text], []) for text in texts]
    return TASK.collator(words)(TASK.encode(examples, words, [], 32).rows)


@pytest.mark.parametrize("fusion", ["dwatt", "deeper"])
@pytest.mark.parametrize("prompts", [False, True])
def test_the_head_where_something_is_predicted_has_the_loss_of_the_whole_model(fusion, prompts):
    attached_model = disturb(attached("llama", "lm", model=model(), fusion=fusion)).eval()
    batch = dict(batch_of(prompts=prompts))
    whole = attached_model(**batch)
    at = labelled_logits(attached_model, batch, predicts_next=True)
    assert len(at) == int((batch["labels"] != IGNORED).sum())
    loss = cross_entropy(at, batch["labels"][batch["labels"] != IGNORED])
    torch.testing.assert_close(loss, whole.loss, rtol=0, atol=1e-6)
    named = [(n, p) for n, p in attached_model.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole.loss, [p for _, p in named], allow_unused=True)
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, _), a, b in zip(named, expected, found, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not any("lm_head" in n or "embed" in n for n, _ in named)


def test_labels_of_a_first_position_count_as_none():
    attached_model = attached("llama", "lm", model=model())
    batch = dict(batch_of())
    full = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}
    torch.testing.assert_close(
        labelled_logits(attached_model, full, predicts_next=True), labelled_logits(attached_model, batch, predicts_next=True)
    )


def trainer_of(recipe, folder):
    data = load_splits(recipe.data, TASK, recipe.seed)
    loaded, words = load_attached(recipe, adapter_config(recipe), [])
    train, dev = (Evaluation(TASK, [], p, TASK.encoded(p, words, [], recipe.data)) for p in (data.train, data.dev))
    return make_trainer(loaded, words, recipe, train, dev, folder), dev, loaded


@pytest.mark.parametrize("form", ["text", "messages"])
def test_an_evaluation_is_exact_over_pieces(tmp_path, form):
    trainer, dev, loaded = trainer_of(load_recipe(write_files(tmp_path, form)), tmp_path / "out")
    assert isinstance(trainer, LabelledTrainer) and trainer.args.per_device_eval_batch_size == 8
    result = trainer.evaluate()
    right, nlls = [], []
    loaded.eval()
    for row in dev.encoded.rows:
        with torch.no_grad():
            scores = loaded(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, piece in enumerate(row["labels"]):
            if piece != IGNORED:
                right.append(int(scores[position - 1].argmax()) == piece)
                nlls.append(-float(scores[position - 1, piece]))
    assert result["eval_loss"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    found = dev.predicted_scores(trainer)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert [p.ndim for p in trainer.predict(dev.dataset).predictions] == [2, 2], "logits of the vocabulary were kept"


@pytest.mark.parametrize(("form", "fusion"), [("packed", "dwatt"), ("completion", "deeper")])
def test_cached_training_gives_the_numbers_of_live_training(tmp_path, form, fusion):
    recipe = load_recipe(write_files(tmp_path, form, adapter={"fusion": fusion, "fusion_heads": None}))
    live = run_recipe(recipe, tmp_path / "live")
    cache_recipe(recipe, tmp_path / "states", "float32")
    cached = run_recipe(recipe, tmp_path / "cached", cache=tmp_path / "states")
    for split in ("dev", "test"):
        assert list(live["scores"][split]) == ["loss", "perplexity", "accuracy"]
        assert cached["scores"][split] == pytest.approx(live["scores"][split], rel=1e-4)
    losses = [[epoch["loss"] for epoch in m["dev_by_epoch"]] for m in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] > losses[0][1]


@pytest.mark.parametrize(("tied", "lora"), [(True, LORA), (False, {})], ids=["tied, lora", "alone"])
def test_the_head_stays_frozen_and_is_not_saved(tmp_path, tied, lora):
    path = write_files(tmp_path, "completion", adapter=lora)
    save_model(tmp_path / "model", tied=tied)
    before = model(tied=tied).lm_head.weight
    metrics = run_recipe(load_recipe(path), tmp_path / "run")
    assert metrics["reload_difference"] == 0 and metrics["parameters"]["head"] == 0
    assert bool(metrics["parameters"]["lora"]) == bool(lora)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == metrics["parameters"]["total"]
    assert not any("lm_head" in name or "embed" in name for name in tensors)
    run = load_run(tmp_path / "run")
    base = run.model.get_base_model()
    assert torch.equal(base.lm_head.weight, before)
    assert (base.lm_head.weight is base.get_input_embeddings().weight) == tied
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    assert type(again.get_base_model()).__name__ == "LlamaForCausalLM"


PROMPTS = {
    "text": "anna lives",
    "completion": "anna lives\n",
    "messages": "<|im_start|>user\nanna lives<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize(("form", "fusion"), [("text", "deeper"), ("completion", "dwatt"), ("messages", "dwatt")])
def test_predict_writes_what_generate_does(tmp_path, form, fusion, capsys):
    path = write_files(tmp_path, form, data={"max_new_tokens": 7}, adapter={"fusion": fusion, "fusion_heads": None})
    main(["train", str(path), "--output", str(tmp_path / "run"), "--set", "training.num_train_epochs=1"])
    capsys.readouterr()
    main(["predict", str(tmp_path / "run"), "--json", "--text", "anna lives"])
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    run, words = load_run(tmp_path / "run"), tokenizer()
    prompt = words(PROMPTS[form], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": 2, "use_cache": False}
        written = run.model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
    expected = {"text": "anna lives", "completion": words.decode(written, skip_special_tokens=True)}
    assert answer == {**expected, "ended": 2 in written.tolist()}
    main(["predict", str(tmp_path / "run"), "--text", "anna lives"])
    assert "anna lives" in capsys.readouterr().out


def test_a_completion_that_was_learnt_is_written_and_ends(tmp_path):
    training = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.0}
    quiet = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    path = write_files(tmp_path, "completion", training={**training, **quiet}, adapter={**LORA, "r": 8})
    metrics = run_recipe(load_recipe(path), tmp_path / "run")
    assert metrics["scores"]["test"]["loss"] < 0.3
    found = predict(load_run(tmp_path / "run"), [question for question, _ in PAIRS])
    assert [(p["completion"], p["ended"]) for p in found] == [(answer, True) for _, answer in PAIRS]
    with pytest.raises(ValueError, match=r"has no word pieces"):
        run = load_run(tmp_path / "run")
        run.recipe.data.separator = ""
        predict(run, [""])


def test_a_text_without_room_for_what_follows_is_refused():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=330, bos_token_id=2, eos_token_id=2)
    recipe = parse_recipe({"task": TASK.name, "backbone": {"model": "x"}, "data": {"path": ".", "max_new_tokens": 8}}, "x")
    run = TrainedRun(attached("llama", "lm", model=GPT2LMHeadModel(config)).eval(), tokenizer(), recipe, [])
    assert len(predict(run, ["anna lives"])) == 1
    with pytest.raises(
        ValueError, match=r"has 15 pieces, and up to 8 more are to be written.*has 16 positions. Give a shorter text"
    ):
        predict(run, ["anna lives " * 7])


def test_a_comparison_has_the_bare_model_fusions_and_lora(tmp_path, capsys):
    out = tmp_path / "out"
    main(["compare", str(write_study(tmp_path)), "--output", str(out), "--workers", "1"])
    told = capsys.readouterr().out
    assert "Loss (mean negative log-likelihood of a predicted piece, in nats; less is better) on the test data" in told
    assert "Perplexity, the exponential of that mean." in told and "Loss on the same data" not in told
    runs = [json.loads(p.read_text()) for p in out.glob("runs/toy/*/*.json")]
    reported = {run["method"]: run for run in runs if run["stage"] == "report"}
    assert reported["bare"]["steps"] == 0 and len(reported["bare"]["curve"]) == 1
    assert 0 <= reported["bare"]["training_cpu_seconds"] < 1, "an evaluation counts as training"
    (rows,) = [json.loads((out / "summary.json").read_text())["rows"]]
    by_method = {row["method"]: row for row in rows}
    assert by_method["dwatt"]["test"]["mean"] < by_method["bare"]["test"]["mean"]
    assert by_method["dwatt"]["to_baseline"]["mean"] < 0
    for name, row in by_method.items():  # the rate with the lowest loss
        tried = {run["rate"]: run["dev"] for run in runs if run["method"] == name and run["stage"] == "rate"}
        assert not tried or row["rate"] == min(tried, key=tried.get)
    assert reported["dwatt"]["test"] == reported["dwatt"]["test_loss"]
    (weights,) = reported["dwatt"]["depth"].values()
    assert sum(weights) == pytest.approx(1, abs=1e-3)
    bare = model()
    words = tokenizer()
    study = load_study(tmp_path / "study.yaml")
    data = study.data["toy"]
    rows = TASK.encoded(load_splits(data, TASK, 0).test, words, [], data).rows
    nlls = []
    for row in rows:
        with torch.no_grad():
            losses = bare(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        nlls += [-float(losses[i, piece]) for i, piece in enumerate(row["input_ids"][1:])]
    assert reported["bare"]["test"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-3)
    assert f"{math.exp(reported['bare']['test']):,.2f}" in summary_text(json.loads((out / "summary.json").read_text()))


def test_a_comparison_of_packed_texts_takes_all_of_them(tmp_path):
    with pytest.raises(
        ValueError, match=r"packs the texts of 'toy'.*Set sizes: \[all\], and data.limit for fewer texts"
    ) as caught:
        load_study(write_study(tmp_path, sizes=[4, "all"]))
    assert "\n" not in str(caught.value)
    load_study(write_study(tmp_path, "text", sizes=[4, "all"]))


def test_the_share_of_a_loss_is_counted_from_below():
    curve = [(10, 5.0), (20, 3.2), (30, 3.0), (40, 3.1)]
    assert steps_to_share(curve, higher=False) == 20
    assert steps_to_share([(10, math.nan)], higher=False) == 10


def test_an_adapter_without_anything_to_train_scores_the_bare_model(tmp_path):
    recipe = load_recipe(write_files(tmp_path, "text", beside={"bare": {"adapter": {"fusion": "last"}}}))
    metrics = run_recipe(recipe, tmp_path / "run")
    bare = metrics["beside"]["bare"]
    assert bare["parameters"]["total"] == 0 and bare["dev_by_epoch"] == []
    assert metrics["scores"]["test"]["loss"] < bare["scores"]["test"]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"fusion_depth": 2}}, r"made for the last block \(4\)"),
        ({"adapter": {"fusion_pool": "mean"}}, r"answers at every position"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, r"'lm_head', which covers the 10,560 embeddings"),
        ({"data": {"labels": ["a"]}}, r"has no label set"),
        ({"task": "masked_lm", "data": {"packing": True}}, r"data.packing, which task: masked_lm does not know"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_recipe(load_recipe(write_files(tmp_path, **changes)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"label_smoothing_factor, which task: causal_lm does not know"):
        load_recipe(write_files(tmp_path, training={"label_smoothing_factor": 0.1}))


def test_a_backbone_that_reads_both_ways_is_refused(tmp_path):
    save_bert(tmp_path / "bert", "mlm")
    with pytest.raises(ValueError, match=r"is not causal: each position has read the pieces after it") as caught:
        load_model(BackboneRecipe(model=str(tmp_path / "bert")), TASK, [])
    assert "\n" not in str(caught.value)
