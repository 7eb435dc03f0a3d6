"""Training from cached layer states is live training, for every family, method and way to a Trainer."""

import copy
import json

import pytest
import torch
from families import FAMILIES, GRID, attach, inputs
from peft import PeftModel, get_peft_model
from support import METHODS, attached, batch, disturb, tiny, without_dropout
from support_cache import assert_equal_training, cached, from_cache, pad, rows_of, some_rows
from support_text import save_model, write_recipe
from torch.utils.data import ConcatDataset
from transformers import BertForTokenClassification, OpenAIGPTConfig, OpenAIGPTLMHeadModel, Trainer, TrainingArguments

from fusion_adapters import FusionConfig, quantization_config
from fusion_adapters.cli import main
from fusion_adapters.states import LayerStateCache, StaleCacheError, cache_layer_states

ONE_STACK = [(f, h) for f, h in GRID if FAMILIES[f].stack is None and f not in ("t5", "bart", "whisper")]


@pytest.mark.parametrize(("family", "head"), ONE_STACK, ids=[f"{f}-{h}" for f, h in ONE_STACK])
def test_losses_and_gradients_are_those_of_live_training(family, head, tmp_path):
    model = disturb(attach(family, head))
    live = inputs(family, head)
    if head == "qa":  # its softmax runs over padding too, whose states no cache keeps: equal without padding only
        live = {n: v[:1] for n, v in live.items()}
    rows = rows_of(live)
    cache = cached(model, rows, tmp_path / "states")
    assert_equal_training(model, live, from_cache(cache, rows))


def test_states_of_blocks_that_answer_with_lists(tmp_path):
    """Those of the first GPT, which has no final norm."""
    torch.manual_seed(0)
    config = OpenAIGPTConfig(n_embd=32, n_layer=4, n_head=4, vocab_size=120, n_positions=32)
    model = disturb(attached(head="lm", model=OpenAIGPTLMHeadModel(config).eval()))
    rows = some_rows(4)
    with model.disable_adapter(), torch.no_grad():
        batches = [{n: torch.tensor([row[n]]) for n in ("input_ids", "attention_mask")} for row in rows]
        reported = [torch.cat(model(**b, output_hidden_states=True).hidden_states) for b in batches]
    cache = cached(model, rows, tmp_path / "states", layers=range(5))
    torch.testing.assert_close(cache.read(cache.find(rows)), torch.cat(reported, dim=1))
    states = from_cache(cache, rows)
    assert_equal_training(model, pad(rows), states)
    loss = model.eval()(**states).loss
    states["layer_states"]["states"] = -states["layer_states"]["states"]
    assert (model(**states).loss - loss).abs() > 1e-3, "the states have no effect, so the test shows nothing"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_method_trains_from_a_cache(method, family, tmp_path):
    fields = {k: v for k, v in METHODS[method].items() if k != "fusion_dropout"}
    model = disturb(attached(family, **fields))
    rows = some_rows()
    cache = cached(model, rows, tmp_path / "states")
    assert_equal_training(model, pad(rows), from_cache(cache, rows))


def test_rows_may_come_in_any_order_with_other_labels_and_in_part(tmp_path):
    model = disturb(attached())
    rows = some_rows()
    cache = cached(model, rows, tmp_path / "states", batch_size=4)
    chosen = [{**rows[i], "labels": [1] * len(rows[i]["labels"])} for i in (7, 2, 2, 11)]
    assert_equal_training(model, pad(chosen), from_cache(cache, chosen))


def test_a_batch_may_have_rows_of_several_datasets_of_one_cache(tmp_path):
    model = without_dropout(disturb(attached()))
    rows = some_rows()
    cache = cached(model, rows, tmp_path / "states")
    first = rows[:6]
    second = [{**row, "labels": [i % 3, *[-100] * (len(row["labels"]) - 1)]} for i, row in enumerate(rows[6:])]
    for positions in ("all", "labelled", "packed"):
        joined = ConcatDataset([cache.dataset(part, positions=positions) for part in (first, second)])
        chosen = cache.collator(pad)([joined[i] for i in (7, 0, 11, 3)])
        assert_equal_training(model, pad([second[1], first[0], second[5], first[3]]), chosen)
    other = cached(model, rows, tmp_path / "other")
    for part in (other.dataset(second), cache.dataset(second, positions="labelled"), cache.dataset(second, layers=[4])):
        joined = ConcatDataset([cache.dataset(first), part])
        with pytest.raises(ValueError, match="rows of 2 cached datasets that do not go together"):
            cache.collator(pad)([joined[0], joined[7]])


def test_positions_without_label_may_be_left_out(tmp_path):
    model = disturb(attached())
    rows = [{**row, "labels": [y if i % 2 else -100 for i, y in enumerate(row["labels"])]} for row in some_rows()]
    cache = cached(model, rows, tmp_path / "states")
    states = from_cache(cache, rows, positions="labelled")
    labelled = sum(len(row["labels"]) // 2 for row in rows)
    assert states["layer_states"]["states"].shape[1] == labelled
    assert_equal_training(model, pad(rows), states)
    packed = from_cache(cache, rows, positions="packed")
    assert packed["input_ids"].shape == packed["labels"].shape == (-(-labelled // 32), 32)
    assert_equal_training(without_dropout(model), pad(rows), packed)  # dropout draws other numbers in another shape
    with pytest.raises(ValueError, match="positions='some' is unknown"):
        cache.dataset(rows, positions="some")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_without_task_type_takes_states_too(family, tmp_path):
    plain = get_peft_model(tiny(family), FusionConfig(modules_to_save=["classifier" if family == "bert" else "score"]))
    assert type(plain) is PeftModel  # peft calls its model past our tuner
    rows = some_rows()
    cache = cached(plain, rows, tmp_path / "states")
    states = from_cache(cache, rows)
    assert_equal_training(plain, pad(rows), states)
    copied = copy.deepcopy(plain)
    assert_equal_training(copied, pad(rows), states)
    wrong = {**states, "layer_states": {**states["layer_states"], "states": states["layer_states"]["states"][1:]}}
    with pytest.raises(ValueError, match="layer_states has the shape"):
        plain(**wrong)
    assert_equal_training(plain, pad(rows), states)
    left = plain.merge_and_unload(drop_fusion=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in left.modules())


def test_rows_as_people_have_them(tmp_path):
    """Columns that no model takes, rows padded before, the same row twice."""
    model = disturb(attached())
    rows = [{**row, "text": "some words", "id": i} for i, row in enumerate(some_rows(6))]
    rows.append(dict(rows[0]))
    for row in rows[:3]:
        row.update({k: row[k] + [fill] * 4 for k, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))})
    plain = [{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in rows]

    def collate(chosen):
        return pad([{k: row[k] for k in ("input_ids", "attention_mask", "labels") if k in row} for row in chosen])

    cache = cache_layer_states(model, rows, tmp_path / "states", collate, dtype="float32", progress=False)
    assert len(cache) == 7  # the last row is the first without its padding
    for positions in ("all", "labelled"):
        dataset = cache.dataset(rows, positions=positions)
        states = cache.collator(collate)([dataset[i] for i in range(7)])
        assert_equal_training(model, pad(plain), states)
    assert_equal_training(without_dropout(model), pad(plain), from_cache(cache, rows, positions="packed"))
    again = cached(attached(), [*plain, *plain], tmp_path / "twice")
    assert len(again) == 7


def test_a_row_with_an_input_that_was_not_cached_is_refused(tmp_path):
    model, rows = attached(), some_rows(4)
    cache = cached(model, rows, tmp_path / "states")
    zeros = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in rows]
    assert cache.find(zeros) == cache.find(rows)  # what a model takes without any
    pairs = [*zeros[:3], {**zeros[3], "token_type_ids": [1] * len(rows[3]["input_ids"])}]
    with pytest.raises(StaleCacheError, match=r"Row 3 has the model input 'token_type_ids'"):
        cache.dataset(pairs)
    with pytest.raises(ValueError, match="Row 1 and row 0 do not have the same model inputs: token_type_ids"):
        cached(model, [rows[0], *pairs[1:]], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_a_row_with_another_mask_is_another_row(tmp_path):
    model, rows = attached(), some_rows(4)
    cache = cached(model, rows, tmp_path / "states")
    masked = {**rows[1], "attention_mask": [0, *rows[1]["attention_mask"][1:]]}
    with pytest.raises(StaleCacheError, match=r"1 of 1 rows are not in the cache"):
        cache.dataset([masked])


def test_states_of_a_model_that_transformers_attached_to(tmp_path):
    rows = some_rows()
    model = tiny()
    expected = cached(model, rows, tmp_path / "bare")
    model.add_adapter(FusionConfig(fusion="concat"))
    disturb(model)
    cache = cached(model, rows, tmp_path / "attached")
    torch.testing.assert_close(cache.read(cache.find(rows)), expected.read(expected.find(rows)))
    assert_equal_training(model, pad(rows), from_cache(cache, rows))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_backbones(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BertForTokenClassification as Model

    tiny(width=64).save_pretrained(tmp_path / "model")
    options = {"quantization_config": quantization_config(bits), "device_map": {"": "cpu"}}
    model = disturb(attached(model=Model.from_pretrained(tmp_path / "model", **options)))
    rows = some_rows()
    cache = cached(model, rows, tmp_path / "states")
    assert_equal_training(model, pad(rows), from_cache(cache, rows))
    with pytest.raises(StaleCacheError, match=f"quantization: bitsandbytes .* in the cache, none now|quantization: {bits}"):
        LayerStateCache(tmp_path / "states", attached(model=Model.from_pretrained(tmp_path / "model")))


def arguments(folder, **changes):
    return TrainingArguments(
        str(folder), report_to="none", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=4,
        logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"train_sampling_strategy": "group_by_length"}, {"dataloader_num_workers": 1}])
def test_trainer_goes_the_same_way_live_and_from_a_cache(changes, tmp_path):
    rows = some_rows(16)
    finals, losses = [], []
    for live in (True, False):
        model = disturb(attached())
        if live:
            trainer = Trainer(model, arguments(tmp_path / "live", **changes), pad, rows, eval_dataset=rows)
        else:
            cache = cached(model, rows, tmp_path / "states")
            trainer = Trainer(
                model, arguments(tmp_path / "cached", **changes), cache.collator(pad), cache.dataset(rows),
                eval_dataset=cache.dataset(rows),
            )  # fmt: skip
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e] + [trainer.evaluate()["eval_loss"]])
        finals.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, parameter in finals[0].items():
        torch.testing.assert_close(finals[1][name], parameter, rtol=1e-3, atol=1e-4)


def test_a_bare_model_can_be_cached_for_adapters_that_come_later(tmp_path):
    rows = some_rows()
    cached(tiny(), rows, tmp_path / "states", layers=[0, 1, 2, 3, 4])
    for fields in ({"fusion": "dwatt", "fusion_layers": [0, 2]}, {"fusion": "concat"}, {"fusion": "deeper"}):
        model = disturb(get_peft_model(tiny(), FusionConfig(task_type="TOKEN_CLS", **fields)))
        cache = LayerStateCache(tmp_path / "states", model)
        assert_equal_training(model, pad(rows), from_cache(cache, rows))


def test_a_recipe_trains_from_a_cache_to_the_same_scores(tmp_path, capsys):
    recipe = write_recipe(tmp_path, training={"num_train_epochs": 2, "disable_tqdm": True})
    save_model(tmp_path / "model", dropout=0.0)  # the head's dropout draws other numbers for packed rows
    runs = {}
    main(["train", str(recipe), "--output", str(tmp_path / "live")])
    main(["cache", str(recipe), "--output", str(tmp_path / "states"), "--dtype", "float32"])
    main(["train", str(recipe), "--output", str(tmp_path / "cached"), "--cache", str(tmp_path / "states")])
    for name in ("live", "cached"):
        runs[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert runs["live"]["scores"] == runs["cached"]["scores"]
    for live, states in zip(runs["live"]["dev_by_epoch"], runs["cached"]["dev_by_epoch"], strict=True):
        assert live["loss"] == pytest.approx(states["loss"], rel=1e-4)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                str(recipe),
                "--output",
                str(tmp_path / "x"),
                "--cache",
                str(tmp_path / "states"),
                "--set",
                "backbone.dtype=bfloat16",
            ]
        )
    assert stop.value.code == 2 and "dtype: float32 in the cache, bfloat16 now" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        main(
            [
                "cache",
                str(recipe),
                "--output",
                str(tmp_path / "y"),
                "--set",
                "adapter.r=4",
                "--set",
                "adapter.target_modules=[query]",
            ]
        )
    assert "train inside the backbone (LoRA" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "y").exists()


def test_states_equal_the_layer_states_of_the_model(tmp_path):
    model = tiny()
    rows = rows_of(batch())
    cache = cached(model, rows, tmp_path / "states", layers=[0, 1, 2, 3, 4])
    assert isinstance(model, BertForTokenClassification)
    with torch.no_grad():
        hidden = model(**batch(), output_hidden_states=True).hidden_states
    for i, number in enumerate(cache.find(rows)):
        states = cache.read([number])
        for layer, expected in enumerate(hidden):
            torch.testing.assert_close(states[layer], expected[i][batch()["attention_mask"][i].bool()], rtol=1e-5, atol=1e-5)
