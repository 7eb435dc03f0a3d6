"""Cached layer states of the lower blocks (`fusion_depth`): extracted without those above, and taken from a cache of all."""

import pytest
import torch
from families import FAMILIES, attach, inputs
from support import attached, disturb, layer_of, tiny
from support_cache import cached, from_cache, loss_and_gradients, pad, rows_of, some_rows
from support_depth import running_parts

from fusion_adapters import cut_model
from fusion_adapters.states import LayerStateCache, StaleCacheError, cache_layer_states
from fusion_adapters.tuner import fusion_layers


def assert_alike(model, rows, cache):
    live, gradients = loss_and_gradients(model, pad(rows))
    replayed, found = loss_and_gradients(model, from_cache(cache, rows))
    torch.testing.assert_close(replayed, live, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "albert", "modernbert", "deberta-v2"])
def test_training_from_a_cache_is_live_training(family, tmp_path):
    model = disturb(attach(family, "token", fusion_depth=2))
    (layer,) = fusion_layers(model)
    rows = rows_of(inputs(family, "token"))
    with running_parts(model, layer.backbone) as calls:
        cache = cached(model, rows, tmp_path / "states")
    assert cache.layers == [1, 2]
    if family != "albert":
        assert [bool(count) for count in calls.values()] == [True, True, False, False]
    assert layer.taps.open_calls == 0
    assert_alike(model, rows, cache)
    part = disturb(attach(family, "token", model=cut_model(FAMILIES[family].build("token"), 2), fusion_depth=2))
    assert_alike(part, rows, LayerStateCache(tmp_path / "states", part))


def test_a_cache_of_all_layers_serves_every_depth(tmp_path):
    rows = some_rows(6)
    whole = cache_layer_states(tiny(), rows, tmp_path / "all", pad, dtype="float32", progress=False)
    assert whole.layers == [1, 2, 3, 4]
    for depth in (1, 2, 3, 4):
        model = disturb(attached(fusion_depth=depth))
        assert_alike(model, rows, LayerStateCache(tmp_path / "all", model))
        assert layer_of(model).running.num_layers == depth


def test_whose_cache_it_is(tmp_path):
    rows = some_rows(6)
    cached(attached(fusion_depth=2), rows, tmp_path / "two")
    for other in (attached(), attached(fusion_depth=3), attached(model=tiny(seed=1), fusion_depth=2)):
        with pytest.raises(StaleCacheError):
            LayerStateCache(tmp_path / "two", other)
    cached(attached(), rows, tmp_path / "all")
    with pytest.raises(StaleCacheError, match="4 blocks of width 32 in the cache, bert, 2 blocks"):
        LayerStateCache(tmp_path / "all", attached(model=cut_model(tiny(), 2), fusion_depth=2))
    # what is above does not count
    other = tiny()
    with torch.no_grad():
        other.bert.encoder.layer[3].output.dense.weight.mul_(2)
    assert LayerStateCache(tmp_path / "two", attached(model=other, fusion_depth=2)).layers == [1, 2]
    assert LayerStateCache(tmp_path / "two", cut_model(tiny(), 2)).layers == [1, 2]
