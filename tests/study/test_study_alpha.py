"""`fusion_alpha` in comparisons: one that was begun by 0.1.0, which knew none, goes on with parameters that count once."""

import pytest
import yaml
from support_study import METHODS, scores, write_study

from fusion_adapters.cli import main

FEW = {"methods": {n: METHODS[n] for n in ("deeper", "concat")}, "sizes": [4], "seeds": [1], "rates": [1e-3]}


def compare(path, out):
    main(["compare", str(path), "--output", str(out), "--workers", "1"])


def alphas(out):
    methods = yaml.safe_load((out / "study.yaml").read_text())["methods"]
    return {name: method["adapter"]["fusion_alpha"] for name, method in methods.items()}


def without_scales(out):
    """Writes the folder's recipe as 0.1.0 did."""
    path = out / "study.yaml"
    values = yaml.safe_load(path.read_text())
    for method in values["methods"].values():
        del method["adapter"]["fusion_alpha"], method["adapter"]["fusion_norm"]
    path.write_text(yaml.safe_dump(values, sort_keys=False))


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_says_what_its_parameters_count(tmp_path):
    path, out = write_study(tmp_path, **FEW), tmp_path / "out"
    compare(path, out)
    assert alphas(out) == {"deeper": 8.0, "concat": 8.0}
    assert all('"fusion_alpha": 8.0' in row["adapter"] for row in scores(out))


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_of_0_1_0_goes_on_as_it_was_begun(tmp_path):
    once = {n: {"adapter": {**m["adapter"], "fusion_alpha": 1}} for n, m in FEW["methods"].items()}
    path, out = write_study(tmp_path, **{**FEW, "methods": once}), tmp_path / "out"
    compare(path, out)
    before = scores(out)
    without_scales(out)
    more = {**FEW["methods"], "mix": {"adapter": {"fusion": "scalar_mix"}}}
    compare(write_study(tmp_path, **{**FEW, "methods": more}), out)
    assert alphas(out) == {"deeper": 1.0, "concat": 1.0, "mix": 1.0}
    assert yaml.safe_load((out / "study.yaml").read_text())["methods"]["mix"]["adapter"]["fusion_norm"] == "none"
    now = [row for row in scores(out) if row["method"] != "mix"]
    assert [row["test"] for row in now] == [row["test"] for row in before]
    # what is there was trained so, and is not what a recipe that says otherwise asks for
    eight = {n: {"adapter": {**m["adapter"], "fusion_alpha": 8}} for n, m in FEW["methods"].items()}
    with pytest.raises(SystemExit):
        compare(write_study(tmp_path, **{**FEW, "methods": eight}), out)


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_keeps_the_width_with_which_it_was_begun(tmp_path):
    """Methods that say no size: today's default goes into the folder, and the method's own into one of 0.1.0."""
    free = {
        **FEW,
        "methods": {"concat": {"adapter": {"fusion": "concat"}}, "last": {"adapter": {"fusion": "last"}}},
        "baseline": "last",
    }
    path, out = write_study(tmp_path, **free), tmp_path / "out"
    compare(path, out)
    said = yaml.safe_load((out / "study.yaml").read_text())
    assert {n: m["adapter"]["fusion_budget"] for n, m in said["methods"].items()} == {"concat": "none", "last": "none"}
    before = scores(out)
    for method in said["methods"].values():
        del method["adapter"]["fusion_budget"]
    (out / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    compare(path, out)
    assert [row["test"] for row in scores(out)] == [row["test"] for row in before]


@pytest.mark.usefixtures("undrawn")
def test_a_method_may_have_fewer_steps_of_its_own(tmp_path):
    methods = {**FEW["methods"], "concat": {**FEW["methods"]["concat"], "max_steps": 1}}
    path, out = write_study(tmp_path, **{**FEW, "methods": methods}), tmp_path / "out"
    compare(path, out)
    steps = {row["method"]: int(row["steps"]) for row in scores(out)}
    assert steps["concat"] == 1 < steps["deeper"]
