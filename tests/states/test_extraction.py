"""Extraction of layer states: what is stored, resumes, is checked, and never reused wrongly."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from families import FAMILIES, attach, first_head
from support import attached, disturb, tiny
from support_cache import cached, from_cache, pad, some_rows
from support_text import tokenizer

from fusion_adapters.states import LayerStateCache, StaleCacheError, cache_layer_states, plan_cache
from fusion_adapters.states.extract import _all_finite
from fusion_adapters.states.formats import DTYPES, narrowed, widened
from fusion_adapters.states.storage import manifest_text


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 1e-2), ("float8", 4e-2)])
def test_narrow_formats_are_near(dtype, tolerance, tmp_path):
    model = disturb(attached())
    rows = some_rows()
    exact = cached(model, rows, tmp_path / "exact")
    cache = cached(model, rows, tmp_path / dtype, dtype=dtype)
    numbers = cache.find(rows)
    wanted = exact.read(exact.find(rows))
    error = (cache.read(numbers, dtype=torch.float32) - wanted).norm() / wanted.norm()
    assert 0 < error < tolerance
    names = {"float16": 2, "bfloat16": 2, "int8": 1 + 4 / 32, "float8": 1 + 4 / 32}
    ratio = sum(s["bytes"] for s in cache.manifest["shards"]) / sum(s["bytes"] for s in exact.manifest["shards"])
    assert ratio == pytest.approx(names[dtype] / 4)
    assert abs(model(**from_cache(cache, rows)).loss - model(**pad(rows)).loss) < 10 * tolerance


def test_float8_keeps_small_values_beside_massive_ones():
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    states[:, 3] = 3000  # as a channel of a decoder
    small = torch.arange(64) != 3
    errors = {}
    for dtype in ("int8", "float8"):
        stored, scales = narrowed(states, dtype)
        assert stored.dtype == DTYPES[dtype] and scales.shape == (5,)
        found = widened(stored[:, None], scales[:, None])[:, 0]
        torch.testing.assert_close(found[:, 3], states[:, 3])
        errors[dtype] = float((found - states)[:, small].norm() / states[:, small].norm())
    assert errors["float8"] < 0.04 and errors["int8"] == 1  # which keeps nothing of them


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


def test_an_extraction_that_ended_before_its_manifest_goes_on(tmp_path, monkeypatch):
    model, rows, folder = attached(), some_rows(), tmp_path / "states"
    cached(model, rows, tmp_path / "whole")

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_text", full)
        cached(model, rows, folder)
    assert [path.name for path in folder.iterdir()] == ["index.safetensors"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in ("manifest.json", "index.safetensors"):  # killed at once
        (folder / f".{name}.{dead.pid}").write_text("{")
    cached(model, rows, folder)
    assert digests(folder) == digests(tmp_path / "whole")
    (folder / "manifest.json").unlink()  # whose shards are these?
    with pytest.raises(FileExistsError, match="not empty and holds no cache"):
        cached(model, rows, folder)


def test_files_that_dead_runs_were_writing_are_removed(tmp_path):
    model, rows, folder = attached(), some_rows(), tmp_path / "states"
    cached(model, rows, folder)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        for number in (dead.pid, os.getpid(), alive.pid):  # ours is free: this run has not begun to write
            (folder / f".shard-00000.safetensors.{number}").write_text("half")
        (folder / ".notes.1").write_text("mine")
        cached(model, rows, folder)
        left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
        assert left == {f".shard-00000.safetensors.{alive.pid}", ".notes.1"}
        alive.communicate(b"\n")


def test_an_extraction_goes_on_with_the_shards_that_it_began_with(tmp_path):
    model, rows, folder = attached(), some_rows(40), tmp_path / "states"
    cached(model, rows, folder, batch_size=4, shard_bytes=20_000)
    before = digests(folder)
    assert len(before) > 4
    next(folder.glob("shard-*")).unlink()
    cached(model, rows, folder, batch_size=4)
    assert digests(folder) == before
    with pytest.raises(StaleCacheError, match="shard_bytes: 20000 in the cache, 40000 now"):
        cached(model, rows, folder, batch_size=4, shard_bytes=40_000)


def test_a_tokenizer_that_is_not_given_again_changes_nothing(tmp_path):
    model, rows, folder = attached(), some_rows(40), tmp_path / "states"
    options = {"batch_size": 4, "shard_bytes": 20_000}
    cached(model, rows, folder, tokenizer=tokenizer(), max_length=64, **options)
    before, times = digests(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    cache = cached(model, rows, folder, **options)
    assert cache.read(cache.find(rows)).isfinite().all()
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    next(folder.glob("shard-*")).unlink()
    cached(model, rows, folder, **options)
    assert digests(folder) == before
    with pytest.raises(StaleCacheError, match="max_length: 64 in the cache, 32 now"):
        cached(model, rows, folder, max_length=32, **options)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another's"])
def test_a_damaged_index_is_found_and_made_again(damage, tmp_path):
    model, rows = attached(), some_rows(40)
    folder, options = tmp_path / "states", {"batch_size": 4, "shard_bytes": 20_000}
    cached(model, rows, folder, **options)
    before = digests(folder)
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    index = folder / "index.safetensors"
    data = bytearray(index.read_bytes())
    data[-100] ^= 1
    cached(model, rows[:20], tmp_path / "other", **options)
    other = (tmp_path / "other" / "index.safetensors").read_bytes()
    index.write_bytes({"flipped": data, "cut": data[:-50], "gone": b"", "another's": other}[damage])
    if damage == "gone":
        index.unlink()
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"The index .* is missing or damaged: .* writes the index anew"):
            LayerStateCache(folder, model, verify=verify)
    with pytest.raises(StaleCacheError, match="rows or shard_bytes: others, of which the cache's damaged index"):
        cached(model, rows[:20], folder, **options)
    cached(model, rows[::-1], folder, **options)
    assert digests(folder) == before
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())


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
    with pytest.raises(ValueError, match="has format 99, this version reads format 4"):
        LayerStateCache(folder)
    versions = {**cache.manifest, "key": {**cache.manifest["key"], "transformers": "4.0.0"}}
    (folder / "manifest.json").write_text(manifest_text(versions))
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
    with pytest.raises(ValueError, match="does not cut or lengthen rows"):
        cache.collator(lambda rows: {k: v[:, :4] for k, v in pad(rows).items()})([dataset[0], dataset[1]])


def test_a_mask_that_the_collator_makes_reaches_the_backbone(tmp_path):
    model, rows = disturb(attached()), some_rows()
    bare = [{"input_ids": row["input_ids"]} for row in rows]

    def masking(chosen):
        return pad([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in chosen])

    expected = cached(model, rows, tmp_path / "expected")
    cache = cache_layer_states(model, bare, tmp_path / "states", masking, dtype="float32", progress=False)
    torch.testing.assert_close(cache.read(cache.find(bare)), expected.read(expected.find(rows)))


def test_sizes_of_sound_are_planned_in_evaluation_mode():
    model = FAMILIES["wav2vec2"].build("audio").train()
    model.config.layerdrop = 1.0  # in training mode no block would run
    rows = [{"input_values": torch.randn(400)}]
    random = torch.get_rng_state()
    assert len(plan_cache(model, rows).places) == 1
    assert model.training and torch.equal(torch.get_rng_state(), random)


def test_extraction_leaves_the_model_as_it_was(tmp_path):
    model = disturb(attached()).train()
    before = pad(some_rows(3))
    modes = [m.training for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    cached(model, some_rows(), tmp_path / "states")
    assert modes == [m.training for m in model.modules()] and trains == [p.requires_grad for p in model.parameters()]
    assert model.active_adapter == "default" and model(**before).loss.requires_grad
