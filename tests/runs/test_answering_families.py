"""Several runs, over model families: heads that come from the checkpoint in part, encoder-decoders, packed and 16-bit weights."""

import pytest
import torch
from families import FAMILIES
from support import tiny
from support_answering import CLASSES, TAGS, make_run
from support_gguf import write_gguf
from support_text import tokenizer

from fusion_adapters import load_run, load_runs, predict

TEXTS = ["anna lives in oslo", "the old man works at acme corp."]


def check(folders, texts=TEXTS):
    """The runs, together and alone."""
    runs = load_runs(folders)
    found = list(runs.predict(texts))
    for folder in folders:
        assert [answers[folder.name] for answers in found] == predict(load_run(folder), texts), folder.name
    return runs


def runs_on(folder, backbone, heads=("sequence", "token"), **adapter):
    """Two runs of texts with different labels, and one of words, as far as there are such heads."""
    made = []
    if "token" in heads:
        made.append(make_run(folder / "ner", backbone, "token_classification", TAGS, fusion="dwatt", seed=1, **adapter))
    for labels in (CLASSES, CLASSES[:2]):
        made.append(
            make_run(folder / f"of {len(labels)}", backbone, "sequence_classification", labels, fusion="concat", **adapter)
        )
    return made


# distilbert, deberta and modernbert have layers before the classifier that an adapter does not bring
@pytest.mark.parametrize("name", ["roberta", "distilbert", "deberta-v2", "modernbert", "electra", "albert", "gpt2", "qwen3"])
def test_over_the_families(name, tmp_path):
    family = FAMILIES[name]
    family.build("sequence").save_pretrained(tmp_path / "model")
    tokenizer(mask=True).save_pretrained(tmp_path / "model")
    runs = check(runs_on(tmp_path, tmp_path / "model", family.classes))
    assert not runs.apart


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoders_answer_by_passes_of_their_own(name, tmp_path):
    FAMILIES[name].build("sequence").save_pretrained(tmp_path / "model")
    tokenizer(mask=True).save_pretrained(tmp_path / "model")
    brought = {"modules_to_save": ["classification_head"]}  # which peft does not know
    runs = check(runs_on(tmp_path, tmp_path / "model", ("sequence",), fusion_stack="decoder", **brought))
    assert set(runs.apart) == {"of 2", "of 3"} and "encoder-decoder" in runs.apart["of 2"]


def test_in_16_bits(tmp_path):
    tiny("bert", "sequence").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    runs = check(runs_on(tmp_path, {"model": str(tmp_path / "model"), "dtype": "bfloat16"}))
    assert {run.model.dtype for run in runs.runs.values()} == {torch.bfloat16}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    tiny("llama", "sequence", width=64).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    backbone = {"model": str(tmp_path / "model"), "bits": bits}
    folders = runs_on(tmp_path, backbone)
    folders.append(make_run(tmp_path / "lora", backbone, "regression", fusion="dwatt", r=2, target_modules=["q_proj"]))
    runs = check(folders)
    packed = [{id(p) for p in run.model.parameters() if not p.is_floating_point()} for run in runs.runs.values()]
    assert packed[0] and all(each == packed[0] for each in packed)


def test_from_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama")
    backbone = {"model": str(tmp_path), "gguf_file": "tiny.gguf"}
    folders = runs_on(tmp_path, backbone)
    folders.append(make_run(tmp_path / "writes", backbone, "causal_lm", fusion="concat", data={"max_new_tokens": 5}))
    assert set(check(folders).apart) == {"writes"}


def test_trained_inside_the_backbone(tmp_path):
    tiny("bert", "sequence").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    inside = {"fusion": "dwatt", "modules_to_save": ["layer.0.output.dense"]}
    folders = [*runs_on(tmp_path, tmp_path / "model"), make_run(tmp_path / "in", tmp_path / "model", "regression", **inside)]
    assert set(check(folders).apart) == {"in"}
