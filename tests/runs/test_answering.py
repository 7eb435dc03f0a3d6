"""Several runs from one pass of the backbone: each answers what it answers alone."""

import json
import shutil

import pytest
import torch
from support import DEPTH, tiny
from support_answering import CLASSES, TAGS, make_run, mixed_runs, save_backbone
from support_text import tokenizer

from fusion_adapters import load_run, load_runs, predict
from fusion_adapters.runs import sharing
from fusion_adapters.runs.answering import names_of
from fusion_adapters.tuner import fusion_layers

TEXTS = ["Anna lives in Oslo.", "bob", "the old man, Anna and Bob: all works at Acme Corp in the old Rome." * 3, ""]


@pytest.fixture(scope="module", params=["bert", "llama"])
def mixed(request, tmp_path_factory):
    """Runs of many kinds on one backbone, their folders by name."""
    return mixed_runs(tmp_path_factory.mktemp(request.param), request.param)


def texts_for(folders):
    return TEXTS[:3] if "writes" in folders else TEXTS  # Llama's tokenizer has no piece for an empty text


def count_blocks(runs):
    """The list that each run of a block's attention is written down in."""
    ran = []
    for model in [runs._many.host, *(run.model for run in runs.runs.values())]:
        for module in model.modules():
            if type(module).__name__ in ("BertAttention", "LlamaAttention"):
                module.register_forward_hook(lambda module, args, output: ran.append(module))
    return ran


def backbone_of(model):
    (layer,) = fusion_layers(model)
    return layer.backbone


def blocks_of(model):
    return {id(p) for block in backbone_of(model).blocks for n, p in block.named_parameters() if "lora" not in n}


def test_each_answers_as_alone(mixed):
    texts = texts_for(mixed)
    runs = load_runs(list(mixed.values()))
    assert runs.names == list(mixed)
    found = list(runs.predict(texts))
    assert all(list(answers) == runs.names for answers in found)
    for name, folder in mixed.items():
        alone = load_run(folder)
        for run in (alone, runs.runs[name]):  # which is a run like any other
            expected = predict(run, texts)
            rounded = (
                [e | {"probability": pytest.approx(e["probability"], abs=2e-4)} for e in expected] if name == "topic" else []
            )
            assert [answers[name] for answers in found] == (rounded or expected), name


def test_logits_are_the_same_to_the_last_bit(mixed):
    runs = load_runs(mixed)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 100, (n,), generator=generator).tolist() for n in (9, 3)]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    asked = {name: rows for name in mixed if name not in ("writes", "answers")}
    for name, found in runs._logits(asked).items():
        rounding = 1e-5 if name == "topic" else 0  # its mean over the text is taken before the fusion's norm
        for ours, theirs in zip(found, load_run(mixed[name]).logits(rows), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding, msg=name)


def test_the_blocks_run_once_for_each_distinct_row(mixed):
    same = ["intent", "stars", "topic", "deep", "short", *(["ner", "lower"] if "writes" not in mixed else [])]
    runs = load_runs({name: mixed[name] for name in same})
    list(runs.predict(["anna lives"]))
    ran = count_blocks(runs)
    list(runs.predict(["bob works at acme"]))
    assert len(ran) == DEPTH, "all have the same pieces"
    ran.clear()
    list(runs.predict(["bob works at acme"] * 3))
    assert len(ran) == 3 * DEPTH
    ran.clear()
    list(runs.predict(["anna lives in oslo and bob in rome, or in " + "oslo " * 8]))
    assert len(ran) == 2 * DEPTH, "one of them cuts texts off at twelve pieces"


def test_the_backbone_is_loaded_once_and_shared(mixed, monkeypatch):
    loaded = []
    load = sharing.load_lower
    monkeypatch.setattr(sharing, "load_lower", lambda *args: loaded.append(args) or load(*args))
    runs = load_runs(mixed)
    assert len(loaded) == 1
    first, *others = (run.model for run in runs.runs.values())
    assert all(blocks_of(other) == blocks_of(first) for other in [*others])
    assert {id(p) for p in runs._many.host.parameters()} >= blocks_of(first)


def test_who_has_passes_of_its_own(mixed):
    runs = load_runs(mixed)
    apart = {"lora": "has LoRA in the blocks, which changes them"}
    if "writes" in mixed:
        apart |= dict.fromkeys(("writes", "answers"), "writes text, and what comes after each piece depends on it")
    assert runs.apart == apart
    alone = load_runs([mixed["lora"]])
    assert list(alone.predict(["anna"])) == [{"lora": predict(load_run(mixed["lora"]), ["anna"])[0]}]


def test_texts_are_read_and_answered_one_by_one(mixed):
    read = []

    def texts():
        for text in TEXTS[:2]:
            read.append(text)
            yield text

    answers = load_runs([mixed["ner"], mixed["intent"]]).predict(texts())
    assert not read
    next(answers)
    assert read == TEXTS[:1]


def test_pairs_beside_texts(tmp_path):
    backbone = save_backbone(tmp_path / "model")
    folders = [
        make_run(tmp_path / "same", backbone, "sentence_pairs", ["other", "same"], fusion="dwatt"),
        make_run(tmp_path / "alike", backbone, "regression", data={"text": ["a", "b"]}, fusion="concat"),
        make_run(tmp_path / "intent", backbone, "sequence_classification", CLASSES, fusion="concat"),
    ]
    runs = load_runs(folders)
    list(runs.predict(["anna\tbob"]))
    ran = count_blocks(runs)
    (answers,) = runs.predict(["anna lives in oslo\tbob works in rome"])
    assert len(ran) == 2 * DEPTH, "two runs read a pair, and one a text"
    for folder in folders:
        (alone,) = predict(load_run(folder), ["anna lives in oslo\tbob works in rome"])
        assert answers[folder.name] == alone
    with pytest.raises(ValueError, match=r"The run 'same' cannot answer: The text 'anna' has 1 parts"):
        list(runs.predict(["anna"]))


@pytest.mark.parametrize("head", ["mlm", "sequence"])
def test_masks_are_filled_by_the_head_of_the_checkpoint(head, tmp_path):
    # with its bias, transform and all, or as far as the adapter does not bring it
    backbone = save_backbone(tmp_path / "model", head=head)
    fresh = {"modules_to_save": ["transform"]} if head == "sequence" else {}
    pooler = {"modules_to_save": ["pooler"]} if head == "mlm" else {}
    folders = {
        "words": make_run(tmp_path / "words", backbone, "masked_lm", fusion="dwatt", **fresh),
        "ner": make_run(tmp_path / "ner", backbone, "token_classification", TAGS, fusion="concat"),
        "more words": make_run(tmp_path / "more words", backbone, "masked_lm", fusion="concat", seed=1, **fresh),
        "intent": make_run(tmp_path / "intent", backbone, "sequence_classification", CLASSES, fusion="dwatt", **pooler),
    }
    text = "Anna lives in [MASK] and [MASK]."
    for names in (list(folders), ["words", "more words"], ["ner", "words"]):
        runs = load_runs([folders[name] for name in names])
        (answers,) = runs.predict([text])
        assert not runs.apart
        for name in names:
            assert answers[name] == predict(load_run(folders[name]), [text])[0]
        first, *others = (run.model for run in runs.runs.values())
        assert all(blocks_of(other) == blocks_of(first) for other in others)
    with pytest.raises(ValueError, match=r"The run 'words' cannot answer: The text 'anna' holds no \[MASK\]"):
        list(runs.predict(["anna"]))


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_written_by_the_head_of_the_checkpoint(tied, tmp_path):
    backbone = save_backbone(tmp_path / "model", "llama", tied=tied)
    model = json.loads((backbone / "generation_config.json").read_text())
    (backbone / "generation_config.json").write_text(json.dumps({**model, "eos_token_id": [2, 70]}))
    data = {"max_new_tokens": 12}
    folders = [
        make_run(tmp_path / "ner", backbone, "token_classification", TAGS, fusion="concat"),
        make_run(tmp_path / "a", backbone, "causal_lm", data=data, fusion="dwatt"),
        make_run(tmp_path / "b", backbone, "causal_lm", data=data, fusion="concat", seed=1),
    ]
    runs = load_runs(folders)
    texts = ["anna lives", "the old man works at", "rome"]
    for text, answers in zip(texts, runs.predict(texts), strict=True):
        assert answers == {folder.name: predict(load_run(folder), [text])[0] for folder in folders}
    assert runs.runs["a"].model.generation_config.eos_token_id == [2, 70]


def test_no_more_blocks_are_loaded_than_the_deepest_reads(tmp_path):
    backbone = save_backbone(tmp_path / "model")
    folders = [
        make_run(tmp_path / "two", backbone, "token_classification", TAGS, fusion="concat", fusion_depth=2),
        make_run(tmp_path / "three", backbone, "sequence_classification", CLASSES, fusion="dwatt", fusion_depth=0.75),
    ]
    runs = load_runs(folders)
    assert {backbone_of(run.model).num_layers for run in runs.runs.values()} == {3}
    (answers,) = runs.predict(["anna lives"])
    assert answers == {folder.name: predict(load_run(folder), ["anna lives"])[0] for folder in folders}


def test_a_pooler_that_the_checkpoint_lacks_is_each_run_s_own(tmp_path):
    backbone = save_backbone(tmp_path / "model", head="token")  # without a pooler
    pooler = {"modules_to_save": ["pooler"]}
    folders = [
        make_run(tmp_path / name, backbone, "sequence_classification", CLASSES, fusion="dwatt", seed=seed, **pooler)
        for seed, name in enumerate("ab")
    ]
    (answers,) = load_runs(folders).predict(["anna lives"])
    assert answers == {folder.name: predict(load_run(folder), ["anna lives"])[0] for folder in folders}
    description = json.loads((folders[1] / "run.json").read_text())
    del description["recipe"]["adapter"]["modules_to_save"]
    (folders[1] / "run.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"The run '.*b' cannot be loaded beside the others: .* lacks 2 tensors"):
        load_runs(folders)


def test_runs_that_do_not_fit_together(tmp_path):
    backbone = save_backbone(tmp_path / "model")
    run = make_run(tmp_path / "run", backbone, "token_classification", TAGS, fusion="dwatt")
    other = save_backbone(tmp_path / "other", seed=1)
    far = make_run(tmp_path / "far", other, "token_classification", TAGS, fusion="dwatt")
    half = {"model": str(backbone), "dtype": "bfloat16"}
    short = make_run(tmp_path / "half", half, "token_classification", TAGS, fusion="dwatt")
    for folder, told in (
        (far, r"\(model '.*model'; and model '.*other'\)"),
        (short, r"\(dtype 'float32'; and dtype 'bfloat16'\)"),
    ):
        with pytest.raises(ValueError, match=rf"'.*run' and '.*{folder.name}' stand on different backbones {told}"):
            load_runs([run, folder])
    shutil.copytree(run, tmp_path / "moved")  # another name of the same folder is no other backbone
    content = json.loads((run / "run.json").read_text())
    content["recipe"]["backbone"]["model"] = str(tmp_path / "far" / ".." / "model")
    (tmp_path / "moved" / "run.json").write_text(json.dumps(content))
    assert load_runs([run, tmp_path / "moved"]).names == ["run", "moved"]
    tiny("bert", "sequence", seed=3).save_pretrained(backbone)
    with pytest.raises(ValueError, match=r"The run '.*run' cannot be loaded beside the others: .* but with other weights"):
        load_runs([run, tmp_path / "moved"])


def test_folders_that_are_no_runs(tmp_path):
    backbone = save_backbone(tmp_path / "model")
    run = make_run(tmp_path / "run", backbone, "token_classification", TAGS, fusion="dwatt")
    bad = make_run(tmp_path / "bad", backbone, "sequence_classification", CLASSES, fusion="dwatt")
    with pytest.raises(FileNotFoundError, match=r"'.*none' holds no run"):
        load_runs([run, tmp_path / "none"])
    with pytest.raises(ValueError, match="There is no run to load"):
        load_runs([])
    weights = bad / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"The run '.*bad' cannot be loaded beside the others: .*damaged or cut short"):
        load_runs([run, bad])
    shutil.rmtree(bad / "adapter")
    with pytest.raises(ValueError, match=r"bad"):
        load_runs([run, bad])


def test_names(tmp_path):
    paths = [tmp_path / p for p in ("a/x/run", "b/x/run", "b/y/run", "a/x", "v1.5")]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    assert names_of(paths) == ["a/x/run", "b/x/run", "y/run", "x", "v1.5"]
    assert names_of([f"{paths[0]}/", paths[3]]) == ["run", "x"]
    (tmp_path / "latest").symlink_to(paths[0])
    with pytest.raises(ValueError, match=r"The run '.*latest' is given twice, as '.*x/run' too. Give each run once"):
        names_of([paths[0], paths[1], tmp_path / "latest"])
    with pytest.raises(ValueError, match=r"The run '.*run' is given twice. Give each run once"):
        names_of([paths[0], paths[0]])


def test_a_folder_with_dots_in_its_name(tmp_path):
    backbone = save_backbone(tmp_path / "model")
    folders = [
        make_run(tmp_path / f"v1.{i}", backbone, "token_classification", TAGS, fusion="dwatt", seed=i) for i in range(2)
    ]
    (answers,) = load_runs(folders).predict(["anna"])
    assert list(answers) == ["v1.0", "v1.1"]
    mine = load_runs({"first": folders[0], "again": folders[0]})
    (answers,) = mine.predict(["anna"])
    assert answers["first"] == answers["again"], "under names of one's own a folder may come twice"


def test_rows_that_are_longer_than_the_backbone_has_positions(tmp_path):
    backbone = save_backbone(tmp_path / "model", max_position_embeddings=20)
    folders = [
        make_run(tmp_path / "fits", backbone, "token_classification", TAGS, data={"max_length": 20}, fusion="dwatt"),
        make_run(tmp_path / "long", backbone, "sequence_classification", CLASSES, fusion="dwatt"),
    ]
    with pytest.raises(
        ValueError, match=r"The run 'long' cannot answer: .* has 42 pieces, but the backbone has 20 positions"
    ):
        list(load_runs(folders).predict(["oslo " * 40]))
    assert len(tokenizer(mask=True)("oslo " * 40)["input_ids"]) == 42
