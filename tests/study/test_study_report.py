"""What a comparison says of its runs: means and intervals, zeros, runs that diverged; and what it leaves."""

import json
import os
import subprocess
import sys

from support_study import METHODS, scores, write_study

from fusion_adapters.cli import main
from fusion_adapters.study import load_study
from fusion_adapters.study.report import summary_text
from fusion_adapters.study.resume import begin_or_resume
from fusion_adapters.study.statistics import describe, interval, steps_to_share, summarise


def test_a_run_that_diverged_is_marked_and_not_ranked(tmp_path):
    methods = {name: METHODS[name] for name in ("deeper", "concat")}
    methods["deeper"] = {**methods["deeper"], "rates": [1e30, 1e-3]}
    methods["concat"] = {**methods["concat"], "rates": [1e30]}
    path, out = write_study(tmp_path, sizes=[4], methods=methods), tmp_path / "out"
    main(["compare", str(path), "--output", str(out), "--workers", "1"])
    rows = scores(out)
    assert {(row["method"], row["rate"], row["diverged"]) for row in rows if row["stage"] == "report"} == {
        ("deeper", "0.001", "False"),
        ("concat", "1e+30", "True"),
    }
    text = (out / "summary.md").read_text()
    assert "diverged (2 of 2)" in text and "nan" not in text
    (row,) = [row for row in json.loads((out / "summary.json").read_text())["rows"] if row["method"] == "concat"]
    assert row["test"]["mean"] is None and row["test"]["values"] == [None, None]


def test_a_score_of_zero_is_told_in_the_summary(tmp_path):
    study = load_study(write_study(tmp_path))
    row = {
        "data": "toy", "size": 1200, "method": "concat", "measure": "dev", "seeds": [1], "dev": describe([0.0]), "to_baseline": None,
        "to_reference": None, "parameters": {"fusion": 1, "lora": 0, "other": 0}, "rate_at_edge": False, "training_seconds": 1.0,
        "steps_to_90": 1, "rate": 1e-3,
    }  # fmt: skip
    summary = {**summarise(study, []), "rows": [row, {**row, "method": "deeper", "dev": describe([1.0])}]}
    assert "**0 with every seed:** `concat` at 1,200. No entity that was predicted is right" in summary_text(summary)


def test_what_a_killed_comparison_was_writing_goes_and_no_token_is_kept(tmp_path):
    out = tmp_path / "out"
    study = load_study(write_study(tmp_path, training={"hub_token": "hf_secret"}))
    begin_or_resume(study, out)
    (out / "runs" / "toy" / "dwatt").mkdir(parents=True)
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], check=True, capture_output=True, text=True
    )
    left = [
        out / f".summary.md.{ended.stdout.strip()}",
        out / "runs" / "toy" / "dwatt" / f".4-seed1-0.001.json.{ended.stdout.strip()}",
    ]
    kept = [out / f".samples.png.{os.getpid()}", out / ".mine"]
    for path in (*left, *kept):
        path.write_text("half")
    begin_or_resume(study, out)
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    assert study.training == {"hub_token": "hf_secret"} and "hf_secret" not in (out / "study.yaml").read_text()


def test_statistics():
    assert interval([1.0]) is None and interval([1.0, 2.0]) is None
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1 <= low < 3 < high <= 5
    assert interval([2.0, 2.0, 2.0]) == [2.0, 2.0]
    assert steps_to_share([(10, 0.1), (20, 0.46), (30, 0.5), (40, 0.48)]) == 20
    assert steps_to_share([(10, 0.45), (20, 0.46), (30, 0.5)]) == 10
