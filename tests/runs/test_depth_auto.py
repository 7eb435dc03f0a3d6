"""Recipes with `adapter.fusion_depth: auto`: which depths are tried, which is chosen, what a run keeps, and what is refused."""

import json

import pytest
import torch
from families import FAMILIES
from support import tiny
from support_masked import write_files
from support_study import METHODS, refused, write_study
from support_text import SENTENCES, conll, save_decoder, save_model, tokenizer, write_recipe

from fusion_adapters import FusionConfig, StaleCacheError, load_run, predict
from fusion_adapters.cli import app, main
from fusion_adapters.runs import training
from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.depths import Tried, at_depth, choose, depths_to_try, standard_error
from fusion_adapters.runs.evaluation import Evaluation
from fusion_adapters.runs.fitting import Fit
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.states import LayerStateCache
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits
from fusion_adapters.tuner import fusion_layers

TEXTS = TASKS["sequence_classification"]


def write_auto(folder, head="token", adapter=None, data=None, **changes):
    """A recipe of four blocks with enough development examples."""
    path = write_recipe(
        folder,
        head,
        adapter={"fusion_depth": "auto", **(adapter or {})},
        data={"dev_fraction": 0.34, **(data or {})},
        **changes,
    )
    if head == "token":
        (folder / "train.conll").write_text(conll(SENTENCES * 12), encoding="utf-8")
    else:
        rows = ["anna lives in oslo,place", "bob the old man,person", "acme corp,none"] * 12
        (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path


def tried(folder):
    return json.loads((folder / "metrics.json").read_text())["depths"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A run from its recipe in the shell: where every depth learns all there is, and what the terminal showed is not looked at."""
    folder = tmp_path_factory.mktemp("swept")
    path = write_auto(folder, training={"num_train_epochs": 12, "learning_rate": 2e-2})
    run_recipe(load_recipe(path), folder / "run")
    return folder


def test_of_depths_that_score_alike_the_smallest_is_chosen_and_saved_as_a_number(swept):
    record = tried(swept / "run")
    assert [row["depth"] for row in record["tried"]] == [1, 2, 3, 4]
    assert {row["f1"] for row in record["tried"]} == {1.0}
    assert record["chosen"] == 1
    saved = json.loads((swept / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["fusion_depth"] == 1 and saved["fusion_num_layers"] == 4


def test_the_sweep_is_recorded_and_nothing_else_stays(swept):
    record, run = tried(swept / "run"), json.loads((swept / "run" / "run.json").read_text())
    metrics = json.loads((swept / "run" / "metrics.json").read_text())
    assert run["depths"] == record and run["recipe"]["adapter"]["fusion_depth"] == record["chosen"]
    assert load_recipe(swept / "run" / "recipe.yaml").adapter["fusion_depth"] == record["chosen"]
    for row in record["tried"]:
        assert row["seconds"] > 0 and row["parameters"] > 0 and row["below_best"] == row["standard_error"] == 0
    assert metrics["scores"].keys() == {"dev", "test"} and metrics["reload_difference"] == 0
    assert metrics["seconds"].keys() == {"train", "states", "depths", "total"}
    assert sorted(p.name for p in swept.iterdir()) == ["model", "recipe.yaml", "run", "test.conll", "train.conll"]
    assert sorted(p.name for p in (swept / "run").iterdir()) == ["adapter", "metrics.json", "recipe.yaml", "run.json"]


def test_the_adapter_loads_cut_and_predicts(swept):
    run = load_run(swept / "run")
    (layer,) = fusion_layers(run.model)
    assert layer.backbone.num_layers == 1
    (found,) = predict(run, ["Anna lives in Oslo ."])
    assert [(e["type"], e["text"]) for e in found["entities"]] == [("PER", "Anna"), ("LOC", "Oslo")]


@pytest.mark.parametrize("head", ["token", "sequence"])
def test_each_depth_is_trained_as_a_run_with_that_number_from_the_same_states(head, tmp_path):
    settings = ["adapter.modules_to_save=[pooler]"] if head == "sequence" else []
    recipe = load_recipe(write_auto(tmp_path, head, training={"num_train_epochs": 2, "learning_rate": 3e-3}), settings)
    cache_recipe(recipe, tmp_path / "states", dtype="float32")
    metrics = run_recipe(recipe, tmp_path / "run", cache=tmp_path / "states")
    splits, name = load_splits(recipe.data, recipe.task, recipe.seed), recipe.task.main.name
    for row in metrics["depths"]["tried"]:
        alone = at_depth(recipe, row["depth"])
        model, words = load_attached(alone, adapter_config(alone), splits.labels, cut=False)
        states = LayerStateCache(tmp_path / "states", model, tokenizer=words, max_length=recipe.data.max_length)
        fit = Fit(model, words, alone, splits, tmp_path / "alone", states)
        fit.train()
        expected = fit.metrics()
        assert row[name] == expected["scores"]["dev"][name] and row["parameters"] == expected["parameters"]["total"]
        if row["depth"] == metrics["depths"]["chosen"]:
            assert metrics["dev_by_epoch"] == expected["dev_by_epoch"] and metrics["scores"] == expected["scores"]


def test_test_data_are_scored_once_and_the_backbone_runs_once(tmp_path, monkeypatch, capsys):
    scored, extracted = [], []
    predictions, extract = Evaluation.predictions, training.cache_layer_states

    def counted(self, trainer):
        scored.append(len(self.examples))
        return predictions(self, trainer)

    monkeypatch.setattr(Evaluation, "predictions", counted)
    monkeypatch.setattr(training, "cache_layer_states", lambda *a, **k: extracted.append(k["layers"]) or extract(*a, **k))
    app(["train", str(write_auto(tmp_path)), "--output", str(tmp_path / "run")], standalone_mode=False)
    assert extracted == [[1, 2, 3, 4]]
    assert scored == [12, 12, 12, 12, 3]
    told = capsys.readouterr().out
    assert "fusion_depth: auto, f1" in told and f"chosen: {tried(tmp_path / 'run')['chosen']}" in told


def test_what_stands_beside_reads_the_same_states_and_lora_trains_live(tmp_path, monkeypatch):
    extracted, extract = [], training.cache_layer_states
    monkeypatch.setattr(training, "cache_layer_states", lambda *a, **k: extracted.append(k["layers"]) or extract(*a, **k))
    beside = {
        "last": {"adapter": {"fusion": "last"}},
        "low": {"adapter": {"fusion": "concat", "fusion_bottleneck": 4, "fusion_depth": 0.5, "fusion_layers": [0, 1]}},
        "lora": {"adapter": {"fusion": "last", "r": 2, "target_modules": ["query"]}},
    }
    metrics = run_recipe(load_recipe(write_auto(tmp_path, beside=beside)), tmp_path / "run")
    assert extracted == [[0, 1, 2, 3, 4]]
    assert [("failed" in found) for found in metrics["beside"].values()] == [False] * 3
    assert metrics["beside"]["lora"]["parameters"]["lora"] > 0


def test_a_budget_is_settled_at_each_depth(tmp_path):
    metrics = run_recipe(load_recipe(write_auto(tmp_path, adapter={"fusion_budget": 4000})), tmp_path / "run")
    head = metrics["parameters"]["head"]
    assert all(3500 < row["parameters"] - head <= 4000 for row in metrics["depths"]["tried"])
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["fusion_budget"] is None and saved["fusion_bottleneck"] > 0


def test_means_over_texts_on_a_decoder(tmp_path):
    path = write_auto(tmp_path, "sequence", adapter={"fusion": "concat", "fusion_pool": "mean", "fusion_bottleneck": 4})
    save_decoder(tmp_path / "model")
    cache = cache_recipe(load_recipe(path), tmp_path / "states")
    assert cache.manifest["means"] and cache.layers == [1, 2, 3, 4]
    metrics = run_recipe(load_recipe(path), tmp_path / "run", cache=tmp_path / "states")
    assert len(metrics["depths"]["tried"]) == 4
    assert predict(load_run(tmp_path / "run"), ["anna lives in oslo"])[0]["label"] in ("place", "person", "none")


def test_a_backbone_that_cannot_be_cut(tmp_path):
    path = write_auto(tmp_path)
    FAMILIES["albert"].build("token", num_hidden_groups=2, vocab_size=120).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    chosen = run_recipe(load_recipe(path), tmp_path / "run")["depths"]["chosen"]
    (layer,) = fusion_layers(load_run(tmp_path / "run").model)
    assert (layer.backbone.num_layers, layer.running.num_layers) == (4, chosen)


def test_a_depth_whose_training_fails_is_left_out_and_a_run_of_none_leaves_nothing(tmp_path, monkeypatch):
    recipe, failing = load_recipe(write_auto(tmp_path)), {1, 3}
    train = Fit.train

    def diverge(self):
        train(self)
        if self.model.active_peft_config.fusion_depth in failing:
            raise ValueError("The training diverged: all of it.")

    monkeypatch.setattr(Fit, "train", diverge)
    record = run_recipe(recipe, tmp_path / "run")["depths"]
    assert record["chosen"] in (2, 4)
    assert [row.get("failed") for row in record["tried"]] == ["The training diverged: all of it.", None] * 2
    failing.update((2, 4))
    with pytest.raises(ValueError, match=r"failed at every depth that fusion_depth: auto tried\. The training diverged"):
        run_recipe(recipe, tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "recipe.yaml", "run", "test.conll", "train.conll"]


# the choice


def found(depth, predicted, gold):
    score = TEXTS.score(gold, predicted)
    parts = {"scores": {"dev": score}, "parameters": {"total": 10 * depth}, "seconds": {"train": 1.0}}
    return Tried(depth, parts, (gold, predicted))


def right(share, count=100, shift=0):
    """Predictions of which a share is right, beginning with another example."""
    return ["x" if (i + shift) % count < share * count else "y" for i in range(count)]


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ([0.9, 0.9, 0.9], 2),
        ([0.5, 0.9, 0.9], 4),
        ([0.5, 0.7, 0.9], 6),
        ([0.8, 0.87, 0.9], 4),
        ([0.6, 0.9, 0.5], 4),
        ([0.0, 0.0, 0.0], 2),
    ],
)
def test_the_smallest_depth_within_one_standard_error(shares, chosen):
    gold = ["x"] * 100
    record = choose([found(2 * i, right(share, shift=30 * i), gold) for i, share in enumerate(shares, 1)], TEXTS)
    assert record["chosen"] == chosen
    assert [row["accuracy"] for row in record["tried"]] == pytest.approx(shares)


def test_the_error_is_that_of_the_difference_on_the_same_examples():
    gold = ["x"] * 200
    same, other = right(0.6, 200), right(0.6, 200, shift=80)
    rows = [choose([found(1, first, gold), found(2, right(0.65, 200), gold)], TEXTS)["tried"][0] for first in (same, other)]
    assert rows[0]["standard_error"] < rows[1]["standard_error"]
    assert rows[0]["standard_error"] == pytest.approx((0.05 * 0.95 / 200) ** 0.5, rel=0.35)
    assert standard_error([0.5]) == 0


def test_a_large_error_gives_up_no_more_than_a_twentieth_of_the_best():
    gold = ["x"] * 20
    wide = choose([found(1, right(0.75, 20, shift=10), gold), found(2, right(0.85, 20), gold)], TEXTS)
    assert wide["tried"][0]["standard_error"] > wide["tried"][0]["below_best"] and wide["chosen"] == 2
    assert choose([found(1, right(0.9, 20, shift=10), gold), found(2, right(0.9, 20), gold)], TEXTS)["chosen"] == 1


def test_one_example_in_a_hundred_is_within_its_error():
    gold = ["x"] * 100
    assert choose([found(1, right(0.89), gold), found(2, right(0.9), gold)], TEXTS)["chosen"] == 1
    assert choose([found(1, right(0.87), gold), found(2, right(0.9), gold)], TEXTS)["chosen"] == 2


@pytest.mark.parametrize(
    ("blocks", "layers", "expected"),
    [
        (30, None, [5, 10, 15, 20, 25, 30]),
        (12, None, [2, 4, 6, 8, 10, 12]),
        (6, None, [1, 2, 3, 4, 5, 6]),
        (4, None, [1, 2, 3, 4]),
        (2, None, [1, 2]),
        (12, [0, 3, 5], [5, 6, 8, 10, 12]),
        (12, [2, -1], [3, 4, 6, 8, 10, 12]),
        (12, [-4, -1], [3, 4, 6, 8, 10, 12]),
        (12, [11], [11, 12]),
    ],
)
def test_the_depths_are_sixths_that_have_the_layers(blocks, layers, expected):
    assert depths_to_try(FusionConfig(fusion_layers=layers), tiny("bert", depth=blocks)) == expected


# refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"r": 4, "target_modules": ["query"]}}, "auto and LoRA inside the backbone.*Give a number of blocks"),
        ({"data": {"dev_fraction": 0.1}}, r"dev_fraction=0\.1 cuts off 4; at least 10 are needed.*Raise data\.dev_fraction"),
        ({"data": {"dev": "test.conll"}}, r"data\.dev holds 3; at least 10"),
        (
            {"adapter": {"fusion_layers": [0, 4]}},
            r"fusion_layers=\[0, 4\] only with its last block \(4\).*Leave fusion_depth out",
        ),
        ({"adapter": {"fusion_layers": [0, 5]}}, "out of range"),
        ({"beside": {"x": {"adapter": {"fusion_depth": "auto"}}}}, r"beside\.x.*a depth is chosen for the run itself alone"),
        ({"adapter": {"fusion_depth": "automatic"}}, "'automatic' is no depth"),
    ],
)
def test_where_no_depth_can_be_chosen_a_run_says_so_and_leaves_nothing(changes, said, tmp_path):
    path = write_auto(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        run_recipe(load_recipe(path), tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "recipe.yaml", "test.conll", "train.conll"]


def test_a_cache_of_lower_blocks_is_refused(tmp_path):
    recipe = load_recipe(write_auto(tmp_path))
    cache_recipe(at_depth(recipe, 2), tmp_path / "states")
    with pytest.raises(StaleCacheError, match="was made for something else"):
        run_recipe(recipe, tmp_path / "run", cache=tmp_path / "states")
    assert not (tmp_path / "run").exists()


def test_an_encoder_decoder_is_refused(tmp_path):
    path = write_auto(tmp_path, "sequence", adapter={"modules_to_save": ["classification_head"]})
    FAMILIES["bart"].build("sequence", vocab_size=120, pad_token_id=0, eos_token_id=3).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"auto and an encoder-decoder \('bart'\).*Give a number of blocks"):
        run_recipe(load_recipe(path), tmp_path / "run")


def test_a_head_over_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"auto with task: masked_lm.*Leave fusion_depth out"):
        load_recipe(write_files(tmp_path, adapter={"fusion_depth": "auto"}))


def test_outside_of_recipes_it_is_refused_with_what_to_do(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"is for recipes.*train several depths.*give FusionConfig the number of blocks"):
        FusionConfig(fusion_depth="auto")
    methods = {"dwatt": METHODS["dwatt"], "low": {"adapter": {"fusion_depth": "auto"}}}
    path = write_study(tmp_path, methods=methods, baseline="dwatt", reference=None)
    told = refused([path, "--output", tmp_path / "out"], capsys)
    assert "methods.low.adapter.fusion_depth: auto" in told and "a method for each depth" in told
    save_model(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["budget", "--model", str(tmp_path / "model"), "--parameters", "4000", "--depth", "auto"])
    assert "'auto' is chosen on development data" in " ".join(capsys.readouterr().err.split())


def test_a_seed_gives_one_choice(tmp_path):
    recipe = load_recipe(write_auto(tmp_path))
    first, second = (run_recipe(recipe, tmp_path / "run", overwrite=True) for _ in range(2))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run["depths"]["tried"]] for run in (first, second)]
    assert rows[0] == rows[1] and torch.equal(
        torch.tensor(first["depths"]["chosen"]), torch.tensor(second["depths"]["chosen"])
    )
