"""Recipes are read strictly."""

from itertools import pairwise

import pytest

from fusion_adapters.runs.attaching import adapter_config
from fusion_adapters.runs.recipe import load_recipe, parse_recipe

GOOD = """
task: token_classification
backbone: {model: some/model}
adapter: {fusion: dwatt, r: 8}
data: {path: folder, train: train.conll}
training: {learning_rate: 1e-3, num_train_epochs: 2}
"""


def load(folder, text=GOOD, settings=None):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, settings)


def test_values_and_settings(tmp_path):
    recipe = load(
        tmp_path, settings=["training.learning_rate=3e-4", "adapter.fusion_layers=[0, -1]", "data.limit=5", "seed=7"]
    )
    assert recipe.training == {"learning_rate": 3e-4, "num_train_epochs": 2}
    assert recipe.adapter == {"fusion": "dwatt", "r": 8, "fusion_layers": [0, -1]}
    assert (recipe.data.limit, recipe.seed, recipe.backbone.bits) == (5, 7, None)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "0.001"])
def test_numbers_as_people_write_them(tmp_path, text):
    assert load(tmp_path, settings=[f"training.learning_rate={text}"]).training["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("training:", "trainning:"), "'trainning' is not a key of a recipe. Did you mean 'training'"),
        (GOOD.replace("train: train", "trian: train"), "'data.trian' is not a key of a recipe. Did you mean 'train'"),
        (GOOD.replace("fusion: dwatt", "fusin: dwatt"), r"'adapter\.fusin' is not a key.*Did you mean 'fusion'"),
        (GOOD.replace("learning_rate", "learnig_rate"), r"'training\.learnig_rate'.*Did you mean 'learning_rate'"),
        (GOOD.replace("model: some/model", "bits: 8"), "'backbone.model' is missing"),
        (GOOD.replace("model: some/model", "model: x, bits: 5"), "'backbone.bits' is 5"),
        (GOOD.replace("token_classification", "tagging"), "'task' is 'tagging'"),
        (GOOD.replace("num_train_epochs", "seed"), r"sets training\.seed, which the run sets itself"),
        (GOOD.replace("r: 8", "task_type: SEQ_CLS"), r"sets adapter\.task_type"),
        ("", "it is empty or a list"),
        ("- a\n- b\n", "it is empty or a list"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("a: 2026-13-45\n", "recipe.yaml' is not valid YAML"),
        ("? [a]\n: b\n", "is not valid YAML"),
        ("[" * 5_000, "is not valid YAML"),
        ("a: &a [*a]\n", r"aliases \(\*name\) that make it hold itself"),
        (
            "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in pairwise("abcdefghijklmnopqrst")),
            "100,000 values",
        ),
        (GOOD.replace("r: 8", "r: eight"), r"'adapter\.r' is 'eight'; it must be a number"),
        (GOOD.replace("r: 8", "use_dora: 1"), r"'adapter\.use_dora' is 1; it must be true or false"),
        (
            GOOD.replace("num_train_epochs: 2", "num_train_epochs: 0"),
            r"'training\.num_train_epochs' is 0, with which nothing is",
        ),
        (GOOD.replace("{model: some/model}", "some/model"), "'backbone' is 'some/model'"),
        (GOOD.replace("task: token_classification", "1: 2"), "'1"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting", ["training.learning_rate", "=3", "training.=3", "backbone.model.x=3", "data.limit=[1", "data.labels=&a [*a]"]
)
def test_bad_settings(tmp_path, setting):
    with pytest.raises(ValueError, match="--set"):
        load(tmp_path, settings=[setting])


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + "seed: 3\nseed: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not valid YAML: the key 'seed' stands twice"):
        load_recipe(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"task: caf\xe9\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml' is not valid YAML: .*byte 0xe9"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_may_stop_by_steps_and_start_lora_in_another_way(tmp_path):
    text = GOOD.replace("num_train_epochs: 2", "num_train_epochs: 0, max_steps: 5").replace(
        "r: 8", "init_lora_weights: gaussian"
    )
    assert load(tmp_path, text).training["max_steps"] == 5


@pytest.mark.parametrize("value", ["[dwatt]", "{a: 1}", "3"])
def test_a_method_of_another_type(value, tmp_path):
    with pytest.raises(ValueError, match=r"adapter|fusion"):
        adapter_config(load(tmp_path, GOOD.replace("fusion: dwatt", f"fusion: {value}")))


def test_a_finished_run_may_have_arguments_that_nobody_knows_any_more(tmp_path):
    values = load(tmp_path).model_dump()
    values["training"] |= {"an_option_of_old": 1, "num_train_epochs": "2"}
    assert parse_recipe(values, "run.json", finished=True).adapter == {"fusion": "dwatt", "r": 8}
    with pytest.raises(ValueError, match="an_option_of_old"):
        parse_recipe(values, "recipe.yaml")


def test_a_token_is_in_no_file(tmp_path):
    recipe = load(tmp_path, settings=["training.hub_token=hf_secret"])
    assert recipe.training["hub_token"] == "hf_secret"
    assert "hf_secret" not in str(recipe.model_dump()) and "hf_secret" not in recipe.model_dump_json()
