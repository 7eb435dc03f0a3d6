"""Cached layer states: training from them is live training; extraction resumes, is checked, and never reused wrongly."""

import copy
import hashlib
import json
import shutil
from collections import namedtuple

import pytest
import torch
from families import FAMILIES, GRID, attach, first_head, inputs
from peft import PeftModel, get_peft_model
from support import METHODS, attached, batch, disturb, tiny, without_dropout
from support_text import save_model, tokenizer, write_recipe
from transformers import BertForTokenClassification, Trainer, TrainingArguments

from fusion_adapters import FusionConfig, quantization_config
from fusion_adapters.cli import main
from fusion_adapters.features import LayerStateCache, StaleCacheError, cache_layer_states, plan_cache
from fusion_adapters.features.extract import _all_finite

ONE_STACK = [(f, h) for f, h in GRID if FAMILIES[f].stack is None and f not in ("t5", "bart", "whisper")]


def rows_of(inputs):
    """The rows of a batch, without padding."""
    rows = []
    for i in range(len(inputs["labels"] if "labels" in inputs else inputs["start_positions"])):
        row = {name: value[i] for name, value in inputs.items()}
        if "attention_mask" in row:
            real = row["attention_mask"].bool()
            row = {n: v[real].tolist() if v.shape == real.shape else v for n, v in row.items()}
        rows.append(row)
    return rows


def pad(rows):
    """Pads to the right: labels with -100, the rest with 0."""
    result = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if name in ("input_ids", "attention_mask") or (name == "labels" and values[0].dim() == 1):
            fill = -100 if name == "labels" else 0
            result[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        else:
            result[name] = torch.stack(values)
    return result


def some_rows(count=12, seed=0):
    """Token rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = 3 + (7 * i) % 11
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [i % 5] * length})
    return rows


def cached(model, rows, folder, **options):
    return cache_layer_states(model, rows, folder, pad, progress=False, **{"dtype": "float32", **options})


def from_cache(cache, rows, **options):
    dataset = cache.dataset(rows, **options)
    return cache.collator(pad)([dataset[i] for i in range(len(rows))])


def loss_and_gradients(model, inputs, seed=3):
    """In training mode, the head's dropout included."""
    model.train()
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_training(model, live, states):
    expected, gradients = loss_and_gradients(model, live)
    loss, found = loss_and_gradients(model, states)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == found.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("family", "head"), ONE_STACK, ids=[f"{f}-{h}" for f, h in ONE_STACK])
def test_losses_and_gradients_are_those_of_live_training(family, head, tmp_path):
    model = disturb(attach(family, head))
    live = inputs(family, head)
    if head == "qa":  # its softmax runs over padding too, whose states no cache keeps: equal without padding only
        live = {n: v[:1] for n, v in live.items()}
    rows = rows_of(live)
    cache = cached(model, rows, tmp_path / "states")
    assert_equal_training(model, live, from_cache(cache, rows))


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


def test_the_model_is_the_same_after_a_call_with_states_and_after_one_that_failed(tmp_path):
    model = disturb(attached())
    rows = some_rows(4)
    before = model(**pad(rows)).logits
    states = from_cache(cached(model, rows, tmp_path / "states"), rows)
    model(**states)
    torch.testing.assert_close(model(**pad(rows)).logits, before)
    broken = {**states, "layer_states": {**states["layer_states"], "states": torch.zeros(2, 3, 4)}}
    with pytest.raises(ValueError, match=r"layer_states has the shape \(2, 3, 4\), but the fusion wants \(4, tokens, 32\)"):
        model(**broken)
    torch.testing.assert_close(model(**pad(rows)).logits, before)
    assert all("forward" not in block.__dict__ for block in model.base_model.model.bert.encoder.layer)


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


def test_a_fusion_may_train_over_a_lora_that_stays_as_it_is(tmp_path):
    first = disturb(attached(fusion="last", r=4, target_modules=["query", "value"]))
    model = first.merge_and_unload(drop_fusion=True)
    model = disturb(attached(model=model))
    rows = some_rows()
    cache = cached(model, rows, tmp_path / "states")
    assert_equal_training(model, pad(rows), from_cache(cache, rows))
    with pytest.raises(StaleCacheError, match="weights: "):
        LayerStateCache(tmp_path / "states", attached())


def test_states_of_a_model_that_transformers_attached_to(tmp_path):
    rows = some_rows()
    model = tiny()
    expected = cached(model, rows, tmp_path / "bare")
    model.add_adapter(FusionConfig(fusion="concat", init_lora_weights=True))
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


def test_only_what_the_fusion_reads_is_stored_and_no_padding(tmp_path):
    rows = some_rows()
    tokens = sum(len(row["input_ids"]) for row in rows)
    for layers, stored in ((None, [1, 2, 3, 4]), ([0, 2], [0, 2, 4])):
        cache = cached(attached(fusion="dwatt", fusion_layers=layers), rows, tmp_path / str(layers), dtype="float16")
        assert cache.layers == stored
        size = sum(p.stat().st_size for p in (tmp_path / str(layers)).glob("shard-*"))
        assert 0 <= size - tokens * len(stored) * 32 * 2 < 400  # the header
    cache = cached(attached(fusion="mlp"), rows, tmp_path / "last")
    assert cache.layers == [4]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 1e-2)])
def test_narrow_formats_are_near(dtype, tolerance, tmp_path):
    model = disturb(attached())
    rows = some_rows()
    exact = cached(model, rows, tmp_path / "exact")
    cache = cached(model, rows, tmp_path / dtype, dtype=dtype)
    numbers = cache.find(rows)
    wanted = exact.read(exact.find(rows))
    error = (cache.read(numbers, dtype=torch.float32) - wanted).norm() / wanted.norm()
    assert 0 < error < tolerance
    names = {"float16": 2, "bfloat16": 2, "int8": 1 + 4 / 32}
    ratio = sum(s["bytes"] for s in cache.manifest["shards"]) / sum(s["bytes"] for s in exact.manifest["shards"])
    assert ratio == pytest.approx(names[dtype] / 4)
    assert abs(model(**from_cache(cache, rows)).loss - model(**pad(rows)).loss) < 10 * tolerance


def test_a_value_that_float16_cannot_hold_is_an_error(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e9)
    with pytest.raises(
        ValueError, match=r"\[1, 2, 3, 4\] hold values beyond 65,504, where float16 ends, or NaN. Use dtype='bfloat16'"
    ):
        cached(model, some_rows(), tmp_path / "states", dtype="float16")
    assert not list((tmp_path / "states").glob("shard-*"))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_every_value_that_is_not_finite_is_found(value):
    states = torch.cat((torch.linspace(-65504, 65504, 50).half(), torch.tensor([0.0, -0.0]).half()))
    assert _all_finite(states) and _all_finite(states[:0])
    states[7] = value
    assert not _all_finite(states)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_a_killed_extraction_goes_on_and_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    model, rows = attached(), some_rows(40)
    options = {"batch_size": 4, "shard_bytes": 20_000}
    cached(model, rows, tmp_path / "whole", **options)
    calls = []

    def failing(chosen):
        calls.append(len(chosen))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return pad(chosen)

    with pytest.raises(KeyboardInterrupt):
        cache_layer_states(model, rows, tmp_path / "cut", failing, dtype="float32", progress=False, **options)
    there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard-*")}
    assert 0 < len(there) < len(list((tmp_path / "whole").glob("shard-*")))
    assert not [p for p in (tmp_path / "cut").iterdir() if p.name.startswith(".")]
    with pytest.raises(FileNotFoundError, match=r"not complete: \d+ of \d+ shards are missing"):
        LayerStateCache(tmp_path / "cut", model)
    cached(model, rows, tmp_path / "cut", **options)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in there.items())


def test_a_damaged_shard_is_found_and_only_it_is_made_again(tmp_path):
    model, rows = attached(), some_rows(40)
    folder, options = tmp_path / "states", {"batch_size": 4, "shard_bytes": 20_000}
    cached(model, rows, folder, **options)
    before = digests(folder)
    shards = sorted(folder.glob("shard-*"))
    times = {p.name: p.stat().st_mtime_ns for p in shards}
    data = bytearray(shards[1].read_bytes())
    data[-100] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(ValueError, match=r"1 of \d+ shards of the cache .* are damaged \(shard-00001.safetensors\)"):
        LayerStateCache(folder, model)
    cached(model, rows[::-1], folder, **options)  # the order of the rows does not matter
    assert digests(folder) == before
    assert [p.name for p in shards if p.stat().st_mtime_ns != times[p.name]] == ["shard-00001.safetensors"]
    shards[0].write_bytes(shards[0].read_bytes()[:-50])  # cut short
    with pytest.raises(ValueError, match=r"damaged \(shard-00000"):
        LayerStateCache(folder, model)


def test_a_cache_of_something_else_is_refused_and_the_part_is_named(tmp_path):
    model, rows = attached(), some_rows()
    folder = tmp_path / "states"
    cache = cached(model, rows, folder, tokenizer=tokenizer(), max_length=64)
    cache.check(model, tokenizer=tokenizer(), max_length=64)
    with pytest.raises(StaleCacheError, match="max_length: 64 in the cache, 32 now"):
        cache.check(model, max_length=32)
    other = tokenizer()
    other.add_tokens(["extra"])
    with pytest.raises(StaleCacheError, match="tokenizer: "):
        cache.check(model, tokenizer=other)
    for wrong, message in (
        (attached(model=tiny(seed=1)), "weights: "),
        (attached(model=tiny(depth=5)), "backbone: bert, 4 blocks of width 32 in the cache, bert, 5 blocks"),
        (attached(model=tiny(dtype=torch.bfloat16)), "dtype: float32 in the cache, bfloat16 now"),
        (attached(fusion_layers=[0, 4]), r"reads the layer states \[0\], which the cache .* does not hold"),
    ):
        with pytest.raises(StaleCacheError, match=message):
            LayerStateCache(folder, wrong)
    one_weight = attached()
    with torch.no_grad():  # a backbone that was trained on, seen nowhere but here
        one_weight.base_model.model.bert.encoder.layer[1].intermediate.dense.bias.add_(1e-3)
    with pytest.raises(StaleCacheError, match="weights: "):
        LayerStateCache(folder, one_weight)
    with pytest.raises(StaleCacheError, match=r"3 of 3 rows are not in the cache .* \(the first: row 0\)"):
        cache.dataset(some_rows(3, seed=5))
    with pytest.raises(
        StaleCacheError, match="text: 12 of 12 rows are not in the cache, 12 of its rows are not among these"
    ):
        cached(model, some_rows(seed=5), folder)
    with pytest.raises(StaleCacheError, match="dtype: float32 in the cache, float16 now"):
        cached(model, rows, folder, dtype="float16")
    (folder / "manifest.json").write_text(json.dumps({**cache.manifest, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads format 1"):
        LayerStateCache(folder)
    versions = {**cache.manifest, "key": {**cache.manifest["key"], "transformers": "4.0.0"}}
    (folder / "manifest.json").write_text(json.dumps(versions))
    with pytest.raises(StaleCacheError, match=r"transformers: 4.0.0 in the cache"):
        LayerStateCache(folder, model)


def test_a_disk_that_is_too_small_is_found_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10_000))
    with pytest.raises(OSError, match=r"need 0.\d MiB .* rows, .* has 0.0 MiB free. Nothing was written"):
        cached(attached(), some_rows(40), tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_the_size_is_told_before_writing(tmp_path, capsys):
    plan = plan_cache(attached(), some_rows(), dtype="float16")
    tokens = sum(len(row["input_ids"]) for row in some_rows())
    assert plan.bytes == tokens * 4 * 32 * 2
    cache_layer_states(attached(), some_rows(), tmp_path / "states", pad)
    told = capsys.readouterr().out
    assert f"12 rows, {tokens} tokens x 4 layers x 32 values in float16, 1 shards; 0 of them there" in told


def test_a_backbone_that_trains_has_no_cache(tmp_path):
    rows = some_rows()
    lora = attached(r=4, target_modules=["query"])
    with pytest.raises(ValueError, match=r"8 parameters train inside the backbone \(LoRA, for example"):
        cached(lora, rows, tmp_path / "states")
    cache = cached(attached(), rows, tmp_path / "states")
    with pytest.raises(ValueError, match="train inside the backbone"):
        LayerStateCache(tmp_path / "states", lora)
    with pytest.raises(ValueError, match=r"parameters inside the backbone train now"):
        lora(**from_cache(cache, rows))
    model = attached()
    with pytest.raises(ValueError, match="or its adapter is disabled"), model.disable_adapter():
        model(**from_cache(cache, rows))
    with pytest.raises(ValueError, match=r"encoder-decoder \('t5'\) cannot be cached"):
        cached(attach("t5", first_head("t5")), rows, tmp_path / "t5")


def test_folders_and_rows_that_do_not_fit(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no cache"):
        cached(attached(), some_rows(), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no cache of layer states"):
        LayerStateCache(tmp_path)
    with pytest.raises(ValueError, match="no rows to cache"):
        cached(attached(), [], tmp_path / "states")
    with pytest.raises(ValueError, match="dtype='int4' is not a format of caches"):
        cached(attached(), some_rows(), tmp_path / "states", dtype="int4")
    with pytest.raises(ValueError, match="differ in length, and there is no collator"):
        cache_layer_states(attached(), some_rows(), tmp_path / "states", progress=False)
    cache = cached(attached(), some_rows(), tmp_path / "good")
    dataset = cache.dataset(some_rows())
    with pytest.raises(ValueError, match="must not cut or lengthen rows"):
        cache.collator(lambda rows: {k: v[:, :4] for k, v in pad(rows).items()})([dataset[0], dataset[1]])


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


def test_extraction_leaves_the_model_as_it_was(tmp_path):
    model = disturb(attached()).train()
    before = pad(some_rows(3))
    modes = [m.training for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    cached(model, some_rows(), tmp_path / "states")
    assert modes == [m.training for m in model.modules()] and trains == [p.requires_grad for p in model.parameters()]
    assert model.active_adapter == "default" and model(**before).loss.requires_grad


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
                "data.max_length=16",
            ]
        )
    assert stop.value.code == 2 and "max_length: 256 in the cache, 16 now" in " ".join(capsys.readouterr().err.split())
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
