"""Margins, thresholds, calibration: against a slow reading of the paper's rule."""

import json
import math

import pytest
import torch
from families import FAMILIES
from support_exits import build, some_shortcuts
from support_text import tokenizer
from transformers import DataCollatorWithPadding

from fusion_adapters.shortcuts import (
    FUSED,
    IDENTITY,
    Margins,
    Readout,
    calibrate,
    choose_exits,
    exit_curve,
    exit_margins,
    frequent_tokens,
)
from fusion_adapters.shortcuts.early_exit.calibrate import saving
from fusion_adapters.shortcuts.early_exit.sure import margin, threshold


def drawn(n=600, layers=(2, 4, 6, 8), num_layers=10, texts=30, seed=0, better=True):
    """Margins where a layer that is sure is right the more often."""
    generator = torch.Generator().manual_seed(seed)
    margins = torch.rand(n, len(layers), generator=generator)
    if better:
        margins = margins ** (1.5 - 0.2 * torch.arange(len(layers)))
    agrees = torch.rand(n, len(layers), generator=generator) < 0.3 + 0.7 * margins
    rows = torch.arange(n) % texts
    return Margins("mat", layers, num_layers, margins, agrees, rows, torch.arange(n) // texts + 1)


def literal(margins, lam, length):
    """The paper's rule, position by position: agreement and mean layers."""
    right, layers = [], []
    for m, a, t in zip(margins.margins.tolist(), margins.agrees.tolist(), margins.places.tolist(), strict=True):
        decided = (True, margins.num_layers)
        for layer, sure, agree in zip(margins.layers, m, a, strict=True):
            if sure > 0.9 * lam + 0.1 * math.exp(-4 * t / length):
                decided = (agree, layer)
                break
        right.append(decided[0])
        layers.append(decided[1])
    return sum(right) / len(right), sum(layers) / len(layers)


@pytest.mark.parametrize("lam", [-1.112, -0.05, 0.0, 0.3, 0.77, 0.95, 1.0, 1.112])
def test_the_papers_rule(lam):
    margins = drawn()
    length = sum(t + 1 for t in margins.places.tolist()) / len(margins.places)
    assert margins.mean_length == pytest.approx(length)
    found = saving(margins, lam)
    agreement, layers = literal(margins, lam, length)
    assert (found.agreement, found.layers) == (pytest.approx(agreement), pytest.approx(layers))
    assert found.saved == pytest.approx(1 - layers / 10) and (found.positions, found.texts) == (600, 30)


def test_its_constants():
    places = torch.tensor([0.0, 5.0, 100.0])
    wanted = [0.9 * 0.7 + 0.1 * math.exp(-4 * t / 20) for t in places.tolist()]
    assert threshold(0.7, places, 20.0).tolist() == pytest.approx(wanted)
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    one, two = math.exp(3), math.exp(2)
    assert margin(logits).tolist() == pytest.approx([(one - two) / (one + two + math.e), 0.0])


def test_always_and_never():
    margins = drawn()
    curve = exit_curve(margins)
    assert len(curve) == 13 and [s.threshold for s in curve] == sorted(s.threshold for s in curve)
    assert (curve[0].layers, curve[-1].layers) == (2.0, 10.0) and curve[-1].agreement == 1
    assert (curve[0].looks, curve[-1].looks) == (0.0, 4.0)
    assert [s.saved for s in curve] == sorted((s.saved for s in curve), reverse=True)


@pytest.mark.parametrize("target", [0.8, 0.9, 0.95, 0.99, 1.0])
def test_the_lowest_threshold_that_keeps_the_agreement(target):
    margins = drawn()
    found = calibrate(margins, target)
    assert found.dev.agreement >= target
    # by trying many: at none from there on is the agreement lower, and not far below there is one that is
    tried = {lam: float(margins.leave(lam)[1].double().mean()) for lam in torch.linspace(-0.2, 1.112, 400).tolist()}
    assert all(agreement >= target - 0.003 for lam, agreement in tried.items() if lam > found.threshold)
    assert found.threshold <= max(lam for lam, agreement in tried.items() if agreement < target) + 0.03


def test_a_target_that_every_layer_keeps_leaves_at_the_first():
    margins = drawn()
    kept = Margins(**{**vars(margins), "agrees": torch.ones_like(margins.agrees)})
    assert calibrate(kept, 1.0).dev.layers == 2.0
    lost = Margins(**{**vars(margins), "agrees": torch.zeros_like(margins.agrees)})
    assert calibrate(lost, 0.999).dev.layers == 10.0


def test_test_data_are_judged_by_the_same_threshold():
    dev, test = drawn(), drawn(seed=1)
    found = calibrate(dev.only([4, 8]), 0.9, test)
    wanted = literal(test.only([4, 8]), found.threshold, dev.mean_length)
    assert (found.test.agreement, found.test.layers) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))
    assert found.layers == (4, 8) and found.test.threshold == found.threshold
    said = json.loads(json.dumps(found.as_json()))
    assert said["test"]["agreement"] == found.test.agreement and said["mean_length"] == dev.mean_length
    options = found.options(kv="cast", short_list=[3, 4])
    assert (options.layers, options.threshold, options.mean_length) == ((4, 8), found.threshold, dev.mean_length)
    assert (options.kind, options.kv, options.short_list) == ("mat", "cast", [3, 4])


def test_intervals_cover_what_texts_drawn_anew_give():
    """95 % intervals over texts, against texts that really are drawn anew."""
    seen = []
    for seed in range(60):
        found = saving(drawn(seed=seed), 0.6)
        seen.append((found.agreement, found.agreement_interval, found.saved, found.saved_interval))
    for at, name in ((0, "agreement"), (2, "saved")):
        mean = sum(s[at] for s in seen) / len(seen)
        covered = sum(s[at + 1][0] <= mean <= s[at + 1][1] for s in seen) / len(seen)
        assert 0.85 <= covered <= 1, name
    assert saving(drawn(texts=19), 0.6).saved_interval is None


def test_intervals_go_over_texts_and_not_over_positions():
    """Texts whose positions are all alike: the interval is that of 25 draws, however many positions they have."""
    texts, each = 25, 40
    sure = (torch.arange(texts) % 2 == 0).float().repeat_interleave(each)[:, None]
    rows = torch.arange(texts).repeat_interleave(each)
    margins = Margins("mat", (2,), 10, sure, sure > 2, rows, None)
    low, high = saving(margins, 0.5).saved_interval
    spread = 1.96 * math.sqrt(0.52 * 0.48 / texts) * 0.8
    assert (high - low) / 2 == pytest.approx(spread, rel=0.25)


def test_few_exits_are_chosen():
    generator = torch.Generator().manual_seed(0)
    n = 2000
    easy = torch.rand(n, generator=generator) < 0.4  # sure and right from layer 4 on; the others nowhere
    margins = torch.where(easy[:, None], torch.tensor([0.1, 0.9, 0.9, 0.9]), torch.full((n, 4), 0.05))
    agrees = easy[:, None] & torch.tensor([False, True, True, True])
    dev = Margins("mat", (2, 4, 6, 8), 10, margins, agrees, torch.arange(n) % 30, None)
    assert choose_exits(dev, 3, 0.95) == (4,)  # others add nothing
    # late exits of few tokens, which pay if looks are cheap
    late = torch.rand(n, generator=generator) < 0.2
    margins[late & ~easy, 3], agrees[late & ~easy, 3] = 0.9, True
    dev = Margins("mat", (2, 4, 6, 8), 10, margins, agrees, torch.arange(n) % 30, None)
    assert choose_exits(dev, 3, 0.95) == (4, 8)
    assert choose_exits(dev, 1, 0.95) == (4,)
    assert choose_exits(dev, 3, 0.95, look_cost=3.0) == (4,)
    with pytest.raises(ValueError, match="at least one"):
        choose_exits(dev, 0)


@pytest.mark.parametrize("target", [0.0, 1.2, -1.0])
def test_targets_that_are_none(target):
    with pytest.raises(ValueError, match="share of positions"):
        calibrate(drawn(), target)


def test_margins_that_do_not_fit_together():
    with pytest.raises(ValueError, match="same shortcuts"):
        calibrate(drawn(), 0.9, Margins(**{**vars(drawn()), "kind": "fused"}))
    with pytest.raises(ValueError, match=r"\[3\] of them"):
        drawn().only([2, 3])


# from a model


def rows_of(count=6, first=3):
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 5, 12, 7, 4, 10][:count]
    return [
        {"input_ids": torch.randint(first, 60, (n,), generator=generator).tolist(), "attention_mask": [1] * n}
        for n in lengths
    ]


@pytest.mark.parametrize("kind", ["mat", FUSED, IDENTITY])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_margins_of_a_language_model(family, kind):
    model, shortcuts, rows = build(family), some_shortcuts(), rows_of()
    readout = Readout(model)
    given = {"readout": readout, "batch_size": 2, "progress": False}
    found = exit_margins(model, shortcuts, rows, DataCollatorWithPadding(tokenizer()), kind, **given)
    assert found.layers == (1, 2, 3) and found.margins.shape == (sum(len(r["input_ids"]) - 1 for r in rows), 3)
    for number, row in enumerate(rows):
        at = found.rows == number
        assert found.places[at].tolist() == list(range(1, len(row["input_ids"])))  # all but the first
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        states = dict(enumerate(output.hidden_states[:-1]))
        for i, layer in enumerate(found.layers):
            with torch.no_grad():
                logits = readout(shortcuts.get(layer, kind=kind)(states))[0, 1:]
            two = logits.softmax(-1).topk(2).values
            assert torch.allclose(found.margins[at, i], two[:, 0] - two[:, 1], atol=1e-5)
            assert torch.equal(found.agrees[at, i], logits.argmax(-1) == output.logits[0, 1:].argmax(-1))


def test_masked_models_have_one_place():
    model = FAMILIES["bert"].build("masked")
    found = exit_margins(
        *(model, some_shortcuts(), rows_of(), DataCollatorWithPadding(tokenizer()), "mat", [1, 3]),
        readout=Readout(model),
        progress=False,
    )
    assert found.layers == (1, 3) and set(found.places.tolist()) == {3.0} and found.mean_length == 4
    assert len(found.margins) == sum(len(r["input_ids"]) for r in rows_of())


def test_margins_of_nothing():
    model = build("llama")
    given = {"readout": Readout(model), "progress": False}
    with pytest.raises(ValueError, match="no position"):
        exit_margins(model, some_shortcuts(), [], DataCollatorWithPadding(tokenizer()), **given)
    with pytest.raises(ValueError, match="no 'tuned' shortcut"):
        exit_margins(model, some_shortcuts(), rows_of(), DataCollatorWithPadding(tokenizer()), "tuned", **given)


def test_frequent_tokens():
    rows = [{"input_ids": [5, 5, 9, 2]}, {"input_ids": [9, 5, 1]}]
    assert frequent_tokens(rows, 2) == (5, 9)
    assert frequent_tokens(rows, 3) == (1, 5, 9)
    assert frequent_tokens(rows, 50) == (1, 2, 5, 9)
