"""Learning rates of a comparison: which are tried, where, and how the grid grows."""

import pytest
from support_study import METHODS, scores, write_study

from fusion_adapters.cli import main
from fusion_adapters.study import load_study
from fusion_adapters.study.runner import Cell, rate_size


@pytest.mark.usefixtures("undrawn")
def test_rates_may_be_added(tmp_path):
    methods = {n: METHODS[n] for n in ("deeper", "concat")}
    few = {"methods": methods, "sizes": [4], "seeds": [1]}
    path = write_study(tmp_path, rates=[1e-5], **few)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    path = write_study(tmp_path, rates=[1e-5, 3e-2], **few)
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    rows = scores(tmp_path / "out")
    for method in methods:
        tried = {float(r["rate"]): float(r["dev"]) for r in rows if r["method"] == method and r["stage"] == "rate"}
        assert set(tried) == {1e-5, 3e-2}
        (chosen,) = [float(r["rate"]) for r in rows if r["method"] == method and r["stage"] == "report"]
        assert tried[chosen] == max(tried.values())
    told = (tmp_path / "out" / "summary.md").read_text()
    assert "0.03*" in told  # the highest of the grid
    # and so may the rates of a single method
    own = {**methods, "concat": {**METHODS["concat"], "rates": [1e-5, 3e-2, 1e-1]}}
    grown = write_study(tmp_path, rates=[1e-5, 3e-2], **{**few, "methods": own})
    main(["compare", str(grown), "--output", str(tmp_path / "out"), "--workers", "1"])
    rows = [r for r in scores(tmp_path / "out") if r["stage"] == "rate"]
    assert {float(r["rate"]) for r in rows if r["method"] == "concat"} == {1e-5, 3e-2, 1e-1}


@pytest.mark.usefixtures("undrawn")
def test_a_grid_of_one_rate_needs_no_choice(tmp_path):
    methods = {n: METHODS[n] for n in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods, sizes=[4], seeds=[1], rates=[1e-3])
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert [r["stage"] for r in scores(tmp_path / "out")] == ["report", "report"]


def test_rates_may_be_chosen_at_a_few_sizes(tmp_path):
    study = load_study(write_study(tmp_path, sizes=[2, 4, 8, "all"], rate_sizes=[4, "all"]))
    assert [rate_size(study, Cell("toy", "dwatt", size)) for size in (2, 4, 8, 13)] == [4, 4, 4, 13]


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_grows_its_rate_sizes(tmp_path):
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    path = write_study(tmp_path, methods=methods, rate_sizes=["all"], seeds=[1])
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    before = scores(tmp_path / "out")
    grown = write_study(tmp_path, methods=methods, rate_sizes=[4, "all"], seeds=[1])
    main(["compare", str(grown), "--output", str(tmp_path / "out"), "--workers", "1"])
    after = scores(tmp_path / "out")
    assert {r["size"] for r in before if r["stage"] == "rate"} == {"13"}
    assert {r["size"] for r in after if r["stage"] == "rate"} == {"4", "13"}
    assert [r for r in after if r["size"] == "13"] == [r for r in before if r["size"] == "13"]


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_grows_its_rate_seeds(tmp_path):
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    growing = [([0], [1]), ([0, 3], [1]), ([0], [1, 3])]  # a seed that chose rates is reported later: with its test score
    for rate_seeds, seeds in growing:
        path = write_study(tmp_path, methods=methods, sizes=["all"], rate_seeds=rate_seeds, seeds=seeds)
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
        rows = scores(tmp_path / "out")
        assert {r["seed"] for r in rows if r["stage"] == "rate"} == {str(s) for s in rate_seeds}
        assert {(r["seed"], r["test"] != "") for r in rows if r["stage"] == "report"} == {(str(s), True) for s in seeds}
    main(["compare", str(path), "--output", str(tmp_path / "fresh"), "--workers", "1"])
    assert scores(tmp_path / "fresh") == scores(tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_a_warm_start_follows_the_rate_of_its_source(tmp_path):
    # a method that stands still scores what it began with
    methods = {"deeper": METHODS["deeper"], "concat": METHODS["concat"]}
    methods["again"] = {**METHODS["concat"], "start_from": "concat", "rates": [1e-12]}
    for rates in ([1e-12], [1e-12, 3e-2]):
        path = write_study(tmp_path, methods=methods, sizes=["all"], seeds=[1], rates=rates, epochs=6)
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
        report = {r["method"]: r for r in scores(tmp_path / "out") if r["stage"] == "report"}
        assert float(report["concat"]["rate"]) == rates[-1]
        assert report["again"]["dev"] == report["concat"]["dev"] and report["again"]["test"] == report["concat"]["test"]
