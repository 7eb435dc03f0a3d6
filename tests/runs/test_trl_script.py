"""TRL's flags in the recipe script: a fusion is trained and saved, with LoRA where they ask for it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from support_text import save_decoder

SCRIPT = Path(__file__).parents[2] / "recipes" / "trl_sft.py"


@pytest.mark.parametrize("lora", [False, True])
def test_the_script_trains_and_saves_a_fusion(lora, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed (extra: dev)")
    from fusion_adapters.runs.verifying import verify

    save_decoder(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": "anna lives in oslo . bob works at acme corp ."})] * 4
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
    flags = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
    flags |= {"max_steps": 1, "max_length": 16, "report_to": "none", "bf16": False, "save_strategy": "no", "use_cpu": True}
    flags |= {"fusion": "dwconcat", "fusion_budget": "4k"}
    flags |= {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]} if lora else {}
    flags |= {"pad_token": "<pad>", "eos_token": "<pad>"}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = [[f"--{key}", *(value if isinstance(value, list) else [value])] for key, value in flags.items()]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(str(part) for parts in given for part in parts)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    verdict = verify(tmp_path / "out", str(tmp_path / "model"))
    assert not verdict.problems
    counts = verdict.inside["parameters"]
    assert verdict.inside["method"] == "dwconcat" and 0 < counts["total"] <= 4000 and (counts["lora"] > 0) == lora
    assert (verdict.inside["lora"] or {}).get("r") == (2 if lora else None)
