"""Where layer states come from, and by what a cache knows it again."""

import hashlib

import torch
from support import attached, tiny
from support_cache import cached, some_rows

from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.backbone.fingerprint import fingerprints
from fusion_adapters.backbone.sampled import sampled_signature
from fusion_adapters.states import LayerStateCache, Source, cache_key, source_of


def test_a_backbone_without_adapters_is_a_source(tmp_path):
    model, rows = tiny().train(), some_rows()
    source = Source(find_backbones(model)[0])
    cache = cached(source, rows, tmp_path / "source", layers=range(5))
    expected = cached(model, rows, tmp_path / "model", layers=range(5))
    assert cache.manifest == expected.manifest
    assert torch.equal(cache.read(cache.find(rows)), expected.read(expected.find(rows)))
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert LayerStateCache(tmp_path / "source", attached()).wanted == [1, 2, 3, 4]


def test_a_source_is_what_the_model_was(tmp_path):
    model = attached(fusion_layers=[0, 2])
    source = source_of(model)
    assert (source.layers, source.adapters, source_of(source)) == ((0, 2, 4), "none", source)
    assert cache_key(source) == cache_key(model) == cache_key(tiny())
    with model.disable_adapter():
        assert source_of(model).layers == (4,)
    with source.quiet():
        assert not torch.is_grad_enabled() and source_of(model).layers == (4,)
    assert source_of(model).layers == (0, 2, 4)


def test_signatures_of_weights_are_those_of_earlier_versions():
    """Adapters and comparisons that were written with 0.1.0 hold these values."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 17 / 16).view_as(parameter))
    backbone = find_backbones(model)[0]
    assert sampled_signature(backbone) == "915b3bfa0c1c5c43"
    assert hashlib.sha256(fingerprints(backbone, saved="v1:")["v1"].encode()).hexdigest()[:16] == "d8b2ec6f19d96708"
