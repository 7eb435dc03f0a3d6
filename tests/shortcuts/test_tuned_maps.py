"""Shortcuts trained by the divergence of what the head says."""

import pytest
import torch
from support_linear import DEPTH, WIDTH, padded, some_rows
from support_linear import decoder as tame

from fusion_adapters.shortcuts import (
    FitOptions,
    Readout,
    ShortcutSet,
    TuneOptions,
    fit_shortcuts,
    load_shortcuts,
    save_shortcuts,
    tune_shortcuts,
)
from fusion_adapters.shortcuts.stream import Choice, stream
from fusion_adapters.shortcuts.teaching import Teacher, divergence
from fusion_adapters.states import cache_layer_states, source_of

ROWS, OTHERS = some_rows(100), some_rows(40, seed=1)
OPTIONS = {"epochs": 4, "per_step": 64, "rate": 3e-3, "held_out": 0.2}


def decoder(family="llama", **settings):
    """One of which least squares leave much to gain: its blocks are far from linear."""
    return tame(family, initializer_range=0.5, **settings)


def fitted(model, rows=ROWS, **options):
    options = {"sources": [1, 2], "fused": [0], "ridge": 1e-3, **options}
    return fit_shortcuts(model, rows, padded, FitOptions(**options), progress=False).shortcuts


def tuned(model, shortcuts, rows=ROWS, cache=None, **options):
    return tune_shortcuts(model, shortcuts, rows, padded, TuneOptions(**{**OPTIONS, **options}), cache=cache, progress=False)


def mean_divergence(model, shortcut, rows):
    """Written out: the mean KL of the model's tokens from those after the cast."""
    readout, found = Readout(model), []
    layers = [*shortcut.sources, DEPTH]
    with torch.no_grad():
        for chunk in stream(source_of(model), rows, layers, padded, Choice(skip=1)):
            p = readout(chunk.states[DEPTH]).double().softmax(-1)
            q = readout(shortcut(chunk.states)).double().softmax(-1)
            found.append((p * (p.log() - q.log())).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"rank": 6}, {"bias": False}], ids=["whole", "low rank", "no bias"])
def test_training_lowers_the_divergence_on_other_rows(family, options):
    model = decoder(family)
    start = fitted(model, **options)
    given = {name: t.clone() for name, t in start.state_dict().items()}
    result = tuned(model, start)
    assert [(s.kind, s.sources) for s in result.shortcuts] == [
        *(("mat", (1,)), ("mat", (2,)), ("fused", (0, 1)), ("fused", (0, 2))),
        *(("kl", (1,)), ("kl", (2,)), ("kl fused", (0, 1)), ("kl fused", (0, 2))),
    ]
    assert all(torch.equal(t, given[name]) for name, t in start.state_dict().items())
    for kind, before in (("kl", "mat"), ("kl fused", "fused")):
        for layer in (1, 2):
            after, first = result.shortcuts.get(layer, kind=kind), start.get(layer, kind=before)
            assert (after.rank, after.bias is None) == (first.rank, first.bias is None)
            assert mean_divergence(model, after, OTHERS) < 0.97 * mean_divergence(model, first, OTHERS)
    for tuning in result.tunings:
        assert len(tuning.divergences) == 1 + OPTIONS["epochs"] and tuning.best > 0
        assert tuning.divergences[tuning.best] == min(tuning.divergences)


def test_what_is_reported_is_the_divergence_of_what_is_kept():
    model = decoder()
    result = tuned(model, fitted(model), held_out=0.5, epochs=2, judged=10_000)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))
    apart = [ROWS[i] for i in order[:50].tolist()]
    assert result.held_out == sum(len(row["input_ids"]) - 1 for row in apart)
    assert result.positions + result.held_out == sum(len(row["input_ids"]) - 1 for row in ROWS)
    for tuning in result.tunings:
        kept = result.shortcuts.get(tuning.source, kind=tuning.kind)
        assert mean_divergence(model, kept, apart) == pytest.approx(tuning.divergences[tuning.best], rel=2e-3)


def test_rows_to_watch_are_not_trained_on_and_choose_the_best():
    model = decoder()
    start = fitted(model, fused=None)
    result = tune_shortcuts(
        model, start, ROWS, padded, TuneOptions(**OPTIONS, judged=10_000), watched=OTHERS, progress=False
    )
    assert result.positions == sum(len(row["input_ids"]) - 1 for row in ROWS)
    assert result.held_out == sum(len(row["input_ids"]) - 1 for row in OTHERS)
    for tuning in result.tunings:
        kept = result.shortcuts.get(tuning.source, kind="kl")
        assert mean_divergence(model, kept, OTHERS) == pytest.approx(tuning.divergences[tuning.best], rel=2e-3)


def test_a_training_that_only_harms_gives_back_the_start():
    model = decoder()
    start = fitted(model)
    result = tuned(model, start, rate=1e3, epochs=1)
    assert {t.best for t in result.tunings} == {0}
    for layer in (1, 2):
        for kind, before in (("kl", "mat"), ("kl fused", "fused")):
            assert torch.equal(result.shortcuts.get(layer, kind=kind).weight, start.get(layer, kind=before).weight)
            assert torch.equal(result.shortcuts.get(layer, kind=kind).bias, start.get(layer, kind=before).bias)


def test_the_same_seed_gives_the_same_maps_and_another_others():
    model = decoder()
    start = fitted(model, fused=None)
    first, again, other = (tuned(model, start, epochs=2, seed=seed).shortcuts for seed in (0, 0, 1))
    assert torch.equal(first.get(1, kind="kl").weight, again.get(1, kind="kl").weight)
    assert not torch.equal(first.get(1, kind="kl").weight, other.get(1, kind="kl").weight)


def test_states_of_a_cache_do_as_well(tmp_path):
    model = decoder()
    start = fitted(model)
    cache = cache_layer_states(model, ROWS, tmp_path, padded, layers=range(DEPTH + 1), dtype="float16", progress=False)
    live, cached = tuned(model, start, epochs=2), tuned(model, start, epochs=2, cache=cache)
    assert cached.positions == live.positions
    for layer in (1, 2):
        assert torch.allclose(
            *(t.shortcuts.get(layer, kind="kl fused").weight for t in (live, cached)), atol=1e-4, rtol=1e-3
        )
    few = cache_layer_states(model, ROWS, tmp_path / "few", padded, layers=[DEPTH], progress=False)
    with pytest.raises(ValueError, match=r"no states of layers \[0, 1, 2\]"):
        tuned(model, start, cache=few)


def test_a_part_of_the_vocabulary_stands_for_all_of_it():
    torch.manual_seed(0)
    model = decoder(vocab_size=400)
    readout = Readout(model)
    teacher = Teacher(readout, torch.float32, 100)
    true, cast = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    likely = teacher.likely(true)
    assert torch.equal(likely, readout(true).topk(16).indices)
    whole = divergence(teacher.says(true), readout(cast))
    found = []
    for seed in range(200):
        words = teacher.draw(likely, torch.Generator().manual_seed(seed))
        kept = len(likely.unique())
        assert len(words.head) == kept + 100
        # as many as there are, counted as often as they stand for others
        assert float(words.offsets.exp().sum()) == pytest.approx(400, rel=1e-5)
        found.append(divergence(teacher.says(true, words), teacher.logits(cast, words)))
        assert torch.equal(divergence(teacher.says(true, words), teacher.logits(true, words)), torch.zeros(8))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - whole).abs() < 4 * error + 0.01 * whole).all()
    every = Teacher(readout, torch.float32, 199).draw(likely, torch.Generator())
    assert len(every.head) == kept + 199
    assert Teacher(readout, torch.float32, 200).linear is None and Teacher(readout, torch.float32, None).linear is None


def test_a_drawn_vocabulary_trains_nearly_as_the_whole():
    model = decoder(vocab_size=400)
    start = fitted(model, fused=None)
    before = mean_divergence(model, start.get(2), OTHERS)
    drawn, whole = (
        mean_divergence(model, tuned(model, start, drawn=n).shortcuts.get(2, kind="kl"), OTHERS) for n in (64, None)
    )
    assert drawn < before and drawn - whole < 0.2 * (before - whole)


def test_a_head_behind_which_something_is_done_is_taught_whole():
    model = decoder(vocab_size=400)
    readout = Readout(model)
    readout.chain = None  # as where logits are scaled or capped outside of a module
    result = tune_shortcuts(
        model, fitted(model, fused=None), ROWS[:50], padded, TuneOptions(**OPTIONS, drawn=8), readout=readout, progress=False
    )
    assert all(tuning.best > 0 for tuning in result.tunings)


def test_trained_maps_are_saved_beside_the_others(tmp_path):
    model = decoder()
    result = tuned(model, fitted(model), epochs=1).shortcuts
    save_shortcuts(result, model, tmp_path)
    again = load_shortcuts(tmp_path, model)
    assert again.kinds() == ["mat", "fused", "kl", "kl fused"]
    for kind in ("kl", "kl fused"):
        assert torch.equal(again.get(2, kind=kind).weight, result.get(2, kind=kind).weight)


def test_labelled_positions_alone():
    model = decoder()
    rows = [{**row, "labels": [7 if i in (2, 5) else -100 for i in range(len(row["input_ids"]))]} for row in ROWS]
    result = tuned(model, fitted(model, fused=None), rows=rows, positions="labelled", epochs=1)
    assert result.positions + result.held_out == 2 * len(ROWS)


def test_nothing_of_the_model_trains_or_changes():
    model = decoder().train().requires_grad_(True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = tuned(model, fitted(model), epochs=1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert not any(p.requires_grad for p in result.shortcuts.parameters())


def test_errors_name_the_remedy():
    model = decoder()
    start = fitted(model, fused=None)
    with pytest.raises(ValueError, match="kinds to it are: mat"):
        tuned(model, start, kinds=["fused"])
    with pytest.raises(ValueError, match="Fit some"):
        tuned(model, ShortcutSet([], WIDTH, DEPTH))
    with pytest.raises(ValueError, match="Give more rows"):
        tuned(model, start, rows=ROWS[:1])
    with pytest.raises(ValueError, match="longer"):
        tuned(model, start, rows=[{"input_ids": [3], "attention_mask": [1]}])
    with pytest.raises(ValueError, match="Give the model, or its readout"):
        tuned(source_of(model), start)
    with pytest.raises(ValueError, match="hidden size"):
        tuned(decoder(hidden_size=32), start)
    broken = decoder()
    broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        tuned(broken, start)
    for wrong in ({"kinds": "mat"}, {"kinds": ["identity"]}, {"rate": 0}, {"epochs": 0}, {"drawn": 0}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TuneOptions(**wrong)


def test_large_states_are_held_in_float32():
    model = decoder()
    model.model.embed_tokens.weight[:, 3] = 1e5
    start = fitted(model, fused=None)
    result = tuned(model, start, epochs=1)
    assert all(torch.isfinite(torch.tensor(t.divergences)).all() for t in result.tunings)
