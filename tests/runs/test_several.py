"""Several recipes from one extraction: each comes out as alone, bit for bit; what is refused, kept and gone on with."""

import json
import re
from functools import partial

import pytest
import support_causal
from families import FAMILIES
from support_several import SECTIONS, TEXTS, recipes_of, result_of, write_recipes

from fusion_adapters import load_run, predict
from fusion_adapters.cli import app, main
from fusion_adapters.runs import checkpoints, loading, several, together
from fusion_adapters.runs.files import check_output
from fusion_adapters.runs.several import cache_recipes, run_recipes
from fusion_adapters.runs.training import run_recipe
from fusion_adapters.states import LayerStateCache, StaleCacheError, extract
from fusion_adapters.states import cache as cache_module

LORA = {"fusion": "dwatt", "r": 2, "target_modules": ["query"]}


@pytest.fixture
def run_rows(monkeypatch):
    """The rows that went through the backbone in extractions."""
    found, run = [], extract.run

    def counted(backbone, inputs):
        mask = inputs["attention_mask"].bool()
        found.extend(tuple(row[real].tolist()) for row, real in zip(inputs["input_ids"], mask, strict=True))
        return run(backbone, inputs)

    monkeypatch.setattr(extract, "run", counted)
    return found


@pytest.fixture
def unloaded(monkeypatch):
    """Loading weights is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_pretrained", refuse)


def all_and_alone(folder, recipes):
    """Trains recipes together, and each alone from the same states."""
    outcomes = run_recipes(recipes(), folder / "all", folder / "states")
    assert {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed} == {}
    for name, recipe in recipes().items():
        run_recipe(recipe, folder / "alone" / name, cache=folder / "states")
    return outcomes


def test_each_comes_out_as_alone_bit_for_bit(tmp_path, run_rows):
    paths = write_recipes(tmp_path)
    outcomes = all_and_alone(tmp_path, lambda: recipes_of(paths))
    assert list(outcomes) == list(SECTIONS)
    assert len(run_rows) == len(set(run_rows)), "a text ran twice"
    assert len(run_rows) == len(LayerStateCache(tmp_path / "states"))
    for name, outcome in outcomes.items():
        together, alone = (result_of(tmp_path / kind / name) for kind in ("all", "alone"))
        assert together == alone, name
        assert outcome.metrics["scores"] == together["scores"] and outcome.metrics["dev_by_epoch"]
        assert outcome.metrics["reload_difference"] == 0
    for name, texts in (("entities", TEXTS), ("pooled", TEXTS), ("pairs", [f"{TEXTS[0]}\t{TEXTS[1]}"])):
        found = [predict(load_run(tmp_path / kind / name), texts) for kind in ("all", "alone")]
        assert found[0] == found[1], name
    seeds = {outcome.metrics["seed"] for outcome in outcomes.values()}
    assert len(seeds) == len(outcomes)


def test_the_checkpoint_and_every_shard_are_read_once(tmp_path, monkeypatch):
    paths = write_recipes(tmp_path, "entities", "intents", "low")
    monkeypatch.setattr(together, "cache_layer_states", partial(together.cache_layer_states, batch_size=2, shard_bytes=4096))
    read, opened, classes = [], [], []
    load, tensors_of = loading.load_pretrained, checkpoints._tensors
    monkeypatch.setattr(checkpoints, "_tensors", lambda recipe: opened.append(recipe) or tensors_of(recipe))
    monkeypatch.setattr(loading, "load_pretrained", lambda cls, *args, **kw: classes.append(cls) or load(cls, *args, **kw))
    shard = cache_module.read_shard
    monkeypatch.setattr(cache_module, "read_shard", lambda *args: read.append(args[2]) or shard(*args))
    monkeypatch.setattr(cache_module, "open_shard", None)  # what is in memory is not opened again
    outcomes = run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert not any(outcome.failed for outcome in outcomes.values())
    assert len(read) > 2 and sorted(set(read)) == read
    assert len(opened) == 1 and len(classes) == 4
    assert all(isinstance(cls, checkpoints.SharedClass) for cls in classes)


def test_states_that_memory_does_not_hold_are_read_from_the_disk(tmp_path, monkeypatch):
    paths = write_recipes(tmp_path, "entities", "intents")
    monkeypatch.setattr(together, "HELD", 0)
    monkeypatch.setattr(LayerStateCache, "hold", None)
    all_and_alone(tmp_path, lambda: recipes_of(paths))
    for name in ("entities", "intents"):
        assert result_of(tmp_path / "all" / name) == result_of(tmp_path / "alone" / name)


def test_a_decoder_with_language_modelling_pooling_and_words(tmp_path, run_rows):
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS * 4), encoding="utf-8")
    language = {
        "task": "causal_lm",
        "adapter": {"fusion": "concat", "fusion_bottleneck": 4, "fusion_depth": None},
        "data": {"train": "texts.txt", "test": "texts.txt"},
    }
    pooled = {"adapter": {"fusion": "dwatt", "fusion_pool": "mean", "modules_to_save": None}}
    paths = write_recipes(tmp_path, "entities", "pooled", "low", pooled=pooled, low=language)
    support_causal.save_model(tmp_path / "model")
    all_and_alone(tmp_path, lambda: recipes_of(paths))
    assert len(run_rows) == len(set(run_rows))
    for name in ("entities", "pooled", "low"):
        assert result_of(tmp_path / "all" / name) == result_of(tmp_path / "alone" / name), name
    assert recipes_of(paths)["low"].task.name == "causal_lm"


def test_with_something_beside_and_a_depth_that_the_run_chooses(tmp_path, run_rows):
    low = {"adapter": {"fusion": "concat", "fusion_bottleneck": 4, "fusion_depth": "auto"}, "data": {"dev": "train.conll"}}
    beside = {"beside": {"last layer": {"adapter": {"fusion": "last", "modules_to_save": ["pooler"]}}}}
    paths = write_recipes(tmp_path, "intents", "low", intents=beside, low=low)
    outcomes = all_and_alone(tmp_path, lambda: recipes_of(paths))
    assert len(run_rows) == len(set(run_rows))
    for name in ("intents", "low"):
        together, alone = (result_of(tmp_path / kind / name) for kind in ("all", "alone"))
        assert together["adapter_model.safetensors"] == alone["adapter_model.safetensors"], name
        assert together["scores"] == alone["scores"]
        for both in (together, alone):
            both["beside"] = {key: each["scores"] for key, each in both.get("beside", {}).items()}
            both["depths"] = [{**row, "seconds": 0} for row in both.get("depths", {}).get("tried", [])]
        assert together["beside"] == alone["beside"] and together["depths"] == alone["depths"]
    assert (
        len(outcomes["low"].metrics["depths"]["tried"]) > 2 and outcomes["intents"].metrics["beside"]["last layer"]["scores"]
    )
    again = run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert all(outcome.kept for outcome in again.values())


def test_pooled_recipes_alone_keep_a_mean_a_text(tmp_path):
    adapter = {"fusion": "concat", "fusion_pool": "mean", "modules_to_save": ["pooler"]}
    pooled = {"task": "sequence_classification", "adapter": adapter}
    data = {"train": "intents.csv", "test": "intents.csv"}
    paths = write_recipes(tmp_path, "pooled", "entities", entities={**pooled, "data": data})
    all_and_alone(tmp_path, lambda: recipes_of(paths))
    assert LayerStateCache(tmp_path / "states").manifest["means"]
    for name in ("pooled", "entities"):
        assert result_of(tmp_path / "all" / name) == result_of(tmp_path / "alone" / name)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intents": {"adapter": LORA}}, "recipe 'intents' cannot .* trains LoRA inside the backbone"),
        ({"intents": {"backbone": {"dtype": "bfloat16"}}}, "'entities' and 'intents' .*dtype: 'float32' and 'bfloat16'"),
        (
            {"intents": {"backbone": {"model": "elsewhere"}}},
            "'entities' and 'intents' name different backbones .*'elsewhere'",
        ),
        ({"intents": {"backbone": {"bits": 8}}}, "different backbones .*bits: None and 8"),
        ({"intents": {"adapter": {"fusion_layers": [99]}}}, "recipe 'intents' cannot .*99"),
        ({"intents": {"data": {"train": "nowhere.csv"}}}, r"recipe 'intents' cannot .*nowhere\.csv"),
        (
            {"intents": {"adapter": {"modules_to_save": ["embeddings"]}}},
            "recipe 'intents' cannot .* train inside the backbone",
        ),
        ({"intents": {"adapter": {"fusion_depth": "auto", "fusion_layers": None, **LORA}}}, "recipe 'intents' cannot"),
    ],
)
def test_what_cannot_go_together_is_refused_before_anything_is_loaded(changes, said, tmp_path):
    paths = write_recipes(tmp_path, "entities", "intents", **changes)
    with pytest.raises((ValueError, OSError), match=said):
        run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert not (tmp_path / "all").exists() and not (tmp_path / "states").exists()


@pytest.mark.usefixtures("unloaded")
def test_an_encoder_decoder_is_refused(tmp_path):
    paths = write_recipes(tmp_path, "intents", "pooled", intents={"adapter": {"modules_to_save": ["classification_head"]}})
    FAMILIES["bart"].build("sequence", vocab_size=120).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"recipe 'intents' cannot .* encoder-decoder"):
        run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")


def test_one_that_fails_leaves_the_others_and_is_told(tmp_path, capsys):
    # momentum alone carries weights beyond what float32 holds, whatever the gradients become
    rate = {"training": {"learning_rate": 1e38, "num_train_epochs": 3}}
    paths = write_recipes(tmp_path, "entities", "intents", "pairs", intents=rate)
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, paths), "--output", str(tmp_path / "all"), "--cache"])
    assert stop.value.code == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "3 recipes from one extraction" in told and "intents failed: The training diverged" in told
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["entities", "pairs", "states"]


def test_a_command_that_was_killed_goes_on_and_keeps_what_is_finished(tmp_path, monkeypatch, run_rows):
    paths, train = write_recipes(tmp_path, "entities", "intents", "pairs"), several.run_recipe

    def killed(recipe, folder, *args):
        if folder.name == "intents":
            raise KeyboardInterrupt
        return train(recipe, folder, *args)

    monkeypatch.setattr(several, "run_recipe", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    monkeypatch.setattr(several, "run_recipe", train)
    before, rows = (tmp_path / "all" / "entities" / "metrics.json").stat().st_mtime_ns, len(run_rows)
    outcomes = run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert [outcome.kept for outcome in outcomes.values()] == [True, False, False]
    assert (tmp_path / "all" / "entities" / "metrics.json").stat().st_mtime_ns == before
    assert len(run_rows) == rows, "states were computed again"
    assert outcomes["entities"].metrics["scores"] == result_of(tmp_path / "all" / "entities")["scores"]
    for name, recipe in recipes_of(paths).items():
        run_recipe(recipe, tmp_path / "alone" / name, cache=tmp_path / "states")
        assert result_of(tmp_path / "all" / name) == result_of(tmp_path / "alone" / name)
    again = run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert all(outcome.kept for outcome in again.values())


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path):
    paths = write_recipes(tmp_path, "entities", "intents")
    run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    changed = recipes_of(paths)
    changed["intents"].seed = 6
    with pytest.raises(FileExistsError, match=r"intents' is not empty .* --overwrite"):
        run_recipes(changed, tmp_path / "all", tmp_path / "states")
    outcomes = run_recipes(changed, tmp_path / "all", tmp_path / "states", overwrite=True)
    assert not any(outcome.kept or outcome.failed for outcome in outcomes.values())
    assert json.loads((tmp_path / "all" / "intents" / "metrics.json").read_text())["seed"] == 6
    with pytest.raises(FileExistsError):
        check_output(tmp_path / "all" / "intents")


def test_a_damaged_shard_is_made_again(tmp_path, run_rows):
    paths = write_recipes(tmp_path, "entities", "intents")
    cache_recipes(recipes_of(paths), tmp_path / "states")
    (shard,) = (tmp_path / "states").glob("shard-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + bytes([1, 2, 3, 4]))
    rows = len(run_rows)
    outcomes = run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert not any(outcome.failed for outcome in outcomes.values())
    assert shard.read_bytes() == whole and len(run_rows) == 2 * rows


def test_states_of_other_texts_are_not_replaced(tmp_path):
    paths = write_recipes(tmp_path, "entities", "pairs")
    cache_recipes(recipes_of(paths[:1]), tmp_path / "states")
    files = {path: path.read_bytes() for path in (tmp_path / "states").iterdir()}
    with pytest.raises(StaleCacheError, match="rows are not in the cache"):
        run_recipes(recipes_of(paths), tmp_path / "all", tmp_path / "states")
    assert {path: path.read_bytes() for path in (tmp_path / "states").iterdir()} == files


def test_more_than_is_asked_for_serves_too(tmp_path, run_rows):
    paths = write_recipes(tmp_path)
    cache_recipes(recipes_of(paths), tmp_path / "states", dtype="float32")
    rows = len(run_rows)
    outcomes = run_recipes(recipes_of(paths[1:3]), tmp_path / "all", tmp_path / "states")
    assert not any(outcome.failed for outcome in outcomes.values()) and len(run_rows) == rows
    assert LayerStateCache(tmp_path / "states").dtype == "float32"


def test_from_the_shell(tmp_path, capsys, monkeypatch):
    paths = write_recipes(tmp_path, "entities", "pairs")
    monkeypatch.chdir(tmp_path)
    names = [str(path) for path in paths]
    app(["train", *names, "--cache", "--set", "training.num_train_epochs=1"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "2 recipes from one extraction" in told and "accuracy" in told and "pairs: outputs/pairs" in told
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["entities", "pairs", "states"]
    app(["train", "--set", "training.num_train_epochs=1", "--cache", *names], standalone_mode=False)
    assert capsys.readouterr().out.count("was there") == 2
    app(["cache", *names, "--output", str(tmp_path / "other"), "--dtype", "int8"], standalone_mode=False)
    app(["train", *names, "--output", "second", "--cache", str(tmp_path / "other")], standalone_mode=False)
    assert LayerStateCache(tmp_path / "other").dtype == "int8" and (tmp_path / "second" / "pairs" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["entities.yaml", "pairs.yaml", "--output", "x"], "2 recipes are trained from one extraction .* add --cache"),
        (["entities.yaml", "other/entities.yaml", "--cache"], "have one name, 'entities'"),
        (["entities.yaml", "--cache", "--output", "x"], "--cache names no folder"),
        (["entities.yaml", "pairs.yaml", "--output", "x", "--cache", "x/pairs"], "folder of the run of 'pairs'"),
        (["entities.yaml"], "Missing option '--output'"),
        (["--cache"], "Missing argument"),
    ],
)
def test_what_the_shell_refuses(arguments, said, tmp_path, monkeypatch, capsys):
    write_recipes(tmp_path, "entities", "pairs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    told = " ".join(" ".join(capsys.readouterr()).split())
    assert re.search(said, told, re.IGNORECASE), told
    assert not (tmp_path / "x").exists()
