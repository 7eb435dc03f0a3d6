"""Early exit of classifiers: who leaves, what the rest computes, and what is refused."""

import pytest
import torch
from families import DEPTH, FAMILIES, LABELS, WIDTH, inputs
from support_exits import ALWAYS, NEVER, layer_states, some_shortcuts

from fusion_adapters.backbone.fed import fed, watched
from fusion_adapters.shortcuts import (
    FUSED,
    IDENTITY,
    EarlyExit,
    EarlyExitClassifier,
    ExitOptions,
    calibrate,
    text_margins,
)
from fusion_adapters.shortcuts.early_exit.sure import margin
from fusion_adapters.shortcuts.saving import backbone_of

TEXTS = ("bert", "roberta", "distilbert", "deberta-v2", "modernbert", "albert", "llama", "gpt2", "gemma3")


def some(family, count=4):
    """Rows of several lengths."""
    found = [inputs(family, "sequence", seed=seed, padding="right") for seed in range(count // 2)]
    return {n: torch.cat([f[n] for f in found]) for n in found[0] if n != "labels"}


def after(model, batch, state):
    """What the model says if a state stands for the last block's: slow, one text at a time."""
    backbone, logits = backbone_of(model), []
    for i in range(len(state)):
        row = {n: v[i : i + 1] for n, v in batch.items()}
        with torch.no_grad():
            with watched(backbone) as seen:
                model(**row)
            with fed(backbone, seen.forms, {DEPTH: state[i : i + 1]}):
                logits.append(model(**row).logits)
    return torch.cat(logits)


@pytest.mark.parametrize("family", TEXTS)
def test_texts_leave_when_they_are_sure(family):
    model, shortcuts, batch = FAMILIES[family].build("sequence"), some_shortcuts(), some(family, 8)
    with torch.no_grad():
        plain = model(**batch).logits
    never = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], NEVER))(**batch)
    assert torch.equal(never.logits, plain) and never.layers.tolist() == [DEPTH] * 8 and never.saved == 0
    states = layer_states(model, batch, [1, 3])
    answers = {layer: after(model, batch, shortcuts.get(layer)(states)) for layer in (1, 3)}
    always = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], ALWAYS))(**batch)
    assert torch.allclose(always.logits, answers[1], atol=1e-5) and always.layers.tolist() == [1] * 8
    lam = float(torch.cat([margin(a) for a in answers.values()]).median())
    found = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], lam))(**batch)
    first, third = (margin(answers[layer]) > lam for layer in (1, 3))
    wanted = torch.where(first, 1, torch.where(third, 3, DEPTH))
    assert torch.equal(found.layers, wanted) and len(set(wanted.tolist())) > 1
    logits = torch.where(first[:, None], answers[1], torch.where(third[:, None], answers[3], plain))
    assert torch.allclose(found.logits, logits, atol=1e-5)


def test_the_rest_is_a_smaller_batch():
    model, batch, sizes = FAMILIES["bert"].build("sequence"), some("bert", 8), []
    for block in model.bert.encoder.layer:
        block.intermediate.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    shortcuts = some_shortcuts()
    looks = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], NEVER)).looks(batch)[0]
    lam = float(margin(looks[1]).sort().values[4]) - 1e-6  # four of eight are below
    sizes.clear()
    found = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], lam))(**batch)
    counts = [int((found.layers > layer).sum()) for layer in (0, 1, 1, 3)]
    assert counts[1] == 4 and sizes == [n for n in counts if n]


def test_fused_shortcuts_and_the_identity():
    model, shortcuts, batch = FAMILIES["bert"].build("sequence"), some_shortcuts(), some("bert", 8)
    states = layer_states(model, batch, range(4))
    for kind in (FUSED, IDENTITY):
        for layer in (1, 3):
            wanted = after(model, batch, shortcuts.get(layer, kind=kind)(states))
            found = EarlyExitClassifier(model, shortcuts, ExitOptions([layer], ALWAYS, kind))(**batch)
            assert torch.allclose(found.logits, wanted, atol=1e-5)
    # after some have left, the lower layers of the others are still right
    looks = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], NEVER, FUSED)).looks(batch)[0]
    one, three = margin(looks[1]), margin(looks[3])
    lam = next(lam for lam in one.tolist() if ((one <= lam) & (three > lam)).any() and (one > lam).any())
    found = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 3], lam, FUSED))(**batch)
    late = found.layers == 3
    assert late.any() and (found.layers == 1).any() and torch.allclose(found.logits[late], looks[3][late], atol=1e-5)


def test_margins_of_texts_and_their_calibration():
    model, shortcuts = FAMILIES["bert"].build("sequence"), some_shortcuts()
    batch = some("bert", 24)
    rows = [
        {"input_ids": i[m > 0].tolist(), "attention_mask": m[m > 0].tolist()} for i, m in zip(*batch.values(), strict=True)
    ]

    def collate(some_rows):
        length = max(len(row["input_ids"]) for row in some_rows)
        padded = {n: [row[n] + [0] * (length - len(row[n])) for row in some_rows] for n in some_rows[0]}
        return {n: torch.tensor(values) for n, values in padded.items()}

    margins = text_margins(model, shortcuts, rows, collate, batch_size=5, progress=False)
    assert margins.layers == (1, 2, 3) and margins.rows.sort().values.tolist() == list(range(24)) and margins.places is None
    looks, full = EarlyExitClassifier(model, shortcuts, ExitOptions([1, 2, 3], NEVER)).looks(batch)
    for i, layer in enumerate(margins.layers):
        assert torch.allclose(margins.margins[:, i], margin(looks[layer])[margins.rows], atol=1e-5)
        assert torch.equal(margins.agrees[:, i], (looks[layer].argmax(-1) == full.argmax(-1))[margins.rows])
    calibration = calibrate(margins.only([1, 3]), 0.8)
    found = EarlyExitClassifier(model, shortcuts, calibration.options())(**batch)
    assert float((found.logits.argmax(-1) == full.argmax(-1)).float().mean()) == pytest.approx(calibration.dev.agreement)
    assert float(found.layers.float().mean()) == pytest.approx(calibration.dev.layers)
    assert found.saved == pytest.approx(calibration.dev.saved) and calibration.dev.agreement >= 0.8


def test_the_model_is_left_as_it_was():
    model, batch = FAMILIES["bert"].build("sequence").train(), some("bert")
    exits = EarlyExitClassifier(model, some_shortcuts(), ExitOptions([2], ALWAYS))
    with pytest.raises(IndexError):
        exits(**{**batch, "input_ids": batch["input_ids"] + 1000})
    before = exits(**batch, labels=torch.zeros(4, dtype=torch.long)).logits
    assert torch.equal(exits(**batch).logits, before)
    assert model.training and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: FAMILIES["t5"].build("sequence"), "encoder-decoder"),
        (lambda: FAMILIES["llama"].build("causal"), "Take EarlyExit"),
        (lambda: FAMILIES["bert"].build("sequence", num_labels=1), "has 1 output"),
        (lambda: FAMILIES["bert"].build("sequence", problem_type="multi_label_classification"), "one of which holds"),
        (lambda: FAMILIES["bert"].build("sequence", hidden_size=64), "hidden size 32"),
    ],
)
def test_models_that_cannot_exit_early(build, says):
    with pytest.raises(ValueError, match=says):
        EarlyExitClassifier(build(), some_shortcuts(), ExitOptions([1], 0.5))


def test_classes_of_tokens_are_no_classes_of_texts():
    exits = EarlyExitClassifier(FAMILIES["bert"].build("token"), some_shortcuts(), ExitOptions([1], 0.5))
    with pytest.raises(ValueError, match=rf"\(4, 9, {LABELS}\).*whole texts"):
        exits(**some("bert"))


def test_each_takes_the_other_for_its_kind():
    with pytest.raises(ValueError, match="no head over a vocabulary"):
        EarlyExit(FAMILIES["llama"].build("sequence"), some_shortcuts(WIDTH), ExitOptions([1], 0.5))
