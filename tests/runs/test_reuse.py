"""A second recipe trains from the first's states: other labels, tasks, methods, layers, depths and lengths, on the same texts."""

import json

import pytest
from support import tiny
from support_cache import cached
from support_several import write_recipes
from support_text import conll

from fusion_adapters.cli import main
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.states import StaleCacheError


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train": "others.csv", "test": "others.csv"}},
        {"adapter": {"fusion": "dwatt", "fusion_layers": [1, -1], "fusion_bottleneck": None}, "seed": 9},
        {"adapter": {"fusion": "dwconcat", "fusion_layers": None, "fusion_bottleneck": None, "fusion_pool": "mean"}},
        {"data": {"max_length": 128}},
        {"adapter": {"fusion_depth": 2, "fusion_layers": None}},
        {"adapter": {"fusion_depth": 0.5, "fusion_layers": [1, -1]}},
    ],
    ids=["labels", "method and layers", "pooled", "length", "depth", "fraction"],
)
def test_on_the_same_texts(changes, tmp_path):
    every = {"adapter": {"fusion_layers": [0, 1, 2, 3, 4]}}
    first, _ = write_recipes(tmp_path, "intents", "pairs", intents=every)
    cache_recipe(load_recipe(first), tmp_path / "states", dtype="float32")
    (second,) = write_recipes(tmp_path, "intents", intents=changes)
    found = run_recipe(load_recipe(second), tmp_path / "run", cache=tmp_path / "states")
    cache_recipe(load_recipe(second), tmp_path / "own", dtype="float32")
    own = run_recipe(load_recipe(second), tmp_path / "alone", cache=tmp_path / "own")
    assert found["dev_by_epoch"][-1]["loss"] == pytest.approx(own["dev_by_epoch"][-1]["loss"], rel=1e-4)
    assert found["scores"] == own["scores"]


def test_another_task(tmp_path):
    """Words with tags have the pieces that their texts have."""
    first, second = write_recipes(tmp_path, "intents", "entities", intents={"adapter": {"fusion_layers": None}})
    texts = [
        text for text, _ in [line.rsplit(",", 1) for line in (tmp_path / "intents.csv").read_text().split("\n")[1:] if line]
    ]
    (tmp_path / "train.conll").write_text(conll([[(w, "B-X") for w in text.split()] for text in texts]), encoding="utf-8")
    (tmp_path / "test.conll").write_text((tmp_path / "train.conll").read_text(), encoding="utf-8")
    cache_recipe(load_recipe(first), tmp_path / "states")
    assert run_recipe(load_recipe(second), tmp_path / "run", cache=tmp_path / "states")["scores"]["test"]


def test_rows_without_an_input_that_pairs_have(tmp_path):
    rows = [{"input_ids": list(range(4 + i, 10 + i)), "attention_mask": [1] * 6} for i in range(2)]
    pairs = [{**rows[0], "token_type_ids": [0] * 6}, {**rows[1], "token_type_ids": [0, 0, 0, 1, 1, 1]}]
    cache = cached(tiny(), pairs, tmp_path / "states")
    assert cache.find(rows[:1]) == cache.find(pairs[:1])
    with pytest.raises(StaleCacheError, match="1 of 1 rows are not in the cache"):  # its second half is another text
        cache.find(rows[1:])


def test_texts_that_are_cut_otherwise_are_told_with_both_lengths(tmp_path, capsys):
    (path,) = write_recipes(tmp_path, "entities")
    long = conll([[("oslo", "B-LOC")] * 30, [("bob", "B-PER"), ("works", "O")]] * 4)
    for name in ("train.conll", "test.conll"):
        (tmp_path / name).write_text(long, encoding="utf-8")
    main(["cache", str(path), "--output", str(tmp_path / "states")])
    capsys.readouterr()
    command = ["train", str(path), "--output", str(tmp_path / "run"), "--cache", str(tmp_path / "states")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--set", "data.max_length=16"])
    told = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "cut in another way (max_length: 256 in the cache, 16 now)" in told
    assert not (tmp_path / "run").exists()
    main([*command, "--set", "data.max_length=32"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"]["test"]
