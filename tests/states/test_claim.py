"""Folders of caches that are exchanged, shared, deleted under a run, or left by a run that was killed."""

import errno
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from support import attached, tiny
from support_cache import cached, pad, some_rows

from fusion_adapters.states import LayerStateCache, StaleCacheError, cache_layer_states, extract, storage
from fusion_adapters.states.claim import LOCK, claimed

SMALL = {"batch_size": 4, "shard_bytes": 20_000}


@pytest.mark.parametrize("verify", [True, False])
def test_shards_of_another_cache_and_exchanged_ones_are_found(verify, tmp_path):
    first, second, rows = attached(), attached(model=tiny(seed=1)), some_rows(40)
    cached(first, rows, tmp_path / "first", **SMALL)
    cached(second, rows, tmp_path / "second", **SMALL)
    before = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()}
    foreign = (tmp_path / "second" / "shard-00001.safetensors").read_bytes()
    names = sorted(name for name in before if name.startswith("shard"))
    for changes in ({names[1]: foreign}, {names[0]: before[names[1]], names[1]: before[names[0]]}):
        for name, content in changes.items():
            (tmp_path / "first" / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"belong to another cache|belongs to another cache"):
            cache = LayerStateCache(tmp_path / "first", first, verify=verify)
            cache.read(cache.find(rows))
        cached(first, rows, tmp_path / "first", **SMALL)
        assert {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()} == before


def test_two_extractions_at_once_end_in_one_cache_and_one_refusal(tmp_path):
    rows, folder = some_rows(40), tmp_path / "states"
    models = [attached(), attached(model=tiny(seed=1))]
    ends: list = [None, None]

    def slow(chosen):
        time.sleep(0.02)
        return pad(chosen)

    def run(i):
        try:
            ends[i] = cache_layer_states(models[i], rows, folder, slow, dtype="float32", progress=False, **SMALL)
        except (RuntimeError, StaleCacheError) as error:
            ends[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [e for e in ends if isinstance(e, Exception)]
    assert len(refused) == 1 and "Another run is writing layer states" in str(refused[0])
    winner = next(i for i, e in enumerate(ends) if e not in refused)
    expected = cached(models[winner], rows, tmp_path / "expected", **SMALL)
    found = LayerStateCache(folder, models[winner])
    assert torch.equal(found.read(found.find(rows)), expected.read(expected.find(rows)))
    assert not (folder / LOCK).exists()


def test_a_run_whose_folder_was_deleted_or_begun_again_stops(tmp_path):
    rows, folder, other = some_rows(40), tmp_path / "states", attached(model=tiny(seed=1))
    calls = []

    def deleting(again):
        def collate(chosen):
            calls.append(1)
            if len(calls) == 4:
                shutil.rmtree(folder)
                if again:
                    cached(other, rows, folder, **SMALL)
            return pad(chosen)

        return collate

    for again in (False, True):
        calls.clear()
        with pytest.raises(FileNotFoundError, match="was deleted, or begun again by another run, while this one wrote"):
            cache_layer_states(attached(), rows, folder, deleting(again), dtype="float32", progress=False, **SMALL)
        if again:
            LayerStateCache(folder, other)
        assert folder.exists() == again


def test_a_claim_is_free_after_its_run(tmp_path):
    with claimed(tmp_path / "new"):
        with pytest.raises(RuntimeError, match="Another run is writing"), claimed(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / LOCK).exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with claimed(tmp_path / "there"):
        pass
    assert [*(tmp_path / "there").iterdir()] == []


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\): nothing keeps a second run"):
        cache = cached(attached(), some_rows(), tmp_path / "states")
    assert len(cache) == 12


def test_a_disk_that_fills_while_a_shard_is_written_is_said_and_the_run_goes_on_later(tmp_path, monkeypatch):
    model, rows, folder = attached(), some_rows(40), tmp_path / "states"
    cached(model, rows, tmp_path / "whole", **SMALL)
    written = []

    def filling(tensors, path, metadata):
        written.append(path)
        if len(written) == 4:
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"'.*shard-0000\d.* The disk is full: make room. Then run"),
    ):
        patch.setattr(storage, "save_file", filling)
        cached(model, rows, folder, **SMALL)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    cached(model, rows, folder, **SMALL)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("begun", [True, False])
def test_what_safetensors_itself_leaves_is_removed(begun, tmp_path):
    model, rows, folder = attached(), some_rows(), tmp_path / "states"
    if begun:
        cached(model, rows, folder)
    folder.mkdir(exist_ok=True)
    for name in (".tmpAb3xYz", LOCK):
        (folder / name).write_text("half")
    (folder / f".shard-00000.safetensors.{2**22 - 1}").mkdir()
    (folder / f".shard-00000.safetensors.{2**22 - 1}" / ".tmpQ0qQ0q").write_text("half")
    cached(model, rows, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["index.safetensors", "manifest.json", "shard-00000.safetensors"]


@pytest.mark.parametrize("step", ["write_plan", "read_manifest", "remove_leftovers"])
def test_a_folder_deleted_before_the_first_shard_is_told_as_that(step, tmp_path, monkeypatch):
    own = getattr(extract, step)

    def after_it_went(*args):
        shutil.rmtree(tmp_path / "states", ignore_errors=True)
        return own(*args)

    monkeypatch.setattr(extract, step, after_it_went)
    with pytest.raises(FileNotFoundError, match="was deleted, or begun again"):
        cached(attached(), some_rows(20), tmp_path / "states", **SMALL)
